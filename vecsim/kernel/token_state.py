"""The state of a scenario of the token model: where each number stands, and the smallest steps on it."""

import numpy as np

from vecsim.kernel import kv
from vecsim.kernel.jit import bare, inlined, unsigned
from vecsim.kernel.kv import FREE
from vecsim.kernel.state import RESERVED

# Queue orders; all but the first take the request of the least rank
FIRST_COME, SHORTEST_PROMPT, PRIORITY, DEADLINE, SHORTEST_OUTPUT = range(5)

# Places in `counts`; the first three are those of `vecsim.kernel.kv`
(
    _FREE, _SPARE, _UNUSED, RUNNING, DECODING, CONTEXT, STEP, PREFILLING, QUEUE_HEAD, QUEUE_TAIL, HEAP, WAITING, STACK,
    PREEMPTED, DROPPED, GAPS, GAP_LOW, GAP_HIGH, MAX_QUEUE, STEPS, SCHEDULED, TOKENS, PROMPT_TOKENS, HIT_TOKENS, PEAK,
    ENDED, COMING, ISSUED, CLIPPED, OPEN, OPEN_SUM, ENQUEUED, CHUNKS, DECODES, DECODE_CONTEXT, BLOCKED, STARVED, GROUPS,
    TAKEN, STATUS, ALL_STEPS, ARRIVALS, NEWCOMERS, INBOX_HEAD, INBOX_TAIL, MEASURING, REPORTED, LEFT, LEFT_BLOCKS,
    BEGUN_BLOCKS, BEGINNING, INBOX, PROMISED, COUNTS,
) = range(54)  # fmt: skip

# `INBOX_HEAD` is the first of those sent to a worker that it hasn't looked at. For routers: `LEFT` requests have
# ended, with so many `BLOCKS`; `BEGUN_BLOCKS` are the `NEW_BLOCKS` of those that have a first token. `BEGINNING` of
# them, and the ended ones from `REPORTED` on, are so only when the step that is under way ends. `INBOX` is how many
# are in the inbox, `PROMISED` the sum of what those that wait lack.

# Places in `sums`
# A worker of a fleet doesn't coast at once: up to `HORIZON` (0: it does) it finds out when something else can happen,
# `FORESEEN`, and coasts when that is certain. Where workers come and go, `SLOT_SECONDS` and `BLOCK_SECONDS` are what
# they had to offer, 0 else.
(
    GAP_SUM,
    GAP_MAX,
    BUSY,
    USED,
    BACKLOG,
    RATIO,
    END_TIME,
    LAST_DECODE,
    NOW,
    LONGEST,
    HORIZON,
    FORESEEN,
    SLOT_SECONDS,
    BLOCK_SECONDS,
    SUMS,
) = range(15)

# Rows of `own` [request], whole numbers. While a request decodes, `GENERATED` is the decode step at which it would have
# had none yet: so it needs no touch. `AFTER` and `BEFORE` tie it to others in the calendar then, in the queue before.
# `KV` is one more than the tokens whose keys and values were brought here for it, 0 if none were; `PINNED` if what it
# holds stays when it ends, `PINNED_ALONE` when it has ended and has no slot any more. A router has counted `BLOCKS` of
# its prompt, `NEW_BLOCKS` of which it took to be new. `KV` is `BROUGHT` (`PINNED_BROUGHT` for `PINNED`) while it waits
# with blocks that are all that was found of its prompt, in lower tiers too. It lacks `LACKS` blocks while it waits:
# known only where there are lower tiers.
(
    COMPUTED, GENERATED, END, PLACE, AFTER, BEFORE, RESIDUE, HELD, HIT, PREEMPTIONS, STATE, STARVING, LATE, BLOCKS,
    NEW_BLOCKS, LACKS, KV, OWN_ROWS,
) = range(18)  # fmt: skip

PINNED, PINNED_ALONE, BROUGHT, PINNED_BROUGHT = range(-1, -5, -1)

# Rows of `times` [request], seconds. `SINCE` is since when it waits; until it arrives, when it will.
STARTED_AT, FIRST_AT, ENDED_AT, LAST_AT, RANK, SINCE, TIME_ROWS = range(7)

# States of a request
UNSEEN, QUEUED, PREFILL, DECODE, GONE, DROPPED_AT_ONCE, FAILED = range(7)

# In the row `LATE`: a gap between two tokens was longer than the limit. Else the count of such gaps in the request's
# class when it began to decode.
TOO_LATE = -1

# Rows of a step's record
BEGIN, LASTS, RECORDED_TIMES = range(3)

(
    STEP_QUEUE, STEP_PREFILLS, STEP_PREFILL_TOKENS, STEP_DECODES, STEP_USED, STEP_RUNNING, STEP_WORKER,
    RECORDED_COUNTS,
) = range(8)  # fmt: skip

# The times between tokens are counted in bins of a relative width of 2**-8
GAP_SHIFT = 44

GAP_FIRST = (1023 - 20) << 8

GAP_BINS = 60 * 256 + 1


@inlined
def put_last(counts, own, head, request):
    """Put a request at the end of a list; `head` is the place of its head in `counts`, its tail is the one after."""
    own[AFTER, unsigned(request)] = -1
    if counts[head] < 0:
        counts[head] = request
    else:
        own[AFTER, unsigned(counts[head + 1])] = request
    counts[head + 1] = request


@inlined
def put_first(counts, own, head, request):
    """Put a request at the front of a list."""
    own[AFTER, unsigned(request)] = counts[head]
    if counts[head] < 0:
        counts[head + 1] = request
    counts[head] = request


@inlined
def take_first(counts, own, head):
    """Take the first request of a list."""
    request = int(counts[head])
    counts[head] = own[AFTER, unsigned(request)]
    return request


@inlined
def is_decode(own, request, rest):
    """Whether a request with so many tokens left to compute decodes, though it is not in the calendar."""
    return rest == 1 and (own[GENERATED, unsigned(request)] > 0 or own[KV, unsigned(request)] > 0)


@inlined
def blocks_for(tokens, block_size, shift):
    """Blocks that hold so many tokens; `shift` is log2 of their size, -1 where that isn't whole."""
    if shift >= 0:
        return (tokens + block_size - 1) >> shift
    return (tokens + block_size - 1) // block_size


@inlined
def full_blocks(tokens, block_size, shift):
    """Blocks that so many tokens fill."""
    return tokens >> shift if shift >= 0 else tokens // block_size


@inlined
def gap_bin(gap):
    """Bin of the time between two tokens; ascends with it."""
    return min(max((np.float64(gap).view(np.int64) >> GAP_SHIFT) - GAP_FIRST, 0), GAP_BINS - 1)


@inlined
def gap_of(place):
    """The time in the middle of a bin."""
    low = np.int64((place + GAP_FIRST) << GAP_SHIFT).view(np.float64)
    high = np.int64((place + 1 + GAP_FIRST) << GAP_SHIFT).view(np.float64)
    return 0.5 * (low + high)


@inlined
def add_gaps(counts, sums, gaps, gap, number):
    """Count the time between two tokens of so many requests."""
    place = gap_bin(gap)
    gaps[unsigned(place)] += number
    counts[GAP_LOW] = min(counts[GAP_LOW], place)
    counts[GAP_HIGH] = max(counts[GAP_HIGH], place)
    counts[GAPS] += number
    sums[GAP_SUM] += number * gap
    sums[GAP_MAX] = max(sums[GAP_MAX], gap)


@inlined
def add_gaps_between(counts, sums, number, total, shortest, longest):
    """Count gaps that are in their bins already: how many, their sum, the shortest and the longest."""
    counts[GAP_LOW] = min(counts[GAP_LOW], gap_bin(shortest))
    counts[GAP_HIGH] = max(counts[GAP_HIGH], gap_bin(longest))
    counts[GAPS] += number
    sums[GAP_SUM] += total
    sums[GAP_MAX] = max(sums[GAP_MAX], longest)


@inlined
def add_steps(counts, sums, steps, scheduled, tokens, busy, used, held):
    """Count steps: requests scheduled, tokens computed, request-seconds in slots, block-seconds, most blocks held."""
    counts[STEPS] += steps
    counts[SCHEDULED] += scheduled
    counts[TOKENS] += tokens
    counts[MAX_QUEUE] = max(counts[MAX_QUEUE], counts[WAITING])
    counts[PEAK] = max(counts[PEAK], held)
    sums[BUSY] += busy
    sums[USED] += used


@inlined
def note_gaps(work, load, gap):
    """Count, for each class, the steps that keep its decoding requests longer than their limit. O(classes)."""
    for class_ in range(load.itl_limits.size):
        work.late[class_] += gap > load.itl_limits[class_]


@inlined
def class_of(load, request):
    """Place of a request's class."""
    return int(load.classes[request]) if load.classes.size > 0 else 0


@inlined
def settle(work, load, request):
    """A request leaves the decoding ones: note for good if a gap was too long since it joined them."""
    if work.own[LATE, request] != work.late[class_of(load, request)]:
        work.own[LATE, request] = TOO_LATE


@inlined
def join_punctual(work, load, request, gap):
    """A request has got a token by itself: what is counted for its class from now on concerns it."""
    class_ = class_of(load, request)
    if gap > load.itl_limits[class_]:
        work.own[LATE, request] = TOO_LATE
    elif work.own[LATE, request] != TOO_LATE:
        work.own[LATE, request] = work.late[class_]


@inlined
def is_active(own, stack, place):
    """Whether the request at a place of the stack still runs."""
    request = unsigned(stack[unsigned(place)])
    state = own[STATE, request]
    return own[PLACE, request] == place and state in (PREFILL, DECODE)


@inlined
def put_on_stack(counts, own, stack, request):
    """Note that a request is the last admitted; requests that have left make room when there is none."""
    if counts[STACK] == stack.size:
        kept = 0
        for place in range(stack.size):
            if is_active(own, stack, place):
                stack[unsigned(kept)] = stack[unsigned(place)]
                own[PLACE, unsigned(stack[unsigned(kept)])] = kept
                kept += 1
        counts[STACK] = kept
    own[PLACE, unsigned(request)] = counts[STACK]
    stack[unsigned(counts[STACK])] = request
    counts[STACK] += 1


@inlined
def generated(counts, own, request):
    """Tokens that a request has generated; `END` less its length stands in `GENERATED` while it decodes."""
    request = unsigned(request)
    if own[STATE, request] == DECODE:
        return int(counts[STEP]) - int(own[GENERATED, request])
    return int(own[GENERATED, request])


@inlined
def file_end(own, first, request):
    """File the end of a request in the calendar, before those that were admitted earlier."""
    bucket = unsigned(own[END, unsigned(request)] & (first.size - 1))
    after = int(first[bucket])
    before = -1
    place = own[PLACE, unsigned(request)]
    while after >= 0 and own[PLACE, unsigned(after)] > place:
        before, after = after, int(own[AFTER, unsigned(after)])
    own[AFTER, unsigned(request)] = after
    own[BEFORE, unsigned(request)] = before
    if after >= 0:
        own[BEFORE, unsigned(after)] = request
    if before >= 0:
        own[AFTER, unsigned(before)] = request
    else:
        first[bucket] = request


@bare
def cancel_end(own, first, request):
    """Take a request out of the calendar."""
    after, before = int(own[AFTER, unsigned(request)]), int(own[BEFORE, unsigned(request)])
    if after >= 0:
        own[BEFORE, unsigned(after)] = before
    if before >= 0:
        own[AFTER, unsigned(before)] = after
    else:
        first[unsigned(own[END, unsigned(request)] & (first.size - 1))] = after


@inlined
def begin_decode(work, memory, policy, request, prompt, output):
    """From the next decode step on, a request yields a token a step."""
    counts, own, first, residues = work.counts, work.own, work.first, work.residues
    step = int(counts[STEP])
    r = unsigned(request)
    so_far = int(own[GENERATED, r])
    left = output - so_far
    own[STATE, r] = DECODE
    own[END, r] = step + left - 1
    own[GENERATED, r] = step - so_far
    counts[DECODING] += 1
    counts[CONTEXT] += prompt + so_far
    if policy.hold != RESERVED:
        distance = step - (prompt + so_far - 1)
        residue = distance & (memory.block_size - 1) if memory.shift >= 0 else distance % memory.block_size
        own[RESIDUE, r] = residue
        residues[unsigned(residue)] += 1
    file_end(own, first, request)


@inlined
def open_room(counts, unclip, step, left, steps, most, sign):
    """Count what a decoding request may still generate, `most` at most (or take it back: sign -1)."""
    if left > most:
        counts[CLIPPED] += sign
        if steps > left - most:
            unclip[unsigned((step + left - most) & (unclip.size - 1))] += sign
    else:
        counts[OPEN] += sign
        counts[OPEN_SUM] += sign * left


@inlined
def let_go(counts, cache, memory, request, held, full, returns):
    """Free a request's slot and blocks."""
    counts[RUNNING] -= 1
    if memory.caching:
        shared, own_start = blocks_with_ids(cache, memory, request)
        kv.release(
            counts, cache.nodes, cache.node_of, cache.seen, cache.owned, cache.own, cache.ids, shared, own_start,
            request, held, full, returns, memory.front,
        )  # fmt: skip
    else:
        counts[FREE] += held


@inlined
def blocks_with_ids(cache, memory, request):
    """(blocks of a request that have given ids, their first place in `cache.own`)."""
    if cache.shared.size == 0:
        return 0, 0
    return int(cache.shared[unsigned(request)]), int(cache.own_start[unsigned(request)])
