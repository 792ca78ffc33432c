"""The table of published and golden cases, and how to declare them."""

import json
from pathlib import Path
from typing import Any

import vecsim as sim

BATCHERS = {
    "static": sim.StaticBatcher(),
    "ifb": sim.IFBatcher(),
    "one_prefill": sim.IFBatcherWithOnePrefillOnly(),
}
LOADS = {
    "batch": (sim.BatchLoadGenerator, "initial_batch"),
    "concurrent": (sim.ConcurrentLoadGenerator, "target_concurrency"),
    "rate": (sim.RequestRateLoadGenerator, "request_rate"),
}

GOLDEN = json.loads((Path(__file__).parent / "data" / "tick-cases.json").read_text())

# batcher, load, load value, chunks: E2E, TTFT, ITL, requests and tokens per 1K ticks, final queue, end time
PUBLISHED = [
    ("static", "batch", 100, 1, 58.16, 52.80, 1.00, 190.00, 1680.00, 80, 100),
    ("ifb", "batch", 100, 1, 58.44, 52.90, 1.39, 267.33, 2376.24, 69, 101),
    ("ifb", "batch", 100, 2, 57.42, 54.51, 1.14, 310.00, 2730.00, 65, 100),
    ("one_prefill", "batch", 100, 2, 55.94, 52.13, 1.00, 360.00, 3170.00, 60, 100),
    ("one_prefill", "concurrent", 6, 2, 15.14, 7.87, 1.00, 360.00, 3170.00, 2, 100),
    ("one_prefill", "rate", 0.46, 2, 17.66, 11.03, 1.00, 350.00, 3060.00, 6, 100),
]

# The long runs, with the length stream restarted at its seed
PUBLISHED_LONG = [
    ("rate", 0.46, 1135, 1233.30, 1240.58, 346.00, 3361.40),
    ("concurrent", 6, 2, 8.60, 17.31, 346.10, 3362.60),
]


def load_generator(load: str, value: float, **fields: Any) -> sim.LoadGenerator:
    cls, name = LOADS[load]
    return cls(**{name: value}, **fields)


def golden_engine(config: dict[str, Any]) -> sim.Engine:
    names = (
        "prefill_time",
        "itl",
        "total_prefill_chunks",
        "target_output_len_tokens",
        "target_output_len_std",
        "seed",
    )
    return sim.Engine(
        max_batch_size=config["max_batch_size"],
        load_generator=load_generator(config["load"], config["load_value"], **{name: config[name] for name in names}),
        batcher=BATCHERS[config["batcher"]],
    )


def published_engine(batcher: str, load: str, value: float, chunks: int) -> sim.Engine:
    return sim.Engine(
        max_batch_size=4,
        load_generator=load_generator(
            load,
            value,
            prefill_time=2,
            itl=1,
            total_prefill_chunks=chunks,
            target_output_len_tokens=10,
            target_output_len_std=5,
            seed=42,
        ),
        batcher=BATCHERS[batcher],
    )
