"""Links shared by transfers: each gets the least of (bandwidth / transfers on it) over its links.

A transfer passes up to three links (the source's NIC, the destination's, a fabric). Each link knows its transfers, so
that one which begins or ends changes only those it shares a link with. What a transfer has left is brought up to date
when its rate changes and at no other time: between two changes its end stands. Ends form a heap in which each transfer
knows its place.

A caller takes events in order of time: `now` never falls, and never passes `next_end`.
"""

from typing import NamedTuple

import numpy as np

from vecsim.kernel.jit import bare, inlined, unsigned
from vecsim.kernel.state import Array

# Rows of `loads` [link]: bytes a second; bytes moved; seconds with a transfer, and since when there is one
BANDWIDTH, MOVED, BUSY, SINCE, LOAD_ROWS = range(5)

# Rows of `members` [link]: transfers on it, the first of them
COUNT, FIRST, MEMBER_ROWS = range(3)

# Rows of `work` [transfer]: bytes that its links don't count as moved; bytes left; bytes a second; when both were so;
# when it will end
SIZE, LEFT, RATE, AT, END, WORK_ROWS = range(6)

# A transfer's links; where there is none, NO_LINK
SOURCE, DESTINATION, FABRIC, SIDES = range(4)
NO_LINK = -1

# Rows of `places` [transfer]: its links, then its place in the heap
HEAP_PLACE = SIDES
PLACE_ROWS = SIDES + 1

# Rows of `beside` [side of a transfer]: neighbours in the list of a link
NEXT, PREVIOUS, BESIDE_ROWS = range(3)


class Links(NamedTuple):
    """Links and the transfers in flight, the latter numbered by the caller."""

    loads: Array
    members: Array
    work: Array
    places: Array
    beside: Array
    heap: Array  # transfers, the first to end first: ties by number
    size: Array  # [1]: of the heap


def links_for(links: int, transfers: int) -> Links:
    """Memory for so many links and transfers at once; `reset` makes it ready."""
    return Links(
        loads=np.empty((LOAD_ROWS, links)),
        members=np.empty((MEMBER_ROWS, links), np.int64),
        work=np.empty((WORK_ROWS, transfers)),
        places=np.empty((PLACE_ROWS, transfers), np.int64),
        beside=np.empty((BESIDE_ROWS, SIDES * transfers), np.int64),
        heap=np.empty(transfers, np.int64),
        size=np.zeros(1, np.int64),
    )


@bare
def reset(links, bandwidths):
    """All links idle. O(links)."""
    links.size[0] = 0
    for link in range(bandwidths.size):
        at = unsigned(link)
        links.loads[BANDWIDTH, at] = bandwidths[at]
        links.loads[MOVED, at] = 0.0
        links.loads[BUSY, at] = 0.0
        links.loads[SINCE, at] = 0.0
        links.members[COUNT, at] = 0
        links.members[FIRST, at] = -1


@bare
def begin(links, now, transfer, source, destination, fabric, size):
    """Begin a transfer of so many bytes over links that differ. O(transfers on them x log of those in flight)."""
    place = unsigned(transfer)
    links.places[SOURCE, place] = source
    links.places[DESTINATION, place] = destination
    links.places[FABRIC, place] = fabric
    links.work[SIZE, place] = size
    links.work[LEFT, place] = size
    links.work[RATE, place] = 0.0
    links.work[AT, place] = now
    links.work[END, place] = np.inf
    for side in range(SIDES):
        link = int(links.places[unsigned(side), place])
        if link != NO_LINK:
            if links.members[COUNT, unsigned(link)] == 0:
                links.loads[SINCE, unsigned(link)] = now
            join(links, link, SIDES * transfer + side)
    last = int(links.size[0])
    links.size[0] = last + 1
    rise(links, last, transfer)
    share_out(links, now, transfer)
    retime(links, now, transfer)  # one that passes no link has no neighbours to share with


@bare
def end(links, now, transfer):
    """Take a transfer off its links: the bytes that it has left, 0 once it's due. O(as `begin`)."""
    place = unsigned(transfer)
    advance(links, now, transfer)
    left = float(links.work[LEFT, place])
    moved = links.work[SIZE, place] - left
    for side in range(SIDES):
        link = int(links.places[unsigned(side), place])
        if link != NO_LINK:
            links.loads[MOVED, unsigned(link)] += moved
            leave(links, link, SIDES * transfer + side)
            if links.members[COUNT, unsigned(link)] == 0:
                links.loads[BUSY, unsigned(link)] += now - links.loads[SINCE, unsigned(link)]
    drop(links, transfer)
    share_out(links, now, transfer)
    return left


@inlined
def next_end(links):
    """(when the next transfer ends, which): infinity and -1 if there is none. O(1)."""
    if links.size[0] == 0:
        return np.inf, -1
    transfer = int(links.heap[0])
    return float(links.work[END, unsigned(transfer)]), transfer


@bare
def settle(links, now):
    """Count what has moved, and how long links were busy, up to now. O(in flight + links)."""
    for place in range(links.size[0]):
        transfer = int(links.heap[unsigned(place)])
        advance(links, now, transfer)
        row = unsigned(transfer)
        moved = links.work[SIZE, row] - links.work[LEFT, row]
        links.work[SIZE, row] = links.work[LEFT, row]
        for side in range(SIDES):
            link = int(links.places[unsigned(side), row])
            if link != NO_LINK:
                links.loads[MOVED, unsigned(link)] += moved
    for link in range(links.members.shape[1]):
        at = unsigned(link)
        if links.members[COUNT, at] > 0:
            links.loads[BUSY, at] += now - links.loads[SINCE, at]
            links.loads[SINCE, at] = now


@bare
def share_out(links, now, transfer):
    """Give all transfers on the links of one their rates."""
    for side in range(SIDES):
        link = int(links.places[unsigned(side), unsigned(transfer)])
        if link != NO_LINK:
            member = int(links.members[FIRST, unsigned(link)])
            while member >= 0:
                retime(links, now, member // SIDES)
                member = int(links.beside[NEXT, unsigned(member)])


@bare
def retime(links, now, transfer):
    """Give a transfer its rate and its end; where the rate stays, so does the end."""
    place = unsigned(transfer)
    rate = np.inf
    for side in range(SIDES):
        link = int(links.places[unsigned(side), place])
        if link != NO_LINK:
            rate = min(rate, links.loads[BANDWIDTH, unsigned(link)] / links.members[COUNT, unsigned(link)])
    if rate == links.work[RATE, place]:
        return
    advance(links, now, transfer)
    links.work[RATE, place] = rate
    before = links.work[END, place]
    links.work[END, place] = now + links.work[LEFT, place] / rate
    if links.work[END, place] < before:
        rise(links, int(links.places[HEAP_PLACE, place]), transfer)
    else:
        sink(links, int(links.places[HEAP_PLACE, place]), transfer)


@inlined
def advance(links, now, transfer):
    """Bring what a transfer has left up to date."""
    place = unsigned(transfer)
    if now >= links.work[END, place]:  # exactly nothing, whatever rounding says; and infinity x 0 is no number
        links.work[LEFT, place] = 0.0
    elif now > links.work[AT, place]:
        moved = links.work[RATE, place] * (now - links.work[AT, place])
        links.work[LEFT, place] = max(links.work[LEFT, place] - moved, 0.0)
    links.work[AT, place] = now


@inlined
def join(links, link, member):
    """Put a side of a transfer first in the list of a link."""
    first = int(links.members[FIRST, unsigned(link)])
    links.beside[NEXT, unsigned(member)] = first
    links.beside[PREVIOUS, unsigned(member)] = -1
    if first >= 0:
        links.beside[PREVIOUS, unsigned(first)] = member
    links.members[FIRST, unsigned(link)] = member
    links.members[COUNT, unsigned(link)] += 1


@inlined
def leave(links, link, member):
    """Take a side of a transfer out of the list of a link."""
    after = int(links.beside[NEXT, unsigned(member)])
    before = int(links.beside[PREVIOUS, unsigned(member)])
    if after >= 0:
        links.beside[PREVIOUS, unsigned(after)] = before
    if before >= 0:
        links.beside[NEXT, unsigned(before)] = after
    else:
        links.members[FIRST, unsigned(link)] = after
    links.members[COUNT, unsigned(link)] -= 1


@inlined
def is_before(links, a, b):
    """Whether a transfer ends before another: ties by number."""
    end, other = links.work[END, unsigned(a)], links.work[END, unsigned(b)]
    return end < other or (end == other and a < b)


@inlined
def put(links, place, transfer):
    links.heap[unsigned(place)] = transfer
    links.places[HEAP_PLACE, unsigned(transfer)] = place


@bare
def rise(links, place, transfer):
    """Put a transfer into the heap at a place or above. O(log n)."""
    while place > 0:
        above = int(links.heap[unsigned((place - 1) // 2)])
        if not is_before(links, transfer, above):
            break
        put(links, place, above)
        place = (place - 1) // 2
    put(links, place, transfer)


@bare
def sink(links, place, transfer):
    """Put a transfer into the heap at a place or below. O(log n)."""
    size = int(links.size[0])
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and is_before(links, links.heap[unsigned(below + 1)], links.heap[unsigned(below)]):
            below += 1
        first = int(links.heap[unsigned(below)])
        if not is_before(links, first, transfer):
            break
        put(links, place, first)
        place = below
    put(links, place, transfer)


@bare
def drop(links, transfer):
    """Take a transfer out of the heap. O(log n)."""
    place = int(links.places[HEAP_PLACE, unsigned(transfer)])
    size = int(links.size[0]) - 1
    links.size[0] = size
    last = int(links.heap[unsigned(size)])
    if last != transfer:
        if place > 0 and is_before(links, last, links.heap[unsigned((place - 1) // 2)]):
            rise(links, place, last)
        else:
            sink(links, place, last)
