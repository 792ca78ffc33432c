"""Steps of the token model in which little happens: loops whose few variables stay in registers. O(1) a step."""

import numpy as np

from vecsim.kernel import kv, seen
from vecsim.kernel.duration import by_formula, decodes_of, duration, of_decodes, step_of
from vecsim.kernel.jit import bare, inlined, unsigned
from vecsim.kernel.kv import FREE
from vecsim.kernel.state import BAD_DURATION, DONE, OUT_OF_STEPS
from vecsim.kernel.token_state import (
    AFTER,
    ARRIVALS,
    BACKLOG,
    BEGIN,
    BLOCKED,
    CONTEXT,
    DECODE,
    DECODING,
    END,
    ENDED,
    ENDED_AT,
    ENQUEUED,
    FIRST_AT,
    GENERATED,
    GONE,
    GROUPS,
    LAST_AT,
    LAST_DECODE,
    LASTS,
    LONGEST,
    NOW,
    PREFILLING,
    PROMPT_TOKENS,
    RESIDUE,
    RUNNING,
    STARTED_AT,
    STARVED,
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
    WAITING,
    add_gaps_between,
    add_steps,
    blocks_for,
    file_end,
    gap_bin,
    put_on_stack,
)


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
    worker,
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
        after = t + duration(model, decodes_of(model.formula, decoding, context), own_duration)
        if need > 0:
            if memory.caching:
                seen.begin(cache.seen, t)
                kv.take(counts, cache.nodes, cache.node_of, cache.seen, cache.owned, need)
                seen.publish(cache.seen, after)
            free -= need
            held = float(blocks - free)
        gap = after - t
        if not gap > 0.0:
            status = BAD_DURATION
            sums[LONGEST] = gap
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
            record.counts[STEP_WORKER, at] = worker
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
        sums[LONGEST] = t
    counts[STATUS] = status
    if status == BAD_DURATION:
        sums[NOW] = t
    elif steps > 0:
        spent = t - begin
        counts[FREE] = free
        counts[STEP] = step
        counts[CONTEXT] = context
        sums[LONGEST] = longest
        sums[LAST_DECODE] = t
        sums[NOW] = t
        samples = decoding * steps
        add_gaps_between(counts, sums, samples, decoding * spent, shortest, longest)
        add_steps(counts, sums, steps, samples, samples, counts[RUNNING] * spent, used, blocks - free)
    return steps


@bare
def foresee(counts, first, residues, memory, model, own_duration, t, horizon, most):
    """When `coast` would end if nobody came; changes nothing. O(steps)."""
    block_size = memory.block_size
    decoding = int(counts[DECODING])
    free = int(counts[FREE])
    step = int(counts[STEP])
    context = int(counts[CONTEXT])
    phase = step & (block_size - 1) if memory.shift >= 0 else step % block_size
    last_step = step + most
    while step < last_step and t < horizon:
        free -= int(residues[unsigned(phase)])
        if free < 0:
            break
        after = t + duration(model, decodes_of(model.formula, decoding, context), own_duration)
        if not after > t:
            break
        context += decoding
        step += 1
        phase = phase + 1 if phase + 1 < block_size else 0
        t = after
        if first[unsigned((step - 1) & (first.size - 1))] >= 0:
            break
    return t


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
    steps = samples = tokens = started = known = 0
    last = arrivals
    begin = t
    shortest, longest = np.inf, 0.0
    used = busy = gap_sum = backlog = last_decode = 0.0
    held = float(blocks - free)
    status = DONE
    while steps < most and t < horizon:
        ends = False
        if decoding > 0 and due > t:
            # Decodes alone. A small loop, for its few variables stay in registers so.
            begin, before = t, step
            limit, last_step = min(due, horizon), step + most - steps
            # Steps in a row mostly fall in one bin: counted in a register, for a bin that has just been written to
            # is slow to read (a quarter of all the time).
            place, alike = -1, 0
            while step < last_step and t < limit:
                need = int(residues[unsigned(phase)])
                if need > free:
                    break
                free -= need
                held = float(blocks - free)
                after = t + of_decodes(formula, decoding, context)
                gap = after - t
                if not gap > 0.0:
                    status = BAD_DURATION
                    sums[LONGEST] = gap
                    break
                if gap_bin(gap) != place:
                    if alike > 0:
                        gaps[unsigned(place)] += alike
                    place, alike = gap_bin(gap), 0
                alike += decoding
                shortest = min(shortest, gap)
                longest = max(longest, gap)
                used += held * gap
                context += decoding
                step += 1
                phase = phase + 1 if phase + 1 < block_size else 0
                t = after
                if first[unsigned((step - 1) & (first.size - 1))] >= 0:
                    ends = True
                    break
            if alike > 0:
                gaps[unsigned(place)] += alike
            least_free = min(least_free, free)
            made = step - before
            if made == 0:
                break
            steps += made
            gap_sum += decoding * (t - begin)
            busy += running * (t - begin)
            samples += decoding * made
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
            started_now = step_of(formula, last - arrivals, prompt_tokens, attention, 0.0, 0, decoding, context)
            after = t + by_formula(formula, started_now)
            gap = after - t
            if not gap > 0.0:
                status = BAD_DURATION
                sums[LONGEST] = gap
                break
            running += last - arrivals
            free -= need
            least_free = min(least_free, free)
            held = float(blocks - free)
            begin = t
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
            came = arrived_at[request]
            backlog += max(begin - max(came + before_queue, measured_from), 0.0)
            if came >= measured_from:
                known += size
            put_on_stack(counts, own, stack, new)
            times[STARTED_AT, request] = begin
            times[FIRST_AT, request] = t
            times[LAST_AT, request] = t
            if length == 1:
                own[STATE, request] = GONE
                own[GENERATED, request] = 1
                times[ENDED_AT, request] = t
                running -= 1
                free += blocks_for(size, block_size, shift)
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
        sums[LONGEST] = t
    counts[STATUS] = status
    counts[ENQUEUED] += started
    counts[PROMPT_TOKENS] += known
    counts[ARRIVALS] = arrivals
    counts[DECODING] = decoding
    counts[RUNNING] = running
    counts[FREE] = free
    counts[STEP] = step
    counts[CONTEXT] = context
    sums[NOW] = t
    sums[BACKLOG] += backlog
    if steps > 0:
        if samples > 0:
            sums[LAST_DECODE] = last_decode
            add_gaps_between(counts, sums, samples, gap_sum, shortest, longest)
        add_steps(counts, sums, steps, samples + started, samples + tokens, busy, used, blocks - least_free)
    return steps
