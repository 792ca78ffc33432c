"""What the workers of a fleet do over time."""

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb

from vecsim.fleet import DisaggregatedEngine
from vecsim.kernel.state import Array
from vecsim.paths import PARTS
from vecsim.plot.style import DECODE, EMPTY, PREFILL, Picture, heading, ticks_at_integers
from vecsim.plot.tokens import mean_over_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vecsim.run import Run


# More lines of transfers than these would hide what is below
MOST_LINES = 400
TRANSFER = "#000000"

# Waits are grey, what is done has the colours of its phase
PART_COLOURS = ("#000000", "#BBBBBB", "#888888", PREFILL, "#CC79A7", "#009E73", DECODE, "#0072B2")


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
    if isinstance(run.engine, DisaggregatedEngine):
        axis.axhline(run.engine.prefill_workers - 0.5, color="white", linewidth=2)
        axis.set_ylabel("prefill | decode workers" if workers > 4 else "worker")
        draw_transfers(axis, run)


def draw_transfers(axis: "Axes", run: "Run") -> None:
    """A line for each transfer, from its prefill worker when it begins to its decode worker when it has ended.

    Of more than `MOST_LINES`, so many are drawn, evenly chosen.
    """
    requests = run.requests
    moved = np.flatnonzero(np.isfinite(requests.transfer_noticed_at.values))
    if moved.size > MOST_LINES:
        moved = moved[np.linspace(0, moved.size - 1, MOST_LINES).astype(np.int64)]
    ends = [
        np.stack([requests[at].values[moved], requests[worker].values[moved]], axis=-1)
        for at, worker in (("transfer_began_at", "prefill_worker"), ("transfer_noticed_at", "worker"))
    ]
    alpha = float(np.clip(30 / max(moved.size, 1), 0.15, 0.8))
    axis.add_collection(
        LineCollection(list(np.stack(ends, axis=1)), colors=TRANSFER, linewidths=0.8, alpha=alpha), autolim=False
    )


def ttft_parts(*runs: "Run") -> Any:
    """Draw what the time to first token of disaggregated fleets is made of.

    A bar for each run and each part of its requests by their time to first token: the faster half, the next 40 %, the
    next 9 %, the slowest 1 %; its length is their mean.

    Parameters
    ----------
    *runs : Run
        Of disaggregated fleets, one beside the other.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        When there is no run, or one of no such fleet or without a first token.
    """
    if not runs:
        raise ValueError("runs must be one or more, got none")
    figure = Picture(figsize=(10, 1.4 + 2.2 * len(runs)), layout="constrained")
    plots = np.atleast_1d(figure.subplots(len(runs), 1, sharex=True))
    for axis, run in zip(plots, runs, strict=True):
        names, means = zip(*by_rank(run), strict=True)
        left = np.zeros(len(names))
        for part, colour in zip(range(len(PARTS)), PART_COLOURS, strict=True):
            width = np.array([mean[part] for mean in means])
            if width.max() > 0:
                axis.barh(names, width, left=left, color=colour, label=PARTS[part], edgecolor="white", linewidth=0.5)
            left = left + width
        axis.invert_yaxis()
        axis.set_title(heading(run), fontsize="small", loc="left")
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    plots[-1].set_xlabel("time to first token, mean [s]")
    entries = {text: bar for axis in plots for bar, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def by_rank(run: "Run") -> list[tuple[str, Array]]:
    """(name, mean of each part) of requests by rank of their time to first token."""
    parts = run.ttft_parts.values
    parts = parts[:, np.isfinite(parts[-1])]
    if parts.shape[1] == 0:
        raise ValueError("run must have a request with a first token, got none")
    order = np.argsort(parts.sum(axis=0), kind="stable")
    edges = np.ceil(np.array([0.0, 0.5, 0.9, 0.99, 1.0]) * order.size).astype(np.int64)
    names = ("faster half", "next 40 %", "next 9 %", "slowest 1 %")
    return [
        (name, np.maximum(parts[:, order[first:last]].mean(axis=1), 0.0))
        for name, first, last in zip(names, edges, edges[1:], strict=False)
        if last > first
    ]
