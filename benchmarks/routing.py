"""Hit rates of routers on Mooncake's conversations: `python benchmarks/routing.py FOLDER`.

FOLDER holds `data/traces/mooncake_conversation.jsonl`. Prints a table, and draws the picture that README.md shows.
"""

import argparse
from pathlib import Path

import numpy as np

import vecsim as sim
from vecsim.plot.style import COLOURS, Picture

ROUTERS = [
    sim.RoundRobinRouter(),
    sim.LeastOutstandingRouter(),
    sim.KVAwareRouter(),
    sim.OverlapRouter(),
]
BLOCKS = [10_000, 20_000, 40_000, 80_000, 160_000, 320_000]
WORKERS = [2, 4, 8]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--requests", type=int, help="of the trace; all unless given")
    options = parser.parse_args()
    trace = options.folder / "data" / "traces" / "mooncake_conversation.jsonl"
    cluster = sim.Cluster(
        pool=sim.Pool(
            max_batch_size=64,
            step_time=sim.RooflineStepTime(model="llama-3.1-8b", gpu="h100"),
            kv_cache=sim.KVCache(blocks=BLOCKS[0], block_size=16, prefix_caching=True),
        ),
        load_generator=sim.read_trace(trace, "mooncake", requests=options.requests),
    )
    ds = sim.sweep(cluster, time_limit=np.inf, workers=WORKERS, blocks=BLOCKS, router=ROUTERS)
    rates = 100 * ds.prefix_hit_rate
    print("| workers | KV blocks of each |", " | ".join(rates.router.values), "|")
    print("|---|---|" + "---|" * rates.sizes["router"])
    for workers in WORKERS:
        for blocks in BLOCKS:
            row = rates.sel(workers=workers, blocks=blocks).values
            print(f"| {workers} | {blocks:,} |", " | ".join(f"{rate:.1f}" for rate in row), "|")
    figure = Picture(figsize=(11, 3.6), layout="constrained")
    plots = figure.subplots(1, len(WORKERS), sharey=True)
    for axis, workers in zip(plots, WORKERS, strict=True):
        for router, colour in zip(rates.router.values, COLOURS, strict=False):
            axis.plot(BLOCKS, rates.sel(workers=workers, router=router), marker="o", color=colour, label=router)
        axis.set(xscale="log", title=f"{workers} workers", xlabel="KV blocks of each worker")
        axis.grid(alpha=0.3)
    plots[0].set(ylabel="prompt tokens found in a cache [%]", ylim=0)
    plots[-1].legend(fontsize="small")
    figure.savefig(Path(__file__).parent / "routing.png", dpi=100)


if __name__ == "__main__":
    main()
