"""Batchers: who is let into the running batch at a boundary. Declaration and rule side by side.

A rule gets the batch as it stands at the boundary (`vecsim.kernel.state.Batch`: running, prefilling,
decoding, free slots, queued, ...) and returns how many requests to admit from the head of the queue, at most
`min(batch.free, batch.queued)`. It is plain Python; the kernel compiles it.
"""

import importlib
import operator
import re
from typing import Annotated, Any, Self

import msgspec

from vecsim.declaration import Declaration, Range, shown, suggestion
from vecsim.kernel.state import Batch

# As in "module:name"
RULE_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Batcher(Declaration, frozen=True, kw_only=True, tag_field="type"):
    """Base of all batchers."""

    @staticmethod
    def admit(batch: Any) -> int:
        """Rule: how many requests to admit."""
        raise NotImplementedError


class StaticBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """Fill an empty engine, then wait until the whole batch is done (FasterTransformer)."""

    @staticmethod
    def admit(batch: Any) -> int:
        return min(batch.free, batch.queued) if batch.running == 0 else 0


class IFBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """In-flight batching: fill every free slot at every boundary (Orca, TensorRT-LLM)."""

    @staticmethod
    def admit(batch: Any) -> int:
        return min(batch.free, batch.queued)


class IFBatcherWithOnePrefillOnly(Batcher, frozen=True, kw_only=True, tag=True):
    """In-flight batching with at most one request of the batch in prefill."""

    @staticmethod
    def admit(batch: Any) -> int:
        return int(batch.prefilling == 0 and batch.free > 0 and batch.queued > 0)


class CustomBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """A policy of one's own; the function alone may stand where a batcher is asked for.

    Parameters
    ----------
    rule : function
        Compiled with `numba.njit`. Gets the batch at each boundary where a request is queued (see
        `vecsim.kernel.state.Batch`) and returns how many to admit from the head of the queue: 0 to `batch.free`,
        more than are queued meaning all of them. Where no slot is free its answer has no meaning. It must depend on
        the batch alone. Text of the form "module:name" names one to be imported; so it is written in TOML.
    parameter : float
        What the rule reads as `batch.parameter`.

    Raises
    ------
    ValueError
        When the function isn't compiled, can't be, or returns no whole number.
    """

    rule: Any
    parameter: Annotated[float, Range()] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = named_rule(self.rule) if isinstance(self.rule, str) else self.rule
        check_rule(rule)
        msgspec.structs.force_setattr(self, "rule", rule)

    @classmethod
    def standing_for(cls, value: Any) -> Self | None:
        is_name = isinstance(value, str) and RULE_NAME.fullmatch(value)
        return cls(rule=value) if is_name or (callable(value) and not isinstance(value, type)) else None

    @property
    def name(self) -> str:
        return self.rule.__name__


def named_rule(name: str) -> Any:
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


def check_rule(rule: Any) -> None:
    """Compile a rule for a batch.

    Raises
    ------
    ValueError
        When it isn't compiled with `numba.njit`, can't be, or returns no whole number.
    """
    from numba.core.dispatcher import Dispatcher
    from numba.core.errors import NumbaError
    from numba.core.types import Boolean, Integer

    if not isinstance(rule, Dispatcher):
        hint = f": write @numba.njit above `def {rule.__name__}`" if hasattr(rule, "__name__") else ""
        raise ValueError(f"rule must be compiled with numba.njit, got {shown(rule)}{hint}")
    if rule.targetoptions.get("parallel"):
        raise ValueError(
            f"rule {rule.py_func.__name__} must not be compiled with parallel=True: scenarios share the threads"
        )
    from vecsim.kernel.custom import return_type

    name = rule.py_func.__name__
    try:
        returned = return_type(rule)
    except (NumbaError, TypeError, RuntimeError) as error:  # RuntimeError: of a signature of its own
        lines = [line for line in str(error).splitlines() if line and not line.startswith("Failed in nopython")]
        reason = re.sub(r"Batch\(.*?\)", "Batch", lines[0] if lines else type(error).__name__)
        attribute = re.search(r"Unknown attribute '(\w+)' of type Batch", reason)
        hint = suggestion(attribute[1], Batch._fields) if attribute else ""
        raise ValueError(
            f"rule {name} can't be compiled for a batch: {reason}{hint} (a batch has {', '.join(Batch._fields)})"
        ) from error
    if not isinstance(returned, Integer | Boolean):
        raise ValueError(f"rule {name} must return a whole number on every path, got {returned}")


# The kernel knows a batcher by its place here.
BATCHERS: tuple[type[Batcher], ...] = (StaticBatcher, IFBatcher, IFBatcherWithOnePrefillOnly)
AnyBatcher = StaticBatcher | IFBatcher | IFBatcherWithOnePrefillOnly | CustomBatcher
