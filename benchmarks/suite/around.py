"""All around the kernels: lowering, gathering, single runs, pictures, start-up, memory."""

import numpy as np

import vecsim as sim
from suite import cases
from vecsim.axes import plan
from vecsim.scenarios import lower

ENGINE = cases.THROUGHPUT["4 slots"].engine
BATCHERS = [sim.StaticBatcher(), sim.IFBatcher(), sim.IFBatcherWithOnePrefillOnly()]


def axes(scenarios):
    """Batchers x rates x seeds."""
    size = max(2, int(np.sqrt(scenarios / 3)))
    return {"batcher": BATCHERS, "request_rate": np.linspace(0.1, 0.5, size), "seed": range(size)}


class Lowering:
    """From axes to the table of scenarios, and from results to the Dataset."""

    params = [100] if cases.TINY else [10_000, 1_000_000]
    param_names = ["scenarios"]

    def setup(self, scenarios):
        self.axes = axes(scenarios)
        sim.sweep(ENGINE, 1, progress=False, **axes(12))

    def time_plan(self, scenarios):
        plan(ENGINE, self.axes)

    def time_lower(self, scenarios):
        lower(plan(ENGINE, self.axes), 1_000)

    def time_everything_but_the_simulation(self, scenarios):
        sim.sweep(ENGINE, 1, progress=False, **self.axes)


class Sweep:
    """A sweep as users write it."""

    timeout = 300

    def setup(self):
        self.axes = axes(30 if cases.TINY else 10_000)
        self.ticks = 100 if cases.TINY else 1_000
        self.few = axes(30 if cases.TINY else 1_000)
        for keep in (None, "requests", "queue"):
            sim.sweep(ENGINE, 10, progress=False, keep=keep, **axes(12))

    def time_sweep(self):
        sim.sweep(ENGINE, self.ticks, progress=False, **self.axes)

    def time_keep_requests(self):
        sim.sweep(ENGINE, self.ticks, progress=False, keep="requests", **self.few)

    def time_keep_queue(self):
        sim.sweep(ENGINE, self.ticks, progress=False, keep="queue", **self.few)

    def time_queue_growth(self):
        sim.queue_growth(ENGINE, 10, self.ticks, progress=False, **self.few)

    def peakmem_sweep(self):
        sim.sweep(ENGINE, self.ticks, progress=False, **axes(30 if cases.TINY else 300_000))


class SingleRun:
    """One run, and its pictures."""

    def setup(self):
        load = sim.PoissonLoadGenerator(request_rate=1.2, prefill_time=0.2, **cases.LONG)
        self.large = sim.Engine(max_batch_size=256, load_generator=load).run(100 if cases.TINY else 10_000)
        self.run = ENGINE.run(100)
        self.run.plot()._repr_png_()
        self.large.plot(interactive=True)

    def time_run(self):
        ENGINE.run(10_000)

    def time_run_and_its_datasets(self):
        run = ENGINE.run(10_000)
        run.metrics, run.requests, run.steps  # noqa: B018

    def time_picture_of_4_slots(self):
        self.run.plot()._repr_png_()

    def time_picture_of_256_slots_and_10_000_ticks(self):
        self.large.plot()._repr_png_()

    def time_interactive_picture_of_256_slots_and_10_000_ticks(self):
        self.large.plot(interactive=True).to_html()

    def track_interactive_picture(self):
        return len(self.large.plot(interactive=True).to_html()) / 1e6

    track_interactive_picture.unit = "MB"


FIRST_OWN_RULE = """
import numba
import vecsim as sim
@numba.njit
def rule(batch):
    return batch.free
engine = sim.Engine(load_generator=sim.RequestRateLoadGenerator(target_output_len_tokens=10), batcher=rule)
sim.sweep(engine, 1000, progress=False, request_rate=[0.1, 0.2], seed=range(2))
"""


class StartUp:
    """Fresh processes, kernels in the disk cache."""

    timeout = 300

    def setup(self):
        if not cases.TINY:  # else how long it takes doesn't matter
            cases.child(cases.FIRST)
            cases.child(FIRST_OWN_RULE)

    def track_import(self):
        code = "import time; t = time.perf_counter(); import vecsim; print(time.perf_counter() - t)"
        return min(float(cases.child(code)[1]) for _ in range(1 if cases.TINY else 3))

    track_import.unit = "s"

    def track_first_sweep(self):
        return min(cases.first(cases.FIRST) for _ in range(1 if cases.TINY else 3))

    track_first_sweep.unit = "s"

    def track_first_sweep_of_an_own_rule(self):
        return min(cases.first(FIRST_OWN_RULE) for _ in range(1 if cases.TINY else 3))

    track_first_sweep_of_an_own_rule.unit = "s"
