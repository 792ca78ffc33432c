"""The step loop of the token model: O(1) a step whatever the batch size, O(1) a scheduled chunk of a prompt.

Decoding requests all advance by one token in a step that decodes. So they are counts: how many, their context, how
many need a new block at which residue of the step number, and a calendar of who ends at which decode step. Only
requests whose prompt is being computed are touched in a step. While nothing else can happen the loop coasts from step
to step, until an arrival, an end or a lack of blocks. All that a batcher decides are the values of a `Policy`.
"""

import numpy as np

from vecsim.kernel import kv
from vecsim.kernel.duration import by_formula, duration
from vecsim.kernel.heap import pop, push
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.state import (
    BAD_DURATION,
    DONE,
    INTERRUPTED,
    OUT_OF_REQUESTS,
    OUT_OF_STEPS,
    Formula,
    TokenBatch,
)
from vecsim.step_time import LINEAR, POLYNOMIAL

# What holds a request's blocks: those that its computed tokens need, those of its whole prompt from the start, or
# what was reserved when it was admitted
AS_SCHEDULED, WHOLE_PROMPT, RESERVED = range(3)

# Who is preempted
LAST, LEAST_URGENT, FEWEST_TOKENS = range(3)

# Queue orders; all but the first take the request of the least rank
FIRST_COME, SHORTEST_PROMPT, PRIORITY, DEADLINE, SHORTEST_OUTPUT = range(5)

# Places in `counts`; the first three are those of `vecsim.kernel.kv`
(
    _FREE, _SPARE, _UNUSED, RUNNING, DECODING, CONTEXT, STEP, PREFILLING, QUEUE_HEAD, QUEUE_TAIL, HEAP, WAITING, STACK,
    PREEMPTED, DROPPED, GAPS, GAP_LOW, GAP_HIGH, MAX_QUEUE, STEPS, SCHEDULED, TOKENS, PROMPT_TOKENS, HIT_TOKENS, PEAK,
    ENDED, COMING, ISSUED, CLIPPED, OPEN, OPEN_SUM, ENQUEUED, CHUNKS, DECODES, DECODE_CONTEXT, BLOCKED, STARVED, GROUPS,
    TAKEN, STATUS, ALL_STEPS, ARRIVALS, NEWCOMERS, COUNTS,
) = range(44)  # fmt: skip

# Places in `sums`
GAP_SUM, GAP_MAX, BUSY, USED, BACKLOG, RATIO, END_TIME, LAST_DECODE, NOW, LONGEST, SUMS = range(11)

# Rows of `own` [request], whole numbers. While a request decodes, `GENERATED` is the decode step at which it would have
# had none yet: so it needs no touch.
(
    COMPUTED, GENERATED, END, PLACE, AFTER, BEFORE, HELD, RESIDUE, HIT, PREEMPTIONS, STATE, STARVING, LATE, OWN_ROWS,
) = range(14)  # fmt: skip

# Rows of `times` [request], seconds. `SINCE` is since when it waits; until it arrives, when it will.
STARTED_AT, FIRST_AT, ENDED_AT, LAST_AT, RANK, SINCE, TIME_ROWS = range(7)

# States of a request
UNSEEN, QUEUED, PREFILL, DECODE, GONE, DROPPED_AT_ONCE = range(6)

# In the row `LATE`: a gap between two tokens was longer than the limit. Else the count of such gaps in the request's
# class when it began to decode.
TOO_LATE = -1

# Rows of a step's record
BEGIN, LASTS, RECORDED_TIMES = range(3)
(
    STEP_QUEUE, STEP_PREFILLS, STEP_PREFILL_TOKENS, STEP_DECODES, STEP_USED, STEP_RUNNING, RECORDED_COUNTS,
) = range(7)  # fmt: skip

# The times between tokens are counted in bins of a relative width of 2**-8
GAP_SHIFT = 44
GAP_FIRST = (1023 - 20) << 8
GAP_BINS = 60 * 256 + 1

# Look for an interruption once in so many steps
WATCH = 1 << 16


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


@bare
def find_victim(work, load, rule):
    """Whom to preempt. O(1) amortised for the last admitted, else O(batch)."""
    counts, own, stack = work.counts, work.own, work.stack
    urgency, classes, arrived_at, prompt_tokens = load.urgency, load.classes, load.arrived_at, load.prompt_tokens
    while not is_active(own, stack, counts[STACK] - 1):
        counts[STACK] -= 1
    victim = int(stack[unsigned(counts[STACK] - 1)])
    if rule == LAST:
        return victim
    for place in range(counts[STACK] - 2, -1, -1):
        if not is_active(own, stack, place):
            continue
        other = int(stack[unsigned(place)])
        if rule == LEAST_URGENT:
            mine = urgency[classes[unsigned(other)]] if classes.size else 0.0
            worst = urgency[classes[unsigned(victim)]] if classes.size else 0.0
            if mine > worst or (
                mine == worst
                and (
                    arrived_at[unsigned(other)] > arrived_at[unsigned(victim)]
                    or (arrived_at[unsigned(other)] == arrived_at[unsigned(victim)] and other > victim)
                )
            ):
                victim = other
        else:
            mine, least = generated(counts, own, other), generated(counts, own, victim)
            if mine < least or (mine == least and prompt_tokens[unsigned(other)] > prompt_tokens[unsigned(victim)]):
                victim = other
    return victim


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
            counts, cache.nodes, cache.node_of, cache.owned, cache.own, cache.ids, shared, own_start,
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


@bare
def preempt(work, load, cache, memory, policy, request, t):
    """Free all that a running request holds; it waits again, and will compute its tokens anew."""
    counts, sums, own, times = work.counts, work.sums, work.own, work.times
    arrived_at, prompt, output, caps = load.arrived_at, load.prompt_tokens, load.output_tokens, load.max_tokens
    first, residues, prefills, waiting, heap = work.first, work.residues, work.prefills, work.waiting, work.heap
    unclip, joined, joined_at = work.unclip, work.joined, work.joined_at
    r = unsigned(request)
    step = int(counts[STEP])
    if own[STATE, r] == DECODE:
        so_far = step - int(own[GENERATED, r])
        cancel_end(own, first, request)
        if load.watches_gaps:
            settle(work, load, r)
        # The block for its next token may be taken already.
        taken = 0
        if policy.hold != RESERVED:
            residues[unsigned(own[RESIDUE, r])] -= 1
            phase = step & (memory.block_size - 1) if memory.shift >= 0 else step % memory.block_size
            taken = own[RESIDUE, r] == phase and (counts[TAKEN] or own[HELD, r] == -1 - step)
        if policy.ratio > 0.0:
            open_room(counts, unclip, step, caps[r] - so_far, output[r] - so_far, policy.room_tokens, -1)
        own[GENERATED, r] = so_far
        counts[DECODING] -= 1
        counts[CONTEXT] -= prompt[r] + so_far
        if own[STARVING, r]:
            own[STARVING, r] = 0
        elif times[LAST_AT, r] < sums[LAST_DECODE]:
            times[LAST_AT, r] = sums[LAST_DECODE]
        else:  # it has not decoded since it joined
            for i in range(counts[GROUPS]):
                joined[i] -= joined_at[i] == times[LAST_AT, r]
        computed = prompt[r] + so_far - 1
        held = blocks_for(computed, memory.block_size, memory.shift) + taken
    else:
        computed = int(own[COMPUTED, r])
        held = int(own[HELD, r])
        kept = 0
        for i in range(counts[PREFILLING]):
            prefills[unsigned(kept)] = prefills[unsigned(i)]
            kept += prefills[unsigned(i)] != request
        counts[PREFILLING] = kept
    let_go(work.counts, cache, memory, request, held, full_blocks(computed, memory.block_size, memory.shift), True)
    own[STATE, r] = QUEUED
    own[COMPUTED, r] = 0
    own[PREEMPTIONS, r] += 1
    times[SINCE, r] = t
    counts[PREEMPTED] += 1
    counts[WAITING] += 1
    counts[BLOCKED] = 0
    if policy.order != FIRST_COME:
        push(heap, counts[HEAP], request, times[RANK], arrived_at)
        counts[HEAP] += 1
    elif policy.to_back:
        waiting[unsigned(counts[QUEUE_TAIL] & (waiting.size - 1))] = request
        counts[QUEUE_TAIL] += 1
    else:
        counts[QUEUE_HEAD] -= 1
        waiting[unsigned(counts[QUEUE_HEAD] & (waiting.size - 1))] = request


@bare
def unschedule(counts, chunk_of, chunk_tokens, request):
    """Take a preempted request out of the step that is being formed; returns the tokens that it had been given."""
    kept = given = 0
    for i in range(counts[CHUNKS]):
        if chunk_of[unsigned(i)] == request:
            given = int(chunk_tokens[unsigned(i)])
        else:
            chunk_of[unsigned(kept)] = chunk_of[unsigned(i)]
            chunk_tokens[unsigned(kept)] = chunk_tokens[unsigned(i)]
            kept += 1
    counts[CHUNKS] = kept
    return given


@inlined
def take_blocks(counts, cache, memory, number):
    """Take blocks that are known to be free."""
    if number > 0:
        if memory.caching:
            kv.take(counts, cache.nodes, cache.node_of, cache.owned, number)
        else:
            counts[FREE] -= number


@inlined
def schedule(work, cache, memory, request, tokens, hold):
    """Have a request compute tokens in this step, holding so many blocks."""
    counts, own, chunk_of, chunk_tokens = work.counts, work.own, work.chunk_of, work.chunk_tokens
    r = unsigned(request)
    take_blocks(counts, cache, memory, hold - own[HELD, r])
    own[HELD, r] = hold
    if memory.caching:
        shared, own_start = blocks_with_ids(cache, memory, request)
        full = min(full_blocks(own[COMPUTED, r] + tokens, memory.block_size, memory.shift), shared)
        named = int(cache.owned[kv.NAMED, r])
        if full > named:
            kv.name(counts, cache.nodes, cache.node_of, cache.own, cache.ids, own_start, request, named, full)
            cache.owned[kv.NAMED, r] = full
    chunk_of[unsigned(counts[CHUNKS])] = request
    chunk_tokens[unsigned(counts[CHUNKS])] = tokens
    counts[CHUNKS] += 1


@inlined
def reservation(policy, prompt, output, cap):
    """Tokens that there must be blocks for, at some time in a request's life."""
    if policy.hold == RESERVED:
        return policy.reserve_tokens if policy.reserve_tokens > 0 else prompt + cap
    if policy.ratio > 0.0:
        return max(prompt + min(cap, policy.room_tokens) + policy.page, prompt + output)
    return prompt + output


@inlined
def room(counts, sums, policy):
    """Tokens that decoding requests are expected to generate still (SGLang)."""
    return (counts[OPEN_SUM] + policy.room_tokens * counts[CLIPPED]) * sums[RATIO]


@inlined
def asked_of_rule(own_rule, work, load, memory, policy, request, rest, cached, started, sent, t):
    """Tokens that a rule of the user's own has a request compute in this step; 0 to `rest`."""
    counts = work.counts
    prompt, caps, classes = load.prompt_tokens, load.max_tokens, load.classes
    r = unsigned(request)
    class_ = whole(classes[r]) if classes.size > 0 else whole(0)
    batch = TokenBatch(
        running=counts[RUNNING],
        prefilling=counts[PREFILLING],
        decoding=counts[DECODING],
        free=policy.slots - counts[RUNNING],
        queued=counts[WAITING],
        time=t,
        waited=t - work.times[SINCE, r],
        prefill_requests=counts[CHUNKS],
        prefill_tokens=whole(sent),
        decode_context=counts[CONTEXT],
        free_blocks=counts[FREE],
        blocks=memory.blocks,
        block_size=memory.block_size,
        head_started=whole(started),
        head_tokens=whole(rest),
        head_cached_tokens=whole(cached),
        head_prompt_tokens=whole(prompt[r]),
        head_max_tokens=whole(caps[r]),
        head_class=class_,
        parameter=policy.parameter,
    )
    return min(max(whole(own_rule(batch)), 0), rest)


@inlined
def admit(work, load, cache, memory, policy, own_rule, left, sent, free_before, measured_from, t):
    """Admit waiting requests, in order, while slots, tokens and blocks last.

    `left` is the step's budget that is left, `sent` the prompt tokens that are scheduled already.
    """
    counts, sums, own, times = work.counts, work.sums, work.own, work.times
    arrived_at, prompt, caps = load.arrived_at, load.prompt_tokens, load.max_tokens
    prefills, chunk_of, chunk_tokens = work.prefills, work.chunk_of, work.chunk_tokens
    stack, waiting, heap = work.stack, work.waiting, work.heap
    block_size, shift = memory.block_size, memory.shift
    longest = 0
    promised = 0
    if policy.ratio > 0.0:
        for i in range(counts[CHUNKS]):  # the chunk that goes on
            r = unsigned(chunk_of[unsigned(i)])
            promised += blocks_for(chunk_tokens[unsigned(i)], block_size, shift) * block_size
            promised += min(caps[r] - own[GENERATED, r], policy.room_tokens)
    while counts[WAITING] > 0 and (left > 0 or policy.custom):
        if counts[RUNNING] >= policy.slots:
            counts[BLOCKED] = 1
            return
        if policy.one_prompt and counts[PREFILLING] > 0:
            return
        if policy.order == FIRST_COME:
            request = int(waiting[unsigned(counts[QUEUE_HEAD] & (waiting.size - 1))])
        else:
            request = int(heap[0])
        r = unsigned(request)
        so_far = int(own[GENERATED, r])
        known = int(prompt[r]) + so_far
        found = idle = 0
        if memory.caching:
            shared, own_start = blocks_with_ids(cache, memory, request)
            found, idle = kv.look_up(
                cache.nodes, cache.node_of, cache.owned, cache.ids, shared, request,
                full_blocks(known - 1, block_size, shift),
            )  # fmt: skip
        cached = found * block_size
        rest = known - cached
        tokens = rest
        cut = False
        if policy.custom:
            tokens = asked_of_rule(own_rule, work, load, memory, policy, request, rest, cached, 0, sent, t)
            if tokens == 0:
                return
        else:
            if policy.threshold > 0:
                tokens = min(tokens, policy.threshold)
            first_one = counts[CHUNKS] == 0 if policy.prefill_only else sent == 0
            cost = tokens
            if policy.padded:
                cost = (counts[CHUNKS] + 1) * max(longest, tokens) - counts[CHUNKS] * longest
            if cost > left:
                if policy.chunked:
                    cut = policy.ratio > 0.0
                    tokens = left // block_size * block_size if cut else left
                elif not (so_far > 0 and tokens > policy.budget and first_one):
                    return
                cost = min(cost, left)
            if tokens <= 0:
                return
        # Blocks
        if policy.hold == AS_SCHEDULED:
            hold = blocks_for(cached + tokens, block_size, shift)
        elif policy.hold == WHOLE_PROMPT:
            hold = blocks_for(known, block_size, shift)
        else:
            reserved = policy.reserve_tokens if policy.reserve_tokens > 0 else int(prompt[r]) + int(caps[r])
            hold = blocks_for(reserved, block_size, shift)
        needed = hold - found + idle
        if policy.reserve_full_prompt:
            needed = blocks_for(known, block_size, shift) - found + idle
        if counts[RUNNING] > 0:
            needed += memory.watermark
        if needed > counts[FREE]:
            counts[BLOCKED] = 1
            return
        if policy.ratio > 0.0:
            more = min(caps[r] - so_far, policy.room_tokens)
            if counts[RUNNING] > 0 and rest + idle * block_size + more + policy.page > (
                free_before * block_size - room(counts, sums, policy) - promised
            ):
                return
            promised += blocks_for(tokens, block_size, shift) * block_size + more
        # Admitted
        if policy.order == FIRST_COME:
            counts[QUEUE_HEAD] += 1
        else:
            pop(heap, counts[HEAP], times[RANK], arrived_at)
            counts[HEAP] -= 1
        counts[WAITING] -= 1
        counts[RUNNING] += 1
        sums[BACKLOG] += t - max(times[SINCE, r], measured_from)
        if own[PREEMPTIONS, r] == 0:
            times[STARTED_AT, r] = t
            own[HIT, r] = cached
            if arrived_at[r] >= measured_from:
                counts[PROMPT_TOKENS] += prompt[r]
                counts[HIT_TOKENS] += cached
        own[HELD, r] = found
        own[COMPUTED, r] = cached
        own[STATE, r] = PREFILL
        own[STARVING, r] = 0
        put_on_stack(counts, own, stack, request)
        if memory.caching:
            kv.claim(
                counts, cache.nodes, cache.node_of, cache.owned, cache.own, cache.ids, shared, own_start, request, found
            )
        prefills[unsigned(counts[PREFILLING])] = request
        counts[PREFILLING] += 1
        schedule(work, cache, memory, request, tokens, hold)
        left -= cost if not policy.custom else 0
        sent += 0 if so_far > 0 and rest == 1 else tokens
        longest = max(longest, tokens)
        if cut:
            return


@bare
def starve(work, memory, request, t):
    """A decoding request gets no token in this step: all that is filed for it comes a step later."""
    counts, own, times = work.counts, work.own, work.times
    first, residues, starving = work.first, work.residues, work.starving
    r = unsigned(request)
    cancel_end(own, first, request)
    own[END, r] += 1
    own[GENERATED, r] += 1
    file_end(own, first, request)
    residues[unsigned(own[RESIDUE, r])] -= 1
    own[RESIDUE, r] = (own[RESIDUE, r] + 1) % memory.block_size
    residues[unsigned(own[RESIDUE, r])] += 1
    if own[STARVING, r] == 0:
        times[LAST_AT, r] = t
    own[STARVING, r] = 2
    starving[unsigned(counts[STARVED])] = request
    counts[STARVED] += 1


@bare
def grow(work, load, cache, memory, policy, phase, t):
    """Take a block for each decoding request that needs one in this step, preempting where there are too few.

    Who comes first doesn't matter, unless freed blocks go to the front of the queue: then one by one, O(batch).
    SGLang's last request is spared: what it lacks is held by requests that have ended; returns whether all have got
    theirs.
    """
    counts, own, stack, residues = work.counts, work.own, work.stack, work.residues
    one_by_one = memory.front and memory.caching and policy.ratio == 0.0
    step = int(counts[STEP])
    for place in range(counts[STACK] if one_by_one else 1):
        if one_by_one:
            if place >= counts[STACK] or not is_active(own, stack, place):
                continue
            r = unsigned(stack[unsigned(place)])
            if own[STATE, r] != DECODE or own[RESIDUE, r] != phase:
                continue
        need = 1 if one_by_one else int(residues[unsigned(phase)])
        while need > counts[FREE] and (policy.victim != FEWEST_TOKENS or counts[DECODING] + counts[PREFILLING] > 1):
            victim = find_victim(work, load, policy.victim)
            preempt(work, load, cache, memory, policy, victim, t)
            need = int(is_active(own, stack, place)) if one_by_one else int(residues[unsigned(phase)])
        if need > counts[FREE]:
            return False
        take_blocks(counts, cache, memory, need)
        if one_by_one and need > 0:
            own[HELD, r] = -1 - step
    return True


@inlined
def form(work, load, cache, memory, policy, own_rule, measured_from, t):
    """Decide what the step at `t` does: chunks of prompts, and how many requests decode."""
    counts, sums, own = work.counts, work.sums, work.own
    prompt = load.prompt_tokens
    residues, prefills, stack = work.residues, work.prefills, work.stack
    chunk_of, chunk_tokens = work.chunk_of, work.chunk_tokens
    block_size, shift = memory.block_size, memory.shift
    counts[CHUNKS] = 0
    counts[DECODES] = 0
    counts[DECODE_CONTEXT] = 0
    counts[BLOCKED] = 0
    preempted = counts[PREEMPTED]
    grows = policy.hold != RESERVED
    step = int(counts[STEP])
    phase = step & (block_size - 1) if shift >= 0 else step % block_size
    counts[TAKEN] = 0
    walked = False
    if policy.prefill_only:
        left = policy.budget
    else:
        decoding = int(counts[DECODING])
        if policy.threshold > 0 and counts[PREFILLING] > 0:
            # Where tokens or blocks fall short, who comes before whom matters.
            asked = decoding
            more = int(residues[unsigned(phase)])
            last = 0
            for i in range(counts[PREFILLING]):
                request = int(prefills[unsigned(i)])
                r = unsigned(request)
                last = min(int(prompt[r] + own[GENERATED, r] - own[COMPUTED, r]), policy.threshold)
                asked += last
                more += blocks_for(own[COMPUTED, r] + last, block_size, shift) - own[HELD, r]
            while not is_active(own, stack, counts[STACK] - 1):
                counts[STACK] -= 1
            is_last = stack[unsigned(counts[STACK] - 1)] == prefills[unsigned(counts[PREFILLING] - 1)]
            if more > counts[FREE] or (asked > policy.budget and not (is_last and asked - last <= policy.budget)):
                left = walk(work, load, cache, memory, policy, t)
                walked = True
        if grows and not walked:
            need = int(residues[unsigned(phase)])
            if need <= counts[FREE]:
                take_blocks(counts, cache, memory, need)
            else:
                grow(work, load, cache, memory, policy, phase, t)
            counts[TAKEN] = 1
        if not walked:
            left = policy.budget - counts[DECODING]
        # Requests that have one token left to compute decode, though they are not in the calendar.
        for i in range(0 if walked else counts[PREFILLING]):
            r = unsigned(prefills[unsigned(i)])
            left -= own[GENERATED, r] > 0 and prompt[r] + own[GENERATED, r] - own[COMPUTED, r] == 1

    # Prompts that go on
    sent = taken = 0
    i = 0
    while i < counts[PREFILLING] and not walked:
        request = int(prefills[unsigned(i)])
        r = unsigned(request)
        rest = int(prompt[r] + own[GENERATED, r] - own[COMPUTED, r])
        is_single = rest == 1 and own[GENERATED, r] > 0
        if is_single:
            tokens = 1
        elif policy.custom:
            tokens = asked_of_rule(
                own_rule, work, load, memory, policy, request, rest, int(own[COMPUTED, r]), 1, sent, t
            )
        else:
            tokens = min(rest, left)
            if policy.threshold > 0:
                tokens = min(tokens, policy.threshold)
        if tokens <= 0:
            i += 1
            continue
        hold = int(own[HELD, r])
        if policy.hold == AS_SCHEDULED:
            hold = blocks_for(own[COMPUTED, r] + tokens, block_size, shift)
            while (
                own[STATE, r] == PREFILL
                and hold - own[HELD, r] > counts[FREE]
                and (policy.victim != FEWEST_TOKENS or counts[DECODING] + counts[PREFILLING] > 1)
            ):
                victim = find_victim(work, load, policy.victim)
                left += unschedule(counts, chunk_of, chunk_tokens, victim)
                preempt(work, load, cache, memory, policy, victim, t)
            if policy.ratio > 0.0:
                if counts[PREEMPTED] > preempted:
                    renew_ratio(work, load, policy)
                if own[STATE, r] == PREFILL and hold - own[HELD, r] > counts[FREE]:
                    return
            # Others may have gone from before it.
            i = 0
            while i < counts[PREFILLING] and own[PLACE, unsigned(prefills[unsigned(i)])] < own[PLACE, r]:
                i += 1
            if own[STATE, r] != PREFILL:
                continue
        taken += hold - own[HELD, r]
        schedule(work, cache, memory, request, tokens, hold)
        if not is_single:
            sent += tokens
        if not is_single or policy.prefill_only:
            left -= tokens
        i += 1

    if (counts[PREEMPTED] == preempted or policy.admits_after_preemption) and not (
        policy.into_empty and counts[RUNNING] > 0
    ):
        admit(work, load, cache, memory, policy, own_rule, left, sent, counts[FREE] + taken, measured_from, t)
    if policy.into_empty and counts[RUNNING] > 0:
        counts[BLOCKED] = 1

    if walked:
        return
    if not policy.prefill_only:
        counts[DECODES] = counts[DECODING]
        counts[DECODE_CONTEXT] = counts[CONTEXT]
    elif counts[CHUNKS] == 0 and counts[DECODING] > 0:
        before_decodes = counts[PREEMPTED]
        fits = True
        need = int(residues[unsigned(phase)])
        if need <= counts[FREE]:
            take_blocks(counts, cache, memory, need)
        else:
            fits = grow(work, load, cache, memory, policy, phase, t)
        if policy.ratio > 0.0:
            if counts[PREEMPTED] > before_decodes:
                renew_ratio(work, load, policy)
            elif fits:
                sums[RATIO] = max(sums[RATIO] - policy.ratio_decay, policy.least_ratio)
        if fits:
            counts[DECODES] = counts[DECODING]
            counts[DECODE_CONTEXT] = counts[CONTEXT]


@bare
def renew_ratio(work, load, policy):
    """After a retraction, what SGLang expects of the requests that still run. O(batch)."""
    counts, sums, own, stack, caps = work.counts, work.sums, work.own, work.stack, load.max_tokens
    so_far = expected = running = 0
    for place in range(counts[STACK]):
        if is_active(own, stack, place):
            request = int(stack[unsigned(place)])
            so_far += generated(counts, own, request)
            expected += min(int(caps[unsigned(request)]), policy.room_tokens)
            running += 1
    sums[RATIO] = min(1.0, (so_far + policy.retract_steps * running) / max(expected, 1))


@bare
def walk(work, load, cache, memory, policy, t):
    """Go through the running requests one by one, O(batch); returns what is left of the budget.

    Only where a limit on the chunks lets several prompts run ahead of others, and tokens or blocks fall short.
    """
    counts, own, prompt = work.counts, work.own, load.prompt_tokens
    stack, chunk_of, chunk_tokens = work.stack, work.chunk_of, work.chunk_tokens
    block_size, shift = memory.block_size, memory.shift
    left = policy.budget
    step = int(counts[STEP])
    phase = step & (block_size - 1) if shift >= 0 else step % block_size
    context = decodes = 0
    # A preemption may take from behind the one that asks, or (under priority) from before it.
    for place in range(counts[STACK]):
        if place >= counts[STACK] or not is_active(own, stack, place):
            continue
        request = int(stack[unsigned(place)])
        r = unsigned(request)
        decoding = own[STATE, r] == DECODE
        hold = 0
        if decoding:
            tokens = min(1, left)
            more = int(own[RESIDUE, r] == phase) if tokens > 0 else 0
        else:
            tokens = min(int(prompt[r] + own[GENERATED, r] - own[COMPUTED, r]), left, policy.threshold)
            hold = blocks_for(own[COMPUTED, r] + tokens, block_size, shift)
            more = hold - own[HELD, r]
        if tokens == 0:
            continue
        while is_active(own, stack, place) and more > counts[FREE]:
            victim = find_victim(work, load, policy.victim)
            v = unsigned(victim)
            if own[STATE, v] == DECODE:
                if own[HELD, v] == -1 - step:  # it was given its token
                    left += 1
                    decodes -= 1
                    context -= prompt[v] + generated(counts, own, victim)
            else:
                left += unschedule(counts, chunk_of, chunk_tokens, victim)
            preempt(work, load, cache, memory, policy, victim, t)
        if not is_active(own, stack, place):
            continue
        left -= tokens
        if decoding:
            take_blocks(counts, cache, memory, more)
            own[HELD, r] = -1 - step
            decodes += 1
            context += prompt[r] + generated(counts, own, request)
        else:
            schedule(work, cache, memory, request, tokens, hold)
    for place in range(counts[STACK]):
        if is_active(own, stack, place):
            request = int(stack[unsigned(place)])
            if own[STATE, unsigned(request)] == DECODE and own[HELD, unsigned(request)] != -1 - step:
                starve(work, memory, request, t)
    counts[DECODES] = decodes
    counts[DECODE_CONTEXT] = context
    return left


@inlined
def issue(work, load, request, at):
    """Have a request arrive later."""
    load.arrived_at[unsigned(request)] = at
    work.times[SINCE, unsigned(request)] = at + load.before_queue
    push(work.coming, work.counts[COMING], request, work.times[SINCE], load.arrived_at)
    work.counts[COMING] += 1


@bare
def sort_by_admission(own, ended, begin, end):
    """Order requests as they were admitted: so they free their blocks, and their users send the next ones."""
    for i in range(begin + 1, end):
        request = int(ended[unsigned(i)])
        place = i
        while place > begin and own[PLACE, unsigned(ended[unsigned(place - 1)])] > own[PLACE, unsigned(request)]:
            ended[unsigned(place)] = ended[unsigned(place - 1)]
            place -= 1
        ended[unsigned(place)] = request


@inlined
def let_ended_go(work, load, cache, memory, policy):
    """Free what requests that have ended hold."""
    counts, own, ended = work.counts, work.own, work.ended
    prompt, output = load.prompt_tokens, load.output_tokens
    if policy.into_empty:
        sort_by_admission(own, ended, 0, counts[ENDED])
    for i in range(counts[ENDED]):
        request = int(ended[unsigned(i)])
        r = unsigned(request)
        computed = int(prompt[r]) + int(output[r]) - 1
        held = int(own[HELD, r]) if policy.hold == RESERVED else blocks_for(computed, memory.block_size, memory.shift)
        full = full_blocks(computed, memory.block_size, memory.shift)
        let_go(work.counts, cache, memory, request, held, full, False)
    counts[ENDED] = 0
    counts[BLOCKED] = 0


@inlined
def can_coast(counts, sums, policy, t):
    """Whether steps do nothing but decode, until something happens."""
    return (
        counts[PREFILLING] == 0
        and counts[DECODING] > 0
        and (counts[WAITING] == 0 or (counts[BLOCKED] == 1 and not policy.custom))
        and policy.ratio == 0.0
        and counts[ENDED] * policy.asynchronous == 0
        and counts[GROUPS] == 0
        and counts[STARVED] == 0
        and not (policy.prefill_only and sums[LAST_DECODE] != t)
    )


@bare
def coast(
    counts, sums, first, residues, gaps, memory, model, cache, record, own_duration, t, due, horizon, all_steps, watch,
):  # fmt: skip
    """Make steps that do nothing but decode, until something else can happen; returns how many. O(1) each.

    A function of its own, for its few variables stay in registers so.
    """
    blocks, block_size = memory.blocks, memory.block_size
    decoding = int(counts[DECODING])
    free = int(counts[FREE])
    step = int(counts[STEP])
    context = int(counts[CONTEXT])
    phase = step & (block_size - 1) if memory.shift >= 0 else step % block_size
    begin = t
    most = watch - all_steps
    steps = 0
    shortest, longest = np.inf, 0.0
    used = 0.0
    held = float(blocks - free)
    status = DONE
    while steps < most:
        need = int(residues[unsigned(phase)])
        if need > free or t >= horizon or t >= due:
            break
        if need > 0:
            if memory.caching:
                kv.take(counts, cache.nodes, cache.node_of, cache.owned, need)
            free -= need
            held = float(blocks - free)
        after = t + duration(model, 0, 0, 0.0, 0.0, 0, decoding, context, own_duration)
        gap = after - t
        if not gap > 0.0:
            status = BAD_DURATION
            break
        if record.times.shape[1] > 0:
            at = unsigned(all_steps + steps)
            if at >= unsigned(record.times.shape[1]):
                status = OUT_OF_STEPS
                break
            record.times[BEGIN, at] = t
            record.times[LASTS, at] = gap
            record.counts[STEP_QUEUE, at] = counts[WAITING]
            record.counts[STEP_PREFILLS, at] = 0
            record.counts[STEP_PREFILL_TOKENS, at] = 0
            record.counts[STEP_DECODES, at] = decoding
            record.counts[STEP_USED, at] = blocks - free
            record.counts[STEP_RUNNING, at] = counts[RUNNING]
        gaps[unsigned(gap_bin(gap))] += decoding
        shortest = min(shortest, gap)
        longest = max(longest, gap)
        used += held * gap
        context += decoding
        steps += 1
        step += 1
        phase = phase + 1 if phase + 1 < block_size else 0
        t = after
        if first[unsigned((step - 1) & (first.size - 1))] >= 0:
            break
    if t == np.inf:
        status = BAD_DURATION
    counts[STATUS] = status
    if steps > 0:
        spent = t - begin
        counts[FREE] = free
        counts[STEP] = step
        counts[CONTEXT] = context
        sums[GAP_SUM] += decoding * spent
        sums[GAP_MAX] = max(sums[GAP_MAX], longest)
        sums[LONGEST] = longest
        sums[BUSY] += counts[RUNNING] * spent
        sums[USED] += used
        sums[LAST_DECODE] = t
        sums[NOW] = t
        counts[GAP_LOW] = min(counts[GAP_LOW], gap_bin(shortest))
        counts[GAP_HIGH] = max(counts[GAP_HIGH], gap_bin(longest))
        counts[GAPS] += decoding * steps
        counts[SCHEDULED] += decoding * steps
        counts[TOKENS] += decoding * steps
        counts[STEPS] += steps
        counts[MAX_QUEUE] = max(counts[MAX_QUEUE], counts[WAITING])
        counts[PEAK] = max(counts[PEAK], blocks - free)
    return steps


@bare
def cruise(
    counts, sums, own, times, arrived_at, prompt, output, first, residues, gaps, stack, slots, budget, longest_request,
    blocks, block_size, shift, watermark, formula, before_queue, measured_from, alone, t, horizon, all_steps, watch,
):  # fmt: skip
    """Make steps while there is no more to them than decodes, ends and requests that start at once; returns how many.

    What `simulate` does in the plain case, an engine that isn't overloaded: no prefix cache, no record, step times from
    a formula, first come first served, prompts and decodes in one step, arrivals that are known. `alone` is false while
    requests wait; then it ends with the first request that ends or comes. O(1) a step and a request.
    """
    arrivals = int(counts[ARRIVALS])
    due = arrived_at[unsigned(arrivals)] + before_queue
    decoding, running = int(counts[DECODING]), int(counts[RUNNING])
    free = least_free = int(counts[FREE])
    step = int(counts[STEP])
    context = int(counts[CONTEXT])
    phase = step & (block_size - 1) if shift >= 0 else step % block_size
    most = watch - all_steps
    steps = samples = tokens = started = 0
    last = arrivals
    shortest, longest = np.inf, 0.0
    used = busy = gap_sum = backlog = last_decode = 0.0
    held = float(blocks - free)
    status = DONE
    while steps < most and t < horizon:
        ends = False
        if decoding > 0 and due > t:
            # Decodes alone. A small loop, for its few variables stay in registers so.
            begin, before = t, steps
            while steps < most and t < horizon and t < due:
                need = int(residues[unsigned(phase)])
                if need > 0:
                    if need > free:
                        break
                    free -= need
                    held = float(blocks - free)
                after = t + by_formula(formula, 0, 0, 0.0, 0.0, 0, decoding, context, None)
                gap = after - t
                if not gap > 0.0:
                    status = BAD_DURATION
                    break
                gaps[unsigned(gap_bin(gap))] += decoding
                shortest = min(shortest, gap)
                longest = max(longest, gap)
                used += held * gap
                context += decoding
                steps += 1
                step += 1
                phase = phase + 1 if phase + 1 < block_size else 0
                t = after
                if first[unsigned((step - 1) & (first.size - 1))] >= 0:
                    ends = True
                    break
            least_free = min(least_free, free)
            if steps == before:
                break
            gap_sum += decoding * (t - begin)
            busy += running * (t - begin)
            samples += decoding * (steps - before)
            last_decode = t
            last = arrivals
        elif due <= t:
            # All who have come, if all can start at once.
            need = int(residues[unsigned(phase)])
            last = arrivals
            prompt_tokens = 0
            attention = 0.0
            fits = alone
            while fits and due <= t:
                request = unsigned(last)
                size, length = int(prompt[request]), int(output[request])
                need += blocks_for(size, block_size, shift)
                prompt_tokens += size
                attention += size * (0.5 * size)
                kept_free = watermark if running + last - arrivals > 0 else 0
                last += 1
                due = arrived_at[unsigned(last)] + before_queue
                fits = (
                    running + last - arrivals <= slots
                    and prompt_tokens <= budget - decoding
                    and size + length <= longest_request
                    and blocks_for(size + length, block_size, shift) <= blocks
                    and need + kept_free <= free
                )
            if not fits:
                break
            after = t + by_formula(formula, last - arrivals, prompt_tokens, attention, 0.0, 0, decoding, context, None)
            gap = after - t
            if not gap > 0.0:
                status = BAD_DURATION
                break
            running += last - arrivals
            free -= need
            least_free = min(least_free, free)
            held = float(blocks - free)
            for new in range(arrivals, last):
                request = unsigned(new)
                came = arrived_at[request]
                own[COMPUTED, request] = prompt[request]
                own[HIT, request] = 0
                own[PREEMPTIONS, request] = 0
                own[LATE, request] = 0
                own[STARVING, request] = 0
                own[HELD, request] = blocks_for(prompt[request], block_size, shift)
                own[STATE, request] = PREFILL
                times[STARTED_AT, request] = t
                times[ENDED_AT, request] = np.nan
                times[SINCE, request] = came
                put_on_stack(counts, own, stack, new)
                backlog += t - max(came, measured_from)
                if came >= measured_from:
                    counts[PROMPT_TOKENS] += prompt[request]
            started += last - arrivals
            steps += 1
            tokens += prompt_tokens
            used += held * gap
            busy += running * gap
            t = after
            if decoding > 0:
                gaps[unsigned(gap_bin(gap))] += decoding
                shortest = min(shortest, gap)
                longest = max(longest, gap)
                gap_sum += decoding * gap
                samples += decoding
                last_decode = t
                context += decoding
                step += 1
                phase = phase + 1 if phase + 1 < block_size else 0
                ends = first[unsigned((step - 1) & (first.size - 1))] >= 0
        elif due < horizon:
            t = due
            continue
        else:
            break
        if ends:
            if not alone:
                break
            bucket = unsigned((step - 1) & (first.size - 1))
            ending = int(first[bucket])
            first[bucket] = -1
            while ending >= 0:
                r = unsigned(ending)
                size = int(output[r])
                decoding -= 1
                running -= 1
                context -= prompt[r] + size
                residues[unsigned(own[RESIDUE, r])] -= 1
                free += blocks_for(prompt[r] + size - 1, block_size, shift)
                own[STATE, r] = GONE
                own[GENERATED, r] = size
                times[ENDED_AT, r] = t
                ending = int(own[AFTER, r])
            held = float(blocks - free)
        for new in range(arrivals, last):
            request = unsigned(new)
            size, length = int(prompt[request]), int(output[request])
            times[FIRST_AT, request] = t
            times[LAST_AT, request] = t
            if length == 1:
                own[STATE, request] = GONE
                own[GENERATED, request] = 1
                times[ENDED_AT, request] = t
                running -= 1
                free += own[HELD, request]
                held = float(blocks - free)
            else:
                own[STATE, request] = DECODE
                own[END, request] = step + length - 2
                own[GENERATED, request] = step - 1
                decoding += 1
                context += size + 1
                distance = step - size
                residue = distance & (block_size - 1) if shift >= 0 else distance % block_size
                own[RESIDUE, request] = residue
                residues[unsigned(residue)] += 1
                file_end(own, first, new)
        arrivals = last
    if t == np.inf:
        status = BAD_DURATION
    counts[STATUS] = status
    counts[ENQUEUED] += started
    counts[ARRIVALS] = arrivals
    counts[DECODING] = decoding
    counts[RUNNING] = running
    counts[FREE] = free
    counts[STEP] = step
    counts[CONTEXT] = context
    sums[NOW] = t
    sums[BACKLOG] += backlog
    if steps > 0:
        sums[GAP_SUM] += gap_sum
        sums[GAP_MAX] = max(sums[GAP_MAX], longest)
        sums[BUSY] += busy
        sums[USED] += used
        if samples > 0:
            sums[LAST_DECODE] = last_decode
            counts[GAP_LOW] = min(counts[GAP_LOW], gap_bin(shortest))
            counts[GAP_HIGH] = max(counts[GAP_HIGH], gap_bin(longest))
        counts[GAPS] += samples
        counts[SCHEDULED] += samples + started
        counts[TOKENS] += samples + tokens
        counts[STEPS] += steps
        counts[MAX_QUEUE] = max(counts[MAX_QUEUE], counts[WAITING])
        counts[PEAK] = max(counts[PEAK], blocks - least_free)
    return steps


@bare_entry
def simulate(policy, memory, model, load, work, cache, record, time_limit, warmup, stop, own_rule, own_duration):
    """Run one scenario. Results stay in `work`; returns the status.

    Parameters
    ----------
    policy : Policy
    memory : Memory
    model : StepModel
    load : TokenLoad
    work : TokenWork
    cache : Cache
    record : StepRecord
        Of no step if they aren't kept.
    time_limit, warmup : float
        Seconds.
    stop : array
        Set from outside to interrupt.
    own_rule, own_duration : function
        The user's own: how many tokens to compute of a request, and how long a step lasts.
    """
    arrived_at, prompt, output, caps = load.arrived_at, load.prompt_tokens, load.output_tokens, load.max_tokens
    classes, follower, think, urgency, ttft_limits = (
        load.classes, load.follower, load.think, load.urgency, load.ttft_limits,
    )  # fmt: skip
    counts, sums, gaps, own, times = work.counts, work.sums, work.gaps, work.own, work.times
    first, residues, unclip = work.first, work.residues, work.unclip
    prefills, chunk_of, chunk_tokens, stack = work.prefills, work.chunk_of, work.chunk_tokens, work.stack
    waiting, heap, coming, ended = work.waiting, work.heap, work.coming, work.ended
    joined, joined_at, starving = work.joined, work.joined_at, work.starving
    recorded_times, recorded_counts = record.times, record.counts
    blocks, block_size, shift, caching = memory.blocks, memory.block_size, memory.shift, memory.caching
    grows = policy.hold != RESERVED
    room_for = recorded_times.shape[1]
    is_formula = model.code in (LINEAR, POLYNOMIAL)
    is_plain = (
        is_formula
        and grows
        and not (caching or room_for > 0 or load.closed or follower.size > 0)
        and not (policy.asynchronous or policy.prefill_only or policy.custom or policy.threshold > 0)
        and policy.order == FIRST_COME
        and not load.watches_gaps
    )
    formula = Formula(
        model.code, model.a, model.b, model.c, model.d, model.e, model.f, model.g, model.per_step, model.kv_tokens
    )

    gaps[counts[GAP_LOW] : counts[GAP_HIGH] + 1] = 0
    counts[:] = 0
    counts[GAP_LOW] = GAP_BINS
    sums[:] = 0.0
    sums[RATIO] = policy.ratio
    first[:] = -1
    residues[:block_size] = 0
    unclip[:] = 0
    work.late[:] = 0
    counts[FREE] = blocks
    own[STATE, : prompt.size] = UNSEEN
    if caching:
        kv.reset(counts, cache.nodes, cache.node_of, blocks)
        cache.owned[kv.RUN_NODE] = -1
        cache.owned[kv.NAMED] = 0

    t = 0.0
    static = min(load.static, prompt.size)
    static_due = arrived_at[0] + load.before_queue if static > 0 else np.inf
    dynamic_due = np.inf
    counts[ISSUED] = static
    measured_from = warmup
    measuring = warmup <= 0.0
    all_steps = 0
    watch = WATCH
    status = DONE

    while t < time_limit:
        if all_steps >= watch:
            watch = all_steps + WATCH
            if stop[0]:
                status = INTERRUPTED
                break
        if not measuring and t >= warmup:
            measuring = True
            sums[GAP_SUM] = sums[GAP_MAX] = sums[BUSY] = sums[USED] = 0.0
            counts[GAPS] = counts[MAX_QUEUE] = counts[STEPS] = counts[SCHEDULED] = counts[TOKENS] = counts[PEAK] = 0
            gaps[counts[GAP_LOW] : counts[GAP_HIGH] + 1] = 0
            counts[GAP_LOW], counts[GAP_HIGH] = GAP_BINS, 0

        begin = t
        due = min(static_due, dynamic_due)
        steps = chunks = decodes = was_starved = 0
        coasted = False
        for attempt in range(2):
            if attempt == 0:
                # Asynchronously the batch was formed when the last step began: without who has arrived since, and
                # without what the requests that ended held.
                if not policy.asynchronous or (can_coast(counts, sums, policy, t) and due > t):
                    continue
            else:
                if counts[ENDED] > 0 and not (policy.into_empty and counts[DECODING] + counts[PREFILLING] > 0):
                    let_ended_go(work, load, cache, memory, policy)
                while due <= t:
                    if static_due <= dynamic_due:
                        request = int(counts[ARRIVALS])
                        counts[ARRIVALS] += 1
                        static_due = (
                            arrived_at[unsigned(request + 1)] + load.before_queue if request + 1 < static else np.inf
                        )
                    else:
                        request = pop(coming, counts[COMING], times[SINCE], arrived_at)
                        counts[COMING] -= 1
                        dynamic_due = times[SINCE, unsigned(coming[0])] if counts[COMING] > 0 else np.inf
                    r = unsigned(request)
                    counts[ENQUEUED] += 1
                    own[COMPUTED, r] = 0
                    own[GENERATED, r] = 0
                    own[HIT, r] = 0
                    own[PREEMPTIONS, r] = 0
                    own[LATE, r] = 0
                    times[STARTED_AT, r] = np.nan
                    times[FIRST_AT, r] = np.nan
                    times[ENDED_AT, r] = np.nan
                    times[SINCE, r] = arrived_at[r]
                    prompt_tokens, output_tokens, cap = int(prompt[r]), int(output[r]), int(caps[r])
                    if (
                        prompt_tokens + output_tokens > policy.longest
                        or blocks_for(reservation(policy, prompt_tokens, output_tokens, cap), block_size, shift)
                        > blocks
                        or (not policy.chunked and prompt_tokens > policy.budget)
                    ):
                        own[STATE, r] = DROPPED_AT_ONCE
                        counts[DROPPED] += 1
                        if load.closed:
                            if counts[ISSUED] == prompt.size:
                                status = OUT_OF_REQUESTS
                                break
                            issue(work, load, counts[ISSUED], t + max(load.think_time, 1.0))
                            counts[ISSUED] += 1
                            dynamic_due = times[SINCE, unsigned(coming[0])]
                    else:
                        own[STATE, r] = QUEUED
                        counts[WAITING] += 1
                        if policy.order == FIRST_COME:
                            waiting[unsigned(counts[QUEUE_TAIL] & (waiting.size - 1))] = request
                            counts[QUEUE_TAIL] += 1
                        else:
                            class_ = int(classes[r]) if classes.size > 0 else 0
                            if policy.order == SHORTEST_PROMPT:
                                rank = float(prompt_tokens)
                            elif policy.order == SHORTEST_OUTPUT:
                                rank = float(output_tokens)
                            elif policy.order == PRIORITY:
                                rank = urgency[class_]
                            else:
                                rank = arrived_at[r] + ttft_limits[class_]
                            times[RANK, r] = rank
                            push(heap, counts[HEAP], request, times[RANK], arrived_at)
                            counts[HEAP] += 1
                            counts[BLOCKED] = 0
                    due = min(static_due, dynamic_due)
                if status != DONE or chunks + decodes > 0:
                    break
                horizon = time_limit if measuring else min(time_limit, warmup)
                if (
                    is_plain
                    and counts[PREFILLING] == 0
                    and (counts[WAITING] == 0 or can_coast(counts, sums, policy, t))
                ):
                    steps = cruise(
                        counts, sums, own, times, arrived_at, prompt, output, first, residues, gaps, stack,
                        policy.slots, policy.budget, policy.longest, blocks, block_size, shift, memory.watermark,
                        formula, load.before_queue, measured_from, counts[WAITING] == 0, t, horizon, all_steps, watch,
                    )  # fmt: skip
                    request = int(counts[ARRIVALS])
                    static_due = arrived_at[unsigned(request)] + load.before_queue if request < static else np.inf
                    coasted = sums[NOW] > t
                    t = sums[NOW]
                    status = counts[STATUS]
                elif can_coast(counts, sums, policy, t):
                    steps = coast(
                        counts, sums, first, residues, gaps, memory, model, cache, record, own_duration, t, due,
                        horizon, all_steps, watch,
                    )  # fmt: skip
                    coasted = steps > 0
                    if coasted:
                        t = sums[NOW]
                        if load.watches_gaps:
                            note_gaps(work, load, sums[LONGEST])
                    status = counts[STATUS]
                all_steps += steps
                if coasted or status != DONE:
                    break
            was_starved = int(counts[STARVED])
            for i in range(was_starved):
                starving[unsigned(policy.slots + i)] = starving[unsigned(i)]
            counts[STARVED] = 0
            form(work, load, cache, memory, policy, own_rule, measured_from, t)
            chunks = int(counts[CHUNKS])
            decodes = int(counts[DECODES])
        if status != DONE:
            break
        if chunks + decodes == 0 and not coasted:
            if due >= time_limit or due == np.inf:
                break
            t = due
            continue
        if coasted:
            counts[CHUNKS] = 0
            counts[DECODES] = counts[DECODING]
        else:
            prefill_tokens = prefill_requests = prefill_context = 0
            attention = squares = 0.0
            decode_requests, decode_context = decodes, int(counts[DECODE_CONTEXT])
            for i in range(chunks):
                r = unsigned(chunk_of[unsigned(i)])
                tokens = int(chunk_tokens[unsigned(i)])
                computed = int(own[COMPUTED, r])
                if own[GENERATED, r] > 0 and prompt[r] + own[GENERATED, r] - computed == 1:
                    decode_requests += 1
                    decode_context += computed + 1
                else:
                    prefill_requests += 1
                    prefill_tokens += tokens
                    attention += tokens * (computed + 0.5 * tokens)
                    squares += float(tokens) * tokens
                    prefill_context += computed
                    if model.context_step > 1:
                        prefill_context += -computed % model.context_step
            t = begin + duration(
                model, prefill_requests, prefill_tokens, attention, squares, prefill_context,
                decode_requests, decode_context, own_duration,
            )  # fmt: skip
            gap = t - begin
            if not (gap > 0.0 and gap < np.inf):
                status = BAD_DURATION
                break
            if room_for > 0:
                if all_steps >= room_for:
                    status = OUT_OF_STEPS
                    break
                at = unsigned(all_steps)
                recorded_times[BEGIN, at] = begin
                recorded_times[LASTS, at] = gap
                recorded_counts[STEP_QUEUE, at] = counts[WAITING]
                recorded_counts[STEP_PREFILLS, at] = prefill_requests
                recorded_counts[STEP_PREFILL_TOKENS, at] = prefill_tokens
                recorded_counts[STEP_DECODES, at] = decode_requests
                recorded_counts[STEP_USED, at] = blocks - counts[FREE]
                recorded_counts[STEP_RUNNING, at] = counts[RUNNING]
            all_steps += 1
            counts[STEPS] += 1
            counts[SCHEDULED] += prefill_requests + decode_requests
            counts[TOKENS] += prefill_tokens + decode_requests
            counts[MAX_QUEUE] = max(counts[MAX_QUEUE], counts[WAITING])
            counts[PEAK] = max(counts[PEAK], blocks - counts[FREE])
            sums[BUSY] += counts[RUNNING] * gap
            sums[USED] += (blocks - counts[FREE]) * gap
            if decodes > 0:
                # The gaps between the last token and this one
                regular = decodes
                for i in range(was_starved):
                    r = unsigned(starving[unsigned(policy.slots + i)])
                    if own[STARVING, r] == 1:
                        add_gaps(counts, sums, gaps, t - times[LAST_AT, r], 1)
                        if load.watches_gaps and t - times[LAST_AT, r] > load.itl_limits[class_of(load, r)]:
                            own[LATE, r] = TOO_LATE
                        own[STARVING, r] = 0
                        regular -= 1
                for i in range(counts[STARVED]):
                    own[STARVING, unsigned(starving[unsigned(i)])] = 1
                for i in range(counts[GROUPS]):
                    if joined[i] > 0:
                        add_gaps(counts, sums, gaps, t - joined_at[i], joined[i])
                    regular -= joined[i]
                if regular > 0:
                    regular_gap = t - sums[LAST_DECODE] if policy.prefill_only else gap
                    add_gaps(counts, sums, gaps, regular_gap, regular)
                    if load.watches_gaps:
                        note_gaps(work, load, regular_gap)
                for i in range(counts[NEWCOMERS]):
                    r = unsigned(work.newcomers[unsigned(i)])
                    if own[STATE, r] == DECODE:
                        join_punctual(work, load, r, t - times[LAST_AT, r])
                counts[NEWCOMERS] = 0
                counts[GROUPS] = 0
                counts[STEP] += 1
                counts[CONTEXT] += decodes
                sums[LAST_DECODE] = t
                if policy.ratio > 0.0:
                    opened = int(unclip[unsigned(counts[STEP] & (unclip.size - 1))])
                    unclip[unsigned(counts[STEP] & (unclip.size - 1))] = 0
                    counts[OPEN_SUM] += opened * policy.room_tokens - counts[OPEN]
                    counts[OPEN] += opened
                    counts[CLIPPED] -= opened

        # Decodes that end
        pending = int(counts[ENDED])
        if counts[DECODES] > 0:
            bucket = unsigned((counts[STEP] - 1) & (first.size - 1))
            request = int(first[bucket])
            if request >= 0:
                first[bucket] = -1
                number = pending
                while request >= 0:
                    ended[unsigned(number)] = request
                    number += 1
                    r = unsigned(request)
                    counts[DECODING] -= 1
                    counts[CONTEXT] -= prompt[r] + output[r]
                    if grows:
                        residues[unsigned(own[RESIDUE, r])] -= 1
                    if policy.ratio > 0.0:
                        open_room(counts, unclip, int(counts[STEP]), caps[r] - output[r], 0, policy.room_tokens, -1)
                    request = int(own[AFTER, r])
                counts[ENDED] = number
                # The calendar has the last admitted first.
                low, high = pending, number - 1
                while low < high:
                    ended[unsigned(low)], ended[unsigned(high)] = ended[unsigned(high)], ended[unsigned(low)]
                    low += 1
                    high -= 1

        # Prompts that are complete
        done = joining = 0
        for i in range(counts[CHUNKS]):
            request = int(chunk_of[unsigned(i)])
            r = unsigned(request)
            own[COMPUTED, r] += chunk_tokens[unsigned(i)]
            if own[COMPUTED, r] < prompt[r] + own[GENERATED, r]:
                continue
            done += 1
            if own[GENERATED, r] == 0:
                times[FIRST_AT, r] = t
                times[LAST_AT, r] = t
            else:
                add_gaps(counts, sums, gaps, t - times[LAST_AT, r], 1)
            if load.watches_gaps:
                join_punctual(work, load, r, t - times[LAST_AT, r])
                if policy.prefill_only:
                    work.newcomers[unsigned(counts[NEWCOMERS])] = request
                    counts[NEWCOMERS] += 1
            own[GENERATED, r] += 1
            if own[GENERATED, r] == output[r]:
                own[STATE, r] = GONE
                ended[unsigned(counts[ENDED])] = request
                counts[ENDED] += 1
            else:
                times[LAST_AT, r] = t
                joining += 1
                if policy.ratio > 0.0:
                    so_far = int(own[GENERATED, r])
                    open_room(
                        counts, unclip, int(counts[STEP]), caps[r] - so_far, output[r] - so_far, policy.room_tokens, 1
                    )
                begin_decode(work, memory, policy, request, int(prompt[r]), int(output[r]))
        if done > 0:
            kept = 0
            for i in range(counts[PREFILLING]):
                request = int(prefills[unsigned(i)])
                if own[STATE, unsigned(request)] == PREFILL:
                    prefills[unsigned(kept)] = request
                    kept += 1
            counts[PREFILLING] = kept
            if policy.prefill_only and joining > 0:
                joined[counts[GROUPS]] = joining
                joined_at[counts[GROUPS]] = t
                counts[GROUPS] += 1

        # Requests that end
        number = int(counts[ENDED])
        if number > pending:
            if number - pending > 1:
                sort_by_admission(own, ended, pending, number)
            for i in range(pending, number):
                r = unsigned(ended[unsigned(i)])
                own[STATE, r] = GONE
                own[GENERATED, r] = output[r]
                times[ENDED_AT, r] = t
                if load.watches_gaps:
                    settle(work, load, r)
                seen = t + output[r] * load.per_token + load.at_completion
                if load.closed:
                    if counts[ISSUED] == prompt.size:
                        status = OUT_OF_REQUESTS
                        break
                    issue(work, load, counts[ISSUED], seen + load.think_time)
                    counts[ISSUED] += 1
                    dynamic_due = times[SINCE, unsigned(coming[0])]
                elif follower.size > 0 and follower[r] >= 0:
                    next_ = int(follower[r])
                    issue(work, load, next_, seen + think[unsigned(next_)])
                    dynamic_due = times[SINCE, unsigned(coming[0])]
            if status != DONE:
                break
    if t < time_limit < np.inf and status == DONE:
        t = time_limit
    sums[END_TIME] = t
    counts[ALL_STEPS] = all_steps
    return status
