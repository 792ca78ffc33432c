"""The table that a sweep prints: for each combination, how much it holds and how soon the first token comes."""

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

# The axis that a table or a picture is drawn along, if the sweep has it.
LOADS = ("request_rate", "target_concurrency", "initial_batch")

# A queue is stable if at the end no more requests wait than there are slots, or than this share of the arrivals.
STABLE_SHARE = 0.01

MOST_ROWS = 36


def load_dim(dataset: "xr.Dataset") -> str | None:
    """The dimension of the load, else the longest numeric one that isn't the seed."""
    dims = [dim for dim in dataset.sizes if dim not in ("stat", "seed", "request")]
    for name in LOADS:
        if name in dims:
            return name
    numeric = [str(dim) for dim in dims if dim in dataset.coords and dataset[dim].dtype.kind in "iuf"]
    return max(numeric, key=lambda dim: dataset.sizes[dim], default=None)


def stable(dataset: "xr.Dataset") -> "xr.DataArray":
    """Whether the queue is stable: final_queue <= max(slots, 1 % of arrived), medians over `seed`."""
    import msgspec

    queued, arrived = dataset.final_queue, dataset.arrived
    if "seed" in queued.dims:
        queued, arrived = queued.median("seed"), arrived.median("seed")
    if "max_batch_size" in dataset.coords:
        slots: Any = dataset.max_batch_size
    else:
        slots = msgspec.json.decode(dataset.attrs["declaration"])["max_batch_size"]
    return queued <= np.maximum(slots, STABLE_SHARE * arrived)


def table(dataset: "xr.Dataset", at_load: float | None = None) -> str:
    """One row for each combination of the axes other than load and seed.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.sweep`.
    at_load : float, optional
        Where to read the TTFT: the nearest load swept. Unless given, the highest one at which every row is stable.
    """
    load = load_dim(dataset)
    dims = [str(dim) for dim in dataset.sizes if dim not in ("stat", "seed", "request", load)]
    holds = stable(dataset)
    throughput = _median(dataset.token_throughput)
    requests = _median(dataset.request_throughput)
    tail = str(dataset.stat.values[-2])
    ttft = _median(dataset.ttft.sel(stat=tail))

    heads = [*dims, "peak tokens/1K ticks", "peak requests/1K ticks"]
    chosen = None
    if load is not None:
        everywhere = holds.all([dim for dim in holds.dims if dim != load])
        values = dataset[load].values
        if at_load is not None:
            chosen = int(np.abs(values - at_load).argmin())
        else:
            chosen = int(np.flatnonzero(everywhere.values).max(initial=0))
        heads += [f"highest stable {load}", f"{tail} TTFT at {load}={values[chosen]:.4g}"]
    else:
        heads += ["stable", f"{tail} TTFT"]

    rows = []
    for index in itertools.product(*(range(dataset.sizes[dim]) for dim in dims)):
        at = dict(zip(dims, index, strict=True))
        row = [_text(dataset[dim].values[i] if dim in dataset.coords else i) for dim, i in at.items()]
        row += [
            f"{float(throughput.isel(at).max()):,.0f}",
            f"{float(requests.isel(at).max()):,.1f}",
        ]
        if load is not None:
            good = dataset[load].values[holds.isel(at).values]
            row += [
                f"{good.max():.4g}" if good.size else "none",
                _text(float(ttft.isel(at)[chosen])),
            ]
        else:
            row += ["yes" if bool(holds.isel(at)) else "no", _text(float(ttft.isel(at)))]
        rows.append(row)
    shown = rows[:MOST_ROWS]
    widths = [max(len(row[i]) for row in [heads, *shown]) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < len(dims) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, ["-" * width for width in widths], *shown]
    ]
    if len(rows) > MOST_ROWS:
        lines.append(f"... and {len(rows) - MOST_ROWS} more rows, in the Dataset")
    seeds = dataset.sizes.get("seed", 1)
    median = f"medians over {seeds} seeds; " if seeds > 1 else ""
    lines.append(f"({median}stable: at the end no more wait than there are slots, or 1 % of the arrivals)")
    return "\n".join(lines)


def _median(array: "xr.DataArray") -> "xr.DataArray":
    """Median over `seed`; NaN where nothing was completed in half of them, without a warning."""
    return array.median("seed", skipna=False) if "seed" in array.dims else array


def _text(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)
