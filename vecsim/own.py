"""Functions of the user's own: jitted, or named as "module:name"."""

import importlib
import operator
import re
from typing import Any

from vecsim.declaration import shown, suggestion

# As in "module:name"
RULE_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

# What a function is given
WHAT = {
    "tick": "a batch of the tick model",
    "token": "a batch of the token model",
    "step": "a step",
    "router": "a router's view",
    "planner": "a planner's view",
}


def stands_for(value: Any) -> bool:
    """Whether a value is a function, or the name of one."""
    is_name = isinstance(value, str) and RULE_NAME.fullmatch(value) is not None
    return is_name or (callable(value) and not isinstance(value, type))


def named(name: str) -> Any:
    """What a "module:name" names.

    Raises
    ------
    ValueError
        When there is no such thing.
    """
    module, _, path = name.partition(":")
    try:
        if not RULE_NAME.fullmatch(name):
            raise ValueError("it has no module or no name")
        return operator.attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f'rule must be a jitted function or "module:name", got {shown(name)}: {error}') from None


def name_of(rule: Any) -> str:
    """A function's name."""
    return str(rule.__name__)


def compiled_rule(rule: Any, *kinds: str) -> Any:
    """A function, or what a "module:name" names, compiled for what it will be given; see `check_own`."""
    function = named(rule) if isinstance(rule, str) else rule
    check_own(function, *kinds)
    return function


def check_own(rule: Any, *kinds: str) -> None:
    """Compile a function for what it will be given; where that may be one of several, one will do.

    Parameters
    ----------
    rule : function
    *kinds : "tick", "token", "step", "router" or "planner"
        A batcher's rule in the tick or the token model, a step time, a router, or a planner.

    Raises
    ------
    ValueError
        When it isn't compiled with `numba.njit`, can't be, or returns no (whole) number.
    """
    from numba.core.dispatcher import Dispatcher
    from numba.core.errors import NumbaError
    from numba.core.types import Boolean, Float, Integer

    if not isinstance(rule, Dispatcher):
        hint = f": write @numba.njit above `def {rule.__name__}`" if hasattr(rule, "__name__") else ""
        raise ValueError(f"rule must be compiled with numba.njit, got {shown(rule)}{hint}")
    name = rule.py_func.__name__
    if rule.targetoptions.get("parallel"):
        raise ValueError(f"rule {name} must not be compiled with parallel=True: scenarios share the threads")
    from vecsim.kernel.custom import return_type

    errors: list[Exception] = []
    for kind in kinds:
        try:
            returned = return_type(rule, kind)
        except (NumbaError, TypeError, RuntimeError) as error:  # RuntimeError: of a signature of its own
            errors.append(error)
            continue
        if kind == "step":
            if not isinstance(returned, Integer | Float):
                raise ValueError(f"rule {name} must return a number of seconds on every path, got {returned}")
        elif kind == "planner":
            parts = getattr(returned, "types", ())
            if len(parts) != 2 or not all(isinstance(part, Integer | Boolean) for part in parts):
                raise ValueError(f"rule {name} must return two whole numbers on every path, got {returned}")
        elif not isinstance(returned, Integer | Boolean):
            raise ValueError(f"rule {name} must return a whole number on every path, got {returned}")
        return
    raise ValueError(f"rule {name} can't be compiled for {_why_not(errors, kinds)}") from errors[0]


def _why_not(errors: list[Exception], kinds: tuple[str, ...]) -> str:
    """What numba says of a function, one error for each kind, and the fields that there are."""
    from vecsim.kernel.address import GIVEN

    fields = {name for kind in kinds for name in GIVEN[kind]._fields}
    reasons = []
    for error, kind in zip(errors, kinds, strict=True):
        lines = [line for line in str(error).splitlines() if line and not line.startswith("Failed in nopython")]
        reason = re.sub(
            rf"{GIVEN[kind].__name__}\((?:[^()]|\([^()]*\))*\)", "Batch", lines[0] if lines else type(error).__name__
        )
        attribute = re.search(r"Unknown attribute '(\w+)' of type Batch", reason)
        # A field of one kind that another lacks tells that the function is meant for the former.
        elsewhere = attribute is not None and attribute[1] in fields
        reasons.append((elsewhere, reason + (suggestion(attribute[1], fields) if attribute and not elsewhere else "")))
    there = "; ".join(f"{WHAT[kind]} has {', '.join(GIVEN[kind]._fields)}" for kind in kinds)
    given = WHAT[kinds[0]] if len(kinds) == 1 else "a batch"
    return f"{given}: {min(reasons, key=lambda found: found[0])[1]} ({there})"
