"""Fleets, event for event against their literal oracle: every router, rule and transfer on random scenarios."""

import random
from functools import partial

import fleet_oracle
import msgspec
import numpy as np
import pytest
import token_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_token import KINDS, STEP, a_batcher, a_closed_load, a_trace, seconds, some_conversations, turns_of

import vecsim as sim
from vecsim.fleet import LengthOrLoadRule, PrefillLoadRule, PromptLengthRule, QueueAndLengthRule
from vecsim.transfer import TRANSPOSE_EFFICIENCY, TRANSPOSE_LAUNCH, KVTransfer

ROUTERS = {
    "round robin": sim.RoundRobinRouter,
    "random": sim.RandomRouter,
    "least outstanding": sim.LeastOutstandingRouter,
    "power of two": sim.PowerOfTwoRouter,
    "least kv": sim.LeastKVRouter,
    "session sticky": sim.SessionRouter,
}

BITS = 2**64 - 1


def draws(load):
    """The oracle's draws, by the numbers that the kernel gives them: SplitMix64 (Steele, Lea, Flood, 2014)."""

    def draw(request, place, n):
        z = load.seed * 0xD1342543DE82EF95 + (4 * request.index + place + 1) * 0x9E3779B97F4A7C15 & BITS
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & BITS
        z = (z ^ z >> 27) * 0x94D049BB133111EB & BITS
        return (z ^ z >> 31) % n

    return draw


def a_router(rng):
    """(ours, the oracle's name)."""
    name = rng.choice(list(ROUTERS))
    return ROUTERS[name](), name


def a_pool(rng, block_size, orders, roomy):
    """(ours, the oracle's) of one to three workers, most of them with little memory."""
    slots = rng.randint(1, 6)
    memory = {
        "prefix_caching": rng.random() < 0.5,
        "watermark": rng.choice([0.0, 0.0, 0.1]),
        "uncached_first": rng.random() < 0.3,
    }
    if not memory["prefix_caching"]:
        block_size = rng.choice([block_size, 8])
    common = {"order": rng.choice(orders), "async_scheduling": rng.random() < 0.3}
    batcher = rng.randrange(2**32), rng.choice(KINDS), slots, block_size, common
    ours = a_batcher(random.Random(batcher[0]), *batcher[1:])[0]
    blocks = None if roomy else rng.choice([100, *[rng.randint(5, 40)] * 4])
    if blocks and getattr(ours, "reserve_tokens", None):
        blocks = max(blocks, -(-ours.reserve_tokens // block_size))
    limit = rng.choice([None, None, None, rng.randint(20, 100)])
    step = msgspec.structs.replace(STEP, base=rng.choice([2.0, 5.0]), per_request=rng.choice([1.0, 0.5]))
    workers = rng.randint(1, 3)
    pool = sim.Pool(
        workers=workers,
        max_batch_size=slots,
        batcher=ours,
        step_time=step,
        kv_cache=sim.KVCache(blocks=blocks, block_size=block_size, **memory),
        max_model_len=limit,
    )
    literal = fleet_oracle.Workers(
        workers,
        lambda: a_batcher(random.Random(batcher[0]), *batcher[1:])[1],
        slots,
        partial(seconds, step=step),
        blocks=blocks,
        block_size=block_size,
        max_model_len=limit,
        **memory,
        **common,
    )
    return pool, literal


def some_pools(make, rng, *args):
    """([ours], [the oracle's]) of one or two kinds."""
    return zip(*(make(rng, *args) for _ in range(rng.choice([1, 1, 2]))), strict=True)


def a_transfer(rng, block_size):
    """(ours, the oracle's): none, at once, or with whatever takes time."""
    if rng.random() < 0.2:
        return None, None
    size = rng.choice([1.0, 2.0])
    bandwidth, destination = rng.choice([np.inf, 0.25, 1.0, 8.0]), rng.choice([None, None, 0.5, 2.0])
    fabric, latency = rng.choice([np.inf, np.inf, 1.0, 2.0]), rng.choice([0.0, 0.0, 3.0])
    cost, layers = rng.choice([0.0, 0.125]), rng.choice([None, 1, 3])
    hbm, polling = rng.choice([None, 4.0]), rng.choice([0.0, 0.0, 1.0, 5.0, 50.0])
    ours = KVTransfer(
        bandwidth=bandwidth,
        destination_bandwidth=destination,
        fabric_bandwidth=fabric,
        latency=latency,
        descriptor_cost=cost,
        kv_bytes_per_token=size,
        layers=layers,
        layout="contiguous" if layers is None else "layers",
        transpose=hbm is not None,
        hbm_bandwidth=hbm,
        polling=polling,
    )
    each = 1 if layers is None else 2 * layers

    def transpose(moved):
        return 0.0 if hbm is None else moved * (2 / (TRANSPOSE_EFFICIENCY * hbm)) + TRANSPOSE_LAUNCH

    literal = fleet_oracle.Transfer(
        size,
        bandwidth,
        None if fabric == np.inf else fabric,
        latency,
        lambda source, destination: len(destination) * each,
        cost,
        transpose,
        polling,
        destination_bandwidth=destination,
    )
    return ours, literal


def a_rule(rng):
    """(ours, the oracle's rule, the oracle's threshold)."""
    busy = rng.choice([1.0, 1.0, 0.3])
    length, ratio, queue = rng.randint(0, 60), rng.choice([0.5, 0.7, 1.1]), rng.randint(0, 3)
    common = {"decode_busy_threshold": busy}
    ours, literal = rng.choice(
        [
            (None, None),
            (
                QueueAndLengthRule(max_local_prefill_length=length, max_prefill_queue_size=queue, **common),
                fleet_oracle.Gen1(length, queue),
            ),
            (
                PromptLengthRule(eff_isl_threshold=length, ratio=ratio, **common),
                fleet_oracle.IslBounding(length, ratio),
            ),
            (PrefillLoadRule(**common), fleet_oracle.PrefillLoad()),
            (
                LengthOrLoadRule(eff_isl_threshold=length, ratio=ratio, **common),
                fleet_oracle.IslOrLoad(length, ratio),
            ),
        ]
    )
    return ours, literal, busy


def a_fleet(rng, apart, load, block_size, orders, make=a_pool):
    """(ours, the oracle's) with random workers, routers, rules and transfers."""
    roomy = rng.random() < 0.15
    overheads = {
        "before_queue": rng.choice([0.0, 3.0]),
        "per_step": rng.choice([0.0, 1.0]),
        "per_output_token": rng.choice([0.0, 0.5]),
        "at_completion": rng.choice([0.0, 2.0]),
    }
    common = {"load_generator": load, "overheads": sim.Overheads(**overheads)}
    router, name = a_router(rng)
    there, literal = some_pools(make, rng, block_size, orders, roomy)
    if not apart:
        ours = sim.Cluster(pool=there, router=router, **common)
        return ours, fleet_oracle.Cluster(literal, name), token_oracle.Overheads(**overheads)
    prefill, literal_prefill = some_pools(make, rng, block_size, orders, roomy)
    prefill_router, prefill_name = rng.choice([(None, None), a_router(rng)])
    rule, literal_rule, busy = a_rule(rng)
    transfer, literal_transfer = a_transfer(rng, block_size)
    same = {"reserve": rng.choice(["arrival", "prefill"]), "first_token": rng.choice(["prefill", "decode"])}
    ours = sim.DisaggregatedEngine(
        prefill=prefill,
        decode=there,
        prefill_router=prefill_router,
        router=router,
        local_prefill=rule,
        transfer=transfer,
        **same,
        **common,
    )
    literal = fleet_oracle.Disaggregated(
        literal_prefill,
        literal,
        prefill_name,
        name,
        local=literal_rule,
        decode_busy_threshold=busy,
        transfer=literal_transfer,
        **same,
    )
    return ours, literal, token_oracle.Overheads(**overheads)


def those_that_came(result, all_of_them=False):
    """Requests that have come to where they are first looked at; or all that have come to the router."""
    return [
        request
        for request in result.requests
        if request.dropped
        or (
            request.routed_at is not None
            if all_of_them
            else request.is_local is False or request.enqueued_at is not None
        )
    ]


def column(instants):
    """NaN where there was none."""
    return [np.nan if instant is None else instant for instant in instants]


def check_against(run, result, all_that_came=False):
    """Every step of every worker, and every request that has come to where it is first looked at, or to the router."""
    steps = run.steps.sortby(["time", "worker"])
    theirs = sorted(result.steps, key=lambda step: (step.begin, step.worker))
    ours = run.requests
    came = those_that_came(result, all_that_came)
    started = [request.prefill_started_at if request.is_local is False else request.started_at for request in came]
    for name, literal in (
        ("time", [step.begin for step in theirs]),
        ("duration", [step.end - step.begin for step in theirs]),
        ("worker", [step.worker for step in theirs]),
        ("prefilling", [sum(one.is_prefill for one in step.chosen) for step in theirs]),
        ("prefill_tokens", [sum(one.tokens for one in step.chosen if one.is_prefill) for step in theirs]),
        ("decoding", [sum(not one.is_prefill for one in step.chosen) for step in theirs]),
        ("kv_blocks", [step.used for step in theirs]),
    ):
        np.testing.assert_array_equal(steps[name].values, literal, err_msg=name)
    for name, literal in (
        ("arrived_at", [request.arrived_at for request in came]),
        ("refused", [request.dropped for request in came]),
        ("worker", [-1 if request.worker is None else request.worker for request in came]),
        ("started_at", column(started)),
        ("first_token_at", column(request.seen_at[0] if request.seen_at else None for request in came)),
        ("completed_at", column(request.completed_at for request in came)),
        ("hit_tokens", [request.hit_tokens for request in came]),
        ("preempted", [request.preempted + request.prefill_preempted for request in came]),
    ):
        np.testing.assert_array_equal(ours[name].values, literal, err_msg=name)
    if "remote" in ours:
        hops = (
            ("prefilled_at", "prefill_ended_at"),
            ("reserved_at", "reserved_at"),
            ("transfer_began_at", "transfer_begun_at"),
            ("transfer_noticed_at", "noticed_at"),
        )
        for name, attribute in hops:
            literal = column(getattr(request, attribute) for request in came)
            np.testing.assert_array_equal(ours[name].values, literal, err_msg=name)
        literal = [request.prefill_worker for request in came if request.is_local is False]
        at = ours.prefill_worker.values[ours.remote.values == 1].tolist()
        assert at == [-1 if number is None else number for number in literal]
    for name, literal in (
        ("arrived", len(came)),
        ("dropped", sum(request.dropped for request in came)),
        ("completed", sum(request.completed_at is not None for request in came)),
        ("preemptions", sum(worker.preemptions for worker in result.workers)),
        ("steps", len(theirs)),
    ):
        assert int(run.metrics[name]) == literal, name


def check_open(seed, apart):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    requests, load = a_trace(rng, block_size)
    fleet, literal, overheads = a_fleet(rng, apart, load, block_size, ["fcfs", *token_oracle.ORDERS])
    limit = rng.choice([None, None, 150.0])
    result = fleet_oracle.simulate(requests, literal, overheads=overheads, time_limit=limit or np.inf, draw=draws(load))
    check_against(fleet.run(limit), result)


def check_closed(seed, apart):
    rng = random.Random(seed)
    users, think = rng.randint(1, 6), rng.choice([0.0, 7.0])
    load = a_closed_load(users, think, seed)
    fleet, literal, overheads = a_fleet(rng, apart, load, rng.choice([1, 4, 16, 5]), ["fcfs", "shortest_prompt"])
    run = fleet.run(150.0)
    requests = [token_oracle.Request(0.0, *lengths) for lengths in lengths_of(load, 1000)]
    result = fleet_oracle.simulate(
        requests, literal, overheads=overheads, concurrency=users, think_time=think, time_limit=150.0, draw=draws(load)
    )
    check_against(run, result)


def lengths_of(load, number):
    """The lengths that the seed gives the first requests."""
    batch = sim.BatchLoadGenerator(
        initial_batch=number, prompt_tokens=load.prompt_tokens, output_tokens=load.output_tokens, seed=load.seed
    )
    engine = sim.Engine(load_generator=batch, batcher=sim.IFBatcher(), step_time=sim.LinearStepTime(base=1))
    requests = engine.run().requests
    return zip(requests.prompt_tokens.values.tolist(), requests.output_tokens.values.tolist(), strict=True)


def check_sessions(seed, apart):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    load = some_conversations(rng, seed, [0.0, 3.0])
    fleet, literal, overheads = a_fleet(rng, apart, load, block_size, ["fcfs", "shortest_prompt"])
    limit = rng.choice([None, None, 150.0])
    result = fleet_oracle.simulate(
        turns_of(load, block_size), literal, overheads=overheads, time_limit=limit or np.inf, draw=draws(load)
    )
    check_against(fleet.run(limit), result)


CHECKS = {"open": check_open, "closed": check_closed, "sessions": check_sessions}


@pytest.mark.parametrize("load", CHECKS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_event_of_a_cluster_is_that_of_the_oracle(load, seed):
    CHECKS[load](seed, apart=False)


@pytest.mark.parametrize("load", CHECKS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_event_where_prefill_is_kept_apart_is_that_of_the_oracle(load, seed):
    CHECKS[load](seed, apart=True)
