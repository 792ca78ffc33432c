"""A literal, slow reading of the tick model's rules: an object a request, each touched at every step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Request:
    arrived_at: float
    enqueued_at: float
    length: int
    chunks_left: int
    tokens: int = 0
    slot: int = -1
    started_at: float = math.nan
    first_token_at: float = math.nan
    completed_at: float = math.nan


@dataclass
class Result:
    requests: list[Request] = field(default_factory=list)
    boundaries: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    queue_sizes: list[int] = field(default_factory=list)
    prefilling: list[int] = field(default_factory=list)
    decoding: list[int] = field(default_factory=list)
    itls: list[tuple[float, float]] = field(default_factory=list)  # (boundary, sample)
    end_time: float = 0.0


def simulate(
    *,
    batcher: str | Callable[[Any], int],
    load: str,
    load_value: float,
    max_batch_size: int,
    prefill_time: float,
    itl: float,
    total_prefill_chunks: int,
    lengths,
    time_limit: float,
    arrivals=None,
    parameter: float = 0.0,
) -> Result:
    """Run the rules of the tick model.

    `batcher` is a built-in one's name, or a rule of a user's own in plain Python. `lengths` is an iterator of output
    lengths, in queue order. `load` is "batch", "concurrent", "rate", or "due" (explicit instants in `arrivals`).
    """
    result = Result()
    slots: list[Request | None] = [None] * max_batch_size
    queue: list[Request] = []
    lengths = iter(lengths)
    t = 0.0
    made = 0
    step_ran = False
    while t < time_limit:
        batch = [request for request in slots if request is not None]
        if step_ran:
            for request in batch:
                if request.chunks_left > 0:
                    request.chunks_left -= 1
                    if request.chunks_left == 0:
                        request.tokens = 1
                        request.first_token_at = t
                else:
                    request.tokens += 1
                if request.tokens == request.length:
                    request.completed_at = t
                    slots[request.slot] = None

        due: list[float] = []
        if load == "batch":
            due = [0.0] * int(load_value) if t == 0 else []
        elif load == "concurrent":
            running = sum(request is not None for request in slots)
            due = [t] * max(0, int(load_value) - running - len(queue))
        elif load == "rate":
            while t // (1 / load_value) >= made + len(due) + 1:
                due.append((made + len(due) + 1) * (1 / load_value))
        else:
            while made + len(due) < len(arrivals) and arrivals[made + len(due)] <= t:
                due.append(arrivals[made + len(due)])
        for arrived_at in due:
            request = Request(arrived_at, t, next(lengths), total_prefill_chunks)
            queue.append(request)
            result.requests.append(request)
        made += len(due)

        most = max_batch_size
        if callable(batcher) and queue:
            prefilling = sum(request is not None and request.chunks_left > 0 for request in slots)
            running = sum(request is not None for request in slots)
            batch = SimpleNamespace(
                running=running,
                prefilling=prefilling,
                decoding=running - prefilling,
                free=max_batch_size - running,
                queued=len(queue),
                time=t,
                waited=t - queue[0].enqueued_at,
                prefill_time=prefill_time,
                itl=itl,
                total_prefill_chunks=total_prefill_chunks,
                parameter=parameter,
            )
            most = int(batcher(batch))
        for place in range(max_batch_size):
            if slots[place] is not None or not queue or most == 0:
                continue
            most -= 1
            others = [request for request in slots if request is not None]
            if batcher == "static" and any(request.started_at != t for request in others):
                break
            if batcher == "one_prefill" and any(request.chunks_left > 0 for request in others):
                break
            request = queue.pop(0)
            request.slot, request.started_at = place, t
            slots[place] = request

        batch = [request for request in slots if request is not None]
        prefilling = [request for request in batch if request.chunks_left > 0]
        decoding = [request for request in batch if request.chunks_left == 0]
        prefill = 0.0
        for _ in prefilling:
            prefill += prefill_time / total_prefill_chunks
        duration = max(prefill, itl if decoding else 0.0, 1.0)
        result.boundaries.append(t)
        result.durations.append(duration)
        result.queue_sizes.append(len(queue))
        result.prefilling.append(len(prefilling))
        result.decoding.append(len(decoding))
        result.itls += [(t, duration) for request in decoding if request.tokens > 1]
        t += duration
        step_ran = True
    result.end_time = t
    return result


def metrics(result: Result, max_batch_size: int, warmup: float, quantiles) -> dict:
    """Every output variable, from its definition, with NumPy over lists."""
    import numpy as np

    last = result.boundaries[-1]
    measured = [r for r in result.requests if r.arrived_at >= warmup]
    steps = [i for i, t in enumerate(result.boundaries) if t >= warmup]
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
    running = [result.prefilling[i] + result.decoding[i] for i in steps]
    busy = sum(n * result.durations[i] for n, i in zip(running, steps, strict=True))
    slot_time = max_batch_size * sum(result.durations[i] for i in steps)
    queues = [result.queue_sizes[i] for i in steps]
    out |= {
        "arrived": len(measured),
        "started": len(started),
        "first_tokens": len(with_token),
        "completed": len(completed),
        "itl_samples": len(samples["itl"]),
        "request_throughput": 1000 * len(completed) / span,
        "token_throughput": 1000 * sum(r.tokens for r in started) / span,
        "final_queue": result.queue_sizes[-1],
        "mean_queue": np.mean(queues) if queues else math.nan,
        "max_queue": max(queues, default=0),
        "utilization": busy / slot_time if slot_time else math.nan,
        "end_time": result.end_time,
        "steps": len(steps),
    }
    assert last < result.end_time
    return out
