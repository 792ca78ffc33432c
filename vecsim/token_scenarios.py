"""The lowering of the token model: an engine -> the numbers of a scenario, and what scenarios share."""

from typing import Any

import numpy as np

from vecsim.batching import CustomBatcher, check_budget, policy_of
from vecsim.control_plane import ControlPlane
from vecsim.engine import Engine
from vecsim.fleet import DisaggregatedEngine, Fleet, listed
from vecsim.kernel.state import Array
from vecsim.kv_cache import ENDLESS, KVCache
from vecsim.load import (
    AT_ONCE,
    CLOSED,
    SLO,
    TRACED,
    TURNS,
    ConcurrentLoadGenerator,
    PiecewiseLoadGenerator,
    RequestClass,
    Stream,
    TraceLoadGenerator,
)
from vecsim.roofline import RooflineStepTime
from vecsim.scaling import CustomPlanner
from vecsim.step_time import CustomStepTime, TableStepTime, flat_tables, kernel_of

# Fields that are columns of the table: an axis over one of them costs no declaration per value.
TOKEN_COLUMNS = {
    "max_batch_size": "slots",
    "batcher.parameter": "parameter",
    "batcher.max_num_batched_tokens": "budget",
    "batcher.chunk_tokens": "budget",
    "load_generator.seed": "seed",
    "load_generator.request_rate": "request_rate",
    "load_generator.rate_scale": "request_rate",
    "load_generator.target_concurrency": "requests",
}

ENDLESS_REQUESTS = 2.0**52


class TokenTables:
    """What scenarios of the token model share: traces, classes, stages, step-time tables."""

    def __init__(self) -> None:
        self.places: dict[Any, tuple[int, ...]] = {}  # of what is here already
        self.stages: list[tuple[float, float]] = []
        self.times: list[Array] = []  # of traces' arrivals
        self.ids: list[Array] = []  # of traces' blocks
        self.id_counts: list[Array] = []
        self.classes: list[tuple[float, ...]] = []
        self.terms: list[Array] = []
        self.grids: list[Array] = []
        self.values: list[Array] = []
        self.class_names: tuple[str, ...] | None = None
        self.fleets: list[tuple[float, ...]] = []
        self.groups: list[tuple[float, ...]] = []
        self.events: list[tuple[float, float]] = []  # of fleets: crashes, outages
        self.planners: list[float] = []  # their numbers

    @staticmethod
    def fields() -> tuple[str, ...]:
        """The numbers of a scenario, in their order."""
        from vecsim.kernel.token_scenarios import FIELDS

        return FIELDS

    def place(self, key: Any, put: Any) -> tuple[int, ...]:
        """Where something is; `put` puts it there if it's new."""
        if key not in self.places:
            self.places[key] = put()
        return self.places[key]

    def put_stages(self, load: PiecewiseLoadGenerator) -> tuple[int, ...]:
        first = len(self.stages)
        self.stages += zip(load.durations, load.request_rates, strict=True)
        return first, len(load.durations)

    def put_times(self, load: TraceLoadGenerator) -> tuple[int, ...]:
        first = sum(len(times) for times in self.times)
        self.times.append(load.arrived_at.array)
        return (first,)

    def put_ids(self, load: TraceLoadGenerator) -> tuple[int, ...]:
        first = sum(len(counts) for counts in self.id_counts)
        most = max((int(ids.max(initial=-1)) + 1 for ids in self.ids), default=0)
        self.ids.append(load.block_ids.array + most)
        self.id_counts.append(load.block_counts.array)
        return (first,)

    def put_classes(self, classes: tuple[RequestClass, ...], slo: SLO | None) -> tuple[int, ...]:
        first = len(self.classes)
        for kind in classes or (RequestClass(name="all"),):
            own = kind.slo or slo or SLO()
            limits = (np.inf if limit is None else limit for limit in (own.ttft, own.tpot, own.itl, own.e2e))
            self.classes.append((float(kind.priority), *limits))
        return (first,)

    def put_fleet(self, rows: list[dict[str, Any]], cluster: Fleet) -> tuple[int, ...]:
        place, first = len(self.fleets), len(self.groups)
        if cluster.changes and isinstance(cluster, DisaggregatedEngine):  # what crashes elsewhere is prefilled anew
            prefills = len(listed(cluster.prefill))
            rows = [row | {"returns": number < prefills} for number, row in enumerate(rows)]
        self.groups += (
            (
                *(float(row[name]) for name in self.fields()),
                *(places, pool.workers, *pool.start_up, pool.gpus),
                *(pool.kv_cache or KVCache()).tier_numbers(),
            )
            for row, pool, places in zip(rows, cluster.pools, cluster.places(), strict=True)
        )
        control = self.control_numbers(cluster)
        numbers = (first, len(rows), sum(cluster.places()), *cluster.kernel().values(), *control)
        self.fleets.append(tuple(map(float, numbers)))
        return (place,)

    def control_numbers(self, fleet: Fleet) -> tuple[float, ...]:
        """How a fleet's workers come and go, as the kernel has it; what is scheduled is put to `events`."""
        plane = fleet.control_plane
        first = len(self.events)
        if plane is not None:
            self.events += [*plane.crashes, *plane.outages]
        plane = plane or ControlPlane()
        numbers = () if fleet.scaling is None else fleet.scaling.numbers()
        planner = (-1 if fleet.scaling is None else fleet.scaling.code, len(self.planners), len(numbers))
        self.planners += numbers
        return (fleet.changes, *plane.kernel(), first, len(plane.crashes), len(plane.outages), *planner)

    def put_tables(self, step_time: TableStepTime | RooflineStepTime) -> tuple[int, ...]:
        from vecsim.kernel.duration import AXIS, GRID, VALUES_AT

        first = sum(len(terms) for terms in self.terms)
        if isinstance(step_time, RooflineStepTime):
            self.terms.append(np.array([step_time.coefficients()]))
            return first, 1
        terms, grids, values = flat_tables(step_time.terms)
        terms[:, GRID] += sum(len(part) for part in self.grids)
        terms[:, GRID + 1] += np.where(terms[:, AXIS + 1] >= 0, sum(len(part) for part in self.grids), 0)
        terms[:, VALUES_AT] += sum(len(part) for part in self.values)
        self.terms.append(terms)
        self.grids.append(grids)
        self.values.append(values)
        return first, len(terms)


# The user's own functions of a scenario, where it has none: a batcher's rule, a step time, a router, a planner
NO_RULES = (None, None, None, None)


def functions_of(engine: Engine) -> tuple[Any, Any, Any, Any]:
    """An engine's functions of the user's own."""
    batcher, step_time = engine.batcher, engine.step_time
    return (
        batcher.rule if isinstance(batcher, CustomBatcher) else None,
        step_time.rule if isinstance(step_time, CustomStepTime) else None,
        None,
        None,
    )


def place_of(functions: tuple[Any, ...], rules: dict[Any, int]) -> int:
    """The place of functions of the user's own in all those of a table; -1 if there are none."""
    return -1 if functions == NO_RULES else rules.setdefault(functions, len(rules))


def token_parameters(
    engine: Engine, time_limit: float, shared: TokenTables, rules: dict[Any, int]
) -> tuple[list[Stream], dict[str, Any]]:
    """(streams of whole numbers, one row of the table) of an engine; what scenarios share is put into `shared`."""
    load, batcher, step_time = engine.load_generator, engine.batcher, engine.step_time
    memory = (engine.kv_cache or KVCache()).kernel()
    streams = load.streams()
    tables = (
        shared.place(step_time, lambda: shared.put_tables(step_time))
        if isinstance(step_time, TableStepTime | RooflineStepTime)
        else (0, 0)
    )
    classes = shared.place(("classes", load.classes, engine.slo), lambda: shared.put_classes(load.classes, engine.slo))
    names = tuple(kind.name for kind in load.classes)
    if shared.class_names is None:
        shared.class_names = names
    elif shared.class_names != names:
        raise ValueError("the classes' names must be the same throughout a sweep")
    row: dict[str, Any] = {
        **policy_of(batcher, engine.max_batch_size, engine.max_model_len, memory["block_size"]),
        **memory,
        **kernel_of(step_time, memory["blocks"] * memory["block_size"], engine.overheads.per_step),
        "tables": tables[0],
        "terms": tables[1],
        "needs_budget": batcher.needs_budget,
        "arrivals": load.arrivals,
        "request_rate": 1.0,
        "requests": ENDLESS_REQUESTS,
        "shape": 1.0,
        "rate_factor": 1.0,
        "think_time": load.think_time if isinstance(load, ConcurrentLoadGenerator) else 0.0,
        "stage": 0,
        "stages": 0,
        "repeats": 0,
        "capped": load.max_tokens is not None,
        "prefix_tokens": 0 if load.prefix is None else load.prefix.tokens,
        "prefix_groups": 1 if load.prefix is None else load.prefix.groups,
        "sessions": load.sessions is not None,
        "session_think": 0.0 if load.sessions is None else load.sessions.think_time,
        "trace": -1,
        "id_blocks": 1,
        "trace_times": 0,
        "first_class": classes[0],
        "classes": len(load.classes),
        "before_queue": engine.overheads.before_queue,
        "per_token": engine.overheads.per_output_token,
        "at_completion": engine.overheads.at_completion,
        "fleet": -1,
        "seed": load.seed,
        "offset": load.stream_offset,
        "functions": place_of(functions_of(engine), rules),
        **load.arrival_parameters(),
    }
    if isinstance(load, PiecewiseLoadGenerator):
        key = ("stages", load.durations, load.request_rates)
        row["stage"], row["stages"] = shared.place(key, lambda: shared.put_stages(load))
        row["repeats"] = load.repeat
        row["rate_factor"] = load.mean_rate(time_limit)
    if isinstance(load, TraceLoadGenerator):
        (row["trace_times"],) = shared.place(("times", load.arrived_at), lambda: shared.put_times(load))
        if load.block_ids is not None:
            key = ("ids", load.block_ids, load.block_counts)
            (row["trace"],) = shared.place(key, lambda: shared.put_ids(load))
            row["id_blocks"] = max((load.id_block_tokens or 1) // memory["block_size"], 1)
    return streams, row


def fleet_parameters(
    cluster: Fleet, time_limit: float, shared: TokenTables, rules: dict[Any, int]
) -> tuple[list[Stream], dict[str, Any]]:
    """`token_parameters` of a fleet: the numbers of one engine as large as all its workers, and where theirs are.

    Raises
    ------
    ValueError
        When its pools have different functions of the user's own.
    """
    made = [token_parameters(engine, time_limit, shared, rules) for engine in cluster.engines()]
    streams, rows = made[0][0], [row for _, row in made]
    own = {functions_of(engine) for engine in cluster.engines()}
    if len(own) > 1:
        raise ValueError("the pools of a fleet must have the same rules of one's own, or none")
    planner = cluster.scaling.rule if isinstance(cluster.scaling, CustomPlanner) else None
    functions = (*own.pop()[:2], cluster.own_router(), planner)
    counts = cluster.places()
    blocks = [row["blocks"] for row in rows]
    key = (
        "fleet",
        cluster.pools,
        cluster.control_plane,
        cluster.scaling,
        cluster.overheads.per_step,
        *cluster.kernel().values(),
    )
    (place,) = shared.place(key, lambda: shared.put_fleet(rows, cluster))
    caching = next((row for row in rows if row["caching"]), rows[0])  # all that cache have blocks of one size
    row = {
        **rows[0],
        **{name: caching[name] for name in ("block_size", "shift", "id_blocks")},
        "slots": sum(row["slots"] * count for row, count in zip(rows, counts, strict=True)),
        "blocks": ENDLESS
        if ENDLESS in blocks
        else sum(size * count for size, count in zip(blocks, counts, strict=True)),
        "caching": any(row["caching"] for row in rows),
        "needs_budget": False,
        "functions": place_of(functions, rules),
        "fleet": place,
    }
    return streams, row


def check_columns(columns: dict[str, Array]) -> None:
    """Refuse combinations of axes that no declaration was made of.

    Raises
    ------
    ValueError
        When a budget is below the slots.
    """
    budget, slots, needs = np.broadcast_arrays(columns["budget"], columns["slots"], columns["needs_budget"])
    wrong = (needs > 0) & (budget < slots)
    if wrong.any():
        check_budget(budget[wrong][0], slots[wrong][0])


def token_requests_needed(columns: dict[str, Array], time_limit: float, more: float) -> Array:
    """How many requests to draw for each scenario; see `vecsim.scenarios.requests_needed`."""
    arrivals, requests = columns["arrivals"], columns["requests"].astype(np.float64)
    if np.isfinite(time_limit):
        expected = columns["request_rate"] * columns["rate_factor"] * time_limit
        spread = 8.0 * np.sqrt((expected + 1.0) / columns["shape"]) + 16.0
        due = (expected + spread) * more
    else:
        due = np.full_like(requests, np.inf)
    due = np.where((arrivals == AT_ONCE) | (arrivals == TRACED), requests, np.minimum(due, requests))
    closed = requests + (8.0 * requests + 1000.0) * more * more
    count = np.where(arrivals == CLOSED, closed, due) + 1.0
    turns = columns[f"mean{TURNS}"]
    return np.where(columns["sessions"] > 0, count * (1.1 * turns + 1.0) * more, count)


def refuse_endless(columns: dict[str, Array], time_limit: float) -> None:
    """Refuse a load that never ends where there is no time limit.

    Raises
    ------
    ValueError
        When there is one.
    """
    if np.isfinite(time_limit):
        return
    endless = (columns["arrivals"] == CLOSED) | (columns["requests"] >= ENDLESS_REQUESTS)
    if endless.any():
        raise ValueError("time_limit must be given where the load has no end (a closed loop, or no number of requests)")
