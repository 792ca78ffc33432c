"""Planners: when workers are added and taken away. Declarations and rules side by side.

A planner looks at the fleet each `interval` (`decide`), some of them more often in between (`sample`). The rules are
plain functions of numbers and small arrays, written so that numba can compile them (`compiled`): what they need of a
planner is a row of numbers (`Planner.numbers`), behind them those of its floor; what they remember is in an array that
begins as zeros (`MEMORY`).

The rules are those of NVIDIA Dynamo's planners, learned from its public source and documentation
(github.com/ai-dynamo/dynamo: `examples/llm/components/planner.py` and `docs/planner/load_planner.md` of the first
generation's load planner, `components/planner/.../planner_core.py` of its SLA planner,
`components/src/dynamo/planner/core/` of the second generation).
"""

import math
import types
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec

from vecsim.declaration import (
    LONGEST_TIME,
    Count,
    Declaration,
    NonNegative,
    Offset,
    Positive,
    Range,
    check,
    shown,
    suggestion,
)
from vecsim.kernel.state import PlannerView
from vecsim.own import compiled_rule, name_of, stands_for
from vecsim.step_time import LinearStepTime

# Codes of planners, in the order of `PLANNERS`
SCHEDULE, LOAD, SLA, THROUGHPUT, REACTIVE, CUSTOM = range(6)

# Numbers of a planner: what all have but a schedule, then its own
INTERVAL, SAMPLE_INTERVAL, MIN_WORKERS, MAX_GPUS, OWN = range(5)

# Own numbers of a schedule: how many changes, and three for each of them (time, pool, workers)
CHANGES = OWN
FIRST_CHANGE = OWN + 1
PREFILL, DECODE = range(2)

# Own numbers of LoadPlanner; those of ThroughputPlanner begin in the same way
QUEUE_LOW, QUEUE_HIGH, KV_LOW, KV_HIGH, KV_PER_WAITING, TREND_INTERVALS, GRACE_INTERVALS = range(OWN, OWN + 7)

# Own numbers of SLAPlanner; those of ReactivePlanner begin in the same way
TTFT, ITL, CORRECTS, PREDICTOR, WINDOW, LEVEL_NOISE, TREND_NOISE, OBSERVATION_NOISE = range(OWN, OWN + 8)
DOWN_SHARE = CORRECTS
# of its profile: seconds of a step that prefills, for each prompt token, and for each pair of tokens that attend
PREFILL_STEP, PREFILL_TOKEN, PREFILL_PAIR, STEP_TOKENS = range(OWN + 8, OWN + 12)
# of a step that decodes, for each request in it, and for each token of their contexts
DECODE_STEP, DECODE_REQUEST, DECODE_CONTEXT, MOST_REQUESTS, KV_TOKENS, NUMBERS = range(OWN + 12, OWN + 18)

# Predictors, in the order of `PREDICTORS`
CONSTANT, MOVING_AVERAGE, LINEAR_TREND, KALMAN = range(4)

# Memory of a schedule: changes made
MADE = 0
# Memory of LoadPlanner: of the samples since the last tick; then ticks until a decode worker may go
SAMPLES, QUEUE_SUM, QUEUE_FIRST, QUEUE_LAST, KV_SUM, KV_SAMPLES, PREFILL_READY, DECODE_READY, GRACE = range(9)
# Memory of SLAPlanner: last tick, whether a request was ever seen, the last mean lengths, observed / expected
# (0 where it isn't known), and what it predicts
LAST_TICK, SEEN, PROMPT, OUTPUT, PREFILL_FACTOR, DECODE_FACTOR, REQUESTS = range(7)
# Memory of what is predicted: how many values, the filter's state and its covariance, and the last values
VALUES, LEVEL, TREND, LEVEL_VARIANCE, COVARIANCE, TREND_VARIANCE, RECENT = range(7)
MOST_WINDOW = 64
SERIES = RECENT + MOST_WINDOW
PROMPTS, OUTPUTS = REQUESTS + SERIES, REQUESTS + 2 * SERIES
OWN_MEMORY = REQUESTS + 3 * SERIES  # float64s that any planner needs by itself

# Memory of a floor: workers of each pool, how many of its intervals are over, what has come, gone and been waited for
# since the last of them, and what the planner remembers that sets it
FLOOR_PREFILL, FLOOR_DECODE, FLOOR_TICKS = range(OWN_MEMORY, OWN_MEMORY + 3)
FLOOR_CAME, FLOOR_PROMPTS, FLOOR_ENDED, FLOOR_OUTPUTS, FLOOR_TTFT, FLOOR_ITL = range(OWN_MEMORY + 3, OWN_MEMORY + 9)
FLOOR_MEMORY = OWN_MEMORY + 9
MEMORY = FLOOR_MEMORY + OWN_MEMORY

# The filter's variance before it has seen anything
UNSURE = 1000.0

# A share this much below a whole number is that number: limits aren't exact
SLACK = 1e-9

# More workers than any fleet has
MANY = 2.0**31


VIEW_ARRAYS = PlannerView._fields[:11]


def counted(flags, first, last):
    """Workers among [first, last) with a flag."""
    count = 0
    for worker in range(first, last):
        if flags[worker] != 0.0:
            count += 1
    return count


def bounded(numbers, view, prefill_change, decode_change):
    """`within`, with the minimum of each pool. O(workers)."""
    least = int(numbers[MIN_WORKERS])
    return within(numbers, view, least, least, prefill_change, decode_change)


def within(numbers, view, least_prefill, least_decode, prefill_change, decode_change):
    """Changes within the least of each pool and the GPUs of all, those of draining workers not counted.

    Workers go first, so that their GPUs are free; then prefill workers come before others, for their queue fills decode
    workers too (Dynamo's order in both generations). A pool below its least is brought to it. O(workers).
    """
    first = view.prefill_workers
    size = view.ready.size
    prefill = counted(view.ready, 0, first) + counted(view.starting, 0, first)
    decode = counted(view.ready, first, size) + counted(view.starting, first, size)
    more_prefill = max(prefill + int(prefill_change), least_prefill) - prefill if first > 0 else 0
    more_decode = max(decode + int(decode_change), least_decode) - decode
    room = int(numbers[MAX_GPUS]) - (prefill + min(more_prefill, 0)) * view.prefill_gpus
    room -= (decode + min(more_decode, 0)) * view.decode_gpus
    if more_prefill > 0:
        more_prefill = min(more_prefill, max(room, 0) // view.prefill_gpus)
        room -= more_prefill * view.prefill_gpus
    if more_decode > 0:
        more_decode = min(more_decode, max(room, 0) // view.decode_gpus)
    return more_prefill, more_decode


def next_change(numbers, memory):
    """When the next change of a schedule is due; infinity if all are made."""
    made = int(memory[MADE])
    return numbers[FIRST_CHANGE + 3 * made] if made < int(numbers[CHANGES]) else math.inf


def by_schedule(numbers, view, memory):
    """What is due brings each pool to the number that was named last."""
    made = int(memory[MADE])
    prefill = -1
    decode = -1
    while made < int(numbers[CHANGES]) and numbers[FIRST_CHANGE + 3 * made] <= view.now:
        workers = int(numbers[FIRST_CHANGE + 3 * made + 2])
        if int(numbers[FIRST_CHANGE + 3 * made + 1]) == PREFILL:
            prefill = workers
        else:
            decode = workers
        made += 1
    memory[MADE] = made
    first = view.prefill_workers
    size = view.ready.size
    if prefill >= 0:
        prefill -= counted(view.ready, 0, first) + counted(view.starting, 0, first)
    else:
        prefill = 0
    if decode >= 0:
        decode -= counted(view.ready, first, size) + counted(view.starting, first, size)
    else:
        decode = 0
    return prefill, decode


def load_sample(numbers, view, memory):
    """A sample of LoadPlanner. O(workers)."""
    first = view.prefill_workers
    size = view.ready.size
    if counted(view.starting, 0, size) > 0:
        return
    queue = float(view.prefill_queue)
    if memory[SAMPLES] == 0.0:
        memory[QUEUE_FIRST] = queue
        memory[PREFILL_READY] = counted(view.ready, 0, first)
        memory[DECODE_READY] = counted(view.ready, first, size)
    memory[SAMPLES] += 1.0
    memory[QUEUE_SUM] += queue
    memory[QUEUE_LAST] = queue
    for worker in range(first, size):
        if view.ready[worker] != 0.0:
            memory[KV_SUM] += view.kv_use[worker] + numbers[KV_PER_WAITING] * view.waiting[worker]
            memory[KV_SAMPLES] += 1.0


def by_load(numbers, view, memory):
    """LoadPlanner at a tick: see there. O(workers)."""
    first = view.prefill_workers
    size = view.ready.size
    samples = memory[SAMPLES]
    kv_samples = memory[KV_SAMPLES]
    last = memory[QUEUE_LAST]
    queue = memory[QUEUE_SUM] / max(samples, 1.0)
    kv = memory[KV_SUM] / max(kv_samples, 1.0)
    later = last + numbers[TREND_INTERVALS] * (last - memory[QUEUE_FIRST])
    for i in range(KV_SAMPLES + 1):
        memory[i] = 0.0
    prefill_ready = counted(view.ready, 0, first)
    decode_ready = counted(view.ready, first, size)
    same = prefill_ready == int(memory[PREFILL_READY]) and decode_ready == int(memory[DECODE_READY])
    if samples == 0.0 or not same or counted(view.starting, 0, size) > 0:
        return 0, 0
    prefill = 0
    decode = 0
    if first > 0:
        if queue < numbers[QUEUE_LOW]:
            prefill = -1
        elif queue > numbers[QUEUE_HIGH] and later > numbers[QUEUE_HIGH]:
            prefill = 1
    if kv_samples > 0.0:
        if kv < numbers[KV_LOW] and memory[GRACE] == 0.0:
            decode = -1
        elif kv > numbers[KV_HIGH]:
            decode = 1
    prefill, decode = bounded(numbers, view, prefill, decode)
    if decode > 0:
        memory[GRACE] = numbers[GRACE_INTERVALS]
    if memory[GRACE] > 0.0:
        memory[GRACE] -= 1.0
    return prefill, decode


def kv_change(numbers, view):
    """ThroughputPlanner's change of the workers that decode. O(workers)."""
    ready = 0
    low = True
    for worker in range(view.prefill_workers, view.ready.size):
        if view.ready[worker] != 0.0:
            ready += 1
            use = view.kv_use[worker] + view.kv_waiting[worker]
            if use > numbers[KV_HIGH]:
                return 1
            low = low and use < numbers[KV_LOW]
    return -1 if low and ready > 0 else 0


def queue_change(numbers, view):
    """ThroughputPlanner's change of the prefill workers. O(workers)."""
    ready = counted(view.ready, 0, view.prefill_workers)
    if ready == 0 or view.context_length <= 0:
        return 0
    low = True
    for worker in range(view.prefill_workers):
        if view.ready[worker] != 0.0:
            queued = (view.queued_tokens[worker] + view.queue_tokens / ready) / view.context_length
            if queued >= numbers[QUEUE_HIGH]:
                return 1
            low = low and (queued < numbers[QUEUE_LOW] or queued == 0.0)
    return -1 if low else 0


def ttft_change(numbers, view, first, last):
    """ReactivePlanner's change by what TTFT is predicted in workers [first, last). O(workers)."""
    ready = counted(view.ready, first, last)
    if ready == 0:
        return 0
    grows = ready / (ready - 1) if ready > 1 else 1.0
    above = True
    fits = ready > 1
    for worker in range(first, last):
        if view.ready[worker] != 0.0:
            ttft = view.predicted_ttft[worker]
            own = view.own_ttft[worker]
            if math.isnan(ttft) or math.isnan(own):  # no prompt has come since the last tick
                above = False
                fits = fits and view.queued_tokens[worker] == 0.0
                continue
            above = above and ttft > numbers[TTFT]
            fits = fits and (ttft - own) * grows < (numbers[TTFT] - own) * numbers[DOWN_SHARE]
    return 1 if above else (-1 if fits else 0)


def itl_change(numbers, view, first, last):
    """ReactivePlanner's change by what ITL is predicted in workers [first, last). O(workers)."""
    ready = counted(view.ready, first, last)
    if ready == 0:
        return 0
    grows = ready / (ready - 1) if ready > 1 else 1.0
    above = True
    fits = ready > 1
    for worker in range(first, last):
        if view.ready[worker] != 0.0:
            itl = view.predicted_itl[worker]
            own = view.own_itl[worker]
            fits = fits and (view.kv_use[worker] + view.kv_waiting[worker]) * grows < 1.0
            if math.isnan(itl) or math.isnan(own):  # it decodes nothing
                above = False
                continue
            above = above and itl > numbers[ITL]
            fits = fits and own + (itl - own) * grows < numbers[ITL] * numbers[DOWN_SHARE]
    return 1 if above else (-1 if fits else 0)


def by_latency(numbers, view):
    """ReactivePlanner at a tick: see there. O(workers)."""
    first = view.prefill_workers
    size = view.ready.size
    if first > 0:
        return ttft_change(numbers, view, 0, first), itl_change(numbers, view, first, size)
    ttft = ttft_change(numbers, view, 0, size)
    itl = itl_change(numbers, view, 0, size)
    if ttft > 0 or itl > 0:
        return 0, 1
    return 0, -1 if ttft < 0 and itl < 0 else 0


def filtered(numbers, memory, at, value):
    """One step of a Kalman filter with a level that moves by a trend, and where it will be a step later.

    The state is (level, trend), F = [[1, 1], [0, 1]], H = [1, 0]; in memory is the state that was predicted.
    """
    if memory[at + VALUES] == 0.0:
        level, trend = value, 0.0
        a, b, c = UNSURE, 0.0, UNSURE
    else:
        a, b, c = memory[at + LEVEL_VARIANCE], memory[at + COVARIANCE], memory[at + TREND_VARIANCE]
        total = a + numbers[OBSERVATION_NOISE]
        surprise = value - memory[at + LEVEL]
        level = memory[at + LEVEL] + a / total * surprise
        trend = memory[at + TREND] + b / total * surprise
        c -= b * b / total
        b *= numbers[OBSERVATION_NOISE] / total
        a *= numbers[OBSERVATION_NOISE] / total
    memory[at + LEVEL] = level + trend
    memory[at + TREND] = trend
    memory[at + LEVEL_VARIANCE] = a + 2.0 * b + c + numbers[LEVEL_NOISE]
    memory[at + COVARIANCE] = b + c
    memory[at + TREND_VARIANCE] = c + numbers[TREND_NOISE]
    return level + trend


def predicted(numbers, memory, at, value):
    """The next value of a series whose memory begins at `at`, after this one; never below 0. O(window)."""
    code = int(numbers[PREDICTOR])
    if code == CONSTANT:
        return value
    if code == KALMAN:
        ahead = filtered(numbers, memory, at, value)
        memory[at + VALUES] += 1.0
        return max(ahead, 0.0)
    window = int(numbers[WINDOW])
    memory[at + RECENT + int(memory[at + VALUES]) % window] = value
    memory[at + VALUES] += 1.0
    values = int(memory[at + VALUES])
    kept = min(values, window)
    mean = 0.0
    for i in range(kept):
        mean += memory[at + RECENT + i] / kept
    if code == MOVING_AVERAGE or kept == 1:
        return mean
    # Least squares over the instants 0 .. kept - 1, the oldest first
    middle = (kept - 1) / 2.0
    slope = 0.0
    for i in range(kept):
        slope += (i - middle) * memory[at + RECENT + (values - kept + i) % window]
    slope /= kept * (kept * kept - 1) / 12.0
    return max(mean + slope * (kept - middle), 0.0)


def prompt_seconds(numbers, tokens):
    """How long a prompt takes that is alone, by the profile."""
    steps = math.ceil(tokens / numbers[STEP_TOKENS])
    return (
        steps * numbers[PREFILL_STEP] + tokens * numbers[PREFILL_TOKEN] + tokens * tokens / 2.0 * numbers[PREFILL_PAIR]
    )


def decode_seconds(numbers, requests, context):
    """How long a step takes in which requests decode, by the profile."""
    return numbers[DECODE_STEP] + requests * (numbers[DECODE_REQUEST] + context * numbers[DECODE_CONTEXT])


def most_requests(numbers, context):
    """As many as decode at the same time in a worker."""
    most = numbers[MOST_REQUESTS]
    if context > 0.0:
        most = min(most, math.floor(numbers[KV_TOKENS] / context) if numbers[KV_TOKENS] < MANY * context else MANY)
    return max(float(most), 1.0)


def token_seconds(numbers, itl, context):
    """A worker's seconds for each token, with as many requests as the profile has within an ITL, one at least."""
    most = most_requests(numbers, context)
    each = numbers[DECODE_REQUEST] + context * numbers[DECODE_CONTEXT]
    left = itl - numbers[DECODE_STEP]
    requests = most
    if left < each:
        requests = 1.0
    elif left < most * each:
        requests = float(math.floor(left / each + SLACK))
    return decode_seconds(numbers, requests, context) / requests


def correct(numbers, view, memory, elapsed):
    """Learn how observed latencies differ from those of the profile. O(workers)."""
    prompt = memory[PROMPT]
    output = memory[OUTPUT]
    if math.isfinite(view.ttft):
        expected = prompt_seconds(numbers, prompt)
        if expected > 0.0:
            memory[PREFILL_FACTOR] = view.ttft / expected
    ready = counted(view.ready, view.prefill_workers, view.ready.size)
    if math.isfinite(view.itl) and ready > 0 and output > 0.0:
        # Requests that decode in a worker, by Little's law
        duration = view.itl * max(output - 1.0, 0.0)
        if math.isfinite(view.ttft):
            duration += view.ttft
        context = prompt + output / 2.0
        requests = min(max(view.arrived / ready * duration / elapsed, 1.0), most_requests(numbers, context))
        expected = decode_seconds(numbers, requests, context)
        if expected > 0.0:
            memory[DECODE_FACTOR] = view.itl / expected


def demanded(numbers, view, memory, prefill_now, decode_now):
    """As many workers as SLAPlanner has each pool have: see there. O(workers + window).

    Those given where nothing is known. In one pool it's all of them.
    """
    elapsed = view.now - memory[LAST_TICK]
    memory[LAST_TICK] = view.now
    if view.arrived > 0:
        memory[SEEN] = 1.0
        memory[PROMPT] = view.prompt_tokens / view.arrived
    if view.ended > 0:
        memory[OUTPUT] = view.output_tokens / view.ended
    if memory[SEEN] == 0.0 or elapsed <= 0.0:
        return prefill_now, decode_now
    if numbers[CORRECTS] != 0.0:
        correct(numbers, view, memory, elapsed)
    prefill_factor = memory[PREFILL_FACTOR] if memory[PREFILL_FACTOR] > 0.0 else 1.0
    decode_factor = memory[DECODE_FACTOR] if memory[DECODE_FACTOR] > 0.0 else 1.0
    interval = numbers[INTERVAL]
    rate = predicted(numbers, memory, REQUESTS, view.arrived * interval / elapsed) / interval
    prompt = predicted(numbers, memory, PROMPTS, memory[PROMPT])
    prefill = rate * prompt_seconds(numbers, prompt) * min(prefill_factor, 1.0)
    first = view.prefill_workers
    least = numbers[MIN_WORKERS]
    decode = float(decode_now)  # as long as nothing is known of outputs
    if memory[OUTPUT] > 0.0:
        output = predicted(numbers, memory, OUTPUTS, memory[OUTPUT])
        decode = rate * output * token_seconds(numbers, numbers[ITL] / decode_factor, prompt + output / 2.0)
        if first == 0:
            decode += prefill
    decode = max(math.ceil(min(decode, MANY)), least)
    if first == 0:
        return prefill_now, int(decode)
    prefill = max(math.ceil(min(prefill, MANY)), least)
    # More than there are GPUs for: each gets its share, at least the minimum
    gpus = prefill * view.prefill_gpus + decode * view.decode_gpus
    most = numbers[MAX_GPUS]
    if gpus > most:
        room = math.floor((most - least * view.decode_gpus) / view.prefill_gpus)
        prefill = max(min(room, math.floor(prefill * most / gpus)), least)
        decode = max(math.floor((most - prefill * view.prefill_gpus) / view.decode_gpus), least)
    return int(prefill), int(decode)


def by_demand(numbers, view, memory):
    """SLAPlanner at a tick: see there. O(workers + window)."""
    first = view.prefill_workers
    size = view.ready.size
    prefill_now = counted(view.ready, 0, first) + counted(view.starting, 0, first)
    decode_now = counted(view.ready, first, size) + counted(view.starting, first, size)
    prefill, decode = demanded(numbers, view, memory, prefill_now, decode_now)
    return prefill - prefill_now, decode - decode_now


def set_floor(numbers, view, memory):
    """Note what a floor is told at a tick; set it anew if one of its intervals is over. O(workers + window)."""
    memory[FLOOR_CAME] += view.arrived
    memory[FLOOR_PROMPTS] += view.prompt_tokens
    memory[FLOOR_ENDED] += view.ended
    memory[FLOOR_OUTPUTS] += view.output_tokens
    if math.isfinite(view.ttft):
        memory[FLOOR_TTFT] += view.ended * view.ttft
    if math.isfinite(view.itl):
        memory[FLOOR_ITL] += (view.output_tokens - view.ended) * view.itl
    own = numbers[NUMBERS:]
    over = math.floor(view.now / own[INTERVAL] + SLACK)
    if over <= memory[FLOOR_TICKS]:
        return
    memory[FLOOR_TICKS] = over
    ended = memory[FLOOR_ENDED]
    gaps = memory[FLOOR_OUTPUTS] - ended
    since = PlannerView(
        view.ready, view.starting, view.running, view.waiting, view.kv_use, view.kv_waiting, view.queued_tokens,
        view.predicted_ttft, view.own_ttft, view.predicted_itl, view.own_itl,
        view.prefill_workers, view.prefill_gpus, view.decode_gpus, view.context_length, view.prefill_queue,
        view.queue_tokens, int(memory[FLOOR_CAME]), int(memory[FLOOR_PROMPTS]), int(ended), int(memory[FLOOR_OUTPUTS]),
        memory[FLOOR_TTFT] / ended if ended > 0.0 else math.nan,
        memory[FLOOR_ITL] / gaps if gaps > 0.0 else math.nan,
        view.now,
    )  # fmt: skip
    prefill, decode = int(memory[FLOOR_PREFILL]), int(memory[FLOOR_DECODE])
    prefill, decode = demanded(own, since, memory[FLOOR_MEMORY:], prefill, decode)
    memory[FLOOR_PREFILL] = prefill
    memory[FLOOR_DECODE] = decode
    for i in range(FLOOR_CAME, FLOOR_MEMORY):
        memory[i] = 0.0


def sample(code, numbers, view, memory):
    """What a planner notes each `sample_interval`, at a tick before it decides. O(workers)."""
    if code == LOAD:
        load_sample(numbers, view, memory)


def decide(code, numbers, view, memory):
    """How many workers a planner adds to the prefill and to the decode pool; negative: takes away. O(workers).

    A rule of the user's own is for the caller to ask, its answer for `bounded`.
    """
    if code == SCHEDULE:
        return by_schedule(numbers, view, memory)
    if code == LOAD:
        return by_load(numbers, view, memory)
    prefill = 0
    decode = 0
    if code == SLA:
        prefill, decode = by_demand(numbers, view, memory)
    has_floor = numbers.size > NUMBERS
    if has_floor:
        set_floor(numbers, view, memory)
    if counted(view.starting, 0, view.starting.size) > 0:
        return 0, 0
    if code == THROUGHPUT:
        prefill = queue_change(numbers, view)
        decode = kv_change(numbers, view)
    elif code == REACTIVE:
        prefill, decode = by_latency(numbers, view)
    if has_floor:
        least = int(numbers[MIN_WORKERS])
        least_prefill = max(int(memory[FLOOR_PREFILL]), least)
        least_decode = max(int(memory[FLOOR_DECODE]), least)
        return within(numbers, view, least_prefill, least_decode, prefill, decode)
    return bounded(numbers, view, prefill, decode)


# Whatever a rule calls comes before it
RULES = (
    *(counted, within, bounded, next_change, by_schedule, load_sample, by_load, kv_change, queue_change, ttft_change),
    *(itl_change, by_latency, filtered, predicted, prompt_seconds, decode_seconds, most_requests, token_seconds),
    *(correct, demanded, by_demand, set_floor, sample, decide),
)


def compiled(jit: Any) -> Any:
    """All rules by their names, compiled: one that is compiled can't call one that isn't.

    Parameters
    ----------
    jit : function
        A decorator, such as `numba.njit`.

    Returns
    -------
    namespace
    """
    scope: dict[str, Any] = dict(globals())
    for rule in RULES:
        scope[rule.__name__] = jit(types.FunctionType(rule.__code__, scope, rule.__name__))
    return types.SimpleNamespace(**{rule.__name__: scope[rule.__name__] for rule in RULES})


Interval = Annotated[float, Range(1e-3, LONGEST_TIME)]
Predictor = Literal["constant", "moving_average", "linear_trend", "kalman"]
PREDICTORS = ("constant", "moving_average", "linear_trend", "kalman")
PoolName = Literal["prefill", "decode"]
POOLS = ("prefill", "decode")


def check_apart(planner: Declaration, low: str, high: str) -> None:
    """Refuse thresholds between which there is nothing.

    Raises
    ------
    ValueError
        When the low one isn't below the high one.
    """
    lower, higher = getattr(planner, low), getattr(planner, high)
    if not lower < higher:
        raise ValueError(f"{low} must be < {high}, got {low}={lower:g}, {high}={higher:g}")


class Planner(Declaration, frozen=True, kw_only=True, tag=True):
    """When workers are added to a fleet and taken away.

    Where prefill isn't kept apart there is one pool, named "decode".
    """

    code: ClassVar[int]  # of the rule

    def numbers(self) -> tuple[float, ...]:
        """What the rule needs, in the order of this file's numbers."""
        raise NotImplementedError

    def places(self, pool: PoolName, workers: int, gpus: int, other_gpus: int = 0) -> int:
        """As many workers of a pool as there may be at a time, draining ones not counted.

        Parameters
        ----------
        pool : "prefill" or "decode"
        workers : int
            Of the pool, when a run begins.
        gpus, other_gpus : int
            Of each worker of the pool, and of the other one; 0 if there is no other.

        Returns
        -------
        int
        """
        raise NotImplementedError

    def check_fleet(self, decode_gpus: int, prefill_gpus: int | None = None) -> None:
        """Refuse a fleet that the planner can't be of.

        Parameters
        ----------
        decode_gpus, prefill_gpus : int
            Of each worker of the pools; None if there is no pool for prefill.

        Raises
        ------
        ValueError
            When the minima of the pools need more GPUs than there are, or there is no pool of a name.
        """
        raise NotImplementedError


class Schedule(Planner, frozen=True, kw_only=True, tag=True):
    """Changes at times that are known.

    Parameters
    ----------
    changes : sequence of (float, str, int)
        When [s], which pool ("prefill" or "decode"), and how many workers it has from then on; in order of time.

    Raises
    ------
    ValueError
        When there is no change, one has a wrong value or takes the last worker, or they are out of order.
    """

    changes: tuple[tuple[float, str, int], ...]

    code = SCHEDULE

    def __post_init__(self) -> None:
        super().__post_init__()
        form = 'one or more of (seconds, "prefill" or "decode", workers)'
        if not isinstance(self.changes, list | tuple) or not self.changes:
            raise ValueError(f"changes must be {form}, got {shown(self.changes)}")
        changes: list[tuple[float, str, int]] = []
        for i, change in enumerate(self.changes):
            if not isinstance(change, list | tuple) or len(change) != 3:
                raise ValueError(f"changes must be {form}, got {shown(change)}")
            at, pool, workers = change
            at = check(f"time of changes[{i}]", at, (float,), Range(0, LONGEST_TIME))
            if pool not in POOLS:
                hint = suggestion(str(pool), POOLS)
                raise ValueError(f"pool of changes[{i}] must be one of {', '.join(POOLS)}, got {shown(pool)}{hint}")
            workers = check(f"workers of changes[{i}]", workers, (int,), Range(1, 2**16))
            if changes and at < changes[-1][0]:
                raise ValueError(f"changes must be in order of time, got {at:g} after {changes[-1][0]:g}")
            if any((at, pool) == other[:2] for other in changes):
                raise ValueError(f"changes must name a pool once at a time, got {pool} twice at {at:g}")
            changes.append((at, pool, workers))
        msgspec.structs.force_setattr(self, "changes", tuple(changes))

    def label(self) -> str:
        """Short text for coordinates and legends."""
        return f"{self.name}({len(self.changes)} changes)"

    def numbers(self) -> tuple[float, ...]:
        """As many changes as there are, so it's of any length."""
        changes = [(at, float(POOLS.index(pool)), float(workers)) for at, pool, workers in self.changes]
        return (0.0, 0.0, 1.0, 0.0, float(len(changes)), *(number for change in changes for number in change))

    def check_fleet(self, decode_gpus: int, prefill_gpus: int | None = None) -> None:
        if prefill_gpus is None and any(pool == "prefill" for _, pool, _ in self.changes):
            raise ValueError("changes must be of the pool decode, for the fleet has no other, got prefill")

    def places(self, pool: PoolName, workers: int, gpus: int, other_gpus: int = 0) -> int:
        return max([workers, *(to for _, name, to in self.changes if name == pool)])


class IntervalPlanner(Planner, frozen=True, kw_only=True, tag=True):
    """What planners have in common that look at the fleet again and again.

    None takes the last workers of a pool or exceeds the GPUs. While a worker starts nothing is changed, in any pool:
    Dynamo's connector ignores whatever is asked of a deployment that isn't ready (draining workers don't count).

    Parameters
    ----------
    interval : float
        Seconds from one decision to the next.
    min_workers : int
        Of each pool.
    max_gpus : int
        Of all workers that are ready or starting.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    interval: Interval = 30.0
    min_workers: Annotated[int, Range(1, 2**16)] = 1
    max_gpus: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fleet(1)

    def check_fleet(self, decode_gpus: int, prefill_gpus: int | None = None) -> None:
        needed = self.min_workers * (decode_gpus + (prefill_gpus or 0))
        if needed > self.max_gpus:
            raise ValueError(
                f"min_workers must fit into max_gpus, got min_workers={self.min_workers}, which takes {needed} GPUs, "
                f"max_gpus={self.max_gpus}"
            )

    def places(self, pool: PoolName, workers: int, gpus: int, other_gpus: int = 0) -> int:
        return max(workers, (self.max_gpus - self.min_workers * other_gpus) // gpus)

    @property
    def sampled(self) -> float:
        """Seconds from one sample to the next; 0 where there is none."""
        return 0.0

    def own_numbers(self) -> tuple[float, ...]:
        """What the rule needs besides what all have."""
        return ()

    def numbers(self) -> tuple[float, ...]:
        own = (self.interval, self.sampled, self.min_workers, self.max_gpus, *self.own_numbers())
        return tuple(map(float, own)) + (0.0,) * (NUMBERS - len(own))


class LoadPlanner(IntervalPlanner, frozen=True, kw_only=True, tag=True):
    """Thresholds on means over an interval (the load planner of Dynamo's first generation).

    At each sample it notes how many requests wait for prefill, and of each ready decode worker the share of its KV
    memory in use, each waiting request adding to it. At each tick the means decide, of all samples, and of all samples
    of all workers. A queue below `prefill_queue_low` takes a prefill worker, a KV use below `kv_low` a decode worker; a
    queue above `prefill_queue_high` adds a prefill worker, unless by its trend over the interval, last + 3 x (last -
    first), it will have gone; a KV use above `kv_high` adds a decode worker. With one pool only KV use counts.

    Nothing is noted while a worker starts, and nothing decided if other workers are ready than when the interval's
    first sample was taken: Dynamo's waits for a worker that it adds, and then begins a new interval.

    Parameters
    ----------
    sample_interval : float
        Seconds from one sample to the next; `interval` is a multiple of it.
    prefill_queue_low, prefill_queue_high : float
        Requests.
    kv_low, kv_high : float
        Share of the KV memory.
    kv_per_waiting : float
        What a waiting request adds to it.
    trend_intervals : int
        For how many intervals the queue's trend is assumed to go on.
    grace_intervals : int
        How many intervals after a decode worker was added one may be taken again.

    Raises
    ------
    ValueError
        When a field has a wrong value, or thresholds cross.

    Notes
    -----
    As in Dynamo's code the earliest decision to take a decode worker is the third after one was added; its
    documentation reads as if it were the fourth. Where it adds a waiting request's 0.02 only for workers with a running
    one, it is added here in any case.
    """

    sample_interval: Interval = 1.0
    prefill_queue_low: NonNegative = 0.2
    prefill_queue_high: NonNegative = 0.5
    kv_low: NonNegative = 0.5
    kv_high: NonNegative = 0.9
    kv_per_waiting: NonNegative = 0.02
    trend_intervals: Offset = 3
    grace_intervals: Offset = 3

    code = LOAD

    def __post_init__(self) -> None:
        super().__post_init__()
        check_apart(self, "prefill_queue_low", "prefill_queue_high")
        check_apart(self, "kv_low", "kv_high")
        times = self.interval / self.sample_interval
        if round(times) < 1 or abs(times - round(times)) > SLACK * times:
            raise ValueError(
                f"interval must be a multiple of sample_interval, got interval={self.interval:g}, "
                f"sample_interval={self.sample_interval:g}"
            )

    @classmethod
    def later(cls, **fields: Any) -> Self:
        """With the defaults of later releases of the first generation: slower, and a queue of 5 before more prefill.

        Parameters
        ----------
        **fields
            Others than these defaults.

        Returns
        -------
        LoadPlanner
        """
        return cls(**{"interval": 180.0, "sample_interval": 10.0, "prefill_queue_high": 5.0} | fields)

    @property
    def sampled(self) -> float:
        return self.sample_interval

    def own_numbers(self) -> tuple[float, ...]:
        return (
            *(self.prefill_queue_low, self.prefill_queue_high, self.kv_low, self.kv_high, self.kv_per_waiting),
            *(self.trend_intervals, self.grace_intervals),
        )


class SLAPlanner(IntervalPlanner, frozen=True, kw_only=True, tag=True):
    """As many workers as the predicted load needs within the SLA (Dynamo's planner by throughput).

    At each tick the requests of the next interval and their mean prompt and output are predicted from those of the past
    ones. Prefill workers = ceil(prompt tokens a second / throughput), of a worker that computes one prompt at a time;
    decode workers = ceil(output tokens a second / throughput), of a worker with as many requests as the profile has
    within the ITL, their context being the prompt and half the output. A pool that does both needs the sum. If there
    aren't GPUs enough both get their share, rounded down, prefill first.

    With `correction`, observed / expected counts: expected are the TTFT of a lone prompt of the observed length, and
    the ITL of the observed concurrency (by Little's law). The prefill's load is multiplied by the former where it's
    below 1 (cached prompts; queues are what more workers cure), the ITL is divided by the latter.

    Parameters
    ----------
    profile : LinearStepTime
        How long a worker's steps take, as measured beforehand.
    decode_profile : LinearStepTime, optional
        That of workers that decode; unless given as the other.
    max_batch_size : int
        Requests that decode in a worker, at most.
    kv_tokens : float
        Tokens in a worker's KV memory.
    max_num_batched_tokens : int
        Prompt tokens of a step.
    itl : float
        Limit of the time between tokens [s].
    predictor : str
        "constant" (as in the last interval), "moving_average", "linear_trend" (least squares, one interval on) or
        "kalman" (a level and its trend).
    window : int
        Intervals of the moving average and of the linear trend.
    level_noise, trend_noise, observation_noise : float
        Of the Kalman filter: variances that the level and the trend gain in an interval, and that of what is observed.
    correction : bool
        Whether observed / expected counts; it does in the first generation, not in the second.

    Raises
    ------
    ValueError
        When a field has a wrong value.

    Notes
    -----
    Nothing is decided before the first request; an interval without one counts with 0 requests of the last lengths, as
    in the second generation (the first decides nothing then). Dynamo interpolates measured throughputs in the first
    generation; a line for each kind of step, as here, is what it fits in the second. It has ARIMA and Prophet besides;
    they are its defaults, and predict the last value until they have five.
    """

    interval: Interval = 180.0
    profile: LinearStepTime
    decode_profile: LinearStepTime | None = None
    max_batch_size: Count = 256
    kv_tokens: Annotated[float, Range(1, infinity_allowed=True)] = math.inf
    max_num_batched_tokens: Annotated[int, Range(1, 1e9)] = 2048
    itl: Positive = 0.05
    predictor: Predictor = "constant"
    window: Annotated[int, Range(1, MOST_WINDOW)] = 5
    level_noise: NonNegative = 1.0
    trend_noise: NonNegative = 0.1
    observation_noise: Positive = 10.0
    correction: bool = True

    code = SLA

    def own_numbers(self) -> tuple[float, ...]:
        prefill, decode = self.profile, self.decode_profile or self.profile
        return (
            *(0.0, self.itl, self.correction, PREDICTORS.index(self.predictor), self.window),
            *(self.level_noise, self.trend_noise, self.observation_noise),
            *(prefill.base + prefill.per_request + prefill.per_prefill_step, prefill.per_prefill_token),
            *(prefill.per_prefill_attention, self.max_num_batched_tokens),
            *(decode.base, decode.per_request + decode.per_decode_request, decode.per_context_token),
            *(self.max_batch_size, self.kv_tokens),
        )


class FlooredPlanner(IntervalPlanner, frozen=True, kw_only=True, tag=True):
    """What planners by load have in common: a floor that another planner sets, by the load that it predicts.

    Parameters
    ----------
    floor : SLAPlanner, optional
        At the first tick after each of its intervals it says how many workers each pool has at least from then on; a
        pool that has fewer is brought there at that tick, as far as there are GPUs and none starts. Before that, and
        without one, `min_workers` counts.

    Raises
    ------
    ValueError
        When a field has a wrong value, or the floor looks more often than the planner or has more GPUs.

    Notes
    -----
    Dynamo's second generation has such a floor where both kinds of scaling are on: each 180 s unless told otherwise,
    without `correction`. In its earlier releases it counts from the planner's next tick on.
    """

    floor: SLAPlanner | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor is None:
            return
        if self.floor.interval < self.interval:
            raise ValueError(
                f"floor.interval must be >= interval, got floor.interval={self.floor.interval:g}, "
                f"interval={self.interval:g}"
            )
        if self.floor.max_gpus > self.max_gpus:
            raise ValueError(
                f"floor.max_gpus must be <= max_gpus, got floor.max_gpus={self.floor.max_gpus}, "
                f"max_gpus={self.max_gpus}"
            )

    def check_fleet(self, decode_gpus: int, prefill_gpus: int | None = None) -> None:
        super().check_fleet(decode_gpus, prefill_gpus)
        if self.floor is not None:
            try:
                self.floor.check_fleet(decode_gpus, prefill_gpus)
            except ValueError as error:
                raise ValueError(f"floor: {error}") from None

    def numbers(self) -> tuple[float, ...]:
        return super().numbers() + (() if self.floor is None else self.floor.numbers())


class ThroughputPlanner(FlooredPlanner, frozen=True, kw_only=True, tag=True):
    """Thresholds on what waits now (the default of Dynamo's second generation).

    One more prefill worker if any has `queue_high` x the context length or more prompt tokens in its queue, one less if
    all have less than `queue_low` x it, or none. One more decode worker if any has more than `kv_high` of its KV
    memory in use or waited for, one less if all have less than `kv_low`. With one pool only KV memory counts.

    Parameters
    ----------
    queue_low, queue_high : float
        Prompt tokens in a worker's queue / context length; a queue for all counts in equal shares. Without a
        `max_model_len` nothing is decided.
    kv_low, kv_high : float
        Share of the KV memory.

    Raises
    ------
    ValueError
        When a field has a wrong value, or thresholds cross.

    Notes
    -----
    With all GPUs in use Dynamo shrinks both pools in proportion, so that a pool that wants one more can take one from
    the other; later releases don't any more, nor does this.
    """

    interval: Interval = 5.0
    queue_low: NonNegative = 0.1
    queue_high: NonNegative = 1.0
    kv_low: NonNegative = 0.6
    kv_high: NonNegative = 1.0

    code = THROUGHPUT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_apart(self, "queue_low", "queue_high")
        check_apart(self, "kv_low", "kv_high")

    @classmethod
    def latency(cls, **fields: Any) -> Self:
        """With the thresholds of Dynamo's target "latency": more workers sooner, and fewer only when little is done.

        Parameters
        ----------
        **fields
            Others than these defaults.

        Returns
        -------
        ThroughputPlanner
        """
        return cls(**{"queue_low": 0.0, "queue_high": 0.1, "kv_low": 0.1, "kv_high": 0.4} | fields)

    def own_numbers(self) -> tuple[float, ...]:
        return self.queue_low, self.queue_high, self.kv_low, self.kv_high


class ReactivePlanner(FlooredPlanner, frozen=True, kw_only=True, tag=True):
    """Latencies that each worker is predicted to have (Dynamo's second generation, target "sla", scaling by load).

    One more prefill worker if the next request's TTFT would exceed `ttft` at all of them, one more decode worker if the
    next step's ITL would exceed `itl` at all. One of N less if the others could take its load: what a TTFT has of
    waiting, x N / (N - 1), would be below `down_share` x what the limit leaves for it; an ITL, with what it has of load
    x N / (N - 1), below `down_share` x the limit, and KV memory in use and waited for, x N / (N - 1), below all there
    is; each at all workers. A pool that does both gets one more for either reason, one less for both. A worker that has
    nothing to do could take any load.

    Parameters
    ----------
    ttft, itl : float
        Limits [s].
    down_share : float
        Of what is allowed, that may be used after a worker has gone.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    interval: Interval = 5.0
    ttft: Annotated[float, Range(0, LONGEST_TIME, low_allowed=False)] = 0.5
    itl: Annotated[float, Range(0, LONGEST_TIME, low_allowed=False)] = 0.05
    down_share: Annotated[float, Range(0, 1)] = 0.8

    code = REACTIVE

    def own_numbers(self) -> tuple[float, ...]:
        return self.ttft, self.itl, self.down_share


class CustomPlanner(IntervalPlanner, frozen=True, kw_only=True, tag=True):
    """A rule of the user's own.

    Parameters
    ----------
    rule : function
        Compiled with `numba.njit`. Gets what a planner is told (`PlannerView`) and an array for its own notes
        (`MEMORY` float64s, 0 at first), and returns two whole numbers: workers to add to the prefill and to the decode
        pool, negative to take away. They are kept within `min_workers` and `max_gpus`. Asked while workers start, too.
        Text of the form "module:name" names one to be imported; so it is written in TOML.

    Raises
    ------
    ValueError
        When the function isn't compiled, can't be, or doesn't return two whole numbers.
    """

    rule: Any

    code = CUSTOM

    def __post_init__(self) -> None:
        super().__post_init__()
        msgspec.structs.force_setattr(self, "rule", compiled_rule(self.rule, "planner"))

    @classmethod
    def standing_for(cls, value: Any) -> Self | None:
        return cls(rule=value) if stands_for(value) else None

    @property
    def name(self) -> str:
        return name_of(self.rule)


AnyPlanner = Schedule | LoadPlanner | SLAPlanner | ThroughputPlanner | ReactivePlanner | CustomPlanner

# In the order of their codes
PLANNERS = (Schedule, LoadPlanner, SLAPlanner, ThroughputPlanner, ReactivePlanner, CustomPlanner)
