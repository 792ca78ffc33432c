"""What the event loop of a fleet works on, and the small steps that its parts have in common."""

import numpy as np

from vecsim.kernel import kv, seen, tree
from vecsim.kernel.address import call_token_loop, found
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.placed import fetched, put
from vecsim.kernel.routing import PREFILLS, load_of
from vecsim.kernel.state import (
    BAD_DURATION,
    BEGINS,
    DONE,
    GOES_ON,
    Cache,
    Place,
    TokenLoad,
    TokenWork,
)
from vecsim.kernel.token import forget_steps, never_fits
from vecsim.kernel.token_scenarios import CAPACITY, GROUP_WORKERS, memory_of, model_of, policy_of
from vecsim.kernel.token_state import (
    ALL_STEPS,
    BACKLOG,
    BLOCKED,
    BLOCKS,
    BUSY,
    END_TIME,
    ENQUEUED,
    FORESEEN,
    GAP_HIGH,
    GAP_LOW,
    GAP_MAX,
    GAP_SUM,
    GAPS,
    HIT_TOKENS,
    INBOX,
    INBOX_HEAD,
    LONGEST,
    MAX_QUEUE,
    MEASURING,
    NEW_BLOCKS,
    NOW,
    PEAK,
    PREEMPTED,
    PROMPT_TOKENS,
    REPORTED,
    RUNNING,
    SCHEDULED,
    SINCE,
    STEPS,
    TOKENS,
    USED,
    WAITING,
    blocks_for,
    blocks_with_ids,
    full_blocks,
    put_last,
)

# Places in `fleet.between`: the status, if it isn't `DONE`; workers, there or not, that could hold the request that was
# looked at last. Those in between are in `vecsim.kernel.handover`.
TROUBLE, EVER, BETWEEN = 0, 6, 7

# What counts references to arrays it returns would leave them counted here, where nobody does.
tables_of = inlined(model_of.py_func)


@inlined
def prefills_only(world, worker):
    """Whether a worker does nothing but prefill."""
    return worker < world.split.prefill_workers


@inlined
def kind_of(world, worker):
    """Where the numbers of a worker's kind are."""
    return unsigned(world.fleet.group[unsigned(worker)])


@inlined
def view(world, worker, gaps):
    """What one worker works in: its own rows, and the requests of all."""
    fleet, work = world.fleet, world.work
    w = unsigned(worker)
    prefills = prefills_only(world, worker)
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
def cache_of(world, worker):
    """What a worker can find in its KV memory."""
    fleet, cache = world.fleet, world.cache
    w = unsigned(worker)
    prefills = prefills_only(world, worker)
    return Cache(
        fleet.nodes[w],
        fleet.node_of[w],
        fleet.seen[w],
        fleet.owned if prefills else cache.owned,
        fleet.own_blocks if prefills else cache.own,
        cache.ids,
        cache.shared,
        cache.own_start,
    )


@inlined
def visiting(world, worker):
    """The load as a worker is given it: requests come by its inbox alone, and have one token to yield for a prefill."""
    load = world.load
    prefills = prefills_only(world, worker)
    ones = world.fleet.ones[: load.prompt_tokens.size]
    return TokenLoad(
        load.arrived_at,
        load.prompt_tokens,
        ones if prefills else load.output_tokens,
        ones if prefills else load.max_tokens,
        load.classes,
        load.follower[:0],
        load.think,
        load.urgency,
        load.ttft_limits,
        load.itl_limits,
        load.watches_gaps and not prefills,
        0,
        False,
        whole(worker),
        False,
        load.think_time,
        load.before_queue,
        load.per_token,
        load.at_completion,
    )


@bare
def settle_in(world, worker, measures):
    """Keep what a worker is visited with; of prefill workers, and before the warm-up is over, nobody counts gaps."""
    fleet, work = world.fleet, world.work
    p = world.groups[kind_of(world, worker)]
    measures = measures and not prefills_only(world, worker)
    put(
        Place(
            policy_of(p), memory_of(p), tables_of(p, world.tables), visiting(world, worker),
            view(world, worker, work.gaps if measures else fleet.unmeasured), cache_of(world, worker),
            fetched(world.record), world.warmup, world.stop, world.own_rule, world.own_duration,
        ),
        fleet.put[unsigned(worker)],
    )  # fmt: skip


@bare
def visit(world, worker, kind, until):
    """Have a worker go on until a time; returns the status."""
    fleet, work = world.fleet, world.work
    w = unsigned(worker)
    fleet.counts[w, ALL_STEPS] = work.counts[ALL_STEPS]
    status = call_token_loop(world.step_loop, (found(fleet.put[w]), kind, until))
    if kind != BEGINS:
        work.counts[ALL_STEPS] = fleet.counts[w, ALL_STEPS]
    if status == BAD_DURATION:
        work.sums[NOW], work.sums[LONGEST] = fleet.sums[w, NOW], fleet.sums[w, LONGEST]
    return status


@bare
def add_up(world, worker):
    """Add what a worker has done to what the fleet has done."""
    fleet, counts, sums = world.fleet, world.work.counts, world.work.sums
    w = unsigned(worker)
    its, its_sums = fleet.counts[w], fleet.sums[w]
    if its[MEASURING] == 0:
        forget_steps(its, its_sums, fleet.unmeasured)
    sums[END_TIME] = max(sums[END_TIME], its_sums[END_TIME])
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
    counts[PEAK] = max(counts[PEAK], its[PEAK] * fleet.all_blocks[0] // fleet.blocks[w])
    sums[GAP_SUM] += its_sums[GAP_SUM]
    sums[GAP_MAX] = max(sums[GAP_MAX], its_sums[GAP_MAX])
    sums[BUSY] += its_sums[BUSY]
    sums[USED] += its_sums[USED]
    sums[BACKLOG] += its_sums[BACKLOG]


@bare
def begin_anew(world, worker, t):
    """A worker has nothing in its memory and nothing to do at `t`."""
    fleet = world.fleet
    w = unsigned(worker)
    if fleet.seen.shape[1] > 0:
        fleet.seen[w, seen.LIST] = 0.0
        if world.groups[kind_of(world, worker), CAPACITY] > 0.0:
            fleet.seen[w, seen.LIST] = seen.CHANGES + 2 * fleet.node_of.shape[1]
    fleet.sent[w] = fleet.sent_blocks[w] = fleet.sent_new[w] = 0
    settle_in(world, worker, False)
    visit(world, worker, whole(BEGINS), 0.0)
    fleet.sums[w, END_TIME] = t
    fleet.waiting[unsigned(2 * worker)] = -1
    tree.put(fleet.clock, worker, np.inf)
    note_load(world, worker)


@inlined
def is_behind(world, worker, t):
    """Whether a worker was left behind the time, since it does nothing but decode."""
    sums = world.fleet.sums
    w = unsigned(worker)
    return sums[w, FORESEEN] > sums[w, END_TIME] and sums[w, END_TIME] < t


@bare
def bring_up(world, worker, t):
    """Have a worker that was left behind go on to its first boundary from `t` on."""
    if is_behind(world, worker, t):
        status = visit(world, worker, whole(GOES_ON), t)
        if status != DONE:
            world.fleet.between[TROUBLE] = status


@inlined
def sleeps(world, worker):
    """Whether a worker has nothing to do."""
    clock = world.fleet.clock
    return clock[unsigned((clock.size >> 1) + worker)] == np.inf


@bare
def look_again(world, worker):
    """Something has changed at a worker that is at its first boundary from now on: it must not run on over it."""
    fleet = world.fleet
    fleet.sums[unsigned(worker), FORESEEN] = 0.0
    fleet.counts[unsigned(worker), BLOCKED] = 0
    if not sleeps(world, worker):
        tree.put(fleet.clock, worker, fleet.sums[unsigned(worker), END_TIME])


@bare
def wake(world, worker, t):
    """The same; and wake it if it sleeps."""
    fleet = world.fleet
    if sleeps(world, worker):
        fleet.sums[unsigned(worker), END_TIME] = t
        tree.put(fleet.clock, worker, t)
    look_again(world, worker)


@bare
def note_load(world, worker):
    """Let the router see what a worker has to do now."""
    fleet = world.fleet
    router = world.prefill_router if prefills_only(world, worker) else world.router
    load = np.inf if fleet.away[unsigned(worker)] != 0 else load_of(fleet, router, worker)
    tree.put(fleet.loads[router.place], worker - router.first, load)


@bare
def assign(world, request, worker, computes):
    """One more request is outstanding at a worker, which is to compute its prompt or not."""
    fleet = world.fleet
    w, r = unsigned(worker), unsigned(request)
    own = fleet.own if prefills_only(world, worker) else world.work.own
    memory = memory_of(world.groups[kind_of(world, worker)])
    blocks = blocks_for(whole(world.load.prompt_tokens[r]), memory.block_size, memory.shift)
    own[BLOCKS, r] = blocks
    own[NEW_BLOCKS, r] = max(blocks - fleet.expected[r], 0) if computes else 0
    fleet.sent[w] += 1
    fleet.sent_blocks[w] += blocks
    fleet.sent_new[w] += own[NEW_BLOCKS, r]
    note_load(world, worker)


@bare
def send(world, request, worker, t):
    """Put a request into the inbox of a worker that is at its first boundary from `t` on; wake it if it sleeps."""
    fleet, work = world.fleet, world.work
    w, r = unsigned(worker), unsigned(request)
    prefills = prefills_only(world, worker)
    own = fleet.own if prefills else work.own
    if prefills:
        fleet.times[SINCE, r] = t
    else:
        work.times[SINCE, r] = t
    put_last(fleet.counts[w], own, INBOX_HEAD, request)
    fleet.counts[w, INBOX] += 1
    wake(world, worker, t)


@bare
def tell_of_room(world, worker, t):
    """Blocks of a worker have come free beside its steps: it is to see whether it can go on."""
    counts = world.fleet.counts
    w = unsigned(worker)
    note_load(world, worker)
    if counts[w, WAITING] > 0 or counts[w, RUNNING] > 0:
        wake(world, worker, t)


@inlined
def open_changes(world, worker, t):
    """What changes in a worker's cache beside its steps is told at the end of the one under way, or of the next."""
    w = unsigned(worker)
    if world.fleet.seen.shape[1] > 0 and world.fleet.sums[w, END_TIME] <= t:
        seen.begin(world.fleet.seen[w], t)


@inlined
def close_changes(world, worker, t):
    """That was all."""
    w = unsigned(worker)
    if world.fleet.seen.shape[1] > 0 and world.fleet.sums[w, END_TIME] > t:
        seen.publish(world.fleet.seen[w], world.fleet.sums[w, END_TIME])


@bare
def name_ended(world, worker):
    """Have the blocks of requests that have ended at a worker be found: their followers may come before they leave."""
    fleet, load = world.fleet, world.load
    w = unsigned(worker)
    memory = memory_of(world.groups[kind_of(world, worker)])
    if not memory.caching or load.follower.size == 0:
        return
    cache = cache_of(world, worker)
    for i in range(fleet.counts[w, REPORTED]):
        request = whole(fleet.ended[w, unsigned(i)])
        r = unsigned(request)
        shared, own_start = blocks_with_ids(cache, memory, request)
        computed = whole(load.prompt_tokens[r]) + whole(load.output_tokens[r]) - 1
        full = min(full_blocks(computed, memory.block_size, memory.shift), shared)
        named = whole(cache.owned[kv.NAMED, r])
        if full > named:
            kv.name(
                fleet.counts[w], cache.nodes, cache.node_of, cache.seen, cache.own, cache.ids, own_start, request,
                named, full,
            )  # fmt: skip
            cache.owned[kv.NAMED, r] = full


@bare
def judge(world, router, request):
    """Which kinds of a router's workers could ever hold a request, into `fleet.fits`; returns how many workers."""
    fleet, groups, load = world.fleet, world.groups, world.load
    r = unsigned(request)
    prefills = router.place == PREFILLS
    output, cap = (1, 1) if prefills else (whole(load.output_tokens[r]), whole(load.max_tokens[r]))
    able = ever = worker = 0
    for group in range(groups.shape[0]):
        p = groups[unsigned(group)]
        if prefills_only(world, worker) == prefills:
            fits = not never_fits(policy_of(p), memory_of(p), whole(load.prompt_tokens[r]), output, cap)
            fleet.fits[unsigned(group)] = fits
            able += fits * int(fleet.present[unsigned(group)])
            ever += fits * int(p[GROUP_WORKERS])
        worker += int(p[GROUP_WORKERS])
    fleet.between[EVER] = ever
    return able
