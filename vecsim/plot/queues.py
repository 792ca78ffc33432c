"""The picture of queues that hold and queues that grow."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.plot.style import COLOURS, Picture, label
from vecsim.plot.sweeps import band_over_seeds
from vecsim.sweep.report import CRITERION, other_dims, texts

if TYPE_CHECKING:
    import xarray as xr


def queue_growth(dataset: "xr.Dataset") -> Any:
    """Draw queue sizes over time, stable queues apart from growing ones.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.queue_growth`.

    Returns
    -------
    matplotlib.figure.Figure
        A line for each combination of the axes: the median over seeds, with a band from 10 % to 90 %. At most seven a
        panel, spread evenly; the title says what was left out.

    Raises
    ------
    ValueError
        When the Dataset isn't one of `vecsim.queue_growth`.
    """
    if "grows" not in dataset or "queue_size" not in dataset:
        raise ValueError("a Dataset from vecsim.queue_growth is needed: this one has no queue_size and grows")
    dims = other_dims(dataset, "run")
    names = {dim: texts(dataset, dim) for dim in dims}
    panels: dict[str, list[dict[str, int]]] = {"stable": [], "growing": []}
    for index in np.ndindex(tuple(dataset.sizes[dim] for dim in dims)):
        place = dict(zip(dims, index, strict=True))
        panels["growing" if bool(dataset.grows.isel(place)) else "stable"].append(place)
    panels = {name: places for name, places in panels.items() if places}

    figure = Picture(figsize=(5.5 * len(panels) + 1.0, 4.8), layout="constrained")
    notes = []
    colours = itertools.cycle(COLOURS)
    for axis, (name, places) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        if len(places) > len(COLOURS):
            notes.append(f"{len(COLOURS)} of {len(places)} {name} queues")
        some = np.linspace(0, len(places) - 1, min(len(places), len(COLOURS))).round().astype(int)
        for place, colour in zip([places[i] for i in some], colours, strict=False):
            low, middle, high = band_over_seeds(dataset.queue_size.isel(place).transpose(..., "time"))
            text = ", ".join(names[dim][i] if len(dims) == 1 else f"{dim}={names[dim][i]}" for dim, i in place.items())
            axis.fill_between(dataset.time, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(dataset.time, middle, color=colour, label=text or "queue")
        axis.set_title(f"{name} queues", fontsize="medium")
        axis.set_xlabel(label(dataset.time))
        axis.set_ylabel(label(dataset.queue_size))
        axis.set_xlim(0, float(dataset.time[-1]))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        # Below the axes, where it hides no line.
        title = dims[0].replace("_", " ") if len(dims) == 1 else None
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize="small", title=title)
    first = f"a queue grows if {CRITERION}"
    if dataset.sizes.get("seed", 1) > 1:
        notes.insert(0, f"line: median of {dataset.sizes['seed']} seeds, band: 10 % to 90 %")
    figure.suptitle("\n".join([first, "; ".join(notes)]) if notes else first, fontsize="small")
    return figure
