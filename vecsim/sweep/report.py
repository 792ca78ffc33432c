"""The table that a sweep prints: for each combination, how much it holds and how soon the first token comes."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr

# The fields that say how much load there is
LOADS = ("request_rate", "rate_scale", "target_concurrency", "initial_batch")

# A queue is stable if at the end no more requests wait than there are slots, or than this share of the arrivals, and
# half of the arrivals are done.
STABLE_SHARE = 0.01
STABLE = "at the end no more wait than there are slots, or 1 % of the arrivals, and half of the arrivals are done"

# In the token model slots may be so many that a growing queue is shorter for long, and a run may go on until the queue
# is empty. A queue that grows ends at twice its mean, and one that was served to the end has half its largest size as
# its mean; one that holds ends near its mean, and is far below its largest size most of the time. Measured on eight
# batchers x 25 rates: short waits alone would refuse a static batcher, which waits for a batch longer than a request
# runs; the share of the largest size alone would refuse a closed loop, whose queue is always as long.
STABLE_END = 1.5
STABLE_MEAN = 1 / 3
STABLE_TOKEN = (
    "at the end no more wait than 1.5 times the mean queue, or 1 % of the arrivals; requests wait no longer than they "
    "run, or the mean queue is below a third of the largest; and half of the arrivals are done"
)

MOST_ROWS = 36
WIDTH = 160  # of the lines below a table

THROUGHPUTS = ("token_throughput", "request_throughput")
ATTAINED = 0.9  # the SLO attainment at which a load is held

CRITERION = (
    "from the end of the short run to that of the long one it gains more than there are slots, and more than 1 % of "
    "the arrivals"
)


def load_coord(dataset: "xr.Dataset") -> str | None:
    """The coordinate of the load, if there is one along a dimension (of its own, or one that is shared)."""
    one_dim = (name for name in LOADS if name in dataset.coords and dataset[name].ndim == 1)
    return next((name for name in one_dim if dataset[name].dims != ("seed",)), None)


# Dimensions within a scenario
WITHIN = ("stat", "request", "time", "class", "part")


def other_dims(dataset: "xr.Dataset", along: str | None) -> list[str]:
    """The dimensions that make rows or lines: not those within a scenario, nor seeds, nor the one drawn along."""
    return [str(dim) for dim in dataset.sizes if dim not in (*WITHIN, "seed", along)]


def numeric_dims(dataset: "xr.Dataset", but: str | None) -> list[str]:
    """Dimensions with more than one number as their coordinate, the longest first; not that of coordinate `but`."""
    numeric = [
        dim
        for dim in other_dims(dataset, str(dataset[but].dims[0]) if but is not None else None)
        if dim in dataset.coords and dataset[dim].dtype.kind in "iuf" and dataset.sizes[dim] > 1
    ]
    return sorted(numeric, key=lambda dim: -dataset.sizes[dim])


def drawable(dataset: "xr.Dataset") -> list[str]:
    """Coordinates that a table or a picture can have along an axis."""
    dims = other_dims(dataset, None)
    return [str(coord) for coord in dataset.coords if dataset[coord].ndim == 1 and dataset[coord].dims[0] in dims]


def label(array: "xr.DataArray", before: str = "") -> str:
    """A name with its unit, from the attributes."""
    name = before + array.attrs.get("long_name", str(array.name))
    units = array.attrs.get("units", "1")
    return name if units in ("1", name) else f"{name} [{units}]"


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
    """Whether the queue holds, medians over `seed`.

    In the tick model: final_queue <= max(slots, 1 % of arrived) and completed >= arrived / 2. In the token model:
    final_queue <= max(1.5 mean_queue, 1 % of arrived), and mean queue_time <= mean e2e - mean queue_time or
    mean_queue <= max_queue / 3, and completed >= arrived / 2.
    """
    queued, arrived, completed = (median(dataset[name]) for name in ("final_queue", "arrived", "completed"))
    half = completed >= arrived / 2
    if not is_token(dataset):
        short = queued <= np.maximum(slots_of(dataset), STABLE_SHARE * arrived)
        return (short & half).transpose(*queued.dims)
    mean, largest = median(dataset.mean_queue), median(dataset.max_queue)
    waits, takes = (median(dataset[name].sel(stat="mean", drop=True)) for name in ("queue_time", "e2e"))
    short = queued <= np.maximum(STABLE_END * mean, STABLE_SHARE * arrived)
    return (short & ((waits <= takes - waits) | (mean <= STABLE_MEAN * largest)) & half).transpose(*queued.dims)


def is_token(dataset: "xr.Dataset") -> bool:
    """Whether a Dataset is of the token model, in seconds."""
    return str(dataset.end_time.attrs["units"]) == "s"


def has_slo(dataset: "xr.Dataset") -> bool:
    """Whether any limit is declared in a Dataset: by the engine, by a class of requests, or by an axis."""
    import msgspec

    def declares(plain: Any) -> bool:
        if isinstance(plain, dict):
            return bool(plain.get("slo")) or any(map(declares, plain.values()))
        return isinstance(plain, list) and any(map(declares, plain))

    if not is_token(dataset):
        return False
    if any("slo" in str(name).split(".") for name in dataset.coords):
        return True
    kept = [coord.attrs["declarations"] for coord in dataset.coords.values() if "declarations" in coord.attrs]
    return any(declares(msgspec.json.decode(text)) for text in (dataset.attrs["declaration"], *kept))


def slots_of(dataset: "xr.Dataset") -> Any:
    """The slots of each scenario, of a fleet those of all workers: a number, or an array where they are an axis."""
    import msgspec
    import xarray as xr

    declared = msgspec.json.decode(dataset.attrs["declaration"])
    pools = {name: declared[name] for name in ("pool", "prefill", "decode") if name in declared}

    def given(field: str, pool: str, value: Any) -> Any:
        names = (f"{pool}.{field}", f"{pool}_{field}", field)
        coord = next((name for name in names if name in dataset.coords), None)
        return value if coord is None else median(dataset[coord])

    if declared["type"] == "TickDisaggregatedEngine":
        return sum(given(name, "", declared[name]) for name in ("max_prefill_workers", "max_decode_workers"))
    if not pools:
        return given("max_batch_size", "", declared["max_batch_size"])

    def of_pools(name: str, pool: Any) -> Any:
        every = [(f"{name}.{i}", one) for i, one in enumerate(pool)] if isinstance(pool, list) else [(name, pool)]
        return sum(
            given("workers", path, one.get("workers", 1))
            * given("max_batch_size", path, one.get("max_batch_size", 256))
            for path, one in every
        )

    total: Any = 0
    for name, pool in pools.items():
        along = dataset.coords.get(name)
        if along is None or along.ndim != 1:
            total = total + of_pools(name, pool)
        else:  # an axis over whole pools
            each = [xr.DataArray(of_pools(name, one)) for one in msgspec.json.decode(along.attrs["declarations"])]
            total = total + xr.concat(each, along.dims[0])
    return total


def table(dataset: "xr.Dataset", at_load: float | None = None) -> str:
    """One row for each combination of the axes other than load and seed; with goodput where an SLO is declared.

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
    throughput, requests = (median(dataset[name]) for name in THROUGHPUTS)
    tail = str(dataset.stat.values[-2])
    ttft = median(dataset.ttft.sel(stat=tail))

    slo = has_slo(dataset)
    units = [dataset[name].attrs.get("units", "").replace(" per 1000 ticks", "/1K ticks") for name in THROUGHPUTS]
    heads = [*dims, *(f"peak {unit}" for unit in units)]
    if slo:
        goodput, attainment = median(dataset.goodput), median(dataset.slo_attainment)
        heads += [f"peak goodput {dataset.goodput.attrs['units']}"]
    if load is not None:
        loads = dataset[load].values
        if at_load is not None:
            chosen = int(np.abs(loads - np.clip(at_load, loads.min(), loads.max())).argmin())
        else:
            everywhere = np.flatnonzero(holds.all([dim for dim in holds.dims if dim != along]).values)
            chosen = int(everywhere[loads[everywhere].argmax()] if everywhere.size else loads.argmin())
        heads += [f"highest stable {load}", *([f"highest at {100 * ATTAINED:.0f} % SLO"] if slo else [])]
        heads += [f"{tail} TTFT at {load}={loads[chosen]:.4g}"]
    else:
        heads += ["stable", *(["SLO attainment"] if slo else []), f"{tail} TTFT"]

    changing = {"failed": ",.0f", "crashes": ",.0f", "gpu_hours": ".3g"} if "gpu_hours" in dataset else {}
    heads += [name if name != "gpu_hours" else "GPU-hours" for name in changing]

    names = {dim: texts(dataset, dim) for dim in dims}
    rows = []
    combinations = itertools.product(*(range(dataset.sizes[dim]) for dim in dims))
    for index in itertools.islice(combinations, MOST_ROWS):
        at = dict(zip(dims, index, strict=True))
        row = [names[dim][i] for dim, i in at.items()]
        row += [f"{float(throughput.isel(at).max()):,.0f}", f"{float(requests.isel(at).max()):,.1f}"]
        if slo:
            row.append(f"{float(goodput.isel(at).max()):,.1f}")
        if load is not None:
            row += [
                _highest(loads, holds.isel(at)),
                *([_highest(loads, attainment.isel(at) >= ATTAINED)] if slo else []),
            ]
            row.append(_number(ttft.isel(at)[chosen]))
        else:
            row += ["yes" if bool(holds.isel(at)) else "no"]
            row += [f"{100 * float(attainment.isel(at)):.1f} %"] if slo else []
            row.append(_number(ttft.isel(at)))
        for name, digits in changing.items():
            values = median(dataset[name]).isel(at)
            row.append(f"{float(values if load is None else values[chosen]):{digits}}")
        rows.append(row)
    lines = aligned([heads, *rows], len(dims))
    lines += more_rows(dataset, dims)
    seeds = dataset.sizes.get("seed", 1)
    medians = f"medians over {seeds} seeds; " if seeds > 1 else ""
    criterion = STABLE_TOKEN if is_token(dataset) else STABLE
    if slo:
        judged = "completed, refused or failed" if changing else "completed or refused"
        criterion += f"; {100 * ATTAINED:.0f} % SLO: so many of the requests that were {judged} kept to their limits"
    lines += textwrap.wrap(f"({medians}stable: {criterion})", WIDTH)
    return "\n".join(lines)


def variables_table(dataset: "xr.Dataset", variables: Sequence[str], x: str | None = None) -> str:
    """Medians of each variable: a row for each combination of the axes other than seed, a column for each place on x.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.sweep`.
    variables : sequence of str
        Of variables with several statistics the highest quantile is told.
    x : str, optional
        Coordinate: the load, else the longest axis of numbers, unless given.

    Raises
    ------
    ValueError
        When the Dataset has no such coordinate or variable.
    """
    x = x or load_coord(dataset) or next(iter(numeric_dims(dataset, None)), None)
    if x is not None and x not in drawable(dataset):
        raise ValueError(f"x must be one of {', '.join(drawable(dataset))}, got {x!r}")
    if unknown := [name for name in variables if name not in dataset]:
        raise ValueError(f"variables must be among {', '.join(map(str, dataset.data_vars))}, got {unknown[0]!r}")
    along = str(dataset[x].dims[0]) if x is not None else None
    tail = str(dataset.stat.values[-2])
    seeds = dataset.sizes.get("seed", 1)
    lines: list[str] = []
    for name in variables:
        array = dataset[name]
        head = label(array)
        if "stat" in array.dims:
            array, head = array.sel(stat=tail, drop=True), label(array, f"{tail} ")
        array = median(array)
        dims = [str(dim) for dim in array.dims if dim != along]
        columns = [f"{value:g}" for value in dataset[x].values] if x is not None else [""]
        names = {dim: texts(dataset, dim) for dim in dims}
        rows = [[*dims, *columns]]
        combinations = itertools.product(*(range(array.sizes[dim]) for dim in dims))
        for index in itertools.islice(combinations, MOST_ROWS):
            at = dict(zip(dims, index, strict=True))
            cells = [_number(value) for value in np.atleast_1d(array.isel(at).values)]
            rows.append([*(names[dim][i] for dim, i in at.items()), *cells])
        lines += [head if x is None else f"{head}, by {label(dataset[x])}", *aligned(rows, len(dims))]
        lines += [*more_rows(dataset, dims), ""]
    return "\n".join([*lines[:-1], *([f"(medians over {seeds} seeds)"] if seeds > 1 else [])])


def growth_table(dataset: "xr.Dataset") -> str:
    """The final queue and the mean latencies of the short and the long run, for each combination of the axes.

    Parameters
    ----------
    dataset : xarray.Dataset
        From `vecsim.queue_growth`. With several seeds, the table has the first one's values, and medians.
    """
    dims = other_dims(dataset, "run")
    seeds = dataset.sizes.get("seed", 1)
    first = dataset.isel(seed=0) if "seed" in dataset.dims else dataset
    unit, places = ("s", ".3f") if is_token(dataset) else ("ticks", ".2f")
    times = [f"{limit:,.10g} {unit}" for limit in dataset.run_time.values]
    heads = [*dims, "queue", "metric", *(f"{time}, seed {first.seed.item()}" if seeds > 1 else time for time in times)]
    if seeds > 1:
        heads += [f"{time}, median" for time in times]
    names = {dim: texts(dataset, dim) for dim in dims}
    rows = []
    combinations = itertools.product(*(range(dataset.sizes[dim]) for dim in dims))
    for index in itertools.islice(combinations, MOST_ROWS):
        at = dict(zip(dims, index, strict=True))
        verdict = "grows" if bool(dataset.grows.isel(at)) else "stable"
        begin = [*(names[dim][i] for dim, i in at.items()), verdict]
        for metric, title in (("final_queue", "final queue"), ("ttft", "mean TTFT"), ("e2e", "mean E2E")):
            cells = []
            for source in (first, dataset) if seeds > 1 else (first,):
                array = source[metric].sel(stat="mean") if "stat" in source[metric].dims else source[metric]
                digits = ".0f" if array.dtype.kind == "i" else places
                cells += [f"{value:{digits}}" for value in median(array.isel(at)).values]
            rows.append([*begin, title, *cells])
            begin = [""] * len(begin)
    lines = aligned([heads, *rows], len(dims) + 2)
    lines += more_rows(dataset, dims)
    return "\n".join([*lines, f"(a queue grows if {CRITERION})"])


def aligned(rows: list[list[str]], names: int) -> list[str]:
    """Lines of a table: a head, a rule, and the rest; the first `names` columns are flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [rows[0], ["-" * width for width in widths], *rows[1:]]
    ]


def more_rows(dataset: "xr.Dataset", dims: list[str]) -> list[str]:
    """A line that tells how many combinations a table leaves out, if any."""
    more = math.prod(dataset.sizes[dim] for dim in dims) - MOST_ROWS
    return [f"... and {more:,} more rows, in the Dataset"] if more > 0 else []


def median(array: "xr.DataArray") -> "xr.DataArray":
    """Median over `seed`, NaN where a seed has none."""
    return array.median("seed", skipna=False) if "seed" in array.dims else array


def _highest(loads: Any, where: "xr.DataArray") -> str:
    """The highest of the loads at which something holds."""
    good = loads[where.values]
    return f"{good.max():.4g}" if good.size else "none"


def _number(value: Any) -> str:
    """A latency, or a dash if there is none."""
    return "-" if np.isnan(float(value)) else f"{float(value):.4g}"
