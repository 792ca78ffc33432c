"""What happens to a request between its prefill worker and its decode worker: blocks reserved, moved, given back."""

import numpy as np

from vecsim import transfer as transfers
from vecsim.kernel import kv, links
from vecsim.kernel.heap import push
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.state import RESERVED
from vecsim.kernel.token_batch import reservation, take_blocks
from vecsim.kernel.token_state import (
    COMPUTED,
    GENERATED,
    HELD,
    HIT,
    HIT_TOKENS,
    KV,
    PROMPT_TOKENS,
    RUNNING,
    blocks_for,
    blocks_with_ids,
    full_blocks,
)

# Rows of `way` [request]: workers of its prefill and decode, -1 where there is none; whether it prefills elsewhere than
# it decodes; the one after it in a list; what its timer is for
PREFILLS_AT, DECODES_AT, REMOTE, NEXT, WAITS_FOR, WAY_ROWS = range(6)

# What is to be done for a request: when its timer is due, its bytes begin to flow, or their arrival is noticed. At its
# decode worker: choose where it is prefilled; reserve blocks; give them back; have it decoded.
FLOW, NOTICE, DISPATCH, RESERVE, RELEASE, DECODE_IT = range(6)

# Rows of `instants` [request], seconds: blocks are reserved; it goes to prefill; prefill has ended; the transfer
# begins, and is noticed to have ended; when its timer is due
RESERVED_AT, TO_PREFILL_AT, PREFILLED_AT, TRANSFER_AT, NOTICED_AT, DUE, INSTANT_ROWS = range(7)

# Places in `between`, whole numbers of a fleet: timers that run; the queue for prefill, and how many are in it; kinds
# of prefill workers; steps of all workers; the first and the last that something is planned for
TIMERS, QUEUE_FIRST, QUEUE_LAST, QUEUED_FOR_PREFILL, PREFILL_GROUPS, STEPS_MADE, AGENDA_FIRST, AGENDA_LAST, BETWEEN = (
    range(9)
)

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
def give_back(memory, work, cache, request, full):
    """Free the blocks that a request holds of a worker where it has no slot; `full` of them have what they can hold."""
    counts, own = work.counts, work.own
    r = unsigned(request)
    if memory.caching:
        shared, own_start = blocks_with_ids(cache, memory, request)
        kv.release(
            counts, cache.nodes, cache.node_of, cache.owned, cache.own, cache.ids, shared, own_start, request,
            int(own[HELD, r]), full, False, memory.front,
        )  # fmt: skip
    else:
        counts[FREE] += own[HELD, r]
    own[HELD, r] = 0


@inlined
def set_timer(fleet, load, request, at, what):
    """Have something happen to a request later."""
    fleet.instants[DUE, unsigned(request)] = at
    fleet.way[WAITS_FOR, unsigned(request)] = what
    push(fleet.timers, fleet.between[TIMERS], request, fleet.instants[DUE], load.arrived_at)
    fleet.between[TIMERS] += 1


@bare
def begin_transfer(fleet, transfer, load, hit, block_size, request, t):
    """Have the keys and values that the decode worker lacks move there; returns whether they are there at once."""
    r = unsigned(request)
    tokens = whole(load.prompt_tokens[r]) - hit
    fleet.instants[TRANSFER_AT, r] = t
    fleet.moved[r] = tokens * transfer.bytes_per_token
    blocks = (tokens + block_size - 1) // block_size
    setup = transfer.latency + blocks * transfer.descriptors_per_run * transfer.descriptor_cost
    if setup > 0.0:
        set_timer(fleet, load, request, t + setup, FLOW)
        return False
    return flow(fleet, transfer, load, request, t)


@bare
def flow(fleet, transfer, load, request, t):
    """Have a transfer's bytes flow; returns whether they are there at once."""
    r = unsigned(request)
    if fleet.moved[r] == 0.0 or transfer.unlimited:
        return settle(fleet, transfer, load, request, t)
    source, destination = whole(fleet.way[PREFILLS_AT, r]), whole(fleet.way[DECODES_AT, r])
    fabric = whole(fleet.sent.size) if transfer.fabric_bandwidth < np.inf else whole(links.NO_LINK)
    links.begin(fleet.links, t, whole(request), source, destination, fabric, fleet.moved[r])
    return False


@bare
def settle(fleet, transfer, load, request, t):
    """All bytes of a transfer are there: have that noticed; returns whether it is at once."""
    r = unsigned(request)
    at = t
    if fleet.moved[r] > 0.0 and transfer.transpose_launch > 0.0:
        at += fleet.moved[r] * transfer.transpose_per_byte + transfer.transpose_launch
    if transfer.polling > 0.0:
        at = noticed_at(fleet.instants[TRANSFER_AT, r], at, transfer.polling)
    if at > t:
        set_timer(fleet, load, request, at, NOTICE)
        return False
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
    if split.rule == ALWAYS_REMOTE:
        return False
    if split.rule == QUEUE_AND_LENGTH:
        chosen = not (effective > split.length and waiting < split.queue_size)
    else:
        chosen = split.rule != PREFILL_LOAD and effective < split.length and effective < split.ratio * prompt
        chosen = chosen or (split.rule != PROMPT_LENGTH and busy)
    return chosen and kv_use <= split.busy_threshold


# Rules of local prefill, in the order of `vecsim.fleet.LOCAL_RULES`
ALWAYS_REMOTE, QUEUE_AND_LENGTH, PROMPT_LENGTH, PREFILL_LOAD, LENGTH_OR_LOAD = range(5)


@bare
def arrive(load, work, request, first_by_prefill):
    """A request's keys and values are at its decode worker: what is left of it to do there."""
    r = unsigned(request)
    prompt = whole(load.prompt_tokens[r])
    work.own[KV, r] = prompt + 1 if first_by_prefill else prompt
    work.own[GENERATED, r] = int(first_by_prefill)
    work.own[COMPUTED, r] = 0
