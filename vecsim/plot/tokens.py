"""The picture of one run of the token model: what the batch does, KV memory, queue and latencies over time."""

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.kernel.state import Array
from vecsim.plot.runs import COLUMNS, draw_latencies, draw_queue
from vecsim.plot.style import DECODE, E2E, PREFILL, TTFT, Picture, ticks_at_integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vecsim.run import Run


def draw(run: "Run") -> Any:
    """Batch composition, tokens computed, KV memory, queue and latencies on one time axis; see `vecsim.plot.run`."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    finite = not np.isnan(float(run.metrics.kv_use))
    heights = [2.0, 1.1, *([1.1] if finite else []), 1.0, 1.6]
    figure = Picture(figsize=(11, sum(heights) + 1.6), layout="constrained")
    axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    end = float(run.metrics.end_time)
    edges = np.linspace(0.0, end, COLUMNS // 2 + 1)
    draw_batch(axes[0], run, edges)
    draw_tokens(axes[1], run, edges)
    if finite:
        draw_memory(axes[2], run, edges)
    queue, latency = axes[-2:]
    draw_queue(queue, run, color="0.35", fill=True)
    draw_latencies(latency, run, TTFT, E2E)
    queue.set_ylabel("queue\n[requests]")
    queue.set_ylim(0, 1.08 * max(int(run.metrics.max_queue), 1))
    latency.set_ylabel("latency\n[s]")
    latency.set_ylim(0, None if int(run.metrics.first_tokens) else 1)
    latency.set_xlabel("time [s]")
    latency.set_xlim(0, end or 1.0)
    figure.suptitle(textwrap.fill(run.title, 120), fontsize="medium")
    handles: list[Any] = [Patch(color=PREFILL, label="prefill"), Patch(color=DECODE, label="decode")]
    handles += [
        Line2D([], [], linestyle="none", marker=marker, color=colour, markersize=4, label=name)
        for name, marker, colour in (("time to first token", "x", TTFT), ("end-to-end latency", "o", E2E))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize="small")
    return figure


def mean_over_time(run: "Run", name: str, edges: Array) -> Array:
    """Time-weighted mean of a step variable in each column; 0 where the engine is idle."""
    steps = run.steps
    begin, lasts = steps.time.values, steps.duration.values
    knots = np.stack([begin, begin + lasts], -1).ravel()
    spent = np.cumsum(np.stack([np.zeros(begin.size), lasts * steps[name].values], -1).ravel())
    if not knots.size:
        return np.zeros(edges.size - 1)
    return np.diff(np.interp(edges, knots, spent)) / np.diff(edges)


def draw_batch(axis: "Axes", run: "Run", edges: Array) -> None:
    """Requests that prefill and decode, stacked; a line at the slots if they come near."""
    decode, prefill = mean_over_time(run, "decoding", edges), mean_over_time(run, "prefilling", edges)
    axis.stackplot(edges[:-1], decode, prefill, colors=(DECODE, PREFILL), step="post", linewidth=0)
    slots = run.engine.max_batch_size
    most = float((decode + prefill).max(initial=1.0))
    if most > 0.6 * slots:
        axis.axhline(slots, color="0.3", linewidth=0.8, linestyle=":")
        most = max(most, slots)
    axis.set_ylim(0, 1.08 * most)
    axis.set_ylabel("batch\n[requests]")
    ticks_at_integers(axis.yaxis)
    axis.grid(alpha=0.3)


def draw_tokens(axis: "Axes", run: "Run", edges: Array) -> None:
    """Tokens computed a second, of prompts and outputs, stacked."""
    steps = run.steps
    widths = np.diff(edges)
    place = np.clip(np.searchsorted(edges, steps.time.values, side="right") - 1, 0, widths.size - 1)
    decode, prefill = (
        np.bincount(place, steps[name].values, widths.size) / widths for name in ("decoding", "prefill_tokens")
    )
    axis.stackplot(edges[:-1], decode, prefill, colors=(DECODE, PREFILL), step="post", linewidth=0)
    axis.set_ylim(0, None if (decode + prefill).any() else 1)
    axis.set_ylabel("computed\n[tokens/s]")
    axis.grid(alpha=0.3)


def draw_memory(axis: "Axes", run: "Run", edges: Array) -> None:
    """Share of KV memory in use, and when requests were preempted is told in its label."""
    cache = run.engine.kv_cache
    assert cache is not None
    assert cache.blocks is not None
    used = 100 * mean_over_time(run, "kv_blocks", edges) / cache.blocks
    axis.fill_between(edges[:-1], used, step="post", color="0.55", linewidth=0)
    axis.set_ylim(0, 105 if used.max(initial=0.0) > 50 else None)
    axis.set_ylabel("KV memory\n[%]")
    preemptions = int(run.metrics.preemptions)
    if preemptions:
        axis.text(
            0.995, 0.9, f"{preemptions} preemptions", transform=axis.transAxes, ha="right", va="top", fontsize="small"
        )
    axis.grid(alpha=0.3)
