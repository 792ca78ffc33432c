"""How long a step of the token model takes, from what it does. O(1), but for tables that aren't even: O(log places)."""

import math

from vecsim.kernel import roofline as roofline_rule
from vecsim.kernel.address import call_step_time
from vecsim.kernel.jit import bare, inlined, unsigned, whole
from vecsim.kernel.state import StepBatch
from vecsim.step_time import AXES, LINEAR, LOOKUPS, POLYNOMIAL, ROOFLINE, TABLE

# Fields of a table's term, twice those of an axis: which (-1: none), how it is looked up, its places, where they begin
# in `grids`, the first one, and the step between them (0: they aren't even); then where its values begin, and a factor
# for more than one request
AXIS, LOOKUP, SIZE, GRID, FIRST, STEP = range(0, 12, 2)
VALUES_AT, FACTOR = 12, 13

# Numbers of a row of terms: a table's, or the sixteen of a roofline
FIELDS = 16

(
    TOKENS, REQUESTS, PREFILL_TOKENS, PREFILL_REQUESTS, PREFILL_CONTEXT, PREFILL_CHUNK, DECODE_REQUESTS, DECODE_CONTEXT,
    MEAN_DECODE_CONTEXT,
) = range(len(AXES))  # fmt: skip
_INTERPOLATED, UP, NEAREST = range(len(LOOKUPS))

roofline = bare(roofline_rule.seconds)


@bare
def look_up(terms, grids, term, other, x):
    """(place, weight of the next place) of a value on one axis of a term; outside [0, 1] it extrapolates."""
    step = terms[term, STEP + other]
    if step > 0.0:
        places = x - terms[term, FIRST + other]
        if step != 1.0:
            places /= step
        low = int(min(max(places, 0.0), terms[term, SIZE + other] - 2.0))
        weight = places - low
    else:
        begin = int(terms[term, GRID + other])
        low, high = 0, int(terms[term, SIZE + other]) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if grids[unsigned(begin + middle)] <= x:
                low = middle
            else:
                high = middle
        left, right = grids[unsigned(begin + low)], grids[unsigned(begin + low + 1)]
        weight = (x - left) / (right - left)
    if 0.0 < weight < 1.0:
        if terms[term, LOOKUP + other] == UP:
            weight = 1.0
        elif terms[term, LOOKUP + other] == NEAREST:
            weight = 1.0 if weight > 0.5 else 0.0
    return low, weight


@inlined
def step_of(
    formula, prefill_requests, prefill_tokens, attention, squares, prefill_context, decode_requests, decode_context
):
    """What a step does, as a `StepBatch`."""
    return StepBatch(
        whole(prefill_requests),
        whole(prefill_tokens),
        attention,
        squares,
        whole(prefill_context),
        whole(decode_requests),
        whole(decode_context),
        formula.kv_tokens,
        formula.a,
    )


@inlined
def decodes_of(formula, decoding, context):
    """A step of decodes alone."""
    return step_of(formula, 0, 0, 0.0, 0.0, 0, decoding, context)


@inlined
def aggregate(axis, step):
    """What an axis of a table is about."""
    if axis == TOKENS:
        return float(step.prefill_tokens + step.decode_requests)
    if axis == REQUESTS:
        return float(step.prefill_requests + step.decode_requests)
    if axis == PREFILL_TOKENS:
        return float(step.prefill_tokens)
    if axis == PREFILL_REQUESTS:
        return float(step.prefill_requests)
    if axis == PREFILL_CONTEXT:
        return float(step.prefill_context)
    if axis == PREFILL_CHUNK:
        return math.sqrt(step.prefill_squares)
    if axis == DECODE_REQUESTS:
        return float(step.decode_requests)
    if axis == DECODE_CONTEXT:
        return float(step.decode_context)
    return float(step.decode_context // max(step.decode_requests, 1))


@bare
def from_tables(terms, grids, values, outside, step):
    """The sum of a table's terms; notes in `outside` that it had to extrapolate."""
    total = 0.0
    for term in range(terms.shape[0]):
        axis = int(terms[term, AXIS])
        concerned = step.prefill_requests + step.decode_requests
        if PREFILL_TOKENS <= axis <= PREFILL_CHUNK:
            concerned = step.prefill_requests
        elif axis >= DECODE_REQUESTS:
            concerned = step.decode_requests
        if concerned == 0:
            continue
        begin = int(terms[term, VALUES_AT])
        place, weight = look_up(terms, grids, term, 0, aggregate(axis, step))
        is_outside = weight < 0.0 or weight > 1.0
        if terms[term, AXIS + 1] < 0:
            low, high = values[unsigned(begin + place)], values[unsigned(begin + place + 1)]
            seconds = low + (high - low) * weight if weight != 1.0 else high
        else:
            x = aggregate(int(terms[term, AXIS + 1]), step)
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
def by_formula(formula, step):
    """Seconds that a step takes where they come from a formula."""
    if formula.code == LINEAR:
        seconds = (
            formula.a
            + formula.b * (step.prefill_requests + step.decode_requests)
            + formula.c * step.prefill_tokens
            + formula.d * step.decode_requests
            + formula.e * step.decode_context
            + formula.f * step.prefill_attention
            + (formula.g if step.prefill_requests > 0 else 0.0)
        )
    else:
        seconds = 0.0
        if step.prefill_requests > 0:
            tokens = step.prefill_tokens
            if step.prefill_requests > 1:
                tokens = step.prefill_requests * (tokens // step.prefill_requests)
            n = float(tokens)
            seconds = (formula.a * n + formula.b) * n + formula.c
        if step.decode_requests > 0:
            u = min(1.0, step.decode_context / formula.kv_tokens)
            seconds += max(formula.g, (formula.d * u + formula.e) * u + formula.f)
    return seconds + formula.per_step


@inlined
def of_decodes(formula, decoding, context):
    """The same of a step of decodes alone, to the bit: without the terms that are 0."""
    if formula.code == LINEAR:
        seconds = formula.a + formula.b * decoding + formula.d * decoding + formula.e * context
    else:
        u = min(1.0, context / formula.kv_tokens)
        seconds = max(formula.g, (formula.d * u + formula.e) * u + formula.f)
    return seconds + formula.per_step


@bare
def by_call(model, step, own):
    """Seconds that a step takes where they come from tables, a roofline, or a rule of the user's own."""
    if model.formula.code == TABLE:
        seconds = from_tables(model.terms, model.grids, model.values, model.outside, step)
    elif model.formula.code == ROOFLINE:
        n = model.terms
        numbers = (
            n[0, 0], n[0, 1], n[0, 2], n[0, 3], n[0, 4], n[0, 5], n[0, 6], n[0, 7], n[0, 8], n[0, 9], n[0, 10],
            n[0, 11], n[0, 12], n[0, 13], n[0, 14], n[0, 15],
        )  # fmt: skip
        seconds = roofline(
            numbers, step.prefill_requests, step.prefill_tokens, step.prefill_attention, step.prefill_context,
            step.decode_requests, step.decode_context,
        )  # fmt: skip
    else:
        seconds = call_step_time(own, (step,))
    return seconds + model.formula.per_step


@inlined
def is_formula(formula):
    """Whether seconds come from a formula."""
    return formula.code in (LINEAR, POLYNOMIAL)


@inlined
def duration(model, step, own):
    """Seconds that a step takes; `own` is a rule of the user's own."""
    if is_formula(model.formula):
        return by_formula(model.formula, step)
    return by_call(model, step, own)
