"""Figures of the token model, one thread, compile apart, all metrics on: `python benchmarks/tokens.py`.

Cases of other simulators are measured where VECSIM_DATA names the folder that holds their inputs.
"""

import csv
import os
import time
from pathlib import Path

import numpy as np
from suite.fleets import VARIANTS, a_thousand, changing
from suite.tokens import disaggregated, poisson, replicas, ten_thousand

import vecsim as sim
from vecsim.axes import Plan
from vecsim.kernel import custom
from vecsim.scenarios import blocks, lower
from vecsim.simulate import Measured, Results
from vecsim.threads import Workers
from vecsim.token_simulate import run_token_block

REPEAT = 40


def milliseconds(engine: sim.Engine | sim.Cluster) -> tuple[float, int]:
    """Shortest time of the kernel for one scenario, requests made and metrics tallied, and its steps."""
    table = lower(Plan(engine, (), {}, {}), np.inf)
    measured = Measured(0.0, np.array([0.5, 0.9, 0.95, 0.99]), np.empty(0))
    results = Results.empty(True, 1, measured.width(table))
    times = []
    make = custom.token_kernel

    def timed(own, job):
        kernel = make(own, job)

        def run(first, last, job):
            outcome = kernel(first, last, job)
            for _ in range(REPEAT):
                begin = time.perf_counter()
                outcome = kernel(first, last, job)
                times.append(time.perf_counter() - begin)
            return outcome

        return run

    custom.token_kernel = timed
    try:
        block = next(blocks(table, np.zeros(1, np.int64)))
        run_token_block(table, block, measured, results, Workers(1))
    finally:
        custom.token_kernel = make
    return 1000 * min(times), int(results.metrics[0, -1])


def sweep_of_disaggregated() -> tuple[float, int, int]:
    """Seconds of a whole sweep of 10,000 scenarios, drawing, lowering and gathering included; steps, requests."""
    sim.sweep(disaggregated(20), **ten_thousand(True), progress=False)  # compiles
    begin = time.perf_counter()
    ds = sim.sweep(disaggregated(1_000), **ten_thousand(), threads=2, progress=False)
    return time.perf_counter() - begin, int(ds.steps.sum()), int(ds.completed.sum())


def sweeps_of_changing_fleets() -> None:
    """Seconds of whole sweeps of 1,000 fleets, 5,000 requests each, whose workers come, go and crash; a row each."""
    print("\n| 1,000 fleets, two threads | s | at most | of a processor | steps | us a request | ns a step |")
    print("|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        sim.sweep(changing(20, variant), **a_thousand(variant, 1), progress=False)  # compiles
        begin, used = time.perf_counter(), time.process_time()
        ds = sim.sweep(changing(5_000, variant), **a_thousand(variant), threads=2, progress=False)
        took, used = time.perf_counter() - begin, time.process_time() - used
        steps, most = int(ds.steps.sum()), "60" if variant == "all" else ""
        each = f"{1e6 * used / int(ds.arrived.sum()):.1f} | {1e9 * used / steps:.0f}"
        print(f"| {variant} | {took:.1f} | {most} | {used:.1f} | {steps:,} | {each} |")


def cases() -> dict[str, tuple[sim.Engine | sim.Cluster, str]]:
    """Engines and fleets, and the most milliseconds that each should take."""
    found = {
        "10,000 requests of 512/512 tokens at 10/s": (poisson(10_000), "2"),
        "100,000 of them": (poisson(100_000), "20"),
        **{
            f"2,000 of them, {slots} slots, the rate to match": (poisson(2_000, slots), "")
            for slots in (16, 64, 256, 1024)
        },
        "8 replicas, 20,000 of them at 80/s, least outstanding": (replicas(8, 20_000), "40"),
        **{
            f"{workers:,} replicas, {requests:,} of them at {10 * workers:,}/s": (replicas(workers, requests), "")
            for workers, requests in ((1, 2_500), (4, 10_000), (32, 80_000), (256, 100_000), (1024, 100_000))
        },
    }
    if folder := os.environ.get("VECSIM_DATA"):
        golden = Path(folder) / "golden"
        with (golden / "dynosim" / "poisson5000_agg1_rr_nocache.csv").open() as file:
            rows = list(csv.DictReader(file))
        dynamo = sim.Engine(
            max_batch_size=256,
            load_generator=sim.TraceLoadGenerator(
                arrived_at=[float(row["arrival_ms"]) / 1000 for row in rows],
                prompt_tokens=[int(row["input_length"]) for row in rows],
                output_tokens=[int(row["output_length"]) for row in rows],
            ),
            batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=8192),
            kv_cache=sim.KVCache(blocks=16384, block_size=64),
            step_time=sim.PolynomialStepTime(),
        )
        case = golden / "vidur" / "sarathi_c512_qps6.45"
        vidur = sim.Engine(
            max_batch_size=512,
            load_generator=sim.read_trace(case / "requests.csv", "vidur"),
            batcher=sim.ChunkedPrefillBatcher(chunk_tokens=512),
            kv_cache=sim.KVCache(blocks=30208, watermark=0.01),
            step_time=sim.TableStepTime(file=str(case / "step_tables_ms_per_layer.npz"), format="vidur"),
        )
        found["Dynamo's Poisson case, 5,000 requests"] = dynamo, "1"
        found["Vidur's Sarathi case, 1,000 requests"] = vidur, "0.6"
    return found


if __name__ == "__main__":
    print("| case | steps | ms | at most | ns a step |\n|---|---|---|---|---|")
    for name, (engine, most) in cases().items():
        took, steps = milliseconds(engine)
        print(f"| {name} | {steps:,} | {took:.2f} | {most} | {1e6 * took / steps:.1f} |")
    took, steps, completed = sweep_of_disaggregated()
    print(
        f"\n10,000 disaggregated scenarios of 1,000 requests, two threads: {took:.1f} s, at most 30; "
        f"{steps:,} steps, {1e9 * took * 2 / steps:.0f} ns a step of a thread, {completed / took:.3g} requests/s"
    )
    sweeps_of_changing_fleets()
