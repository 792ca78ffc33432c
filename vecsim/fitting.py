"""Find the coefficients of a step time from measurements: logs of steps, or what a server's clients saw."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vecsim.axes import replace_all
from vecsim.declaration import Declaration, checks, shown, suggestion
from vecsim.engine import Engine
from vecsim.kernel.state import Array
from vecsim.load import TraceLoadGenerator
from vecsim.step_time import LinearStepTime

# Around what a coefficient lies: what a change is measured by where it begins at 0 [s, but for efficiencies]
USUAL = {
    "base": 5e-3,
    "per_request": 3e-5,
    "per_prefill_token": 2e-5,
    "per_decode_request": 3e-5,
    "per_context_token": 1e-7,
    "per_prefill_attention": 1e-9,
    "per_prefill_step": 1e-3,
    "step_overhead": 1e-3,
    "layer_overhead": 1e-5,
    "expert_overhead": 2e-5,
    "request_overhead": 1e-5,
    "link_latency": 1e-5,
    "before_queue": 5e-3,
    "per_output_token": 1e-5,
    "per_step": 1e-3,
    "at_completion": 1e-3,
}

# Relative errors that count alike, of each statistic of a stage
TTFT_WEIGHTS: dict[str | float, float] = {"mean": 0.04, 0.5: 0.04, 0.9: 0.10}
ITL_WEIGHTS: dict[str | float, float] = {"mean": 0.01, 0.1: 0.02, 0.5: 0.01, 0.9: 0.02}
E2E_WEIGHTS: dict[str | float, float] = {"mean": 0.01}

# Of a coefficient's usual size, for derivatives. First far apart: near by, they are lost among what chance makes of
# single requests. Then nearer, where many requests tell.
STEPS = (0.1, 0.03)
ROUNDS = (8, 8)
LEAST_EFFICIENCY = 0.05
LEAST_EFFECT = 0.3  # of a coefficient's usual size, in relative errors that count alike
DEPENDENT = 0.01  # the part of a coefficient's effect that no other one has
STAGES = 4


class Measured:
    """What the clients of a server measured, request by request in the order of an engine's load.

    Parameters
    ----------
    ttft, e2e : array
        [request] seconds; NaN where a request failed.
    stage : array, optional
        [request] whole numbers from 0: requests whose statistics are compared together, such as those of one rate.
        Unless given, four equal parts in the order of arrival.

    Raises
    ------
    ValueError
        When an array is wrong: names it and the place.
    """

    def __init__(self, *, ttft: Any, e2e: Any, stage: Any = None) -> None:
        self.ttft, self.e2e = (np.asarray(values, np.float64) for values in (ttft, e2e))
        size = self.ttft.size
        if self.ttft.shape != (size,) or self.e2e.shape != (size,):
            raise ValueError(f"ttft and e2e must be of as many requests, got {self.ttft.shape} and {self.e2e.shape}")
        self.ok = np.isfinite(self.ttft) & np.isfinite(self.e2e)
        wrong = self.ok & ~((self.ttft > 0) & (self.e2e >= self.ttft))
        if wrong.any():
            at = int(wrong.argmax())
            raise ValueError(
                f"ttft must be > 0 and at most e2e, got {self.ttft[at]:g} and {self.e2e[at]:g} of request {at}"
            )
        if not self.ok.any():
            raise ValueError("ttft and e2e must be of one request or more that didn't fail, got none")
        self.stage = np.arange(size) * STAGES // size if stage is None else np.asarray(stage)
        if self.stage.shape != (size,) or self.stage.dtype.kind not in "iu" or self.stage.min(initial=0) < 0:
            raise ValueError("stage must be a whole number >= 0 for each request")

    def statistics(self, ttft: Array, e2e: Array, output_tokens: Array) -> tuple[Array, Array]:
        """(values, the relative errors in them that count alike) of what was measured, or of what is predicted."""
        values: list[float] = []
        weights: list[float] = []
        several = output_tokens > 1
        itl = np.where(several, (e2e - ttft) / np.maximum(output_tokens - 1, 1), np.nan)
        for stage in np.unique(self.stage[self.ok]):
            there = self.ok & (self.stage == stage)
            for latency, which, those in (
                (ttft, TTFT_WEIGHTS, there),
                (itl, ITL_WEIGHTS, there & several),
                (e2e, E2E_WEIGHTS, there),
            ):
                if those.any():
                    for statistic, weight in which.items():
                        sample = latency[those]
                        values.append(
                            float(sample.mean() if isinstance(statistic, str) else np.quantile(sample, statistic))
                        )
                        weights.append(weight)
        return np.array(values), np.array(weights)


class Calibration(NamedTuple):
    """What `fit_step_time` found."""

    estimates: dict[str, float]  # by field
    standard_errors: dict[str, float]
    engines: tuple[Engine, ...]  # with these values; none for a log of steps
    errors: tuple[dict[str, float], ...]  # of each engine: (predicted - measured) / measured of mean TTFT, ITL, E2E
    step_time: Any  # of the first engine

    def __str__(self) -> str:
        width = max(map(len, self.estimates))
        lines = [f"{'':{width}}  estimate    standard error"]
        for name, value in self.estimates.items():
            lines.append(f"{name:{width}}  {value:<10.4g}  {self.standard_errors[name]:.2g}")
        for error in self.errors:
            lines.append(", ".join(f"mean {name} {100 * value:+.1f} %" for name, value in error.items()))
        return "\n".join(lines)


def fit_step_time(
    measured: "Mapping[str, Any] | Sequence[tuple[Engine, Measured]]", fields: Sequence[str] | None = None
) -> Calibration:
    """Find the coefficients of a step time.

    Parameters
    ----------
    measured : sequence of (Engine, Measured), or mapping of arrays
        Servers as they are, each with the load that it had, and what its clients measured: the engines are simulated
        again and again until TTFT, ITL and E2E come near (least squares of relative errors in means and quantiles,
        stage by stage; trust region reflective, `scipy.optimize.least_squares`). What is fitted is the same in all of
        them, and begins where the first one has it.

        Or a log of steps: `duration` [s] and what each step did, as the fields of `vecsim.kernel.state.StepBatch`
        [step]: least squares of relative errors.
    fields : sequence of str, optional
        What to fit: fields of the engines' step time, and of `Overheads`. Unless given, of a linear step time `base`,
        `per_request`, `per_context_token`, `per_prefill_token` and `before_queue`, of a roofline
        `bandwidth_efficiency`, `step_overhead`, `request_overhead` and `before_queue`. From a log of steps: `base`,
        `per_decode_request`, `per_context_token`, `per_prefill_token`, `per_prefill_attention`, `per_prefill_step`, as
        far as the log has what they go with.

    Returns
    -------
    Calibration

    Raises
    ------
    ValueError
        When there is too little to tell a field: names it; or an argument is wrong.

    Notes
    -----
    Standard errors are those of least squares, with the relative errors that count alike taken for the measurements'
    own if the fit is closer than they are.
    """
    if fields is not None and not 0 < len(fields) == len(set(fields)):
        raise ValueError(f"fields must be one or more that differ, got {', '.join(fields) or 'none'}")
    if isinstance(measured, Mapping):
        return _fit_steps(measured, fields)
    return _fit_servers(list(measured), fields)


class _Server:
    """An engine, its measurements, and how to simulate it with other values."""

    def __init__(self, engine: Engine, measured: Measured, paths: list[str]) -> None:
        self.engine, self.measured, self.paths = engine, measured, paths
        load: Any = engine.load_generator
        if not isinstance(load, TraceLoadGenerator):
            raise ValueError(f"engine must have a trace for its load, got {type(load).__name__}")
        arrived_at: Any = load.arrived_at
        output_tokens: Any = load.output_tokens
        if len(arrived_at) != measured.ttft.size:
            raise ValueError(f"measured must be of the load's {len(arrived_at)} requests, got {measured.ttft.size}")
        self.arrived_at = arrived_at.array / load.rate_scale
        self.output_tokens = output_tokens.array
        self.values, self.weights = measured.statistics(measured.ttft, measured.e2e, self.output_tokens)

    def predict(self, points: Array) -> list[tuple[Array, Array]]:
        """(TTFT, E2E) of each request for each point [point, field]."""
        import xarray as xr

        from vecsim.sweep import sweep

        axes: dict[str, Any] = {path: xr.DataArray(points[:, i], dims="point") for i, path in enumerate(self.paths)}
        ds = sweep(self.engine, keep="requests", progress=False, **axes)
        if ds.sizes["request"] < self.arrived_at.size or bool(ds.refused.any()):
            raise ValueError("every request must fit the engine: some are refused (max_model_len, or KV memory)")
        first, last = ds.first_token_at.values, ds.completed_at.values
        return [(first[i] - self.arrived_at, last[i] - self.arrived_at) for i in range(len(points))]

    def residuals(self, points: Array) -> Array:
        """[point, statistic]"""
        rows = []
        for ttft, e2e in self.predict(points):
            values, _ = self.measured.statistics(ttft, e2e, self.output_tokens)
            rows.append(np.log(values / self.values) / self.weights)
        return np.array(rows)

    def errors(self, point: Array) -> dict[str, float]:
        """Relative errors of the means."""
        ((ttft, e2e),) = self.predict(point[np.newaxis])
        ok, measured = self.measured.ok, self.measured
        several = ok & (self.output_tokens > 1)

        def itl(ttft: Array, e2e: Array) -> Array:
            return (e2e[several] - ttft[several]) / (self.output_tokens[several] - 1)

        pairs = {
            "TTFT": (ttft[ok], measured.ttft[ok]),
            "ITL": (itl(ttft, e2e), itl(measured.ttft, measured.e2e)),
            "E2E": (e2e[ok], measured.e2e[ok]),
        }
        return {name: float(ours.mean() / theirs.mean() - 1) for name, (ours, theirs) in pairs.items() if ours.size}


def _fit_servers(pairs: list[tuple[Engine, Measured]], fields: Sequence[str] | None) -> Calibration:
    from scipy.optimize import least_squares

    if not pairs:
        raise ValueError("measured must be one (engine, measured) or more, got none")
    for pair in pairs:
        if not (isinstance(pair, tuple) and isinstance(pair[0], Engine) and isinstance(pair[1], Measured)):
            raise ValueError(f"measured must be pairs (Engine, Measured), got {shown(pair)}")
    names = list(fields) if fields is not None else _usual_fields(pairs[0][0])
    paths = [_path(name, pairs[0][0]) for name in names]
    servers = [_Server(engine, measured, paths) for engine, measured in pairs]
    begin = np.array([_value(pairs[0][0], path) for path in paths])
    scale = np.array([max(value, USUAL.get(name, value)) for name, value in zip(names, begin, strict=True)])
    efficient = np.array([name.endswith("_efficiency") for name in names])
    low, high = np.where(efficient, LEAST_EFFICIENCY, 0.0) / scale, np.where(efficient, 1.0, np.inf) / scale
    known: dict[bytes, tuple[Array, Array]] = {}

    def look(x: Array, step: float) -> tuple[Array, Array]:
        """(residuals, derivatives) at a point: all of one sweep a server."""
        key = x.tobytes() + np.float64(step).tobytes()
        if key not in known:
            above, below = np.minimum(x + step, high), np.maximum(x - step, low)
            points = np.concatenate([x[np.newaxis], x + np.diag(above - x), x + np.diag(below - x)]) * scale
            rows = np.concatenate([server.residuals(points) for server in servers], axis=1)
            up, down = rows[1:].reshape(2, x.size, -1)
            known[key] = rows[0], ((up - down) / (above - below)[:, np.newaxis]).T
        return known[key]

    best = np.clip(np.where(begin > 0, begin, 0.5 * scale) / scale, low, high)
    for step, rounds in zip(STEPS, ROUNDS, strict=True):
        residuals, slopes = look(best, step)
        _check_determined(slopes, names, residuals.size, LEAST_EFFECT)
        found = least_squares(
            lambda x, step=step: look(x, step)[0], best, jac=lambda x, step=step: look(x, step)[1],
            bounds=(low, high), x_scale="jac", max_nfev=rounds, ftol=1e-3, xtol=1e-3,
        )  # fmt: skip
        if 2.0 * found.cost < float(residuals @ residuals):
            best = found.x
    residuals, slopes = look(best, STEPS[0])
    _check_determined(slopes, names, residuals.size, LEAST_EFFECT)
    point = best * scale
    spread = _standard_errors(residuals, slopes) * scale
    engines = tuple(replace_all(engine, dict(zip(paths, point.tolist(), strict=True))) for engine, _ in pairs)
    return Calibration(
        dict(zip(names, point.tolist(), strict=True)),
        dict(zip(names, spread.tolist(), strict=True)),
        engines,
        tuple(server.errors(point) for server in servers),
        engines[0].step_time,
    )


def _usual_fields(engine: Engine) -> list[str]:
    if isinstance(engine.step_time, LinearStepTime):
        return ["base", "per_request", "per_context_token", "per_prefill_token", "before_queue"]
    return ["bandwidth_efficiency", "step_overhead", "request_overhead", "before_queue"]


def _path(name: str, engine: Engine) -> str:
    """The path of a field of the step time, or of the overheads."""
    parts: dict[str, Declaration] = {"step_time": engine.step_time, "overheads": engine.overheads}
    known = {
        field: f"{component}.{field}"
        for component, part in parts.items()
        for field, kinds, _ in checks(type(part))
        if float in kinds
    }
    if name not in known:
        raise ValueError(f"fields must be of {', '.join(known)}, got {name!r}{suggestion(name, known)}")
    return known[name]


def _value(engine: Engine, path: str) -> float:
    component, _, name = path.partition(".")
    return float(getattr(getattr(engine, component), name))


def _check_determined(slopes: Array, names: Sequence[str], residuals: int, least: float) -> None:
    """Refuse what the measurements don't tell: slopes [statistic, field] of less than `least`, or all but dependent."""
    if residuals < len(names):
        raise ValueError(f"too few data for {len(names)} fields: {residuals} statistics; leave out {names[-1]}")
    effects = np.linalg.norm(slopes, axis=0)
    if (effects < least).any():
        raise ValueError(
            f"too few data: {names[int(effects.argmin())]} is undetermined, for it hardly changes what was measured; "
            f"leave it out of fields"
        )
    _, sizes, directions = np.linalg.svd(slopes / effects, full_matrices=False)
    if sizes[-1] < DEPENDENT:
        blurred = [names[i] for i in np.argsort(-np.abs(directions[-1]))[:2]]
        raise ValueError(
            f"too few data: {blurred[0]} is undetermined, for {blurred[-1]} does the same to what was measured; leave "
            f"one out of fields, or measure at other loads"
        )


def _standard_errors(residuals: Array, slopes: Array) -> Array:
    freedom = max(residuals.size - slopes.shape[1], 1)
    variance = max(float(residuals @ residuals) / freedom, 1.0)
    return np.sqrt(variance * np.diag(np.linalg.inv(slopes.T @ slopes)))


# What a coefficient of `LinearStepTime` is multiplied with, from the columns of a log
FEATURES = {
    "base": ((), lambda log: np.ones_like(log["duration"])),
    "per_request": (
        ("prefill_requests", "decode_requests"),
        lambda log: log["prefill_requests"] + log["decode_requests"],
    ),
    "per_prefill_token": (("prefill_tokens",), lambda log: log["prefill_tokens"]),
    "per_decode_request": (("decode_requests",), lambda log: log["decode_requests"]),
    "per_context_token": (("decode_context",), lambda log: log["decode_context"]),
    "per_prefill_attention": (("prefill_attention",), lambda log: log["prefill_attention"]),
    "per_prefill_step": (("prefill_tokens",), lambda log: (log["prefill_tokens"] > 0).astype(np.float64)),
}


def _fit_steps(log: Mapping[str, Any], fields: Sequence[str] | None) -> Calibration:
    from scipy.optimize import lsq_linear

    columns = {}
    for name in {"duration", *(column for needs, _ in FEATURES.values() for column in needs)}:
        if name in log:
            columns[name] = np.asarray(log[name], np.float64)
    if "duration" not in columns:
        raise ValueError(f"a log of steps must have a duration, got {', '.join(map(str, log))}")
    duration = columns["duration"]
    for name, values in columns.items():
        wrong = ~(values > 0 if name == "duration" else values >= 0) | ~np.isfinite(values)
        if values.shape != duration.shape:
            raise ValueError(f"{name} must be of as many steps as duration, {duration.size}, got {values.size}")
        if wrong.any():
            at = int(wrong.argmax())
            allowed = "> 0" if name == "duration" else ">= 0"
            raise ValueError(f"{name} must be a number {allowed}, got {values[at]:g} of step {at}")
    if fields is None:
        names = [
            name for name, (needs, _) in FEATURES.items() if name != "per_request" and all(n in columns for n in needs)
        ]
    else:
        names = list(fields)
        for name in names:
            if name not in FEATURES:
                raise ValueError(f"fields must be of {', '.join(FEATURES)}, got {name!r}{suggestion(name, FEATURES)}")
            if missing := [column for column in FEATURES[name][0] if column not in columns]:
                raise ValueError(f"{name} needs the column {' and '.join(missing)} in a log of steps")
    scale = np.array([USUAL[name] for name in names])
    work = np.stack([FEATURES[name][1](columns) for name in names], axis=1) * scale / duration[:, np.newaxis]
    _check_determined(work, names, duration.size, 1e-9)
    found = lsq_linear(work, np.ones(duration.size), bounds=(0.0, np.inf))
    residuals = work @ found.x - 1.0
    freedom = max(duration.size - len(names), 1)
    spread = np.sqrt(float(residuals @ residuals) / freedom * np.diag(np.linalg.inv(work.T @ work))) * scale
    estimates = dict(zip(names, (found.x * scale).tolist(), strict=True))
    return Calibration(estimates, dict(zip(names, spread.tolist(), strict=True)), (), (), LinearStepTime(**estimates))
