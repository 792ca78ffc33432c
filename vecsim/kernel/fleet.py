"""The event loop of a fleet: many engines, each with a clock of its own, behind a router. O(log workers) an event.

Each worker runs the step loop of `vecsim.kernel.token`, called by its address, from one boundary until the next thing
that may concern it: who it serves, and what a step does, is decided there alone. What a step does is known when it
begins; others learn of it when it ends. Ties go: arrivals, then boundaries of workers in their order.
"""

import numpy as np

from vecsim.kernel import tree
from vecsim.kernel.address import call_token_loop
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned
from vecsim.kernel.kv import FREE
from vecsim.kernel.routing import LEAST_KV, load_of, route
from vecsim.kernel.state import (
    BAD_DURATION,
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
from vecsim.kernel.token import (
    MOST_STEPS,
    due_at,
    follow_up,
    forget_steps,
    issue_after_drop,
    never_fits,
    next_issued,
    report,
    reset_requests,
    take_arrival,
)
from vecsim.kernel.token_scenarios import GROUP_WORKERS, memory_of, model_of, policy_of
from vecsim.kernel.token_state import (
    ALL_STEPS,
    BACKLOG,
    BUSY,
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
    own_duration,
):  # fmt: skip
    """Have a worker go on until a time; returns the status."""
    w = unsigned(worker)
    p = groups[unsigned(fleet.group[w])]
    gaps = work.gaps if fleet.counts[w, MEASURING] else fleet.unmeasured
    its_cache = Cache(
        fleet.nodes[w], fleet.node_of[w], cache.owned, cache.own, cache.ids, cache.shared, cache.own_start
    )
    fleet.counts[w, ALL_STEPS] = work.counts[ALL_STEPS]
    status = call_token_loop(
        step_loop,
        (
            policy_of(p), memory_of(p), tables_of(p, tables), visiting(load, kind, worker),
            view(fleet, work, worker, gaps), its_cache, record, until, warmup, stop, own_rule, own_duration,
        ),
    )  # fmt: skip
    if kind != BEGINS:
        work.counts[ALL_STEPS] = fleet.counts[w, ALL_STEPS]
    if status == BAD_DURATION:
        work.sums[NOW], work.sums[LONGEST] = fleet.sums[w, NOW], fleet.sums[w, LONGEST]
    return status


@inlined
def is_behind(fleet, worker):
    """Whether a worker was left behind, since it does nothing but decode."""
    w = unsigned(worker)
    return fleet.sums[w, FORESEEN] > fleet.sums[w, END_TIME]


@bare
def let_others_know(fleet, load, work, worker, t):
    """A step has ended at `t`: send the next requests of those whose last one has ended in it; returns the status."""
    w = unsigned(worker)
    for i in range(fleet.counts[w, REPORTED], fleet.counts[w, ENDED]):
        request = int(fleet.ended[w, unsigned(i)])
        if not follow_up(work, load, request, t):
            return OUT_OF_REQUESTS
        if load.follower.size > 0 and load.follower[unsigned(request)] >= 0:
            fleet.bound[unsigned(load.follower[unsigned(request)])] = worker
    report(fleet.counts[w])
    return DONE


@inlined
def send(fleet, router, work, request, worker, t):
    """Put a request into the inbox of a worker that is at its first boundary from `t` on; wake it if it sleeps."""
    w, r = unsigned(worker), unsigned(request)
    own, own_counts = work.own, fleet.counts[w]
    fleet.worker[r] = worker
    own[COMPUTED, r] = 0
    own[GENERATED, r] = 0
    work.times[SINCE, r] = t
    put_last(own_counts, own, INBOX_HEAD, request)
    fleet.sent[w] += 1
    tree.put(fleet.loads, worker, load_of(fleet, router, worker))
    fleet.sums[w, FORESEEN] = 0.0
    if fleet.clock[unsigned((fleet.clock.size >> 1) + worker)] == np.inf:
        fleet.sums[w, END_TIME] = t
    tree.put(fleet.clock, worker, fleet.sums[w, END_TIME])


@inlined
def judge(fleet, groups, load, request):
    """Which kinds of workers could ever hold a request, into `fleet.fits`; returns how many workers that are."""
    r = unsigned(request)
    able = 0
    for group in range(groups.shape[0]):
        p = groups[unsigned(group)]
        fits = not never_fits(
            policy_of(p), memory_of(p), int(load.prompt_tokens[r]), int(load.output_tokens[r]), int(load.max_tokens[r])
        )
        fleet.fits[unsigned(group)] = fits
        able += fits * int(p[GROUP_WORKERS])
    return able


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
    fleet.turn[0] = 0
    tree.clear(fleet.clock)
    tree.clear(fleet.loads)
    lazy = router.code != LEAST_KV
    for worker in range(workers):
        visit(
            step_loop, fleet, groups, tables, load, work, cache, record, worker, BEGINS, 0.0, warmup, stop, own_rule,
            own_duration,
        )  # fmt: skip
        fleet.blocks[unsigned(worker)] = fleet.counts[unsigned(worker), FREE]
        tree.put(fleet.loads, worker, 0.0)

    static = min(load.static, requests)
    counts[ISSUED] = static
    static_due = due_at(load, 0, static)
    dynamic_due = np.inf
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
            request, static_due, dynamic_due = take_arrival(work, load, static, static_due, dynamic_due)
            worker = route(fleet, router, request, judge(fleet, groups, load, request))
            if worker >= 0:
                if is_behind(fleet, worker):
                    status = visit(
                        step_loop, fleet, groups, tables, load, work, cache, record, worker, kind, t, warmup, stop,
                        own_rule, own_duration,
                    )  # fmt: skip
                    if status != DONE:
                        break
                send(fleet, router, work, request, worker, t)
                continue
            counts[ENQUEUED] += 1
            counts[DROPPED] += 1
            own[STATE, unsigned(request)] = DROPPED_AT_ONCE
            if not issue_after_drop(work, load, t):
                status = OUT_OF_REQUESTS
                break
            dynamic_due = next_issued(work)
            continue
        if t >= time_limit:
            break
        worker = tree.first(fleet.clock)
        w = unsigned(worker)
        if fleet.counts[w, REPORTED] < fleet.counts[w, ENDED] and stops:
            status = let_others_know(fleet, load, work, worker, t)
            dynamic_due = next_issued(work)
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
        status = visit(
            step_loop, fleet, groups, tables, load, work, cache, record, worker, kind,
            max(until, np.nextafter(fleet.sums[w, END_TIME], np.inf)), warmup, stop, own_rule, own_duration,
        )  # fmt: skip
        after = fleet.sums[w, END_TIME]
        if status == IDLE:
            after = np.inf
            status = DONE
        elif status == COASTING:
            after = fleet.sums[w, FORESEEN]
            status = DONE
        if fleet.counts[w, STEP] > MOST_STEPS:
            status = TOO_LONG
        tree.put(fleet.clock, worker, after)
        tree.put(fleet.loads, worker, load_of(fleet, router, worker))
    for worker in range(workers):
        if status == DONE and is_behind(fleet, worker):
            status = visit(
                step_loop, fleet, groups, tables, load, work, cache, record, worker, kind, time_limit, warmup, stop,
                own_rule, own_duration,
            )  # fmt: skip
    gather(fleet, work, requests, time_limit, status)
    return status


@bare
def gather(fleet, work, requests, time_limit, status):
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
