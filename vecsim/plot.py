"""Pictures of sweeps."""

from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.sweep.report import load_coord, other_dims, texts

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind too (https://jfly.uni-koeln.de/color/)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)))


def sweep(dataset: "xr.Dataset") -> "Figure":
    """Throughput and tail TTFT against the load; a line for each combination, a band over seeds.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.sweep`.

    Returns
    -------
    matplotlib.figure.Figure
        Along the load, else along the longest axis of numbers, else a point for each combination. The first other
        axis tells the colour, the second the kind of line, of each at most seven values, spread evenly; of any more
        axes the first value is drawn. The title says what was left out.
    """
    from matplotlib.figure import Figure

    x = load_coord(dataset) or _longest_numeric(dataset)
    along = str(dataset[x].dims[0]) if x is not None else None
    dims = other_dims(dataset, along)
    shown, rest = dims[:2], dims[2:]
    notes = [f"{dim}={texts(dataset, dim)[0]}" for dim in rest if dataset.sizes[dim] > 1]
    drawn = dataset.isel(dict.fromkeys(rest, 0))
    for dim in shown:
        size = dataset.sizes[dim]
        if size > len(COLOURS):
            drawn = drawn.isel({dim: np.linspace(0, size - 1, len(COLOURS)).round().astype(int)})
            notes.append(f"{len(COLOURS)} of {size} values of {dim}")
    if along is not None:
        drawn = drawn.sortby(x)

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    tail = str(dataset.stat.values[-2])
    for axis, array in zip(axes, (drawn.token_throughput, drawn.ttft.sel(stat=tail)), strict=True):
        for number, index in enumerate(np.ndindex(tuple(drawn.sizes[dim] for dim in shown))):
            style: dict[str, Any] = {"color": COLOURS[index[0]] if index else COLOURS[0]}
            style["linestyle"] = DASHES[index[1]] if len(index) > 1 else "-"
            place = dict(zip(shown, index, strict=True))
            if along is not None:
                _line(axis, drawn[x].values, array.isel(place), along, style)
            else:
                _point(axis, number, array, place)
        if x is not None:
            axis.set_xlabel(_label(dataset[x]))
        else:
            axis.set_xticks([])
        axis.set_ylabel(_label(array, f"{tail} " if "stat" in array.coords else ""))
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    if (axes[1].dataLim.intervaly > 0).all() and np.isfinite(axes[1].dataLim.intervaly).all():
        axes[1].set_yscale("log")
    elif drawn.ttft.isnull().all():
        axes[1].text(0.5, 0.5, "no request has a first token", ha="center", transform=axes[1].transAxes)
    _legend(figure, drawn, shown, lines=along is not None)
    title = f"{dataset.attrs['time_limit']:g} ticks"
    if dataset.sizes.get("seed", 1) > 1:
        title += f"; line: median of {dataset.sizes['seed']} seeds, band: 10 % to 90 %"
    figure.suptitle("; ".join([title, *notes]), fontsize="medium")
    return figure


def _longest_numeric(dataset: "xr.Dataset") -> str | None:
    """The longest dimension with more than one number as its coordinate."""
    numeric = [
        dim
        for dim in other_dims(dataset, None)
        if dim in dataset.coords and dataset[dim].dtype.kind in "iuf" and dataset.sizes[dim] > 1
    ]
    return max(numeric, key=lambda dim: dataset.sizes[dim], default=None)


def _band(array: "xr.DataArray") -> np.ndarray:
    """10 %, 50 % and 90 % quantiles over seeds [3, ...]; NaN where a seed has no value."""
    if "seed" not in array.dims:
        return np.stack([array.values] * 3)
    values = array.transpose("seed", ...).values
    band = np.full((3, *values.shape[1:]), np.nan)
    complete = ~np.isnan(values).any(axis=0)
    band[:, complete] = np.quantile(values[:, complete], (0.1, 0.5, 0.9), axis=0)
    return band


def _line(axis: Any, x: np.ndarray, array: "xr.DataArray", along: str, style: dict[str, Any]) -> None:
    """The median over seeds, with a band from their 10 % to their 90 % quantile."""
    low, median, high = _band(array.transpose(..., along))
    if "seed" in array.dims:
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(x, median, **style, marker="o" if x.size <= 12 else "", markersize=3)


def _point(axis: Any, x: int, array: "xr.DataArray", place: dict[str, int]) -> None:
    """The median over seeds, with a bar from their 10 % to their 90 % quantile."""
    low, median, high = _band(array.isel(place))
    colours = list(place.values())
    axis.errorbar(
        [x],
        [median],
        [[median - low], [high - median]],
        color=COLOURS[colours[0]] if colours else COLOURS[0],
        marker="osD^v<>"[colours[1]] if len(colours) > 1 else "o",
    )


def _label(array: "xr.DataArray", before: str = "") -> str:
    name = before + array.attrs.get("long_name", str(array.name))
    return f"{name} [{array.attrs['units']}]" if "units" in array.attrs else name


def _legend(figure: "Figure", drawn: "xr.Dataset", shown: list[str], lines: bool) -> None:
    """Colours, then kinds of line (or of marker), to the right of the panels."""
    from matplotlib.lines import Line2D

    handles = []
    for place, dim in enumerate(shown):
        handles.append(Line2D([], [], linestyle="none", label=dim.replace("_", " ")))
        for i, text in enumerate(texts(drawn, dim)):
            colour = COLOURS[i] if place == 0 else "0.3"
            marker = "o" if place == 0 else "osD^v<>"[i]
            if lines:
                handles.append(Line2D([], [], color=colour, linestyle="-" if place == 0 else DASHES[i], label=text))
            else:
                handles.append(Line2D([], [], color=colour, linestyle="none", marker=marker, label=text))
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False)
