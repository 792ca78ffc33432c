"""Block allocators that know places: which blocks a request gets, and how many stretches of neighbours they are.

Paged: free blocks form a ring; those taken are the longest free (the front, as in vLLM's free queue) or those freed
last. Contiguous: first fit, over a binary tree whose nodes know the free stretches of their range, so that the lowest
one of a length is found in O(log blocks); where none is long enough, the longest is taken, then what fits the rest.
"""

from typing import NamedTuple

import numpy as np

from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.state import Array

# Rows of `counts` [row, worker]: its blocks, how many are free, where the ring of them begins
BLOCKS, FREE, HEAD, COUNT_ROWS = range(4)

# Of a node [worker, node, these]: free blocks at the begin of its range, at its end, and in the longest stretch
BEGIN, END, LONGEST, NODE_SIZE = range(4)


class Allocator(NamedTuple):
    """Free blocks of each worker: `ring` of the paged allocator or `tree` of first fit, the other one empty."""

    counts: Array
    ring: Array
    tree: Array


def allocator_for(workers: int, blocks: int, first_fit: bool) -> Allocator:
    """Memory for workers of at most so many blocks; `reset` makes it ready."""
    leaves = 1 << max(blocks - 1, 0).bit_length()
    return Allocator(
        counts=np.zeros((COUNT_ROWS, workers), np.int64),
        ring=np.empty((workers, 0 if first_fit else blocks), np.int32),
        tree=np.empty((workers, 2 * leaves if first_fit else 0, NODE_SIZE), np.int32),
    )


@bare
def reset(allocator, worker, blocks):
    """All blocks of a worker free, in order. O(most blocks of a worker)."""
    at = unsigned(worker)
    allocator.counts[BLOCKS, at] = blocks
    allocator.counts[FREE, at] = blocks
    allocator.counts[HEAD, at] = 0
    if allocator.tree.shape[1] == 0:
        for place in range(blocks):
            allocator.ring[at, unsigned(place)] = place
        return
    leaves = allocator.tree.shape[1] // 2
    for place in range(leaves):
        for part in range(NODE_SIZE):
            allocator.tree[at, unsigned(leaves + place), unsigned(part)] = place < blocks
    length = 1
    for node in range(leaves - 1, 0, -1):
        if node & (node + 1) == 0:  # the last node of a level
            length *= 2
        pull(allocator.tree, at, node, length // 2)


@bare
def take(allocator, worker, count, places, start, latest):
    """Take free blocks, which there must be, and write their places into `places` from `start` on.

    `latest` is whether the paged allocator takes those freed last. O(count); of first fit, O(count + stretches that
    they are x log blocks).
    """
    at = unsigned(worker)
    free = int(allocator.counts[FREE, at])
    allocator.counts[FREE, at] = free - count
    if allocator.tree.shape[1] == 0:
        head, blocks = int(allocator.counts[HEAD, at]), int(allocator.counts[BLOCKS, at])
        if not latest:
            place = head
            for i in range(count):
                places[unsigned(start + i)] = allocator.ring[at, unsigned(place)]
                place = place + 1 if place + 1 < blocks else 0
            allocator.counts[HEAD, at] = place
        else:
            place = head + free if head + free < blocks else head + free - blocks
            for i in range(count):
                place = place - 1 if place > 0 else blocks - 1
                places[unsigned(start + i)] = allocator.ring[at, unsigned(place)]
        return
    while count > 0:
        length = min(count, int(allocator.tree[at, unsigned(1), LONGEST]))
        first = lowest(allocator.tree, at, length)
        mark(allocator.tree, at, first, first + length, 0)
        for i in range(length):
            places[unsigned(start + i)] = first + i
        start += length
        count -= length


@bare
def release(allocator, worker, count, places, start, deepest_first):
    """Free the blocks at `places` from `start` on; a ring gets them in order, or the last one first as in vLLM.

    O(count); of first fit, O(count + stretches that they are x log blocks).
    """
    at = unsigned(worker)
    free = int(allocator.counts[FREE, at])
    allocator.counts[FREE, at] = free + count
    if allocator.tree.shape[1] == 0:
        blocks = int(allocator.counts[BLOCKS, at])
        place = int(allocator.counts[HEAD, at]) + free
        place = place if place < blocks else place - blocks
        for i in range(count):
            from_ = start + count - 1 - i if deepest_first else start + i
            allocator.ring[at, unsigned(place)] = places[unsigned(from_)]
            place = place + 1 if place + 1 < blocks else 0
        return
    i = 0
    while i < count:
        first = whole(places[unsigned(start + i)])
        length = 1
        while i + length < count and places[unsigned(start + i + length)] == first + length:
            length += 1
        mark(allocator.tree, at, first, first + length, 1)
        i += length


@bare
def runs(places, start, count):
    """Stretches of blocks that are adjacent, in order. O(count)."""
    number = 1 if count > 0 else 0
    for i in range(1, count):
        number += places[unsigned(start + i)] != places[unsigned(start + i - 1)] + 1
    return number


@bare
def runs_on_both(source, source_start, destination, destination_start, count):
    """Stretches of blocks that are adjacent, in order, on both sides. O(count)."""
    number = 1 if count > 0 else 0
    for i in range(1, count):
        a, b = source_start + i, destination_start + i
        apart = source[unsigned(a)] != source[unsigned(a - 1)] + 1
        number += apart or destination[unsigned(b)] != destination[unsigned(b - 1)] + 1
    return number


@inlined
def pull(tree, worker, node, half):
    """What a node knows, from its two halves of so many blocks each."""
    at, left, right = unsigned(node), unsigned(2 * node), unsigned(2 * node + 1)
    begin, end = int(tree[worker, left, BEGIN]), int(tree[worker, right, END])
    between = int(tree[worker, left, END]) + int(tree[worker, right, BEGIN])
    tree[worker, at, BEGIN] = half + int(tree[worker, right, BEGIN]) if begin == half else begin
    tree[worker, at, END] = half + int(tree[worker, left, END]) if end == half else end
    longest = max(int(tree[worker, left, LONGEST]), int(tree[worker, right, LONGEST]))
    tree[worker, at, LONGEST] = max(longest, between)


@bare
def mark(tree, worker, first, last, free):
    """Make blocks [first, last) free (1) or not (0). O(last - first + log blocks)."""
    leaves = tree.shape[1] // 2
    low, high = leaves + first, leaves + last - 1
    for node in range(low, high + 1):
        for part in range(NODE_SIZE):
            tree[worker, unsigned(node), unsigned(part)] = free
    half = 1
    while low > 1:
        low, high = low >> 1, high >> 1
        for node in range(low, high + 1):
            pull(tree, worker, node, half)
        half *= 2


@bare
def lowest(tree, worker, length):
    """First block of the lowest free stretch of a length, which there must be. O(log blocks)."""
    half = tree.shape[1] // 4
    node, begin = 1, 0
    while half > 0:
        left, right = unsigned(2 * node), unsigned(2 * node + 1)
        if tree[worker, left, LONGEST] >= length:
            node = 2 * node
        elif int(tree[worker, left, END]) + int(tree[worker, right, BEGIN]) >= length:
            return begin + half - int(tree[worker, left, END])
        else:
            node, begin = 2 * node + 1, begin + half
        half //= 2
    return begin
