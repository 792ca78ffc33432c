"""The table that a sweep prints: for each combination, how much it holds and how soon the first token comes."""

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

# The fields that say how much load there is
LOADS = ("request_rate", "target_concurrency", "initial_batch")

# A queue is stable if requests are completed and at the end no more wait than there are slots, or than this share of
# the arrivals.
STABLE_SHARE = 0.01

MOST_ROWS = 36


def load_coord(dataset: "xr.Dataset") -> str | None:
    """The coordinate of the load, if there is one along a dimension (of its own, or one that is shared)."""
    return next((name for name in LOADS if name in dataset.coords and dataset[name].ndim == 1), None)


def other_dims(dataset: "xr.Dataset", along: str | None) -> list[str]:
    """The dimensions that make rows or lines: not those of statistics, seeds, requests, nor the one drawn along."""
    return [str(dim) for dim in dataset.sizes if dim not in ("stat", "seed", "request", along)]


def texts(dataset: "xr.Dataset", dim: str) -> list[str]:
    """What each place along a dimension is called: its coordinate, or those of the axes that vary along it."""

    def text(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)

    if dim in dataset.coords:
        return [text(value) for value in dataset[dim].values]
    along = [name for name, coord in dataset.coords.items() if coord.dims == (dim,)]
    return [
        ", ".join(f"{name}={text(dataset[name].values[i])}" for name in along) or str(i)
        for i in range(dataset.sizes[dim])
    ]


def stable(dataset: "xr.Dataset") -> "xr.DataArray":
    """Whether requests are completed and final_queue <= max(slots, 1 % of arrived); medians over `seed`."""
    import msgspec

    queued, arrived, completed = (_median(dataset[name]) for name in ("final_queue", "arrived", "completed"))
    if "max_batch_size" in dataset.coords:
        slots: Any = _median(dataset.max_batch_size)
    else:
        slots = msgspec.json.decode(dataset.attrs["declaration"])["max_batch_size"]
    return ((queued <= np.maximum(slots, STABLE_SHARE * arrived)) & (completed > 0)).transpose(*queued.dims)


def table(dataset: "xr.Dataset", at_load: float | None = None) -> str:
    """One row for each combination of the axes other than load and seed.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.sweep`.
    at_load : float, optional
        Where to read the TTFT: the nearest load swept. Unless given, the highest one at which every row is stable.
    """
    load = load_coord(dataset)
    along = str(dataset[load].dims[0]) if load is not None else None
    dims = other_dims(dataset, along)
    holds = stable(dataset)
    throughput, requests = _median(dataset.token_throughput), _median(dataset.request_throughput)
    tail = str(dataset.stat.values[-2])
    ttft = _median(dataset.ttft.sel(stat=tail))

    heads = [*dims, "peak tokens/1K ticks", "peak requests/1K ticks"]
    if load is not None:
        loads = dataset[load].values
        if at_load is not None:
            chosen = int(np.abs(loads - np.clip(at_load, loads.min(), loads.max())).argmin())
        else:
            everywhere = np.flatnonzero(holds.all([dim for dim in holds.dims if dim != along]).values)
            chosen = int(everywhere[loads[everywhere].argmax()] if everywhere.size else loads.argmin())
        heads += [f"highest stable {load}", f"{tail} TTFT at {load}={loads[chosen]:.4g}"]
    else:
        heads += ["stable", f"{tail} TTFT"]

    names = {dim: texts(dataset, dim) for dim in dims}
    rows = []
    combinations = itertools.product(*(range(dataset.sizes[dim]) for dim in dims))
    for index in itertools.islice(combinations, MOST_ROWS):
        at = dict(zip(dims, index, strict=True))
        row = [names[dim][i] for dim, i in at.items()]
        row += [f"{float(throughput.isel(at).max()):,.0f}", f"{float(requests.isel(at).max()):,.1f}"]
        if load is not None:
            good = loads[holds.isel(at).values]
            row += [f"{good.max():.4g}" if good.size else "none", _number(ttft.isel(at)[chosen])]
        else:
            row += ["yes" if bool(holds.isel(at)) else "no", _number(ttft.isel(at))]
        rows.append(row)
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < len(dims) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, ["-" * width for width in widths], *rows]
    ]
    more = math.prod(dataset.sizes[dim] for dim in dims) - len(rows)
    if more > 0:
        lines.append(f"... and {more:,} more rows, in the Dataset")
    seeds = dataset.sizes.get("seed", 1)
    median = f"medians over {seeds} seeds; " if seeds > 1 else ""
    lines.append(f"({median}stable: at the end no more wait than there are slots, or 1 % of the arrivals)")
    return "\n".join(lines)


def _median(array: "xr.DataArray") -> "xr.DataArray":
    """Median over `seed`, NaN where a seed has none."""
    return array.median("seed", skipna=False) if "seed" in array.dims else array


def _number(value: Any) -> str:
    """A latency, or a dash if there is none."""
    return "-" if np.isnan(float(value)) else f"{float(value):.4g}"
