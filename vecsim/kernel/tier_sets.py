"""Which blocks are in a worker's host memory, and on its disk: sets of ids, the least recently used goes. O(1) a block.

Each is a list by last use, linked by id. The last place of the links ties both ends together.
"""

import numpy as np

from vecsim.kernel import links
from vecsim.kernel.address import call_tiers
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.token_scenarios import CAPACITY

HOST, DISK, LEVELS = range(3)

# In `after`: the block isn't in the tier. In `line`: it neither waits to go there nor is on its way; the last one
ABSENT, LAST = -1, -1
NOT_OFFERED = -2

# Places in `lists` [worker, tier]: blocks in it; the first and last that wait to go there; batches that move; the first
# block of each, -1 where there is none
COUNT, LINE_FIRST, LINE_LAST, MOVING, BATCHES = range(5)

# Rows of `changed` [worker, 2 x tier + row]: when a block came and went
CAME, WENT = range(2)

# Rows of `way` [request]: its leading blocks found in GPU memory; then those in host memory and on disk, of the
# admission that its hits are told of; flows that it waits for, a bit for each tier; whether it is in the line for
# blocks; its worker
FOUND, HOST_BLOCKS, DISK_BLOCKS, PENDING, IN_LINE, AT, WAY_ROWS = range(7)

# Rows of `instants` [request], seconds: it asked for blocks; they began to move, and all were there, for that admission
ASKED_AT, BEGAN_AT, ENDED_AT, INSTANT_ROWS = range(4)

# What `vecsim.kernel.tiers.tiers_act` is to do: begin a run; the first flow of all ends; offer what a worker has
# registered; a request comes to it; blocks may be there for one that waits; a worker loses all; end the run
BEGINS, FLOW_ENDS, OFFERS, COMES, RISES, CLEARS, ENDS = range(7)

# Rows of `numbers` [worker]: prompt tokens found in each tier, of measured requests; requests whose blocks move up, and
# all that did; blocks that came to each tier, that went from it, and whose offers were dropped
(
    HOST_TOKENS, DISK_TOKENS, RISING, RISEN, HOST_IN, DISK_IN, HOST_OUT, DISK_OUT, HOST_DROPPED, DISK_DROPPED,
    NUMBER_ROWS,
) = range(11)  # fmt: skip


@inlined
def has_tiers(world, worker):
    """Whether a worker has host memory."""
    return world.tiers.on and world.groups[unsigned(world.fleet.group[unsigned(worker)]), CAPACITY] > 0.0


@inlined
def next_flow_end(world):
    """When the first flow ends."""
    end, _ = links.next_end(world.tiers.links)
    return end


@bare
def act(world, what, request, worker, t):
    """Call `vecsim.kernel.tiers.tiers_act`."""
    return call_tiers(world.tiers_act, (world, whole(what), whole(request), whole(worker), t)) != 0


@bare
def forget_rise(tiers, request):
    """Nothing is known yet of what is brought up for a request."""
    r = unsigned(request)
    tiers.way[HOST_BLOCKS, r] = tiers.way[DISK_BLOCKS, r] = 0
    tiers.instants[BEGAN_AT, r] = tiers.instants[ENDED_AT, r] = np.nan


@inlined
def is_in(tiers, worker, tier, id_):
    """Whether a block is in a tier."""
    return tiers.after[unsigned(worker), unsigned(tier), unsigned(id_)] != ABSENT


@bare
def unlink(tiers, worker, tier, id_):
    """Take a block out of the list of a tier."""
    w, at = unsigned(worker), unsigned(tier)
    after, before = tiers.after[w, at, unsigned(id_)], tiers.before[w, at, unsigned(id_)]
    tiers.after[w, at, unsigned(before)] = after
    tiers.before[w, at, unsigned(after)] = before


@bare
def link_last(tiers, worker, tier, id_):
    """Put a block at the end of the list of a tier: it was used last."""
    w, at, end = unsigned(worker), unsigned(tier), tiers.after.shape[2] - 1
    before = tiers.before[w, at, unsigned(end)]
    tiers.after[w, at, unsigned(before)] = id_
    tiers.before[w, at, unsigned(id_)] = before
    tiers.after[w, at, unsigned(id_)] = end
    tiers.before[w, at, unsigned(end)] = id_


@bare
def renew(tiers, worker, tier, id_):
    """A block of a tier is used."""
    unlink(tiers, worker, tier, id_)
    link_last(tiers, worker, tier, id_)


@bare
def note(tiers, worker, tier, id_, row, t):
    """A block has come to a tier, or gone, which routers are told of."""
    if tiers.changed.shape[2] > 0:
        tiers.changed[unsigned(worker), unsigned(2 * tier + row), unsigned(id_)] = t


@bare
def store(tiers, worker, tier, id_, capacity, t):
    """A block comes to a tier where it isn't, the least recently used goes if that is full."""
    w, at = unsigned(worker), unsigned(tier)
    if tiers.lists[w, at, COUNT] >= capacity:
        oldest = whole(tiers.after[w, at, unsigned(tiers.after.shape[2] - 1)])
        unlink(tiers, worker, tier, oldest)
        tiers.after[w, at, unsigned(oldest)] = ABSENT
        tiers.lists[w, at, COUNT] -= 1
        tiers.numbers[unsigned(HOST_OUT + tier), w] += 1
        note(tiers, worker, tier, oldest, whole(WENT), t)
    link_last(tiers, worker, tier, id_)
    tiers.lists[w, at, COUNT] += 1
    tiers.numbers[unsigned(HOST_IN + tier), w] += 1
    note(tiers, worker, tier, id_, whole(CAME), t)


@inlined
def is_known_in(tiers, worker, tier, id_, until):
    """Whether routers that know what happened until then take a block to be in a tier."""
    w, i = unsigned(worker), unsigned(id_)
    came, went = tiers.changed[w, unsigned(2 * tier + CAME), i], tiers.changed[w, unsigned(2 * tier + WENT), i]
    if is_in(tiers, worker, tier, id_):
        return came <= until or went > until
    return came <= until < went
