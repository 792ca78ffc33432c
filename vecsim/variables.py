"""The output variables: name, dims, units, meaning. The kernel's row of results follows this table."""

from typing import NamedTuple


class Variable(NamedTuple):
    """An output variable of a run or a sweep; `over_stat` ones have a `stat` dimension."""

    name: str
    long_name: str
    units: str
    doc: str
    over_stat: bool = False
    whole: bool = False


TICK_VARIABLES = (
    Variable(
        "e2e",
        "end-to-end latency",
        "ticks",
        "completion - enqueued_at, of completed requests",
        over_stat=True,
    ),
    Variable(
        "ttft",
        "time to first token",
        "ticks",
        "first token - enqueued_at, of requests with a first token",
        over_stat=True,
    ),
    Variable(
        "tpot",
        "time per output token",
        "ticks",
        "(e2e - ttft) / (output tokens - 1), of completed requests with more than one token",
        over_stat=True,
    ),
    Variable(
        "queue_time",
        "time in queue",
        "ticks",
        "started_at - enqueued_at, of started requests",
        over_stat=True,
    ),
    Variable(
        "itl",
        "inter-token latency",
        "ticks",
        "duration of a step, once for each request that has more than one token when it begins",
        over_stat=True,
    ),
    Variable("arrived", "requests arrived", "requests", "requests that entered the queue", whole=True),
    Variable(
        "started",
        "requests started",
        "requests",
        "requests that left the queue for a slot",
        whole=True,
    ),
    Variable("first_tokens", "requests with a first token", "requests", "samples of ttft", whole=True),
    Variable("completed", "requests completed", "requests", "samples of e2e", whole=True),
    Variable("itl_samples", "samples of inter-token latency", "samples", "samples of itl", whole=True),
    Variable(
        "request_throughput",
        "request throughput",
        "requests per 1000 ticks",
        "completed requests over the run time",
    ),
    Variable(
        "token_throughput",
        "token throughput",
        "tokens per 1000 ticks",
        "tokens of completed requests, and those so far of requests in the batch, over the run time",
    ),
    Variable("final_queue", "final queue size", "requests", "queue size at the last boundary", whole=True),
    Variable("mean_queue", "mean queue size", "requests", "mean over boundaries of the queue size"),
    Variable(
        "max_queue",
        "maximal queue size",
        "requests",
        "largest queue size at a boundary",
        whole=True,
    ),
    Variable("utilization", "slot utilization", "1", "time-weighted mean of running requests / slots"),
    Variable("end_time", "end time", "ticks", "first boundary at or after the time limit"),
    Variable("steps", "engine steps", "steps", "boundaries measured", whole=True),
)

DISTRIBUTIONS = tuple(variable for variable in TICK_VARIABLES if variable.over_stat)
SCALARS = tuple(variable for variable in TICK_VARIABLES if not variable.over_stat)

REQUEST_VARIABLES = (
    Variable("arrived_at", "arrival", "ticks", "when the request was due"),
    Variable("enqueued_at", "entry into the queue", "ticks", "boundary that noticed the arrival"),
    Variable("started_at", "start", "ticks", "boundary that admitted the request"),
    Variable("first_token_at", "first token", "ticks", "end of the last prefill step"),
    Variable("completed_at", "completion", "ticks", "end of the last decode step"),
    Variable("output_tokens", "output length", "tokens", "drawn length", whole=True),
    Variable("slot", "slot", "1", "place in the batch; -1 if the request never started", whole=True),
)

STEP_VARIABLES = (
    Variable("time", "begin of step", "ticks", "boundary at which the step begins"),
    Variable("duration", "duration", "ticks", "how long the step takes"),
    Variable("queue_size", "queue size", "requests", "requests queued during the step", whole=True),
    Variable(
        "prefilling",
        "prefilling requests",
        "requests",
        "requests of the batch in prefill",
        whole=True,
    ),
    Variable("decoding", "decoding requests", "requests", "requests of the batch in decode", whole=True),
)

DEFAULT_QUANTILES = (0.5, 0.9, 0.95, 0.99)


def stat_labels(quantiles: tuple[float, ...]) -> list[str]:
    """Labels along `stat`: mean, then p50, p99.9, ..., then max."""
    return ["mean", *(f"p{100 * q:.10g}" for q in quantiles), "max"]
