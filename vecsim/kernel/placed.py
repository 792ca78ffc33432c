"""Named tuples that stay in memory: a function is given their address, and loads the fields that it looks at.

numba hands every number of every array in a tuple over one by one. The event loop of fleets has some 600 of them, and
30 functions that are given them: lowering those calls took three quarters of a minute.
"""

import hashlib
from typing import Any

from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model

# Room for a `vecsim.kernel.state.Place` in an array
PLACE_WORDS = 768

function: Any = intrinsic  # that kernels call: one argument less than mypy sees


class Placed(types.Type):
    """The address of a named tuple whose fields never change; a field that is one too is again such an address."""

    def __init__(self, held: Any) -> None:
        self.held = held
        # Short, since it becomes part of the names of all functions that are given it
        digest = hashlib.sha256(str(held).encode()).hexdigest()[:8]
        super().__init__(f"Placed({held.instance_class.__name__}:{digest})")


@register_model(Placed)
class PlacedModel(models.PrimitiveModel):
    """A pointer to the tuple as numba has it in registers."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, manager.lookup(kind.held).get_value_type().as_pointer())


@infer_getattr
class PlacedFields(AttributeTemplate):
    """Types of the fields."""

    key = Placed

    def generic_resolve(self, kind: Any, name: str) -> Any:  # type: ignore[override]
        """The type of a field; none of another name."""
        if name not in kind.held.fields:
            return None
        field = kind.held.types[kind.held.fields.index(name)]
        return Placed(field) if isinstance(field, types.BaseNamedTuple) else field


@lower_getattr_generic(Placed)
def load_field(context: Any, builder: Any, kind: Any, value: Any, name: str) -> Any:
    """Load a field."""
    index = kind.held.fields.index(name)
    place = cgutils.gep_inbounds(builder, value, 0, index)
    if isinstance(kind.held.types[index], types.BaseNamedTuple):
        return place
    return load(builder, place)


def load(builder: Any, place: Any) -> Any:
    """Load number by number what nobody changes."""
    kind = place.type.pointee
    if not hasattr(kind, "__len__"):
        loaded = builder.load(place)
        loaded.set_metadata("invariant.load", builder.module.add_metadata([]))
        return loaded
    whole = cgutils.get_null_value(kind)
    for index in range(len(kind)):
        whole = builder.insert_value(whole, load(builder, cgutils.gep_inbounds(builder, place, 0, index)), index)
    return whole


def store(builder: Any, value: Any, place: Any) -> None:
    """Store number by number."""
    kind = value.type
    if not hasattr(kind, "__len__"):
        builder.store(value, place)
        return
    for index in range(len(kind)):
        store(builder, builder.extract_value(value, index), cgutils.gep_inbounds(builder, place, 0, index))


@function
def placed(typing: Any, given: Any) -> Any:
    """The address of a copy of a tuple, which lives as long as the function that asks for it runs."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        place = cgutils.alloca_once(builder, values[0].type)
        store(builder, values[0], place)
        return place

    return Placed(given)(given), generate


@function
def put(typing: Any, given: Any, row: Any) -> Any:
    """Store a tuple at the begin of an array of 64-bit numbers."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if context.get_abi_sizeof(values[0].type) > 8 * PLACE_WORDS:
            raise TypingError(f"PLACE_WORDS must be {context.get_abi_sizeof(values[0].type) // 8} or more")
        data = context.make_array(signature.args[1])(context, builder, values[1]).data
        store(builder, values[0], builder.bitcast(data, values[0].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(given, row), generate


def finder(kind: Placed) -> Any:
    """A function for kernels: `found(row)` is the address of the tuple that was put into an array."""

    @intrinsic
    def found(typing: Any, row: Any) -> Any:
        """The address of the tuple that was put into an array."""

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, values[0]).data
            return builder.bitcast(data, context.get_value_type(kind))

        return kind(row), generate

    return found


@function
def fetched(typing: Any, place: Any) -> Any:
    """All of a tuple that is in memory."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return load(builder, values[0])

    return place.held(place), generate
