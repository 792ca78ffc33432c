"""Queueing theory: closed forms lie in the confidence intervals of independent replications.

One slot, prefill of one short step and then L - 1 decode steps is a single server. An idle engine looks for
arrivals once a tick and latencies count from the boundary that notices one, so `started_at - arrived_at` is what
theory calls the wait, up to a tick; service times of hundreds of ticks make that tick small, and the
tolerance says how small.
"""

import numpy as np
import pytest
from scipy import stats

import vecsim as sim

SEEDS = 20
SERVICE = 400  # ticks


def waits(load: sim.LoadGenerator, max_batch_size: int = 1) -> np.ndarray:
    """Mean wait in each of independent runs, from arrival to start."""
    engine = sim.Engine(max_batch_size=max_batch_size, load_generator=load)
    ds = sim.sweep(engine, 4e6, seed=range(SEEDS), keep="requests", progress=False)
    arrived = ds.arrived_at.where(ds.arrived_at > 4e5)
    return (ds.started_at - arrived).mean("request").values


def assert_inside(sample: np.ndarray, expected: float, bias: float) -> None:
    """The truth is in the 99.9 % interval of the replications, widened by the known bias."""
    half = stats.t.ppf(0.9995, sample.size - 1) * sample.std(ddof=1) / np.sqrt(sample.size)
    assert abs(sample.mean() - expected) <= half + bias
    assert half < 0.12 * expected  # or the test would say nothing


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_poisson_arrivals_and_constant_service_wait_as_in_m_d_1(load):
    generator = sim.PoissonLoadGenerator(request_rate=load / SERVICE, prefill_time=0, output_tokens=SERVICE)
    # Pollaczek and Khinchine: W = rho s / (2 (1 - rho))
    assert_inside(waits(generator), load * SERVICE / (2 * (1 - load)), bias=1.0)


def test_poisson_arrivals_and_exponential_service_wait_as_in_m_m_1():
    load = 0.6
    table = np.ceil(stats.expon(scale=SERVICE).ppf((np.arange(4000) + 0.5) / 4000)).astype(int)
    mean, square = table.mean(), (table.astype(float) ** 2).mean()
    generator = sim.PoissonLoadGenerator(
        request_rate=load / mean, prefill_time=0, output_tokens=sim.Empirical(values=table)
    )
    # M/G/1 of the very table; M/M/1's rho s / (1 - rho) is within 2 % of it.
    expected = load * square / (2 * mean * (1 - load))
    assert expected == pytest.approx(load * mean / (1 - load), rel=0.02)
    assert_inside(waits(generator), expected, bias=1.0)


def test_evenly_spaced_arrivals_below_capacity_never_wait():
    generator = sim.RequestRateLoadGenerator(request_rate=1 / 500, prefill_time=0, output_tokens=SERVICE)
    run = sim.Engine(max_batch_size=1, load_generator=generator).run(1e5)
    assert (run.requests.started_at == run.requests.enqueued_at).all()
    # Each is served 400 of every 500 ticks.
    assert float(run.metrics.utilization) == pytest.approx(0.8, abs=0.01)


def test_offered_load_is_utilisation_with_many_slots():
    generator = sim.PoissonLoadGenerator(request_rate=0.05, prefill_time=0, output_tokens=100)
    ds = sim.sweep(
        sim.Engine(max_batch_size=16, load_generator=generator),
        1e5,
        seed=range(SEEDS),
        warmup=1e4,
        progress=False,
    )
    assert_inside(ds.utilization.values, 0.05 * 100 / 16, bias=1e-3)
