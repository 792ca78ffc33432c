"""How long a step of the token model takes, from what it does. O(1), but for tables that aren't even: O(log places)."""

import math

import numpy as np

from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.state import StepBatch
from vecsim.step_time import AXES, LINEAR, LOOKUPS, POLYNOMIAL, TABLE

# Fields of a table's term, twice those of an axis: which (-1: none), how it is looked up, its places, where they begin
# in `grids`, the first one, and the step between them (0: they aren't even); then where its values begin, and a factor
# for more than one request
AXIS, LOOKUP, SIZE, GRID, FIRST, STEP = range(0, 12, 2)
VALUES_AT, FACTOR, FIELDS = range(12, 15)

(
    TOKENS, REQUESTS, PREFILL_TOKENS, PREFILL_REQUESTS, PREFILL_CONTEXT, PREFILL_CHUNK, DECODE_REQUESTS, DECODE_CONTEXT,
    MEAN_DECODE_CONTEXT,
) = range(len(AXES))  # fmt: skip
_INTERPOLATED, UP, NEAREST = range(len(LOOKUPS))


@bare
def look_up(terms, grids, term, other, x):
    """(place, weight of the next place) of a value on one axis of a term; outside [0, 1] it extrapolates."""
    begin = int(terms[term, GRID + other])
    size = int(terms[term, SIZE + other])
    step = terms[term, STEP + other]
    if step > 0.0:
        low = int(min(max(math.floor((x - terms[term, FIRST + other]) / step), 0.0), size - 2.0))
    else:
        low, high = 0, size - 1
        while high - low > 1:
            middle = (low + high) // 2
            if grids[unsigned(begin + middle)] <= x:
                low = middle
            else:
                high = middle
    left, right = grids[unsigned(begin + low)], grids[unsigned(begin + low + 1)]
    weight = (x - left) / (right - left)
    if 0.0 <= weight <= 1.0:
        if terms[term, LOOKUP + other] == UP:
            weight = math.ceil(weight)
        elif terms[term, LOOKUP + other] == NEAREST:
            weight = 1.0 if weight > 0.5 else 0.0
    return low, weight


@inlined
def aggregate(axis, prefill_requests, prefill_tokens, squares, prefill_context, decode_requests, decode_context):
    """What an axis of a table is about."""
    if axis == TOKENS:
        return float(prefill_tokens + decode_requests)
    if axis == REQUESTS:
        return float(prefill_requests + decode_requests)
    if axis == PREFILL_TOKENS:
        return float(prefill_tokens)
    if axis == PREFILL_REQUESTS:
        return float(prefill_requests)
    if axis == PREFILL_CONTEXT:
        return float(prefill_context)
    if axis == PREFILL_CHUNK:
        return math.sqrt(squares)
    if axis == DECODE_REQUESTS:
        return float(decode_requests)
    if axis == DECODE_CONTEXT:
        return float(decode_context)
    return float(decode_context // max(decode_requests, 1))


@bare
def from_tables(
    terms, grids, values, outside, prefill_requests, prefill_tokens, squares, prefill_context, decode_requests,
    decode_context,
):  # fmt: skip
    """The sum of a table's terms; notes in `outside` that it had to extrapolate."""
    total = 0.0
    for term in range(terms.shape[0]):
        axis = int(terms[term, AXIS])
        concerned = prefill_requests + decode_requests
        if PREFILL_TOKENS <= axis <= PREFILL_CHUNK:
            concerned = prefill_requests
        elif axis >= DECODE_REQUESTS:
            concerned = decode_requests
        if concerned == 0:
            continue
        begin = int(terms[term, VALUES_AT])
        x = aggregate(axis, prefill_requests, prefill_tokens, squares, prefill_context, decode_requests, decode_context)
        place, weight = look_up(terms, grids, term, 0, x)
        is_outside = weight < 0.0 or weight > 1.0
        if terms[term, AXIS + 1] < 0:
            low, high = values[unsigned(begin + place)], values[unsigned(begin + place + 1)]
            seconds = low + (high - low) * weight if weight != 1.0 else high
        else:
            x = aggregate(
                int(terms[term, AXIS + 1]), prefill_requests, prefill_tokens, squares, prefill_context, decode_requests,
                decode_context,
            )  # fmt: skip
            other, other_weight = look_up(terms, grids, term, 1, x)
            is_outside |= other_weight < 0.0 or other_weight > 1.0
            width = int(terms[term, SIZE + 1])
            seconds = 0.0
            for i in range(2):
                share = weight if i == 1 else 1.0 - weight
                if share == 0.0:
                    continue
                at = begin + (place + i) * width + other
                low, high = values[unsigned(at)], values[unsigned(at + 1)]
                seconds += share * (low + (high - low) * other_weight if other_weight != 1.0 else high)
        if is_outside:
            outside[0] += 1
        total += max(seconds, 0.0) * (terms[term, FACTOR] if concerned > 1 else 1.0)
    return total


@inlined
def by_formula(
    model, prefill_requests, prefill_tokens, attention, squares, prefill_context, decode_requests, decode_context, own
):  # fmt: skip
    """Seconds that a step takes where they come from a formula."""
    if model.code == LINEAR:
        seconds = (
            model.a
            + model.b * (prefill_requests + decode_requests)
            + model.c * prefill_tokens
            + model.d * decode_requests
            + model.e * decode_context
            + model.f * attention
            + (model.g if prefill_requests > 0 else 0.0)
        )
    else:
        seconds = 0.0
        if prefill_requests > 0:
            n = float(prefill_requests * (prefill_tokens // prefill_requests))
            seconds = (model.a * n + model.b) * n + model.c
        if decode_requests > 0:
            u = min(1.0, decode_context / model.kv_tokens)
            seconds += max(model.g, (model.d * u + model.e) * u + model.f)
    return seconds + model.per_step


@bare
def by_call(
    model, prefill_requests, prefill_tokens, attention, squares, prefill_context, decode_requests, decode_context, own
):  # fmt: skip
    """Seconds that a step takes where they come from tables, or from a rule of the user's own."""
    if model.code == TABLE:
        seconds = from_tables(
            model.terms, model.grids, model.values, model.outside, prefill_requests, prefill_tokens, squares,
            prefill_context, decode_requests, decode_context,
        )  # fmt: skip
    else:
        seconds = np.float64(
            own(
                StepBatch(
                    whole(prefill_requests),
                    whole(prefill_tokens),
                    attention,
                    squares,
                    whole(prefill_context),
                    whole(decode_requests),
                    whole(decode_context),
                    model.kv_tokens,
                    model.a,
                )
            )
        )
    return seconds + model.per_step


@inlined
def duration(
    model, prefill_requests, prefill_tokens, attention, squares, prefill_context, decode_requests, decode_context, own
):  # fmt: skip
    """Seconds that a step takes; `own` is a rule of the user's own."""
    if model.code in (LINEAR, POLYNOMIAL):
        return by_formula(
            model,
            prefill_requests,
            prefill_tokens,
            attention,
            squares,
            prefill_context,
            decode_requests,
            decode_context,
            own,
        )
    return by_call(
        model,
        prefill_requests,
        prefill_tokens,
        attention,
        squares,
        prefill_context,
        decode_requests,
        decode_context,
        own,
    )
