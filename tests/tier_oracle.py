"""A literal, slow reading of the rules of tiers below the caches of a fleet's workers, on top of `fleet_oracle`.

    simulate(requests, fleet, **as fleet_oracle.simulate) -> Result

`fleet` has `TieredWorkers`, some of which have `Tiers`. Ends of flows between tiers come after ends of transfers and
before arrivals; those of one instant in the order host memory's to requests, the disk's to requests, batches by worker,
tier and place.

Requests come to a worker with tiers one after the other. Each goes on to its queue, or has what lower tiers hold of it
be brought up before; but whoever comes while others stand in the line there stands behind them. Those that wait in the
queue (or inbox), or are being brought up, are ahead of the first in the line. It is brought up when

    they and those that run are fewer than the worker's slots, and
    the blocks for all of its tokens (those that a batcher reserves, if it does) that it doesn't share with others are
    free, beside those for all tokens of each that is ahead of it, less what that one holds, and beside the watermark.

What each one ahead may find in GPU memory isn't looked at, if it holds nothing yet. Those whose prompts were moved here
lack nothing. If nothing is to be brought up for the first in the line it goes on at once. The line is looked at
whenever blocks come free beside a step, before each step and after it has been formed; before it, only those that wait
to be brought up are.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Any

import fleet_oracle
from fleet_oracle import FleetRequest, Result, Worker, Workers
from token_oracle import Overheads, Pool

TIER_FLOW = 1.5


@dataclass
class Tiers:
    """What is declared."""

    host_blocks: int
    disk_blocks: int
    host_bandwidth: float
    disk_bandwidth: float
    block_bytes: float
    offload_batch: int
    offloads_in_flight: int
    disk_after: int


@dataclass
class TieredWorkers(Workers):
    tiers: Tiers | None = None


class TieredPool(Pool):
    """Blocks that others know by their ids are new when they are named."""

    def __init__(self, blocks: int, uncached_first: bool) -> None:
        super().__init__(blocks, uncached_first)
        self.new: list[Hashable] = []
        self.late: set[int] = set()  # blocks that decoding has filled, which nobody can look for before it ends

    def name(self, block: int, id_: Hashable, late: bool = False) -> bool:
        named = super().name(block, id_)
        if named and late:
            self.late.add(block)
        elif named:
            self.register(id_)
        return named

    def register(self, id_: Hashable) -> None:
        if not is_own(id_) and id_ not in self.new:
            self.new.append(id_)

    def register_late(self, blocks: list[int]) -> None:
        for block in blocks:
            if block in self.late:
                self.late.remove(block)
                self.register(self.id_of[block])

    def forget(self, block: int) -> None:
        self.late.discard(block)
        super().forget(block)


def is_own(id_: Hashable) -> bool:
    return isinstance(id_, tuple) and id_[0] == "own"


@dataclass
class Tier:
    """A set of blocks, the least recently used first; those that wait to come, and the batches that move there."""

    capacity: int
    bandwidth: float
    held: OrderedDict[Hashable, None] = field(default_factory=OrderedDict)
    line: list[Hashable] = field(default_factory=list)
    batches: dict[int, list[Hashable]] = field(default_factory=dict)
    came: int = 0
    went: int = 0
    dropped: int = 0

    def offer(self, id_: Hashable) -> None:
        moving = any(id_ in batch for batch in self.batches.values())
        if id_ in self.held:
            self.held.move_to_end(id_)
        elif id_ not in self.line and not moving:
            self.line.append(id_)

    def put(self, id_: Hashable) -> None:
        if len(self.held) >= self.capacity:
            self.held.popitem(last=False)
            self.went += 1
        self.held[id_] = None
        self.came += 1


@dataclass(eq=False)
class TieredWorker(Worker):
    declared: Tiers | None = None
    tiers: list[Tier] = field(default_factory=list)  # host memory, disk
    sightings: Counter[Hashable] = field(default_factory=Counter)
    talks: bool = False  # requests have ids for what they generate
    rising: list[FleetRequest] = field(default_factory=list)
    done: list[FleetRequest] = field(default_factory=list)  # ended, not yet left, as they ended

    def for_all_tokens(self, request: FleetRequest) -> int:
        """Blocks that it holds when all of its tokens are computed, or that are reserved for it."""
        reserved = getattr(self.batcher, "reserved", None)
        return reserved(self, request) if reserved else self.needed(request.known)

    def ahead(self) -> list[FleetRequest]:
        """Those ahead of the line that aren't admitted yet."""
        return self.waiting + self.inbox + self.rising

    def lacks(self, request: FleetRequest) -> int:
        return 0 if request.moved else self.for_all_tokens(request) - len(request.blocks)

    def who_gives_way(self) -> FleetRequest | None:
        return None if self.rising else super().who_gives_way()

    def give_back(self, request: FleetRequest) -> None:
        super().give_back(request)
        if request.of is not None:
            request.of.prefill_preempted += 1

    def admit(self, request: FleetRequest, hold: int, must_fit: int = 0) -> bool:
        request.tokens_at_admission = request.generated
        rose = getattr(request, "rose", None)
        if rose is None or not request.holds:
            return super().admit(request, hold, must_fit)
        more = max(hold, must_fit, len(request.blocks)) - len(request.blocks)
        if len(self.pool.free) - more < (self.kept_free if self.running else 0):
            return False
        self.waiting.remove(request)
        self.running.append(request)
        if not request.admitted_at:
            self.note_start(request, rose)
        request.admitted_at.append(self.now)
        request.hits.append(len(request.blocks))
        request.blocks += [self.pool.take() for _ in range(hold - len(request.blocks))]
        request.holds = False
        return True

    def note_start(self, request: FleetRequest, hit_tokens: int) -> None:
        rose = getattr(request, "rose", None)
        super().note_start(request, hit_tokens if rose is None else rose)

    def compute(self, request: FleetRequest, tokens: int) -> None:
        """As `Engine.compute`; what is filled by a request that has decoded before is registered later."""
        if self.declared is None:
            super().compute(request, tokens)
            return
        late = request.generated > request.tokens_at_admission
        name = self.pool.name
        self.pool.name = lambda block, id_: name(block, id_, late)
        super().compute(request, tokens)
        del self.pool.name

    def prompt_hit(self, request: FleetRequest) -> list[int]:
        self.register_done()
        return super().prompt_hit(request)

    def register_done(self) -> None:
        """Who looks for blocks finds those that a request that has ended would leave."""
        if self.declared is not None and self.talks:
            for each in self.done:
                self.pool.register_late(each.blocks)

    def leave(self, requests: list[FleetRequest]) -> None:
        if self.declared is not None:
            for request in requests:
                self.pool.register_late(request.blocks)

    def preempt(self, victim: FleetRequest) -> None:
        if not victim.holds:
            self.leave([victim])
        super().preempt(victim)

    def release(self) -> None:
        leaving = self.batcher.leaving(self.running)
        self.leave([request for request in leaving if not request.pinned])
        self.done = [request for request in self.done if request not in leaving]
        super().release()

    def finish_step(self, end: float) -> list[FleetRequest]:
        ended = super().finish_step(end)
        self.done += ended
        return ended


@dataclass(eq=False)
class TierFlow:
    """Bytes on a link of a worker."""

    order: tuple[int, ...]
    link: tuple[Any, ...]
    width: float
    left: float
    since: float
    what: Any
    rate: float = 0.0
    end: float = inf


class TieredSimulation(fleet_oracle.Simulation):
    worker_type = TieredWorker

    def __init__(self, *args: Any) -> None:
        self.tier_flows: list[TierFlow] = []
        super().__init__(*args)

    def furnish(self, worker: TieredWorker, pool: TieredWorkers) -> None:
        worker.pool = TieredPool(worker.blocks, pool.uncached_first)
        declared = worker.declared = pool.tiers
        if declared is not None:
            worker.talks = any(len(each.ids) > each.prompt_tokens // worker.block_size for each in self.requests)
            worker.tiers = [
                Tier(declared.host_blocks, declared.host_bandwidth),
                Tier(declared.disk_blocks, declared.disk_bandwidth),
            ]

    # Flows

    def next_events(self) -> list[Any]:
        events = super().next_events()
        for flow in self.tier_flows:
            events.append((flow.end, TIER_FLOW, flow.order, lambda flow=flow: self.end_tier_flow(flow)))
        return events

    def begin_tier_flow(self, flow: TierFlow) -> None:
        self.tier_flows.append(flow)
        self.share_tier_links()

    def share_tier_links(self) -> None:
        for flow in self.tier_flows:
            if flow.end <= self.now:
                continue
            rate = flow.width / sum(each.link == flow.link for each in self.tier_flows)
            if rate != flow.rate:
                flow.left = max(0.0, flow.left - flow.rate * (self.now - flow.since)) if flow.rate < inf else 0.0
                flow.since, flow.rate = self.now, rate
                flow.end = self.now + flow.left / rate

    def end_tier_flow(self, flow: TierFlow) -> None:
        self.tier_flows.remove(flow)
        self.share_tier_links()
        flow.what()

    # Down

    def offer_new(self, worker: TieredWorker) -> None:
        if worker.declared is None or not worker.pool.new:
            return
        for id_ in reversed(worker.pool.new):
            if id_ not in worker.pool.block_of:
                continue
            worker.sightings[id_] += 1
            worker.tiers[0].offer(id_)
            if id_ in worker.tiers[0].held:
                self.offer_to_disk(worker, id_)
        worker.pool.new = []
        self.begin_batches(worker)

    def offer_to_disk(self, worker: TieredWorker, id_: Hashable) -> None:
        if worker.declared.disk_blocks > 0 and worker.sightings[id_] >= worker.declared.disk_after:
            worker.tiers[1].offer(id_)

    def begin_batches(self, worker: TieredWorker) -> None:
        declared = worker.declared
        for number, (tier, above) in enumerate(
            zip(worker.tiers, (worker.pool.block_of, worker.tiers[0].held), strict=True)
        ):
            while len(tier.batches) < declared.offloads_in_flight and tier.line:
                batch: list[Hashable] = []
                while tier.line and len(batch) < declared.offload_batch:
                    id_ = tier.line.pop(0)
                    if id_ in above:
                        batch.append(id_)
                    else:
                        tier.dropped += 1
                if batch:
                    place = min(set(range(declared.offloads_in_flight)) - set(tier.batches))
                    tier.batches[place] = batch
                    self.begin_tier_flow(
                        TierFlow(
                            (2, worker.number, number, place), (worker.number, number, "down"), tier.bandwidth,
                            len(batch) * declared.block_bytes, self.now,
                            lambda number=number, place=place: self.batch_came(worker, number, place),
                        )
                    )  # fmt: skip

    def batch_came(self, worker: TieredWorker, number: int, place: int) -> None:
        tier = worker.tiers[number]
        for id_ in tier.batches.pop(place):
            tier.put(id_)
            if number == 0:
                self.offer_to_disk(worker, id_)
        self.begin_batches(worker)

    # Up

    def send(self, worker: TieredWorker, request: FleetRequest) -> None:
        if worker.declared is None or request.holds:
            super().send(worker, request)
        elif worker.reservations or not self.rise(worker, request):
            request.enqueued_at = self.now  # it waits there
            request.in_line = True
            worker.reservations.append(request)

    def rise(self, worker: TieredWorker, request: FleetRequest) -> bool:
        size = worker.block_size
        if worker in self.decode:
            worker.register_done()
        found = worker.found(request)
        places: list[tuple[int, Hashable]] = []
        host, disk = worker.tiers
        for i in range(len(found), min((request.known - 1) // size, len(request.ids))):
            id_ = request.block_id(i)
            if id_ not in host.held and id_ not in disk.held:
                break
            places.append((0 if id_ in host.held else 1, id_))
        if not places:
            super().send(worker, request)
            return True
        request.enqueued_at = self.now  # it waits there
        ahead = worker.ahead()
        if len(worker.running) + len(ahead) >= worker.slots:
            return False
        idle = sum(worker.pool.holders[block] == 0 for block in found)
        more = worker.for_all_tokens(request) - len(found) + idle
        promised = sum(worker.lacks(each) for each in ahead)
        kept = worker.kept_free if worker.running or worker.used else 0
        if len(worker.pool.free) - promised - more < kept:
            return False
        worker.forget_own(request, len(found))
        for block in found:
            worker.pool.share(block)
        request.blocks = found + [worker.pool.take() for _ in places]
        for number, id_ in reversed(places):
            worker.tiers[number].held.move_to_end(id_)
        request.rose = len(request.blocks) * size
        self.note(request, "rose_tokens", [sum(at == number for at, _ in places) * size for number in (0, 1)])
        self.note(request, "rise_began_at", self.now)
        worker.rising.append(request)
        request.pending = 0
        for number in (0, 1):
            blocks = sum(at == number for at, _ in places)
            if blocks:
                request.pending += 1
                self.begin_tier_flow(
                    TierFlow(
                        (number, request.index), (worker.number, number, "up"), worker.tiers[number].bandwidth,
                        blocks * worker.declared.block_bytes, self.now,
                        lambda: self.part_rose(worker, request, len(found)),
                    )
                )  # fmt: skip
        return True

    def note(self, request: FleetRequest, name: str, value: Any) -> None:
        setattr(request.of or request, name, value)
        if name == "rose_tokens":
            if request.of is not None:
                request.of.prefill_hit_tokens = request.rose
            else:
                request.hit_tokens = request.rose

    def part_rose(self, worker: TieredWorker, request: FleetRequest, found: int) -> None:
        request.pending -= 1
        if request.pending:
            return
        worker.rising.remove(request)
        self.note(request, "rise_ended_at", self.now)
        for i in range(found, len(request.blocks)):
            worker.pool.name(request.blocks[i], request.block_id(i))
        request.computed = len(request.blocks) * worker.block_size
        request.holds = True
        super().send(worker, request)

    def try_reservations(self, worker: TieredWorker) -> None:
        if worker.boundary == inf:  # no step follows
            self.offer_new(worker)
        while worker.reservations:
            self.rise_in_turn(worker)
            if not worker.reservations or in_line(worker.reservations[0]):
                break
            if not worker.reserve(worker.reservations[0]):
                break
            self.leave_line(worker)

    def rise_in_turn(self, worker: TieredWorker) -> None:
        while worker.reservations and in_line(worker.reservations[0]) and self.rise(worker, worker.reservations[0]):
            worker.reservations.pop(0).in_line = False

    def stays(self, request: FleetRequest, worker: TieredWorker) -> bool:
        if self.fleet.local is not None:
            return super().stays(request, worker)
        talks, worker.talks = worker.talks, False  # nobody looks
        local = super().stays(request, worker)
        worker.talks = talks
        return local

    # Boundaries

    def begin_step(self, worker: TieredWorker) -> None:
        self.offer_new(worker)
        if worker in self.prefill:
            self.feed()
        if worker.declared is not None and worker.reservations:
            worker.release()
            self.rise_in_turn(worker)
        super().begin_step(worker)


def in_line(request: FleetRequest) -> bool:
    return getattr(request, "in_line", False)


def simulate(requests: Any, fleet: Any, **fields: Any) -> Result:
    """Serve the requests to the end, or as long as steps begin before the time limit."""
    limit = fields.get("time_limit", inf)
    simulation = TieredSimulation(
        requests, fleet, fields.get("overheads") or Overheads(), fields.get("concurrency"),
        fields.get("think_time", 0.0), fields.get("draw"), True,
    )  # fmt: skip
    simulation.run(limit)
    return Result(simulation.requests, simulation.workers, simulation.steps, simulation.routed)
