"""From what the step loop noted to metrics and to the instants of each request. O(1) a request.

A request admitted at boundary s has its first token at boundary s + chunks and ends at boundary
s + chunks + length - 1, if the run gets that far.
"""

import numpy as np

from vecsim.kernel.jit import inner, unsigned
from vecsim.kernel.quantiles import quantiles, weighted_quantiles
from vecsim.kernel.tick import duration


@inner
def first_at_or_after(times, size, limit):
    """Place of the first of ascending times[:size] that is >= limit. O(log n)."""
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        if times[middle] < limit:
            low = middle + 1
        else:
            high = middle
    return low


@inner
def summarise(values, total, largest, wanted, scratch, out):
    """Mean, quantiles and maximum of one distribution into `out`; NaN if it has no sample."""
    if values.size == 0:
        out[:] = np.nan
        return
    out[0] = total / values.size
    quantiles(values, largest, wanted, scratch.bin_counts, scratch.bin_places, scratch.picked, out[1:-1])
    out[-1] = largest


@inner
def tally(max_batch_size, itl, chunks, closed, warmup, requests, scratch, outcome, wanted, out):
    """Write the row of metrics of one scenario: the order of `vecsim.variables.TICK_VARIABLES`."""
    arrived_at, output_tokens, enqueued_step, started_step = requests
    time = scratch.time
    _, steps, enqueued, started, most_prefilling, max_queue, end_time = outcome
    first_step = first_at_or_after(time, steps, warmup)
    # Measured requests arrive at or after the warm-up; in a closed loop they arrive when they are enqueued.
    if closed:
        first_request = first_at_or_after(enqueued_step, enqueued, first_step)
    else:
        first_request = first_at_or_after(arrived_at, enqueued, warmup)

    queue_time, ttft, e2e, tpot = scratch.values[0], scratch.values[1], scratch.values[2], scratch.values[3]
    queue_time_sum = ttft_sum = e2e_sum = tpot_sum = busy = 0.0
    queue_time_max = ttft_max = e2e_max = tpot_max = 0.0
    first_tokens = completed = tpots = tokens = queue_steps = 0
    begin = time[first_step]
    for i in range(started):
        s = started_step[i]
        queued_at = enqueued_step[i]
        length = output_tokens[i]
        first = s + chunks
        last = first + length - 1
        started_at = time[unsigned(s)]
        left_at = time[unsigned(min(last, steps))]
        queue_steps += max(s - max(queued_at, first_step), 0)
        busy += max(left_at - max(started_at, begin), 0.0)
        if i < first_request:
            continue
        enqueued_at = time[unsigned(queued_at)]
        value = started_at - enqueued_at
        queue_time[unsigned(i - first_request)] = value
        queue_time_sum += value
        queue_time_max = max(queue_time_max, value)
        if first >= steps:
            continue
        first_token_at = time[unsigned(first)]
        value = first_token_at - enqueued_at
        ttft[unsigned(first_tokens)] = value
        ttft_sum += value
        ttft_max = max(ttft_max, value)
        first_tokens += 1
        if last >= steps:
            tokens += steps - first
            continue
        tokens += length
        value = left_at - enqueued_at
        e2e[unsigned(completed)] = value
        e2e_sum += value
        e2e_max = max(e2e_max, value)
        completed += 1
        if length > 1:
            value = (left_at - first_token_at) / (length - 1)
            tpot[unsigned(tpots)] = value
            tpot_sum += value
            tpot_max = max(tpot_max, value)
            tpots += 1
    for i in range(started, enqueued):
        queue_steps += steps - max(enqueued_step[i], first_step)

    stats = wanted.size + 2
    started_measured = max(started - first_request, 0)
    summarise(e2e[:completed], e2e_sum, e2e_max, wanted, scratch, out[:stats])
    summarise(ttft[:first_tokens], ttft_sum, ttft_max, wanted, scratch, out[stats : 2 * stats])
    summarise(tpot[:tpots], tpot_sum, tpot_max, wanted, scratch, out[2 * stats : 3 * stats])
    summarise(
        queue_time[:started_measured], queue_time_sum, queue_time_max, wanted, scratch, out[3 * stats : 4 * stats]
    )
    itl_samples = tally_itl(itl, most_prefilling, scratch, wanted, out[4 * stats : 5 * stats])

    measured_steps = steps - first_step
    measured_time = end_time - warmup
    batch_time = end_time - begin
    at = 5 * stats
    out[at] = enqueued - first_request
    out[at + 1] = started_measured
    out[at + 2] = first_tokens
    out[at + 3] = completed
    out[at + 4] = itl_samples
    out[at + 5] = 1000.0 * completed / measured_time
    out[at + 6] = 1000.0 * tokens / measured_time
    out[at + 7] = enqueued - started
    out[at + 8] = queue_steps / measured_steps if measured_steps > 0 else np.nan
    out[at + 9] = max_queue
    out[at + 10] = busy / (max_batch_size * batch_time) if batch_time > 0.0 else np.nan
    out[at + 11] = end_time
    out[at + 12] = measured_steps


@inner
def tally_itl(itl, most_prefilling, scratch, wanted, out):
    """Statistics of the inter-token latency, exact: a step's duration depends on its prefills alone.

    Returns the number of samples. O(prefills in a step).
    """
    samples = scratch.itl_samples[: most_prefilling + 1]
    durations = scratch.prefill_sum[: most_prefilling + 1]
    count = 0
    total = largest = 0.0
    for prefilling in range(most_prefilling + 1):
        durations[prefilling] = duration(durations[prefilling], itl)
        if samples[prefilling] > 0:
            count += samples[prefilling]
            total += samples[prefilling] * durations[prefilling]
            largest = durations[prefilling]
    if count == 0:
        out[:] = np.nan
    else:
        out[0] = total / count
        weighted_quantiles(durations, samples, count, wanted, out[1:-1])
        out[-1] = largest
    return count
