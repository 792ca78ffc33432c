"""A tournament of numbers, one for each worker: the least is found in O(1), a change costs O(log workers)."""

import numpy as np

from vecsim.kernel.jit import bare, unsigned


@bare
def clear(tree):
    """Set every number to infinity; `tree` has twice as many places as there are numbers, a power of two."""
    tree[:] = np.inf


@bare
def put(tree, number, value):
    """Change one number."""
    place = (tree.size >> 1) + int(number)
    tree[unsigned(place)] = value
    while place > 1:
        place >>= 1
        least = min(tree[unsigned(2 * place)], tree[unsigned(2 * place + 1)])
        if tree[unsigned(place)] == least:
            break
        tree[unsigned(place)] = least


@bare
def first(tree):
    """Which number is the least, the first of those that are equal. O(log workers)."""
    place = 1
    half = tree.size >> 1
    while place < half:
        place *= 2
        if tree[unsigned(place)] > tree[unsigned(place + 1)]:
            place += 1
    return place - half
