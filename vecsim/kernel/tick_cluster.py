"""The tick model's cluster: workers behind a router, each an engine of `vecsim.kernel.tick` with a clock of its own.

O(1) a step of a worker with a request and O(1) a request, O(log workers) where the order of the workers' boundaries
matters. Requests are numbered through; those of a worker are a chain in the order of its queue. They start in that
order, so they have their first tokens in it too. Ends are filed by step in a ring of each worker. Nothing is kept of a
boundary: an idle worker passes over its ticks at once (`advance`), and is left behind until a request is sent to it.
"""

import numpy as np

from vecsim.batching import BATCHERS
from vecsim.kernel import tree
from vecsim.kernel.address import call_router, call_tick_rule
from vecsim.kernel.calendar import ring_size
from vecsim.kernel.jit import bare, entry, inlined, inner, unsigned, whole
from vecsim.kernel.record import assign_slots
from vecsim.kernel.routing import (
    ABLE,
    DECODE_BLOCKS,
    HIT_BLOCKS,
    KV_USE,
    LEAST_OUTSTANDING,
    OUTSTANDING,
    OWN,
    PREFILL_BLOCKS,
    RANDOM,
    ROUND_ROBIN,
    RUNS,
    WAITS,
    one_of,
)
from vecsim.kernel.scenarios import fill_arrivals, same_arrivals
from vecsim.kernel.state import (
    DONE,
    INTERRUPTED,
    OUT_OF_REQUESTS,
    REFUSED,
    Batch,
    ClusterOutcome,
    ClusterSetting,
    RouterView,
)
from vecsim.kernel.tally import (
    LATENCIES,
    first_at_or_after,
    no_latencies,
    note_latencies,
    tally_itl,
    write_noted,
)
from vecsim.kernel.tick import duration
from vecsim.kernel.tick_disaggregated import ENDLESS, advance
from vecsim.load import CLOSED, RENEWAL

# Columns of the fleets and of their groups of workers, in the order of `vecsim.tick_fleets`; a rule is that of the
# user's own, as its place among the table's, -1 if there is none
FIRST_GROUP, GROUPS, WORKERS, ROUTER, ROUTER_RULE = range(5)
GROUP_WORKERS, GROUP_SLOTS, GROUP_BATCHER, GROUP_PARAMETER, GROUP_RULE = range(5)

# Columns of `scratch.counts` [worker]: slots; its batcher, and the address of a rule of the user's own; the step that
# begins at the clock; requests in the batch, those of them in prefill, and those in the queue; step of the next first
# token; the latest request that was sent there, noticed, started, had its first token (or the head of the chain);
# requests sent and ended; largest queue, sum of the queues and first step since the end of the warm-up
SLOTS, BATCHER, RULE, STEP, IN_BATCH, IN_PREFILL, IN_QUEUE, FIRST_DUE = range(8)
SENT_LAST, NOTICED, STARTED, HAD_FIRST, SENT, ENDED, MAX_QUEUE, QUEUES, MEASURED_FROM, COUNTS = range(8, 18)

# Columns of `scratch.times` [worker]: the next boundary, the first one from the end of the warm-up on, and the number
# that the batcher has
CLOCK, BEGIN, PARAMETER, TIMES = range(4)

# Places of `scratch.totals`: requests that came and that ended, the router's turn, most requests in prefill at a time,
# what a rule returned that was refused, and for which worker
CAME, GONE, TURN, MOST_PREFILLING, ADMITTED, REFUSED_AT, TOTALS = range(7)


def make_choose(rules):
    """A function that asks the rule of the batcher with a given code."""
    first = inlined(rules[0])
    if len(rules) == 1:

        @inlined
        def last(batcher, batch):
            return first(batch)

        return last
    others = make_choose(rules[1:])

    @inlined
    def choose(batcher, batch):
        return first(batch) if batcher == 0 else others(batcher - 1, batch)

    return choose


choose = make_choose([batcher.admit for batcher in BATCHERS])


@inlined
def is_idle(counts, following, worker):
    """Whether a worker has no request."""
    w = unsigned(worker)
    return counts[w, IN_BATCH] == 0 and counts[w, IN_QUEUE] == 0 and following[unsigned(counts[w, NOTICED])] < 0


@bare
def pass_over(t, step, begin, measured_from, limit, warmup):
    """Make the steps of an idle worker until a limit, one tick each. O(log t)."""
    if t < warmup:
        t, made = advance(t, 1.0, ENDLESS, min(limit, warmup))
        step += made
    if measured_from < 0 and t >= warmup:
        begin, measured_from = t, step
    t, made = advance(t, 1.0, ENDLESS, limit)
    return t, step + made, begin, measured_from


@inlined
def wake(worker, by, t, setting, scratch):
    """Bring an idle worker to its first boundary after the one at `t` of worker `by`; of one instant by number."""
    w = unsigned(worker)
    counts, times = scratch.counts, scratch.times
    clock, step, begin, measured_from = pass_over(
        times[w, CLOCK], counts[w, STEP], times[w, BEGIN], counts[w, MEASURED_FROM], t, setting.warmup
    )
    if clock == t and worker < by:
        clock += 1.0
        step += 1
    times[w, CLOCK], times[w, BEGIN] = clock, begin
    counts[w, STEP], counts[w, MEASURED_FROM] = step, measured_from


@inlined
def route(request, t, setting, scratch):
    """The worker for a request; draws and ties as in `vecsim.kernel.routing`. O(log workers)."""
    workers, code = setting.workers, setting.router
    if workers == 1:
        return whole(0)
    if code == ROUND_ROBIN:
        turn = scratch.totals[TURN]
        scratch.totals[TURN] = turn + 1
        return whole(turn % workers)
    if code == LEAST_OUTSTANDING:
        return whole(tree.first(scratch.loads))
    if code == OWN:
        return route_own(request, t, setting, scratch)
    draw = 4 * request
    one = whole(one_of(setting.seed, draw, workers))
    if code == RANDOM:
        return one
    other = whole(one_of(setting.seed, draw + 1, workers - 1))
    other += other >= one
    counts = scratch.counts
    outstanding = counts[unsigned(one), SENT] - counts[unsigned(one), ENDED]
    return one if outstanding <= counts[unsigned(other), SENT] - counts[unsigned(other), ENDED] else other


@bare
def route_own(request, t, setting, scratch):
    """What the user's own rule chooses, the first worker where there is none such. O(workers)."""
    rows, counts, workers = scratch.survey, scratch.counts, setting.workers
    for worker in range(workers):
        w = unsigned(worker)
        outstanding = counts[w, SENT] - counts[w, ENDED]
        rows[OUTSTANDING, w] = outstanding
        rows[RUNS, w] = counts[w, IN_BATCH]
        rows[WAITS, w] = outstanding - counts[w, IN_BATCH]
    chosen = call_router(
        setting.router_rule,
        (
            RouterView(
                rows[ABLE, :workers],
                rows[OUTSTANDING, :workers],
                rows[WAITS, :workers],
                rows[RUNS, :workers],
                rows[KV_USE, :workers],
                rows[HIT_BLOCKS, :workers],
                rows[PREFILL_BLOCKS, :workers],
                rows[DECODE_BLOCKS, :workers],
                whole(0),
                whole(0),
                whole(-1),
                whole(request),
                t,
            ),
        ),
    )
    return whole(chosen) if 0 <= chosen < workers else whole(0)


@inlined
def send(request, worker, scratch):
    """Put a request at the end of a worker's chain."""
    r, w = unsigned(request), unsigned(worker)
    counts = scratch.counts
    scratch.following[unsigned(counts[w, SENT_LAST])] = request
    scratch.following[r] = -1
    counts[w, SENT_LAST] = request
    counts[w, SENT] += 1
    scratch.worker[r] = worker
    scratch.enqueued_at[r] = scratch.started_at[r] = scratch.first_token_at[r] = scratch.left_at[r] = np.inf


@inlined
def create(by, t, missing, setting, scratch):
    """Have the missing requests of a closed loop come at a boundary of worker `by`; returns the status."""
    counts = scratch.counts
    if scratch.totals[CAME] + missing > setting.available:
        return OUT_OF_REQUESTS
    for _ in range(missing):
        request = scratch.totals[CAME]
        scratch.totals[CAME] = request + 1
        scratch.arrived_at[unsigned(request)] = t
        worker = route(request, t, setting, scratch)
        w = unsigned(worker)
        if worker != by and is_idle(counts, scratch.following, worker):
            wake(worker, by, t, setting, scratch)
            tree.put(scratch.clocks, worker, scratch.times[w, CLOCK])
        send(request, worker, scratch)
        tree.put(scratch.loads, worker, float(counts[w, SENT] - counts[w, ENDED]))
    return DONE


@inlined
def go_on(worker, until, setting, output_tokens, scratch):
    """Process a worker's boundaries before a time; returns the status. O(1) a step and a request.

    What was sent there until then is in its chain. A worker that becomes idle is left there, but at the end of the run.
    """
    w = unsigned(worker)
    # Taken out of the tuples once
    counts, times, totals = scratch.counts, scratch.times, scratch.totals
    ring, following, next_ending = scratch.ring, scratch.following, scratch.next_ending
    arrived_at, enqueued_at, started_at = scratch.arrived_at, scratch.enqueued_at, scratch.started_at
    first_token_at, left_at, started_step = scratch.first_token_at, scratch.left_at, scratch.started_step
    prefill_sum, itl_samples, stop = scratch.prefill_sum, scratch.itl_samples, setting.stop
    prefill_time, itl, chunks = setting.prefill_time, setting.itl, setting.chunks
    chunk_time = prefill_time / chunks
    warmup, time_limit, target = setting.warmup, setting.time_limit, setting.target
    ring_of, size = worker * setting.ring, setting.ring
    slots, batcher, rule = counts[w, SLOTS], counts[w, BATCHER], counts[w, RULE]
    parameter = times[w, PARAMETER]
    t, begin, step, measured_from = times[w, CLOCK], times[w, BEGIN], counts[w, STEP], counts[w, MEASURED_FROM]
    running, prefilling, queued = counts[w, IN_BATCH], counts[w, IN_PREFILL], counts[w, IN_QUEUE]
    noticed, started, had_first = counts[w, NOTICED], counts[w, STARTED], counts[w, HAD_FIRST]
    first_due, gone = counts[w, FIRST_DUE], counts[w, ENDED]
    max_queue, queues = counts[w, MAX_QUEUE], counts[w, QUEUES]
    next_request = following[unsigned(noticed)]
    due = arrived_at[unsigned(next_request)] if next_request >= 0 else np.inf
    status = DONE
    while t < until:
        if stop[0]:
            status = INTERRUPTED
            break
        if measured_from < 0 and t >= warmup:
            begin, measured_from = t, step
        missing = target - (totals[CAME] - totals[GONE])  # of a closed loop
        if running == 0 and queued == 0 and due > t and missing <= 0:
            if due == np.inf and until < time_limit:
                break
            t, step, begin, measured_from = pass_over(t, step, begin, measured_from, min(due, until), warmup)
            continue

        # Advance: what the step that just ended has changed.
        place = unsigned(ring_of + (step & (size - 1)))
        ending = ring[place]
        if ending > 0:
            ring[place] = 0
            before = gone
            while ending > 0:
                left_at[unsigned(ending - 1)] = t
                ending = next_ending[unsigned(ending - 1)]
                gone += 1
            running -= gone - before
            totals[GONE] += gone - before
        beginning = 0
        while first_due == step:
            had_first = whole(following[unsigned(had_first)])
            first_token_at[unsigned(had_first)] = t
            prefilling -= 1
            beginning += output_tokens[unsigned(had_first)] > 1
            first_due = ENDLESS
            if had_first != started:
                first_due = whole(started_step[unsigned(following[unsigned(had_first)])]) + chunks

        # Load
        if target > 0:
            missing = target - (totals[CAME] - totals[GONE])
        if missing > 0:
            counts[w, ENDED], counts[w, IN_BATCH] = gone, running
            tree.put(scratch.loads, worker, float(counts[w, SENT] - gone))
            status = create(worker, t, missing, setting, scratch)
            if status != DONE:
                break
            next_request = following[unsigned(noticed)]
            due = arrived_at[unsigned(next_request)] if next_request >= 0 else np.inf
        while due <= t:
            noticed = whole(following[unsigned(noticed)])
            enqueued_at[unsigned(noticed)] = t
            queued += 1
            next_request = following[unsigned(noticed)]
            due = arrived_at[unsigned(next_request)] if next_request >= 0 else np.inf

        # Admit
        if queued > 0:
            free = slots - running
            admitted = whole(0)
            batch = Batch(
                running=running,
                prefilling=prefilling,
                decoding=running - prefilling,
                free=free,
                queued=queued,
                time=t,
                waited=t - enqueued_at[unsigned(following[unsigned(started)])] if rule != 0 else 0.0,
                prefill_time=prefill_time,
                itl=itl,
                total_prefill_chunks=chunks,
                parameter=parameter,
            )
            if rule == 0:
                admitted = whole(choose(batcher, batch))
            else:
                wanted = call_tick_rule(rule, (batch,))
                if wanted != 0 and free > 0:
                    if unsigned(wanted) > unsigned(free):
                        totals[ADMITTED], totals[REFUSED_AT] = wanted, worker
                        status = REFUSED
                        break
                    admitted = min(wanted, queued)
            if admitted > 0:
                if had_first == started:
                    first_due = step + chunks
                for _ in range(admitted):
                    started = whole(following[unsigned(started)])
                    started_at[unsigned(started)] = t
                    started_step[unsigned(started)] = step
                    length = whole(output_tokens[unsigned(started)])
                    # What lies beyond the ring lies beyond the run.
                    if chunks + length <= size:
                        place = unsigned(ring_of + ((step + chunks + length - 1) & (size - 1)))
                        next_ending[unsigned(started)] = ring[place]
                        ring[place] = started + 1
                running += admitted
                prefilling += admitted
                queued -= admitted
                while totals[MOST_PREFILLING] < prefilling:
                    most = unsigned(totals[MOST_PREFILLING])
                    prefill_sum[most + unsigned(1)] = prefill_sum[most] + chunk_time
                    itl_samples[most + unsigned(1)] = 0
                    totals[MOST_PREFILLING] += 1

        # Observe
        decoding = running - prefilling
        if t >= warmup:
            max_queue = max(max_queue, queued)
            queues += queued
            itl_samples[unsigned(prefilling)] += decoding - beginning

        # Step
        t += duration(prefill_sum[unsigned(prefilling)], itl if decoding > 0 else 0.0)
        step += 1
    times[w, CLOCK], times[w, BEGIN], counts[w, STEP], counts[w, MEASURED_FROM] = t, begin, step, measured_from
    counts[w, IN_BATCH], counts[w, IN_PREFILL], counts[w, IN_QUEUE] = running, prefilling, queued
    counts[w, NOTICED], counts[w, STARTED], counts[w, HAD_FIRST] = noticed, started, had_first
    counts[w, FIRST_DUE], counts[w, ENDED] = first_due, gone
    counts[w, MAX_QUEUE], counts[w, QUEUES] = max_queue, queues
    return status


@bare
def simulate_cluster(setting, output_tokens, scratch):
    """Run one scenario; returns the status. `setting.available` requests of an open load are due.

    What it calls is compiled into it, in one place each: to pass all these arrays on takes longer than a step.
    """
    clocks, loads, counts = scratch.clocks, scratch.loads, scratch.counts
    workers, time_limit, due = setting.workers, setting.time_limit, setting.available
    closed = setting.target > 0
    blind = setting.router in (ROUND_ROBIN, RANDOM) or workers == 1
    if closed:
        tree.put(clocks, 0, 0.0)  # the boundary at which the first requests come
    status = DONE
    sent = ended = whole(0)
    while status == DONE:
        if closed and clocks[1] < time_limit:
            worker = whole(tree.first(clocks))
            until = clocks[1] + 0.5  # one boundary: steps take a tick or more
        elif not closed and sent < due and (blind or not clocks[1] < scratch.arrived_at[unsigned(sent)]):
            t = scratch.arrived_at[unsigned(sent)]
            worker = route(sent, t, setting, scratch)
            w = unsigned(worker)
            send(sent, worker, scratch)
            sent += 1
            scratch.totals[CAME] = sent
            if not blind:
                tree.put(clocks, worker, scratch.times[w, CLOCK])
                tree.put(loads, worker, float(counts[w, SENT] - counts[w, ENDED]))
            continue
        elif not closed and sent < due:
            worker = whole(tree.first(clocks))
            until = scratch.arrived_at[unsigned(sent)]
        elif ended < workers:
            worker = ended
            until = time_limit
            ended += 1
        else:
            break
        status = go_on(worker, until, setting, output_tokens, scratch)
        w = unsigned(worker)
        idle = is_idle(counts, scratch.following, worker)
        tree.put(clocks, worker, np.inf if idle else scratch.times[w, CLOCK])
        tree.put(loads, worker, float(counts[w, SENT] - counts[w, ENDED]))
    return status


@bare
def begin_cluster(setting, first_group, groups, rules, scratch):
    """Empty workers. O(workers x ring)."""
    counts, times = scratch.counts, scratch.times
    scratch.ring[: setting.workers * setting.ring] = 0
    scratch.totals[:] = 0
    scratch.prefill_sum[0] = 0.0
    scratch.itl_samples[0] = 0
    tree.clear(scratch.clocks)
    tree.clear(scratch.loads)
    group, left = first_group - 1, whole(0)
    for worker in range(setting.workers):
        while left == 0:
            group += 1
            left = whole(groups[unsigned(group), GROUP_WORKERS])
        left -= 1
        w, g = unsigned(worker), unsigned(group)
        head = scratch.started_step.size + worker  # of its chain, after all requests
        counts[w, :] = 0
        counts[w, SLOTS] = whole(groups[g, GROUP_SLOTS])
        counts[w, BATCHER] = whole(groups[g, GROUP_BATCHER])
        rule = whole(groups[g, GROUP_RULE])
        counts[w, RULE] = rules[unsigned(rule)] if rule >= 0 else 0
        counts[w, FIRST_DUE] = ENDLESS
        counts[w, SENT_LAST] = counts[w, NOTICED] = counts[w, STARTED] = counts[w, HAD_FIRST] = head
        counts[w, MEASURED_FROM] = -1
        scratch.following[unsigned(head)] = -1
        times[w, CLOCK] = times[w, BEGIN] = 0.0
        times[w, PARAMETER] = groups[g, GROUP_PARAMETER]
        tree.put(scratch.loads, worker, 0.0)


@inner
def tally_cluster(setting, output_tokens, scratch, wanted, out):
    """Write the row of metrics of one scenario: the order of `vecsim.variables.TICK_VARIABLES`.

    Returns how many requests came until the last one that was noticed.
    """
    counts, times, came = scratch.counts, scratch.times, scratch.totals[CAME]
    chunks, warmup = setting.chunks, setting.warmup
    end_time = slot_time = mean_queue = 0.0
    measured_steps = final_queue = max_queue = 0
    for worker in range(setting.workers):
        w = unsigned(worker)
        end = times[w, CLOCK]
        if counts[w, MEASURED_FROM] < 0:
            counts[w, MEASURED_FROM] = counts[w, STEP]
            times[w, BEGIN] = end
        steps = counts[w, STEP] - counts[w, MEASURED_FROM]
        measured_steps += steps
        end_time = max(end_time, end)
        slot_time += counts[w, SLOTS] * (end - times[w, BEGIN])
        mean_queue += counts[w, QUEUES] / steps if steps > 0 else 0.0
        max_queue = max(max_queue, counts[w, MAX_QUEUE])
        final_queue += counts[w, IN_QUEUE]

    # In a closed loop too requests come in the order of their numbers.
    first_request = first_at_or_after(scratch.arrived_at, came, warmup)
    values = scratch.values
    totals = no_latencies()
    busy = 0.0
    arrived = tokens = entered = 0
    # Taken out of the tuple once, for each access to it would count references.
    queued, starts, firsts, ends = scratch.enqueued_at, scratch.started_at, scratch.first_token_at, scratch.left_at
    worker_of, started_step = scratch.worker, scratch.started_step
    for i in range(came):
        request = unsigned(i)
        enqueued_at, started_at, first, left = queued[request], starts[request], firsts[request], ends[request]
        if enqueued_at == np.inf:
            continue
        entered = i + 1
        arrived += i >= first_request
        if started_at == np.inf:
            continue
        w = unsigned(worker_of[request])
        length = whole(output_tokens[request])
        busy += max(min(left, times[w, CLOCK]) - max(started_at, times[w, BEGIN]), 0.0)
        if i < first_request:
            continue
        note_latencies(values, totals, enqueued_at, started_at, first, left, length)
        if left < np.inf:
            tokens += length
        elif first < np.inf:
            tokens += counts[w, STEP] - (started_step[request] + chunks)

    stats = wanted.size + 2
    completed, first_tokens, _, begun = write_noted(values, totals, wanted, scratch, out)
    at = LATENCIES * stats
    most_prefilling = scratch.totals[MOST_PREFILLING]
    itl_samples = tally_itl(
        setting.itl,
        scratch.prefill_sum[: most_prefilling + 1],
        scratch.itl_samples[: most_prefilling + 1],
        wanted,
        out[at : at + stats],
    )
    at += stats
    measured_time = end_time - warmup
    out[at] = arrived
    out[at + 1] = begun
    out[at + 2] = first_tokens
    out[at + 3] = completed
    out[at + 4] = itl_samples
    out[at + 5] = 1000.0 * completed / measured_time
    out[at + 6] = 1000.0 * tokens / measured_time
    out[at + 7] = final_queue
    out[at + 8] = mean_queue if measured_steps > 0 else np.nan
    out[at + 9] = max_queue
    out[at + 10] = busy / slot_time if slot_time > 0.0 else np.nan
    out[at + 11] = end_time
    out[at + 12] = measured_steps
    return entered


@entry
def run_clusters(first, last, job, fleets, groups, rules):
    """Run the scenarios [first, last) of a `Job`: a row of metrics each; returns the outcome of the last.

    Parameters
    ----------
    first, last : int
        Rows of the scenarios and of all results.
    job : Job
    fleets, groups : array
        [fleet, column], [group, column]: see above.
    rules : array
        [rule] Addresses of the user's own, those of batchers and of routers.
    """
    scenarios, arrivals, lengths, time_limit, warmup, quantiles, scratch, metrics, enqueued, status, stop = job
    outcome = ClusterOutcome(DONE, 0, 0, 0)
    filled = -1  # the row that the due times in `scratch` are of
    filled_size = due = 0
    for row in range(first, last):
        closed = scenarios.arrivals[row] == CLOSED
        chunks = scenarios.total_prefill_chunks[row]
        stream = scenarios.length_stream[row]
        start = lengths.start[stream]
        available = min(lengths.size[stream], scratch.started_step.size)
        if closed:
            filled = -1  # it has its own times there
        else:
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
            available = due
        fleet = fleets[scenarios.fleet[row]]
        router_rule = whole(fleet[ROUTER_RULE])
        setting = ClusterSetting(
            workers=whole(fleet[WORKERS]),
            router=whole(fleet[ROUTER]),
            router_rule=rules[router_rule] if router_rule >= 0 else 0,
            seed=scenarios.seed[row],
            prefill_time=scenarios.prefill_time[row],
            itl=scenarios.itl[row],
            chunks=chunks,
            target=scenarios.requests[row] if closed else 0,
            available=available,
            time_limit=time_limit,
            warmup=warmup,
            # Nothing further away than the last possible step needs a place in the ring.
            ring=ring_size(min(chunks + lengths.longest[stream], scratch.most_steps[0])),
            stop=stop,
        )
        output_tokens = lengths.values[start : start + available]
        begin_cluster(setting, whole(fleet[FIRST_GROUP]), groups, rules, scratch)
        status[row] = simulate_cluster(setting, output_tokens, scratch)
        outcome = ClusterOutcome(status[row], scratch.totals[CAME], 0, setting.workers)
        if status[row] in (INTERRUPTED, REFUSED):
            break
        if status[row] == OUT_OF_REQUESTS:
            continue
        enqueued[row] = tally_cluster(setting, output_tokens, scratch, quantiles, metrics[row])
        outcome = ClusterOutcome(DONE, scratch.totals[CAME], enqueued[row], setting.workers)
    return outcome


@entry
def write_cluster_record(row, scenarios, lengths, scratch, outcome, record):
    """Write the row of the scenario that `run_clusters` has just run in `scratch`; slots are those of each worker."""
    chunks = scenarios.total_prefill_chunks[row]
    begin = lengths.start[scenarios.length_stream[row]]
    for i in range(outcome.entered):
        record.arrived_at[row, i] = scratch.arrived_at[i]
        record.output_tokens[row, i] = lengths.values[begin + i]
        record.worker[row, i] = scratch.worker[i]
        if scratch.enqueued_at[i] < np.inf:
            record.enqueued_at[row, i] = scratch.enqueued_at[i]
        if scratch.started_at[i] < np.inf:
            record.started_at[row, i] = scratch.started_at[i]
        if scratch.first_token_at[i] < np.inf:
            record.first_token_at[row, i] = scratch.first_token_at[i]
        if scratch.left_at[i] < np.inf:
            record.completed_at[row, i] = scratch.left_at[i]
    requests = scratch.started_step.size
    for worker in range(outcome.workers):
        steps = scratch.counts[worker, STEP]
        started = 0
        request = scratch.following[requests + worker]
        while request >= 0 and scratch.started_at[request] < np.inf:
            started += 1
            request = scratch.following[request]
        own, started_step = np.empty(started, np.int64), np.empty(started, np.int64)
        end_step, slot = np.empty(started, np.int64), np.empty(started, np.int64)
        request = scratch.following[requests + worker]
        for i in range(started):
            own[i] = request
            started_step[i] = scratch.started_step[request]
            end_step[i] = started_step[i] + chunks + lengths.values[begin + request] - 1
            request = scratch.following[request]
        assign_slots(started_step, end_step, steps, scratch.counts[worker, SLOTS], slot)
        for i in range(started):
            record.slot[row, own[i]] = slot[i]


@entry
def write_cluster_queue(row, instants, scratch, outcome, queue):
    """Write the requests in all queues at ascending instants of the scenario that was just run."""
    change = np.zeros(instants.size + 1, np.int64)
    for i in range(outcome.came):
        if scratch.enqueued_at[i] < np.inf:
            change[first_at_or_after(instants, instants.size, scratch.enqueued_at[i])] += 1
        if scratch.started_at[i] < np.inf:
            change[first_at_or_after(instants, instants.size, scratch.started_at[i])] -= 1
    waiting = 0
    for i in range(instants.size):
        waiting += change[i]
        queue[row, i] = waiting
