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

SECONDS = "s"

TOKEN_VARIABLES = (
    Variable("e2e", "end-to-end latency", SECONDS, "completion - arrived_at, of completed requests", over_stat=True),
    Variable(
        "ttft",
        "time to first token",
        SECONDS,
        "first token - arrived_at, of requests with a first token",
        over_stat=True,
    ),
    Variable(
        "tpot",
        "time per output token",
        SECONDS,
        "(last token - first token) / (output tokens - 1), of completed requests with more than one token",
        over_stat=True,
    ),
    Variable(
        "queue_time",
        "time in queue",
        SECONDS,
        "started_at - arrived_at, of started requests",
        over_stat=True,
    ),
    Variable(
        "itl",
        "inter-token latency",
        SECONDS,
        "time between two tokens of a request; quantiles to 0.2 %, mean and max exact",
        over_stat=True,
    ),
    Variable("arrived", "requests arrived", "requests", "requests that entered the queue or were refused", whole=True),
    Variable("started", "requests started", "requests", "requests that left the queue for a slot", whole=True),
    Variable("first_tokens", "requests with a first token", "requests", "samples of ttft", whole=True),
    Variable("completed", "requests completed", "requests", "samples of e2e", whole=True),
    Variable("dropped", "requests refused", "requests", "requests that could never be served", whole=True),
    Variable("preemptions", "preemptions", "preemptions", "times that a request lost its blocks", whole=True),
    Variable("itl_samples", "samples of inter-token latency", "samples", "samples of itl", whole=True),
    Variable("request_throughput", "request throughput", "requests/s", "completed requests over the run time"),
    Variable(
        "token_throughput",
        "token throughput",
        "tokens/s",
        "output tokens of completed requests, and those so far of running ones, over the run time",
    ),
    Variable("goodput", "goodput", "requests/s", "completed requests that kept to all their limits, over the run time"),
    Variable(
        "slo_attainment",
        "SLO attainment",
        "1",
        "requests that kept to all their limits, of those that were completed, refused or failed",
    ),
    Variable("final_queue", "final queue size", "requests", "queue size at the end", whole=True),
    Variable(
        "mean_queue",
        "mean queue size",
        "requests",
        "time-weighted mean of the requests that wait, from when they can be queued",
    ),
    Variable("max_queue", "maximal queue size", "requests", "largest queue size during a step", whole=True),
    Variable("utilization", "slot utilization", "1", "time-weighted mean of running requests / slots"),
    Variable("kv_use", "KV memory in use", "1", "time-weighted mean of held blocks / blocks; NaN if memory is endless"),
    Variable("kv_peak", "peak of KV memory in use", "1", "most blocks held in a step / blocks"),
    Variable(
        "prefix_hit_rate",
        "prefix hit rate",
        "1",
        "prompt tokens found in the cache when a request was first admitted, of all prompt tokens",
    ),
    Variable("batch_size", "batch size", "requests", "mean over steps of the requests scheduled"),
    Variable("step_tokens", "tokens per step", "tokens", "mean over steps of the tokens computed"),
    Variable("end_time", "end time", SECONDS, "when the run ended"),
    Variable("steps", "engine steps", "steps", "steps measured", whole=True),
)

CLASS_VARIABLES = (
    Variable("class_goodput", "goodput by class", "requests/s", "goodput of each class"),
    Variable(
        "class_slo_attainment",
        "SLO attainment by class",
        "1",
        "of the completed, refused and failed requests of each class",
    ),
    Variable("class_completed", "requests completed by class", "requests", "of each class", whole=True),
)

# Of fleets that keep prefill apart, in the order of `vecsim.kernel.parts`
APART_VARIABLES = (
    Variable(
        "remote_share", "share prefilled remotely", "1", "requests prefilled elsewhere, of those with a first token"
    ),
    Variable(
        "transfer_time",
        "transfer time",
        SECONDS,
        "mean time from the begin of a transfer until its end is noticed, of requests with a first token",
    ),
    Variable(
        "ttft_parts",
        "parts of the time to first token",
        SECONDS,
        "mean of each part over the requests with a first token; together they are the mean ttft",
    ),
)

# Of fleets whose workers come and go, in the order of `vecsim.kernel.life`
CHANGING_VARIABLES = (
    Variable("failed", "requests failed", "requests", "that lost their worker, or found none", whole=True),
    Variable("migrations", "migrations", "migrations", "of requests whose worker crashed to another one", whole=True),
    Variable("retries", "retries", "retries", "of requests that could not be sent to their worker", whole=True),
    Variable("crashes", "crashes", "crashes", "of workers that were ready or draining", whole=True),
    Variable("scale_ups", "workers added", "workers", "by the planner", whole=True),
    Variable("scale_downs", "workers removed", "workers", "by the planner", whole=True),
    Variable("gpu_hours", "GPU-hours", "GPU-hours", "of workers that start, are ready or drain"),
    Variable("gpu_seconds_per_request", "GPU-seconds per request", "GPU-seconds", "for each completed request"),
    Variable(
        "attained_per_gpu_hour", "requests within the SLO per GPU-hour", "requests/GPU-hour", "goodput for what it cost"
    ),
)

# Of clusters whose router goes by what workers have cached, in the order of `vecsim.kernel.routing`
VIEW_VARIABLES = (
    Variable(
        "expected_hit_rate",
        "expected hit rate",
        "1",
        "prompt tokens that the router counted on as cached, of all prompt tokens of requests that started and never "
        "migrated",
    ),
    Variable(
        "missed_hit_rate",
        "missed hit rate",
        "1",
        "prompt tokens that the router counted on and that were not found when the request was first admitted, of the "
        "same prompt tokens",
    ),
    Variable(
        "view_age",
        "age of the router's view",
        SECONDS,
        "mean over requests, when they were last routed, of the time since the first step began whose changes to the "
        "worker's cache the router did not know; 0 where it knew all",
    ),
)

# Of fleets whose workers have tiers below their caches, in the order of `vecsim.kernel.tiers`
TIER_VARIABLES = (
    Variable(
        "host_hit_rate",
        "host hit rate",
        "1",
        "prompt tokens brought up from host memory, of all prompt tokens; `prefix_hit_rate` counts all tiers",
    ),
    Variable("disk_hit_rate", "disk hit rate", "1", "prompt tokens brought up from disk, of all prompt tokens"),
    Variable(
        "onboarding_time",
        "time to bring blocks up",
        SECONDS,
        "mean time that the blocks of a request took to come from lower tiers, of requests that had such",
    ),
)

VIEW_REQUEST_VARIABLES = (
    Variable(
        "expected_hit_tokens",
        "expected cached tokens",
        "tokens",
        "that the router counted on at its worker",
        whole=True,
    ),
    Variable(
        "view_age", "age of the router's view", SECONDS, "how long the router had not known of its worker's cache"
    ),
)

# Parts of the time to first token, in the order in which they pass
PARTS = (
    "before routing",
    "wait for decode blocks",
    "wait for prefill",
    "prefill",
    "wait for decode blocks after prefill",
    "transfer",
    "wait for decode",
    "first decode step",
    "until seen",
)

TOKEN_REQUEST_VARIABLES = (
    Variable("arrived_at", "arrival", SECONDS, "when the request came"),
    Variable("started_at", "start", SECONDS, "begin of the first step that computed some of it"),
    Variable("first_token_at", "first token", SECONDS, "when the first token was seen"),
    Variable("completed_at", "completion", SECONDS, "when the completion was seen"),
    Variable("prompt_tokens", "prompt length", "tokens", "what was asked", whole=True),
    Variable("output_tokens", "output length", "tokens", "drawn or recorded length", whole=True),
    Variable(
        "hit_tokens", "cached prompt tokens", "tokens", "found in the prefix cache when first admitted", whole=True
    ),
    Variable("preempted", "preemptions", "preemptions", "times that it lost its blocks", whole=True),
    Variable("refused", "refused", "1", "1 if it could never be served", whole=True),
    Variable("class_number", "class", "1", "place in the load's classes", whole=True),
)

TOKEN_STEP_VARIABLES = (
    Variable("time", "begin of step", SECONDS, "when the step begins"),
    Variable("duration", "duration", SECONDS, "how long the step takes"),
    Variable("queue_size", "queue size", "requests", "requests queued during the step", whole=True),
    Variable("prefilling", "prefilling requests", "requests", "requests that compute prompt tokens", whole=True),
    Variable("prefill_tokens", "prefill tokens", "tokens", "prompt tokens computed in the step", whole=True),
    Variable("decoding", "decoding requests", "requests", "requests that compute an output token", whole=True),
    Variable("kv_blocks", "KV blocks in use", "blocks", "blocks held during the step", whole=True),
    Variable("running", "running requests", "requests", "requests in slots", whole=True),
)


FLEET_STEP_VARIABLES = (Variable("worker", "worker", "", "number of the worker that makes the step", whole=True),)


DISTRIBUTIONS = tuple(variable for variable in TICK_VARIABLES if variable.over_stat)
SCALARS = tuple(variable for variable in TICK_VARIABLES if not variable.over_stat)


def metric_variables(token: bool) -> tuple[Variable, ...]:
    """The output variables of a clock, in the order of the kernel's rows."""
    return TOKEN_VARIABLES if token else TICK_VARIABLES


def output_names(token: bool) -> list[str]:
    """The names of all output variables of a clock, those of some engines alone among them."""
    some = (CLASS_VARIABLES, APART_VARIABLES, CHANGING_VARIABLES, TIER_VARIABLES) if token else ()
    return [variable.name for variables in (metric_variables(token), *some) for variable in variables]


def row_width(
    token: bool,
    quantiles: int,
    classes: int = 0,
    apart: bool = False,
    changing: bool = False,
    tiered: bool = False,
    viewing: bool = False,
) -> int:
    """Numbers in a row of metrics.

    Whether prefill is kept apart, workers come and go, caches have tiers, and routers go by what is cached.
    """
    variables = metric_variables(token)
    stats = sum(variable.over_stat for variable in variables)
    more = len(APART_VARIABLES) - 1 + len(PARTS) if apart else 0
    more += len(CHANGING_VARIABLES) if changing else 0
    more += len(TIER_VARIABLES) if tiered else 0
    more += len(VIEW_VARIABLES) if viewing else 0
    return stats * (quantiles + 2) + len(variables) - stats + len(CLASS_VARIABLES) * classes + more


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


# Of a disaggregated engine of the tick model, beside the others
APART_REQUEST_VARIABLES = (
    Variable("decode_started_at", "begin of decode", "ticks", "boundary at which a decode worker took the request"),
    Variable("decode_worker", "decode worker", "", "number of the worker that decodes it; -1 if none did", whole=True),
)

APART_STEP_VARIABLES = (
    Variable(
        "decode_queue_size",
        "decode queue size",
        "requests",
        "those of the queue that wait for a decode worker",
        whole=True,
    ),
)

FLEET_REQUEST_VARIABLES = (
    Variable("worker", "worker", "", "number of the worker that the request was sent to; -1: none", whole=True),
)
