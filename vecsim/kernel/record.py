"""What is kept of one scenario: the instants and the slot of each request, the queue over time."""

import numpy as np

from vecsim.kernel.jit import entry, inner
from vecsim.load import CLOSED


@inner
def lowest_bit(word):
    """Place of the lowest set bit of a word that has one."""
    bit = 0
    while (word >> np.uint64(bit)) & np.uint64(1) == np.uint64(0):
        bit += 1
    return bit


@inner
def assign_slots(started_step, end_step, steps, max_batch_size, slot):
    """The slot of each started request: the lowest one that is free when it starts.

    At a boundary slots are freed before they are taken. `next_ending` links the requests that end at the
    same boundary. Free slots are a bitmap, with no free one in the words before `lowest`.
    """
    free = np.zeros((max_batch_size + 63) // 64, np.uint64)
    for i in range(max_batch_size):
        free[i // 64] |= np.uint64(1) << np.uint64(i % 64)
    ending = np.full(steps + 1, -1, np.int64)
    next_ending = np.full(started_step.size, -1, np.int64)
    released = lowest = 0
    for i in range(started_step.size):
        while released <= started_step[i]:
            other = ending[released]
            while other >= 0:
                word = slot[other] // 64
                free[word] |= np.uint64(1) << np.uint64(slot[other] % 64)
                lowest = min(lowest, word)
                other = next_ending[other]
            released += 1
        while free[lowest] == np.uint64(0):
            lowest += 1
        bit = lowest_bit(free[lowest])
        free[lowest] ^= np.uint64(1) << np.uint64(bit)
        slot[i] = 64 * lowest + bit
        if end_step[i] <= steps:
            next_ending[i] = ending[end_step[i]]
            ending[end_step[i]] = i


@entry
def write_record(row, scenarios, lengths, scratch, outcome, record):
    """Write the row of the scenario that `run_scenarios` has just run in `scratch`."""
    time, steps, enqueued, started = scratch.time, outcome.steps, outcome.enqueued, outcome.started
    chunks = scenarios.total_prefill_chunks[row]
    closed = scenarios.arrivals[row] == CLOSED
    begin = lengths.start[scenarios.length_stream[row]]
    end_step = np.empty(started, np.int64)
    for i in range(enqueued):
        enqueued_at = time[scratch.enqueued_step[i]]
        record.enqueued_at[row, i] = enqueued_at
        record.arrived_at[row, i] = enqueued_at if closed else scratch.arrived_at[i]
        length = lengths.values[begin + i]
        record.output_tokens[row, i] = length
        if i < started:
            first = scratch.started_step[i] + chunks
            last = first + length - 1
            end_step[i] = last
            record.started_at[row, i] = time[scratch.started_step[i]]
            if first < steps:
                record.first_token_at[row, i] = time[first]
            if last < steps:
                record.completed_at[row, i] = time[last]
    assign_slots(
        scratch.started_step[:started],
        end_step,
        steps,
        scenarios.max_batch_size[row],
        record.slot[row],
    )


@entry
def write_queue(row, times, scratch, outcome, queue):
    """Write the queue size at ascending instants of the scenario that `run_scenarios` has just run. O(steps)."""
    step = enqueued = started = 0
    for i in range(times.size):
        while step + 1 < outcome.steps and scratch.time[step + 1] <= times[i]:
            step += 1
        while enqueued < outcome.enqueued and scratch.enqueued_step[enqueued] <= step:
            enqueued += 1
        while started < outcome.started and scratch.started_step[started] <= step:
            started += 1
        queue[row, i] = enqueued - started
