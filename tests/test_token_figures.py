"""The token model against other simulators' results."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import vecsim as sim

CASES = json.loads((Path(__file__).parent / "data" / "scheduler-cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_request_of_another_simulators_scheduler_is_met_to_the_microsecond(case):
    config = case["config"]
    run = sim.Engine(
        max_batch_size=config["max_num_seqs"],
        load_generator=sim.TraceLoadGenerator(
            arrived_at=case["arrival_us"], prompt_tokens=case["prompt_tokens"], output_tokens=case["output_tokens"]
        ),
        batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=config["max_num_batched_tokens"]),
        kv_cache=sim.KVCache(blocks=config["kv_blocks"], block_size=config["block_size"]),
        step_time=sim.LinearStepTime(base=config["step_base_us"], per_request=config["step_per_request_us"]),
    ).run()
    requests = run.requests
    np.testing.assert_array_equal(requests.first_token_at - requests.arrived_at, case["ttft_us"])
    np.testing.assert_array_equal(requests.completed_at - requests.arrived_at, case["e2e_us"])
    assert int(run.metrics.steps) == case["steps"]
    assert float(run.metrics.end_time) == case["makespan_us"]
    assert int(run.metrics.preemptions) == 0


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


VIDUR = {
    "sarathi_c512_qps6.45": (sim.ChunkedPrefillBatcher(chunk_tokens=512), 512, 0.05),  # a tie: see its README
    "sarathi_c512_qps20_n2000": (sim.ChunkedPrefillBatcher(chunk_tokens=512), 512, 1e-5),
    "vllm_qps6.45": (sim.PrefillFirstBatcher(max_num_batched_tokens=4096, padded=True), 512, 1e-5),
    "vllm_qps20_n2000": (sim.PrefillFirstBatcher(max_num_batched_tokens=4096, padded=True), 512, 1e-5),
    "orca_qps6.45": (sim.IFBatcher(reserve_tokens=4096), 118, 1e-5),
}


@pytest.mark.data
@pytest.mark.parametrize("case", VIDUR)
def test_vidurs_iterations_and_completion_times_are_met(case, data_folder):
    batcher, slots, tolerance = VIDUR[case]
    folder = data_folder / "golden" / "vidur" / case
    rows = rows_of(folder / "requests.csv")
    run = sim.Engine(
        max_batch_size=slots,
        load_generator=sim.read_trace(folder / "requests.csv", "vidur"),
        batcher=batcher,
        kv_cache=sim.KVCache(blocks=30208, watermark=0.01),
        step_time=sim.TableStepTime(file=str(folder / "step_tables_ms_per_layer.npz"), format="vidur"),
    ).run()
    summary = json.loads((folder / "config.json").read_text())["summary"]
    assert int(run.metrics.steps) == summary["iterations"]
    assert int(run.metrics.preemptions) == summary["restarts"]
    begin = float(rows[0]["arrived_at"])  # times of a trace count from its first request
    completed_at = run.requests.completed_at.values + begin
    np.testing.assert_allclose(completed_at, [float(row["completed_at"]) for row in rows], rtol=0, atol=tolerance)


DYNAMO = {
    "max_batch_size": 256,
    "batcher": sim.TokenBudgetBatcher(max_num_batched_tokens=8192),
    "step_time": sim.PolynomialStepTime(),
}


@pytest.mark.data
def test_every_instant_of_dynamos_simulator_is_met(data_folder):
    rows = rows_of(data_folder / "golden" / "dynosim" / "poisson5000_agg1_rr_nocache.csv")
    run = sim.Engine(
        load_generator=sim.TraceLoadGenerator(
            arrived_at=[float(row["arrival_ms"]) / 1000 for row in rows],
            prompt_tokens=[int(row["input_length"]) for row in rows],
            output_tokens=[int(row["output_length"]) for row in rows],
        ),
        kv_cache=sim.KVCache(blocks=16384, block_size=64),
        **DYNAMO,
    ).run()
    assert int(run.metrics.steps) == 69_121
    for name, column in (("first_token_at", "first_token_ms"), ("completed_at", "last_token_ms")):
        theirs = [float(row[column]) for row in rows]
        np.testing.assert_allclose(1000 * run.requests[name].values, theirs, rtol=0, atol=1e-3)


@pytest.mark.data
def test_the_conversation_trace_is_within_two_per_cent_of_dynamos_simulator(data_folder):
    rows = rows_of(data_folder / "golden" / "dynosim" / "conv1000_agg1_rr.csv")
    run = sim.Engine(
        load_generator=sim.read_trace(
            data_folder / "data" / "traces" / "mooncake_conversation.jsonl", "mooncake", requests=len(rows)
        ),
        kv_cache=sim.KVCache(blocks=16384, block_size=64, prefix_caching=True),
        **DYNAMO,
    ).run()
    np.testing.assert_allclose(1000 * run.requests.arrived_at.values, [float(row["arrival_ms"]) for row in rows])
    for name, column in (("ttft", "first_token_ms"), ("e2e", "last_token_ms")):
        theirs = np.mean([float(row[column]) - float(row["arrival_ms"]) for row in rows])
        assert 1000 * float(run.metrics[name].sel(stat="mean")) == pytest.approx(theirs, rel=0.02)


@pytest.mark.data
@pytest.mark.parametrize(("trace", "of_all_ids"), [("conversation", 0.3660), ("synthetic", 0.6379)])
def test_mooncakes_hit_rates_are_met_with_an_endless_cache(trace, of_all_ids, data_folder):
    load = sim.read_trace(data_folder / "data" / "traces" / f"mooncake_{trace}.jsonl", "mooncake")
    # One prompt after the other, each served before the next one comes.
    run = sim.Engine(
        max_batch_size=1,
        load_generator=load,
        batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=2**20),
        kv_cache=sim.KVCache(block_size=512, prefix_caching=True),
        step_time=sim.LinearStepTime(base=1e-6),
    ).run()
    found = run.requests.hit_tokens.values / 512
    # A prompt that is cached to its end computes its last block anew: no id of it is missing from the cache.
    counts = load.block_counts.array
    assert found.sum() / counts.sum() == pytest.approx(of_all_ids, abs=5e-5)
