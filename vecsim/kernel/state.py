"""The kernel's state, structure-of-arrays: what each array holds, its shape and its unit."""

from typing import Any, NamedTuple

from numpy.typing import NDArray

# Kinds of random numbers that a stream is made of
NO_DRAWS, NORMAL_DRAWS, UNIFORM_DRAWS, EXPONENTIAL_DRAWS, GAMMA_DRAWS = range(5)

# What became of a scenario: done, more requests are needed than were drawn, the user interrupted, or the batcher's
# rule returned what can't be
DONE, OUT_OF_REQUESTS, INTERRUPTED, REFUSED = range(4)

Array = NDArray[Any]


class Batch(NamedTuple):
    """What a batcher's rule is told at a boundary."""

    running: int  # requests in slots: prefilling + decoding
    prefilling: int  # requests in prefill
    decoding: int  # requests past their first token
    free: int  # slots
    queued: int  # requests in the queue
    time: float  # ticks since the run began
    waited: float  # ticks that the head of the queue has waited; 0 if the queue is empty
    prefill_time: float  # ticks that the prefill of one prompt takes
    itl: float  # ticks that the decode of one token takes
    total_prefill_chunks: int  # steps over which a prefill is spread
    parameter: float  # the batcher's own number


class Scenarios(NamedTuple):
    """One array for each parameter [scenario]."""

    batcher: Array  # place in `vecsim.batching.BATCHERS`; past their end in the table's own rules
    parameter: Array  # the batcher's own number
    max_batch_size: Array
    prefill_time: Array  # ticks
    itl: Array  # ticks
    total_prefill_chunks: Array
    arrivals: Array  # code of `vecsim.load.arrival_time`, or CLOSED
    request_rate: Array  # requests per tick; 1 where it has no meaning
    requests: Array  # of a batch, or to keep in a closed loop
    arrival_stream: Array  # row in the arrival `Streams`; an empty one where arrivals aren't random
    length_stream: Array  # row in the length `Streams`


class LengthParameters(NamedTuple):
    """What each length stream is drawn from [stream]."""

    code: Array  # of `vecsim.lengths.output_tokens`
    a: Array
    b: Array
    table_start: Array  # first place in the flat table of empirical values
    table_size: Array
    draws: Array  # kind of random numbers
    seed: Array
    offset: Array  # draws that are passed over


class ArrivalParameters(NamedTuple):
    """What each arrival stream is drawn from [stream]."""

    shape: Array  # of the gaps' gamma distribution
    draws: Array
    seed: Array


class Streams(NamedTuple):
    """Random numbers of several seeds in one flat array."""

    start: Array  # [stream] first place in `values`
    size: Array  # [stream]
    longest: Array  # [stream] the largest value (lengths)
    values: Array  # [place] lengths [tokens], or instants of a renewal process of rate 1


class Requests(NamedTuple):
    """Requests of one scenario, in the order of the queue [request]."""

    arrived_at: Array  # ticks; infinite after the last
    output_tokens: Array
    enqueued_step: Array  # the boundary that noticed the arrival
    started_step: Array  # the boundary that admitted it


class Scratch(NamedTuple):
    """What one thread works in; sized for the largest scenario that it meets."""

    arrived_at: Array  # [request + 1]
    enqueued_step: Array  # [request]
    started_step: Array  # [request]
    time: Array  # [step + 1] the instant of each boundary
    calendar: Array  # [ring]
    prefill_sum: Array  # [slot + 1] summed time of n prefill chunks
    itl_samples: Array  # [slot + 1] ITL samples taken in steps with n prefills
    values: Array  # [latency, request]
    kept: Array  # [request + 1] those of one latency that quantiles are selected among
    bins: Array  # [request] the bin of each latency
    bin_counts: Array  # [bin]
    bin_places: Array  # [bin]


class Record(NamedTuple):
    """Per-request results that are kept [scenario, request]; NaN (or -1) where it never happened."""

    arrived_at: Array
    enqueued_at: Array
    started_at: Array
    first_token_at: Array
    completed_at: Array
    output_tokens: Array
    slot: Array


class Job(NamedTuple):
    """What a block of scenarios is run with, and where the results go."""

    scenarios: Scenarios
    arrivals: Streams
    lengths: Streams
    time_limit: float
    warmup: float
    quantiles: Array
    scratch: Scratch
    metrics: Array  # [scenario, metric] in the order of `vecsim.variables.TICK_VARIABLES`
    enqueued: Array  # [scenario] requests that entered the queue
    status: Array  # [scenario] `DONE`, or why there is no result
    stop: Array  # [1] set by another thread to end early


class Outcome(NamedTuple):
    """How the step loop of one scenario ended."""

    status: int
    steps: int
    enqueued: int
    started: int
    running: int
    admitted: int  # what the batcher's rule returned last
    most_prefilling: int
    max_queue: int
    end_time: float
