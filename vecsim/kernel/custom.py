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
    Array,
    Batch,
    Cache,
    Formula,
    Job,
    Memory,
    Outcome,
    Policy,
    Requests,
    StepBatch,
    StepModel,
    StepRecord,
    TokenBatch,
    TokenJob,
    TokenLoad,
    TokenWork,
)
from vecsim.kernel.tick import make_simulate
from vecsim.kernel.token import simulate as simulate_token
from vecsim.kernel.token_scenarios import run_token_scenarios

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


def like(kind: Any, **arrays: Any) -> Any:
    """The type of a tuple of `vecsim.kernel.state`: numbers as annotated, `arrays` as given, other arrays of int32."""
    values = {
        name: np.empty(0, np.int32) if annotation is Array else annotation(0)
        for name, annotation in kind.__annotations__.items()
        if name not in arrays
    }
    return kind(**values, **arrays)


FLOATS, WHOLES, NUMBERS = np.empty(0), np.empty(0, np.int32), np.empty(0, np.int64)
IDS = (NUMBERS, 1, NUMBERS, WHOLES, NUMBERS, NUMBERS)

# The token model's step loop's arguments, in its order; then the functions of the user's own
LOOP_ARGUMENTS = tuple(
    numba.typeof(value)
    for value in (
        like(Policy),
        like(Memory),
        like(StepModel, formula=like(Formula), terms=np.empty((0, 0)), grids=FLOATS, values=FLOATS, outside=NUMBERS),
        like(TokenLoad, arrived_at=FLOATS, think=FLOATS, urgency=FLOATS, ttft_limits=FLOATS, itl_limits=FLOATS),
        like(
            TokenWork,
            counts=NUMBERS,
            sums=FLOATS,
            gaps=NUMBERS,
            own=np.empty((0, 0), np.int32),
            times=np.empty((0, 0)),
            joined_at=FLOATS,
            late=NUMBERS,
        ),
        like(
            Cache,
            nodes=np.empty((0, 0), np.int32),
            owned=np.empty((0, 0), np.int32),
            own=np.empty(0, np.uint8),
            ids=IDS,
            own_start=NUMBERS,
        ),
        like(StepRecord, times=np.empty((0, 0)), counts=np.empty((0, 0), np.int64)),
        0.0,
        0.0,
        np.empty(0, np.uint8),
    )
)


@numba.njit(**OPTIONS)
def no_rule(batch):
    """In the place of a batcher's rule, where it is no function."""
    return 0


@numba.njit(**OPTIONS)
def no_step_time(batch):
    """In the place of a step time, where it is no function."""
    return 0.0


@functools.cache
def by_address(rule: Any, kind: str, returned: Any) -> tuple[Any, Any]:
    """A function of the user's own that returns just that type, and its type: called by its address."""
    cast_to = returned

    @numba.njit(**OPTIONS)
    def own(batch):
        return cast_to(rule(batch))

    return own, numba.types.FunctionType(compiled(own, (BATCHES[kind],)).signature)


@functools.cache
def token_step_loop(kinds: tuple[Any, ...]) -> Any:
    """The type of the token model's step loop for arguments of some types."""
    return numba.types.FunctionType(compiled(simulate_token, kinds).signature)


def token_kernel(own: tuple[Any, Any], job: TokenJob) -> Callable[[int, int, TokenJob], tuple[int, int]]:
    """`run_token_scenarios` with a batcher's rule and a step time of the user's own, None where there is none."""
    rule, rule_type = by_address(own[0] or no_rule, "token", COUNT)
    step_time, step_time_type = by_address(own[1] or no_step_time, "step", TIME)
    loop_type = token_step_loop((*LOOP_ARGUMENTS, rule_type, step_time_type))
    kinds = (loop_type, rule_type, step_time_type, COUNT, COUNT, numba.typeof(job))
    run = functools.partial(compiled(run_token_scenarios, kinds).entry_point, simulate_token, rule, step_time)
    names = " or ".join(function.py_func.__name__ for function in own if function is not None)

    def guarded(first: int, last: int, job: TokenJob) -> tuple[int, int]:
        try:
            return run(first, last, job)
        except MemoryError:  # not the rule's
            raise
        except Exception as error:
            if not names:
                raise
            raise ValueError(f"rule {names} raised {type(error).__name__}: {error}") from error

    return guarded
