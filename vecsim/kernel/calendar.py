"""The calendar: which changes the running batch undergoes at which step.

When a request is admitted, the step of its first token and the step at which it ends are known. Three
counts a step say all that the engine needs to know of them, and they are added up in one word of 21 bits
each: requests that end, prefills that end, and prefills that end with decoding still to do. The words form
a ring indexed by step number; a size that exceeds the longest distance filed makes laps impossible.
"""

from vecsim.kernel.jit import inner, unsigned

BITS = 21  # so at most 2**21 - 1 requests in a batch
FIELD = (1 << BITS) - 1

ENDS = 1
PREFILL_ENDS = 1 << BITS
DECODE_BEGINS = 1 << 2 * BITS


@inner
def file(calendar, step, change):
    """Add a change at a step. O(1)."""
    calendar[unsigned(step & (calendar.size - 1))] += change


@inner
def take(calendar, step):
    """(ending, prefill ending, decode beginning) at a step, which is then cleared for the next lap. O(1)."""
    place = unsigned(step & (calendar.size - 1))
    word = calendar[place]
    calendar[place] = 0
    return word & FIELD, (word >> BITS) & FIELD, word >> 2 * BITS


@inner
def ring_size(distance):
    """The smallest power of two above a distance in steps."""
    size = 8
    while size <= distance:
        size *= 2
    return size
