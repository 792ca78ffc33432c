"""The comparison as Markdown."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from replay import STATISTICS, WHOLE, Replay

LATENCIES = tuple(STATISTICS)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def mean_errors(compared: pd.DataFrame) -> pd.DataFrame:
    """Errors of the means over whole runs [%], a row for each run."""
    means = compared[(compared.stage == WHOLE) & (compared.statistic == "mean")]
    return means.pivot_table(index="run", columns="latency", values="error", sort=False)[list(LATENCIES)]


def shares(errors: pd.DataFrame, of: str = "run") -> str:
    """Errors by run [%], and the medians of their absolute values."""
    rows = [[name, *(f"{error:+.1f}" for error in row)] for name, row in errors.iterrows()]
    if len(errors) > 1:
        rows.append(["**median of absolute values**", *(f"**{value:.1f}**" for value in errors.abs().median())])
        rows.append(["largest absolute value", *(f"{value:.1f}" for value in errors.abs().max())])
    return table([of, *(f"{latency} mean, error %" for latency in errors.columns)], rows)


def details(compared: pd.DataFrame) -> str:
    """A table for each latency: predicted / measured (error) by run and stage."""
    parts = []
    for latency, names in STATISTICS.items():
        of_latency = compared[compared.latency == latency]
        rows = []
        for (run, stage), values in of_latency.groupby(["run", "stage"], sort=False):
            by_name = values.set_index("statistic")
            cells = (by_name.loc[name, ["predicted", "measured", "error"]] for name in names)
            rows.append([run, stage, *(f"{shown(ours)} / {shown(theirs)} ({e:+.1f})" for ours, theirs, e in cells)])
        parts.append(
            f"### {latency} [ms]: predicted / measured (error in %)\n\n" + table(["run", "stage", *names], rows)
        )
    return "\n".join(parts)


def shown(value: float) -> str:
    """Four significant digits at most, and no more than two behind the point."""
    return f"{value:,.{int(np.clip(3 - np.floor(np.log10(max(value, 1e-9))), 0, 2))}f}"


def queues(replays: Sequence[Replay]) -> str:
    """How the predicted queues of overloaded runs grow, and how many requests were compared."""
    rows = []
    for replayed in replays:
        run = replayed.run
        failed = int(np.isnan(run.e2e).sum())
        until = f"over before {run.first_failure:,.0f} s" if np.isfinite(run.first_failure) else "that succeeded"
        compared = f"{int(replayed.compared.sum()):,} {until}"
        rows += [
            [
                run.name,
                q.stage,
                f"{failed:,} of {run.e2e.size:,}",
                f"{q.middle:,}",
                f"{q.end:,}",
                yes(q.grows),
                compared,
            ]
            for q in replayed.queues().itertuples()
        ]
    header = ["run", "stage", "failed", "waiting in the middle, predicted", "at the end", "grows", "requests compared"]
    return table(header, rows)


def yes(value: bool) -> str:
    return "yes" if value else "no"


def report(replays: Sequence[Replay], compared: pd.DataFrame, refused: dict[str, str]) -> str:
    """Everything: errors, overloaded runs, what couldn't be read."""
    overloaded = [replayed for replayed in replays if replayed.run.overloaded]
    apart = compared.run.isin([replayed.run.name for replayed in overloaded])
    parts = ["# Measured servers and simulated ones\n"]
    if not apart.all():
        parts += ["## Means over whole runs\n", shares(mean_errors(compared[~apart]))]
    for replayed in replays:
        run, lost = replayed.run, int((replayed.run.compared & np.isnan(replayed.e2e)).sum())
        if lost:
            parts.append(f"{run.name}: {lost:,} requests are longer than the simulated server takes; left out.\n")
        if not run.overloaded and replayed.queues().grows.any():
            parts.append(f"{run.name}: the predicted queue grows, and the measured server wasn't overloaded.\n")
    if overloaded:
        parts += [
            "## Overloaded runs\n",
            "A server drops requests that a client gives up on, the simulated one serves them: compared are those that "
            "were over before the first one failed.\n",
            queues(overloaded),
        ]
        if apart.any():
            parts.append(shares(mean_errors(compared[apart])))
    if not compared.empty:
        parts += ["## By stage\n", details(compared)]
    if refused:
        parts.append("## Not read\n")
        parts.append(table(["file", "reason"], list(refused.items())))
    return "\n".join(parts)
