"""Fleets whose workers come, go and crash, and whose caches have lower tiers; and what each of these costs."""

import vecsim as sim
from suite import cases

VARIANTS = {
    "none": (),
    "planner": ("planner",),
    "tiers": ("tiers",),
    "crashes": ("crashes",),
    "all": ("planner", "tiers", "crashes"),
}


def changing(requests, variant="all"):
    """Four workers at first, two to eight later, under a load in waves; prompts begin with one of 200 long prefixes."""
    parts = VARIANTS[variant]
    tiers = sim.CacheTiers(host_blocks=20_000, disk_blocks=40_000, kv_bytes_per_token=131_072)
    planner = sim.ThroughputPlanner(min_workers=2, max_gpus=8, kv_low=0.15, kv_high=0.4)
    return sim.Cluster(
        pool=sim.Pool(
            workers=4,
            max_batch_size=64,
            step_time=sim.LinearStepTime(base=6e-3, per_request=6e-5, per_prefill_token=4e-5),
            kv_cache=sim.KVCache(blocks=6_000, prefix_caching=True, tiers=tiers if "tiers" in parts else None),
            start_up_time=20.0,
        ),
        router=sim.KVAwareRouter(),
        load_generator=sim.PiecewiseLoadGenerator(
            request_rates=(8, 24),
            durations=(60, 60),
            repeat=True,
            requests=requests,
            prompt_tokens=sim.LogNormal(mean=800, std=600),
            output_tokens=sim.LogNormal(mean=211, std=160),
            prefix=sim.SharedPrefix(tokens=1_024, groups=200),
        ),
        slo=sim.SLO(ttft=1.0, tpot=0.05),
        scaling=planner if "planner" in parts else None,
        control_plane=sim.ControlPlane(mtbf=300.0, migration_limit=3) if "crashes" in parts else None,
    )


def a_thousand(variant="all", seeds=50):
    """Axes of 1,000 scenarios of it: start-up times x mean times between failures x seeds; or of fewer seeds.

    Where nothing crashes, more seeds stand for the times between failures.
    """
    axes = {"start_up_time": [0.0, 5.0, 10.0, 20.0, 40.0], "mtbf": [150.0, 300.0, 600.0, 1_200.0]}
    if "crashes" not in VARIANTS[variant]:
        seeds *= len(axes.pop("mtbf"))
    return {**axes, "seed": range(seeds)}


class Changing:
    """The cost of a request where workers come and go, where caches have tiers, where workers crash; one thread."""

    params = list(VARIANTS)
    param_names = ["variant"]
    timeout = 600

    def setup(self, variant):
        self.cluster = changing(20 if cases.TINY else 5_000, variant)
        self.axes = {**a_thousand(variant, 1 if cases.TINY else 5), "threads": 1, "progress": False}
        self.requests = int(sim.sweep(self.cluster, **self.axes).arrived.sum())  # compiles

    def track_request(self, variant):
        repeat = 1 if cases.TINY else 3
        return 1e6 * cases.seconds(lambda: sim.sweep(self.cluster, **self.axes), repeat) / self.requests

    track_request.unit = "us/request"


class ChangingSweep:
    """A sweep of 1,000 such fleets with all of it, 5,000 requests each, two threads."""

    timeout = 600
    number = repeat = 1  # it takes long enough
    warmup_time = 0

    def setup(self):
        self.cluster = changing(20 if cases.TINY else 5_000)
        self.axes = {**a_thousand(seeds=1 if cases.TINY else 50), "threads": 2, "progress": False}
        sim.sweep(changing(20), **a_thousand(seeds=1), progress=False)  # compiles

    def time_sweep(self):
        sim.sweep(self.cluster, **self.axes)
