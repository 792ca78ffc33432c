"""The oracle of fleets that change and fail: against the one of those that don't, and against cases done by hand."""

import random
from dataclasses import fields
from itertools import pairwise

import changing_oracle
import fleet_oracle
import pytest
import token_oracle
from changing_oracle import ControlPlane
from fleet_oracle import Cluster, Disaggregated, Gen1, PrefillLoad, Transfer, Workers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fleet_against_oracle import a_fleet, a_trace, draws
from test_fleet_oracle import OVERHEADS, ROUTERS, disaggregated, pools, ten
from test_token_oracle import streams
from token_oracle import Request, TokenBudget

INF = float("inf")


# Nothing changes


def check_same(requests, fleet, **common):
    ours = changing_oracle.simulate(requests, fleet, **common)
    theirs = fleet_oracle.simulate(requests, fleet, **common)
    names = [each.name for each in fields(fleet_oracle.FleetRequest) if each.name not in {"of", "stand_in", "able"}]
    for one, other in zip(ours.requests, theirs.requests, strict=True):
        for name in names:
            assert getattr(one, name) == getattr(other, name), name
        assert one.failed_at is None
        assert (one.migrations, one.retries) == (0, 0)
    assert ours.routed == theirs.routed
    assert len(ours.steps) == len(theirs.steps)
    for one, other in zip(ours.steps, theirs.steps, strict=True):
        assert (one[:2], one[3:]) == (other[:2], other[3:])
        for this, that in zip(one.chosen, other.chosen, strict=True):
            assert this.request.index == that.request.index
            assert (this.before, this.tokens, this.is_prefill) == (that.before, that.tokens, that.is_prefill)
    for one, other in zip(ours.workers, theirs.workers, strict=True):
        assert (one.ended, one.preemptions) == (other.ended, other.preemptions)
        assert one.pool.block_of == other.pool.block_of
        assert one.changes == [(0, "ready", "initial")]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    block_size=st.sampled_from([4, 16]),
    is_cluster=st.booleans(),
    overheads=OVERHEADS,
    time_limit=st.sampled_from([INF, INF, 150]),
)
def test_where_nothing_changes_all_is_as_in_a_fleet(data, block_size, is_cluster, overheads, time_limit):
    if is_cluster:
        there = data.draw(st.lists(pools(block_size), min_size=1, max_size=2))
        fleet = Cluster(there, data.draw(st.sampled_from(ROUTERS)))
    else:
        fleet = data.draw(disaggregated(block_size))
    users = data.draw(st.none() | st.integers(1, 10))
    check_same(
        data.draw(streams(block_size)), fleet, concurrency=users, think_time=3, overheads=overheads,
        time_limit=time_limit,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_where_nothing_changes_the_kernels_scenarios_are_as_in_a_fleet(seed):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    requests, load = a_trace(rng, block_size)
    _, literal, overheads = a_fleet(rng, seed % 2 == 0, load, block_size, ["fcfs", *token_oracle.ORDERS])
    check_same(requests, literal, overheads=overheads, draw=draws(load))


# Laws


@st.composite
def controls(draw, workers):
    """Crashes and outages that end: every request gets an end without a time limit."""
    at = st.one_of(st.integers(0, 400), st.floats(0, 400))
    return ControlPlane(
        request_plane=draw(st.sampled_from([0, 0, 1.5])),
        queue_push=draw(st.sampled_from([0, 0, 1.5])),
        queue_pop=draw(st.sampled_from([0, 0, 2.5])),
        watch=draw(st.sampled_from([0, 0, 1.5, 30])),
        ttl=draw(st.sampled_from([10, 40])),
        renewal=draw(st.sampled_from([0, 5])),
        connect_timeout=draw(st.sampled_from([1, 7])),
        shun=draw(st.sampled_from([0, 5, 50])),
        break_delay=draw(st.sampled_from([0, 0, 3, 40])),
        migration_limit=draw(st.sampled_from([0, 1, 3])),
        crashes=draw(st.lists(st.tuples(at, st.integers(0, workers - 1)), max_size=12)),
        restarts=draw(st.sampled_from([True, True, False])),
        outages=draw(st.lists(st.tuples(at, st.sampled_from([3, 15, 60])), max_size=2)),
    )


def check_laws(result, limit):
    for request in result.requests:
        if request.routed_at is None:
            continue
        ends = [request.dropped, request.completed_at is not None, request.failed_at is not None]
        assert sum(ends) == (0 if request in result.stuck else 1)
        assert request.migrations <= limit
        assert len(request.token_at) <= request.output_tokens
        assert request.token_at == sorted(set(request.token_at))
        if request.completed_at is not None:
            assert len(request.token_at) == request.output_tokens
        if request.failed_at is not None:
            assert request.reason in {"crash", "no worker"}
            assert all(time <= request.failed_at for time in request.token_at)
    for worker in result.workers:
        assert not worker.pinned
        assert not worker.astray
        # Those in the global queue keep what is reserved for them, which others then wait for.
        assert set(worker.sent) == {request for request in result.stuck if request in worker.sent}
        blocks = {block for request in worker.sent for block in request.blocks}
        assert sum(count > 0 for count in worker.pool.holders) == len(blocks)
        assert set(worker.inbox + worker.waiting + worker.running) <= set(worker.sent)
        phases = [phase for _, phase, _ in worker.changes]
        after = {
            "off": {"starting"},
            "starting": {"starting", "ready", "off"},
            "ready": {"draining", "starting", "dead", "off"},
            "draining": {"off"},
            "dead": {"starting"},
        }
        assert all(later in after[phase] for phase, later in pairwise(phases))
        for step in result.steps:
            if step.worker == worker.number:
                assert phase_at(worker, step.begin) in {"ready", "draining"}
                assert 0 < step.used <= worker.blocks


def phase_at(worker, time):
    """As it was before what happens then, if it changed then to be off or starting."""
    phase = None
    for since, name, _ in worker.changes:
        if since < time or (since == time and name in {"ready", "draining"}):
            phase = name
    return phase


@settings(max_examples=200, deadline=None)
@given(data=st.data(), block_size=st.sampled_from([4, 16]), is_cluster=st.booleans(), overheads=OVERHEADS)
def test_each_request_has_one_end_and_nothing_is_left_behind(data, block_size, is_cluster, overheads):
    if is_cluster:
        there = data.draw(st.lists(pools(block_size), min_size=1, max_size=2))
        fleet = Cluster(there, data.draw(st.sampled_from(ROUTERS)))
    else:
        fleet = data.draw(disaggregated(block_size))
        there = [*fleet.prefill, *fleet.decode]
    for pool in there:
        pool.spare = data.draw(st.integers(0, 2))
        pool.start_up_time = data.draw(st.sampled_from([0, 0, 7, 100]))
        pool.start_up_std = data.draw(st.sampled_from([0, 3])) if pool.start_up_time else 0
    control = data.draw(controls(sum(pool.count + pool.spare for pool in there)))
    changes = data.draw(
        st.lists(st.tuples(st.integers(0, 400), st.sampled_from(["prefill", "decode"]), st.integers(0, 4)), max_size=6)
    )
    requests = data.draw(streams(block_size))
    users = data.draw(st.none() | st.integers(1, 10))
    result = changing_oracle.simulate(
        requests, fleet, control=control, changes=changes, concurrency=users, think_time=3, overheads=overheads
    )
    check_laws(result, control.migration_limit)


def some_changes(rng, literal):
    """Spare workers for the fleet, and what else the oracle is given: crashes, outages, latencies, changes of size."""
    there = [*literal.pools] if isinstance(literal, Cluster) else [*literal.prefill, *literal.decode]
    for pool in there:
        pool.spare = rng.choice([0, 1, 2])
        pool.start_up_time = rng.choice([0.0, 5.0, 30.0])
        pool.start_up_std = rng.choice([0.0, 3.0]) if pool.start_up_time else 0.0
        pool.gpus = rng.choice([1, 2])
    number = sum(pool.count + pool.spare for pool in there)
    latest = rng.choice([30, 200])

    def instant():
        return float(rng.choice([rng.randint(0, latest), rng.uniform(0, latest)]))

    control = ControlPlane(
        request_plane=rng.choice([0.0, 0.0, 0.5]),
        queue_push=rng.choice([0.0, 0.0, 1.5]),
        queue_pop=rng.choice([0.0, 0.0, 2.5]),
        watch=rng.choice([0.0, 0.0, 1.5, 20.0]),
        ttl=rng.choice([1.0, 10.0]),
        renewal=rng.choice([0.0, 1.0]),
        connect_timeout=rng.choice([0.25, 3.0]),
        shun=rng.choice([0.0, 1.0, 5.0]),
        break_delay=rng.choice([0.0, 0.0, 2.0, 12.0]),
        migration_limit=rng.choice([0, 1, 3, 100]),
        mtbf=rng.choice([INF, INF, 100.0]),
        crashes=[(instant(), rng.randrange(number)) for _ in range(rng.choice([0, 3, 20]))],
        restarts=rng.random() < 0.8,
        outages=[(instant(), rng.choice([3.0, 15.0, 40.0])) for _ in range(rng.choice([0, 0, 1, 2]))],
    )
    changes = [
        (instant(), rng.choice(["prefill", "decode"]), rng.randint(0, 5)) for _ in range(rng.choice([0, 0, 3, 8]))
    ]
    return {"control": control, "changes": changes}


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_request_of_the_kernels_scenarios_has_one_end(seed):
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16, 5])
    requests, load = a_trace(rng, block_size)
    _, literal, overheads = a_fleet(rng, rng.random() < 0.7, load, block_size, ["fcfs", *token_oracle.ORDERS])
    there = some_changes(rng, literal)
    users = rng.choice([None, None, 3])
    limit = 5000.0
    result = changing_oracle.simulate(
        requests, literal, **there, overheads=overheads, concurrency=users, think_time=3.0, draw=draws(load),
        time_limit=limit,
    )  # fmt: skip
    if result.end < limit:
        check_laws(result, there["control"].migration_limit)


# By hand. Steps take 10; a block has 4 tokens, memory is ample and a batch takes four, unless said otherwise.


def some(count, budget=10_000, **settings):
    there = {"slots": 4, "blocks": 100, "block_size": 4, "duration": ten} | settings
    return Workers(count, lambda: TokenBudget(budget), **there)


def apart(prefill, decode, *, of_prefill=None, of_decode=None, **settings):
    return Disaggregated([some(prefill, **(of_prefill or {}))], [some(decode, **(of_decode or {}))], **settings)


def go(
    requests, fleet, *, changes=(), planner=None, interval=INF, draws=None, concurrency=None, think_time=0, **control
):
    """Without a part of its delay that is drawn, a crash is noticed 10 later."""
    control = ControlPlane(**({"renewal": 0} | control))
    result = changing_oracle.simulate(
        requests, fleet, control=control, changes=changes, planner=planner, interval=interval, draws=draws,
        concurrency=concurrency, think_time=think_time,
    )  # fmt: skip
    check_laws(result, control.migration_limit)
    assert not result.stuck
    return result


def column(result, name):
    return [getattr(request, name) for request in result.requests]


def test_a_crash_while_decoding():
    # The step from 0 to 10 is under way at 5: its token counts.
    fleet = Cluster([some(2, start_up_time=20)])
    result = go([Request(0, 8, 3), Request(50, 8, 1)], fleet, crashes=[(5, 0)])
    one = result.requests[0]
    assert (one.token_at, one.completed_at, one.failed_at, one.reason) == ([10], None, 10, "crash")
    assert result.workers[0].changes == [(0, "ready", "initial"), (10, "starting", "crash"), (30, "ready", "started")]
    # It goes to the worker whose turn it is, which computes 8 + 1 tokens from 10 to 20, and one from 20 to 30.
    result = go([Request(0, 8, 3)], fleet, crashes=[(5, 0)], migration_limit=1)
    one = result.requests[0]
    assert (one.token_at, one.worker, one.migrations, one.retries) == ([10, 20, 30], 1, 1, 0)
    steps = [
        (step.worker, step.begin, [(each.tokens, each.is_prefill) for each in step.chosen]) for step in result.steps
    ]
    assert steps == [(0, 0, [(8, True)]), (1, 10, [(9, True)]), (1, 20, [(1, False)])]
    # At 10 a step ends: it is lost only with the next; at 10.5 that one is under way.
    assert go([Request(0, 8, 3)], fleet, crashes=[(10, 0)]).requests[0].token_at == [10]
    assert go([Request(0, 8, 3)], fleet, crashes=[(10.5, 0)]).requests[0].token_at == [10, 20]


def test_a_crash_while_a_prompt_is_computed():
    # 4 of its 8 tokens are computed by 10, and computed anew from then on.
    fleet = Cluster([some(2, budget=4)])
    result = go([Request(0, 8, 2)], fleet, crashes=[(5, 0)], migration_limit=1)
    assert column(result, "token_at") == [[30, 40]]
    assert column(go([Request(0, 8, 2)], fleet, crashes=[(5, 0)]), "failed_at") == [10]
    # The turn is worker 0's again until 11, then it is at worker 1, whose budget the other takes until 20. It finds "a"
    # there: 4 tokens are left.
    cached = Cluster([some(2, budget=4, prefix_caching=True, start_up_time=100)])
    requests = [Request(0, 8, 1, ["a", "b"]), Request(0, 8, 1, ["a", "c"])]
    result = go(requests, cached, crashes=[(5, 0)], migration_limit=1)
    assert column(result, "token_at") == [[30], [20]]
    assert column(result, "hits") == [[0, 1], [0]]


def test_migrations_have_a_limit():
    # Worker 0 is dead from 10, 1 from 20, 2 from 30, each after a token.
    def serve(limit):
        (one,) = go(
            [Request(0, 8, 9)], Cluster([some(3)]), crashes=[(5, 0), (15, 1), (25, 2)], restarts=False,
            migration_limit=limit,
        ).requests  # fmt: skip
        return one.token_at, one.failed_at, one.reason, one.migrations, one.retries

    assert serve(0) == ([10], 10, "crash", 0, 0)
    assert serve(1) == ([10, 20], 20, "crash", 1, 0)
    assert serve(2) == ([10, 20, 30], 30, "crash", 2, 0)
    # At 30 only worker 2 is still taken for ready; that it isn't is known at 31, and no other is there then.
    assert serve(3) == ([10, 20, 30], 31, "no worker", 3, 1)


def test_dispatches_to_the_dead_are_retried_and_these_are_shunned():
    # Worker 0 is dead from 0.5 on, which is noticed at 10.5.
    fleet = Cluster([some(2, start_up_time=100)])
    requests = [Request(at, 8, 1) for at in (1, 3, 7, 10, 14)]
    result = go(requests, fleet, crashes=[(0.5, 0)])
    # At 1 it is its turn: known at 2, and shunned until 7. So the second goes to 1, the third tries it again; it is
    # shunned until 13 then, and unknown at 14.
    assert column(result, "retries") == [1, 0, 1, 0, 0]
    assert column(result, "worker") == [1] * 5
    # From 2 on, from 12, from 22 (two of them)
    assert column(result, "token_at") == [[12], [22], [22], [22], [32]]
    # Not shunned at all: at 3 the turn is worker 0's, at 7 too (1 came between), and at 10.
    assert column(go(requests, fleet, crashes=[(0.5, 0)], shun=0), "retries") == [1, 1, 1, 1, 0]
    assert column(go(requests[:1], fleet, crashes=[(0.5, 0)], connect_timeout=3), "token_at") == [[14]]
    # The only one, and it is shunned: nobody is left. The last comes when it has started again.
    alone = Cluster([some(1, start_up_time=20)])
    result = go([Request(1, 8, 1), Request(3, 8, 1), Request(21, 8, 1)], alone, crashes=[(0.5, 0)])
    assert column(result, "failed_at") == [2, 3, None]
    assert column(result, "reason") == ["no worker", "no worker", None]
    assert result.requests[2].token_at == [31]


def test_a_crash_is_noticed_by_the_lease():
    # The dead worker looks idle, so each tries it first until it is noticed, once, and goes to the other one then.
    fleet = Cluster([some(2, start_up_time=1000)], "least outstanding")
    requests = [Request(at / 4, 8, 1) for at in range(60)]

    def noticed(**settings):
        """At or after the last of those that find it dead, and before the first that doesn't."""
        result = go(requests, fleet, crashes=[(0, 0)], shun=0.125, connect_timeout=0.0625, **settings)
        retries = column(result, "retries")
        number = sum(retries)
        assert retries == [1] * number + [0] * (60 - number)
        return (number - 1) / 4, number / 4

    asked = []

    def draws(*which):
        asked.append(which)
        return 3.125

    assert noticed() == (9.75, 10)
    assert noticed(ttl=7) == (6.75, 7)
    # At 6.875
    assert noticed(renewal=5, draws=draws) == (6.75, 7)
    assert asked == [("lease", 0, 0)]
    before, after = noticed(renewal=5)
    assert after >= 5
    assert before < 10


def test_two_at_once():
    # Both die at 10, worker 0 first: its request goes to 2, whose turn it is. The other's turns are 0, until 11, and 1,
    # until 12. Worker 2 computes the first from 10 to 20, both from 20 on.
    result = go(
        [Request(0, 8, 3), Request(0, 8, 3)], Cluster([some(3, start_up_time=100)]), crashes=[(5, 1), (5, 0)],
        migration_limit=1,
    )  # fmt: skip
    assert column(result, "token_at") == [[10, 20, 30], [10, 30, 40]]
    assert column(result, "retries") == [0, 2]
    assert column(result, "worker") == [2, 2]


def test_streams_break_later():
    # Dead at 10, known to the client at 14.
    fleet = Cluster([some(2, start_up_time=100)])
    one = go([Request(0, 8, 3)], fleet, crashes=[(5, 0)], break_delay=4).requests[0]
    assert (one.token_at, one.failed_at) == ([10], 14)
    one = go([Request(0, 8, 3)], fleet, crashes=[(5, 0)], break_delay=4, migration_limit=1).requests[0]
    assert one.token_at == [10, 24, 34]
    # Till then it is in the books of the router: at 12 both workers have one, at 15 only the second one has two.
    requests = [Request(0, 8, 3), Request(0, 8, 9), Request(12, 8, 1), Request(15, 8, 1)]
    fleet.router = "least outstanding"
    fleet.pools[0].start_up_time = 1
    result = go(requests, fleet, crashes=[(5, 0)], break_delay=4)
    assert column(result, "worker") == [0, 1, 0, 0]
    result = go(requests, fleet, crashes=[(5, 0)], break_delay=4.5)
    assert column(result, "failed_at")[0] == 14.5


def test_lives_are_drawn():
    asked = []

    def draws(*which):
        asked.append(which)
        return 15 if which == ("life", 0, 0) else 1000

    one = go([Request(0, 8, 5)], Cluster([some(1, start_up_time=7)]), mtbf=50, draws=draws).requests[0]
    # At 15 the second step is under way; restarted at 27, but the run ends at 20.
    assert (one.token_at, one.failed_at) == ([10, 20], 20)
    assert asked == [("life", 0, 0)]
    asked.clear()
    go([Request(0, 8, 5), Request(40, 8, 1)], Cluster([some(1, start_up_time=7)]), mtbf=50, draws=draws)
    assert asked == [("life", 0, 0), ("life", 0, 1)]
    # As long as the mean, on the whole: 60 lives of 100 each, with a deviation of 13 of their mean
    fleet = Cluster([some(60, start_up_time=1e9)])
    result = go([Request(2000, 8, 1)], fleet, mtbf=100)
    lives = [worker.changes[1][0] for worker in result.workers if len(worker.changes) > 1]
    assert len(lives) == 60
    assert sum(lives) / 60 == pytest.approx(100, abs=40)


def test_a_start_takes_time():
    fleet = Cluster([some(1, spare=1, start_up_time=20)])
    requests = [Request(at, 8, 1) for at in (24, 24.5, 25, 26, 27)]
    changes = [(5, "decode", 2)]
    result = go(requests, fleet, changes=changes)
    assert result.workers[1].changes == [(0, "off", "initial"), (5, "starting", "scale up"), (25, "ready", "started")]
    assert result.scaling == [(5, "decode", 1, 1)]
    assert column(result, "worker") == [0, 0, 1, 0, 1]
    # Known 2 later, so before the last of them
    assert column(go(requests, fleet, changes=changes, watch=2), "worker") == [0, 0, 0, 0, 1]
    # By a draw
    fleet.pools[0].start_up_std = 5
    asked = []
    result = go(requests, fleet, changes=changes, draws=lambda *which: asked.append(which) or 21)
    assert asked == [("start_up", 1, 0)]
    assert result.workers[1].changes[-1] == (26, "ready", "started")
    # One more than there are does nothing; one that starts goes off at once, not below one that is there.
    result = go(requests, fleet, changes=[(5, "decode", 9), (6, "decode", 0), (7, "prefill", 3)])
    assert result.workers[1].changes == [(0, "off", "initial"), (5, "starting", "scale up"), (6, "off", "scale down")]
    assert result.scaling == [(5, "decode", 1, 1), (6, "decode", -1, 1)]
    assert result.workers[0].changes == [(0, "ready", "initial")]


def test_notices_that_come_too_late_do_nothing():
    # Ready at 5, which would be known at 25, and off at 10
    fleet = Cluster([some(1, spare=1)])
    requests = [Request(at, 8, 1) for at in (9, 30, 31)]
    result = go(requests, fleet, changes=[(5, "decode", 2), (10, "decode", 1)], watch=20)
    assert column(result, "worker") == [0] * 3
    assert column(result, "retries") == [0] * 3
    # Ready at 5, dead at 7, ready at 7 again: known from 27 on
    requests = [Request(at, 8, 1) for at in (26, 26.5, 27)]
    result = go(requests, fleet, changes=[(5, "decode", 2)], crashes=[(7, 1)], watch=20)
    assert column(result, "worker") == [0, 0, 1]
    # Dead at 1, ready anew at 3: that it died isn't noticed at 11 any more.
    result = go([Request(12, 8, 1)], Cluster([some(1, start_up_time=2)]), crashes=[(1, 0)])
    assert column(result, "token_at") == [[22]]


def test_a_crash_while_starting():
    fleet = Cluster([some(1, spare=1, start_up_time=20)])
    common = {"changes": [(5, "decode", 2)], "crashes": [(3, 1), (15, 1)]}
    # At 3 it is off. It begins anew at 15.
    result = go([Request(40, 8, 1)], fleet, **common)
    phases = [(5, "starting", "scale up"), (15, "starting", "crash"), (35, "ready", "started")]
    assert result.workers[1].changes[1:] == phases
    result = go([Request(40, 8, 1)], fleet, restarts=False, **common)
    assert result.workers[1].changes[1:] == [(5, "starting", "scale up"), (15, "off", "crash")]
    # It can be started again.
    common["changes"] += [(16, "decode", 2)]
    result = go([Request(40, 8, 1)], fleet, restarts=False, **common)
    assert result.workers[1].changes[3:] == [(16, "starting", "scale up"), (36, "ready", "started")]


def test_a_draining_worker_ends_what_it_has():
    fleet = Cluster([some(2)])
    requests = [Request(0, 8, 3), Request(0, 8, 3), Request(6, 8, 1), Request(8, 8, 1)]
    common = {"changes": [(5, "decode", 1)]}
    result = go(requests, fleet, **common)
    assert column(result, "worker") == [0, 1, 0, 0]
    assert column(result, "completed_at") == [30, 30, 20, 20]
    assert result.workers[1].changes == [(0, "ready", "initial"), (5, "draining", "scale down"), (30, "off", "drained")]
    assert result.scaling == [(5, "decode", -1, 1)]
    # Until 7 the router sends it more: the one of 6 has its turn after worker 0, the one of 8 has not.
    result = go([*requests[:2], Request(6, 8, 1), Request(6, 8, 4), Request(8, 8, 1)], fleet, watch=2, **common)
    assert column(result, "worker") == [0, 1, 0, 1, 0]
    assert result.workers[1].changes[1:] == [(5, "draining", "scale down"), (50, "off", "drained")]
    # One that has nothing is off at once, and so can't take what it is sent before the router knows.
    result = go([Request(0, 8, 1), Request(21, 8, 1)], fleet, changes=[(20, "decode", 1)], watch=2)
    assert result.workers[1].changes[1:] == [(20, "draining", "scale down"), (20, "off", "drained")]
    assert column(result, "retries") == [0, 1]
    assert column(result, "token_at") == [[10], [32]]


def test_a_crash_while_draining():
    fleet = Cluster([some(2)])
    result = go([Request(0, 8, 5)] * 2, fleet, changes=[(5, "decode", 1)], crashes=[(12, 1)], migration_limit=1)
    phases = [(5, "draining", "scale down"), (20, "off", "crash")]
    assert result.workers[1].changes[1:] == phases
    # At 20 it moves to worker 0, whose next step has begun then.
    assert column(result, "token_at") == [[10, 20, 30, 40, 50], [10, 20, 40, 50, 60]]
    assert column(result, "worker") == [0, 0]


def test_planners_are_asked():
    asked = []

    def planner(now, fleet):
        asked.append((now, fleet.size("decode"), len(fleet.workers[0].waiting)))
        return [("decode", 1)] if fleet.workers[0].waiting else [("decode", -1)]

    # One at a time: at 4 the second to come is still in the inbox, at 12, 16 and 20 it waits (at 20 the step's end
    # comes later). At 24 it runs; the only other one, which is idle, is off then.
    fleet = Cluster([some(1, slots=1, spare=1, start_up_time=6)])
    result = go([Request(0, 8, 2), Request(1, 8, 1)], fleet, planner=planner, interval=4)
    assert asked == [(4, 1, 0), (8, 1, 0), (12, 1, 1), (16, 2, 1), (20, 2, 1), (24, 2, 0), (28, 1, 0)]
    phases = [(12, "starting"), (18, "ready"), (24, "draining"), (24, "off")]
    assert [change[:2] for change in result.workers[1].changes[1:]] == phases
    # An outage from 8 on, for 8: it isn't asked at 8 and 12.
    asked.clear()
    go([Request(0, 8, 2), Request(1, 8, 1)], fleet, planner=planner, interval=4, outages=[(8, 8)])
    assert [now for now, _, _ in asked] == [4, 16, 20, 24, 28]


def test_gpu_seconds():
    # Two GPUs each: worker 0 from 0 to 60; worker 1 starts at 5, and drains from 30 until the step to 50 has ended.
    fleet = Cluster([some(1, spare=2, start_up_time=20, gpus=2)])
    requests = [Request(0, 8, 6), Request(25, 8, 1), Request(30, 8, 2)]
    result = go(requests, fleet, changes=[(5, "decode", 2), (31, "decode", 1)])
    assert column(result, "worker") == [0, 1, 0]
    assert result.workers[1].changes[-1] == (35, "off", "drained")
    assert result.end == 60
    assert result.gpu_seconds() == 2 * (60 + 30)
    # Cut off at 40
    result = changing_oracle.simulate(requests, fleet, changes=[(5, "decode", 2)], time_limit=40)
    assert result.end == 40
    assert result.gpu_seconds() == 2 * (40 + 35)


def test_what_follows_a_request_that_failed():
    fleet = Cluster([some(1, start_up_time=2)])
    # Failed at 10; asked again 5 later, as after an end
    result = go([Request(0, 8, 3)] * 2, fleet, crashes=[(5, 0)], concurrency=1, think_time=5)
    assert column(result, "arrived_at") == [0, 15]
    assert column(result, "failed_at") == [10, None]
    result = go([Request(0, 8, 3), Request(0, 8, 2, after=0, think=3)], fleet, crashes=[(5, 0)])
    assert column(result, "arrived_at") == [0, 13]
    # At 10 there's none; at 11 it is unknown still, as it is shunned until 16
    result = go([Request(0, 8, 3)] * 5, fleet, crashes=[(5, 0)], concurrency=1)
    assert column(result, "arrived_at") == [0, 10, 12, 13, 14]
    assert column(result, "reason") == ["crash"] + ["no worker"] * 4


# By hand, where prefill is kept apart: the prefill workers come first, and 10 tokens take 10 to move

SLOW = Transfer(1, bandwidth=1)


@pytest.mark.parametrize("reserve", ["arrival", "prefill"])
@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_the_decode_worker_crashes_in_a_transfer(reserve, first_token):
    common = {"transfer": SLOW, "reserve": reserve, "first_token": first_token}
    result = go([Request(0, 10, 3)], apart(1, 2, **common), crashes=[(15, 1)], restarts=False)
    (one,) = result.requests
    assert (one.worker, one.migrations, one.retries) == (2, 0, 0)
    assert (one.prefill_ended_at, one.reserved_at, one.transfer_begun_at, one.noticed_at) == (10, 15, 15, 25)
    assert one.token_at == ([10, 35, 45] if first_token == "prefill" else [35, 45, 55])
    # There's only one, and it is dead, as is known at 16.
    result = go([Request(0, 10, 3)], apart(1, 1, **common), crashes=[(15, 1)], restarts=False, migration_limit=9)
    (one,) = result.requests
    assert (one.failed_at, one.reason, one.migrations, one.retries) == (16, "no worker", 0, 1)
    assert one.token_at == ([10] if first_token == "prefill" else [])
    # It is at once ready again.
    result = go([Request(0, 10, 3)], apart(1, 1, **common), crashes=[(15, 1)])
    assert result.requests[0].noticed_at == 25


@pytest.mark.parametrize("reserve", ["arrival", "prefill"])
@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("router", [None, "round robin"])
def test_the_prefill_worker_crashes_in_a_transfer(reserve, first_token, router):
    fleet = apart(2, 1, transfer=SLOW, reserve=reserve, first_token=first_token, prefill_router=router)
    result = go([Request(0, 10, 3)], fleet, crashes=[(15, 0)], restarts=False)
    (one,) = result.requests
    assert (one.failed_at, one.reason) == (15, "crash")
    assert one.token_at == ([10] if first_token == "prefill" else [])
    # Prefilled anew from 15 to 25, and moved until 35; what is reserved before a prefill stays reserved.
    result = go([Request(0, 10, 3)], fleet, crashes=[(15, 0)], restarts=False, migration_limit=1)
    (one,) = result.requests
    assert (one.prefill_worker, one.migrations, one.retries) == (1, 1, 0)
    assert one.reserved_at == (0 if reserve == "arrival" else 25)
    assert (one.sent_to_prefill_at, one.prefill_ended_at) == (15, 25)
    assert one.prefill_started_at == (0 if first_token == "prefill" else 15)  # that of its first token
    assert (one.transfer_begun_at, one.noticed_at) == (25, 35)
    assert one.token_at == ([10, 45, 55] if first_token == "prefill" else [45, 55, 65])


def test_a_link_is_free_again_when_a_transfer_breaks():
    # Two transfers of 10 share the decode worker's link from 10 on; when one breaks at 16, 7 are left of the other.
    fleet = apart(2, 1, transfer=SLOW)
    result = go([Request(0, 10, 2)] * 2, fleet, crashes=[(16, 0)], restarts=False)
    assert column(result, "failed_at") == [16, None]
    assert column(result, "noticed_at") == [None, 23]


def test_the_prefill_worker_crashes_at_the_prefill():
    # 4 of 8 tokens are computed at 10, when it dies: all of it is computed from 10 to 30 by the other.
    fleet = apart(2, 1, of_prefill={"budget": 4, "slots": 1})
    requests = [Request(0, 8, 2), Request(0, 8, 2)]
    result = go(requests, fleet, crashes=[(5, 0)], restarts=False, migration_limit=1)
    # From the queue, as the other has no place until 20
    assert column(result, "sent_to_prefill_at") == [20, 0]
    assert column(result, "prefill_ended_at") == [40, 20]
    assert column(result, "token_at") == [[40, 50], [20, 30]]
    assert column(result, "migrations") == [1, 0]
    assert column(go(requests, fleet, crashes=[(5, 0)], restarts=False), "failed_at") == [10, None]
    # Until it has started anew, at 17, those of the queue wait; a router would fail them.
    alone = apart(1, 1, of_prefill={"start_up_time": 7})
    result = go([Request(12, 8, 2)], alone, crashes=[(10, 0)])
    assert column(result, "token_at") == [[27, 37]]
    alone.prefill_router = "round robin"
    result = go([Request(12, 8, 2)], alone, crashes=[(10, 0)])
    (one,) = result.requests
    assert (one.failed_at, one.reason, one.retries) == (13, "no worker", 1)


def test_both_workers_crash():
    # Worker 2 is dead from 5 on, worker 0 from 10, when half of the prompt is computed: blocks are reserved at worker 3
    # before it is prefilled anew, from 10 to 30, or after.
    fleet = apart(2, 2, of_prefill={"budget": 4})
    common = {"crashes": [(5, 2), (7, 0)], "restarts": False, "migration_limit": 1}
    for reserve, at in (("arrival", 10), ("prefill", 30)):
        fleet.reserve = reserve
        (one,) = go([Request(0, 8, 2)], fleet, **common).requests
        assert (one.prefill_ended_at, one.migrations) == (30, 1)
        assert (one.worker, one.retries) == (3, 0)
        assert one.reserved_at == at
        assert one.token_at == [30, 40]


@pytest.mark.parametrize("first_token", ["prefill", "decode"])
def test_the_decode_worker_crashes_before_the_prefill_has_ended(first_token):
    fleet = apart(1, 2, transfer=SLOW, first_token=first_token)
    result = go([Request(0, 10, 3)], fleet, crashes=[(5, 1)], restarts=False)
    (one,) = result.requests
    assert (one.worker, one.migrations, one.reserved_at, one.noticed_at) == (2, 0, 10, 20)
    assert one.token_at == ([10, 30, 40] if first_token == "prefill" else [30, 40, 50])
    # It learns of it only at 12: the transfer that could begin at 10 doesn't before.
    result = go([Request(0, 10, 3)], fleet, crashes=[(5, 1)], restarts=False, break_delay=7)
    (one,) = result.requests
    assert (one.worker, one.migrations, one.reserved_at, one.noticed_at) == (2, 0, 12, 22)


def test_the_decode_worker_crashes_while_it_decodes():
    fleet = apart(1, 2, transfer=SLOW)
    result = go([Request(0, 10, 4)], fleet, crashes=[(25, 1)], restarts=False, migration_limit=1)
    (one,) = result.requests
    # A token at 10 and at 30; then 12 tokens are computed where it decodes, by 40.
    assert one.token_at == [10, 30, 40, 50]
    assert (one.is_local, one.migrations, one.prefill_ended_at, one.noticed_at) == (False, 1, 10, 20)
    assert [(step.worker, step.chosen[0].tokens) for step in result.steps] == [(0, 10), (1, 1), (2, 12), (2, 1)]
    assert go([Request(0, 10, 4)], fleet, crashes=[(25, 1)]).requests[0].failed_at == 30


def test_who_has_no_token_goes_the_whole_way_again():
    # Worker 1 decodes one at a time. Both are there at 10; the first has a token at 20, when it dies.
    fleet = apart(1, 1, of_decode={"slots": 1, "spare": 1}, first_token="decode")
    result = go(
        [Request(0, 10, 5), Request(0, 10, 2)], fleet, changes=[(12, "decode", 2)], crashes=[(15, 1)], restarts=False,
        migration_limit=1,
    )  # fmt: skip
    # The first goes to 2. The turn is 1's then, until 21; so to 2 again, reserved at 21, prefilled from then to 31, and
    # decoded when the first has ended.
    assert column(result, "token_at") == [[20, 30, 40, 50, 60], [70, 80]]
    assert column(result, "retries") == [0, 1]
    assert column(result, "migrations") == [1, 1]
    assert column(result, "reserved_at") == [0, 21]
    assert column(result, "prefill_ended_at") == [10, 31]
    # Worker 0 for 80, worker 1 for 20, worker 2 from 12 on
    assert (result.end, result.gpu_seconds()) == (80, 80 + 20 + 68)


def test_a_place_in_line_is_lost_with_the_prefill_worker():
    # Worker 0 prefills the first and the third, which hold 4 of the decode worker's 8 blocks each until 30. The second
    # waits for 3.
    fleet = apart(2, 1, of_prefill={"start_up_time": 100}, of_decode={"blocks": 8}, reserve="prefill")
    requests = [Request(0, 12, 3)] * 3
    result = go(requests, fleet)
    assert column(result, "prefill_worker") == [0, 1, 0]
    assert column(result, "prefill_ended_at") == [10, 10, 10]
    assert column(result, "reserved_at") == [10, 30, 10]
    assert column(result, "token_at") == [[10, 20, 30], [10, 40, 50], [10, 20, 30]]
    assert column(go(requests, fleet, crashes=[(15, 1)]), "failed_at") == [None, 15, None]
    result = go(requests, fleet, crashes=[(15, 1)], migration_limit=1)
    assert column(result, "prefill_worker") == [0, 0, 0]
    assert column(result, "prefill_ended_at") == [10, 25, 10]
    assert column(result, "reserved_at") == [10, 30, 10]
    assert column(result, "token_at")[1] == [10, 40, 50]
    # Another one, which comes from worker 0 at 24 (of the step that begins at 14), is before it in the line then.
    result = go([*requests, Request(14, 12, 3)], fleet, crashes=[(15, 1)], migration_limit=1)
    assert column(result, "prefill_ended_at") == [10, 34, 10, 24]
    assert column(result, "reserved_at") == [10, 34, 10, 30]


def test_waiting_for_blocks_at_a_decode_worker_that_crashes():
    # The second waits at worker 1, where all but one of the blocks are held, and isn't prefilled.
    fleet = apart(1, 1, of_decode={"blocks": 4, "spare": 1, "start_up_time": 3})
    requests = [Request(0, 12, 3)] * 2
    common = {"changes": [(4, "decode", 2)], "crashes": [(9, 1)]}
    result = go(requests, fleet, **common)
    # The first was at the prefill: another is chosen for it at 10, which has joined at 7.
    assert column(result, "failed_at") == [None, 9]
    assert column(result, "reserved_at") == [10, None]
    assert column(result, "token_at")[0] == [10, 20, 30]
    result = go(requests, fleet, migration_limit=1, **common)
    # At 9 the second goes to worker 2, whose turn it is, and comes first. The first tries 1 at 10, and waits at 2 from
    # 11 on until the other one is gone, at 40; it has let go of what was prefilled, so that this takes till 50.
    assert column(result, "migrations") == [0, 1]
    assert column(result, "retries") == [1, 0]
    assert column(result, "reserved_at") == [40, 9]
    assert column(result, "token_at") == [[10, 60, 70], [20, 30, 40]]


def test_nobody_waits_for_the_blocks_of_one_that_waits_for_its_own():
    # Each worker has 4 blocks, of which a prompt needs 3. Worker 1 is dead from 5 on: the first, prefilled at 10, tries
    # it until 11, and then waits for the blocks of worker 2. Those are reserved for the second, which waits for the
    # blocks of worker 0.
    few = {"blocks": 4}
    requests = [Request(0, 12, 2)] * 2
    fleet = apart(1, 2, of_prefill=few, of_decode=few)
    control = ControlPlane(crashes=[(5, 1)], restarts=False)
    assert len(changing_oracle.simulate(requests, fleet, control=control, lets_go=False).stuck) == 2
    result = go(requests, fleet, crashes=[(5, 1)], restarts=False)
    # If the first lets go, the second is prefilled from 11 on, and done at 31. Then the first is prefilled anew.
    assert column(result, "token_at") == [[10, 51], [21, 31]]
    assert column(result, "reserved_at") == [31, 0]
    assert column(result, "migrations") == [0, 0]
    # Worker 0 is dead from 15 on: the first, which is moved from there, waits for the blocks of worker 1. Those are of
    # the second, which waits for the blocks of worker 2, reserved for the first.
    fleet = apart(2, 1, of_prefill=few, of_decode=few, reserve="prefill", transfer=SLOW)
    control = ControlPlane(crashes=[(15, 0)], restarts=False, migration_limit=1)
    assert len(changing_oracle.simulate(requests, fleet, control=control, lets_go=False).stuck) == 2
    result = go(requests, fleet, crashes=[(15, 0)], restarts=False, migration_limit=1)
    # If the first lets go, the second is moved until 27, and done at 37. The first is prefilled by 37, and moved by 49.
    assert column(result, "token_at") == [[10, 59], [10, 37]]
    assert column(result, "reserved_at") == [37, 15]


def test_draining_waits_for_what_is_reserved_and_what_is_moved():
    fleet = apart(2, 2, transfer=SLOW)
    requests = [Request(0, 10, 3)] * 2
    result = go(requests, fleet, changes=[(5, "decode", 1), (12, "prefill", 1)])
    assert result.workers[3].changes[1:] == [(5, "draining", "scale down"), (40, "off", "drained")]
    assert result.workers[1].changes[1:] == [(12, "draining", "scale down"), (20, "off", "drained")]
    assert column(result, "token_at") == [[10, 30, 40]] * 2


def test_latencies_add_up():
    def times(**settings):
        fleet = apart(1, 1, **settings)
        (one,) = go([Request(0, 8, 2)], fleet, request_plane=1, queue_push=2, queue_pop=4).requests
        return one.reserved_at, one.sent_to_prefill_at, one.prefill_started_at, one.prefill_ended_at, one.token_at

    # At the decode worker at 1, in the queue at 3, at the prefill worker at 7
    assert times() == (1, 3, 7, 17, [17, 27])
    # In the queue at 2, at the prefill worker at 6; to the decode worker from 16 to 17
    assert times(reserve="prefill") == (17, 2, 6, 16, [16, 27])
    # From the router to the prefill worker 1
    assert times(prefill_router="random") == (1, 1, 2, 12, [12, 22])
    assert times(prefill_router="random", reserve="prefill") == (12, 0, 1, 11, [11, 22])
    assert times(local=Gen1()) == (None, None, None, None, [11, 21])
    (one,) = go([Request(0, 8, 2)], Cluster([some(1)]), request_plane=1).requests
    assert (one.routed_at, one.enqueued_at, one.token_at) == (0, 1, [11, 21])
    # The books know it at once: the second goes elsewhere.
    result = go([Request(0, 8, 2), Request(0.5, 8, 2)], Cluster([some(2)], "least outstanding"), request_plane=1)
    assert column(result, "worker") == [0, 1]
    # On its way when the worker crashes
    result = go([Request(0, 8, 2)], Cluster([some(2)]), request_plane=1, crashes=[(0.5, 0)])
    assert column(result, "failed_at") == [0.5]


def test_the_rules_of_gen_2_and_the_queues_where_no_prefill_worker_is_ready():
    fleet = apart(1, 1, of_prefill={"start_up_time": 20}, local=PrefillLoad())
    # The queue looks busy: local. A router's worker doesn't: known to be dead at 3, it fails.
    result = go([Request(2, 8, 1)], fleet, crashes=[(1, 0)])
    assert column(result, "is_local") == [True]
    assert column(result, "token_at") == [[12]]
    fleet.prefill_router = "round robin"
    result = go([Request(2, 8, 1), Request(12, 8, 1)], fleet, crashes=[(1, 0)])
    assert column(result, "is_local") == [False, False]
    assert column(result, "failed_at") == [3, 12]


# Outages


def test_notices_wait_for_the_end_of_an_outage():
    # Worker 0 is dead from 1 on, which would be noticed at 11, but in the outage from 5 to 12 isn't.
    fleet = Cluster([some(2, start_up_time=100)], "least outstanding")
    requests = [Request(at, 8, 1) for at in (10, 11, 11.5, 12, 13)]
    common = {"crashes": [(1, 0)], "connect_timeout": 0.125, "shun": 0.125}
    assert column(go(requests, fleet, **common), "retries") == [1, 0, 0, 0, 0]
    assert column(go(requests, fleet, outages=[(5, 7)], **common), "retries") == [1, 1, 1, 0, 0]
    # One that is ready at 8 is known at 12; a change at 7 is made at 12.
    fleet = Cluster([some(1, spare=2, start_up_time=5)])
    requests = [Request(at, 8, 1) for at in (9, 11, 12, 17, 18)]
    result = go(requests, fleet, changes=[(3, "decode", 2), (7, "decode", 3)], outages=[(5, 7)])
    assert column(result, "worker") == [0, 0, 1, 2, 0]
    assert result.workers[1].changes[-1] == (8, "ready", "started")
    assert result.workers[2].changes[1:] == [(12, "starting", "scale up"), (17, "ready", "started")]


def test_workers_that_cannot_renew_their_lease_stop():
    # From 5 to 25: at 15 worker 1 is idle, and worker 2 in a step until 20. Worker 0 has crashed at 11, so it is ready
    # anew, and stays so.
    fleet = Cluster([some(3, start_up_time=2)])
    requests = [Request(0, 8, 1), Request(0, 8, 1), Request(0, 8, 9), Request(26, 8, 1), Request(27, 8, 1)]
    result = go(requests, fleet, crashes=[(11, 0)], outages=[(5, 20)])
    first, *others = (worker.changes[1:] for worker in result.workers)
    assert first == [(11, "starting", "crash"), (13, "ready", "started")]
    after = [(25, "starting", "restart"), (27, "ready", "started")]
    assert others == [[(15, "dead", "outage"), *after], [(20, "dead", "outage"), *after]]
    assert (result.requests[2].token_at, result.requests[2].failed_at) == ([10, 20], 20)
    # At 25 the router learns that worker 1 is gone (at 25 anyway), and that worker 0 is ready anew. The turn is that of
    # worker 0 at 26, and of worker 1 at 27.
    assert column(result, "worker")[3:] == [0, 1]
    # Who is dead costs nothing; the run ends at 37.
    assert result.gpu_seconds() == 37 + (37 - 10) + (37 - 5)


def test_an_outage_that_ends_before_the_lease_stops_nobody():
    asked = []

    def draws(*which):
        asked.append(which)
        return {0: 0.0, 1: 2.5}[which[1]]

    fleet = Cluster([some(2, start_up_time=2)])
    result = go([Request(40, 8, 1)], fleet, outages=[(5, 8)], renewal=5, draws=draws)
    # At 15 and 12.5; the outage ends at 13.
    assert asked == [("outage", 0, 0), ("outage", 1, 0), ("lease", 1, 0)]
    assert [len(worker.changes) for worker in result.workers] == [1, 4]
    assert result.workers[1].changes[1] == (12.5, "dead", "outage")
    # At the very end it doesn't stop.
    result = go([Request(40, 8, 1)], fleet, outages=[(5, 7.5)], renewal=5, draws=draws)
    assert [len(worker.changes) for worker in result.workers] == [1, 1]
    # Nor does it start again where workers don't.
    result = go([Request(40, 8, 1)], fleet, outages=[(5, 8)], renewal=5, draws=draws, restarts=False)
    assert result.workers[1].changes[1:] == [(12.5, "off", "outage")]


def test_a_crash_in_an_outage():
    # It starts again at once, not at 19; its request goes on where the turn is, at 20.
    fleet = Cluster([some(2, start_up_time=3)])
    result = go([Request(0, 8, 4)], fleet, crashes=[(12, 0)], outages=[(11, 8)], migration_limit=1)
    assert column(result, "token_at") == [[10, 20, 30, 40]]
    assert column(result, "worker") == [1]
    assert result.workers[0].changes[1:] == [(20, "starting", "crash"), (23, "ready", "started")]
