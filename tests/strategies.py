"""Hypothesis strategies for declarations and for how a sweep is cut."""

import math
from typing import Any

import numpy as np
import policies
from hypothesis import strategies as st

import vecsim as sim

times = st.one_of(
    st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0, 1.1, 2.0, 3.3]),
    st.floats(0, 9, allow_subnormal=False),
)
rates = st.one_of(
    st.sampled_from([0.05, 0.1, 1 / 3, 0.46, 0.5, 1.0, 3.0, 10.0]),
    st.floats(0.01, 12, allow_subnormal=False),
)
seeds = st.integers(0, 2**32 - 1)
quantiles = st.lists(st.floats(0, 1), min_size=1, max_size=6, unique_by=lambda q: f"{100 * q:.10g}").map(sorted)

distributions = st.one_of(
    st.builds(sim.Normal, mean=st.floats(0, 30), std=st.floats(0, 20)),
    st.builds(sim.Constant, value=st.integers(1, 40)),
    st.tuples(st.integers(1, 10), st.integers(0, 30)).map(lambda x: sim.Uniform(low=x[0], high=x[0] + x[1])),
    st.builds(sim.LogNormal, mean=st.floats(0.5, 30), std=st.floats(0, 40)),
    st.builds(sim.Empirical, values=st.lists(st.integers(1, 50), min_size=1, max_size=5)),
)

common: dict[str, Any] = {
    "prefill_time": times,
    "itl": times,
    "total_prefill_chunks": st.integers(1, 9),
    "output_tokens": distributions,
    "seed": seeds,
}
loads = st.one_of(
    st.builds(sim.BatchLoadGenerator, initial_batch=st.integers(1, 60), **common),
    st.builds(sim.ConcurrentLoadGenerator, target_concurrency=st.integers(1, 40), **common),
    st.builds(sim.RequestRateLoadGenerator, request_rate=rates, **common),
    st.builds(sim.PoissonLoadGenerator, request_rate=rates, **common),
    st.builds(
        sim.GammaLoadGenerator,
        request_rate=rates,
        coefficient_of_variation=st.floats(0.2, 4),
        **common,
    ),
)
built_in_batchers = st.sampled_from([sim.StaticBatcher(), sim.IFBatcher(), sim.IFBatcherWithOnePrefillOnly()])
custom_batchers = st.builds(sim.CustomBatcher, rule=st.just(policies.every_field), parameter=st.floats(-1, 20))
batchers = st.one_of(built_in_batchers, custom_batchers)
engines = st.builds(sim.Engine, max_batch_size=st.integers(1, 33), load_generator=loads, batcher=batchers)
time_limits = st.one_of(st.integers(1, 150), st.floats(0.5, 150))


def drawn_lengths(distribution: sim.Distribution, seed: int, n: int) -> list[int]:
    """Output lengths from their definition and NumPy's own legacy stream."""
    stream = np.random.RandomState(seed)
    match distribution:
        case sim.Constant(value=value):
            return [value] * n
        case sim.Normal(mean=mean, std=std):
            return [int(max(x, 1)) for x in stream.normal(mean, std, n)]
        case sim.LogNormal(mean=mean, std=std):
            variance = math.log1p((std / mean) ** 2)
            mu = math.log(mean) - variance / 2
            return [int(max(math.exp(mu + math.sqrt(variance) * z), 1)) for z in stream.normal(size=n)]
        case sim.Uniform(low=low, high=high):
            return [low + math.floor(u * (high - low + 1)) for u in stream.random_sample(n)]
        case sim.Empirical(values=values):
            return [values[int(u * len(values))] for u in stream.random_sample(n)]
    raise AssertionError(distribution)
