"""The reference's way, compiled: every slot is touched at every step. What the benchmarks compare with."""

import numba
import numpy as np


@numba.njit(nogil=True)
def simulate(one_prefill, max_batch_size, prefill_time, itl, chunks, arrived_at, lengths, time_limit, e2e, ttft, slots):
    """One scenario of an in-flight batcher under an open load: latencies into `e2e` and `ttft`, counts back."""
    chunks_left, tokens_left, enqueued_at, request = slots
    request[:] = -1
    noticed_at = np.empty(arrived_at.size)
    t = 0.0
    tail = head = completed = first_tokens = 0
    started = False
    itl_sum = 0.0
    itl_count = 0
    while t < time_limit:
        for slot in range(max_batch_size):
            if started and request[slot] >= 0:
                if chunks_left[slot] > 0:
                    chunks_left[slot] -= 1
                    if chunks_left[slot] == 0:
                        ttft[first_tokens] = t - enqueued_at[slot]
                        first_tokens += 1
                        tokens_left[slot] -= 1
                else:
                    tokens_left[slot] -= 1
                if chunks_left[slot] == 0 and tokens_left[slot] == 0:
                    e2e[completed] = t - enqueued_at[slot]
                    completed += 1
                    request[slot] = -1
        while tail < arrived_at.size and arrived_at[tail] <= t:
            noticed_at[tail] = t
            tail += 1
        prefilling = 0
        for slot in range(max_batch_size):
            if request[slot] >= 0 and chunks_left[slot] > 0:
                prefilling += 1
        for slot in range(max_batch_size):
            if request[slot] < 0 and head < tail and not (one_prefill and prefilling > 0):
                request[slot] = head
                chunks_left[slot] = chunks
                tokens_left[slot] = lengths[head]
                enqueued_at[slot] = noticed_at[head]
                head += 1
                prefilling += 1
        duration = 0.0
        decoding = False
        for slot in range(max_batch_size):
            if request[slot] >= 0:
                if chunks_left[slot] > 0:
                    duration += prefill_time / chunks
                else:
                    decoding = True
        duration = max(duration, itl if decoding else 1.0, 1.0)
        for slot in range(max_batch_size):
            if request[slot] >= 0 and chunks_left[slot] == 0 and tokens_left[slot] < lengths[request[slot]] - 1:
                itl_sum += duration
                itl_count += 1
        t += duration
        started = True
    return completed, first_tokens, itl_sum, itl_count


def run_all(scenarios, threads):
    """Completed requests of all scenarios, on threads; each is the arguments of `simulate` up to the time limit."""
    from concurrent.futures import ThreadPoolExecutor

    def task(part):
        total = 0
        for arguments in part:
            size = arguments[5].size
            slots = tuple(np.zeros(arguments[1], kind) for kind in (np.int64, np.int64, np.float64, np.int64))
            total += simulate(*arguments, np.empty(size), np.empty(size), slots)[0]
        return total

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(task, [scenarios[i::threads] for i in range(threads)]))
