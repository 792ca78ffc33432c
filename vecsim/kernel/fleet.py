"""The event loop of a fleet: many engines, each with a clock of its own, behind a router. O(log workers) an event.

Each worker runs the step loop of `vecsim.kernel.token`, called by its address, from one boundary until the next thing
that may concern it: who it serves, and what a step does, is decided there alone. What a step does is known when it
begins; others learn of it when it ends. Ties go: what moves between workers, then between tiers of their caches,
arrivals, boundaries of workers in their order.

Where prefill is kept apart, the first workers do nothing else: to them a request has one token to yield, and what they
hold for it stays until it has moved to the worker that decodes.
"""

import numpy as np

from vecsim.kernel import links, seen, tree
from vecsim.kernel.address import call_live
from vecsim.kernel.handover import (
    FLOW,
    NOTICE,
    NOTICED_AT,
    REMOTE,
    WAITS_FOR,
    all_flowed,
    arrive,
    deliver,
    feed,
    flow,
    gives_way,
    join,
    landed,
    let_others_know,
    make_room,
    next_timer,
    note_arrival,
    reset_handover,
    retry,
    take_timer,
)
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.life import (
    CAME_HERE,
    CRASHES_METRIC,
    CRASHES_SEEN,
    CUT_SHORT,
    DOOM,
    DOWNS,
    DOWNS_METRIC,
    FAILED_AT,
    FAILED_METRIC,
    HOURS_METRIC,
    LIVE,
    MIGRATIONS,
    MIGRATIONS_METRIC,
    ON,
    RETRIES,
    RETRIES_METRIC,
    SERVING,
    STRANDED,
    UPS,
    UPS_METRIC,
    next_of_life,
    reset_life,
    spend,
)
from vecsim.kernel.parts import write_parts
from vecsim.kernel.places import reset_places
from vecsim.kernel.routing import DECODES_AT, EXPECTED_RATE, MISSED_RATE, VIEW_AGE, looks_inside
from vecsim.kernel.state import (
    COASTING,
    DONE,
    GOES_ON,
    IDLE,
    INTERRUPTED,
    OUT_OF_REQUESTS,
    STOPS,
    TOO_LONG,
)
from vecsim.kernel.tier_sets import BEGINS, ENDS, FLOW_ENDS, OFFERS, act, has_tiers, next_flow_end
from vecsim.kernel.token import (
    MOST_STEPS,
    due_at,
    forget_steps,
    next_issued,
    reset_requests,
    take_arrival,
)
from vecsim.kernel.token_scenarios import GROUP_GPUS, GROUP_WORKERS, memory_of, policy_of
from vecsim.kernel.token_state import (
    BLOCK_SECONDS,
    DECODE,
    END_TIME,
    ENDED,
    ENQUEUED,
    FAILED,
    FORESEEN,
    GAP_BINS,
    GAP_HIGH,
    GAP_LOW,
    GENERATED,
    HIT,
    HORIZON,
    ISSUED,
    MEASURING,
    PREEMPTED,
    PREEMPTIONS,
    PREFILL,
    QUEUED,
    REPORTED,
    SLOT_SECONDS,
    STARTED_AT,
    STATE,
    STEP,
    UNSEEN,
    WAITING,
)
from vecsim.kernel.world import (
    TROUBLE,
    add_up,
    begin_anew,
    bring_up,
    is_behind,
    kind_of,
    note_load,
    prefills_only,
    settle_in,
    visit,
)

# Look for an interruption once in so many events
WATCH = 1 << 12


@bare
def reset(world):
    """Nothing has happened yet."""
    fleet, work, cache = world.fleet, world.work, world.cache
    counts, requests = work.counts, world.load.prompt_tokens.size
    work.gaps[counts[GAP_LOW] : counts[GAP_HIGH] + 1] = 0
    counts[:] = 0
    counts[GAP_LOW] = GAP_BINS
    work.sums[:] = 0.0
    fleet.all_blocks[0] = 0
    reset_requests(work.own, work.times, cache.owned, requests, cache.owned.size > 0)
    fleet.before[:requests] = -1
    fleet.turn[:] = 0
    fleet.clock[:] = np.inf
    fleet.loads[:] = np.inf
    reset_handover(world, requests)
    for worker in range(fleet.group.size):
        fleet.away[unsigned(worker)] = fleet.ghosts[unsigned(worker)] = 0
        begin_anew(world, worker, 0.0)
        fleet.blocks[unsigned(worker)] = fleet.counts[unsigned(worker), FREE]
        fleet.all_blocks[0] += fleet.blocks[unsigned(worker)]
        note_load(world, worker)
    for group in range(world.groups.shape[0]):
        fleet.present[unsigned(group)] = whole(world.groups[unsigned(group), GROUP_WORKERS])
    if world.control.changes:
        reset_life(world)
    if world.tiers.on:
        act(world, BEGINS, 0, 0, 0.0)
    if world.transfer.merges:
        reset_places(world)


@inlined
def is_sent(world):
    """Whether anything takes time between the workers, or to them."""
    return world.split.prefill_workers > 0 or world.control.request_plane > 0.0


@inlined
def next_move(world):
    """When something that moves between workers goes on next."""
    flow_end, _ = links.next_end(world.fleet.links)
    return min(next_timer(world), flow_end)


@bare
def move_on(world, t):
    """What moves between workers goes on at `t`, by a timer or the end of a flow."""
    flow_end, moving = links.next_end(world.fleet.links)
    if flow_end < next_timer(world):
        links.end(world.fleet.links, t, moving)
        all_flowed(world, moving, t)
        return
    request = take_timer(world)
    what = world.fleet.way[WAITS_FOR, unsigned(request)]
    if what == NOTICE:
        landed(world, request, t)
    elif what == FLOW:
        flow(world, request, t)
    else:
        deliver(world, request, t)


@bare
def go_on(world, worker, kind, due, others_matter):
    """Have a worker make steps from its boundary on, until something that comes at `due` may concern it.

    `others_matter` is whether what happens at the boundaries of others may send it requests.
    """
    fleet = world.fleet
    w = unsigned(worker)
    until = min(due, world.time_limit)
    if is_sent(world):
        until = min(until, next_move(world))
    if world.control.changes:
        until = min(until, next_of_life(world))
    tiered = world.tiers.on
    if tiered:
        until = min(until, next_flow_end(world))
    measures = fleet.sums[w, END_TIME] >= world.warmup
    if measures and fleet.counts[w, MEASURING] == 0:
        if world.warmup > 0.0:
            forget_steps(fleet.counts[w], fleet.sums[w], fleet.unmeasured)
        fleet.counts[w, MEASURING] = 1
        settle_in(world, worker, True)
    horizon = world.time_limit
    if not measures:
        until = min(until, world.warmup)
        horizon = min(horizon, world.warmup)
    inside = tiered or looks_inside(world.router) or looks_inside(world.prefill_router)
    fleet.sums[w, HORIZON] = 0.0 if inside else horizon
    if others_matter:
        tree.put(fleet.clock, worker, np.inf)
        until = min(until, fleet.clock[1])
    if fleet.waiting[unsigned(2 * worker)] >= 0:  # step by step: each may free blocks
        until = 0.0
        if fleet.counts[w, ENDED] > 0:  # only then there may be enough for those that wait
            fleet.sums[w, HORIZON] = 0.0
    until = max(until, np.nextafter(fleet.sums[w, END_TIME], np.inf))
    preempted = fleet.counts[w, PREEMPTED]
    begins_at = fleet.sums[w, END_TIME]
    status = visit(world, worker, kind, until)
    while (
        status == IDLE
        and (world.split.prefill_workers > 0 or tiered)
        and (fleet.counts[w, PREEMPTED] != preempted or gives_way(world, worker))
    ):
        preempted = fleet.counts[w, PREEMPTED]
        status = visit(world, worker, kind, until)
    after = fleet.sums[w, END_TIME]
    if status == IDLE and tiered and seen.has_new(fleet.seen[w]):  # no step follows
        act(world, OFFERS, 0, worker, after)
    coasts = status == COASTING
    if status == IDLE:
        after = np.inf
        status = DONE
    elif coasts:
        after = fleet.sums[w, FORESEEN]
        status = DONE
    if fleet.counts[w, STEP] > MOST_STEPS:
        status = TOO_LONG
    if status != DONE:
        fleet.between[TROUBLE] = status
    tree.put(fleet.clock, worker, after)
    note_load(world, worker)
    if fleet.waiting[unsigned(2 * worker)] >= 0 and not coasts:  # what the step leaves is for those that wait for it
        retry(world, worker, begins_at)


@bare
def dooms(world):
    """Whether a worker crashes at the end of its step, which sends its requests to others then. O(workers)."""
    for worker in range(world.fleet.group.size):
        if world.life.whole[DOOM, unsigned(worker)] != 0:
            return True
    return False


@bare_entry
def simulate_fleet(world):
    """Run one scenario of a fleet, a `World`; returns the status.

    Results stay in `world.fleet`, and in `world.work` as if of one engine.
    """
    fleet, split, load, work = world.fleet, world.split, world.load, world.work
    time_limit, between = world.time_limit, fleet.between
    apart = split.prefill_workers > 0
    users_wait = load.closed or load.follower.size > 0
    changes, tiered, sent = world.control.changes, world.tiers.on, is_sent(world)
    doomed = False
    tiers_due = np.inf
    life_due = np.inf
    reset(world)

    static = min(load.static, load.prompt_tokens.size)
    work.counts[ISSUED] = static
    static_due = due_at(load, 0, static)
    dynamic_due = moving_due = np.inf
    events = 0
    now = 0.0
    while between[TROUBLE] == DONE:
        events += 1
        if events & (WATCH - 1) == 0 and world.stop[0]:
            between[TROUBLE] = INTERRUPTED
            break
        if sent:
            moving_due = next_move(world)
        due = min(static_due, dynamic_due)
        t = min(moving_due, due, fleet.clock[1])
        if tiered:
            tiers_due = next_flow_end(world)
            t = min(t, tiers_due)
        if changes:
            life_due = max(next_of_life(world), now)
            if due == np.inf and world.life.numbers[LIVE] == 0 and time_limit == np.inf:
                break
            t = min(t, life_due)
        if t >= time_limit or t == np.inf:
            over = t < np.inf or time_limit < np.inf or not changes or world.life.numbers[LIVE] == 0
            if over or call_live(world.live, (world, now, whole(STRANDED))) == 0:
                break
            dynamic_due = next_issued(work) if users_wait else dynamic_due
            continue
        now = t
        issued = True
        if changes and life_due == t:
            issued = call_live(world.live, (world, t, whole(-1))) != 0
        elif moving_due == t:
            move_on(world, t)
        elif tiers_due == t:
            act(world, FLOW_ENDS, 0, 0, t)
        elif due == t:
            request, static_due, dynamic_due = take_arrival(work, load, static, static_due, dynamic_due)
            if changes:
                note_arrival(world, request)
            issued = arrive(world, request, t)
        else:
            worker = tree.first(fleet.clock)
            w = unsigned(worker)
            prefills, waits = prefills_only(world, worker), fleet.waiting[unsigned(2 * worker)] >= 0
            stops = users_wait or prefills or waits or changes or tiered or world.transfer.merges
            if stops and is_behind(world, worker, t):
                bring_up(world, worker, t)
                tree.put(fleet.clock, worker, fleet.sums[w, END_TIME])
                continue
            if changes and world.life.whole[DOOM, w] != 0:
                issued = call_live(world.live, (world, t, whole(worker))) != 0
            elif stops and fleet.counts[w, REPORTED] < fleet.counts[w, ENDED]:
                issued = let_others_know(world, worker, t)
            else:
                if tiered and seen.has_new(fleet.seen[w]):
                    act(world, OFFERS, 0, worker, t)
                if prefills and split.queued:
                    feed(world, t)
                if tiered and has_tiers(world, worker) and fleet.waiting[unsigned(2 * worker)] >= 0:
                    make_room(world, worker, t)
                go_on(world, worker, whole(STOPS if stops else GOES_ON), due, users_wait or apart or doomed)
        if doomed or life_due == t:
            doomed = dooms(world)
        if not issued:
            between[TROUBLE] = OUT_OF_REQUESTS
        if users_wait:
            dynamic_due = next_issued(work)
    status = between[TROUBLE]
    for worker in range(fleet.group.size):
        if status == DONE and is_behind(world, worker, time_limit):
            status = visit(world, worker, whole(GOES_ON), time_limit)
    if apart:
        join(world)
    gather(world, status)
    if apart:
        links.settle(fleet.links, max(work.sums[END_TIME], now))
        write_parts(world)
    if tiered:
        act(world, ENDS, 0, 0, max(work.sums[END_TIME], now))
    return status


@inlined
def waits_for_decode(world, request):
    """Whether a request that was prefilled elsewhere waits at its decode worker at the end; `join` has been."""
    fleet, r = world.fleet, unsigned(request)
    return (
        fleet.way[REMOTE, r] == 1
        and world.work.own[STATE, r] == PREFILL
        and not np.isnan(fleet.instants[NOTICED_AT, r])
        and np.isnan(fleet.times[STARTED_AT, r])
    )


@bare
def gather(world, status):
    """Make the numbers of all workers those of one engine."""
    fleet, work, time_limit = world.fleet, world.work, world.time_limit
    counts, sums, own = work.counts, work.sums, work.own
    for worker in range(fleet.group.size):
        add_up(world, worker)
    apart = world.split.prefill_workers > 0
    for request in range(world.load.prompt_tokens.size):
        r = unsigned(request)
        if own[STATE, r] == DECODE:  # as `generated` will have it of one engine that has not made a step
            own[GENERATED, r] -= fleet.counts[unsigned(fleet.way[DECODES_AT, r]), STEP]
        if world.control.changes:
            own[PREEMPTIONS, r] -= world.life.fate[CUT_SHORT, r]
            if own[STATE, r] == FAILED:  # perhaps after the last step of all
                sums[END_TIME] = max(sums[END_TIME], world.life.rings[FAILED_AT, r])
            if own[STATE, r] == UNSEEN and world.life.fate[CAME_HERE, r] != 0:  # on its way to a worker
                own[STATE, r] = QUEUED
    if apart or world.tiers.on or world.control.changes:  # some are in no worker's queue, or in that of two
        counts[WAITING] = 0
        for request in range(world.load.prompt_tokens.size):
            counts[WAITING] += own[STATE, unsigned(request)] == QUEUED or (apart and waits_for_decode(world, request))
    if world.tiers.on or world.control.changes:
        counts[ENQUEUED] = 0
        for request in range(world.load.prompt_tokens.size):
            counts[ENQUEUED] += own[STATE, unsigned(request)] != UNSEEN
    if fleet.views.size > 0:
        write_views(world)
    if status == DONE and time_limit < np.inf:
        sums[END_TIME] = max(sums[END_TIME], time_limit)
    if world.control.changes:
        count_changes(world)
    elif world.life.metrics.size > 0:
        world.life.metrics[:] = 0.0
        for group in range(world.groups.shape[0]):
            p = world.groups[unsigned(group)]
            spent = max(sums[END_TIME] - world.warmup, 0.0)
            world.life.metrics[HOURS_METRIC] += p[GROUP_WORKERS] * p[GROUP_GPUS] * spent / 3600.0


@bare
def write_views(world):
    """Tell how what a router took to be cached differed from what was found, over measured requests. O(requests)."""
    fleet, load, work = world.fleet, world.load, world.work
    fleet.views[:] = np.nan
    if world.router.credit == 0.0:
        return
    known = expected = missed = routed = whole(0)
    age = 0.0
    for request in range(load.prompt_tokens.size):
        r = unsigned(request)
        worker = whole(fleet.way[DECODES_AT, r])
        if worker < 0 or work.own[STATE, r] == UNSEEN or load.arrived_at[r] < world.warmup:
            continue
        routed += 1
        age += fleet.view_age[r]
        moved = world.control.changes and world.life.fate[MIGRATIONS, r] > 0
        if moved or np.isnan(work.times[STARTED_AT, r]):
            continue
        tokens = whole(fleet.expected[r]) * memory_of(world.groups[kind_of(world, worker)]).block_size
        known += load.prompt_tokens[r]
        expected += tokens
        missed += max(tokens - work.own[HIT, r], 0)
    if known > 0:
        fleet.views[EXPECTED_RATE], fleet.views[MISSED_RATE] = expected / known, missed / known
    if routed > 0:
        fleet.views[VIEW_AGE] = age / routed


@bare
def count_changes(world):
    """Tell what has happened to workers, what they cost and had to offer, and what became of requests."""
    life, work = world.life, world.work
    out, sums = life.metrics, work.sums
    out[:] = 0.0
    for worker in range(world.fleet.group.size):
        w = unsigned(worker)
        spend(world, worker, sums[END_TIME])
        p = world.groups[kind_of(world, worker)]
        sums[SLOT_SECONDS] += life.spent[SERVING, w] * policy_of(p).slots
        sums[BLOCK_SECONDS] += life.spent[SERVING, w] * world.fleet.blocks[w]
        out[HOURS_METRIC] += life.spent[ON, w] * p[GROUP_GPUS] / 3600.0
    for request in range(world.load.prompt_tokens.size):
        r = unsigned(request)
        if work.own[STATE, r] != UNSEEN and world.load.arrived_at[r] >= world.warmup:
            out[FAILED_METRIC] += work.own[STATE, r] == FAILED
            out[MIGRATIONS_METRIC] += life.fate[MIGRATIONS, r]
            out[RETRIES_METRIC] += life.fate[RETRIES, r]
    out[CRASHES_METRIC] = life.numbers[CRASHES_SEEN]
    out[UPS_METRIC] = life.numbers[UPS]
    out[DOWNS_METRIC] = life.numbers[DOWNS]
