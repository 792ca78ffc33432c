"""The token model's oracle against other simulators, and against the laws that any scheduler keeps."""

import csv
import json
import os
from pathlib import Path

import pytest
import token_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = json.loads((Path(__file__).parent / "data" / "scheduler-cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_request_of_another_simulators_scheduler_is_met_to_the_microsecond(case):
    config = case["config"]
    result = token_oracle.simulate(
        list(zip(case["arrival_us"], case["prompt_tokens"], case["output_tokens"], strict=True)),
        slots=config["max_num_seqs"],
        budget=config["max_num_batched_tokens"],
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
        rows = list(csv.DictReader(file))[:1500]
    result = token_oracle.simulate(
        [(float(row["arrival_ms"]), int(row["input_length"]), int(row["output_length"])) for row in rows],
        slots=256, budget=8192, blocks=16384, block_size=64,
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
    assert compared > 1000


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
            requests.append((float(row["arrival_ms"]), traced["input_length"], traced["output_length"], ids))
    result = token_oracle.simulate(
        requests, slots=256, budget=8192, blocks=16384, block_size=64,
        duration=lambda chosen: dynamo_ms(chosen, 16384 * 64),
    )  # fmt: skip
    for token, column in ((0, "first_token_ms"), (-1, "last_token_ms")):
        ours = sum(request.token_at[token] - request.arrived_at for request in result.requests)
        theirs = sum(float(row[column]) - float(row["arrival_ms"]) for row in rows)
        assert ours == pytest.approx(theirs, rel=0.02)


def test_a_prompt_finds_what_an_earlier_one_left_but_computes_its_last_block():
    def serve(*requests, blocks=20):
        return token_oracle.simulate(
            requests, slots=4, budget=100, blocks=blocks, block_size=4, duration=lambda chosen: 10
        )  # fmt: skip

    first, again, longer, other = serve(
        (0, 8, 2, "ab"), (100, 8, 2, "ab"), (200, 13, 2, "abc"), (300, 8, 2, "xb")
    ).requests  # fmt: skip
    assert [request.hits for request in (first, again, longer, other)] == [[0], [1], [2], [0]]
    # In the same step as well
    assert serve((0, 9, 1, "ab"), (0, 9, 1, "ab")).requests[1].hits == [2]
    # The least recently used is evicted, the deepest block of a prompt first: "b" of the first goes, then "a".
    assert serve((0, 8, 1, "ab"), (50, 8, 1, "cd"), (100, 8, 1, "ab"), blocks=5).requests[2].hits == [1]
    assert serve((0, 9, 1, "ab"), (50, 9, 1, "cd"), (100, 9, 1, "ab"), blocks=4).requests[2].hits == [1]
    assert serve((0, 9, 1, "ab"), (50, 9, 1, "cd"), (100, 9, 1, "ab"), blocks=3).requests[2].hits == [0]


@st.composite
def streams(draw):
    """Requests in the order of arrival; some share the begin of their prompts."""
    shared = draw(st.booleans())
    requests = []
    for arrived_at in sorted(draw(st.lists(st.integers(0, 200), min_size=1, max_size=25))):
        prompt, output, group = draw(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 2)))
        requests.append((arrived_at, prompt, output, group if shared else None))
    return requests


@settings(max_examples=400, deadline=None)
@given(
    streams(), st.integers(1, 8), st.integers(0, 40), st.integers(7, 40), st.sampled_from([4, 16]), st.integers(0, 20)
)
def test_the_laws_of_any_scheduler_hold(requests, slots, more_budget, blocks, block_size, most_prompt_tokens):
    requests = [
        (arrived_at, prompt, output, [] if group is None else [(group, i) for i in range(prompt // block_size)])
        for arrived_at, prompt, output, group in requests
    ]
    result = token_oracle.simulate(
        requests, slots=slots, budget=slots + more_budget, blocks=blocks, block_size=block_size,
        duration=lambda chosen: 5 + len(chosen), most_prompt_tokens=most_prompt_tokens,
    )  # fmt: skip
    computed = dict.fromkeys(map(id, result.requests), 0)
    for begin, end, chosen in result.steps:
        assert end > begin
        assert 0 < len(chosen) <= slots
        assert sum(one.tokens for one in chosen) <= slots + more_budget
        for one in chosen:
            computed[id(one.request)] += one.tokens
    for request in result.requests:
        needed = -(-(request.prompt_tokens + request.output_tokens) // block_size)
        assert request.dropped == (needed > blocks)
        if request.dropped:
            assert not request.token_at
            continue
        assert len(request.token_at) == request.output_tokens
        assert request.token_at == sorted(set(request.token_at))
        assert request.token_at[0] > request.admitted_at[0] >= request.arrived_at
        # Every token but the last is computed or found once, and again only after a preemption.
        once = request.prompt_tokens + request.output_tokens - 1
        done = computed[id(request)] + sum(request.hits) * block_size
        assert done == once if len(request.admitted_at) == 1 else done >= once
        assert len(request.hits) == len(request.admitted_at)
    served = [request for request in result.requests if not request.dropped]
    assert sum(len(request.admitted_at) - 1 for request in served) == result.preemptions
    first = [request.admitted_at[0] for request in served]
    assert first == sorted(first)  # nobody overtakes
    # Blocks are conserved, and whoever can be found is there.
    pool = result.pool
    assert not any(pool.holders)
    assert sorted(pool.free) == list(range(blocks))
    assert all(pool.id_of[block] == id_ for id_, block in pool.block_of.items())
