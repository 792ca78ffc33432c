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


requests = st.lists(
    st.tuples(st.integers(0, 200), st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=25
).map(sorted)


@settings(max_examples=300, deadline=None)
@given(
    requests, st.integers(1, 8), st.integers(0, 40), st.integers(7, 40), st.sampled_from([4, 16]), st.integers(0, 20)
)
def test_the_laws_of_any_scheduler_hold(requests, slots, more_budget, blocks, block_size, most_prompt_tokens):
    result = token_oracle.simulate(
        requests, slots=slots, budget=slots + more_budget, blocks=blocks, block_size=block_size,
        duration=lambda chosen: 5 + len(chosen), most_prompt_tokens=most_prompt_tokens,
    )  # fmt: skip
    computed = dict.fromkeys(map(id, result.requests), 0)
    for begin, end, chosen in result.steps:
        assert end > begin
        assert 0 < len(chosen) <= slots
        assert sum(one.tokens for one in chosen) <= slots + more_budget
        assert sum(-(-(one.before + one.tokens) // block_size) for one in chosen) <= blocks
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
        # Every token but the last is computed once, and again only after a preemption.
        once = request.prompt_tokens + request.output_tokens - 1
        preemptions = len(request.admitted_at) - 1
        assert computed[id(request)] == once if preemptions == 0 else computed[id(request)] > once - 1
    served = [request for request in result.requests if not request.dropped]
    assert sum(len(request.admitted_at) - 1 for request in served) == result.preemptions
    first = [request.admitted_at[0] for request in served]
    assert first == sorted(first)  # nobody overtakes
