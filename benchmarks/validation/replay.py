"""A measured run simulated, and the two compared."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from measured import MeasuredRun

import vecsim as sim

STATISTICS = {
    "TTFT": ("mean", "p50", "p90", "p99"),
    "ITL": ("mean", "p50", "p90"),
    "E2E": ("mean", "p50", "p90", "p99"),
}
WHOLE = "all"


@dataclass(frozen=True, eq=False)
class Replay:
    """What a simulation of a run's requests gives: seconds, NaN where a request was refused."""

    run: MeasuredRun
    started_at: np.ndarray
    ttft: np.ndarray
    e2e: np.ndarray

    @property
    def compared(self) -> np.ndarray:
        """Which requests are compared."""
        return self.run.compared & ~np.isnan(self.e2e)

    def waiting(self, time: float) -> int:
        """How many requests have arrived and aren't started."""
        return int((self.run.arrived_at <= time).sum() - (self.started_at <= time).sum())

    def queues(self) -> pd.DataFrame:
        """How many requests wait in the middle and at the end of each stage, and whether their queue grows.

        By `vecsim.queue_growth`'s criterion: by more than the slots, and than 1 % of the requests between the two.
        """
        rows = []
        for index, name in enumerate(self.run.stages):
            arrived = self.run.arrived_at[self.run.stage == index]
            if not arrived.size:
                continue
            middle, end = self.waiting((arrived[0] + arrived[-1]) / 2), self.waiting(arrived[-1])
            between = (arrived > (arrived[0] + arrived[-1]) / 2).sum()
            grows = end - middle > max(self.run.server["max_batch_size"], 0.01 * between)
            rows.append({"run": self.run.name, "stage": name, "middle": middle, "end": end, "grows": grows})
        return pd.DataFrame(rows)


def replay(run: MeasuredRun, fit: sim.Fit | None = None, engine: sim.Engine | None = None) -> Replay:
    """Simulate a run with a fitted set, or an engine of one's own for its requests."""
    engine = engine or run.engine(fit or sim.Fit.named("vllm-0.15-h100"))
    requests = engine.run().requests
    return Replay(
        run=run,
        started_at=requests.started_at.values,
        ttft=requests.first_token_at.values - run.arrived_at,
        e2e=requests.completed_at.values - run.arrived_at,
    )


def latencies(ttft: np.ndarray, e2e: np.ndarray, output_tokens: int) -> dict[str, np.ndarray]:
    """The three, in milliseconds."""
    itl = (e2e - ttft) / max(output_tokens - 1, 1)
    return {"TTFT": 1000 * ttft, "ITL": 1000 * itl, "E2E": 1000 * e2e}


def statistic(values: np.ndarray, name: str) -> float:
    """The mean, or a quantile as in "p90"."""
    return float(values.mean() if name == "mean" else np.quantile(values, int(name[1:]) / 100))


def compare(replays: Iterable[Replay]) -> pd.DataFrame:
    """Predicted and measured statistics of the whole runs and each stage [ms], and errors [%]."""
    columns = ["run", "stage", "requests", "latency", "statistic", "predicted", "measured", "error"]
    return pd.DataFrame([row for replayed in replays for row in _rows(replayed)], columns=columns)


def _rows(replayed: Replay) -> Iterable[tuple]:
    run = replayed.run
    predicted = latencies(replayed.ttft, replayed.e2e, run.output_tokens)
    measured = latencies(run.ttft, run.e2e, run.output_tokens)
    parts = {WHOLE: replayed.compared}
    if len(run.stages) > 1:
        names = (f"{index + 1}: {name}" for index, name in enumerate(run.stages))
        parts |= {name: replayed.compared & (run.stage == index) for index, name in enumerate(names)}
    for part, inside in parts.items():
        for latency, names in STATISTICS.items():
            for name in names if inside.any() else ():
                ours, theirs = (statistic(values[latency][inside], name) for values in (predicted, measured))
                error = 100 * (ours / theirs - 1) if theirs else np.nan
                yield run.name, part, int(inside.sum()), latency, name, ours, theirs, error


def beside(first_token_at: np.ndarray, completed_at: np.ndarray) -> np.ndarray:
    """How many other requests were decoding beside each, in the mean over its own decoding."""
    times = np.concatenate([first_token_at, completed_at])
    order = np.argsort(times, kind="stable")
    decoding = np.cumsum(np.where(order < first_token_at.size, 1, -1))
    area = np.concatenate([[0.0], np.cumsum(decoding[:-1] * np.diff(times[order]))])
    until = np.empty(times.size)
    until[order] = area
    first, last = until[: first_token_at.size], until[first_token_at.size :]
    return (last - first) / np.maximum(completed_at - first_token_at, 1e-12) - 1
