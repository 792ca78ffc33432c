"""Fleets with all on: tiers, crashes, outages, slow messages, a schedule or a planner of one's own, event for event."""

import random
from dataclasses import replace

import all_oracle
import msgspec
import numba
import numpy as np
import pytest
import token_oracle
from all_oracle import ByCache
from test_changing_against_oracle import a_schedule, check_fates, some_changes
from test_fleet_against_oracle import a_fleet, draws, lengths_of, those_that_came
from test_tiers import a_crowd, a_crowded_pool, a_recurring_trace, a_tiered_pool, check_tiers
from test_token import a_closed_load, a_trace, some_conversations, turns_of

import vecsim as sim

# A planner: requests at each ready worker, share of its memory, and requests since the last tick, from which a pool
# grows, and requests at each from which it shrinks
MANY, FULL, ARRIVED, FEW = 3.0, 0.7, 10, 1.0


@numba.njit
def change_of(ready, here, use, arrived):
    if ready == 0:
        return 1
    if here > 2 * MANY * ready:
        return 2
    if here > MANY * ready or use > FULL * ready or arrived > ARRIVED:
        return 1
    return -1 if here < FEW * ready else 0


@numba.njit
def by_load(view, memory):
    """A rule for `sim.CustomPlanner`."""
    memory[0] += 1
    first, workers = view.prefill_workers, view.ready.size
    prefill = decode = 0
    for begin, end in ((0, first), (first, workers)):
        ready, here, use = 0, 0.0, 0.0
        for worker in range(begin, end):
            if view.ready[worker]:
                ready += 1
                here += view.running[worker] + view.waiting[worker]
                use += view.kv_use[worker]
        change = change_of(ready, here, use, view.arrived)
        if begin == first:
            decode = change
        else:
            prefill = change
    # Once in a while all that may go do
    return (-100, -100) if memory[0] % 7 == 0 else (prefill, decode)


def planner_by_load(least, most_gpus):
    """The same for the oracle, and what keeps it within its bounds."""
    ticks, since = 0, 0.0

    def plan(now, simulation):
        nonlocal ticks, since
        ticks += 1
        arrived = sum(
            request.routed_at is not None and since <= request.routed_at < now for request in simulation.requests
        )
        since = now
        pools = {"prefill": simulation.prefill, "decode": simulation.decode}
        changes, gpus = {}, 0
        for name, workers in pools.items():
            if not workers:
                continue
            there = [worker for worker in workers if worker.phase == "ready"]
            here = sum(len(worker.sent) for worker in there)
            wanted = -100 if ticks % 7 == 0 else change_of(len(there), here, sum(w.share for w in there), arrived)
            size = simulation.size(name)
            changes[name] = max(size + wanted, least) - size
            gpus += (size + min(changes[name], 0)) * workers[0].kind.gpus
        for name, change in changes.items():  # prefill first
            each = pools[name][0].kind.gpus
            changes[name] = min(change, max(most_gpus - gpus, 0) // each)
            gpus += max(changes[name], 0) * each
        return sorted(changes.items(), key=lambda change: change[1] > 0)

    return plan


def a_planner(rng, names, instant):
    """As `a_schedule`, or one that looks at the fleet."""
    if rng.random() < 0.4:
        return a_schedule(rng, names, instant)
    least, most_gpus, interval = rng.choice([1, 1, 2]), rng.choice([8, 12]), rng.choice([3.0, 10.0, 47.0])
    planner = sim.CustomPlanner(rule=by_load, interval=interval, min_workers=least, max_gpus=most_gpus)
    return planner, {"planner": planner_by_load(least, most_gpus), "interval": interval}


def crashes_in_rises(rng, result):
    """Crashes of workers while blocks come up there."""
    crashes = []
    for request in result.requests:
        began_at, ended_at = (getattr(request, name, None) for name in ("rise_began_at", "rise_ended_at"))
        if began_at is not None and ended_at is not None and rng.random() < 0.5:
            worker = request.prefill_worker if request.is_local is False else request.worker
            crashes.append((rng.choice([began_at, rng.uniform(began_at, ended_at)]), worker))
    return rng.sample(crashes, min(len(crashes), 2))


def routers_by_caches(rng, fleet, literal):
    """The same fleet with routers that go by what workers have cached, as they know."""

    def a_router(place):
        latency = rng.choice([0.0, 0.0, 7.0, 50.0])
        if rng.random() < 0.3:
            return sim.OverlapRouter(event_latency=latency), ByCache(1, latency)
        credit, scale = rng.choice([1.0, 1.0, 0.5, 0.0]), rng.choice([1.0, 2.0])
        host, disk = rng.choice([(0.75, 0.25), (0.0, 0.0), (1.0, 0.5)])
        router = sim.KVAwareRouter(
            overlap_credit=credit, prefill_load_scale=scale, event_latency=latency, host_credit=host, disk_credit=disk
        )
        credit = 0.0 if place == "decode" else credit
        return router, ByCache(2, latency, credit, scale, host, disk, place != "prefill")

    def are_alike(pools):
        return len({pool.block_size for pool in pools}) == 1

    if isinstance(fleet, sim.Cluster):
        if not are_alike(literal.pools):
            return fleet
        router, literal.router = a_router("all")
        return msgspec.structs.replace(fleet, router=router)
    if are_alike(literal.decode):
        router, literal.decode_router = a_router("decode")
        fleet = msgspec.structs.replace(fleet, router=router)
    if fleet.prefill_router is not None and are_alike(literal.prefill):
        router, literal.prefill_router = a_router("prefill")
        fleet = msgspec.structs.replace(fleet, prefill_router=router)
    return fleet


def check(rng, apart, requests, load, block_size, make, orders, latest, limit, **users):
    """Run both, the oracle's twice: the second time with crashes while blocks come up."""
    fleet, literal, overheads = a_fleet(rng, apart, load, block_size, orders, make=make)
    if isinstance(load, sim.TraceLoadGenerator) and rng.random() < 0.5:  # no others look for what decoding fills
        fleet = routers_by_caches(rng, fleet, literal)
    fleet, given = some_changes(rng, fleet, literal, latest, a_planner)
    given |= {"overheads": overheads, "time_limit": limit, "draw": draws(load), **users}
    planner = given.get("planner")
    if not users:  # the oracle's run must not end before
        requests = [*requests, token_oracle.Request(limit + 1.0, 1, 1)]

    def simulate():
        if planner is not None:
            given["planner"] = planner_by_load(fleet.scaling.min_workers, fleet.scaling.max_gpus)
        return all_oracle.simulate(requests, literal, **given)

    result = simulate()
    if fleet.control_plane is not None and (crashes := crashes_in_rises(rng, result)):
        crashes = tuple(sorted((*fleet.control_plane.crashes, *crashes)))
        given["control"] = replace(given["control"], crashes=crashes)
        plane = msgspec.structs.replace(fleet.control_plane, crashes=crashes)
        fleet = msgspec.structs.replace(fleet, control_plane=plane)
        result = simulate()
    run = fleet.run(limit)
    check_tiers(run, result, all_that_came=fleet.changes)
    check_fates(run, result)
    if "expected_hit_tokens" in run.requests:
        came = those_that_came(result, fleet.changes)
        expected = [request.expected * fleet.cached_block_size for request in came]
        np.testing.assert_array_equal(run.requests.expected_hit_tokens.values, expected)


def check_trace(seed, apart):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    requests, load = (a_recurring_trace if rng.random() < 0.8 else a_trace)(rng, block_size)
    latest = max(30, int(requests[-1].arrived_at))
    limit = rng.choice([0.5 * latest, latest + 1000.0])
    orders = ["fcfs", *token_oracle.ORDERS]
    check(rng, apart, requests, load, block_size, a_tiered_pool, orders, latest, limit)


def check_crowd(seed, apart):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    requests, load = a_recurring_trace(rng, block_size, a_crowd(rng), rng.choice([0, 20, 40]))
    latest = max(30, int(requests[-1].arrived_at))
    orders = ["fcfs", "fcfs", *token_oracle.ORDERS]
    check(rng, apart, requests, load, block_size, a_crowded_pool, orders, latest, latest + 1000.0)


def check_talks(seed, apart):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 5])
    load = some_conversations(rng, seed, [0.0, 3.0, 40.0])
    requests, orders = turns_of(load, block_size), ["fcfs", "shortest_prompt"]
    check(rng, apart, requests, load, block_size, a_tiered_pool, orders, 100, rng.choice([150.0, 1000.0]))


def check_closed(seed, apart):
    rng = random.Random(seed)
    users, think = rng.randint(1, 6), rng.choice([0.0, 7.0])
    load = a_closed_load(users, think, seed)
    requests = [token_oracle.Request(0.0, *lengths) for lengths in lengths_of(load, 2000)]
    block_size, orders = rng.choice([1, 4, 16, 5]), ["fcfs", "shortest_prompt"]
    check(
        rng, apart, requests, load, block_size, a_tiered_pool, orders, 100, 150.0,
        concurrency=users, think_time=think,
    )  # fmt: skip


CHECKS = {"trace": check_trace, "crowd": check_crowd, "talks": check_talks, "closed": check_closed}


@pytest.mark.parametrize("apart", [False, True], ids=["cluster", "apart"])
@pytest.mark.parametrize(("load", "seeds"), [("trace", 100), ("crowd", 150), ("talks", 80), ("closed", 60)])
def test_fleets_with_all_of_it_on_agree_event_for_event(load, seeds, apart):
    for seed in range(seeds):
        CHECKS[load](seed, apart)
