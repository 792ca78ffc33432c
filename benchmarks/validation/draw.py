"""Pictures of measured and predicted latencies."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from replay import STATISTICS, WHOLE, Replay, beside, latencies

from vecsim.plot.style import COLOURS, MARKERS, Picture

BAND = 0.1  # of the measured value
BINS = 14


def draw(replays: Sequence[Replay], compared: pd.DataFrame, folder: Path) -> None:
    """All pictures into a folder; overloaded runs are in the distributions alone."""
    calm = [replayed for replayed in replays if not replayed.run.overloaded]
    pictures = {"distributions.png": distributions(replays)}
    if calm:
        pictures["predicted.png"] = against(calm, compared)
        pictures["concurrency.png"] = concurrency(calm)
    for name, picture in pictures.items():
        picture.savefig(folder / name, dpi=100)


def against(replays: Sequence[Replay], compared: pd.DataFrame) -> Picture:
    """Means of each run and stage: predicted against measured."""
    picture = Picture(figsize=(13, 5), layout="constrained")
    models = sorted({replayed.run.model.name for replayed in replays})
    profiles = sorted({replayed.run.profile for replayed in replays})
    means = compared[compared.statistic == "mean"]
    for axes, latency in zip(picture.subplots(1, 3), STATISTICS, strict=True):
        low, high = np.inf, 0.0
        for replayed in replays:
            run = replayed.run
            rows = means[(means.run == run.name) & (means.latency == latency)]
            stages = rows[rows.stage != WHOLE] if len(run.stages) > 1 else rows
            colour = COLOURS[models.index(run.model.name) % len(COLOURS)]
            marker = MARKERS[profiles.index(run.profile) % len(MARKERS)]
            axes.plot(
                stages.measured, stages.predicted, marker, color=colour, markersize=8, alpha=0.85, markeredgecolor="w"
            )
            low, high = min(low, stages[["measured", "predicted"]].min(axis=None)), max(high, stages.measured.max())
        ends = np.array([low / 1.15, high * 1.15])
        axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color="#EEEEEE", zorder=0)
        axes.plot(ends, ends, color="#888888", linewidth=0.8, zorder=1)
        axes.set(
            xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal", title=f"mean {latency} of each stage"
        )
        axes.set(xlabel="measured [ms]", ylabel="predicted [ms]")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if ends[1] / ends[0] < 10 else (1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axis.set_minor_formatter(NullFormatter())
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o", ls="", label=m) for i, m in enumerate(models)
    ]
    handles += [
        Line2D([], [], color="#555555", marker=MARKERS[i % len(MARKERS)], ls="", label=p)
        for i, p in enumerate(profiles)
    ]
    handles.append(Line2D([], [], color="#EEEEEE", linewidth=8, label=f"± {100 * BAND:g} %"))
    picture.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False)
    return picture


def distributions(replays: Sequence[Replay]) -> Picture:
    """Cumulative distributions of TTFT and E2E by run and stage, measured and predicted; two runs a row."""
    rows = math.ceil(len(replays) / 2)
    picture = Picture(figsize=(15, 2.9 * rows + 0.5), layout="constrained")
    grid = picture.subplots(rows, 4, squeeze=False, sharey=True).reshape(-1, 2)
    for pair in grid[len(replays) :]:
        for axes in pair:
            axes.axis("off")
    for pair, replayed in zip(grid, replays, strict=False):
        run = replayed.run
        both = {"TTFT [ms]": (1000 * run.ttft, 1000 * replayed.ttft), "E2E [s]": (run.e2e, replayed.e2e)}
        for axes, (latency, (measured, predicted)) in zip(pair, both.items(), strict=True):
            ends = []
            for stage, name in enumerate(run.stages):
                inside = replayed.compared & (run.stage == stage)
                if not inside.any():
                    continue
                colour = COLOURS[stage % len(COLOURS)]
                share = (np.arange(inside.sum()) + 1) / inside.sum()
                theirs, ours = np.sort(measured[inside]), np.sort(predicted[inside])
                axes.plot(theirs, share, color=colour, linewidth=3.5, alpha=0.35, solid_capstyle="butt", label=name)
                axes.plot(ours, share, color=colour, linewidth=1.2, linestyle="--")
                ends += [np.quantile(values, q) for values in (theirs, ours) for q in (0.001, 0.99)]
            if ends:
                axes.set_xlim(min(ends) / 1.05, max(ends) * 1.05)
                if max(ends) > 4 * min(ends):
                    axes.set_xscale("log")
                    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(ends) < 300 * min(ends) else (1,)))
                    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
                    axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set(xlabel=latency, ylim=(0, 1))
            axes.grid(alpha=0.3)
        pair[0].set_title(heading(replayed), loc="left", fontsize=10)
        pair[0].set_ylabel("share of requests")
        pair[0].legend(fontsize=8, loc="lower right")
    handles = [
        Line2D([], [], color="#555555", linewidth=3.5, alpha=0.35, label="measured"),
        Line2D([], [], color="#555555", linewidth=1.2, linestyle="--", label="predicted"),
    ]
    picture.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return picture


def concurrency(replays: Sequence[Replay]) -> Picture:
    """ITL of requests against how many were decoding beside them, a panel for each model."""
    groups: dict[str, list[Replay]] = {}
    for replayed in replays:
        groups.setdefault(f"{replayed.run.model.name}, TP {replayed.run.tp}", []).append(replayed)
    columns = min(len(groups), 4)
    rows = math.ceil(len(groups) / columns)
    picture = Picture(figsize=(3.8 * columns + 0.5, 3.9 * rows + 0.5), layout="constrained")
    panels = picture.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(groups) :]:
        axes.axis("off")
    for axes, (name, of_model) in zip(panels, sorted(groups.items()), strict=False):
        for index, replayed in enumerate(sorted(of_model, key=lambda one: one.run.profile)):
            run, ok, colour = replayed.run, replayed.compared, COLOURS[index % len(COLOURS)]
            binned = [
                by_concurrency(run.arrived_at[ok], ttft[ok], e2e[ok], run.output_tokens)
                for ttft, e2e in ((run.ttft, run.e2e), (replayed.ttft, replayed.e2e))
            ]
            theirs, ours = binned
            axes.vlines(theirs.others, theirs.low, theirs.high, color=colour, linewidth=1, alpha=0.6)
            axes.plot(theirs.others, theirs.itl, "o", color=colour, markersize=5, alpha=0.6)
            axes.plot(ours.others, ours.itl, color=colour, linewidth=1.5)
            axes.plot([], [], "o-", color=colour, label=run.profile)
        axes.set(title=name, xlabel="requests decoding beside it", xlim=(0, None))
        axes.legend(fontsize=8, loc="upper left")
        axes.grid(alpha=0.3)
    for axes in panels[::columns]:
        axes.set_ylabel("ITL of a request [ms]")
    handles = [
        Line2D([], [], color="#555555", marker="o", ls="", alpha=0.6, label="measured: median, and from p10 to p90"),
        Line2D([], [], color="#555555", linewidth=1.5, label="predicted: median"),
    ]
    picture.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return picture


def by_concurrency(arrived_at: np.ndarray, ttft: np.ndarray, e2e: np.ndarray, output_tokens: int) -> pd.DataFrame:
    """ITL's median, p10 and p90 where so many others decode; bins of 20 requests and more."""
    others = beside(arrived_at + ttft, arrived_at + e2e)
    itl = latencies(ttft, e2e, output_tokens)["ITL"]
    bins = np.digitize(others, np.linspace(others.min(), np.quantile(others, 0.999), BINS + 1)[1:-1])
    groups = pd.DataFrame({"others": others, "itl": itl}).groupby(bins)
    found = groups.agg(
        others=("others", "mean"),
        itl=("itl", "median"),
        low=("itl", lambda values: values.quantile(0.1)),
        high=("itl", lambda values: values.quantile(0.9)),
    )
    return found[groups.size() >= 20]


def heading(replayed: Replay) -> str:
    """What was run, in a few words."""
    run = replayed.run
    note = f"; overloaded, {int(replayed.compared.sum())} requests" if run.overloaded else ""
    return f"{run.model.name}, TP {run.tp}, {run.profile}{note}"
