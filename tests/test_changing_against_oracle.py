"""Fleets that change and fail, event for event against their literal oracle, on random scenarios."""

import math
import random

import changing_oracle
import msgspec
import numpy as np
import pytest
import token_oracle
from test_fleet_against_oracle import BITS, a_fleet, check_against, draws
from test_token import a_trace

import vecsim as sim
from vecsim.control_plane import ControlPlane
from vecsim.kernel.life import CRASH_DRAW, NOTICE_DRAW, START_UP_DRAW, STOP_DRAW

DRAWS = 4


def uniform(seed, kind, worker, nth):
    """The kernel's draw in [0, 1) (SplitMix64)."""
    number = ((worker << 24) + nth) * DRAWS + kind + (1 << 48)
    z = seed * 0xD1342543DE82EF95 + (number + 1) * 0x9E3779B97F4A7C15 & BITS
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & BITS
    z = (z ^ z >> 27) * 0x94D049BB133111EB & BITS
    return ((z ^ z >> 31) >> 11) * 2.0**-53


def drawn(load, plane, pools):
    """The oracle's draws of seconds; `pools` are ours, one for each worker."""
    seed = load.seed

    def draw(kind, worker, nth):
        if kind == "life":
            return -plane.mtbf * math.log1p(-uniform(seed, CRASH_DRAW, worker, nth))
        if kind == "lease":
            return plane.renewal * uniform(seed, NOTICE_DRAW, worker, nth)
        if kind == "outage":
            return plane.renewal * uniform(seed, STOP_DRAW, worker, nth)
        mean, sigma = pools[worker].start_up
        one, other = (uniform(seed, START_UP_DRAW, worker, 2 * nth + i) for i in range(2))
        return math.exp(mean + sigma * (math.sqrt(-2.0 * math.log1p(-one)) * math.cos(2.0 * math.pi * other)))

    return draw


def a_schedule(rng, names, instant):
    """(ours, what the oracle is given but for what an outage delays)."""
    changes = {(instant(), rng.choice(names)): rng.randint(1, 5) for _ in range(rng.choice([1, 3, 8]))}
    planner = sim.Schedule(changes=tuple((*at, size) for at, size in sorted(changes.items())))
    return planner, {"changes": planner.changes}


def some_changes(rng, fleet, literal, latest=None, plan=a_schedule):
    """(ours, what the oracle is given): crashes, outages, start-up times, a planner or none, most before `latest`."""
    apart = isinstance(fleet, sim.DisaggregatedEngine)
    kinds = [[*literal.prefill], [*literal.decode]] if apart else [[*literal.pools]]
    names = ("prefill", "decode")[-len(kinds) :]
    often = latest or 100.0  # a crash of each worker
    latest = latest or rng.choice([30, 200])

    def instant():
        return float(rng.choice([rng.randint(0, latest), rng.uniform(0, latest)]))

    planner, given = None, {}
    if all(len(kind) == 1 for kind in kinds) and rng.random() < 0.6:
        planner, given = plan(rng, names, instant)
    pools = []
    for pool, there in zip(fleet.pools, [one for kind in kinds for one in kind], strict=True):
        there.start_up_time = rng.choice([0.0, 5.0, 30.0])
        there.start_up_std = rng.choice([0.0, 3.0]) if there.start_up_time else 0.0
        there.gpus = rng.choice([1, 2])
        own = {name: getattr(there, name) for name in ("start_up_time", "start_up_std", "gpus")}
        pools.append(msgspec.structs.replace(pool, **own))
    parts = {"prefill": tuple(pools[: len(kinds[0])]), "decode": tuple(pools[len(kinds[0]) :])} if apart else {}
    fleet = msgspec.structs.replace(fleet, scaling=planner, **parts or {"pool": tuple(pools)})
    for there, places in zip([one for kind in kinds for one in kind], fleet.places(), strict=True):
        there.spare = places - there.count
    number = sum(fleet.places())
    starts = sorted(rng.uniform(0, latest) for _ in range(rng.choice([0, 0, 1, 2])))
    outages = [
        (at, min(rng.choice([3.0, 15.0, 40.0]), 0.9 * (following - at)))
        for at, following in zip(starts, [*starts[1:], math.inf], strict=False)
    ]
    plane = {
        **{name: rng.choice([0.0, 0.0, 0.5, 4.0]) for name in ("request_plane", "queue_push", "queue_pop")},
        "watch": rng.choice([0.0, 0.0, 1.5, 20.0]),
        "ttl": rng.choice([1.0, 10.0]),
        "renewal": rng.choice([0.0, 1.0]),
        "connect_timeout": rng.choice([0.25, 3.0]),
        "shun": rng.choice([0.0, 1.0, 5.0]),
        "break_delay": rng.choice([0.0, 0.0, 2.0, 12.0]),
        "migration_limit": rng.choice([0, 1, 3, 100]),
        "mtbf": rng.choice([math.inf, math.inf, often]),
        "crashes": tuple(sorted((instant(), rng.randrange(number)) for _ in range(rng.choice([0, 3, 20])))),
        "restarts": rng.random() < 0.8,
        "outages": tuple(outages),
    }
    if not apart or fleet.prefill_router is not None:
        plane |= {"queue_push": 0.0, "queue_pop": 0.0}
    if any(isinstance(pool.batcher, sim.NoEvictBatcher) and not pool.batcher.chunked_prefill for pool in fleet.pools):
        plane["migration_limit"] = 0  # tokens of its own don't count there against the budget
    ours = msgspec.structs.replace(fleet, control_plane=ControlPlane(**plane))
    of_worker = [pool for pool, places in zip(ours.pools, ours.places(), strict=True) for _ in range(places)]
    if "changes" in given:
        given["changes"] = last_ones(given["changes"], outages)
    given |= {
        "control": changing_oracle.ControlPlane(**plane),
        "draws": drawn(ours.load_generator, ours.control_plane, of_worker),
    }
    return ours, given


def last_ones(changes, outages):
    """Of the changes of a pool that an outage delays, only the last is made at its end."""
    kept = {}
    for at, name, size in changes:
        delayed = next(
            (end for start, end in ((start, start + lasts) for start, lasts in outages) if start <= at < end), at
        )
        kept[delayed, name] = (at, name, size)
    return list(kept.values())


def check_fates(run, result):
    """What became of each request and worker, beside what `check_against` looks at."""
    if not run.engine.changes:
        return
    came = [request for request in result.requests if request.routed_at is not None]
    for name in ("migrations", "retries"):
        np.testing.assert_array_equal(run.requests[name], [getattr(request, name) for request in came], err_msg=name)
    failed_at = [np.nan if request.failed_at is None else request.failed_at for request in came]
    np.testing.assert_array_equal(run.requests.failed_at, failed_at)
    assert run.requests.failure.values.tolist() == [request.reason or "" for request in came]
    for name, literal in (
        ("failed", sum(request.failed_at is not None for request in result.requests)),
        ("migrations", sum(request.migrations for request in result.requests)),
        ("retries", sum(request.retries for request in result.requests)),
        ("scale_ups", sum(change > 0 for _, _, change, _ in result.scaling)),
        ("scale_downs", sum(change < 0 for _, _, change, _ in result.scaling)),
    ):
        assert int(run.metrics[name]) == literal, name
    result.end = float(run.metrics.end_time)  # ours is at the time limit
    np.testing.assert_allclose(run.metrics.gpu_hours, result.gpu_seconds() / 3600, rtol=1e-9, atol=1e-12)


def check_open(seed, apart, crashes=True):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    requests, load = a_trace(rng, block_size)
    fleet, literal, overheads = a_fleet(rng, apart, load, block_size, ["fcfs", *token_oracle.ORDERS])
    fleet, given = some_changes(rng, fleet, literal)
    if not crashes:
        if fleet.scaling is None:
            return
        watch = fleet.control_plane.watch
        fleet = msgspec.structs.replace(fleet, control_plane=ControlPlane(watch=watch) if watch else None)
        given["control"] = changing_oracle.ControlPlane(watch=watch)
        given["changes"] = list(fleet.scaling.changes)
    limit = rng.choice([150.0, 1000.0])
    later = token_oracle.Request(limit + 1.0, 1, 1)  # so that the oracle's run doesn't end before
    result = changing_oracle.simulate(
        [*requests, later], literal, **given, overheads=overheads, time_limit=limit, draw=draws(load)
    )
    run = fleet.run(limit)
    check_against(run, result, all_that_came=fleet.changes)
    check_fates(run, result)


def check_sizes(seed, apart):
    """Pools that grow and shrink by a schedule, and nothing else."""
    check_open(seed, apart, crashes=False)


CHECKS = {"open": check_open, "sizes": check_sizes}


@pytest.mark.parametrize(
    ("kind", "apart", "seeds"),
    [("open", False, 100), ("open", True, 200), ("sizes", False, 100), ("sizes", True, 100)],
)
def test_fleets_that_change_agree_event_for_event(kind, apart, seeds):
    for seed in range(seeds):
        CHECKS[kind](seed, apart)
