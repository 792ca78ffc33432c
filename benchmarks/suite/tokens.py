"""The token model: what a step costs, sweeps of schedulers, conversations in a prefix cache, runs, pictures."""

import msgspec

import vecsim as sim
from suite import cases

STEP = sim.LinearStepTime(base=8e-3, per_request=4e-5)
BATCHERS = {
    "static": sim.StaticBatcher(),
    "in-flight": sim.IFBatcher(),
    "prefill first": sim.PrefillFirstBatcher(max_num_batched_tokens=8192),
    "chunked": sim.ChunkedPrefillBatcher(chunk_tokens=512),
    "token budget": sim.TokenBudgetBatcher(max_num_batched_tokens=2048),
    "no evict": sim.NoEvictBatcher(),
    "max utilization": sim.MaxUtilizationBatcher(),
    "SGLang": sim.SGLangBatcher(),
}
SECONDS = 5 if cases.TINY else 600


def poisson(requests, slots=256):
    """512/512 tokens at 10/s for 256 slots."""
    load = sim.PoissonLoadGenerator(
        request_rate=10 * slots / 256, requests=requests, prompt_tokens=512, output_tokens=512
    )
    batcher = sim.TokenBudgetBatcher(max_num_batched_tokens=2048)
    return sim.Engine(max_batch_size=slots, load_generator=load, batcher=batcher, step_time=STEP)


def replicas(workers, requests, router=None):
    """As many of such engines behind a router, each with its 10 requests a second."""
    one = poisson(requests)
    return sim.Cluster(
        pool=sim.Pool(workers=workers, max_batch_size=256, batcher=one.batcher, step_time=STEP),
        router=router or sim.LeastOutstandingRouter(),
        load_generator=msgspec.structs.replace(one.load_generator, request_rate=10.0 * workers),
    )


def disaggregated(requests):
    """Two workers that prefill and two that decode, joined by links of 50 GB/s."""
    pool = sim.Pool(
        workers=2,
        max_batch_size=256,
        step_time=sim.LinearStepTime(base=6e-3, per_request=6e-5, per_prefill_token=4e-5),
        kv_cache=sim.KVCache(blocks=4000),
    )
    return sim.DisaggregatedEngine(
        prefill=pool,
        decode=pool,
        transfer=sim.KVTransfer(bandwidth=50e9, kv_bytes_per_token=131_072),
        load_generator=sim.PoissonLoadGenerator(
            request_rate=16,
            requests=requests,
            prompt_tokens=sim.LogNormal(mean=1155, std=1000),
            output_tokens=sim.LogNormal(mean=211, std=160),
        ),
    )


def ten_thousand(tiny=False):
    """Axes of 10,000 scenarios of it: shares of the workers x rates x bandwidths x seeds; some of them if `tiny`."""
    return {
        "prefill_workers": [1, 2, 3, 4] if not tiny else [1],
        "decode_workers": [1, 2, 3, 4, 6] if not tiny else [2],
        "request_rate": [8, 16, 24, 32, 48] if not tiny else [8],
        "bandwidth": [1e9, 5e9, 11e9, 25e9, 50e9] if not tiny else [1e9, 50e9],
        "seed": range(20 if not tiny else 2),
    }


def conversations(batcher="token budget", **load):
    """Lengths as in conversations, finite KV memory."""
    usual = {
        "request_rate": 8,
        "prompt_tokens": sim.LogNormal(mean=1155, std=1000),
        "output_tokens": sim.LogNormal(mean=211, std=160),
    }
    return sim.Engine(
        max_batch_size=128,
        load_generator=sim.PoissonLoadGenerator(**usual | load),
        batcher=BATCHERS[batcher],
        kv_cache=sim.KVCache(blocks=4000),
        step_time=sim.LinearStepTime(base=6e-3, per_request=6e-5, per_prefill_token=4e-5),
    )


class TokenStep:
    """The cost of a step and of the requests that come and go in it, which are the more the more slots there are."""

    params = [16, 64, 256, 1024]
    param_names = ["slots"]
    timeout = 300

    def setup(self, slots):
        self.engine = poisson(20 if cases.TINY else 2_000, slots)
        self.axes = {"seed": range(2 if cases.TINY else 16), "threads": 1, "progress": False}
        self.steps = int(sim.sweep(self.engine, **self.axes).steps.sum())  # compiles

    def track_step(self, slots):
        repeat = 1 if cases.TINY else 5
        return 1e9 * cases.seconds(lambda: sim.sweep(self.engine, **self.axes), repeat) / self.steps

    track_step.unit = "ns/step"


class Replicas:
    """The cost of an event of a fleet, which should grow no faster than the logarithm of its workers."""

    params = [1, 8, 64, 512]
    param_names = ["workers"]
    timeout = 300

    def setup(self, workers):
        self.cluster = replicas(workers, 20 if cases.TINY else 200 * workers)
        self.axes = {"seed": range(1), "threads": 1, "progress": False}
        self.steps = int(sim.sweep(self.cluster, **self.axes).steps.sum())  # compiles

    def track_step(self, workers):
        repeat = 1 if cases.TINY else 3
        return 1e9 * cases.seconds(lambda: sim.sweep(self.cluster, **self.axes), repeat) / self.steps

    track_step.unit = "ns/step"


class Disaggregated:
    """A sweep of 10,000 disaggregated fleets over shares of workers, loads and bandwidths, two threads."""

    timeout = 600
    number = repeat = 1  # it takes long enough
    warmup_time = 0

    def setup(self):
        self.engine = disaggregated(20 if cases.TINY else 1_000)
        self.axes = {**ten_thousand(cases.TINY), "threads": 2, "progress": False}
        sim.sweep(disaggregated(20), **ten_thousand(True), progress=False)  # compiles

    def time_sweep(self):
        sim.sweep(self.engine, **self.axes)


class Schedulers:
    """A sweep of each scheduler over light, high and too high loads, all metrics on, two threads."""

    params = list(BATCHERS)
    param_names = ["batcher"]
    timeout = 300

    def setup(self, batcher):
        self.engine = conversations(batcher)
        self.axes = {"request_rate": [4, 8, 12], "seed": range(1 if cases.TINY else 4), "threads": 2, "progress": False}
        self.completed = int(sim.sweep(self.engine, SECONDS, **self.axes).completed.sum())  # compiles

    def time_sweep(self, batcher):
        sim.sweep(self.engine, SECONDS, **self.axes)

    def track_completed(self, batcher):
        repeat = 1 if cases.TINY else 5
        return self.completed / cases.seconds(lambda: sim.sweep(self.engine, SECONDS, **self.axes), repeat)

    track_completed.unit = "completed requests/s"


class PrefixCache:
    """Conversations of five turns that find what was said before, in a small and a large memory."""

    params = [1_000, 20_000]
    param_names = ["blocks"]
    timeout = 300

    def setup(self, blocks):
        talk = {
            "request_rate": 0.5,
            "requests": 10 if cases.TINY else 400,
            "prompt_tokens": sim.LogNormal(mean=300, std=300),
            "sessions": sim.Sessions(turns=5, think_time=20),
        }
        cache = sim.KVCache(blocks=blocks, prefix_caching=True)
        self.engine = msgspec.structs.replace(conversations(**talk), kv_cache=cache)
        self.axes = {"seed": range(1 if cases.TINY else 4), "threads": 1, "progress": False}
        sim.sweep(self.engine, **self.axes)  # compiles

    def time_sweep(self, blocks):
        sim.sweep(self.engine, **self.axes)


class TokenRuns:
    """Single runs and their pictures, and what is kept of a sweep."""

    timeout = 300

    def setup(self):
        self.engine = conversations()
        self.axes = {"request_rate": [4, 8, 12], "seed": range(1 if cases.TINY else 4), "progress": False}
        self.run = self.engine.run(SECONDS)
        self.run.plot()._repr_png_()
        self.run.plot(interactive=True)
        sim.sweep(self.engine, 5, **self.axes)  # compiles

    def time_run_and_its_datasets(self):
        run = self.engine.run(SECONDS)
        run.metrics, run.requests, run.steps  # noqa: B018

    def time_picture(self):
        self.run.plot()._repr_png_()

    def time_interactive_picture(self):
        self.run.plot(interactive=True).to_html()

    def time_keep_requests(self):
        sim.sweep(self.engine, SECONDS, keep="requests", **self.axes)

    def time_keep_queue(self):
        sim.sweep(self.engine, SECONDS, keep="queue", **self.axes)

    def time_queue_growth(self):
        sim.queue_growth(self.engine, SECONDS / 5, SECONDS, **self.axes)

    def peakmem_sweep(self):
        sim.sweep(self.engine, SECONDS, seed=range(2 if cases.TINY else 1_000), progress=False)
