"""Laws of fleets with a planner, lower tiers of caches, crashes and slow messages at once, on random scenarios."""

import math
import random

import msgspec
import numpy as np
import pytest

import vecsim as sim

STEP = sim.LinearStepTime(base=6e-3, per_request=6e-5, per_prefill_token=4e-5)


def some_planner(rng):
    often = rng.uniform(1, 6)
    return rng.choice(
        [
            sim.Schedule(changes=((rng.uniform(0, 5), "decode", rng.randint(1, 4)), (12.0, "decode", 2))),
            sim.LoadPlanner(interval=often, sample_interval=often / 4, max_gpus=6),
            sim.ThroughputPlanner(interval=often, kv_low=0.2, kv_high=0.5, max_gpus=6),
            sim.ReactivePlanner(interval=often, ttft=0.3, itl=0.03, max_gpus=6),
            sim.SLAPlanner(interval=often, profile=STEP, max_gpus=6),
            sim.ReactivePlanner(
                interval=often, max_gpus=6, floor=sim.SLAPlanner(interval=2.5 * often, profile=STEP, max_gpus=4)
            ),
        ]
    )


def some_load(rng):
    fields = {
        "prompt_tokens": sim.Uniform(low=1, high=400),
        "output_tokens": sim.LogNormal(mean=50, std=50),
        "prefix": sim.SharedPrefix(tokens=rng.choice([32, 256]), groups=rng.randint(1, 20)),
        "seed": rng.randrange(1000),
    }
    requests = rng.randint(20, 150)
    kind = rng.randrange(4)
    if kind == 0:
        return sim.ConcurrentLoadGenerator(target_concurrency=rng.randint(1, 40), **fields)
    if kind == 1:
        sessions = sim.Sessions(turns=rng.randint(1, 4), think_time=rng.choice([0.0, 1.0]))
        return sim.PoissonLoadGenerator(
            request_rate=rng.uniform(1, 6), requests=requests // 3, sessions=sessions, **fields
        )
    if kind == 2:
        return sim.BatchLoadGenerator(initial_batch=requests // 2, **fields)
    return sim.PiecewiseLoadGenerator(request_rates=(2, 15), durations=(4, 4), repeat=True, requests=requests, **fields)


def some_pool(rng):
    host = rng.randint(1, 200)
    tiers = sim.CacheTiers(
        host_blocks=host,
        disk_blocks=rng.choice([0, 300]),
        host_bandwidth=rng.choice([1e8, 14e9]),
        disk_bandwidth=rng.choice([5e7, 7e9]),
        kv_bytes_per_token=131_072,
        offload_batch=rng.choice([1, 16]),
        offloads_in_flight=rng.choice([1, 4]),
    )
    return sim.Pool(
        workers=rng.randint(1, 4),
        max_batch_size=rng.choice([2, 8, 32]),
        batcher=rng.choice([sim.TokenBudgetBatcher(), sim.PrefillFirstBatcher(), sim.SGLangBatcher()]),
        step_time=STEP,
        kv_cache=sim.KVCache(blocks=rng.randint(60, 500), prefix_caching=True, tiers=tiers),
        start_up_time=rng.choice([0.0, 1.0, 4.0]),
        gpus=rng.choice([1, 2]),
    )


def some_fleet(rng):
    """(a cluster that changes in all ways, a time limit or none, a warm-up or 0)."""
    pool = some_pool(rng)
    ttl = rng.uniform(0, 6)
    plane = sim.ControlPlane(
        request_plane=rng.choice([0.0, 0.0, 0.05]),
        watch=rng.choice([0.0, 0.5]),
        ttl=ttl,
        renewal=ttl * rng.random(),
        connect_timeout=rng.choice([0.0, 0.05, 1.0]),
        break_delay=rng.choice([0.0, 0.2]),
        migration_limit=rng.randint(0, 3),
        mtbf=rng.choice([math.inf, 5.0, 15.0]),
        crashes=tuple(sorted((rng.uniform(0, 15), 0) for _ in range(rng.randint(0, 3)))),
        restarts=rng.random() < 0.8,
        outages=rng.choice([(), ((rng.uniform(1, 12), rng.uniform(0.5, 15)),)]),
    )
    load = some_load(rng)
    router = rng.choice([sim.LeastOutstandingRouter(), sim.KVAwareRouter(event_latency=0.1), sim.OverlapRouter()])
    fleet = sim.Cluster(
        pool=pool,
        router=router,
        load_generator=load,
        scaling=some_planner(rng),
        control_plane=plane,
        slo=sim.SLO(ttft=1.0),
    )
    closed = isinstance(load, sim.ConcurrentLoadGenerator)
    return fleet, 20.0 if closed or rng.random() < 0.3 else None, rng.choice([0.0, rng.uniform(1, 5)])


def some_fleet_apart(rng):
    """The same where prefill is apart."""
    cluster, limit, warmup = some_fleet(rng)
    queued = rng.random() < 0.5
    transfer = sim.KVTransfer(
        bandwidth=rng.choice([1e8, 5e9]),
        kv_bytes_per_token=131_072,
        latency=rng.choice([0.0, 0.01]),
        merges_blocks=rng.random() < 0.3,
        polling=rng.choice([0.0, 0.02]),
    )
    plane = cluster.control_plane
    if queued:
        plane = msgspec.structs.replace(plane, queue_push=rng.choice([0.0, 0.01]), queue_pop=rng.choice([0.0, 0.01]))
    prefill = some_pool(rng)
    cache = msgspec.structs.replace(cluster.pools[0].kv_cache, blocks=rng.randint(80, 500))
    fleet = sim.DisaggregatedEngine(
        prefill=prefill,
        decode=msgspec.structs.replace(cluster.pools[0], kv_cache=cache),
        prefill_router=None if queued else rng.choice([sim.KVAwareRouter(), sim.RoundRobinRouter()]),
        router=cluster.router,
        reserve=rng.choice(["arrival", "prefill"]),
        first_token=rng.choice(["prefill", "decode"]),
        local_prefill=rng.choice([None, sim.QueueAndLengthRule(max_local_prefill_length=50)]),
        transfer=rng.choice([None, transfer]),
        load_generator=cluster.load_generator,
        scaling=cluster.scaling,
        control_plane=plane,
        slo=cluster.slo,
    )
    return fleet, limit, warmup


def test_every_request_has_one_fate_and_metrics_after_the_warm_up_are_their_definition():
    happened = dict.fromkeys(["crashes", "scale_ups", "migrations", "retries", "failed", "host_hit_rate"], 0.0)
    for seed in range(60):
        fleet, limit, warmup = some_fleet(random.Random(seed))
        run = fleet.run(limit, warmup=warmup)
        requests, metrics, steps = run.requests, run.metrics, run.steps
        arrived, started, first, done = (
            requests[f"{what}_at"].values for what in ("arrived", "started", "first_token", "completed")
        )
        completed, failed, refused = np.isfinite(done), requests.failure.values != "", requests.refused.values > 0
        fates = completed.astype(int) + failed + refused
        assert (fates <= 1).all() if limit else (fates == 1).all(), seed
        np.testing.assert_array_equal(np.isfinite(requests.failed_at), failed, err_msg=str(seed))
        assert int(metrics.final_queue) <= (fates == 0).sum(), seed
        slots, blocks = fleet.pools[0].max_batch_size, fleet.pools[0].kv_cache.blocks
        assert int(steps.running.values.max(initial=0)) <= slots, seed
        assert int(steps.kv_blocks.values.max(initial=0)) <= blocks, seed

        counts = arrived >= warmup
        spent = float(metrics.end_time) - warmup
        events = run.worker_events
        since = events.time.values >= warmup
        kept = completed & (first - arrived <= 1.0)
        with np.errstate(invalid="ignore"):
            expected = {
                "arrived": counts.sum(),
                "completed": (counts & completed).sum(),
                "failed": (counts & failed).sum(),
                "dropped": (counts & refused).sum(),
                "migrations": requests.migrations.values[counts].sum(),
                "retries": requests.retries.values[counts].sum(),
                "scale_ups": (since & (events.reason.values == "added")).sum(),
                "scale_downs": (since & (events.reason.values == "removed")).sum(),
                "request_throughput": (counts & completed).sum() / spent if spent > 0 else np.nan,
                "goodput": (counts & kept).sum() / spent if spent > 0 else np.nan,
                "slo_attainment": (counts & kept).sum() / np.float64((counts & (fates == 1)).sum()),
            }
        if "expected_hit_tokens" in requests:
            stayed = counts & np.isfinite(started) & (requests.migrations.values == 0)
            prompts = np.float64(requests.prompt_tokens.values[stayed].sum())
            counted_on = requests.expected_hit_tokens.values[stayed]
            missed = np.maximum(counted_on - requests.hit_tokens.values[stayed], 0)
            with np.errstate(invalid="ignore"):
                expected |= {"expected_hit_rate": counted_on.sum() / prompts, "missed_hit_rate": missed.sum() / prompts}
        for name, value in expected.items():
            if spent > 0:
                np.testing.assert_allclose(float(metrics[name]), value, rtol=1e-9, err_msg=f"{name}, {seed}")
        for name, end in (("e2e", done), ("ttft", first), ("queue_time", started)):
            took = (end - arrived)[counts & np.isfinite(end)]
            if took.size:
                shown = [float(metrics[name].sel(stat=stat)) for stat in ("mean", "p50", "p99", "max")]
                literal = [took.mean(), *np.quantile(took, [0.5, 0.99]), took.max()]
                np.testing.assert_allclose(shown, literal, rtol=1e-9, err_msg=f"{name}, {seed}")
        for name in happened:
            happened[name] += np.nan_to_num(metrics[name].item())
    assert all(value > 0 for value in happened.values()), happened


def test_every_request_has_one_fate_where_prefill_is_apart():
    happened = dict.fromkeys(["crashes", "scale_ups", "migrations", "retries", "failed", "completed"], 0.0)
    for seed in range(150):
        fleet, limit, warmup = some_fleet_apart(random.Random(seed))
        run = fleet.run(limit, warmup=warmup)
        requests, metrics = run.requests, run.metrics
        completed, failed, refused = (
            np.isfinite(requests.completed_at.values),
            requests.failure.values != "",
            requests.refused.values > 0,
        )
        fates = completed.astype(int) + failed + refused
        assert (fates <= 1).all() if limit else (fates == 1).all(), seed
        assert int(metrics.final_queue) <= (fates == 0).sum(), seed
        counts = requests.arrived_at.values >= warmup
        for name, literal in (
            ("arrived", counts.sum()),
            ("completed", (counts & completed).sum()),
            ("failed", (counts & failed).sum()),
            ("dropped", (counts & refused).sum()),
            ("migrations", requests.migrations.values[counts].sum()),
            ("retries", requests.retries.values[counts].sum()),
        ):
            assert int(metrics[name]) == literal, (name, seed)
        seen = np.isfinite(requests.first_token_at.values)
        took = (requests.first_token_at - requests.arrived_at).values[seen]
        parts = run.ttft_parts.values[:, seen]
        assert (parts >= 0).all(), seed
        np.testing.assert_array_equal(parts.sum(axis=0), took, err_msg=str(seed))
        if took[counts[seen]].size:
            means = metrics.ttft_parts.values
            literal = dict(zip(run.ttft_parts.part.values.tolist(), parts[:, counts[seen]].mean(axis=1), strict=True))
            for part in ("wait for onboarding", "onboarding"):  # metrics have it in the wait for prefill
                literal["wait for prefill"] += literal.pop(part, 0.0)
            np.testing.assert_allclose(means, list(literal.values()), rtol=1e-7, atol=1e-9, err_msg=str(seed))
            np.testing.assert_allclose(means.sum(), took[counts[seen]].mean(), rtol=1e-9, err_msg=str(seed))
        for name in happened:
            happened[name] += float(metrics[name])
    assert all(value > 0 for value in happened.values()), happened


@pytest.mark.parametrize("make", [some_fleet, some_fleet_apart])
def test_a_run_is_the_same_twice_on_any_threads_and_within_a_sweep(make):
    for seed in range(100, 115):
        fleet, limit, warmup = make(random.Random(seed))
        one, again = (fleet.run(limit, warmup=warmup) for _ in range(2))
        assert one.requests.identical(again.requests), seed
        assert one.metrics.identical(again.metrics), seed
        first = fleet.load_generator.seed
        axes = {"seed": [first, first + 1, first + 2], "warmup": warmup, "keep": "requests", "progress": False}
        by_one, by_two = (sim.sweep(fleet, limit, threads=threads, **axes) for threads in (1, 2))
        assert by_one.identical(by_two), seed
        alone = by_one.isel(seed=0)
        for name in one.metrics:
            np.testing.assert_array_equal(alone[name], one.metrics[name], err_msg=f"{name}, {seed}")
        size = one.requests.sizes["request"]
        for name in ("arrived_at", "started_at", "first_token_at", "completed_at", "worker", "hit_tokens"):
            np.testing.assert_array_equal(alone[name][:size], one.requests[name], err_msg=f"{name}, {seed}")


def test_blocks_slots_and_places_are_all_there_when_all_is_over():
    """Long after, requests that take a worker's whole memory each are served at once."""
    for seed in range(200, 230):
        rng = random.Random(seed)
        fleet, _, _ = some_fleet(rng)
        pool = msgspec.structs.replace(fleet.pools[0], batcher=sim.TokenBudgetBatcher())
        plane = msgspec.structs.replace(fleet.control_plane, mtbf=math.inf, restarts=True)
        size, blocks, late = pool.kv_cache.block_size, pool.kv_cache.blocks, 2 * sum(fleet.places())
        prompt = [rng.randint(1, 40 * size) for _ in range(80)] + [blocks * size - 2] * late
        counts = [min(tokens // size, blocks) for tokens in prompt[:80]] + [0] * late
        load = sim.TraceLoadGenerator(
            arrived_at=[*sorted(rng.uniform(0, 15) for _ in range(80)), *(1000.0 + 200.0 * i for i in range(late))],
            prompt_tokens=prompt,
            output_tokens=[rng.randint(1, 60) for _ in range(80)] + [2] * late,
            block_ids=[rng.randrange(3) * 1000 + i for count in counts for i in range(count)],
            block_counts=counts,
            id_block_tokens=size,
        )
        run = msgspec.structs.replace(fleet, pool=pool, load_generator=load, control_plane=plane).run()
        took = (run.requests.completed_at - run.requests.arrived_at).values[80:]
        assert took.max() < 190, seed  # NaN too
        assert int(run.metrics.final_queue) == 0, seed
