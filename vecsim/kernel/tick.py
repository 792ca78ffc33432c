"""The step loop of the tick model: one scenario, O(1) a step whatever the batch size, O(1) a request.

Between two boundaries every request of the batch advances by one chunk or one token, and requests start
in the order of the queue. So the loop keeps counts alone. It files in the calendar when each admitted request
will have its first token and its end, and notes for each request the boundaries that enqueued and
admitted it; every instant follows from those two and the times of the boundaries (`vecsim.kernel.tally`).
"""

from typing import Any

import numpy as np

from vecsim.batching import BATCHERS
from vecsim.kernel.calendar import DECODE_BEGINS, ENDS, PREFILL_ENDS, file, take
from vecsim.kernel.jit import inner, unsigned
from vecsim.kernel.state import DONE, INTERRUPTED, OUT_OF_REQUESTS, REFUSED, Batch, Outcome
from vecsim.step_time import TickStepTime

duration = inner(TickStepTime.duration)

# Look for an interruption once in so many ticks.
WATCH = 65536.0


def make_simulate(admit, checked=False, jit=inner):
    """The step loop around one batcher's rule, which is compiled into it.

    A rule that isn't trusted is `checked`: asked only where a request is queued, and its answer looked at. Built-in
    rules are left alone, for that would cost the short steps of 4 slots a tenth.
    """

    @jit
    def simulate(
        batcher,
        parameter,
        max_batch_size,
        prefill_time,
        itl,
        chunks,
        target,
        time_limit,
        warmup,
        requests,
        time,
        calendar,
        prefill_sum,
        itl_samples,
        stop,
    ):
        """Run one scenario; `target` is the concurrency of a closed loop, 0 for an open load.

        What is called has chosen the rule already: `batcher`, its code, has no meaning any more.
        """
        arrived_at, output_tokens, enqueued_step, started_step = requests
        available = output_tokens.size
        chunk_time = prefill_time / chunks
        calendar[:] = 0
        prefill_sum[0] = 0.0
        itl_samples[0] = 0
        most_prefilling = 0
        enqueued = started = running = prefilling = max_queue = 0
        wanted: Any = 0
        t = 0.0
        step = 0
        status = DONE
        while t < time_limit and status == DONE:
            if stop[0]:
                status = INTERRUPTED
            # An inner loop, so that looking for an interruption costs the step nothing.
            pause = min(t + WATCH, time_limit)
            while t < pause:
                time[unsigned(step)] = t

                # Advance: what the step that just ended has changed.
                ending, prefill_ending, decode_beginning = take(calendar, step)
                running -= ending
                prefilling -= prefill_ending

                # Load
                if target > 0:
                    missing = max(target - running - (enqueued - started), 0)
                    if enqueued + missing > available:
                        status = OUT_OF_REQUESTS
                        break
                    for _ in range(missing):
                        enqueued_step[unsigned(enqueued)] = step
                        enqueued += 1
                else:
                    while arrived_at[unsigned(enqueued)] <= t:
                        enqueued_step[unsigned(enqueued)] = step
                        enqueued += 1

                # Admit
                queued = enqueued - started
                free = max_batch_size - running
                batch = Batch(
                    running=running,
                    prefilling=prefilling,
                    decoding=running - prefilling,
                    free=free,
                    queued=queued,
                    time=t,
                    waited=t - time[unsigned(enqueued_step[unsigned(started)])] if checked and queued > 0 else 0.0,
                    prefill_time=prefill_time,
                    itl=itl,
                    total_prefill_chunks=chunks,
                    parameter=parameter,
                )
                if checked:
                    wanted = np.int64(admit(batch) if queued > 0 else 0)
                    admitted = 0
                    if wanted != 0 and free > 0:
                        if unsigned(wanted) > unsigned(free):
                            status = REFUSED
                            break
                        admitted = min(wanted, queued)
                else:
                    admitted = admit(batch)
                if admitted > 0:
                    running += admitted
                    prefilling += admitted
                    for request in range(started, started + admitted):
                        length = int(output_tokens[unsigned(request)])
                        started_step[unsigned(request)] = step
                        # What lies beyond the ring lies beyond the run.
                        if chunks + length <= calendar.size:
                            file(calendar, step + chunks + length - 1, ENDS)
                        if chunks < calendar.size:
                            file(calendar, step + chunks, PREFILL_ENDS + DECODE_BEGINS * (length > 1))
                    started += admitted
                    while most_prefilling < prefilling:
                        prefill_sum[most_prefilling + 1] = prefill_sum[most_prefilling] + chunk_time
                        most_prefilling += 1
                        itl_samples[most_prefilling] = 0

                # Observe
                decoding = running - prefilling
                if t >= warmup:
                    max_queue = max(max_queue, enqueued - started)
                    itl_samples[unsigned(prefilling)] += decoding - decode_beginning

                # Step
                t += duration(prefill_sum[unsigned(prefilling)], itl if decoding > 0 else 0.0)
                step += 1
        time[unsigned(step)] = t
        return Outcome(
            status=status,
            steps=step,
            enqueued=enqueued,
            started=started,
            running=running,
            admitted=wanted,
            most_prefilling=most_prefilling,
            max_queue=max_queue,
            end_time=t,
        )

    return simulate


def make_dispatch(rules):
    """A function that runs the step loop of the batcher with a given code; the choice is made once a scenario."""
    first = make_simulate(inner(rules[0]))
    if len(rules) == 1:
        return first
    others = make_dispatch(rules[1:])

    @inner
    def dispatch(batcher, *arguments):
        if batcher == 0:
            return first(batcher, *arguments)
        return others(batcher - 1, *arguments)

    return dispatch


simulate = make_dispatch([batcher.admit for batcher in BATCHERS])
