"""Workers that come and go: phases, crashes, what routers know of it, and what becomes of the requests hit.

A worker is off, starting, ready or draining. Routers go by what they were told: a worker that is gone may be listed
still. What happens to workers are events of the fleet's loop, as are the instants at which a request learns that its
worker is gone. At equal times: the begin of an outage, crashes, what routers learn, workers that get ready, requests
that learn, the planner; then all else.
"""

import numpy as np

from vecsim.kernel import runs, tree
from vecsim.kernel.heap import pop, push, rise
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.kv import FREE, RUN_NODE
from vecsim.kernel.routing import OWNS_AT, outstanding, uniform
from vecsim.kernel.tier_sets import CLEARS, act
from vecsim.kernel.token_scenarios import GROUP_WORKERS, READY_WORKERS, START_UP, START_UP_SIGMA
from vecsim.kernel.token_state import END_TIME
from vecsim.kernel.world import add_up, begin_anew, kind_of, note_load, prefills_only
from vecsim.scaling import FIRST_CHANGE, INTERVAL, SAMPLE_INTERVAL, SCHEDULE

# Phases of a worker
# One that has stopped in an outage is dead until that ends
OFF, DEAD, STARTING, READY, DRAINING = range(5)

# Rows of `life.due` [worker]: when it crashes, and stops since it couldn't renew its lease; when routers learn that it
# is gone, and that it is there; when it is ready, and no longer shunned
CRASHES, STOPS_AT, LEAVES, JOINS, STARTED, FORGIVEN, DUE_ROWS = range(7)

# Rows of `life.whole` [worker]: its phase; whether routers take it for ready, and shun it; how often it has started,
# got ready, and crashed; requests whose blocks a prefill worker holds;
# whether it crashes at the end of its step: one more than the row of the event, 0 if it doesn't
PHASE, LISTED, SHUNNED, STARTS, LIVES, CRASHED, HOLDS, DOOM, WHOLE_ROWS = range(9)

# Rows of `life.spent` [worker]: since when it is in its phase; seconds in phases that cost, and of these in those that
# serve
SINCE_WHEN, ON, SERVING, SPENT_ROWS = range(4)

# What a request has a worker for, and an alarm each: its decode (or all of it), its prefill where that is apart
DECODE_PART, PREFILL_PART, PARTS = range(3)

# Rows of `life.fate` [request]: how often it has moved to another worker, and was sent again; how often a crash made it
# leave its slot, less the preemptions of prefills that were lost; why it failed; for each part what its alarm is for,
# of which worker (-1: of none), and which one of all it is; whether it came to the router
MIGRATIONS, RETRIES, CUT_SHORT, REASON, RINGS_FOR, TARGET, NUMBER, CAME_HERE, FATE_ROWS = 0, 1, 2, 3, 4, 6, 8, 10, 11

# Rows of `life.rings` [request]: when the alarm of each part rings, when it failed
RINGS_AT, FAILED_AT, RING_ROWS = 0, 2, 3

# When an alarm rings that is for what follows from the event that has just been
AT_ONCE = -1.0

# Why a request failed
NO_WORKER, CRASH = range(1, 3)

# What an alarm is for: the request's worker is gone; it could not be sent there as it came, or after its prefill; there
# is no worker for it. Then the same of the worker that prefills it
BROKEN, NOT_SENT, NOT_SENT_ON, NOBODY, BROKEN_PREFILL, NOT_SENT_TO_PREFILL, NOBODY_TO_PREFILL = range(7)

# Places in `life.numbers`: requests that came and have neither ended nor failed; alarms of each part, and all that were
# ever set; scheduled crashes, outages and ticks of the planner that have been; events in the log; and since the warm-up
# crashes, workers added and removed
LIVE, ALARMS = 0, 1
ALARMS_SET, CRASHES_DONE, OUTAGES_DONE, TICKS, LOGGED, CRASHES_SEEN, UPS, DOWNS, NUMBERS = range(3, 12)

# Places in `life.metrics`
FAILED_METRIC, MIGRATIONS_METRIC, RETRIES_METRIC, CRASHES_METRIC, UPS_METRIC, DOWNS_METRIC, HOURS_METRIC = range(7)

# Places in `life.times`: when the latest outage ends; when the next crash and outage is scheduled; when the planner
# looks, and acts
OUTAGE_END, NEXT_CRASH, NEXT_OUTAGE, NEXT_SAMPLE, NEXT_TICK, TIMES = range(6)

# Fields of `life.events`
AT, WHO, EVENT_FIELDS = range(3)

# Why a worker goes to another phase, in the order of `vecsim.lives.REASONS`: it was there from the start, or added; it
# has started; it is removed, and has nothing left to do; it has crashed, stopped in an outage, or starts again after
# that
INITIAL, ADDED, IS_STARTED, REMOVED, DRAINED, HAS_CRASHED, STOPPED, RESTARTED = range(8)

# Places in `life.sums`, all since the last tick: requests that came, and their prompts' tokens; those that ended, and
# their tokens; seconds until their first tokens; gaps between tokens, and their seconds
CAME, CAME_TOKENS, LEFT_BY_END, LEFT_TOKENS, TTFT_SUM, GAPS_SEEN, GAPS_SUM, PLANNER_SUMS = range(8)

# What `losses.live` is called for where it isn't for an event, nor the crash of a worker
STRANDED = -2

# Kinds of draws
START_UP_DRAW, CRASH_DRAW, NOTICE_DRAW, STOP_DRAW, DRAWS = range(5)


@inlined
def draw(world, kind, worker, nth):
    """A number in [0, 1) of its own for each kind, worker and turn."""
    return uniform(world.router.seed, ((worker << 24) + nth) * DRAWS + kind + (1 << 48))


@bare
def set_due(world, row, worker, t):
    """Have something of a worker be due at a time."""
    life = world.life
    w = unsigned(worker)
    life.due[row, w] = t
    least = np.inf
    for other in range(DUE_ROWS):
        least = min(least, life.due[unsigned(other), w])
    tree.put(life.clock, worker, least)


@bare
def spend(world, worker, t):
    """Count the time that a worker was in its phase until `t`."""
    life = world.life
    w = unsigned(worker)
    lasted = max(t - max(life.spent[SINCE_WHEN, w], world.warmup), 0.0)
    if life.whole[PHASE, w] >= STARTING:
        life.spent[ON, w] += lasted
    if life.whole[PHASE, w] >= READY:
        life.spent[SERVING, w] += lasted
    life.spent[SINCE_WHEN, w] = t


@bare
def set_phase(world, worker, phase, reason, t):
    """A worker goes to another phase."""
    spend(world, worker, t)
    world.life.whole[PHASE, unsigned(worker)] = phase
    log(world, worker, phase, reason, t)
    look_for(world, worker)


@bare
def log(world, worker, phase, reason, t):
    """Note that something has happened to a worker, where there is room for it."""
    life = world.life
    at = life.numbers[LOGGED]
    if at < life.log.shape[1]:
        life.log[0, unsigned(at)] = t
        life.log[1, unsigned(at)] = worker
        life.log[2, unsigned(at)] = phase
        life.log[3, unsigned(at)] = reason
    life.numbers[LOGGED] = at + 1


@bare
def look_for(world, worker):
    """Whether a worker can be chosen has changed, perhaps: let routers find it or not."""
    life, fleet = world.life, world.fleet
    w = unsigned(worker)
    if prefills_only(world, worker) and world.split.queued:
        away = life.whole[PHASE, w] != READY  # for it takes from the queue itself
    else:
        away = life.whole[LISTED, w] == 0
    away = away or life.whole[SHUNNED, w] != 0
    if away != fleet.away[w]:
        group = unsigned(fleet.group[w])
        fleet.present[group] += -1 if away else 1
        fleet.away[w] = away
    note_load(world, worker)


@inlined
def is_up(world, worker):
    """Whether a worker can be given requests."""
    return not world.control.changes or world.life.whole[PHASE, unsigned(worker)] >= READY


@bare
def normal(world, worker, nth):
    """A standard normal number (Box, Muller, 1958)."""
    one = draw(world, whole(START_UP_DRAW), worker, 2 * nth)
    other = draw(world, whole(START_UP_DRAW), worker, 2 * nth + 1)
    return np.sqrt(-2.0 * np.log1p(-one)) * np.cos(2.0 * np.pi * other)


@bare
def begin_start(world, worker, reason, t):
    """A worker begins to start."""
    life = world.life
    w = unsigned(worker)
    p = world.groups[kind_of(world, worker)]
    lasts = p[START_UP]
    if p[START_UP_SIGMA] > 0.0:
        lasts = np.exp(lasts + p[START_UP_SIGMA] * normal(world, worker, life.whole[STARTS, w]))
    life.whole[STARTS, w] += 1
    set_phase(world, worker, whole(STARTING), reason, t)
    set_due(world, whole(STARTED), worker, t + lasts)


@bare
def get_ready(world, worker, t):
    """A worker has started: with nothing in its memory, and nobody knows of it yet."""
    life = world.life
    w = unsigned(worker)
    set_due(world, whole(STARTED), worker, np.inf)
    world.fleet.sums[w, END_TIME] = t
    life.whole[HOLDS, w] = life.whole[DOOM, w] = 0
    set_phase(world, worker, whole(READY), whole(IS_STARTED), t)
    set_crash(world, worker, t)
    set_due(world, whole(JOINS), worker, t + world.control.watch)


@bare
def set_crash(world, worker, t):
    """Draw when a worker that has become ready crashes."""
    mtbf = world.control.mtbf
    if mtbf < np.inf:
        nth = whole(world.life.whole[LIVES, unsigned(worker)])
        lasts = -mtbf * np.log1p(-draw(world, whole(CRASH_DRAW), worker, nth))
        set_due(world, whole(CRASHES), worker, t + lasts)
    world.life.whole[LIVES, unsigned(worker)] += 1


@bare
def empty(world, worker, t):
    """A worker has nothing in its memory, its tiers, or to do any more. O(requests + ids)."""
    fleet = world.fleet
    add_up(world, worker)
    begin_anew(world, worker, t)
    if fleet.owned.size > 0 and prefills_only(world, worker):
        for request in range(world.load.prompt_tokens.size):
            if fleet.way[OWNS_AT, unsigned(request)] == worker:
                fleet.owned[RUN_NODE, unsigned(request)] = -1
    if world.tiers.on:
        act(world, CLEARS, 0, worker, t)
    if world.transfer.merges:
        runs.reset(fleet.allocator, worker, whole(fleet.counts[unsigned(worker), FREE]))


@bare
def turn_off(world, worker, reason, t):
    """A worker is off: nothing more happens to it but what routers have yet to learn."""
    set_phase(world, worker, whole(OFF), reason, t)
    world.life.whole[DOOM, unsigned(worker)] = 0
    set_due(world, whole(CRASHES), worker, np.inf)
    set_due(world, whole(STOPS_AT), worker, np.inf)
    set_due(world, whole(JOINS), worker, np.inf)
    set_due(world, whole(STARTED), worker, np.inf)


@bare
def turn_off_if_done(world, worker, t):
    """A worker that drains is off when it has nothing left to do."""
    life = world.life
    w = unsigned(worker)
    left = whole(life.whole[HOLDS, w]) if prefills_only(world, worker) else outstanding(world.fleet, worker)
    if life.whole[PHASE, w] == DRAINING and left == 0:
        turn_off(world, worker, whole(DRAINED), t)
        empty(world, worker, t)


@bare
def learn(world, row, worker, t):
    """Routers learn that a worker is gone, or there; during an outage at its end."""
    life = world.life
    w = unsigned(worker)
    if t < life.times[OUTAGE_END]:
        set_due(world, row, worker, life.times[OUTAGE_END])
        return
    set_due(world, row, worker, np.inf)
    if row == JOINS:
        set_due(world, whole(LEAVES), worker, np.inf)
    life.whole[LISTED, w] = row == JOINS
    look_for(world, worker)


@bare
def forgive(world, worker):
    """A worker is no longer shunned."""
    set_due(world, whole(FORGIVEN), worker, np.inf)
    world.life.whole[SHUNNED, unsigned(worker)] = 0
    look_for(world, worker)


@bare
def shun(world, worker, t):
    """Routers avoid a worker that could not be reached."""
    if world.control.shun > 0.0:
        world.life.whole[SHUNNED, unsigned(worker)] = 1
        set_due(world, whole(FORGIVEN), worker, t + world.control.shun)
        look_for(world, worker)


@bare
def first_of(world, group):
    """The number of the first worker of a kind."""
    first = whole(0)
    for other in range(group):
        first += int(world.groups[unsigned(other), GROUP_WORKERS])
    return first


@bare
def workers_on(world, group):
    """Workers of a kind that are ready or starting."""
    first = first_of(world, group)
    number = whole(0)
    for worker in range(first, first + int(world.groups[unsigned(group), GROUP_WORKERS])):
        phase = world.life.whole[PHASE, unsigned(worker)]
        number += phase in (STARTING, READY)
    return number


@bare
def add_worker(world, group, t):
    """One worker more of a kind, the first that is off; returns whether there was one."""
    first = first_of(world, group)
    for worker in range(first, first + int(world.groups[unsigned(group), GROUP_WORKERS])):
        if world.life.whole[PHASE, unsigned(worker)] == OFF:
            begin_start(world, worker, whole(ADDED), t)
            world.life.numbers[UPS] += t >= world.warmup
            return True
    return False


@bare
def remove_worker(world, group, t):
    """One worker less of a kind: the last that starts, else the last that is ready; returns whether there was one."""
    life = world.life
    first = first_of(world, group)
    last = whole(-1)
    starting = False
    for worker in range(first, first + int(world.groups[unsigned(group), GROUP_WORKERS])):
        phase = life.whole[PHASE, unsigned(worker)]
        if phase == STARTING or (phase == READY and not starting):
            last = worker
            starting = phase == STARTING
    if last < 0 or workers_on(world, group) <= 1:
        return False
    life.numbers[DOWNS] += t >= world.warmup
    if starting:
        turn_off(world, last, whole(REMOVED), t)
        return True
    set_phase(world, last, whole(DRAINING), whole(REMOVED), t)
    set_due(world, whole(JOINS), last, np.inf)
    if life.whole[LISTED, unsigned(last)] != 0:
        set_due(world, whole(LEAVES), last, min(life.due[LEAVES, unsigned(last)], t + world.control.watch))
    turn_off_if_done(world, last, t)
    return True


@inlined
def alarms_of(world, part):
    """(the heap of a part's alarms, how many there are, when each rings)."""
    life, row = world.life, unsigned(part)
    return life.alarms[row], whole(life.numbers[ALARMS + row]), life.rings[RINGS_AT + row]


@bare
def set_alarm(world, request, worker, at, what):
    """Have a request learn something of a worker later (-1: of none); routers take it to be there until then."""
    life = world.life
    r = unsigned(request)
    part = whole(PREFILL_PART if what >= BROKEN_PREFILL else DECODE_PART)
    row = unsigned(part)
    life.rings[RINGS_AT + row, r] = at
    life.fate[RINGS_FOR + row, r] = what
    life.fate[TARGET + row, r] = worker
    life.fate[NUMBER + row, r] = life.numbers[ALARMS_SET]
    life.numbers[ALARMS_SET] += 1
    if worker >= 0:
        world.fleet.ghosts[unsigned(worker)] += 1
        note_load(world, worker)
    heap, size, rings_at = alarms_of(world, part)
    push(heap, size, request, rings_at, world.load.arrived_at)
    life.numbers[ALARMS + row] += 1


@bare
def take_alarm(world, part):
    """Take the request whose alarm of a part rings first."""
    life, row = world.life, unsigned(part)
    heap, size, rings_at = alarms_of(world, part)
    request = whole(pop(heap, size, rings_at, world.load.arrived_at))
    life.numbers[ALARMS + row] -= 1
    worker = whole(life.fate[TARGET + row, unsigned(request)])
    if worker >= 0:
        world.fleet.ghosts[unsigned(worker)] -= 1
        note_load(world, worker)
    return request


@bare
def drop_alarm(world, request, part):
    """A request learns nothing of what its alarm is for. O(alarms)."""
    heap, _, rings_at = alarms_of(world, part)
    place = 0
    while heap[unsigned(place)] != request:
        place += 1
    rings_at[unsigned(request)] = -np.inf
    rise(heap, place, request, rings_at, world.load.arrived_at)
    take_alarm(world, part)


@inlined
def next_alarm_of(world, part):
    """When the first alarm of a part rings."""
    heap, size, rings_at = alarms_of(world, part)
    return rings_at[unsigned(heap[0])] if size > 0 else np.inf


@inlined
def next_alarm(world):
    """When the first alarm rings."""
    return min(next_alarm_of(world, DECODE_PART), next_alarm_of(world, PREFILL_PART))


@bare
def look_at_schedule(world):
    """Find out when the next of each kind of event is scheduled."""
    control, life = world.control, world.life
    first = whole(control.first_event)
    for place, done, number in (
        (NEXT_CRASH, CRASHES_DONE, control.crashes),
        (NEXT_OUTAGE, OUTAGES_DONE, control.outages),
    ):
        at = first + whole(life.numbers[unsigned(done)])
        left = life.numbers[unsigned(done)] < number
        life.times[unsigned(place)] = life.events[unsigned(at), AT] if left else np.inf
        first += number


@inlined
def next_of_life(world):
    """When the next event of workers' lives is due."""
    life = world.life
    planned = min(life.times[NEXT_CRASH], life.times[NEXT_OUTAGE], life.times[NEXT_SAMPLE], life.times[NEXT_TICK])
    return min(life.clock[1], next_alarm(world), planned)


@bare
def reset_life(world):
    """The workers that are there from the start are ready, and known; nothing has happened yet."""
    life, fleet = world.life, world.fleet
    life.numbers[:] = 0
    life.due[:] = np.inf
    life.clock[:] = np.inf
    life.spent[:] = 0.0
    life.whole[:] = 0
    life.fate[:] = 0
    life.rings[:] = np.nan
    life.times[:] = np.inf
    life.times[OUTAGE_END] = -np.inf
    life.sums[:] = 0.0
    life.memory[:] = 0.0
    if world.control.planner == SCHEDULE:
        life.times[NEXT_TICK] = life.planner[FIRST_CHANGE]
    elif world.control.planner >= 0:
        life.times[NEXT_TICK] = life.planner[INTERVAL]
        if life.planner[SAMPLE_INTERVAL] > 0.0:
            life.times[NEXT_SAMPLE] = life.planner[SAMPLE_INTERVAL]
    look_at_schedule(world)
    first = whole(0)
    for group in range(world.groups.shape[0]):
        p = world.groups[unsigned(group)]
        for place in range(int(p[GROUP_WORKERS])):
            worker = first + place
            w = unsigned(worker)
            on = place < int(p[READY_WORKERS])
            life.whole[PHASE, w] = READY if on else OFF
            life.whole[LISTED, w] = on
            fleet.away[w] = not on
            note_load(world, worker)
            if on:
                log(world, worker, whole(READY), whole(INITIAL), 0.0)
                set_crash(world, worker, 0.0)
        fleet.present[unsigned(group)] = int(p[READY_WORKERS])
        first += int(p[GROUP_WORKERS])
