"""A batcher's rule of the user's own, in the kernel.

A kernel compiled around it from one end to the other would take each new rule 14 s. So the step loop alone is
compiled around it, in some 1.5 s, and a kernel from the disk cache calls that by its address, once a scenario.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
from numba.core.errors import NumbaExperimentalFeatureWarning

from vecsim.kernel.jit import OPTIONS
from vecsim.kernel.scenarios import run_scenarios_by_address
from vecsim.kernel.state import (
    Batch,
    Job,
    Outcome,
    Requests,
    StepBatch,
    TokenBatch,
)
from vecsim.kernel.tick import make_simulate

COUNT, TIME = numba.int64, numba.float64
# What a function of the user's own is given
GIVEN: dict[str, Any] = {"tick": Batch, "token": TokenBatch, "step": StepBatch}
BATCHES = {
    kind: numba.typeof(given(*(field(0) for field in given.__annotations__.values()))) for kind, given in GIVEN.items()
}

TIMES, COUNTS, BYTES = (numba.typeof(np.empty(0, kind)) for kind in (np.float64, np.int64, np.uint8))
REQUESTS = numba.typeof(Requests(np.empty(0), *(np.empty(0, np.int32) for _ in range(3))))

# The step loop's arguments, in its order
ARGUMENTS = (
    COUNT,  # batcher
    TIME,  # parameter
    COUNT,  # max_batch_size
    TIME,  # prefill_time
    TIME,  # itl
    COUNT,  # chunks
    COUNT,  # target
    TIME,  # time_limit
    TIME,  # warmup
    REQUESTS,
    TIMES,  # time
    COUNTS,  # calendar
    TIMES,  # prefill_sum
    COUNTS,  # itl_samples
    BYTES,  # stop
)


def compiled(dispatcher: Any, kinds: tuple[Any, ...]) -> Any:
    """The record of a jitted function compiled for arguments of some types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaExperimentalFeatureWarning)  # functions called by their address
        dispatcher.compile(kinds)
    return dispatcher.overloads[kinds]


def guarded(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    """What runs scenarios, with a ValueError that names the function of the user's own when that raises."""

    def guarded_run(first: int, last: int, job: Any) -> Any:
        try:
            return run(first, last, job)
        except MemoryError:  # not the rule's
            raise
        except Exception as error:
            raise ValueError(f"rule {name} raised {type(error).__name__}: {error}") from error

    return guarded_run


@functools.cache
def return_type(rule: Any, kind: str) -> Any:
    """What a jitted rule returns when it's given a batch (a numba type)."""
    return compiled(rule, (BATCHES[kind],)).signature.return_type


@functools.cache
def step_loop(rule: Any) -> tuple[Any, Any]:
    """The step loop around a rule, and its type: a function called by its address."""
    loop = make_simulate(rule, checked=True, jit=cast(Any, numba.njit)(**OPTIONS))
    return loop, numba.types.FunctionType(compiled(loop, ARGUMENTS).signature)


def make_run_scenarios(rule: Any, job: Job) -> Callable[[int, int, Job], Outcome]:
    """`run_scenarios` for scenarios of one rule, of jobs like this one."""
    loop, function = step_loop(rule)
    # Typed by hand: numba would take the loop for a constant, and compile everything around it.
    kinds = (function, COUNT, COUNT, numba.typeof(job))
    return functools.partial(compiled(run_scenarios_by_address, kinds).entry_point, loop)
