"""Which worker a request goes to. O(1) or O(log workers), but where a router compares what each worker has cached."""

import numpy as np

from vecsim.kernel import tree
from vecsim.kernel.jit import bare, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.token_state import LEFT

# Routers, in the order of `vecsim.routing.ROUTERS`
ROUND_ROBIN, RANDOM, LEAST_OUTSTANDING, POWER_OF_TWO, LEAST_KV, STICKY = range(6)


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


@bare
def outstanding(fleet, worker):
    """Requests sent to a worker that have not ended."""
    w = unsigned(worker)
    return int(fleet.sent[w] - fleet.counts[w, LEFT])


@bare
def load_of(fleet, router, worker):
    """What a router wants to be least; 0 where it goes by no load."""
    w = unsigned(worker)
    if router.code == LEAST_KV:
        return (fleet.blocks[w] - fleet.counts[w, FREE]) / fleet.blocks[w]
    return float(outstanding(fleet, worker))


@bare
def route(fleet, router, loads, request, first, number):
    """One of `number` workers from the first on for a request; -1 where none could ever hold it.

    `fleet.fits` [kind] is whether it could. Those that could not are passed over. `loads` is the tree of theirs.
    """
    fits = fleet.fits
    last = first + number
    able = 0
    for worker in range(first, last):
        able += fits[unsigned(fleet.group[unsigned(worker)])]
        if able > 0 and router.alike:
            able = number
            break
    if able == 0:
        return -1
    code = router.code
    if code == STICKY and fleet.bound[unsigned(request)] >= 0:
        worker = whole(fleet.bound[unsigned(request)])
        if fits[unsigned(fleet.group[unsigned(worker)])]:
            return worker
    if code in (ROUND_ROBIN, STICKY):
        while True:
            worker = first + int(fleet.turn[router.place] % number)
            fleet.turn[router.place] += 1
            if fits[unsigned(fleet.group[unsigned(worker)])]:
                return worker
    if able == number and code in (LEAST_OUTSTANDING, LEAST_KV):
        return first + tree.first(loads)
    if code in (RANDOM, POWER_OF_TWO):
        one = one_of(router.seed, 4 * request + 2 * router.place, able)
        other = one_of(router.seed, 4 * request + 2 * router.place + 1, max(able - 1, 1))
        other += other >= one and able > 1
        one = nth_able(fleet, fits, first, one, able == number)
        if code == RANDOM:
            return one
        other = nth_able(fleet, fits, first, other, able == number)
        return one if outstanding(fleet, one) <= outstanding(fleet, other) else other
    best = -1
    least = np.inf
    for worker in range(first, last):
        if fits[unsigned(fleet.group[unsigned(worker)])] and load_of(fleet, router, worker) < least:
            best, least = worker, load_of(fleet, router, worker)
    return best


@bare
def nth_able(fleet, fits, first, number, all_able):
    """The n-th worker that could hold a request."""
    if all_able:
        return first + number
    worker = first
    while True:
        if fits[unsigned(fleet.group[unsigned(worker)])]:
            if number == 0:
                return worker
            number -= 1
        worker += 1
