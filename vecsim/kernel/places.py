"""Where in the KV memory a request's blocks lie, for transfers that move runs of neighbours at once.

A prompt's blocks get their places all together: at its prefill worker when its prefill ends, at its decode worker when
they are reserved. What decoding fills gets places when the request ends, and gives them back with the others.
"""

from vecsim.kernel import runs
from vecsim.kernel.jit import bare, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.token_scenarios import memory_of
from vecsim.kernel.world import kind_of

# Sides of a transfer
SOURCE, DESTINATION, SIDES = range(3)

# Rows of `chains`: a request's first block on each side, and how many there are
FIRST, COUNT, CHAIN_ROWS = range(3)


@bare
def reset_places(world):
    """All blocks of all workers free, in order."""
    fleet = world.fleet
    for worker in range(fleet.group.size):
        runs.reset(fleet.allocator, worker, whole(fleet.counts[unsigned(worker), FREE]))
    for request in range(world.load.prompt_tokens.size):
        fleet.chains[COUNT, unsigned(request)] = 0
        fleet.chains[CHAIN_ROWS + COUNT, unsigned(request)] = 0


@bare
def take_places(world, side, request, worker, count):
    """Give a request's blocks on one side their places."""
    fleet = world.fleet
    row, r, w = unsigned(CHAIN_ROWS * side), unsigned(request), unsigned(worker)
    count = min(count, whole(fleet.allocator.counts[runs.FREE, w]))
    memory = memory_of(world.groups[kind_of(world, worker)])
    runs.take(fleet.allocator, whole(worker), count, fleet.places[0], whole(0), memory.front)
    for i in range(count):
        fleet.next_block[w, unsigned(fleet.places[0, unsigned(i)])] = fleet.places[0, unsigned(i + 1)]
    fleet.chains[row + FIRST, r] = fleet.places[0, 0]
    fleet.chains[row + COUNT, r] = count


@bare
def lay_out(world, side, request, worker):
    """Write a request's places on one side into `fleet.places`; returns how many there are."""
    fleet = world.fleet
    row, r, w = unsigned(CHAIN_ROWS * side), unsigned(request), unsigned(worker)
    count = whole(fleet.chains[row + COUNT, r])
    block = fleet.chains[row + FIRST, r]
    for i in range(count):
        fleet.places[unsigned(side), unsigned(i)] = block
        block = fleet.next_block[w, unsigned(block)]
    return count


@bare
def free_places(world, side, request, worker, held):
    """Give back a request's places on one side, and those of what it has filled since, `held` blocks in all."""
    fleet = world.fleet
    w = unsigned(worker)
    count = lay_out(world, side, request, worker)
    more = min(held - count, whole(fleet.allocator.counts[runs.FREE, w]))
    if more > 0:
        memory = memory_of(world.groups[kind_of(world, worker)])
        runs.take(fleet.allocator, whole(worker), more, fleet.places[unsigned(side)], count, memory.front)
        count += more
    runs.release(fleet.allocator, whole(worker), count, fleet.places[unsigned(side)], whole(0), True)
    fleet.chains[unsigned(CHAIN_ROWS * side + COUNT), unsigned(request)] = 0


@bare
def runs_to_move(world, request, source, destination, found, blocks):
    """Stretches of neighbours, in order, on both sides, of a request's blocks but for the first ones `found` there."""
    fleet = world.fleet
    there = lay_out(world, whole(SOURCE), request, source)
    here = lay_out(world, whole(DESTINATION), request, destination)
    number = min(blocks, there - found, here)
    stretches = runs.runs_on_both(fleet.places[SOURCE], found, fleet.places[DESTINATION], whole(0), number)
    return stretches + blocks - number
