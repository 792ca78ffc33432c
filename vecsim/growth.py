"""Does the queue grow? A short and a long run of the same engine, side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.axes import plan
from vecsim.engine import Engine
from vecsim.fleet import Fleet
from vecsim.measure import check_limit
from vecsim.scenarios import lower
from vecsim.sweep import sweep
from vecsim.sweep.report import CRITERION, STABLE_SHARE, median, slots_of

if TYPE_CHECKING:
    import xarray as xr


def queue_growth(
    engine: Engine | Fleet,
    short: float = 100,
    long: float = 10_000,
    *,
    quantiles: Sequence[float] | None = None,
    progress: bool = True,
    threads: int | None = None,
    **axes: Any,
) -> "xr.Dataset":
    """Simulate a short and a long run; the long one's output lengths go on where the short one's stopped.

    In the token model both see the same requests: the short run is the begin of the long one.

    Parameters
    ----------
    engine : Engine, Cluster or DisaggregatedEngine
        What is simulated.
    short, long : float
        The two time limits [ticks, or seconds in the token model].
    quantiles, progress, threads, **axes
        As for `vecsim.sweep`.

    Returns
    -------
    xarray.Dataset
        That of a sweep over a dimension `run` ("short", "long") before the axes'; beside it `queue_size` of the long
        run over `time`, and `grows` without `seed`: whether, in the median over seeds, the final queue of the long
        run exceeds that of the short one by more than the slots and by more than 1 % of the requests that arrive
        between the two.

    Raises
    ------
    ValueError
        As `vecsim.sweep`; and when `long` isn't longer than `short`, or `keep`, `warmup` or `stream_offset` is given.
    """
    import xarray as xr

    if not isinstance(engine, Engine | Fleet):
        raise ValueError(f"engine must be an Engine or a fleet, got {engine!r}")
    short, long = check_limit("short", short), check_limit("long", long)
    if not long > short:
        raise ValueError(f"long (the time limit) must be > short ({short:g}), got {long:g}")
    for name in axes:
        if name.rpartition(".")[2] in ("keep", "warmup", "stream_offset"):
            raise ValueError(f"{name} can't be given here: the long run goes on where the short one stopped")
    options: dict[str, Any] = {"quantiles": quantiles, "progress": progress, "threads": threads}
    brief = sweep(engine, short, **options, **axes)
    going_on: dict[str, Any] = {}
    if not engine.is_token:
        own = lower(plan(engine, axes), short).columns["offset"]
        offset = brief.arrived.values + np.broadcast_to(own, brief.arrived.shape)
        going_on["stream_offset"] = xr.DataArray(offset, dims=brief.arrived.dims)
    full = sweep(engine, long, keep="queue", **options, **axes, **going_on)
    full = full.drop_vars("stream_offset", errors="ignore")  # there is none without axes
    queue = full[["queue_size"]]
    full = full.drop_vars(["queue_size", "time"])
    both = xr.concat([brief, full], dim=xr.Variable("run", ["short", "long"]), combine_attrs="override")
    units = "s" if engine.is_token else "ticks"
    both = both.assign_coords(
        run_time=("run", [float(short), float(long)], {"long_name": "time limit", "units": units})
    ).assign(queue)
    both.attrs["time_limit"] = float(long)
    return both.assign(grows=grows(both))


def grows(dataset: "xr.Dataset") -> "xr.DataArray":
    """Whether the queue grows, from a Dataset of `queue_growth`: see there."""
    queued, arrived = (median(dataset[name]) for name in ("final_queue", "arrived"))
    gained = queued.sel(run="long", drop=True) - queued.sel(run="short", drop=True)
    came = arrived.sel(run="long", drop=True) - arrived.sel(run="short", drop=True)
    result = (gained > np.maximum(slots_of(dataset), STABLE_SHARE * came)).transpose(*gained.dims)
    return result.assign_attrs(long_name="queue grows", description=CRITERION)
