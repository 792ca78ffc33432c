"""What becomes of requests whose worker is gone: they go elsewhere, or fail."""

import numpy as np

from vecsim.kernel import links
from vecsim.kernel.handover import (
    ASTRAY,
    AT_WORK,
    FLOW_AT,
    FLOWED_AT,
    FOR_PREFILL,
    HAS_BLOCKS,
    NOTICED_AT,
    NOWHERE,
    ON_ITS_WAY,
    PREFILL_STAGE,
    PREFILLED,
    PREFILLED_AT,
    QUEUE_FIRST,
    QUEUED_FOR_PREFILL,
    QUEUED_TOKENS,
    REMOTE,
    RESERVED_AT,
    STAGE,
    TRANSFER_AT,
    arrive,
    choose_decode,
    drop_timer,
    feed,
    find_nobody,
    forget_prefill,
    go_astray,
    go_to_prefill,
    is_answered,
    leave,
    leave_decode,
    let_others_know,
    miss,
    note_wait,
    serve,
    unpin,
)
from vecsim.kernel.heap import is_before
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned, whole
from vecsim.kernel.kv import NAMED, RUN_NODE
from vecsim.kernel.life import (
    AT_ONCE,
    BROKEN,
    BROKEN_PREFILL,
    CAME_HERE,
    CRASH,
    CRASHED,
    CRASHES,
    CRASHES_DONE,
    CRASHES_SEEN,
    CUT_SHORT,
    DEAD,
    DECODE_PART,
    DOOM,
    DRAINING,
    FAILED_AT,
    FORGIVEN,
    HAS_CRASHED,
    JOINS,
    LEAVES,
    LISTED,
    MIGRATIONS,
    NEXT_CRASH,
    NEXT_OUTAGE,
    NO_WORKER,
    NOBODY,
    NOBODY_TO_PREFILL,
    NOT_SENT,
    NOT_SENT_ON,
    NOTICE_DRAW,
    NUMBER,
    OFF,
    OUTAGE_END,
    OUTAGES_DONE,
    PHASE,
    PREFILL_PART,
    READY,
    REASON,
    RESTARTED,
    RETRIES,
    RINGS_FOR,
    STARTED,
    STARTING,
    STOP_DRAW,
    STOPPED,
    STOPS_AT,
    STRANDED,
    TARGET,
    WHO,
    begin_start,
    draw,
    drop_alarm,
    empty,
    forgive,
    get_ready,
    is_up,
    learn,
    look_at_schedule,
    next_alarm,
    next_alarm_of,
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
from vecsim.kernel.token import issue_after_drop
from vecsim.kernel.token_state import (
    COMPUTED,
    DECODE,
    DROPPED_AT_ONCE,
    ENDED,
    FAILED,
    GENERATED,
    GONE,
    HELD,
    KV,
    LACKS,
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
    bring_up,
    judge,
    look_again,
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
            notice = t + (world.control.ttl - world.control.renewal * part)
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
    """All that a worker has in its memory is lost, and all that it was to do; requests learn of it later."""
    fleet, load = world.fleet, world.load
    prefills = prefills_only(world, worker)
    learns_at = t + world.control.break_delay
    for request in range(load.prompt_tokens.size):
        r = unsigned(request)
        stage = whole(fleet.way[unsigned(PREFILL_STAGE if prefills else STAGE), r])
        if stage in (NOWHERE, FOR_PREFILL, ASTRAY) or fleet.way[PREFILLS_AT if prefills else DECODES_AT, r] != worker:
            continue
        if world.work.own[STATE, r] in (GONE, FAILED, DROPPED_AT_ONCE):
            continue
        if stage == ON_ITS_WAY:
            drop_timer(world, request)
        elif is_moving(world, request):
            stop_moving(world, request, t)
        if prefills:
            lose_prefill(world, request, t)
            # Routers no longer count those who only have blocks there; the queue goes by who is there.
            nowhere = stage == PREFILLED or world.split.queued
            go_astray(world, request, whole(-1) if nowhere else worker, learns_at, whole(BROKEN_PREFILL))
        else:
            if stage == AT_WORK:
                lose_work(world, request, worker, t)
            world.work.times[SINCE, r] = t
            forget_blocks(world, world.work.own, world.cache.owned, request, whole(DESTINATION))
            go_astray(world, request, worker, learns_at, whole(BROKEN))
    fleet.counts[unsigned(worker), WAITING] = fleet.counts[unsigned(worker), RUNNING] = 0
    empty(world, worker, t)


@inlined
def is_moving(world, request):
    """Whether a request's keys and values are on their way to its decode worker."""
    fleet, r = world.fleet, unsigned(request)
    return (
        fleet.way[STAGE, r] == HAS_BLOCKS
        and fleet.way[PREFILL_STAGE, r] == PREFILLED
        and not np.isnan(fleet.instants[TRANSFER_AT, r])
    )


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


@inlined
def forget_blocks(world, own, owned, request, side):
    """A request has no blocks that could be found, nor does it find those that it left at an earlier worker."""
    r = unsigned(request)
    own[HELD, r] = own[LACKS, r] = 0
    if owned.shape[1] > 0:
        owned[RUN_NODE, r] = -1
        owned[NAMED, r] = 0
    if world.transfer.merges:
        world.fleet.chains[unsigned(CHAIN_ROWS * side + COUNT), r] = 0


@bare
def lose_prefill(world, request, t):
    """What a request had at its prefill worker is gone."""
    fleet = world.fleet
    r = unsigned(request)
    if fleet.way[PREFILL_STAGE, r] != PREFILLED and fleet.own[STATE, r] not in (PREFILL, DECODE):
        note_wait(world, fleet.times[SINCE, r], t)
    fleet.times[SINCE, r] = t
    fleet.own[STATE, r] = UNSEEN
    forget_blocks(world, fleet.own, fleet.owned, request, whole(SOURCE))


@bare
def lose_work(world, request, worker, t):
    """A request that is served must go to another worker: it keeps its tokens, which are computed anew there."""
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
    if state in (PREFILL, DECODE) or (own[KV, r] > 0 and own[GENERATED, r] > 0):  # what it found there stands
        own[PREEMPTIONS, r] += 1
        world.life.fate[CUT_SHORT, r] += 1
    elif own[GENERATED, r] == 0 and np.isnan(times[STARTED_AT, r]):  # what it finds elsewhere will be what it found
        world.life.fate[CUT_SHORT, r] -= own[PREEMPTIONS, r]  # they were preemptions all the same
        own[PREEMPTIONS, r] = 0
    if state not in (PREFILL, DECODE):
        note_wait(world, times[SINCE, r], t)
    own[STATE, r] = QUEUED
    own[COMPUTED, r] = own[KV, r] = 0


@bare
def fail(world, request, reason, t):
    """A request fails: what is held for it is freed, and what follows it is issued as if it had ended."""
    fleet, life, own = world.fleet, world.life, world.work.own
    r = unsigned(request)
    own[STATE, r] = FAILED
    life.fate[REASON, r] = reason
    life.rings[FAILED_AT, r] = t
    leave(world, request, False)
    if world.split.prefill_workers > 0:
        if fleet.way[PREFILL_STAGE, r] == PREFILLED:
            unpin(world, request, t)
        elif fleet.way[PREFILL_STAGE, r] == ASTRAY:
            drop_alarm(world, request, whole(PREFILL_PART))
        leave_decode(world, request, t)
    refused = reason == NO_WORKER and world.load.closed
    if not (issue_after_drop(world.work, world.load, t) if refused else is_answered(world, request, t)):
        fleet.between[TROUBLE] = OUT_OF_REQUESTS


@bare
def strand(world, t):
    """Nothing is left to happen: requests that wait for a worker that won't come fail. Returns how many there were."""
    fleet, own = world.fleet, world.work.own
    queued = fleet.between[QUEUE_FIRST] >= 0
    fleet.between[QUEUE_FIRST] = -1
    fleet.between[QUEUED_FOR_PREFILL] = fleet.between[QUEUED_TOKENS] = 0
    number = whole(0)
    for request in range(world.load.prompt_tokens.size):
        r = unsigned(request)
        waits = fleet.way[PREFILL_STAGE, r] == FOR_PREFILL
        if queued and not waits:  # others may go on when these have gone
            continue
        if world.life.fate[CAME_HERE, r] == 0 or own[STATE, r] in (GONE, FAILED, DROPPED_AT_ONCE):
            continue
        if waits:
            fleet.way[PREFILL_STAGE, r] = NOWHERE
        fail(world, request, whole(NO_WORKER), t)
        number += 1
    return number


@bare
def migrates(world, request, t):
    """Whether a request may go to another worker; else it fails."""
    life, r = world.life, unsigned(request)
    if life.fate[MIGRATIONS, r] >= world.control.migration_limit:
        fail(world, request, whole(CRASH), t)
        return False
    life.fate[MIGRATIONS, r] += 1
    return True


@inlined
def first_part(world):
    """Which alarm rings first: of one request's, the one that was set first."""
    decode, prefill = next_alarm_of(world, DECODE_PART), next_alarm_of(world, PREFILL_PART)
    if decode != prefill:
        return whole(DECODE_PART if decode < prefill else PREFILL_PART)
    alarms, fate, arrived_at = world.life.alarms, world.life.fate, world.load.arrived_at
    at_decode, at_prefill = whole(alarms[DECODE_PART, 0]), whole(alarms[PREFILL_PART, 0])
    if at_decode == at_prefill:
        r = unsigned(at_decode)
        return whole(DECODE_PART if fate[NUMBER + DECODE_PART, r] < fate[NUMBER + PREFILL_PART, r] else PREFILL_PART)
    return whole(DECODE_PART if is_before(arrived_at, arrived_at, at_decode, at_prefill) else PREFILL_PART)


@bare
def ring(world, t):
    """A request learns what its alarm is for."""
    fleet, life = world.fleet, world.life
    part = first_part(world)
    request = take_alarm(world, part)
    r = unsigned(request)
    what = whole(life.fate[unsigned(RINGS_FOR + part), r])
    fleet.way[unsigned(STAGE + part), r] = NOWHERE
    if what in (NOBODY, NOBODY_TO_PREFILL):
        fail(world, request, whole(NO_WORKER), t)
        return
    note_wait(world, world.work.times[SINCE, r] if part == DECODE_PART else fleet.times[SINCE, r], t)
    if what == BROKEN:
        learn_of_loss(world, request, t)
    elif what == BROKEN_PREFILL:
        learn_of_lost_prefill(world, request, t)
    else:
        life.fate[RETRIES, r] += 1
        shun(world, whole(life.fate[unsigned(TARGET + part), r]), t)
        if what == NOT_SENT:
            send_again(world, request, t)
        elif what == NOT_SENT_ON:
            choose_decode(world, request, t)
        else:
            go_to_prefill(world, request, t)


@bare
def learn_of_loss(world, request, t):
    """A request learns that its decode worker is gone."""
    fleet, r = world.fleet, unsigned(request)
    if world.split.prefill_workers > 0 and fleet.way[REMOTE, r] == 1 and np.isnan(fleet.instants[NOTICED_AT, r]):
        if not np.isnan(fleet.instants[PREFILLED_AT, r]):
            fleet.instants[RESERVED_AT, r] = fleet.instants[TRANSFER_AT, r] = np.nan
            choose_decode(world, request, t)
            return
        if not np.isnan(fleet.instants[RESERVED_AT, r]):  # another one is chosen when it is prefilled
            fleet.instants[RESERVED_AT, r] = np.nan
            return
    if migrates(world, request, t):
        if world.split.prefill_workers > 0 and world.work.own[GENERATED, r] == 0:
            fleet.instants[RESERVED_AT, r] = fleet.instants[NOTICED_AT, r] = np.nan
            forget_prefill(world, request)
        send_again(world, request, t)


@bare
def learn_of_lost_prefill(world, request, t):
    """A request learns that the worker that prefills it, or has done so, is gone."""
    fleet, r = world.fleet, unsigned(request)
    if not migrates(world, request, t):
        return
    if not world.split.reserves_first or np.isnan(fleet.instants[RESERVED_AT, r]):
        # Else two requests could wait for each other's blocks.
        leave_decode(world, request, t)
        fleet.instants[RESERVED_AT, r] = np.nan
    forget_prefill(world, request)
    if world.split.reserves_first and np.isnan(fleet.instants[RESERVED_AT, r]):
        choose_decode(world, request, t)
    else:
        go_to_prefill(world, request, t)


@bare
def send_again(world, request, t):
    """Have a request be routed as if it came now."""
    if world.work.own[GENERATED, unsigned(request)] > 0:
        compute_anew(world, request, t)
    elif not arrive(world, request, t):
        world.fleet.between[TROUBLE] = OUT_OF_REQUESTS


@bare
def compute_anew(world, request, t):
    """Have a request that has tokens be served by another worker."""
    worker = route(world, world.router, request, judge(world, world.router, request), t)
    if worker < 0:
        find_nobody(world, request, whole(NOBODY))
    elif is_up(world, worker):
        bring_up(world, worker, t)
        serve(world, request, worker, t)
    else:
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
            stops_at = t + (control.ttl - control.renewal * part)
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

    Where nothing is left to happen (`STRANDED`), returns how many requests fail for that. The fleet's loop calls it by
    its address: fleets that stay as they are need not have it compiled.
    """
    control, life = world.control, world.life
    if doomed == STRANDED:
        return strand(world, t)
    if doomed >= 0:
        return whole(crash(world, doomed, t, whole(life.whole[DOOM, unsigned(doomed)]) - 1, True))
    if next_alarm(world) == AT_ONCE:
        ring(world, t)
        return whole(1)
    if life.times[NEXT_OUTAGE] == t:
        begin_outage(world, t)
        return whole(1)
    if life.times[NEXT_CRASH] == t:
        at = whole(control.first_event) + whole(life.numbers[CRASHES_DONE])
        worker = whole(life.events[unsigned(at), WHO])
        if life.due[CRASHES, unsigned(worker)] == t:  # of one that crashes twice, one after the other
            return whole(crash(world, worker, t, whole(CRASHES), False))
        set_due(world, whole(CRASHES), worker, t)
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
