"""A literal, slow reading of the tick model's cluster: an object for each worker, one boundary after the other."""

import math
from dataclasses import dataclass, field

import vecsim as sim

MASK = 2**64 - 1


@dataclass(eq=False)
class Request:
    number: int
    arrived_at: float
    length: int
    worker: int
    chunks_left: int
    tokens: int = 0
    enqueued_at: float = math.nan
    started_at: float = math.nan
    first_token_at: float = math.nan
    completed_at: float = math.nan


@dataclass(eq=False)
class Worker:
    number: int
    slots: int
    batcher: sim.IFBatcher | sim.StaticBatcher | sim.IFBatcherWithOnePrefillOnly | sim.CustomBatcher
    clock: float = 0.0
    sent: list[Request] = field(default_factory=list)  # not noticed yet
    queue: list[Request] = field(default_factory=list)
    batch: list[Request] = field(default_factory=list)
    boundaries: list[float] = field(default_factory=list)
    queues: list[int] = field(default_factory=list)  # after each
    running: list[int] = field(default_factory=list)
    itls: list[tuple[float, float]] = field(default_factory=list)  # (begin, sample)

    @property
    def outstanding(self) -> int:
        return len(self.sent) + len(self.queue) + len(self.batch)


def scrambled(seed: int, number: int) -> int:
    z = (seed * 0xD1342543DE82EF95 + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


class Router:
    def __init__(self, router, workers: list[Worker], seed: int) -> None:
        self.router, self.workers, self.seed, self.turn = router, workers, seed, 0

    def choose(self, request: int, now: float) -> Worker:
        n = len(self.workers)
        match self.router:
            case sim.RoundRobinRouter():
                self.turn += 1
                return self.workers[(self.turn - 1) % n]
            case sim.LeastOutstandingRouter():
                return min(self.workers, key=lambda worker: worker.outstanding)
            case sim.RandomRouter():
                return self.workers[scrambled(self.seed, 4 * request) % n]
            case sim.PowerOfTwoRouter():
                one = scrambled(self.seed, 4 * request) % n
                others = [worker for worker in self.workers if worker.number != one]
                if not others:
                    return self.workers[0]
                other = others[scrambled(self.seed, 4 * request + 1) % (n - 1)]
                return self.workers[one] if self.workers[one].outstanding <= other.outstanding else other
            case sim.CustomRouter():  # `policies.least_waiting`
                if int(now) % 2:
                    return self.workers[request % n]
                return min(self.workers, key=lambda worker: (len(worker.sent) + len(worker.queue), -len(worker.batch)))
        raise AssertionError(self.router)


def admitted(worker: Worker, t: float, prefill_time: float, itl: float, chunks: int) -> int:
    running, queued = len(worker.batch), len(worker.queue)
    prefilling = sum(request.tokens == 0 for request in worker.batch)
    free = worker.slots - running
    match worker.batcher:
        case sim.StaticBatcher():
            return 0 if running else min(free, queued)
        case sim.IFBatcher():
            return min(free, queued)
        case sim.IFBatcherWithOnePrefillOnly():
            return min(free, queued, 1) if prefilling == 0 else 0
        case sim.CustomBatcher(parameter=parameter):  # `policies.every_field`
            if not queued or not free:
                return 0
            late = t - worker.queue[0].enqueued_at > parameter * chunks
            short = prefill_time * prefilling <= itl * (running - prefilling + 1)
            if late or (short and int(t) % 3 == 1):
                return min(free, queued)
            return 1 if running < queued else 0
    raise AssertionError(worker.batcher)


@dataclass
class Result:
    requests: list[Request]
    workers: list[Worker]


def simulate(
    *, pools, router, seed: int, prefill_time: float, itl: float, chunks: int, lengths, time_limit: float,
    arrivals=None, target: int = 0,
) -> Result:  # fmt: skip
    """Run the rules; `arrivals` are the due times of an open load, `target` is that of a closed loop."""
    workers: list[Worker] = []
    for pool in pools:
        for _ in range(pool.workers):
            workers.append(Worker(len(workers), pool.max_batch_size, pool.batcher))
    routing = Router(router, workers, seed)
    requests: list[Request] = []

    def arrive(now: float) -> None:
        number = len(requests)
        worker = routing.choose(number, now)
        request = Request(number, now, lengths[number], worker.number, chunks)
        requests.append(request)
        worker.sent.append(request)

    def boundary(worker: Worker) -> None:
        t = worker.clock
        for request in list(worker.batch):
            if request.tokens == 0:
                request.chunks_left -= 1
                if request.chunks_left == 0:
                    request.tokens = 1
                    request.first_token_at = t
            else:
                request.tokens += 1
            if request.tokens == request.length:
                request.completed_at = t
                worker.batch.remove(request)
        if target:
            while sum(other.outstanding for other in workers) < target:
                arrive(t)
        while worker.sent and worker.sent[0].arrived_at <= t:
            request = worker.sent.pop(0)
            request.enqueued_at = t
            worker.queue.append(request)
        old = [request for request in worker.batch if request.tokens > 0]
        for _ in range(admitted(worker, t, prefill_time, itl, chunks)):
            request = worker.queue.pop(0)
            request.started_at = t
            worker.batch.append(request)
        spent = 0.0
        for request in worker.batch:
            if request.tokens == 0:
                spent += prefill_time / chunks
        step = max(spent, itl if old else 0.0, 1.0)
        # Who got the first token at this boundary had none when the step before began; its next one is no sample.
        worker.itls += [(t, step) for request in old if request.first_token_at < t]
        worker.boundaries.append(t)
        worker.queues.append(len(worker.queue))
        worker.running.append(len(worker.batch))
        worker.clock = t + step

    due = list(arrivals or ())
    while True:
        worker = min(workers, key=lambda worker: (worker.clock, worker.number))
        if due and due[0] <= worker.clock and due[0] < time_limit:
            arrive(due.pop(0))
        elif worker.clock < time_limit:
            boundary(worker)
        else:
            return Result(requests, workers)


def metrics(result: Result, warmup: float, quantiles) -> dict:
    """Every output variable, from its definition, with NumPy over lists."""
    import numpy as np

    noticed = [r for r in result.requests if r.arrived_at >= warmup and not math.isnan(r.enqueued_at)]
    started = [r for r in noticed if not math.isnan(r.started_at)]
    with_token = [r for r in noticed if not math.isnan(r.first_token_at)]
    completed = [r for r in noticed if not math.isnan(r.completed_at)]
    samples = {
        "e2e": [r.completed_at - r.enqueued_at for r in completed],
        "ttft": [r.first_token_at - r.enqueued_at for r in with_token],
        "tpot": [(r.completed_at - r.first_token_at) / (r.length - 1) for r in completed if r.length > 1],
        "queue_time": [r.started_at - r.enqueued_at for r in started],
        "itl": [step for worker in result.workers for t, step in worker.itls if t >= warmup],
    }
    out: dict = {}
    for name, values in samples.items():
        if values:
            out[name] = [np.mean(values), *np.quantile(values, quantiles), max(values)]
        else:
            out[name] = [math.nan] * (len(quantiles) + 2)
    end_time = max(worker.clock for worker in result.workers)
    busy = slot_time = 0.0
    steps, queues, largest = 0, [], [0]
    for worker in result.workers:
        durations = np.diff([*worker.boundaries, worker.clock])
        measured = [i for i, t in enumerate(worker.boundaries) if t >= warmup]
        busy += sum(worker.running[i] * durations[i] for i in measured)
        slot_time += worker.slots * sum(durations[i] for i in measured)
        steps += len(measured)
        if measured:
            queues.append(np.mean([worker.queues[i] for i in measured]))
            largest.append(max(worker.queues[i] for i in measured))
    span = end_time - warmup
    return out | {
        "arrived": len(noticed),
        "started": len(started),
        "first_tokens": len(with_token),
        "completed": len(completed),
        "itl_samples": len(samples["itl"]),
        "request_throughput": 1000 * len(completed) / span,
        "token_throughput": 1000 * sum(r.tokens for r in started) / span,
        "final_queue": sum(len(worker.queue) for worker in result.workers),
        "mean_queue": sum(queues) if queues else math.nan,
        "max_queue": max(largest),
        "utilization": busy / slot_time if slot_time else math.nan,
        "end_time": end_time,
        "steps": steps,
    }
