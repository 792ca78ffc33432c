"""Run a table of scenarios on threads: draw the streams of a block, run its scenarios, next block."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np

from vecsim import memory
from vecsim.kernel.state import DONE, INTERRUPTED, Array, Outcome, Record, Scratch, Streams
from vecsim.scenarios import BLOCK_BYTES, Block, Table, blocks, requests_needed
from vecsim.variables import DISTRIBUTIONS, SCALARS

# A piece of work for one thread is about this many simulated steps and requests: some 20 ms.
PIECE = 2_000_000

# Below this many of them threads cost more than they save.
INLINE = 500_000

BYTES_PER_REQUEST = 56  # of a thread's scratch
BYTES_PER_STEP = 16


class Results(NamedTuple):
    """What the kernels wrote."""

    metrics: Array  # [scenario, metric], see `vecsim.variables`
    enqueued: Array  # [scenario] requests that entered the queue
    record: Record  # [scenario, request], no request if not kept


class Single(NamedTuple):
    """Everything of one scenario."""

    metrics: Array  # [metric]
    record: Record  # [1, request]
    outcome: Outcome
    scratch: Scratch


def simulate(
    table: Table,
    warmup: float,
    quantiles: tuple[float, ...],
    threads: int | None = None,
    keep_requests: bool = False,
    progress: Callable[[int], Any] = lambda done: None,
) -> Results:
    """Run every scenario of a table; `progress` is told how many more are done.

    Raises
    ------
    ValueError
        When results and working arrays would not fit in memory: says how much they take and what to do.
    """
    threads = threads or available_threads()
    width = len(DISTRIBUTIONS) * (len(quantiles) + 2) + len(SCALARS)
    check_memory(table, 8 * (width + 2) * table.size, threads)
    results = Results(np.empty((table.size, width)), np.empty(table.size, np.int64), no_record(table.size, 0))
    rows = np.arange(table.size)
    with Workers(threads) as workers:
        _run(table, rows, results, warmup, quantiles, workers, progress)
        if keep_requests:
            # The first pass has told how many requests there are.
            most = int(results.enqueued.max())
            check_memory(table, 8 * (width + 2 + 7 * most) * table.size, threads)
            results = results._replace(record=no_record(table.size, most))
            _run(table, rows, results, warmup, quantiles, workers, lambda done: None)
    return results


def simulate_one(table: Table, warmup: float, quantiles: tuple[float, ...]) -> Single:
    """Run a table's only scenario and return everything of it.

    Raises
    ------
    ValueError
        When its arrays would not fit in memory.
    """
    width = len(DISTRIBUTIONS) * (len(quantiles) + 2) + len(SCALARS)
    more = 1.0
    with Workers(1) as workers:
        while True:
            check_memory(table, 0, 1, more)
            block = next(blocks(table, np.zeros(1, np.int64), more))
            record = no_record(1, block.most_requests)
            results = Results(np.empty((1, width)), np.empty(1, np.int64), record)
            scratch = new_scratch(block, table.time_limit)
            status, outcomes = _run_block(table, block, results, warmup, quantiles, workers, lambda: scratch)
            if status[0] == DONE:
                (outcome,) = outcomes
                kept = Record(*(array[:, : outcome.enqueued] for array in record))
                return Single(results.metrics[0], kept, outcome, scratch)
            more *= 2.0


def no_record(scenarios: int, requests: int) -> Record:
    """A record in which nothing has happened yet."""
    shape = scenarios, requests
    instants = [np.full(shape, np.nan) for _ in range(5)]
    return Record(*instants, np.zeros(shape, np.int64), np.full(shape, -1, np.int64))


def _run(
    table: Table,
    rows: Array,
    results: Results,
    warmup: float,
    quantiles: tuple[float, ...],
    workers: "Workers",
    progress: Callable[[int], Any],
) -> None:
    """Run the scenarios at `rows`; those that ran out of drawn requests again, with twice as many."""
    more = 1.0
    while rows.size:
        check_memory(table, 0, workers.threads, more)
        again = []
        for block in blocks(table, rows, more):
            local = threading.local()

            def scratch(block: Block = block, local: threading.local = local) -> Scratch:
                if not hasattr(local, "scratch"):
                    local.scratch = new_scratch(block, table.time_limit)
                return local.scratch

            size = block.rows.size
            part = Results(
                np.empty((size, results.metrics.shape[1])),
                np.empty(size, np.int64),
                no_record(size, results.record.slot.shape[1]),
            )
            status, _ = _run_block(table, block, part, warmup, quantiles, workers, scratch, progress)
            done = status == DONE
            for whole, new in zip(
                (results.metrics, results.enqueued, *results.record), (part.metrics, part.enqueued, *part.record),
                strict=True,
            ):
                whole[block.rows[done]] = new[done]
            again.append(block.rows[~done])
            progress(-again[-1].size)
        rows = np.concatenate(again)
        more *= 2.0


def _run_block(
    table: Table,
    block: Block,
    results: Results,
    warmup: float,
    quantiles: tuple[float, ...],
    workers: "Workers",
    scratch: Callable[[], Scratch],
    progress: Callable[[int], Any] = lambda done: None,
) -> tuple[Array, list[Outcome]]:
    """Draw a block's streams and run its scenarios: (status of each, [outcome of the last one recorded])."""
    from vecsim.kernel.scenarios import draw_arrivals, draw_lengths, run_scenarios

    lengths, arrivals = new_streams(block.lengths["size"], np.int32), new_streams(block.arrivals["size"], np.float64)
    size = block.rows.size
    status = np.full(size, INTERRUPTED, np.int64)
    stop = workers.stop
    wanted = np.array(quantiles)
    outcome: list[Outcome] = []

    def draw_some_lengths(first: int, last: int) -> None:
        names = "code", "a", "b", "table_start", "table_size"
        parameters = [block.lengths[name] for name in names]
        draw_lengths(
            first, last, lengths, *parameters, table.tables, block.lengths["draws"], block.lengths["seed"], stop
        )

    def draw_some_arrivals(first: int, last: int) -> None:
        parameters = [block.arrivals[name] for name in ("shape", "draws", "seed")]
        draw_arrivals(first, last, arrivals, *parameters, stop)

    def run_rows(first: int, last: int) -> Outcome:
        return run_scenarios(
            np.arange(first, last),
            block.scenarios,
            arrivals,
            lengths,
            table.time_limit,
            warmup,
            wanted,
            scratch(),
            results.metrics,
            results.enqueued,
            status,
            stop,
        )

    def run_and_record(first: int, last: int) -> None:
        from vecsim.kernel.record import write_record

        for row in range(first, last):
            outcome[:] = [run_rows(row, row + 1)]
            if status[row] == DONE:
                write_record(row, block.scenarios, lengths, scratch(), outcome[0], results.record)

    keep = results.record.slot.shape[1] > 0
    workers.share(draw_some_lengths, lengths.start.size, lengths.values.size)
    if arrivals.values.size:
        workers.share(draw_some_arrivals, arrivals.start.size, arrivals.values.size)
    workers.share(run_and_record if keep else run_rows, size, size * (table.time_limit + block.most_requests), progress)
    return status, outcome


def new_streams(sizes: Array, dtype: Any) -> Streams:
    """Room for streams of given sizes."""
    start = np.cumsum(sizes) - sizes
    return Streams(start, sizes, np.zeros(sizes.size, np.int64), np.empty(int(sizes.sum()), dtype))


def new_scratch(block: Block, time_limit: float) -> Scratch:
    """What a thread needs for the largest scenario of a block."""
    from vecsim.kernel.quantiles import BINS
    from vecsim.kernel.tally import LATENCIES

    requests = block.most_requests + 1
    steps = int(time_limit) + 2
    slots = int(block.scenarios.max_batch_size.max())
    ring = 16
    while ring <= 2 * steps:
        ring *= 2
    return Scratch(
        arrived_at=np.empty(requests),
        enqueued_step=np.empty(requests, np.int32),
        started_step=np.empty(requests, np.int32),
        time=np.empty(steps + 1),
        calendar=np.empty(ring, np.int64),
        prefill_sum=np.empty(slots + 1),
        itl_samples=np.empty(slots + 1, np.int64),
        values=np.empty((LATENCIES, requests)),
        kept=np.empty(requests + 1),
        bin_counts=np.empty(BINS, np.int32),
        bin_places=np.empty(BINS, np.int32),
    )


class Workers:
    """Threads that share a range of work in small pieces, whoever is free taking the next."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.stop = np.zeros(1, np.uint8)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self.stop[0] = 1
            self._pool.shutdown(cancel_futures=True)

    def share(
        self,
        task: Callable[[int, int], Any],
        size: int,
        cost: float,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> None:
        """Call task(first, last) over range(size) in pieces; `cost` is that of the whole range.

        An interruption of the main thread sets `stop`, which kernels watch.
        """
        if cost < INLINE:
            task(0, size)
            progress(size)
            return
        # At least some pieces a thread, so that all end at about the same time.
        pieces = int(min(size, max(cost / PIECE, 4 * self.threads if self.threads > 1 else 1)))
        cuts = [size * i // pieces for i in range(pieces + 1)]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="vecsim")
        futures: dict[Future[Any], int] = {
            self._pool.submit(task, first, last): last - first for first, last in zip(cuts, cuts[1:], strict=False)
        }
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                progress(futures[future])


def available_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_memory(table: Table, results: float, threads: int, more: float = 1.0) -> None:
    """Refuse what would not fit: `results` bytes for results, and what threads work in.

    Raises
    ------
    ValueError
        With the size, what takes it, and what to do.
    """
    columns = 24.0 * table.size + 8.0 * sum(column.size for column in table.columns.values())
    requests = float(np.max(requests_needed(table, more)))
    streams = max(BLOCK_BYTES, 12.0 * requests)
    working = threads * (BYTES_PER_REQUEST * requests + BYTES_PER_STEP * table.time_limit)
    if results + columns >= working + streams:
        memory.require_results(table.size, (results + columns + working + streams) / table.size)
    else:
        largest = f"{requests:.3g} requests and {table.time_limit:.3g} ticks in one scenario"
        memory.require(
            results + columns + working + streams, largest, "a shorter time_limit, a lower load or fewer threads"
        )
