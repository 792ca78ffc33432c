"""Pictures of sweeps, straight from the Dataset: names and units are its attributes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.kernel.state import Array
from vecsim.plot.style import COLOURS, DASHES, MARKERS, Picture, check_dataset, run_time, ticks_at_integers
from vecsim.sweep.report import drawable, has_slo, label, load_coord, median, numeric_dims, other_dims, stable, texts

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

VARIABLES = ("token_throughput", "ttft")
SLO_VARIABLES = (*VARIABLES, "goodput")  # where there are limits
LINEAR = ("goodput", "slo_attainment")  # whose fall to nothing would fill a logarithmic scale
NEAR_ONE = 0.9  # shares that are all above it aren't drawn from 0 on
MOST_MAPS = 4  # side by side, or rows of lines
MOST_TICKS = 12
MOST_CHARACTERS = 40  # of tick labels below a map


def sweep(dataset: "xr.Dataset") -> Any:
    """Throughput and tail TTFT, and goodput where an SLO is declared: the picture that suits the dimensions.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.sweep` or `vecsim.queue_growth`.

    Returns
    -------
    matplotlib.figure.Figure
        For queue growth its own picture. A `heat_map` if, beside the load, there is a dimension of more numbers than
        there are colours (or, without a load, two of four numbers or more); else `lines`.
    """
    check_dataset(dataset)
    if "grows" in dataset:
        from vecsim.plot.queues import queue_growth

        return queue_growth(dataset)
    load = load_coord(dataset)
    numeric = numeric_dims(dataset, load)
    longest = numeric[0] if numeric else None
    if load is not None and longest is not None and dataset.sizes[longest] > len(COLOURS):
        return heat_map(dataset, x=load, y=longest)
    if load is None and len(numeric) > 1 and dataset.sizes[numeric[1]] > 3:
        return heat_map(dataset, x=numeric[0], y=numeric[1])
    return lines(dataset)


def lines(
    dataset: "xr.Dataset",
    x: str | None = None,
    variables: Sequence[str] | str | None = None,
    stat: str | None = None,
) -> Any:
    """A line for each combination, a band over seeds; a panel for each variable.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.sweep`.
    x : str, optional
        Coordinate to draw along: the load, else the longest axis of numbers, unless given. Without any, a point is
        drawn for each combination.
    variables : sequence of str, or str
        What to draw; token throughput and time to first token unless given, and goodput where an SLO is declared.
    stat : str, optional
        Which statistic of variables that have several; the highest quantile unless given.

    Returns
    -------
    matplotlib.figure.Figure
        The first other axis tells the colour, the second the kind of line (the other way round where the second is
        of axes that vary together), of each at most seven values, spread evenly; a third gives rows, at most four. Of
        any more axes the first value is drawn. The title says what was left out.

    Raises
    ------
    ValueError
        When the Dataset has no such coordinate, variable or statistic.
    """
    check_dataset(dataset)
    variables = check_variables(dataset, variables)
    if x is None:
        x = load_coord(dataset) or next(iter(numeric_dims(dataset, None)), None)
    else:
        check_coord(dataset, "x", x)
    along = str(dataset[x].dims[0]) if x is not None else None
    dims = other_dims(dataset, along) + within(dataset, variables)
    shown, below, rest = dims[:2], dims[2:3], dims[3:]
    # Where several axes vary together, what a line is called is long, and colours tell more than kinds of lines.
    shown.sort(key=lambda dim: dim in dataset.coords)
    notes = [f"{dim}={texts(dataset, dim)[0]}" for dim in rest if dataset.sizes[dim] > 1]
    drawn = dataset.isel(dict.fromkeys(rest, 0))
    for dim in shown:
        drawn = thin(drawn, dim, len(COLOURS), notes)
    for dim in below:
        drawn = thin(drawn, dim, MOST_MAPS, notes)
    rows = [({dim: i}, f"{dim.replace('_', ' ')}: {text}") for dim in below for i, text in enumerate(texts(drawn, dim))]
    if x is not None:
        drawn = in_order(drawn, x)
        notes += partners(dataset, x)

    height = 4.6 if len(rows) < 2 else 3.4 * len(rows) + 0.4
    figure = Picture(figsize=(5.5 * len(variables), height), layout="constrained")
    panels = figure.subplots(max(1, len(rows)), len(variables), squeeze=False)
    for (row, text), line in zip(rows or [({}, "")], panels, strict=True):
        for axis, (array, name) in zip(line, [pick(drawn.isel(row), name, stat) for name in variables], strict=True):
            for number, index in enumerate(np.ndindex(tuple(drawn.sizes[dim] for dim in shown))):
                style: dict[str, Any] = {"color": COLOURS[index[0]] if index else COLOURS[0]}
                style["linestyle"] = DASHES[index[1]] if len(index) > 1 else "-"
                # The first lines are the widest, so that those drawn over them hide none.
                style["linewidth"] = 1.5 + 0.4 * (drawn.sizes[shown[0]] - 1 - index[0]) if index else 1.5
                place = dict(zip(shown, index, strict=True))
                if along is not None:
                    draw_line(axis, drawn[x].values, array.isel(place), along, style)
                else:
                    draw_point(axis, number, array, place)
            finish_panel(axis, array, name, drawn[x] if x is not None else None)
        line[0].set_title(text, loc="left", fontsize="medium")
    draw_legend(figure, drawn, shown, is_lines=along is not None)
    title = [run_time(dataset)]
    if dataset.sizes.get("seed", 1) > 1:
        middle, spread = ("line", "band") if along is not None else ("point", "bar")
        title[0] += f"; {middle}: median of {dataset.sizes['seed']} seeds, {spread}: 10 % to 90 %"
    figure.suptitle("; ".join(title + notes), fontsize="medium")
    return figure


def heat_map(
    dataset: "xr.Dataset",
    x: str | None = None,
    y: str | None = None,
    variables: Sequence[str] | str | None = None,
    stat: str | None = None,
) -> Any:
    """Colours over two axes; a row of maps for each variable, a column for each value of another axis.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.sweep`.
    x, y : str, optional
        Coordinates; the load and the longest other axis of numbers unless given.
    variables : sequence of str, or str
        What to draw; token throughput and time to first token unless given, and goodput where an SLO is declared.
    stat : str, optional
        Which statistic of variables that have several; the highest quantile unless given.

    Returns
    -------
    matplotlib.figure.Figure
        Medians over seeds; the white line parts stable queues from growing ones. At most four
        values of the third axis, spread evenly; of any more axes the first value is drawn. The title says what was
        left out.

    Raises
    ------
    ValueError
        When the Dataset has no two axes, or no such coordinate, variable or statistic.
    """
    check_dataset(dataset)
    variables = check_variables(dataset, variables)
    for name, value in (("x", x), ("y", y)):
        if value is not None:
            check_coord(dataset, name, value)
    numeric = numeric_dims(dataset, None)
    if x is None:
        x = load_coord(dataset) or next((dim for dim in numeric if dim != y), None)
    if y is None:
        others = [*numeric, *drawable(dataset)]
        y = next((name for name in others if x is None or dataset[name].dims != dataset[x].dims), None)
    if x is None or y is None:
        axes = ", ".join(drawable(dataset)) or "none"
        raise ValueError(f"a heat map needs two axes along two dimensions: the Dataset has {axes}")
    along, across = str(dataset[x].dims[0]), str(dataset[y].dims[0])
    if along == across:
        raise ValueError(f"x and y must be along two dimensions, got {x} and {y}, both along {along}")
    dims = [dim for dim in other_dims(dataset, along) + within(dataset, variables) if dim != across]
    notes = [f"{dim}={texts(dataset, dim)[0]}" for dim in dims[1:] if dataset.sizes[dim] > 1]
    drawn = dataset.isel(dict.fromkeys(dims[1:], 0))
    if dims:
        drawn = thin(drawn, dims[0], MOST_MAPS, notes)
    drawn = in_order(in_order(drawn, x), y)
    notes += [*partners(dataset, x), *partners(dataset, y)]
    columns = [{dims[0]: i} for i in range(drawn.sizes[dims[0]])] if dims else [{}]
    names = texts(drawn, dims[0]) if dims else [""]
    holds = stable(drawn)

    figure = Picture(figsize=(2.2 + 3.6 * len(columns), 3.3 * len(variables) + 0.6), layout="constrained")
    panels = figure.subplots(len(variables), len(columns), squeeze=False, sharex=True, sharey=True)
    for row, (array, name) in zip(panels, [pick(drawn, name, stat) for name in variables], strict=True):
        norm = norm_of(median(array).values, linear=array.name in LINEAR)
        for axis, place, text in zip(row, columns, names, strict=True):
            values = median(array.isel(place)).transpose(across, along).values
            right, up = positions(drawn[x].values), positions(drawn[y].values)
            image = axis.pcolormesh(edges(right), edges(up), values, norm=norm, cmap="viridis", rasterized=True)
            steady = holds.isel(place).transpose(across, along).values
            if min(steady.shape) > 1 and steady.any() and not steady.all():
                axis.contour(right, up, steady.astype(float), levels=[0.5], colors="white", linewidths=1.5)
            if axis in panels[0]:
                axis.set_title(f"{dims[0].replace('_', ' ')}: {text}" if dims else "", fontsize="medium")
            if axis in panels[-1]:
                name_positions(axis.xaxis, drawn, x)
            if axis is row[0]:
                name_positions(axis.yaxis, drawn, y)
        figure.colorbar(image, ax=list(row), label=name)
    title = [f"{run_time(dataset)}; white line: where queues begin to grow"]
    if dataset.sizes.get("seed", 1) > 1:
        title[0] += f"; medians of {dataset.sizes['seed']} seeds"
    figure.suptitle("; ".join(title + notes), fontsize="medium")
    return figure


def finish_panel(axis: "Axes", array: "xr.DataArray", name: str, x: "xr.DataArray | None") -> None:
    """Name the axes of a panel of lines, and choose their scales."""
    from matplotlib.ticker import LogLocator

    if x is None:
        axis.set_xticks([])
    else:
        axis.set_xlabel(label(x))
        if is_geometric(x.values) and not array.isnull().all():
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("")
    axis.set_ylabel(name)
    axis.grid(alpha=0.3)
    if array.isnull().all():
        axis.text(0.5, 0.5, f"no value of {array.name}", ha="center", transform=axis.transAxes)
    elif spans_decades(array.values) and array.name not in LINEAR:
        axis.set_yscale("log")
    elif array.attrs.get("units") != "1" or float(array.min()) < NEAR_ONE:  # else all would lie along the upper edge
        axis.set_ylim(bottom=min(0.0, float(array.min())))


def check_coord(dataset: "xr.Dataset", argument: str, name: str) -> None:
    """Raise a ValueError unless a picture can have that coordinate along an axis."""
    if name not in drawable(dataset):
        raise ValueError(f"{argument} must be one of {', '.join(drawable(dataset))}, got {name!r}")


def check_variables(dataset: "xr.Dataset", variables: Sequence[str] | str | None) -> list[str]:
    """The variables as a list, the usual ones if None; a ValueError if there are none."""
    if variables is None:
        return list(SLO_VARIABLES if has_slo(dataset) else VARIABLES)
    result = [variables] if isinstance(variables, str) else list(variables)
    if not result:
        raise ValueError(f"variables must be one or more names, got {variables!r}")
    return result


def within(dataset: "xr.Dataset", variables: list[str]) -> list[str]:
    """The classes, or parts of the time to first token, that variables have one value for each of.

    Raises
    ------
    ValueError
        When only some of them have.
    """
    dims = []
    for dim in ("class", "part"):
        some = [name for name in variables if name in dataset and dim in dataset[name].dims]
        if some and len(some) < len(variables):
            raise ValueError(f"variables must all be over {dim} or none of them, got {', '.join(variables)}")
        dims += [dim] if some else []
    return dims


def in_order(dataset: "xr.Dataset", name: str) -> "xr.Dataset":
    """Sorted along a coordinate of numbers; texts stay in the order of the axis."""
    return dataset.sortby(name) if dataset[name].dtype.kind in "iuf" else dataset


def partners(dataset: "xr.Dataset", name: str) -> list[str]:
    """Notes on the coordinates that vary along the same dimension."""
    dims = dataset[name].dims
    return [f"{other} varies with {name}" for other in dataset.coords if other != name and dataset[other].dims == dims]


def pick(dataset: "xr.Dataset", name: str, stat: str | None) -> "tuple[xr.DataArray, str]":
    """A variable, of which one statistic is left, and its label."""
    known = [str(other) for other in dataset.data_vars if "request" not in dataset[other].dims]
    if name not in known:
        raise ValueError(f"variable must be one of {', '.join(known)}, got {name!r}")
    array = dataset[name]
    if "stat" not in array.dims:
        return array, label(array)
    stats = [str(value) for value in dataset.stat.values]
    stat = stats[-2] if stat is None else stat
    if stat not in stats:
        raise ValueError(f"stat must be one of {', '.join(stats)}, got {stat!r}")
    return array.sel(stat=stat), label(array, f"{stat} ")


def thin(dataset: "xr.Dataset", dim: str, most: int, notes: list[str]) -> "xr.Dataset":
    """At most so many places along a dimension, spread evenly; what is left out is noted."""
    size = dataset.sizes[dim]
    if size <= most:
        return dataset
    notes.append(f"{most} of {size} values of {dim}")
    return dataset.isel({dim: np.linspace(0, size - 1, most).round().astype(int)})


def spans_decades(values: Array) -> bool:
    """Whether values are positive and far apart: better seen on a logarithmic scale."""
    some = values[np.isfinite(values)]
    return some.size > 0 and some.min() > 0 and some.max() > 30 * some.min()


def is_geometric(values: Array) -> bool:
    """Whether positive numbers span a decade, each about the same multiple of the one before it."""
    if values.dtype.kind not in "iuf" or values.size < 4 or values[0] <= 0 or values[-1] <= 10 * values[0]:
        return False
    ratios, gaps = values[1:] / values[:-1], np.diff(values)
    return bool(ratios.max() < 1.25 * ratios.min() and gaps[-1] > 3 * gaps[0])


def norm_of(values: Array, linear: bool = False) -> Any:
    """The scale of colours, logarithmic for values that span decades unless it must be linear."""
    from matplotlib.colors import LogNorm, Normalize

    some = values[np.isfinite(values)]
    if some.size == 0 or some.min() == some.max():
        return Normalize(min(0.0, *some[:1]), max(1.0, *some[:1]))
    return (LogNorm if spans_decades(values) and not linear else Normalize)(some.min(), some.max())


def positions(values: Array) -> Array:
    """Where values lie on an axis: themselves if evenly spaced numbers, else their order."""
    if values.dtype.kind in "iuf" and values.size > 2:
        gaps = np.diff(values)
        if gaps[0] > 0 and np.allclose(gaps, gaps[0], rtol=1e-6):
            return values
    return np.arange(values.size)


def edges(at: Array) -> Array:
    """Where the cells of evenly spaced positions begin and end."""
    gap = at[1] - at[0] if at.size > 1 else 1
    return np.append(at - gap / 2, at[-1] + gap / 2)


def name_positions(axis: Any, dataset: "xr.Dataset", name: str) -> None:
    """Name an axis, and its ticks where positions aren't the values themselves."""
    axis.set_label_text(label(dataset[name]))
    values = dataset[name].values
    at = positions(values)
    if at is values:
        ticks_at_integers(axis, values.dtype.kind != "f")
    else:
        names = texts(dataset, name) if name in dataset.dims else [f"{value:.4g}" for value in values]
        most = MOST_TICKS if axis.axis_name == "y" else max(2, MOST_CHARACTERS // max(map(len, names)))
        some = np.unique(np.linspace(0, at.size - 1, min(at.size, MOST_TICKS, most)).round().astype(int))
        axis.set_ticks(at[some], [names[i] for i in some])


def band_over_seeds(array: "xr.DataArray") -> Array:
    """10 %, 50 % and 90 % quantiles over seeds [3, ...]; NaN where a seed has no value."""
    if "seed" not in array.dims:
        return np.stack([array.values] * 3)
    values = array.transpose("seed", ...).values
    band = np.full((3, *values.shape[1:]), np.nan)
    complete = ~np.isnan(values).any(axis=0)
    band[:, complete] = np.quantile(values[:, complete], (0.1, 0.5, 0.9), axis=0)
    return band


def draw_line(axis: "Axes", x: Array, array: "xr.DataArray", along: str, style: dict[str, Any]) -> None:
    """The median over seeds, with a band from their 10 % to their 90 % quantile."""
    low, middle, high = band_over_seeds(array.transpose(..., along))
    if "seed" in array.dims:
        axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(x, middle, **style, marker="o" if x.size <= 12 else "", markersize=3)


def draw_point(axis: "Axes", x: int, array: "xr.DataArray", place: dict[str, int]) -> None:
    """The median over seeds, with a bar from their 10 % to their 90 % quantile."""
    low, middle, high = band_over_seeds(array.isel(place))
    colours = list(place.values())
    axis.errorbar(
        [x],
        [middle],
        [[middle - low], [high - middle]],
        color=COLOURS[colours[0]] if colours else COLOURS[0],
        marker=MARKERS[colours[1]] if len(colours) > 1 else "o",
    )


def draw_legend(figure: Picture, drawn: "xr.Dataset", shown: list[str], is_lines: bool) -> None:
    """Colours, then kinds of line (or of marker), to the right of the panels."""
    from matplotlib.lines import Line2D

    handles = []
    for place, dim in enumerate(shown):
        title = label(drawn[dim]) if dim in drawn.coords else dim.replace("_", " ")
        handles.append(Line2D([], [], linestyle="none", label=title))
        for i, text in enumerate(texts(drawn, dim)):
            colour = COLOURS[i] if place == 0 else "0.3"
            if is_lines:
                handles.append(Line2D([], [], color=colour, linestyle="-" if place == 0 else DASHES[i], label=text))
            else:
                marker = "o" if place == 0 else MARKERS[i]
                handles.append(Line2D([], [], color=colour, linestyle="none", marker=marker, label=text))
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False)
