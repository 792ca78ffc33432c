"""A binary heap of requests, the least key first: ties by time of arrival, then by number."""

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
    place = size
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
