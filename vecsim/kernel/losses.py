"""What becomes of requests whose worker is gone: they go elsewhere, or fail."""

import numpy as np

from vecsim.kernel import links, runs
from vecsim.kernel.handover import (
    AT_DECODE,
    AT_PREFILL,
    FLOW_AT,
    FLOWED_AT,
    FOR_RESERVATION,
    MOVING,
    NOWHERE,
    PREFILLED_AT,
    REMOTE,
    RESERVED_AT,
    STAGE,
    arrive,
    choose_decode,
    drop_timer,
    feed,
    go_to_prefill,
    haunt,
    is_answered,
    leave,
    let_others_know,
    miss,
    release,
    serve,
    take_from_line,
    unpin,
    withdraw,
)
from vecsim.kernel.heap import rise
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned, whole
from vecsim.kernel.kv import FREE, NAMED, RUN_NODE
from vecsim.kernel.life import (
    BROKEN,
    BROKEN_ON,
    BROKEN_PREFILL,
    CHOSEN_PREFILL,
    CRASH,
    CRASHED,
    CRASHES,
    CRASHES_DONE,
    CRASHES_SEEN,
    DEAD,
    DOOM,
    DRAINING,
    FAILED_AT,
    FORGIVEN,
    HAS_CRASHED,
    INTERRUPTED,
    JOINS,
    LEARNS_AT,
    LEAVES,
    LISTED,
    MIGRATIONS,
    NEXT_CRASH,
    NEXT_OUTAGE,
    NO_WORKER,
    NOBODY,
    NOT_SENT,
    NOT_SENT_ON,
    NOTICE_DRAW,
    OFF,
    OUTAGE_END,
    OUTAGES_DONE,
    PHASE,
    READY,
    REASON,
    RESTARTED,
    RETRIES,
    RINGS_AT,
    RINGS_FOR,
    STARTED,
    STARTING,
    STOP_DRAW,
    STOPPED,
    STOPS_AT,
    TARGET,
    WHO,
    begin_start,
    draw,
    forgive,
    get_ready,
    is_up,
    learn,
    look_at_schedule,
    next_alarm,
    set_alarm,
    set_due,
    set_phase,
    shun,
    take_alarm,
    turn_off,
)
from vecsim.kernel.places import CHAIN_ROWS, COUNT, DESTINATION, SOURCE
from vecsim.kernel.planning import plan
from vecsim.kernel.routing import DECODES_AT, PREFILLS_AT, route
from vecsim.kernel.state import OUT_OF_REQUESTS
from vecsim.kernel.tier_sets import CLEARS, act
from vecsim.kernel.token import issue_after_drop
from vecsim.kernel.token_state import (
    BACKLOG,
    COMPUTED,
    DECODE,
    DROPPED_AT_ONCE,
    ENDED,
    ENDED_AT,
    FAILED,
    FIRST_AT,
    GENERATED,
    GONE,
    HELD,
    HIT,
    KV,
    LAST_AT,
    LAST_DECODE,
    LATE,
    PREEMPTIONS,
    PREFILL,
    QUEUED,
    REPORTED,
    RUNNING,
    SINCE,
    STARTED_AT,
    STARVING,
    STATE,
    TOO_LATE,
    UNSEEN,
    WAITING,
    class_of,
    generated,
)
from vecsim.kernel.world import (
    TROUBLE,
    add_up,
    begin_anew,
    bring_up,
    judge,
    look_again,
    note_load,
    prefills_only,
    sleeps,
)


@bare
def crash(world, worker, t, row, at_boundary):
    """A worker crashes, at its first boundary from `t` on; returns whether what follows could be issued.

    `row` is that of the event in `life.due`; it is put off to the boundary that ends the step that is under way.
    """
    fleet, life = world.fleet, world.life
    w = unsigned(worker)
    if not at_boundary:
        set_due(world, row, worker, np.inf)
    phase = whole(life.whole[PHASE, w])
    if phase <= DEAD:
        return True
    issued = True
    if phase != STARTING:
        bring_up(world, worker, t)
        if not sleeps(world, worker) and not at_boundary:
            if life.whole[DOOM, w] == 0:  # else one that came first will strike
                life.whole[DOOM, w] = row + 1
                look_again(world, worker)
            return True
        if fleet.counts[w, REPORTED] < fleet.counts[w, ENDED]:
            issued = let_others_know(world, worker, t)
            if life.whole[PHASE, w] == OFF:  # it was draining, and that was the last
                return issued
        # What they were told of an earlier crash is of the worker that they know.
        if life.whole[LISTED, w] != 0 and (life.due[LEAVES, w] == np.inf or phase == DRAINING):
            part = draw(world, whole(NOTICE_DRAW), worker, whole(life.whole[CRASHED, w]))
            notice = t + world.control.ttl - world.control.renewal * part
            set_due(world, whole(LEAVES), worker, min(life.due[LEAVES, w], notice))
        life.numbers[CRASHES_SEEN] += t >= world.warmup
        lose(world, worker, t)
    life.whole[CRASHED, w] += 1
    life.whole[DOOM, w] = 0
    set_due(world, whole(JOINS), worker, np.inf)
    set_due(world, whole(CRASHES), worker, np.inf)
    set_due(world, whole(STOPS_AT), worker, np.inf)
    reason = whole(STOPPED) if row == STOPS_AT else whole(HAS_CRASHED)
    if phase == DRAINING or not world.control.restarts:
        turn_off(world, worker, reason, t)
    elif row == STOPS_AT and t < life.times[OUTAGE_END]:
        set_phase(world, worker, whole(DEAD), reason, t)
        set_due(world, whole(STARTED), worker, life.times[OUTAGE_END])
    else:
        begin_start(world, worker, reason, t)
    return issued


@bare
def lose(world, worker, t):
    """All that a worker has in its memory is lost, and all that it was to do."""
    fleet, life, load, own = world.fleet, world.life, world.load, world.work.own
    prefills = prefills_only(world, worker)
    for request in range(load.prompt_tokens.size):
        r = unsigned(request)
        stage = whole(fleet.way[STAGE, r])
        if own[STATE, r] in (GONE, FAILED, DROPPED_AT_ONCE):
            continue
        if prefills:
            if fleet.way[PREFILLS_AT, r] == worker and stage in (AT_PREFILL, MOVING, FOR_RESERVATION):
                lose_prefill(world, request, worker, stage, t)
            elif (
                fleet.way[PREFILLS_AT, r] == worker
                and stage == NOWHERE
                and life.fate[RINGS_FOR, r] in (BROKEN_ON, NOT_SENT_ON)  # it was to go on from there
            ):
                drop_alarm(world, request)
                lose_prefill(world, request, worker, stage, t)
        elif fleet.way[DECODES_AT, r] == worker:
            if stage == AT_DECODE:
                lose_decode(world, request, worker, t)
                continue
            if stage == MOVING:
                stop_moving(world, request, t)
            forget_reservation(world, request)
            life.rings[LEARNS_AT, r] = t + world.control.break_delay
            if stage in (MOVING, FOR_RESERVATION):
                fleet.way[STAGE, r] = NOWHERE
                prefilled = not np.isnan(fleet.instants[PREFILLED_AT, r])
                haunt(world, request, worker)
                set_alarm(world, request, life.rings[LEARNS_AT, r], whole(BROKEN_ON if prefilled else BROKEN))
    fleet.counts[unsigned(worker), WAITING] = fleet.counts[unsigned(worker), RUNNING] = 0
    add_up(world, worker)
    begin_anew(world, worker, t)
    if world.tiers.on:
        act(world, CLEARS, 0, worker, t)
    if world.transfer.merges:
        runs.reset(fleet.allocator, worker, whole(fleet.counts[unsigned(worker), FREE]))


@bare
def forget_reservation(world, request):
    """Nothing is held for a request at its decode worker any more, which it is to choose anew."""
    fleet, own = world.fleet, world.work.own
    r = unsigned(request)
    fleet.way[DECODES_AT, r] = -1
    fleet.instants[RESERVED_AT, r] = np.nan
    own[HELD, r] = own[HIT, r] = 0
    forget_blocks(world.cache.owned, request)
    if world.transfer.merges:
        fleet.chains[CHAIN_ROWS * DESTINATION + COUNT, r] = 0


@inlined
def forget_blocks(owned, request):
    """A request has no blocks that could be found."""
    if owned.shape[1] > 0:
        owned[RUN_NODE, unsigned(request)] = -1
        owned[NAMED, unsigned(request)] = 0


@bare
def drop_alarm(world, request):
    """A request learns nothing of what its alarm is for. O(alarms)."""
    life = world.life
    place = 0
    while life.alarms[unsigned(place)] != request:
        place += 1
    life.rings[RINGS_AT, unsigned(request)] = -np.inf
    rise(life.alarms, place, request, life.rings[RINGS_AT], world.load.arrived_at)
    take_alarm(world)
    target = whole(life.fate[TARGET, unsigned(request)])
    world.fleet.ghosts[unsigned(target)] -= 1
    note_load(world, target)


@bare
def stop_moving(world, request, t):
    """A transfer is given up."""
    fleet = world.fleet
    r = unsigned(request)
    if np.isnan(fleet.instants[FLOW_AT, r]) or not np.isnan(fleet.instants[FLOWED_AT, r]):
        drop_timer(world, request)
    else:
        links.end(fleet.links, t, request)
    fleet.instants[FLOW_AT, r] = fleet.instants[FLOWED_AT, r] = np.nan


@bare
def lose_prefill(world, request, worker, stage, t):
    """A request must be prefilled anew; what is reserved for its decode stays."""
    fleet = world.fleet
    r = unsigned(request)
    if stage == MOVING:
        stop_moving(world, request, t)
    elif stage == FOR_RESERVATION:
        decodes_at = whole(fleet.way[DECODES_AT, r])
        take_from_line(world, request, decodes_at)
        withdraw(world, request, decodes_at, t)
        forget_reservation(world, request)
    elif stage == AT_PREFILL and fleet.own[STATE, r] in (PREFILL, DECODE):
        fleet.own[PREEMPTIONS, r] += 1
        world.life.fate[INTERRUPTED, r] += 1
    fleet.way[PREFILLS_AT, r] = -1
    fleet.way[STAGE, r] = NOWHERE
    fleet.own[STATE, r] = UNSEEN
    fleet.own[HELD, r] = 0
    forget_blocks(fleet.owned, request)
    if world.transfer.merges:
        fleet.chains[CHAIN_ROWS * SOURCE + COUNT, r] = 0
    haunt(world, request, worker)
    set_alarm(world, request, t + world.control.break_delay, whole(BROKEN_PREFILL))


@bare
def lose_decode(world, request, worker, t):
    """A request must go to another worker: it keeps the tokens that it has generated, and computes them anew there."""
    fleet, work = world.fleet, world.work
    own, times = work.own, work.times
    r, w = unsigned(request), unsigned(worker)
    state = own[STATE, r]
    if state == DECODE:
        if world.load.watches_gaps and own[LATE, r] != fleet.late[w, unsigned(class_of(world.load, r))]:
            own[LATE, r] = TOO_LATE
        if own[STARVING, r] == 0:
            times[LAST_AT, r] = max(times[LAST_AT, r], fleet.sums[w, LAST_DECODE])
        own[STARVING, r] = 0
        own[GENERATED, r] = generated(fleet.counts[w], own, request)
    if state in (PREFILL, DECODE):
        own[PREEMPTIONS, r] += 1
        world.life.fate[INTERRUPTED, r] += 1
    else:
        work.sums[BACKLOG] += max(t - max(times[SINCE, r], world.warmup), 0.0)
    own[STATE, r] = QUEUED
    own[COMPUTED, r] = own[KV, r] = own[HELD, r] = 0
    times[SINCE, r] = t
    fleet.way[DECODES_AT, r] = -1
    fleet.way[STAGE, r] = NOWHERE
    forget_blocks(world.cache.owned, request)
    if world.transfer.merges:
        fleet.chains[CHAIN_ROWS * DESTINATION + COUNT, r] = 0
    haunt(world, request, worker)
    set_alarm(world, request, t + world.control.break_delay, whole(BROKEN))


@bare
def fail(world, request, reason, t):
    """A request fails: what is held for it is freed, and what follows it is issued as if it had ended."""
    fleet, life, own = world.fleet, world.life, world.work.own
    r = unsigned(request)
    if own[GENERATED, r] == 0 and not np.isnan(world.work.times[FIRST_AT, r]):
        own[GENERATED, r] = 1
    own[STATE, r] = FAILED
    life.fate[REASON, r] = reason
    life.rings[FAILED_AT, r] = t
    leave(world, request, False)
    if world.split.prefill_workers > 0:
        if fleet.way[PREFILLS_AT, r] >= 0 and not np.isnan(fleet.instants[PREFILLED_AT, r]):
            unpin(world, request, t)
        if fleet.way[DECODES_AT, r] >= 0:
            release(world, request, t)
    refused = reason == NO_WORKER and world.load.closed
    if not (issue_after_drop(world.work, world.load, t) if refused else is_answered(world, request, t)):
        fleet.between[TROUBLE] = OUT_OF_REQUESTS


@bare
def ring(world, t):
    """A request learns what its alarm is for."""
    fleet, life, work = world.fleet, world.life, world.work
    request = take_alarm(world)
    r = unsigned(request)
    what = whole(life.fate[RINGS_FOR, r])
    if what == NOBODY:
        fail(world, request, whole(NO_WORKER), t)
        return
    target = whole(life.fate[TARGET, r])
    fleet.ghosts[unsigned(target)] -= 1
    note_load(world, target)
    if what in (BROKEN, BROKEN_PREFILL):
        if life.fate[MIGRATIONS, r] >= world.control.migration_limit:
            fail(world, request, whole(CRASH), t)
            return
        life.fate[MIGRATIONS, r] += 1
    elif what != BROKEN_ON:
        life.fate[RETRIES, r] += 1
        shun(world, target, t)
    if what in (BROKEN, NOT_SENT):
        work.sums[BACKLOG] += max(t - max(work.times[SINCE, r], world.warmup), 0.0)
        if world.split.prefill_workers > 0 and work.own[GENERATED, r] == 0:
            forget_way(world, request)
        if work.own[GENERATED, r] > 0:
            compute_anew(world, request, t)
        elif not arrive(world, request, t):
            fleet.between[TROUBLE] = OUT_OF_REQUESTS
    elif what in (NOT_SENT_ON, BROKEN_ON):
        choose_decode(world, request, t)
    else:
        if what == BROKEN_PREFILL:
            fleet.instants[PREFILLED_AT, r] = fleet.times[ENDED_AT, r] = fleet.times[STARTED_AT, r] = np.nan
        if what == BROKEN_PREFILL and not world.split.reserves_first and fleet.way[DECODES_AT, r] >= 0:
            # Else two requests could wait for each other's blocks.
            release(world, request, t)
            forget_reservation(world, request)
        if world.split.reserves_first and fleet.way[DECODES_AT, r] < 0:
            choose_decode(world, request, t)
        else:
            go_to_prefill(world, request, t)


@bare
def forget_way(world, request):
    """A request begins its way anew."""
    fleet = world.fleet
    r = unsigned(request)
    fleet.instants[:, r] = np.nan
    fleet.times[STARTED_AT, r] = fleet.times[ENDED_AT, r] = np.nan
    fleet.way[PREFILLS_AT, r] = -1
    fleet.way[REMOTE, r] = 0
    fleet.moved[r] = 0.0
    fleet.runs[r] = 0
    world.life.fate[CHOSEN_PREFILL, r] = 0


@bare
def compute_anew(world, request, t):
    """Have a request that has tokens be served by another worker."""
    worker = route(world, world.router, request, judge(world, world.router, request), t)
    if worker < 0:
        set_alarm(world, request, t, whole(NOBODY))
    elif is_up(world, worker):
        bring_up(world, worker, t)
        serve(world, request, worker, t)
    else:
        world.work.times[SINCE, unsigned(request)] = t
        miss(world, request, worker, whole(NOT_SENT), t)


@bare
def begin_outage(world, t):
    """The control plane is gone for a while: workers that can't renew their leases until they end stop."""
    control, life = world.control, world.life
    at = whole(control.first_event) + control.crashes + whole(life.numbers[OUTAGES_DONE])
    end = t + life.events[unsigned(at), WHO]
    life.times[OUTAGE_END] = end
    for worker in range(world.fleet.group.size):
        w = unsigned(worker)
        if life.whole[PHASE, w] == READY:
            part = draw(world, whole(STOP_DRAW), worker, whole(life.numbers[OUTAGES_DONE]))
            stops_at = t + control.ttl - control.renewal * part
            if stops_at < end:
                set_due(world, whole(STOPS_AT), worker, stops_at)
    life.numbers[OUTAGES_DONE] += 1
    look_at_schedule(world)


@bare
def first_due(world, row, t):
    """The first worker of which something is due at `t`; -1 if there is none."""
    for worker in range(world.fleet.group.size):
        if world.life.due[row, unsigned(worker)] == t:
            return worker
    return -1


@bare_entry
def live(world, t, doomed):
    """The next event of workers' lives, at `t`, or the crash of one at its boundary (-1: of none); returns whether what
    follows could be issued.

    The fleet's loop calls it by its address: fleets that stay as they are need not have it compiled.
    """
    control, life = world.control, world.life
    if doomed >= 0:
        return whole(crash(world, doomed, t, whole(life.whole[DOOM, unsigned(doomed)]) - 1, True))
    if life.times[NEXT_OUTAGE] == t:
        begin_outage(world, t)
        return whole(1)
    if life.times[NEXT_CRASH] == t:
        at = whole(control.first_event) + whole(life.numbers[CRASHES_DONE])
        set_due(world, whole(CRASHES), whole(life.events[unsigned(at), WHO]), t)
        life.numbers[CRASHES_DONE] += 1
        look_at_schedule(world)
        return whole(1)
    if life.clock[1] == t:
        worker = first_due(world, whole(CRASHES), t)
        if worker >= 0:
            return whole(crash(world, worker, t, whole(CRASHES), False))
        worker = first_due(world, whole(STOPS_AT), t)
        if worker >= 0:
            return whole(crash(world, worker, t, whole(STOPS_AT), False))
        worker = first_due(world, whole(LEAVES), t)
        if worker >= 0:
            learn(world, whole(LEAVES), worker, t)
            return whole(1)
        worker = first_due(world, whole(JOINS), t)
        if worker >= 0:
            learn(world, whole(JOINS), worker, t)
            return whole(1)
        worker = first_due(world, whole(FORGIVEN), t)
        if worker >= 0:
            forgive(world, worker)
            return whole(1)
        worker = first_due(world, whole(STARTED), t)
        if worker >= 0:
            if life.whole[PHASE, unsigned(worker)] == DEAD:
                begin_start(world, worker, whole(RESTARTED), t)
                return whole(1)
            get_ready(world, worker, t)
            if prefills_only(world, worker) and world.split.queued:
                feed(world, t)
            return whole(1)
    if next_alarm(world) == t:
        ring(world, t)
        return whole(1)
    plan(world, t)
    return whole(1)
