"""The kernels: what a step and a request cost, beside the reference's way."""

import vecsim as sim
from suite import cases


class Throughput:
    """Sweeps with all metrics on, two threads."""

    params = list(cases.THROUGHPUT)
    param_names = ["sweep"]
    timeout = 300

    def setup(self, sweep):
        self.case = cases.THROUGHPUT[sweep]
        self.completed = self.case.completed(2)  # compiles

    def time_sweep(self, sweep):
        self.case.completed(2)

    def track_completed(self, sweep):
        return self.completed / cases.seconds(lambda: self.case.completed(2), 1 if cases.TINY else 5)

    track_completed.unit = "completed requests/s"

    def track_literal_ratio(self, sweep):
        ours, literal = cases.rates(self.case, 2, 1 if cases.TINY else 5)
        return ours / literal

    track_literal_ratio.unit = "x the literal loop"


class Step:
    """The cost of a step, whatever the slots."""

    params = [4, 64, 1024, 4096]
    param_names = ["slots"]

    def setup(self, slots):
        self.case = cases.flat(slots)
        self.case.completed(1)

    def track_step(self, slots):
        return 1e9 * cases.seconds(lambda: self.case.completed(1), 1 if cases.TINY else 3) / cases.steps(self.case)

    track_step.unit = "ns/step"


class OwnRule:
    """A user's own batcher beside the built-in one of the same rule."""

    params = [["4 slots", "64 slots"], [0] if cases.TINY else [0, 1, 2]]  # TINY: each rule is compiled
    param_names = ["sweep", "rule"]
    timeout = 300

    def track_speed(self, sweep, rule):
        return cases.own_rule_speed(sweep, rule, 1 if cases.TINY else 10)

    track_speed.unit = "x the built-in batcher"


class Replicas:
    """The cost of a request to a cluster in ticks, whose workers are half busy however many there are."""

    params = [[1, 8, 64, 512], ["RoundRobinRouter", "LeastOutstandingRouter"]]
    param_names = ["workers", "router"]

    def setup(self, workers, router):
        pool = sim.Pool(workers=workers, max_batch_size=16, batcher=cases.IFB, step_time=sim.TickStepTime())
        load = sim.PoissonLoadGenerator(request_rate=0.15 * workers, prefill_time=2, output_tokens=20)
        self.cluster = sim.Cluster(pool=pool, router=getattr(sim, router)(), load_generator=load)
        self.time_limit = (200 if cases.TINY else 100_000) / workers
        self.axes = {"seed": range(4), "threads": 1, "progress": False}
        self.requests = int(sim.sweep(self.cluster, self.time_limit, **self.axes).arrived.sum())  # compiles

    def track_request(self, workers, router):
        repeat = 1 if cases.TINY else 3
        seconds = cases.seconds(lambda: sim.sweep(self.cluster, self.time_limit, **self.axes), repeat)
        return 1e9 * seconds / max(self.requests, 1)

    track_request.unit = "ns/request"
