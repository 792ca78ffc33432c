"""What the workers of a fleet do over time."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import to_rgb

from vecsim.kernel.state import Array
from vecsim.plot.style import DECODE, EMPTY, PREFILL, ticks_at_integers
from vecsim.plot.tokens import mean_over_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vecsim.run import Run


def draw_workers(axis: "Axes", run: "Run", workers: int, edges: Array) -> None:
    """Workers over time: the colour mixes what a column's time went to, as the shares of it."""
    steps = run.steps
    prefills = (steps.prefill_tokens.values > 0).astype(np.float64)
    image = np.empty((workers, edges.size - 1, 3))
    colours = [np.array(to_rgb(colour)) for colour in (PREFILL, DECODE, EMPTY)]
    for worker in range(workers):
        own = np.flatnonzero(steps.worker.values == worker)
        busy = mean_over_time(run, np.ones(prefills.size), edges, own)[:, np.newaxis]
        prefill = mean_over_time(run, prefills, edges, own)[:, np.newaxis]
        image[worker] = prefill * colours[0] + (busy - prefill) * colours[1] + (1 - busy) * colours[2]
    axis.imshow(
        np.clip(image, 0.0, 1.0),
        aspect="auto",
        interpolation="nearest",
        extent=(edges[0], edges[-1], workers - 0.5, -0.5),
    )
    axis.set_ylabel("worker")
    ticks_at_integers(axis.yaxis)
