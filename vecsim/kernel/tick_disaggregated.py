"""The tick model's disaggregated engine: one scenario, O(log workers) a boundary at which something can happen.

Workers hold one request each, and requests go through both pools in the order of their arrival: prefills take equally
long, so they end in the order in which they began. So all instants of a request follow when its prefill begins, in one
pass over the boundaries of the prefill workers. A heap has each worker's next boundary that matters; idle ticks and
equal steps in a row are passed over at once, with the very bits of adding them up one by one (`advance`).

A closed loop is an open load whose next request is due when a request ends. What ends is known when it begins, and
what has not begun yet ends later than all prefills that run: so no boundary that is passed over could have noticed it.
"""

import math

import numpy as np

from vecsim.kernel.jit import bare, entry, inner, unsigned
from vecsim.kernel.scenarios import fill_arrivals, same_arrivals
from vecsim.kernel.state import DONE, INTERRUPTED, OUT_OF_REQUESTS, ApartOutcome
from vecsim.kernel.tally import LATENCIES, first_at_or_after, no_latencies, note_latencies, write_noted
from vecsim.load import CLOSED, RENEWAL

ENDLESS = 1 << 62
NEAR = 12  # steps


@bare
def advance(t, step, most, limit):
    """(instant, steps made) of a clock that makes equal steps until it reaches a limit, or has made `most`.

    Whole numbers add up exactly. Else a step is rounded to the same gain each time within a power of two, but for ties,
    which go to even: so from the second step on. O(log t).
    """
    made = 0
    if t == np.floor(t) and step == np.floor(step):
        if t < limit:
            needed = int((limit - t) / step)
            needed += t + needed * step < limit
            made = min(needed, most)
        return t + made * step, made
    while made < most and t < limit:
        before = t
        t += step
        made += 1
        if made + NEAR > most or t + NEAR * step >= limit:
            continue  # looking further would take longer
        second = t + step
        top = math.ldexp(1.0, math.frexp(before)[1])
        if second >= top:
            continue
        gain = second - t
        # One less, for the division is rounded.
        jump = min(int((min(top, limit) - t) / gain) - 1, most - made)
        if jump > 0:
            t += jump * gain
            made += jump
    return t, made


@bare
def settle(heap, clock):
    """Put the first worker of a heap where its clock belongs; ties by number. O(log workers)."""
    top = int(heap[0])
    key = clock[unsigned(top)]
    place = 0
    while 2 * place + 1 < heap.size:
        below = 2 * place + 1
        worker = int(heap[unsigned(below)])
        if below + 1 < heap.size:
            other = int(heap[unsigned(below + 1)])
            a, b = clock[unsigned(worker)], clock[unsigned(other)]
            if b < a or (b == a and other < worker):
                below += 1
                worker = other
        at = clock[unsigned(worker)]
        if key < at or (key == at and top < worker):
            break
        heap[unsigned(place)] = worker
        place = below
    heap[unsigned(place)] = top


@bare
def push(ends, size, end):
    """Add an instant to a heap of `size`. O(log n)."""
    place = size
    while place > 0:
        above = (place - 1) // 2
        if ends[unsigned(above)] <= end:
            break
        ends[unsigned(place)] = ends[unsigned(above)]
        place = above
    ends[unsigned(place)] = end


@bare
def pop(ends, size):
    """Take the first instant from a heap of `size`. O(log n)."""
    last = ends[unsigned(size - 1)]
    place = 0
    while 2 * place + 1 < size - 1:
        below = 2 * place + 1
        if below + 1 < size - 1 and ends[unsigned(below + 1)] < ends[unsigned(below)]:
            below += 1
        if last <= ends[unsigned(below)]:
            break
        ends[unsigned(place)] = ends[unsigned(below)]
        place = below
    ends[unsigned(place)] = last


@bare
def simulate_apart(
    prefill_workers,
    decode_workers,
    transfer_time,
    prefill_time,
    itl,
    chunks,
    target,
    time_limit,
    warmup,
    available,
    arrived_at,
    output_tokens,
    scratch,
    stop,
):
    """Run one scenario; `target` is the concurrency of a closed loop, 0 for an open load."""
    chunk_time = max(prefill_time / chunks, 1.0)
    token_time = max(itl, 1.0)
    ends = scratch.ends
    prefill_heap, decode_heap = scratch.prefill_heap[:prefill_workers], scratch.decode_heap[:decode_workers]
    prefill_clock, decode_clock = scratch.prefill_clock, scratch.decode_clock
    for k in range(prefill_workers):
        prefill_heap[k] = k
        prefill_clock[k] = scratch.busy_until[k] = 0.0
    for k in range(decode_workers):
        decode_heap[k] = k
        decode_clock[k] = 0.0
    enqueued = started = ending = steps = itl_samples = 0
    wanted = target  # requests that are due at once
    status = DONE
    while status == DONE:
        worker = unsigned(prefill_heap[0])
        t = prefill_clock[worker]
        if t >= time_limit:
            break
        if stop[0]:
            status = INTERRUPTED

        # Load
        if target > 0:
            while ending > 0 and ends[0] <= t:
                pop(ends, ending)
                ending -= 1
                wanted += 1
            if enqueued + wanted > available:
                status = OUT_OF_REQUESTS
                break
            for _ in range(wanted):
                scratch.enqueued_at[unsigned(enqueued)] = t
                enqueued += 1
            wanted = 0
        else:
            while arrived_at[unsigned(enqueued)] <= t:
                scratch.enqueued_at[unsigned(enqueued)] = t
                enqueued += 1

        # Admit
        if enqueued > started and scratch.busy_until[worker] <= t:
            i = unsigned(started)
            started += 1
            length = int(output_tokens[i])
            first, made = advance(t, chunk_time, chunks, time_limit)
            steps += made
            if t < warmup:
                steps -= advance(t, chunk_time, chunks, warmup)[1]
            scratch.busy_until[worker] = first
            scratch.started_at[i] = t
            scratch.prefill_worker[i] = worker
            scratch.decode_worker[i] = -1
            begun = left = np.inf
            tokens = 0
            if first >= time_limit:
                first = np.inf
            elif length == 1:
                tokens = 1
                left = first
            else:
                # The decode worker whose boundary is the first once it is there; idle ones poll once a tick.
                tokens = 1
                there = min(first + transfer_time, time_limit)
                decoder = unsigned(decode_heap[0])
                while decode_clock[decoder] < there:
                    decode_clock[decoder] = advance(decode_clock[decoder], 1.0, ENDLESS, there)[0]
                    settle(decode_heap, decode_clock)
                    decoder = unsigned(decode_heap[0])
                if decode_clock[decoder] < time_limit:
                    begun = decode_clock[decoder]
                    end, made = advance(begun, token_time, length - 1, time_limit)
                    decode_clock[decoder] = end
                    settle(decode_heap, decode_clock)
                    scratch.decode_worker[i] = decoder
                    earlier = advance(begun, token_time, length - 1, warmup)[1] if begun < warmup else 0
                    steps += made - earlier
                    itl_samples += max(made - max(earlier, 1), 0)
                    if end < time_limit:
                        tokens = length
                        left = end
                    else:
                        tokens = made
            scratch.first_token_at[i] = first
            scratch.decode_started_at[i] = begun
            scratch.left_at[i] = left
            scratch.tokens[i] = tokens
            if target > 0 and left < time_limit:
                push(ends, ending, left)
                ending += 1

        # The next boundary that could notice a request, or begin a prefill
        due = time_limit
        if target == 0:
            due = min(due, arrived_at[unsigned(enqueued)])
        elif ending > 0:
            due = min(due, ends[0])
        if scratch.busy_until[worker] > t:
            prefill_clock[worker] = advance(t, chunk_time, ENDLESS, min(due, scratch.busy_until[worker]))[0]
        else:
            prefill_clock[worker] = advance(t, 1.0, ENDLESS, due)[0]
        settle(prefill_heap, prefill_clock)

    end_time = time_limit
    for k in range(prefill_workers):
        end_time = max(end_time, prefill_clock[k])
    for k in range(decode_workers):
        end_time = max(end_time, advance(decode_clock[k], 1.0, ENDLESS, time_limit)[0])
    for k in range(started, enqueued):
        scratch.started_at[k] = scratch.first_token_at[k] = scratch.decode_started_at[k] = scratch.left_at[k] = np.inf
        scratch.prefill_worker[k] = scratch.decode_worker[k] = -1
    return ApartOutcome(
        status=status, steps=steps, itl_samples=itl_samples, enqueued=enqueued, started=started, end_time=end_time
    )


@bare
def queue_after(t, transfer_time, scratch, output_tokens, enqueued, started, places):
    """(requests that wait for either pool after an instant, the next instant at which that changes).

    `places` says how far the instants of each kind were read, and is moved on. O(requests read).
    """
    waiting = 0
    following = np.inf
    for kind in range(4):
        times = scratch.enqueued_at
        later = transfer_time if kind == 2 else 0.0
        if kind == 1:
            times = scratch.started_at
        elif kind == 2:
            times = scratch.first_token_at
        elif kind == 3:
            times = scratch.decode_started_at
        size = enqueued if kind == 0 else started
        i, counted = places[kind, 0], places[kind, 1]
        # A request of one token doesn't wait for a decode worker.
        while i < size and (times[unsigned(i)] + later <= t or (kind >= 2 and output_tokens[unsigned(i)] == 1)):
            counted += kind < 2 or output_tokens[unsigned(i)] > 1
            i += 1
        places[kind, 0], places[kind, 1] = i, counted
        waiting += counted if kind in (0, 2) else -counted
        if i < size:
            following = min(following, times[unsigned(i)] + later)
    return waiting, following


@inner
def tally_apart(
    workers, transfer_time, itl, closed, time_limit, warmup, arrived_at, output_tokens, scratch, outcome, wanted, out
):  # fmt: skip
    """Write the row of metrics of one scenario: the order of `vecsim.variables.TICK_VARIABLES`."""
    enqueued, started, end_time = outcome.enqueued, outcome.started, outcome.end_time
    first_request = first_at_or_after(scratch.enqueued_at if closed else arrived_at, enqueued, warmup)
    values = scratch.values
    totals = no_latencies()
    busy = waited = 0.0
    tokens = prefilled = decoding = 0
    # Taken out of the tuple once, for each access to it would count references.
    queued, starts, firsts = scratch.enqueued_at, scratch.started_at, scratch.first_token_at
    begins, ends, made = scratch.decode_started_at, scratch.left_at, scratch.tokens
    for i in range(started):
        request = unsigned(i)
        enqueued_at, started_at = queued[request], starts[request]
        first = firsts[request]
        begun, left = begins[request], ends[request]
        length = int(output_tokens[request])
        waited += max(started_at - max(enqueued_at, warmup), 0.0)
        busy += max(min(first, end_time) - max(started_at, warmup), 0.0)
        if first < np.inf and length > 1:
            there = first + transfer_time
            if there < time_limit:
                prefilled += 1
                decoding += begun < np.inf
                waited += max(min(begun, end_time) - max(there, warmup), 0.0)
            busy += max(min(left, end_time) - max(begun, warmup), 0.0)
        if i < first_request:
            continue
        tokens += made[request]
        note_latencies(values, totals, enqueued_at, started_at, first, left, length)
    for i in range(started, enqueued):
        waited += end_time - max(queued[unsigned(i)], warmup)

    places = np.zeros((4, 2), np.int64)
    max_queue, instant = 0, warmup
    while instant < time_limit:  # what would be there later, nobody notices
        waiting, instant = queue_after(instant, transfer_time, scratch, output_tokens, enqueued, started, places)
        max_queue = max(max_queue, waiting)

    stats = wanted.size + 2
    completed, first_tokens, _, begun = write_noted(values, totals, wanted, scratch, out)
    at = LATENCIES * stats
    # Each step of a decode worker takes as long.
    out[at : at + stats] = max(itl, 1.0) if outcome.itl_samples > 0 else np.nan
    at += stats
    measured_time = end_time - warmup
    out[at] = enqueued - first_request
    out[at + 1] = begun
    out[at + 2] = first_tokens
    out[at + 3] = completed
    out[at + 4] = outcome.itl_samples
    out[at + 5] = 1000.0 * completed / measured_time
    out[at + 6] = 1000.0 * tokens / measured_time
    out[at + 7] = enqueued - started + prefilled - decoding
    out[at + 8] = waited / measured_time
    out[at + 9] = max_queue
    out[at + 10] = busy / (workers * measured_time)
    out[at + 11] = end_time
    out[at + 12] = outcome.steps


@entry
def run_disaggregated(first, last, job):
    """Run the scenarios [first, last) of a `Job`: a row of metrics each; returns the outcome of the last."""
    scenarios, arrivals, lengths, time_limit, warmup, quantiles, scratch, metrics, enqueued, status, stop = job
    outcome = ApartOutcome(DONE, 0, 0, 0, 0, 0.0)
    filled = -1  # the row that the due times in `scratch` are of
    filled_size = due = 0
    for row in range(first, last):
        closed = scenarios.arrivals[row] == CLOSED
        stream = scenarios.length_stream[row]
        start = lengths.start[stream]
        available = min(lengths.size[stream], scratch.enqueued_at.size)
        if not closed:
            wanted = scenarios.requests[row]
            at = scenarios.arrival_stream[row]
            units = arrivals.values[arrivals.start[at] : arrivals.start[at] + arrivals.size[at]]
            drawn = min(available, units.size) if scenarios.arrivals[row] == RENEWAL else available
            room = scratch.arrived_at[: min(wanted, drawn) + 1]
            if filled < 0 or room.size != filled_size or not same_arrivals(scenarios, filled, row):
                due = fill_arrivals(scenarios.arrivals[row], scenarios.request_rate[row], units, time_limit, room)
                filled = row
                filled_size = room.size
            if due == drawn < wanted:
                status[row] = OUT_OF_REQUESTS
                continue
        output_tokens = lengths.values[start : start + available]
        outcome = simulate_apart(
            scenarios.max_batch_size[row],
            scenarios.decode_workers[row],
            scenarios.transfer_time[row],
            scenarios.prefill_time[row],
            scenarios.itl[row],
            scenarios.total_prefill_chunks[row],
            scenarios.requests[row] if closed else 0,
            time_limit,
            warmup,
            available,
            scratch.arrived_at,
            output_tokens,
            scratch,
            stop,
        )
        status[row] = outcome.status
        if outcome.status == INTERRUPTED:
            break
        if outcome.status == OUT_OF_REQUESTS:
            continue
        enqueued[row] = outcome.enqueued
        workers = scenarios.max_batch_size[row] + scenarios.decode_workers[row]
        tally_apart(
            workers,
            scenarios.transfer_time[row],
            scenarios.itl[row],
            closed,
            time_limit,
            warmup,
            scratch.arrived_at,
            output_tokens,
            scratch,
            outcome,
            quantiles,
            metrics[row],
        )
    return outcome


@entry
def write_apart_record(row, scenarios, lengths, scratch, outcome, record):
    """Write the row of the scenario that `run_disaggregated` has just run in `scratch`; a slot is a prefill worker."""
    closed = scenarios.arrivals[row] == CLOSED
    begin = lengths.start[scenarios.length_stream[row]]
    for i in range(outcome.enqueued):
        record.enqueued_at[row, i] = scratch.enqueued_at[i]
        record.arrived_at[row, i] = scratch.enqueued_at[i] if closed else scratch.arrived_at[i]
        record.output_tokens[row, i] = lengths.values[begin + i]
        record.slot[row, i] = scratch.prefill_worker[i]
        if scratch.started_at[i] < np.inf:
            record.started_at[row, i] = scratch.started_at[i]
        if scratch.first_token_at[i] < np.inf:
            record.first_token_at[row, i] = scratch.first_token_at[i]
        if scratch.left_at[i] < np.inf:
            record.completed_at[row, i] = scratch.left_at[i]


@entry
def write_apart_queue(row, times, scenarios, lengths, scratch, outcome, queue):
    """Write the queue size at ascending instants of the scenario that was just run. O(requests)."""
    begin = lengths.start[scenarios.length_stream[row]]
    output_tokens = lengths.values[begin : begin + outcome.enqueued]
    places = np.zeros((4, 2), np.int64)
    for i in range(times.size):
        queue[row, i], _ = queue_after(
            times[i], scenarios.transfer_time[row], scratch, output_tokens, outcome.enqueued, outcome.started, places
        )
