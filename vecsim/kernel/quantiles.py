"""Exact quantiles without sorting, in O(n): 4 ns a value for four quantiles, where numba's sort takes 70.

Non-negative float64 order like their bits. So the top bits (64 bins an octave) give a value's bin; counts
tell which bins hold the wanted ranks; only the values in those are selected among.
"""

import numpy as np

from vecsim.kernel.jit import inner, unsigned

SHIFT = 46  # 52 bits of mantissa less 6: 64 bins an octave
LOWEST = (1023 - 20) << 6  # bin 0 holds 0 and all below 2**-20, the last one all from 2**40 on
BINS = 60 * 64 + 1


@inner
def bin_of(value):
    """Bin of a non-negative value; ascends with it."""
    return min(max((np.float64(value).view(np.int64) >> SHIFT) - LOWEST, 0), BINS - 1)


@inner
def select(values, first, last, k):
    """Move the value of rank k into place k of values[first:last + 1] (Hoare's selection). O(n)."""
    while first < last:
        pivot = values[unsigned(k)]
        i = first
        j = last
        while i <= j:
            while values[unsigned(i)] < pivot:
                i += 1
            while pivot < values[unsigned(j)]:
                j -= 1
            if i <= j:
                values[unsigned(i)], values[unsigned(j)] = values[unsigned(j)], values[unsigned(i)]
                i += 1
                j -= 1
        if j < k:
            first = i
        if k < i:
            last = j


@inner
def is_flat(values, first, last):
    """Whether values[first:last + 1] are all the same. O(n) at worst, mostly O(1)."""
    for i in range(first + 1, last + 1):
        if values[unsigned(i)] != values[unsigned(first)]:
            return False
    return True


@inner
def interpolate(low, high, weight):
    """`numpy.quantile`'s linear interpolation, to the bit."""
    gap = high - low
    return high - gap * (1.0 - weight) if weight >= 0.5 else low + gap * weight


@inner
def quantiles(values, smallest, largest, wanted, counts, places, bins, kept, out):
    """`numpy.quantile(values, wanted)` of one or more non-negative values, into `out`; `wanted` ascends.

    Works in `counts` and `places` [bin], `bins` [value] and `kept` [value + 1].
    """
    n = values.size
    if smallest == largest:
        for q in range(wanted.size):
            out[q] = smallest
        return
    lowest, highest = bin_of(smallest), bin_of(largest)
    for i in range(lowest, highest + 1):
        counts[i] = 0
        places[i] = 0
    for i in range(n):
        b = bin_of(values[i])
        bins[i] = b
        counts[unsigned(b)] += 1

    # The bin of each wanted rank and of the next one, and how many values lie in lower bins. Such a bin gets a
    # place among the kept values; place 0 is for all others.
    where = np.empty((2 * wanted.size, 2), np.int64)
    bin_ = lowest
    below = 0
    end = 1
    known = -1
    for q in range(wanted.size):
        rank = int((n - 1) * wanted[q])
        if rank == known:  # the walk may have gone past it
            for side in range(2):
                for j in range(2):
                    where[2 * q + side, j] = where[2 * q - 2 + side, j]
            continue
        known = rank
        for side in range(2):
            while below + counts[unsigned(bin_)] <= min(rank + side, n - 1):
                below += counts[unsigned(bin_)]
                bin_ += 1
            where[2 * q + side, 0] = bin_
            where[2 * q + side, 1] = below
            if places[unsigned(bin_)] == 0:
                places[unsigned(bin_)] = end
                end += counts[unsigned(bin_)]
    for i in range(n):
        b = unsigned(bins[i])
        place = int(places[b])
        if place > 0:
            kept[unsigned(place)] = values[i]
            places[b] = place + 1

    # In each such bin select from the last rank on, unless it holds one value only.
    first = last = known = -1
    flat = False
    low = high = 0.0
    for q in range(wanted.size):
        position = (n - 1) * wanted[q]
        rank = int(position)
        for side in range(2 if rank != known else 0):
            bin_ = where[2 * q + side, 0]
            below = where[2 * q + side, 1]
            end = int(places[unsigned(bin_)])
            begin = end - counts[unsigned(bin_)]
            if end - 1 != last:
                first, last = begin, end - 1
                flat = is_flat(kept, first, last)
            k = begin + min(rank + side, n - 1) - below
            if not flat:
                select(kept, first, last, k)
                first = k
            low, high = high, kept[unsigned(k)]
        known = rank
        out[q] = interpolate(low, high, position - rank)


@inner
def weighted_quantiles(values, weights, total, wanted, out):
    """Quantiles of the sample in which ascending values[i] stands weights[i] times. O(values)."""
    i = below = 0
    known = -1
    low = high = 0.0
    for q in range(wanted.size):
        position = (total - 1) * wanted[q]
        rank = int(position)
        for r in range(rank, min(rank + 2, total) if rank != known else rank):
            while below + weights[i] <= r:
                below += weights[i]
                i += 1
            high = values[i]
            if r == rank:
                low = high
        known = rank
        out[q] = interpolate(low, high, position - rank)
