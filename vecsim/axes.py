"""Axes: keywords that name fields of a declaration, however deep, and the values that they take."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from vecsim.declaration import Declaration, Range, check, checks, shown, suggestion
from vecsim.kernel.state import Array
from vecsim.memory import require_results
from vecsim.variables import (
    APART_REQUEST_VARIABLES,
    APART_VARIABLES,
    CHANGING_VARIABLES,
    CLASS_VARIABLES,
    FLEET_REQUEST_VARIABLES,
    REQUEST_VARIABLES,
    TICK_VARIABLES,
    TOKEN_REQUEST_VARIABLES,
    TOKEN_VARIABLES,
    VIEW_VARIABLES,
)

# Names that results use: an axis over a field of such a name is a dimension under its full path.
TAKEN = {
    *("stat", "request", "time", "run", "queue_size", "class", "part"),
    *(
        variable.name
        for variables in (
            TICK_VARIABLES,
            REQUEST_VARIABLES,
            TOKEN_VARIABLES,
            CLASS_VARIABLES,
            APART_VARIABLES,
            CHANGING_VARIABLES,
            VIEW_VARIABLES,
            TOKEN_REQUEST_VARIABLES,
            FLEET_REQUEST_VARIABLES,
            APART_REQUEST_VARIABLES,
        )
        for variable in variables
    ),
}


class Axis(NamedTuple):
    """Values of one field along one or more dimensions."""

    name: str  # of the coordinate
    path: str
    dims: tuple[str, ...]
    values: Array  # one axis for each of `dims`; of objects where they are declarations

    @property
    def is_component(self) -> bool:
        return _is_component(self.values)

    def labels(self) -> Array:
        """The values as plain data: numbers, or short texts for declarations."""
        if self.values.dtype != object:
            return self.values
        values = list(self.values.flat)
        texts = [_text(value) for value in values]
        for name in set(texts):
            same = [i for i, text in enumerate(texts) if text == name]
            declared = [values[i] for i in same]
            if len(same) > 1 and all(isinstance(value, Declaration) for value in declared):
                for i, differing in zip(same, differing_fields(declared), strict=True):
                    texts[i] = f"{name}({differing})" if differing else name
        numbers: dict[str, list[Any]] = {}  # the different values of each text
        for i, text in enumerate(texts):
            others = numbers.setdefault(text, [])
            if values[i] not in others:
                others.append(values[i])
            if (number := others.index(values[i]) + 1) > 1:
                texts[i] = f"{text} #{number}"
        return np.array(texts).reshape(self.values.shape)


def _text(value: Any) -> str:
    """A value's name, or its text."""
    if isinstance(value, tuple) and all(isinstance(item, Declaration) for item in value):
        return " + ".join(item.name for item in value)
    return value.name if isinstance(value, Declaration) else str(value)


class Plan(NamedTuple):
    """What a sweep varies: the declaration with every scalar pinned, the axes, the size of each dimension."""

    engine: Any  # an `Engine`
    axes: tuple[Axis, ...]  # those of scalars have no dimension
    sizes: dict[str, int]
    coords: dict[str, Any]  # coordinates that zipped DataArrays brought along

    @property
    def scenarios(self) -> int:
        count = 1
        for size in self.sizes.values():
            count *= size
        return count


def replace_all(declaration: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a declaration with the fields at dotted paths replaced; checked like a new one.

    All fields of one component are replaced at once, and those of a component that is replaced itself after it.
    """
    own = {name: value for name, value in changes.items() if "." not in name}
    inner: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        if "." in path:
            head, _, rest = path.partition(".")
            inner.setdefault(head, {})[rest] = value
    for head, rest_changes in inner.items():
        own[head] = replace_all(own.get(head, _part(declaration, head)), rest_changes)
    if isinstance(declaration, tuple):
        return tuple(own.get(str(i), item) for i, item in enumerate(declaration))
    return msgspec.structs.replace(declaration, **own)


def _part(declaration: Any, name: str) -> Any:
    """A field, or one of several pools by its place."""
    return declaration[int(name)] if isinstance(declaration, tuple) else getattr(declaration, name)


def replace(declaration: Any, path: str, value: Any) -> Any:
    """`replace_all` for one field."""
    return replace_all(declaration, {path: value})


def fields(declaration: Declaration, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every field, however deep."""
    for name in declaration.__struct_fields__:
        value = getattr(declaration, name)
        yield prefix + name, value
        if isinstance(value, Declaration):
            yield from fields(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, Declaration) and item.is_numbered:
                    yield from fields(item, f"{prefix}{name}.{i}.")


def differing_fields(declarations: Sequence[Declaration]) -> list[str]:
    """What tells each declaration from the others: names of components, and `field=value`."""
    described = [dict(fields(declaration)) for declaration in declarations]
    texts = []
    for own in described:
        names, values = [], []
        named = set()
        for path, value in own.items():
            others = [other[path] for other in described if path in other]
            if isinstance(value, Declaration):
                if any(not isinstance(other, Declaration) or other.name != value.name for other in others):
                    names.append(value.name)
                    named.add(path)
            elif value is None and path.rpartition(".")[0] in named:
                continue  # another kind of component says enough
            elif not callable(value) and any(other != value for other in others):
                text = f"{value:.6g}" if isinstance(value, float) else shown(value)
                values.append(f"{path.rpartition('.')[2]}={text}")
        texts.append(", ".join(names + values))
    return texts


def find(name: str, declaration: Declaration, what: str = "axis") -> str:
    """The path of the one field that a name means; errors call the name `what`.

    Raises
    ------
    ValueError
        When no field or several have that name: lists the candidates.
    """
    paths = [path for path, _ in fields(declaration)]
    found = meant(name, paths)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{what} {name!r} is ambiguous: write one of {', '.join(found)}")
    words = [as_word(path) for path in paths if path.count(".") == 1]
    hint = suggestion(name, [*paths, *(path.rpartition(".")[2] for path in paths), *words])
    raise ValueError(f"unknown {what} {name!r}{hint or ': fields are ' + ', '.join(paths)}")


def meant(name: str, paths: Sequence[str]) -> list[str]:
    """The paths that a name may mean: itself, those that end in it, or, as a keyword has it, with _ for each dot."""
    if name in paths:
        return [name]
    return [path for path in paths if path.endswith("." + name)] or [
        path for path in paths if name in map(as_word, tails(path))
    ]


def tails(path: str) -> list[str]:
    """A path and what is left of it without its first components."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def as_word(path: str) -> str:
    """A path as a keyword: `prefill.workers` is `prefill_workers`."""
    return path.replace(".", "_")


def plan(engine: Declaration, axes: Mapping[str, Any]) -> Plan:
    """Resolve axes against a declaration: check every value, name every dimension, pin scalars.

    Raises
    ------
    ValueError
        When an axis is unknown, ambiguous, empty, of a wrong shape or value, or shares a dimension with
        one of another length.
    """
    # Some 400 bytes of results a scenario; ranges can be endless, so look before making anything of them.
    lengths: dict[Any, float] = {}
    for name, value in axes.items():
        if hasattr(value, "dims"):
            lengths |= dict(zip(value.dims, value.shape, strict=True))
        else:
            lengths[name] = _length(value)
    require_results(math.prod(lengths.values()), 400.0)
    given = {name: _values(name, value) for name, value in axes.items()}
    resolved = _resolve(engine, given)

    # A coordinate has its field's name, or the whole path where a result or another axis has that name.
    fields_named = [path.rpartition(".")[2] for path, _ in resolved.values()]
    planned = []
    for name, (dims, _, array) in given.items():
        path, values = resolved[name]
        field = path.rpartition(".")[2]
        label = path if field in TAKEN or fields_named.count(field) > 1 else field
        if name not in (path, field, *TAKEN) and "." not in name:
            label = name  # such as `prefill_workers`
        elif "." in name and len(meant(field, [other for other, _ in fields(engine)])) > 1:
            label = path  # else none could tell which
        planned.append(Axis(label, path, (label,) if dims and array is None else dims, values))

    sizes: dict[str, int] = {}
    coords: dict[str, Any] = {}
    for axis, (_, _, array) in zip(planned, given.values(), strict=True):
        for dim, size in zip(axis.dims, axis.values.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                others = [other.name for other in planned if dim in other.dims and other is not axis]
                raise ValueError(
                    f"axes along {dim!r} must have one length: {axis.name} has {size}, {', '.join(others)} {sizes[dim]}"
                )
            if dim in TAKEN:
                raise ValueError(f"dimension {dim!r} must have another name: a result is called so")
            if array is not None and dim in array.coords:
                values = array.coords[dim].values
                if dim in coords and not np.array_equal(coords[dim], values):
                    raise ValueError(f"axes along {dim!r} must have the same coordinate there")
                coords[dim] = values
    if "seed" in sizes and not any(axis.dims == ("seed",) and axis.name == "seed" for axis in planned):
        raise ValueError("dimension 'seed' must have another name: it is for an axis over seed")
    for axis in planned:
        if axis.name in sizes and axis.dims != (axis.name,):
            raise ValueError(f"axis {axis.name!r} must not be a dimension of another axis as well")
    pins = {axis.path: axis.values[()] for axis in planned if not axis.dims}
    components = {path: value for path, value in pins.items() if isinstance(value, Declaration)}
    known = dict(fields(replace_all(engine, components)))
    # A pin that only a component on an axis has is for the lowering.
    engine = replace_all(engine, {path: value for path, value in pins.items() if path in known})
    return Plan(engine, tuple(planned), sizes, coords)


def _resolve(engine: Declaration, given: Mapping[str, Any]) -> dict[str, tuple[str, Array]]:
    """The path that each axis means, and its checked values.

    What a field's name means depends on the components, and these may be on an axis themselves: `specimens` holds
    one declaration for each combination of their types.
    """
    specimens: dict[Any, Declaration] = {_shape(engine): engine}
    resolved: dict[str, tuple[str, Array]] = {}
    for name in _outermost_first(engine, given):
        paths = set()
        lacking: list[tuple[str, str]] = []
        for specimen in specimens.values():
            try:
                paths.add(find(name, specimen))
            except ValueError as unknown:
                kinds = (type(value).__name__ for _, value in fields(specimen) if isinstance(value, Declaration))
                lacking.append((str(unknown), f"; with {', '.join(dict.fromkeys(kinds))}"))
        if lacking:
            # Where some have such a field, tell which hasn't.
            raise ValueError("".join(lacking[0]) if len(lacking) < len(specimens) else lacking[0][0])
        if len(paths) > 1:
            raise ValueError(f"axis {name!r} is ambiguous: write one of {', '.join(sorted(paths))}")
        path = paths.pop()
        if path in [other for other, _ in resolved.values()]:
            raise ValueError(f"axis {name!r} names {path}, which another axis names too")
        values = _checked(path, given[name][1], specimens.values())
        resolved[name] = path, values
        if _decides_fields(values):
            made = [replace(old, path, value) for old in specimens.values() for value in values.flat]
            specimens = {_shape(specimen): specimen for specimen in made}
    return resolved


def _outermost_first(engine: Declaration, given: Mapping[str, Any]) -> list[str]:
    """Names of the axes: components before numbers, outer components before those inside them."""

    def depth(name: str) -> tuple[bool, int]:
        found = meant(name, [path for path, _ in fields(engine)])
        return not _decides_fields(given[name][1]), min((path.count(".") for path in found), default=99)

    return sorted(given, key=depth)


def _length(given: Any) -> float:
    """How many values an axis has; infinite where they can't be counted."""
    try:
        return len(given)
    except TypeError:
        return 1
    except OverflowError:
        return math.inf


def _values(name: str, given: Any) -> tuple[tuple[str, ...], Array, Any]:
    """(dims, values, the DataArray or None) of what the user wrote."""
    if hasattr(given, "dims") and hasattr(given, "coords"):
        array = given
        dims = tuple(str(dim) for dim in array.dims)
        values = np.asarray(array.values)
    else:
        array = None
        if isinstance(given, dict | set | frozenset):
            raise ValueError(f"axis {name!r} must be a list, an array or a range, got a {type(given).__name__}")
        if isinstance(given, np.ndarray) and given.ndim == 0:
            given = given.item()
        if isinstance(given, str | bytes | Declaration | type) or not hasattr(given, "__len__"):
            if hasattr(given, "__next__"):
                raise ValueError(f"axis {name!r} must be a list, an array or a range, got an iterator")
            values = np.empty((), object)
            values[()] = given
            return (), values, None
        if isinstance(given, range) or (
            isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind in "iuf"
        ):
            numbers = np.asarray(given)
            if numbers.size:
                return (name,), numbers, None
        items = list(given)
        if isinstance(given, np.ndarray) and given.ndim != 1:
            raise ValueError(
                f"axis {name!r} must be one-dimensional, got {given.ndim} dimensions; "
                "an xarray.DataArray names its dimensions"
            )
        dims = (name,)
        values = np.empty(len(items), object)
        values[:] = items
    if values.size == 0:
        raise ValueError(f"axis {name!r} must have at least one value, got none")
    return dims, values, array


def _decides_fields(values: Array) -> bool:
    """Whether which fields there are may depend on an axis: of components, or of none."""
    return _is_component(values) or (values.dtype == object and any(value is None for value in values.flat))


def _is_component(values: Array) -> bool:
    return values.dtype == object and any(isinstance(value, Declaration) or callable(value) for value in values.flat)


def _checked(path: str, values: Array, specimens: Any) -> Array:
    """Every value checked against the field that it is for, as plain numbers where all are."""
    out = np.empty(values.shape, object)
    owner_path, _, name = path.rpartition(".")
    owners: dict[Any, Any] = {}
    for specimen in specimens:
        owner = specimen
        for part in owner_path.split(".") if owner_path else ():
            owner = _part(owner, part)
        owners[type(owner)] = owner
    for owner_type in owners:
        kinds, allowed = next((kinds, allowed) for field, kinds, allowed in checks(owner_type) if field == name)
        if values.dtype.kind in "iuf":
            whole = float not in kinds
            wrong = _wrong(values, whole, allowed)
            if float in kinds or int in kinds:
                if wrong.any():
                    check(name, values[wrong][0].item(), kinds, allowed)
                out = values.astype(np.int64 if whole else np.float64)
                continue
        for index in np.ndindex(values.shape):
            value = values[index]
            out[index] = check(name, value.item() if isinstance(value, np.generic) else value, kinds, allowed)
    if out.dtype != object:
        return out
    types = {type(value) for value in out.flat}
    if types <= {int, float}:
        return out.astype(np.int64 if types == {int} else np.float64)
    return out


def _wrong(values: Array, whole: bool, allowed: Range | None) -> Array:
    """Where numbers aren't what a field may be."""
    right = np.isfinite(values)
    if whole:
        right &= values == np.floor(values)
    if allowed is not None:
        right &= (values >= allowed.low if allowed.low_allowed else values > allowed.low) & (values <= allowed.high)
    return ~right


def _shape(declaration: Declaration) -> Any:
    """What decides which fields there are: the types of all components."""
    return tuple((path, type(value)) for path, value in fields(declaration) if isinstance(value, Declaration))
