"""Sweeps: every combination of axes in one call, one labelled Dataset back."""

import contextlib
import sys
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vecsim.axes import plan
from vecsim.fleet import AnyEngine, DisaggregatedEngine, Fleet, TickDisaggregatedEngine
from vecsim.gather import axis_coords, base_attrs, metrics_dataset, queue_variables, record_variables
from vecsim.measure import check_quantiles, check_times
from vecsim.scenarios import lower
from vecsim.simulate import Measured, simulate
from vecsim.token_simulate import comes_and_goes, goes_by_caches, keeps_tiers

if TYPE_CHECKING:
    import xarray as xr


INSTANTS = 201  # at which a kept queue is looked at


def sweep(
    engine: AnyEngine,
    time_limit: float | None = None,
    *,
    warmup: float = 0.0,
    quantiles: Sequence[float] | None = None,
    keep: Literal["requests", "queue"] | None = None,
    progress: bool = True,
    threads: int | None = None,
    **axes: Any,
) -> "xr.Dataset":
    """Simulate every combination of the axes' values.

    Parameters
    ----------
    engine : Engine, Cluster, DisaggregatedEngine or TickDisaggregatedEngine
        What is varied.
    time_limit : float, optional
        Each run ends at the first boundary at or after it [ticks, or seconds in the token model]. In the token model
        finite loads can do without: each run ends when all is served.
    warmup : float
        Requests that arrive and steps that begin before it are simulated, not measured [ticks or seconds]. Throughputs
        count the same requests: where a long queue was there already, they read lower than what the engine does.
    quantiles : sequence of float, optional
        Quantiles of the latencies, each in [0, 1]; 0.5, 0.9, 0.95 and 0.99 unless given.
    keep : "requests" or "queue", optional
        Keep the per-request arrays of `Run.requests` too, over a dimension `request`, padded with NaN (-1 for
        `slot`, 0 for `output_tokens`); or `queue_size` at 201 evenly spaced instants, over a dimension `time`.
    progress : bool
        Show a progress bar when it takes more than half a second.
    threads : int, optional
        Threads to use; all available cores unless given. Results don't depend on it.
    **axes
        A keyword names a field of the declaration, however deep: `request_rate=[0.1, 0.2]`, or in full
        `**{"load_generator.request_rate": [0.1, 0.2]}`. Lists, ranges and arrays become dimensions (outer product);
        `xarray.DataArray` values that share a dimension vary together; scalars pin a field. Values may be
        declarations: `batcher=[StaticBatcher(), IFBatcher()]`. Scenarios of the same `seed` see the same requests.
        A field that is named like a result (`itl`, `output_tokens`) becomes a dimension under its full path.

    Returns
    -------
    xarray.Dataset
        Over the axes' dimensions in the order of the keywords; latencies over `stat` too. Each variable has
        `long_name`, `units` and `description`; attrs hold the declaration as JSON, the version and the times.

    Raises
    ------
    ValueError
        When an axis is unknown, ambiguous, empty or has a wrong value, or the sweep would not fit in memory.
    """
    if not isinstance(engine, AnyEngine):
        raise ValueError(f"engine must be an Engine or a Cluster, got {engine!r}")
    time_limit, warmup = check_times(time_limit, warmup, engine.is_token)
    wanted = check_quantiles(quantiles)
    if keep == "queue" and time_limit == np.inf:
        raise ValueError('keep must be "requests" or left out where there is no time_limit, got "queue"')
    if keep not in (None, "requests", "queue"):
        raise ValueError(f'keep must be "requests", "queue" or left out, got {keep!r}')
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, Integral) or threads < 1):
        raise ValueError(f"threads must be a whole number >= 1, got {threads!r}")
    planned = plan(engine, axes)
    table = lower(planned, time_limit)
    kernel = "run_scenarios_by_address" if table.rules else "run_scenarios"
    if isinstance(engine, TickDisaggregatedEngine):
        kernel = "run_disaggregated"
    if table.clusters is not None:
        kernel = "run_clusters"
    if table.token is not None:
        kernel = "simulate_fleet" if table.token.fleets else "run_token_scenarios"
    with progress_bar(planned.scenarios, progress, kernel) as bar:
        instants = np.linspace(0.0, time_limit, INSTANTS) if keep == "queue" else np.empty(0)
        measured = Measured(warmup, np.array(wanted), instants)
        results = simulate(table, measured, threads, keep == "requests", bar.update)
    attrs = base_attrs(planned.engine, time_limit, warmup)
    token, classes = table.token is not None, () if table.token is None else table.token.class_names or ()
    apart = isinstance(engine, DisaggregatedEngine)
    tiered = table.token is not None and keeps_tiers(table.token.groups)
    coords = axis_coords(planned)
    changing = table.token is not None and comes_and_goes(table.token.fleets)
    viewing = table.token is not None and goes_by_caches(table.token)
    dataset = metrics_dataset(
        results.metrics, planned.sizes, coords, wanted, attrs, token, classes, apart, changing, tiered, viewing
    )  # fmt: skip
    dims, shape = tuple(planned.sizes), tuple(planned.sizes.values())
    if keep == "requests":
        dataset = dataset.assign(record_variables(results.record, dims, shape, isinstance(engine, Fleet)))
    if keep == "queue":
        dataset = dataset.assign(queue_variables(results.queue, instants, dims, shape, token))
    return dataset


def progress_bar(total: int, shown: bool, kernel: str) -> Any:
    """A bar on standard error that counts scenarios; a bar that isn't shown costs no import.

    Says so before if the kernel isn't compiled.
    """
    if not shown:
        return contextlib.nullcontext(_NoBar())
    from vecsim.kernel.jit import is_compiled

    if not is_compiled(kernel):
        spent = {"simulate_fleet": "some two minutes", "run_token_scenarios": "some 50 s"}.get(kernel, "some 20 s")
        print(f"compiling the kernels: this once, {spent}", file=sys.stderr, flush=True)
    if "ipykernel" in sys.modules:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    return tqdm(total=total, delay=0.5, unit=" scenarios", unit_scale=True, smoothing=0.1)


class _NoBar:
    def update(self, done: int) -> None:
        pass
