"""Keys and values that move between the workers of a fleet, against the formulas of a transfer alone."""

import numpy as np
import pytest

import vecsim as sim
from vecsim.transfer import KVTransfer

PREFILL, DECODE = 1e-4, 1e-3  # seconds a token, a step
PER_TOKEN = 131_072  # bytes: Llama-3.1-8B


def engine(transfer, load, workers=1, blocks=None, **fields):
    pool = sim.Pool(
        workers=workers,
        max_batch_size=64,
        step_time=sim.LinearStepTime(base=DECODE, per_prefill_token=PREFILL),
        batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=2**20),
        kv_cache=sim.KVCache(blocks=blocks, block_size=16),
    )
    return sim.DisaggregatedEngine(prefill=pool, decode=pool, load_generator=load, transfer=transfer, **fields)


def apart(prompts, seconds=1000.0):
    return sim.TraceLoadGenerator(
        arrived_at=seconds * np.arange(len(prompts)), prompt_tokens=prompts, output_tokens=[3] * len(prompts)
    )


@pytest.mark.parametrize("overlap", ["none", "layers"])
@pytest.mark.parametrize("layout", ["layers", "contiguous"])
@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("reserve", ["arrival", "prefill"])
def test_one_alone_takes_what_the_formulas_say(overlap, layout, merges, reserve):
    transfer = KVTransfer(
        bandwidth=2e9,
        fabric_bandwidth=1e9,
        kv_bytes_per_token=PER_TOKEN,
        latency=0.01,
        layers=32,
        descriptor_cost=4e-6,
        layout=layout,
        overlap=overlap,
        merges_blocks=merges,
        transpose=True,
        hbm_bandwidth=3e12,
    )
    prompts = [17, 1000, 8000]
    load = apart(prompts)
    requests = engine(transfer, load, blocks=2000, first_token="decode", reserve=reserve).run().requests
    for i, prompt in enumerate(prompts):
        prefill = DECODE + PREFILL * prompt
        # Nothing else is in either memory: one run, but where the ring of free blocks begins anew
        descriptors = transfer.descriptors(-(-prompt // 16), runs=1)
        time = transfer.unloaded_time(transfer.size(prompt), descriptors)
        ttft = float(requests.first_token_at[i] - requests.arrived_at[i])
        assert ttft == pytest.approx(prefill + transfer.visible_time(time, prefill) + DECODE, abs=1e-9)


def test_ten_at_once_share_a_slow_path():
    # 8,000 tokens are 1.05 GB
    transfer = KVTransfer(bandwidth=1e8, kv_bytes_per_token=PER_TOKEN)
    load = sim.TraceLoadGenerator(arrived_at=[0.0] * 10, prompt_tokens=[8000] * 10, output_tokens=[2] * 10)
    requests = engine(transfer, load, first_token="decode").run().requests
    moving = requests.first_token_at - requests.arrived_at - DECODE - 10 * 8000 * PREFILL - DECODE
    np.testing.assert_allclose(moving, 10 * 8000 * PER_TOKEN / 1e8, rtol=1e-6)
    assert moving.values == pytest.approx(105, abs=0.2)


def test_merged_runs_are_fewer_and_fewest_where_each_request_gets_neighbours():
    load = sim.PoissonLoadGenerator(
        request_rate=2.0,
        requests=2000,
        prompt_tokens=sim.LogNormal(mean=600, std=600),
        output_tokens=sim.LogNormal(mean=600, std=600),
        seed=4,
    )
    ttft = []
    for allocator, merges in (("contiguous", True), ("paged", True), ("paged", False)):
        # Nothing but descriptors takes time
        transfer = KVTransfer(layers=1, tensors=1, descriptor_cost=1e-6, merges_blocks=merges, allocator=allocator)
        requests = engine(transfer, load, workers=2, blocks=4000, first_token="decode").run().requests
        ttft.append(float((requests.first_token_at - requests.arrived_at).mean()))
    assert ttft[0] < ttft[1] < ttft[2]
