"""Measure the figures of benchmarks/README.md and print them as Markdown: `uv run python benchmarks/figures.py`.

Each throughput is the best of several repetitions, of the simulator and of the literal loop alternately, so that both
see the same machine. `--quick` measures each once.
"""

import argparse
import datetime
import os
import platform
import tempfile

import numpy as np
from suite import cases, literal
from suite.cases import child


def throughput(repeat, threads):
    print(f"\n### Sweeps, all metrics on, drawing included, {threads} threads\n")
    print("| sweep | scenarios | completed requests/s | floor | literal loop | ratio |")
    print("|---|---|---|---|---|---|")
    for case in cases.THROUGHPUT.values():
        ours, theirs = cases.rates(case, threads, repeat)
        sizes = {dim: size for axis in case.axes.values() for dim, size in sized(axis)}
        scenarios = np.prod(list(sizes.values()))
        print(
            f"| {case.title} | {scenarios:,} | {ours:.2e} | {case.floor:.0e} | {theirs:.2e} | {ours / theirs:.1f} x |",
            flush=True,
        )


def sized(axis):
    """(dimension, length) of an axis."""
    return axis.sizes.items() if hasattr(axis, "sizes") else [(id(axis), len(axis))]


def own_rules(repeat):
    print("\n### A user's own batcher: its speed over that of the built-in one of the same rule, one thread\n")
    print("| sweep | static | in-flight | one prefill |")
    print("|---|---|---|---|")
    for slots in ("4 slots", "64 slots"):
        cells = [f"{cases.own_rule_speed(slots, twin, repeat):.2f}" for twin in range(3)]
        print(f"| {slots} | {' | '.join(cells)} |", flush=True)


def flatness(repeat):
    print("\n### Cost of a step against slots: rate 0.46, 2 chunks, lengths 10 +- 5, 100,000 ticks, one thread\n")
    print("| slots | ns a step, all metrics on | literal loop, ns a step |")
    print("|---|---|---|")
    for slots in (4, 16, 64, 256, 1024, 4096):
        case = cases.flat(slots)
        shorter = max(200, 100_000 // slots)
        some = case._replace(ticks=shorter).literal(2)
        case.completed(1), literal.run_all(some, 1)
        ours = cases.seconds(lambda case=case: case.completed(1), repeat)
        theirs = cases.seconds(lambda some=some: literal.run_all(some, 1), repeat)
        print(f"| {slots:,} | {ours / cases.steps(case) * 1e9:.1f} | {theirs / (2 * shorter) * 1e9:,.0f} |", flush=True)


MILLION = """
import resource, time
import numpy as np
import vecsim as sim
engine = sim.Engine(max_batch_size=4, batcher=sim.IFBatcherWithOnePrefillOnly(),
    load_generator=sim.RequestRateLoadGenerator(
        total_prefill_chunks=2, target_output_len_tokens=10, target_output_len_std=5))
sim.sweep(engine, 10, progress=False, seed=[0])
begin = time.perf_counter()
ds = sim.sweep(engine, 1000, progress=False, request_rate=np.linspace(0.44, 0.48, 1000), seed=range(1000))
seconds = time.perf_counter() - begin
completed = int(ds.completed.sum())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"| a million scenarios of 1,000 ticks | {seconds:.1f} s, {peak:.2f} GiB, "
      f"{completed / seconds:.2e} completed requests/s | < 60 s, < 1.5 GiB |")
"""

SINGLE = """
import time
import xarray
import vecsim as sim
engine = sim.Engine(load_generator=sim.RequestRateLoadGenerator(request_rate=0.46, target_output_len_tokens=10))
engine.run(100).metrics
times = []
for _ in range(50):
    begin = time.perf_counter()
    engine.run(time_limit=10_000)
    times.append(time.perf_counter() - begin)
begin = time.perf_counter()
run = engine.run(time_limit=10_000)
run.metrics, run.requests, run.steps
everything = time.perf_counter() - begin
print(f"| `Engine.run(time_limit=10_000)`, warm: median of 50 | {sorted(times)[25] * 1e3:.2f} ms | < 5 ms |")
print(f"| the same, its three Datasets made as well | {everything * 1e3:.1f} ms | |")
"""

PICTURES = """
import time
import numpy as np
import vecsim as sim
load = sim.PoissonLoadGenerator(
    request_rate=1.2, prefill_time=0.2, target_output_len_tokens=200, target_output_len_std=100)
run = sim.Engine(max_batch_size=256, load_generator=load).run(10_000)
run.plot()._repr_png_()
begin = time.perf_counter()
size = len(run.plot()._repr_png_())
seconds = time.perf_counter() - begin
print(f"| `run.plot()` of 256 slots x 10,000 ticks, PNG | {seconds:.2f} s, {size / 1e6:.1f} MB | < 2 s |")
run.plot(interactive=True).to_html()
begin = time.perf_counter()
size = len(run.plot(interactive=True).to_html())
seconds = time.perf_counter() - begin
print(f"| the same, interactive, HTML | {seconds:.2f} s, {size / 1e6:.1f} MB (plotly itself: 4.8) | |")
"""

OWN_RULE = """
import numba, time
import vecsim as sim
engine = sim.Engine(load_generator=sim.RequestRateLoadGenerator(target_output_len_tokens=10))
sim.sweep(engine, 1000, progress=False, seed=range(2))
sim.sweep(engine, 1000, progress=False, seed=range(2), batcher=numba.njit(lambda batch: batch.free // 2))
begin = time.perf_counter()
sim.sweep(engine, 1000, progress=False, seed=range(2), batcher=numba.njit(lambda batch: batch.free))
print(f"| a batcher of one's own: to the end of its first sweep | {time.perf_counter() - begin:.1f} s | |")
"""

IMPORT = """
import sys, time
begin = time.perf_counter()
import vecsim
print(time.perf_counter() - begin)
assert not {"numba", "xarray", "matplotlib"} & set(sys.modules)
"""


def latencies(repeat):
    print("\n### Start-up, single runs, a million scenarios\n")
    print("| what | measured | floor |")
    print("|---|---|---|")
    seconds = min(float(child(IMPORT)[1]) for _ in range(repeat + 1))
    print(f"| `import vecsim` | {seconds:.2f} s | < 0.4 s |")
    seconds = min(child("import numba, xarray")[0] for _ in range(repeat + 1))
    print(f"| fresh process, `import numba, xarray` alone | {seconds:.2f} s | |")
    child(cases.FIRST)
    seconds = min(child(cases.FIRST)[0] for _ in range(repeat))
    print(
        f"| fresh process, warm disk cache: interpreter start to end of the first sweep | {seconds:.2f} s | < 1.5 s |"
    )
    with tempfile.TemporaryDirectory() as folder:
        cold, _ = child(cases.FIRST, VECSIM_CACHE_DIR=folder)
    print(f"| the same with a cold cache: all kernels of a sweep compiled | {cold:.1f} s | < 20 s |", flush=True)
    print(child(SINGLE)[1], end="", flush=True)
    print(child(OWN_RULE)[1], end="", flush=True)
    print(child(PICTURES)[1], end="", flush=True)
    print(child(MILLION)[1], end="", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure each figure once")
    repeat = 1 if parser.parse_args().quick else 15
    import numba

    print(
        f"Measured on {datetime.date.today()}: {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, numba {numba.__version__}, NumPy {np.__version__}."
    )
    throughput(repeat, 2)
    own_rules(1 if repeat == 1 else 25)
    flatness(min(repeat, 3))
    latencies(min(repeat, 6))


if __name__ == "__main__":
    main()
