"""The shared constants fitted anew: on all runs, and on all but those of a profile or a model."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pandas as pd
from measured import MeasuredRun
from replay import compare, replay
from report import LATENCIES, mean_errors, shares, table

import vecsim as sim

FIELDS = (
    "bandwidth_efficiency",
    "link_latency",
    "step_overhead",
    "layer_overhead",
    "expert_overhead",
    "request_overhead",
    "before_queue",
)
KINDS: dict[str, Callable[[MeasuredRun], str]] = {
    "profile": lambda run: run.profile,
    "model": lambda run: run.model.name,
}
AT_ONCE = 2  # fits: a sweep's own threads wait for one another at its end


def unfitted(run: MeasuredRun) -> sim.Engine:
    """The server that was measured, with the declarations' defaults as step times."""
    return run.engine(sim.Fit(name="unfitted", version="0.15", gpu=run.gpu, step_time={}))


def fields_of(runs: Sequence[MeasuredRun]) -> list[str]:
    """Fields that the runs tell of: without experts or a second GPU some cost nothing."""
    silent = set()
    if not any(run.model.experts for run in runs):
        silent.add("expert_overhead")
    if all(run.tp == 1 for run in runs):
        silent.add("link_latency")
    return [field for field in FIELDS if field not in silent]


def fit(runs: Sequence[MeasuredRun]) -> sim.Calibration | str:
    """The constants that all the runs share, or why they can't be told."""
    pairs = [(unfitted(run), sim.Measured(ttft=run.ttft, e2e=run.e2e, stage=run.stage)) for run in runs]
    try:
        return sim.fit_step_time(pairs, fields=fields_of(runs))
    except ValueError as error:
        return str(error)


def predicted(run: MeasuredRun, found: sim.Calibration) -> sim.Engine:
    """The server that was measured, with constants that were found."""
    engine = unfitted(run)
    values = dict(found.estimates)
    overheads = sim.Overheads(before_queue=values.pop("before_queue"))
    step_time = msgspec.structs.replace(engine.step_time, **values)
    return msgspec.structs.replace(engine, step_time=step_time, overheads=overheads)


def errors(runs: Sequence[MeasuredRun], found: sim.Calibration) -> pd.DataFrame:
    """Errors of the means of whole runs with these constants [%]."""
    return mean_errors(pd.concat([compare(replay(run, engine=predicted(run, found))) for run in runs]))


def constants(found: dict[str, sim.Calibration | str]) -> str:
    """A table of constants with their standard errors, a row for each fit."""
    rows = []
    for name, one in found.items():
        if isinstance(one, str):
            rows.append([f"{name}: {one}", *[""] * len(FIELDS)])
            continue
        values, spread = one.estimates, one.standard_errors
        cells = (f"{values[f]:.3g} ± {spread[f]:.1g}" if f in values else "not fitted" for f in FIELDS)
        rows.append([name, *cells])
    return table(["fitted on", *FIELDS], rows)


def cross_validate(runs: Sequence[MeasuredRun]) -> str:
    """All fits as Markdown, apart for each GPU: overheads are of the host and the card together."""
    return "\n".join(_of_gpu(gpu, [run for run in runs if run.gpu == gpu]) for gpu in sorted({r.gpu for r in runs}))


def _of_gpu(gpu: str, runs: Sequence[MeasuredRun]) -> str:
    begin = time.perf_counter()
    groups = {kind: sorted({of(run) for run in runs}) for kind, of in KINDS.items()}
    parts = {("all", ""): list(runs)}
    for kind, values in groups.items():
        if len(values) > 1:
            parts |= {(kind, value): [run for run in runs if KINDS[kind](run) != value] for value in values}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(parts, pool.map(fit, parts.values()), strict=True))
    everything = found["all", ""]
    lines = [f"# Fitted anew: {len(runs)} runs on {gpu}\n", constants({"all runs": everything})]
    if not isinstance(everything, str):
        lines.append(shares(errors(runs, everything), "run, fitted"))
    for kind, values in groups.items():
        lines.append(f"## A {kind} left out\n")
        if len(values) < 2:
            lines.append(f"All runs have the same {kind}.\n")
            continue
        lines.append(constants({f"all but {value}": found[kind, value] for value in values}))
        held = []
        for value in values:
            one, models = found[kind, value], {run.model.name for run in parts[kind, value]}
            # A profile's runs are held against the fit if it has seen their model: the other table is about models
            outside = [r for r in runs if KINDS[kind](r) == value and (kind == "model" or r.model.name in models)]
            if outside and not isinstance(one, str):
                held.append(errors(outside, one))
        if held:
            lines.append(shares(pd.concat(held)[list(LATENCIES)], "run left out"))
    lines.append(f"{len(parts)} fits in {time.perf_counter() - begin:.0f} s.\n")
    return "\n".join(lines)
