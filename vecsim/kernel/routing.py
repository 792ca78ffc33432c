"""Which worker a request goes to. O(1) or O(log workers), but where a router compares what each worker has cached."""

import numpy as np

from vecsim.kernel import tree
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.token_state import LEFT, REPORTED, RUNNING

# Routers, in the order of `vecsim.routing.ROUTERS`
ROUND_ROBIN, RANDOM, LEAST_OUTSTANDING, POWER_OF_TWO, LEAST_KV, STICKY = range(6)

# Places of a router: it chooses who decodes, or who prefills only
DECODES, PREFILLS = range(2)

# Rows of `way` [request]: workers of its prefill and decode, -1 where there is none; others in `vecsim.kernel.handover`
PREFILLS_AT, DECODES_AT = range(2)


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
def outstanding(fleet, worker):
    """Requests sent to a worker that have not ended."""
    w = unsigned(worker)
    return int(fleet.sent[w] - fleet.counts[w, LEFT])


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
    return float(outstanding(fleet, worker))


@inlined
def could_hold(fleet, worker):
    """Whether a worker could ever hold the request that is looked at."""
    return fleet.fits[unsigned(fleet.group[unsigned(worker)])]


@bare
def route(fleet, router, request, able):
    """The worker for a request, of the `able` ones of the kinds in `fleet.fits`; -1 where there is none."""
    first, number = router.first, router.number
    if able == 0:
        return -1
    code = router.code
    if code == STICKY and fleet.before[unsigned(request)] >= 0:
        at = PREFILLS_AT if router.place == PREFILLS else DECODES_AT
        worker = whole(fleet.way[at, unsigned(fleet.before[unsigned(request)])])
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
    if code in (RANDOM, POWER_OF_TWO):
        draw = 4 * request + 2 * router.place
        one = one_of(router.seed, draw, able)
        other = one_of(router.seed, draw + 1, max(able - 1, 1))
        other += other >= one and able > 1
        one = nth_able(fleet, router, one, able)
        if code == RANDOM:
            return one
        other = nth_able(fleet, router, other, able)
        return one if outstanding(fleet, one) <= outstanding(fleet, other) else other
    best = -1
    least = np.inf
    for worker in range(first, first + number):
        if could_hold(fleet, worker) and load_of(fleet, router, worker) < least:
            best, least = worker, load_of(fleet, router, worker)
    return best


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
