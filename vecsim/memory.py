"""Refuse what would not fit in memory, before anything is computed."""

import os
from pathlib import Path


def available() -> float:
    """Bytes of memory that are free for use; infinite where the system doesn't tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def require(size: float, largest: str, advice: str) -> None:
    """Check that an amount of memory is free.

    Raises
    ------
    ValueError
        When it isn't: with the amount, what takes most of it, and what to do.
    """
    free = available()
    if size > free:
        raise ValueError(
            f"this needs {_gib(size)} GiB of memory, {_gib(free)} GiB are free: most of it is for "
            f"{largest}. Try {advice}."
        )


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:,.1f}" if gib < 1e6 else f"{gib:.3g}"


def require_results(scenarios: float, per_scenario: float) -> None:
    """Check that the results of so many scenarios fit, at so many bytes each.

    Raises
    ------
    ValueError
        When they don't.
    """
    advice = 'fewer values on an axis, or several calls; keep="requests" takes most where it is used'
    require(
        scenarios * per_scenario,
        f"the results of {scenarios:,} scenarios" if scenarios < 1e15 else "the results of all scenarios",
        advice,
    )
