"""The event loop of a fleet: many engines, each with a clock of its own, behind a router. O(log workers) an event.

Each worker runs the step loop of `vecsim.kernel.token`, called by its address, from one boundary until the next thing
that may concern it: who it serves, and what a step does, is decided there alone. What a step does is known when it
begins; others learn of it when it ends. Ties go: what moves between workers, arrivals, boundaries of workers in their
order.

Where prefill is kept apart, the first workers do nothing else: to them a request has one token to yield, and what they
hold for it stays until it has moved to the worker that decodes.
"""

from typing import Any, NamedTuple

import numpy as np

from vecsim.kernel import links, tree
from vecsim.kernel.address import call_token_loop
from vecsim.kernel.handover import (
    AGENDA_FIRST,
    DECODE_IT,
    DECODES_AT,
    DISPATCH,
    DUE,
    NOTICE,
    NOTICED_AT,
    PREFILL_GROUPS,
    PREFILLED_AT,
    PREFILLS_AT,
    QUEUE_FIRST,
    QUEUED_FOR_PREFILL,
    RELEASE,
    REMOTE,
    RESERVE,
    RESERVED_AT,
    STEPS_MADE,
    TIMERS,
    TO_PREFILL_AT,
    WAITS_FOR,
    arrive,
    begin_transfer,
    flow,
    give_back,
    hit_tokens,
    local,
    put_in,
    reserve,
    settle,
    take_out,
)
from vecsim.kernel.heap import pop
from vecsim.kernel.jit import bare, bare_entry, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.routing import LEAST_KV, load_of, outstanding, route
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
from vecsim.kernel.token import MOST_STEPS, forget_steps, issue, let_ended_go, never_fits, report, reset_requests
from vecsim.kernel.token_scenarios import memory_of, model_of, policy_of
from vecsim.kernel.token_state import (
    ALL_STEPS,
    ARRIVALS,
    BACKLOG,
    BLOCKED,
    BUSY,
    COMING,
    COMPUTED,
    DECODE,
    DROPPED,
    DROPPED_AT_ONCE,
    END_TIME,
    ENDED,
    ENDED_AT,
    ENQUEUED,
    FIRST_AT,
    FORESEEN,
    GAP_BINS,
    GAP_HIGH,
    GAP_LOW,
    GAP_MAX,
    GAP_SUM,
    GAPS,
    GENERATED,
    GONE,
    HIT,
    HIT_TOKENS,
    HORIZON,
    INBOX_HEAD,
    ISSUED,
    KV,
    LAST_AT,
    LONGEST,
    MAX_QUEUE,
    MEASURING,
    NOW,
    PEAK,
    PREEMPTED,
    PREEMPTIONS,
    PREFILL,
    PROMPT_TOKENS,
    QUEUED,
    REPORTED,
    RUNNING,
    SCHEDULED,
    SINCE,
    STARTED_AT,
    STATE,
    STEP,
    STEPS,
    TOKENS,
    UNSEEN,
    USED,
    WAITING,
    blocks_for,
    full_blocks,
    put_last,
)
from vecsim.kv_cache import ENDLESS

# What counts references to arrays it returns would leave them counted here, where nobody does.
tables_of = inlined(model_of.py_func)

# Look for an interruption once in so many events
WATCH = 1 << 12


class World(NamedTuple):
    """Everything that one scenario of a fleet is made of; see `simulate_fleet`."""

    step_loop: Any
    fleet: Any
    split: Any
    router: Any
    prefill_router: Any
    transfer: Any
    groups: Any
    tables: Any
    load: Any
    work: Any
    cache: Any
    record: Any
    warmup: Any
    stop: Any
    own_rule: Any
    own_duration: Any


@inlined
def view(fleet, split, work, worker, gaps):
    """What one worker works in: its own rows, and the requests of all."""
    w = unsigned(worker)
    prefills = worker < split.prefill_workers
    return TokenWork(
        fleet.counts[w],
        fleet.sums[w],
        gaps,
        fleet.own if prefills else work.own,
        fleet.times if prefills else work.times,
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
def cache_of(fleet, split, cache, worker):
    """What a worker can find in its KV memory."""
    w = unsigned(worker)
    prefills = worker < split.prefill_workers
    return Cache(
        fleet.nodes[w],
        fleet.node_of[w],
        fleet.owned if prefills else cache.owned,
        fleet.own_blocks if prefills else cache.own,
        cache.ids,
        cache.shared,
        cache.own_start,
    )


@inlined
def visiting(load, fleet, split, kind, worker):
    """The load as a worker is given it: requests come by its inbox alone, and have one token to yield for a prefill."""
    prefills = worker < split.prefill_workers
    requests = load.prompt_tokens.size
    return TokenLoad(
        load.arrived_at,
        load.prompt_tokens,
        fleet.ones[:requests] if prefills else load.output_tokens,
        fleet.ones[:requests] if prefills else load.max_tokens,
        load.classes,
        load.follower[:0],
        load.think,
        load.urgency,
        load.ttft_limits,
        load.itl_limits,
        load.watches_gaps and not prefills,
        0,
        kind,
        whole(worker),
        False,
        load.think_time,
        load.before_queue,
        load.per_token,
        load.at_completion,
    )


@inlined
def kind_of(fleet, worker):
    """Where the numbers of a worker's kind are."""
    return unsigned(fleet.group[unsigned(worker)])


@bare
def visit(world, worker, kind, until):
    """Have a worker go on until a time; returns the status."""
    fleet, split, groups, load, work, cache = (
        world.fleet, world.split, world.groups, world.load, world.work, world.cache,
    )  # fmt: skip
    p = groups[kind_of(fleet, worker)]
    w = unsigned(worker)
    measures = fleet.counts[w, MEASURING] != 0 and worker >= split.prefill_workers
    fleet.counts[w, ALL_STEPS] = fleet.between[STEPS_MADE]
    status = call_token_loop(
        world.step_loop,
        (
            policy_of(p), memory_of(p), tables_of(p, world.tables), visiting(load, fleet, split, kind, worker),
            view(fleet, split, work, worker, work.gaps if measures else fleet.unmeasured),
            cache_of(fleet, split, cache, worker), world.record, until, world.warmup,
            world.stop, world.own_rule, world.own_duration,
        ),
    )  # fmt: skip
    if kind != BEGINS:
        fleet.between[STEPS_MADE] = fleet.counts[w, ALL_STEPS]
    return status


@inlined
def is_behind(fleet, worker, t):
    """Whether a worker was left behind the time, since it does nothing but decode."""
    w = unsigned(worker)
    return fleet.sums[w, FORESEEN] > fleet.sums[w, END_TIME] and fleet.sums[w, END_TIME] < t


@inlined
def plan(fleet, request, what):
    """Have something be done for a request at its decode worker, now, once this worker is up to time."""
    fleet.way[WAITS_FOR, unsigned(request)] = what
    put_in(fleet.between, AGENDA_FIRST, fleet.way, request)


@inlined
def sleeps(fleet, worker):
    """Whether a worker has nothing to do."""
    return fleet.clock[unsigned((fleet.clock.size >> 1) + worker)] == np.inf


@bare
def wake(fleet, worker, t):
    """Something has come to a worker that is at its first boundary from `t` on, or sleeps."""
    w = unsigned(worker)
    if sleeps(fleet, worker):
        fleet.sums[w, END_TIME] = t
    fleet.sums[w, FORESEEN] = 0.0
    fleet.counts[w, BLOCKED] = 0
    tree.put(fleet.clock, worker, fleet.sums[w, END_TIME])


@bare
def note_load(fleet, split, router, prefill_router, worker):
    """Let routers see what a worker has to do now."""
    if worker < split.prefill_workers:
        tree.put(fleet.prefill_loads, worker, load_of(fleet, prefill_router, worker))
    else:
        tree.put(fleet.loads, worker - split.prefill_workers, load_of(fleet, router, worker))


@bare
def send(fleet, split, groups, load, work, request, worker, t):
    """Put a request into the inbox of a worker that is at its first boundary from `t` on; wake it if it sleeps."""
    w, r = unsigned(worker), unsigned(request)
    memory = memory_of(groups[kind_of(fleet, worker)])
    prefills = worker < split.prefill_workers
    times = fleet.times if prefills else work.times
    times[SINCE, r] = t
    if prefills:
        put_last(fleet.counts[w], fleet.own, INBOX_HEAD, request)
    else:
        put_last(fleet.counts[w], work.own, INBOX_HEAD, request)
    fleet.sent[w] += 1
    fleet.sent_blocks[w] += blocks_for(whole(load.prompt_tokens[r]), memory.block_size, memory.shift)
    wake(fleet, worker, t)


@inlined
def new_at(own, request):
    """A request that a worker has not computed anything of."""
    own[COMPUTED, unsigned(request)] = 0
    own[GENERATED, unsigned(request)] = 0


@bare
def judge(fleet, groups, load, request, first, last, prefills):
    """Which kinds of workers could ever hold a request, into `fleet.fits`; of kinds [first, last)."""
    r = unsigned(request)
    output, cap = (1, 1) if prefills else (whole(load.output_tokens[r]), whole(load.max_tokens[r]))
    for group in range(first, last):
        p = groups[unsigned(group)]
        fleet.fits[unsigned(group)] = not never_fits(
            policy_of(p), memory_of(p), whole(load.prompt_tokens[r]), output, cap
        )


@bare
def follow_up(fleet, load, work, request, worker, t):
    """A request has ended at `t`: have the next one of its user come; returns the status."""
    r = unsigned(request)
    seen = t + load.output_tokens[r] * load.per_token + load.at_completion
    if load.closed:
        if work.counts[ISSUED] == load.prompt_tokens.size:
            return OUT_OF_REQUESTS
        issue(work, load, work.counts[ISSUED], seen + load.think_time)
        work.counts[ISSUED] += 1
    elif load.follower.size > 0 and load.follower[r] >= 0:
        following = whole(load.follower[r])
        fleet.bound[unsigned(following)] = worker
        issue(work, load, following, seen + load.think[unsigned(following)])
    return DONE


@bare
def prefill_at(world, request, worker, t):
    """Send a request to a prefill worker."""
    fleet, split, router, prefill_router, groups, load, work = (
        world.fleet, world.split, world.router, world.prefill_router, world.groups, world.load, world.work,
    )  # fmt: skip
    r = unsigned(request)
    fleet.way[PREFILLS_AT, r] = worker
    new_at(fleet.own, request)
    fleet.own[KV, r] = -1
    send(fleet, split, groups, load, work, request, worker, t)
    note_load(fleet, split, router, prefill_router, worker)


@bare
def idle_prefill_worker(fleet, groups, split):
    """The prefill worker with the fewest requests that has a free slot; -1 if there is none."""
    worker = tree.first(fleet.prefill_loads)
    if outstanding(fleet, worker) < int(groups[kind_of(fleet, worker)][0]) and fleet.fits[fleet.group[worker]]:
        return worker
    best = -1
    for worker in range(split.prefill_workers if groups.shape[0] > 2 else 0):
        room = outstanding(fleet, worker) < int(groups[kind_of(fleet, worker)][0])
        if room and fleet.fits[fleet.group[worker]] and (
            best < 0 or outstanding(fleet, worker) < outstanding(fleet, best)
        ):  # fmt: skip
            best = worker
    return best


@bare
def go_to_prefill(world, request, t):
    """Send a request to a prefill worker, or into the queue for one."""
    fleet, split, prefill_router, groups, load = (
        world.fleet,
        world.split,
        world.prefill_router,
        world.groups,
        world.load,
    )
    fleet.instants[TO_PREFILL_AT, unsigned(request)] = t
    judge(fleet, groups, load, request, 0, fleet.between[PREFILL_GROUPS], True)
    if not split.queued:
        prefill_at(
            world, request, route(fleet, prefill_router, fleet.prefill_loads, request, 0, split.prefill_workers), t
        )
        return
    worker = -1
    if fleet.between[QUEUE_FIRST] < 0:
        worker = idle_prefill_worker(fleet, groups, split)
    if worker >= 0:
        prefill_at(world, request, worker, t)
    else:
        put_in(fleet.between, QUEUE_FIRST, fleet.way, request)
        fleet.between[QUEUED_FOR_PREFILL] += 1


@bare
def try_to_reserve(world, request, worker, t):
    """Reserve a request's blocks at its decode worker, which is at its first boundary from `t` on."""
    fleet, split, groups, load, work, cache, warmup = (
        world.fleet, world.split, world.groups, world.load, world.work, world.cache, world.warmup,
    )  # fmt: skip
    w = unsigned(worker)
    p = groups[kind_of(fleet, worker)]
    its_work, its_cache = view(fleet, split, work, worker, work.gaps), cache_of(fleet, split, cache, worker)
    holds = fleet.counts[w, FREE] < fleet.blocks[w]
    if not reserve(policy_of(p), memory_of(p), load, its_work, its_cache, warmup, holds, request):
        return False
    fleet.instants[RESERVED_AT, unsigned(request)] = t
    if not sleeps(fleet, worker):  # it may run out of blocks earlier now
        fleet.sums[w, FORESEEN] = 0.0
        tree.put(fleet.clock, worker, fleet.sums[w, END_TIME])
    return True


@bare
def on_reserved(world, request, t):
    """A request's blocks are reserved: it goes on to what comes next."""
    if world.split.reserves_first:
        go_to_prefill(world, request, t)
    else:
        move(world, request, t)


@bare
def reserve_or_wait(world, request, worker, t):
    """Reserve a request's blocks at its decode worker, or have it wait there until there are enough."""
    fleet = world.fleet
    first = 2 * worker
    if fleet.waiting[first] < 0 and try_to_reserve(world, request, worker, t):
        on_reserved(world, request, t)
        return
    put_in(fleet.waiting, first, fleet.way, request)
    wake_if_awake(fleet, worker)  # it must not run on over the next end, which may make room


@inlined
def wake_if_awake(fleet, worker):
    if not sleeps(fleet, worker):
        fleet.sums[unsigned(worker), FORESEEN] = 0.0
        tree.put(fleet.clock, worker, fleet.sums[unsigned(worker), END_TIME])


@bare
def retry(world, worker, t):
    """Blocks of a decode worker have come free: reserve for those that wait, in their order."""
    fleet, work = world.fleet, world.work
    first = 2 * worker
    while fleet.waiting[first] >= 0:
        request = whole(fleet.waiting[first])
        if not try_to_reserve(world, request, worker, t):
            break
        take_out(fleet.waiting, first, fleet.way)
        since = work.times[SINCE, unsigned(request)]
        if not world.split.reserves_first:
            since = fleet.instants[PREFILLED_AT, unsigned(request)]
        work.sums[BACKLOG] += max(t - max(since, world.warmup), 0.0)
        on_reserved(world, request, t)


@bare
def move(world, request, t):
    """Have a request's keys and values move to its decode worker."""
    fleet, groups, work = world.fleet, world.groups, world.work
    r = unsigned(request)
    memory = memory_of(groups[kind_of(fleet, whole(fleet.way[DECODES_AT, r]))])
    if begin_transfer(fleet, world.transfer, world.load, whole(work.own[HIT, r]), memory.block_size, request, t):
        landed(world, request, t)


@bare
def unpin(world, request, t):
    """Free what a request holds at its prefill worker."""
    fleet, split, groups, load, work, cache = (
        world.fleet,
        world.split,
        world.groups,
        world.load,
        world.work,
        world.cache,
    )
    r = unsigned(request)
    worker = whole(fleet.way[PREFILLS_AT, r])
    memory = memory_of(groups[kind_of(fleet, worker)])
    full = full_blocks(whole(load.prompt_tokens[r]), memory.block_size, memory.shift)
    give_back(memory, view(fleet, split, work, worker, work.gaps), cache_of(fleet, split, cache, worker), request, full)
    if sleeps(fleet, worker):
        if fleet.counts[unsigned(worker), WAITING] > 0:
            wake(fleet, worker, t)
    else:
        fleet.counts[unsigned(worker), BLOCKED] = 0


@bare
def landed(world, request, t):
    """A request's keys and values are at its decode worker, and it is noticed."""
    world.fleet.instants[NOTICED_AT, unsigned(request)] = t
    unpin(world, request, t)
    plan(world.fleet, request, DECODE_IT)


@bare
def prefilled(world, request, worker, t):
    """A request's prefill has ended; returns the status."""
    fleet, split, load, work = world.fleet, world.split, world.load, world.work
    r = unsigned(request)
    fleet.instants[PREFILLED_AT, r] = t
    if split.first_by_prefill:
        work.times[FIRST_AT, r] = work.times[LAST_AT, r] = t
        if load.output_tokens[r] == 1:
            work.own[STATE, r] = GONE
            work.own[GENERATED, r] = 1
            work.times[ENDED_AT, r] = t
            unpin(world, request, t)
            if split.reserves_first:
                plan(fleet, request, RELEASE)
            return follow_up(fleet, load, work, request, worker, t)
    if split.reserves_first:
        move(world, request, t)
    else:
        judge(fleet, world.groups, load, request, fleet.between[PREFILL_GROUPS], world.groups.shape[0], False)
        first = split.prefill_workers
        fleet.way[DECODES_AT, r] = route(fleet, world.router, fleet.loads, request, first, fleet.group.size - first)
        plan(fleet, request, RESERVE)
    return DONE


@bare
def release(world, request, worker, t):
    """A request has ended with its prefill: give back what was reserved for its decode."""
    fleet, split, groups, work, cache = world.fleet, world.split, world.groups, world.work, world.cache
    memory = memory_of(groups[kind_of(fleet, worker)])
    full = full_blocks(whole(work.own[HIT, unsigned(request)]), memory.block_size, memory.shift)
    give_back(memory, view(fleet, split, work, worker, work.gaps), cache_of(fleet, split, cache, worker), request, full)
    wake_if_awake(fleet, worker)
    retry(world, worker, t)


@bare
def act(world, request, worker, t):
    """Do what is planned for a request at its decode worker, which is at its first boundary from `t` on."""
    fleet, split, groups, load, work = world.fleet, world.split, world.groups, world.load, world.work
    r = unsigned(request)
    what = fleet.way[WAITS_FOR, r]
    if what == RELEASE:
        release(world, request, worker, t)
        return
    if what == RESERVE:
        reserve_or_wait(world, request, worker, t)
        return
    if what == DISPATCH and split.prefill_workers > 0 and is_remote(world, request, worker):
        fleet.way[REMOTE, r] = 1
        work.times[SINCE, r] = t
        work.counts[ENQUEUED] += 1
        if split.reserves_first:
            reserve_or_wait(world, request, worker, t)
        else:
            fleet.way[DECODES_AT, r] = -1
            go_to_prefill(world, request, t)
        return
    if what == DISPATCH:
        new_at(work.own, request)
    else:
        arrive(load, work, request, split.first_by_prefill)
    send(fleet, split, groups, load, work, request, worker, t)
    note_load(fleet, split, world.router, world.prefill_router, worker)


@bare
def end_of_step(world, worker, t):
    """The step of a worker has ended: others learn of the requests that ended in it; returns the status."""
    fleet, split, groups, load, work = world.fleet, world.split, world.groups, world.load, world.work
    w = unsigned(worker)
    status = DONE
    for i in range(fleet.counts[w, REPORTED], fleet.counts[w, ENDED]):
        request = whole(fleet.ended[w, unsigned(i)])
        if worker < split.prefill_workers:
            status = prefilled(world, request, worker, t)
        else:
            status = follow_up(fleet, load, work, request, worker, t)
        if status != DONE:
            break
    memory = memory_of(groups[kind_of(fleet, worker)])
    report(view(fleet, split, work, worker, work.gaps), load, memory)
    return status


@bare
def route_arrival(world, request, t):
    """A request has come to the router; returns the status."""
    fleet, split, router, groups, load, work = (
        world.fleet, world.split, world.router, world.groups, world.load, world.work,
    )  # fmt: skip
    counts, own = work.counts, work.own
    r = unsigned(request)
    first = split.prefill_workers
    judge(fleet, groups, load, request, fleet.between[PREFILL_GROUPS], groups.shape[0], False)
    worker = route(fleet, router, fleet.loads, request, first, fleet.group.size - first)
    if worker < 0:
        counts[ENQUEUED] += 1
        counts[DROPPED] += 1
        own[STATE, r] = DROPPED_AT_ONCE
        if load.closed:
            if counts[ISSUED] == load.prompt_tokens.size:
                return OUT_OF_REQUESTS
            issue(work, load, counts[ISSUED], t + max(load.think_time, 1.0))
            counts[ISSUED] += 1
        return DONE
    fleet.way[DECODES_AT, r] = worker
    plan(fleet, request, DISPATCH)
    return DONE


@bare
def is_remote(world, request, worker):
    """Whether a request is prefilled elsewhere than at its decode worker."""
    fleet, split, prefill_router, groups, load, cache = (
        world.fleet,
        world.split,
        world.prefill_router,
        world.groups,
        world.load,
        world.cache,
    )
    r = unsigned(request)
    w = unsigned(worker)
    judge(fleet, groups, load, request, 0, fleet.between[PREFILL_GROUPS], True)
    able = 0
    for group in range(fleet.between[PREFILL_GROUPS]):
        able += fleet.fits[unsigned(group)]
    if able == 0:
        return False
    memory = memory_of(groups[kind_of(fleet, worker)])
    prompt = whole(load.prompt_tokens[r])
    hit = hit_tokens(cache_of(fleet, split, cache, worker), memory, prompt, request)
    used = (fleet.blocks[w] - fleet.counts[w, FREE]) / fleet.blocks[w] if memory.blocks < ENDLESS else 0.0
    waiting = whole(fleet.between[QUEUED_FOR_PREFILL])
    busy = False
    if split.queued:
        busy = waiting > 0 or idle_prefill_worker(fleet, groups, split) < 0
    else:
        for other in range(split.prefill_workers):
            waiting += fleet.counts[unsigned(other), WAITING]
        turn = fleet.turn[1]
        chosen = route(fleet, prefill_router, fleet.prefill_loads, request, 0, split.prefill_workers)
        fleet.turn[1] = turn
        busy = outstanding(fleet, chosen) > 0
    return not local(split, prompt, hit, used, busy, waiting)


@bare_entry
def simulate_fleet(
    step_loop, router, prefill_router, split, transfer, fleet, groups, tables, load, work, cache, record, time_limit,
    warmup, stop, own_rule, own_duration,
):  # fmt: skip
    """Run one scenario of a fleet; returns the status. Results stay in `fleet`, and in `work` as if of one engine.

    Parameters
    ----------
    step_loop : int
        Address of `vecsim.kernel.token.simulate`.
    router, prefill_router : Router
        Of workers that decode, and of those that prefill only.
    split : Split
    transfer : Transfer
    fleet : Fleet
    groups : array
        [group, field] The numbers of each kind of worker, in the order of `vecsim.kernel.token_scenarios.FIELDS`.
    tables : StepModel
        The tables of step times of all kinds; its formula has no meaning.

    Others as for `vecsim.kernel.token.simulate`.
    """
    counts, sums, gaps, own, times = work.counts, work.sums, work.gaps, work.own, work.times
    between = fleet.between
    requests = load.prompt_tokens.size
    workers = fleet.group.size
    prefill_workers = split.prefill_workers
    users_wait = load.closed or load.follower.size > 0
    lazy = router.code != LEAST_KV
    world = World(
        step_loop, fleet, split, router, prefill_router, transfer, groups, tables, load, work, cache, record, warmup,
        stop, own_rule, own_duration,
    )  # fmt: skip

    gaps[counts[GAP_LOW] : counts[GAP_HIGH] + 1] = 0
    counts[:] = 0
    sums[:] = 0.0
    reset_requests(own, times, cache.owned, requests, cache.owned.size > 0)
    fleet.bound[:requests] = -1
    fleet.way[:REMOTE, :requests] = -1
    fleet.sent[:] = 0
    fleet.sent_blocks[:] = 0
    fleet.turn[:] = 0
    fleet.waiting[:] = -1
    between[:] = 0
    between[QUEUE_FIRST] = between[AGENDA_FIRST] = -1
    tree.clear(fleet.clock)
    tree.clear(fleet.loads)
    tree.clear(fleet.prefill_loads)
    if prefill_workers > 0:
        reset_requests(fleet.own, fleet.times, fleet.owned, requests, fleet.owned.size > 0)
        fleet.way[REMOTE, :requests] = 0
        fleet.instants[:, :requests] = np.nan
        fleet.moved[:requests] = 0.0
        between[PREFILL_GROUPS] = fleet.group[unsigned(prefill_workers - 1)] + 1
        fleet.bandwidths[:prefill_workers] = transfer.source_bandwidth
        fleet.bandwidths[prefill_workers:workers] = transfer.destination_bandwidth
        fleet.bandwidths[workers] = transfer.fabric_bandwidth
        links.reset(fleet.links, fleet.bandwidths)

    static = min(load.static, requests)
    counts[ISSUED] = static
    static_due = load.arrived_at[0] + load.before_queue if static > 0 else np.inf
    dynamic_due = moving_due = np.inf
    events = begun = last = 0
    t = 0.0
    over = False
    status = DONE
    while status == DONE:
        # One call of the step loop for all, at the end: compiled in several places, it took four times as long.
        steps = False
        if begun < workers:
            worker, kind, until = begun, BEGINS, 0.0
        elif over:
            while last < workers and not is_behind(fleet, last, time_limit):
                last += 1
            if last == workers:
                break
            worker, kind, until = last, GOES_ON, time_limit
        elif between[AGENDA_FIRST] >= 0:
            request = whole(between[AGENDA_FIRST])
            worker, kind, until = whole(fleet.way[DECODES_AT, unsigned(request)]), GOES_ON, t
            if not is_behind(fleet, worker, t):
                take_out(between, AGENDA_FIRST, fleet.way)
                act(world, request, worker, t)
                continue
        else:
            events += 1
            if events & (WATCH - 1) == 0 and stop[0]:
                status = INTERRUPTED
                break
            if users_wait:
                dynamic_due = times[SINCE, unsigned(work.coming[0])] if counts[COMING] > 0 else np.inf
            due = min(static_due, dynamic_due)
            boundary = fleet.clock[1]
            if prefill_workers > 0:
                timer_due = fleet.instants[DUE, unsigned(fleet.timers[0])] if between[TIMERS] > 0 else np.inf
                link_due, moving = links.next_end(fleet.links)
                moving_due = min(timer_due, link_due)
            t = min(moving_due, due, boundary)
            if t >= time_limit or t == np.inf:
                over = True
                continue
            if moving_due == t:
                if timer_due <= link_due:
                    request = whole(pop(fleet.timers, between[TIMERS], fleet.instants[DUE], load.arrived_at))
                    between[TIMERS] -= 1
                    there = fleet.way[WAITS_FOR, unsigned(request)] == NOTICE or flow(fleet, transfer, load, request, t)
                else:
                    request = whole(moving)
                    links.end(fleet.links, t, request)
                    there = settle(fleet, transfer, load, request, t)
                if there:
                    landed(world, request, t)
                continue
            if due == t:
                if static_due <= dynamic_due:
                    request = whole(counts[ARRIVALS])
                    counts[ARRIVALS] += 1
                    static_due = (
                        load.arrived_at[unsigned(request + 1)] + load.before_queue if request + 1 < static else np.inf
                    )
                else:
                    request = whole(pop(work.coming, counts[COMING], times[SINCE], load.arrived_at))
                    counts[COMING] -= 1
                status = route_arrival(world, request, t)
                continue

            worker = tree.first(fleet.clock)
            w = unsigned(worker)
            prefills = worker < prefill_workers
            waits = fleet.waiting[2 * worker] >= 0
            stops = users_wait or prefills or waits
            kind = STOPS if stops else GOES_ON
            if stops and is_behind(fleet, worker, t):
                until = t
            elif stops and fleet.counts[w, REPORTED] < fleet.counts[w, ENDED]:
                status = end_of_step(world, worker, t)
                note_load(fleet, split, router, prefill_router, worker)
                continue
            else:
                if prefills and split.queued:
                    pull(world, worker, t)
                if waits:
                    make_room(world, worker, t)
                    if between[AGENDA_FIRST] >= 0:
                        continue
                steps = True
                until = min(due, time_limit, moving_due)
                measures = fleet.sums[w, END_TIME] >= warmup
                if measures and fleet.counts[w, MEASURING] == 0:
                    if warmup > 0.0:
                        forget_steps(fleet.counts[w], fleet.sums[w], fleet.unmeasured)
                    fleet.counts[w, MEASURING] = 1
                if not measures:
                    until = min(until, warmup)
                fleet.sums[w, HORIZON] = (time_limit if measures else min(time_limit, warmup)) if lazy else 0.0
                if users_wait or prefill_workers > 0:
                    tree.put(fleet.clock, worker, np.inf)
                    until = min(until, fleet.clock[1])
                until = max(until, np.nextafter(fleet.sums[w, END_TIME], np.inf))

        status = visit(world, worker, kind, until)
        w = unsigned(worker)
        if kind == BEGINS:
            begun += 1
            fleet.blocks[w] = fleet.counts[w, FREE]
            note_load(fleet, split, router, prefill_router, worker)
        if not steps:
            continue
        after = fleet.sums[w, END_TIME]
        if status == IDLE:
            after = np.inf
            status = DONE
            if prefill_workers > 0 and worker >= prefill_workers and give_way(world, worker):
                after = fleet.sums[w, END_TIME]
        elif status == COASTING:
            after = fleet.sums[w, FORESEEN]
            status = DONE
        elif status != DONE:
            sums[NOW], sums[LONGEST] = fleet.sums[w, NOW], fleet.sums[w, LONGEST]
        if fleet.counts[w, STEP] > MOST_STEPS:
            status = TOO_LONG
        tree.put(fleet.clock, worker, after)
        note_load(fleet, split, router, prefill_router, worker)
    if prefill_workers > 0:
        join(fleet, work, requests)
    gather(fleet, split, work, requests, time_limit, status)
    counts[ALL_STEPS] = between[STEPS_MADE]
    return status


@bare
def pull(world, worker, t):
    """Have a prefill worker with free slots take from the queue for prefill."""
    fleet, groups = world.fleet, world.groups
    between = fleet.between
    while between[QUEUE_FIRST] >= 0 and outstanding(fleet, worker) < int(groups[kind_of(fleet, worker)][0]):
        request = take_out(between, QUEUE_FIRST, fleet.way)
        between[QUEUED_FOR_PREFILL] -= 1
        queued_at = fleet.instants[TO_PREFILL_AT, unsigned(request)]
        world.work.sums[BACKLOG] += max(t - max(queued_at, world.warmup), 0.0)
        prefill_at(world, request, worker, t)


@bare
def make_room(world, worker, t):
    """Free what requests that have ended hold at a decode worker, for those that wait for blocks there."""
    fleet, split, work = world.fleet, world.split, world.work
    p = world.groups[kind_of(fleet, worker)]
    if fleet.counts[unsigned(worker), ENDED] > 0:
        let_ended_go(
            view(fleet, split, work, worker, work.gaps), world.load, cache_of(fleet, split, world.cache, worker),
            memory_of(p), policy_of(p),
        )  # fmt: skip
    retry(world, worker, t)


@bare
def give_way(world, worker):
    """A decode worker can't admit anything for want of blocks, and nothing runs: free those of the last that came.

    It will compute all anew. Returns whether there was one.
    """
    fleet, split, groups, work, cache, load = (
        world.fleet,
        world.split,
        world.groups,
        world.work,
        world.cache,
        world.load,
    )
    w = unsigned(worker)
    own = work.own
    if fleet.counts[w, WAITING] == 0 or fleet.counts[w, RUNNING] > 0 or fleet.counts[w, BLOCKED] == 0:
        return False
    last = -1
    for request in range(load.prompt_tokens.size):
        r = unsigned(request)
        has_blocks = fleet.way[DECODES_AT, r] == worker and own[STATE, r] == QUEUED and own[KV, r] > 0
        if has_blocks and (last < 0 or fleet.instants[NOTICED_AT, r] >= fleet.instants[NOTICED_AT, unsigned(last)]):
            last = request
    if last < 0:
        return False
    memory = memory_of(groups[kind_of(fleet, worker)])
    full = full_blocks(int(own[KV, unsigned(last)]) - 1, memory.block_size, memory.shift)
    give_back(
        memory, view(fleet, split, work, worker, work.gaps), cache_of(fleet, split, cache, worker), last, full
    )  # fmt: skip
    own[KV, unsigned(last)] = 0
    own[PREEMPTIONS, unsigned(last)] += 1
    fleet.counts[w, PREEMPTED] += 1
    return True


@bare
def join(fleet, work, requests):
    """Put both parts of the requests that were prefilled elsewhere together."""
    own, times = work.own, work.times
    for request in range(requests):
        r = unsigned(request)
        if fleet.way[REMOTE, r] != 1:
            continue
        times[STARTED_AT, r] = fleet.times[STARTED_AT, r]
        own[PREEMPTIONS, r] += fleet.own[PREEMPTIONS, r]
        if own[STATE, r] == UNSEEN:
            # It has not come to its decode worker
            own[GENERATED, r] = 0 if np.isnan(times[FIRST_AT, r]) else 1
            if np.isnan(times[STARTED_AT, r]):
                own[STATE, r] = QUEUED
                work.counts[WAITING] += 1
            else:
                own[STATE, r] = PREFILL
        elif own[STATE, r] == QUEUED and own[PREEMPTIONS, r] == 0:
            own[STATE, r] = PREFILL


@bare
def gather(fleet, split, work, requests, time_limit, status):
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
        counts[ENQUEUED] += 0 if worker < split.prefill_workers else its[ENQUEUED]
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
            own[GENERATED, r] -= fleet.counts[unsigned(fleet.way[DECODES_AT, r]), STEP]
    if status == DONE and time_limit < np.inf:
        end = max(end, time_limit)
    sums[END_TIME] = end
