"""Functions of the user's own: jitted, or named as "module:name"."""

import importlib
import operator
import re
from typing import Any

from vecsim.declaration import shown, suggestion

# As in "module:name"
RULE_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


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


def check_own(rule: Any, kind: str) -> None:
    """Compile a function for what it will be given.

    Parameters
    ----------
    rule : function
    kind : "tick", "token" or "step"
        A batcher's rule in the tick or the token model, or a step time.

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
    if rule.targetoptions.get("parallel"):
        raise ValueError(
            f"rule {rule.py_func.__name__} must not be compiled with parallel=True: scenarios share the threads"
        )
    from vecsim.kernel.address import GIVEN
    from vecsim.kernel.custom import return_type

    name = rule.py_func.__name__
    given = GIVEN[kind]
    try:
        returned = return_type(rule, kind)
    except (NumbaError, TypeError, RuntimeError) as error:  # RuntimeError: of a signature of its own
        lines = [line for line in str(error).splitlines() if line and not line.startswith("Failed in nopython")]
        reason = re.sub(rf"{given.__name__}\(.*?\)", "Batch", lines[0] if lines else type(error).__name__)
        attribute = re.search(r"Unknown attribute '(\w+)' of type Batch", reason)
        hint = suggestion(attribute[1], given._fields) if attribute else ""
        raise ValueError(
            f"rule {name} can't be compiled for a batch: {reason}{hint} (a batch has {', '.join(given._fields)})"
        ) from error
    if kind == "step":
        if not isinstance(returned, Integer | Float):
            raise ValueError(f"rule {name} must return a number of seconds on every path, got {returned}")
    elif not isinstance(returned, Integer | Boolean):
        raise ValueError(f"rule {name} must return a whole number on every path, got {returned}")
