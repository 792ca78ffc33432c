"""What is kept of a run whose workers come and go: their phases, and what became of the requests hit."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vecsim.kernel.state import Array, Life
from vecsim.variables import Variable

if TYPE_CHECKING:
    import xarray as xr

# Phases of a worker, reasons to go to another one, and why requests fail, in the order of `vecsim.kernel.life`
PHASES = ("off", "dead", "starting", "ready", "draining")
REASONS = ("initial", "added", "started", "removed", "drained", "crash", "outage", "outage over")
FAILURES = ("", "no worker", "crash")

LIFE_VARIABLES = (
    Variable("migrations", "migrations", "migrations", "times that it moved from a crashed worker", whole=True),
    Variable("retries", "retries", "retries", "times that it could not be sent to its worker", whole=True),
    Variable("failed_at", "failure", "s", "when the request failed"),
    Variable(
        "failure", "reason of the failure", "", "no worker: none was known that could take it; crash: of its worker"
    ),
)


class Lives(NamedTuple):
    """What the kernel noted of each request [request], and of each change of a worker [event]."""

    migrations: Array
    retries: Array
    failed_at: Array
    failure: Array  # text
    time: Array
    worker: Array
    phase: Array  # place in `PHASES`
    reason: Array  # place in `REASONS`
    left_out: int  # events that there was no room for


def lives_of(life: Life, came: Array) -> Lives:
    """What is kept of a scenario; `came` is which requests came [request]."""
    from vecsim.kernel import life as rows

    requests = np.flatnonzero(came)
    logged = int(life.numbers[rows.LOGGED])
    log = life.log[:, : min(logged, life.log.shape[1])]
    return Lives(
        migrations=life.fate[rows.MIGRATIONS, requests],
        retries=life.fate[rows.RETRIES, requests],
        failed_at=life.rings[rows.FAILED_AT, requests],
        failure=np.array(FAILURES)[life.fate[rows.REASON, requests]],
        time=log[0].copy(),
        worker=log[1].astype(np.int64),
        phase=log[2].astype(np.int64),
        reason=log[3].astype(np.int64),
        left_out=logged - log.shape[1],
    )


def events_dataset(lives: Lives, attrs: dict[str, object]) -> "xr.Dataset":
    """Each change of a worker [event]."""
    import xarray as xr

    return xr.Dataset(
        {
            "time": ("event", lives.time, {"long_name": "when", "units": "s"}),
            "worker": ("event", lives.worker, {"long_name": "number of the worker"}),
            "phase": ("event", np.array(PHASES)[lives.phase], {"long_name": "phase from then on"}),
            "reason": ("event", np.array(REASONS)[lives.reason], {"long_name": "why"}),
        },
        attrs=attrs | {"events_left_out": lives.left_out},
    )


def counts_dataset(lives: Lives, places: list[int], end: float, instants: int) -> "xr.Dataset":
    """Workers of each pool in each phase over time [pool, phase, time]."""
    import xarray as xr

    time = np.linspace(0.0, end, instants)
    pool_of = np.repeat(np.arange(len(places)), places)
    counts = np.zeros((len(places), len(PHASES), instants), np.int64)
    counts[:, 0] = np.array(places)[:, np.newaxis]
    phases = np.zeros(sum(places), np.int64)
    for at, worker, phase in zip(lives.time, lives.worker, lives.phase, strict=True):
        later = int(np.searchsorted(time, at, "left"))
        counts[pool_of[worker], phases[worker], later:] -= 1
        counts[pool_of[worker], phase, later:] += 1
        phases[worker] = phase
    return xr.Dataset(
        {"workers": (("pool", "phase", "time"), counts, {"long_name": "workers", "units": "workers"})},
        {"pool": np.arange(len(places)), "phase": list(PHASES), "time": ("time", time, {"units": "s"})},
    )
