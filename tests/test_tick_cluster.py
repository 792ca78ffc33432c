"""The tick model's cluster: against a literal reading of its rules, against an engine, and against laws."""

import itertools
import math
import pickle

import numpy as np
import policies
import pytest
import strategies
import tick_cluster_oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim import plot, scenarios
from vecsim.axes import replace_all
from vecsim.plot import interactive
from vecsim.sweep import report, spec
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


def pool_of(**fields) -> sim.Pool:
    return sim.Pool(**({"max_batch_size": 4, "batcher": sim.IFBatcher(), "step_time": sim.TickStepTime()} | fields))


def cluster(workers: int = 1, router=None, **fields) -> sim.Cluster:
    load = fields.pop("load_generator", sim.PoissonLoadGenerator(output_tokens=8))
    pool = pool_of(workers=workers, **fields)
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
        noticed = ~np.isnan(whole.requests.enqueued_at.values)
        own = whole.requests.isel(request=(whole.requests.worker.values == worker) & noticed)
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


def test_a_sweep_is_the_runs_of_its_scenarios_on_any_number_of_threads():
    axes = {
        "workers": [1, 3, 8],
        "router": [sim.RoundRobinRouter(), sim.PowerOfTwoRouter(), sim.CustomRouter(rule=policies.least_waiting)],
        "batcher": [sim.IFBatcher(), sim.CustomBatcher(rule=policies.every_field, parameter=2)],
        "request_rate": [0.2, 1.4],
        "seed": range(3),
    }
    swept = cluster(max_batch_size=3)
    one, many = (sim.sweep(swept, 200, warmup=20, keep="requests", progress=False, threads=n, **axes) for n in (1, 3))
    assert one.identical(many)
    at = {"workers": 3, "request_rate": 1.4, "seed": 2}
    place = {"router": 1, "batcher": 1}
    chosen = replace_all(
        swept,
        {
            "pool.workers": 3,
            "pool.batcher": axes["batcher"][1],
            "router": axes["router"][1],
            "load_generator.request_rate": 1.4,
            "load_generator.seed": 2,
        },
    )
    run, kept = chosen.run(200, warmup=20), one.sel(at).isel(place)
    for name in run.metrics:
        np.testing.assert_array_equal(kept[name].values, run.metrics[name].values, err_msg=name)
    for name in run.requests:
        values = kept[name].values[: run.requests.sizes["request"]]
        np.testing.assert_array_equal(values, run.requests[name].values, err_msg=name)
    queues = sim.sweep(swept, 200, keep="queue", progress=False, **axes).sel(at).isel(place)
    entered, started = (np.sort(chosen.run(200).requests[name].values) for name in ("enqueued_at", "started_at"))
    waiting = (np.searchsorted(at, queues.time.values, "right") for at in (entered, started))
    np.testing.assert_array_equal(queues.queue_size.values, next(waiting) - next(waiting))


def test_a_closed_loop_on_one_axis_with_open_loads_gets_what_it_gets_alone():
    loads = [
        sim.PoissonLoadGenerator(request_rate=1),
        sim.ConcurrentLoadGenerator(target_concurrency=9),
        sim.PoissonLoadGenerator(request_rate=1),
        sim.BatchLoadGenerator(initial_batch=30),
    ]
    swept = cluster(4, sim.LeastOutstandingRouter(), max_batch_size=2)
    both = sim.sweep(swept, 100, load_generator=loads, progress=False, threads=1)
    for i, load in enumerate(loads):
        alone = cluster(4, sim.LeastOutstandingRouter(), max_batch_size=2, load_generator=load).run(100).metrics
        for name in alone:
            np.testing.assert_array_equal(both[name].values[i], alone[name].values, err_msg=name)


def test_fleets_of_different_pools_are_swept_together():
    small, large = (
        pool_of(workers=n, max_batch_size=slots, batcher=batcher)
        for n, slots, batcher in ((4, 2, sim.IFBatcher()), (1, 8, sim.StaticBatcher()))
    )
    load = sim.PoissonLoadGenerator(output_tokens=8)
    pools = [small, (small, large), (large,)]
    swept = sim.sweep(sim.Cluster(pool=small, load_generator=load), 150, pool=pools, progress=False)
    assert swept.pool.values.tolist() == ["Pool", "Pool + Pool", "Pool #2"]
    assert report.slots_of(swept).values.tolist() == [8, 16, 8]
    for i, pool in enumerate(pools):
        alone = sim.Cluster(pool=pool, load_generator=load).run(150).metrics
        np.testing.assert_array_equal(swept.e2e.values[i], alone.e2e.values)
    both = sim.Cluster(pool=(small, large), load_generator=load)
    numbered = sim.sweep(both, 150, **{"pool.0.workers": [2, 4], "pool.1.max_batch_size": [8, 3]}, progress=False)
    np.testing.assert_array_equal(numbered.e2e.values[1, 0], swept.e2e.values[1])
    assert report.slots_of(numbered).values.tolist() == [[12, 7], [16, 11]]
    assert "pool.1.max_batch_size" in report.table(numbered)


def test_equal_workers_are_better_used_the_more_the_router_knows():
    load = sim.PoissonLoadGenerator(request_rate=1.6, output_tokens=20)
    named = [sim.RandomRouter(), sim.PowerOfTwoRouter(), sim.LeastOutstandingRouter()]
    swept = sim.sweep(cluster(8, load_generator=load), 4000, router=named, seed=range(4), progress=False)
    random, two, least = swept.queue_time.sel(stat="mean").mean("seed").values
    assert least < two < random


def test_a_router_that_chooses_no_worker_gets_the_first():
    run = cluster(3, policies.nobody).run(50)
    assert set(run.requests.worker.values) == {0}


def test_queue_growth_tells_how_many_workers_a_load_needs():
    load = sim.RequestRateLoadGenerator(request_rate=0.9, output_tokens=20)
    grown = sim.queue_growth(cluster(1, load_generator=load), 300, 6000, workers=[2, 4, 8], progress=False)
    assert grown.grows.values.tolist() == [True, True, False]


def test_workers_that_idle_cost_nothing_and_a_ring_is_no_longer_than_outputs():
    load = sim.PoissonLoadGenerator(
        request_rate=0.01, prefill_time=1 / 3, itl=1.1, output_tokens=sim.Normal(mean=10, std=5)
    )
    run = cluster(2000, load_generator=load).run(200_000.5)
    assert run.metrics.steps > 2000 * 190_000
    ring = run._single.scratch.ring
    assert ring.size == 2000 * 32  # outputs are 10 +- 5 tokens
    assert (run.requests.started_at == run.requests.enqueued_at).all()


def test_what_workers_did_adds_up_to_the_metrics():
    pool = pool_of(workers=2, max_batch_size=3)
    pools = (pool, replace_all(pool, {"max_batch_size": 5}))
    run = sim.Cluster(pool=pools, load_generator=sim.PoissonLoadGenerator(request_rate=1.5)).run(300)
    workers, metrics = run.workers, run.metrics
    assert workers.pool.values.tolist() == [0, 0, 1, 1]
    assert workers.steps.sum() == metrics.steps
    assert workers.mean_queue.sum() == metrics.mean_queue
    assert workers.max_queue.max() == metrics.max_queue
    assert workers.requests.sum() == run.requests.sizes["request"]
    over_time = run.workers_over_time(40)
    assert over_time.sizes == {"worker": 4, "time": 40}
    np.testing.assert_allclose(over_time.utilization.mean("time"), workers.utilization, rtol=1e-9)
    np.testing.assert_allclose(
        over_time.running.mean("time") / over_time.utilization.mean("time"), workers.batch_size, rtol=1e-9
    )


def test_a_picture_has_the_slots_of_each_worker_and_a_box_for_each_phase():
    pool = pool_of(workers=2, max_batch_size=3)
    pools = (pool, replace_all(pool, {"max_batch_size": 5}))
    load = sim.PoissonLoadGenerator(request_rate=0.6, prefill_time=2.5, total_prefill_chunks=2, itl=1.2, seed=1)
    run = sim.Cluster(pool=pools, load_generator=load).run(60)
    figure = run.plot()
    top, queue = figure.axes[:2]
    assert top.get_ylabel() == "worker"
    assert top.get_ylim() == (15.5, -0.5)
    assert [text.get_text() for text in top.get_yticklabels()] == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(top.get_yticks(), [1, 4, 8, 13])
    prefill, decode = top.collections
    assert len(prefill.get_paths()) == run.metrics.started
    assert len(decode.get_paths()) == (run.requests.first_token_at < run.metrics.end_time).sum()
    total = [int(run.steps.queue_size.values[run.steps.worker.values == worker][-1]) for worker in range(4)]
    assert queue.get_lines()[0].get_ydata()[-1] == sum(total) == run.metrics.final_queue

    shown = interactive.cells(run)
    for worker, rows in enumerate((slice(0, 3), slice(3, 6), slice(6, 11), slice(11, 16))):
        own = run.steps.isel(step=run.steps.worker.values == worker)
        at = np.searchsorted(shown.edges, own.time.values)
        np.testing.assert_array_equal((shown.phase[rows, at] == 1).sum(axis=0), own.prefilling)
        np.testing.assert_array_equal((shown.phase[rows, at] == 2).sum(axis=0), own.decoding)
        for row in range(rows.start, rows.stop):
            for before, now in itertools.pairwise(at):
                if shown.phase[row, now] == 2:
                    goes_on = shown.phase[row, before] == 2 and shown.request[row, before] == shown.request[row, now]
                    assert shown.token[row, now] == (shown.token[row, before] + 1 if goes_on else 1)
    assert len(run.plot(interactive=True).data[0].y) == 16
    assert plot.compare([run, run], labels=["one", "other"]).axes
    assert "Requests/(1K ticks) = " in str(run)


def test_declarations_and_specs_come_back(tmp_path):
    for made in (cluster(3), cluster(2, sim.CustomRouter(rule=policies.least_waiting), max_batch_size=5)):
        assert sim.Cluster.from_toml(made.to_toml()) == made
        assert pickle.loads(pickle.dumps(made)) == made
        assert not made.is_token
    written = tmp_path / "cluster.toml"
    written.write_text("""
        time_limit = 50
        [engine]
        type = "Cluster"
        router = { type = "LeastOutstandingRouter" }
        [engine.pool]
        workers = 3
        max_batch_size = 4
        batcher = { type = "IFBatcher" }
        step_time = { type = "TickStepTime" }
        [engine.load_generator]
        type = "RequestRateLoadGenerator"
        [axes]
        workers = "1..3"
        batcher = ["StaticBatcher", "IFBatcher"]
    """)
    read = spec.read_spec(str(written))
    swept = sim.sweep(read.engine, read.time_limit, progress=False, **read.keywords())
    assert swept.sizes == {"workers": 3, "batcher": 2, "stat": 6}
    assert swept.attrs["declaration"] == read.engine.to_json()


LOAD = sim.PoissonLoadGenerator()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cluster(0), "workers must be >= 1, got 0"),
        (
            lambda: cluster(batcher=sim.TokenBudgetBatcher()),
            "batcher TokenBudgetBatcher needs a step_time in seconds, got TickStepTime",
        ),
        (lambda: cluster(kv_cache=sim.KVCache(blocks=10)), "kv_cache means nothing in the tick model"),
        (lambda: cluster(max_model_len=100), "max_model_len means nothing in the tick model, got 100"),
        (
            lambda: sim.Cluster(pool=pool_of(), load_generator=LOAD, overheads=sim.Overheads(per_step=1)),
            "overheads means nothing in the tick model",
        ),
        (
            lambda: sim.Cluster(pool=pool_of(), load_generator=LOAD, slo=sim.SLO(ttft=1)),
            "slo means nothing in the tick model",
        ),
        (
            lambda: cluster(load_generator=sim.PoissonLoadGenerator(prompt_tokens=10, output_tokens=5)),
            "prompt_tokens must be left out where step_time is TickStepTime",
        ),
        (
            lambda: sim.Cluster(
                pool=(pool_of(), pool_of(batcher=sim.TokenBudgetBatcher(), step_time=sim.LinearStepTime(base=1))),
                load_generator=LOAD,
            ),
            "step_time must be TickStepTime in all pools, or in none: ticks aren't seconds",
        ),
        (
            lambda: sim.DisaggregatedEngine(prefill=pool_of(), decode=pool_of(), load_generator=LOAD),
            "in seconds, got TickStepTime: in ticks there is TickDisaggregatedEngine",
        ),
        *(
            (
                lambda router=router: cluster(2, router()),
                f"router {router.__name__} needs a step_time in seconds, got TickStepTime",
            )
            for router in (sim.LeastKVRouter, sim.SessionRouter, sim.KVAwareRouter, sim.OverlapRouter)
        ),
        (
            lambda: cluster(2, sim.CustomRouter(rule=policies.least_waiting, event_latency=1)),
            "router.event_latency means nothing in the tick model, got 1.0",
        ),
        (
            lambda: sim.sweep(cluster(2), 10, router=[sim.RandomRouter(), sim.LeastKVRouter()], progress=False),
            "router LeastKVRouter needs a step_time in seconds",
        ),
        (lambda: cluster(2).run(None), "time_limit must be given in the tick model"),
        (lambda: cluster(2).run(10).ttft_parts, "ttft_parts are there for runs in seconds"),
        (
            lambda: sim.sweep(cluster(2), 1e9, workers=[2, 60_000], output_tokens=10**8, progress=False),
            "GiB are free: most of it is for .* of 60,000 workers",
        ),
        (
            lambda: cluster(2, batcher=policies.negative_later, load_generator=sim.BatchLoadGenerator()).run(100),
            r"rule negative_later must return 0 to 4 requests \(batch.free\), got -1 at 21 ticks with 0 running, \d+ "
            "queued at worker 0",
        ),
        (
            lambda: cluster(2, batcher=policies.divides).run(100),
            "rule divides raised ZeroDivisionError: .*division by zero",
        ),
        (
            lambda: sim.sweep(cluster(2), 100, router=[policies.nobody, policies.divides_by_none], progress=False),
            "rule nobody or divides_by_none raised ZeroDivisionError: .*division by zero",
        ),
    ],
)
def test_what_the_tick_model_has_not_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("load", [LOAD, sim.ConcurrentLoadGenerator(target_concurrency=20, output_tokens=3)])
@pytest.mark.parametrize("shortage", [2, 50, 10_000])
def test_too_few_drawn_requests_are_drawn_again_and_change_nothing(load, shortage, monkeypatch):
    named = cluster(3, sim.LeastOutstandingRouter(), load_generator=load)
    whole = named.run(80)
    needed = scenarios.requests_needed

    def fewer(table, more):
        return np.maximum(needed(table, 1.0) * min(more / shortage, 1.0), 1.0)

    monkeypatch.setattr(scenarios, "requests_needed", fewer)
    again = named.run(80)
    assert again.metrics.identical(whole.metrics)
    assert again.requests.identical(whole.requests)
    swept = sim.sweep(named, 80, seed=[load.seed], workers=[2, 3], progress=False)
    np.testing.assert_array_equal(swept.e2e.values[0, 1], whole.metrics.e2e.values)
