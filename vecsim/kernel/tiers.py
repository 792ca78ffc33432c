"""Tiers below the workers' prefix caches: blocks go down in batches, and come up for a request before its prefill.

They move over links of each worker's own. `CacheTiers` in `vecsim.kv_cache` has the rules. The blocks that wait to go
down form a list linked by id, and so do those of a batch. O(1) a block, O(log of what is under way) a batch or request.
"""

import numpy as np

from vecsim.kernel import kv, links, seen
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.tier_sets import (
    ABSENT,
    ASKED_AT,
    AT,
    BATCHES,
    BEGAN_AT,
    BEGINS,
    CLEARS,
    COMES,
    COUNT,
    DISK,
    DISK_BLOCKS,
    DISK_TOKENS,
    ENDED_AT,
    FLOW_ENDS,
    FOUND,
    HOST,
    HOST_BLOCKS,
    HOST_DROPPED,
    HOST_TOKENS,
    IN_LINE,
    LAST,
    LEVELS,
    LINE_FIRST,
    LINE_LAST,
    MOVING,
    NOT_OFFERED,
    OFFERS,
    PENDING,
    RISEN,
    RISES,
    RISING,
    is_in,
    renew,
    store,
)
from vecsim.kernel.token_batch import for_all_tokens, promise, take_blocks
from vecsim.kernel.token_scenarios import (
    BLOCK_BYTES,
    CAPACITY,
    DISK_AFTER,
    IN_FLIGHT,
    OFFLOAD_BATCH,
    memory_of,
    policy_of,
)
from vecsim.kernel.token_state import (
    BROUGHT,
    GENERATED,
    HELD,
    HIT,
    HIT_TOKENS,
    INBOX,
    KV,
    PINNED,
    PINNED_BROUGHT,
    PREEMPTIONS,
    PROMISED,
    PROMPT_TOKENS,
    QUEUED,
    RUNNING,
    SINCE,
    STATE,
    WAITING,
    blocks_with_ids,
    full_blocks,
)
from vecsim.kernel.world import (
    bring_up,
    cache_of,
    close_changes,
    kind_of,
    look_again,
    name_ended,
    note_load,
    open_changes,
    prefills_only,
    send,
    view,
    visiting,
)

# A worker's links with each tier
DOWN, UP, WAYS = range(3)

# Places in `means`: shares of prompt tokens, seconds of those that had something brought up
HOST_SHARE, DISK_SHARE, ONBOARDING, MEANS = range(4)


@inlined
def link_of(worker, tier, way):
    """The number of a worker's link."""
    return whole((worker * LEVELS + tier) * WAYS + way)


@inlined
def most_batches(tiers):
    """Batches that there is room for on the way to a tier."""
    return tiers.lists.shape[2] - BATCHES


@bare
def reset_tiers(world):
    """Nothing is in any tier. O(workers x ids)."""
    tiers = world.tiers
    for worker in range(world.fleet.group.size):
        p = world.groups[kind_of(world, worker)]
        for tier in range(LEVELS):
            for way in range(WAYS):
                tiers.bandwidths[unsigned(link_of(worker, tier, way))] = p[unsigned(CAPACITY + LEVELS + tier)]
        empty(world, worker)
    tiers.way[:] = 0
    tiers.way[AT] = -1
    tiers.instants[:] = np.nan
    tiers.numbers[:] = 0
    tiers.means[:] = np.nan
    links.reset(tiers.links, tiers.bandwidths[: link_of(world.fleet.group.size, 0, 0)])


@bare
def empty(world, worker):
    """Nothing is in a worker's tiers, and nothing is on its way there. O(ids)."""
    tiers = world.tiers
    w, last = unsigned(worker), tiers.after.shape[2] - 1
    for tier in range(LEVELS):
        at = unsigned(tier)
        for id_ in range(last):
            tiers.after[w, at, unsigned(id_)] = ABSENT
            tiers.line[w, at, unsigned(id_)] = NOT_OFFERED
        tiers.after[w, at, unsigned(last)] = tiers.before[w, at, unsigned(last)] = last
        tiers.lists[w, at, :] = -1
        tiers.lists[w, at, COUNT] = tiers.lists[w, at, MOVING] = 0
    tiers.sightings[w, :] = 0
    tiers.changed[w] = -np.inf
    tiers.numbers[RISING, w] = 0


@bare
def offer(tiers, worker, tier, id_):
    """Offer a block to a tier: it counts as used where it is there; else it waits, unless it's on its way."""
    w, at = unsigned(worker), unsigned(tier)
    if is_in(tiers, worker, tier, id_):
        renew(tiers, worker, tier, id_)
    elif tiers.line[w, at, unsigned(id_)] == NOT_OFFERED:
        tiers.line[w, at, unsigned(id_)] = LAST
        if tiers.lists[w, at, LINE_FIRST] < 0:
            tiers.lists[w, at, LINE_FIRST] = id_
        else:
            tiers.line[w, at, unsigned(tiers.lists[w, at, LINE_LAST])] = id_
        tiers.lists[w, at, LINE_LAST] = id_


@bare
def offer_to_disk(world, worker, id_):
    """Offer a block of host memory to the disk, if it was seen often enough."""
    tiers, p = world.tiers, world.groups[kind_of(world, worker)]
    if p[CAPACITY + DISK] > 0.0 and tiers.sightings[unsigned(worker), unsigned(id_)] >= p[DISK_AFTER]:
        offer(tiers, worker, whole(DISK), id_)


@bare
def offer_new(world, worker, t):
    """Offer the blocks that a worker has registered since its last boundary, the last first. O(blocks)."""
    tiers, fleet = world.tiers, world.fleet
    w = unsigned(worker)
    while seen.has_new(fleet.seen[w]):
        id_ = whole(seen.take_new(fleet.seen[w]))
        if fleet.node_of[w, unsigned(id_)] < 0:
            continue
        tiers.sightings[w, unsigned(id_)] += 1
        offer(tiers, worker, whole(HOST), id_)
        if is_in(tiers, worker, HOST, id_):
            offer_to_disk(world, worker, id_)
    begin_batches(world, worker, whole(HOST), t)
    begin_batches(world, worker, whole(DISK), t)


@bare
def begin_batches(world, worker, tier, t):
    """Have what waits to go to a tier move, while batches may. O(blocks that leave the line)."""
    tiers, p = world.tiers, world.groups[kind_of(world, worker)]
    w, at = unsigned(worker), unsigned(tier)
    lists = tiers.lists[w, at]
    while lists[MOVING] < p[IN_FLIGHT] and lists[LINE_FIRST] >= 0:
        place = whole(BATCHES)
        while lists[unsigned(place)] >= 0:
            place += 1
        number, last = whole(0), whole(-1)
        while number < p[OFFLOAD_BATCH] and lists[LINE_FIRST] >= 0:
            id_ = whole(lists[LINE_FIRST])
            lists[LINE_FIRST] = tiers.line[w, at, unsigned(id_)]
            there = is_in(tiers, worker, HOST, id_) if tier == DISK else world.fleet.node_of[w, unsigned(id_)] >= 0
            if not there:
                tiers.line[w, at, unsigned(id_)] = NOT_OFFERED
                tiers.numbers[unsigned(HOST_DROPPED + tier), w] += 1
                continue
            tiers.line[w, at, unsigned(id_)] = LAST
            if last < 0:
                lists[unsigned(place)] = id_
            else:
                tiers.line[w, at, unsigned(last)] = id_
            last = id_
            number += 1
        if number > 0:
            lists[MOVING] += 1
            most = most_batches(tiers)
            transfer = LEVELS * tiers.way.shape[1] + (worker * LEVELS + tier) * most + place - BATCHES
            links.begin(
                tiers.links, t, whole(transfer), link_of(worker, tier, DOWN), whole(links.NO_LINK),
                whole(links.NO_LINK), number * p[BLOCK_BYTES],
            )  # fmt: skip


@bare
def batch_moved(world, batch, t):
    """A batch has come to its tier: the ones that it took first are the least recently used. O(blocks)."""
    tiers = world.tiers
    most = most_batches(tiers)
    place, tier, worker = BATCHES + batch % most, batch // most % LEVELS, batch // most // LEVELS
    w, at = unsigned(worker), unsigned(tier)
    p = world.groups[kind_of(world, worker)]
    id_ = whole(tiers.lists[w, at, unsigned(place)])
    tiers.lists[w, at, unsigned(place)] = -1
    tiers.lists[w, at, MOVING] -= 1
    while id_ >= 0:
        following = whole(tiers.line[w, at, unsigned(id_)])
        tiers.line[w, at, unsigned(id_)] = NOT_OFFERED
        store(tiers, worker, tier, id_, p[unsigned(CAPACITY + tier)], t)
        if tier == HOST:
            offer_to_disk(world, worker, id_)
        id_ = following
    bring_up(world, worker, t)
    begin_batches(world, worker, whole(HOST), t)
    begin_batches(world, worker, whole(DISK), t)


@bare
def begin_rise(world, request, worker, t):
    """Have what lower tiers hold of a request be brought up; returns whether it could, or there was nothing.

    Then it is on its way to the worker's queue. The worker is at its first boundary from `t` on. Those ahead of it have
    what they lack of blocks: else what is brought up for those behind could keep the first from being admitted.
    """
    tiers, fleet, load = world.tiers, world.fleet, world.load
    work, cache = view(world, worker, world.work.gaps), cache_of(world, worker)
    counts, own = work.counts, work.own
    r, w = unsigned(request), unsigned(worker)
    p = world.groups[kind_of(world, worker)]
    memory, policy = memory_of(p), policy_of(p)
    open_changes(world, worker, t)
    if not prefills_only(world, worker):
        name_ended(world, worker)
    known = whole(load.prompt_tokens[r]) + whole(own[GENERATED, r])
    limit = full_blocks(known - 1, memory.block_size, memory.shift)
    shared, own_start = blocks_with_ids(cache, memory, request)
    found, idle = kv.look_up(cache.nodes, cache.node_of, cache.owned, cache.ids, shared, request, limit)
    total, on_disk = whole(found), whole(0)
    while total < min(shared, limit):
        id_ = whole(kv.block_id(cache.ids, request, total))
        if not is_in(tiers, worker, HOST, id_):
            if not is_in(tiers, worker, DISK, id_):
                break
            on_disk += 1
        total += 1
    hold = for_all_tokens(policy, memory, visiting(world, worker), request, whole(own[GENERATED, r]))
    if total == found:
        promise(counts, own, request, hold)
        enter_queue(world, request, worker, t)
        return True
    own[STATE, r] = QUEUED
    if counts[RUNNING] + counts[WAITING] + counts[INBOX] + tiers.numbers[RISING, w] >= policy.slots:
        return False
    needed = hold - found + idle + counts[PROMISED]
    if counts[RUNNING] > 0 or counts[FREE] < fleet.blocks[w]:
        needed += memory.watermark
    if needed > counts[FREE]:
        return False
    kv.claim(counts, cache.nodes, cache.node_of, cache.owned, cache.own, cache.ids, shared, own_start, request, found)
    take_blocks(counts, cache, memory, total - found)
    close_changes(world, worker, t)
    for place in range(total - 1, found - 1, -1):
        id_ = whole(kv.block_id(cache.ids, request, place))
        renew(tiers, worker, whole(HOST if is_in(tiers, worker, HOST, id_) else DISK), id_)
    in_host = total - found - on_disk
    own[HELD, r] = total
    promise(counts, own, request, hold - total)
    if own[PREEMPTIONS, r] == 0:
        own[HIT, r] = total * memory.block_size
        tiers.way[HOST_BLOCKS, r], tiers.way[DISK_BLOCKS, r] = in_host, on_disk
        tiers.instants[BEGAN_AT, r] = t
        if load.arrived_at[r] >= world.warmup:
            counts[PROMPT_TOKENS] += load.prompt_tokens[r]
            counts[HIT_TOKENS] += total * memory.block_size
            tiers.numbers[HOST_TOKENS, w] += in_host * memory.block_size
            tiers.numbers[DISK_TOKENS, w] += on_disk * memory.block_size
    tiers.way[FOUND, r] = found
    tiers.way[PENDING, r] = (in_host > 0) + 2 * (on_disk > 0)
    tiers.numbers[RISING, w] += 1
    tiers.numbers[RISEN, w] += 1
    note_load(world, worker)
    look_again(world, worker)  # it may run out of blocks earlier now
    for tier in range(LEVELS):
        number = on_disk if tier == DISK else in_host
        if number > 0:
            links.begin(
                tiers.links, t, whole(tier * tiers.way.shape[1] + request), link_of(worker, tier, UP),
                whole(links.NO_LINK), whole(links.NO_LINK), number * p[BLOCK_BYTES],
            )  # fmt: skip
    return True


@bare
def enter_queue(world, request, worker, t):
    """A request goes to the queue of its worker: it has waited since it came there."""
    send(world, request, worker, t)
    asked = world.tiers.instants[ASKED_AT, unsigned(request)]
    if prefills_only(world, worker):
        world.fleet.times[SINCE, unsigned(request)] = asked
    else:
        world.work.times[SINCE, unsigned(request)] = asked


@bare
def ask(world, request, worker, t):
    """A request comes to a worker that has lower tiers: it waits from now on. Returns whether none is in the line."""
    work = view(world, worker, world.work.gaps)
    r = unsigned(request)
    work.times[SINCE, r] = t
    world.tiers.instants[ASKED_AT, r] = t
    world.tiers.way[AT, r] = worker
    first = world.fleet.waiting[unsigned(2 * worker)] < 0
    if not first:
        work.own[STATE, r] = QUEUED
    return first


@bare
def risen(world, request, worker, t):
    """All is there that was brought up for a request: it is registered, and the request is sent on."""
    tiers = world.tiers
    r, w = unsigned(request), unsigned(worker)
    work, cache = view(world, worker, world.work.gaps), cache_of(world, worker)
    if work.own[PREEMPTIONS, r] == 0:
        tiers.instants[ENDED_AT, r] = t
    tiers.numbers[RISING, w] -= 1
    bring_up(world, worker, t)
    enter_queue(world, request, worker, t)
    memory = memory_of(world.groups[kind_of(world, worker)])
    _, own_start = blocks_with_ids(cache, memory, request)
    found, total = whole(tiers.way[FOUND, r]), whole(work.own[HELD, r])
    open_changes(world, worker, t)
    kv.name(work.counts, cache.nodes, cache.node_of, cache.seen, cache.own, cache.ids, own_start, request, found, total)
    close_changes(world, worker, t)
    cache.owned[kv.NAMED, r] = total
    work.own[KV, r] = PINNED_BROUGHT if work.own[KV, r] == PINNED else BROUGHT


@bare
def flow_ended(world, t):
    """The first flow of all ends at `t`: a batch, or what one tier has of a request."""
    tiers = world.tiers
    requests = tiers.way.shape[1]
    _, transfer = links.next_end(tiers.links)
    links.end(tiers.links, t, transfer)
    if transfer >= LEVELS * requests:
        batch_moved(world, whole(transfer - LEVELS * requests), t)
        return
    request = whole(transfer % requests)
    r = unsigned(request)
    tiers.way[PENDING, r] -= 1 << (transfer // requests)
    if tiers.way[PENDING, r] == 0:
        risen(world, request, whole(tiers.way[AT, r]), t)


@bare
def clear(world, worker, t):
    """A worker's tiers are as those of a new one: what moves there is given up. O(requests + ids)."""
    tiers = world.tiers
    w, requests, most = unsigned(worker), tiers.way.shape[1], most_batches(tiers)
    for tier in range(LEVELS):
        for place in range(most):
            if tiers.lists[w, unsigned(tier), unsigned(BATCHES + place)] >= 0:
                batch = (worker * LEVELS + tier) * most + place
                links.end(tiers.links, t, whole(LEVELS * requests + batch))
    for request in range(world.load.prompt_tokens.size):
        r = unsigned(request)
        if tiers.way[AT, r] != worker:
            continue
        for tier in range(LEVELS):
            if tiers.way[PENDING, r] >> tier & 1:
                links.end(tiers.links, t, whole(tier * requests + request))
                if np.isnan(tiers.instants[ENDED_AT, r]):
                    tiers.instants[BEGAN_AT, r] = np.nan
        tiers.way[PENDING, r] = tiers.way[IN_LINE, r] = 0
        tiers.way[AT, r] = -1
    empty(world, worker)


@bare
def write_means(world):
    """Write the means over the measured requests. O(requests)."""
    tiers, load, counts = world.tiers, world.load, world.work.counts
    host = disk = whole(0)
    for worker in range(world.fleet.group.size):
        host += tiers.numbers[HOST_TOKENS, unsigned(worker)]
        disk += tiers.numbers[DISK_TOKENS, unsigned(worker)]
    known = counts[PROMPT_TOKENS]
    tiers.means[HOST_SHARE] = host / known if known > 0 else np.nan
    tiers.means[DISK_SHARE] = disk / known if known > 0 else np.nan
    number, total = whole(0), 0.0
    for request in range(load.prompt_tokens.size):
        took = tiers.instants[ENDED_AT, unsigned(request)] - tiers.instants[BEGAN_AT, unsigned(request)]
        if took >= 0.0 and load.arrived_at[unsigned(request)] >= world.warmup:
            number += 1
            total += took
    tiers.means[ONBOARDING] = total / number if number > 0 else np.nan


@bare_entry
def tiers_act(world, what, request, worker, t):
    """What concerns tiers at `t`; returns 1, or 0 where a request has to wait in the line.

    The fleet's loop calls it by its address: fleets without tiers need not have it compiled.
    """
    if what == FLOW_ENDS:
        flow_ended(world, t)
    elif what == OFFERS:
        offer_new(world, worker, t)
    elif what == COMES:
        return whole(ask(world, request, worker, t) and begin_rise(world, request, worker, t))
    elif what == RISES:
        return whole(begin_rise(world, request, worker, t))
    elif what == CLEARS:
        clear(world, worker, t)
    elif what == BEGINS:
        reset_tiers(world)
    else:
        links.settle(world.tiers.links, t)
        write_means(world)
    return whole(1)
