"""A literal, slow reading of the tick model's disaggregated engine: workers are objects, each boundary an event."""

import math
from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    number: int
    arrived_at: float
    enqueued_at: float
    length: int
    tokens: int = 0
    prefill_worker: int = -1
    decode_worker: int = -1
    started_at: float = math.nan
    first_token_at: float = math.nan
    decode_started_at: float = math.nan
    completed_at: float = math.nan


@dataclass(eq=False)
class Worker:
    number: int
    step: float  # duration of one with a request
    clock: float = 0.0
    request: Request | None = None
    steps_left: int = 0


@dataclass
class Result:
    requests: list[Request] = field(default_factory=list)
    instants: list[float] = field(default_factory=list)  # of boundaries
    queue_sizes: list[int] = field(default_factory=list)  # after them
    working: list[int] = field(default_factory=list)  # workers with a request
    steps: list[float] = field(default_factory=list)  # begins of steps with a request
    itls: list[tuple[float, float]] = field(default_factory=list)  # (begin, sample)
    end_time: float = 0.0


def simulate(
    *,
    load: str,
    load_value: float,
    prefill_workers: int,
    decode_workers: int,
    prefill_time: float,
    itl: float,
    total_prefill_chunks: int,
    lengths,
    time_limit: float,
    kv_transfer_time: float = 0.0,
    arrivals=None,
) -> Result:
    """Run the rules, one boundary after the other; those of one instant together.

    `load` is "batch", "concurrent", "rate", or "due" (explicit instants in `arrivals`).
    """
    result = Result()
    lengths = iter(lengths)
    prefillers = [Worker(i, max(prefill_time / total_prefill_chunks, 1.0)) for i in range(prefill_workers)]
    decoders = [Worker(i, max(itl, 1.0)) for i in range(decode_workers)]
    prefill_queue: list[Request] = []
    decode_queue: list[Request] = []
    moving: list[Request] = []
    made = present = 0
    while True:
        boundaries = [worker.clock for worker in prefillers + decoders]
        t = min(boundaries + [request.first_token_at + kv_transfer_time for request in moving])
        if t >= time_limit:
            break
        prefill_here = [worker for worker in prefillers if worker.clock == t]
        decode_here = [worker for worker in decoders if worker.clock == t]

        prefilled = []
        for worker in prefill_here + decode_here:
            request = worker.request
            if request is None:
                continue
            worker.steps_left -= 1
            if worker in decode_here:
                request.tokens += 1
            elif worker.steps_left == 0:
                request.first_token_at, request.tokens = t, 1
                prefilled.append(request)
            if worker.steps_left == 0:
                worker.request = None
            if request.tokens == request.length:
                request.completed_at = t
                present -= 1
        prefilled.sort(key=lambda request: request.number)
        moving += [request for request in prefilled if request.length > 1]
        while moving and moving[0].first_token_at + kv_transfer_time <= t:
            decode_queue.append(moving.pop(0))

        due: list[float] = []
        if prefill_here:
            if load == "batch":
                due = [0.0] * int(load_value) if t == 0 else []
            elif load == "concurrent":
                due = [t] * (int(load_value) - present)
            elif load == "rate":
                while t // (1 / load_value) >= made + len(due) + 1:
                    due.append((made + len(due) + 1) * (1 / load_value))
            else:
                while made + len(due) < len(arrivals) and arrivals[made + len(due)] <= t:
                    due.append(arrivals[made + len(due)])
        for arrived_at in due:
            request = Request(made, arrived_at, t, next(lengths))
            prefill_queue.append(request)
            result.requests.append(request)
            made += 1
            present += 1

        for worker in prefill_here:
            if worker.request is None and prefill_queue:
                worker.request = request = prefill_queue.pop(0)
                request.prefill_worker, request.started_at = worker.number, t
                worker.steps_left = total_prefill_chunks
        for worker in decode_here:
            if worker.request is None and decode_queue:
                worker.request = request = decode_queue.pop(0)
                request.decode_worker, request.decode_started_at = worker.number, t
                worker.steps_left = request.length - 1

        for worker in prefill_here + decode_here:
            if worker.request is None:
                worker.clock += 1.0
                continue
            result.steps.append(t)
            if worker.request.tokens > 1:
                result.itls.append((t, worker.step))
            worker.clock += worker.step
        result.instants.append(t)
        result.queue_sizes.append(len(prefill_queue) + len(decode_queue))
        result.working.append(sum(worker.request is not None for worker in prefillers + decoders))
    result.end_time = max(worker.clock for worker in prefillers + decoders)
    return result


def metrics(result: Result, workers: int, warmup: float, quantiles) -> dict:
    """Every output variable, from its definition, with NumPy over lists."""
    import numpy as np

    measured = [r for r in result.requests if r.arrived_at >= warmup]
    started = [r for r in measured if not math.isnan(r.started_at)]
    with_token = [r for r in measured if not math.isnan(r.first_token_at)]
    completed = [r for r in measured if not math.isnan(r.completed_at)]
    samples = {
        "e2e": [r.completed_at - r.enqueued_at for r in completed],
        "ttft": [r.first_token_at - r.enqueued_at for r in with_token],
        "tpot": [(r.completed_at - r.first_token_at) / (r.length - 1) for r in completed if r.length > 1],
        "queue_time": [r.started_at - r.enqueued_at for r in started],
        "itl": [duration for t, duration in result.itls if t >= warmup],
    }
    out = {}
    for name, values in samples.items():
        if values:
            out[name] = [np.mean(values), *np.quantile(values, quantiles), max(values)]
        else:
            out[name] = [math.nan] * (len(quantiles) + 2)
    span = result.end_time - warmup
    edges = np.array([*result.instants, result.end_time])
    lasts = np.diff(np.maximum(edges, warmup))
    out |= {
        "arrived": len(measured),
        "started": len(started),
        "first_tokens": len(with_token),
        "completed": len(completed),
        "itl_samples": len(samples["itl"]),
        "request_throughput": 1000 * len(completed) / span,
        "token_throughput": 1000 * sum(r.tokens for r in started) / span,
        "final_queue": result.queue_sizes[-1],
        "mean_queue": np.dot(lasts, result.queue_sizes) / span,
        "max_queue": max((size for size, last in zip(result.queue_sizes, lasts, strict=True) if last > 0), default=0),
        "utilization": np.dot(lasts, result.working) / (workers * span),
        "end_time": result.end_time,
        "steps": sum(t >= warmup for t in result.steps),
    }
    return out
