"""Run a table of scenarios: draw the streams of a block, run its scenarios on threads, next block."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vecsim import memory, tick_fleets
from vecsim.kernel.state import (
    DONE,
    INTERRUPTED,
    OUT_OF_STEPS,
    REFUSED,
    ApartOutcome,
    ApartScratch,
    Array,
    ClusterOutcome,
    ClusterScratch,
    Job,
    Outcome,
    Record,
    Scratch,
    StepRecord,
    TokenRecord,
)
from vecsim.lives import Lives
from vecsim.paths import Path, Rise
from vecsim.scenarios import BLOCK_BYTES, Block, Table, blocks, requests_needed, same_rule
from vecsim.streams import draw_streams
from vecsim.threads import INLINE, Workers, available_threads
from vecsim.token_simulate import (
    Views,
    check_token_memory,
    comes_and_goes,
    goes_by_caches,
    keeps_apart,
    keeps_tiers,
    run_token_block,
)
from vecsim.variables import row_width

AnyOutcome = Outcome | ApartOutcome | ClusterOutcome
AnyScratch = Scratch | ApartScratch | ClusterScratch

NOTHING = np.empty(0)

BYTES_PER_REQUEST = 120  # of a thread's scratch
BYTES_PER_RECORD = 148  # of a run's record, and of what it is made with
BYTES_PER_STEP = 24


class Results(NamedTuple):
    """What the kernels write."""

    metrics: Array  # [scenario, metric], see `vecsim.variables`
    enqueued: Array  # [scenario] requests that entered the queue
    queue: Array  # [scenario, instant] queue sizes, at no instant if not kept
    record: Any  # `Record` or `TokenRecord` [scenario, request], of no request if not kept

    @classmethod
    def empty(
        cls, token: bool, scenarios: int, metrics: int, instants: int = 0, requests: int = 0, fleet: bool = False
    ) -> "Results":
        """Room for results; nothing has happened yet to any request."""
        shape = scenarios, requests
        record: Any = (
            TokenRecord.empty(shape)
            if token
            else Record(
                arrived_at=np.full(shape, np.nan),
                enqueued_at=np.full(shape, np.nan),
                started_at=np.full(shape, np.nan),
                first_token_at=np.full(shape, np.nan),
                completed_at=np.full(shape, np.nan),
                output_tokens=np.zeros(shape, np.int64),
                slot=np.full(shape, -1, np.int64),
                worker=np.full((scenarios, requests if fleet else 0), -1, np.int64),
            )
        )
        queue = np.empty((scenarios, instants), np.int64)
        return cls(np.empty((scenarios, metrics)), np.empty(scenarios, np.int64), queue, record)

    def room(self, rows: Array) -> "Results":
        """Room for the results of some rows: these very arrays where the rows follow one another."""
        first, size = int(rows[0]), rows.size
        if np.array_equal(rows, np.arange(first, first + size)):
            part = slice(first, first + size)
            record = type(self.record)(*(array[part] for array in self.record))
            return Results(self.metrics[part], self.enqueued[part], self.queue[part], record)
        token = isinstance(self.record, TokenRecord)
        requests, fleet = self.record.arrived_at.shape[1], self.record.worker.shape[1] > 0
        return Results.empty(token, size, self.metrics.shape[1], self.queue.shape[1], requests, fleet)

    def put(self, rows: Array, part: "Results", done: Array) -> None:
        """Take over what is done of the results of some rows, if it isn't there already."""
        if np.may_share_memory(part.metrics, self.metrics):
            return
        for whole, new in zip((*self[:-1], *self.record), (*part[:-1], *part.record), strict=True):
            whole[rows[done]] = new[done]


class Single(NamedTuple):
    """Everything of one scenario."""

    metrics: Array  # [metric]
    record: Any  # `Record` or `TokenRecord` [1, request]
    outcome: AnyOutcome | None  # of the tick model
    scratch: AnyScratch | None
    steps: StepRecord | None  # of the token model
    path: Path | None = None  # of a fleet that keeps prefill apart
    lives: Lives | None = None  # of a fleet whose workers come and go
    rise: Rise | None = None  # of a fleet whose workers have tiers below their caches
    views: Views | None = None  # of a cluster whose router goes by what workers have cached


class Measured(NamedTuple):
    """What is measured of every scenario."""

    warmup: float  # ticks
    quantiles: Array
    instants: Array  # at which the queue is looked at, ascending [ticks]

    def width(self, table: Table) -> int:
        """Numbers in a row of metrics."""
        classes = 0 if table.token is None else len(table.token.class_names or ())
        apart = table.token is not None and keeps_apart(table.token.fleets)
        changing = table.token is not None and comes_and_goes(table.token.fleets)
        tiered = table.token is not None and keeps_tiers(table.token.groups)
        viewing = table.token is not None and goes_by_caches(table.token)
        return row_width(table.token is not None, self.quantiles.size, classes, apart, changing, tiered, viewing)


def simulate(
    table: Table,
    measured: Measured,
    threads: int | None = None,
    keep_requests: bool = False,
    progress: Callable[[int], Any] = lambda done: None,
) -> Results:
    """Run every scenario of a table; `progress` is told how many more are done.

    Raises
    ------
    ValueError
        When results and working arrays would not fit in memory: says how much they take and what to do. When the
        rule of a user's own batcher fails.
    """
    threads = min(threads or available_threads(), table.size)
    instants = measured.instants.size
    token = table.token is not None
    own_width = measured.width(table)
    width = own_width + instants + 2
    check_memory(table, 8 * width * table.size, threads)
    results = Results.empty(token, table.size, own_width, instants)
    workers = Workers(threads)
    _run(table, measured, results, workers, progress)
    if keep_requests:
        # The first pass has told how many requests there are.
        most = int(results.enqueued.max())
        check_memory(table, 8 * (width + 21 * most) * table.size, threads)
        results = Results.empty(token, table.size, own_width, instants, most, table.clusters is not None)
        _run(table, measured, results, workers, lambda done: None)
    return results


def simulate_one(table: Table, measured: Measured) -> Single:
    """Run a table's only scenario and return everything of it.

    Raises
    ------
    ValueError
        When its arrays would not fit in memory, or the rule of a user's own batcher fails.
    """
    more = 1.0
    workers = Workers(1)
    if table.token is not None:
        return _simulate_one_token(table, measured, workers)
    while True:
        check_memory(table, BYTES_PER_RECORD * float(np.max(requests_needed(table, more))), 1, more)
        block = next(blocks(table, np.zeros(1, np.int64), more))
        fleet = table.clusters is not None
        results = Results.empty(False, 1, measured.width(table), requests=block.most_requests, fleet=fleet)
        status, outcome, scratch = _run_block(table, block, measured, results, workers)
        if status[0] == DONE and outcome is not None:
            record = Record(*(array[:, : int(results.enqueued[0])] for array in results.record))
            return Single(results.metrics[0], record, outcome, scratch, None)
        more *= 2.0


def _simulate_one_token(table: Table, measured: Measured, workers: Workers) -> Single:
    """`simulate_one` in the token model."""
    more, steps = 1.0, 1 << 16
    while True:
        check_memory(table, BYTES_PER_RECORD * float(np.max(requests_needed(table, more))) + 64.0 * steps, 1, more)
        block = next(blocks(table, np.zeros(1, np.int64), more))
        results = Results.empty(True, 1, measured.width(table), requests=block.most_requests)
        status, run = run_token_block(table, block, measured, results, workers, steps=steps)
        if status[0] == DONE and run is not None:
            kept = run.requests
            record = TokenRecord(*(array[:, :kept] for array in results.record))
            return Single(results.metrics[0], record, None, None, run.steps, run.path, run.lives, run.rise, run.views)
        if status[0] == OUT_OF_STEPS:
            steps *= 4
        else:
            more *= 2.0


def _run(table: Table, measured: Measured, results: Results, workers: Workers, progress: Callable[[int], Any]) -> None:
    """Run all scenarios; those that ran out of drawn requests again, with twice as many."""
    rows = np.arange(table.size)
    more = 1.0
    while rows.size:
        check_memory(table, 0, workers.threads, more)
        again = []
        for block in blocks(table, rows, more):
            part = results.room(block.rows)
            if table.token is None:
                status = _run_block(table, block, measured, part, workers, progress)[0]
            else:
                status = run_token_block(table, block, measured, part, workers, progress)[0]
            done = status == DONE
            results.put(block.rows, part, done)
            again.append(block.rows[~done])
            progress(-again[-1].size)
        rows = np.concatenate(again)
        more *= 2.0


def _run_block(
    table: Table,
    block: Block,
    measured: Measured,
    results: Results,
    workers: Workers,
    progress: Callable[[int], Any] = lambda done: None,
) -> tuple[Array, AnyOutcome | None, AnyScratch]:
    """Draw a block's streams and run its scenarios.

    Returns the status of each, and, if requests are recorded, outcome and scratch of one that was run last.
    """
    apart, clusters = bool(block.scenarios.decode_workers[0] > 0), table.clusters
    run_scenarios = clusters.kernel() if clusters is not None else _kernel(apart)
    lengths, arrivals = draw_streams(table, block, NOTHING, workers)
    size = block.rows.size
    status = np.full(size, INTERRUPTED, np.int64)
    own = threading.local()
    latest: dict[str, Any] = {"outcome": None}

    def scratch() -> Any:
        if not hasattr(own, "scratch"):
            if clusters is not None:
                made: Any = tick_fleets.new_scratch(block, clusters, table.time_limit, lengths.longest)
            elif apart:
                made = _new_apart_scratch(block)
            else:
                made = _new_scratch(block, table.time_limit, int(lengths.longest.max()))
            own.scratch = latest["scratch"] = made
        return own.scratch

    def job() -> Job:
        return Job(
            block.scenarios,
            arrivals,
            lengths,
            table.time_limit,
            measured.warmup,
            measured.quantiles,
            scratch(),
            results.metrics,
            results.enqueued,
            status,
            workers.stop,
        )

    def run_some(first: int, last: int) -> AnyOutcome:
        for rule, begin, end in same_rule(block.own, first, last):
            outcome = kernels[rule](begin, end, job())
        return outcome

    def run_and_record(first: int, last: int) -> None:
        for row in range(first, last):
            outcome = latest["outcome"] = run_some(row, row + 1)
            if status[row] == DONE:
                _keep(row, block, lengths, measured.instants, scratch(), outcome, results)

    own_kernels = [_own_kernel(rule, job()) for rule in table.rules]
    kernels = [*own_kernels, run_scenarios]  # -1 is the last
    keeps_requests, keeps_queue = results.record.slot.shape[1] > 0, measured.instants.size > 0
    run = run_and_record if keeps_requests or keeps_queue else run_some
    cost = size * (table.time_limit + block.most_requests)
    if clusters is not None:
        cost += table.time_limit * float(clusters.workers[block.scenarios.fleet].sum() - size)
    # A user's own rule may take any time: always on threads, where it can be interrupted.
    own_rules = table.rules or (clusters is not None and clusters.rules)
    workers.share(run, size, max(cost, INLINE) if own_rules else cost, progress)
    return status, latest["outcome"], latest["scratch"]


def _kernel(apart: bool) -> Any:
    """What runs scenarios of engines, or of disaggregated ones."""
    if apart:
        from vecsim.kernel.tick_disaggregated import run_disaggregated

        return run_disaggregated
    from vecsim.kernel.scenarios import run_scenarios

    return run_scenarios


def _keep(row: int, block: Block, lengths: Any, instants: Array, scratch: Any, outcome: Any, results: Results) -> None:
    """Write what is kept, besides metrics, of the scenario that was run last."""
    keeps_requests, keeps_queue = results.record.slot.shape[1] > 0, instants.size > 0
    if isinstance(outcome, ClusterOutcome):
        tick_fleets.keep(row, block, lengths, instants, scratch, outcome, results)
        return
    if isinstance(outcome, Outcome):
        from vecsim.kernel.record import write_queue, write_record

        if keeps_requests:
            write_record(row, block.scenarios, lengths, scratch, outcome, results.record)
        if keeps_queue:
            write_queue(row, instants, scratch, outcome, results.queue)
        return
    from vecsim.kernel.tick_disaggregated import write_apart_queue, write_apart_record

    if keeps_requests:
        write_apart_record(row, block.scenarios, lengths, scratch, outcome, results.record)
    if keeps_queue:
        write_apart_queue(row, instants, block.scenarios, lengths, scratch, outcome, results.queue)


def _own_kernel(rule: Any, job: Job) -> Callable[[int, int, Job], Outcome]:
    """What runs scenarios of a rule of the user's own; a ValueError when it raises or returns what can't be."""
    from vecsim.kernel.custom import guarded, make_run_scenarios

    name = rule.py_func.__name__
    run_scenarios = guarded(make_run_scenarios(rule, job), name)

    def run(first: int, last: int, job: Job) -> Outcome:
        outcome = run_scenarios(first, last, job)
        if outcome.status == REFUSED:
            row = first + int(np.argmax(job.status[first:last] == REFUSED))
            free = int(job.scenarios.max_batch_size[row]) - outcome.running
            queued = outcome.enqueued - outcome.started
            raise ValueError(
                f"rule {name} must return 0 to {free} requests (batch.free), got {outcome.admitted} at "
                f"{outcome.end_time:g} ticks with {outcome.running} running, {queued} queued"
            )
        return outcome

    return run


def _new_scratch(block: Block, time_limit: float, longest: int) -> Scratch:
    """What a thread needs for the largest scenario of a block; `longest` is the longest output drawn."""
    from vecsim.kernel.quantiles import BINS
    from vecsim.kernel.tally import LATENCIES

    requests = block.most_requests + 1
    steps = int(time_limit) + 2  # a step takes a tick or more
    slots = int(block.scenarios.max_batch_size.max())
    farthest = min(int(block.scenarios.total_prefill_chunks.max()) + longest, steps + 1)
    return Scratch(
        arrived_at=np.empty(requests),
        enqueued_step=np.empty(requests, np.int32),
        started_step=np.empty(requests, np.int32),
        time=np.empty(steps + 1),
        calendar=np.empty(max(8, 1 << farthest.bit_length()), np.int64),
        prefill_sum=np.empty(slots + 1),
        itl_samples=np.empty(slots + 1, np.int64),
        values=np.empty((LATENCIES, requests)),
        kept=np.empty(requests + 1),
        bins=np.empty(requests, np.uint16),
        bin_counts=np.empty(BINS, np.int32),
        bin_places=np.empty(BINS, np.int32),
    )


def _new_apart_scratch(block: Block) -> ApartScratch:
    """What a thread needs for the largest scenario of a block of disaggregated engines."""
    from vecsim.kernel.quantiles import BINS
    from vecsim.kernel.tally import LATENCIES

    requests = block.most_requests + 1
    scenarios = block.scenarios
    prefill, decode = int(scenarios.max_batch_size.max()), int(scenarios.decode_workers.max())
    return ApartScratch(
        arrived_at=np.empty(requests),
        enqueued_at=np.empty(requests),
        started_at=np.empty(requests),
        first_token_at=np.empty(requests),
        decode_started_at=np.empty(requests),
        left_at=np.empty(requests),
        tokens=np.empty(requests, np.int32),
        prefill_worker=np.empty(requests, np.int32),
        decode_worker=np.empty(requests, np.int32),
        ends=np.empty(requests),
        prefill_heap=np.empty(prefill, np.int32),
        decode_heap=np.empty(decode, np.int32),
        prefill_clock=np.empty(prefill),
        decode_clock=np.empty(decode),
        busy_until=np.empty(prefill),
        values=np.empty((LATENCIES, requests)),
        kept=np.empty(requests + 1),
        bins=np.empty(requests, np.uint16),
        bin_counts=np.empty(BINS, np.int32),
        bin_places=np.empty(BINS, np.int32),
    )


def check_memory(table: Table, results: float, threads: int, more: float = 1.0) -> None:
    """Refuse what would not fit: `results` bytes for results, and what threads work in.

    Raises
    ------
    ValueError
        With the size, what takes it, and what to do.
    """
    if table.token is not None:
        check_token_memory(table, results, threads, more)
        return
    columns = 24.0 * table.size + 8.0 * sum(column.size for column in table.columns.values())
    requests = float(np.max(requests_needed(table, more)))
    streams = max(BLOCK_BYTES, 12.0 * requests)
    scratches = threads + bool(table.rules)
    steps = BYTES_PER_STEP * table.time_limit
    if table.clusters is not None:
        steps = tick_fleets.worker_bytes(table.clusters, table.columns, table.time_limit)
    working = scratches * (BYTES_PER_REQUEST * requests + steps)
    working += threads * 8.0 * float(table.lengths.offset.max())
    total = results + columns + working + streams
    if table.size > 1 and results + columns >= working + streams:
        memory.require_results(table.size, total / table.size)
    else:
        largest = f"{requests:.3g} requests and {table.time_limit:.3g} ticks in one scenario"
        if table.clusters is not None:
            largest += f" of {table.clusters.workers.max():,} workers"
        memory.require(total, largest, "a shorter time_limit, a lower load or fewer threads")
