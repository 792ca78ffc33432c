"""The random numbers of a block of scenarios."""

from typing import Any

import numpy as np

from vecsim.kernel.state import Array, Streams
from vecsim.scenarios import Block, Table
from vecsim.threads import Workers


def new_streams(sizes: Array, dtype: Any) -> Streams:
    """Room for streams of given sizes."""
    start = np.cumsum(sizes) - sizes
    return Streams(start, sizes, np.zeros(sizes.size, np.int64), np.empty(int(sizes.sum()), dtype))


def draw_streams(table: Table, block: Block, recorded: Array, workers: Workers) -> tuple[Streams, Streams]:
    """Draw a block's streams of whole numbers and of arrivals; `recorded` are the times of all traces."""
    from vecsim.kernel.scenarios import draw_arrivals, draw_lengths

    lengths = new_streams(block.length_sizes, np.int32)
    arrivals = new_streams(block.arrival_sizes, np.float64)

    def draw_some_lengths(first: int, last: int) -> None:
        draw_lengths(first, last, block.lengths, table.tables, lengths, workers.stop)

    def draw_some_arrivals(first: int, last: int) -> None:
        draw_arrivals(first, last, block.arrivals, recorded, arrivals, workers.stop)

    passed_over = int(block.lengths.offset.sum())
    workers.share(draw_some_lengths, lengths.size.size, lengths.values.size + passed_over)
    if arrivals.values.size:
        workers.share(draw_some_arrivals, arrivals.size.size, arrivals.values.size)
    return lengths, arrivals


def values_of(streams: Streams, at: int) -> Array:
    """The values of one stream."""
    return streams.values[streams.start[at] : streams.start[at] + streams.size[at]]
