"""Compile the kernels of one model into the disk cache: `python compile_kernels.py ticks`, or `tokens`."""

import sys

import policies

import vecsim as sim
from vecsim.kernel.address import COUNT, TIERS_ACT, WORLD, address_of
from vecsim.kernel.fleet import simulate_fleet
from vecsim.kernel.jit import is_compiled
from vecsim.kernel.tiers import tiers_act


def ticks():
    """Everything that runs, sweeps and rules of a user's own need."""
    engine = sim.Engine(load_generator=sim.PoissonLoadGenerator())
    engine.run(10).requests  # noqa: B018
    for keep in ("requests", "queue"):
        sim.sweep(engine, 10, keep=keep, progress=False, batcher=policies.in_flight)
    apart = sim.TickDisaggregatedEngine(
        max_prefill_workers=1, max_decode_workers=1, load_generator=engine.load_generator
    )
    for keep in ("requests", "queue"):
        sim.sweep(apart, 10, keep=keep, progress=False)
    pool = sim.Pool(batcher=sim.IFBatcher(), step_time=sim.TickStepTime())
    for keep in ("requests", "queue"):
        sim.sweep(sim.Cluster(pool=pool, load_generator=engine.load_generator), 10, keep=keep, progress=False)
    address_of(tiers_act, TIERS_ACT, COUNT)
    address_of(simulate_fleet, (WORLD,), COUNT)  # calls what the other process compiles


def tokens():
    """The same for the token model, with nothing drawn: what draws is compiled with the tick model's kernels."""
    load = sim.TraceLoadGenerator(arrived_at=[0, 1], prompt_tokens=[10, 10], output_tokens=[5, 5])
    sim.Engine(load_generator=load, batcher=sim.TokenBudgetBatcher(), step_time=sim.LinearStepTime(base=1)).run()


# Of each model, and what it compiles last
MODELS = {"ticks": (ticks, "simulate_fleet"), "tokens": (tokens, "write_token_record")}

if __name__ == "__main__":
    compile_all, last = MODELS[sys.argv[1]]
    if not is_compiled(last):
        print(f"compiling the kernels of {sys.argv[1]}: one or two minutes, once", flush=True)
        compile_all()
