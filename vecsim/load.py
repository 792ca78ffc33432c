"""Load generators: when requests arrive and how long they are. Declaration and rule side by side."""

from typing import Annotated, Any, ClassVar

from vecsim.declaration import Count, Declaration, NonNegative, Number, Offset, Positive, Range, Seed, Time
from vecsim.lengths import AnyDistribution, Constant, Distribution, Normal

# Codes of the rule `arrival_time`, and of the closed loop
AT_ONCE, EVENLY, RENEWAL, CLOSED = range(4)

UP = 0.6 * 2.0**-52


class LoadGenerator(Declaration, frozen=True, kw_only=True, tag_field="type"):
    """Base of all load generators of the tick model.

    Parameters
    ----------
    prefill_time : float
        Time that the prefill of one prompt takes [ticks].
    itl : float
        Time that the decode of one token takes [ticks].
    total_prefill_chunks : int
        Steps over which a prefill is spread; above 1 this is "chunked context".
    output_tokens : int or distribution, optional
        Output length [tokens]: a number, `Constant`, `Normal`, `Uniform`, `LogNormal` or `Empirical`.
    target_output_len_tokens, target_output_len_std : float, optional
        Shorthand for `output_tokens=Normal(mean, std)`; 4 and 0 unless given.
    seed : int
        The same seed gives the same requests, whatever else differs.
    stream_offset : int
        Draws of the seed's stream of lengths that are passed over: the first request gets the next one. So a run goes
        on where another one stopped.

    Raises
    ------
    ValueError
        When a field is out of its range, or a length is given both ways.
    """

    prefill_time: Time = 2.0
    itl: Time = 1.0
    total_prefill_chunks: Count = 1
    output_tokens: AnyDistribution | Number | None = None
    target_output_len_tokens: NonNegative | None = None
    target_output_len_std: NonNegative | None = None
    seed: Seed = 0
    stream_offset: Offset = 0

    arrivals: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_tokens is None:
            return
        for name in ("target_output_len_tokens", "target_output_len_std"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must be left out where output_tokens is given, got {getattr(self, name)!r}")

    @property
    def output_length(self) -> Distribution:
        """The distribution of output lengths, however it was declared."""
        if self.output_tokens is None:
            mean, std = self.target_output_len_tokens, self.target_output_len_std
            return Normal(mean=4.0 if mean is None else mean, std=0.0 if std is None else std)
        if isinstance(self.output_tokens, Distribution):
            return self.output_tokens
        return Constant(value=self.output_tokens)

    def arrival_parameters(self) -> dict[str, Any]:
        """Columns of the scenario table that describe the arrivals."""
        raise NotImplementedError


class BatchLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """All requests at once, at time 0.

    Parameters
    ----------
    initial_batch : int
        Number of requests.
    """

    initial_batch: Number = 3

    arrivals = AT_ONCE

    def arrival_parameters(self) -> dict[str, Any]:
        return {"requests": self.initial_batch}


class ConcurrentLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """A closed loop: at each boundary, as many new requests as have left since the last.

    Parameters
    ----------
    target_concurrency : int
        Requests in the system (running and queued) after each boundary.
    """

    target_concurrency: Number = 3

    arrivals = CLOSED

    def arrival_parameters(self) -> dict[str, Any]:
        return {"requests": self.target_concurrency}


class RequestRateLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """Evenly spaced arrivals: the i-th request is due at i / request_rate.

    Parameters
    ----------
    request_rate : float
        Requests per tick.
    """

    request_rate: Positive = 1.0

    arrivals = EVENLY

    def arrival_parameters(self) -> dict[str, Any]:
        return {"request_rate": self.request_rate}


class PoissonLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """Poisson arrivals: independent exponential gaps.

    Parameters
    ----------
    request_rate : float
        Mean requests per tick.
    """

    request_rate: Positive = 1.0

    arrivals = RENEWAL

    def arrival_parameters(self) -> dict[str, Any]:
        return {"request_rate": self.request_rate, "shape": 1.0}


class GammaLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """Independent gamma gaps: burstier than Poisson above a coefficient of variation of 1, smoother below.

    Parameters
    ----------
    request_rate : float
        Mean requests per tick.
    coefficient_of_variation : float
        Standard deviation of the gaps over their mean; 1 is Poisson's law.

    Notes
    -----
    The gaps' shape is 1 / cv^2 and their mean 1 / request_rate.
    """

    request_rate: Positive = 1.0
    coefficient_of_variation: Annotated[float, Range(1e-3, 1e3)] = 1.0

    arrivals = RENEWAL

    def arrival_parameters(self) -> dict[str, Any]:
        return {"request_rate": self.request_rate, "shape": self.coefficient_of_variation**-2.0}


AnyLoadGenerator = (
    BatchLoadGenerator | ConcurrentLoadGenerator | RequestRateLoadGenerator | PoissonLoadGenerator | GammaLoadGenerator
)


def arrival_time(code, request_rate, i, unit):
    """Rule: when request i = 0, 1, ... of an open load is due [ticks].

    `unit` is the i-th instant of a renewal process of rate 1. An evenly spaced request is due at the first
    float64 t with `t // (1 / request_rate) >= i + 1`: the exact product (i + 1) x (1 / request_rate) rounded
    up. Dekker's product gives the rounding error exactly.
    """
    if code == AT_ONCE:
        return 0.0
    if code == RENEWAL:
        return unit / request_rate
    gap = 1.0 / request_rate
    count = i + 1.0
    product = count * gap
    split = 134217729.0 * gap  # 2**27 + 1
    gap_high = split - (split - gap)
    gap_low = gap - gap_high
    split = 134217729.0 * count
    count_high = split - (split - count)
    count_low = count - count_high
    error = ((count_high * gap_high - product) + count_high * gap_low + count_low * gap_high) + (count_low * gap_low)
    # Adding 0.6 to 1.2 units in the last place gives the next float64, without a branch that can't be foreseen.
    return product + product * (UP if error > 0.0 else 0.0)
