"""Time that passes outside the engine's steps."""

from vecsim.declaration import Declaration, Time


class Overheads(Declaration, frozen=True, kw_only=True):
    """Seconds that a server adds around its engine; each 0 unless given.

    Parameters
    ----------
    before_queue : float
        From a request's arrival until it can be queued (HTTP, tokenising).
    per_step : float
        For each step, beside its `step_time`.
    per_output_token : float
        For each output token (detokenising, streaming): the i-th is seen i times this after the end of its step. The
        engine isn't slowed.
    at_completion : float
        From the last token until the completion is seen.
    """

    before_queue: Time = 0.0
    per_step: Time = 0.0
    per_output_token: Time = 0.0
    at_completion: Time = 0.0
