"""What slow starts cost under reactive scaling, beside a published study: `python benchmarks/start_up.py FOLDER`.

FOLDER holds `data/traces/mooncake_conversation.jsonl`. Prints tables, and draws the picture that README.md shows.

The study is NVIDIA Dynamo's own, in its simulator (github.com/ai-dynamo/dynamo, docs/benchmarks/
planner-replay-benchmarking.md): Llama-3.1-8B in FP8 on H200s, two workers at first, limits of 1.5 s TTFT and 50 ms ITL,
scaling by load each 10 s above a floor by predicted throughput, set each 300 s, an hour of Mooncake's toolagent trace:
23,608 requests, 6.67 a second, 8,596 prompt and 182 output tokens in the mean.
"""

import argparse
from pathlib import Path

import msgspec
import numpy as np
import xarray as xr

import vecsim as sim
from vecsim.kernel.roofline import seconds
from vecsim.plot.style import COLOURS, Picture

TIMES = np.arange(0, 301, 20)
ROWS = (0, 60, 120, 180, 300)
# What the study tells: start-up time [s] -> mean and p90 TTFT [s], p90 ITL [ms], GPU-hours, scale-ups
PUBLISHED = {
    0: (0.850, 1.861, 28.2, 2.05, 42),
    30: (0.954, 1.957, 30.0, 2.04, 33),
    60: (2.116, 2.149, 32.9, 2.17, 28),
    90: (3.120, 2.285, 41.3, 2.11, 23),
    120: (34.797, 181.991, 182.3, 2.17, 16),
    180: (60, 300, 190, 2.3, 12),
    300: (76, 375, 190, 2.4, 8),
}
NAMES = ("SLO attainment [%]", "p90 TTFT [s]", "p90 ITL [ms]", "workers added", "GPU-hours")
PLACES = (1, 1, 0, 0, 2)

REQUESTS, PROMPT, OUTPUT, SHARED = 23_608, 8_596, 182, 5_072  # SHARED: 59 % of a prompt, in whole blocks
STAGE = 60.0  # s

DASHES = {"by load": ":", "floor": "-"}
UNCACHED = "floor, uncached"  # in no table and no picture: it is told how near the others it is


def server():
    """A worker of the study: FP8, a step of 8,192 tokens, prefix cache."""
    cache = sim.KVCache.of("llama-3.1-8b", "h200", dtype="fp8")
    return sim.Pool(
        workers=2,
        max_batch_size=256,
        batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=8192),
        step_time=sim.RooflineStepTime(model="llama-3.1-8b", gpu="h200", dtype="fp8"),
        kv_cache=msgspec.structs.replace(cache, prefix_caching=True),
    )


def profile(step_time):
    """Lines through steps that prefill one prompt, or decode, as a profiler would measure them beforehand."""
    numbers = tuple(step_time.coefficients())
    tokens = np.arange(1024, 8193, 1024)
    log = {"prefill_tokens": tokens, "prefill_attention": tokens**2 / 2}
    log["duration"] = [seconds(numbers, 1, n, n**2 / 2, 0, 0, 0) for n in tokens.tolist()]
    prefill = sim.fit_step_time(log, ["base", "per_prefill_token", "per_prefill_attention"]).step_time
    requests, context = (grid.ravel() for grid in np.meshgrid([1, 8, 32, 64, 96], [2048, 4096, 8192, 16384]))
    log = {"decode_requests": requests, "decode_context": requests * context}
    log["duration"] = [seconds(numbers, 0, 0, 0, 0, *one) for one in np.transpose(list(log.values())).tolist()]
    return prefill, sim.fit_step_time(log, ["base", "per_decode_request", "per_context_token"]).step_time


def planners(pool, hit_rate):
    """By load alone, or above a floor by the throughput of all prompt tokens or of those alone that aren't cached."""
    prefill, decode = profile(pool.step_time)
    cached = msgspec.structs.replace(
        prefill,
        per_prefill_token=prefill.per_prefill_token * (1 - hit_rate),
        per_prefill_attention=prefill.per_prefill_attention * (1 - hit_rate**2),
    )
    floor = sim.SLAPlanner(
        profile=prefill,
        decode_profile=decode,
        max_batch_size=pool.max_batch_size,
        kv_tokens=pool.kv_cache.blocks * pool.kv_cache.block_size,
        max_num_batched_tokens=pool.batcher.max_num_batched_tokens,
        itl=0.05,
        interval=300,
        correction=False,
    )
    alone = sim.ReactivePlanner(ttft=1.5, itl=0.05, interval=10, max_gpus=8)
    return {
        "by load": alone,
        "floor": msgspec.structs.replace(alone, floor=floor),
        UNCACHED: msgspec.structs.replace(alone, floor=msgspec.structs.replace(floor, profile=cached)),
    }


def stand_in(trace):
    """The toolagent trace's number and mean lengths; rates by the minute, and spreads of lengths, as in `trace`."""
    arrived, prompts, outputs = (
        np.asarray(getattr(trace, name)) for name in ("arrived_at", "prompt_tokens", "output_tokens")
    )
    counts = np.histogram(arrived, np.arange(0, arrived.max() + STAGE, STAGE))[0]
    rates = counts / STAGE * REQUESTS / arrived.size
    return sim.PiecewiseLoadGenerator(
        request_rates=tuple(rates),
        durations=(STAGE,) * rates.size,
        requests=REQUESTS,
        prompt_tokens=sim.LogNormal(mean=PROMPT - SHARED, std=PROMPT * prompts.std() / prompts.mean()),
        output_tokens=sim.LogNormal(mean=OUTPUT, std=OUTPUT * outputs.std() / outputs.mean()),
        prefix=sim.SharedPrefix(tokens=SHARED, groups=20),
    )


def measure(load, seeds):
    """A sweep of start-up times and planners; start-up times spread by a tenth, so that seeds differ."""
    cluster = sim.Cluster(
        pool=server(), router=sim.RoundRobinRouter(), load_generator=load, slo=sim.SLO(ttft=1.5, tpot=0.05)
    )
    hit_rate = float(sim.sweep(cluster, np.inf, workers=3, progress=False).prefix_hit_rate)
    named = planners(cluster.pool, hit_rate)
    times = xr.DataArray(TIMES, dims="start_up")
    axes = {"start_up_time": times, "start_up_std": 0.1 * times, "seed": range(seeds)}
    planner = xr.DataArray(list(named.values()), dims="planner")
    ds = sim.sweep(cluster, np.inf, scaling=planner, **axes, progress=False).assign_coords(planner=list(named))
    p90 = {"stat": "p90", "drop": True}
    values = (100 * ds.slo_attainment, ds.ttft.sel(**p90), 1000 * ds.itl.sel(**p90), ds.scale_ups, ds.gpu_hours)
    return hit_rate, dict(zip(NAMES, values, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    trace = sim.read_trace(options.folder / "data" / "traces" / "mooncake_conversation.jsonl", "mooncake")
    lines = {}
    for name, load in {"conversations": trace, "stand-in": stand_in(trace)}.items():
        hit_rate, values = measure(load, options.seeds)
        ttft = values["p90 TTFT [s]"].median("seed")
        apart = {}
        for planner in DASHES:
            lines[name, planner] = {key: array.sel(planner=planner) for key, array in values.items()}
            apart[planner] = float(abs(ttft.sel(planner=UNCACHED) / ttft.sel(planner=planner) - 1).max())
        nearest = min(apart, key=apart.__getitem__)
        print(
            f"{name}: of prompt tokens {100 * hit_rate:.1f} % are in the caches of three workers; with a floor by the "
            f"others alone, p90 TTFT is within {100 * apart[nearest]:.1f} % of {nearest!r}"
        )
    print("| load | planner | start-up [s] |", " | ".join(NAMES), "|")
    print("|---|---|---|" + "---|" * len(NAMES))
    for time in ROWS:
        _, ttft, itl, hours, ups = PUBLISHED[time]
        print(f"| published | floor | {time} | | {ttft:g} | {itl:.0f} | {ups} | {hours:g} |")
    for names, values in lines.items():
        for time in ROWS:
            cells = []
            for key, places in zip(NAMES, PLACES, strict=True):
                seeds = values[key].isel(start_up=int(np.flatnonzero(time == TIMES)[0])).values
                low, middle, high = (f"{value:.{places}f}" for value in np.quantile(seeds, (0, 0.5, 1)))
                cells.append(middle if low == high else f"{middle} ({low}-{high})")
            print("|", " | ".join([*names, str(time), *cells]), "|")

    shown = {"SLO attainment [%]": None, "p90 TTFT [s]": 1, "workers added": 4, "GPU-hours": 3}
    figure = Picture(figsize=(13, 3.9), layout="constrained")
    for axis, (key, place) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for (load, planner), values in lines.items():
            low, middle, high = values[key].quantile((0, 0.5, 1), "seed").transpose("quantile", ...).values
            colour = COLOURS[load != "conversations"]
            axis.plot(TIMES, middle, color=colour, linestyle=DASHES[planner], label=f"{load}, {planner}")
            axis.fill_between(TIMES, low, high, color=colour, alpha=0.15, linewidth=0)
        if place is not None:
            axis.plot(list(PUBLISHED), [row[place] for row in PUBLISHED.values()], "ks", ms=5, label="published")
        axis.set(xlabel="start-up time [s]", ylabel=key)
        axis.grid(alpha=0.3)
        if key == "p90 TTFT [s]":
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            axis.set_ylim(bottom=0)
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(Path(__file__).parent / "start_up.png", dpi=100)


if __name__ == "__main__":
    main()
