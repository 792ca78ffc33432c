"""A literal, slow reading of the fleet model's rules: a `token_oracle.Engine` a worker, one event at a time.

    simulate(requests, fleet, *, overheads=None, concurrency=None, think_time=0.0, time_limit=inf, draw=None,
             gives_back=True) -> Result

`requests` are `token_oracle.Request`s (copies are served); `fleet` is a `Cluster` or a `Disaggregated` of `Workers`;
`overheads`, `concurrency`, `think_time` and `time_limit` are those of `token_oracle.simulate`.
`draw(request, place, n)` gives a number below n: one draw for "random" (among the workers that can hold the request, in
their order), two for "power of two" (the second one of the n - 1 others, in their order); none where only one worker
can hold it. Places 0 and 1 are the draws for the worker that decodes, 2 and 3 those for the one that prefills only; the
same place is drawn again where a request is routed twice.

Events at equal times: timers, by arrival and request; ends of transfers, by request; arrivals at the router, by
request; boundaries, by worker. What takes no time is done at once. At a boundary the step that ends there is finished
first (tokens, ends); then the next step begins: a prefill worker is fed from the global queue; then it goes as in an
engine; and blocks that are left are reserved for requests that wait for that.

Requests that wait at a decode worker hold blocks there, for which one before them in the queue may wait. So where a
batch would be empty, and where a lone running request would preempt itself, the last in the queue of those that hold
blocks gives these back; that counts as a preemption. `gives_back=False` leaves it out: some then wait without end
(`Result.stuck`), and some begin anew without end, so that it needs a time limit.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from heapq import heappop, heappush
from math import ceil, inf
from typing import NamedTuple

from token_oracle import Batcher, Engine, Overheads, Pool, Request, Scheduled

TIMER, FLOW, ARRIVAL, BOUNDARY = range(4)

# Blocks of a memory without end, of which a share is in use too, and a poll that comes so little too early sees it
ENDLESS = 2**31 - 1
SLACK = 1e-9


# What is simulated


@dataclass
class Workers:
    """So many workers of a kind; each has its own batcher."""

    count: int
    batcher: Callable[[], Batcher]
    slots: int
    duration: Callable[[list[Scheduled]], float]
    blocks: int | None = None  # None: endless
    block_size: int = 1
    prefix_caching: bool = False
    uncached_first: bool = False
    watermark: float = 0.0
    order: str = "fcfs"
    async_scheduling: bool = False
    max_model_len: int | None = None
    # Of fleets that change (`changing_oracle`)
    spare: int = 0  # more of them that are off at first
    gpus: int = 1
    start_up_time: float = 0.0
    start_up_std: float = 0.0


@dataclass
class Cluster:
    pools: Sequence[Workers]
    router: str = "round robin"


@dataclass
class Gen1:
    max_local_prefill_length: int = 1000
    max_prefill_queue_size: int = 2


@dataclass
class IslBounding:
    threshold: float = 2048
    ratio: float = 0.7


@dataclass
class PrefillLoad:
    pass


@dataclass
class IslOrLoad(IslBounding):
    pass


@dataclass
class Transfer:
    """Every worker has a network card of that bandwidth [bytes a unit of time]; the fabric is one for all."""

    bytes_per_token: float
    bandwidth: float = inf
    fabric: float | None = None
    latency: float = 0.0
    # Of the blocks that move, on either side.
    descriptors: Callable[[list[int], list[int]], float] = lambda source, destination: len(destination)
    per_descriptor: float = 0.0
    transpose: Callable[[float], float] = lambda moved: 0.0  # seconds for so many bytes
    polling: float = 0.0
    destination_bandwidth: float | None = None  # of those that decode, where it differs


@dataclass
class Disaggregated:
    prefill: Sequence[Workers]
    decode: Sequence[Workers]
    prefill_router: str | None = None  # None: a global queue
    decode_router: str = "round robin"
    reserve: str = "arrival"  # or "prefill"
    first_token: str = "prefill"  # or "decode"
    local: Gen1 | IslBounding | PrefillLoad | IslOrLoad | None = None
    decode_busy_threshold: float | None = None
    transfer: Transfer | None = None


# What comes out


@dataclass(eq=False)
class FleetRequest(Request):
    """A request, and on a prefill worker the stand-in `of` a request, with one output token.

    What `Request` has (`enqueued_at`, `admitted_at`, `hits`, `preempted`) is of the worker that decodes; the times
    of its tokens and of its end are as the client sees them, whoever made them.
    """

    worker: int | None = field(init=False, default=None)  # the decode worker, or the only one
    prefill_worker: int | None = field(init=False, default=None)
    is_local: bool | None = field(init=False, default=None)  # None in a cluster, or dropped
    routed_at: float | None = field(init=False, default=None)
    reserved_at: float | None = field(init=False, default=None)  # of remote ones, as all that follow
    sent_to_prefill_at: float | None = field(init=False, default=None)  # to a worker
    prefill_started_at: float | None = field(init=False, default=None)
    prefill_ended_at: float | None = field(init=False, default=None)
    transfer_begun_at: float | None = field(init=False, default=None)
    noticed_at: float | None = field(init=False, default=None)
    prefill_hit_tokens: int = field(init=False, default=0)
    hit_tokens: int = field(init=False, default=0)  # at the worker that decodes
    bytes: float = field(init=False, default=0.0)
    prefill_preempted: int = field(init=False, default=0)

    of: "FleetRequest | None" = field(init=False, default=None)
    stand_in: "FleetRequest | None" = field(init=False, default=None)
    able: "list[Worker]" = field(init=False, default_factory=list)  # decode workers that can hold it
    holds: bool = field(init=False, default=False)  # waits at the decode worker with what has been moved
    moved: bool = field(init=False, default=False)  # there, and not computed anew since
    pinned: bool = field(init=False, default=False)  # a stand-in's blocks

    @property
    def started_at(self) -> float | None:
        """Of a local one its begin, of a remote one the begin of its decoding."""
        return self.admitted_at[0] if self.admitted_at else None

    @property
    def decodes(self) -> bool:
        return self.rest == 1 and (self.generated > 0 or self.moved)


class FleetStep(NamedTuple):
    begin: float
    end: float
    chosen: list[Scheduled]
    queue: int  # requests that wait at the worker while it runs (not those in its inbox)
    used: int  # blocks held while it runs, reserved and pinned ones too
    worker: int


@dataclass
class Result:
    requests: list[FleetRequest]
    workers: "list[Worker]"  # each with `ended`, `preemptions`, `pool`
    steps: list[FleetStep]  # as they begin
    routed: list[int]  # requests as they come to the router

    @property
    def stuck(self) -> list[FleetRequest]:
        """Who came, and neither ended nor was dropped."""
        came = [request for request in self.requests if request.routed_at is not None]
        return [request for request in came if request.completed_at is None and not request.dropped]


# A worker


@dataclass(eq=False)
class Worker(Engine):
    number: int = 0
    duration: Callable[[list[Scheduled]], float] = lambda chosen: 1.0
    endless: bool = False
    gives_back: bool = True
    inbox: list[FleetRequest] = field(default_factory=list)
    sent: list[FleetRequest] = field(default_factory=list)  # and not ended
    reservations: list[FleetRequest] = field(default_factory=list)  # that wait for blocks
    boundary: float = inf  # the next one; never while it sleeps
    in_step: bool = False
    ended: int = 0

    @property
    def used(self) -> int:
        return self.blocks - len(self.pool.free)

    @property
    def share(self) -> float:
        return self.used / (ENDLESS if self.endless else self.blocks)

    @property
    def has_slot(self) -> bool:
        return len(self.sent) < self.slots

    @property
    def outstanding(self) -> int:
        """By the routers' books."""
        return len(self.sent)

    def read_inbox(self) -> None:
        for request in self.inbox:
            request.enqueued_at = self.now
            self.queue_up(request)
        self.inbox = []

    # What it decodes for others

    def prompt_hit(self, request: FleetRequest) -> list[int]:
        """The cached blocks that the prompt begins with, but for its last token."""
        found: list[int] = []
        for i in range((request.prompt_tokens - 1) // self.block_size if self.caching else 0):
            block = self.pool.block_of.get(request.block_id(i))
            if block is None:
                break
            found.append(block)
        return found

    def reserve(self, request: FleetRequest) -> bool:
        """What an admission would hold, if it is free."""
        reserved = getattr(self.batcher, "reserved", None)
        hold = reserved(self, request) if reserved else self.needed(request.prompt_tokens)
        found = self.prompt_hit(request)
        idle = sum(self.pool.holders[block] == 0 for block in found)
        if len(self.pool.free) - (hold - len(found) + idle) < (self.kept_free if self.running or self.used else 0):
            return False
        for block in found:
            self.pool.share(block)
        request.blocks = found + [self.pool.take() for _ in range(hold - len(found))]
        request.hit_tokens = len(found) * self.block_size
        return True

    def last_to_give_back(self) -> FleetRequest | None:
        """The last in the queue of those that hold blocks there."""
        holding = [request for request in self.waiting if request.holds]
        return holding[-1] if holding and self.gives_back else None

    def who_gives_way(self) -> FleetRequest | None:
        """Who gives its blocks back where there is nothing else to do."""
        return self.last_to_give_back()

    def give_back(self, request: FleetRequest) -> None:
        """What was moved is lost: it keeps its place in the queue, and is computed anew."""
        self.pool.release(request.blocks)
        request.blocks, request.computed = [], 0
        request.holds = request.moved = False
        request.preempted += 1
        self.preemptions += 1

    def found_tokens(self, request: FleetRequest) -> int:
        return request.computed if request.holds else super().found_tokens(request)

    def found_idle(self, request: FleetRequest) -> int:
        return 0 if request.holds else super().found_idle(request)

    def admit(self, request: FleetRequest, hold: int, must_fit: int = 0) -> bool:
        if not request.holds:
            first = not request.admitted_at
            admitted = super().admit(request, hold, must_fit)
            if admitted and first:
                self.note_start(request, request.hits[0] * self.block_size)
            return admitted
        more = max(hold, must_fit, len(request.blocks)) - len(request.blocks)
        if len(self.pool.free) - more < (self.kept_free if self.running else 0):
            return False
        self.waiting.remove(request)
        self.running.append(request)
        request.admitted_at.append(self.now)
        request.hits.append(request.hit_tokens // self.block_size)
        request.blocks += [self.pool.take() for _ in range(hold - len(request.blocks))]
        for i in range(request.prompt_tokens // self.block_size if self.caching else 0):
            self.pool.name(request.blocks[i], request.block_id(i))
        request.holds = False
        return True

    def note_start(self, request: FleetRequest, hit_tokens: int) -> None:
        if request.of is not None:
            if request.of.prefill_started_at is None:
                request.of.prefill_started_at = self.now
            request.of.prefill_hit_tokens = hit_tokens
        elif request.prefill_ended_at is None:
            request.hit_tokens = hit_tokens

    def victim(self) -> FleetRequest:
        last = self.last_to_give_back()
        return last if last is not None and len(self.live()) == 1 else super().victim()

    def preempt(self, victim: FleetRequest) -> None:
        if victim.holds:
            self.give_back(victim)
            return
        super().preempt(victim)
        victim.moved = False
        if victim.of is not None:
            victim.of.prefill_preempted += 1

    def release(self) -> None:
        for request in self.batcher.leaving(self.running):
            self.running.remove(request)
            if not request.pinned:
                self.pool.release(request.blocks)
                request.blocks = []


# A router


@dataclass
class Router:
    kind: str
    workers: list[Worker]
    place: int  # of its draws
    draw: Callable[[FleetRequest, int, int], int]
    previous: Callable[[FleetRequest], int | None]  # the worker of the session's turn before this one
    is_open: Callable[[Worker], bool] = lambda worker: True  # those that it would choose at all

    last: int = field(init=False, default=-1)  # place of the last choice among the workers
    # Request, and among how many workers, when it was only asked
    drawn: dict[tuple[int, int], list[int]] = field(init=False, default_factory=dict)

    def ask(self, request: FleetRequest, able: list[Worker]) -> Worker | None:
        """Whom it would choose now; the choice itself then uses the same draws."""
        able = [worker for worker in able if self.is_open(worker)]
        if not able:
            return None
        last = self.last
        one = request.index, len(able)
        if one not in self.drawn:
            self.drawn[one] = self.draws(request, len(able))
        chosen = self.pick(request, able, self.drawn[one])
        self.last = last
        return chosen

    def choose(self, request: FleetRequest, able: list[Worker]) -> Worker | None:
        able = [worker for worker in able if self.is_open(worker)]
        if not able:
            return None
        draws = self.drawn.pop((request.index, len(able)), None)
        return self.pick(request, able, self.draws(request, len(able)) if draws is None else draws)

    def draws(self, request: FleetRequest, n: int) -> list[int]:
        if n == 1 or self.kind not in {"random", "power of two"}:
            return []
        if self.kind == "random":
            return [self.draw(request, self.place, n)]
        return [self.draw(request, self.place, n), self.draw(request, self.place + 1, n - 1)]

    def pick(self, request: FleetRequest, able: list[Worker], draws: list[int]) -> Worker:
        match self.kind:
            case "round robin":
                return self.next_in_turn(able)
            case "random":
                return able[draws[0]] if draws else able[0]
            case "least outstanding":
                return min(able, key=lambda worker: (worker.outstanding, worker.number))
            case "power of two":
                if not draws:
                    return able[0]
                first = able[draws[0]]
                second = [worker for worker in able if worker is not first][draws[1]]
                return min(first, second, key=lambda worker: worker.outstanding)
            case "least kv":
                return min(able, key=lambda worker: (worker.share, worker.number))
            case "session sticky":
                number = self.previous(request)
                same = [worker for worker in able if worker.number == number]
                return same[0] if same else self.next_in_turn(able)
        raise ValueError(self.kind)

    def next_in_turn(self, able: list[Worker]) -> Worker:
        while True:
            self.last = (self.last + 1) % len(self.workers)
            if self.workers[self.last] in able:
                return self.workers[self.last]


@dataclass(eq=False)
class Flow:
    """Bytes on their way; what is left is reckoned anew whenever the rate changes, and only then."""

    request: FleetRequest
    links: list[tuple[str, int]]
    left: float
    since: float
    rate: float = 0.0
    end: float = inf


# The fleet


class Simulation:
    request_type: type[FleetRequest] = FleetRequest
    worker_type: type[Worker] = Worker
    router_type: type[Router] = Router

    def __init__(self, requests, fleet, overheads, concurrency, think_time, draw, gives_back) -> None:
        self.fleet = fleet
        self.overheads = overheads
        self.think_time = think_time
        self.gives_back = gives_back
        self.now = 0.0
        self.is_over = False
        self.steps: list[FleetStep] = []
        self.routed: list[int] = []
        self.timers: list[tuple[float, float, int, Callable[[], None]]] = []
        self.arrivals: list[tuple[float, int]] = []
        self.flows: list[Flow] = []
        self.prefill_queue: list[FleetRequest] = []  # the global one

        names = [each.name for each in fields(Request) if each.init]
        self.requests = [self.request_type(**{name: getattr(request, name) for name in names}) for request in requests]
        for index, request in enumerate(self.requests):
            request.index = index

        self.workers: list[Worker] = []
        is_cluster = isinstance(fleet, Cluster)
        self.prefill = [] if is_cluster else self.make_workers(fleet.prefill)
        self.decode = self.make_workers(fleet.pools if is_cluster else fleet.decode)

        def before(request: FleetRequest) -> FleetRequest | None:
            if request.after is None or concurrency is not None:  # nobody follows another in a closed loop
                return None
            return self.requests[request.after]

        self.router = self.router_type(
            fleet.router if is_cluster else fleet.decode_router, self.decode, 0, draw,
            lambda request: before(request) and before(request).worker,
        )  # fmt: skip
        self.prefill_router = None
        if not is_cluster and fleet.prefill_router is not None:
            self.prefill_router = self.router_type(
                fleet.prefill_router, self.prefill, 2, draw,
                lambda request: before(request) and before(request).prefill_worker,
            )  # fmt: skip

        self.unsent: list[FleetRequest] = []  # of a closed loop
        self.followers: dict[int, list[FleetRequest]] = defaultdict(list)
        for request in self.requests:
            if concurrency is not None:
                request.arrived_at = inf
                self.unsent.append(request)
            elif request.after is not None:
                request.arrived_at = inf
                self.followers[request.after].append(request)
            else:
                self.ask(request, request.arrived_at)
        for _ in range(concurrency or 0):
            self.ask_next(0.0)

    def make_workers(self, pools: Sequence[Workers]) -> list[Worker]:
        return [self.make_worker(pool) for pool in pools for _ in range(pool.count)]

    def make_worker(self, pool: Workers) -> Worker:
        batcher = pool.batcher()
        blocks = pool.blocks
        if blocks is None:  # as many as could ever be held at once
            least = max(getattr(batcher, "reserve_tokens", None) or 0, pool.max_model_len or 0)
            tokens = [
                max(least, request.prompt_tokens + max(request.output_tokens, request.cap)) for request in self.requests
            ]
            blocks = sum(each // pool.block_size + 2 for each in tokens)
        worker = self.worker_type(
            batcher, pool.slots, Pool(blocks, pool.uncached_first), pool.block_size, pool.prefix_caching,
            0 if pool.blocks is None else int(pool.watermark * blocks), pool.order, pool.async_scheduling,
            pool.max_model_len, self.overheads,
            number=len(self.workers), duration=pool.duration, endless=pool.blocks is None,
            gives_back=self.gives_back,
        )  # fmt: skip
        self.furnish(worker, pool)
        self.workers.append(worker)
        return worker

    def furnish(self, worker: Worker, pool: Workers) -> None:
        """What else it has."""

    # Users

    def ask(self, request: FleetRequest, at: float) -> None:
        request.arrived_at = at
        heappush(self.arrivals, (at + self.overheads.before_queue, request.index))

    def ask_next(self, at: float) -> None:
        if self.unsent:
            self.ask(self.unsent.pop(0), at)

    def complete(self, request: FleetRequest) -> None:
        request.completed_at = request.seen_at[-1] + self.overheads.at_completion
        self.ask_next(request.completed_at + self.think_time)
        for follower in self.followers[request.index]:
            self.ask(follower, request.completed_at + follower.think)

    # Events

    def run(self, time_limit: float) -> None:
        while True:
            time, _, _, act = min(self.next_events(), key=lambda event: event[:3], default=(inf, 0, 0, None))
            if time >= time_limit or time == inf:
                break
            self.now = time
            act()
        # Steps that have begun are carried out, but nothing follows from them.
        self.is_over = True
        for worker in sorted(self.workers, key=lambda worker: (worker.boundary, worker.number)):
            if worker.in_step:
                self.now = worker.boundary
                self.finish_step(worker)

    def next_events(self) -> list[tuple[float, int, int, Callable[[], None]]]:
        events = []
        if self.timers:
            events.append((self.timers[0][0], TIMER, 0, self.next_timer))
        for flow in self.flows:
            events.append((flow.end, FLOW, flow.request.index, lambda flow=flow: self.end_flow(flow)))
        if self.arrivals:
            time, number = self.arrivals[0]
            events.append((time, ARRIVAL, number, self.next_arrives))
        for worker in self.workers:
            if worker.boundary < inf:
                events.append((worker.boundary, BOUNDARY, worker.number, lambda worker=worker: self.reach(worker)))
        return events

    def next_timer(self) -> None:
        heappop(self.timers)[-1]()

    def at(self, time: float, request: FleetRequest, act: Callable[[], None]) -> None:
        if time > self.now:
            heappush(self.timers, (time, request.arrived_at, request.index, act))
        else:
            act()

    # Boundaries

    def wake(self, worker: Worker) -> None:
        if worker.boundary == inf:
            worker.boundary = self.now

    def send(self, worker: Worker, request: FleetRequest) -> None:
        worker.inbox.append(request)
        self.wake(worker)

    def reach(self, worker: Worker) -> None:
        """The end of a step, or the begin of one: what is due after the one comes before the other."""
        if worker.in_step:
            self.finish_step(worker)
        else:
            self.begin_step(worker)

    def finish_step(self, worker: Worker) -> None:
        worker.in_step = False
        ended = worker.finish_step(self.now)
        for request in ended:
            worker.sent.remove(request)
            worker.ended += 1
        for request in ended:
            if request.of is None:
                self.complete(request)
            else:
                request.completed_at = self.now
                self.end_prefill(request)

    def begin_step(self, worker: Worker) -> None:
        if worker in self.prefill:
            self.feed()

        preempted = worker.preemptions
        chosen = worker.begin_step(self.now, worker.read_inbox)
        while not chosen:
            # Nothing is left of the batch after a preemption; or who waits needs the blocks of others who wait behind.
            if worker.preemptions == preempted:
                if (last := worker.who_gives_way()) is None:
                    break
                worker.give_back(last)
            preempted = worker.preemptions
            chosen = worker.form_batch()
        if not chosen:
            worker.boundary = inf
            self.try_reservations(worker)  # a preemption may have freed blocks, and no step follows
            return
        end = self.now + (worker.duration(chosen) + self.overheads.per_step)
        self.steps.append(FleetStep(self.now, end, chosen, len(worker.waiting), worker.used, worker.number))
        worker.in_step = True
        worker.boundary = end
        self.try_reservations(worker)  # of what is left

    # Routing

    def next_arrives(self) -> None:
        request = self.requests[heappop(self.arrivals)[1]]
        request.routed_at = self.now
        self.routed.append(request.index)
        request.able = [worker for worker in self.decode if not worker.refuses(request)]
        if not request.able:
            request.dropped = True
            self.ask_next(self.now + max(self.think_time, 1.0))  # a user who is refused never asks without end
            return
        self.route(request)

    def route(self, request: FleetRequest) -> None:
        if isinstance(self.fleet, Disaggregated):
            worker = self.router.ask(request, request.able)
            request.is_local = self.stays(request, worker)
            if not request.is_local and self.fleet.reserve == "prefill":
                self.go_to_prefill(request)
                return
        worker = self.router.choose(request, request.able)
        if request.is_local is False:
            self.want_blocks(request, worker)
            return
        self.assign(request, worker)
        self.send(worker, request)

    def assign(self, request: FleetRequest, worker: Worker) -> None:
        """From now on it is outstanding there."""
        request.worker = worker.number
        worker.sent.append(request)

    def able_to_prefill(self, request: FleetRequest) -> list[Worker]:
        return [worker for worker in self.prefill if not worker.refuses(request.stand_in)]

    def make_stand_in(self, request: FleetRequest) -> None:
        one = self.request_type(
            request.arrived_at, request.prompt_tokens, 1, request.ids, 1, request.priority, request.ttft_limit
        )
        one.index, one.of, request.stand_in = request.index, request, one

    def stays(self, request: FleetRequest, worker: Worker) -> bool:
        """Whether the decode worker computes the prompt itself."""
        self.make_stand_in(request)
        able = self.able_to_prefill(request)
        if not able:
            return True
        eff = request.prompt_tokens - len(worker.prompt_hit(request)) * worker.block_size
        rule = self.fleet.local

        def is_short() -> bool:
            return eff < rule.threshold and eff / request.prompt_tokens < rule.ratio

        def is_busy() -> bool:
            if self.prefill_router is None:
                return bool(self.prefill_queue) or not any(each.has_slot for each in able)
            asked = self.prefill_router.ask(request, able)
            return asked is not None and asked.outstanding > 0

        match rule:
            case None:
                local = False
            case Gen1():
                queue = len(self.prefill_queue) if self.prefill_router is None else self.not_started()
                local = not (eff > rule.max_local_prefill_length and queue < rule.max_prefill_queue_size)
            case IslOrLoad():
                local = is_short() or is_busy()
            case IslBounding():
                local = is_short()
            case PrefillLoad():
                local = is_busy()
        threshold = self.fleet.decode_busy_threshold
        return local and (threshold is None or worker.share <= threshold)

    def not_started(self) -> int:
        return sum(each not in worker.running for worker in self.prefill for each in worker.sent)

    # Reservations

    def want_blocks(self, request: FleetRequest, worker: Worker) -> None:
        self.assign(request, worker)
        worker.reservations.append(request)
        if worker.reservations == [request]:
            self.try_reservations(worker)

    def try_reservations(self, worker: Worker) -> None:
        while worker.reservations and worker.reserve(worker.reservations[0]):
            self.leave_line(worker)

    def leave_line(self, worker: Worker) -> None:
        """Blocks are reserved for the first that waits for that."""
        request = worker.reservations.pop(0)
        request.reserved_at = self.now
        if request.prefill_ended_at is None:
            self.go_to_prefill(request)
        else:
            self.begin_transfer(request)

    def blocks_were_freed(self, worker: Worker) -> None:
        """Beside a boundary."""
        self.try_reservations(worker)
        if worker.waiting or worker.running:
            self.wake(worker)

    # Prefill

    def go_to_prefill(self, request: FleetRequest) -> None:
        if self.prefill_router is None:
            self.prefill_queue.append(request)
            self.feed()
        else:
            self.send_to_prefill(request, self.prefill_router.choose(request, self.able_to_prefill(request)))

    def feed(self) -> None:
        """From the global queue, as far as there is room."""
        while self.prefill_queue:
            free = [worker for worker in self.able_to_prefill(self.prefill_queue[0]) if worker.has_slot]
            if not free:
                break
            worker = min(free, key=lambda worker: (len(worker.sent), worker.number))
            self.send_to_prefill(self.prefill_queue.pop(0), worker)

    def send_to_prefill(self, request: FleetRequest, worker: Worker) -> None:
        request.prefill_worker = worker.number
        request.sent_to_prefill_at = self.now
        worker.sent.append(request.stand_in)
        self.send(worker, request.stand_in)

    def end_prefill(self, one: FleetRequest) -> None:
        request = one.of
        request.prefill_ended_at = self.now
        if self.fleet.first_token == "prefill":
            request.token_at.append(self.now)
            request.seen_at.append(self.now + self.overheads.per_output_token)
            if request.ended:
                if request.worker is not None:
                    worker = self.workers[request.worker]
                    worker.sent.remove(request)
                    worker.pool.release(request.blocks)
                    request.blocks = []
                    if not self.is_over:
                        self.blocks_were_freed(worker)
                self.complete(request)
                return
        one.pinned = True
        if self.is_over:
            return
        if self.fleet.reserve == "arrival":
            self.begin_transfer(request)
        else:
            self.want_blocks(request, self.router.choose(request, request.able))

    # Transfer

    def begin_transfer(self, request: FleetRequest) -> None:
        transfer = self.fleet.transfer
        request.transfer_begun_at = self.now
        if transfer is None:
            self.notice(request)
            return
        worker = self.workers[request.worker]
        hit, end = request.hit_tokens // worker.block_size, worker.needed(request.prompt_tokens)
        request.bytes = (request.prompt_tokens - request.hit_tokens) * transfer.bytes_per_token
        descriptors = transfer.descriptors(request.stand_in.blocks[hit:end], request.blocks[hit:end])
        start = self.now + (transfer.latency + descriptors * transfer.per_descriptor)
        self.at(start, request, lambda: self.begin_flow(request))

    def begin_flow(self, request: FleetRequest) -> None:
        transfer = self.fleet.transfer
        widths = transfer.bandwidth, transfer.destination_bandwidth, transfer.fabric
        if request.bytes == 0 or all(width in {None, inf} for width in widths):
            self.all_flowed(request)
            return
        links = [("source", request.prefill_worker), ("destination", request.worker)]
        if transfer.fabric is not None:
            links.append(("fabric", 0))
        self.flows.append(Flow(request, links, request.bytes, self.now))
        self.share_links()

    def end_flow(self, flow: Flow) -> None:
        self.flows.remove(flow)
        self.share_links()
        self.all_flowed(flow.request)

    def all_flowed(self, request: FleetRequest) -> None:
        transfer, begun = self.fleet.transfer, request.transfer_begun_at
        end = self.now + transfer.transpose(request.bytes)
        if transfer.polling > 0:
            polls = ceil((end - begun) / transfer.polling - SLACK)
            end = max(end, begun + polls * transfer.polling)
        self.at(end, request, lambda: self.notice(request))

    def width_of(self, link: tuple[str, int]) -> float:
        transfer = self.fleet.transfer
        if link[0] == "fabric":
            return transfer.fabric
        differs = link[0] == "destination" and transfer.destination_bandwidth is not None
        return transfer.destination_bandwidth if differs else transfer.bandwidth

    def share_links(self) -> None:
        for flow in self.flows:
            if flow.end <= self.now:
                continue  # it is done, only not yet seen to be
            rate = inf
            for link in flow.links:
                rate = min(rate, self.width_of(link) / sum(link in each.links for each in self.flows))
            if rate != flow.rate:
                flow.left = max(0.0, flow.left - flow.rate * (self.now - flow.since))
                flow.since, flow.rate = self.now, rate
                flow.end = self.now + flow.left / rate

    def notice(self, request: FleetRequest) -> None:
        one, source = request.stand_in, self.workers[request.prefill_worker]
        request.noticed_at = self.now
        one.pinned = False
        if one not in source.running:  # else its blocks are freed as it leaves
            source.pool.release(one.blocks)
            one.blocks = []
            self.blocks_were_freed(source)
        request.computed = request.known - 1
        request.holds = request.moved = True
        self.send(self.workers[request.worker], request)


def simulate(
    requests: Sequence[Request],
    fleet: Cluster | Disaggregated,
    *,
    overheads: Overheads | None = None,
    concurrency: int | None = None,
    think_time: float = 0.0,
    time_limit: float = inf,
    draw: Callable[[FleetRequest, int, int], int] | None = None,
    gives_back: bool = True,
) -> Result:
    """Serve the requests to the end, or as long as steps begin before the time limit."""
    if draw is None:
        numbers = random.Random(0)

        def draw(request: FleetRequest, place: int, n: int) -> int:
            return numbers.randrange(n)

    simulation = Simulation(requests, fleet, overheads or Overheads(), concurrency, think_time, draw, gives_back)
    simulation.run(time_limit)
    return Result(simulation.requests, simulation.workers, simulation.steps, simulation.routed)
