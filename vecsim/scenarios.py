"""The lowering: a declaration and axes -> one table of parameter columns, cut in blocks that fit in memory."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vecsim.axes import Plan, replace_all
from vecsim.batching import BATCHERS, CustomBatcher, IFBatcherWithOnePrefillOnly
from vecsim.engine import Engine
from vecsim.fleet import Cluster, Fleet, TickDisaggregatedEngine
from vecsim.kernel.state import (
    EXPONENTIAL_DRAWS,
    GAMMA_DRAWS,
    NO_DRAWS,
    RECORDED,
    Array,
    ArrivalParameters,
    LengthParameters,
    Scenarios,
)
from vecsim.lengths import DRAWS, SEQUENCE
from vecsim.load import AT_ONCE, CLOSED, EVENLY, OUTPUT, PIECEWISE, RENEWAL, TRACED, Stream
from vecsim.tick_fleets import TickFleets, cluster_columns
from vecsim.token_scenarios import (
    TOKEN_COLUMNS,
    TokenTables,
    check_columns,
    fleet_parameters,
    refuse_endless,
    token_parameters,
    token_requests_needed,
)

# Fields that are columns of the table: an axis over one of them costs no declaration per value.
COLUMNS = {
    "max_batch_size": "max_batch_size",
    "max_prefill_workers": "max_batch_size",
    "max_decode_workers": "decode_workers",
    "kv_transfer_time": "transfer_time",
    "batcher.parameter": "parameter",
    "load_generator.prefill_time": "prefill_time",
    "load_generator.itl": "itl",
    "load_generator.total_prefill_chunks": "total_prefill_chunks",
    "load_generator.seed": "seed",
    "load_generator.stream_offset": "offset",
    "load_generator.request_rate": "request_rate",
    "load_generator.initial_batch": "requests",
    "load_generator.target_concurrency": "requests",
}
INTEGERS = (
    *("batcher", "max_batch_size", "decode_workers", "total_prefill_chunks", "arrivals", "requests", "seed", "offset"),
    *("functions", "fleet", "workers"),
)

# The drawn streams of a block stay within this, unless one alone is larger.
BLOCK_BYTES = 64 * 2**20
BLOCK_SCENARIOS = 2**16

ENDLESS = 2**62


class Table(NamedTuple):
    """Every scenario of a sweep.

    A column is an array that broadcasts to `shape`: it varies along the dimensions of the axes that matter to it.
    """

    shape: tuple[int, ...]
    columns: dict[str, Array]
    lengths: LengthParameters  # of every length stream
    arrivals: ArrivalParameters  # of every arrival stream
    tables: Array  # values of empirical distributions, one after the other
    rules: tuple[Any, ...]  # the user's own: of batchers; in the token model (rule, step time) where one is
    streams: int  # of lengths that a scenario has
    time_limit: float
    token: TokenTables | None  # what the scenarios of the token model share; None in the tick model
    clusters: TickFleets | None  # of the tick model; None if it's of engines

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def at(self, name: str, rows: Array) -> Array:
        """A column's values at flat scenario numbers."""
        return self.pick(self.columns[name], rows)

    def pick(self, column: Array, rows: Array) -> Array:
        """Values at flat scenario numbers of anything that broadcasts to the table's shape."""
        shape = self.shape or (1,)
        return np.broadcast_to(column, shape)[np.unravel_index(rows, shape)]


def lower(plan: Plan, time_limit: float) -> Table:
    """Make the table of a plan's scenarios."""
    dims = tuple(plan.sizes)
    shape = tuple(plan.sizes.values())

    def spread(values: Array, over: tuple[str, ...]) -> Array:
        """Order `values` [over] like the table's dimensions, with length 1 where it doesn't vary."""
        order = sorted(range(len(over)), key=lambda i: dims.index(over[i]))
        sizes = [plan.sizes[dim] if dim in over else 1 for dim in dims]
        return values.transpose(order).reshape(sizes)

    # Axes over components and their inner fields: one declaration for each combination.
    token = TokenTables() if plan.engine.is_token else None
    clusters = TickFleets() if isinstance(plan.engine, Cluster) and token is None else None
    fast = COLUMNS if token is None else TOKEN_COLUMNS
    fast = {axis.path: fast[axis.path] for axis in plan.axes if axis.path in fast and axis.values.dtype != object}
    inner = [axis for axis in plan.axes if axis.path not in fast]
    over = tuple(dim for dim in dims if any(dim in axis.dims for axis in inner))
    tables: dict[Any, int] = {}
    rules: dict[Any, int] = {}
    rows = []
    for index in np.ndindex(tuple(plan.sizes[dim] for dim in over)):
        place = dict(zip(over, index, strict=True))
        engine = replace_all(
            plan.engine, {axis.path: axis.values[tuple(place[dim] for dim in axis.dims)] for axis in inner}
        )
        if engine.is_token != (token is not None):
            raise ValueError("step_time must be TickStepTime throughout a sweep, or nowhere: ticks aren't seconds")
        if token is None:
            rows.append(parameters(engine, tables, rules, clusters))
        else:
            make = fleet_parameters if isinstance(engine, Fleet) else token_parameters
            streams, row = make(engine, time_limit, token, rules)
            for k, stream in enumerate(streams):
                row |= stream_columns(k, stream, tables)
            rows.append(row)
    columns = {
        name: spread(
            np.array([row[name] for row in rows], np.int64 if name in INTEGERS else np.float64).reshape(
                tuple(plan.sizes[dim] for dim in over)
            ),
            over,
        )
        for name in rows[0]
    }
    for axis in plan.axes:
        if axis.path in fast:
            columns[fast[axis.path]] = spread(axis.values, axis.dims)
    if token is not None:
        check_columns(columns)
        refuse_endless(columns, time_limit)
    flat_tables = np.concatenate([np.asarray(table, np.int64) for table in tables] + [np.zeros(1, np.int64)])

    # All kinds of streams of lengths are numbered together.
    kinds = 1 if token is None else 1 + max(int(name[7:]) for name in columns if name.startswith("purpose"))
    parts: dict[str, list[Array]] = {name: [] for name in LengthParameters._fields}
    for k in range(kinds):
        random = columns[f"draws{k}"] != NO_DRAWS
        seed = _seed_for(columns["seed"], columns[f"purpose{k}"])
        for name, values in (
            *((name, columns[f"{name}{k}"]) for name in ("code", "a", "b", "table_start", "table_size", "draws")),
            ("seed", np.where(random, seed, 0)),
            ("offset", np.where(random | (columns[f"code{k}"] == SEQUENCE), columns["offset"], 0)),
        ):
            parts[name].append(values)
    widest = np.broadcast_shapes(*(values.shape for part in parts.values() for values in part))
    numbers, lengths = _distinct(
        {name: np.stack([np.broadcast_to(values, widest) for values in part]) for name, part in parts.items()}
    )
    for k in range(kinds):
        columns[f"length_stream{k}"] = numbers[k]
    renewal = (columns["arrivals"] == RENEWAL) | (columns["arrivals"] == PIECEWISE)
    traced = columns["arrivals"] == TRACED
    columns["arrival_stream"], arrivals = _distinct(
        {
            "shape": np.where(renewal, columns["shape"], np.where(traced, columns.get("trace_times", 0.0), 0.0)),
            "draws": np.where(
                renewal,
                np.where(columns["shape"] == 1.0, EXPONENTIAL_DRAWS, GAMMA_DRAWS),
                np.where(traced, RECORDED, NO_DRAWS),
            ),
            "seed": np.where(renewal, _other_seed(columns["seed"]), 0),
        }
    )
    return Table(
        shape=shape,
        columns=columns,
        lengths=LengthParameters(**lengths),
        arrivals=ArrivalParameters(**arrivals),
        tables=flat_tables,
        rules=tuple(rules),
        streams=kinds,
        time_limit=time_limit,
        token=token,
        clusters=clusters,
    )


def stream_columns(k: int, stream: Stream, tables: dict[Any, int]) -> dict[str, Any]:
    """Columns of the k-th stream of whole numbers; its table is appended to `tables` (values -> place of the first)."""
    if stream.table not in tables:
        tables[stream.table] = sum(len(other) for other in tables)
    own = {
        "code": stream.code,
        "a": stream.a,
        "b": stream.b,
        "table_start": tables[stream.table],
        "table_size": len(stream.table),
        "draws": DRAWS[stream.code],
        "mean": stream.expected,
        "purpose": stream.purpose,
    }
    return {f"{name}{k}": value for name, value in own.items()}


def parameters(
    engine: Engine | Cluster | TickDisaggregatedEngine,
    tables: dict[Any, int],
    rules: dict[Any, int],
    clusters: TickFleets | None,
) -> dict[str, Any]:
    """One row of the table.

    Empirical lengths are appended to `tables` (values -> place of the first), the user's own rules to `rules`, and a
    cluster to `clusters`.
    """
    load = engine.load_generator
    row: dict[str, Any] = {"batcher": 0, "parameter": 0.0, "decode_workers": 0, "workers": 1, "fleet": -1}
    row["transfer_time"] = 0.0  # as all that isn't of an engine
    if isinstance(engine, Cluster):
        assert clusters is not None
        row |= cluster_columns(engine, clusters)
    elif isinstance(engine, TickDisaggregatedEngine):
        row |= {"max_batch_size": engine.max_prefill_workers, "decode_workers": engine.max_decode_workers}
        row["transfer_time"] = engine.kv_transfer_time
    else:
        batcher = engine.batcher
        row["max_batch_size"] = engine.max_batch_size
        if isinstance(batcher, CustomBatcher):
            row["batcher"] = len(BATCHERS) + rules.setdefault(batcher.rule, len(rules))
            row["parameter"] = batcher.parameter
        else:
            row["batcher"] = BATCHERS.index(type(batcher))
    return {
        **row,
        "prefill_time": load.prefill_time,
        "itl": load.itl,
        "total_prefill_chunks": load.total_prefill_chunks,
        "arrivals": load.arrivals,
        "request_rate": 1.0,
        "requests": ENDLESS,
        "shape": 1.0,
        "seed": load.seed,
        "offset": load.stream_offset,
        **stream_columns(0, Stream.of(load.output_length, OUTPUT), tables),
        **load.arrival_parameters(),
    }


def _distinct(columns: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Number the distinct rows of columns: (the number at each place, the columns of the distinct rows)."""
    spread = np.broadcast_arrays(*columns.values())
    key = np.zeros(spread[0].size, np.int64)
    for column in spread:
        # One sort of numbers for each column that varies: much cheaper than sorting rows.
        values, place = np.unique(column, return_inverse=True)
        if values.size > 1:
            _, key = np.unique(key * values.size + place.ravel(), return_inverse=True)
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    return number.reshape(spread[0].shape), {
        name: column.ravel()[first] for name, column in zip(columns, spread, strict=True)
    }


def _seed_for(seed: Array, purpose: Array) -> Array:
    """The seed of a stream: the very one for output lengths, for every other purpose one of its own."""
    return np.where(purpose == OUTPUT, seed, _other_seed(seed, purpose))


def _other_seed(seed: Array, purpose: Any = 0) -> Array:
    """A seed that shares no stream with the output lengths of nearby seeds (SplitMix64, upper half).

    Purpose 0 is that of arrivals.
    """
    seed, purpose = np.broadcast_arrays(seed, purpose)
    z = np.atleast_1d(seed).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z += np.atleast_1d(purpose).astype(np.uint64) << np.uint64(32)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(32)).astype(np.int64).reshape(seed.shape)


def requests_needed(table: Table, more: float) -> Array:
    """How many requests to draw for each scenario, enough unless luck is against it; `more` multiplies it.

    A scenario that needs more than this says so, and is run again with more.
    """
    columns = table.columns
    if table.token is not None:
        return token_requests_needed(columns, table.time_limit, more)
    arrivals, time_limit = columns["arrivals"], table.time_limit
    requests = columns["requests"].astype(np.float64)
    expected = columns["request_rate"] * time_limit
    spread = np.where(arrivals == RENEWAL, 8.0 * np.sqrt((expected + 1.0) / columns["shape"]) + 16.0, 2.0)
    due = np.minimum((expected + spread) * np.where(arrivals == RENEWAL, more, 1.0), requests + 1.0)

    # A closed loop puts in as many as the slots can serve, a step taking a tick or more.
    slots = np.minimum(columns["max_batch_size"], requests)
    served = 1.1 * slots * (time_limit + 1.0) / (columns["total_prefill_chunks"] + columns["mean0"] - 1.0)
    one_at_a_time = (time_limit + 1.0) / columns["total_prefill_chunks"] + 1.0
    one_prefill = columns["batcher"] == BATCHERS.index(IFBatcherWithOnePrefillOnly)
    served = np.where(one_prefill, np.minimum(served, columns["workers"] * one_at_a_time), served)
    # Of a disaggregated engine, as many as either pool can serve
    decodes = columns["decode_workers"] * (time_limit + 1.0) / np.maximum(columns["mean0"] - 1.0, 1e-9)
    apart = 1.1 * np.minimum(decodes, slots * one_at_a_time)
    served = np.where(columns["decode_workers"] > 0, apart, served)
    closed = (served + 8.0 * np.sqrt(served) + slots + 64.0) * more + requests
    return np.where(arrivals == CLOSED, closed, np.where(arrivals == AT_ONCE, requests, due))


class Block(NamedTuple):
    """Scenarios that are lowered and run together."""

    rows: Array  # flat scenario numbers
    scenarios: Any  # `Scenarios`, or the numbers of the token model [scenario, field]
    stream: Array  # [scenario, kind] length streams
    arrival_stream: Array  # [scenario]
    own: Array  # [scenario] place in the table's rules, -1 if it has none of the user's own
    lengths: LengthParameters  # of the streams used
    length_sizes: Array
    arrivals: ArrivalParameters
    arrival_sizes: Array
    most_requests: int


def blocks(table: Table, rows: Array, more: float = 1.0) -> Iterator[Block]:
    """Cut scenarios in blocks: those that share streams together, drawn numbers within `BLOCK_BYTES`."""
    stream = np.stack([table.at(f"length_stream{k}", rows) for k in range(table.streams)], axis=1)
    arrival_stream = table.at("arrival_stream", rows)
    needed = np.ceil(table.pick(requests_needed(table, more), rows)).astype(np.int64)
    kind = table.at("arrivals", rows)
    renewal = (kind != AT_ONCE) & (kind != EVENLY) & (kind != CLOSED)
    length_sizes = _largest(stream, needed, table.lengths.seed.size)
    arrival_sizes = _largest(arrival_stream, np.where(renewal, needed, 0), table.arrivals.seed.size)

    if 4 * length_sizes.sum() + 8 * arrival_sizes.sum() <= BLOCK_BYTES:
        order = np.arange(rows.size)
        cost = np.zeros(rows.size, np.int64)
    else:
        order = np.lexsort((arrival_stream, *stream.T[::-1]))
        stream, arrival_stream = stream[order], arrival_stream[order]
        cost = np.zeros(rows.size, np.int64)
        first = np.ones(rows.size, bool)
        for k in range(table.streams):
            first[1:] = stream[1:, k] != stream[:-1, k]
            cost += np.where(first, 4 * length_sizes[stream[:, k]], 0)
        first[1:] |= arrival_stream[1:] != arrival_stream[:-1]
        cost += np.where(first, 8 * arrival_sizes[arrival_stream], 0)
    begin = 0
    cost = np.cumsum(cost)
    while begin < order.size:
        spent = cost[begin - 1] if begin else 0
        end = int(np.searchsorted(cost, spent + BLOCK_BYTES, side="right"))
        end = min(max(end, begin + 1), begin + BLOCK_SCENARIOS, order.size)
        part = order[begin:end]
        if table.rules:  # scenarios of one rule in a row, for they run together
            inside = begin + np.argsort(own_rule(table, rows[part]), kind="stable")
            part = order[inside]
            stream[begin:end] = stream[inside]
            arrival_stream[begin:end] = arrival_stream[inside]
        used_lengths, length_number = np.unique(stream[begin:end], return_inverse=True)
        length_number = length_number.reshape(-1, table.streams)
        used_arrivals, arrival_number = np.unique(arrival_stream[begin:end], return_inverse=True)
        if table.token is None:
            columns = {name: table.at(name, rows[part]) for name in Scenarios._fields[:-2]}
            scenarios: Any = Scenarios(**columns, arrival_stream=arrival_number, length_stream=length_number[:, 0])
        else:
            scenarios = np.stack([table.at(name, rows[part]) for name in TokenTables.fields()], axis=1).astype(
                np.float64
            )
        # Sized by this block's own scenarios: a stream is never longer than what a thread has room for.
        yield Block(
            rows[part],
            scenarios,
            length_number,
            arrival_number,
            own_rule(table, rows[part]),
            LengthParameters(*(column[used_lengths] for column in table.lengths)),
            _largest(length_number, needed[part], used_lengths.size),
            ArrivalParameters(*(column[used_arrivals] for column in table.arrivals)),
            _largest(arrival_number, np.where(renewal[part], needed[part], 0), used_arrivals.size),
            int(needed[part].max()),
        )
        begin = end


def own_rule(table: Table, rows: Array) -> Array:
    """The places of scenarios' rules in the table's own ones, -1 where nothing is of the user's own."""
    if table.token is not None:
        return table.at("functions", rows)
    return np.maximum(table.at("batcher", rows) - len(BATCHERS), -1)


def same_rule(own: Array, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(rule, begin, end) of each run of scenarios in [first, last) that have the same rule of the user's own."""
    cuts = first + 1 + np.flatnonzero(np.diff(own[first:last]))
    for begin, end in itertools.pairwise((first, *cuts.tolist(), last)):
        yield int(own[begin]), begin, end


def _largest(stream: Array, needed: Array, streams: int) -> Array:
    """The largest need among the scenarios that share each stream."""
    sizes = np.zeros(streams, np.int64)
    np.maximum.at(sizes, stream, needed if stream.ndim == 1 else needed[:, np.newaxis])
    return sizes
