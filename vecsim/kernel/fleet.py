"""The event loop of a fleet: many engines, each with a clock of its own, behind a router. O(log workers) an event.

Each worker runs the step loop of `vecsim.kernel.token`, called by its address, from one boundary until the next thing
that may concern it: who it serves, and what a step does, is decided there alone. What a step does is known when it
begins; others learn of it when it ends. Ties go: arrivals, then boundaries of workers in their order.
"""

import numpy as np

from vecsim.kernel import tree
from vecsim.kernel.address import call_token_loop
from vecsim.kernel.heap import pop
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned
from vecsim.kernel.kv import FREE
from vecsim.kernel.routing import LEAST_KV, load_of, route
from vecsim.kernel.state import (
    BEGINS,
    COASTING,
    DONE,
    GOES_ON,
    IDLE,
    INTERRUPTED,
    OUT_OF_REQUESTS,
    STOPS,
    TOO_LONG,
    Cache,
    TokenLoad,
    TokenWork,
)
from vecsim.kernel.token import MOST_STEPS, forget_steps, issue, never_fits, report, reset_requests
from vecsim.kernel.token_scenarios import memory_of, model_of, policy_of
from vecsim.kernel.token_state import (
    ALL_STEPS,
    ARRIVALS,
    BACKLOG,
    BUSY,
    COMING,
    COMPUTED,
    DECODE,
    DROPPED,
    DROPPED_AT_ONCE,
    END_TIME,
    ENDED,
    ENQUEUED,
    FORESEEN,
    GAP_BINS,
    GAP_HIGH,
    GAP_LOW,
    GAP_MAX,
    GAP_SUM,
    GAPS,
    GENERATED,
    HIT_TOKENS,
    HORIZON,
    INBOX_HEAD,
    ISSUED,
    LONGEST,
    MAX_QUEUE,
    MEASURING,
    NOW,
    PEAK,
    PREEMPTED,
    PROMPT_TOKENS,
    REPORTED,
    RUNNING,
    SCHEDULED,
    SINCE,
    STATE,
    STEP,
    STEPS,
    TOKENS,
    USED,
    WAITING,
    blocks_for,
    put_last,
)

# What counts references to arrays it returns would leave them counted here, where nobody does.
tables_of = inlined(model_of.py_func)

# Look for an interruption once in so many events
WATCH = 1 << 12


@inlined
def view(fleet, work, worker, gaps):
    """What one worker works in: its own rows, and the requests of all."""
    w = unsigned(worker)
    return TokenWork(
        fleet.counts[w],
        fleet.sums[w],
        gaps,
        work.own,
        work.times,
        fleet.first[w],
        fleet.unclip[w],
        fleet.residues[w],
        fleet.prefills[w],
        fleet.chunk_of[w],
        fleet.chunk_tokens[w],
        fleet.stack[w],
        work.coming,
        fleet.ended[w],
        fleet.joined[w],
        fleet.joined_at[w],
        fleet.newcomers[w],
        fleet.late[w],
        fleet.starving[w],
    )


@inlined
def visiting(load, kind, worker):
    """The load as a worker is given it: requests come by its inbox alone."""
    return TokenLoad(
        load.arrived_at,
        load.prompt_tokens,
        load.output_tokens,
        load.max_tokens,
        load.classes,
        load.follower[:0],
        load.think,
        load.urgency,
        load.ttft_limits,
        load.itl_limits,
        load.watches_gaps,
        0,
        kind,
        int(worker),
        False,
        load.think_time,
        load.before_queue,
        load.per_token,
        load.at_completion,
    )


@bare
def visit(
    step_loop, fleet, groups, tables, load, work, cache, record, worker, kind, until, warmup, stop, own_rule,
    own_duration, gaps,
):  # fmt: skip
    """Have a worker go on until a time; returns the status."""
    w = unsigned(worker)
    p = groups[unsigned(fleet.group[w])]
    memory = memory_of(p)
    its_cache = Cache(
        fleet.nodes[w], fleet.node_of[w], cache.owned, cache.own, cache.ids, cache.shared, cache.own_start
    )
    return call_token_loop(
        step_loop,
        (
            policy_of(p), memory, tables_of(p, tables), visiting(load, kind, worker), view(fleet, work, worker, gaps),
            its_cache, record, until, warmup, stop, own_rule, own_duration,
        ),
    )  # fmt: skip


@bare
def let_others_know(fleet, load, work, memory, worker, t):
    """A step has ended at `t`: send the next requests of those whose last one has ended in it."""
    w = unsigned(worker)
    own_counts = fleet.counts[w]
    status = DONE
    for i in range(own_counts[REPORTED], own_counts[ENDED]):
        request = int(fleet.ended[w, unsigned(i)])
        r = unsigned(request)
        seen = t + load.output_tokens[r] * load.per_token + load.at_completion
        if load.closed:
            if work.counts[ISSUED] == load.prompt_tokens.size:
                status = OUT_OF_REQUESTS
                break
            issue(work, load, work.counts[ISSUED], seen + load.think_time)
            work.counts[ISSUED] += 1
        elif load.follower.size > 0 and load.follower[r] >= 0:
            following = int(load.follower[r])
            fleet.bound[unsigned(following)] = worker
            issue(work, load, following, seen + load.think[unsigned(following)])
    report(view(fleet, work, worker, work.gaps), load, memory)
    return status


@bare
def send(fleet, router, groups, load, work, request, worker, t):
    """Put a request into the inbox of a worker that is at its first boundary from `t` on; wake it if it sleeps."""
    w, r = unsigned(worker), unsigned(request)
    own, own_counts = work.own, fleet.counts[w]
    memory = memory_of(groups[unsigned(fleet.group[w])])
    fleet.worker[r] = worker
    own[COMPUTED, r] = 0
    own[GENERATED, r] = 0
    work.times[SINCE, r] = t
    put_last(own_counts, own, INBOX_HEAD, request)
    fleet.sent[w] += 1
    fleet.sent_blocks[w] += blocks_for(int(load.prompt_tokens[r]), memory.block_size, memory.shift)
    tree.put(fleet.loads, worker, load_of(fleet, router, worker))
    fleet.sums[w, FORESEEN] = 0.0
    if fleet.clock[unsigned((fleet.clock.size >> 1) + worker)] == np.inf:
        fleet.sums[w, END_TIME] = t
    tree.put(fleet.clock, worker, fleet.sums[w, END_TIME])


@bare_entry
def simulate_fleet(
    step_loop, router, fleet, groups, tables, load, work, cache, record, time_limit, warmup, stop, own_rule,
    own_duration,
):  # fmt: skip
    """Run one scenario of a fleet; returns the status. Results stay in `fleet`, and in `work` as if of one engine.

    Parameters
    ----------
    step_loop : int
        Address of `vecsim.kernel.token.simulate`.
    router : Router
    fleet : Fleet
    groups : array
        [group, field] The numbers of each kind of worker, in the order of `vecsim.kernel.token_scenarios.FIELDS`.
    tables : StepModel
        The tables of step times of all kinds; its formula has no meaning.

    Others as for `vecsim.kernel.token.simulate`.
    """
    counts, sums, gaps, own, times = work.counts, work.sums, work.gaps, work.own, work.times
    requests = load.prompt_tokens.size
    workers = fleet.group.size
    stops = load.closed or load.follower.size > 0
    kind = STOPS if stops else GOES_ON

    gaps[counts[GAP_LOW] : counts[GAP_HIGH] + 1] = 0
    counts[:] = 0
    sums[:] = 0.0
    reset_requests(own, times, cache.owned, requests, cache.owned.size > 0)
    fleet.bound[:requests] = -1
    fleet.worker[:requests] = -1
    fleet.sent[:] = 0
    fleet.sent_blocks[:] = 0
    fleet.turn[0] = 0
    tree.clear(fleet.clock)
    tree.clear(fleet.loads)
    lazy = router.code != LEAST_KV
    for worker in range(workers):
        visit(
            step_loop, fleet, groups, tables, load, work, cache, record, worker, BEGINS, 0.0, warmup, stop, own_rule,
            own_duration, gaps,
        )  # fmt: skip
        fleet.blocks[unsigned(worker)] = fleet.counts[unsigned(worker), FREE]
        tree.put(fleet.loads, worker, 0.0)

    static = min(load.static, requests)
    counts[ISSUED] = static
    static_due = load.arrived_at[0] + load.before_queue if static > 0 else np.inf
    dynamic_due = np.inf
    all_steps = 0
    events = 0
    status = DONE
    while status == DONE:
        events += 1
        if events & (WATCH - 1) == 0 and stop[0]:
            status = INTERRUPTED
            break
        due = min(static_due, dynamic_due)
        t = fleet.clock[1]
        if due <= t:
            if due >= time_limit or due == np.inf:
                break
            t = due
            if static_due <= dynamic_due:
                request = int(counts[ARRIVALS])
                counts[ARRIVALS] += 1
                static_due = (
                    load.arrived_at[unsigned(request + 1)] + load.before_queue if request + 1 < static else np.inf
                )
            else:
                request = pop(work.coming, counts[COMING], times[SINCE], load.arrived_at)
                counts[COMING] -= 1
                dynamic_due = times[SINCE, unsigned(work.coming[0])] if counts[COMING] > 0 else np.inf
            r = unsigned(request)
            for group in range(groups.shape[0]):
                p = groups[unsigned(group)]
                fleet.fits[unsigned(group)] = not never_fits(
                    policy_of(p), memory_of(p), int(load.prompt_tokens[r]), int(load.output_tokens[r]),
                    int(load.max_tokens[r]),
                )  # fmt: skip
            worker = route(fleet, router, request, 0, workers, fleet.fits)
            if worker >= 0:
                w = unsigned(worker)
                if fleet.sums[w, FORESEEN] > fleet.sums[w, END_TIME]:
                    fleet.counts[w, ALL_STEPS] = all_steps
                    status = visit(
                        step_loop, fleet, groups, tables, load, work, cache, record, worker, kind, t, warmup, stop,
                        own_rule, own_duration, gaps if fleet.counts[w, MEASURING] else fleet.unmeasured,
                    )  # fmt: skip
                    all_steps = int(fleet.counts[w, ALL_STEPS])
                    if status != DONE:
                        break
                send(fleet, router, groups, load, work, request, worker, t)
                continue
            counts[ENQUEUED] += 1
            counts[DROPPED] += 1
            own[STATE, r] = DROPPED_AT_ONCE
            if load.closed:
                if counts[ISSUED] == requests:
                    status = OUT_OF_REQUESTS
                    break
                issue(work, load, counts[ISSUED], t + max(load.think_time, 1.0))
                counts[ISSUED] += 1
                dynamic_due = times[SINCE, unsigned(work.coming[0])]
            continue
        if t >= time_limit:
            break
        worker = tree.first(fleet.clock)
        w = unsigned(worker)
        if fleet.counts[w, REPORTED] < fleet.counts[w, ENDED] and stops:
            status = let_others_know(fleet, load, work, memory_of(groups[unsigned(fleet.group[w])]), worker, t)
            dynamic_due = times[SINCE, unsigned(work.coming[0])] if counts[COMING] > 0 else np.inf
            tree.put(fleet.loads, worker, load_of(fleet, router, worker))
            continue
        until = min(due, time_limit)
        measures = fleet.sums[w, END_TIME] >= warmup
        if measures and fleet.counts[w, MEASURING] == 0:
            if warmup > 0.0:
                forget_steps(fleet.counts[w], fleet.sums[w], fleet.unmeasured)
            fleet.counts[w, MEASURING] = 1
        if not measures:
            until = min(until, warmup)
        fleet.sums[w, HORIZON] = (time_limit if measures else min(time_limit, warmup)) if lazy else 0.0
        if stops:
            tree.put(fleet.clock, worker, np.inf)
            until = min(until, fleet.clock[1])
        fleet.counts[w, ALL_STEPS] = all_steps
        status = visit(
            step_loop, fleet, groups, tables, load, work, cache, record, worker, kind,
            max(until, np.nextafter(fleet.sums[w, END_TIME], np.inf)), warmup, stop, own_rule, own_duration,
            gaps if measures else fleet.unmeasured,
        )  # fmt: skip
        all_steps = int(fleet.counts[w, ALL_STEPS])
        after = fleet.sums[w, END_TIME]
        if status == IDLE:
            after = np.inf
            status = DONE
        elif status == COASTING:
            after = fleet.sums[w, FORESEEN]
            status = DONE
        elif status != DONE:
            sums[NOW], sums[LONGEST] = fleet.sums[w, NOW], fleet.sums[w, LONGEST]
        if fleet.counts[w, STEP] > MOST_STEPS:
            status = TOO_LONG
        tree.put(fleet.clock, worker, after)
        tree.put(fleet.loads, worker, load_of(fleet, router, worker))
    for worker in range(workers):
        w = unsigned(worker)
        if status == DONE and fleet.sums[w, FORESEEN] > fleet.sums[w, END_TIME]:
            fleet.counts[w, ALL_STEPS] = all_steps
            status = visit(
                step_loop, fleet, groups, tables, load, work, cache, record, worker, kind, time_limit, warmup, stop,
                own_rule, own_duration, gaps if fleet.counts[w, MEASURING] else fleet.unmeasured,
            )  # fmt: skip
            all_steps = int(fleet.counts[w, ALL_STEPS])
    gather(fleet, load, work, requests, warmup, time_limit, status)
    counts[ALL_STEPS] = all_steps
    return status


@bare
def gather(fleet, load, work, requests, warmup, time_limit, status):
    """Make the numbers of all workers those of one engine."""
    counts, sums, own = work.counts, work.sums, work.own
    counts[GAP_LOW] = GAP_BINS
    end = 0.0
    blocks = fleet.blocks.sum()
    for worker in range(fleet.group.size):
        w = unsigned(worker)
        its, its_sums = fleet.counts[w], fleet.sums[w]
        if its[MEASURING] == 0:
            forget_steps(its, its_sums, fleet.unmeasured)
        end = max(end, its_sums[END_TIME])
        counts[GAP_LOW] = min(counts[GAP_LOW], its[GAP_LOW])
        counts[GAP_HIGH] = max(counts[GAP_HIGH], its[GAP_HIGH])
        counts[GAPS] += its[GAPS]
        counts[WAITING] += its[WAITING]
        counts[RUNNING] += its[RUNNING]
        counts[PREEMPTED] += its[PREEMPTED]
        counts[ENQUEUED] += its[ENQUEUED]
        counts[STEPS] += its[STEPS]
        counts[SCHEDULED] += its[SCHEDULED]
        counts[TOKENS] += its[TOKENS]
        counts[PROMPT_TOKENS] += its[PROMPT_TOKENS]
        counts[HIT_TOKENS] += its[HIT_TOKENS]
        counts[MAX_QUEUE] = max(counts[MAX_QUEUE], its[MAX_QUEUE])
        counts[PEAK] = max(counts[PEAK], its[PEAK] * blocks // fleet.blocks[w])
        sums[GAP_SUM] += its_sums[GAP_SUM]
        sums[GAP_MAX] = max(sums[GAP_MAX], its_sums[GAP_MAX])
        sums[BUSY] += its_sums[BUSY]
        sums[USED] += its_sums[USED]
        sums[BACKLOG] += its_sums[BACKLOG]
    for request in range(requests):
        r = unsigned(request)
        if own[STATE, r] == DECODE:  # as `generated` will have it of one engine that has not made a step
            own[GENERATED, r] -= fleet.counts[unsigned(fleet.worker[r]), STEP]
    if status == DONE and time_limit < np.inf:
        end = max(end, time_limit)
    sums[END_TIME] = end
