"""Fleets against engines alone, other simulators and queueing theory."""

import csv
import json
from itertools import pairwise
from math import factorial

import numpy as np
import pytest

import vecsim as sim
from vecsim.plot.runs import queue_over_time
from vecsim.routing import KVAwareRouter, OverlapRouter
from vecsim.transfer import KVTransfer

LOAD = sim.PoissonLoadGenerator(
    request_rate=12.0,
    requests=300,
    prompt_tokens=sim.LogNormal(mean=300, std=300),
    output_tokens=sim.LogNormal(mean=60, std=60),
    seed=3,
)
POOL = {
    "max_batch_size": 8,
    "step_time": sim.LinearStepTime(base=5e-3, per_request=1e-4, per_prefill_token=2e-5, per_context_token=1e-8),
    "kv_cache": sim.KVCache(blocks=300, block_size=16),
}
ROUTERS = [
    sim.RoundRobinRouter(),
    sim.RandomRouter(),
    sim.LeastOutstandingRouter(),
    sim.PowerOfTwoRouter(),
    sim.LeastKVRouter(),
    sim.SessionRouter(),
    KVAwareRouter(),
    KVAwareRouter(temperature=0.3, event_latency=0.1),
    OverlapRouter(),
]


@pytest.mark.parametrize(
    "batcher",
    [
        sim.TokenBudgetBatcher(max_num_batched_tokens=256),
        sim.TokenBudgetBatcher(async_scheduling=True),
        sim.TokenBudgetBatcher(order="shortest_prompt"),
        sim.PrefillFirstBatcher(),
        sim.ChunkedPrefillBatcher(chunk_tokens=128),
        sim.NoEvictBatcher(),
        sim.SGLangBatcher(),
        sim.StaticBatcher(),
    ],
    ids=lambda batcher: batcher.label(),
)
@pytest.mark.parametrize("time_limit", [None, 9.0])
def test_a_fleet_of_one_is_the_engine_alone(batcher, time_limit):
    engine = sim.Engine(load_generator=LOAD, batcher=batcher, **POOL)
    cluster = sim.Cluster(pool=sim.Pool(batcher=batcher, **POOL), load_generator=LOAD)
    one, other = cluster.run(time_limit, warmup=2.0), engine.run(time_limit, warmup=2.0)
    for name in other.requests:
        np.testing.assert_array_equal(one.requests[name].values, other.requests[name].values, err_msg=name)
    for name in other.metrics:
        # Sums over steps are added up in other portions.
        np.testing.assert_allclose(one.metrics[name].values, other.metrics[name].values, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.label())
@pytest.mark.parametrize("caching", [False, True])
def test_every_router_of_one_worker_does_the_same(router, caching):
    load = sim.ConcurrentLoadGenerator(
        target_concurrency=12,
        prompt_tokens=sim.Uniform(low=10, high=400),
        output_tokens=sim.Uniform(low=1, high=60),
        prefix=sim.SharedPrefix(tokens=64, groups=3),
    )
    pool = POOL | {"kv_cache": sim.KVCache(blocks=300, block_size=16, prefix_caching=caching)}
    engine = sim.Engine(load_generator=load, batcher=sim.TokenBudgetBatcher(), **pool)
    cluster = sim.Cluster(pool=sim.Pool(**pool), router=router, load_generator=load)
    one, other = cluster.run(5.0), engine.run(5.0)
    for name in other.requests:
        np.testing.assert_array_equal(one.requests[name].values, other.requests[name].values, err_msg=name)


def test_conversations_are_served_by_a_fleet_of_one_as_by_the_engine():
    load = sim.PoissonLoadGenerator(
        request_rate=2.0,
        requests=30,
        prompt_tokens=50,
        output_tokens=20,
        sessions=sim.Sessions(turns=4, think_time=0.5),
    )
    pool = POOL | {"kv_cache": sim.KVCache(blocks=300, block_size=16, prefix_caching=True)}
    engine = sim.Engine(load_generator=load, batcher=sim.TokenBudgetBatcher(), **pool)
    cluster = sim.Cluster(pool=sim.Pool(**pool), router=sim.SessionRouter(), load_generator=load)
    one, other = cluster.run(), engine.run()
    for name in other.requests:
        np.testing.assert_array_equal(one.requests[name].values, other.requests[name].values, err_msg=name)


def test_a_round_robin_over_workers_is_as_many_engines_with_a_share_of_the_requests_each():
    rng = np.random.default_rng(5)
    workers, each = 3, 40
    arrived_at = np.sort(rng.uniform(0, 4, workers * each))
    prompt, output = rng.integers(1, 500, workers * each), rng.integers(1, 80, workers * each)

    def trace(part):
        return sim.TraceLoadGenerator(
            arrived_at=arrived_at[part], prompt_tokens=prompt[part], output_tokens=output[part]
        )

    cluster = sim.Cluster(pool=sim.Pool(workers=workers, **POOL), load_generator=trace(slice(None))).run()
    for worker in range(workers):
        part = slice(worker, None, workers)
        engine = sim.Engine(batcher=sim.TokenBudgetBatcher(), load_generator=trace(part), **POOL).run()
        ours = cluster.requests.isel(request=part)
        np.testing.assert_array_equal(ours.worker, worker)
        for name in ("started_at", "first_token_at", "completed_at"):
            np.testing.assert_array_equal(ours[name], engine.requests[name])


@pytest.mark.data
def test_vidurs_four_replicas_are_met(data_folder):
    folder = data_folder / "golden" / "vidur" / "sarathi_c512_4rep_rr_qps20_n2000"
    with (folder / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    run = sim.Cluster(
        pool=sim.Pool(
            workers=4,
            max_batch_size=512,
            batcher=sim.ChunkedPrefillBatcher(chunk_tokens=512),
            kv_cache=sim.KVCache(blocks=30208, watermark=0.01),
            step_time=sim.TableStepTime(file=str(folder / "step_tables_ms_per_layer.npz"), format="vidur"),
        ),
        load_generator=sim.read_trace(folder / "requests.csv", "vidur"),
    ).run()
    summary = json.loads((folder / "config.json").read_text())["summary"]
    assert int(run.metrics.steps) == summary["iterations"]
    completed_at = run.requests.completed_at.values + float(rows[0]["arrived_at"])
    np.testing.assert_allclose(completed_at, [float(row["completed_at"]) for row in rows], rtol=0, atol=1e-5)


DYNAMO = {
    "max_batch_size": 256,
    "batcher": sim.TokenBudgetBatcher(max_num_batched_tokens=8192),
    "step_time": sim.PolynomialStepTime(),
    "kv_cache": sim.KVCache(blocks=16384, block_size=64, prefix_caching=True),
}


def of_dynamo(data_folder, name):
    """(the load, and of each request, in ms: first token, end; the worker that decodes)."""
    with (data_folder / "golden" / "dynosim" / name).open() as file:
        rows = list(csv.DictReader(file))
    load = sim.read_trace(
        data_folder / "data" / "traces" / "mooncake_conversation.jsonl", "mooncake", requests=len(rows)
    )
    names = ("first_token_ms", "last_token_ms", "decode_worker_idx")
    return load, *(np.array([float(row[name]) for row in rows]) for name in names)


def errors(requests, name, theirs):
    """(relative, of the mean latency; in ms, of each request)."""
    arrived_at, ours = 1000 * requests.arrived_at.values, 1000 * requests[name].values
    return (ours - arrived_at).mean() / (theirs - arrived_at).mean() - 1, np.abs(ours - theirs)


@pytest.mark.data
def test_dynamos_four_replicas_are_met_within_a_thousandth(data_folder):
    # Two in five instants are met to 10 us. It computes the last block of a fully cached prompt differently, which
    # shifts the steps after it.
    load, first, last, worker = of_dynamo(data_folder, "conv1000_agg4_rr.csv")
    requests = sim.Cluster(pool=sim.Pool(workers=4, **DYNAMO), load_generator=load).run().requests
    np.testing.assert_array_equal(requests.worker, worker)
    for name, theirs in (("first_token_at", first), ("completed_at", last)):
        mean, each = errors(requests, name, theirs)
        assert abs(mean) < 1e-3
        assert np.median(each) < 0.1
        assert (each < 20).mean() > 0.99


@pytest.mark.data
def test_dynamos_disaggregated_workers_are_met_within_a_hundredth(data_folder):
    # It moves all of a prompt at the full bandwidth whatever else moves. Here transfers share links, and what the
    # decode worker has cached does not move.
    load, first, last, worker = of_dynamo(data_folder, "conv1000_disagg2p2d_rr_bw64.csv")
    fleet = sim.DisaggregatedEngine(
        prefill=sim.Pool(workers=2, **DYNAMO),
        decode=sim.Pool(workers=2, **DYNAMO),
        prefill_router=sim.RoundRobinRouter(),
        router=sim.RoundRobinRouter(),
        first_token="decode",
        transfer=KVTransfer(bandwidth=64e9, kv_bytes_per_token=131072),
        load_generator=load,
    )
    requests = fleet.run().requests
    assert (requests.worker.values == worker + 2).mean() > 0.97
    for name, theirs, close in (("first_token_at", first, 0.93), ("completed_at", last, 0.65)):
        mean, each = errors(requests, name, theirs)
        assert abs(mean) < 0.01
        assert (each < 20).mean() > close


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.label())
def test_requests_are_conserved_and_threads_do_not_matter(router):
    cluster = sim.Cluster(pool=sim.Pool(workers=3, **POOL), router=router, load_generator=LOAD)
    one, two = (
        sim.sweep(cluster, threads=threads, keep="requests", progress=False, seed=range(4)) for threads in (1, 2)
    )
    for name in one:
        np.testing.assert_array_equal(one[name].values, two[name].values, err_msg=name)
    assert (one.completed + one.dropped == one.arrived).all()
    assert (one.arrived == 300).all()
    assert set(np.unique(one.worker)) <= {-1, 0, 1, 2}


APART = {
    "prefill": sim.Pool(workers=2, **POOL),
    "decode": sim.Pool(workers=2, **POOL),
    "transfer": KVTransfer(bandwidth=5e9, kv_bytes_per_token=131072),
    "load_generator": LOAD,
}
WAYS = [
    {"reserve": reserve, "first_token": first_token, "prefill_router": router}
    for reserve in ("arrival", "prefill")
    for first_token in ("prefill", "decode")
    for router in (None, sim.PowerOfTwoRouter())
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way['reserve']}-{way['first_token']}-{way['prefill_router']}")
def test_where_prefill_is_kept_apart_requests_are_conserved_and_memory_suffices(way):
    tight = POOL | {"kv_cache": sim.KVCache(blocks=150, block_size=16, prefix_caching=True)}
    fleet = sim.DisaggregatedEngine(**APART | way | {"decode": sim.Pool(workers=2, **tight)})
    one, two = (sim.sweep(fleet, threads=threads, keep="requests", progress=False, seed=range(3)) for threads in (1, 2))
    for name in one:
        np.testing.assert_array_equal(one[name].values, two[name].values, err_msg=name)
    assert (one.completed + one.dropped == one.arrived).all()
    assert (one.arrived == 300).all()
    run = fleet.run()
    steps, requests = run.steps, run.requests
    blocks = np.array([300, 300, 150, 150])
    assert (steps.kv_blocks.values <= blocks[steps.worker.values]).all()
    served = requests.isel(request=~requests.refused.values)
    assert set(np.unique(served.worker)) <= {-1, 2, 3}
    assert (served.worker.values >= 0)[served.output_tokens.values > 1].all()
    order = [served[name].values for name in ("arrived_at", "started_at", "first_token_at", "completed_at")]
    for before, after in pairwise(order):
        assert (before <= after).all()


def test_an_endless_bandwidth_is_no_transfer():
    for way in WAYS:
        without, endless = (
            sim.DisaggregatedEngine(**APART | way | {"transfer": transfer}).run().requests
            for transfer in (None, KVTransfer(kv_bytes_per_token=131072))
        )
        for name in set(without) - {"transfer_bytes"}:
            np.testing.assert_array_equal(without[name], endless[name], err_msg=name)


def test_more_bandwidth_never_worsens_the_first_token_where_one_transfer_is_in_flight():
    rare = sim.RequestRateLoadGenerator(
        request_rate=0.5, requests=40, prompt_tokens=sim.Uniform(low=10, high=2000), output_tokens=20
    )
    tight = POOL | {"kv_cache": None}
    pools = {"prefill": sim.Pool(**tight), "decode": sim.Pool(**tight)}
    ttft = []
    for bandwidth in (2e9, 4e9, 5e9, 2e10, np.inf):
        fleet = sim.DisaggregatedEngine(
            **pools,
            first_token="decode",
            transfer=KVTransfer(bandwidth=bandwidth, kv_bytes_per_token=131072, polling=0.005),
            load_generator=rare,
        )
        requests = fleet.run().requests
        ttft.append(requests.first_token_at.values - requests.arrived_at.values)
    for slow, fast in pairwise(ttft):
        assert (fast <= slow).all()
    assert (ttft[-1] < ttft[0]).all()


def test_no_link_moves_more_than_its_bandwidth():
    burst = sim.BatchLoadGenerator(initial_batch=8, prompt_tokens=1000, output_tokens=2)
    transfer = KVTransfer(bandwidth=1e9, kv_bytes_per_token=131072)
    pools = {"prefill": sim.Pool(workers=4, **POOL), "decode": sim.Pool(**POOL | {"kv_cache": None})}
    run = sim.DisaggregatedEngine(**pools, first_token="decode", transfer=transfer, load_generator=burst).run()
    # All pass the one link into the worker that decodes, and none leaves before its prompt is computed.
    spent = 8 * 1000 * 131072 / 1e9
    prefills = run.steps.isel(step=run.steps.prefilling.values > 0)
    begun = float((prefills.time + prefills.duration).min())
    last = float(run.steps.time.max())
    assert last - begun >= spent
    assert last - begun == pytest.approx(spent, rel=0.02)


def test_what_waits_behind_a_full_worker_goes_to_others():
    # The second waits for the larger worker, the third behind it for any; both are there when the first one has gone.
    small, large = (sim.Pool(**POOL | {"max_batch_size": 1, "max_model_len": longest}) for longest in (100, 2000))
    fleet = sim.DisaggregatedEngine(
        prefill=(small, large),
        decode=sim.Pool(**POOL),
        load_generator=sim.TraceLoadGenerator(prompt_tokens=[500, 500, 50], output_tokens=[2, 2, 2]),
    )
    requests = fleet.run().requests
    assert requests.completed_at.notnull().all()
    assert requests.started_at.values[1] == requests.started_at.values[2] > 0


def test_the_queue_of_a_fleet_is_that_of_all_its_workers_and_all_of_it_is_drawn():
    load = sim.BatchLoadGenerator(initial_batch=60, prompt_tokens=50, output_tokens=20)
    run = sim.Cluster(pool=sim.Pool(workers=3, **POOL), load_generator=load).run()
    time, queue = queue_over_time(run)
    assert (np.diff(time) >= 0).all()
    assert queue.max() == 60 - 3 * 8 > run.metrics.max_queue
    axis = next(axis for axis in run.plot().axes if axis.get_ylabel().startswith("queue"))
    assert axis.get_ylim()[1] > queue.max()


@pytest.mark.parametrize("router", [None, sim.RoundRobinRouter()])
@pytest.mark.parametrize("scaling", [None, sim.Schedule(changes=((100.0, "prefill", 1),))])
def test_the_final_queue_has_each_request_once_wherever_it_waits(router, scaling):
    pool = sim.Pool(**POOL | {"max_batch_size": 2, "kv_cache": None})
    load = sim.BatchLoadGenerator(initial_batch=30, prompt_tokens=500, output_tokens=50)
    fleet = sim.DisaggregatedEngine(
        prefill=pool, decode=pool, prefill_router=router, load_generator=load, scaling=scaling
    )
    run = fleet.run(0.3)
    decodes = int(run.steps.worker.max())
    waiting = int(run.steps.queue_size.values[run.steps.worker.values == decodes][-1])
    assert waiting > 0
    not_started = int(run.requests.started_at.isnull().sum())
    assert int(run.metrics.final_queue) == not_started + waiting < 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sim.Pool(workers=0, **POOL), "workers must be >= 1, got 0"),
        (lambda: sim.Cluster(pool=(), load_generator=LOAD), "pool must have a worker, got none"),
        (
            lambda: sim.Cluster(pool=sim.Pool(step_time=sim.TickStepTime()), load_generator=LOAD),
            "prompt_tokens must be left out where step_time is TickStepTime",
        ),
    ],
)
def test_what_is_no_fleet_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("workers", "load"), [(1, 0.7), (4, 0.8), (16, 0.9)])
def test_one_queue_for_prefill_is_an_m_m_c(workers, load):
    service = 1.0  # second, exponential
    offered = load * workers
    tokens = np.ceil(-10_000 * np.log1p(-(np.arange(20_000) + 0.5) / 20_000)).astype(int)
    engine = sim.DisaggregatedEngine(
        prefill=sim.Pool(
            workers=workers,
            max_batch_size=1,
            step_time=sim.LinearStepTime(base=1e-9, per_prefill_token=service / 10_000),
            batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=2**20),
        ),
        decode=sim.Pool(max_batch_size=1, step_time=sim.LinearStepTime(base=1e-9)),
        load_generator=sim.PoissonLoadGenerator(
            request_rate=offered / service, requests=40_000, prompt_tokens=sim.Empirical(values=tokens), output_tokens=1
        ),
    )
    data = sim.sweep(engine, seed=range(8), time_limit=np.inf)
    times = data.e2e.sel(stat="mean").values
    # Erlang's C: the share of requests that wait (Kleinrock, Queueing Systems I, section 3.5)
    last = offered**workers / factorial(workers) / (1 - load)
    waits = last / (sum(offered**k / factorial(k) for k in range(workers)) + last)
    expected = service + waits * service / (workers - offered)
    error = times.std(ddof=1) / np.sqrt(times.size)
    assert abs(times.mean() - expected) < 3.5 * error + 1e-3
