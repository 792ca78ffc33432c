"""The picture of one run, and of several on one time axis."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vecsim.axes import differing_fields
from vecsim.fleet import Cluster, TickDisaggregatedEngine, is_changing
from vecsim.kernel.state import Array
from vecsim.plot.style import (
    COLOURS,
    DASHES,
    DECODE,
    E2E,
    EMPTY,
    PHASES,
    PREFILL,
    TTFT,
    Picture,
    heading,
    ticks_at_integers,
)
from vecsim.series import total_over_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vecsim.run import Run

# More requests or slots than this are drawn as an image: shares of time in each pixel.
MOST_BOXES = 1500
MOST_BOX_SLOTS = 64

COLUMNS = 1600  # of such an image
ROWS = 400
MOST_NUMBERS = 12  # of workers along an axis
MOST_MARKS = 20_000  # of a kind; above, they are drawn as pixels


class Timeline(NamedTuple):
    """When each started request was in which phase, in the order of their start [request], ticks.

    Of a cluster the slots of its workers are one after the other. Of a disaggregated engine first all prefills, whose
    slots are those workers, then all decodes, in slots after these.
    """

    request: Array
    slot: Array
    enqueued_at: Array
    started_at: Array
    first_token_at: Array  # the run's end where it wasn't reached
    left_at: Array


def timeline(run: "Run") -> Timeline:
    """The timeline of a run."""
    requests = run.requests
    started = np.flatnonzero(requests.slot.values >= 0)
    end = float(run.metrics.end_time)
    if isinstance(run.engine, TickDisaggregatedEngine):
        return two_phases(run, started, end, run.engine.max_prefill_workers)
    slot = requests.slot.values[started]
    if isinstance(run.engine, Cluster):
        slot = slot + first_slots(run.engine)[requests.worker.values[started]]
        by_start = np.argsort(requests.started_at.values[started], kind="stable")
        started, slot = started[by_start], slot[by_start]
    first_token_at, completed_at = (
        np.nan_to_num(requests[name].values[started], nan=end) for name in ("first_token_at", "completed_at")
    )
    return Timeline(
        request=started,
        slot=slot,
        enqueued_at=requests.enqueued_at.values[started],
        started_at=requests.started_at.values[started],
        first_token_at=first_token_at,
        left_at=completed_at,
    )


def first_slots(cluster: Cluster) -> Array:
    """The place of each worker's first slot among those of all."""
    return np.cumsum([0, *cluster.slots()])[:-1]


def two_phases(run: "Run", started: Array, end: float, prefill_workers: int) -> Timeline:
    """The timeline of a disaggregated engine, whose requests go from one worker to another."""
    requests = {name: column.values for name, column in run.requests.items()}
    decoded = np.flatnonzero(requests["decode_worker"] >= 0)

    def both(prefill: Array, decode: Array) -> Array:
        return np.concatenate([prefill[started], decode[decoded]])

    first = np.nan_to_num(requests["first_token_at"], nan=end)
    return Timeline(
        request=np.concatenate([started, decoded]),
        slot=both(requests["slot"], requests["decode_worker"] + prefill_workers),
        enqueued_at=both(requests["enqueued_at"], requests["enqueued_at"]),
        started_at=both(requests["started_at"], requests["decode_started_at"]),
        first_token_at=both(first, requests["decode_started_at"]),
        left_at=both(first, np.nan_to_num(requests["completed_at"], nan=end)),
    )


def by_slot(times: Timeline, slots: int) -> list[Array]:
    """The places in the timeline of the requests of each slot, in the order of their start."""
    order = np.argsort(times.slot, kind="stable")
    return np.split(order, np.searchsorted(times.slot[order], np.arange(1, slots)))


def run(run: "Run", *, interactive: bool = False) -> Any:
    """Draw a run: what each slot does over time, the queue, and the latencies when they were recorded.

    Parameters
    ----------
    run : Run
        From `Engine.run`.
    interactive : bool
        Draw it with plotly: what is under the pointer tells slot, request, phase, token, latency so far and queue. In
        the token model it tells what the batch did at that time, and of a mark its request.
        `figure.write_html("run.html")` writes one file that stands on its own.

    Returns
    -------
    matplotlib.figure.Figure or plotly.graph_objects.Figure
        Slots over time with request numbers where they fit (an image of the shares of time where there are many),
        queue size, TTFT and E2E marks; one time axis. Of a cluster in ticks the slots of one worker below those of
        another; of a disaggregated engine in ticks its workers instead of slots, those that prefill on top; in the
        token model the batch's composition, tokens computed and KV memory.

    Raises
    ------
    ImportError
        When plotly is needed and isn't there.
    """
    if interactive:
        from vecsim.plot import interactive as pointed

        return pointed.draw_tokens(run) if run.engine.is_token else pointed.draw(run)
    if run.engine.is_token:
        from vecsim.plot import tokens

        return tokens.draw(run)
    slots = run.engine.max_batch_size
    height = float(np.clip(0.35 * slots, 1.4, 5.0))
    figure = Picture(figsize=(11, height + 3.6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(height, 1.1, 1.5))
    draw_slots(top, run, float(run.metrics.end_time))
    draw_queue(middle, run, color="0.35", fill=True)
    draw_latencies(bottom, run, TTFT, E2E)
    finish(middle, bottom, [run])
    figure.suptitle(heading(run), fontsize="medium")
    legend(figure, (("empty", EMPTY), *PHASES), [("time to first token", "x", TTFT), ("end-to-end latency", "o", E2E)])
    return figure


def compare(runs: Sequence["Run"], labels: Sequence[str] | None = None) -> Any:
    """Draw several runs on one time axis: the slots of each, then their queues and latencies together.

    In the token model the batch's composition instead of slots, and KV memory before the queues where it has an end.

    Parameters
    ----------
    runs : sequence of Run
        From `Engine.run`; at most seven.
    labels : sequence of str, optional
        One for each; what differs between their declarations unless given.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        When there are no runs, more than seven, or not as many labels, or runs of both models.
    """
    runs = list(runs) if isinstance(runs, Sequence) else [runs]
    from vecsim.run import Run

    for one in runs:
        if not isinstance(one, Run):
            raise ValueError(f"runs must be a list of what Engine.run returns, got {one!r} among them")
    if not 1 <= len(runs) <= len(COLOURS):
        raise ValueError(f"runs must be 1 to {len(COLOURS)}, got {len(runs)}")
    if len({run.unit for run in runs}) > 1:
        raise ValueError("runs must be of one model, got some in ticks and some in s")
    if labels is None:
        labels = differing_fields([run.engine for run in runs])
        if len(set(labels)) < len(labels) or "" in labels:
            labels = [f"{i + 1}: {text}" if text else f"{i + 1}" for i, text in enumerate(labels)]
    if len(labels) != len(runs):
        raise ValueError(f"labels must be one for each of {len(runs)} runs, got {len(labels)}")
    token = runs[0].engine.is_token
    if token:
        from vecsim.plot import tokens

        heights = [1.5] * len(runs)
        together = [1.2] if any(tokens.has_memory(run) for run in runs) else []
    else:
        heights = [float(np.clip(0.3 * run.engine.max_batch_size, 1.0, 3.0)) for run in runs]
        together = []
    together += [1.5, 1.8]
    figure = Picture(figsize=(11, sum(heights) + 0.6 * len(runs) + sum(together) + 0.9), layout="constrained")
    axes = figure.subplots(len(runs) + len(together), 1, sharex=True, height_ratios=(*heights, *together))
    middle, bottom = axes[-2:]
    end = max(float(run.metrics.end_time) for run in runs)
    for i, (axis, run, text) in enumerate(zip(axes, runs, labels, strict=False)):
        if token:
            tokens.draw_batch(axis, run, tokens.columns(run))
        else:
            draw_slots(axis, run, end)
        title = textwrap.shorten(text, 110, placeholder=" ...") + "\n"
        axis.set_title(title, loc="left", fontsize="medium", color=COLOURS[i], fontweight="bold")
        axis.text(0.0, 1.03, in_brief(run), transform=axis.transAxes, fontsize="small")
        if len(together) > 2 and tokens.has_memory(run):
            tokens.draw_memory_line(axes[-3], run, color=COLOURS[i], linestyle=DASHES[i])
        draw_queue(middle, run, color=COLOURS[i], linestyle=DASHES[i])
        draw_latencies(bottom, run, COLOURS[i], COLOURS[i])
    if token:
        top = max(axis.get_ylim()[1] for axis in axes[: len(runs)])
        for axis in axes[: len(runs)]:
            axis.set_ylim(0, top)
    finish(middle, bottom, runs)
    phases = PHASES if token else (("empty", EMPTY), *PHASES)
    legend(figure, phases, [("time to first token", "x", "0.3"), ("end-to-end latency", "o", "0.3")])
    return figure


def in_brief(run: "Run") -> str:
    """What came of a run, in a line."""
    if not run.steps.sizes["step"]:
        from vecsim.plot.tokens import why_nothing

        return why_nothing(run)
    metrics = run.metrics
    ttft, e2e = (float(metrics[name].sel(stat="mean")) for name in ("ttft", "e2e"))
    digits, unit = (3, " s") if run.engine.is_token else (1, "")
    return (
        f"{int(metrics.completed)} requests done, {float(metrics.token_throughput):,.0f} "
        f"{metrics.token_throughput.attrs['units']}, mean TTFT {ttft:.{digits}f}{unit}, E2E {e2e:.{digits}f}{unit}"
    )


def finish(queue: "Axes", latency: "Axes", runs: Sequence["Run"]) -> None:
    """Name the axes, and begin them at zero."""
    unit = runs[0].unit
    queue.set_ylabel("queue\n[requests]")
    latency.set_ylabel(f"latency\n[{unit}]")
    latency.set_xlabel(f"time [{unit}]")
    latency.set_xlim(0, max(float(run.metrics.end_time) for run in runs) or 1.0)
    most = max(int(queue_over_time(run)[1].max(initial=0)) for run in runs)
    queue.set_ylim(0, 1.08 * max(most, 1))
    latency.set_ylim(0, None if any(int(run.metrics.first_tokens) for run in runs) else 1)


def legend(figure: Picture, phases: Sequence[tuple[str, str]], marks: list[tuple[str, str, str]]) -> None:
    """Phases and marks (of which "-" is a line), below the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in phases]
    handles += [
        Line2D([], [], color=colour, linewidth=0.8, label=name)
        if marker == "-"
        else Line2D([], [], linestyle="none", marker=marker, color=colour, markersize=4, label=name)
        for name, marker, colour in marks
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small")


def draw_slots(axis: "Axes", run: "Run", span: float) -> None:
    """Slots over time, coloured by phase; `span` is the length of the time axis."""
    times = timeline(run)
    slots = run.engine.max_batch_size
    end = float(run.metrics.end_time)
    axis.set_facecolor(EMPTY)
    if times.request.size <= MOST_BOXES and slots <= MOST_BOX_SLOTS:
        draw_boxes(axis, times, span, slots)
    else:
        image = phase_image(times, slots, end, min(slots, ROWS), COLUMNS)
        axis.imshow(image, extent=(0, end, slots - 0.5, -0.5), aspect="auto", interpolation="antialiased")
    axis.set_ylim(slots - 0.5, -0.5)
    axis.set_ylabel(place_name(run))
    if isinstance(run.engine, TickDisaggregatedEngine):
        axis.axhline(run.engine.max_prefill_workers - 0.5, color="0.3", linewidth=1.0)
    if isinstance(run.engine, Cluster):
        mark_workers(axis, run.engine)
    else:
        ticks_at_integers(axis.yaxis)


def mark_workers(axis: "Axes", cluster: Cluster) -> None:
    """Lines between the slots of workers, and the workers' numbers at theirs, as many as fit."""
    first, slots = first_slots(cluster), np.array(cluster.slots())
    if slots.size <= MOST_BOX_SLOTS:
        for place in first[1:]:
            axis.axhline(place - 0.5, color="0.3", linewidth=min(1.0, 10 / slots.size))
    shown = np.arange(0, slots.size, -(-slots.size // MOST_NUMBERS))
    axis.set_yticks((first + (slots - 1) / 2)[shown], [str(worker) for worker in shown])


def place_name(run: "Run") -> str:
    """What holds a request."""
    return "worker" if isinstance(run.engine, Cluster | TickDisaggregatedEngine) else "slot"


def draw_boxes(axis: "Axes", times: Timeline, span: float, slots: int) -> None:
    """A box for each phase of each request, and the request's number where it fits."""
    from matplotlib.collections import PolyCollection

    low, high = times.slot - 0.45, times.slot + 0.45
    for colour, left, right in (
        (PREFILL, times.started_at, times.first_token_at),
        (DECODE, times.first_token_at, times.left_at),
    ):
        some = right > left
        corners = np.stack(
            [np.stack([x, y], -1) for x, y in ((left, low), (left, high), (right, high), (right, low))], axis=1
        )
        axis.add_collection(PolyCollection(list(corners[some]), facecolors=colour, edgecolors="white", linewidths=0.4))
    if slots > 32:
        return
    width = 760 / span  # points a tick, about
    fits = (times.left_at - times.started_at) * width > 5.0 * np.char.str_len(times.request.astype(str)) + 3.0
    for i in np.flatnonzero(fits):
        axis.text(
            (times.started_at[i] + times.left_at[i]) / 2,
            times.slot[i],
            str(times.request[i]),
            ha="center",
            va="center",
            fontsize=7,
            clip_on=True,
        )


def phase_image(times: Timeline, slots: int, end: float, rows: int, columns: int) -> Array:
    """Colours [row, column, 3], mixed by the shares of time in each phase. O(requests + slots x columns)."""
    from matplotlib.colors import to_rgb

    edges = np.linspace(0.0, end, columns + 1)
    row_of = np.arange(slots) * rows // slots
    shares = np.zeros((2, rows, columns))
    for slot, mine in enumerate(by_slot(times, slots)):
        for phase, begin, stop in (
            (0, times.started_at[mine], times.first_token_at[mine]),
            (1, times.first_token_at[mine], times.left_at[mine]),
        ):
            # Time in the phase up to an instant is linear between begins and ends.
            knots = np.stack([begin, stop], -1).ravel()
            spent = np.cumsum(np.stack([np.zeros_like(begin), stop - begin], -1).ravel())
            if knots.size:
                shares[phase, row_of[slot]] += np.diff(np.interp(edges, knots, spent))
    shares /= np.bincount(row_of, minlength=rows)[:, np.newaxis] * (end / columns)
    empty, prefill, decode = (np.array(to_rgb(colour)) for colour in (EMPTY, PREFILL, DECODE))
    return np.clip(
        empty + shares[0, ..., np.newaxis] * (prefill - empty) + shares[1, ..., np.newaxis] * (decode - empty), 0, 1
    )


def queue_over_time(run: "Run") -> tuple[Array, Array]:
    """When the queue changes, and its size then; of a fleet those of all workers together."""
    time, queue = run.steps.time.values, run.steps.queue_size.values
    if "worker" not in run.steps:
        return time, queue
    worker = run.steps.worker.values
    if is_changing(run.engine):  # a worker that is gone has no queue, and makes no step
        gone = run.worker_events.isel(event=np.isin(run.worker_events.reason, ["drained", "crash", "outage"]))
        time, worker = np.append(time, gone.time), np.append(worker, gone.worker)
        queue = np.append(queue, np.zeros(gone.sizes["event"], queue.dtype))
        order = np.argsort(time, kind="stable")
        time, worker, queue = time[order], worker[order], queue[order]
    return total_over_time(time, queue, worker)


def draw_queue(axis: "Axes", run: "Run", *, fill: bool = False, **style: Any) -> None:
    """Queue size over time: the range in each of many columns where there are more steps than that."""
    time, queue = queue_over_time(run)
    end = float(run.metrics.end_time)
    if not time.size:
        time, queue = np.zeros(1), np.zeros(1, np.int64)
    if time.size > 4 * COLUMNS:
        begin = np.searchsorted(time, np.linspace(0.0, end, 2 * COLUMNS, endpoint=False))
        begin = np.unique(np.minimum(begin, time.size - 1))
        low, high = np.minimum.reduceat(queue, begin), np.maximum.reduceat(queue, begin)
        time = np.repeat(time[begin], 2)
        queue = np.stack([low, high], -1).ravel()
    time, queue = np.append(time, end), np.append(queue, queue[-1])
    if fill:
        axis.fill_between(time, queue, step="post", color=style["color"], alpha=0.3, linewidth=0)
    axis.plot(time, queue, drawstyle="steps-post", linewidth=1.2, **style)
    ticks_at_integers(axis.yaxis)
    axis.grid(alpha=0.3)


def draw_latencies(axis: "Axes", run: "Run", ttft: str, e2e: str) -> None:
    """A mark for each latency at the time at which it was recorded."""
    requests = run.requests
    for name, colour, marker in (("first_token_at", ttft, "x"), ("completed_at", e2e, "o")):
        at = requests[name].values
        recorded = ~np.isnan(at)
        since = requests.arrived_at if run.engine.is_token else requests.enqueued_at
        at, latency = at[recorded], (requests[name] - since).values[recorded]
        many = at.size > MOST_MARKS
        axis.plot(
            at,
            latency,
            linestyle="none",
            marker="," if many else marker,
            markersize=float(np.clip(60 / np.sqrt(max(at.size, 1)), 1.0, 4.5)),
            markeredgewidth=0.6 if marker == "x" else 0.0,
            alpha=0.4 if many else 0.8,
            color=colour,
            rasterized=at.size > 2000,
        )
    axis.grid(alpha=0.3)
