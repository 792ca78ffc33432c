"""The event loop of a fleet: many engines, each with a clock of its own, behind a router. O(log workers) an event.

Each worker runs the step loop of `vecsim.kernel.token`, called by its address, from one boundary until the next thing
that may concern it: who it serves, and what a step does, is decided there alone. What a step does is known when it
begins; others learn of it when it ends. Ties go: what moves between workers, arrivals, boundaries of workers in their
order.

Where prefill is kept apart, the first workers do nothing else: to them a request has one token to yield, and what they
hold for it stays until it has moved to the worker that decodes.
"""

import numpy as np

from vecsim.kernel import links, tree
from vecsim.kernel.handover import (
    NOTICE,
    WAITS_FOR,
    all_flowed,
    feed,
    flow,
    gives_way,
    go_elsewhere,
    is_answered,
    is_remote,
    join,
    landed,
    make_room,
    next_timer,
    prefilled,
    reset_handover,
    retry,
    take_timer,
)
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.parts import write_parts
from vecsim.kernel.places import DESTINATION, free_places, reset_places
from vecsim.kernel.routing import DECODES_AT, looks_inside, route
from vecsim.kernel.state import (
    BEGINS,
    COASTING,
    DONE,
    GOES_ON,
    IDLE,
    INTERRUPTED,
    OUT_OF_REQUESTS,
    STOPS,
    TOO_LONG,
)
from vecsim.kernel.token import (
    MOST_STEPS,
    due_at,
    forget_steps,
    issue_after_drop,
    next_issued,
    report,
    reset_requests,
    take_arrival,
)
from vecsim.kernel.token_scenarios import memory_of
from vecsim.kernel.token_state import (
    BACKLOG,
    BUSY,
    COMPUTED,
    DECODE,
    DROPPED,
    DROPPED_AT_ONCE,
    END_TIME,
    ENDED,
    ENQUEUED,
    FORESEEN,
    GAP_BINS,
    GAP_HIGH,
    GAP_LOW,
    GAP_MAX,
    GAP_SUM,
    GAPS,
    GENERATED,
    HIT_TOKENS,
    HORIZON,
    ISSUED,
    MAX_QUEUE,
    MEASURING,
    PEAK,
    PREEMPTED,
    PROMPT_TOKENS,
    REPORTED,
    RUNNING,
    SCHEDULED,
    STATE,
    STEP,
    STEPS,
    TOKENS,
    USED,
    WAITING,
    blocks_for,
)
from vecsim.kernel.world import (
    TROUBLE,
    assign,
    bring_up,
    is_behind,
    judge,
    kind_of,
    note_load,
    prefills_only,
    send,
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
    work.sums[:] = 0.0
    reset_requests(work.own, work.times, cache.owned, requests, cache.owned.size > 0)
    fleet.before[:requests] = -1
    for worker in range(fleet.group.size):
        fleet.sent[unsigned(worker)] = 0
        fleet.sent_blocks[unsigned(worker)] = 0
        fleet.sent_new[unsigned(worker)] = 0
    fleet.turn[:] = 0
    fleet.clock[:] = np.inf
    fleet.loads[:] = np.inf
    reset_handover(world, requests)
    for worker in range(fleet.group.size):
        settle_in(world, worker, False)
        visit(world, worker, whole(BEGINS), 0.0)
        fleet.blocks[unsigned(worker)] = fleet.counts[unsigned(worker), FREE]
        note_load(world, worker)
    if world.transfer.merges:
        reset_places(world)


@bare
def arrive(world, request, t):
    """A request has come to the router; returns whether the one after it could be issued."""
    fleet, work = world.fleet, world.work
    turn = fleet.turn[world.router.place]
    worker = route(world, world.router, request, judge(world, world.router, request), t)
    if worker < 0:
        work.counts[ENQUEUED] += 1
        work.counts[DROPPED] += 1
        work.own[STATE, unsigned(request)] = DROPPED_AT_ONCE
        return issue_after_drop(work, world.load, t)
    bring_up(world, worker, t)
    expected = fleet.expected[unsigned(request)]
    if world.split.prefill_workers > 0 and is_remote(world, request, worker, t):
        fleet.expected[unsigned(request)] = expected  # which the other router may have changed
        if not world.split.reserves_first:  # it was only asked for
            fleet.turn[world.router.place] = turn
        go_elsewhere(world, request, worker, t)
        return True
    fleet.way[DECODES_AT, unsigned(request)] = worker
    fleet.expected[unsigned(request)] = expected
    work.own[COMPUTED, unsigned(request)] = work.own[GENERATED, unsigned(request)] = 0
    assign(world, request, worker, whole(1))
    send(world, request, worker, t)
    return True


@bare
def let_others_know(world, worker, t):
    """A step has ended at `t`: others learn of the requests that have ended in it.

    Returns whether what follows them could be issued.
    """
    fleet, load = world.fleet, world.load
    w = unsigned(worker)
    first = whole(fleet.counts[w, REPORTED])
    report(fleet.counts[w], fleet.own if prefills_only(world, worker) else world.work.own, fleet.ended[w])
    note_load(world, worker)
    for i in range(first, fleet.counts[w, ENDED]):
        request = whole(fleet.ended[w, unsigned(i)])
        if prefills_only(world, worker):
            if not prefilled(world, request, worker, t):
                return False
            continue
        if world.transfer.merges:
            memory = memory_of(world.groups[kind_of(world, worker)])
            tokens = load.prompt_tokens[unsigned(request)] + load.output_tokens[unsigned(request)] - 1
            held = blocks_for(whole(tokens), memory.block_size, memory.shift)
            free_places(world, whole(DESTINATION), request, worker, held)
        if not is_answered(world, request, t):
            return False
    return True


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
    if world.fleet.way[WAITS_FOR, unsigned(request)] == NOTICE:
        landed(world, request, t)
    else:
        flow(world, request, t)


@bare
def go_on(world, worker, kind, due, users_wait):
    """Have a worker make steps from its boundary on, until something that comes at `due` may concern it."""
    fleet = world.fleet
    w = unsigned(worker)
    until = min(due, world.time_limit)
    if world.split.prefill_workers > 0:
        until = min(until, next_move(world))
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
    fleet.sums[w, HORIZON] = 0.0 if looks_inside(world.router) or looks_inside(world.prefill_router) else horizon
    if users_wait or world.split.prefill_workers > 0:
        tree.put(fleet.clock, worker, np.inf)
        until = min(until, fleet.clock[1])
    if fleet.waiting[unsigned(2 * worker)] >= 0:  # step by step: each may free blocks
        until = 0.0
    until = max(until, np.nextafter(fleet.sums[w, END_TIME], np.inf))
    preempted = fleet.counts[w, PREEMPTED]
    status = visit(world, worker, kind, until)
    while (
        status == IDLE
        and world.split.prefill_workers > 0
        and (fleet.counts[w, PREEMPTED] != preempted or gives_way(world, worker))
    ):
        preempted = fleet.counts[w, PREEMPTED]
        status = visit(world, worker, kind, until)
    after = fleet.sums[w, END_TIME]
    if status == IDLE:
        after = np.inf
        status = DONE
    elif status == COASTING:
        after = fleet.sums[w, FORESEEN]
        status = DONE
    if fleet.counts[w, STEP] > MOST_STEPS:
        status = TOO_LONG
    if status != DONE:
        fleet.between[TROUBLE] = status
    tree.put(fleet.clock, worker, after)
    note_load(world, worker)
    if after == np.inf and fleet.waiting[unsigned(2 * worker)] >= 0:
        retry(world, worker, fleet.sums[w, END_TIME])  # a preemption may have freed blocks, and no step follows


@bare_entry
def simulate_fleet(world):
    """Run one scenario of a fleet, a `World`; returns the status.

    Results stay in `world.fleet`, and in `world.work` as if of one engine.
    """
    fleet, split, load, work = world.fleet, world.split, world.load, world.work
    time_limit, between = world.time_limit, fleet.between
    apart = split.prefill_workers > 0
    users_wait = load.closed or load.follower.size > 0
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
        if apart:
            moving_due = next_move(world)
        due = min(static_due, dynamic_due)
        t = min(moving_due, due, fleet.clock[1])
        if t >= time_limit or t == np.inf:
            break
        now = t
        issued = True
        if moving_due == t:
            move_on(world, t)
        elif due == t:
            request, static_due, dynamic_due = take_arrival(work, load, static, static_due, dynamic_due)
            issued = arrive(world, request, t)
        else:
            worker = tree.first(fleet.clock)
            w = unsigned(worker)
            prefills, waits = prefills_only(world, worker), fleet.waiting[unsigned(2 * worker)] >= 0
            stops = users_wait or prefills or waits or world.transfer.merges
            if stops and is_behind(world, worker, t):
                bring_up(world, worker, t)
                tree.put(fleet.clock, worker, fleet.sums[w, END_TIME])
                continue
            if stops and fleet.counts[w, REPORTED] < fleet.counts[w, ENDED]:
                issued = let_others_know(world, worker, t)
            else:
                if prefills and split.queued:
                    feed(world, t)
                if waits:
                    make_room(world, worker, t)
                go_on(world, worker, whole(STOPS if stops else GOES_ON), due, users_wait)
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
    return status


@bare
def gather(world, status):
    """Make the numbers of all workers those of one engine."""
    fleet, work, time_limit = world.fleet, world.work, world.time_limit
    counts, sums, own = work.counts, work.sums, work.own
    counts[GAP_LOW] = GAP_BINS
    end = 0.0
    blocks = fleet.blocks.sum()
    for worker in range(fleet.group.size):
        w = unsigned(worker)
        its, its_sums = fleet.counts[w], fleet.sums[w]
        if its[MEASURING] == 0:
            forget_steps(its, its_sums, fleet.unmeasured)
        end = max(end, its_sums[END_TIME])
        counts[GAP_LOW] = min(counts[GAP_LOW], its[GAP_LOW])
        counts[GAP_HIGH] = max(counts[GAP_HIGH], its[GAP_HIGH])
        counts[GAPS] += its[GAPS]
        counts[WAITING] += its[WAITING]
        counts[RUNNING] += its[RUNNING]
        counts[PREEMPTED] += its[PREEMPTED]
        counts[ENQUEUED] += its[ENQUEUED]
        counts[STEPS] += its[STEPS]
        counts[SCHEDULED] += its[SCHEDULED]
        counts[TOKENS] += its[TOKENS]
        counts[PROMPT_TOKENS] += its[PROMPT_TOKENS]
        counts[HIT_TOKENS] += its[HIT_TOKENS]
        counts[MAX_QUEUE] = max(counts[MAX_QUEUE], its[MAX_QUEUE])
        counts[PEAK] = max(counts[PEAK], its[PEAK] * blocks // fleet.blocks[w])
        sums[GAP_SUM] += its_sums[GAP_SUM]
        sums[GAP_MAX] = max(sums[GAP_MAX], its_sums[GAP_MAX])
        sums[BUSY] += its_sums[BUSY]
        sums[USED] += its_sums[USED]
        sums[BACKLOG] += its_sums[BACKLOG]
    for request in range(world.load.prompt_tokens.size):
        r = unsigned(request)
        if own[STATE, r] == DECODE:  # as `generated` will have it of one engine that has not made a step
            own[GENERATED, r] -= fleet.counts[unsigned(fleet.way[DECODES_AT, r]), STEP]
    if status == DONE and time_limit < np.inf:
        end = max(end, time_limit)
    sums[END_TIME] = end
