"""The fleet model's oracle against the single engine's, against theory, and against the laws that any fleet keeps."""

from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from math import factorial

import fleet_oracle
import numpy as np
import pytest
import token_oracle
from fleet_oracle import Cluster, Disaggregated, Gen1, IslBounding, IslOrLoad, PrefillLoad, Transfer, Workers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_token_oracle import batchers, streams
from token_oracle import IF, ORDERS, Overheads, Request, TokenBudget

ROUTERS = ("round robin", "random", "least outstanding", "power of two", "least kv", "session sticky")


def ten(chosen):
    return 10


@st.composite
def pools(draw, block_size, count=None, cls=None):
    """Workers of a kind, with little memory."""
    slots = draw(st.integers(1, 8))
    batcher = draw(batchers(slots) if cls is None else batchers(slots).filter(lambda batcher: isinstance(batcher, cls)))
    return Workers(
        draw(st.integers(1, 3)) if count is None else count,
        lambda: deepcopy(batcher),
        slots,
        lambda chosen: 5 + len(chosen),
        blocks=draw(st.integers(7, 40)),
        block_size=block_size,
        prefix_caching=draw(st.booleans()),
        uncached_first=draw(st.booleans()),
        watermark=draw(st.sampled_from([0, 0.1, 0.5])),
        order=draw(st.sampled_from(["fcfs", *ORDERS])),
        async_scheduling=draw(st.booleans()),
        max_model_len=draw(st.none() | st.integers(10, 100)),
    )


OVERHEADS = st.builds(
    Overheads, st.sampled_from([0, 3.5]), st.sampled_from([0, 1]), st.sampled_from([0, 0.5]), st.sampled_from([0, 7])
)


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    block_size=st.sampled_from([4, 16]),
    router=st.sampled_from(ROUTERS),
    overheads=OVERHEADS,
    users=st.none() | st.integers(1, 10),
    think_time=st.integers(0, 30),
    time_limit=st.sampled_from([float("inf"), float("inf"), 150]),
)
def test_a_fleet_of_one_worker_is_the_single_engine(data, block_size, router, overheads, users, think_time, time_limit):
    pool = data.draw(pools(block_size, count=1))
    requests = data.draw(streams(block_size))
    if users is not None:
        # The single engine refuses at a boundary, the router when a request comes: a user asks again from then on.
        alone = fleet_oracle.simulate([replace(request, after=None) for request in requests], Cluster([pool]))
        requests = [one for one, other in zip(requests, alone.requests, strict=True) if not other.dropped]
    common = {"overheads": overheads, "concurrency": users, "think_time": think_time, "time_limit": time_limit}
    fleet = fleet_oracle.simulate(requests, Cluster([pool], router), **common)
    names = (
        "slots", "blocks", "block_size", "duration", "prefix_caching", "uncached_first", "watermark", "order",
        "async_scheduling", "max_model_len",
    )  # fmt: skip
    single = token_oracle.simulate(
        requests, batcher=pool.batcher(), **{name: getattr(pool, name) for name in names}, **common
    )
    assert len(fleet.steps) == len(single.steps)
    for ours, theirs in zip(fleet.steps, single.steps, strict=True):
        assert ours[:2] == theirs[:2]
        assert (ours.queue, ours.used, ours.worker) == (theirs.queue, theirs.used, 0)
        for one, other in zip(ours.chosen, theirs.chosen, strict=True):
            assert one.request.index == other.request.index
            assert (one.before, one.tokens, one.is_prefill) == (other.before, other.tokens, other.is_prefill)
    for ours, theirs in zip(fleet.requests, single.requests, strict=True):
        if theirs.enqueued_at is None and not theirs.dropped:
            assert not ours.token_at
            continue
        names = (
            "arrived_at", "enqueued_at", "hits", "preempted", "dropped", "admitted_at", "token_at", "seen_at",
            "completed_at",
        )  # fmt: skip
        for name in names:
            assert getattr(ours, name) == getattr(theirs, name), name
    assert fleet.workers[0].preemptions == single.preemptions
    assert fleet.workers[0].pool.block_of == single.pool.block_of
    assert time_limit < float("inf") or not fleet.stuck


def route(requests, router, count=3, **settings):
    """To which worker each request goes."""
    there = {"blocks": 100, "block_size": 4} | settings
    pool = Workers(count, IF, 4, ten, **there)
    return [one.worker for one in fleet_oracle.simulate(requests, Cluster([pool], router)).requests]


def test_routers():
    # One that runs from 0 to 100, then three short ones at once, and one when these have ended
    requests = [Request(0, 20, 10), *[Request(5, 4, 1)] * 3, Request(30, 4, 1)]
    assert route(requests, "round robin") == [0, 1, 2, 0, 1]
    assert route(requests, "least outstanding") == [0, 1, 2, 0, 1]
    # Blocks are taken when a step begins: those of the three are seen only by the next, and gone again at 30.
    assert route(requests, "least kv") == [0, 1, 1, 1, 1]
    assert route([Request(0, 4, 10), Request(5, 8, 10), Request(6, 4, 1), Request(7, 4, 1)], "least kv") == [0, 1, 2, 2]
    turns = [Request(0, 4, 1), Request(0, 4, 1), Request(prompt_tokens=4, after=1), Request(90, 4, 1)]
    assert route(turns, "session sticky") == [0, 1, 1, 2]


def test_a_request_ends_at_a_boundary_which_comes_after_whoever_arrives_then():
    requests = [Request(0, 4, 1), Request(0, 4, 2), Request(10, 4, 1)]
    assert route(requests, "least outstanding", count=2) == [0, 1, 0]
    # Of the first two the first ends at 10 as well, but the third sees both.
    requests = [Request(0, 4, 1), Request(0, 4, 1), Request(0, 4, 1), Request(10, 4, 1)]
    assert route(requests, "least outstanding", count=2) == [0, 1, 0, 1]


def test_workers_that_could_never_hold_a_request_are_passed_over():
    small, large = Workers(2, IF, 4, ten, blocks=2, block_size=4), Workers(1, IF, 4, ten, blocks=9, block_size=4)
    requests = [Request(0, 4, 1), Request(0, 20, 1), Request(0, 4, 1), Request(0, 40, 1), Request(0, 20, 1)]
    result = fleet_oracle.simulate(requests, Cluster([small, large]))
    assert [one.worker for one in result.requests] == [0, 2, 0, None, 2]
    assert [one.dropped for one in result.requests] == [False, False, False, True, False]
    assert [worker.ended for worker in result.workers] == [2, 0, 2]


def test_draws():
    asked = []

    def draw(request, place, n):
        asked.append((request.index, place, n))
        return n - 1

    def go(router):
        asked.clear()
        pool = Workers(3, IF, 4, ten, blocks=9, block_size=4)
        return [
            one.worker
            for one in fleet_oracle.simulate([Request(0, 4, 1)] * 3, Cluster([pool], router), draw=draw).requests
        ]

    assert go("random") == [2, 2, 2]
    assert asked == [(0, 0, 3), (1, 0, 3), (2, 0, 3)]
    # Of the workers 2 and 1; of equal ones that which is drawn first
    assert go("power of two") == [2, 1, 2]
    assert asked == [(0, 0, 3), (0, 1, 2), (1, 0, 3), (1, 1, 2), (2, 0, 3), (2, 1, 2)]


def check_laws(result):
    """What holds in any fleet that served to the end."""
    assert not result.stuck
    for worker in result.workers:
        assert not worker.sent
        assert not any(worker.pool.holders)
        assert sorted(worker.pool.free) == list(range(worker.blocks))
        steps = [step for step in result.steps if step.worker == worker.number]
        assert all(before.end <= after.begin for before, after in pairwise(steps))
        assert all(0 < step.used <= worker.blocks for step in steps)
        assert all(0 < len(step.chosen) <= worker.slots for step in steps)
    for request in result.requests:
        if request.routed_at is None:
            assert request.after is None or result.requests[request.after].completed_at is None
        elif not request.dropped:
            assert len(request.token_at) == request.output_tokens
            assert request.token_at == sorted(set(request.token_at))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_size=st.sampled_from([4, 16]), router=st.sampled_from(ROUTERS))
def test_a_cluster_keeps_the_laws(data, block_size, router):
    there = data.draw(st.lists(pools(block_size), min_size=1, max_size=2))
    requests = data.draw(streams(block_size))
    users = data.draw(st.none() | st.integers(1, 10))
    result = fleet_oracle.simulate(requests, Cluster(there, router), concurrency=users)
    check_laws(result)
    assert sum(worker.ended for worker in result.workers) == sum(
        one.completed_at is not None for one in result.requests
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data(), count=st.integers(1, 4))
def test_round_robin_over_n_workers_is_n_single_engines(data, count):
    pool = data.draw(pools(4, count=count))
    pool = replace(pool, blocks=40, max_model_len=None)
    requests = [request for request in data.draw(streams(4)) if request.after is None and request.prompt_tokens < 40]
    fleet = fleet_oracle.simulate(requests, Cluster([pool])).requests
    if any(request.dropped for request in fleet):
        return
    for i in range(count):
        alone = fleet_oracle.simulate(requests[i::count], Cluster([replace(pool, count=1)])).requests
        assert [one.token_at for one in fleet[i::count]] == [one.token_at for one in alone]


def test_unknown_routers_are_refused():
    with pytest.raises(ValueError, match="nearest"):
        route([Request(0, 4, 1)], "nearest")


def test_endless_memory():
    pool = Workers(1, lambda: TokenBudget(8), 4, ten)
    result = fleet_oracle.simulate([Request(0, 100, 4), Request(0, 100, 4)], Cluster([pool]))
    assert result.workers[0].share == 0
    assert result.workers[0].preemptions == 0
    check_laws(result)


# Disaggregation


def one_each(prefill=1, decode=1, block_size=4, blocks=100, slots=4, **settings):
    return Disaggregated(
        [Workers(prefill, lambda: TokenBudget(10_000), slots, ten, blocks=blocks, block_size=block_size)],
        [Workers(decode, lambda: TokenBudget(10_000), slots, ten, blocks=blocks, block_size=block_size)],
        **settings,
    )


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_a_request_on_its_way(first_token):
    transfer = Transfer(
        bytes_per_token=2, bandwidth=10, latency=1, per_descriptor=0.5, transpose=lambda moved: moved / 20, polling=4
    )
    fleet = one_each(transfer=transfer, first_token=first_token)
    (one,) = fleet_oracle.simulate([Request(3, 10, 3)], fleet).requests
    assert (one.routed_at, one.reserved_at, one.sent_to_prefill_at, one.prefill_started_at) == (3, 3, 3, 3)
    assert (one.prefill_ended_at, one.transfer_begun_at, one.bytes) == (13, 13, 20)
    # 1 + 3 blocks of 0.5 + 2 + 1 is 5.5: noticed at the second poll
    assert (one.noticed_at, one.started_at) == (21, 21)
    assert one.token_at == ([13, 31, 41] if first_token == "prefill" else [31, 41, 51])
    assert (one.worker, one.prefill_worker, one.is_local) == (1, 0, False)
    result = fleet_oracle.simulate([Request(3, 10, 3)], fleet)
    decodes = [(each.before + 1, each.is_prefill) for step in result.steps[1:] for each in step.chosen]
    first = 11 if first_token == "prefill" else 10
    assert decodes == [(first + i, False) for i in range(len(decodes))]
    assert [step.used for step in result.steps] == [3] * len(result.steps)


def test_one_token_from_the_prefill_worker_moves_nothing():
    fleet = one_each(transfer=Transfer(2))
    result = fleet_oracle.simulate([Request(0, 10, 1)], fleet, overheads=Overheads(0, 0, 0.5, 2))
    one = result.requests[0]
    assert (one.token_at, one.completed_at, one.transfer_begun_at, one.noticed_at) == ([10], 12.5, None, None)
    check_laws(result)
    (one,) = fleet_oracle.simulate([Request(0, 10, 1)], replace(fleet, first_token="decode")).requests
    assert (one.noticed_at, one.token_at) == (10, [20])


def test_reservations_hold_a_request_back():
    # Three blocks each: the third waits until one of the first two has gone from the decode worker.
    fleet = one_each(blocks=7)
    requests = [Request(0, 12, 2), Request(0, 12, 3), Request(0, 12, 2)]

    def column(name, **settings):
        result = fleet_oracle.simulate(requests, replace(fleet, **settings))
        check_laws(result)
        return [getattr(request, name) for request in result.requests]

    # The one block that is left is for the first's next token: the second waits for another.
    assert column("reserved_at") == [0, 0, 20]
    assert column("prefill_ended_at") == [10, 10, 30]
    assert column("noticed_at") == [10, 10, 30]
    assert column("prefill_ended_at", reserve="prefill") == [10, 10, 20]
    assert column("reserved_at", reserve="prefill") == [10, 10, 20]


def test_who_waits_with_blocks_gives_them_back():
    # Each has one of two blocks, and needs a second one.
    fleet = one_each(blocks=2)
    result = fleet_oracle.simulate([Request(0, 4, 2)] * 2, fleet)
    assert [request.token_at for request in result.requests] == [[10, 20], [10, 30]]
    assert [request.preempted for request in result.requests] == [0, 1]
    check_laws(result)
    assert len(fleet_oracle.simulate([Request(0, 4, 2)] * 2, fleet, gives_back=False).stuck) == 2
    # One that runs alone takes the block too, instead of preempting itself.
    fleet.decode[0].blocks, fleet.decode[0].slots = 3, 1
    result = fleet_oracle.simulate([Request(0, 4, 6), Request(0, 4, 2)], fleet)
    assert [request.preempted for request in result.requests] == [0, 1]
    assert [request.token_at for request in result.requests] == [[10, 20, 30, 40, 50, 60], [10, 70]]
    check_laws(result)


def test_links_are_shared():
    requests = [Request(0, 10, 2)] * 2
    transfer = Transfer(1, bandwidth=1)

    def noticed(fleet, requests=requests):
        return [request.noticed_at for request in fleet_oracle.simulate(requests, fleet).requests]

    assert noticed(one_each(transfer=transfer)) == [30, 30]
    assert noticed(one_each(prefill=2, transfer=transfer)) == [30, 30]
    assert noticed(one_each(decode=2, transfer=transfer)) == [30, 30]
    assert noticed(one_each(prefill=2, decode=2, transfer=transfer)) == [20, 20]
    assert noticed(one_each(prefill=2, decode=2, transfer=replace(transfer, fabric=0.5))) == [50, 50]
    # Alone for 10, half the rate for 20, alone again for 10
    fleet = one_each(prefill=2, transfer=transfer)
    assert noticed(fleet, [Request(0, 20, 2), Request(10, 20, 2)]) == [40, 50]


def test_the_local_rules():
    def local(rule, *requests, **settings):
        fleet = one_each(slots=1, blocks=10_000, local=rule, **settings)
        result = fleet_oracle.simulate(requests, fleet)
        check_laws(result)
        return [request.is_local for request in result.requests]

    short, long = Request(0, 200, 2), Request(0, 3000, 2)
    assert local(Gen1(), short) == [True]
    assert local(None, short) == [False]
    assert local(Gen1(), long) == [False]
    # One is at the worker and two wait for it; the fourth finds two of them.
    assert local(Gen1(), *[long] * 4) == [False, False, False, True]
    # With a router all are at the worker, the first not yet begun where all come at once.
    assert local(Gen1(), *[long] * 4, prefill_router="round robin") == [False, False, True, True]
    late = [Request(i, 3000, 2) for i in range(4)]
    assert local(Gen1(), *late, prefill_router="round robin") == [False, False, False, True]
    assert local(IslBounding(ratio=1.1), short, long) == [True, False]
    assert local(IslBounding(), short) == [False]  # all of it is to be computed
    assert local(PrefillLoad(), long, long) == [False, True]
    assert local(PrefillLoad(), long, long, prefill_router="least outstanding") == [False, True]
    assert local(IslOrLoad(ratio=1.1), short, long, long) == [True, False, True]
    # The gate: 750 of 10,000 blocks are reserved for the first.
    assert local(PrefillLoad(), long, long, decode_busy_threshold=0.075) == [False, True]
    assert local(PrefillLoad(), long, long, decode_busy_threshold=0.07) == [False, False]


def test_a_prompt_that_no_prefill_worker_could_hold_stays():
    fleet = one_each()
    fleet.prefill[0].max_model_len = 20
    result = fleet_oracle.simulate([Request(0, 19, 50), Request(0, 20, 2), Request(0, 399, 2)], fleet)
    assert [request.is_local for request in result.requests] == [False, True, None]
    assert [request.dropped for request in result.requests] == [False, False, True]


def test_what_the_decode_worker_has_cached_is_not_moved():
    fleet = one_each(transfer=Transfer(2))
    fleet.decode[0].prefix_caching = fleet.prefill[0].prefix_caching = True
    ids = list("abcd")
    requests = [Request(0, 16, 2, ids), Request(100, 16, 2, ids), Request(200, 9, 2, ["a", "x"])]
    result = fleet_oracle.simulate(requests, fleet)
    assert [request.hit_tokens for request in result.requests] == [0, 12, 4]
    assert [request.prefill_hit_tokens for request in result.requests] == [0, 12, 4]
    assert [request.bytes for request in result.requests] == [32, 8, 10]
    check_laws(result)


RULES = st.one_of(
    st.none(),
    st.builds(Gen1, st.integers(0, 40), st.integers(0, 4)),
    st.builds(IslBounding, st.integers(0, 60), st.sampled_from([0.5, 0.7, 1.1])),
    st.builds(PrefillLoad),
    st.builds(IslOrLoad, st.integers(0, 60), st.sampled_from([0.5, 0.7, 1.1])),
)
TRANSFERS = st.none() | st.builds(
    Transfer,
    st.sampled_from([0, 1, 4]),
    st.sampled_from([0.25, 1, 8, float("inf")]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([0, 3]),
    per_descriptor=st.sampled_from([0, 0.5]),
    polling=st.sampled_from([0, 1, 5, 50]),
)


@st.composite
def disaggregated(draw, block_size):
    return Disaggregated(
        draw(st.lists(pools(block_size), min_size=1, max_size=2)),
        draw(st.lists(pools(block_size), min_size=1, max_size=2)),
        prefill_router=draw(st.none() | st.sampled_from(ROUTERS)),
        decode_router=draw(st.sampled_from(ROUTERS)),
        reserve=draw(st.sampled_from(["arrival", "prefill"])),
        first_token=draw(st.sampled_from(["prefill", "decode"])),
        local=draw(RULES),
        decode_busy_threshold=draw(st.sampled_from([None, None, 0.3])),
        transfer=draw(TRANSFERS),
    )


def check_hops(result, fleet):
    """Every request is on every hop once, in order, and computed as often as it should be."""
    size = fleet.decode[0].block_size
    computed = defaultdict(int)
    for step in result.steps:
        for one in step.chosen:
            computed[one.request] += one.tokens
            assert step.worker == (one.request.worker if one.request.of is None else one.request.of.prefill_worker)
    ended = [0] * len(result.workers)
    for request in result.requests:
        if request.completed_at is None:
            continue
        prompt, one = request.prompt_tokens, request.stand_in
        if request.is_local:
            assert request.prefill_worker is None
            assert request.reserved_at is None
            ended[request.worker] += 1
            if not request.preempted:
                assert computed[request] == prompt + request.output_tokens - 1 - request.hit_tokens
            continue
        ended[request.prefill_worker] += 1
        done = computed[one] + sum(one.hits) * size
        assert done == prompt if not request.prefill_preempted else done >= prompt
        times = [request.sent_to_prefill_at, request.prefill_started_at, request.prefill_ended_at]
        moves = fleet.first_token == "decode" or request.output_tokens > 1
        after = [request.transfer_begun_at, request.noticed_at, request.enqueued_at, request.started_at]
        if moves:
            ended[request.worker] += 1
            times += after
            if not request.preempted:
                rest = request.output_tokens - (1 if fleet.first_token == "prefill" else 0)
                assert computed[request] == rest
            if fleet.transfer is not None:
                assert request.bytes == (prompt - request.hit_tokens) * fleet.transfer.bytes_per_token
                least = request.bytes / fleet.transfer.bandwidth + fleet.transfer.latency
                assert request.noticed_at - request.transfer_begun_at >= least * (1 - 1e-12)
        else:
            assert after == [None] * 4
        at = 0 if fleet.reserve == "arrival" else 3
        if moves or fleet.reserve == "arrival":
            times.insert(at, request.reserved_at)
        times = [request.arrived_at, request.routed_at, *times]
        assert times == sorted(times)
        if fleet.first_token == "prefill":
            assert request.token_at[0] == request.prefill_ended_at
    assert [worker.ended for worker in result.workers] == ended


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block_size=st.sampled_from([4, 16]))
def test_a_disaggregated_fleet_keeps_the_laws(data, block_size):
    fleet = data.draw(disaggregated(block_size))
    requests = data.draw(streams(block_size))
    users = data.draw(st.none() | st.integers(1, 10))
    result = fleet_oracle.simulate(requests, fleet, concurrency=users)
    check_laws(result)
    check_hops(result, fleet)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_size=st.sampled_from([4, 16]))
def test_infinite_bandwidth_is_no_transfer(data, block_size):
    fleet = data.draw(disaggregated(block_size))
    requests = data.draw(streams(block_size))
    without, infinite = (
        fleet_oracle.simulate(requests, replace(fleet, transfer=transfer)).requests for transfer in (None, Transfer(4))
    )
    assert [request.token_at for request in without] == [request.token_at for request in infinite]
    assert [request.noticed_at for request in without] == [request.noticed_at for request in infinite]


@settings(max_examples=30, deadline=None)
@given(data=st.data(), block_size=st.sampled_from([4, 16]), limit=st.integers(1, 300))
def test_what_begins_before_the_time_limit_is_as_without(data, block_size, limit):
    fleet = data.draw(disaggregated(block_size))
    requests = data.draw(streams(block_size))
    whole = fleet_oracle.simulate(requests, fleet)
    part = fleet_oracle.simulate(requests, fleet, time_limit=limit)
    begun = [step for step in whole.steps if step.begin < limit]
    assert [(step[:2], step[3:]) for step in begun] == [(step[:2], step[3:]) for step in part.steps]
    for all_, some in zip(whole.requests, part.requests, strict=True):
        assert all_.token_at[: len(some.token_at)] == some.token_at


def test_one_slot_workers_with_a_global_queue_are_an_erlang_c_system():
    servers, load, number = 3, 2.1, 8_000
    rng = np.random.default_rng(5)
    at = np.cumsum(rng.exponential(1 / load, number))
    lengths = dict(enumerate(rng.exponential(1.0, number)))
    one_slot = Workers(servers, lambda: TokenBudget(100), 1, lambda chosen: lengths[chosen[0].request.index])
    fleet = Disaggregated([one_slot], [Workers(1, lambda: TokenBudget(100), 1, ten, blocks=100)])
    result = fleet_oracle.simulate([Request(float(t), 1, 1) for t in at], fleet)
    waits = np.array([request.prefill_started_at - request.arrived_at for request in result.requests])
    top = load**servers / factorial(servers) * servers / (servers - load)
    waiting = top / (sum(load**k / factorial(k) for k in range(servers)) + top)
    batches = waits[: number // 40 * 40].reshape(40, -1).mean(axis=1)
    error = batches.std(ddof=1) / len(batches) ** 0.5
    assert batches.mean() == pytest.approx(waiting / (servers - load), abs=3 * error)
    assert (waits > 0).mean() == pytest.approx(waiting, abs=0.03)
