"""Tiers below the caches of a fleet's workers: a literal oracle, and what can be told by hand."""

import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import tier_oracle
import token_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fleet_against_oracle import a_fleet, a_pool, check_against, column, draws, those_that_came
from test_token import a_trace, some_conversations, turns_of

import vecsim as sim
from vecsim.control_plane import ControlPlane


def a_tiered_pool(rng, block_size, orders, roomy):
    """`a_pool`, with tiers below most caches."""
    pool, literal = a_pool(rng, block_size, orders, roomy)
    while not literal.prefix_caching and rng.random() < 0.8:
        pool, literal = a_pool(rng, block_size, orders, roomy)
    declared = tiers = None
    if literal.prefix_caching and rng.random() < 0.9:
        size = rng.choice([1.0, 2.0])
        host = rng.choice([1, 3, rng.randint(5, 60), 1000])
        declared = sim.CacheTiers(
            host_blocks=host,
            disk_blocks=rng.choice([0, 2, rng.randint(5, 60), 1000]),
            host_bandwidth=rng.choice([np.inf, 0.25, 1.0, 8.0, 100.0]),
            disk_bandwidth=rng.choice([np.inf, 0.5, 4.0, 50.0]),
            kv_bytes_per_token=size,
            offload_batch=rng.choice([1, 2, 16]),
            offloads_in_flight=rng.choice([1, 2, 4]),
            disk_after=rng.choice([1, 2, 3]),
        )
        tiers = tier_oracle.Tiers(
            declared.host_blocks,
            declared.disk_blocks,
            declared.host_bandwidth,
            declared.disk_bandwidth,
            size * literal.block_size,
            declared.offload_batch,
            declared.offloads_in_flight,
            declared.disk_after,
        )
        pool = msgspec.structs.replace(pool, kv_cache=msgspec.structs.replace(pool.kv_cache, tiers=declared))
    return pool, tier_oracle.TieredWorkers(**vars(literal), tiers=tiers)


def a_crowded_pool(rng, block_size, orders, roomy):
    """`a_tiered_pool` with few slots, and memory for one to three of the longest requests of `a_crowd`."""
    pool, literal = a_tiered_pool(rng, block_size, orders, roomy)
    while literal.tiers is None or literal.tiers.host_blocks < 5:
        pool, literal = a_tiered_pool(rng, block_size, orders, roomy)
    longest = -(-72 // block_size)
    reserved = getattr(pool.batcher, "reserve_tokens", None) or 0
    blocks = max(rng.randint(longest, 3 * longest), -(-reserved // block_size))
    slots = min(literal.slots, rng.choice([1, 2, 2, 3, 6]))
    memory = msgspec.structs.replace(pool.kv_cache, blocks=blocks)
    return (
        msgspec.structs.replace(pool, max_batch_size=slots, kv_cache=memory),
        replace(literal, slots=slots, blocks=blocks),
    )


def check_tiers(run, result, all_that_came=False):
    """What `check_against` has, and what came up for each request, when, and what each tier did."""
    check_against(run, result, all_that_came)
    tiered = [worker for worker in result.workers if worker.declared is not None]
    if not tiered:
        assert "onboarding_time" not in run.requests
        return
    came = those_that_came(result, all_that_came)
    rose = [getattr(request, "rose_tokens", (0, 0)) for request in came]
    for name, literal in (
        ("host_hit_tokens", [host for host, _ in rose]),
        ("disk_hit_tokens", [disk for _, disk in rose]),
        ("onboarding_began_at", column(getattr(request, "rise_began_at", None) for request in came)),
        ("onboarding_ended_at", column(getattr(request, "rise_ended_at", None) for request in came)),
    ):
        np.testing.assert_array_equal(run.requests[name].values, literal, err_msg=name)
    for worker in tiered:
        for number, tier in enumerate(worker.tiers):
            ours = run.tiers.isel(worker=worker.number, tier=number)
            assert int(ours.blocks) == len(tier.held)
            assert (int(ours.came), int(ours.went), int(ours.dropped)) == (tier.came, tier.went, tier.dropped)
    parts = run.ttft_parts
    ttft = run.requests.first_token_at - run.requests.arrived_at
    np.testing.assert_array_equal(parts.sum("part", skipna=False).values, ttft.values)
    assert not (parts < 0).any()


def a_crowd(rng):
    """Times of arrival of requests that come many at a time."""
    apart, lasts = rng.choice([100, 500, 2000]), rng.choice([0, 5, 30, 200])
    return [apart * i + rng.randint(0, lasts) for i in range(rng.randint(3, 8)) for _ in range(rng.randint(2, 10))]


def a_recurring_trace(rng, block_size, times=None, least=0):
    """(the oracle's requests, the load) of prompts that come again and again, after others have needed the memory."""
    groups = [[(group, i) for i in range(60)] for group in range(rng.randint(2, 6))]
    latest = rng.choice([200, 1000, 3000])
    requests = []
    for arrived_at in sorted(times or [rng.randint(0, latest) for _ in range(rng.randint(5, 40))]):
        blocks = rng.randint(least // block_size, 60 // block_size)
        prompt = blocks * block_size + rng.randint(1, block_size)
        ids = rng.choice(groups)[:blocks] if rng.random() < 0.9 else []
        requests.append(token_oracle.Request(float(arrived_at), prompt, rng.randint(1, 12), ids))
    numbers = {id_: i for i, id_ in enumerate(dict.fromkeys(id_ for each in requests for id_ in each.ids))}
    load = sim.TraceLoadGenerator(
        arrived_at=[each.arrived_at for each in requests],
        prompt_tokens=[each.prompt_tokens for each in requests],
        output_tokens=[each.output_tokens for each in requests],
        block_ids=[[numbers[id_] for id_ in each.ids] for each in requests],
        id_block_tokens=block_size,
    )
    return requests, load


def check_trace(seed, apart):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    requests, load = (a_recurring_trace if rng.random() < 0.8 else a_trace)(rng, block_size)
    orders = ["fcfs", *token_oracle.ORDERS]
    fleet, literal, overheads = a_fleet(rng, apart, load, block_size, orders, make=a_tiered_pool)
    limit = rng.choice([None, None, 150.0, 1000.0])
    result = tier_oracle.simulate(requests, literal, overheads=overheads, time_limit=limit or np.inf, draw=draws(load))
    check_tiers(fleet.run(limit), result)


def check_crowd(seed, apart):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    requests, load = a_recurring_trace(rng, block_size, a_crowd(rng), rng.choice([0, 20, 40]))
    orders = ["fcfs", "fcfs", *token_oracle.ORDERS]
    fleet, literal, overheads = a_fleet(rng, apart, load, block_size, orders, make=a_crowded_pool)
    limit = rng.choice([None, None, 1000.0])
    result = tier_oracle.simulate(requests, literal, overheads=overheads, time_limit=limit or np.inf, draw=draws(load))
    assert limit or not result.stuck
    check_tiers(fleet.run(limit), result)


def check_talks(seed, apart):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 5])
    load = some_conversations(rng, seed, [0.0, 3.0, 40.0])
    orders = ["fcfs", "shortest_prompt"]
    fleet, literal, overheads = a_fleet(rng, apart, load, block_size, orders, make=a_tiered_pool)
    limit = rng.choice([None, None, 150.0])
    result = tier_oracle.simulate(
        turns_of(load, block_size), literal, overheads=overheads, time_limit=limit or np.inf, draw=draws(load)
    )
    check_tiers(fleet.run(limit), result)


CHECKS = {"trace": check_trace, "crowd": check_crowd, "talks": check_talks}


@pytest.mark.parametrize("load", CHECKS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_event_of_a_cluster_with_tiers_is_that_of_the_oracle(load, seed):
    CHECKS[load](seed, apart=False)


@pytest.mark.parametrize("load", CHECKS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_event_with_tiers_where_prefill_is_kept_apart_is_that_of_the_oracle(load, seed):
    CHECKS[load](seed, apart=True)


BASE, PER_TOKEN, BYTES = 1e-3, 1e-3, 1e6
BLOCK = 16


def a_cluster(requests, tiers, blocks=20, workers=1, **fields):
    """Requests (at, ids of the prompt's blocks), each with one token more than these, that each yield three tokens."""
    load = sim.TraceLoadGenerator(
        arrived_at=[at for at, _ in requests],
        prompt_tokens=[BLOCK * len(ids) + 1 for _, ids in requests],
        output_tokens=[3] * len(requests),
        block_ids=[list(ids) for _, ids in requests],
        id_block_tokens=BLOCK,
    )
    pool = sim.Pool(
        workers=workers,
        max_batch_size=8,
        batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=2**16),
        step_time=sim.LinearStepTime(base=BASE, per_prefill_token=PER_TOKEN),
        kv_cache=sim.KVCache(blocks=blocks, block_size=BLOCK, prefix_caching=True, tiers=tiers),
    )
    return sim.Cluster(pool=pool, load_generator=load, **fields)


def tiers(host=1000, **fields):
    return sim.CacheTiers(**{"host_blocks": host, "kv_bytes_per_token": BYTES, "host_bandwidth": 1e9} | fields)


def ttft(run):
    return (run.requests.first_token_at - run.requests.arrived_at).values


FIRST, OTHER, THIRD = range(8), range(100, 119), range(200, 208)


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_hit_below_takes_its_bytes_over_the_bandwidth_longer_than_one_above(tier):
    # Nothing is left of the first prompt in GPU memory after the second, which needs all of its 20 blocks
    requests = [(0.0, FIRST), (10.0, OTHER), (20.0, FIRST)]
    below = {"host": tiers(), "disk": tiers(8, disk_blocks=100, disk_bandwidth=0.5e9, disk_after=1)}[tier]
    above, without = a_cluster(requests, None, blocks=1000).run(), a_cluster(requests, None).run()
    run = a_cluster(requests, below).run()
    seconds = len(FIRST) * BLOCK * BYTES / {"host": 1e9, "disk": 0.5e9}[tier]
    assert ttft(run)[2] == pytest.approx(ttft(above)[2] + seconds, abs=1e-9)
    assert ttft(above)[2] < ttft(run)[2]
    assert without.requests.hit_tokens.values[2] == 0
    assert run.requests.hit_tokens.values[2] == above.requests.hit_tokens.values[2] == len(FIRST) * BLOCK
    assert run.requests[f"{tier}_hit_tokens"].values[2] == len(FIRST) * BLOCK
    share = len(FIRST) * BLOCK / float(run.requests.prompt_tokens.sum())
    assert float(run.metrics[f"{tier}_hit_rate"]) == pytest.approx(share)
    assert float(run.metrics.onboarding_time) == pytest.approx(seconds)
    np.testing.assert_allclose(run.ttft_parts.sel(part="onboarding").values, [0, 0, seconds], atol=1e-9)
    fast = a_cluster(requests, msgspec.structs.replace(below, host_bandwidth=np.inf, disk_bandwidth=np.inf)).run()
    np.testing.assert_allclose(ttft(fast), ttft(above), atol=1e-12)
    quick = a_cluster(requests, msgspec.structs.replace(below, host_bandwidth=14e9, disk_bandwidth=7e9)).run()
    assert ttft(above)[2] < ttft(quick)[2] < ttft(without)[2]


def test_requests_whose_blocks_come_up_at_the_same_time_share_the_link():
    requests = [(0.0, FIRST), (10.0, THIRD), (20.0, OTHER), (30.0, FIRST), (30.0, THIRD), (40.0, OTHER[:1])]
    run = a_cluster(requests, tiers()).run().requests
    alone = len(FIRST) * BLOCK * BYTES / 1e9
    np.testing.assert_allclose(run.onboarding_time.values[3:5], [2 * alone, 2 * alone])
    later = [(at + (0.5 * alone if ids == THIRD and at > 20 else 0.0), ids) for at, ids in requests]
    run = a_cluster(later, tiers()).run().requests
    np.testing.assert_allclose(run.onboarding_time.values[3:5], [1.5 * alone, 1.5 * alone])


def test_only_what_was_seen_twice_goes_to_the_disk():
    # The third needs 9 of 20 blocks, and so does away with 8 of those of the second: these come up again last
    requests = [(0.0, FIRST), (10.0, OTHER), (20.0, FIRST), (30.0, OTHER)]
    held = [int(a_cluster(requests[:n], tiers(disk_blocks=1000)).run(1000).tiers.blocks[0, 1]) for n in (1, 2, 3, 4)]
    assert held == [0, 0, 8, 16]
    once = a_cluster(requests, tiers(disk_blocks=1000, disk_after=1)).run(1000).tiers
    assert int(once.blocks[0, 1]) == 27
    often = a_cluster(requests, tiers(disk_blocks=1000, disk_after=3)).run(1000).tiers
    assert int(often.blocks[0, 1]) == 0


def test_blocks_go_down_in_batches_of_sixteen_of_which_four_move_at_a_time():
    ids = range(88)
    step = BASE + PER_TOKEN * (len(ids) * BLOCK + 1)
    one = BLOCK * BYTES / 1e9  # a block alone

    def held(seconds, **fields):
        cluster = a_cluster([(0.0, ids)], tiers(**fields), blocks=1000)
        return int(cluster.run(step + seconds).tiers.blocks[0, 0])

    by_one = [held(16 * one * i + 0.1 * one, offloads_in_flight=1) for i in range(7)]
    assert by_one == [0, 16, 32, 48, 64, 80, 88]
    # Four share the link; then the last two batches, of 16 and 8 blocks: these have come once each has moved 8
    ends = 64 * one + np.array([0.0, 16.0, 24.0]) * one
    assert [held(end - 0.1 * one) for end in ends] == [0, 64, 72]
    assert [held(end + 0.1 * one) for end in ends] == [64, 72, 88]
    assert held(64 * one + 0.1 * one, offload_batch=1000) == 0
    assert held(88 * one + 0.1 * one, offload_batch=1000) == 88


def test_where_gpu_memory_is_endless_tiers_change_nothing():
    load = sim.PoissonLoadGenerator(
        request_rate=4.0,
        requests=400,
        prompt_tokens=sim.Uniform(low=20, high=200),
        output_tokens=20,
        prefix=sim.SharedPrefix(tokens=128, groups=8),
        sessions=sim.Sessions(turns=3, think_time=5.0),
        seed=1,
    )
    pool = sim.Pool(workers=2, step_time=sim.LinearStepTime(base=5e-3, per_prefill_token=1e-4))

    def run(below):
        memory = sim.KVCache(prefix_caching=True, tiers=below)
        return sim.Cluster(pool=msgspec.structs.replace(pool, kv_cache=memory), load_generator=load).run(200)

    plain, tiered = run(None), run(tiers(host_bandwidth=14e9, disk_blocks=500))
    for name in plain.requests:
        np.testing.assert_array_equal(plain.requests[name], tiered.requests[name], err_msg=str(name))
    plain_steps, tiered_steps = (run.steps.sortby(["worker", "time"]) for run in (plain, tiered))
    for name in plain_steps:
        np.testing.assert_array_equal(plain_steps[name], tiered_steps[name], err_msg=str(name))
    for name in ("arrived", "completed", "final_queue", "steps", "prefix_hit_rate"):
        assert float(plain.metrics[name]) == float(tiered.metrics[name]), name
    assert float(tiered.metrics.host_hit_rate) == 0.0
    assert int(tiered.tiers.came.sum()) > 0


def test_a_request_is_brought_up_once_all_of_its_prompt_fits_beside_those_ahead_and_nobody_overtakes_it():
    # From 40 on 8 blocks come up for each of two, which need 9. The block of the third is gone from GPU memory by then:
    # it needs 13, and 20 - 2 x 9 are free. The last would find 2, and finds the third before it.
    requests = [(0.0, FIRST), (10.0, THIRD), (20.0, OTHER), (40.0, FIRST), (40.0, THIRD)]
    requests += [(40.1, [OTHER[10], *range(300, 311)]), (40.2, [400])]
    run = a_cluster(requests, tiers()).run().requests
    moved = 2 * len(FIRST) * BLOCK * BYTES / 1e9
    np.testing.assert_allclose(run.onboarding_ended_at.values[3:5], 40 + moved)
    left = 40 + moved + 3 * BASE + 2 * PER_TOKEN  # a token of each prompt is left to compute
    np.testing.assert_allclose(run.completed_at.values[3:5], left)
    assert run.onboarding_began_at.values[5] == run.started_at.values[6] == run.completed_at.values[3]
    assert run.host_hit_tokens.values[5] == BLOCK


def test_no_more_are_brought_up_than_there_are_slots():
    requests = [(0.0, FIRST), (10.0, THIRD), (20.0, OTHER), (40.0, FIRST), (40.0, THIRD)]
    cluster = a_cluster(requests, tiers())
    one = msgspec.structs.replace(cluster, pool=msgspec.structs.replace(cluster.pool, max_batch_size=1))
    both, alone = cluster.run().requests, one.run().requests
    assert both.onboarding_began_at.values[4] == both.onboarding_began_at.values[3] == 40.0
    assert alone.onboarding_began_at.values[4] == alone.completed_at.values[3] > 40.0


def test_a_worker_under_a_high_load_completes_no_less_with_lower_tiers():
    def completed(below):
        load = sim.PoissonLoadGenerator(
            request_rate=10.0,
            prompt_tokens=sim.LogNormal(mean=200, std=200),
            output_tokens=150,
            prefix=sim.SharedPrefix(tokens=4096, groups=500, exponent=0.8),
        )
        memory = sim.KVCache(blocks=4000, prefix_caching=True, tiers=below)
        step = sim.LinearStepTime(base=6e-3, per_request=6e-5, per_prefill_token=4e-5)
        pool = sim.Pool(workers=1, max_batch_size=64, step_time=step, kv_cache=memory)
        run = sim.Cluster(pool=pool, router=sim.RoundRobinRouter(), load_generator=load).run(200)
        return int(run.metrics.completed)

    below = tiers(kv_bytes_per_token=131_072.0, host_bandwidth=14e9)
    few, many = (msgspec.structs.replace(below, host_blocks=blocks) for blocks in (20_000, 200_000))
    assert completed(None) < completed(few) < completed(many)


def a_busy_cluster(**fields):
    load = sim.PoissonLoadGenerator(
        request_rate=8.0,
        requests=600,
        prompt_tokens=sim.Uniform(low=20, high=200),
        output_tokens=20,
        prefix=sim.SharedPrefix(tokens=1024, groups=40),
        seed=1,
    )
    pool = sim.Pool(
        workers=2,
        max_batch_size=16,
        step_time=sim.LinearStepTime(base=5e-3, per_prefill_token=1e-4),
        kv_cache=sim.KVCache(
            blocks=600, prefix_caching=True, tiers=tiers(kv_bytes_per_token=131_072.0, host_bandwidth=14e9)
        ),
    )
    return sim.Cluster(pool=pool, load_generator=load, **fields)


def test_the_hit_rate_grows_with_the_blocks_below():
    sizes = [0, 800, 1500, 3000]  # below 600 blocks of GPU memory
    ds = sim.sweep(a_busy_cluster(), host_blocks=sizes, seed=range(3), progress=False).mean("seed")
    assert ds.host_hit_rate.values[0] == 0.0
    assert (np.diff(ds.prefix_hit_rate.values) > 0).all()
    assert (np.diff(ds.host_hit_rate.values) > 0).all()
    assert ds.ttft.sel(stat="mean").values[-1] < ds.ttft.sel(stat="mean").values[0]
    assert ds.onboarding_time.attrs["units"] == "s"
    assert ds.host_blocks.attrs["units"] == "blocks"
    both = sim.sweep(a_busy_cluster(), host_blocks=200, disk_blocks=[0, 3000], disk_after=1, progress=False)
    assert both.disk_hit_rate.values[0] == 0.0 < both.disk_hit_rate.values[1]


def test_a_link_moves_no_more_than_its_bandwidth_and_a_tier_holds_no_more_than_its_blocks():
    run = a_busy_cluster().run()
    below = run.tiers
    assert (below.blocks.values <= [[1000, 0], [1000, 0]]).all()
    assert (below.moved.values <= below.bandwidth.values * below.busy.values * (1 + 1e-12)).all()
    up = below.moved.sel(tier="host", way="up").sum()
    assert float(up) == pytest.approx(float(run.requests.host_hit_tokens.sum()) * 131_072)
    down = below.moved.sel(tier="host", way="down").sum()
    assert float(down) == pytest.approx(float(below.came.sel(tier="host").sum()) * BLOCK * 131_072)


def test_a_router_counts_blocks_below_by_their_credit():
    # The first worker has the prompt in host memory alone; the second has begun another
    load = [(0.0, FIRST), (1.0, FIRST), (10.0, OTHER), (10.0, OTHER)]

    def worker_of(credit, latency=0.0, at=30.0):
        router = sim.KVAwareRouter(host_credit=credit, event_latency=latency)
        requests = [*load, (at, range(300, 306)), (at, FIRST)]
        run = a_cluster(requests, tiers(), workers=2, router=router).run().requests
        assert run.worker.values[0] == run.worker.values[1]
        assert sorted(run.worker.values[2:4]) == [0, 1]
        return run.worker.values[5] == run.worker.values[0], run.worker.values[4] == run.worker.values[0]

    for seed_like in (30.0, 31.0, 32.0, 33.0):
        here, busy = worker_of(0.75, at=seed_like)
        # 9 - 0.75 x 8 blocks to compute there: it goes there unless 7 + 7 more are being done there
        assert here != busy
    outcomes = {worker_of(0.75, latency=1e6, at=at) for at in (30.0, 31.0, 32.0, 33.0)}
    assert all(here != busy for here, busy in outcomes)
    aware = a_busy_cluster(router=sim.KVAwareRouter()).run().metrics
    blind = a_busy_cluster(router=sim.KVAwareRouter(host_credit=0.0, disk_credit=0.0)).run().metrics
    assert float(aware.prefix_hit_rate) > float(blind.prefix_hit_rate)


def test_what_a_router_learns_late_it_doesnt_know_before():
    router = sim.KVAwareRouter(event_latency=5.0)
    requests = [(0.0, FIRST), (0.5, OTHER), (0.5, OTHER), (9.0, FIRST)]
    known = [a_cluster([*requests[:3], (at, FIRST)], tiers(), workers=2, router=router).run() for at in (9.0, 9.5)]
    for run in known:
        assert run.requests.worker.values[3] == run.requests.worker.values[0]
        assert run.requests.host_hit_tokens.values[3] == 8 * BLOCK


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sim.CacheTiers(host_blocks=-1), "host_blocks must be"),
        (lambda: sim.CacheTiers(host_blocks=10), "kv_bytes_per_token must be given where host_bandwidth is finite"),
        (
            lambda: sim.CacheTiers(host_blocks=10, host_bandwidth=np.inf, disk_blocks=3),
            "kv_bytes_per_token must be given where disk_bandwidth is finite",
        ),
        (lambda: tiers(0, disk_blocks=5), "host_blocks must be > 0 where disk_blocks is"),
        (lambda: tiers(offload_batch=0), "offload_batch must be"),
        (lambda: tiers(offloads_in_flight=0), "offloads_in_flight must be"),
        (lambda: tiers(disk_after=0), "disk_after must be"),
        (lambda: tiers(host_bandwidth=0.0), "host_bandwidth must be"),
        (lambda: tiers(kv_bytes_per_token=0.0), "kv_bytes_per_token must be"),
        (lambda: sim.KVCache(tiers=tiers()), "prefix_caching must be true where there are tiers"),
        (lambda: sim.KVAwareRouter(host_credit=1.5), "host_credit must be"),
        (
            lambda: sim.Engine(
                load_generator=sim.PoissonLoadGenerator(prompt_tokens=5, output_tokens=5, requests=3),
                step_time=sim.LinearStepTime(base=1),
                batcher=sim.TokenBudgetBatcher(),
                kv_cache=sim.KVCache(prefix_caching=True, tiers=tiers()),
            ),
            "kv_cache.tiers are there for the workers of fleets",
        ),
        (lambda: a_cluster([(0.0, FIRST)], None).run().tiers, "tiers are there for fleets whose kv_cache has tiers"),
    ],
)
def test_what_cant_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_declaration_with_tiers_is_read_back():
    cluster = a_busy_cluster(router=sim.KVAwareRouter(host_credit=0.5))
    assert sim.Cluster.from_toml(cluster.to_toml()) == cluster
    assert sim.sweep(cluster, offload_batch=[1, 16], time_limit=5, progress=False).sizes["offload_batch"] == 2


def test_a_worker_that_crashes_has_lost_what_was_below():
    requests = [(0.0, FIRST), (10.0, OTHER), (50.0, FIRST), (60.0, OTHER), (90.0, FIRST)]
    plane = ControlPlane(crashes=((20.0, 0),), ttl=2.0, renewal=1.0)
    run = a_cluster(requests, tiers(), control_plane=plane).run(200).requests
    assert run.host_hit_tokens.values.tolist() == [0, 0, 0, 0, 8 * BLOCK]
    # A crash while blocks come up: the request goes elsewhere, or comes again, and all ends
    slow = tiers(host_bandwidth=1e7)
    requests = [(0.0, FIRST), (20.0, OTHER), (60.0, FIRST), (61.0, FIRST)]
    for limit in (0, 3):
        plane = ControlPlane(crashes=((65.0, 0),), ttl=2.0, renewal=1.0, migration_limit=limit)
        run = a_cluster(requests, slow, control_plane=plane).run(500)
        assert int(run.metrics.completed) == (4 if limit else 2)
        assert int(run.metrics.final_queue) == 0
        assert np.isnan(run.requests.onboarding_time.values).all()
