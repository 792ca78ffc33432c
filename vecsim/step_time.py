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


AnyStepTime = TickStepTime
