"""Pictures: of a run, of several, of sweeps, of growing queues, of fleets. matplotlib is imported when one is drawn."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vecsim.plot.fleets import ttft_parts
    from vecsim.plot.queues import queue_growth
    from vecsim.plot.runs import compare, run
    from vecsim.plot.sweeps import heat_map, lines, sweep

_HOMES = {
    "compare": "runs",
    "heat_map": "sweeps",
    "lines": "sweeps",
    "queue_growth": "queues",
    "run": "runs",
    "sweep": "sweeps",
    "ttft_parts": "fleets",
}

__all__ = ["compare", "heat_map", "lines", "queue_growth", "run", "sweep", "ttft_parts"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
