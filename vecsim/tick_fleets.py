"""Clusters of the tick model: their lowering, what their kernel works in and is called with, and the steps of a run."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim import memory
from vecsim.batching import BATCHERS, CustomBatcher, IFBatcher
from vecsim.kernel.state import REFUSED, Array, ClusterOutcome, ClusterScratch, Job
from vecsim.routing import ROUTERS, CustomRouter

if TYPE_CHECKING:
    import xarray as xr

    from vecsim.fleet import Cluster
    from vecsim.scenarios import Block


LONG = 4.0  # the longest output, as multiples of the mean: a guess that memory is planned with


class TickFleets:
    """The different clusters of a table, their groups of equal workers, and their rules of the user's own."""

    def __init__(self) -> None:
        self.places: dict[Any, int] = {}
        self.fleets: list[tuple[int, ...]] = []
        self.groups: list[tuple[float, ...]] = []
        self.rules: dict[tuple[str, Any], int] = {}  # (kind, function) -> place

    def put(self, cluster: "Cluster") -> int:
        """The place of a cluster, put there if it's new; columns as in `vecsim.kernel.tick_cluster`."""
        key = cluster.pools, cluster.router
        if key in self.places:
            return self.places[key]
        first = len(self.groups)
        for pool in cluster.pools:
            batcher = pool.batcher
            code, parameter, rule = 0, 0.0, -1
            if isinstance(batcher, CustomBatcher):
                parameter, rule = batcher.parameter, self._rule("tick", batcher.rule)
            else:
                code = BATCHERS.index(type(batcher))
            self.groups.append(tuple(map(float, (pool.workers, pool.max_batch_size, code, parameter, rule))))
        router = cluster.router
        rule = self._rule("router", router.rule) if isinstance(router, CustomRouter) else -1
        self.fleets.append((first, len(cluster.pools), cluster.workers, ROUTERS.index(type(router)), rule))
        return self.places.setdefault(key, len(self.fleets) - 1)

    def _rule(self, kind: str, rule: Any) -> int:
        return self.rules.setdefault((kind, rule), len(self.rules))

    @property
    def workers(self) -> Array:
        """Workers of each [fleet]."""
        return np.array([fleet[2] for fleet in self.fleets], np.int64)

    def addresses(self) -> Array:
        """Where the machine code of each rule is [rule]; compiles those that aren't yet."""
        if not self.rules:
            return np.zeros(0, np.int64)
        from vecsim.kernel.address import COUNT
        from vecsim.kernel.custom import rule_address

        return np.array([rule_address(rule, kind, COUNT)[1] for kind, rule in self.rules], np.int64)

    def kernel(self) -> Callable[[int, int, Job], ClusterOutcome]:
        """What runs scenarios of these clusters; a ValueError when a rule raises or returns what can't be."""
        from vecsim.kernel.custom import guarded
        from vecsim.kernel.tick_cluster import run_clusters

        fleets, groups, rules = np.array(self.fleets, np.int64), np.array(self.groups), self.addresses()

        def run_all(first: int, last: int, job: Job) -> ClusterOutcome:
            outcome: ClusterOutcome = run_clusters(first, last, job, fleets, groups, rules)
            return outcome

        if not self.rules:
            return run_all
        names = {at: rule.py_func.__name__ for at, (_, rule) in zip(rules.tolist(), self.rules, strict=True)}
        run_guarded = guarded(run_all, " or ".join(names.values()))

        def run(first: int, last: int, job: Job) -> ClusterOutcome:
            outcome: ClusterOutcome = run_guarded(first, last, job)
            if outcome.status == REFUSED:
                raise ValueError(_refusal(job.scratch, names))
            return outcome

        return run


def _refusal(scratch: ClusterScratch, names: dict[int, str]) -> str:
    """What a rule returned that can't be; `names` are those of the addresses."""
    from vecsim.kernel.tick_cluster import ADMITTED, CLOCK, IN_BATCH, IN_QUEUE, REFUSED_AT, RULE, SLOTS

    worker = int(scratch.totals[REFUSED_AT])
    slots, running, queued, rule = (int(scratch.counts[worker, column]) for column in (SLOTS, IN_BATCH, IN_QUEUE, RULE))
    return (
        f"rule {names[rule]} must return 0 to {slots - running} requests (batch.free), got {scratch.totals[ADMITTED]} "
        f"at {scratch.times[worker, CLOCK]:g} ticks with {running} running, {queued} queued at worker {worker}"
    )


def cluster_columns(cluster: "Cluster", fleets: TickFleets) -> dict[str, Any]:
    """What a row of the table has of a cluster, its workers taken as one engine where that bounds its requests."""
    kinds = {type(pool.batcher) for pool in cluster.pools}
    kind = kinds.pop() if len(kinds) == 1 else IFBatcher
    return {
        "batcher": BATCHERS.index(kind if kind in BATCHERS else IFBatcher),
        "parameter": 0.0,
        "max_batch_size": cluster.max_batch_size,
        "workers": cluster.workers,
        "fleet": fleets.put(cluster),
    }


def ring_steps(longest: Any, chunks: Any, time_limit: float) -> Any:
    """Places in the ring of a worker: a power of two above the furthest step at which a request can end in the run."""
    furthest = np.minimum(longest + chunks, most_steps(time_limit))
    return np.maximum(8, 2 ** np.ceil(np.log2(furthest + 1.0))).astype(np.int64)


def most_steps(time_limit: float) -> int:
    """More boundaries than a worker can have: a step takes a tick or more."""
    return int(time_limit) + 3


def worker_bytes(fleets: TickFleets, columns: dict[str, Array], time_limit: float) -> float:
    """What the workers of the largest scenario take of a thread's scratch, about: lengths aren't drawn yet."""
    longest = LONG * columns["mean0"]
    rings = ring_steps(longest, columns["total_prefill_chunks"], time_limit)
    return float((fleets.workers[columns["fleet"]] * (4.0 * rings + 280.0)).max())


def new_scratch(block: "Block", fleets: TickFleets, time_limit: float, longest: Array) -> ClusterScratch:
    """What a thread needs for the largest scenarios of a block of clusters; `longest` output of each stream.

    Raises
    ------
    ValueError
        When it would not fit in memory.
    """
    from vecsim.kernel.quantiles import BINS
    from vecsim.kernel.routing import ABLE, SURVEY_ROWS
    from vecsim.kernel.tally import LATENCIES
    from vecsim.kernel.tick_cluster import COUNTS, TIMES, TOTALS

    scenarios, requests = block.scenarios, block.most_requests + 1
    each = fleets.workers[scenarios.fleet]
    rings = ring_steps(longest[scenarios.length_stream], scenarios.total_prefill_chunks, time_limit)
    workers, places = int(each.max()), int((each * rings).max())
    memory.require(
        4.0 * places,
        f"the calendars of {workers:,} workers",
        "fewer workers, shorter outputs, a shorter time_limit or fewer threads",
    )
    size = 1 << (workers - 1).bit_length()
    slots = int(max(group[1] for group in fleets.groups))
    survey = np.zeros((SURVEY_ROWS, workers))
    survey[ABLE] = 1.0
    return ClusterScratch(
        arrived_at=np.empty(requests),
        enqueued_at=np.empty(requests),
        started_at=np.empty(requests),
        first_token_at=np.empty(requests),
        left_at=np.empty(requests),
        started_step=np.empty(requests, np.int32),
        worker=np.empty(requests, np.int32),
        next_ending=np.empty(requests, np.int32),
        following=np.empty(requests + workers, np.int32),
        ring=np.empty(places, np.int32),
        counts=np.empty((workers, COUNTS), np.int64),
        times=np.empty((workers, TIMES)),
        totals=np.empty(TOTALS, np.int64),
        clocks=np.empty(2 * size),
        loads=np.empty(2 * size),
        survey=survey,
        most_steps=np.array([most_steps(time_limit)]),
        prefill_sum=np.empty(slots + 1),
        itl_samples=np.empty(slots + 1, np.int64),
        values=np.empty((LATENCIES, requests)),
        kept=np.empty(requests + 1),
        bins=np.empty(requests, np.uint16),
        bin_counts=np.empty(BINS, np.int32),
        bin_places=np.empty(BINS, np.int32),
    )


def keep(
    row: int,
    block: "Block",
    lengths: Any,
    instants: Array,
    scratch: ClusterScratch,
    outcome: ClusterOutcome,
    results: Any,
) -> None:
    """Write what is kept, besides metrics, of the scenario that was run last."""
    from vecsim.kernel.tick_cluster import write_cluster_queue, write_cluster_record

    if results.record.slot.shape[1] > 0:
        write_cluster_record(row, block.scenarios, lengths, scratch, outcome, results.record)
    if instants.size > 0:
        write_cluster_queue(row, instants, scratch, outcome, results.queue)


def steps_of(
    scratch: ClusterScratch, outcome: ClusterOutcome, output_tokens: Array, load: Any
) -> tuple[dict[str, Array], int]:
    """(what each worker's steps were, by the names of their variables, how many there are), in the order of time.

    A step's length follows from the requests in the batch, so all boundaries follow from those at which requests start.

    Raises
    ------
    ValueError
        When they would not fit in memory.
    """
    from vecsim.kernel.tick_cluster import STEP

    steps = scratch.counts[: outcome.workers, STEP]
    memory.require(120.0 * steps.sum(), f"{steps.sum():,} steps", "a shorter time_limit or fewer workers")
    chunks, entered = load.total_prefill_chunks, outcome.entered
    prefills = np.append(0.0, np.cumsum(np.full(scratch.prefill_sum.size - 1, load.prefill_time / chunks)))
    worker_of, enqueued_at = scratch.worker[:entered], scratch.enqueued_at[:entered]
    by_worker = np.argsort(worker_of, kind="stable")
    own_requests = np.split(by_worker, np.searchsorted(worker_of[by_worker], np.arange(1, outcome.workers)))
    parts = []
    for own, size in zip(own_requests, steps.tolist(), strict=True):
        started = own[scratch.started_at[own] < np.inf]
        start = scratch.started_step[started].astype(np.int64)
        first = start + chunks
        prefilling = present(start, first, size)
        decoding = present(first, first + output_tokens[started] - 1, size)
        # As `TickStepTime.duration` has it; the sum is made one by one.
        duration = np.maximum(np.maximum(prefills[prefilling], np.where(decoding > 0, load.itl, 0.0)), 1.0)
        time = np.append(0.0, np.cumsum(duration))
        enqueued = np.searchsorted(time, enqueued_at[own][enqueued_at[own] < np.inf])
        parts.append((time[:-1], np.diff(time), present(enqueued, start, size), prefilling, decoding))
    values = [np.concatenate(part) for part in zip(*parts, strict=True)]
    worker = np.repeat(np.arange(outcome.workers), steps)
    order = np.lexsort((worker, values[0]))
    names = ("time", "duration", "queue_size", "prefilling", "decoding", "worker")
    return {name: value[order] for name, value in zip(names, (*values, worker), strict=True)}, order.size


def tick_workers(steps: "xr.Dataset", requests: "xr.Dataset", cluster: "Cluster", end_time: float) -> "xr.Dataset":
    """What each worker did over the whole run [worker], from `Run.steps` and `Run.requests`."""
    import xarray as xr

    from vecsim.paths import labelled

    workers, pools = cluster.workers, [pool.workers for pool in cluster.pools]
    worker, lasts, queue = (steps[name].values for name in ("worker", "duration", "queue_size"))
    running = (steps.prefilling + steps.decoding).values
    made = np.bincount(worker, minlength=workers)
    busy = np.bincount(worker, lasts * (running > 0), workers)
    longest = np.zeros(workers)
    np.maximum.at(longest, worker, queue)
    dims = ("worker",)
    with np.errstate(invalid="ignore", divide="ignore"):
        return xr.Dataset(
            {
                "pool": labelled(dims, np.repeat(np.arange(len(pools)), pools), "number of the pool", ""),
                "requests": labelled(
                    dims, np.bincount(requests.worker.values, minlength=workers), "requests sent there", "requests"
                ),
                "steps": labelled(dims, made, "steps", "1"),
                "busy": labelled(dims, busy, "time with a request in the batch", "ticks"),
                "utilization": labelled(dims, busy / end_time, "share of the time with a request in the batch", "1"),
                "batch_size": labelled(
                    dims, np.bincount(worker, running * lasts, workers) / busy, "mean requests then", "requests"
                ),
                "mean_queue": labelled(
                    dims, np.bincount(worker, queue, workers) / made, "mean queue over boundaries", "requests"
                ),
                "max_queue": labelled(dims, longest, "largest queue", "requests"),
            },
            {"worker": np.arange(workers)},
        )


def tick_workers_over_time(steps: "xr.Dataset", workers: int, end_time: float, intervals: int) -> "xr.Dataset":
    """Means of what each worker did in equal intervals of the run [worker, time], from `Run.steps`."""
    import xarray as xr

    from vecsim.paths import labelled
    from vecsim.series import mean_in_intervals

    edges = np.linspace(0.0, end_time, intervals + 1)
    order = np.argsort(steps.worker.values, kind="stable")
    own = np.split(order, np.searchsorted(steps.worker.values[order], np.arange(1, workers)))
    begin, lasts, prefilling, decoding, queue = (
        steps[name].values for name in ("time", "duration", "prefilling", "decoding", "queue_size")
    )

    def means(values: Array, long_name: str, units: str = "requests") -> Any:
        rows = [mean_in_intervals(begin[of], lasts[of], values[of], edges) for of in own]
        return labelled(("worker", "time"), np.array(rows), long_name, units)

    running = prefilling + decoding
    return xr.Dataset(
        {
            "utilization": means((running > 0).astype(np.float64), "share of the time with a request", "1"),
            "prefilling": means(prefilling, "prefilling requests"),
            "decoding": means(decoding, "decoding requests"),
            "running": means(running, "running requests"),
            "queue_size": means(queue, "queue size"),
        },
        {
            "worker": np.arange(workers),
            "time": labelled(("time",), (edges[:-1] + edges[1:]) / 2, "middle of the interval", "ticks"),
        },
    )


def present(entered: Array, left: Array, steps: int) -> Array:
    """How many are in a state at each step, from the steps at which they enter and leave it."""
    change = np.bincount(entered[entered < steps], minlength=steps)
    change -= np.bincount(left[left < steps], minlength=steps)
    return np.cumsum(change)
