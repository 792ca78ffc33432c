"""Kernels with functions of the user's own.

A kernel compiled around a new rule from one end to the other would take 14 s. So in the tick model the step loop alone
is compiled around it, in some 1.5 s, and a kernel from the disk cache calls that by its address, once a scenario. In
the token model a new function compiles itself alone: the step loop calls it by its address, and is itself called so,
for compiled into what calls it, it would be optimised again as a part of that.
"""

import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import numba

from vecsim.kernel.address import (
    COUNT,
    LIVE,
    OWN_ARGUMENTS,
    PLANNED,
    TICK_LOOP,
    TICK_OUTCOME,
    TIERS_ACT,
    TIME,
    TOKEN_LOOP,
    WORLD,
    address_of,
    compiled,
)
from vecsim.kernel.jit import CACHE_FOLDER, OPTIONS, is_compiled
from vecsim.kernel.state import Job, Outcome, TokenJob


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
    return compiled(rule, OWN_ARGUMENTS[kind]).signature.return_type


@functools.cache
def tick_loop(rule: Any) -> tuple[Any, int]:
    """The step loop around a rule, and its address."""
    from vecsim.kernel.tick import make_simulate

    loop = make_simulate(rule, checked=True, jit=cast(Any, numba.njit)(**OPTIONS))
    return loop, address_of(loop, TICK_LOOP, TICK_OUTCOME)


def make_run_scenarios(rule: Any, job: Job) -> Callable[[int, int, Job], Outcome]:
    """`run_scenarios` for scenarios of one rule, of jobs like this one."""
    from vecsim.kernel.scenarios import run_scenarios_by_address

    _, address = tick_loop(rule)
    kinds = (COUNT, COUNT, COUNT, numba.typeof(job))
    return functools.partial(compiled(run_scenarios_by_address, kinds).entry_point, address)


@functools.cache
def rule_address(rule: Any, kind: str, returned: Any) -> tuple[Any, int]:
    """A function of the user's own that returns just that type, and its address."""
    if kind == "planner":

        @numba.njit(**OPTIONS)
        def own(view, memory):
            prefill, decode = rule(view, memory)
            return COUNT(prefill), COUNT(decode)

    else:

        @numba.njit(**OPTIONS)
        def own(batch):
            return returned(rule(batch))

    return own, address_of(own, OWN_ARGUMENTS[kind], returned)


COMPILE_BESIDE = """
import pickle, sys
from vecsim.kernel.address import compiled
from vecsim.kernel.token_scenarios import run_token_scenarios
compiled(run_token_scenarios, pickle.load(sys.stdin.buffer))
"""


def compile_beside(kinds: tuple[Any, ...]) -> "subprocess.Popen[bytes]":
    """Have another process compile `run_token_scenarios` into the disk cache, while this one compiles the step loop.

    numba compiles on one thread a process. Should the other fail, it is compiled here.
    """
    places = {"PYTHONPATH": os.pathsep.join(sys.path), "VECSIM_CACHE_DIR": str(CACHE_FOLDER.parent)}
    helper = subprocess.Popen(
        [sys.executable, "-c", COMPILE_BESIDE],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | places,
    )
    assert helper.stdin is not None
    helper.stdin.write(pickle.dumps(kinds))
    helper.stdin.close()
    return helper


def token_kernel(own: tuple[Any, Any, Any, Any], job: TokenJob) -> Callable[[int, int, TokenJob], tuple[int, int]]:
    """`run_token_scenarios` with a rule, step time, router and planner of the user's own, None where there is none."""
    from vecsim.kernel.token import simulate
    from vecsim.kernel.token_scenarios import run_token_scenarios

    rule, step_time, router, planner = own
    rule_at = rule_address(rule, "token", COUNT)[1] if rule is not None else 0
    step_time_at = rule_address(step_time, "step", TIME)[1] if step_time is not None else 0
    router_at = rule_address(router, "router", COUNT)[1] if router is not None else 0
    planner_at = rule_address(planner, "planner", PLANNED)[1] if planner is not None else 0
    kinds = (*[COUNT] * 10, numba.typeof(job))
    helper = None
    if not (is_compiled("simulate") or is_compiled("run_token_scenarios")):
        helper = compile_beside(kinds)
    loop = address_of(simulate, TOKEN_LOOP, COUNT)
    fleet_loop = live_at = tiers_at = 0
    if job.fleet.group.size > 0:
        from vecsim.kernel.fleet import simulate_fleet

        fleet_loop = address_of(simulate_fleet, (WORLD,), COUNT)
    if job.life.whole.size > 0:
        from vecsim.kernel.losses import live

        live_at = address_of(live, LIVE, COUNT)
    if job.tiers.numbers.size > 0:
        from vecsim.kernel.tiers import tiers_act

        tiers_at = address_of(tiers_act, TIERS_ACT, COUNT)
    if helper is not None:
        helper.wait()
    scenarios = compiled(run_token_scenarios, kinds).entry_point
    run = functools.partial(
        scenarios, loop, fleet_loop, live_at, tiers_at, rule_at, step_time_at, router_at, planner_at
    )  # fmt: skip
    names = " or ".join(function.py_func.__name__ for function in own if function is not None)

    return guarded(run, names) if names else run
