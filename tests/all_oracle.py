"""Fleets that change and fail, with tiers below their workers' caches: `changing_oracle` and `tier_oracle` in one.

    simulate(requests, fleet, **as changing_oracle.simulate) -> changing_oracle.Result

`fleet` has `tier_oracle.TieredWorkers`, and its routers may be `ByCache`: these go by what workers have cached, as far
as they know, and by the blocks of prompts there. Of workers that cost the same one is drawn, at place 0 of those that
decode, 2 of those that prefill only. Chosen where no other has a rule:

- A worker that crashes, or is off, has nothing in its tiers, nor anything on its way up or down. Who waits there to be
  brought up, or is being brought up, learns of a crash as those do that are served there.
- What was brought up for a request, and when, is told of the admission that its hits are told of: the first one at a
  worker that serves all of it, the last one at a prefill worker.
- A change of a cache is told at the end of the step that is under way, or that begins next; one of a lower tier at
  once. All that is told is known a latency later.
- Blocks of a prompt are to be computed at a worker that computes it, but for those that a router took to be there (in
  any tier) as it chose it last, until the end of the step that computes the last of them.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import changing_oracle
import fleet_oracle
from changing_oracle import ChangingRequest, ChangingWorker, Result
from tier_oracle import Tier, TieredPool, TieredSimulation, TieredWorker, TieredWorkers, is_own


@dataclass(frozen=True)
class ByCache:
    """Dynamo's routers, of its first generation or the second."""

    generation: int
    latency: float = 0.0
    credit: float = 1.0
    scale: float = 1.0
    host_credit: float = 0.75
    disk_credit: float = 0.25
    counts_requests: bool = True


@dataclass
class History:
    """Which ids came and went, each with when it was told; None: it waits for a step."""

    changes: list[tuple[float | None, Hashable, bool]] = field(default_factory=list)

    def note(self, told_at: float | None, id_: Hashable, there: bool) -> None:
        self.changes.append((told_at, id_, there))

    def tell(self, at: float) -> None:
        self.changes = [(at if told_at is None else told_at, *change) for told_at, *change in self.changes]

    def knows(self, id_: Hashable, at: float) -> bool:
        known = [
            there for told_at, other, there in self.changes if other == id_ and told_at is not None and told_at <= at
        ]
        return bool(known) and known[-1]


class KnownPool(TieredPool):
    def __init__(self, blocks: int, uncached_first: bool, note: Callable[[Hashable, bool], None]) -> None:
        super().__init__(blocks, uncached_first)
        self.note = note

    def register(self, id_: Hashable) -> None:
        super().register(id_)
        if not is_own(id_):
            self.note(id_, True)

    def forget(self, block: int) -> None:
        id_ = self.id_of[block]
        if id_ is not None and not is_own(id_) and block not in self.late:
            self.note(id_, False)
        super().forget(block)


@dataclass
class KnownTier(Tier):
    clock: Callable[[], float] = lambda: 0.0
    history: History = field(default_factory=History)

    def put(self, id_: Hashable) -> None:
        before = set(self.held)
        super().put(id_)
        for gone in before - set(self.held):
            self.history.note(self.clock(), gone, False)
        self.history.note(self.clock(), id_, True)


class Request(ChangingRequest):
    expected = 0  # blocks that the router took to be there
    new_blocks = 0  # to be computed where it is


@dataclass(eq=False)
class Worker(ChangingWorker, TieredWorker):
    history: History = field(default_factory=History)
    clock: Callable[[], float] = lambda: 0.0

    def empty(self) -> None:
        for request in self.sent:
            request.rose, request.in_line = None, False
        super().empty()
        self.make_memory()
        self.sightings, self.rising, self.done = Counter(), [], []

    def make_memory(self) -> None:
        self.history = History()
        self.pool = KnownPool(self.blocks, self.pool.uncached_first, self.note)
        self.tiers = [
            KnownTier(
                tier.capacity, tier.bandwidth, came=tier.came, went=tier.went, dropped=tier.dropped, clock=self.clock
            )
            for tier in self.tiers
        ]

    def note(self, id_: Hashable, there: bool) -> None:
        self.history.note(self.boundary if self.in_step else None, id_, there)

    def finish_step(self, end: float) -> list[Request]:
        ended = super().finish_step(end)
        for one in self.chosen:
            if one.request.token_at and one.request.token_at[-1] == end:
                one.request.new_blocks = 0
        return ended

    def known(self, request: Request, rule: ByCache, at: float) -> tuple[float, int]:
        """(blocks of its prompt that are known to be there, by their credit; how many these are)."""
        most = min(len(request.ids), (request.prompt_tokens - 1) // self.block_size) if self.caching else 0
        ids = [request.block_id(i) for i in range(most if rule.credit > 0 else 0)]
        found = 0
        while found < len(ids) and self.history.knows(ids[found], at):
            found += 1
        credit = float(found)
        while found < len(ids):
            tiers = [place for place, tier in enumerate(self.tiers) if tier.history.knows(ids[found], at)]
            if not tiers:
                break
            credit += (rule.host_credit, rule.disk_credit)[tiers[0]] if rule.generation == 2 else 0.0
            found += 1
        return credit, found


@dataclass
class Router(fleet_oracle.Router):
    clock: Callable[[], float] = lambda: 0.0

    def choose(self, request: Request, able: list[Worker]) -> Worker | None:
        request.expected = 0
        worker = super().choose(request, able)
        if worker is not None and isinstance(self.kind, ByCache):
            _, request.expected = worker.known(request, self.kind, self.clock() - self.kind.latency)
        return worker

    def pick(self, request: Request, able: list[Worker], draws: list[int]) -> Worker:
        if not isinstance(self.kind, ByCache):
            return super().pick(request, able, draws)
        costs = {worker.number: self.cost(request, worker) for worker in able}
        best = [worker for worker in able if costs[worker.number] == min(costs.values())]
        return best[self.draw(request, self.place, len(best))]

    def cost(self, request: Request, worker: Worker) -> float:
        rule = self.kind
        hit, _ = worker.known(request, rule, self.clock() - rule.latency)
        incoming = worker.needed(request.prompt_tokens)
        if rule.generation == 1:
            longest = max(len(each.waiting) for each in self.workers)
            waits = len(worker.waiting) / longest if longest else 0.0
            return worker.share + waits - 2.0 * hit / incoming
        to_compute = sum(one.new_blocks for one in worker.sent)
        cost = rule.scale * max(to_compute + incoming - rule.credit * hit, 0.0)
        if rule.counts_requests:
            cost += sum(worker.needed(one.prompt_tokens) for one in worker.sent)
        return cost


class Simulation(changing_oracle.Simulation, TieredSimulation):
    request_type = Request
    worker_type = Worker
    router_type = Router

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for router in (self.router, self.prefill_router):
            if router is not None:
                router.clock = self.clock

    def clock(self) -> float:
        return self.now

    def furnish(self, worker: Worker, pool: TieredWorkers) -> None:
        super().furnish(worker, pool)
        worker.clock = self.clock
        worker.make_memory()

    def begin_step(self, worker: Worker) -> None:
        super().begin_step(worker)
        if worker.in_step:
            worker.history.tell(worker.boundary)

    # What is to be computed where

    def dispatch_to_decode(self, worker: Worker, request: Request, arrives: Callable, again: Callable) -> None:
        request.new_blocks = self.new_blocks(worker, request) if arrives == self.send else 0
        super().dispatch_to_decode(worker, request, arrives, again)

    def dispatch(self, worker: Worker, one: Request, *args: Callable) -> None:
        if one.of is not None:
            one.new_blocks = self.new_blocks(worker, one.of)
        super().dispatch(worker, one, *args)

    def send_to_prefill(self, request: Request, worker: Worker) -> None:
        request.stand_in.new_blocks = self.new_blocks(worker, request)
        super().send_to_prefill(request, worker)

    def new_blocks(self, worker: Worker, request: Request) -> int:
        return max(worker.needed(request.prompt_tokens) - request.expected, 0)

    # What rises

    def send(self, worker: Worker, request: Request) -> None:
        if not request.holds and tells(request):
            told = request.of or request
            told.rose_tokens = (0, 0)
            told.rise_began_at = told.rise_ended_at = None
        super().send(worker, request)

    def note(self, request: Request, name: str, value: Any) -> None:
        if tells(request):
            super().note(request, name, value)

    def lose(self, worker: Worker) -> None:
        for request in worker.rising:
            self.note(request, "rise_began_at", None)
        super().lose(worker)
        self.stop_moving(worker)

    def turn_off(self, worker: Worker, reason: str) -> None:
        super().turn_off(worker, reason)
        self.stop_moving(worker)

    def stop_moving(self, worker: Worker) -> None:
        self.tier_flows = [flow for flow in self.tier_flows if flow.link[0] != worker.number]


def tells(request: Request) -> bool:
    """Whether hits of its next admission are those that are told."""
    return request.of is not None or not (request.admitted_at or request.prefill_ended_at is not None)


def simulate(requests: Any, fleet: Any, **fields: Any) -> Result:
    """Serve the requests to the end, or as long as steps begin before the time limit."""
    return changing_oracle.simulate(requests, fleet, **fields, simulation_type=Simulation)
