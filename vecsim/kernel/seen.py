"""What others know of a worker's cached blocks: changes are published at the end of the step that made them.

Those between two steps are published with the next one.

Each block of a given id has the times of its last two changes. So what was known at an earlier time can be told from
what is there now; where a block came and went more than once since, the last two times count.

Where there are lower tiers, blocks that were named since the worker's last boundary form a list too, the last first.
"""

import numpy as np

from vecsim.kernel.jit import bare, inlined, unsigned

# Steps with changes whose ends are kept: those before are known to all
RING = 64

# Places in `seen`: the time at which the step began that is under way, or of the first change since the last one;
# whether there was any; how many such steps there were; where the list of new blocks is, 0 if there is none, and its
# first; when the last of those steps began and ended; from `CHANGES` on, when a block [id] was named, and was evicted;
# last the links of the list [id]
CLOCK, FRESH, PUBLISHED, LIST, NEWEST, STEPS, CHANGES = 0, 1, 2, 3, 4, 5, 5 + 2 * RING
NAMED, EVICTED = range(2)


def places(ids, listed):
    """How much room there must be for so many ids; `listed` is whether new blocks form a list."""
    return CHANGES + (3 if listed else 2) * ids


@bare
def reset(seen):
    """Nothing is cached."""
    for place in range(CHANGES):
        if place != LIST:
            seen[unsigned(place)] = 0.0
    seen[NEWEST] = -1.0
    for place in range(CHANGES, seen.size):
        seen[unsigned(place)] = -np.inf


@inlined
def note(seen, id_, change):
    """A block has just been named or evicted."""
    if seen.size > 0:
        seen[unsigned(CHANGES + 2 * id_ + change)] = seen[CLOCK]
        seen[FRESH] = 1.0
        if seen[LIST] > 0.0 and change == NAMED:
            link = unsigned(seen[LIST]) + unsigned(id_)
            if seen[link] == -np.inf:
                seen[link] = seen[NEWEST]
                seen[NEWEST] = id_


@inlined
def has_new(seen):
    """Whether there are new blocks to be offered to a lower tier."""
    return seen.size > 0 and seen[LIST] > 0.0 and seen[NEWEST] >= 0.0


@bare
def take_new(seen):
    """The block that was named last, which is new no more."""
    id_ = int(seen[NEWEST])
    link = unsigned(int(seen[LIST]) + id_)
    seen[NEWEST] = seen[link]
    seen[link] = -np.inf
    return id_


@inlined
def begin(seen, t):
    """A step begins, or something changes while none is under way."""
    if seen.size > 0 and seen[FRESH] == 0.0:
        seen[CLOCK] = t


@inlined
def publish(seen, t):
    """What the step under way has changed is known to all from `t` on."""
    if seen.size > 0 and seen[FRESH] != 0.0:
        last = int(seen[PUBLISHED])
        at = STEPS + 2 * ((last - 1) % RING)
        if last == 0 or seen[unsigned(at)] != seen[CLOCK]:  # else it has published others of its changes
            at = STEPS + 2 * (last % RING)
            seen[unsigned(at)] = seen[CLOCK]
            seen[unsigned(at + 1)] = t
            seen[PUBLISHED] += 1.0
        seen[FRESH] = 0.0


@bare
def known_until(seen, t):
    """When the first step began of whose changes nobody knows at `t`; infinite if there is none. O(1)."""
    first = seen[CLOCK] if seen[FRESH] != 0.0 else np.inf
    last = int(seen[PUBLISHED])
    for step in range(last - 1, max(last - RING, 0) - 1, -1):
        at = STEPS + 2 * (step % RING)
        if seen[unsigned(at + 1)] <= t:
            break
        first = seen[unsigned(at)]
    return first


@inlined
def is_known(seen, id_, there, until):
    """Whether others take a block to be cached; `there` is whether it is."""
    at = CHANGES + 2 * id_
    if there:
        return seen[unsigned(at + NAMED)] < until or seen[unsigned(at + EVICTED)] >= until
    return seen[unsigned(at + EVICTED)] >= until and seen[unsigned(at + NAMED)] < until
