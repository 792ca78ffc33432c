"""Routers that look at what workers have cached, and routers of one's own."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim import routing

STEP = sim.LinearStepTime(base=5e-3, per_prefill_token=1e-4)


def cluster(load, router, workers=3, blocks=None, **fields):
    cache = sim.KVCache(block_size=16, blocks=blocks, prefix_caching=True)
    pool = sim.Pool(workers=workers, max_batch_size=4, step_time=STEP, kv_cache=cache, **fields)
    return sim.Cluster(pool=pool, router=router, load_generator=load)


@st.composite
def spaced(draw):
    """Requests so far apart that each finds all workers idle; prompts that share what they begin with."""
    requests = []
    for i in range(draw(st.integers(5, 25))):
        ids = [0] if draw(st.booleans()) else []
        branch = draw(st.integers(1, 4))
        ids += [100 * branch + depth for depth in range(draw(st.integers(1, 6)))]
        requests.append((10.0 * i, ids))
    return requests


def hit(known, ids):
    """Blocks that a prompt begins with and that are known; its last one is computed in any case."""
    found = 0
    while found < len(ids) - 1 and ids[found] in known:
        found += 1
    return found


@given(requests=spaced(), latency=st.sampled_from([0.0, 5.0, 15.0, 35.0]), gen=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_the_worker_is_one_that_is_known_to_have_most_of_the_prompt(requests, latency, gen):
    load = sim.TraceLoadGenerator(
        arrived_at=[at for at, _ in requests],
        prompt_tokens=[16 * len(ids) for _, ids in requests],
        output_tokens=[2] * len(requests),
        block_ids=[ids for _, ids in requests],
        id_block_tokens=16,
    )
    kind = routing.KVAwareRouter if gen == 2 else routing.OverlapRouter
    run = cluster(load, kind(event_latency=latency)).run()
    served = [(at, ids, int(worker)) for (at, ids), worker in zip(requests, run.requests.worker.values, strict=True)]
    for i, (at, ids, worker) in enumerate(served):
        cached = [{id_ for _, past, there in served[:i] if there == w for id_ in past} for w in range(3)]
        # Each is served within a second
        known = [
            {id_ for then, past, there in served[:i] if there == w and then + latency < at for id_ in past}
            for w in range(3)
        ]
        hits = [hit(blocks, ids) for blocks in known]
        assert hits[worker] == max(hits)
        assert run.requests.hit_tokens.values[i] == 16 * hit(cached[worker], ids)


def test_of_equal_workers_each_is_chosen_as_often():
    load = sim.PoissonLoadGenerator(request_rate=0.01, requests=3000, prompt_tokens=20, output_tokens=2)
    run = cluster(load, routing.KVAwareRouter()).run()
    assert np.bincount(run.requests.worker.values) == pytest.approx([1000, 1000, 1000], abs=100)


def test_a_temperature_gives_the_weights_of_a_softmax():
    # The worker that has it all costs 0, the others 1 once the costs are scaled
    load = sim.TraceLoadGenerator(
        arrived_at=10.0 * np.arange(3000),
        prompt_tokens=[65] * 3000,
        output_tokens=[2] * 3000,
        block_ids=[[i // 2] for i in range(3000)],
        id_block_tokens=64,
    )
    run = cluster(load, routing.KVAwareRouter(temperature=0.5)).run()
    worker = run.requests.worker.values
    again = np.mean(worker[1::2] == worker[::2])
    assert again == pytest.approx(1 / (1 + 2 * np.exp(-2)), abs=0.03)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_where_prefill_is_apart_each_router_looks_at_its_own_part(name):
    load = sim.PoissonLoadGenerator(
        request_rate=20.0,
        requests=400,
        prompt_tokens=160,
        output_tokens=20,
        prefix=sim.SharedPrefix(tokens=128, groups=8),
    )
    pool = sim.Pool(
        workers=4, max_batch_size=8, step_time=STEP, kv_cache=sim.KVCache(block_size=16, blocks=60, prefix_caching=True)
    )

    def hit_rate(router, prefill_router):
        engine = sim.DisaggregatedEngine(
            prefill=pool, decode=pool, router=router, prefill_router=prefill_router, load_generator=load
        )
        return float(engine.run().metrics.prefix_hit_rate)

    plain = hit_rate(sim.RoundRobinRouter(), sim.RoundRobinRouter())
    if name == "prefill":
        assert hit_rate(sim.RoundRobinRouter(), routing.KVAwareRouter()) > 1.1 * plain
    else:
        aware = hit_rate(routing.KVAwareRouter(), sim.RoundRobinRouter())
        blind = hit_rate(routing.KVAwareRouter(overlap_credit=0.0), sim.RoundRobinRouter())
        assert aware == blind


@numba.njit
def fewest(view):
    best = -1
    for worker in range(view.able.size):
        if view.able[worker] and (best < 0 or view.outstanding[worker] < view.outstanding[best]):
            best = worker
    return best


@numba.njit
def nowhere(view):
    return view.able.size


def test_a_router_of_ones_own_does_what_it_says():
    load = sim.PoissonLoadGenerator(
        request_rate=30.0,
        requests=500,
        prompt_tokens=sim.LogNormal(mean=200, std=200),
        output_tokens=sim.LogNormal(mean=30, std=30),
    )
    own, same, first = (
        cluster(load, router).run()
        for router in (routing.CustomRouter(rule=fewest), sim.LeastOutstandingRouter(), nowhere)
    )
    views = ["expected_hit_tokens", "view_age"]
    assert own.requests.drop_vars(views).identical(same.requests.assign_attrs(own.requests.attrs))
    assert (first.requests.worker == 0).all()


def of_two_sizes(router):
    pools = [sim.Pool(workers=1, step_time=STEP, kv_cache=sim.KVCache(block_size=size)) for size in (16, 32)]
    load = sim.PoissonLoadGenerator(request_rate=1.0, requests=5, prompt_tokens=20, output_tokens=2)
    return sim.Cluster(pool=pools, router=router, load_generator=load)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: routing.KVAwareRouter(temperature=-1), r"temperature must be .*>= 0.*got -1"),
        (lambda: routing.KVAwareRouter(event_latency=-1), r"event_latency must be .*got -1"),
        (lambda: routing.KVAwareRouter(overlap_credit=float("nan")), r"overlap_credit must be .*got nan"),
        (lambda: routing.CustomRouter(rule=len), r"rule must be compiled with numba\.njit"),
        (lambda: routing.CustomRouter(rule=numba.njit(lambda view: view.idle)), r"a router's view: .*idle.*able"),
        (lambda: routing.CustomRouter(rule=numba.njit(lambda view: 0.5)), "must return a whole number"),
        (
            lambda: of_two_sizes(routing.KVAwareRouter()),
            r"block_size must be the same .* KVAwareRouter.*got \[16, 32\]",
        ),
        (
            lambda: of_two_sizes(routing.OverlapRouter()),
            r"block_size must be the same .* OverlapRouter.*got \[16, 32\]",
        ),
    ],
)
def test_routers_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.data
def test_a_router_that_knows_what_is_cached_hits_more_of_mooncakes_conversations(data_folder):
    trace = data_folder / "data" / "traces" / "mooncake_conversation.jsonl"
    load = sim.read_trace(trace, "mooncake", requests=2000)
    for blocks, gain in ((20_000, 1.0), (100_000, 1.2)):
        rates = [
            float(cluster(load, router, workers=4, blocks=blocks).run().metrics.prefix_hit_rate)
            for router in (sim.RoundRobinRouter(), routing.KVAwareRouter())
        ]
        assert rates[1] > gain * rates[0]


def served_one_by_one(arrived_at, prompt_tokens, first_ids, latency):
    """One worker of 40 blocks, a request at a time; prompts are those that begin with a block of the same id."""
    counts = [tokens // 16 for tokens in prompt_tokens]
    load = sim.TraceLoadGenerator(
        arrived_at=arrived_at,
        prompt_tokens=prompt_tokens,
        output_tokens=[1] * len(arrived_at),
        block_ids=[first + i for first, count in zip(first_ids, counts, strict=True) for i in range(count)],
        block_counts=counts,
        id_block_tokens=16,
    )
    pool = sim.Pool(
        max_batch_size=8,
        step_time=sim.LinearStepTime(base=0.01),
        kv_cache=sim.KVCache(blocks=40, prefix_caching=True),
    )
    return sim.Cluster(pool=pool, router=sim.KVAwareRouter(event_latency=latency), load_generator=load).run()


def test_a_router_that_is_told_at_once_expects_what_is_found():
    run = served_one_by_one([0.0, 1.0, 2.0, 3.0], [512, 320, 512, 320], [0, 100, 0, 100], latency=0.0)
    assert run.requests.expected_hit_tokens.values.tolist() == run.requests.hit_tokens.values.tolist()
    assert run.requests.hit_tokens.values[2:].max() > 0
    assert (run.requests.view_age == 0).all()
    assert run.metrics.missed_hit_rate == 0
    assert run.metrics.expected_hit_rate == run.metrics.prefix_hit_rate > 0


def test_the_view_of_a_router_is_as_old_as_the_first_change_that_it_does_not_know():
    # Each request's step changes the cache; 2.5 s later the router knows
    run = served_one_by_one([float(i) for i in range(6)], [64] * 6, range(0, 600, 100), latency=2.5)
    np.testing.assert_allclose(run.requests.view_age, [0, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(run.metrics.view_age, 9 / 6)


def test_blocks_that_went_without_the_router_knowing_are_missed():
    run = served_one_by_one([0.0, 6.0, 8.0], [512, 624, 512], [0, 100, 0], latency=5.0)
    expected, found = (run.requests[name].values for name in ("expected_hit_tokens", "hit_tokens"))
    assert expected.tolist() == [0, 0, 31 * 16]  # the last block is always computed
    assert found[2] < 31 * 16
    np.testing.assert_allclose(run.metrics.missed_hit_rate, (31 * 16 - found[2]) / (512 + 624 + 512))


def test_only_routers_that_go_by_caches_have_a_view_of_them():
    pool = sim.Pool(
        workers=2, step_time=sim.LinearStepTime(base=0.01), kv_cache=sim.KVCache(blocks=400, prefix_caching=True)
    )
    load = sim.PoissonLoadGenerator(
        request_rate=20, requests=100, prompt_tokens=50, output_tokens=5, prefix=sim.SharedPrefix(tokens=160, groups=4)
    )
    cluster = sim.Cluster(pool=pool, load_generator=load)
    routers = [sim.RoundRobinRouter(), sim.KVAwareRouter(event_latency=0.2), sim.OverlapRouter()]
    ds = sim.sweep(cluster, router=routers, seed=range(2), progress=False)
    for name in ("expected_hit_rate", "missed_hit_rate", "view_age"):
        assert ds[name].isel(router=0).isnull().all()
        assert (ds[name].isel(router=slice(1, 3)) >= 0).all()
    assert (ds.view_age.isel(router=1) > ds.view_age.isel(router=2)).all()
    assert "view_age" not in cluster.run().metrics
