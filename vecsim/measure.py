"""The arguments that a run and a sweep share: how long, from when on, which quantiles."""

import math
import numbers
from collections.abc import Sequence
from typing import cast

from vecsim.declaration import shown
from vecsim.variables import DEFAULT_QUANTILES, stat_labels

LONGEST_RUN = 1e9


def check_times(time_limit: float | None, warmup: float, token: bool = False) -> tuple[float, float]:
    """Both as floats; in the token model there may be no limit.

    Raises
    ------
    ValueError
        When one isn't a number in its range.
    """
    if time_limit is None and not token:
        raise ValueError("time_limit must be given in the tick model")
    endless = time_limit is None or (token and check_number("time_limit", time_limit) == math.inf)
    time_limit = math.inf if endless else check_limit("time_limit", cast(float, time_limit))
    warmup = check_number("warmup", warmup)
    if not 0 <= warmup < time_limit:
        raise ValueError(f"warmup must be >= 0 and < time_limit ({time_limit:g}), got {warmup:g}")
    return time_limit, warmup


def check_limit(name: str, value: float) -> float:
    """How long a run takes, as a float.

    Raises
    ------
    ValueError
        When it isn't a number in its range.
    """
    limit = check_number(name, value)
    if not 0 < limit <= LONGEST_RUN:
        got = f"{limit:g}" if math.isfinite(limit) else shown(value)
        raise ValueError(f"{name} must be > 0 and <= {LONGEST_RUN:g}, got {got}")
    return limit


def check_number(name: str, value: float) -> float:
    """A number as a float, infinite if it's too large for one; a ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_quantiles(quantiles: Sequence[float] | None) -> tuple[float, ...]:
    """Ascending quantiles, the usual ones if None.

    Raises
    ------
    ValueError
        When one isn't in [0, 1] or is given twice.
    """
    if quantiles is None:
        return DEFAULT_QUANTILES
    try:
        values = () if isinstance(quantiles, str) else tuple(sorted(float(q) for q in quantiles))
    except (TypeError, ValueError, OverflowError):
        values = ()
    if not values:
        raise ValueError(f"quantiles must be one or more numbers in [0, 1], got {shown(quantiles)}")
    for q in values:
        if not 0 <= q <= 1:
            raise ValueError(f"quantiles must be in [0, 1], got {q:g}")
    if len(set(stat_labels(values))) < len(values) + 2:
        raise ValueError(f"quantiles must differ from one another in their first ten digits, got {quantiles!r}")
    return values
