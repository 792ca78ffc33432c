"""The token model's kernel with functions of the user's own: all are called by their addresses.

So a new function compiles itself alone, and the step loop isn't compiled again as a part of what calls it.
"""

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from vecsim.kernel.custom import BATCHES, COUNT, TIME, compiled, guarded
from vecsim.kernel.jit import OPTIONS
from vecsim.kernel.state import (
    Array,
    Cache,
    Formula,
    Memory,
    Policy,
    StepModel,
    StepRecord,
    TokenJob,
    TokenLoad,
    TokenWork,
)
from vecsim.kernel.token import simulate
from vecsim.kernel.token_scenarios import run_token_scenarios


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
    return numba.types.FunctionType(compiled(simulate, kinds).signature)


def token_kernel(own: tuple[Any, Any], job: TokenJob) -> Callable[[int, int, TokenJob], tuple[int, int]]:
    """`run_token_scenarios` with a batcher's rule and a step time of the user's own, None where there is none."""
    rule, rule_type = by_address(own[0] or no_rule, "token", COUNT)
    step_time, step_time_type = by_address(own[1] or no_step_time, "step", TIME)
    loop_type = token_step_loop((*LOOP_ARGUMENTS, rule_type, step_time_type))
    kinds = (loop_type, rule_type, step_time_type, COUNT, COUNT, numba.typeof(job))
    run = functools.partial(compiled(run_token_scenarios, kinds).entry_point, simulate, rule, step_time)
    names = " or ".join(function.py_func.__name__ for function in own if function is not None)

    return guarded(run, names) if names else run
