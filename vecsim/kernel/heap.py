"""Heaps of requests, the least key first: ties by time of arrival, then by number.

One in an array, and one of links that requests have anyway: so that many queues share the room of one.
"""

from vecsim.kernel.jit import bare, unsigned


@bare
def is_before(keys, arrived_at, a, b):
    a, b = unsigned(a), unsigned(b)
    if keys[a] != keys[b]:
        return keys[a] < keys[b]
    if arrived_at[a] != arrived_at[b]:
        return arrived_at[a] < arrived_at[b]
    return a < b


@bare
def push(heap, size, request, keys, arrived_at):
    """Add a request to a heap of `size` requests. O(log n)."""
    rise(heap, size, request, keys, arrived_at)


@bare
def rise(heap, place, request, keys, arrived_at):
    """Put a request at a place of a heap, or nearer to its root. O(log n)."""
    while place > 0:
        above = (place - 1) // 2
        if not is_before(keys, arrived_at, request, heap[unsigned(above)]):
            break
        heap[unsigned(place)] = heap[unsigned(above)]
        place = above
    heap[unsigned(place)] = request


@bare
def pop(heap, size, keys, arrived_at):
    """Remove and return the first request of a heap of `size` requests. O(log n)."""
    first = int(heap[0])
    last = int(heap[unsigned(size - 1)])
    place = 0
    while 2 * place + 1 < size - 1:
        below = 2 * place + 1
        if below + 1 < size - 1 and is_before(keys, arrived_at, heap[unsigned(below + 1)], heap[unsigned(below)]):
            below += 1
        if not is_before(keys, arrived_at, heap[unsigned(below)], last):
            break
        heap[unsigned(place)] = heap[unsigned(below)]
        place = below
    heap[unsigned(place)] = last
    return first


@bare
def meld(a, b, left, right, keys, arrived_at):
    """Make one skew heap (Sleator, Tarjan, 1986) of two, -1 being the empty one; returns its root. O(log n), amortised.

    `left` and `right` are the links [request].
    """
    root = above = -1
    while a >= 0 and b >= 0:
        if is_before(keys, arrived_at, b, a):
            a, b = b, a
        if above < 0:
            root = a
        else:
            left[unsigned(above)] = a
        above = a
        a = int(right[unsigned(above)])
        right[unsigned(above)] = left[unsigned(above)]
    rest = a if a >= 0 else b
    if above < 0:
        return rest
    left[unsigned(above)] = rest
    return root


@bare
def enter(root, request, left, right, keys, arrived_at):
    """Add a request to a skew heap; returns its root."""
    left[unsigned(request)] = right[unsigned(request)] = -1
    return meld(int(root), int(request), left, right, keys, arrived_at)


@bare
def leave(root, left, right, keys, arrived_at):
    """Take the first request, the root, from a skew heap; returns the new root."""
    r = unsigned(root)
    return meld(int(left[r]), int(right[r]), left, right, keys, arrived_at)
