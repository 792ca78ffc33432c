"""A literal, slow reading of the rules of fleets that change and fail: workers that come, go, crash; control planes.

    simulate(requests, fleet, *, control=None, changes=(), planner=None, interval=inf, draws=None, **settings) -> Result

`fleet` and `settings` are those of `fleet_oracle.simulate`. Of a pool, `Workers.count` workers are ready at 0 and
`spare` ones are off; they are numbered as there, each kind's spare ones after its others. With nothing else given the
results are `fleet_oracle`'s.

`control` is a `ControlPlane`. `changes` are (time, pool, workers): so many of the pool ("prefill" or "decode", the
latter in a cluster too) are to be starting or ready. `planner(now, simulation)` gives (pool, change) pairs, each a
number of workers more (or less, below 0); it is called at 1, 2, ... times the `interval`, and may read whatever the
simulation has (`members`, `size`, `gpus`, `prefill_queue`, a worker's `phase`, `share`, `waiting`, ...).

`draws(kind, worker, nth)` gives seconds, where there is something to be drawn; all are counted from 0: "start_up" (a
worker's nth start; lognormal, where `start_up_std` > 0), "life" (after the nth time that it becomes ready;
exponential, where `mtbf` < inf), "lease" (at its nth crash) and "outage" (in the nth outage), both uniform up to
`renewal`, where that is > 0.

Events at equal times: outages begin (by number); outages end; crashes (by worker); routers notice that workers leave,
then that they join (by worker); workers become ready (by worker); broken streams and failed dispatches (by arrival,
request, and as they came about); a schedule's changes (in their order), then the planner; then as in `fleet_oracle`.
After each event, a worker that drains and has nothing left is off.

Chosen where the rules leave a choice:

Workers
- A crash of a worker that is in a step is due until that step ends, even if it ends at the same instant; a second one
  in that time does nothing, nor does one of a worker that is off or waits for an outage to end. The delay until it is
  noticed counts from when it strikes. All crashes that strike have a number, those while starting too (which nobody
  notices). At one instant, those of a schedule come before a life's end, and that before an outage's stop.
- A worker that crashed while ready or starting is "starting" at once, without a time in between; "dead" is only one
  that stopped in an outage, until that ends. Its batcher is new then too (SGLang's ratio).
- What is outstanding at a draining worker: all that the router has sent there, on its way or in it (also waiting for
  blocks to be reserved), and the blocks of transfers from it. It may be off before a router avoids it.
- A worker that is about to start is off at once when scaled down, one that starts again after a crash too. A change to
  fewer than one leaves one; one where no slot is off, or in a planner's list beyond that, does nothing.
- A worker that drains or crashes before its joining is noticed doesn't join. A leave that is noticed after it has
  joined anew does nothing. `watch` counts for routers only: the global queue feeds ready workers at once.
- What would be noticed in an outage (its begin is in it, its end isn't) is noticed at its end. Changes of a schedule
  are made then too; the planner isn't called. Outages may overlap: then it is the end of the last of them.
- In an outage those stop that are ready as it begins (not those that become ready in it), unless they have crashed
  since; not if they would as it ends. One that crashes in an outage starts again at once, one that stopped at the end
  of it, or at the end of its step if that comes later.

Routing
- A worker that is shunned is as unknown: a request for which no other is known fails ("no worker"). It is chosen again
  from the end of that time on, whether it has joined anew or not.
- Whether a dispatch succeeds is known by the worker's phase at the instant of the choice: ready and draining ones take
  it. It then is in flight there, while it's on its way too, and breaks if the worker crashes.
- The routers' books have what was sent to a worker until it ended, or was known to be lost (a crash's `break_delay`, or
  the dispatch's timeout, later). The queue reads the true number of those at a worker, and so does Gen1's rule. The KV
  load and the cache that a router reads are the true ones: none, of a dead worker.
- Every choice of a router takes `request_plane` to get there: also a wish for blocks to be reserved, and a stand-in
  to a prefill worker. The end of a transfer doesn't, nor does an ended prefill.
- A retry repeats the choice that failed: that at arrival (local or remote is decided anew), that of a worker to decode
  what is prefilled or goes to prefill anew, or that of one to prefill. `before_queue` isn't spent again.
- Locally for want of prefill workers are only those requests that none could ever hold. Else the global queue waits for
  one that is ready (and looks busy until then), and a router that knows none fails them (and looks not busy).
- The draws of a request are the same in each of its choices, for as many workers as there are then. A round robin's
  turn passes all slots of the pool, those that are off too.
- Of the blocks that only it has, a request that is prefilled anew finds those at the worker that it was sent to last.

Broken streams
- Whatever happens to a request happens when it learns of the crash; only its transfer ends, and its blocks are gone,
  at once. What it comes to in between waits until then: a transfer that could begin doesn't.
- Who waits for blocks at a dead decode worker, and isn't prefilled (`reserve="arrival"`), migrates or fails, as
  those that are decoded. Who has lost its reservation while it was at or before the prefill worker chooses when it is
  prefilled; if it has to go to prefill anew first, with `reserve="arrival"` it chooses and waits for blocks before.
- Who waits for blocks and loses its prefill worker, leaves the line, and so the worker: one is chosen anew.
- Two requests must not wait for each other's blocks, one of them at the prefill and one at the decode worker. So those
  at the decode worker come first with `reserve="arrival"`: who is prefilled, has chosen anew and has to wait in the
  line lets go of its blocks at the prefill worker, and goes to prefill anew when some are reserved for it, unless it
  has its slot there still (that's no migration, and a token isn't seen again). With `reserve="prefill"` they come last:
  who goes to prefill anew lets go of what is reserved for it. `lets_go=False` leaves this out: some may wait without
  end then (`Result.stuck`).
- Who migrates without a token has the times of its last way only (but `routed_at`, `admitted_at`, `hits`); with tokens
  those of before stay (where it goes to prefill anew: that its first prefill started), and it is still `is_local` or
  not. `hit_tokens` is of its first admission or last reservation, `worker` and `prefill_worker` are the last that were
  chosen. A migration is not a preemption.
- Who fails for want of a worker in a closed loop is followed after the think time, but 1 at least, as one that is
  refused: else a user might ask without end at one instant. After a crash the think time is as after an end. The
  followers in a session have their own. `at_completion` isn't spent.

The run ends when all that came have an end, and nothing is on its way or to come but changes of workers; at the time
limit; or when nothing is left to happen (then some may be `stuck`: in a global queue that nobody will serve, or behind
those). With a planner or `mtbf`, it then needs a time limit. `Result.end` is the limit, or the last event.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappush
from math import exp, inf, log, sqrt

import fleet_oracle
from fleet_oracle import Cluster, Disaggregated, FleetRequest, Overheads, Workers
from token_oracle import Pool, Request

OFF, STARTING, READY, DRAINING, DEAD = "off", "starting", "ready", "draining", "dead"

# All of them come before fleet_oracle's.
OUTAGE_BEGIN, OUTAGE_END, CRASH, LEAVE, JOIN, IS_READY, BROKEN, TICK = range(-8, 0)


@dataclass
class ControlPlane:
    request_plane: float = 0.0
    queue_push: float = 0.0
    queue_pop: float = 0.0
    watch: float = 0.0
    ttl: float = 10.0
    renewal: float = 5.0
    connect_timeout: float = 1.0
    shun: float = 5.0
    break_delay: float = 0.0
    migration_limit: int = 0
    mtbf: float = inf
    crashes: Sequence[tuple[float, int]] = ()
    restarts: bool = True
    outages: Sequence[tuple[float, float]] = ()


@dataclass(eq=False)
class ChangingRequest(FleetRequest):
    failed_at: float | None = field(init=False, default=None)
    reason: str | None = field(init=False, default=None)  # "crash" or "no worker"
    migrations: int = field(init=False, default=0)
    retries: int = field(init=False, default=0)

    # Counts the decode workers that it was sent to or has left: what was under way for an earlier one is void.
    leg: int = field(init=False, default=0)
    lost: bool = field(init=False, default=False)  # of a stand-in: its worker has crashed
    own_at: "ChangingWorker | None" = field(init=False, default=None)  # the last one that it was sent to for prefill

    @property
    def is_accounted_for(self) -> bool:
        return self.dropped or self.completed_at is not None or self.failed_at is not None


@dataclass(eq=False)
class ChangingWorker(fleet_oracle.Worker):
    kind: Workers | None = None
    phase: str = OFF
    changes: list[tuple[float, str, str]] = field(default_factory=list)  # (time, phase, reason)
    starts: int = 0
    lives: int = 0  # how often it became ready
    crashes: int = 0
    known_life: int | None = None  # that in which routers take it for ready
    shunned_until: float = 0.0
    due: str | None = None  # the reason of a crash that waits for the end of the step
    ready_at: float = inf
    dies_at: float = inf
    stops_at: float = inf  # in an outage
    pinned: list[ChangingRequest] = field(default_factory=list)  # stand-ins whose blocks wait for a transfer
    astray: list[ChangingRequest] = field(default_factory=list)  # only in the routers' books

    @property
    def serves(self) -> bool:
        return self.phase in {READY, DRAINING}

    @property
    def has_slot(self) -> bool:
        return self.phase == READY and super().has_slot

    @property
    def outstanding(self) -> int:
        return len(self.sent) + len(self.astray)

    def empty(self) -> None:
        """Nothing is left in it."""
        for request in [*self.sent, *self.running, *self.pinned]:
            request.blocks, request.computed = [], 0
            request.holds = request.moved = request.pinned = False
        self.batcher = self.kind.batcher()
        self.pool = Pool(self.blocks, self.kind.uncached_first)
        self.inbox, self.waiting, self.running, self.chosen = [], [], [], []
        self.reservations, self.sent, self.pinned = [], [], []
        self.boundary, self.in_step, self.due = inf, False, None
        self.dies_at = self.stops_at = inf


@dataclass
class Result(fleet_oracle.Result):
    scaling: list[tuple[float, str, int, int]]  # (time, pool, 1 or -1, worker)
    end: float

    @property
    def stuck(self) -> list[ChangingRequest]:
        return [each for each in self.requests if each.routed_at is not None and not each.is_accounted_for]

    def gpu_seconds(self) -> float:
        return sum(worker.kind.gpus * self.seconds_on(worker) for worker in self.workers)

    def seconds_on(self, worker: ChangingWorker) -> float:
        ends = [time for time, _, _ in worker.changes[1:]] + [self.end]
        return sum(
            end - time
            for (time, phase, _), end in zip(worker.changes, ends, strict=True)
            if phase in {STARTING, READY, DRAINING}
        )


class Simulation(fleet_oracle.Simulation):
    request_type = ChangingRequest
    worker_type = ChangingWorker

    def __init__(self, control: ControlPlane, changes, planner, interval, draws, lets_go, *settings) -> None:
        assert control.connect_timeout > 0 or control.shun > 0  # or a dispatch might fail without end at one instant
        self.control = control
        self.planner = planner
        self.interval = interval
        self.ticks = 1  # the next one's number
        self.draws = draws
        self.lets_go = lets_go
        self.scaling: list[tuple[float, str, int, int]] = []
        self.broken: list[tuple] = []  # streams and dispatches
        self.number_made = 0  # of broken ones and timers
        self.leaves: list[tuple[float, ChangingWorker, int]] = []  # with the worker's life
        self.joins: list[tuple[float, ChangingWorker, int]] = []
        self.crashes = list(control.crashes)
        self.outage_begins = [(start, number) for number, (start, _) in enumerate(control.outages)]
        self.outage_ends = [(start + length, number) for number, (start, length) in enumerate(control.outages)]
        self.changes = [(self.noticed(time), number) for number, (time, _, _) in enumerate(changes)]
        self.change = changes
        super().__init__(*settings)
        self.router.is_open = self.is_open
        if self.prefill_router is not None:
            self.prefill_router.is_open = self.is_open

    def make_workers(self, pools: Sequence[Workers]) -> list[ChangingWorker]:
        made = []
        for pool in pools:
            for i in range(pool.count + pool.spare):
                worker = self.make_worker(pool)
                worker.kind = pool
                made.append(worker)
                if i < pool.count:
                    self.set_phase(worker, READY, "initial")
                    self.begin_life(worker)
                    worker.known_life = worker.lives
                else:
                    self.set_phase(worker, OFF, "initial")
        return made

    # Events

    def run(self, time_limit: float) -> float:
        """When it ended."""
        while True:
            time, _, _, act = min(self.next_events(), key=lambda event: event[:3], default=(inf, 0, 0, None))
            if time >= time_limit or time == inf:
                break
            self.now = time
            act()
            for worker in self.workers:
                if worker.phase == DRAINING and not worker.sent and not worker.pinned:
                    self.turn_off(worker, "drained")
        end = self.now if time == inf else time_limit
        # Steps that have begun are carried out, but nothing follows from them.
        self.is_over = True
        for worker in sorted(self.workers, key=lambda worker: (worker.boundary, worker.number)):
            if worker.in_step:
                self.now = worker.boundary
                self.finish_step(worker)
        return end

    def next_events(self) -> list[tuple]:
        for under_way in (self.timers, self.broken):
            under_way[:] = [one for one in under_way if one[-2]()]
            heapify(under_way)
        events = super().next_events()
        for time, arrived_at, index, number, _, _ in self.broken:
            events.append((time, BROKEN, (arrived_at, index, number), self.next_breaks))
        came = [request for request in self.requests if request.routed_at is not None]
        if not events and all(request.is_accounted_for for request in came):
            return []

        for time, number in self.outage_begins:
            events.append((time, OUTAGE_BEGIN, number, lambda number=number: self.begin_outage(number)))
        for time, number in self.outage_ends:
            events.append((time, OUTAGE_END, number, lambda number=number: self.end_outage(number)))
        for one in self.crashes:
            events.append((one[0], CRASH, (one[1], 0), lambda one=one: self.crash_as_scheduled(one)))
        for one in self.leaves:
            events.append((one[0], LEAVE, one[1].number, lambda one=one: self.leave(one)))
        for one in self.joins:
            events.append((one[0], JOIN, one[1].number, lambda one=one: self.join(one)))
        for worker in self.workers:
            events.append((worker.dies_at, CRASH, (worker.number, 1), lambda worker=worker: self.end_life(worker)))
            events.append((worker.stops_at, CRASH, (worker.number, 2), lambda worker=worker: self.stop(worker)))
            events.append((worker.ready_at, IS_READY, worker.number, lambda worker=worker: self.is_ready(worker)))
        for time, number in self.changes:
            events.append((time, TICK, (0, number), lambda number=number: self.make_change(number)))
        if self.planner is not None:
            events.append((self.ticks * self.interval, TICK, (1, 0), self.tick))
        return [event for event in events if event[0] < inf]

    def later(self, time: float, request: ChangingRequest, act: Callable[[], None], still: Callable[[], bool]) -> None:
        """A timer that is void when it no longer holds."""
        if time > self.now:
            self.number_made += 1
            heappush(self.timers, (time, request.arrived_at, request.index, self.number_made, still, act))
        else:
            act()

    def at(self, time: float, request: ChangingRequest, act: Callable[[], None]) -> None:
        """Of a transfer."""
        leg, one = request.leg, request.stand_in
        self.later(time, request, act, lambda: request.leg == leg and request.stand_in is one and not one.lost)

    def breaks(self, time: float, request: ChangingRequest, act: Callable[[], None], still: Callable[[], bool]) -> None:
        self.number_made += 1
        heappush(self.broken, (time, request.arrived_at, request.index, self.number_made, still, act))

    def next_breaks(self) -> None:
        first = min(self.broken, key=lambda one: one[:4])
        self.broken.remove(first)
        first[-1]()

    # Phases

    def set_phase(self, worker: ChangingWorker, phase: str, reason: str) -> None:
        worker.phase = phase
        worker.changes.append((self.now, phase, reason))

    def start(self, worker: ChangingWorker, reason: str) -> None:
        self.set_phase(worker, STARTING, reason)
        seconds = worker.kind.start_up_time
        if worker.kind.start_up_std > 0:
            seconds = self.draws("start_up", worker.number, worker.starts)
        worker.starts += 1
        worker.ready_at = self.now + seconds

    def is_ready(self, worker: ChangingWorker) -> None:
        worker.ready_at = inf
        self.set_phase(worker, READY, "started")
        self.begin_life(worker)
        self.joins.append((self.noticed(self.now + self.control.watch), worker, worker.lives))
        if worker in self.prefill:
            self.feed()

    def begin_life(self, worker: ChangingWorker) -> None:
        if self.control.mtbf < inf:
            worker.dies_at = self.now + self.draws("life", worker.number, worker.lives)
        worker.lives += 1

    def drain(self, worker: ChangingWorker) -> None:
        self.set_phase(worker, DRAINING, "scale down")
        self.leaves.append((self.noticed(self.now + self.control.watch), worker, worker.lives))

    def turn_off(self, worker: ChangingWorker, reason: str) -> None:
        worker.empty()
        worker.ready_at = inf
        self.set_phase(worker, OFF, reason)

    # Scaling

    def members(self, pool: str) -> list[ChangingWorker]:
        return {"prefill": self.prefill, "decode": self.decode}[pool]

    def size(self, pool: str) -> int:
        return sum(worker.phase in {STARTING, READY} for worker in self.members(pool))

    def gpus(self) -> int:
        return sum(worker.kind.gpus for worker in self.workers if worker.phase in {STARTING, READY, DRAINING})

    def scale_up(self, pool: str) -> None:
        off = [worker for worker in self.members(pool) if worker.phase == OFF]
        if off:
            self.start(off[0], "scale up")
            self.scaling.append((self.now, pool, 1, off[0].number))

    def scale_down(self, pool: str) -> None:
        if self.size(pool) <= 1:
            return
        starting = [worker for worker in self.members(pool) if worker.phase == STARTING]
        ready = [worker for worker in self.members(pool) if worker.phase == READY]
        if starting:
            worker = starting[-1]
            self.turn_off(worker, "scale down")
        else:
            worker = ready[-1]
            self.drain(worker)
        self.scaling.append((self.now, pool, -1, worker.number))

    def make_change(self, number: int) -> None:
        self.changes = [one for one in self.changes if one[1] != number]
        _, pool, workers = self.change[number]
        change = workers - self.size(pool)
        self.scale(pool, change)

    def tick(self) -> None:
        self.ticks += 1
        if not self.in_outage(self.now):
            for pool, change in self.planner(self.now, self):
                self.scale(pool, change)

    def scale(self, pool: str, change: int) -> None:
        for _ in range(abs(change)):
            if change > 0:
                self.scale_up(pool)
            else:
                self.scale_down(pool)

    # Crashes

    def crash_as_scheduled(self, one: tuple[float, int]) -> None:
        self.crashes.remove(one)
        self.crash(self.workers[one[1]], "crash")

    def end_life(self, worker: ChangingWorker) -> None:
        worker.dies_at = inf
        self.crash(worker, "crash")

    def stop(self, worker: ChangingWorker) -> None:
        worker.stops_at = inf
        self.crash(worker, "outage")

    def crash(self, worker: ChangingWorker, reason: str) -> None:
        if worker.phase in {OFF, DEAD}:
            return
        if worker.in_step:
            worker.due = worker.due or reason
        else:
            self.die(worker, reason)

    def reach(self, worker: ChangingWorker) -> None:
        if not worker.in_step:
            self.begin_step(worker)
            return
        self.finish_step(worker)
        if worker.due is not None:
            self.die(worker, worker.due)

    def die(self, worker: ChangingWorker, reason: str) -> None:
        phase = worker.phase
        if worker.serves:
            delay = self.control.ttl
            if self.control.renewal > 0:
                delay -= self.draws("lease", worker.number, worker.crashes)
            self.leaves.append((self.noticed(self.now + delay), worker, worker.lives))
            self.lose(worker)
        worker.crashes += 1
        if phase == DRAINING or not self.control.restarts:
            self.turn_off(worker, reason)
        elif reason == "outage" and self.in_outage(self.now):
            worker.empty()
            self.set_phase(worker, DEAD, reason)
        else:
            worker.empty()
            self.start(worker, reason)

    def lose(self, worker: ChangingWorker) -> None:
        """What was there is gone at once; who was there learns of it later."""
        there = [*worker.sent, *worker.pinned]
        worker.astray += worker.sent
        broken = [flow for flow in self.flows if flow.request in there or flow.request.stand_in in there]
        self.flows = [flow for flow in self.flows if flow not in broken]
        if broken:
            self.share_links()
        time = self.now + self.control.break_delay
        for one in there:
            if one.of is not None:
                one.lost = True
                self.breaks(
                    time,
                    one,
                    lambda one=one: self.lose_prefill(worker, one),
                    lambda one=one: one.of.stand_in is one and one.of.failed_at is None,
                )
            else:
                one.leg += 1
                self.breaks(
                    time,
                    one,
                    lambda one=one: self.lose_decode(worker, one),
                    lambda one=one, leg=one.leg: one.leg == leg,
                )

    # What routers know

    def noticed(self, time: float) -> float:
        """Now, or at the end of an outage."""
        while self.in_outage(time):
            time = max(start + length for start, length in self.control.outages if start <= time < start + length)
        return time

    def in_outage(self, time: float) -> bool:
        return any(start <= time < start + length for start, length in self.control.outages)

    def leave(self, one: tuple[float, ChangingWorker, int]) -> None:
        self.leaves.remove(one)
        _, worker, life = one
        if worker.known_life == life:
            worker.known_life = None

    def join(self, one: tuple[float, ChangingWorker, int]) -> None:
        self.joins.remove(one)
        _, worker, life = one
        if worker.lives == life and worker.phase == READY:
            worker.known_life = life

    def is_open(self, worker: ChangingWorker) -> bool:
        return worker.known_life is not None and worker.shunned_until <= self.now

    # Outages

    def begin_outage(self, number: int) -> None:
        self.outage_begins = [one for one in self.outage_begins if one[1] != number]
        start, length = self.control.outages[number]
        for worker in self.workers:
            if worker.phase == READY:
                delay = self.control.ttl
                if self.control.renewal > 0:
                    delay -= self.draws("outage", worker.number, number)
                time = start + delay
                if time < start + length:
                    worker.stops_at = min(worker.stops_at, time)

    def end_outage(self, number: int) -> None:
        self.outage_ends = [one for one in self.outage_ends if one[1] != number]
        if not self.in_outage(self.now):
            for worker in self.workers:
                if worker.phase == DEAD:
                    self.start(worker, "restart")

    # Routing

    def dispatch(
        self,
        worker: ChangingWorker,
        one: ChangingRequest,
        arrives: Callable[[], None],
        again: Callable[[], None],
        still: Callable[[], bool],
    ) -> None:
        """Send a request, or a stand-in, to the worker that a router has chosen."""
        if worker.serves:
            self.leave_own(one, worker)
            worker.sent.append(one)
            self.later(self.now + self.control.request_plane, one, arrives, still)
        else:
            worker.astray.append(one)
            self.breaks(
                self.now + self.control.connect_timeout, one, lambda: self.fail_dispatch(worker, one, again), still
            )

    def fail_dispatch(self, worker: ChangingWorker, one: ChangingRequest, again: Callable[[], None]) -> None:
        worker.astray.remove(one)
        worker.shunned_until = self.now + self.control.shun
        (one.of or one).retries += 1
        again()

    def dispatch_to_decode(
        self,
        worker: ChangingWorker,
        request: ChangingRequest,
        arrives: Callable[[ChangingWorker, ChangingRequest], None],
        again: Callable[[ChangingRequest], None],
    ) -> None:
        request.worker = worker.number
        request.leg += 1
        leg = request.leg
        self.dispatch(
            worker, request, lambda: arrives(worker, request), lambda: again(request), lambda: request.leg == leg
        )

    def route(self, request: ChangingRequest) -> None:
        if request.generated == 0 and isinstance(self.fleet, Disaggregated):
            request.is_local = None
            asked = self.router.ask(request, request.able)
            if asked is None:
                self.fail(request, "no worker")
                return
            request.is_local = self.stays(request, asked)
            if not request.is_local and self.fleet.reserve == "prefill":
                self.go_to_prefill(request)
                return
        worker = self.router.choose(request, request.able)
        if worker is None:
            self.fail(request, "no worker")
        elif request.generated == 0 and request.is_local is False:
            self.dispatch_to_decode(worker, request, self.stand_in_line, self.route)
        else:
            self.dispatch_to_decode(worker, request, self.send, self.route)

    # Reservations

    def choose_decode(self, request: ChangingRequest) -> None:
        """Of one that is prefilled, or goes to prefill anew."""
        worker = self.router.choose(request, request.able)
        if worker is None:
            self.fail(request, "no worker")
        else:
            self.dispatch_to_decode(worker, request, self.stand_in_line, self.choose_decode)

    def stand_in_line(self, worker: ChangingWorker, request: ChangingRequest) -> None:
        worker.reservations.append(request)
        if worker.reservations == [request]:
            self.try_reservations(worker)
        comes_first = self.lets_go and self.fleet.reserve == "arrival"
        if comes_first and request in worker.reservations and request.stand_in.pinned:
            self.unpin(request.stand_in)

    def let_go(self, request: ChangingRequest) -> None:
        """It leaves the decode worker, and its books, with all that it has there."""
        request.leg += 1
        if request.worker is None:
            return
        worker = self.workers[request.worker]
        if request in worker.astray:
            worker.astray.remove(request)
        if request in worker.sent:
            worker.sent.remove(request)
            if request in worker.reservations:
                worker.reservations.remove(request)
            worker.pool.release(request.blocks)
            request.blocks = []
            if not self.is_over:
                self.blocks_were_freed(worker)

    # Prefill

    def go_to_prefill(self, request: ChangingRequest) -> None:
        if self.prefill_router is None:
            time = self.now + self.control.queue_push
            self.later(time, request, lambda: self.join_queue(request), lambda: True)
            return
        worker = self.prefill_router.choose(request, self.able_to_prefill(request))
        if worker is None:
            self.fail(request, "no worker")
            return
        one = request.stand_in
        request.prefill_worker = worker.number
        request.sent_to_prefill_at = self.now
        self.dispatch(
            worker,
            one,
            lambda: self.send(worker, one),
            lambda: self.go_to_prefill(request),
            lambda: request.stand_in is one and not one.lost,
        )

    def join_queue(self, request: ChangingRequest) -> None:
        self.prefill_queue.append(request)
        self.feed()

    def send_to_prefill(self, request: ChangingRequest, worker: ChangingWorker) -> None:
        """From the global queue."""
        one = request.stand_in
        request.prefill_worker = worker.number
        request.sent_to_prefill_at = self.now
        self.leave_own(one, worker)
        worker.sent.append(one)
        self.later(self.now + self.control.queue_pop, one, lambda: self.send(worker, one), lambda: not one.lost)

    def leave_own(self, one: ChangingRequest, worker: ChangingWorker) -> None:
        """What only a stand-in had at another prefill worker can't be found any more."""
        if one.of is not None:
            if one.of.own_at not in {None, worker}:
                one.of.own_at.forget_own(one, 0)
            one.of.own_at = worker

    def end_prefill(self, one: ChangingRequest) -> None:
        request = one.of
        request.prefill_ended_at = self.now
        if self.fleet.first_token == "prefill" and request.generated == 0:
            request.token_at.append(self.now)
            request.seen_at.append(self.now + self.overheads.per_output_token)
            if request.ended:
                self.let_go(request)
                self.complete(request)
                return
        one.pinned = True
        self.workers[request.prefill_worker].pinned.append(one)
        if self.is_over:
            return
        if request.reserved_at is None:
            self.choose_decode(request)
        else:
            self.begin_transfer(request)

    def unpin(self, one: ChangingRequest) -> None:
        source = self.workers[one.of.prefill_worker]
        source.pinned.remove(one)
        one.pinned = False
        if one not in source.running:  # else its blocks are freed as it leaves
            source.pool.release(one.blocks)
            one.blocks = []
            self.blocks_were_freed(source)

    # Transfer

    def begin_transfer(self, request: ChangingRequest) -> None:
        one = request.stand_in
        if request not in self.workers[request.worker].sent or one.lost:
            return  # it will learn of a crash
        if not one.pinned:  # it has let go of its blocks
            source = self.workers[request.prefill_worker]
            if one not in source.running:
                self.forget_prefill(request)
                self.make_stand_in(request)
                self.go_to_prefill(request)
                return
            one.pinned = True
            source.pinned.append(one)
        super().begin_transfer(request)

    def notice(self, request: ChangingRequest) -> None:
        request.noticed_at = self.now
        self.unpin(request.stand_in)
        request.computed = request.known - 1
        request.holds = request.moved = True
        self.send(self.workers[request.worker], request)

    # Broken streams

    def lose_decode(self, worker: ChangingWorker, request: ChangingRequest) -> None:
        worker.astray.remove(request)
        is_on_its_way = request.is_local is False and request.noticed_at is None
        if is_on_its_way and request.prefill_ended_at is not None:
            request.reserved_at = request.transfer_begun_at = None
            self.choose_decode(request)
        elif is_on_its_way and request.reserved_at is not None:
            request.reserved_at = None  # another one is chosen when it is prefilled
        elif self.migrates(request):
            if request.generated == 0:
                request.is_local = request.stand_in = None
                request.reserved_at = request.noticed_at = None
                self.forget_prefill(request)
            self.route(request)

    def lose_prefill(self, worker: ChangingWorker, one: ChangingRequest) -> None:
        request = one.of
        if one in worker.astray:
            worker.astray.remove(one)
        if not self.migrates(request):
            return
        if request.reserved_at is None or (self.lets_go and self.fleet.reserve == "prefill"):
            self.let_go(request)
            request.reserved_at = None
        self.forget_prefill(request)
        self.make_stand_in(request)
        if self.fleet.reserve == "arrival" and request.reserved_at is None:
            self.choose_decode(request)
        else:
            self.go_to_prefill(request)

    def migrates(self, request: ChangingRequest) -> bool:
        if request.migrations < self.control.migration_limit:
            request.migrations += 1
            return True
        self.fail(request, "crash")
        return False

    def forget_prefill(self, request: ChangingRequest) -> None:
        request.sent_to_prefill_at = request.prefill_ended_at = request.transfer_begun_at = None
        if request.generated == 0:
            request.prefill_started_at = None
        request.bytes, request.prefill_hit_tokens = 0.0, 0

    def fail(self, request: ChangingRequest, reason: str) -> None:
        request.failed_at, request.reason = self.now, reason
        self.let_go(request)
        one = request.stand_in
        if one is not None and one.pinned:
            self.unpin(one)
        elif one is not None and one.lost and one in self.workers[request.prefill_worker].astray:
            self.workers[request.prefill_worker].astray.remove(one)
        think_time = self.think_time if reason == "crash" else max(self.think_time, 1.0)
        self.ask_next(self.now + think_time)
        for follower in self.followers[request.index]:
            self.ask(follower, self.now + follower.think)


def simulate(
    requests: Sequence[Request],
    fleet: Cluster | Disaggregated,
    *,
    control: ControlPlane | None = None,
    changes: Sequence[tuple[float, str, int]] = (),
    planner: Callable[[float, Simulation], Iterable[tuple[str, int]]] | None = None,
    interval: float = inf,
    draws: Callable[[str, int, int], float] | None = None,
    overheads: Overheads | None = None,
    concurrency: int | None = None,
    think_time: float = 0.0,
    time_limit: float = inf,
    draw: Callable[[FleetRequest, int, int], int] | None = None,
    gives_back: bool = True,
    lets_go: bool = True,
    simulation_type: type[Simulation] = Simulation,
) -> Result:
    control = control or ControlPlane()
    numbers = random.Random(0)

    def drawn(request: FleetRequest, place: int, n: int) -> int:
        return numbers.randrange(n)

    simulation = None

    def seconds(kind: str, worker: int, nth: int) -> float:
        one = random.Random(f"{kind} {worker} {nth}")
        if kind == "start_up":
            mean, std = simulation.workers[worker].kind.start_up_time, simulation.workers[worker].kind.start_up_std
            variance = log(1 + (std / mean) ** 2)
            return exp(one.gauss(log(mean) - variance / 2, sqrt(variance)))
        if kind == "life":
            return one.expovariate(1 / control.mtbf)
        return one.uniform(0, control.renewal)

    simulation = simulation_type(
        control, changes, planner, interval, draws or seconds, lets_go,
        requests, fleet, overheads or Overheads(), concurrency, think_time, draw or drawn, gives_back,
    )  # fmt: skip
    end = simulation.run(time_limit)
    return Result(simulation.requests, simulation.workers, simulation.steps, simulation.routed, simulation.scaling, end)
