"""The picture of queues that hold and queues that grow."""

import itertools
import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.plot.style import COLOURS, DASHES, Picture, check_dataset
from vecsim.plot.sweeps import band_over_seeds, thin
from vecsim.sweep.report import CRITERION, label, other_dims, texts

if TYPE_CHECKING:
    import xarray as xr

MOST_QUEUES = 2 * len(COLOURS)  # in a panel


def queue_growth(dataset: "xr.Dataset") -> Any:
    """Draw queue sizes over time, stable queues apart from growing ones.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.queue_growth`.

    Returns
    -------
    matplotlib.figure.Figure
        A line for each combination of the axes: the median over seeds, with a band from 10 % to 90 %. Some
        fourteen, spread evenly along the longest axis; the title says what was left out.

    Raises
    ------
    ValueError
        When the Dataset isn't one of `vecsim.queue_growth`.
    """
    check_dataset(dataset)
    if "grows" not in dataset or "queue_size" not in dataset:
        raise ValueError("a Dataset from vecsim.queue_growth is needed: this one has no queue_size and grows")
    notes: list[str] = []
    dims = other_dims(dataset, "run")
    if dims:
        # Fewer places along the longest dimension, so that those along the others can be compared.
        longest = max(dims, key=lambda dim: dataset.sizes[dim])
        others = math.prod(dataset.sizes[dim] for dim in dims) // dataset.sizes[longest]
        dataset = thin(dataset, longest, max(2, MOST_QUEUES // others), notes)
    names = {dim: texts(dataset, dim) for dim in dims}
    panels: dict[str, list[dict[str, int]]] = {"stable": [], "growing": []}
    for index in np.ndindex(tuple(dataset.sizes[dim] for dim in dims)):
        place = dict(zip(dims, index, strict=True))
        panels["growing" if bool(dataset.grows.isel(place)) else "stable"].append(place)
    panels = {name: places for name, places in panels.items() if places}

    figure = Picture(figsize=(5.5 * len(panels) + 1.0, 4.8), layout="constrained")
    styles = itertools.cycle(itertools.product(DASHES[: MOST_QUEUES // len(COLOURS)], COLOURS))
    for axis, (name, places) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        if len(places) > MOST_QUEUES:
            notes.append(f"{MOST_QUEUES} of {len(places)} {name} queues")
        some = np.linspace(0, len(places) - 1, min(len(places), MOST_QUEUES)).round().astype(int)
        for place, (dashes, colour) in zip([places[i] for i in some], styles, strict=False):
            low, middle, high = band_over_seeds(dataset.queue_size.isel(place).transpose(..., "time"))
            text = ", ".join(names[dim][i] if len(dims) == 1 else f"{dim}={names[dim][i]}" for dim, i in place.items())
            axis.fill_between(dataset.time, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(dataset.time, middle, color=colour, linestyle=dashes, label=text or "queue")
        axis.set_title(f"{name} queues", fontsize="medium")
        axis.set_xlabel(label(dataset.time))
        axis.set_ylabel(label(dataset.queue_size))
        axis.set_xlim(0, float(dataset.time[-1]))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        # Below the axes, where it hides no line.
        title = dims[0].replace("_", " ") if len(dims) == 1 else None
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize="small", title=title)
    first = textwrap.fill(f"a queue grows if {CRITERION}", int(15 * figure.get_figwidth()))
    if dataset.sizes.get("seed", 1) > 1:
        notes.insert(0, f"line: median of {dataset.sizes['seed']} seeds, band: 10 % to 90 %")
    figure.suptitle("\n".join([first, "; ".join(notes)]) if notes else first, fontsize="small")
    return figure
