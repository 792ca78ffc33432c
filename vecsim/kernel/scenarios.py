"""What Python calls: draw streams, run scenarios. Each call does a range of rows on one thread, without the GIL.

Several threads call at the same time with ranges of their own and scratch of their own, so results
depend neither on their number nor on how the rows are cut. (Python threads take the next small range when they are
free, where `prange` cuts the work in equal shares; and they need neither `parallel=True` nor OpenMP.)
"""

import numpy as np

from vecsim import lengths as length_rules
from vecsim import load as arrival_rules
from vecsim.kernel import streams
from vecsim.kernel.address import call_tick_loop
from vecsim.kernel.calendar import ring_size
from vecsim.kernel.jit import entry, inner
from vecsim.kernel.state import DONE, INTERRUPTED, OUT_OF_REQUESTS, RECORDED, REFUSED, Outcome, Requests
from vecsim.kernel.tally import first_at_or_after, tally
from vecsim.kernel.tick import simulate

CLOSED = arrival_rules.CLOSED
RENEWAL = arrival_rules.RENEWAL
TRACED = arrival_rules.TRACED

output_tokens = inner(length_rules.output_tokens)
arrival_time = inner(arrival_rules.arrival_time)


@entry
def draw_lengths(first, last, parameters, tables, lengths, stop):
    """Fill the length streams [first, last)."""
    for row in range(first, last):
        if stop[0]:
            return
        out = lengths.values[lengths.start[row] : lengths.start[row] + lengths.size[row]]
        offset = parameters.offset[row]
        units = np.zeros(offset + out.size)
        streams.standard(parameters.draws[row], parameters.seed[row], units)
        begin = parameters.table_start[row]
        table = tables[begin : begin + parameters.table_size[row]]
        code, a, b = parameters.code[row], parameters.a[row], parameters.b[row]
        longest = 0
        for i in range(out.size):
            length = output_tokens(code, a, b, table, offset + i, units[offset + i])
            out[i] = length
            longest = max(longest, length)
        lengths.longest[row] = longest


@entry
def draw_arrivals(first, last, parameters, recorded, arrivals, stop):
    """Fill the arrival streams [first, last): instants of renewal processes of rate 1, or recorded ones."""
    for row in range(first, last):
        if stop[0]:
            return
        out = arrivals.values[arrivals.start[row] : arrivals.start[row] + arrivals.size[row]]
        if parameters.draws[row] == RECORDED:
            begin = int(parameters.shape[row])
            for i in range(out.size):
                out[i] = recorded[begin + i] if begin + i < recorded.size else np.inf
            continue
        streams.gaps(parameters.draws[row], parameters.shape[row], parameters.seed[row], out)
        t = 0.0
        for i in range(out.size):
            t += out[i]
            out[i] = t


@inner
def fill_arrivals(code, request_rate, units, time_limit, out):
    """Due times of an open load before the limit, and an infinite one after them; returns how many."""
    n = out.size - 1
    if code in (RENEWAL, TRACED):
        for i in range(n):
            out[i] = arrival_time(RENEWAL, request_rate, i, units[i])
    else:
        for i in range(n):
            out[i] = arrival_time(code, request_rate, i, 0.0)
    n = first_at_or_after(out, n, time_limit)
    out[n] = np.inf
    return n


@inner
def same_arrivals(scenarios, row, other):
    """Whether two open loads are due at the same times, if they have room for as many."""
    return (
        scenarios.arrivals[row] == scenarios.arrivals[other]
        and scenarios.request_rate[row] == scenarios.request_rate[other]
        and scenarios.arrival_stream[row] == scenarios.arrival_stream[other]
    )


def make_run_rows(simulate):
    """`run_rows` around a function that calls a step loop."""

    @inner
    def run_rows(loop, first, last, job):
        """Run the scenarios [first, last): a row of metrics each.

        Parameters
        ----------
        loop : int or None
            The address of the step loop, for `simulate`.
        first, last : int
            Rows of the scenarios and of all results.
        job : Job

        Returns
        -------
        Outcome
            Of the last scenario; its boundaries and requests are still in `scratch`.
        """
        scenarios, arrivals, lengths, time_limit, warmup, quantiles, scratch, metrics, enqueued, status, stop = job
        outcome = Outcome(DONE, 0, 0, 0, 0, 0, 0, 0, 0.0)
        filled = -1  # the row that the due times in `scratch` are of
        filled_size = due = 0
        for row in range(first, last):
            closed = scenarios.arrivals[row] == CLOSED
            chunks = scenarios.total_prefill_chunks[row]
            stream = scenarios.length_stream[row]
            start = lengths.start[stream]
            drawn = min(lengths.size[stream], scratch.started_step.size)
            if closed:
                target = scenarios.requests[row]
            else:
                target = 0
                wanted = scenarios.requests[row]
                at = scenarios.arrival_stream[row]
                units = arrivals.values[arrivals.start[at] : arrivals.start[at] + arrivals.size[at]]
                available = min(drawn, units.size) if scenarios.arrivals[row] == RENEWAL else drawn
                room = scratch.arrived_at[: min(wanted, available) + 1]
                if filled < 0 or room.size != filled_size or not same_arrivals(scenarios, filled, row):
                    due = fill_arrivals(scenarios.arrivals[row], scenarios.request_rate[row], units, time_limit, room)
                    filled = row
                    filled_size = room.size
                if due == available < wanted:
                    status[row] = OUT_OF_REQUESTS
                    continue
                drawn = due
            requests = Requests(
                scratch.arrived_at,
                lengths.values[start : start + drawn],
                scratch.enqueued_step,
                scratch.started_step,
            )
            # Nothing further away than the last possible step needs a place in the ring.
            farthest = min(chunks + lengths.longest[stream], scratch.time.size)
            calendar = scratch.calendar[: ring_size(farthest)]
            outcome = simulate(
                loop,
                scenarios.batcher[row],
                scenarios.parameter[row],
                scenarios.max_batch_size[row],
                scenarios.prefill_time[row],
                scenarios.itl[row],
                chunks,
                target,
                time_limit,
                warmup,
                requests,
                scratch.time,
                calendar,
                scratch.prefill_sum,
                scratch.itl_samples,
                stop,
            )
            status[row] = outcome.status
            if outcome.status in (INTERRUPTED, REFUSED):
                break
            if outcome.status == OUT_OF_REQUESTS:
                continue
            enqueued[row] = outcome.enqueued
            tally(
                scenarios.max_batch_size[row],
                scenarios.itl[row],
                chunks,
                closed,
                warmup,
                requests,
                scratch,
                outcome,
                quantiles,
                metrics[row],
            )
        return outcome

    return run_rows


@inner
def by_code(loop, *arguments):
    """Call the step loop of a built-in batcher."""
    return simulate(*arguments)


@inner
def by_address(loop, *arguments):
    """Call the step loop at an address: see `vecsim.kernel.custom`."""
    return call_tick_loop(loop, arguments)


run_rows_by_code = make_run_rows(by_code)
run_rows_by_address = make_run_rows(by_address)


@entry
def run_scenarios(first, last, job):
    """Run the scenarios [first, last) of a `Job`, all of built-in batchers."""
    return run_rows_by_code(None, first, last, job)


@entry
def run_scenarios_by_address(loop, first, last, job):
    """Run scenarios with a step loop that is called by its address."""
    return run_rows_by_address(loop, first, last, job)
