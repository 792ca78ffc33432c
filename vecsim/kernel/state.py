"""The kernel's state, structure-of-arrays: what each array holds, its shape and its unit."""

from typing import Any, NamedTuple

from numpy.typing import NDArray

# Kinds of random numbers that a stream is made of
NO_DRAWS, NORMAL_DRAWS, UNIFORM_DRAWS, EXPONENTIAL_DRAWS, GAMMA_DRAWS = range(5)

# What became of a scenario: done, more requests are needed than were drawn, or the user interrupted
DONE, OUT_OF_REQUESTS, INTERRUPTED = range(3)

Array = NDArray[Any]


class Batch(NamedTuple):
    """What a batcher's rule is told at a boundary (counts of requests)."""

    running: int
    prefilling: int
    decoding: int
    free: int
    queued: int


class Scenarios(NamedTuple):
    """One array for each parameter [scenario]."""

    batcher: Array  # place in `vecsim.batching.BATCHERS`
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


class Outcome(NamedTuple):
    """How the step loop of one scenario ended."""

    status: int
    steps: int
    enqueued: int
    started: int
    most_prefilling: int
    max_queue: int
    end_time: float
