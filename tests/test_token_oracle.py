"""The token model's oracle against other simulators, and against the laws that any scheduler keeps."""

import csv
import functools
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import token_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from token_oracle import (
    IF,
    ORDERS,
    Chunked,
    MaxUtilization,
    NoEvict,
    OnePrefill,
    Overheads,
    PrefillFirst,
    Request,
    SGLang,
    Static,
    TokenBudget,
)

CASES = json.loads((Path(__file__).parent / "data" / "scheduler-cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_request_of_another_simulators_scheduler_is_met_to_the_microsecond(case):
    config = case["config"]
    result = token_oracle.simulate(
        list(map(Request, case["arrival_us"], case["prompt_tokens"], case["output_tokens"])),
        batcher=TokenBudget(config["max_num_batched_tokens"]),
        slots=config["max_num_seqs"],
        blocks=config["kv_blocks"],
        block_size=config["block_size"],
        duration=lambda chosen: config["step_base_us"] + config["step_per_request_us"] * len(chosen),
    )
    assert [request.token_at[0] - request.arrived_at for request in result.requests] == case["ttft_us"]
    assert [request.token_at[-1] - request.arrived_at for request in result.requests] == case["e2e_us"]
    assert len(result.steps) == case["steps"]
    assert result.preemptions == case["preemptions"] == 0


def dynamo_ms(chosen, capacity):
    """NVIDIA Dynamo's published uncalibrated step time [ms]."""
    prefills = [one.tokens for one in chosen if one.is_prefill]
    contexts = [one.before + one.tokens for one in chosen if not one.is_prefill]
    ms = 0.0
    if prefills:
        n = len(prefills) * (sum(prefills) // len(prefills))
        ms += 4.209989e-7 * n**2 + 1.518344e-2 * n + 16.50142
    if contexts:
        u = min(1.0, sum(contexts) / capacity)
        ms += max(1.0, -25.74 * u**2 + 54.01 * u + 5.74)
    return ms


@pytest.mark.data
@pytest.mark.skipif("VECSIM_DATA" not in os.environ, reason="VECSIM_DATA is not set")
def test_every_instant_of_dynamos_simulator_is_met():
    path = Path(os.environ["VECSIM_DATA"]) / "golden" / "dynosim" / "poisson5000_agg1_rr_nocache.csv"
    with path.open() as file:
        rows = list(csv.DictReader(file))[:750]
    result = token_oracle.simulate(
        [Request(float(row["arrival_ms"]), int(row["input_length"]), int(row["output_length"])) for row in rows],
        batcher=TokenBudget(8192), slots=256, blocks=16384, block_size=64,
        duration=lambda chosen: dynamo_ms(chosen, 16384 * 64),
    )  # fmt: skip
    # Those that were done before the first request that is left out here arrived.
    end = result.requests[-1].arrived_at
    compared = 0
    for request, row in zip(result.requests, rows, strict=True):
        if float(row["last_token_ms"]) < end:
            assert request.token_at[0] == pytest.approx(float(row["first_token_ms"]), abs=1e-3)
            assert request.token_at[-1] == pytest.approx(float(row["last_token_ms"]), abs=1e-3)
            compared += 1
    assert compared > 500


@pytest.mark.data
@pytest.mark.skipif("VECSIM_DATA" not in os.environ, reason="VECSIM_DATA is not set")
def test_the_conversation_trace_is_within_two_per_cent_of_dynamos_simulator():
    folder = Path(os.environ["VECSIM_DATA"])
    with (folder / "golden" / "dynosim" / "conv1000_agg1_rr.csv").open() as file:
        rows = list(csv.DictReader(file))
    requests = []
    with (folder / "data" / "traces" / "mooncake_conversation.jsonl").open() as file:
        for row, line in zip(rows, file, strict=False):
            traced = json.loads(line)
            # An id of 512 tokens stands for 8 blocks; only full blocks are shared.
            ids = [(id_, i) for id_ in traced["hash_ids"] for i in range(8)][: traced["input_length"] // 64]
            requests.append(Request(float(row["arrival_ms"]), traced["input_length"], traced["output_length"], ids))
    result = token_oracle.simulate(
        requests, batcher=TokenBudget(8192), slots=256, blocks=16384, block_size=64, prefix_caching=True,
        duration=lambda chosen: dynamo_ms(chosen, 16384 * 64),
    )  # fmt: skip
    for token, column in ((0, "first_token_ms"), (-1, "last_token_ms")):
        ours = sum(request.token_at[token] - request.arrived_at for request in result.requests)
        theirs = sum(float(row[column]) - float(row["arrival_ms"]) for row in rows)
        assert ours == pytest.approx(theirs, rel=0.02)


def serve(*requests, batcher, slots=4, blocks=100, block_size=4, **settings):
    """Serve them with steps of ten units."""
    return token_oracle.simulate(
        requests, batcher=batcher, slots=slots, blocks=blocks, block_size=block_size, duration=lambda _: 10, **settings
    )


def steps(*requests, **settings):
    """Who computes how many tokens in each step."""
    return [[(one.request.index, one.tokens) for one in step.chosen] for step in serve(*requests, **settings).steps]


def test_a_prompt_finds_what_an_earlier_one_left_but_computes_its_last_block():
    def hits(*requests, blocks=20, **settings):
        requests = [Request(*request) for request in requests]
        result = serve(*requests, batcher=TokenBudget(100), blocks=blocks, prefix_caching=True, **settings)
        return [request.hits for request in result.requests]

    requests = (0, 8, 2, "ab"), (100, 8, 2, "ab"), (200, 13, 2, "abc"), (300, 8, 2, "xb")
    assert hits(*requests) == [[0], [1], [2], [0]]
    # In the same step as well
    assert hits((0, 9, 1, "ab"), (0, 9, 1, "ab"))[1] == [2]
    # The least recently used is evicted, the deepest block of a prompt first: "b" of the first goes, then "a".
    assert hits((0, 8, 1, "ab"), (50, 8, 1, "cd"), (100, 8, 1, "ab"), blocks=5)[2] == [1]
    assert hits((0, 9, 1, "ab"), (50, 9, 1, "cd"), (100, 9, 1, "ab"), blocks=4)[2] == [1]
    assert hits((0, 9, 1, "ab"), (50, 9, 1, "cd"), (100, 9, 1, "ab"), blocks=3)[2] == [0]
    # The partly filled block of the second is taken before "a" if those without an id go to the front.
    requests = (0, 4, 1, "a"), (50, 5, 1, "b"), (100, 5, 1, "c"), (150, 5, 1, "a")
    assert hits(*requests, blocks=4)[3] == [0]
    assert hits(*requests, blocks=4, uncached_first=True)[3] == [1]


def test_token_budget():
    two = Request(0, 8, 2), Request(0, 8, 1)
    assert steps(*two, batcher=TokenBudget(10)) == [[(0, 8), (1, 2)], [(0, 1), (1, 6)]]
    assert steps(*two, batcher=TokenBudget(10, threshold=4)) == [[(0, 4), (1, 4)], [(0, 4), (1, 4)], [(0, 1)]]
    # Two blocks are free at first: enough for the second prompt's first chunk, not for the whole.
    two = Request(0, 4, 5), Request(0, 9, 1)
    assert steps(*two, batcher=TokenBudget(6), blocks=3)[0] == [(0, 4), (1, 2)]
    waits = [[(0, 4)], *[[(0, 1)]] * 4, [(1, 6)], [(1, 3)]]
    assert steps(*two, batcher=TokenBudget(6, reserve_full_prompt=True), blocks=3) == waits


def test_chunked():
    two = Request(0, 4, 3), Request(0, 12, 1)
    assert steps(*two, batcher=Chunked(8)) == [[(0, 4), (1, 4)], [(0, 1), (1, 7)], [(0, 1), (1, 1)]]
    # The second is preempted in the second step. The third, more urgent, is admitted nevertheless.
    three = Request(0, 4, 6), Request(0, 4, 2, priority=2), Request(5, 4, 1, priority=1)
    there = steps(*three, batcher=Chunked(8), blocks=3, order="priority")
    assert there == [[(0, 4), (1, 4)], [(0, 1), (2, 4)], *[[(0, 1)]] * 4, [(1, 5)]]
    there = steps(*three, batcher=TokenBudget(8), blocks=3, order="priority")
    assert there == [[(0, 4), (1, 4)], [(0, 1)], [(0, 1), (2, 4)], *[[(0, 1)]] * 3, [(1, 5)]]


def test_whole_prompts_beside_decodes():
    assert steps(Request(0, 4, 3), Request(5, 8, 1), batcher=IF()) == [[(0, 4)], [(0, 1), (1, 8)], [(0, 1)]]
    two = Request(0, 4, 2), Request(0, 4, 2)
    one_by_one = [[(0, 4)], [(0, 1)], [(1, 4)], [(1, 1)]]
    assert steps(*two, batcher=IF()) == [[(0, 4), (1, 4)], [(0, 1), (1, 1)]]
    assert steps(*two, batcher=IF(budget=4)) == one_by_one
    assert steps(*two, batcher=IF(reserve_tokens=12), blocks=4) == one_by_one
    assert steps(*two, batcher=IF(), blocks=4, max_model_len=9) == one_by_one
    assert steps(*two, batcher=IF(), blocks=4) == [[(0, 4), (1, 4)], [(0, 1), (1, 1)]]
    assert steps(*two, batcher=OnePrefill()) == [[(0, 4)], [(0, 1), (1, 4)], [(1, 1)]]


def test_static():
    result = serve(Request(0, 4, 1), Request(0, 4, 3), Request(0, 4, 1), batcher=Static(), slots=2)
    chosen = [[(one.request.index, one.tokens) for one in step.chosen] for step in result.steps]
    assert chosen == [[(0, 4), (1, 4)], [(1, 1)], [(1, 1)], [(2, 4)]]
    assert [step.used for step in result.steps] == [4, 4, 4, 2]
    assert [step.queue for step in result.steps] == [1, 1, 1, 0]


def test_prefill_first():
    there = steps(Request(0, 4, 3), Request(5, 4, 1), batcher=PrefillFirst(8))
    assert there == [[(0, 4)], [(1, 4)], [(0, 1)], [(0, 1)]]
    three = Request(0, 2, 1), Request(0, 4, 1), Request(0, 3, 1)
    assert steps(*three, batcher=PrefillFirst(9)) == [[(0, 2), (1, 4), (2, 3)]]
    assert steps(*three, batcher=PrefillFirst(9, padded=True)) == [[(0, 2), (1, 4)], [(2, 3)]]
    # The second is preempted in the third step, and has outgrown the budget when it is resumed.
    there = steps(Request(0, 4, 3), Request(0, 4, 3), batcher=PrefillFirst(4), blocks=3)
    assert there == [[(0, 4)], [(1, 4)], [(0, 1)], [(0, 1)], [(1, 5)], [(1, 1)]]


def test_no_evict():
    two = Request(0, 4, 2, max_tokens=8), Request(0, 8, 1)
    assert steps(*two, batcher=NoEvict(), blocks=6) == [[(0, 4), (1, 8)], [(0, 1)]]
    assert steps(*two, batcher=NoEvict(), blocks=5) == [[(0, 4)], [(0, 1)], [(1, 8)]]
    assert steps(*two, batcher=NoEvict(budget=8)) == [[(0, 4)], [(0, 1)], [(1, 8)]]
    assert steps(*two, batcher=NoEvict(budget=6, chunked=True)) == [[(0, 4), (1, 2)], [(0, 1), (1, 5)], [(1, 1)]]


def test_max_utilization():
    two = Request(0, 4, 3), Request(0, 4, 3)
    paused = [[(0, 4), (1, 4)], [(0, 1)], [(0, 1)], [(1, 5)], [(1, 1)]]
    assert steps(*two, batcher=MaxUtilization(), blocks=3) == paused
    assert steps(*two, batcher=MaxUtilization(budget=6, chunked=True))[:2] == [[(0, 4), (1, 2)], [(0, 1), (1, 2)]]
    assert steps(*two, batcher=MaxUtilization(budget=6))[:2] == [[(0, 4)], [(0, 1), (1, 4)]]


def test_sglang():
    # The second prompt gets whole blocks of what the first one leaves; what is left of it pauses the decodes.
    two = Request(0, 6, 2), Request(0, 9, 1)
    assert steps(*two, batcher=SGLang(chunk_tokens=10)) == [[(0, 6), (1, 4)], [(1, 5)], [(0, 1)]]
    # The second needs 4 + 8 + 4 tokens. 24 - (4 + 8) are left in the first step, 20 - ratio * 7 in the second.
    two = [Request(0, 4, 4, max_tokens=8)] * 2
    assert steps(*two, batcher=SGLang(), blocks=6)[:5] == [[(0, 4)], *[[(0, 1)]] * 3, [(1, 4)]]
    assert steps(*two, batcher=SGLang(init_ratio=0.5), blocks=6)[:3] == [[(0, 4)], [(1, 4)], [(0, 1), (1, 1)]]
    # In the fifth step the second (as many tokens, a longer prompt) is retracted, to the back of the queue.
    batcher = SGLang(max_new=1)
    three = Request(0, 4, 8), Request(0, 5, 6), Request(35, 4, 1)
    both, first = [(0, 1), (1, 1)], [(0, 1)]
    there = steps(*three, batcher=batcher, blocks=4)
    assert there == [[(0, 4), (1, 5)], both, both, both, first, first, first, first, [(2, 4)], [(1, 9)], [(1, 1)]]
    # That made it min(1, (4 + 20) / 1); four decode steps follow.
    assert batcher.ratio == pytest.approx(1 - 4 * 0.7 * (1 - 0.14) / 600)


def test_asynchronous_scheduling():
    settings = {"batcher": TokenBudget(100), "async_scheduling": True}
    # Who arrives during step 0 joins step 2.
    there = steps(Request(0, 4, 4), Request(5, 4, 1), **settings)
    assert there == [[(0, 4)], [(0, 1)], [(0, 1), (1, 4)], [(0, 1)]]
    # A slot that step 0 frees is used from step 2 on, and so are blocks.
    three = Request(0, 4, 1), Request(0, 1, 4), Request(0, 8, 1)
    there = [[(0, 4), (1, 1)], [(1, 1)], [(1, 1), (2, 8)], [(1, 1)]]
    assert steps(*three, **settings, slots=2) == there
    assert steps(*three, **settings, blocks=3) == there
    # Step 1 would be empty, so that it begins with what step 0 freed and with who arrived during it.
    two = serve(Request(0, 4, 1), Request(5, 4, 1), **settings, slots=1)
    assert [step.begin for step in two.steps] == [0, 10]
    # The same where the only one left needs a block of one that has ended: it is preempted, and resumed at once.
    there = [[(0, 4), (1, 4)], [(1, 5)]]
    assert steps(Request(0, 4, 1), Request(0, 4, 2), **settings, blocks=2) == there


def test_queue_orders():
    requests = (
        Request(0, 4, 3, priority=1, ttft_limit=20),
        Request(0, 2, 4, priority=2, ttft_limit=40),
        Request(0, 3, 2, priority=0, ttft_limit=30),
    )

    def order(name):
        admitted = [request.admitted_at for request in serve(*requests, batcher=IF(), slots=1, order=name).requests]
        return sorted(range(3), key=admitted.__getitem__)

    assert order("fcfs") == [0, 1, 2]
    assert order("shortest_prompt") == [1, 2, 0]
    assert order("priority") == [2, 0, 1]
    assert order("deadline") == [0, 2, 1]
    assert order("shortest_output") == [2, 0, 1]
    # The third step's first is the less urgent: it goes when the second one needs its block.
    two = Request(0, 4, 3, priority=1), Request(5, 4, 3)
    there = steps(*two, batcher=TokenBudget(8), blocks=3, order="priority")
    assert there == [[(0, 4)], [(0, 1), (1, 4)], [(1, 1)], [(1, 1)], [(0, 6)]]


def test_a_watermark_is_kept_free_at_an_admission_beside_others():
    two = Request(0, 4, 2), Request(0, 8, 1)
    assert steps(*two, batcher=TokenBudget(20), blocks=4, watermark=0.25) == [[(0, 4), (1, 8)], [(0, 1)]]
    assert steps(*two, batcher=TokenBudget(20), blocks=4, watermark=0.5) == [[(0, 4)], [(0, 1)], [(1, 8)]]


def test_users_of_a_closed_loop_and_of_sessions():
    three = Request(prompt_tokens=4), Request(prompt_tokens=400), Request(prompt_tokens=4)
    result = serve(*three, batcher=IF(), blocks=20, concurrency=1, think_time=0.5)
    assert [request.arrived_at for request in result.requests] == [0, 10.5, 11.5]
    assert [request.dropped for request in result.requests] == [False, True, False]
    # Of the first turn's 8 computed tokens 4 are generated ones.
    turns = Request(0, 4, 5, "abc"), Request(0, 12, 1, "abc", after=0, think=3), Request(0, 400, 1), Request(after=2)
    result = serve(*turns, batcher=TokenBudget(400), prefix_caching=True)
    assert [request.arrived_at for request in result.requests[:2]] == [0, 53]
    assert result.requests[1].hits == [2]
    assert result.requests[3].arrived_at == float("inf")


def test_overheads_and_the_time_limit():
    overheads = Overheads(before_queue=3, per_step=2, per_output_token=0.5, at_completion=7)
    two = Request(0, 4, 2), Request(4, 4, 1, after=0, think=1)
    first, second = serve(*two, batcher=IF(), overheads=overheads).requests
    assert (first.token_at, first.seen_at, first.completed_at) == ([15, 27], [15.5, 28], 35)
    assert (second.arrived_at, second.enqueued_at, second.token_at) == (36, 39, [51])
    assert len(serve(Request(0, 4, 9), batcher=IF(), time_limit=20).steps) == 2
    assert len(serve(Request(0, 4, 9), batcher=IF(), time_limit=20.1).steps) == 3
    assert not serve(Request(5, 4, 9), batcher=IF(), time_limit=5).steps


@functools.cache
def batchers(slots):
    """Any batcher, with budgets that let every running request decode."""
    budgets = st.integers(0, 40).map(lambda more: slots + more)
    maybe = st.none() | budgets
    return st.one_of(
        st.builds(TokenBudget, budgets, st.integers(0, 20), st.booleans()),
        st.builds(Chunked, st.integers(1, 50)),
        st.builds(IF, maybe, st.none() | st.integers(8, 100)),
        st.builds(OnePrefill, maybe),
        st.builds(Static, maybe),
        st.builds(PrefillFirst, budgets, st.booleans()),
        st.builds(NoEvict, maybe, st.booleans()),
        st.builds(MaxUtilization, maybe, st.booleans()),
        st.builds(SGLang, st.integers(16, 50), st.floats(0, 1), decay_steps=st.just(20), max_new=st.integers(1, 40)),
    )


# Made once: a strategy that is made anew for each draw takes longer than the draw.
ARRIVALS = st.lists(st.integers(0, 200), min_size=1, max_size=25)
SHARED = st.sampled_from(["nothing", "prompts", "all"])
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 20), st.integers(0, 2))
WISHES = st.tuples(st.integers(0, 2), st.integers(0, 200), st.integers(0, 30))
BEFORE = st.none() | st.integers(0, 24)


@st.composite
def streams(draw, block_size):
    """Requests in the order of arrival, or in sessions; some share the begin of their prompts, or of all they hold."""
    shared, sessions = draw(SHARED), draw(st.booleans())
    requests = []
    for arrived_at in sorted(draw(ARRIVALS)):
        prompt, output, cap, group = draw(SIZES)
        priority, ttft_limit, think = draw(WISHES)
        blocks = {"nothing": 0, "prompts": prompt // block_size, "all": 100 // block_size}[shared]
        after = draw(BEFORE) if sessions and requests else None
        requests.append(
            Request(
                arrived_at, prompt, output, [(group, i) for i in range(blocks)], output + cap, priority, ttft_limit,
                after=None if after is None else after % len(requests), think=think,
            )
        )  # fmt: skip
    return requests


def keeps_budget(batcher, chosen):
    prefills = [one.tokens for one in chosen if one.is_prefill]
    decodes = len(chosen) - len(prefills)
    tokens = sum(prefills) + decodes
    match batcher:
        case TokenBudget():
            return tokens <= batcher.budget
        case Chunked():
            return sum(prefills) <= max(0, batcher.chunk_tokens - decodes)
        case OnePrefill():
            return not prefills or (len(prefills) == 1 and tokens <= (batcher.budget or tokens))
        case IF() | NoEvict():
            return not prefills or tokens <= (batcher.budget or tokens)
        case PrefillFirst():
            cost = max(one.tokens for one in chosen) * len(chosen) if batcher.padded else tokens
            return not prefills or len(chosen) == 1 or cost <= batcher.budget
        case MaxUtilization():
            return tokens <= (batcher.budget or tokens) or (len(prefills) == 1 and not batcher.chunked)
        case SGLang():
            return not prefills or tokens <= batcher.chunk_tokens


@settings(max_examples=400, deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(7, 40), st.sampled_from([4, 16]))
def test_the_laws_of_any_scheduler_hold(data, slots, blocks, block_size):
    batcher = data.draw(batchers(slots))
    order = data.draw(st.sampled_from(["fcfs", *ORDERS]))
    requests = data.draw(streams(block_size))
    users = data.draw(st.none() | st.integers(1, 10))
    limit = data.draw(st.none() | st.integers(10, 100))

    def duration(chosen):
        count[0] += 1
        assert count[0] < 20_000, "no progress"
        return 5 + len(chosen)

    count = [0]
    result = token_oracle.simulate(
        requests, batcher=batcher, slots=slots, blocks=blocks, block_size=block_size, order=order, duration=duration,
        prefix_caching=data.draw(st.booleans()), uncached_first=data.draw(st.booleans()),
        watermark=data.draw(st.sampled_from([0, 0.1, 0.5])), async_scheduling=data.draw(st.booleans()),
        max_model_len=limit, concurrency=users, think_time=data.draw(st.integers(0, 30)),
    )  # fmt: skip
    computed = dict.fromkeys(result.requests, 0)
    filled = set()
    for before, step in pairwise(result.steps):
        assert step.begin >= before.end
    for step in result.steps:
        assert step.end > step.begin
        assert 0 < len(step.chosen) <= slots
        assert len({one.request for one in step.chosen}) == len(step.chosen)
        assert 0 < step.used <= blocks
        assert keeps_budget(batcher, step.chosen)
        for one in step.chosen:
            computed[one.request] += one.tokens
            after = one.before + one.tokens
            filled |= {one.request.block_id(i) for i in range(one.before // block_size, after // block_size)}
            assert step.begin >= one.request.arrived_at
    for request in result.requests:
        total = request.prompt_tokens + request.output_tokens
        never = -(-total // block_size) > blocks or (limit is not None and total > limit)
        if request.arrived_at == float("inf"):  # the one that it follows was refused
            assert not request.token_at
            assert users is None
            assert result.requests[request.after].completed_at is None
            continue
        assert request.dropped or not never
        if request.dropped:
            assert never or not isinstance(batcher, (TokenBudget, Chunked))
            assert not request.token_at
            continue
        assert len(request.token_at) == request.output_tokens
        assert request.token_at == sorted(set(request.token_at))
        assert request.token_at[0] > request.admitted_at[0] >= request.enqueued_at >= request.arrived_at
        # Every token but the last is computed or found once, and again only after a preemption.
        done = computed[request] + sum(request.hits) * block_size
        assert done == total - 1 if len(request.admitted_at) == 1 else done >= total - 1
        assert len(request.hits) == len(request.admitted_at)
    served = [request for request in result.requests if request.token_at]
    assert sum(len(request.admitted_at) - 1 for request in served) == result.preemptions
    if isinstance(batcher, (IF, NoEvict)):
        assert result.preemptions == 0
    if order == "fcfs":
        in_order = sorted(served, key=lambda request: (request.arrived_at, request.index))
        first = [request.admitted_at[0] for request in in_order]
        assert first == sorted(first)  # nobody overtakes
    # Blocks are conserved, and whatever can be found is there, and was computed.
    pool = result.pool
    assert not any(pool.holders)
    assert sorted(pool.free) == list(range(blocks))
    assert all(pool.id_of[block] == id_ for id_, block in pool.block_of.items())
    assert filled >= pool.block_of.keys()
