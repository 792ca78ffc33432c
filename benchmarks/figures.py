"""Measure the figures of benchmarks/README.md and print them as Markdown: `uv run python benchmarks/figures.py`.

Each throughput is the best of several repetitions, of the simulator and of the literal loop alternately, so that both
see the same machine. `--quick` measures each once.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
import time

import literal
import numpy as np
import xarray as xr

import vecsim as sim

SHORT = {"target_output_len_tokens": 10, "target_output_len_std": 5}
LONG = {"target_output_len_tokens": 200, "target_output_len_std": 100}
ONE, IFB = sim.IFBatcherWithOnePrefillOnly(), sim.IFBatcher()


def own_seeds(rates, count):
    """Every scenario has a seed of its own."""
    return {
        "request_rate": xr.DataArray(np.linspace(*rates, count), dims="scenario"),
        "seed": xr.DataArray(np.arange(count), dims="scenario"),
    }


def grid(rates, number, seeds):
    return {"request_rate": np.linspace(*rates, number), "seed": range(seeds)}


# name, floor [completed requests/s], slots, batcher, load, axes, ticks
THROUGHPUT = [
    ("4 slots, one prefill", 5e7, 4, ONE, {"total_prefill_chunks": 2, **SHORT}, grid((0.45, 0.47), 125, 32), 10_000),
    (
        "64 slots, in-flight", 5e7, 64, IFB, {"total_prefill_chunks": 2, "prefill_time": 0.2, **SHORT},
        grid((4.9, 5.1), 125, 16), 2_000,
    ),
    ("256 slots, long outputs", 3e7, 256, IFB, {"prefill_time": 0.2, **LONG}, grid((1.19, 1.21), 50, 8), 10_000),
    (
        "4 slots, a seed each", 2e7, 4, ONE, {"total_prefill_chunks": 2, **SHORT},
        own_seeds((0.45, 0.47), 4_000), 10_000,
    ),
]  # fmt: skip


def best(function, repeat):
    """The shortest of several times [s], and what the function returned."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    return min(times), result


def literal_scenarios(slots, batcher, load, axes, ticks, most):
    """Some of the scenarios of a sweep, as the literal loop takes them."""
    rates = np.asarray(axes["request_rate"])
    load = sim.RequestRateLoadGenerator(**load)
    stream = np.random.RandomState(0).normal(load.target_output_len_tokens, load.target_output_len_std, 10**6)
    lengths = np.maximum(stream, 1).astype(np.int64)
    scenarios = []
    for i in range(most):
        rate = rates[i * rates.size // most]
        due = (np.arange(int(ticks * rate)) + 1) / rate
        scenarios.append(
            (batcher == ONE, slots, load.prefill_time, load.itl, load.total_prefill_chunks, due, lengths, float(ticks))
        )
    return scenarios


def throughput(repeat, threads):
    print(f"\n### Sweeps, all metrics on, drawing included, {threads} threads\n")
    print("| sweep | scenarios | completed requests/s | floor | literal loop | ratio |")
    print("|---|---|---|---|---|---|")
    for name, floor, slots, batcher, load, axes, ticks in THROUGHPUT:
        engine = sim.Engine(max_batch_size=slots, batcher=batcher, load_generator=sim.RequestRateLoadGenerator(**load))
        some = literal_scenarios(slots, batcher, load, axes, ticks, max(2, min(200, 400_000 // (slots * 20))))

        def ours(engine=engine, ticks=ticks, axes=axes):
            return int(sim.sweep(engine, ticks, progress=False, threads=threads, **axes).completed.sum())

        def theirs(some=some):
            return literal.run_all(some, threads)

        ours(), theirs()
        our_rate = their_rate = 0.0
        for _ in range(repeat):
            seconds, completed = best(ours, 1)
            our_rate = max(our_rate, completed / seconds)
            seconds, completed = best(theirs, 1)
            their_rate = max(their_rate, completed / seconds)
        scenarios = sim.sweep(engine, 10, progress=False, **axes).completed.size
        print(
            f"| {name} | {scenarios:,} | {our_rate:.2e} | {floor:.0e} | {their_rate:.2e} "
            f"| {our_rate / their_rate:.1f} x |",
            flush=True,
        )


def flatness(repeat):
    print("\n### Cost of a step against slots: rate 0.46, 2 chunks, lengths 10 +- 5, 100,000 ticks, one thread\n")
    print("| slots | ns a step, all metrics on | literal loop, ns a step |")
    print("|---|---|---|")
    load = {"total_prefill_chunks": 2, "prefill_time": 0.2, **SHORT}
    for slots in (4, 16, 64, 256, 1024, 4096):
        engine = sim.Engine(max_batch_size=slots, load_generator=sim.RequestRateLoadGenerator(**load))

        def ours(engine=engine):
            axes = {"request_rate": [0.46], "seed": range(20)}
            return int(sim.sweep(engine, 100_000, progress=False, threads=1, **axes).steps.sum())

        shorter = max(200, 100_000 // slots)
        some = literal_scenarios(slots, IFB, load, {"request_rate": [0.46]}, shorter, 2)
        ours(), literal.run_all(some, 1)
        seconds, steps = best(ours, repeat)
        theirs, _ = best(lambda some=some: literal.run_all(some, 1), repeat)
        print(f"| {slots:,} | {seconds / steps * 1e9:.1f} | {theirs / (2 * shorter) * 1e9:,.0f} |", flush=True)


def child(code, **environment):
    """Run code in a fresh process: (seconds from its start to its end, what it printed)."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return time.perf_counter() - begin, done.stdout


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

FIRST = """
import vecsim as sim
engine = sim.Engine(load_generator=sim.RequestRateLoadGenerator(target_output_len_tokens=10))
sim.sweep(engine, 1000, progress=False, request_rate=[0.1, 0.2], seed=range(2))
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
    child(FIRST)
    seconds = min(child(FIRST)[0] for _ in range(repeat))
    print(
        f"| fresh process, warm disk cache: interpreter start to end of the first sweep | {seconds:.2f} s | < 1.5 s |"
    )
    with tempfile.TemporaryDirectory() as folder:
        cold, _ = child(FIRST, VECSIM_CACHE_DIR=folder)
    print(f"| the same with a cold cache: all kernels of a sweep compiled | {cold:.1f} s | < 20 s |", flush=True)
    print(child(SINGLE)[1], end="", flush=True)
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
    flatness(min(repeat, 3))
    latencies(min(repeat, 3))


if __name__ == "__main__":
    main()
