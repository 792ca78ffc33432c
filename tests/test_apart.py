"""The tick model's disaggregated engine: against a literal reading of its rules, and against laws."""

import math
import pickle

import apart_oracle
import numba
import numpy as np
import pytest
import strategies
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim.axes import replace_all
from vecsim.kernel import tick_disaggregated
from vecsim.plot import interactive
from vecsim.variables import DISTRIBUTIONS, SCALARS

INSTANTS = ("enqueued_at", "started_at", "first_token_at", "decode_started_at", "completed_at")

engines = st.builds(
    sim.TickDisaggregatedEngine,
    max_prefill_workers=st.integers(1, 9),
    max_decode_workers=st.integers(1, 12),
    kv_transfer_time=st.sampled_from([0.0, 1.0, 2.75, 40.0]),
    load_generator=strategies.loads,
)


def literal(engine: sim.TickDisaggregatedEngine, time_limit: float) -> apart_oracle.Result:
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
            # Random arrivals don't depend on the engine: an engine alone notices them all.
            alone = sim.Engine(max_batch_size=1, load_generator=load)
            arrivals = alone.run(2 * time_limit + 10).requests.arrived_at.values.tolist()
    n = 70 + int(13 * (time_limit + 10)) + (40 + int(34 * time_limit) if kind == "concurrent" else 0)
    return apart_oracle.simulate(
        load=kind,
        load_value=value,
        arrivals=arrivals,
        prefill_workers=engine.max_prefill_workers,
        decode_workers=engine.max_decode_workers,
        prefill_time=load.prefill_time,
        itl=load.itl,
        total_prefill_chunks=load.total_prefill_chunks,
        lengths=strategies.drawn_lengths(load.output_length, load.seed, max(n, len(arrivals or ()))),
        time_limit=time_limit,
        kv_transfer_time=engine.kv_transfer_time,
    )


@settings(max_examples=120, deadline=None)
@given(engines, strategies.time_limits)
def test_every_event_is_that_of_the_literal_rules(engine, time_limit):
    run = engine.run(time_limit)
    expected = literal(engine, time_limit)
    assert run.requests.sizes["request"] == len(expected.requests)
    names = {name: name for name in (*INSTANTS, "decode_worker")} | {
        "slot": "prefill_worker",
        "output_tokens": "length",
    }
    for ours, theirs in names.items():
        values = [getattr(request, theirs) for request in expected.requests]
        np.testing.assert_array_equal(run.requests[ours].values, values, err_msg=ours)
    np.testing.assert_allclose(run.requests.arrived_at.values, [r.arrived_at for r in expected.requests], rtol=1e-15)

    place = np.searchsorted(run.steps.time.values, expected.instants, "right") - 1
    np.testing.assert_array_equal(run.steps.queue_size.values[place], expected.queue_sizes)
    np.testing.assert_array_equal((run.steps.prefilling + run.steps.decoding).values[place], expected.working)


@settings(max_examples=100, deadline=None)
@given(engines, strategies.time_limits, st.floats(0, 0.99), strategies.quantiles)
def test_every_metric_is_that_of_its_definition(engine, time_limit, share, quantiles):
    warmup = share * time_limit
    ours = engine.run(time_limit, warmup=warmup, quantiles=quantiles).metrics
    expected = apart_oracle.metrics(literal(engine, time_limit), engine.max_batch_size, warmup, quantiles)
    for variable in DISTRIBUTIONS:
        values = ours[variable.name].values
        np.testing.assert_allclose(values[0], expected[variable.name][0], rtol=1e-12)
        np.testing.assert_array_equal(values[1:], expected[variable.name][1:], err_msg=variable.name)
    for variable in SCALARS:
        value, wanted = ours[variable.name].item(), expected[variable.name]
        if variable.whole:
            assert value == wanted, variable.name
        else:
            np.testing.assert_allclose(value, wanted, rtol=1e-10, atol=1e-10, err_msg=variable.name)


advance = tick_disaggregated.advance


@numba.njit
def both_ways(t, step, most, limit):
    one, made = t, 0
    while made < most and one < limit:
        one += step
        made += 1
    return (one, made), advance(t, step, most, limit)


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 3000), st.floats(1, 40), st.integers(0, 3000), st.floats(0, 20_000))
@example(2.0**-30, 1.0, 3000, 3000.0)
@example(1.0, 1 + 2.0**-52, 3000, 1e4)  # a tie at every other power of two
@example(1 + 2.0**-52, 1 + 3 * 2.0**-52, 3000, 1e4)
@example(7.3, 1.1, 3000, 1e4)
def test_passing_over_steps_gives_the_bits_of_making_them(t, step, most, limit):
    literally, at_once = both_ways(t, step, most, limit)
    assert at_once == literally


@settings(max_examples=40, deadline=None)
@given(engines, strategies.time_limits)
def test_both_queues_are_first_come_first_served_and_no_worker_holds_two(engine, time_limit):
    r = engine.run(time_limit).requests
    for name in INSTANTS[:-1]:
        at = r[name].values[r.output_tokens.values > 1] if name == "decode_started_at" else r[name].values
        assert (np.diff(at[~np.isnan(at)]) >= 0).all()
    for worker, begin, end in (
        (r.slot.values, r.started_at.values, r.first_token_at.values),
        (r.decode_worker.values, r.decode_started_at.values, r.completed_at.values),
    ):
        for number in range(worker.max(initial=-1) + 1):
            mine = worker == number
            assert (begin[mine][1:] >= np.nan_to_num(end[mine], nan=np.inf)[:-1]).all()


@settings(max_examples=40, deadline=None)
@given(engines, strategies.time_limits)
def test_requests_are_conserved_and_no_worker_idles_a_tick_while_one_waits(engine, time_limit):
    run = engine.run(time_limit)
    m, s = run.metrics, run.steps
    assert m.arrived == run.requests.sizes["request"]
    assert m.arrived >= m.started >= m.first_tokens >= m.completed
    present = s.queue_size + s.prefilling + s.decoding
    came = run.requests.first_token_at.values[run.requests.output_tokens.values > 1]
    moving = np.sum((came <= s.time.values[-1]) & (came + engine.kv_transfer_time > s.time.values[-1]))
    assert present[-1] + moving == m.arrived - m.completed
    assert m.final_queue == s.queue_size[-1]
    for waiting, busy, workers in (
        (s.queue_size - s.decode_queue_size, s.prefilling, engine.max_prefill_workers),
        (s.decode_queue_size, s.decoding, engine.max_decode_workers),
    ):
        # An idle worker looks once a tick: so it finds whoever has waited as long.
        idle = ((waiting > 0) & (busy < workers)).values
        for first, last in zip(*np.where(np.diff(np.pad(idle, 1).astype(int)) != 0)[0].reshape(-1, 2).T, strict=True):
            if (waiting[first:last] > 0).all() and last < s.sizes["step"]:
                assert s.time.values[last] - s.time.values[first] <= 1.0 + 1e-9 or first == 0


@settings(max_examples=40, deadline=None)
@given(engines, strategies.time_limits)
def test_a_transfer_delays_nothing_but_the_decode(engine, time_limit):
    run, at_once = (
        replace_all(engine, {"kv_transfer_time": time}).run(time_limit).requests
        for time in (engine.kv_transfer_time, 0.0)
    )
    if not isinstance(engine.load_generator, sim.ConcurrentLoadGenerator):
        np.testing.assert_array_equal(run.first_token_at.values, at_once.first_token_at.values)
    begun = run.decode_started_at.values
    assert (begun - run.first_token_at.values >= engine.kv_transfer_time)[~np.isnan(begun)].all()


def test_one_worker_of_each_kind_is_a_tandem_queue():
    length, chunks = 6, 3
    load = sim.PoissonLoadGenerator(
        request_rate=0.15, prefill_time=4.5, itl=1.5, total_prefill_chunks=chunks, output_tokens=length, seed=4
    )
    r = sim.TickDisaggregatedEngine(max_prefill_workers=1, max_decode_workers=1, load_generator=load).run(3000).requests
    done = ~np.isnan(r.completed_at.values)
    start, first, begun, end = (r[name].values[done] for name in INSTANTS[1:])
    np.testing.assert_array_equal(first, start + 4.5)
    np.testing.assert_array_equal(end, begun + 1.5 * (length - 1))
    # Lindley's recursion, but for the tick that an idle worker may take to look
    assert (start[1:] - np.maximum(first[:-1], r.enqueued_at.values[done][1:]) >= 0).all()
    assert (begun[1:] - np.maximum(end[:-1], first[1:]) <= 1.0).all()
    assert (begun[1:] - np.maximum(end[:-1], first[1:]) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(strategies.loads, strategies.time_limits)
def test_one_prefill_worker_and_outputs_of_one_token_are_an_engine_of_one_slot(load, time_limit):
    load = replace_all(load, {"output_tokens": 1})
    ours = sim.TickDisaggregatedEngine(max_prefill_workers=1, max_decode_workers=3, load_generator=load).run(time_limit)
    alone = sim.Engine(max_batch_size=1, load_generator=load).run(time_limit)
    for name in alone.requests:
        np.testing.assert_array_equal(ours.requests[name].values, alone.requests[name].values, err_msg=name)
    for name in ("e2e", "ttft", "queue_time", "final_queue", "max_queue", "tpot"):
        np.testing.assert_array_equal(ours.metrics[name].values, alone.metrics[name].values, err_msg=name)


def test_a_saturated_pool_serves_what_it_can():
    load = sim.BatchLoadGenerator(initial_batch=10_000, prefill_time=2.0, itl=1.0, output_tokens=11)
    for prefill, decode, served in ((2, 40, 2 / 2), (8, 20, 20 / 10)):
        engine = sim.TickDisaggregatedEngine(
            max_prefill_workers=prefill, max_decode_workers=decode, load_generator=load
        )
        assert engine.run(2000).metrics.request_throughput == pytest.approx(1000 * served, rel=0.02)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_wait_for_prefill_is_that_of_a_queue_of_many_servers(workers):
    # Prefills so long, in steps so short, that the tick that a worker may take to look hardly counts
    service, use = 200, 0.7
    load = sim.PoissonLoadGenerator(
        request_rate=use * workers / service, prefill_time=service, total_prefill_chunks=service, output_tokens=1
    )
    engine = sim.TickDisaggregatedEngine(max_prefill_workers=workers, max_decode_workers=1, load_generator=load)
    runs = sim.sweep(engine, 1e6, warmup=2e4, seed=range(40), progress=False)
    waits = runs.queue_time.sel(stat="mean").values
    margin = 3.0 * waits.std(ddof=1) / math.sqrt(waits.size)
    assert abs(waits.mean() - service * md_c(use, workers)) < margin + 2.0


def md_c(use: float, servers: int) -> float:
    """Mean wait in M/D/c, in services, from the states at instants a service apart (Franx, 2001)."""
    size = 400
    rate = use * servers
    k = np.arange(size)
    poisson = np.exp(k * math.log(rate) - rate - np.array([math.lgamma(i + 1) for i in k]))
    # After a service all that were being served have left, and what arrived has come.
    change = np.zeros((size, size))
    for i in range(size):
        left = max(i - servers, 0)
        change[i, left:] = poisson[: size - left]
    change[:, -1] += 1.0 - change.sum(axis=1)
    share = np.full(size, 1.0 / size)
    for _ in range(4000):
        share = share @ change
    return float(np.dot(np.maximum(k - servers, 0), share) / rate)


def test_a_sweep_is_the_runs_of_its_scenarios_on_any_number_of_threads():
    engine = sim.TickDisaggregatedEngine(
        max_prefill_workers=1, max_decode_workers=1, load_generator=sim.PoissonLoadGenerator(output_tokens=8)
    )
    axes = {"max_prefill_workers": [1, 3], "max_decode_workers": [2, 7], "request_rate": [0.2, 0.9], "seed": range(3)}
    one, many = (sim.sweep(engine, 300, warmup=20, keep="requests", progress=False, threads=n, **axes) for n in (1, 3))
    assert one.identical(many)
    at = {"max_prefill_workers": 3, "max_decode_workers": 7, "request_rate": 0.9, "seed": 2}
    load = replace_all(engine.load_generator, {"request_rate": 0.9, "seed": 2})
    run = sim.TickDisaggregatedEngine(max_prefill_workers=3, max_decode_workers=7, load_generator=load).run(
        300, warmup=20
    )
    chosen = one.sel(at)
    for name in run.metrics:
        np.testing.assert_array_equal(chosen[name].values, run.metrics[name].values, err_msg=name)
    kept = chosen.completed_at.values[: run.requests.sizes["request"]]
    np.testing.assert_array_equal(kept, run.requests.completed_at.values)

    queues = sim.sweep(engine, 300, keep="queue", progress=False, **axes).sel(at)
    whole = sim.TickDisaggregatedEngine(max_prefill_workers=3, max_decode_workers=7, load_generator=load).run(300)
    place = np.searchsorted(whole.steps.time.values, queues.time.values, "right") - 1
    np.testing.assert_array_equal(queues.queue_size.values, whole.steps.queue_size.values[place])


def test_queue_growth_tells_which_pool_is_too_small():
    load = sim.RequestRateLoadGenerator(request_rate=0.9, prefill_time=2, output_tokens=11)
    engine = sim.TickDisaggregatedEngine(max_prefill_workers=2, max_decode_workers=10, load_generator=load)
    grown = sim.queue_growth(engine, 200, 5000, max_prefill_workers=[1, 2], max_decode_workers=[8, 10], progress=False)
    assert grown.grows.values.tolist() == [[True, True], [True, False]]


def test_declarations_are_checked_and_come_back():
    load = sim.PoissonLoadGenerator()
    engine = sim.TickDisaggregatedEngine(max_prefill_workers=2, max_decode_workers=3, load_generator=load)
    assert type(engine).from_toml(engine.to_toml()) == engine
    assert pickle.loads(pickle.dumps(engine)) == engine
    for fields, message in (
        ({"max_prefill_workers": 0}, "max_prefill_workers must be >= 1, got 0"),
        ({"max_decode_workers": 2.5}, "max_decode_workers must be .*, got 2.5"),
        ({"load_generator": 3}, "load_generator must be .*, got 3"),
        (
            {"load_generator": sim.PoissonLoadGenerator(prompt_tokens=10, output_tokens=5)},
            "prompt_tokens must be left out where step_time is TickStepTime",
        ),
        (
            {"load_generator": sim.PiecewiseLoadGenerator(request_rates=[1, 2], durations=[5, 5])},
            "PiecewiseLoadGenerator needs a step_time in seconds and prompt_tokens, got TickStepTime",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sim.TickDisaggregatedEngine(
                **({"max_prefill_workers": 2, "max_decode_workers": 3, "load_generator": load} | fields)
            )
    with pytest.raises(ValueError, match=r"unknown axis 'max_decode_worker'.*max_decode_workers"):
        sim.sweep(engine, 10, max_decode_worker=[1, 2])
    with pytest.raises(ValueError, match="time_limit must be given"):
        engine.run(None)
    assert np.isnan(engine.run(0.5).metrics.e2e).all()


def test_a_picture_has_a_row_for_each_worker_and_a_box_for_each_phase():
    load = sim.RequestRateLoadGenerator(request_rate=0.6, prefill_time=3, total_prefill_chunks=2, output_tokens=7)
    run = sim.TickDisaggregatedEngine(max_prefill_workers=2, max_decode_workers=4, load_generator=load).run(50)
    top = run.plot().axes[0]
    assert top.get_ylabel() == "worker"
    assert top.get_ylim() == (5.5, -0.5)
    prefill, decode = top.collections
    assert len(prefill.get_paths()) == run.metrics.started
    assert len(decode.get_paths()) == (run.requests.decode_worker >= 0).sum()
    assert min(path.vertices[:, 1].min() for path in decode.get_paths()) > 1.5 > prefill.get_paths()[0].vertices[0, 1]
    shown = interactive.cells(run)
    phase = np.stack([(shown.phase[:2] > 0).sum(axis=0), (shown.phase[2:] > 0).sum(axis=0)])
    np.testing.assert_array_equal(phase, [run.steps.prefilling, run.steps.decoding])
    assert set(shown.phase[:2].flat) == {0, 1}
    assert set(shown.phase[2:].flat) == {0, 2}
