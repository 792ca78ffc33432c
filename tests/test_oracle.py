"""Event for event against a literal reading of the rules, on random scenarios."""

import numpy as np
import oracle
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim.variables import DISTRIBUTIONS, SCALARS

NAMES = {
    sim.StaticBatcher: "static",
    sim.IFBatcher: "ifb",
    sim.IFBatcherWithOnePrefillOnly: "one_prefill",
}


def literal(engine: sim.Engine, time_limit: float) -> oracle.Result:
    load = engine.load_generator
    kind, value, arrivals = "due", 0.0, None
    match load:
        case sim.BatchLoadGenerator():
            kind, value = "batch", load.initial_batch
        case sim.ConcurrentLoadGenerator():
            kind, value = "concurrent", load.target_concurrency
        case sim.RequestRateLoadGenerator():
            kind, value = "rate", load.request_rate
        case _:
            # Random arrivals don't depend on the engine: a fast one notices them all.
            fast = sim.Engine(max_batch_size=1, load_generator=load)
            arrivals = fast.run(2 * time_limit + 10).requests.arrived_at.values.tolist()
    n = 70 + int(13 * (time_limit + 10)) + (40 + int(34 * time_limit) if kind == "concurrent" else 0)
    if arrivals is not None:
        n = max(n, len(arrivals))
    return oracle.simulate(
        batcher=NAMES.get(type(engine.batcher)) or engine.batcher.rule.py_func,
        parameter=getattr(engine.batcher, "parameter", 0.0),
        load=kind,
        load_value=value,
        arrivals=arrivals,
        max_batch_size=engine.max_batch_size,
        prefill_time=load.prefill_time,
        itl=load.itl,
        total_prefill_chunks=load.total_prefill_chunks,
        lengths=strategies.drawn_lengths(load.output_length, load.seed, n),
        time_limit=time_limit,
    )


@settings(max_examples=250, deadline=None)
@given(strategies.engines, strategies.time_limits)
def test_every_event_is_that_of_the_literal_rules(engine, time_limit):
    run = engine.run(time_limit)
    expected = literal(engine, time_limit)

    assert run.requests.sizes["request"] == len(expected.requests)
    fields = {
        "enqueued_at": [r.enqueued_at for r in expected.requests],
        "started_at": [r.started_at for r in expected.requests],
        "first_token_at": [r.first_token_at for r in expected.requests],
        "completed_at": [r.completed_at for r in expected.requests],
        "output_tokens": [r.length for r in expected.requests],
        "slot": [r.slot for r in expected.requests],
    }
    for name, values in fields.items():
        np.testing.assert_array_equal(run.requests[name].values, values, err_msg=name)
    np.testing.assert_allclose(run.requests.arrived_at.values, [r.arrived_at for r in expected.requests], rtol=1e-15)
    for name, values in [
        ("time", expected.boundaries),
        ("duration", np.diff([*expected.boundaries, expected.end_time])),
        ("queue_size", expected.queue_sizes),
        ("prefilling", expected.prefilling),
        ("decoding", expected.decoding),
    ]:
        np.testing.assert_array_equal(run.steps[name].values, values, err_msg=name)


@settings(max_examples=150, deadline=None)
@given(strategies.engines, strategies.time_limits, st.floats(0, 0.99), strategies.quantiles)
def test_every_metric_is_that_of_its_definition(engine, time_limit, share, quantiles):
    warmup = share * time_limit
    ours = engine.run(time_limit, warmup=warmup, quantiles=quantiles).metrics
    expected = oracle.metrics(literal(engine, time_limit), engine.max_batch_size, warmup, quantiles)
    for variable in DISTRIBUTIONS:
        values = ours[variable.name].values
        # Means and utilisation add in another order; quantiles and maxima are exact.
        np.testing.assert_allclose(values[0], expected[variable.name][0], rtol=1e-12)
        np.testing.assert_array_equal(values[1:], expected[variable.name][1:], err_msg=variable.name)
    for variable in SCALARS:
        value, wanted = ours[variable.name].item(), expected[variable.name]
        if variable.whole:
            assert value == wanted, variable.name
        else:
            np.testing.assert_allclose(value, wanted, rtol=1e-11, atol=1e-12, err_msg=variable.name)
