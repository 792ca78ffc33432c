"""What slow starts cost under reactive scaling, beside a published study: `python benchmarks/start_up.py FOLDER`.

FOLDER holds `data/traces/mooncake_conversation.jsonl`. Prints tables, and draws the picture that README.md shows.

The study is NVIDIA Dynamo's own, in its simulator (github.com/ai-dynamo/dynamo, docs/benchmarks/
planner-replay-benchmarking.md): Llama-3.1-8B in FP8 on H200s, two workers at first, limits of 1.5 s TTFT and 50 ms ITL,
an hour of Mooncake's toolagent trace: 23,608 requests, 6.67 a second, 8,596 prompt and 182 output tokens in the mean.
"""

import argparse
from pathlib import Path

import msgspec
import numpy as np
import xarray as xr

import vecsim as sim
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
    """A sweep of start-up times and least workers; start-up times spread by a tenth, so that seeds differ."""
    cluster = sim.Cluster(
        pool=server(),
        router=sim.RoundRobinRouter(),
        load_generator=load,
        slo=sim.SLO(ttft=1.5, tpot=0.05),
        scaling=sim.ReactivePlanner(ttft=1.5, itl=0.05, interval=10, max_gpus=8),
    )
    times = xr.DataArray(TIMES, dims="start_up")
    axes = {"start_up_time": times, "start_up_std": 0.1 * times, "min_workers": [1, 2], "seed": range(seeds)}
    ds = sim.sweep(cluster, np.inf, **axes)
    p90 = {"stat": "p90", "drop": True}
    values = (100 * ds.slo_attainment, ds.ttft.sel(**p90), 1000 * ds.itl.sel(**p90), ds.scale_ups, ds.gpu_hours)
    return dict(zip(NAMES, values, strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    trace = sim.read_trace(options.folder / "data" / "traces" / "mooncake_conversation.jsonl", "mooncake")
    measured = {
        "conversations": measure(trace, options.seeds),
        "stand-in": measure(stand_in(trace), options.seeds),
    }
    lines = {
        f"{name}, {least} worker{'s' if least > 1 else ''} or more": {
            key: array.sel(min_workers=least) for key, array in values.items()
        }
        for name, values in measured.items()
        for least in (1, 2)
    }
    print("| load | start-up [s] |", " | ".join(NAMES), "|")
    print("|---|---|" + "---|" * len(NAMES))
    for time in ROWS:
        _, ttft, itl, hours, ups = PUBLISHED[time]
        print(f"| published | {time} | | {ttft:g} | {itl:.0f} | {ups} | {hours:g} |")
    for name, values in lines.items():
        for time in ROWS:
            cells = []
            for key, places in zip(NAMES, PLACES, strict=True):
                seeds = values[key].isel(start_up=int(np.flatnonzero(time == TIMES)[0])).values
                low, middle, high = (f"{value:.{places}f}" for value in np.quantile(seeds, (0, 0.5, 1)))
                cells.append(middle if low == high else f"{middle} ({low}-{high})")
            print(f"| {name} | {time} |", " | ".join(cells), "|")

    shown = {"SLO attainment [%]": None, "p90 TTFT [s]": 1, "workers added": 4, "GPU-hours": 3}
    figure = Picture(figsize=(13, 3.9), layout="constrained")
    for axis, (key, place) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        for (name, values), colour, dash in zip(
            lines.items(), (COLOURS[0], COLOURS[0], COLOURS[1], COLOURS[1]), ("-", ":", "-", ":"), strict=True
        ):
            low, middle, high = values[key].quantile((0, 0.5, 1), "seed").transpose("quantile", ...).values
            axis.plot(TIMES, middle, color=colour, linestyle=dash, label=name)
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
