"""Specs: sweeps written down in TOML, and the short notation for an axis's values."""

import functools
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import numpy as np

from vecsim.declaration import NONE, Declaration, below, checks, from_plain, suggestion, tagged, to_plain
from vecsim.fits import Fit
from vecsim.fleet import AnyEngine
from vecsim.gpus import GPU
from vecsim.models import Model
from vecsim.own import RULE_NAME

# So many values in one range are a slip, not a sweep.
MOST_VALUES = 10_000_000

TRUTHS = {"true": True, "false": False}


class Spec(Declaration, frozen=True, kw_only=True):
    """A sweep written down: what `vecsim.sweep` is called with.

    Parameters
    ----------
    description : str
        One line for `--help`.
    fit : str, optional
        Name of a fitted set, as in `Fit.names()`: what the engine's step time and overheads don't tell is of it.
    engine : Engine, Cluster or DisaggregatedEngine
        What is varied; its `type` is that of an engine alone unless told.
    time_limit, warmup : float
        As for `vecsim.sweep` [ticks, or seconds in the token model, where infinity is to serve all requests].
    short : float, optional
        With it, `vecsim.queue_growth` is called: the time limit of its short run [ticks or seconds].
    variables : sequence of str
        What the table and the picture have, where it isn't throughput and latency over the load.
    x : str, optional
        Axis that these are told along: the load, else the longest axis of numbers, unless given.
    axes : dict
        Values of each axis: a list, or text in short notation (see `parse_values`).
    zip : dict
        Axes that vary together: for each dimension's name, a table of axes of one length.
    """

    description: str = ""
    fit: str | None = None
    engine: AnyEngine
    time_limit: float = 10_000.0
    warmup: float = 0.0
    short: float | None = None
    variables: tuple[str, ...] = ()
    x: str | None = None
    axes: dict[str, Any] = msgspec.field(default_factory=dict)
    zip: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """The axes as keywords for `vecsim.sweep`.

        Raises
        ------
        ValueError
            When a value can't be read.
        """
        import xarray as xr

        keywords = {name: _values(values, f"axes.{name}") for name, values in self.axes.items()}
        for dim, axes in self.zip.items():
            for name, values in axes.items():
                where = f"zip.{dim}.{name}"
                read = _values(values, where)
                if isinstance(read, Declaration) or not hasattr(read, "__len__"):
                    raise ValueError(f"{where}: axes that vary together are lists, got {read!r}")
                if name in keywords:
                    raise ValueError(f"{where}: {name} is an axis already")
                array = np.empty(len(read), object)
                array[:] = list(read)
                keywords[name] = xr.DataArray(array, dims=dim)
        return keywords


def ready_made() -> dict[str, Any]:
    """The specs that ship with the package, by name."""
    folder = resources.files("vecsim.sweep") / "specs"
    return {file.name.removesuffix(".toml"): file for file in sorted(folder.iterdir(), key=lambda file: file.name)}


def read_spec(name: str) -> Spec:
    """A spec from a TOML file, or a ready-made one by name.

    Raises
    ------
    ValueError
        When there is none, or it isn't right: says where.
    """
    import tomllib

    if name in ready_made():
        text = ready_made()[name].read_text()
    else:
        path = Path(name)
        if not path.is_file():
            hint = suggestion(name, ready_made())
            raise ValueError(f"no spec {name!r}: neither a file nor one of {', '.join(ready_made())}{hint}")
        try:
            text = path.read_text()
        except (UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{name} can't be read as text: {error}") from None
    try:
        return from_plain(_with_fit(tomllib.loads(text)), Spec)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _with_fit(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec in which the fitted set that it names, if it does, stands beside what the engine has already."""
    if not isinstance(spec.get("engine"), dict):
        return spec
    engine = {"type": "Engine", **spec["engine"]}
    if "fit" not in spec:
        return {**spec, "engine": engine}
    fit = Fit.named(spec["fit"])
    step_time = {"type": "RooflineStepTime", **fit.fields()}

    def fitted(part: Any) -> Any:
        if isinstance(part, list):
            return [fitted(one) for one in part]
        return {**part, "step_time": step_time | part.get("step_time", {})}

    pools = {name: fitted(engine[name]) for name in ("pool", "prefill", "decode") if name in engine}
    engine = (engine | pools) if pools else fitted(engine)
    return {**spec, "engine": {**engine, "overheads": to_plain(fit.overheads) | engine.get("overheads", {})}}


def read_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Axes, or fields, from `--set` of a command line.

    Raises
    ------
    ValueError
        When one isn't NAME=VALUES.
    """
    axes: dict[str, Any] = {}
    for change in changes:
        name, equals, values = change.partition("=")
        name = name.strip()
        if not equals or not name or not values.strip():
            raise ValueError(f"--set takes NAME=VALUES, got {change!r}")
        if name in axes:
            raise ValueError(f"--set names {name!r} twice")
        try:
            axes[name] = parse_values(values)
        except ValueError as error:
            raise ValueError(f"--set {name}: {error}") from None
    return axes


def parse_values(text: str) -> Any:
    """Values in short notation.

    `0.1:0.6:6` is six evenly spaced numbers, both ends included; `0..31` are whole numbers, both ends included;
    `a,b,c` is a list; anything else is one value, which pins the field. A value is a number, `true` or `false`, a word
    that some field takes, such as `fcfs` or `llama-3.1-8b`, a declaration, such as `IFBatcher` or
    `LogNormal(mean=10, std=5)`, or `module:name`, a batcher's rule of one's own.

    Raises
    ------
    ValueError
        When the text can't be read that way.
    """
    text = text.strip()
    if match := re.fullmatch(r"([^:,]+):([^:,]+):([^:,]+)", text):
        first, last, count = (_number(part) for part in match.groups())
        if not isinstance(count, int) or not 1 <= count <= MOST_VALUES or first is None or last is None:
            raise ValueError(f"a range is FIRST:LAST:COUNT with a whole COUNT >= 1, got {text!r}")
        return np.linspace(first, last, count)
    if match := re.fullmatch(r"([+-]?\d+)\.\.([+-]?\d+)", text):
        begin, end = int(match[1]), int(match[2])
        if not 0 <= end - begin < MOST_VALUES:
            raise ValueError(
                f"whole numbers are FIRST..LAST with FIRST <= LAST, at most {MOST_VALUES:,} of them, got {text!r}"
            )
        return range(begin, end + 1)
    parts = re.split(r",(?![^()]*\))", text)
    if len(parts) == 1:
        return parse_value(text)
    if not all(part.strip() for part in parts):
        raise ValueError(f"a list has a value on either side of each comma, got {text!r}")
    return [parse_value(part) for part in parts]


def parse_value(text: str) -> Any:
    """One number, truth, word, declaration, or name of a rule.

    Raises
    ------
    ValueError
        When it is none of them.
    """
    text = text.strip()
    number = _number(text)
    if number is not None:
        return number
    if text in TRUTHS:
        return TRUTHS[text]
    if RULE_NAME.fullmatch(text) or text in words():
        return text
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", text)
    if match is None:
        hint = suggestion(text, words()) or "; write a number, FIRST:LAST:COUNT or a declaration such as IFBatcher"
        raise ValueError(f"can't read the value {text!r}{hint}")
    fields = {}
    for part in re.split(r",(?![^(\[]*[)\]])", match[2] or ""):
        if part.strip():
            name, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"can't read {part.strip()!r} in {text!r}: write field=value")
            if listed := re.fullmatch(r"\s*\[(.*)\]\s*", value):
                fields[name.strip()] = [parse_value(item) for item in listed[1].split(",")]
            else:
                fields[name.strip()] = parse_value(value)
    return from_plain({"type": match[1], **fields}, _declaration(match[1]))


@functools.cache
def words() -> frozenset[str]:
    """All words that a field of some declaration may be, such as `fcfs`, names of models and GPUs among them."""
    kinds = [kind for declaration in below(Declaration) for _, kinds, _ in checks(declaration) for kind in kinds]
    literals = (word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    return frozenset((*literals, *Model.names(), *GPU.names(), NONE))


def _declaration(name: str | None) -> Any:
    """The declaration class of a name."""
    if name is None:
        raise ValueError('a table of a declaration needs its name: type = "..."')
    found = tagged()
    if name not in found:
        hint = suggestion(name, [*found, *words(), *TRUTHS])
        hint = hint or f"; declarations are {', '.join(sorted(found))}, words {', '.join(sorted({*words(), *TRUTHS}))}"
        raise ValueError(f"can't read the value {name!r}: it is neither a number nor a declaration{hint}")
    return found[name]


def _number(text: str) -> float | int | None:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return None


def _values(values: Any, where: str) -> Any:
    """Axis values from TOML: text in short notation, numbers, or tables of declarations."""
    try:
        if isinstance(values, str):
            return parse_values(values)
        if isinstance(values, dict):
            return from_plain(values, _declaration(values.get("type")))
        if isinstance(values, list):
            return [_values(value, "") for value in values]
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None
    return values
