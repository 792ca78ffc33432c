"""The picture of one run of the token model: what the batch does, KV memory, queue and latencies over time."""

from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.fleet import DisaggregatedEngine, Fleet, is_changing
from vecsim.kernel.state import Array
from vecsim.plot.runs import COLUMNS, draw_latencies, draw_queue, finish, legend
from vecsim.plot.style import DECODE, E2E, EMPTY, PHASES, PREFILL, TTFT, Picture, heading, ticks_at_integers
from vecsim.series import mean_in_intervals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vecsim.run import Run


def draw(run: "Run") -> Any:
    """Batch composition, tokens computed, KV memory, queue and latencies on one time axis; see `vecsim.plot.run`."""
    if not run.steps.sizes["step"]:
        return draw_nothing(run)
    workers = run.engine.workers if isinstance(run.engine, Fleet) else 0
    changes = is_changing(run.engine)
    if changes:  # all that were ever there
        workers = int(run.worker_events.worker.max()) + 1
    apart = isinstance(run.engine, DisaggregatedEngine)
    # Transfers cross the rows of workers
    fleet = [float(np.clip(0.5 * workers, 2.0, 5.0) if apart else np.clip(0.25 * workers, 1.0, 4.0))] if workers else []
    heights = [*fleet, 2.0, 1.1, *([1.1] if has_memory(run) else []), 1.0, 1.6]
    figure = Picture(figsize=(11, sum(heights) + 1.6), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    edges = columns(run)
    if workers:
        from vecsim.plot.fleets import draw_workers

        draw_workers(axes.pop(0), run, workers, edges)
    draw_batch(axes[0], run, edges)
    draw_tokens(axes[1], run, edges)
    if has_memory(run):
        draw_memory(axes[2], run, edges)
    queue, latency = axes[-2:]
    draw_queue(queue, run, color="0.35", fill=True)
    draw_latencies(latency, run, TTFT, E2E)
    finish(queue, latency, [run])
    figure.suptitle(heading(run), fontsize="medium")
    phases = (("idle", EMPTY), *PHASES) if workers else PHASES
    marks = [("time to first token", "x", TTFT), ("end-to-end latency", "o", E2E)]
    if apart:
        marks = [("transfer", "-", "0.2"), *marks]
    if changes:
        from vecsim.plot.fleets import CRASH, STARTING, is_crash

        phases = (("starting", STARTING), *phases)
        marks = [*([("crash", "x", CRASH)] if is_crash(run).any() else []), *marks]
    legend(figure, phases, marks)
    return figure


def draw_nothing(run: "Run") -> Any:
    """A picture that tells why there is nothing to see."""
    figure = Picture(figsize=(11, 2.4), layout="constrained")
    axis = figure.subplots()
    axis.text(0.5, 0.5, why_nothing(run), ha="center", va="center", transform=axis.transAxes)
    axis.set_xlim(0, float(run.metrics.end_time) or 1.0)
    axis.set_yticks([])
    axis.set_xlabel("time [s]")
    figure.suptitle(heading(run), fontsize="medium")
    return figure


def why_nothing(run: "Run") -> str:
    """Why no step was made."""
    arrived, refused = int(run.metrics.arrived), int(run.metrics.dropped)
    if not arrived:
        return "no step was made: no request arrived"
    if refused == arrived:
        return f"no step was made: all {arrived:,} requests were refused"
    return f"no step was made: {arrived:,} requests arrived, {refused:,} were refused, none was begun"


def has_memory(run: "Run") -> bool:
    """Whether the run's KV memory has an end."""
    return run.engine.kv_blocks is not None


def columns(run: "Run") -> Array:
    """Edges of the picture's columns over the run's time."""
    return np.linspace(0.0, float(run.metrics.end_time) or 1.0, COLUMNS // 2 + 1)


def mean_over_time(run: "Run", values: Array, edges: Array, chosen: Array | None = None) -> Array:
    """Time-weighted mean of the steps' values in each column; 0 where the engine is idle.

    Of a fleet the sum over its workers; `chosen` are the steps of one.
    """
    if chosen is None and "worker" in run.steps:
        worker = run.steps.worker.values
        by_worker = np.split(np.argsort(worker, kind="stable"), np.flatnonzero(np.diff(np.sort(worker))) + 1)
        return sum((mean_over_time(run, values, edges, own) for own in by_worker), np.zeros(edges.size - 1))
    steps = run.steps if chosen is None else run.steps.isel(step=chosen)
    values = values if chosen is None else values[chosen]
    return mean_in_intervals(steps.time.values, steps.duration.values, values, edges)


def requests_in_batch(run: "Run", edges: Array) -> tuple[Array, Array]:
    """Mean requests in each column that decode and that prefill."""
    decode, prefill = (mean_over_time(run, run.steps[name].values, edges) for name in ("decoding", "prefilling"))
    return decode, prefill


def tokens_per_second(run: "Run", edges: Array) -> tuple[Array, Array]:
    """Tokens computed a second in each column, of outputs and of prompts, spread evenly over the time of their step."""
    lasts = run.steps.duration.values
    decode, prefill = (
        mean_over_time(run, run.steps[name].values / lasts, edges) for name in ("decoding", "prefill_tokens")
    )
    return decode, prefill


def of_workers_there(run: "Run", edges: Array, of_each: list[int]) -> Array:
    """Sum over the workers that are ready or drain in a column, the most of its two edges; `of_each` is by pool."""
    phases = run.worker_counts(edges.size).workers.sel(phase=["ready", "draining"])
    there = phases.sum("phase").transpose("pool", "time").values
    return np.array(of_each) @ np.maximum(there[:, 1:], there[:, :-1])


def memory_in_use(run: "Run", edges: Array) -> Array:
    """Mean share of KV memory that is held in each column, of that of the workers that are there [%]."""
    held = mean_over_time(run, run.steps.kv_blocks.values, edges)
    blocks: Any = run.engine.kv_blocks
    if is_changing(run.engine):
        each = [(pool.kv_cache and pool.kv_cache.blocks) or 0 for pool in run.engine.pools]
        blocks = np.maximum(of_workers_there(run, edges, each), 1)
    return 100 * held / blocks


def draw_batch(axis: "Axes", run: "Run", edges: Array) -> None:
    """Requests that prefill and decode, stacked; a line at the slots if they come near."""
    decode, prefill = requests_in_batch(run, edges)
    axis.stackplot(edges[:-1], decode, prefill, colors=(DECODE, PREFILL), step="post", linewidth=0)
    slots: Any = np.full(edges.size - 1, run.engine.max_batch_size)
    if is_changing(run.engine):
        slots = of_workers_there(run, edges, [pool.max_batch_size for pool in run.engine.pools])
    most = float((decode + prefill).max(initial=1.0))
    if most > 0.6 * slots.max():
        ends = np.append(slots, slots[-1:])
        axis.plot(edges, ends, color="0.3", linewidth=0.8, linestyle=":", drawstyle="steps-post")
        most = max(most, float(slots.max()))
    axis.set_ylim(0, 1.08 * most)
    axis.set_ylabel("batch\n[requests]")
    ticks_at_integers(axis.yaxis)
    axis.grid(alpha=0.3)


def draw_tokens(axis: "Axes", run: "Run", edges: Array) -> None:
    """Tokens computed a second, of prompts and outputs, stacked."""
    decode, prefill = tokens_per_second(run, edges)
    axis.stackplot(edges[:-1], decode, prefill, colors=(DECODE, PREFILL), step="post", linewidth=0)
    axis.set_ylim(0, None if (decode + prefill).any() else 1)
    axis.set_ylabel("computed\n[tokens/s]")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.grid(alpha=0.3)


def draw_memory(axis: "Axes", run: "Run", edges: Array) -> None:
    """Share of KV memory in use; how often requests were preempted is told in a corner."""
    used = memory_in_use(run, edges)
    axis.fill_between(edges[:-1], used, step="post", color="0.55", linewidth=0)
    axis.set_ylim(0, 105 if used.max(initial=0.0) > 50 else None)
    axis.set_ylabel("KV memory\n[%]")
    preemptions = int(run.metrics.preemptions)
    if preemptions:
        axis.text(
            0.995, 0.9, f"{preemptions:,} preemption{'s' * (preemptions > 1)}", transform=axis.transAxes,
            ha="right", va="top", fontsize="small",
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2},
        )  # fmt: skip
    axis.grid(alpha=0.3)


def draw_memory_line(axis: "Axes", run: "Run", **style: Any) -> None:
    """Share of KV memory in use as a line, for several runs together."""
    edges = columns(run)
    axis.plot(edges[:-1], memory_in_use(run, edges), drawstyle="steps-post", linewidth=1.2, **style)
    axis.set_ylim(0, 105)
    axis.set_ylabel("KV memory\n[%]")
    axis.grid(alpha=0.3)
