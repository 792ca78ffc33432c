"""The tick model's cluster: against a literal reading of its rules, against an engine, and against laws."""

import math

import numpy as np
import policies
import strategies
import tick_cluster_oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim.axes import replace_all
from vecsim.variables import DISTRIBUTIONS, SCALARS

INSTANTS = ("arrived_at", "enqueued_at", "started_at", "first_token_at", "completed_at")

pools = st.builds(
    sim.Pool,
    workers=st.integers(1, 4),
    max_batch_size=st.integers(1, 7),
    batcher=strategies.batchers,
    step_time=st.just(sim.TickStepTime()),
)
built_in_routers = [sim.RoundRobinRouter(), sim.RandomRouter(), sim.LeastOutstandingRouter(), sim.PowerOfTwoRouter()]
routers = st.sampled_from([*built_in_routers, sim.CustomRouter(rule=policies.least_waiting)])
clusters = st.builds(
    sim.Cluster,
    pool=st.one_of(pools, st.lists(pools, min_size=1, max_size=3).map(tuple)),
    router=routers,
    load_generator=strategies.loads,
)


def cluster(workers: int = 1, router=None, **fields) -> sim.Cluster:
    load = fields.pop("load_generator", sim.PoissonLoadGenerator(output_tokens=8))
    pool = sim.Pool(workers=workers, **({"batcher": sim.IFBatcher(), "step_time": sim.TickStepTime()} | fields))
    return sim.Cluster(pool=pool, router=router or sim.RoundRobinRouter(), load_generator=load)


def literal(cluster: sim.Cluster, time_limit: float) -> tick_cluster_oracle.Result:
    load = cluster.load_generator
    arrivals, target = None, 0
    if isinstance(load, sim.ConcurrentLoadGenerator):
        target = load.target_concurrency
        n = target + int((time_limit + 1) * (cluster.max_batch_size + 1))
    else:
        # Arrivals don't depend on what serves: an engine alone notices them all.
        alone = sim.Engine(max_batch_size=1, load_generator=load)
        arrivals = alone.run(2 * time_limit + 10).requests.arrived_at.values.tolist()
        n = len(arrivals)
    return tick_cluster_oracle.simulate(
        pools=cluster.pools,
        router=cluster.router,
        seed=load.seed,
        prefill_time=load.prefill_time,
        itl=load.itl,
        chunks=load.total_prefill_chunks,
        lengths=strategies.drawn_lengths(load.output_length, load.seed, n),
        time_limit=time_limit,
        arrivals=arrivals,
        target=target,
    )


@settings(max_examples=150, deadline=None)
@given(clusters, strategies.time_limits)
def test_every_event_is_that_of_the_literal_rules(cluster, time_limit):
    run = cluster.run(time_limit)
    expected = literal(cluster, time_limit)
    requests = expected.requests
    entered = 1 + max((i for i, request in enumerate(requests) if not math.isnan(request.enqueued_at)), default=-1)
    assert run.requests.sizes["request"] == entered
    for ours, theirs in ({name: name for name in INSTANTS} | {"worker": "worker", "output_tokens": "length"}).items():
        values = [getattr(request, theirs) for request in requests[:entered]]
        np.testing.assert_array_equal(run.requests[ours].values, values, err_msg=ours)
    for worker in expected.workers:
        own = run.steps.isel(step=run.steps.worker.values == worker.number)
        np.testing.assert_array_equal(own.time.values, worker.boundaries)
        np.testing.assert_array_equal(own.queue_size.values, worker.queues)
        np.testing.assert_array_equal((own.prefilling + own.decoding).values, worker.running)


@settings(max_examples=150, deadline=None)
@given(clusters, strategies.time_limits, st.floats(0, 0.99), strategies.quantiles)
def test_every_metric_is_that_of_its_definition(cluster, time_limit, share, quantiles):
    warmup = share * time_limit
    ours = cluster.run(time_limit, warmup=warmup, quantiles=quantiles).metrics
    expected = tick_cluster_oracle.metrics(literal(cluster, time_limit), warmup, quantiles)
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


@settings(max_examples=150, deadline=None)
@given(strategies.engines, strategies.time_limits, routers, st.floats(0, 0.99))
@example(
    sim.Engine(load_generator=sim.PoissonLoadGenerator(request_rate=0.01, prefill_time=2.3, itl=1.1)),
    3000.7,
    sim.LeastOutstandingRouter(),
    0.3,
)
def test_one_worker_is_an_engine_to_the_last_bit(engine, time_limit, router, share):
    one = sim.Cluster(pool=sim.Pool.of(engine), router=router, load_generator=engine.load_generator)
    ours, alone = (each.run(time_limit, warmup=share * time_limit) for each in (one, engine))
    for name in alone.metrics:
        np.testing.assert_array_equal(ours.metrics[name].values, alone.metrics[name].values, err_msg=name)
    for mine, its in ((ours.requests, alone.requests), (ours.steps, alone.steps)):
        assert mine.drop_vars("worker").drop_attrs().identical(its.drop_attrs())


eighths = st.integers(0, 40).map(lambda n: n / 8)  # so that no sum is rounded


@settings(max_examples=60, deadline=None)
@given(
    strategies.batchers.filter(lambda batcher: not isinstance(batcher, sim.CustomBatcher)),
    *(st.integers(1, 6), st.integers(1, 6), st.sampled_from([0.25, 0.5, 1.0]), st.integers(1, 150)),
    st.builds(
        sim.RequestRateLoadGenerator,
        prefill_time=eighths,
        itl=eighths,
        total_prefill_chunks=st.sampled_from([1, 2, 4]),
        output_tokens=st.integers(1, 20).map(lambda n: sim.Constant(value=n)),
    ),
)
def test_workers_in_turn_are_engines_with_each_its_share_of_the_arrivals(
    batcher, slots, workers, rate, time_limit, load
):
    def of_rate(value):
        return replace_all(load, {"request_rate": value})

    whole = cluster(workers, max_batch_size=slots, batcher=batcher, load_generator=of_rate(rate)).run(time_limit)
    engine = sim.Engine(max_batch_size=slots, batcher=batcher, load_generator=of_rate(rate / workers))
    total = {"arrived": 0, "completed": 0, "itl_samples": 0, "final_queue": 0}
    for worker in range(workers):
        # The last one has every n-th request from the n-th on, as an engine has them; the others so much earlier.
        earlier = (workers - 1 - worker) / rate
        alone = engine.run(time_limit + earlier)
        own = whole.requests.isel(request=whole.requests.worker.values == worker)
        for name in INSTANTS:
            np.testing.assert_array_equal(own[name].values + earlier, alone.requests[name].values, err_msg=name)
        np.testing.assert_array_equal(own.slot.values, alone.requests.slot.values)
        steps = whole.steps.isel(step=whole.steps.worker.values == worker)
        for name in ("time", "duration", "queue_size", "prefilling", "decoding"):
            values = steps[name].values + (earlier if name == "time" else 0)
            np.testing.assert_array_equal(values, alone.steps[name].values[int(earlier) :], err_msg=name)
        for name in total:
            total[name] += alone.metrics[name].item()
    for name, value in total.items():
        assert whole.metrics[name].item() == value, name


@settings(max_examples=50, deadline=None)
@given(clusters, strategies.time_limits)
def test_requests_are_conserved_and_no_slot_holds_two(cluster, time_limit):
    run = cluster.run(time_limit)
    r, m = run.requests, run.metrics
    noticed = ~np.isnan(r.enqueued_at.values)
    assert m.arrived == noticed.sum()
    assert m.arrived == m.started + m.final_queue
    if isinstance(cluster.load_generator, sim.ConcurrentLoadGenerator):
        leaves = np.where(np.isnan(r.completed_at.values), np.inf, r.completed_at.values)
        for t in np.unique(run.steps.time.values)[:50]:
            present = (r.arrived_at.values <= t) & (leaves > t)
            assert present.sum() <= cluster.load_generator.target_concurrency
    slots = np.repeat([pool.max_batch_size for pool in cluster.pools], [pool.workers for pool in cluster.pools])
    for worker, size in enumerate(slots):
        own = r.isel(request=(r.worker.values == worker) & (r.slot.values >= 0))
        assert (own.slot.values < size).all()
        for slot in range(size):
            there = own.isel(request=own.slot.values == slot)
            assert (there.started_at.values[1:] >= there.completed_at.values[:-1]).all()
