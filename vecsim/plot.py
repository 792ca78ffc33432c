"""Pictures of sweeps."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.sweep.report import load_dim

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind too (https://jfly.uni-koeln.de/color/)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", "--", ":", "-.")


def sweep(dataset: "xr.Dataset") -> "Figure":
    """Throughput and tail TTFT against the load; a line for each combination, a band over seeds.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.sweep`, with at least one numeric axis beside `seed`.

    Returns
    -------
    matplotlib.figure.Figure
        The first other axis tells the colour, the second the kind of line; of any more, the first value is drawn.

    Raises
    ------
    ValueError
        When no axis is numeric.
    """
    from matplotlib.figure import Figure

    load = load_dim(dataset)
    if load is None:
        raise ValueError("a picture needs an axis of numbers beside seed, such as request_rate")
    dims = [str(dim) for dim in dataset.sizes if dim not in ("stat", "seed", "request", load)]
    shown, rest = dims[:2], dims[2:]
    drawn = dataset.isel(dict.fromkeys(rest, 0))
    tail = str(dataset.stat.values[-2])

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, array in zip(axes, (drawn.token_throughput, drawn.ttft.sel(stat=tail)), strict=True):
        for index in np.ndindex(tuple(dataset.sizes[dim] for dim in shown)):
            place = dict(zip(shown, index, strict=True))
            style: dict[str, Any] = {"color": COLOURS[index[0] % len(COLOURS)] if index else COLOURS[0]}
            style["linestyle"] = LINES[index[1] % len(LINES)] if len(index) > 1 else "-"
            _line(axis, dataset[load].values, array.isel(place), load, style)
        axis.set_xlabel(_label(dataset[load]))
        axis.set_ylabel(_label(array, f"{tail} " if "stat" in array.coords else ""))
        axis.grid(alpha=0.3)
        axis.margins(x=0)
    axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    _legend(figure, dataset, shown)
    title = f"{dataset.attrs['time_limit']:g} ticks"
    if dataset.sizes.get("seed", 1) > 1:
        title += f"; line: median of {dataset.sizes['seed']} seeds, band: 10 % to 90 %"
    fixed = ", ".join(f"{dim}={drawn[dim].values}" for dim in rest if dim in drawn.coords)
    figure.suptitle(title + (f"; {fixed}" if fixed else ""), fontsize="medium")
    return figure


def _line(axis: Any, x: np.ndarray, array: "xr.DataArray", load: Hashable, style: dict[str, Any]) -> None:
    """The median over seeds, with a band from their 10 % to their 90 % quantile."""
    if "seed" in array.dims:
        values = array.transpose("seed", load).values
        complete = ~np.isnan(values).any(axis=0)
        low, median, high = np.full((3, values.shape[1]), np.nan)
        low[complete], median[complete], high[complete] = np.quantile(values[:, complete], (0.1, 0.5, 0.9), axis=0)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    else:
        median = array.values
    axis.plot(x, median, **style)


def _label(array: "xr.DataArray", before: str = "") -> str:
    name = before + array.attrs.get("long_name", str(array.name))
    return f"{name} [{array.attrs['units']}]" if "units" in array.attrs else name


def _legend(figure: "Figure", dataset: "xr.Dataset", shown: list[str]) -> None:
    """Colours, then kinds of line, to the right of the panels."""
    from matplotlib.lines import Line2D

    handles = []
    for place, dim in enumerate(shown):
        values = dataset[dim].values if dim in dataset.coords else np.arange(dataset.sizes[dim])
        handles.append(Line2D([], [], linestyle="none", label=dim.replace("_", " ")))
        for i, value in enumerate(values):
            text = f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)
            if place == 0:
                handles.append(Line2D([], [], color=COLOURS[i % len(COLOURS)], label=text))
            else:
                handles.append(Line2D([], [], color="0.3", linestyle=LINES[i % len(LINES)], label=text))
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False)
