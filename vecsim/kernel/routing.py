"""Which worker a request goes to. O(1) or O(log workers), but where a router compares what each worker has cached."""

import math

import numpy as np

from vecsim.kernel import seen, tree
from vecsim.kernel.address import call_router
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.kv import FREE, block_id
from vecsim.kernel.state import RouterView
from vecsim.kernel.tier_sets import DISK, HOST, has_tiers, is_known_in
from vecsim.kernel.token_scenarios import memory_of
from vecsim.kernel.token_state import (
    BEGUN_BLOCKS,
    LEFT,
    LEFT_BLOCKS,
    REPORTED,
    RUNNING,
    WAITING,
    blocks_for,
    blocks_with_ids,
    full_blocks,
)

# Routers, in the order of `vecsim.routing.ROUTERS`
ROUND_ROBIN, RANDOM, LEAST_OUTSTANDING, POWER_OF_TWO, LEAST_KV, STICKY, KV_AWARE, OVERLAP, OWN = range(9)

# Places of a router: it chooses who decodes, or who prefills only
DECODES, PREFILLS = range(2)

# Rows of `way` [request]: workers of its prefill and decode, and the prefill worker that may have its own blocks, -1
# where there is none; others in `vecsim.kernel.handover`
PREFILLS_AT, DECODES_AT, OWNS_AT = range(3)

# Rows of `fleet.survey` [worker]: whether it could hold the request; requests there, those that wait, and that run;
# share of its KV memory in use; blocks of the prompt that it is known to have, those of lower tiers by their credit;
# prompts' blocks that are to be computed, and those of all requests there; what the router wants to be least; blocks of
# the prompt that it is known to have in any tier
(
    ABLE, OUTSTANDING, WAITS, RUNS, KV_USE, HIT_BLOCKS, PREFILL_BLOCKS, DECODE_BLOCKS, COST, FOUND_BLOCKS, SURVEY_ROWS,
) = range(11)  # fmt: skip


# Places in `fleet.views`, in the order of `vecsim.variables.VIEW_VARIABLES`
EXPECTED_RATE, MISSED_RATE, VIEW_AGE, VIEWS = range(4)


@bare
def scrambled(seed, number):
    """64 bits for a number (SplitMix64: Steele, Lea, Flood, 2014)."""
    z = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + (np.uint64(number) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@bare
def one_of(seed, number, choices):
    """A whole number in [0, choices), the same for the same seed and number."""
    return int(scrambled(seed, number) % np.uint64(choices))


@inlined
def uniform(seed, number):
    """A number in [0, 1), the same for the same seed and number."""
    return float(scrambled(seed, number) >> np.uint64(11)) * 2.0**-53


@inlined
def outstanding(fleet, worker):
    """Requests sent to a worker that have not ended."""
    w = unsigned(worker)
    return int(fleet.sent[w] - fleet.counts[w, LEFT])


@inlined
def believed(fleet, worker):
    """The same as routers have it in their books."""
    return outstanding(fleet, worker) + int(fleet.ghosts[unsigned(worker)])


@inlined
def not_started(fleet, worker):
    """Those of them that have no slot."""
    w = unsigned(worker)
    return outstanding(fleet, worker) - int(fleet.counts[w, RUNNING] - fleet.counts[w, REPORTED])


@inlined
def load_of(fleet, router, worker):
    """What a router wants to be least; 0 where it goes by no load."""
    w = unsigned(worker)
    if router.code == LEAST_KV:
        return (fleet.blocks[w] - fleet.counts[w, FREE]) / fleet.blocks[w]
    return float(believed(fleet, worker))


@inlined
def could_hold(fleet, worker):
    """Whether a worker can be chosen, and could ever hold the request that is looked at."""
    return fleet.fits[unsigned(fleet.group[unsigned(worker)])] != 0 and fleet.away[unsigned(worker)] == 0


@inlined
def looks_inside(router):
    """Whether a router goes by what only a worker that is up to time can tell."""
    return router.code == LEAST_KV or router.code >= KV_AWARE


@inlined
def served_before(fleet, router, request):
    """The worker that did for the session's last request what the router is to choose one for; -1 if none did."""
    before = whole(fleet.before[unsigned(request)])
    if before < 0:
        return whole(-1)
    return whole(fleet.way[PREFILLS_AT if router.place == PREFILLS else DECODES_AT, unsigned(before)])


@bare
def route(world, router, request, able, t):
    """The worker for a request at `t`, of the `able` ones of the kinds in `fleet.fits`; -1 where there is none."""
    fleet = world.fleet
    first, number = router.first, router.number
    fleet.expected[unsigned(request)] = 0
    if able == 0:
        return -1
    code = router.code
    if code == STICKY:
        worker = served_before(fleet, router, request)
        if worker >= 0 and could_hold(fleet, worker):
            return worker
    if code in (ROUND_ROBIN, STICKY):
        turn = fleet.turn[router.place]
        worker = first + turn % number
        while not could_hold(fleet, worker):
            turn += 1
            worker = first + turn % number
        fleet.turn[router.place] = turn + 1
        return worker
    if able == number and code in (LEAST_OUTSTANDING, LEAST_KV):
        return first + tree.first(fleet.loads[router.place])
    draw = 4 * request + 2 * router.place
    if code in (RANDOM, POWER_OF_TWO):
        one = one_of(router.seed, draw, able)
        other = one_of(router.seed, draw + 1, max(able - 1, 1))
        other += other >= one and able > 1
        one = nth_able(fleet, router, one, able)
        if code == RANDOM:
            return one
        other = nth_able(fleet, router, other, able)
        return one if believed(fleet, one) <= believed(fleet, other) else other
    if code >= KV_AWARE:
        blocks = survey(world, router, request, t)
        worker = choose_own(world, router, request, blocks, t) if code == OWN else choose(world, router, blocks, draw)
        fleet.expected[unsigned(request)] = whole(fleet.survey[FOUND_BLOCKS, unsigned(worker)])
        if fleet.view_age.size > 0:
            fleet.view_age[unsigned(request)] = age_of_view(world, router, worker, t)
        return worker
    best = whole(-1)
    least = np.inf
    for worker in range(first, first + number):
        if could_hold(fleet, worker) and load_of(fleet, router, worker) < least:
            best, least = worker, load_of(fleet, router, worker)
    return best


@bare
def age_of_view(world, router, worker, t):
    """How long ago the first step began of whose changes to a worker's cache a router doesn't know; 0: it knows all."""
    if router.credit == 0.0 or not memory_of(world.groups[unsigned(world.fleet.group[unsigned(worker)])]).caching:
        return 0.0
    return max(t - seen.known_until(world.fleet.seen[unsigned(worker)], t - router.latency), 0.0)


@bare
def nth_able(fleet, router, nth, able):
    """The n-th worker that could hold a request."""
    worker = router.first + nth
    if able == router.number:
        return worker
    worker = router.first
    while nth > 0 or not could_hold(fleet, worker):
        nth -= could_hold(fleet, worker)
        worker += 1
    return worker


@bare
def survey(world, router, request, t):
    """Find out how a router's workers are, into `fleet.survey`; returns the blocks of the prompt."""
    fleet, load, cache = world.fleet, world.load, world.cache
    prompt = whole(load.prompt_tokens[unsigned(request)])
    credited = router.credit != 0.0
    incoming = whole(0)
    for worker in range(router.first, router.first + router.number):
        w = unsigned(worker)
        memory = memory_of(world.groups[unsigned(fleet.group[w])])
        incoming = blocks_for(prompt, memory.block_size, memory.shift)
        hit = most = whole(0)
        lower = 0.0
        overlap = credited and (could_hold(fleet, worker) or router.code == OWN)  # whose rule is told of all
        if overlap and memory.caching:
            shared, _ = blocks_with_ids(cache, memory, request)
            most = min(shared, full_blocks(prompt - 1, memory.block_size, memory.shift))
            until = seen.known_until(fleet.seen[w], t - router.latency)
            while hit < most:
                id_ = whole(block_id(cache.ids, request, hit))
                if not seen.is_known(fleet.seen[w], id_, fleet.node_of[w, unsigned(id_)] >= 0, until):
                    break
                hit += 1
        found = hit
        if overlap and has_tiers(world, worker):
            while found < most:
                id_ = whole(block_id(cache.ids, request, found))
                if is_known_in(world.tiers, worker, HOST, id_, t - router.latency):
                    lower += router.host_credit
                elif is_known_in(world.tiers, worker, DISK, id_, t - router.latency):
                    lower += router.disk_credit
                else:
                    break
                found += 1
        fleet.survey[ABLE, w] = could_hold(fleet, worker)
        fleet.survey[OUTSTANDING, w] = believed(fleet, worker)
        fleet.survey[WAITS, w] = fleet.counts[w, WAITING]
        fleet.survey[RUNS, w] = fleet.counts[w, RUNNING]
        fleet.survey[KV_USE, w] = (fleet.blocks[w] - fleet.counts[w, FREE]) / fleet.blocks[w]
        fleet.survey[HIT_BLOCKS, w] = hit + lower
        fleet.survey[FOUND_BLOCKS, w] = found
        fleet.survey[PREFILL_BLOCKS, w] = fleet.sent_new[w] - fleet.counts[w, BEGUN_BLOCKS]
        fleet.survey[DECODE_BLOCKS, w] = fleet.sent_blocks[w] - fleet.counts[w, LEFT_BLOCKS]
    return incoming


@bare
def choose(world, router, incoming, draw):
    """The worker of the least cost, one of them at random; or any, the likelier the less it costs."""
    fleet, costs = world.fleet, world.fleet.survey[COST]
    first, last = router.first, router.first + router.number
    longest = 0.0
    for worker in range(first, last):
        longest = max(longest, fleet.survey[WAITS, unsigned(worker)])
    least, most, ties = np.inf, -np.inf, whole(0)
    for worker in range(first, last):
        w = unsigned(worker)
        hit = fleet.survey[HIT_BLOCKS, w]
        if router.code == OVERLAP:
            waits = fleet.survey[WAITS, w] / longest if longest > 0.0 else 0.0
            costs[w] = fleet.survey[KV_USE, w] + waits - 2.0 * hit / max(incoming, 1)
        else:
            raw = fleet.survey[PREFILL_BLOCKS, w] + incoming - router.credit * hit
            costs[w] = router.scale * max(raw, 0.0)
            if router.decode_counts:
                costs[w] += fleet.survey[DECODE_BLOCKS, w]
        if fleet.survey[ABLE, w] == 0.0:
            continue
        if costs[w] < least:
            least, ties = costs[w], 0
        ties += costs[w] == least
        most = max(most, costs[w])
    if router.temperature > 0.0 and most > least:
        total = 0.0
        for worker in range(first, last):
            costs[unsigned(worker)] = weight(world, router, worker, least, most)
            total += costs[unsigned(worker)]
        left = uniform(router.seed, draw) * total
        chosen = whole(-1)
        for worker in range(first, last):
            if costs[unsigned(worker)] > 0.0:
                chosen = worker
                left -= costs[unsigned(worker)]
                if left < 0.0:
                    break
        return chosen
    nth = one_of(router.seed, draw, ties)
    worker = first
    while True:
        if fleet.survey[ABLE, unsigned(worker)] != 0.0 and costs[unsigned(worker)] == least:
            if nth == 0:
                return worker
            nth -= 1
        worker += 1


@inlined
def weight(world, router, worker, least, most):
    """How likely a worker is chosen, beside others, at a temperature."""
    w = unsigned(worker)
    if world.fleet.survey[ABLE, w] == 0.0:
        return 0.0
    return math.exp(-(world.fleet.survey[COST, w] - least) / (most - least) / router.temperature)


@bare
def choose_own(world, router, request, incoming, t):
    """What the user's own rule chooses; the first that could hold the request where it chooses none such."""
    fleet, rows = world.fleet, world.fleet.survey
    first, last = router.first, router.first + router.number
    chosen = call_router(
        router.rule,
        (
            RouterView(
                rows[ABLE, first:last],
                rows[OUTSTANDING, first:last],
                rows[WAITS, first:last],
                rows[RUNS, first:last],
                rows[KV_USE, first:last],
                rows[HIT_BLOCKS, first:last],
                rows[PREFILL_BLOCKS, first:last],
                rows[DECODE_BLOCKS, first:last],
                whole(world.load.prompt_tokens[unsigned(request)]),
                incoming,
                served_before(fleet, router, request) - first,
                whole(request),
                t,
            ),
        ),
    )
    if 0 <= chosen < router.number and rows[ABLE, unsigned(first + chosen)] != 0.0:
        return first + chosen
    return nth_able(fleet, router, whole(0), whole(0))
