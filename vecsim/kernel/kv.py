"""KV blocks with a prefix cache: which blocks can be found by their ids, and in which order free ones are taken.

Free blocks form a queue, the least recently used first. A node of it is one block of a shared id, or a run of blocks
of one request, or of blocks that nobody can find: so the growth of decoding requests costs O(1) a step, and a
request costs O(blocks of its prompt that have ids). What decoding fills is named only when the request leaves, since
nobody can look for it before. `seen` is empty where nobody else looks, else as in `vecsim.kernel.seen`.
"""

from vecsim.kernel import seen as views
from vecsim.kernel.jit import bare, unsigned

# Places in `counters`
FREE, SPARE, UNUSED = range(3)

# Rows of `nodes`; node 0 ties both ends of the queue together
NEXT, PREVIOUS, COUNT, KEY, REFERENCES = range(5)
NODE_ROWS = 5

# Keys of nodes: a shared block's id; ANONYMOUS; RUN - request for the run of a request's own blocks
ANONYMOUS, RUN = -1, -2

# Rows of `owned` [request]
RUN_NODE, RUN_FULL, NAMED = range(3)
OWNED_ROWS = 3


@bare
def reset(counters, nodes, node_of, seen, blocks):
    """All blocks free, none named. O(ids)."""
    counters[SPARE] = 0
    counters[UNUSED] = 1
    counters[FREE] = 0
    nodes[NEXT, 0] = 0
    nodes[PREVIOUS, 0] = 0
    node_of[:] = -1
    if seen.size > 0:
        views.reset(seen)
    push(counters, nodes, ANONYMOUS, blocks, False)


@bare
def gather(counters, nodes):
    """All nodes are in use: make one, the last, of those whose blocks nobody can find. O(nodes).

    It takes requests that come back again and again to a memory that is never full.
    """
    last = node = int(nodes[PREVIOUS, 0])
    while node > 0:
        before = int(nodes[PREVIOUS, unsigned(node)])
        if nodes[KEY, unsigned(node)] == ANONYMOUS:
            if nodes[KEY, unsigned(last)] != ANONYMOUS:
                last = node
            elif node != last:
                count = nodes[COUNT, unsigned(node)]
                unlink(counters, nodes, node)
                drop_node(counters, nodes, node)
                nodes[COUNT, unsigned(last)] += count
                counters[FREE] += count
        node = before


@bare
def new_node(counters, nodes, key, count):
    """A node outside the queue."""
    if counters[SPARE] == 0 and counters[UNUSED] == nodes.shape[1]:
        gather(counters, nodes)
    node = counters[SPARE]
    if node > 0:
        counters[SPARE] = nodes[NEXT, unsigned(node)]
    else:
        node = counters[UNUSED]
        counters[UNUSED] += 1
    nodes[KEY, unsigned(node)] = key
    nodes[COUNT, unsigned(node)] = count
    return node


@bare
def drop_node(counters, nodes, node):
    nodes[NEXT, unsigned(node)] = counters[SPARE]
    counters[SPARE] = node


@bare
def link(counters, nodes, node, front):
    """Put a node at the end of the queue, or at its front."""
    before = 0 if front else int(nodes[PREVIOUS, 0])
    after = int(nodes[NEXT, unsigned(before)])
    nodes[NEXT, unsigned(before)] = node
    nodes[PREVIOUS, unsigned(node)] = before
    nodes[NEXT, unsigned(node)] = after
    nodes[PREVIOUS, unsigned(after)] = node
    counters[FREE] += nodes[COUNT, unsigned(node)]


@bare
def unlink(counters, nodes, node):
    before, after = int(nodes[PREVIOUS, unsigned(node)]), int(nodes[NEXT, unsigned(node)])
    nodes[NEXT, unsigned(before)] = after
    nodes[PREVIOUS, unsigned(after)] = before
    counters[FREE] -= nodes[COUNT, unsigned(node)]


@bare
def push(counters, nodes, key, count, front):
    """Free `count` blocks; those that nobody can find join others of their kind beside them."""
    beside = int(nodes[NEXT if front else PREVIOUS, 0])
    if key == ANONYMOUS and beside > 0 and nodes[KEY, unsigned(beside)] == ANONYMOUS:
        nodes[COUNT, unsigned(beside)] += count
        counters[FREE] += count
        return beside
    node = new_node(counters, nodes, key, count)
    link(counters, nodes, node, front)
    return node


@bare
def take(counters, nodes, node_of, seen, owned, count):
    """Take blocks from the front of the queue; what was cached in them is forgotten. O(nodes taken)."""
    while count > 0:
        node = int(nodes[NEXT, 0])
        key, size = int(nodes[KEY, unsigned(node)]), int(nodes[COUNT, unsigned(node)])
        taken = min(size, count)
        count -= taken
        if taken < size:
            nodes[COUNT, unsigned(node)] = size - taken
            counters[FREE] -= taken
            if key <= RUN:
                request = RUN - key
                owned[RUN_FULL, unsigned(request)] = min(owned[RUN_FULL, unsigned(request)], size - taken)
        else:
            unlink(counters, nodes, node)
            drop_node(counters, nodes, node)
            if key <= RUN:
                owned[RUN_NODE, unsigned(RUN - key)] = -1
            elif key >= 0:
                node_of[unsigned(key)] = -1
                views.note(seen, key, views.EVICTED)


@bare
def block_id(ids, request, place):
    """Id of a request's block.

    `ids` is (table, tokens of an id in blocks, first place of each request in the table, blocks of its prefix, first id
    of the prefix, first id of what follows): where there is no table, ids are numbered from the last two.
    """
    table, ratio, start, prefix, prefix_id, own_id = ids
    if table.size > 0:
        at = place // ratio
        return table[unsigned(start[unsigned(request)] + at)] * ratio + (place - at * ratio)
    if place < prefix[unsigned(request)]:
        return prefix_id[unsigned(request)] + place
    return own_id[unsigned(request)] + place


@bare
def name(counters, nodes, node_of, seen, own, ids, own_start, request, first, last):
    """Name a request's held blocks [first, last), which are full; where the id is taken the block stays its own."""
    for place in range(first, last):
        id_ = unsigned(block_id(ids, request, place))
        if node_of[id_] < 0:
            node = new_node(counters, nodes, id_, 1)
            nodes[REFERENCES, unsigned(node)] = 1
            node_of[id_] = node
            views.note(seen, id_, views.NAMED)
            own[unsigned(own_start + place)] = 0
        else:
            own[unsigned(own_start + place)] = 1


@bare
def look_up(nodes, node_of, owned, ids, shared, request, limit):
    """(cached blocks that a sequence begins with, at most `limit`; those of them that nobody holds). O(blocks found).

    `shared` is how many blocks of the request have given ids.
    """
    found = idle = 0
    most = min(shared, limit)
    while found < most:
        node = int(node_of[unsigned(block_id(ids, request, found))])
        if node < 0:
            return found, idle
        idle += nodes[REFERENCES, unsigned(node)] == 0
        found += 1
    if found == shared and found < limit and owned[RUN_NODE, unsigned(request)] >= 0:
        run = min(int(owned[RUN_FULL, unsigned(request)]), limit - found)
        found += run
        idle += run
    return found, idle


@bare
def disown(nodes, owned, request):
    """A request won't find its own blocks any more."""
    run = int(owned[RUN_NODE, unsigned(request)])
    if run >= 0:
        nodes[KEY, unsigned(run)] = ANONYMOUS
        owned[RUN_NODE, unsigned(request)] = -1


@bare
def claim(counters, nodes, node_of, owned, own, ids, shared, own_start, request, found):
    """Hold the blocks found. O(blocks found)."""
    for place in range(min(found, shared)):
        node = unsigned(node_of[unsigned(block_id(ids, request, place))])
        if nodes[REFERENCES, node] == 0:
            unlink(counters, nodes, int(node))
        nodes[REFERENCES, node] += 1
        own[unsigned(own_start + place)] = 0
    run = int(owned[RUN_NODE, unsigned(request)])
    if run >= 0:
        # What is left of the run is never looked for again: this request will have a run of its own.
        claimed = max(found - shared, 0)
        disown(nodes, owned, request)
        rest = int(nodes[COUNT, unsigned(run)]) - claimed
        counters[FREE] -= claimed
        nodes[COUNT, unsigned(run)] = rest
        if rest == 0:
            unlink(counters, nodes, run)
            drop_node(counters, nodes, run)
    owned[NAMED, unsigned(request)] = min(found, shared)


@bare
def release(
    counters, nodes, node_of, seen, owned, own, ids, shared, own_start, request, held, full, returns, front
):  # fmt: skip
    """Free a request's blocks, the deepest first. O(its blocks with given ids).

    Parameters
    ----------
    held, full : int
        Blocks that it holds, and how many of them are full.
    returns : bool
        Whether it will come back and look for its own blocks.
    front : bool
        Whether blocks without an id go to the front of the queue.
    """
    named = int(owned[NAMED, unsigned(request)])
    if named < min(full, shared):
        name(counters, nodes, node_of, seen, own, ids, own_start, request, named, min(full, shared))
        named = min(full, shared)
    for place in range(full, named):  # named when a step was formed that it was taken out of
        if not own[unsigned(own_start + place)]:
            id_ = int(block_id(ids, request, place))
            drop_node(counters, nodes, int(node_of[unsigned(id_)]))
            node_of[id_] = -1
            views.note(seen, id_, views.EVICTED)
    named = min(named, full)
    owned[NAMED, unsigned(request)] = 0
    own_full = max(full - shared, 0)  # of its own run
    partial = held - full
    if front and partial > 0:
        push(counters, nodes, ANONYMOUS, partial, True)
        partial = 0
    if own_full > 0 and returns:
        node = new_node(counters, nodes, RUN - request, own_full + partial)
        link(counters, nodes, node, False)
        owned[RUN_NODE, unsigned(request)] = node
        owned[RUN_FULL, unsigned(request)] = own_full
    elif own_full + partial > 0:
        push(counters, nodes, ANONYMOUS, own_full + partial, False)
    for place in range(named - 1, -1, -1):
        if own[unsigned(own_start + place)]:
            push(counters, nodes, ANONYMOUS, 1, front)
        else:
            node = unsigned(node_of[unsigned(block_id(ids, request, place))])
            nodes[REFERENCES, node] -= 1
            if nodes[REFERENCES, node] == 0:
                link(counters, nodes, int(node), False)
