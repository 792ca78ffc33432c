"""What the next step of the token model does: who is given tokens, who is admitted, who is preempted.

O(1) and O(1) a scheduled chunk. All that a batcher decides are the values of a `Policy`.
"""

from vecsim.kernel import kv
from vecsim.kernel.address import call_rule
from vecsim.kernel.heap import enter, leave
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.state import (
    AS_SCHEDULED,
    FEWEST_TOKENS,
    LAST,
    LEAST_URGENT,
    RESERVED,
    WHOLE_PROMPT,
    TokenBatch,
)
from vecsim.kernel.token_state import (
    AFTER,
    BACKLOG,
    BEFORE,
    BLOCKED,
    BROUGHT,
    CHUNKS,
    CLIPPED,
    COMPUTED,
    CONTEXT,
    DECODE,
    DECODE_CONTEXT,
    DECODES,
    DECODING,
    END,
    FIRST_COME,
    GENERATED,
    GROUPS,
    HEAP,
    HELD,
    HIT,
    HIT_TOKENS,
    KV,
    LACKS,
    LAST_AT,
    LAST_DECODE,
    NEWCOMERS,
    OPEN_SUM,
    PINNED,
    PINNED_BROUGHT,
    PLACE,
    PREEMPTED,
    PREEMPTIONS,
    PREFILL,
    PREFILLING,
    PROMISED,
    PROMPT_TOKENS,
    QUEUE_HEAD,
    QUEUED,
    RANK,
    RATIO,
    RESIDUE,
    RUNNING,
    SINCE,
    STACK,
    STARTED_AT,
    STARVED,
    STARVING,
    STATE,
    STEP,
    TAKEN,
    WAITING,
    blocks_for,
    blocks_with_ids,
    cancel_end,
    class_of,
    file_end,
    full_blocks,
    generated,
    is_active,
    is_decode,
    let_go,
    open_room,
    put_first,
    put_last,
    put_on_stack,
    settle,
    take_first,
)


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


@bare
def without(requests, number, request):
    """Take a request out of the first `number` of a list, if it's there; returns how many are left."""
    kept = 0
    for i in range(number):
        requests[unsigned(kept)] = requests[unsigned(i)]
        kept += requests[unsigned(i)] != request
    return kept


@bare
def drop_empty_groups(counts, joined, joined_at):
    """Forget groups whose requests were all preempted: each other one has a request that runs, so there is room."""
    kept = 0
    for i in range(counts[GROUPS]):
        if joined[i] > 0:
            joined[kept], joined_at[kept] = joined[i], joined_at[i]
            kept += 1
    counts[GROUPS] = kept


@inlined
def reservation(policy, prompt, output, cap):
    """Tokens that there must be blocks for, at some time in a request's life."""
    if policy.hold == RESERVED:
        return policy.reserve_tokens if policy.reserve_tokens > 0 else prompt + cap
    if policy.ratio > 0.0:
        return max(prompt + min(cap, policy.room_tokens) + policy.page, prompt + output)
    return prompt + output


@inlined
def for_all_tokens(policy, memory, load, request, generated):
    """Blocks that a request holds when all of its tokens are computed, or that are reserved at its admission."""
    r = unsigned(request)
    tokens = whole(load.prompt_tokens[r])
    if policy.hold == RESERVED:
        tokens = reservation(policy, tokens, whole(load.output_tokens[r]), whole(load.max_tokens[r]))
    else:
        tokens += generated
    return blocks_for(tokens, memory.block_size, memory.shift)


@inlined
def promise(counts, own, request, blocks):
    """Note how many blocks a request lacks while it waits."""
    r = unsigned(request)
    counts[PROMISED] += blocks - own[LACKS, r]
    own[LACKS, r] = blocks


@bare
def preempt(work, load, cache, memory, policy, request, t):
    """Free all that a running request holds; it waits again, and will compute its tokens anew."""
    counts, sums, own, times = work.counts, work.sums, work.own, work.times
    arrived_at, prompt, output, caps = load.arrived_at, load.prompt_tokens, load.output_tokens, load.max_tokens
    first, residues, prefills = work.first, work.residues, work.prefills
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
            counts[NEWCOMERS] = without(work.newcomers, counts[NEWCOMERS], request)
        computed = prompt[r] + so_far - 1
        held = blocks_for(computed, memory.block_size, memory.shift) + taken
    else:
        computed = int(own[COMPUTED, r])
        held = int(own[HELD, r])
        counts[PREFILLING] = without(prefills, counts[PREFILLING], request)
    let_go(work.counts, cache, memory, request, held, full_blocks(computed, memory.block_size, memory.shift), True)
    own[STATE, r] = QUEUED
    own[COMPUTED, r] = 0
    own[KV, r] = min(own[KV, r], 0)
    own[PREEMPTIONS, r] += 1
    promise(counts, own, request, for_all_tokens(policy, memory, load, request, whole(own[GENERATED, r])))
    times[SINCE, r] = t
    counts[PREEMPTED] += 1
    counts[WAITING] += 1
    counts[BLOCKED] = 0
    if policy.order != FIRST_COME:
        counts[HEAP] = enter(counts[HEAP], request, own[AFTER], own[BEFORE], times[RANK], arrived_at)
    elif policy.to_back:
        put_last(counts, own, QUEUE_HEAD, request)
    else:
        put_first(counts, own, QUEUE_HEAD, request)


@bare
def give_back(memory, work, cache, request, full):
    """Free the blocks that a request holds of a worker where it has no slot; `full` of them have what they can hold."""
    counts, own = work.counts, work.own
    r = unsigned(request)
    if memory.caching:
        shared, own_start = blocks_with_ids(cache, memory, request)
        kv.release(
            counts, cache.nodes, cache.node_of, cache.seen, cache.owned, cache.own, cache.ids, shared, own_start,
            request, whole(own[HELD, r]), full, memory.returns, memory.front,
        )  # fmt: skip
    else:
        counts[FREE] += own[HELD, r]
    own[HELD, r] = 0


@inlined
def holds_blocks(own, request):
    """Whether a request that waits holds blocks there."""
    return own[KV, unsigned(request)] > 0 or own[KV, unsigned(request)] <= BROUGHT


@inlined
def not_brought(own, request):
    """`KV` of a request that no longer waits with the blocks that it holds."""
    return PINNED if own[KV, unsigned(request)] == PINNED_BROUGHT else 0


@bare
def last_holder(work, arrived_at, policy):
    """The last in the queue of those that hold blocks there; -1 if none does. O(queue), in ranks x log of it."""
    counts, own, ranks = work.counts, work.own, work.times[RANK]
    last = whole(-1)
    if policy.order == FIRST_COME:
        request = whole(counts[QUEUE_HEAD])
        while request >= 0:
            if holds_blocks(own, request):
                last = request
            request = whole(own[AFTER, unsigned(request)])
        return last
    # Those that were taken from the heap are tied to one another, the last first, until all go back.
    root, taken = whole(counts[HEAP]), whole(-1)
    while root >= 0:
        request = root
        root = whole(leave(root, own[AFTER], own[BEFORE], ranks, arrived_at))
        if holds_blocks(own, request):
            last = request
        own[AFTER, unsigned(request)] = taken
        taken = request
    while taken >= 0:
        request = taken
        taken = whole(own[AFTER, unsigned(request)])
        root = whole(enter(root, request, own[AFTER], own[BEFORE], ranks, arrived_at))
    counts[HEAP] = root
    return last


@bare
def yield_blocks(work, load, cache, memory, policy):
    """Have the last in the queue of those that hold blocks there give them back; returns whether there was one.

    What was brought for it is lost: it will compute all anew.
    """
    counts, own = work.counts, work.own
    last = last_holder(work, load.arrived_at, policy)
    if last < 0:
        return False
    r = unsigned(last)
    full = full_blocks(whole(own[HIT, r]), memory.block_size, memory.shift)
    if own[KV, r] <= BROUGHT:
        full = whole(own[HELD, r])
    give_back(memory, work, cache, last, full)
    own[KV, r] = not_brought(own, last)
    own[PREEMPTIONS, r] += 1
    promise(counts, own, last, for_all_tokens(policy, memory, load, last, whole(own[GENERATED, r])))
    counts[PREEMPTED] += 1
    counts[BLOCKED] = 0
    return True


@inlined
def is_spared(work, load, cache, memory, policy):
    """Whether the last running request need not be preempted, since one that waits gave its blocks back instead."""
    counts = work.counts
    return (
        not load.alone
        and counts[DECODING] + counts[PREFILLING] == 1
        and yield_blocks(work, load, cache, memory, policy)
    )


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
            kv.take(counts, cache.nodes, cache.node_of, cache.seen, cache.owned, number)
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
            kv.name(
                counts, cache.nodes, cache.node_of, cache.seen, cache.own, cache.ids, own_start, request, named, full
            )  # fmt: skip
            cache.owned[kv.NAMED, r] = full
    chunk_of[unsigned(counts[CHUNKS])] = request
    chunk_tokens[unsigned(counts[CHUNKS])] = tokens
    counts[CHUNKS] += 1


@inlined
def room(counts, sums, policy):
    """Tokens that decoding requests are expected to generate still (SGLang)."""
    return (counts[OPEN_SUM] + policy.room_tokens * counts[CLIPPED]) * sums[RATIO]


@inlined
def asked_of_rule(own_rule, work, load, memory, policy, request, rest, cached, started, sent, t):
    """Tokens that a rule of the user's own has a request compute in this step; 0 to `rest`."""
    counts = work.counts
    prompt, caps = load.prompt_tokens, load.max_tokens
    r = unsigned(request)
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
        head_class=whole(class_of(load, r)),
        parameter=policy.parameter,
    )
    return min(max(whole(call_rule(own_rule, (batch,))), 0), rest)


@inlined
def admit(work, load, cache, memory, policy, own_rule, left, sent, free_before, measured_from, t):
    """Admit waiting requests, in order, while slots, tokens and blocks last.

    `left` is the step's budget that is left, `sent` the prompt tokens that are scheduled already.
    """
    counts, sums, own, times = work.counts, work.sums, work.own, work.times
    arrived_at, prompt, caps = load.arrived_at, load.prompt_tokens, load.max_tokens
    prefills, chunk_of, chunk_tokens = work.prefills, work.chunk_of, work.chunk_tokens
    stack = work.stack
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
        request = whole(counts[QUEUE_HEAD] if policy.order == FIRST_COME else counts[HEAP])
        r = unsigned(request)
        so_far = int(own[GENERATED, r])
        known = int(prompt[r]) + so_far
        found = idle = 0
        shared, own_start = blocks_with_ids(cache, memory, request)
        loaded = max(int(own[KV, r]), 0)
        brought = own[KV, r] <= BROUGHT
        holds = loaded > 0 or brought
        if holds:
            found = int(own[HELD, r])
        elif memory.caching:
            found, idle = kv.look_up(
                cache.nodes, cache.node_of, cache.owned, cache.ids, shared, request,
                full_blocks(known - 1, block_size, shift),
            )  # fmt: skip
        cached = loaded - 1 if loaded > 0 else found * block_size
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
            take_first(counts, own, QUEUE_HEAD)
        else:
            counts[HEAP] = leave(counts[HEAP], own[AFTER], own[BEFORE], times[RANK], arrived_at)
        promise(counts, own, request, whole(0))
        counts[WAITING] -= 1
        counts[RUNNING] += 1
        sums[BACKLOG] += max(t - max(times[SINCE, r], measured_from), 0.0)
        if not times[STARTED_AT, r] >= 0.0:
            times[STARTED_AT, r] = t
        if own[PREEMPTIONS, r] == 0 and not holds:
            own[HIT, r] = cached
            if arrived_at[r] >= measured_from:
                counts[PROMPT_TOKENS] += prompt[r]
                counts[HIT_TOKENS] += cached
        own[HELD, r] = found
        own[COMPUTED, r] = cached
        own[STATE, r] = PREFILL
        own[STARVING, r] = 0
        if brought:
            own[KV, r] = not_brought(own, request)
        put_on_stack(counts, own, stack, request)
        if memory.caching and not holds:
            kv.claim(
                counts, cache.nodes, cache.node_of, cache.owned, cache.own, cache.ids, shared, own_start, request, found
            )
        prefills[unsigned(counts[PREFILLING])] = request
        counts[PREFILLING] += 1
        schedule(work, cache, memory, request, tokens, hold)
        left -= cost if not policy.custom else 0
        sent += 0 if is_decode(own, r, rest) else tokens
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
            if is_spared(work, load, cache, memory, policy):
                continue
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
                request = whole(prefills[unsigned(i)])
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
            left -= is_decode(own, r, prompt[r] + own[GENERATED, r] - own[COMPUTED, r])

    # Prompts that go on
    sent = taken = 0
    i = 0
    while i < counts[PREFILLING] and not walked:
        request = whole(prefills[unsigned(i)])
        r = unsigned(request)
        rest = int(prompt[r] + own[GENERATED, r] - own[COMPUTED, r])
        is_single = is_decode(own, r, rest)
        if is_single:
            tokens = 1
        elif policy.custom:
            tokens = asked_of_rule(
                own_rule, work, load, memory, policy, request, rest, int(own[COMPUTED, r]), 1, whole(sent), t
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
                if is_spared(work, load, cache, memory, policy):
                    continue
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
            request = whole(stack[unsigned(place)])
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
        request = whole(stack[unsigned(place)])
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
            if is_spared(work, load, cache, memory, policy):
                continue
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
            request = whole(stack[unsigned(place)])
            if own[STATE, unsigned(request)] == DECODE and own[HELD, unsigned(request)] != -1 - step:
                starve(work, memory, request, t)
    counts[DECODES] = decodes
    counts[DECODE_CONTEXT] = context
    return left
