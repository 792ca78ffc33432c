"""The kernel's state, structure-of-arrays: what each array holds, its shape and its unit."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Kinds of random numbers that a stream is made of
NO_DRAWS, NORMAL_DRAWS, UNIFORM_DRAWS, EXPONENTIAL_DRAWS, GAMMA_DRAWS, RECORDED = range(6)

# What became of a scenario: done, more requests are needed than were drawn, the user interrupted, the batcher's rule
# returned what can't be, there are more steps than room for their record, or a step's duration can't be. A worker of a
# fleet may have nothing to do, or nothing but decodes.
DONE, OUT_OF_REQUESTS, INTERRUPTED, REFUSED, OUT_OF_STEPS, BAD_DURATION, TOO_LONG, IDLE, COASTING = range(9)

# What holds a request's blocks in the token model: those that its computed tokens need, those of its whole prompt from
# the start, or what was reserved when it was admitted
AS_SCHEDULED, WHOLE_PROMPT, RESERVED = range(3)

# How the step loop is called there: for a whole run of an engine alone; to make a worker of a fleet ready; to go on
# with one until a time; the same, but to return when a request ends
ALONE, BEGINS, GOES_ON, STOPS = range(4)

# Who is preempted there
LAST, LEAST_URGENT, FEWEST_TOKENS = range(3)

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
    max_batch_size: Array  # of a disaggregated engine, its prefill workers
    decode_workers: Array  # of a disaggregated engine; 0 in an engine
    transfer_time: Array  # of a disaggregated engine [ticks]
    prefill_time: Array  # ticks
    itl: Array  # ticks
    total_prefill_chunks: Array
    arrivals: Array  # code of `vecsim.load.arrival_time`, or CLOSED
    request_rate: Array  # requests per tick; 1 where it has no meaning
    requests: Array  # of a batch, or to keep in a closed loop
    fleet: Array  # of a cluster, its place in the table's fleets; -1 in an engine
    seed: Array  # of the load
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

    shape: Array  # of the gaps' gamma distribution; of recorded times, the place of the first
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


class ApartScratch(NamedTuple):
    """What one thread works in, of a disaggregated engine of the tick model; an instant is infinite where it's none."""

    arrived_at: Array  # [request + 1]
    enqueued_at: Array  # [request]
    started_at: Array
    first_token_at: Array
    decode_started_at: Array
    left_at: Array
    tokens: Array  # [request] until the end of the run
    prefill_worker: Array
    decode_worker: Array
    ends: Array  # a heap: when the requests of a closed loop end
    prefill_heap: Array  # workers by their clocks
    decode_heap: Array
    prefill_clock: Array  # [worker] its next boundary that matters
    decode_clock: Array
    busy_until: Array  # [prefill worker]
    values: Array  # and what follows as in `Scratch`
    kept: Array
    bins: Array
    bin_counts: Array
    bin_places: Array


class ClusterScratch(NamedTuple):
    """What one thread works in, of a cluster of the tick model; an instant is infinite where it's none."""

    arrived_at: Array  # [request + 1]
    enqueued_at: Array  # [request]
    started_at: Array
    first_token_at: Array
    left_at: Array
    started_step: Array
    worker: Array
    next_ending: Array  # [request] the next one (+ 1) that ends at the same boundary; 0: none
    following: Array  # [request, then worker] the next one of the same worker, or its first; -1: none
    ring: Array  # [worker x step] the first request (+ 1) that ends at a boundary; 0: none
    counts: Array  # [worker, column] see `vecsim.kernel.tick_cluster`
    times: Array  # [worker, column]
    totals: Array
    clocks: Array  # a `vecsim.kernel.tree`: next boundaries of workers that aren't idle
    loads: Array  # a tree: outstanding requests
    survey: Array  # [row, worker] see `vecsim.kernel.routing`
    most_steps: Array  # [1] more than a worker can make
    prefill_sum: Array  # [slot + 1] of the largest worker; what follows as in `Scratch`
    itl_samples: Array
    values: Array
    kept: Array
    bins: Array
    bin_counts: Array
    bin_places: Array


class Record(NamedTuple):
    """Per-request results that are kept [scenario, request]; NaN (or -1) where it never happened."""

    arrived_at: Array
    enqueued_at: Array
    started_at: Array
    first_token_at: Array
    completed_at: Array
    output_tokens: Array
    slot: Array
    worker: Array  # of fleets; else there is none


class Job(NamedTuple):
    """What a block of scenarios is run with, and where the results go."""

    scenarios: Scenarios
    arrivals: Streams
    lengths: Streams
    time_limit: float
    warmup: float
    quantiles: Array
    scratch: Any  # `Scratch`, `ApartScratch` or `ClusterScratch`
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


class ApartOutcome(NamedTuple):
    """How a scenario of a disaggregated engine of the tick model ended."""

    status: int
    steps: int  # with a request, that began at the end of the warm-up or later
    itl_samples: int
    enqueued: int
    started: int
    end_time: float


class ClusterSetting(NamedTuple):
    """One scenario of a cluster of the tick model."""

    workers: int
    router: int  # place in `vecsim.routing.ROUTERS`
    router_rule: int  # address of the user's own
    seed: int
    prefill_time: float
    itl: float
    chunks: int
    target: int  # concurrency of a closed loop; 0 for an open load
    available: int  # requests drawn; of an open load those that are due
    time_limit: float
    warmup: float
    ring: int  # size of a worker's
    stop: Array


class ClusterOutcome(NamedTuple):
    """How a scenario of a cluster of the tick model ended."""

    status: int
    came: int  # requests
    entered: int  # of these, those until the last one that a worker noticed
    workers: int


class TokenBatch(NamedTuple):
    """What the rule of a user's own batcher is told, in the token model, of a request that could compute tokens."""

    running: int  # requests in slots
    prefilling: int  # requests whose prompt is being computed
    decoding: int  # requests past their first token
    free: int  # slots
    queued: int  # requests in the queue
    time: float  # seconds since the run began
    waited: float  # seconds since this request was queued (or preempted)
    prefill_requests: int  # whose prompts are scheduled in this step already
    prefill_tokens: int  # so scheduled
    decode_context: int  # tokens in the context of the decoding requests
    free_blocks: int  # of KV memory
    blocks: int  # of KV memory in all
    block_size: int  # tokens
    head_started: int  # 1 if the request runs already, 0 if it is the head of the queue
    head_tokens: int  # that it still has to compute
    head_cached_tokens: int  # computed already, or found in the prefix cache
    head_prompt_tokens: int
    head_max_tokens: int  # the client's cap on its output
    head_class: int  # place in the load's classes
    parameter: float  # the batcher's own number


class StepBatch(NamedTuple):
    """What a step does, for a step time."""

    prefill_requests: int
    prefill_tokens: int  # of their prompts, computed in this step
    prefill_attention: float  # sum over the chunks of tokens x (context before + tokens / 2)
    prefill_squares: float  # sum over the chunks of tokens^2
    prefill_context: int  # sum over the chunks of their context before, each rounded up to a table's step
    decode_requests: int
    decode_context: int  # tokens, the ones being written included
    kv_tokens: int  # that KV memory has room for
    parameter: float  # the step time's own number


class Policy(NamedTuple):
    """All that a batcher decides (scalars)."""

    slots: int
    budget: int  # tokens of a step
    longest: int  # prompt + output tokens of a request
    chunked: bool  # prompts may be split
    threshold: int  # prompt tokens of one request in a step; 0 = any
    padded: bool  # prompts cost as much as the longest of the step
    prefill_only: bool  # steps of prompts alone, while there can be one
    one_prompt: bool  # one prompt at a time
    into_empty: bool  # admit only when nothing runs; all leave together
    hold: int  # AS_SCHEDULED, WHOLE_PROMPT or RESERVED
    reserve_tokens: int  # 0: prompt + max_tokens
    reserve_full_prompt: bool
    admits_after_preemption: bool
    victim: int  # LAST, LEAST_URGENT or FEWEST_TOKENS
    to_back: bool  # where a preempted request goes in the queue
    order: int  # of the queue
    asynchronous: bool
    ratio: float  # of what may be generated that room is kept for (SGLang); 0 = none
    least_ratio: float
    ratio_decay: float  # a step
    room_tokens: int  # of a request's output that count
    page: int  # tokens
    retract_steps: int  # tokens that are expected beyond those so far, after a retraction
    custom: bool  # a rule of the user's own
    parameter: float  # that it is given


class Memory(NamedTuple):
    """KV memory (scalars)."""

    blocks: int
    block_size: int  # tokens
    shift: int  # log2(block_size), -1 where that isn't whole
    watermark: int  # blocks that stay free at admission while anything runs
    caching: bool  # of prefixes
    front: bool  # freed blocks without an id are taken first
    returns: bool  # requests that have ended may come back and look for their own blocks


class Formula(NamedTuple):
    """The numbers of a step time (scalars)."""

    code: int  # of the kind of step time, as in `vecsim.step_time`
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float
    g: float
    per_step: float  # seconds added to each
    kv_tokens: int  # that KV memory has room for


class StepModel(NamedTuple):
    """A step time: its numbers, and the arrays of its tables."""

    formula: Formula
    context_step: int  # that prefill contexts are rounded up to
    terms: Array  # [term, field]
    grids: Array
    values: Array
    outside: Array  # [1] steps that were outside the table


class TokenLoad(NamedTuple):
    """Requests of one scenario in the token model [request].

    The first `static` have a time of arrival from the start.
    """

    arrived_at: Array  # seconds
    prompt_tokens: Array
    output_tokens: Array
    max_tokens: Array
    classes: Array  # place in the two below; empty: all 0
    follower: Array  # the request that follows in its session, -1 if none; empty: no sessions
    think: Array  # seconds from the end of the request before it in the session
    urgency: Array  # [class] the least goes first
    ttft_limits: Array  # [class] seconds
    itl_limits: Array  # [class] seconds
    watches_gaps: bool  # whether one of these is finite
    static: int
    alone: bool  # no worker of a fleet
    worker: int  # number of the engine in its fleet
    closed: bool  # a request comes when one ends
    think_time: float  # seconds from the end of one to the arrival of the next in a closed loop
    before_queue: float  # seconds from its arrival until a request can be queued
    per_token: float  # seconds after a step's end until a token is seen, for each token so far
    at_completion: float  # seconds until a completion is seen


class TokenWork(NamedTuple):
    """What one thread works in, in the token model; see `vecsim.kernel.token` for the rows."""

    counts: Array
    sums: Array
    gaps: Array  # [bin] tokens by the time since the last one
    own: Array  # [row, request]
    times: Array  # [row, request]
    first: Array  # [ring] the request that ends at a decode step and was admitted last
    unclip: Array  # [ring]
    residues: Array  # [block_size] decoding requests that need a block at decode steps of this residue
    prefills: Array  # [slot] requests whose prompt is being computed, in the order of admission
    chunk_of: Array  # [slot] the request of each chunk of the step
    chunk_tokens: Array
    stack: Array  # requests in the order of admission, with holes where they have left
    coming: Array  # [request] a heap of those that will arrive
    ended: Array  # [slot] requests that have ended, and hold what they held
    joined: Array  # [slot] requests that have begun to decode, since the last decode
    joined_at: Array  # when
    newcomers: Array  # [slot] those of them whose gaps have limits
    late: Array  # [class] steps that were longer than the limit of the time between tokens
    starving: Array  # [2 x slot] decoding requests that had no token in this step, and in the last one


class Router(NamedTuple):
    """How the workers of a fleet are chosen (scalars)."""

    code: int  # place in `vecsim.routing.ROUTERS`
    seed: int  # of the load
    place: int  # 0 where it chooses who decodes, 1 where it chooses who prefills
    first: int  # worker that it can choose
    number: int  # of workers from there on
    credit: float  # blocks' worth of a cached block; 0: the router doesn't look
    scale: float  # weight of prefill against decode
    decode_counts: bool  # whether blocks of requests that decode count
    temperature: float
    latency: float  # seconds until what is cached is known
    host_credit: float  # share of the credit of a block in host memory, and on disk
    disk_credit: float
    rule: int  # address of the user's own


class RouterView(NamedTuple):
    """What a router of the user's own is given: its workers [worker], and the request.

    It returns the place of one of them; where that could not hold the request, the first that could is chosen. In the
    tick model there are no prompts, memory and sessions: 0 is told of them, and no worker served a session before.
    """

    able: Array  # 1 where the worker could ever hold the request
    outstanding: Array  # requests sent there that have not ended
    waiting: Array  # of these, those that wait
    running: Array  # and those that have a slot
    kv_use: Array  # share of the KV memory in use
    hit_blocks: Array  # blocks that the prompt begins with and that the worker is known to have in GPU memory
    prefill_blocks: Array  # blocks of prompts that are yet to be computed
    decode_blocks: Array  # blocks of the prompts of all requests there
    prompt_tokens: int
    prompt_blocks: int
    bound: int  # worker that served the session before; below 0 if there is none
    request: int  # its number
    now: float  # seconds, or ticks


class Split(NamedTuple):
    """How prefill is kept apart from decode (scalars)."""

    prefill_workers: int  # the first ones; 0: each does both
    queued: bool  # prefill workers take from one queue; else a router chooses
    reserves_first: bool  # blocks for decode before the prefill
    first_by_prefill: bool  # the prefill's last step yields the first token
    rule: int  # of local prefill, of `vecsim.kernel.handover`
    length: float  # tokens
    queue_size: float
    ratio: float
    busy_threshold: float  # most KV memory in use for a local prefill


class Transfer(NamedTuple):
    """How keys and values move (scalars); see `vecsim.transfer.KVTransfer`."""

    source_bandwidth: float
    destination_bandwidth: float
    fabric_bandwidth: float
    latency: float
    descriptor_cost: float
    descriptors_per_run: int
    bytes_per_token: float
    merges: bool  # blocks that are neighbours on both sides are one run
    first_fit: bool  # allocator of both sides; else paged
    overlapped_layers: int  # 1: all moves once the prefill has ended
    transpose_per_byte: float
    transpose_launch: float
    polling: float
    unlimited: bool  # every bandwidth is infinite


class Fleet(NamedTuple):
    """What one thread works in, of a fleet: the rows of each worker, and what goes on between them."""

    group: Array  # [worker] its kind
    put: Array  # [worker, word] the `Place` of each
    blocks: Array  # [worker] of KV memory
    all_blocks: Array  # [1] of all workers
    fits: Array  # [group] whether workers of that kind could hold a request
    present: Array  # [group] workers that routers can choose
    away: Array  # [worker] whether they can't
    ghosts: Array  # [worker] requests that routers take to be there, though they are not
    sent: Array  # [worker] requests
    sent_blocks: Array  # [worker] blocks of their prompts
    sent_new: Array  # [worker] of these, those that were taken to be new
    expected: Array  # [request] cached blocks that the router counted on
    survey: Array  # [row, worker] as in `vecsim.kernel.routing`
    turn: Array  # [2] of a round robin: over those that decode, and those that prefill only
    before: Array  # [request] the one before it in its session, -1 if none
    clock: Array  # a tree: when the step of a worker ends, infinite if it sleeps
    loads: Array  # [router's place] a tree: what it wants to be least
    way: Array  # [row, request] as in `vecsim.kernel.handover`
    instants: Array
    moved: Array  # [request] bytes
    left: Array  # [request] share of a transfer that is left when the prefill ends
    runs: Array  # [request] stretches of blocks that it moves
    allocator: Any  # of places in KV memory, and what follows: of no size where runs aren't merged
    next_block: Array  # [worker, block] the one after it of the same request
    chains: Array  # [row, request] as in `vecsim.kernel.places`
    places: Array  # [side, block]
    timers: Array  # a heap of requests
    between: Array  # numbers of the fleet
    waiting: Array  # [2 x worker] the first and the last that wait for blocks to be reserved
    ones: Array  # [request] 1: the tokens that a prefill yields
    own: Array  # [row, request] and what follows: those of requests at their prefill workers
    times: Array
    owned: Array
    own_blocks: Array
    links: Any
    bandwidths: Array  # [link] of each worker's NIC, and of the fabric
    unmeasured: Array  # [bin] gaps before the warm-up is over
    counts: Array  # [worker, ...] and what follows as in `TokenWork`
    sums: Array
    first: Array
    unclip: Array
    residues: Array
    prefills: Array
    chunk_of: Array
    chunk_tokens: Array
    stack: Array
    ended: Array
    joined: Array
    joined_at: Array
    newcomers: Array
    late: Array
    starving: Array
    nodes: Array  # [worker, row, node]
    node_of: Array  # [worker, id]
    seen: Array  # [worker, ...] of no length where no router looks
    parts: Array  # as in `vecsim.kernel.parts`; of no length where prefill isn't apart
    view_age: Array  # [request] seconds; this and the next of no length where no router goes by what is cached
    views: Array  # means over requests, as in `vecsim.kernel.routing`


class PlannerView(NamedTuple):
    """What a planner is told. Arrays [worker] of float64 over all places for workers, those of prefill first.

    What is said of a worker that isn't ready has no meaning.
    """

    ready: Array  # 1 where the worker serves
    starting: Array  # 1 where it will, after its start-up
    running: Array  # requests with a slot
    waiting: Array  # requests there without one
    kv_use: Array  # share of the KV memory in use
    kv_waiting: Array  # share of it that those waiting need when they begin
    queued_tokens: Array  # prompt tokens of those waiting there that are to be computed
    predicted_ttft: Array  # of a mean request that came now [s]; NaN if unknown
    own_ttft: Array  # of that what it would take in an idle worker
    predicted_itl: Array  # of the next step that decodes [s]; NaN if unknown
    own_itl: Array  # of that what a request alone would take
    prefill_workers: int  # places of prefill workers, the first ones; 0: one pool does both
    prefill_gpus: int  # GPUs of each prefill worker
    decode_gpus: int  # and of each of the others
    context_length: int  # tokens of the longest request that a prefill worker takes; 0 if unknown
    prefill_queue: int  # requests that wait for prefill
    queue_tokens: int  # prompt tokens of those that wait in a queue that all prefill workers share
    arrived: int  # requests since the last tick
    prompt_tokens: int  # of these
    ended: int  # requests since the last tick
    output_tokens: int  # of these
    ttft: float  # mean of the first tokens since the last tick [s]; NaN if there were none
    itl: float  # mean time between tokens since the last tick [s]; NaN if there were none
    now: float  # seconds


class Control(NamedTuple):
    """How workers come and go, and how the others learn of it; seconds."""

    changes: bool  # whether they do
    request_plane: float  # until what a router sends is there
    queue_push: float  # until a request is in the queue for prefill, and from there at its worker
    queue_pop: float
    watch: float  # until routers learn that a worker is ready, or drains
    ttl: float  # of a lease
    renewal: float  # between two renewals of it
    connect_timeout: float
    shun: float  # that a worker is avoided that couldn't be reached
    break_delay: float  # until a request learns that its worker has crashed
    migration_limit: int
    mtbf: float  # mean time to a crash of a worker that is ready
    restarts: bool  # whether a worker that has crashed starts again
    first_event: int  # place in the fleets' events of scheduled crashes and outages, and how many
    crashes: int
    outages: int
    planner: int  # code of the planner, -1 if there is none; where its numbers begin, and how many there are
    first_number: int
    numbers: int


class Life(NamedTuple):
    """What becomes of workers, and of requests whose worker is gone; rows as in `vecsim.kernel.life`.

    Of no worker, and of no request, where workers don't change.
    """

    whole: Array  # [row, worker]
    due: Array  # [row, worker] seconds
    clock: Array  # a tree: when the next of these is due
    spent: Array  # [row, worker] seconds
    fate: Array  # [row, request]
    rings: Array  # [row, request] seconds
    alarms: Array  # [part] a heap of requests
    numbers: Array
    times: Array  # seconds: of the outage, and of what is scheduled next
    log: Array  # [row, event]
    events: Array  # [event, field]: a time, the worker or how long
    shown: Array  # [row, worker] as in `vecsim.kernel.planning`
    sums: Array
    planner: Array  # its numbers
    memory: Array  # of the planner
    metrics: Array  # in the order of `vecsim.variables.CHANGING_VARIABLES`; empty where no fleet of a table changes


class Tiers(NamedTuple):
    """What is below the workers' caches, as in `vecsim.kernel.tiers`; of no worker where no worker has anything."""

    on: bool  # whether any has
    links: Any
    bandwidths: Array  # [link]
    after: Array  # [worker, tier, id] the block of the tier that was used next; the last place ties both ends together
    before: Array
    line: Array  # [worker, tier, id] the one after it of those that go there
    lists: Array  # [worker, tier, ...]
    sightings: Array  # [worker, id] times that a block was offered to host memory
    changed: Array  # [worker, change, id] seconds; of no id where no router looks
    way: Array  # [row, request]
    instants: Array  # [row, request]
    numbers: Array  # [row, worker]
    means: Array


class Cache(NamedTuple):
    """KV blocks that can be found; see `vecsim.kernel.kv`."""

    nodes: Array  # [row, node]
    node_of: Array  # [id]
    seen: Array  # empty where no router looks, else as in `vecsim.kernel.seen`
    owned: Array  # [row, request]
    own: Array  # [place] whether a request's block with a given id is one of its own
    ids: Any  # how blocks get their ids
    shared: Array  # [request] blocks that have given ids
    own_start: Array  # [request] first place in `own`


class StepRecord(NamedTuple):
    """What each step was [row, step]; of no step if it isn't kept."""

    times: Array
    counts: Array


class TokenStreams(NamedTuple):
    """What the requests of a block of scenarios are made of, in the token model."""

    numbers: Streams  # whole numbers: lengths, classes, groups, turns
    arrivals: Streams  # instants of renewal processes of rate 1, or recorded ones
    stages: Array  # durations and rates of piecewise loads, pair by pair
    ids: Array  # of the blocks of traces' prompts
    id_start: Array  # [request of a trace] first place in `ids`
    id_count: Array  # [request of a trace]
    classes: Array  # [field, class] urgency, then limits of TTFT, TPOT, ITL, E2E [s]
    terms: Array  # of step-time tables
    grids: Array
    values: Array
    outside: Array  # [1] steps that were outside their table
    fleets: Array  # [fleet, field] as in `vecsim.kernel.token_scenarios.FLEET_FIELDS`
    groups: Array  # [kind of worker, field] as in `FIELDS`, and how many
    events: Array  # [event, field] as in `Life`
    planners: Array  # numbers of all planners, one after the other


class Place(NamedTuple):
    """Everything that the step loop of one engine works on."""

    policy: Policy
    memory: Memory
    model: StepModel
    load: TokenLoad
    work: TokenWork
    cache: Cache
    record: StepRecord
    warmup: float
    stop: Array  # set from outside to interrupt
    own_rule: int  # addresses of the user's own
    own_duration: int


class World(NamedTuple):
    """Everything that one scenario of a fleet is made of."""

    step_loop: int  # address of `vecsim.kernel.token.simulate`
    fleet: Fleet
    split: Split
    router: Router  # of workers that decode
    prefill_router: Router  # of those that prefill only
    transfer: Transfer
    control: Control
    life: Life
    tiers: Tiers
    groups: Array  # [group, field] numbers of each kind of worker, as in `vecsim.kernel.token_scenarios.FIELDS`
    tables: StepModel  # of step times of all kinds; its formula has no meaning
    load: TokenLoad
    work: TokenWork  # of the fleet as if it were one engine
    cache: Cache
    record: StepRecord
    time_limit: float
    warmup: float
    stop: Array
    own_rule: int  # addresses of the user's own
    own_duration: int
    own_planner: int
    live: int  # address of `vecsim.kernel.losses.live`
    tiers_act: int  # address of `vecsim.kernel.tiers.tiers_act`


class TokenScratch(NamedTuple):
    """What one thread prepares a scenario's requests in, and tallies them in [request]."""

    arrived_at: Array  # one more
    prompt_tokens: Array
    output_tokens: Array
    max_tokens: Array
    classes: Array
    follower: Array
    think: Array
    shared: Array
    own_start: Array
    id_start: Array
    prefix: Array
    prefix_id: Array
    own_id: Array
    values: Array  # [latency, request]
    kept: Array  # one more
    bins: Array
    bin_counts: Array
    bin_places: Array
    gap_values: Array  # [bin of gaps]


class TokenJob(NamedTuple):
    """What a block of scenarios of the token model is run with, and where the results go."""

    scenarios: Array  # [scenario, field] in the order of `vecsim.kernel.token_scenarios.FIELDS`
    stream: Array  # [scenario, kind] rows in `streams.numbers`
    arrival_stream: Array  # [scenario]
    streams: TokenStreams
    time_limit: float
    warmup: float
    quantiles: Array
    scratch: TokenScratch
    work: TokenWork
    fleet: Fleet
    life: Life
    tiers: Tiers
    cache_nodes: Array
    cache_node_of: Array
    cache_owned: Array
    cache_own: Array
    record: StepRecord
    metrics: Array  # [scenario, metric] in the order of `vecsim.variables.TOKEN_VARIABLES`, then by class
    enqueued: Array  # [scenario]
    status: Array  # [scenario]
    stop: Array


class TokenRecord(NamedTuple):
    """Per-request results of the token model that are kept [scenario, request]; NaN where it never happened."""

    arrived_at: Array
    started_at: Array
    first_token_at: Array
    completed_at: Array
    prompt_tokens: Array
    output_tokens: Array
    hit_tokens: Array
    preempted: Array
    refused: Array
    class_number: Array
    worker: Array  # of a fleet, -1 where it was sent to none

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "TokenRecord":
        """Room for results; nothing has happened yet to any request."""
        return cls(*(np.full(shape, np.nan) for _ in range(4)), *(np.zeros(shape, np.int64) for _ in range(7)))
