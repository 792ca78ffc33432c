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
    assert own.requests.identical(same.requests.assign_attrs(own.requests.attrs))
    assert (first.requests.worker == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: routing.KVAwareRouter(temperature=-1), r"temperature must be .*>= 0.*got -1"),
        (lambda: routing.KVAwareRouter(event_latency=-1), r"event_latency must be .*got -1"),
        (lambda: routing.KVAwareRouter(overlap_credit=float("nan")), r"overlap_credit must be .*got nan"),
        (lambda: routing.CustomRouter(rule=len), r"rule must be compiled with numba\.njit"),
        (lambda: routing.CustomRouter(rule=numba.njit(lambda view: view.idle)), r"a router's view: .*idle.*able"),
        (lambda: routing.CustomRouter(rule=numba.njit(lambda view: 0.5)), "must return a whole number"),
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
