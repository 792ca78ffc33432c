"""Laws that hold in every run, whatever the declaration."""

import numpy as np
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim


@settings(max_examples=200, deadline=None)
@given(strategies.engines, strategies.time_limits)
def test_requests_are_conserved_and_every_request_moves_forward(engine, time_limit):
    run = engine.run(time_limit)
    m, r = run.metrics, run.requests
    assert m.arrived == r.sizes["request"]
    assert m.arrived >= m.started >= m.first_tokens >= m.completed
    assert m.final_queue == m.arrived - m.started
    moments = np.stack(
        [
            r[name]
            for name in (
                "arrived_at",
                "enqueued_at",
                "started_at",
                "first_token_at",
                "completed_at",
            )
        ]
    )
    gaps = np.diff(moments, axis=0)
    assert (gaps[~np.isnan(gaps)] >= 0).all()
    # What never happened is followed by nothing that did.
    assert (np.diff(np.isnan(moments).astype(int), axis=0) >= 0).all()
    assert (r.output_tokens >= 1).all()


@settings(max_examples=200, deadline=None)
@given(strategies.engines, strategies.time_limits)
def test_first_come_is_first_served_and_no_slot_holds_two(engine, time_limit):
    r = engine.run(time_limit).requests
    slots, started, completed = r.slot.values, r.started_at.values, r.completed_at.values
    assert (np.diff(started[~np.isnan(started)]) >= 0).all()
    for slot in range(engine.max_batch_size):
        mine = slots == slot
        ends = np.nan_to_num(completed[mine], nan=np.inf)
        assert (started[mine][1:] >= ends[:-1]).all()
    assert slots.max(initial=-1) < engine.max_batch_size


@settings(max_examples=150, deadline=None)
@given(strategies.engines, strategies.time_limits)
def test_littles_law_holds_for_slots_and_queue(engine, time_limit):
    run = engine.run(time_limit)
    end = float(run.metrics.end_time)
    r, s = ({name: column.values for name, column in ds.variables.items()} for ds in (run.requests, run.steps))
    in_slots = np.nan_to_num(r["completed_at"], nan=end) - r["started_at"]
    in_queue = np.nan_to_num(r["started_at"], nan=end) - r["enqueued_at"]
    running = ((s["prefilling"] + s["decoding"]) * s["duration"]).sum()
    np.testing.assert_allclose(np.nansum(in_slots), running, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(in_queue.sum(), (s["queue_size"] * s["duration"]).sum(), rtol=1e-9, atol=1e-9)
    assert s["time"][-1] < end


@settings(max_examples=100, deadline=None)
@given(strategies.engines, st.integers(1, 100), st.integers(1, 100))
def test_a_longer_run_begins_like_a_shorter_one(engine, time_limit, more):
    short, long = engine.run(time_limit), engine.run(time_limit + more)
    n, k = short.requests.sizes["request"], short.steps.sizes["step"]
    np.testing.assert_array_equal(long.steps.time[:k], short.steps.time)
    np.testing.assert_array_equal(long.steps.queue_size[:k], short.steps.queue_size)
    first = long.requests.isel(request=slice(n))
    np.testing.assert_array_equal(first.output_tokens, short.requests.output_tokens)
    for name in ("started_at", "first_token_at", "completed_at"):
        happened = ~np.isnan(short.requests[name].values)
        np.testing.assert_array_equal(first[name].values[happened], short.requests[name].values[happened])
    assert long.metrics.completed >= short.metrics.completed


@settings(max_examples=100, deadline=None)
@given(strategies.engines, strategies.time_limits)
def test_in_flight_batching_leaves_no_slot_free_while_requests_wait(engine, time_limit):
    steps = (
        sim.Engine(
            max_batch_size=engine.max_batch_size,
            load_generator=engine.load_generator,
            batcher=sim.IFBatcher(),
        )
        .run(time_limit)
        .steps
    )
    running = steps.prefilling + steps.decoding
    assert ((running == engine.max_batch_size) | (steps.queue_size == 0)).all()


@settings(max_examples=100, deadline=None)
@given(strategies.engines, strategies.time_limits)
def test_the_one_prefill_batcher_prefills_at_most_one(engine, time_limit):
    steps = (
        sim.Engine(
            max_batch_size=engine.max_batch_size,
            load_generator=engine.load_generator,
            batcher=sim.IFBatcherWithOnePrefillOnly(),
        )
        .run(time_limit)
        .steps
    )
    assert (steps.prefilling <= 1).all()


def test_concurrency_is_kept_after_every_boundary():
    run = sim.Engine(
        max_batch_size=4,
        load_generator=sim.ConcurrentLoadGenerator(
            target_concurrency=7, output_tokens=sim.LogNormal(mean=9, std=9), prefill_time=0.7
        ),
    ).run(500)
    present = run.steps.prefilling + run.steps.decoding + run.steps.queue_size
    assert (present == 7).all()


def test_arrival_gaps_follow_their_laws():
    from scipy import stats

    for load, law in [
        (sim.PoissonLoadGenerator(request_rate=3, seed=5), stats.expon(scale=1 / 3)),
        (
            sim.GammaLoadGenerator(request_rate=3, coefficient_of_variation=2, seed=5),
            stats.gamma(0.25, scale=4 / 3),
        ),
    ]:
        due = sim.Engine(load_generator=load).run(5000).requests.arrived_at.values
        assert stats.kstest(np.diff(due, prepend=0.0), law.cdf).pvalue > 1e-3
