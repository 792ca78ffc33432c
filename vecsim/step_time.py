"""Step-time models: how long a step takes, from what the batch does. Declaration and rule side by side."""

from vecsim.declaration import Declaration


class StepTime(Declaration, frozen=True, kw_only=True, tag_field="type"):
    """Base of all step-time models."""


class TickStepTime(StepTime, frozen=True, kw_only=True, tag=True):
    """The tick model: a step lasts as long as its prefill chunks or its decode, and at least one tick."""

    @staticmethod
    def duration(prefill_time, decode_time):
        """Duration [ticks] from the summed time of the step's chunks and the time of its decode (0 if none).

        The sum adds equal terms one by one, as the reference does: n chunks take S[n] = S[n - 1] + chunk,
        which differs from n x chunk in the last bit.
        """
        return max(prefill_time, decode_time, 1.0)


TICK, LINEAR, POLYNOMIAL, TABLE, OWN = range(5)


def duration(
    model, prefill_requests, prefill_tokens, attention, squares, prefill_context, decode_requests, decode_context, own
):
    """Rule: how long a step takes [s], from what it does. O(1)."""
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
    elif model.code == POLYNOMIAL:
        seconds = 0.0
        if prefill_requests > 0:
            n = float(prefill_requests * (prefill_tokens // prefill_requests))
            seconds = (model.a * n + model.b) * n + model.c
        if decode_requests > 0:
            u = min(1.0, decode_context / model.kv_tokens)
            seconds += max(model.g, (model.d * u + model.e) * u + model.f)
    else:
        seconds = 0.0
    return seconds + model.per_step


AnyStepTime = TickStepTime
