"""Run a block of scenarios of the token model: draw its streams, give each thread room, call the kernels."""

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vecsim import memory
from vecsim.kernel.state import (
    BAD_DURATION,
    DONE,
    INTERRUPTED,
    OUT_OF_STEPS,
    TOO_LONG,
    Array,
    Fleet,
    Life,
    StepRecord,
    Streams,
    Tiers,
    TokenJob,
    TokenScratch,
    TokenStreams,
    TokenWork,
    Transfer,
)
from vecsim.lengths import MOST_TOKENS
from vecsim.lives import Lives, lives_of
from vecsim.load import OUTPUT, PROMPT, TURNS
from vecsim.paths import Path, Rise, path_of, rise_of
from vecsim.scenarios import BLOCK_BYTES, Block, Table, requests_needed, same_rule
from vecsim.series import total_over_time
from vecsim.streams import draw_streams, values_of
from vecsim.threads import INLINE, Workers
from vecsim.token_scenarios import TokenTables
from vecsim.variables import CHANGING_VARIABLES

BYTES_PER_REQUEST = 240  # of a thread's room
LOGGED = 1 << 12  # events of workers' lives that there is room for
FEW_STEPS = 1 << 14  # that there is room for where the queue is kept; more if they are too few


class Views(NamedTuple):
    """What a router that goes by caches knew when it last chose a worker for each request [request]."""

    expected_blocks: Array  # of the prompt, that it counted on
    view_age: Array  # seconds


class TokenRun(NamedTuple):
    """What is left of the scenario that was run last."""

    requests: int
    steps: StepRecord
    path: Path | None  # of a fleet that keeps prefill apart
    lives: Lives | None  # of a fleet whose workers come and go
    rise: Rise | None  # of a fleet whose workers have tiers below their caches
    views: Views | None  # of a cluster whose router goes by what workers have cached


def run_token_block(
    table: Table,
    block: Block,
    measured: Any,
    results: Any,
    workers: Workers,
    progress: Callable[[int], Any] = lambda done: None,
    steps: int = 0,
) -> tuple[Array, TokenRun | None]:
    """Draw a block's streams and run its scenarios.

    Parameters
    ----------
    steps : int
        Keep a record of so many steps.

    Returns
    -------
    status : array
        Of each scenario.
    run : TokenRun or None
        Of the scenario that was run last.
    """
    from vecsim.kernel.custom import token_kernel
    from vecsim.kernel.token_record import write_token_record
    from vecsim.kernel.token_state import STATE, UNSEEN
    from vecsim.token_scenarios import NO_RULES

    shared = table.token
    assert shared is not None
    recorded = np.concatenate(shared.times) if shared.times else np.empty(0)
    numbers, arrivals = draw_streams(table, block, recorded, workers)
    streams = token_streams(table, numbers, arrivals)
    size = block.rows.size
    status = np.full(size, INTERRUPTED, np.int64)
    room = Room(table, block, numbers, streams)
    room.require(workers.threads)
    own = threading.local()
    latest: dict[str, Any] = {"run": None}
    keeps_requests, keeps_queue = results.record.arrived_at.shape[1] > 0, measured.instants.size > 0
    if keeps_queue:
        steps = FEW_STEPS

    def job() -> TokenJob:
        if not hasattr(own, "room"):
            own.room = room.make()
            own.record = room_for_steps(steps)
        scratch, work, fleet, life, tiers, (nodes, node_of, owned, cached) = own.room
        return TokenJob(
            block.scenarios, block.stream, block.arrival_stream, streams, table.time_limit, measured.warmup,
            measured.quantiles, scratch, work, fleet, life, tiers, nodes, node_of, owned, cached, own.record,
            results.metrics, results.enqueued, status, workers.stop,
        )  # fmt: skip

    kernels = {
        rule: token_kernel(table.rules[rule] if rule >= 0 else NO_RULES, job()) for rule in set(block.own.tolist())
    }

    def run_some(first: int, last: int) -> tuple[int, int]:
        outcome = DONE, 0
        for rule, begin, end in same_rule(block.own, first, last):
            outcome = kernels[rule](begin, end, job())
            if (status[begin:end] == BAD_DURATION).any():
                raise ValueError(bad_duration(table, rule, own.room[1]))
            if (status[begin:end] == TOO_LONG).any():
                raise ValueError(
                    f"a scenario must have fewer than 2**30 decode steps, and prompts of its conversations at most "
                    f"{MOST_TOKENS:,} tokens: shorten time_limit, or turns"
                )
        return outcome

    def run_and_record(first: int, last: int) -> None:
        for row in range(first, last):
            _, requests = run_some(row, row + 1)
            while keeps_queue and status[row] == OUT_OF_STEPS:
                own.record = room_for_steps(4 * own.record.times.shape[1])
                _, requests = run_some(row, row + 1)
            if status[row] != DONE:
                continue
            made = trimmed(own.record, own.room[1])
            if keeps_requests:
                kept = write_token_record(row, requests, job(), results.record)
                fleet, came = own.room[2], own.room[1].own[STATE, :requests] != UNSEEN
                path = path_of(fleet, came) if room.moves else None
                lives = lives_of(own.room[3], came) if room.changes else None
                rise = rise_of(own.room[4], fleet, came) if room.tiered else None
                views = Views(fleet.expected[:requests][came], fleet.view_age[:requests][came]) if room.views else None
                latest["run"] = TokenRun(kept, made, path, lives, rise, views)
            if keeps_queue:
                results.queue[row] = queue_at(measured.instants, made)

    # How much work that is can't be known; a closed loop's requests are a guess.
    cost = 40.0 * size * block.most_requests
    run = run_and_record if keeps_requests or keeps_queue else run_some
    workers.share(run, size, max(cost, INLINE) if table.rules else cost, progress)
    if streams.outside[0]:
        warnings.warn(
            f"{int(streams.outside[0]):,} steps were outside the tables of the step time: extrapolated", stacklevel=2
        )
    return status, latest["run"]


def keeps_apart(fleets: Any) -> bool:
    """Whether any fleet [fleet, field] keeps prefill apart."""
    from vecsim.kernel.token_scenarios import SPLIT

    return any(numbers[SPLIT] > 0 for numbers in fleets)


def comes_and_goes(fleets: Any) -> bool:
    """Whether workers of any fleet [fleet, field] come and go."""
    from vecsim.kernel.token_scenarios import CONTROL

    return any(numbers[CONTROL] != 0 for numbers in fleets)


def keeps_tiers(groups: Any) -> bool:
    """Whether any kind of worker [kind, field] has a tier below its cache."""
    from vecsim.kernel.token_scenarios import CAPACITY

    return any(numbers[CAPACITY] > 0 for numbers in groups)


def goes_by_caches(shared: TokenTables) -> bool:
    """Whether there are clusters, and the router of any goes by what workers have cached."""
    from vecsim.kernel.token_scenarios import FIELDS, ROUTER, ROUTER_FIELDS

    credit, caching = ROUTER + ROUTER_FIELDS.index("credit"), FIELDS.index("caching")
    looks = any(numbers[credit] != 0 for numbers in shared.fleets) and not keeps_apart(shared.fleets)
    return looks and any(numbers[caching] != 0 for numbers in shared.groups)


def room_for_steps(steps: int) -> StepRecord:
    """Room for the record of so many steps.

    Raises
    ------
    ValueError
        When it would not fit in memory.
    """
    memory.require(64.0 * steps, f"{steps:.3g} steps in one scenario", "a shorter time_limit or fewer threads")
    return StepRecord(np.empty((2, steps)), np.empty((7, steps), np.int64))


def queue_at(instants: Array, made: StepRecord) -> Array:
    """Queue sizes at some instants [instant]: those of the steps that began last; 0 before the first."""
    from vecsim.kernel.token_state import BEGIN, STEP_QUEUE, STEP_WORKER

    time, queue = total_over_time(made.times[BEGIN], made.counts[STEP_QUEUE], made.counts[STEP_WORKER])
    return np.append(0, queue)[np.searchsorted(time, instants, side="right")]


def trimmed(record: StepRecord, work: TokenWork) -> StepRecord:
    """The steps that were made, of all that there is room for."""
    from vecsim.kernel.token_state import ALL_STEPS

    made = int(work.counts[ALL_STEPS])
    return StepRecord(record.times[:, :made], record.counts[:, :made])


def bad_duration(table: Table, place: int, work: TokenWork) -> str:
    """What to say of a step whose duration can't be; `place` is that of its rule in the table's."""
    from vecsim.kernel.token_state import LONGEST, NOW

    rule = table.rules[place][1] if place >= 0 else None
    name = f"rule {rule.py_func.__name__}" if rule is not None else "the step time"
    return (
        f"{name} must return a number of seconds > 0 that is no infinity and is more than the clock's last digit, "
        f"got {work.sums[LONGEST]:g} at {work.sums[NOW]:g} s"
    )


def token_streams(table: Table, numbers: Streams, arrivals: Streams) -> TokenStreams:
    """Everything that requests are made of."""
    from vecsim.kernel.duration import FIELDS
    from vecsim.kernel.token_scenarios import FLEET_FIELDS, GROUP_FIELDS

    shared = table.token
    assert shared is not None

    def joined(parts: list[Array], dtype: Any) -> Array:
        return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)

    counts = joined(shared.id_counts, np.int64)
    return TokenStreams(
        numbers=numbers,
        arrivals=arrivals,
        stages=np.array(shared.stages or [(1.0, 1.0)], np.float64),
        ids=joined(shared.ids, np.int64),
        id_start=np.cumsum(counts) - counts,
        id_count=counts,
        classes=np.ascontiguousarray(np.array(shared.classes, np.float64).T),
        terms=np.concatenate(shared.terms) if shared.terms else np.empty((0, FIELDS)),
        grids=joined(shared.grids, np.float64),
        values=joined(shared.values, np.float64),
        outside=np.zeros(1, np.int64),
        fleets=np.array(shared.fleets or np.empty((0, len(FLEET_FIELDS)))),
        groups=np.array(shared.groups or np.empty((0, GROUP_FIELDS))),
        events=np.array([*shared.events, (np.inf, 0.0)]),
        planners=np.array(shared.planners, np.float64),
    )


class Room:
    """How much room a thread needs for the largest scenario of a block."""

    def __init__(self, table: Table, block: Block, numbers: Streams, streams: TokenStreams) -> None:
        from vecsim.kernel.token_scenarios import (
            FIELDS,
            IN_FLIGHT,
            PREFILL_ROUTER,
            ROUTER,
            ROUTER_FIELDS,
            TRANSFER,
            WORKERS,
        )

        assert table.token is not None
        column = {name: block.scenarios[:, i] for i, name in enumerate(FIELDS)}
        self.requests = block.most_requests + 1
        self.slots = int(column["slots"].max())
        groups = streams.groups[:, FIELDS.index("block_size")]
        self.block_size = int(max(column["block_size"].max(), groups.max(initial=0)))
        self.classes = max(int(column["classes"].max()), 1)
        self.longest = int(numbers.longest[block.stream[:, OUTPUT]].max())
        self.ids, self.with_ids, self.nodes = self._blocks(column, block, numbers, streams)
        self.caching = bool(column["caching"].any())
        fleets = streams.fleets[np.unique(column["fleet"][column["fleet"] >= 0]).astype(np.int64)]
        self.workers = int(fleets[:, WORKERS].max(initial=0))
        credits = fleets[:, [at + ROUTER_FIELDS.index("credit") for at in (ROUTER, PREFILL_ROUTER)]]
        self.looks_inside = self.caching and bool(credits.any())
        self.moves = keeps_apart(fleets)
        self.changes = comes_and_goes(fleets)
        self.counts_changes = comes_and_goes(table.token.fleets)  # in other blocks too
        self.tiered = keeps_tiers(streams.groups)
        self.most_batches = int(streams.groups[:, IN_FLIGHT].max(initial=0))
        self.views = goes_by_caches(table.token)
        self.logged = LOGGED if self.changes else 0
        merging = fleets[:, TRANSFER + Transfer._fields.index("merges")] != 0
        most = streams.groups[:, FIELDS.index("blocks")].max(initial=0)
        self.placed = int(most) if merging.any() else 0
        self.first_fit = bool(fleets[merging, TRANSFER + Transfer._fields.index("first_fit")].any())
        self.kinds = len(streams.groups)
        self.worker_slots = int(streams.groups[:, FIELDS.index("slots")].max(initial=0)) + 1
        self.ring = 1 << max(3, (self.longest + 2).bit_length())

    def require(self, threads: int) -> None:
        """Refuse what would not fit in memory.

        Raises
        ------
        ValueError
            With the size, what takes it, and what to do.
        """
        from vecsim.kernel.kv import NODE_ROWS, OWNED_ROWS

        cached = (4.0 * (NODE_ROWS * self.nodes + self.ids + OWNED_ROWS * self.requests) + self.with_ids) * self.caching
        parts = {
            f"{self.requests:.3g} requests in one scenario": float(BYTES_PER_REQUEST) * self.requests,
            f"the ways of {self.requests:.3g} requests' blocks": 280.0 * self.requests * self.tiered,
            f"outputs of up to {self.longest:.3g} tokens": 8.0 * self.ring,
            f"{self.with_ids:.3g} blocks with ids, of the prompts of all requests": cached,
            f"{self.workers:.3g} workers": float(self.workers) * self.bytes_per_worker(),
        }
        memory.require(
            threads * sum(parts.values()),
            max(parts, key=lambda what: parts[what]),
            "a shorter time_limit, a lower load, shorter conversations, fewer workers or threads",
        )

    def bytes_per_worker(self) -> float:
        """What a worker of a fleet takes beside the requests."""
        from vecsim.kernel import token_state
        from vecsim.kernel.kv import NODE_ROWS
        from vecsim.kernel.placed import PLACE_WORDS

        numbers = 8.0 * (token_state.COUNTS + token_state.SUMS + PLACE_WORDS + self.classes + 4)
        batch = 4.0 * (2 * self.ring + self.block_size + 12 * self.worker_slots + 64)
        known = 16.0 * self.ids * self.looks_inside
        if self.tiered:
            known += self.ids * (36.0 + 32.0 * self.looks_inside) + 2000.0 * self.most_batches
        return numbers + batch + known + 4.0 * (NODE_ROWS * self.nodes + self.ids) * self.caching

    def _blocks(
        self, column: dict[str, Array], block: Block, numbers: Streams, streams: TokenStreams
    ) -> tuple[int, int, int]:
        """(ids of blocks, blocks of requests that have given ids, nodes), at most."""
        ids = with_ids = nodes = 0
        names = ("block_size", "trace", "id_blocks", "prefix_tokens", "prefix_groups", "sessions", "blocks")
        cached = np.flatnonzero(column["caching"])
        talk = block.stream[cached][:, [PROMPT, OUTPUT, TURNS]] * column["sessions"][cached, np.newaxis]
        different = np.unique(np.column_stack([*(column[name][cached] for name in names), talk]), axis=0)
        for size, trace, id_blocks, prefix_tokens, groups, sessions, blocks, prompt, output, turns in different:
            if trace >= 0:
                own_ids = own_with = streams.ids.size * id_blocks
            else:
                prefix = prefix_tokens // size
                own_ids, own_with = prefix * groups, prefix * self.requests
                if sessions:
                    tokens = sum(float(values_of(numbers, int(at)).sum(dtype=np.int64)) for at in (prompt, output))
                    own = tokens / size + self.requests
                    own_ids += own
                    own_with += int(numbers.longest[int(turns)]) * own
            ids, with_ids = max(ids, int(own_ids)), max(with_ids, int(own_with))
            # A node holds a block at least; beside blocks with ids, each request has two runs at most.
            nodes = max(nodes, int(min(blocks, own_ids + own_with + 2 * self.requests)) + 4)
        return ids, with_ids, nodes

    def make(self) -> tuple[TokenScratch, TokenWork, Fleet, Life, Tiers, tuple[Array, Array, Array, Array]]:
        """Room for one thread."""
        from vecsim.kernel import token_state
        from vecsim.kernel.kv import NODE_ROWS, OWNED_ROWS
        from vecsim.kernel.quantiles import BINS
        from vecsim.kernel.tally import LATENCIES

        n, slots = self.requests, self.slots + 1

        def whole(*shape: int) -> Array:
            return np.zeros(shape, np.int32)

        scratch = TokenScratch(
            arrived_at=np.empty(n + 1),
            prompt_tokens=whole(n),
            output_tokens=whole(n),
            max_tokens=whole(n),
            classes=whole(n),
            follower=whole(n),
            think=np.empty(n),
            shared=whole(n),
            own_start=np.zeros(n, np.int64),
            id_start=np.zeros(n, np.int64),
            prefix=whole(n),
            prefix_id=np.zeros(n, np.int64),
            own_id=np.zeros(n, np.int64),
            values=np.empty((LATENCIES, n)),
            kept=np.empty(n + 1),
            bins=np.empty(n, np.uint16),
            bin_counts=np.empty(BINS, np.int32),
            bin_places=np.empty(BINS, np.int32),
            gap_values=np.empty(token_state.GAP_BINS),
        )
        work = TokenWork(
            counts=np.zeros(token_state.COUNTS, np.int64),
            sums=np.zeros(token_state.SUMS),
            gaps=np.zeros(token_state.GAP_BINS, np.int64),
            own=whole(token_state.OWN_ROWS, n),
            times=np.zeros((token_state.TIME_ROWS, n)),
            first=whole(self.ring),
            unclip=whole(self.ring),
            residues=whole(self.block_size),
            prefills=whole(slots),
            chunk_of=whole(slots),
            chunk_tokens=whole(slots),
            stack=whole(max(2 * slots, 64)),
            coming=whole(n),
            ended=whole(slots),
            joined=whole(slots),
            joined_at=np.empty(slots),
            newcomers=whole(slots),
            late=np.zeros(self.classes, np.int64),
            starving=whole(2 * slots),
        )
        requests = n if self.caching else 0
        cache = (
            whole(NODE_ROWS, self.nodes if self.caching else 0),
            whole(self.ids if self.caching else 0),
            whole(OWNED_ROWS, requests),
            np.zeros(self.with_ids + 1 if self.caching else 0, np.uint8),
        )
        return scratch, work, self.make_fleet(), self.make_life(), self.make_tiers(), cache

    def make_fleet(self) -> Fleet:
        """Room for the largest fleet of a block; of no worker where there is none."""
        from vecsim.kernel import handover, token_state
        from vecsim.kernel.kv import NODE_ROWS, OWNED_ROWS
        from vecsim.kernel.links import links_for
        from vecsim.kernel.parts import MEANS
        from vecsim.kernel.placed import PLACE_WORDS
        from vecsim.kernel.places import CHAIN_ROWS, SIDES
        from vecsim.kernel.routing import SURVEY_ROWS, VIEWS
        from vecsim.kernel.runs import allocator_for
        from vecsim.kernel.seen import places
        from vecsim.kernel.world import BETWEEN

        workers, slots = self.workers, self.worker_slots
        n = self.requests if workers else 0
        moving = n if self.moves else 0  # from workers that prefill only
        sent = n if self.moves or self.changes else 0  # what may take time
        leaves = 1 << max(workers - 1, 1).bit_length()

        def whole(*shape: int) -> Array:
            return np.zeros(shape, np.int32)

        def number(*shape: int) -> Array:
            return np.zeros(shape, np.int64)

        return Fleet(
            group=whole(workers),
            put=number(workers, PLACE_WORDS),
            blocks=number(workers),
            all_blocks=number(1),
            fits=np.zeros(self.kinds, np.uint8),
            present=number(self.kinds),
            away=np.zeros(workers, np.uint8),
            ghosts=number(workers),
            sent=number(workers),
            sent_blocks=number(workers),
            sent_new=number(workers),
            expected=whole(n),
            survey=np.zeros((SURVEY_ROWS, workers)),
            turn=number(2),
            before=whole(n),
            clock=np.empty(2 * leaves),
            loads=np.empty((2, 2 * leaves)),
            way=whole(handover.WAY_ROWS, n),
            instants=np.zeros((handover.INSTANT_ROWS, sent)),
            moved=np.zeros(moving),
            left=np.zeros(moving),
            runs=whole(moving),
            allocator=allocator_for(workers, self.placed, self.first_fit),
            next_block=whole(workers, self.placed),
            chains=whole(SIDES * CHAIN_ROWS, moving if self.placed else 0),
            places=whole(SIDES, self.placed + 1),
            timers=whole(sent),
            between=number(BETWEEN),
            waiting=number(2 * workers),
            ones=np.ones(moving, np.int32),
            own=whole(token_state.OWN_ROWS, moving),
            times=np.zeros((token_state.TIME_ROWS, moving)),
            owned=whole(OWNED_ROWS, moving if self.caching else 0),
            own_blocks=np.zeros(self.with_ids + 1 if self.caching and moving else 0, np.uint8),
            links=links_for(workers + 1, moving),
            bandwidths=np.zeros(workers + 1),
            unmeasured=number(token_state.GAP_BINS),
            counts=number(workers, token_state.COUNTS),
            sums=np.zeros((workers, token_state.SUMS)),
            first=whole(workers, self.ring),
            unclip=whole(workers, self.ring),
            residues=whole(workers, self.block_size),
            prefills=whole(workers, slots),
            chunk_of=whole(workers, slots),
            chunk_tokens=whole(workers, slots),
            stack=whole(workers, max(2 * slots, 64)),
            ended=whole(workers, slots),
            joined=whole(workers, slots),
            joined_at=np.zeros((workers, slots)),
            newcomers=whole(workers, slots),
            late=number(workers, self.classes),
            starving=whole(workers, 2 * slots),
            nodes=whole(workers, NODE_ROWS, self.nodes if self.caching else 0),
            node_of=whole(workers, self.ids if self.caching else 0),
            seen=np.zeros((workers, places(self.ids, self.tiered) if self.looks_inside or self.tiered else 0)),
            parts=np.zeros(MEANS if self.moves else 0),
            view_age=np.zeros(n if self.views else 0),
            views=np.zeros(VIEWS if self.views else 0),
        )

    def make_tiers(self) -> Tiers:
        """Room for what is below the caches of workers, where any scenario of a block has that."""
        from vecsim.kernel import tier_sets, tiers
        from vecsim.kernel.links import links_for

        workers = self.workers if self.tiered else 0
        n = self.requests if self.tiered else 0
        ids = self.ids if self.tiered else 0
        batches = self.most_batches

        def whole(*shape: int) -> Array:
            return np.zeros(shape, np.int32)

        return Tiers(
            on=False,
            links=links_for(workers * tier_sets.LEVELS * tiers.WAYS, tier_sets.LEVELS * (n + workers * batches)),
            bandwidths=np.zeros(workers * tier_sets.LEVELS * tiers.WAYS),
            after=whole(workers, tier_sets.LEVELS, ids + 1),
            before=whole(workers, tier_sets.LEVELS, ids + 1),
            line=whole(workers, tier_sets.LEVELS, ids),
            lists=np.zeros((workers, tier_sets.LEVELS, tier_sets.BATCHES + batches), np.int64),
            sightings=whole(workers, ids),
            changed=np.zeros((workers, 2 * tier_sets.LEVELS, ids if self.looks_inside else 0)),
            way=whole(tier_sets.WAY_ROWS, n),
            instants=np.zeros((tier_sets.INSTANT_ROWS, n)),
            numbers=np.zeros((tier_sets.NUMBER_ROWS, workers), np.int64),
            means=np.zeros(tiers.MEANS if self.tiered else 0),
        )

    def make_life(self) -> Life:
        """Room for the lives of workers, where those of any scenario of a block change."""
        from vecsim.kernel import life
        from vecsim.scaling import MEMORY, VIEW_ARRAYS

        workers = self.workers if self.changes else 0
        n = self.requests if self.changes else 0
        leaves = 1 << max(self.workers - 1, 1).bit_length()
        return Life(
            whole=np.zeros((life.WHOLE_ROWS, workers), np.int64),
            due=np.zeros((life.DUE_ROWS, workers)),
            clock=np.zeros(2 * leaves),
            spent=np.zeros((life.SPENT_ROWS, workers)),
            fate=np.zeros((life.FATE_ROWS, n), np.int32),
            rings=np.zeros((life.RING_ROWS, n)),
            alarms=np.zeros((life.PARTS, n), np.int32),
            numbers=np.zeros(life.NUMBERS, np.int64),
            times=np.zeros(life.TIMES),
            log=np.zeros((4, self.logged)),
            events=np.zeros((0, life.EVENT_FIELDS)),
            shown=np.zeros((len(VIEW_ARRAYS), workers)),
            sums=np.zeros(life.PLANNER_SUMS),
            planner=np.zeros(0),
            memory=np.zeros(MEMORY),
            metrics=np.zeros(len(CHANGING_VARIABLES) if self.counts_changes else 0),
        )


def check_token_memory(table: Table, results: float, threads: int, more: float = 1.0) -> None:
    """Refuse what would not fit: `results` bytes for results, and what threads work in.

    Raises
    ------
    ValueError
        With the size, what takes it, and what to do.
    """
    columns = 24.0 * table.size + 8.0 * sum(column.size for column in table.columns.values())
    requests = float(np.max(requests_needed(table, more)))
    working = (threads + 1) * BYTES_PER_REQUEST * requests + max(BLOCK_BYTES, 32.0 * requests)
    total = results + columns + working
    if table.size > 1 and results + columns >= working:
        memory.require_results(table.size, total / table.size)
    else:
        memory.require(
            total, f"{requests:.3g} requests in one scenario", "a shorter time_limit, a lower load or fewer threads"
        )
