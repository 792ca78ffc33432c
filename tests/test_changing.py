"""Fleets whose workers come, go and crash: laws and closed forms."""

import math

import msgspec
import numpy as np
import pytest
from scipy import linalg, stats

import vecsim as sim
from vecsim.plot.runs import queue_over_time
from vecsim.plot.tokens import mean_over_time, memory_in_use
from vecsim.sweep.report import table

STEP = sim.LinearStepTime(base=6e-3, per_request=6e-5, per_prefill_token=4e-5)
POOL = sim.Pool(workers=2, max_batch_size=64, step_time=STEP, kv_cache=sim.KVCache(blocks=2000))
LOAD = sim.PoissonLoadGenerator(request_rate=12, requests=800, prompt_tokens=500, output_tokens=200)


def cluster(**fields):
    usual = {"pool": POOL, "router": sim.LeastOutstandingRouter(), "load_generator": LOAD}
    return sim.Cluster(**usual | fields)


PLANNERS = [
    sim.Schedule(changes=((10.0, "decode", 4), (40.0, "decode", 1))),
    sim.LoadPlanner(interval=10.0),
    sim.ThroughputPlanner(),
    sim.ReactivePlanner(ttft=0.2, itl=0.05),
    sim.ReactivePlanner(ttft=0.2, itl=0.05, floor=sim.SLAPlanner(profile=STEP, interval=20.0, itl=0.0065)),
]


@pytest.mark.parametrize("router", [sim.RoundRobinRouter(), sim.LeastOutstandingRouter(), sim.LeastKVRouter()])
def test_a_control_plane_without_failures_changes_nothing(router):
    plain = cluster(router=router).run()
    watched = cluster(router=router, control_plane=sim.ControlPlane()).run()
    for name in plain.metrics:
        np.testing.assert_array_equal(watched.metrics[name], plain.metrics[name], err_msg=name)
    for name in plain.requests:
        np.testing.assert_array_equal(watched.requests[name], plain.requests[name], err_msg=name)


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: planner.name)
def test_gpu_hours_are_those_of_the_workers_that_there_were(planner):
    pool = msgspec.structs.replace(POOL, gpus=2, start_up_time=5.0, start_up_std=1.0)
    run = cluster(pool=pool, scaling=planner).run(90.0)
    counts = run.worker_counts(20_001).workers.sel(phase=["starting", "ready", "draining"]).sum("phase").values[0]
    mean = (counts[1:] + counts[:-1]).mean() / 2
    np.testing.assert_allclose(run.metrics.gpu_hours, mean * 2 * 90 / 3600, rtol=2e-3)
    events = run.worker_events
    reasons = events.reason.values.tolist()
    assert int(run.metrics.scale_ups) == reasons.count("added")
    assert int(run.metrics.scale_downs) == reasons.count("removed")
    assert (np.diff(events.time) >= 0).all()
    if not isinstance(planner, sim.Schedule):  # within the budget of 8 GPUs, but for those that drain
        on = run.worker_counts(2_001).workers.sel(phase=["starting", "ready"]).sum("phase")
        assert 1 <= int(on.min()) <= int(on.max()) <= 4


def test_a_worker_takes_its_time_to_start_and_begins_cold():
    planner = sim.Schedule(changes=((10.0, "decode", 3),))
    run = cluster(pool=msgspec.structs.replace(POOL, start_up_time=7.5), scaling=planner).run()
    events = run.worker_events.to_dataframe()
    new = events[events.worker == 2]
    assert new[["time", "phase", "reason"]].values.tolist() == [
        [10.0, "starting", "added"],
        [17.5, "ready", "started"],
    ]
    first = run.steps.time.values[run.steps.worker.values == 2].min()
    assert first >= 17.5


def test_draining_finishes_what_there_is_and_takes_nothing_new():
    planner = sim.Schedule(changes=((20.0, "decode", 1),))
    run = cluster(scaling=planner).run()
    events = run.worker_events.to_dataframe()
    drained = float(events[(events.worker == 1) & (events.reason == "drained")].time.iloc[0])
    assert drained > 20.0
    of_worker = run.requests.worker.values == 1
    assert (run.requests.arrived_at.values[of_worker] <= 20.0).all()
    assert run.requests.completed_at.values[of_worker].max() == drained
    assert int(run.metrics.completed) == int(run.metrics.arrived)


def test_availability_of_one_worker_that_crashes_and_recovers():
    """Of requests that find it at once, or not, as many as mtbf / (mtbf + recovery)."""
    mtbf, recovery = 50.0, 12.5
    pool = sim.Pool(workers=1, step_time=sim.LinearStepTime(base=1e-4), start_up_time=recovery)
    plane = sim.ControlPlane(mtbf=mtbf, ttl=0.0, renewal=0.0, connect_timeout=1e-3, shun=0.0)
    load = sim.PoissonLoadGenerator(request_rate=2, prompt_tokens=1, output_tokens=1)
    one = sim.Cluster(pool=pool, load_generator=load, control_plane=plane)
    ds = sim.sweep(one, time_limit=20_000, seed=range(16), progress=False)
    share = (ds.completed / ds.arrived).values
    error = share.std(ddof=1) / math.sqrt(share.size)
    assert abs(share.mean() - mtbf / (mtbf + recovery)) < 4 * error
    np.testing.assert_allclose(ds.crashes.mean(), 20_000 / (mtbf + recovery), rtol=0.03)
    assert (ds.completed + ds.failed >= ds.arrived - 1).all()


def test_goodput_of_one_worker_that_crashes_and_recovers():
    """Requests are served that find the worker ready, and it for as long as they take: A exp(-s / mtbf) of them."""
    mtbf, recovery, step, tokens, rate = 50.0, 12.5, 0.02, 250, 2.0
    pool = sim.Pool(workers=1, step_time=sim.LinearStepTime(base=step), start_up_time=recovery)
    plane = sim.ControlPlane(mtbf=mtbf, ttl=0.0, renewal=0.0, connect_timeout=1e-3, shun=0.0)
    load = sim.PoissonLoadGenerator(request_rate=rate, prompt_tokens=1, output_tokens=tokens)
    slo = sim.SLO(e2e=(tokens + 2) * step)
    one = sim.Cluster(pool=pool, load_generator=load, control_plane=plane, slo=slo)
    goodput = sim.sweep(one, time_limit=20_000, seed=range(32), progress=False).goodput.values
    error = goodput.std(ddof=1) / math.sqrt(goodput.size)
    # A request waits for a step's end, and a crash for that of another, which it may be the last of: a step on each
    # side of those that it takes. A step is 0.0004 of the mean time between failures.
    served = [rate * mtbf / (mtbf + recovery) * math.exp(-(tokens + more) * step / mtbf) for more in (-1, 1)]
    assert served[1] - 4 * error < goodput.mean() < served[0] + 4 * error
    assert error < 0.005 * rate


def test_routers_notice_a_crash_when_the_lease_ends():
    """Requests are sent to the dead worker for a uniform time between ttl - renewal and ttl (Kolmogorov, Smirnov)."""
    plane = sim.ControlPlane(crashes=((10.0, 1),), ttl=10, renewal=5, shun=0.0, connect_timeout=1e-3)
    pool = sim.Pool(workers=2, step_time=sim.LinearStepTime(base=1e-3), start_up_time=60.0)
    lasted = []
    for seed in range(400):
        load = sim.RequestRateLoadGenerator(request_rate=100, prompt_tokens=1, output_tokens=1, seed=seed)
        requests = sim.Cluster(pool=pool, load_generator=load, control_plane=plane).run(21.0).requests
        hit = requests.arrived_at.values[requests.retries.values > 0]
        assert hit.min() >= 10.0 - 1e-9
        lasted.append(hit.max() - 10.0)
    assert min(lasted) >= 5.0 - 0.02
    assert max(lasted) <= 10.0
    assert stats.kstest(lasted, stats.uniform(5, 5).cdf).pvalue > 1e-3


def test_a_queue_whose_servers_are_added_on_a_schedule_is_a_birth_and_death_process():
    """Means of the requests in the system, and of those that wait, as the forward equations have them.

    One queue for prefill before workers of one slot; a prompt takes an exponential time, and its end is the request's.
    """
    rate, start_up = 2.5, 2.0
    tokens = np.ceil(-10_000 * np.log1p(-(np.arange(20_000) + 0.5) / 20_000)).astype(int)
    engine = sim.DisaggregatedEngine(
        prefill=sim.Pool(
            workers=1,
            max_batch_size=1,
            step_time=sim.LinearStepTime(base=1e-9, per_prefill_token=1e-4),
            batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=2**20),
            start_up_time=start_up,
        ),
        decode=sim.Pool(max_batch_size=1, step_time=sim.LinearStepTime(base=1e-9)),
        scaling=sim.Schedule(changes=((10.0, "prefill", 2), (20.0, "prefill", 4))),
        load_generator=sim.PoissonLoadGenerator(
            request_rate=rate, prompt_tokens=sim.Empirical(values=tokens), output_tokens=1
        ),
    )
    ds = sim.sweep(engine, 40.0, seed=range(4000), keep="requests", progress=False)

    number = np.arange(201)  # requests in the system; more are as good as impossible
    share = (number == 0).astype(float)
    before = 0.0
    for now, servers in ((5, 1), (12, 1), (15, 2), (22, 2), (24, 4), (28, 4), (38, 4)):
        births, deaths = np.full(200, rate), np.minimum(number[1:], servers).astype(float)
        generator = np.diag(births, 1) + np.diag(deaths, -1)
        share = share @ linalg.expm((generator - np.diag(generator.sum(axis=1))) * (now - before))
        before = now
        came, started, ended = ((ds[f"{what}_at"] < now).sum("request") for what in ("arrived", "started", "completed"))
        for sample, expected in (
            ((came - ended).values, share @ number),
            ((came - started).values, share @ np.maximum(number - servers, 0)),
        ):
            error = sample.std(ddof=1) / math.sqrt(sample.size)
            assert abs(sample.mean() - expected) < 4 * error
            assert error < 0.03 * expected  # or this would say little


@pytest.mark.parametrize("limit", [0, 1])
def test_each_request_of_a_crashed_worker_migrates_or_fails(limit):
    plane = sim.ControlPlane(crashes=((20.0, 0),), migration_limit=limit)
    run = cluster(control_plane=plane).run()
    requests = run.requests
    assert int(run.metrics.completed + run.metrics.failed) == int(run.metrics.arrived) == 800
    failed = requests.failure.values == "crash"
    assert failed.any() == (limit == 0)
    assert (requests.migrations.values > 0).any() == (limit == 1)
    assert np.isnan(requests.completed_at.values[failed]).all()
    np.testing.assert_array_equal(np.isfinite(requests.failed_at), failed)


def test_pictures_and_tables_have_a_row_for_each_worker_that_there_was():
    scaling = sim.Schedule(changes=((15.0, "decode", 4), (40.0, "decode", 1)))
    together = cluster(scaling=scaling, control_plane=sim.ControlPlane(crashes=((30.0, 0),)))
    apart = sim.DisaggregatedEngine(prefill=POOL, decode=POOL, load_generator=LOAD, scaling=scaling)
    for fleet, rows in ((together, 4), (apart, 4 + 4)):
        run = fleet.run(60.0)
        axis = run.plot().axes[0]
        assert axis.images[0].get_array().shape[0] == rows
        assert run.workers.sizes["worker"] == sum(fleet.places())
        assert int(run.workers.requests.sum()) >= int(run.metrics.started)
    assert run.links.link.values.tolist()[:5] == ["source 0", "source 1", "source 2", "source 3", "destination 4"]


def test_the_text_of_a_run_and_the_table_of_a_sweep_tell_what_became_of_workers_and_requests():
    plane = sim.ControlPlane(crashes=((20.0, 0),), ttl=5)
    fleet = cluster(control_plane=plane, scaling=sim.Schedule(changes=((10.0, "decode", 3),)))
    run = fleet.run(60.0)
    m = run.metrics
    failed, retries = int(m.failed), int(m.retries)
    assert failed > 0
    assert f"\nFailed requests: {failed}; migrations 0, retries {retries}\n" in str(run)
    assert f"\nWorkers: 1 added, 0 removed, 1 crashed; {float(m.gpu_hours):.3f} GPU-hours\n" in str(run)
    assert "1 added, 0 removed, 1 crashed" in run._repr_html_()
    assert "crashed" not in str(cluster().run(60.0))
    ds = sim.sweep(fleet, time_limit=60.0, migration_limit=[0, 1], progress=False)
    head, _, *rows = table(ds).splitlines()
    assert head.split()[-3:] == ["failed", "crashes", "GPU-hours"]
    assert rows[0].split()[-3:] == [str(failed), "1", f"{float(m.gpu_hours):.3g}"]
    assert rows[1].split()[-3] == "0"


def test_a_run_ends_when_its_last_request_has_failed():
    plane = sim.ControlPlane(crashes=((1.0, 0),), restarts=False, ttl=10, renewal=0, connect_timeout=2.0, shun=0.0)
    load = sim.TraceLoadGenerator(arrived_at=[0.0, 4.0], prompt_tokens=[10, 10], output_tokens=[5, 5])
    pool = msgspec.structs.replace(POOL, workers=1)
    run = cluster(pool=pool, load_generator=load, control_plane=plane).run()
    assert run.requests.failed_at.values[1] == run.metrics.end_time >= 11.0
    np.testing.assert_allclose(run.metrics.gpu_hours, 1 / 3600)


def test_threads_and_other_scenarios_change_nothing():
    plane = sim.ControlPlane(mtbf=30.0, migration_limit=2, outages=((30.0, 12.0),))
    pool = msgspec.structs.replace(POOL, start_up_time=5.0)
    fleet = cluster(pool=pool, control_plane=plane, scaling=sim.LoadPlanner(interval=5.0))
    axes = {"start_up_time": [0.0, 5.0, 20.0], "migration_limit": [0, 3], "seed": range(3)}
    one, two = (sim.sweep(fleet, time_limit=80.0, **axes, threads=threads, progress=False) for threads in (1, 2))
    assert one.identical(two)
    alone = fleet.run(80.0)
    same = sim.sweep(fleet, time_limit=80.0, seed=[fleet.load_generator.seed], progress=False).isel(seed=0)
    assert int(same.failed) == int(alone.metrics.failed)
    np.testing.assert_allclose(same.gpu_hours, alone.metrics.gpu_hours, rtol=1e-12)


def test_a_planner_of_ones_own():
    import numba

    @numba.njit
    def one_more_each_time(view, memory):
        memory[0] += 1.0
        return 0, 1

    run = cluster(scaling=sim.CustomPlanner(rule=one_more_each_time, interval=10.0, max_gpus=5)).run(60.0)
    ready = run.worker_counts(601).workers.sel(phase="ready").values[0]
    assert ready[0] == 2
    assert ready.max() == 5


def test_a_floor_holds_as_many_workers_as_its_planner_finds_in_each_interval():
    interval = 20.0
    floor = sim.SLAPlanner(profile=STEP, interval=interval, itl=0.0065, correction=False)
    run = cluster(scaling=sim.ReactivePlanner(ttft=0.2, floor=floor)).run(75.0)
    counts = run.worker_counts(751).workers.sel(phase=["starting", "ready"]).sum("phase")[0]
    assert int(counts[(counts.time > 6) & (counts.time < 19)].min()) == 1  # by their load
    arrived, ended = run.requests.arrived_at.values, run.requests.completed_at.values
    for tick in (1, 2, 3):
        at = tick * interval
        rate = ((arrived > at - interval) & (arrived <= at)).sum() / interval
        assert ((ended > at - interval) & (ended <= at)).any()
        # A prompt takes 0.006 + 0.00006 + 500 x 0.00004 s; 8 requests decode within 0.0065 s
        needed = math.ceil(rate * (0.02606 + 200 * 0.00648 / 8))
        assert needed > 1
        assert int(counts[(counts.time > at + 0.05) & (counts.time < at + interval)].min()) == needed


def test_the_interval_of_a_floor_is_an_axis():
    floor = sim.SLAPlanner(profile=STEP, itl=0.0065)
    fleet = cluster(scaling=sim.ReactivePlanner(ttft=0.2, floor=floor))
    assert sim.Cluster.from_toml(fleet.to_toml()) == fleet
    axes = {"scaling.floor.interval": [10.0, 60.0, 1e6], "seed": range(2), "progress": False}
    hours = sim.sweep(fleet, time_limit=75.0, **axes).gpu_hours
    without = sim.sweep(cluster(scaling=sim.ReactivePlanner(ttft=0.2)), 75.0, seed=range(2), progress=False).gpu_hours
    assert (np.diff(hours.transpose("seed", ...)) < 0).all()
    np.testing.assert_array_equal(hours.isel({"scaling.floor.interval": -1}), without)
    with pytest.raises(ValueError, match=r"floor.interval must be >= interval, got floor.interval=1, interval=5"):
        sim.sweep(fleet, time_limit=75.0, **axes | {"scaling.floor.interval": [1.0]})
    with pytest.raises(ValueError, match=r"floor: min_workers must fit into max_gpus"):
        cluster(
            pool=msgspec.structs.replace(POOL, gpus=2),
            scaling=sim.ReactivePlanner(floor=msgspec.structs.replace(floor, min_workers=5)),
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ttl": 3.0}, "ttl must be at least renewal, 5 s, got 3"),
        ({"outages": ((10.0, 5.0), (12.0, 5.0))}, "outages must not overlap or touch, got one at 12"),
        ({"outages": ((10.0, 0.0),)}, "outages must last a finite time > 0, got 0 at 10"),
        ({"crashes": ((5.0, 0), (1.0, 0))}, "crashes must be in the order of time"),
        ({"crashes": ((5.0, -1),)}, "crashes must be of workers >= 0, got -1"),
        ({"mtbf": 0.0}, "mtbf must be > 0"),
        ({"connect_timeout": 0.0, "shun": 0.0}, "connect_timeout or shun must be > 0"),
    ],
)
def test_a_control_plane_that_cant_be(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        sim.ControlPlane(**fields)


def test_fleets_that_cant_be():
    with pytest.raises(ValueError, match="crashes must be of workers below 2, got 2"):
        cluster(control_plane=sim.ControlPlane(crashes=((1.0, 2),)))
    with pytest.raises(ValueError, match="start_up_time must be > 0 where start_up_std is"):
        sim.Pool(step_time=STEP, start_up_std=1.0)
    with pytest.raises(ValueError, match="scaling needs one pool of each kind, got 2 pools"):
        cluster(pool=(POOL, POOL), scaling=sim.ThroughputPlanner())
    pushes = sim.ControlPlane(queue_push=0.1)
    apart = {"prefill": POOL, "decode": POOL, "load_generator": LOAD, "control_plane": pushes}
    sim.DisaggregatedEngine(**apart)
    with pytest.raises(ValueError, match=r"control_plane.queue_push must be 0 where there is no queue for prefill"):
        sim.DisaggregatedEngine(**apart, prefill_router=sim.RandomRouter())
    with pytest.raises(ValueError, match=r"control_plane.queue_push must be 0 where there is no queue for prefill"):
        cluster(control_plane=pushes)
    ticks = sim.Pool(workers=2, max_batch_size=4, batcher=sim.IFBatcher(), step_time=sim.TickStepTime())
    load = sim.PoissonLoadGenerator(request_rate=0.5, target_output_len_tokens=10, target_output_len_std=0)
    with pytest.raises(ValueError, match="control_plane must not be given in the tick model"):
        sim.Cluster(pool=ticks, load_generator=load, control_plane=sim.ControlPlane())
    with pytest.raises(ValueError, match="worker_events are there for fleets with scaling or a control_plane"):
        _ = cluster().run().worker_events


def test_a_picture_shares_out_memory_among_the_workers_that_are_there_and_names_crashes():
    fleet = cluster(
        scaling=sim.Schedule(changes=((20.0, "decode", 1), (40.0, "decode", 4))),
        control_plane=sim.ControlPlane(crashes=((50.0, 0),)),
    )
    run = fleet.run(60.0)
    edges = np.linspace(0.0, float(run.metrics.end_time), 61)
    held = mean_over_time(run, run.steps.kv_blocks.values, edges)
    used = memory_in_use(run, edges)
    blocks = fleet.pool.kv_cache.blocks
    for workers, column in ((fleet.pool.workers, 10), (1, 35), (4, 45)):
        np.testing.assert_allclose(used[column], 100 * held[column] / (workers * blocks))
    legend = [text.get_text() for text in run.plot().legends[0].get_texts()]
    assert {"starting", "crash"} <= set(legend)


def test_a_crashed_worker_has_no_queue_in_a_picture():
    full = sim.BatchLoadGenerator(initial_batch=400, prompt_tokens=500, output_tokens=200)
    pool = msgspec.structs.replace(POOL, workers=1, start_up_time=20.0)
    run = cluster(pool=pool, load_generator=full, control_plane=sim.ControlPlane(crashes=((3.0, 0),))).run(30.0)
    time, queue = queue_over_time(run)
    (crash,) = run.worker_events.time.values[run.worker_events.reason.values == "crash"]
    assert queue[time < crash][-1] > 0
    assert (queue[(time >= crash) & (time < crash + 20.0)] == 0).all()
