"""The sweeps that are measured, and how: shared by the asv suite and `figures.py`."""

import os
import subprocess
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np
import xarray as xr

import vecsim as sim
from suite import literal

TINY = bool(os.environ.get("VECSIM_BENCHMARKS_TINY"))

SHORT = {"target_output_len_tokens": 10, "target_output_len_std": 5}
LONG = {"target_output_len_tokens": 200, "target_output_len_std": 100}
ONE, IFB = sim.IFBatcherWithOnePrefillOnly(), sim.IFBatcher()


# Each built-in batcher, and a user's own of the same rule
TWINS = [(batcher, numba.njit(batcher.admit)) for batcher in (sim.StaticBatcher(), IFB, ONE)]

FIRST = """
import vecsim as sim
engine = sim.Engine(load_generator=sim.RequestRateLoadGenerator(target_output_len_tokens=10))
sim.sweep(engine, 1000, progress=False, request_rate=[0.1, 0.2], seed=range(2))
"""


class Case(NamedTuple):
    """A sweep."""

    title: str
    floor: float  # completed requests a second
    slots: int
    batcher: sim.Batcher
    load: dict[str, Any]
    axes: dict[str, Any]
    ticks: int

    @property
    def engine(self) -> sim.Engine:
        load = sim.RequestRateLoadGenerator(**self.load)
        return sim.Engine(max_batch_size=self.slots, batcher=self.batcher, load_generator=load)

    def completed(self, threads: int | None = None, **changes: Any) -> int:
        """Run it; returns how many requests were completed."""
        axes = {**self.axes, **changes}
        return int(sim.sweep(self.engine, self.ticks, progress=False, threads=threads, **axes).completed.sum())

    def literal(self, most: int = 200) -> list[tuple[Any, ...]]:
        """Some of the scenarios, as the literal loop takes them."""
        most = max(2, min(most, 400_000 // (self.slots * 20)))
        rates = np.asarray(self.axes["request_rate"])
        load = self.engine.load_generator
        stream = np.random.RandomState(0).normal(load.output_length.mean, load.output_length.std, 10**6)
        lengths = np.maximum(stream, 1).astype(np.int64)
        one = self.batcher == ONE
        scenarios = []
        for i in range(most):
            rate = rates[i * rates.size // most]
            due = (np.arange(int(self.ticks * rate)) + 1) / rate
            fields = (one, self.slots, load.prefill_time, load.itl, load.total_prefill_chunks, due, lengths)
            scenarios.append((*fields, float(self.ticks)))
        return scenarios


def grid(rates: tuple[float, float], number: int, seeds: int) -> dict[str, Any]:
    """Rates x seeds."""
    if TINY:
        number, seeds = 2, 2
    return {"request_rate": np.linspace(*rates, number), "seed": range(seeds)}


def own_seeds(rates: tuple[float, float], count: int) -> dict[str, Any]:
    """Every scenario has a seed of its own."""
    count = 4 if TINY else count
    return {
        "request_rate": xr.DataArray(np.linspace(*rates, count), dims="scenario"),
        "seed": xr.DataArray(np.arange(count), dims="scenario"),
    }


CHUNKED = {"total_prefill_chunks": 2, **SHORT}
THROUGHPUT = {
    "4 slots": Case(
        "4 slots, one prefill, rates 0.45-0.47 x 32 seeds, 10,000 ticks",
        5e7, 4, ONE, CHUNKED, grid((0.45, 0.47), 125, 32), 10_000,
    ),
    "64 slots": Case(
        "64 slots, in-flight, rates 4.9-5.1 x 16 seeds, 2,000 ticks",
        5e7, 64, IFB, {"prefill_time": 0.2, **CHUNKED}, grid((4.9, 5.1), 125, 16), 2_000,
    ),
    "256 slots": Case(
        "256 slots, outputs 200 +- 100, rates 1.19-1.21 x 8 seeds, 10,000 ticks",
        3e7, 256, IFB, {"prefill_time": 0.2, **LONG}, grid((1.19, 1.21), 50, 8), 10_000,
    ),
    "own seeds": Case(
        "4 slots, one prefill, a seed each, 10,000 ticks",
        2e7, 4, ONE, CHUNKED, own_seeds((0.45, 0.47), 4_000), 10_000,
    ),
}  # fmt: skip


def flat(slots: int) -> Case:
    """A sweep whose cost a step shouldn't depend on the slots."""
    ticks, seeds = (1_000, 2) if TINY else (100_000, 20)
    load = {"prefill_time": 0.2, **CHUNKED}
    return Case("", 0.0, slots, IFB, load, {"request_rate": [0.46], "seed": range(seeds)}, ticks)


def steps(case: Case) -> int:
    """Steps of a `flat` sweep, whose steps all take one tick."""
    return case.ticks * len(case.axes["seed"])


def child(code: str, **environment: str) -> tuple[float, str]:
    """Run code in a fresh process, with compiled bytecode as users have it.

    Returns the seconds from its start to its end, and what it printed.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**inherited, **environment}
    )
    return time.perf_counter() - begin, done.stdout


def first(code: str) -> float:
    """The seconds of a fresh process that runs code; TINY runs it in this one, which has all imports done."""
    return seconds(partial(exec, code, {})) if TINY else child(code)[0]


def seconds(function, repeat: int = 1) -> float:
    """The shortest of several times."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def rates(case: Case, threads: int, repeat: int) -> tuple[float, float]:
    """Completed requests a second of ours and of the literal loop, best of several taken alternately."""
    some = case.literal(2 if TINY else 200)
    completed, theirs = case.completed(threads), literal.run_all(some, threads)
    ours_best = theirs_best = np.inf
    for _ in range(repeat):
        ours_best = min(ours_best, seconds(lambda: case.completed(threads)))
        theirs_best = min(theirs_best, seconds(lambda: literal.run_all(some, threads)))
    return completed / ours_best, theirs / theirs_best


def own_rule_speed(slots: str, twin: int, repeat: int) -> float:
    """Speed of a user's own batcher over that of the built-in one of the same rule, on one thread.

    The median over repetitions taken alternately, for the machine's speed varies from one second to the next.
    """
    case = THROUGHPUT[slots]
    axes = grid(tuple(np.quantile(case.axes["request_rate"], [0, 1])), 60, 8)

    def both() -> float:
        built_in, own = (seconds(partial(case.completed, 1, batcher=batcher, **axes)) for batcher in TWINS[twin])
        return built_in / own

    both()  # compiles
    return float(np.median([both() for _ in range(repeat)]))
