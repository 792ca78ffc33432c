"""Draw the pictures of the README and of the pages in this folder: `uv run python docs/pictures.py [FOLDER]`."""

import sys
from pathlib import Path

import numba
import numpy as np
import xarray as xr

import vecsim as sim
from vecsim.sweep.spec import read_spec


@numba.njit
def prefill_budget(batch):
    """As many prefills as fit in the time of a token, so that nobody's token is late."""
    chunk = batch.prefill_time / batch.total_prefill_chunks
    room = int(max(batch.itl, 1.0) / chunk) - batch.prefilling
    return min(max(room, 0), batch.free)


BATCHERS = [sim.StaticBatcher(), sim.IFBatcher(), sim.IFBatcherWithOnePrefillOnly()]
LENGTHS = {"target_output_len_tokens": 10, "target_output_len_std": 5}


def runs():
    """Four strategies, one hundred requests, one hundred ticks."""
    done = []
    for batcher, chunks in ((BATCHERS[0], 1), (BATCHERS[1], 1), (BATCHERS[1], 2), (BATCHERS[2], 2)):
        load = sim.BatchLoadGenerator(initial_batch=100, total_prefill_chunks=chunks, seed=42, **LENGTHS)
        done.append(sim.Engine(max_batch_size=4, load_generator=load, batcher=batcher).run(time_limit=100))
    return sim.plot.compare(
        done, ["static", "in-flight", "in-flight, chunked context", "one prefill at a time, chunked"]
    )


def sweep():
    """Throughput and tail TTFT against the load."""
    engine = sim.Engine(max_batch_size=4, load_generator=sim.PoissonLoadGenerator(**LENGTHS))
    rates = np.linspace(0.05, 0.5, 46)
    axes = {"batcher": BATCHERS, "total_prefill_chunks": [1, 2], "request_rate": rates, "seed": range(32)}
    return sim.plot.sweep(sim.sweep(engine, 10_000, **axes))


def slots():
    """How many slots which load needs."""
    engine = sim.Engine(load_generator=sim.PoissonLoadGenerator(total_prefill_chunks=2, **LENGTHS))
    rates = np.linspace(0.02, 0.7, 35)
    axes = {"batcher": BATCHERS, "max_batch_size": range(1, 21), "request_rate": rates, "seed": range(8)}
    return sim.plot.sweep(sim.sweep(engine, 10_000, **axes))


def policy():
    """A policy of five lines against the built-in ones."""
    engine = sim.Engine(
        max_batch_size=8, load_generator=sim.PoissonLoadGenerator(prefill_time=2, total_prefill_chunks=4, **LENGTHS)
    )
    axes = {"batcher": [*BATCHERS, prefill_budget], "request_rate": np.linspace(0.05, 0.7, 40), "seed": range(16)}
    ds = sim.sweep(engine, 10_000, **axes)
    return sim.plot.lines(ds, variables=["token_throughput", "ttft", "itl"])


def cache():
    """How large a prefix cache conversations need."""
    engine = sim.Engine(
        max_batch_size=128,
        load_generator=sim.PoissonLoadGenerator(
            requests=400,
            prompt_tokens=sim.LogNormal(mean=300, std=300),
            output_tokens=sim.LogNormal(mean=200, std=150),
            prefix=sim.SharedPrefix(tokens=512, groups=8, exponent=1),
            sessions=sim.Sessions(turns=5, think_time=20),
        ),
        batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=2048),
        kv_cache=sim.KVCache(blocks=1000, prefix_caching=True),
        step_time=sim.LinearStepTime(base=6e-3, per_request=6e-5, per_prefill_token=4e-5),
    )
    axes = {"request_rate": [0.25, 0.5, 1], "blocks": np.geomspace(700, 20_000, 20).astype(int), "seed": range(4)}
    return sim.plot.lines(sim.sweep(engine, **axes), x="blocks", variables=["prefix_hit_rate", "ttft"])


def disaggregated():
    """How eight GPUs are shared out best, by load and bandwidth: the ready-made spec."""
    spec = read_spec("disaggregated")
    return sim.plot.sweep(sim.sweep(spec.engine, spec.time_limit, **spec.keywords()))


def parts():
    """What the time to first token is made of, for three shares of eight GPUs and three bandwidths."""
    load = sim.PoissonLoadGenerator(
        request_rate=32,
        prompt_tokens=sim.LogNormal(mean=4000, std=3000),
        output_tokens=sim.LogNormal(mean=200, std=160),
    )
    server = sim.presets.fitted("vllm-0.15-h100", model="llama-3.1-8b", load_generator=load, max_batch_size=256)
    apart = sim.presets.dynamo_gen2(
        prefill=sim.Pool.of(server),
        decode=sim.Pool.of(server),
        transfer=sim.KVTransfer.of("llama-3.1-8b", "infiniband-ndr"),
        load_generator=load,
        overheads=server.overheads,
    )
    prefill = xr.DataArray([4, 5, 6], dims="share")
    axes = {"prefill_workers": prefill, "decode_workers": 8 - prefill, "transfer.bandwidth": [50e9, 25e9, 11e9]}
    return sim.plot.ttft_parts(sim.sweep(apart, 60, **axes, seed=range(8)))


PICTURES = {
    "runs": runs,
    "sweep": sweep,
    "slots": slots,
    "policy": policy,
    "cache": cache,
    "disaggregated": disaggregated,
    "parts": parts,
}


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in PICTURES.items():
        draw().savefig(folder / f"{name}.png", dpi=90)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
