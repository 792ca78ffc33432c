"""What the workers of a fleet do over time."""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb

from vecsim.axes import differing_fields
from vecsim.fleet import DisaggregatedEngine, is_changing
from vecsim.kernel.state import Array
from vecsim.paths import ONBOARDING
from vecsim.plot.style import DECODE, EMPTY, PREFILL, Picture, check_dataset, heading, run_time, ticks_at_integers
from vecsim.plot.tokens import mean_over_time
from vecsim.variables import PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import xarray as xr
    from matplotlib.axes import Axes

    from vecsim.run import Run


Row = tuple[str, dict[str, float]]  # what a bar is called, and the length of each part
Panel = tuple[str, list[Row]]

# More lines of transfers than these would hide what is below
MOST_LINES = 400
TRANSFER = "#000000"
STARTING = "#EAD7F0"
CRASH = "#D55E00"

# What is done has the colours of its phase; waits are grey, those for blocks purple
COLOURS = ("#000000", "#CC79A7", "#777777", PREFILL, "#8C4A73", "#009E73", "#BBBBBB", DECODE, "#0072B2")
PART_COLOURS = dict(zip(PARTS, COLOURS, strict=True)) | dict(zip(ONBOARDING, ("#AA4499", "#E69F00"), strict=True))
THINNEST = 0.002  # part of the longest bar that can be seen
MOST_BARS = 32


def draw_workers(axis: "Axes", run: "Run", workers: int, edges: Array) -> None:
    """Workers over time: the colour mixes what a column's time went to, as the shares of it."""
    steps = run.steps
    prefills = (steps.prefill_tokens.values > 0).astype(np.float64)
    image = np.empty((workers, edges.size - 1, 3))
    colours = [np.array(to_rgb(colour)) for colour in (PREFILL, DECODE, EMPTY)]
    for worker in range(workers):
        own = np.flatnonzero(steps.worker.values == worker)
        busy = mean_over_time(run, np.ones(prefills.size), edges, own)[:, np.newaxis]
        prefill = mean_over_time(run, prefills, edges, own)[:, np.newaxis]
        image[worker] = prefill * colours[0] + (busy - prefill) * colours[1] + (1 - busy) * colours[2]
    if is_changing(run.engine):
        draw_lives(axis, run, image, edges)
    axis.imshow(
        np.clip(image, 0.0, 1.0),
        aspect="auto",
        interpolation="nearest",
        extent=(edges[0], edges[-1], workers - 0.5, -0.5),
    )
    axis.set_ylabel("worker")
    if workers <= 8:
        axis.set_yticks(range(workers))
    else:
        ticks_at_integers(axis.yaxis)
    if isinstance(run.engine, DisaggregatedEngine):
        axis.axhline(run.engine.prefill_places - 0.5, color="white", linewidth=2)
        axis.set_ylabel("prefill | decode workers" if workers > 4 else "worker")
        draw_transfers(axis, run, workers)


def draw_lives(axis: "Axes", run: "Run", image: Array, edges: Array) -> None:
    """Where workers are off nothing is drawn, where they start a light colour; a cross for each crash."""
    events = run.worker_events
    time, worker, phase = (events[name].values for name in ("time", "worker", "phase"))
    middle = (edges[1:] + edges[:-1]) / 2
    for row in range(image.shape[0]):
        own = np.flatnonzero(worker == row)
        there = np.append("off", phase[own])[np.searchsorted(time[own], middle, "right")]
        image[row][np.isin(there, ["off", "dead"])] = 1.0
        image[row][there == "starting"] = to_rgb(STARTING)
    crashed = is_crash(run)
    if crashed.any():
        axis.plot(time[crashed], worker[crashed], "x", color=CRASH, markersize=6, markeredgewidth=1.5)


def is_crash(run: "Run") -> Array:
    """Which of a run's `worker_events` are crashes, or stops in an outage."""
    return np.isin(run.worker_events.reason.values, ["crash", "outage"])


def draw_transfers(axis: "Axes", run: "Run", workers: int) -> None:
    """A line for each transfer, from its prefill worker when it begins to its decode worker when it has ended.

    Of more than `MOST_LINES`, so many are drawn, evenly chosen; fewer where they cross the rows of many workers.
    """
    requests = run.requests
    moved = np.flatnonzero(np.isfinite(requests.transfer_noticed_at.values))
    most = max(1, int(MOST_LINES / max(1.0, workers / 8)))
    if moved.size > most:
        moved = moved[np.linspace(0, moved.size - 1, most).astype(np.int64)]
    ends = [
        np.stack([requests[at].values[moved], requests[worker].values[moved]], axis=-1)
        for at, worker in (("transfer_began_at", "prefill_worker"), ("transfer_noticed_at", "worker"))
    ]
    alpha = float(np.clip(60 / max(moved.size, 1), 0.25, 0.8))
    axis.add_collection(
        LineCollection(list(np.stack(ends, axis=1)), colors=TRANSFER, linewidths=0.8, alpha=alpha), autolim=False
    )


def ttft_parts(*runs: "Run | xr.Dataset", by: str = "rank", labels: "Sequence[str] | None" = None) -> Any:
    """Draw what the time to first token is made of, in stacked bars; each part is a mean.

    Parameters
    ----------
    *runs : Run or xarray.Dataset
        Runs of the token model, one below the other; or one Dataset of a sweep of disaggregated fleets, of which each
        combination of its axes gets a bar (at most 32; means over its seeds), in a panel for each value of the first.
    by : "rank" or "class"
        What the requests of a run are put together by: their time to first token (the faster half, the next 40 %, the
        next 9 %, the slowest 1 %), or their class.
    labels : sequence of str, optional
        One for each run; what differs between their declarations unless given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        When there is no run, one of another kind or without a first token, or a Dataset without `ttft_parts`.
    """
    import xarray as xr

    if not runs:
        raise ValueError("runs must be one or more, got none")
    if by not in ("rank", "class"):
        raise ValueError(f'by must be "rank" or "class", got {by!r}')
    panels: list[Panel]
    if any(isinstance(run, xr.Dataset) for run in runs):
        panels = panels_of_sweep(*runs)
    else:
        named = labels if labels is not None else titles(runs)
        if len(named) != len(runs):
            raise ValueError(f"labels must be one for each of {len(runs)} runs, got {len(named)}")
        groups = by_rank if by == "rank" else by_class
        panels = [(text, groups(cast("Run", run))) for text, run in zip(named, runs, strict=True)]
    heights = [len(rows) for _, rows in panels]
    longest = max(sum(mean.values()) for _, rows in panels for _, mean in rows)
    figure = Picture(figsize=(10, 1.3 + 0.42 * sum(heights) + 0.5 * len(panels)), layout="constrained")
    plots = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (text, rows) in zip(plots, panels, strict=True):
        draw_parts(axis, rows, THINNEST * longest)
        axis.set_title(text, fontsize="medium" if len(text) < 100 else "small", loc="left")
    plots[-1].set_xlabel("time to first token, mean [s]")
    plots[-1].set_xlim(0, 1.09 * longest or 1.0)
    entries = {text: bar for axis in plots for bar, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    shown = [name for name in PART_COLOURS if name in entries]
    figure.legend(
        [entries[name] for name in shown], shown, loc="outside lower center", ncols=min(len(shown), 5),
        fontsize="small", frameon=False,
    )  # fmt: skip
    return figure


def draw_parts(axis: "Axes", rows: list[Row], thinnest: float) -> None:
    """A stacked bar for each row, its length beside it; a part too thin to be seen in any is in no legend."""
    places = np.arange(len(rows))
    left = np.zeros(len(rows))
    for part, colour in PART_COLOURS.items():
        width = np.array([mean.get(part, 0.0) for _, mean in rows])
        if width.max() > 0:
            name = part if width.max() > thinnest else "_"
            axis.barh(places, width, left=left, color=colour, label=name, edgecolor="white", linewidth=0.5)
        left = left + width
    for place, whole in zip(places, left, strict=True):
        axis.annotate(
            f"{whole:.3g}", (whole, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize="small"
        )
    axis.set_yticks(places, [name for name, _ in rows])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def titles(runs: tuple[Any, ...]) -> list[str]:
    """What was run; of several, what differs between them."""
    if len(runs) == 1:
        return [heading(runs[0])]
    texts = differing_fields([run.engine for run in runs])
    return texts if len(set(texts)) == len(texts) and "" not in texts else [heading(run) for run in runs]


def parts_of(run: "Run") -> tuple[Array, list[str], Array]:
    """(parts of the requests that have a first token [part, request], names of the parts, places of the requests)."""
    parts = run.ttft_parts
    there = np.flatnonzero(np.isfinite(parts.values[-1]))
    if there.size == 0:
        raise ValueError("run must have a request with a first token, got none")
    return parts.values[:, there], parts.part.values.tolist(), there


def by_rank(run: "Run") -> list[Row]:
    """(name, mean of each part) of requests by rank of their time to first token."""
    parts, names, _ = parts_of(run)
    order = np.argsort(parts.sum(axis=0), kind="stable")
    edges = np.ceil(np.array([0.0, 0.5, 0.9, 0.99, 1.0]) * order.size).astype(np.int64)
    groups = ("faster half", "next 40 %", "next 9 %", "slowest 1 %")
    return [
        (name, dict(zip(names, parts[:, order[first:last]].mean(axis=1), strict=True)))
        for name, first, last in zip(groups, edges, edges[1:], strict=False)
        if last > first
    ]


def by_class(run: "Run") -> list[Row]:
    """(name, mean of each part) of the requests of each class."""
    parts, names, there = parts_of(run)
    number = run.requests.class_number.values[there]
    classes = [kind.name for kind in run.engine.load_generator.classes] or ["all requests"]
    return [
        (name, dict(zip(names, parts[:, number == place].mean(axis=1), strict=True)))
        for place, name in enumerate(classes)
        if (number == place).any()
    ]


def panels_of_sweep(*datasets: Any) -> list[Panel]:
    """(title, rows) for each place along the first of a sweep's axes; where it has one alone, a single panel."""
    from vecsim.sweep.report import other_dims, texts

    if len(datasets) > 1:
        raise ValueError(f"dataset must be the only one, got {len(datasets)} runs and datasets")
    (dataset,) = datasets
    check_dataset(dataset)
    if "ttft_parts" not in dataset:
        raise ValueError("dataset must be of disaggregated fleets, with `ttft_parts`, got none")
    parts = dataset.ttft_parts.mean("seed") if "seed" in dataset.sizes else dataset.ttft_parts
    seeds = dataset.sizes.get("seed", 1)
    title = run_time(dataset) + (f"; means over {seeds} seeds" if seeds > 1 else "")
    dims = other_dims(parts.to_dataset(), None)

    def called(dim: str, text: str) -> str:
        """A number says little without the name of its axis."""
        if dim in dataset.coords and dataset[dim].dtype.kind in "iufb":
            text = f"{dim.replace('.', ' ')} {text}"
        return text.replace("_", " ")

    named = [[called(dim, text) for text in texts(dataset, dim)] for dim in dims]
    panels: dict[str, list[Row]] = {}
    for index in np.ndindex(tuple(parts.sizes[dim] for dim in dims)):
        means = parts.isel(dict(zip(dims, index, strict=True))).values
        if np.isfinite(means).all():
            told = [names[i] for names, i in zip(named, index, strict=True)] or ["all requests"]
            panel = told.pop(0) if len(told) > 1 else title
            panels.setdefault(panel, []).append((", ".join(told), dict(zip(PARTS, means.tolist(), strict=True))))
    bars = sum(map(len, panels.values()))
    if not 1 <= bars <= MOST_BARS:
        raise ValueError(f"dataset must have 1 to {MOST_BARS} combinations with a first token, got {bars}")
    return list(panels.items())
