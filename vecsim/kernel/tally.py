"""From what the step loop noted to the metrics of a scenario. O(1) a request.

A request admitted at boundary s has its first token at boundary s + chunks and ends at boundary
s + chunks + length - 1, if the run gets that far.
"""

import numpy as np

from vecsim.kernel.jit import inlined, inner, unsigned
from vecsim.kernel.quantiles import quantiles, weighted_quantiles
from vecsim.kernel.tick import duration

# The latencies of a request, in the order of `vecsim.variables.DISTRIBUTIONS`
E2E, TTFT, TPOT, QUEUE_TIME = range(4)
LATENCIES = 4

# Columns of what is noted of each [latency]: how many there are, their sum, the least and the most
NUMBER, SUM, LEAST, MOST, TOTALS = range(5)


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
def tally(max_batch_size, itl, chunks, closed, warmup, requests, scratch, outcome, wanted, out):
    """Write the row of metrics of one scenario: the order of `vecsim.variables.TICK_VARIABLES`."""
    arrived_at, output_tokens, enqueued_step, started_step = requests
    time = scratch.time
    steps, enqueued, started = outcome.steps, outcome.enqueued, outcome.started
    most_prefilling, max_queue, end_time = outcome.most_prefilling, outcome.max_queue, outcome.end_time
    first_step = first_at_or_after(time, steps, warmup)
    # Measured requests arrive at or after the warm-up; in a closed loop they arrive when they are enqueued.
    if closed:
        first_request = first_at_or_after(enqueued_step, enqueued, first_step)
    else:
        first_request = first_at_or_after(arrived_at, enqueued, warmup)

    values, kept, counts, places = (
        scratch.values,
        scratch.kept,
        scratch.bin_counts,
        scratch.bin_places,
    )
    e2e, ttft, tpot, queue_time = values[E2E], values[TTFT], values[TPOT], values[QUEUE_TIME]
    queue_time_sum = ttft_sum = e2e_sum = tpot_sum = busy = 0.0
    queue_time_max = ttft_max = e2e_max = tpot_max = 0.0
    queue_time_min = ttft_min = e2e_min = tpot_min = np.inf
    first_tokens = completed = tpots = tokens = queue_steps = 0
    begin = time[first_step]
    for i in range(started):
        s = int(started_step[unsigned(i)])
        queued_at = int(enqueued_step[unsigned(i)])
        length = int(output_tokens[unsigned(i)])
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
        queue_time_min = min(queue_time_min, value)
        if first >= steps:
            continue
        first_token_at = time[unsigned(first)]
        value = first_token_at - enqueued_at
        ttft[unsigned(first_tokens)] = value
        ttft_sum += value
        ttft_max = max(ttft_max, value)
        ttft_min = min(ttft_min, value)
        first_tokens += 1
        if last >= steps:
            tokens += steps - first
            continue
        tokens += length
        value = left_at - enqueued_at
        e2e[unsigned(completed)] = value
        e2e_sum += value
        e2e_max = max(e2e_max, value)
        e2e_min = min(e2e_min, value)
        completed += 1
        if length > 1:
            value = (left_at - first_token_at) / (length - 1)
            tpot[unsigned(tpots)] = value
            tpot_sum += value
            tpot_max = max(tpot_max, value)
            tpot_min = min(tpot_min, value)
            tpots += 1
    for i in range(started, enqueued):
        queue_steps += steps - max(int(enqueued_step[unsigned(i)]), first_step)

    stats = wanted.size + 2
    sizes = (completed, first_tokens, tpots, max(started - first_request, 0))
    sums = (e2e_sum, ttft_sum, tpot_sum, queue_time_sum)
    least = (e2e_min, ttft_min, tpot_min, queue_time_min)
    most = (e2e_max, ttft_max, tpot_max, queue_time_max)
    write_latencies(values, sizes, sums, least, most, wanted, counts, places, scratch.bins, kept, out)
    at = LATENCIES * stats
    itl_samples = tally_itl(
        itl,
        scratch.prefill_sum[: most_prefilling + 1],
        scratch.itl_samples[: most_prefilling + 1],
        wanted,
        out[at : at + stats],
    )
    at += stats

    measured_steps = steps - first_step
    measured_time = end_time - warmup
    batch_time = end_time - begin
    out[at] = enqueued - first_request
    out[at + 1] = sizes[QUEUE_TIME]
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


@inlined
def note_latency(values, totals, which, value):
    """Keep one latency, `which` of `LATENCIES`, in its row of `values` and in `totals` [latency, field]."""
    n = int(totals[which, NUMBER])
    values[which, unsigned(n)] = value
    totals[which, NUMBER] = n + 1
    totals[which, SUM] += value
    totals[which, LEAST] = min(totals[which, LEAST], value)
    totals[which, MOST] = max(totals[which, MOST], value)


@inlined
def note_latencies(values, totals, enqueued_at, started_at, first, left, length):
    """Keep the latencies of a request that has started: those of what never came, infinite, aren't there."""
    note_latency(values, totals, QUEUE_TIME, started_at - enqueued_at)
    if first < np.inf:
        note_latency(values, totals, TTFT, first - enqueued_at)
        if left < np.inf:
            note_latency(values, totals, E2E, left - enqueued_at)
            if length > 1:
                note_latency(values, totals, TPOT, (left - first) / (length - 1))


@inner
def no_latencies():
    """`totals` before there is any."""
    totals = np.zeros((LATENCIES, TOTALS))
    totals[:, LEAST] = np.inf
    return totals


@inner
def write_noted(values, totals, wanted, scratch, out):
    """`write_latencies` of what was noted; returns how many there are of each."""
    sizes = (
        int(totals[E2E, NUMBER]), int(totals[TTFT, NUMBER]), int(totals[TPOT, NUMBER]), int(totals[QUEUE_TIME, NUMBER])
    )  # fmt: skip
    write_latencies(
        values, sizes, totals[:, SUM], totals[:, LEAST], totals[:, MOST], wanted, scratch.bin_counts,
        scratch.bin_places, scratch.bins, scratch.kept, out,
    )  # fmt: skip
    return sizes


@inner
def write_latencies(values, sizes, sums, least, most, wanted, counts, places, bins, kept, out):
    """Mean, quantiles and maximum of each latency, one after the other; NaN where there is no value."""
    stats = wanted.size + 2
    # One call in a loop, not four: each would be compiled into its place.
    for which in range(LATENCIES):
        n = sizes[which]
        row = out[which * stats : (which + 1) * stats]
        if n > 0:
            row[0] = sums[which] / n
            quantiles(values[which, :n], least[which], most[which], wanted, counts, places, bins, kept, row[1:-1])
            row[-1] = most[which]
        else:
            row[:] = np.nan


@inner
def tally_itl(itl, durations, samples, wanted, out):
    """Statistics of the inter-token latency, exact: a step's duration depends on its prefills alone.

    Turns the summed times of n prefill chunks into durations; returns the number of samples. O(n).
    """
    total = 0
    time = largest = 0.0
    for prefilling in range(durations.size):
        durations[prefilling] = duration(durations[prefilling], itl)
        if samples[prefilling] > 0:
            total += samples[prefilling]
            time += samples[prefilling] * durations[prefilling]
            largest = durations[prefilling]
    if total == 0:
        out[:] = np.nan
    else:
        out[0] = time / total
        weighted_quantiles(durations, samples, total, wanted, out[1:-1])
        out[-1] = largest
    return total
