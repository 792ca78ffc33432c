"""Output-length distributions: declaration and rule side by side."""

import functools
import itertools
import math
from typing import Annotated

import msgspec

from vecsim.declaration import Declaration, NonNegative, Number, Range, shown
from vecsim.kernel.state import NO_DRAWS, NORMAL_DRAWS, UNIFORM_DRAWS

# Codes of the rule `output_tokens`, and the numbers that each is made from
CONSTANT, NORMAL, UNIFORM, LOGNORMAL, EMPIRICAL, CHOICE, SEQUENCE = range(7)
DRAWS = (NO_DRAWS, NORMAL_DRAWS, UNIFORM_DRAWS, NORMAL_DRAWS, UNIFORM_DRAWS, UNIFORM_DRAWS, NO_DRAWS)

# Cumulative probabilities in tables are whole numbers out of this.
CERTAIN = 2**53

MOST_TOKENS = 2**30


class Distribution(Declaration, frozen=True, kw_only=True, tag_field="type"):
    """Base of all length distributions: whole tokens, at least 1."""

    def parameters(self) -> tuple[int, float, float, tuple[int, ...]]:
        """(code, first parameter, second parameter, table of values) for the rule."""
        raise NotImplementedError

    def expected(self) -> float:
        """About the mean length [tokens]; for sizing arrays."""
        raise NotImplementedError


class Constant(Distribution, frozen=True, kw_only=True, tag=True):
    """Every request has the same length.

    Parameters
    ----------
    value : int
        Length [tokens].
    """

    value: Number

    def parameters(self) -> tuple[int, float, float, tuple[int, ...]]:
        return CONSTANT, self.value, 0.0, ()

    def expected(self) -> float:
        return self.value


class Normal(Distribution, frozen=True, kw_only=True, tag=True):
    """`int(max(x, 1))` with x normal, from NumPy's legacy stream `RandomState(seed).normal(mean, std)`.

    Parameters
    ----------
    mean : float
        Mean of the normal [tokens]. The cut at 1 lifts the mean length above it where `std` is large.
    std : float
        Standard deviation of the normal [tokens].
    """

    mean: NonNegative
    std: NonNegative = 0.0

    def parameters(self) -> tuple[int, float, float, tuple[int, ...]]:
        return NORMAL, self.mean, self.std, ()

    def expected(self) -> float:
        return max(self.mean + 0.1 * self.std, 1.0)


class Uniform(Distribution, frozen=True, kw_only=True, tag=True):
    """Every whole length from `low` to `high`, both included, equally likely.

    Parameters
    ----------
    low, high : int
        Shortest and longest length [tokens].
    """

    low: Number
    high: Number

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(f"low must be <= high, got low={self.low}, high={self.high}")

    def parameters(self) -> tuple[int, float, float, tuple[int, ...]]:
        return UNIFORM, self.low, self.high, ()

    def expected(self) -> float:
        return (self.low + self.high) / 2


class LogNormal(Distribution, frozen=True, kw_only=True, tag=True):
    """`int(max(x, 1))` with x lognormal, given by the mean and standard deviation of x itself.

    Parameters
    ----------
    mean : float
        Mean of x [tokens].
    std : float
        Standard deviation of x [tokens].

    Notes
    -----
    log x is normal with variance s^2 = log(1 + std^2 / mean^2) and mean log(mean) - s^2 / 2.
    """

    mean: Annotated[float, Range(0, MOST_TOKENS, low_allowed=False)]
    std: NonNegative

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std > 1e6 * self.mean:
            raise ValueError(f"std must be <= 1e6 x mean, got std={self.std:g}, mean={self.mean:g}")

    def parameters(self) -> tuple[int, float, float, tuple[int, ...]]:
        variance = math.log1p((self.std / self.mean) ** 2)
        return LOGNORMAL, math.log(self.mean) - variance / 2, math.sqrt(variance), ()

    def expected(self) -> float:
        return max(self.mean, 1.0)


class Empirical(Distribution, frozen=True, kw_only=True, tag=True):
    """Lengths drawn from measured ones, each equally likely.

    Parameters
    ----------
    values : sequence of int
        Measured lengths [tokens].
    """

    values: tuple[Annotated[int, Range(1, MOST_TOKENS)], ...]

    def __post_init__(self) -> None:
        try:
            values = tuple(int(value) for value in self.values)
            whole = all(value == given for value, given in zip(values, self.values, strict=True))
        except (TypeError, ValueError, OverflowError):
            whole = False
        if not whole or not values or min(values) < 1 or max(values) > MOST_TOKENS:
            raise ValueError(
                f"values must be one or more whole numbers >= 1 and <= {MOST_TOKENS}, got {shown(self.values)}"
            )
        msgspec.structs.force_setattr(self, "values", values)

    def parameters(self) -> tuple[int, float, float, tuple[int, ...]]:
        return EMPIRICAL, 0.0, 0.0, self.values

    def expected(self) -> float:
        return sum(self.values) / len(self.values)

    def label(self) -> str:
        return f"Empirical({shown(self.values)})"


class Zipf(Distribution, frozen=True, kw_only=True, tag=True):
    """Whole lengths from 1 to `high`, length k with probability proportional to k^-exponent.

    Parameters
    ----------
    exponent : float
        0 makes all equally likely; the larger, the more are short.
    high : int
        Longest length [tokens].
    """

    exponent: NonNegative = 1.0
    high: Annotated[int, Range(1, 2**20)]

    def parameters(self) -> tuple[int, float, float, tuple[int, ...]]:
        return CHOICE, 0.0, 0.0, cumulative(self.high, self.exponent)

    def expected(self) -> float:
        weights = [k**-self.exponent for k in range(1, self.high + 1)]
        return sum(k * weight for k, weight in enumerate(weights, 1)) / sum(weights)


@functools.lru_cache(maxsize=16)
def cumulative(high: int, exponent: float) -> tuple[int, ...]:
    """Zipf's cumulative probabilities, for the rule `output_tokens`."""
    return choice([k**-exponent for k in range(1, high + 1)])


def choice(weights: list[float]) -> tuple[int, ...]:
    """The table of `CHOICE`: 1, 2, ... with probabilities proportional to weights."""
    sums = list(itertools.accumulate(weights))
    return tuple(round(CERTAIN * part / sums[-1]) for part in sums)


AnyDistribution = Constant | Normal | Uniform | LogNormal | Empirical | Zipf


def output_tokens(code, a, b, table, i, draw):
    """Rule: the length of request i, from one number of its stream (see `DRAWS`)."""
    if code == NORMAL:
        x = a + b * draw
    elif code == LOGNORMAL:
        x = math.exp(a + b * draw)
    elif code == UNIFORM:
        x = a + math.floor(draw * (b - a + 1.0))
    elif code == EMPIRICAL:
        x = float(table[int(draw * len(table))])
    elif code == CHOICE:
        low, high = 0, len(table) - 1
        while low < high:
            middle = (low + high) // 2
            if table[middle] > draw * CERTAIN:
                high = middle
            else:
                low = middle + 1
        x = low + 1.0
    elif code == SEQUENCE:
        x = math.ceil(a * table[i] - 1e-9) if i < len(table) else 1.0
    else:
        x = a
    return int(min(max(x, 1.0), float(MOST_TOKENS)))
