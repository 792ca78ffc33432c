"""What every declaration shares: frozen fields with ranges, clear refusals, TOML and JSON."""

import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Self, cast, get_args, get_origin

import msgspec

# Times stay far below 2**53, where adding one tick would no longer change a float64.
LONGEST_TIME = 1e12


class Range(msgspec.Struct, frozen=True):
    """The values a numeric field may take: finite ones, and infinity where that is allowed."""

    low: float = -math.inf
    high: float = math.inf
    low_allowed: bool = True
    infinity_allowed: bool = False

    def refusal(self, value: float) -> str | None:
        """What is allowed, in words, if the value isn't."""
        if self.infinity_allowed and value == math.inf:
            return None
        if self.low == -math.inf and not math.isfinite(value):
            return "finite"
        low = f"{'>=' if self.low_allowed else '>'} {self.low:g}"
        if not (value >= self.low if self.low_allowed else value > self.low):  # NaN included
            return low
        if value > self.high:
            return f"{low} and <= {self.high:.10g}"
        return None if math.isfinite(value) else f"{low} and finite"


Count = Annotated[int, Range(1, 2**20)]
Number = Annotated[int, Range(1, 1e9)]
Offset = Annotated[int, Range(0, 1e9)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Time = Annotated[float, Range(0, LONGEST_TIME)]
Positive = Annotated[float, Range(0, low_allowed=False)]
NonNegative = Annotated[float, Range(0)]


class Declared(msgspec.StructMeta):
    """What makes a declaration: it names the fields there are where one is unknown or missing. Costs some 1 us."""

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except TypeError:
            known, name = cls.__struct_fields__, cls.__name__
            if args:
                raise TypeError(f"{name} takes its fields by name: {', '.join(known)}") from None
            refuse_unknown(name, fields, known)
            required = [field.name for field in msgspec.structs.fields(cast(Any, cls)) if field.required]
            if missing := [field for field in required if field not in fields]:
                raise TypeError(f"{name} needs {' and '.join(missing)}") from None
            raise


def refuse_unknown(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that aren't among the known ones.

    Raises
    ------
    TypeError
        When there is one: names it, those that are like it, and all there are.
    """
    known = tuple(known)
    for field in given:
        if field not in known:
            raise TypeError(f"{name} has no field {field!r}{suggestion(field, known)} (fields: {', '.join(known)})")


class Declaration(msgspec.Struct, metaclass=Declared, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen description of a part of a simulation; compares and hashes by value.

    Raises
    ------
    ValueError
        When a field has a wrong value: the message names the field, the value and what is allowed.
    TypeError
        When a field is unknown or missing: the message names the fields there are.
    """

    def __post_init__(self) -> None:
        for name, kinds, allowed in checks(type(self)):
            value = getattr(self, name)
            checked = check(name, value, kinds, allowed)
            if checked is not value:
                msgspec.structs.force_setattr(self, name, checked)

    def to_toml(self) -> str:
        """Write the declaration as TOML; `from_toml` reads it back to an equal one.

        Raises
        ------
        ValueError
            When a function in it has no name that it could be imported by, or an array in it is long.
        """
        import tomli_w

        text = tomli_w.dumps(to_plain(self))
        if found := re.search(r'"([^"\n]*<(?:locals|lambda)>[^"\n]*)"', text):
            raise ValueError(f"{found[1]} can't be written down: define the function at the top of a module")
        if NOT_WRITTEN in text:
            raise ValueError(f"an array of more than {LONGEST_LIST} values isn't written down: read it from a file")
        return text

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read a declaration from TOML.

        Raises
        ------
        ValueError
            When the text is not TOML, or a field is unknown, missing or out of range: says where.
        """
        import tomllib

        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"not valid TOML: {error}") from None
        return from_plain(data, cls)

    def to_json(self) -> str:
        """Write the declaration as JSON."""
        return as_json(to_plain(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a declaration from JSON.

        Raises
        ------
        ValueError
            When a field is unknown, missing or out of range: says where.
        """
        try:
            data = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ValueError(f"not valid JSON: {error}") from None
        return from_plain(data, cls)

    @property
    def is_numbered(self) -> bool:
        """Whether several in one field are told by their places, so that an axis can name a field of one of them."""
        return False

    @classmethod
    def standing_for(cls, value: Any) -> Self | None:
        """The declaration that a value of another type stands for; None if it stands for none."""
        return None

    @property
    def name(self) -> str:
        """Shortest text for coordinates and legends."""
        return type(self).__name__

    def label(self) -> str:
        """Short text for coordinates and legends: the name, and the fields that are not at their default."""
        fields = []
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            if value != field.default and not callable(value):
                text = value.label() if isinstance(value, Declaration) else f"{value!r}"
                fields.append(f"{field.name}={text}")
        return f"{self.name}({', '.join(fields)})" if fields else self.name


class Values:
    """An array in a declaration: never changed, equal and hashed by its content."""

    __slots__ = ("array", "digest", "read_from")

    def __init__(self, array: Any, read_from: Any = None) -> None:
        import hashlib

        import numpy as np

        self.array = np.array(array)
        self.array.flags.writeable = False
        self.read_from = read_from  # the file that the declaration names, and how it is read
        self.digest = hashlib.sha256(self.array.tobytes()).hexdigest()[:16] + f" {self.array.shape}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.digest == other.digest and self.array.dtype == other.array.dtype

    def __hash__(self) -> int:
        return hash(self.digest)

    def __len__(self) -> int:
        return len(self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.array if dtype is None else self.array.astype(dtype)

    def __repr__(self) -> str:
        return shown(self.array.tolist())

    def plain(self) -> Any:
        """A list if it's short, else what it can be told by; None if it can be read from its file again."""
        if self.read_from is not None:
            return None
        return self.array.tolist() if self.array.size <= LONGEST_LIST else f"{NOT_WRITTEN} {self.digest}"


LONGEST_LIST = 1000
NONE = "none"  # what stands for it in a text, such as an axis in TOML
NOT_WRITTEN = "array, not written:"


def check_array(
    name: str, value: Any, kind: type, dims: int = 1, low: float = -math.inf, high: float = math.inf
) -> Values:
    """Numbers as `Values`: all finite, whole where `kind` is int, and in their range.

    Raises
    ------
    ValueError
        When they aren't: names the first that isn't.
    """
    import numpy as np

    if isinstance(value, Values):
        return value
    what = "whole numbers" if kind is int else "numbers"
    if isinstance(value, str) and value.startswith(NOT_WRITTEN):
        raise ValueError(f"{name} was too long to be written down: read it from a file")
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" or array.ndim != dims:
            raise ValueError
        numbers = array.astype(np.float64)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{name} must be {what} in {dims} dimension{'s' * (dims > 1)}, got {shown(value)}") from None
    wrong = ~np.isfinite(numbers) | (numbers < low) | (numbers > high)
    if kind is int:
        wrong |= numbers != np.floor(numbers)
    if wrong.any():
        at = int(np.flatnonzero(wrong.ravel())[0])
        limits = f" >= {low:g}" if low > -math.inf else ""
        limits += f" and <= {high:.10g}" if high < math.inf else ""
        raise ValueError(f"{name} must be {what}{limits}, got {numbers.ravel()[at]:.10g} at place {at}")
    return Values(array.astype(np.int64 if kind is int else np.float64))


def to_plain(declaration: Declaration) -> dict[str, Any]:
    """Nested dicts of a declaration, without what is None (TOML knows no null)."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return value

    def encode(value: Any) -> Any:
        if isinstance(value, Values):
            return value.plain()
        return f"{value.__module__}:{value.__qualname__}"

    return clean(msgspec.to_builtins(declaration, enc_hook=encode))


def as_json(value: Any) -> str:
    """JSON of nested dicts and lists that `from_json` reads."""
    return msgspec.json.encode(_infinity_as_text(value)).decode()


def _infinity_as_text(value: Any) -> Any:
    """Nested dicts with "inf" for infinity, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _infinity_as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_infinity_as_text(item) for item in value]
    return "inf" if isinstance(value, float) and value == math.inf else value


def from_plain(data: Any, kind: Any) -> Any:
    """A declaration from nested dicts; errors say at which key."""
    data = _spelt_out(data, kind)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        path = path.rstrip("`").lstrip(".")
        raise ValueError((f"{path}: {message}" if path else message) + _hint(message, path, data, kind)) from None


def _spelt_out(data: Any, kind: Any, path: str = "") -> Any:
    """Nested dicts in which the fields of a declaration stand for its name, where there are such names."""
    if isinstance(data, str):
        if data == "inf" and float in _kinds(kind)[0]:
            return math.inf
        for own in _of_type(_kinds(kind)[0], None):
            try:
                made = own.standing_for(data)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            if made is not None:
                return to_plain(made)
    if not isinstance(data, dict):
        return data
    hints = {name: hint for own in _of_type(_kinds(kind)[0], data) for name, hint in _hints(own).items()}
    return {
        key: _spelt_out(value, hints[key], f"{path}.{key}".lstrip(".")) if key in hints else value
        for key, value in data.items()
    }


def tagged() -> dict[str, type[Declaration]]:
    """Every declaration that TOML's `type` can name."""
    return {
        kind.__name__: kind
        for kind in below(Declaration)
        if not kind.__subclasses__() and kind.__struct_config__.tag is not None
    }


def below(kind: type[Declaration]) -> list[type[Declaration]]:
    """All declarations derived from one."""
    return [other for sub in kind.__subclasses__() for other in (sub, *below(sub))]


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing if no known name is like it."""
    close = difflib.get_close_matches(name, set(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _hint(message: str, path: str, data: Any, kind: Any) -> str:
    """What a misspelt field or type may have meant, of the declarations that may stand there."""
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", message):
        kinds = _kinds_at(path, data, kind)
        hint = suggestion(found[1], (name for kind in kinds for name in kind.__struct_fields__))
        return hint or "".join(f"; {kind.__name__} has {', '.join(kind.__struct_fields__)}" for kind in kinds)
    if found := re.fullmatch(r"Invalid value '(.*)'", message):
        kinds = _kinds_at(path.removesuffix("type").rstrip("."), data, kind, any_type=True)
        names = [kind.__name__ for kind in kinds]
        return suggestion(found[1], names) or f"; there are {', '.join(names)}" * bool(names)
    return ""


def _kinds_at(path: str, data: Any, kind: Any, any_type: bool = False) -> list[type[Declaration]]:
    """The declarations that may stand at a path of nested dicts; unless told otherwise, of the `type` given there."""
    kinds, _ = _kinds(kind)
    for key in re.findall(r"\w+", path):
        if key.isdigit():
            kinds = tuple(item for listed in kinds for item in get_args(listed))
            data = data[int(key)]
        else:
            found = _of_type(kinds, data)
            kinds = tuple(own for kind in found for name, owns, _ in checks(kind) if name == key for own in owns)
            data = data[key]
    return _of_type(kinds, None if any_type else data)


def _of_type(kinds: Iterable[Any], data: Any) -> list[type[Declaration]]:
    """The declarations among types; of the type that a dict names, if it names one."""
    named = data.get("type") if isinstance(data, dict) else None
    return [
        kind
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, Declaration) and named in (None, kind.__struct_config__.tag)
    ]


def shown(value: Any) -> str:
    """A value's text for an error message, cut if it's very long."""
    try:
        text = repr(value)
    except ValueError:  # Python's limit of 4,300 digits
        return "a number of thousands of digits"
    return cut(text)


def cut(text: str) -> str:
    """A text for an error message, cut if it's very long."""
    return text if len(text) <= 60 else text[:60] + "..."


def check(name: str, value: Any, kinds: tuple[Any, ...], allowed: Range | None) -> Any:
    """Return the value in its plain type, or raise a ValueError that says what is allowed."""
    if type(None) in kinds and (value is None or (isinstance(value, str) and value == NONE and str not in kinds)):
        return None
    for kind in kinds:
        if get_origin(kind) is typing.Literal:
            if value in get_args(kind):
                return value
            raise ValueError(
                f"{name} must be one of {', '.join(get_args(kind))}, got {shown(value)}"
                f"{suggestion(str(value), get_args(kind))}"
            )
    if bool in kinds:
        if isinstance(value, bool):
            return value
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    if str in kinds and not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {shown(value)}")
    structs = tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Declaration))
    if structs and isinstance(value, structs):
        return value
    if isinstance(value, list | tuple) and any(get_origin(kind) is tuple for kind in kinds) and structs:
        return tuple(check(name, one, structs, None) for one in value)
    for kind in structs:
        if (made := kind.standing_for(value)) is not None:
            return made
    if float in kinds or int in kinds:
        plain = _plain_number(value, whole=float not in kinds)
        refusal = "" if plain is None else allowed and allowed.refusal(plain)
        if refusal is None:
            return plain
        text = "a number" if float in kinds else "a whole number"
        if structs:
            text += " or one of " + ", ".join(kind.__name__ for kind in structs)
        raise ValueError(f"{name} must be {refusal or text}, got {shown(value)}")
    if structs:
        names = ", ".join(kind.__name__ for kind in structs)
        hint = "; call it: " + value.__name__ + "()" if isinstance(value, type) and issubclass(value, structs) else ""
        raise ValueError(f"{name} must be one of {names}, got {shown(value)}{hint}")
    return value


def _plain_number(value: Any, whole: bool) -> float | int | None:
    """A Python float or int of the same value; None if there is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    real: Any = value
    try:
        if not whole:
            return float(real)
        return int(real) if float(real).is_integer() else None
    except OverflowError:  # out of every range, and refused as such
        return math.inf if real > 0 else -math.inf


@functools.cache
def checks(cls: type[Declaration]) -> list[tuple[str, tuple[Any, ...], Range | None]]:
    """(field, types, range) of each field, read from the annotations."""
    hints = _hints(cls)
    return [(name, *_kinds(hints[name])) for name in cls.__struct_fields__]


@functools.cache
def _hints(cls: type[Declaration]) -> dict[str, Any]:
    """Annotations of the fields."""
    return typing.get_type_hints(cls, include_extras=True)


def _kinds(hint: Any) -> tuple[tuple[Any, ...], Range | None]:
    """The types of an annotation, and the range in it."""
    if get_origin(hint) is Annotated:
        kinds, _ = _kinds(get_args(hint)[0])
        return kinds, next((item for item in get_args(hint)[1:] if isinstance(item, Range)), None)
    if get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_kinds(part) for part in get_args(hint)]
        return (
            tuple(kind for kinds, _ in parts for kind in kinds),
            next((allowed for _, allowed in parts if allowed), None),
        )
    return (hint,), None
