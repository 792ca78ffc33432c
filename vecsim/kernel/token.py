"""The step loop of the token model: O(1) a step whatever the batch size, O(1) a scheduled chunk of a prompt.

Decoding requests all advance by one token in a step that decodes. So they are counts: how many, their context, how
many need a new block at which residue of the step number, and a calendar of who ends at which decode step. Only
requests whose prompt is being computed are touched in a step. While nothing else can happen the loop coasts from step
to step, until an arrival, an end or a lack of blocks. All that a batcher decides are the values of a `Policy`.
"""

import numpy as np

from vecsim.kernel import kv, seen
from vecsim.kernel.duration import duration, is_formula, step_of
from vecsim.kernel.heap import enter, pop, push
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.placed import fetched
from vecsim.kernel.state import (
    ALONE,
    BAD_DURATION,
    BEGINS,
    COASTING,
    DONE,
    IDLE,
    INTERRUPTED,
    OUT_OF_REQUESTS,
    OUT_OF_STEPS,
    RESERVED,
    STOPS,
    TOO_LONG,
)
from vecsim.kernel.token_batch import drop_empty_groups, form, reservation
from vecsim.kernel.token_coast import can_coast, coast, cruise, foresee
from vecsim.kernel.token_state import (
    AFTER,
    ALL_STEPS,
    ARRIVALS,
    BEFORE,
    BEGIN,
    BEGINNING,
    BEGUN_BLOCKS,
    BLOCKED,
    BLOCKS,
    BUSY,
    CHUNKS,
    CLIPPED,
    COMING,
    COMPUTED,
    CONTEXT,
    DECODE_CONTEXT,
    DECODES,
    DECODING,
    DROPPED,
    DROPPED_AT_ONCE,
    END_TIME,
    ENDED,
    ENDED_AT,
    ENQUEUED,
    FIRST_AT,
    FIRST_COME,
    FORESEEN,
    GAP_BINS,
    GAP_HIGH,
    GAP_LOW,
    GAP_MAX,
    GAP_SUM,
    GAPS,
    GENERATED,
    GONE,
    GROUPS,
    HEAP,
    HELD,
    HORIZON,
    INBOX,
    INBOX_HEAD,
    ISSUED,
    KV,
    LAST_AT,
    LAST_DECODE,
    LASTS,
    LATE,
    LEFT,
    LEFT_BLOCKS,
    LONGEST,
    MAX_QUEUE,
    NEW_BLOCKS,
    NEWCOMERS,
    NOW,
    OPEN,
    OPEN_SUM,
    PEAK,
    PINNED,
    PINNED_ALONE,
    PLACE,
    PREFILL,
    PREFILLING,
    PRIORITY,
    QUEUE_HEAD,
    QUEUED,
    RANK,
    RATIO,
    REPORTED,
    RESIDUE,
    RUNNING,
    SCHEDULED,
    SHORTEST_OUTPUT,
    SHORTEST_PROMPT,
    SINCE,
    STARVED,
    STARVING,
    STATE,
    STATUS,
    STEP,
    STEP_DECODES,
    STEP_PREFILL_TOKENS,
    STEP_PREFILLS,
    STEP_QUEUE,
    STEP_RUNNING,
    STEP_USED,
    STEP_WORKER,
    STEPS,
    TOKENS,
    TOO_LATE,
    USED,
    WAITING,
    add_gaps,
    add_steps,
    begin_decode,
    blocks_for,
    class_of,
    full_blocks,
    is_decode,
    join_punctual,
    let_go,
    note_gaps,
    open_room,
    put_last,
    settle,
    take_first,
)

# Look for an interruption once in so many steps
WATCH = 1 << 16

# Decode steps are filed as int32, as far ahead as the longest output
MOST_STEPS = (1 << 30) - 2 * WATCH


@inlined
def issue(work, load, request, at):
    """Have a request arrive later."""
    load.arrived_at[unsigned(request)] = at
    work.times[SINCE, unsigned(request)] = at + load.before_queue
    push(work.coming, work.counts[COMING], request, work.times[SINCE], load.arrived_at)
    work.counts[COMING] += 1


@inlined
def issue_next(work, load, at):
    """Have the next request of a closed loop arrive; returns whether there is one."""
    counts = work.counts
    if counts[ISSUED] == load.prompt_tokens.size:
        return False
    issue(work, load, counts[ISSUED], at)
    counts[ISSUED] += 1
    return True


@inlined
def issue_after_drop(work, load, t):
    """The same where one was dropped at `t`, so that time passes even without think time."""
    return not load.closed or issue_next(work, load, t + max(load.think_time, 1.0))


@inlined
def seen_at(load, request, t):
    """When the user sees the end of a request that ends at `t`."""
    return t + load.output_tokens[unsigned(request)] * load.per_token + load.at_completion


@inlined
def follow_up(work, load, request, seen):
    """Have what follows a request arrive whose end is seen then: the next of a closed loop, or of its session.

    Returns whether there was one to be had.
    """
    r = unsigned(request)
    if load.closed:
        return issue_next(work, load, seen + load.think_time)
    if load.follower.size > 0 and load.follower[r] >= 0:
        following = int(load.follower[r])
        issue(work, load, following, seen + load.think[unsigned(following)])
    return True


@inlined
def next_issued(work):
    """When the first of the requests arrives that were issued."""
    return work.times[SINCE, unsigned(work.coming[0])] if work.counts[COMING] > 0 else np.inf


@inlined
def due_at(load, request, static):
    """When a request comes to the queue of those whose arrival is known from the start."""
    return load.arrived_at[unsigned(request)] + load.before_queue if request < static else np.inf


@inlined
def take_arrival(work, load, static, static_due, dynamic_due):
    """Take the request that arrives first; returns (it, when the next of both kinds arrive)."""
    counts = work.counts
    if static_due <= dynamic_due:
        request = int(counts[ARRIVALS])
        counts[ARRIVALS] += 1
        return request, due_at(load, request + 1, static), dynamic_due
    request = whole(pop(work.coming, counts[COMING], work.times[SINCE], load.arrived_at))
    counts[COMING] -= 1
    return request, static_due, next_issued(work)


@bare
def forget_steps(counts, sums, gaps):
    """Count steps from now on: the warm-up is over."""
    sums[GAP_SUM] = sums[GAP_MAX] = sums[BUSY] = sums[USED] = 0.0
    counts[GAPS] = counts[MAX_QUEUE] = counts[STEPS] = counts[SCHEDULED] = counts[TOKENS] = counts[PEAK] = 0
    gaps[counts[GAP_LOW] : counts[GAP_HIGH] + 1] = 0
    counts[GAP_LOW], counts[GAP_HIGH] = GAP_BINS, 0


@bare
def sort_by_admission(own, ended, begin, end):
    """Order requests as they were admitted: so they free their blocks, and their users send the next ones."""
    for i in range(begin + 1, end):
        request = whole(ended[unsigned(i)])
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
        request = whole(ended[unsigned(i)])
        r = unsigned(request)
        computed = int(prompt[r]) + int(output[r]) - 1
        held = int(own[HELD, r]) if policy.hold == RESERVED else blocks_for(computed, memory.block_size, memory.shift)
        full = full_blocks(computed, memory.block_size, memory.shift)
        if own[KV, r] == PINNED:
            own[KV, r] = PINNED_ALONE
            counts[RUNNING] -= 1
        else:
            let_go(counts, cache, memory, request, held, full, memory.returns)
    counts[ENDED] = counts[REPORTED] = 0
    counts[BLOCKED] = 0


@inlined
def never_fits(policy, memory, prompt, output, cap):
    """Whether an engine can't serve a request even when it has no other."""
    reserved = blocks_for(reservation(policy, prompt, output, cap), memory.block_size, memory.shift)
    return (
        prompt + output > policy.longest or reserved > memory.blocks or (not policy.chunked and prompt > policy.budget)
    )


@bare
def reset(counts, sums, first, residues, unclip, late, memory, cache, ratio):
    """An engine that has done nothing yet. Requests are not its own: they are reset where they are made."""
    counts[:] = 0
    counts[GAP_LOW] = GAP_BINS
    counts[QUEUE_HEAD] = counts[HEAP] = counts[INBOX_HEAD] = -1
    counts[FREE] = memory.blocks
    sums[:] = 0.0
    sums[RATIO] = ratio
    first[:] = -1
    residues[: memory.block_size] = 0
    unclip[:] = 0
    late[:] = 0
    if memory.caching:
        kv.reset(counts, cache.nodes, cache.node_of, cache.seen, memory.blocks)


@bare
def reset_requests(own, times, owned, requests, caching):
    """Requests that nobody has seen yet."""
    own[HELD : KV + 1, :requests] = 0  # `UNSEEN`
    times[: ENDED_AT + 1, :requests] = np.nan
    if caching:
        owned[kv.RUN_NODE] = -1
        owned[kv.NAMED] = 0


@inlined
def report(counts, own, ended):
    """Have routers know of the requests that ended, or began to decode, with the step that has just ended."""
    counts[BEGUN_BLOCKS] += counts[BEGINNING]
    counts[BEGINNING] = 0
    counts[LEFT] += counts[ENDED] - counts[REPORTED]
    for i in range(counts[REPORTED], counts[ENDED]):
        counts[LEFT_BLOCKS] += own[BLOCKS, unsigned(ended[unsigned(i)])]
    counts[REPORTED] = counts[ENDED]


@bare_entry
def simulate(place, kind, time_limit):
    """Run one scenario, or a worker of a fleet until a time. Results stay in its `TokenWork`; returns the status.

    Parameters
    ----------
    place : Placed
        Address of a `Place`: a worker is visited more often than it makes steps, and handing all over each time took
        longer than a step.
    kind : int
        ALONE, BEGINS, GOES_ON or STOPS.
    time_limit : float
        Seconds.
    """
    policy, memory, model, load = (
        fetched(place.policy),
        fetched(place.memory),
        fetched(place.model),
        fetched(place.load),
    )
    work, cache, record = fetched(place.work), fetched(place.cache), fetched(place.record)
    warmup, stop, own_rule, own_duration = place.warmup, place.stop, place.own_rule, place.own_duration
    arrived_at, prompt, output, caps = load.arrived_at, load.prompt_tokens, load.output_tokens, load.max_tokens
    follower, urgency, ttft_limits = load.follower, load.urgency, load.ttft_limits
    counts, sums, gaps, own, times = work.counts, work.sums, work.gaps, work.own, work.times
    first, residues, unclip = work.first, work.residues, work.unclip
    prefills, chunk_of, chunk_tokens, stack = work.prefills, work.chunk_of, work.chunk_tokens, work.stack
    ended = work.ended
    joined, joined_at, starving = work.joined, work.joined_at, work.starving
    recorded_times, recorded_counts = record.times, record.counts
    blocks, block_size, shift, caching = memory.blocks, memory.block_size, memory.shift, memory.caching
    grows = policy.hold != RESERVED
    room_for = recorded_times.shape[1]
    is_plain = (
        kind == ALONE
        and is_formula(model.formula)
        and grows
        and not (caching or room_for > 0 or load.closed or follower.size > 0)
        and not (policy.asynchronous or policy.prefill_only or policy.custom or policy.threshold > 0)
        and policy.order == FIRST_COME
        and not load.watches_gaps
    )

    alone = kind == ALONE
    if alone:
        gaps[counts[GAP_LOW] : counts[GAP_HIGH] + 1] = 0
        reset_requests(own, times, cache.owned, prompt.size, caching)
    if kind <= BEGINS:
        reset(counts, sums, first, residues, unclip, work.late, memory, cache, policy.ratio)
    if kind == BEGINS:
        return DONE

    t = sums[END_TIME]
    static = min(load.static, prompt.size) if alone else 0
    static_due = due_at(load, 0, static)
    dynamic_due = np.inf if counts[INBOX_HEAD] < 0 else -np.inf
    counts[ISSUED] = static
    measured_from = warmup
    measuring = warmup <= 0.0 or not alone
    all_steps = whole(counts[ALL_STEPS])  # a literal would compile `cruise` and `coast` once more
    watch = all_steps + WATCH
    offers = not alone and cache.seen.size > 0
    status = DONE

    while t < time_limit:
        if all_steps >= watch:
            watch = all_steps + WATCH
            if stop[0]:
                status = INTERRUPTED
                break
            if counts[STEP] > MOST_STEPS:
                status = TOO_LONG
                break
        if not measuring and t >= warmup:
            measuring = True
            forget_steps(counts, sums, gaps)

        if not alone:
            report(counts, own, ended)
            seen.begin(cache.seen, t)

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
                    if counts[INBOX_HEAD] >= 0:
                        request = take_first(counts, own, INBOX_HEAD)
                        counts[INBOX] -= 1
                        dynamic_due = np.inf if counts[INBOX_HEAD] < 0 else -np.inf
                    else:
                        request, static_due, dynamic_due = take_arrival(work, load, static, static_due, dynamic_due)
                    r = unsigned(request)
                    counts[ENQUEUED] += own[KV, r] == 0
                    if alone:
                        own[COMPUTED, r] = 0
                        own[GENERATED, r] = 0
                        times[SINCE, r] = arrived_at[r] + load.before_queue
                    prompt_tokens, output_tokens, cap = int(prompt[r]), int(output[r]), int(caps[r])
                    if never_fits(policy, memory, prompt_tokens, output_tokens, cap):
                        own[STATE, r] = DROPPED_AT_ONCE
                        counts[DROPPED] += 1
                        if not issue_after_drop(work, load, t):
                            status = OUT_OF_REQUESTS
                            break
                        if load.closed:
                            dynamic_due = next_issued(work)
                    else:
                        own[STATE, r] = QUEUED
                        counts[WAITING] += 1
                        if policy.order == FIRST_COME:
                            put_last(counts, own, QUEUE_HEAD, request)
                        else:
                            class_ = class_of(load, r)
                            if policy.order == SHORTEST_PROMPT:
                                rank = float(prompt_tokens)
                            elif policy.order == SHORTEST_OUTPUT:
                                rank = float(output_tokens)
                            elif policy.order == PRIORITY:
                                rank = urgency[class_]
                            else:
                                rank = arrived_at[r] + ttft_limits[class_]
                            times[RANK, r] = rank
                            counts[HEAP] = enter(
                                counts[HEAP], request, own[AFTER], own[BEFORE], times[RANK], arrived_at
                            )
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
                        model.formula, load.before_queue, measured_from, counts[WAITING] == 0, t, horizon, all_steps,
                        watch,
                    )  # fmt: skip
                    request = int(counts[ARRIVALS])
                    static_due = due_at(load, request, static)
                    coasted = sums[NOW] > t
                    t = sums[NOW]
                    status = counts[STATUS]
                elif can_coast(counts, sums, policy, t) and not (offers and seen.has_new(cache.seen)):
                    if sums[HORIZON] > 0.0:
                        if t >= sums[FORESEEN]:
                            sums[FORESEEN] = foresee(
                                counts, first, residues, memory, model, own_duration, t, sums[HORIZON], WATCH
                            )
                            if sums[FORESEEN] > t:
                                status = COASTING
                                break
                        horizon = min(horizon, sums[FORESEEN])
                    steps = coast(
                        counts, sums, first, residues, gaps, memory, model, cache, record, own_duration, t, due,
                        horizon, all_steps, watch, load.worker,
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
                status = DONE if alone else IDLE
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
                if is_decode(own, r, prompt[r] + own[GENERATED, r] - computed):
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
            done_now = step_of(
                model.formula, prefill_requests, prefill_tokens, attention, squares, prefill_context, decode_requests,
                decode_context,
            )  # fmt: skip
            t = begin + duration(model, done_now, own_duration)
            gap = t - begin
            seen.publish(cache.seen, t)
            if not (gap > 0.0 and gap < np.inf):
                sums[NOW], sums[LONGEST] = begin, gap
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
                recorded_counts[STEP_WORKER, at] = load.worker
            all_steps += 1
            held = blocks - counts[FREE]
            scheduled = prefill_requests + decode_requests
            add_steps(
                counts,
                sums,
                whole(1),
                scheduled,
                prefill_tokens + decode_requests,
                counts[RUNNING] * gap,
                held * gap,
                held,
            )
            if decodes > 0:
                # The gaps between the last token and this one
                regular = decodes
                for i in range(was_starved):
                    r = unsigned(starving[unsigned(policy.slots + i)])
                    if own[STARVING, r] == 1:
                        add_gaps(counts, sums, gaps, t - times[LAST_AT, r], whole(1))
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
            request = whole(first[bucket])
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
                    request = whole(own[AFTER, r])
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
            request = whole(chunk_of[unsigned(i)])
            r = unsigned(request)
            own[COMPUTED, r] += chunk_tokens[unsigned(i)]
            if own[COMPUTED, r] < prompt[r] + own[GENERATED, r]:
                continue
            done += 1
            counts[BEGINNING] += own[NEW_BLOCKS, r]
            own[NEW_BLOCKS, r] = 0
            if own[GENERATED, r] == 0:
                times[FIRST_AT, r] = t
                times[LAST_AT, r] = t
            else:
                add_gaps(counts, sums, gaps, t - times[LAST_AT, r], whole(1))
            if load.watches_gaps:
                join_punctual(work, load, r, t - times[LAST_AT, r])
            own[GENERATED, r] += 1
            if own[GENERATED, r] == output[r]:
                own[STATE, r] = GONE
                ended[unsigned(counts[ENDED])] = request
                counts[ENDED] += 1
            else:
                times[LAST_AT, r] = t
                joining += 1
                if load.watches_gaps and policy.prefill_only:
                    work.newcomers[unsigned(counts[NEWCOMERS])] = request
                    counts[NEWCOMERS] += 1
                if policy.ratio > 0.0:
                    so_far = int(own[GENERATED, r])
                    open_room(
                        counts, unclip, int(counts[STEP]), caps[r] - so_far, output[r] - so_far, policy.room_tokens, 1
                    )
                begin_decode(work, memory, policy, request, int(prompt[r]), int(output[r]))
        if done > 0:
            kept = 0
            for i in range(counts[PREFILLING]):
                request = whole(prefills[unsigned(i)])
                if own[STATE, unsigned(request)] == PREFILL:
                    prefills[unsigned(kept)] = request
                    kept += 1
            counts[PREFILLING] = kept
            if policy.prefill_only and joining > 0:
                if counts[GROUPS] == joined.size:
                    drop_empty_groups(counts, joined, joined_at)
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
                if not follow_up(work, load, r, seen_at(load, r, t)):
                    status = OUT_OF_REQUESTS
                    break
            if load.closed or follower.size > 0:
                dynamic_due = next_issued(work)
            if status != DONE or kind == STOPS:
                break
        if offers and seen.has_new(cache.seen):
            break
    if not measuring:
        forget_steps(counts, sums, gaps)
    if alone and t < time_limit < np.inf and status == DONE:
        t = time_limit
    sums[END_TIME] = t
    counts[ALL_STEPS] = all_steps
    return status
