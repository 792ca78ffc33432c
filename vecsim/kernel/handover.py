"""What happens to a request between its prefill worker and its decode worker: blocks reserved, moved, given back."""

import numpy as np

from vecsim import transfer as transfers
from vecsim.kernel import kv, links, tree
from vecsim.kernel.address import call_live
from vecsim.kernel.heap import pop, push, rise
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.life import (
    AT_ONCE,
    BROKEN_PREFILL,
    CAME,
    CAME_HERE,
    CAME_TOKENS,
    CUT_SHORT,
    DECODE_PART,
    GAPS_SEEN,
    GAPS_SUM,
    HOLDS,
    LEFT_BY_END,
    LEFT_TOKENS,
    LIVE,
    NOBODY,
    NOBODY_TO_PREFILL,
    NOT_SENT,
    NOT_SENT_ON,
    NOT_SENT_TO_PREFILL,
    TTFT_SUM,
    drop_alarm,
    is_up,
    next_alarm,
    set_alarm,
    turn_off_if_done,
)
from vecsim.kernel.places import DESTINATION, SOURCE, free_places, runs_to_move, take_places
from vecsim.kernel.routing import (
    DECODES_AT,
    OWNS_AT,
    PREFILLS_AT,
    believed,
    could_hold,
    not_started,
    outstanding,
    route,
)
from vecsim.kernel.state import RESERVED
from vecsim.kernel.tier_sets import COMES, IN_LINE, RISES, RISING, act, forget_rise, has_tiers
from vecsim.kernel.token import follow_up, issue_after_drop, let_ended_go, report, reset_requests, seen_at
from vecsim.kernel.token_batch import give_back, reservation, take_blocks, yield_blocks
from vecsim.kernel.token_scenarios import memory_of, policy_of
from vecsim.kernel.token_state import (
    BACKLOG,
    BLOCKS,
    COMPUTED,
    DECODING,
    DROPPED,
    DROPPED_AT_ONCE,
    ENDED,
    ENDED_AT,
    ENQUEUED,
    FAILED,
    FIRST_AT,
    GENERATED,
    GONE,
    HELD,
    HIT,
    HIT_TOKENS,
    KV,
    LAST_AT,
    LEFT,
    LEFT_BLOCKS,
    PINNED,
    PREEMPTIONS,
    PREFILL,
    PREFILLING,
    PROMPT_TOKENS,
    QUEUED,
    REPORTED,
    RUNNING,
    SINCE,
    STARTED_AT,
    STATE,
    UNSEEN,
    blocks_for,
    blocks_with_ids,
    full_blocks,
)
from vecsim.kernel.world import (
    EVER,
    assign,
    bring_up,
    cache_of,
    close_changes,
    judge,
    kind_of,
    look_again,
    name_ended,
    note_load,
    open_changes,
    prefills_only,
    send,
    tell_of_room,
    view,
    visiting,
)

# Rows of `way` [request] after those of `vecsim.kernel.routing`: whether it prefills elsewhere than it decodes; the one
# after it in a list; what its timer is for; where it is with each part of its work, that at its decode worker first
REMOTE, NEXT, WAITS_FOR, STAGE, PREFILL_STAGE, WAY_ROWS = range(3, 9)

# Where a request is: nowhere; on its way to a worker; in the line for blocks there, or with blocks reserved; in the
# queue for prefill; at the worker; there no more, but its blocks are; only where routers take it to be
NOWHERE, ON_ITS_WAY, FOR_RESERVATION, HAS_BLOCKS, FOR_PREFILL, AT_WORK, PREFILLED, ASTRAY = range(8)

# When a request's timer is due, its bytes begin to flow, or their arrival is noticed; or it is where it was sent to: to
# be served, to have blocks reserved, to be prefilled, or in the queue for that
FLOW, NOTICE, SERVED, WISHED, TO_PREFILL, TO_QUEUE = range(6)

# Rows of `instants` [request], seconds: blocks are reserved; it goes to prefill; prefill has ended; the transfer
# begins, and is noticed to have ended; when its timer is due; it is sent to a prefill worker; bytes begin to flow, and
# all have
RESERVED_AT, TO_PREFILL_AT, PREFILLED_AT, TRANSFER_AT, NOTICED_AT, DUE, SENT_AT, FLOW_AT, FLOWED_AT, INSTANT_ROWS = (
    range(10)
)

# Places in `between`, whole numbers of a fleet: timers that run; the queue for prefill, how many are in it, and
# their prompts' tokens
TIMERS, QUEUE_FIRST, QUEUE_LAST, QUEUED_FOR_PREFILL, QUEUED_TOKENS = range(1, 6)

# Rules of local prefill, in the order of `vecsim.fleet.LOCAL_RULES`
ALWAYS_REMOTE, QUEUE_AND_LENGTH, PROMPT_LENGTH, PREFILL_LOAD, LENGTH_OR_LOAD = range(5)

noticed_at = inlined(transfers.noticed_at)


@inlined
def put_in(lists, first, way, request):
    """Put a request at the end of a list; its first is at a place of `lists`, its last at the one after."""
    way[NEXT, unsigned(request)] = -1
    if lists[first] < 0:
        lists[first] = request
    else:
        way[NEXT, unsigned(lists[first + 1])] = request
    lists[first + 1] = request


@inlined
def take_out(lists, first, way):
    """Take the first of a list."""
    request = whole(lists[first])
    lists[first] = way[NEXT, unsigned(request)]
    return request


@bare
def hit_tokens(cache, memory, prompt, request):
    """Tokens of a prompt that a worker's cache holds."""
    if not memory.caching:
        return 0
    shared, _ = blocks_with_ids(cache, memory, request)
    limit = full_blocks(prompt - 1, memory.block_size, memory.shift)
    found, _ = kv.look_up(cache.nodes, cache.node_of, cache.owned, cache.ids, shared, request, limit)
    return found * memory.block_size


@bare
def reserve(policy, memory, load, work, cache, measured_from, holds, request):
    """Take blocks for a prompt whose keys and values will come; returns whether there were enough.

    `holds` is whether others' blocks are reserved, so that the watermark counts.
    """
    counts, own = work.counts, work.own
    r = unsigned(request)
    prompt = whole(load.prompt_tokens[r])
    size, shift = memory.block_size, memory.shift
    shared, own_start = blocks_with_ids(cache, memory, request)
    found = idle = 0
    if memory.caching:
        limit = full_blocks(prompt - 1, size, shift)
        found, idle = kv.look_up(cache.nodes, cache.node_of, cache.owned, cache.ids, shared, request, limit)
    hold = blocks_for(prompt, size, shift)
    if policy.hold == RESERVED:
        tokens = reservation(policy, prompt, whole(load.output_tokens[r]), whole(load.max_tokens[r]))
        hold = blocks_for(tokens, size, shift)
    needed = hold - found + idle
    if counts[RUNNING] > 0 or holds:
        needed += memory.watermark
    if needed > counts[FREE]:
        return False
    if memory.caching:
        kv.claim(
            counts, cache.nodes, cache.node_of, cache.owned, cache.own, cache.ids, shared, own_start, request, found
        )
    take_blocks(counts, cache, memory, hold - found)
    own[HELD, r] = hold
    own[HIT, r] = found * size
    if load.arrived_at[r] >= measured_from:
        counts[PROMPT_TOKENS] += prompt
        counts[HIT_TOKENS] += found * size
    return True


@bare
def local(split, prompt, hit, kv_use, busy, waiting):
    """Whether a request is prefilled by the worker that decodes it.

    Parameters
    ----------
    hit : int
        Tokens of its prompt that this worker's cache holds.
    kv_use : float
        Share of this worker's KV memory in use.
    busy : bool
        Whether the prefill worker that would be chosen has something to do.
    waiting : int
        Requests that wait for prefill.
    """
    effective = prompt - hit
    if split.rule == QUEUE_AND_LENGTH:
        chosen = not (effective > split.length and waiting < split.queue_size)
    else:
        chosen = split.rule != PREFILL_LOAD and effective < split.length and effective < split.ratio * prompt
        chosen = chosen or (split.rule != PROMPT_LENGTH and busy)
    return chosen and kv_use <= split.busy_threshold


@inlined
def set_timer(world, request, at, what):
    """Have something happen to a request later."""
    fleet = world.fleet
    fleet.instants[DUE, unsigned(request)] = at
    fleet.way[WAITS_FOR, unsigned(request)] = what
    push(fleet.timers, fleet.between[TIMERS], request, fleet.instants[DUE], world.load.arrived_at)
    fleet.between[TIMERS] += 1


@inlined
def take_timer(world):
    """Take the request whose timer is due first."""
    fleet = world.fleet
    request = whole(pop(fleet.timers, fleet.between[TIMERS], fleet.instants[DUE], world.load.arrived_at))
    fleet.between[TIMERS] -= 1
    return request


@inlined
def next_timer(world):
    """When the first timer is due."""
    fleet = world.fleet
    return fleet.instants[DUE, unsigned(fleet.timers[0])] if fleet.between[TIMERS] > 0 else np.inf


@bare
def reset_handover(world, requests):
    """No request is anywhere yet."""
    fleet, split, transfer = world.fleet, world.split, world.transfer
    workers = fleet.group.size
    fleet.way[:REMOTE, :requests] = -1
    fleet.way[REMOTE, :requests] = 0
    fleet.way[STAGE : PREFILL_STAGE + 1, :requests] = NOWHERE
    fleet.links.size[0] = 0
    fleet.waiting[:] = -1
    fleet.between[:] = 0
    fleet.between[QUEUE_FIRST] = -1
    if split.prefill_workers > 0:
        reset_requests(fleet.own, fleet.times, fleet.owned, requests, fleet.owned.size > 0)
        fleet.instants[:, :requests] = np.nan
        fleet.moved[:requests] = 0.0
        fleet.bandwidths[: split.prefill_workers] = transfer.source_bandwidth
        fleet.bandwidths[split.prefill_workers : workers] = transfer.destination_bandwidth
        fleet.bandwidths[workers] = transfer.fabric_bandwidth
        links.reset(fleet.links, fleet.bandwidths)
        fleet.runs[:requests] = 0


@bare
def send_to_prefill(world, request, worker, lasts, t):
    """Send a request to a prefill worker, where it will be after so many seconds."""
    fleet = world.fleet
    r = unsigned(request)
    fleet.way[PREFILLS_AT, r] = worker
    fleet.instants[SENT_AT, r] = t
    if world.control.changes:
        world.life.whole[HOLDS, unsigned(worker)] += 1
        before = whole(fleet.way[OWNS_AT, r])
        fleet.way[OWNS_AT, r] = worker
        if before >= 0 and before != worker and fleet.owned.size > 0:
            kv.disown(cache_of(world, before).nodes, fleet.owned, request)
    fleet.own[COMPUTED, r] = fleet.own[GENERATED, r] = 0
    fleet.own[KV, r] = PINNED
    assign(world, request, worker, whole(1))
    if lasts > 0.0:
        fleet.way[PREFILL_STAGE, r] = ON_ITS_WAY
        fleet.times[SINCE, r] = t
        set_timer(world, request, t + lasts, whole(TO_PREFILL))
    else:
        arrive_at_prefill(world, request, t)


@bare
def arrive_at_prefill(world, request, t):
    """A request is at the prefill worker that it was sent to."""
    fleet = world.fleet
    r = unsigned(request)
    worker = whole(fleet.way[PREFILLS_AT, r])
    if fleet.way[PREFILL_STAGE, r] == ON_ITS_WAY:
        note_wait(world, fleet.times[SINCE, r], t)
        bring_up(world, worker, t)
    fleet.way[PREFILL_STAGE, r] = AT_WORK
    come(world, request, worker, t)


@inlined
def note_wait(world, since, t):
    """A request has waited."""
    world.work.sums[BACKLOG] += max(t - max(since, world.warmup), 0.0)


@bare
def come(world, request, worker, t):
    """Put a request into the inbox of a worker, once what lower tiers have of it is brought up."""
    fleet = world.fleet
    if world.control.changes and world.tiers.on:
        own = fleet.own if prefills_only(world, worker) else world.work.own
        if own[PREEMPTIONS, unsigned(request)] == 0:  # of a worker that is gone
            forget_rise(world.tiers, request)
    if not has_tiers(world, worker):
        send(world, request, worker, t)
        return
    bring_up(world, worker, t)
    if not act(world, COMES, request, worker, t):
        put_in(fleet.waiting, 2 * worker, fleet.way, request)
        world.tiers.way[IN_LINE, unsigned(request)] = 1
        look_again(world, worker)  # it must not run on over the next end, which may make room


@bare
def rise_in_turn(world, worker, t):
    """Blocks have come free: bring up for the first in line that wait for that; returns whether none is left there."""
    fleet, tiers = world.fleet, world.tiers
    first = 2 * worker
    while fleet.waiting[first] >= 0:
        request = whole(fleet.waiting[first])
        if tiers.way[IN_LINE, unsigned(request)] == 0 or not act(world, RISES, request, worker, t):
            return False
        take_out(fleet.waiting, whole(first), fleet.way)
        tiers.way[IN_LINE, unsigned(request)] = 0
    return True


@inlined
def has_free_slot(world, worker):
    """Whether a prefill worker could hold the request that is looked at, and has a slot for it."""
    slots = int(world.groups[kind_of(world, worker), 0])
    return could_hold(world.fleet, worker) and outstanding(world.fleet, worker) < slots


@bare
def idle_prefill_worker(world):
    """The prefill worker with the fewest requests that has a free slot and could hold one; -1 if there is none."""
    fleet = world.fleet
    first = tree.first(fleet.loads[world.prefill_router.place])
    if has_free_slot(world, first):
        return first
    best = -1
    if world.groups.shape[0] > 2:  # they may differ
        for worker in range(world.split.prefill_workers):
            if has_free_slot(world, worker) and (
                best < 0 or outstanding(fleet, worker) < outstanding(fleet, best)
            ):  # fmt: skip
                best = worker
    return best


@bare
def go_to_prefill(world, request, t):
    """Send a request to a prefill worker, or into the queue for one."""
    fleet = world.fleet
    fleet.instants[TO_PREFILL_AT, unsigned(request)] = t
    able = judge(world, world.prefill_router, request)
    if not world.split.queued:
        worker = route(world, world.prefill_router, request, able, t)
        if worker < 0:
            find_nobody(world, request, whole(NOBODY_TO_PREFILL))
        elif is_up(world, worker):
            send_to_prefill(world, request, worker, world.control.request_plane, t)
        else:
            miss(world, request, worker, whole(NOT_SENT_TO_PREFILL), t)
    elif world.control.queue_push > 0.0:
        fleet.way[PREFILL_STAGE, unsigned(request)] = FOR_PREFILL
        set_timer(world, request, t + world.control.queue_push, whole(TO_QUEUE))
    else:
        join_queue(world, request, t)


@bare
def join_queue(world, request, t):
    """A request comes to the queue for prefill, whose first go on to workers if some are idle."""
    fleet = world.fleet
    put_in(fleet.between, whole(QUEUE_FIRST), fleet.way, request)
    fleet.between[QUEUED_FOR_PREFILL] += 1
    fleet.between[QUEUED_TOKENS] += world.load.prompt_tokens[unsigned(request)]
    fleet.way[PREFILL_STAGE, unsigned(request)] = FOR_PREFILL
    feed(world, t)


@bare
def feed(world, t):
    """Have prefill workers with free slots take from the queue for prefill."""
    fleet = world.fleet
    between = fleet.between
    while between[QUEUE_FIRST] >= 0:
        request = whole(between[QUEUE_FIRST])
        judge(world, world.prefill_router, request)
        worker = idle_prefill_worker(world)
        if worker < 0:
            break
        take_out(between, whole(QUEUE_FIRST), fleet.way)
        between[QUEUED_FOR_PREFILL] -= 1
        between[QUEUED_TOKENS] -= world.load.prompt_tokens[unsigned(request)]
        note_wait(world, fleet.instants[TO_PREFILL_AT, unsigned(request)], t)
        send_to_prefill(world, request, worker, world.control.queue_pop, t)


@bare
def try_to_reserve(world, request, worker, t):
    """Reserve a request's blocks at its decode worker, which is at its first boundary from `t` on."""
    fleet = world.fleet
    w = unsigned(worker)
    p = world.groups[kind_of(world, worker)]
    holds = fleet.counts[w, FREE] < fleet.blocks[w]
    open_changes(world, worker, t)
    name_ended(world, worker)
    if not reserve(
        policy_of(p), memory_of(p), world.load, view(world, worker, world.work.gaps), cache_of(world, worker),
        world.warmup, holds, request,
    ):  # fmt: skip
        return False
    close_changes(world, worker, t)
    fleet.instants[RESERVED_AT, unsigned(request)] = t
    fleet.way[STAGE, unsigned(request)] = HAS_BLOCKS
    if world.transfer.merges:
        own, size = world.work.own, memory_of(p).block_size
        r = unsigned(request)
        take_places(world, whole(DESTINATION), request, worker, whole(own[HELD, r]) - whole(own[HIT, r]) // size)
    note_load(world, worker)
    look_again(world, worker)  # it may run out of blocks earlier now
    return True


@bare
def on_reserved(world, request, t):
    """A request's blocks are reserved: it goes on to what comes next."""
    fleet, r = world.fleet, unsigned(request)
    stage = whole(fleet.way[PREFILL_STAGE, r])
    if stage == NOWHERE:
        if np.isnan(fleet.instants[PREFILLED_AT, r]):
            go_to_prefill(world, request, t)
        elif has_slot_still(world, request):  # the blocks that it has let go of are there
            fleet.own[KV, r] = PINNED
            fleet.way[PREFILL_STAGE, r] = PREFILLED
            world.life.whole[HOLDS, unsigned(fleet.way[PREFILLS_AT, r])] += 1
            move(world, request, t)
        else:
            forget_prefill(world, request)
            go_to_prefill(world, request, t)
    elif stage == PREFILLED:  # else it will learn that its prefill is lost
        move(world, request, t)


@bare
def has_slot_still(world, request):
    """Whether a request whose prefill has ended has not left its slot there. O(those that have ended)."""
    fleet = world.fleet
    w = unsigned(fleet.way[PREFILLS_AT, unsigned(request)])
    for i in range(fleet.counts[w, ENDED]):
        if fleet.ended[w, unsigned(i)] == request:
            return True
    return False


@bare
def reserve_or_wait(world, request, t):
    """Reserve a request's blocks at its decode worker, or have it wait there until there are enough."""
    fleet = world.fleet
    worker = whole(fleet.way[DECODES_AT, unsigned(request)])
    bring_up(world, worker, t)
    if fleet.waiting[2 * worker] < 0 and try_to_reserve(world, request, worker, t):
        on_reserved(world, request, t)
        return
    put_in(fleet.waiting, 2 * worker, fleet.way, request)
    fleet.way[STAGE, unsigned(request)] = FOR_RESERVATION
    world.work.times[SINCE, unsigned(request)] = t
    look_again(world, worker)  # it must not run on over the next end, which may make room
    if world.split.reserves_first and fleet.way[PREFILL_STAGE, unsigned(request)] == PREFILLED:
        # Its decode worker is another one than at first. Else two requests could wait for each other's blocks.
        unpin(world, request, t)


@bare
def retry(world, worker, t):
    """Blocks of a decode worker have come free: reserve for those that wait, in their order."""
    fleet, work = world.fleet, world.work
    first = 2 * worker
    while fleet.waiting[first] >= 0:
        if world.tiers.on and rise_in_turn(world, worker, t):
            break
        request = whole(fleet.waiting[first])
        if world.tiers.on and world.tiers.way[IN_LINE, unsigned(request)] != 0:
            break
        if not try_to_reserve(world, request, worker, t):
            break
        take_out(fleet.waiting, first, fleet.way)
        note_wait(world, work.times[SINCE, unsigned(request)], t)
        on_reserved(world, request, t)


@bare
def make_room(world, worker, t):
    """Free what requests that have ended hold at a worker, for those that wait to be brought up there."""
    counts = world.fleet.counts
    w = unsigned(worker)
    policy = policy_of(world.groups[kind_of(world, worker)])
    if counts[w, ENDED] > 0 and not (policy.into_empty and counts[w, DECODING] + counts[w, PREFILLING] > 0):
        let_ended_go(
            view(world, worker, world.work.gaps), visiting(world, worker), cache_of(world, worker),
            memory_of(world.groups[kind_of(world, worker)]), policy,
        )  # fmt: skip
    rise_in_turn(world, worker, t)


@bare
def move(world, request, t):
    """Have the keys and values that its decode worker lacks move there."""
    fleet, transfer = world.fleet, world.transfer
    r = unsigned(request)
    size = memory_of(world.groups[kind_of(world, whole(fleet.way[DECODES_AT, r]))]).block_size
    tokens = whole(world.load.prompt_tokens[r]) - world.work.own[HIT, r]
    fleet.instants[TRANSFER_AT, r] = t
    fleet.moved[r] = tokens * transfer.bytes_per_token
    fleet.left[r] = 1.0
    blocks = (tokens + size - 1) // size
    stretches = blocks
    if transfer.merges:
        source, destination = whole(fleet.way[PREFILLS_AT, r]), whole(fleet.way[DECODES_AT, r])
        stretches = runs_to_move(world, request, source, destination, whole(world.work.own[HIT, r]) // size, blocks)
    fleet.runs[r] = stretches
    setup = transfer.latency + stretches * transfer.descriptors_per_run * transfer.descriptor_cost
    if transfer.overlapped_layers > 1:
        setup *= overlap(world, request, setup)
    if setup > 0.0:
        set_timer(world, request, t + setup, whole(FLOW))
    else:
        flow(world, request, t)


@bare
def overlap(world, request, setup):
    """The share of a transfer that is left when the prefill ends, since layers move as they are computed.

    As if it had been alone until then: each part of it has gone on as far as the whole, but for the last layer.
    """
    fleet, transfer = world.fleet, world.transfer
    r = unsigned(request)
    layers = transfer.overlapped_layers
    slowest = min(transfer.source_bandwidth, transfer.destination_bandwidth, transfer.fabric_bandwidth)
    alone = setup + fleet.moved[r] / slowest + transposition(world, request)
    began = max(fleet.times[STARTED_AT, r], fleet.instants[SENT_AT, r])  # the former is of its first prefill
    prefill = fleet.instants[PREFILLED_AT, r] - began
    visible = max(alone / layers, alone - prefill * (layers - 1) / layers)
    fleet.left[r] = visible / alone if alone > 0.0 else 1.0
    return fleet.left[r]


@inlined
def transposition(world, request):
    """Seconds to rearrange what has come."""
    moved, transfer = world.fleet.moved[unsigned(request)], world.transfer
    return moved * transfer.transpose_per_byte + transfer.transpose_launch if moved > 0.0 else 0.0


@bare
def flow(world, request, t):
    """Have a transfer's bytes flow."""
    fleet, transfer = world.fleet, world.transfer
    r = unsigned(request)
    fleet.instants[FLOW_AT, r] = t
    if fleet.moved[r] == 0.0 or transfer.unlimited:
        all_flowed(world, request, t)
        return
    fabric = whole(fleet.group.size) if transfer.fabric_bandwidth < np.inf else whole(links.NO_LINK)
    source, destination = whole(fleet.way[PREFILLS_AT, r]), whole(fleet.way[DECODES_AT, r])
    links.begin(fleet.links, t, whole(request), source, destination, fabric, fleet.left[r] * fleet.moved[r])


@bare
def all_flowed(world, request, t):
    """All bytes of a transfer are there: it is noticed now or later."""
    fleet, transfer = world.fleet, world.transfer
    r = unsigned(request)
    fleet.instants[FLOWED_AT, r] = t
    at = t + fleet.left[r] * transposition(world, request)
    if transfer.polling > 0.0:
        at = noticed_at(fleet.instants[TRANSFER_AT, r], at, transfer.polling)
    if at > t:
        set_timer(world, request, at, whole(NOTICE))
    else:
        landed(world, request, t)


@bare
def landed(world, request, t):
    """A request's keys and values are at its decode worker, and it is noticed."""
    world.fleet.instants[NOTICED_AT, unsigned(request)] = t
    unpin(world, request, t)
    own = world.work.own
    r = unsigned(request)
    worker = whole(world.fleet.way[DECODES_AT, r])
    bring_up(world, worker, t)
    own[COMPUTED, r] = 0
    own[GENERATED, r] = int(world.split.first_by_prefill)
    own[KV, r] = whole(world.load.prompt_tokens[r]) + own[GENERATED, r]
    world.fleet.way[STAGE, r] = AT_WORK
    send(world, request, worker, t)


@bare
def unpin(world, request, t):
    """Free what a request holds at its prefill worker; what has a slot there still, when it leaves that."""
    fleet = world.fleet
    r = unsigned(request)
    worker = whole(fleet.way[PREFILLS_AT, r])
    fleet.way[PREFILL_STAGE, r] = NOWHERE
    if world.transfer.merges:
        free_places(world, whole(SOURCE), request, worker, whole(0))
    if fleet.own[KV, r] == PINNED:
        fleet.own[KV, r] = 0
    else:
        free_all(world, request, worker, whole(world.load.prompt_tokens[r]))
        tell_of_room(world, worker, t)
        if world.tiers.on and fleet.waiting[unsigned(2 * worker)] >= 0:
            bring_up(world, worker, t)
            rise_in_turn(world, worker, t)
    if world.control.changes:
        world.life.whole[HOLDS, unsigned(worker)] -= 1
        turn_off_if_done(world, worker, t)


@bare
def free_all(world, request, worker, computed):
    """Free what a request that has no slot holds at a worker, of whose tokens so many are there."""
    memory = memory_of(world.groups[kind_of(world, worker)])
    give_back(
        memory, view(world, worker, world.work.gaps), cache_of(world, worker), request,
        full_blocks(computed, memory.block_size, memory.shift),
    )  # fmt: skip


@bare
def prefilled(world, request, worker, t):
    """A request's prefill has ended; returns whether what follows it could be issued."""
    fleet, split, work, load = world.fleet, world.split, world.work, world.load
    r = unsigned(request)
    fleet.instants[PREFILLED_AT, r] = t
    fleet.way[PREFILL_STAGE, r] = PREFILLED
    if world.transfer.merges:
        memory = memory_of(world.groups[kind_of(world, worker)])
        blocks = blocks_for(whole(load.prompt_tokens[r]), memory.block_size, memory.shift)
        take_places(world, whole(SOURCE), request, worker, blocks)
    if split.first_by_prefill:
        if np.isnan(work.times[FIRST_AT, r]):
            work.times[FIRST_AT, r] = work.times[LAST_AT, r] = t
        work.own[GENERATED, r] = 1
        if load.output_tokens[r] == 1:
            work.own[STATE, r] = GONE
            work.times[ENDED_AT, r] = t
            unpin(world, request, t)
            leave_decode(world, request, t)
            leave(world, request, True)
            return is_answered(world, request, seen_at(load, request, t))
    if np.isnan(fleet.instants[RESERVED_AT, r]):
        choose_decode(world, request, t)
    elif fleet.way[STAGE, r] == HAS_BLOCKS:  # else it will learn that its blocks are lost
        move(world, request, t)
    return True


@bare
def choose_decode(world, request, t):
    """Have a request whose blocks aren't reserved be decoded somewhere."""
    worker = route(world, world.router, request, judge(world, world.router, request), t)
    if worker < 0:
        find_nobody(world, request, whole(NOBODY))
    elif is_up(world, worker):
        wish(world, request, worker, t)
    else:
        miss(world, request, worker, whole(NOT_SENT_ON), t)


@bare
def wish(world, request, worker, t):
    """Have blocks be reserved for a request at a worker, where it is to be decoded."""
    fleet = world.fleet
    r = unsigned(request)
    fleet.way[DECODES_AT, r] = worker
    assign(world, request, worker, whole(0))
    if world.control.request_plane > 0.0:
        fleet.way[STAGE, r] = ON_ITS_WAY
        world.work.times[SINCE, r] = t
        set_timer(world, request, t + world.control.request_plane, whole(WISHED))
    else:
        reserve_or_wait(world, request, t)


@inlined
def leave(world, request, ended):
    """A request has ended or failed."""
    if world.control.changes:
        life, r = world.life, unsigned(request)
        life.numbers[LIVE] -= 1
        if ended:
            times, length = world.work.times, whole(world.load.output_tokens[r])
            life.sums[LEFT_BY_END] += 1.0
            life.sums[LEFT_TOKENS] += length
            life.sums[TTFT_SUM] += times[FIRST_AT, r] - world.load.arrived_at[r]
            life.sums[GAPS_SEEN] += length - 1
            life.sums[GAPS_SUM] += times[ENDED_AT, r] - times[FIRST_AT, r]


@bare
def go_astray(world, request, worker, at, what):
    """A request isn't at a worker, as routers believe until it learns of that at a time."""
    fleet, r = world.fleet, unsigned(request)
    if what >= BROKEN_PREFILL:
        fleet.way[PREFILL_STAGE, r] = ASTRAY
    else:
        fleet.way[STAGE, r] = ASTRAY
    set_alarm(world, request, worker, at, what)


@bare
def miss(world, request, worker, what, t):
    """A request was to go to a worker that isn't there: that is found out later."""
    prefills = prefills_only(world, worker)
    world.fleet.way[PREFILLS_AT if prefills else DECODES_AT, unsigned(request)] = worker
    times = world.fleet.times if prefills else world.work.times
    times[SINCE, unsigned(request)] = t
    go_astray(world, request, worker, t + world.control.connect_timeout, what)


@bare
def find_nobody(world, request, what):
    """There is no worker for a request: it fails next."""
    go_astray(world, request, whole(-1), AT_ONCE, what)


@bare
def note_arrival(world, request):
    """A request comes for the first time."""
    life = world.life
    world.work.own[GENERATED, unsigned(request)] = 0
    life.numbers[LIVE] += 1
    life.fate[CAME_HERE, unsigned(request)] = 1
    life.sums[CAME] += 1.0
    life.sums[CAME_TOKENS] += world.load.prompt_tokens[unsigned(request)]


@bare
def arrive(world, request, t):
    """A request has come to the router; returns whether the one after it could be issued."""
    fleet, work = world.fleet, world.work
    r = unsigned(request)
    turn = fleet.turn[world.router.place]
    worker = route(world, world.router, request, judge(world, world.router, request), t)
    if worker < 0:
        work.counts[ENQUEUED] += 1
        fleet.way[REMOTE, r] = 0
        if could_ever(world) and world.control.changes:
            work.own[STATE, r] = QUEUED
            work.times[SINCE, r] = t
            find_nobody(world, request, whole(NOBODY))
            return True
        work.counts[DROPPED] += 1
        work.own[STATE, r] = DROPPED_AT_ONCE
        leave(world, request, False)
        return issue_after_drop(work, world.load, t)
    bring_up(world, worker, t)
    expected = fleet.expected[r]
    remote = world.split.prefill_workers > 0 and is_remote(world, request, worker, t)
    fleet.way[REMOTE, r] = remote
    if not is_up(world, worker) and not (remote and not world.split.reserves_first):
        work.own[STATE, r] = QUEUED
        miss(world, request, worker, whole(NOT_SENT), t)
        return True
    if remote:
        fleet.expected[r] = expected  # which the other router may have changed
        if not world.split.reserves_first:  # it was only asked for
            fleet.turn[world.router.place] = turn
        work.own[STATE, r] = UNSEEN
        go_elsewhere(world, request, worker, t)
        return True
    fleet.expected[r] = expected
    work.own[GENERATED, r] = 0
    serve(world, request, worker, t)
    return True


@bare
def serve(world, request, worker, t):
    """Have a worker compute all of a request."""
    fleet = world.fleet
    r = unsigned(request)
    fleet.way[DECODES_AT, r] = worker
    world.work.own[COMPUTED, r] = 0
    assign(world, request, worker, whole(1))
    if world.control.request_plane > 0.0:
        fleet.way[STAGE, r] = ON_ITS_WAY
        world.work.own[STATE, r] = QUEUED
        world.work.times[SINCE, r] = t
        set_timer(world, request, t + world.control.request_plane, whole(SERVED))
    else:
        fleet.way[STAGE, r] = AT_WORK
        come(world, request, worker, t)


@bare
def deliver(world, request, t):
    """A request, or the wish for its blocks, is where it was sent to."""
    fleet = world.fleet
    r = unsigned(request)
    what = whole(fleet.way[WAITS_FOR, r])
    if what == TO_QUEUE:
        join_queue(world, request, t)
    elif what == TO_PREFILL:
        arrive_at_prefill(world, request, t)
    else:
        note_wait(world, world.work.times[SINCE, r], t)
        if what == WISHED:
            reserve_or_wait(world, request, t)
        else:
            worker = whole(fleet.way[DECODES_AT, r])
            fleet.way[STAGE, r] = AT_WORK
            bring_up(world, worker, t)
            come(world, request, worker, t)


@inlined
def could_ever(world):
    """Whether any worker that was judged could hold the request, if it were there."""
    return world.fleet.between[EVER] > 0


@bare
def is_answered(world, request, seen):
    """The end of a request is seen: have what follows it arrive; returns whether there was one to be had."""
    follower = world.load.follower
    if follower.size > 0 and follower[unsigned(request)] >= 0:
        world.fleet.before[unsigned(follower[unsigned(request)])] = request
    return follow_up(world.work, world.load, request, seen)


@bare
def leave_decode(world, request, t):
    """A request leaves its decode worker, where it has not begun, with all that it has there."""
    fleet = world.fleet
    r = unsigned(request)
    stage = whole(fleet.way[STAGE, r])
    fleet.way[STAGE, r] = NOWHERE
    if stage == ASTRAY:
        drop_alarm(world, request, whole(DECODE_PART))
    if stage in (NOWHERE, ASTRAY):
        return
    worker = whole(fleet.way[DECODES_AT, r])
    bring_up(world, worker, t)
    fleet.counts[unsigned(worker), LEFT] += 1
    fleet.counts[unsigned(worker), LEFT_BLOCKS] += world.work.own[BLOCKS, r]
    if stage == ON_ITS_WAY:
        drop_timer(world, request)
    elif stage == FOR_RESERVATION:
        take_from_line(world, request, worker)
    else:
        free_all(world, request, worker, whole(world.work.own[HIT, r]))
        if world.transfer.merges:
            free_places(world, whole(DESTINATION), request, worker, whole(0))
    look_again(world, worker)
    retry(world, worker, t)
    tell_of_room(world, worker, t)
    if world.control.changes:
        turn_off_if_done(world, worker, t)


@bare
def forget_prefill(world, request):
    """A request is to be prefilled anew."""
    fleet = world.fleet
    r = unsigned(request)
    fleet.moved[r] = 0.0
    fleet.runs[r] = 0
    for instant in (TO_PREFILL_AT, SENT_AT, PREFILLED_AT, TRANSFER_AT, FLOW_AT, FLOWED_AT):
        fleet.instants[unsigned(instant), r] = np.nan
    fleet.times[ENDED_AT, r] = np.nan
    if world.work.own[GENERATED, r] == 0:  # else it has a first token, of which this stays true
        fleet.times[STARTED_AT, r] = np.nan
    world.life.fate[CUT_SHORT, r] -= fleet.own[PREEMPTIONS, r]  # they were preemptions all the same
    fleet.own[PREEMPTIONS, r] = 0


@bare
def go_elsewhere(world, request, worker, t):
    """Have a request be prefilled elsewhere than at its decode worker: this one, where it is chosen at arrival."""
    work = world.work
    work.times[SINCE, unsigned(request)] = t
    work.counts[ENQUEUED] += 1
    if world.split.reserves_first:
        wish(world, request, worker, t)
    else:
        go_to_prefill(world, request, t)


@bare
def is_remote(world, request, worker, t):
    """Whether a request is prefilled elsewhere than at its decode worker."""
    fleet, split = world.fleet, world.split
    w = unsigned(worker)
    able = judge(world, world.prefill_router, request)
    if not could_ever(world) or split.rule == ALWAYS_REMOTE:
        return could_ever(world)
    memory = memory_of(world.groups[kind_of(world, worker)])
    prompt = whole(world.load.prompt_tokens[unsigned(request)])
    open_changes(world, worker, t)
    name_ended(world, worker)
    hit = hit_tokens(cache_of(world, worker), memory, prompt, request)
    used = (fleet.blocks[w] - fleet.counts[w, FREE]) / fleet.blocks[w]
    waiting = whole(fleet.between[QUEUED_FOR_PREFILL])
    busy = False
    if split.queued:
        busy = waiting > 0 or idle_prefill_worker(world) < 0
    else:
        for other in range(split.prefill_workers):
            waiting += not_started(fleet, other)
        turn = fleet.turn[world.prefill_router.place]
        chosen = route(world, world.prefill_router, request, able, t)
        fleet.turn[world.prefill_router.place] = turn
        busy = chosen >= 0 and believed(fleet, chosen) > 0
    return not local(split, prompt, hit, used, busy, waiting)


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
            while world.control.changes and next_alarm(world) == AT_ONCE:  # there is no worker for it
                call_live(world.live, (world, t, whole(-1)))
            continue
        if world.transfer.merges:
            memory = memory_of(world.groups[kind_of(world, worker)])
            tokens = load.prompt_tokens[unsigned(request)] + load.output_tokens[unsigned(request)] - 1
            held = blocks_for(whole(tokens), memory.block_size, memory.shift)
            free_places(world, whole(DESTINATION), request, worker, held)
        leave(world, request, True)
        if not is_answered(world, request, seen_at(load, request, t)):
            return False
    if world.control.changes:
        turn_off_if_done(world, worker, t)
    return True


@bare
def drop_timer(world, request):
    """Nothing is to happen to a request any more. O(timers)."""
    fleet = world.fleet
    place = 0
    while fleet.timers[unsigned(place)] != request:
        place += 1
    fleet.instants[DUE, unsigned(request)] = -np.inf
    rise(fleet.timers, place, request, fleet.instants[DUE], world.load.arrived_at)
    take_timer(world)


@bare
def take_from_line(world, request, worker):
    """A request no longer waits for blocks of a decode worker. O(requests that do)."""
    fleet = world.fleet
    first = 2 * worker
    before = whole(-1)
    other = whole(fleet.waiting[first])
    while other != request:
        before, other = other, whole(fleet.way[NEXT, unsigned(other)])
    after = fleet.way[NEXT, unsigned(request)]
    if before < 0:
        fleet.waiting[first] = after
    else:
        fleet.way[NEXT, unsigned(before)] = after
    if after < 0:
        fleet.waiting[first + 1] = before


@bare
def gives_way(world, worker):
    """A decode worker has nothing that it could do: have the last that waits give back the blocks that it holds there.

    Returns whether there was one.
    """
    if world.tiers.on:
        if world.tiers.numbers[RISING, unsigned(worker)] > 0:  # whose blocks will come free again
            return False
    elif prefills_only(world, worker):
        return False
    p = world.groups[kind_of(world, worker)]
    return yield_blocks(
        view(world, worker, world.work.gaps),
        visiting(world, worker),
        cache_of(world, worker),
        memory_of(p),
        policy_of(p),
    )


@bare
def join(world):
    """Put both parts of the requests that were prefilled elsewhere together.

    `fleet.times` has when they started at their decode worker then.
    """
    fleet, own, times = world.fleet, world.work.own, world.work.times
    for request in range(world.load.prompt_tokens.size):
        r = unsigned(request)
        if fleet.way[REMOTE, r] != 1:
            continue
        decodes_from = times[STARTED_AT, r]
        times[STARTED_AT, r] = fleet.times[STARTED_AT, r]
        fleet.times[STARTED_AT, r] = decodes_from
        own[PREEMPTIONS, r] += fleet.own[PREEMPTIONS, r]
        if own[STATE, r] == FAILED:
            continue
        if np.isnan(fleet.instants[PREFILLED_AT, r]):  # of a step that was under way at the end
            ended_at = fleet.times[ENDED_AT, r]
            fleet.instants[PREFILLED_AT, r] = ended_at
            if world.split.first_by_prefill and not times[FIRST_AT, r] >= 0.0:
                times[FIRST_AT, r] = ended_at
                if world.load.output_tokens[r] == 1 and not np.isnan(ended_at):
                    own[STATE, r] = GONE
                    own[GENERATED, r] = 1
                    times[ENDED_AT, r] = ended_at
        if own[STATE, r] == UNSEEN:
            # It has not come to its decode worker
            own[GENERATED, r] = 0 if np.isnan(times[FIRST_AT, r]) else 1
            if np.isnan(times[STARTED_AT, r]):
                own[STATE, r] = QUEUED
            else:
                own[STATE, r] = PREFILL
        elif own[STATE, r] == QUEUED and own[PREEMPTIONS, r] == 0:
            own[STATE, r] = PREFILL
