"""Traces: requests read from published files of several formats, or from a plain csv file."""

import csv
import difflib
import gzip
import itertools
import math
import os
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import msgspec
import numpy as np

from vecsim.declaration import LONGEST_TIME, Range, check, cut, shown, suggestion
from vecsim.kernel.state import Array
from vecsim.lengths import MOST_TOKENS

_FIRST_DAY = datetime(1, 1, 1, tzinfo=UTC)
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,7}))?(Z|[+-]\d\d(?::?\d\d)?)?", re.ASCII)
_STAMP_UNITS = 10**7  # per second: the seventh digit of the fraction counts


class Trace(NamedTuple):
    """Requests read from a file, in the order of arrival."""

    arrived_at: Array | None  # [request] seconds from the first request on, ascending; None if the file has no times
    prompt_tokens: Array  # [request] >= 1
    output_tokens: Array  # [request] >= 1
    max_tokens: Array | None  # [request] >= output_tokens; None if the file doesn't say
    block_ids: Array  # flat, numbered 0, 1, 2, ... in the order of first appearance; empty if there are none
    block_counts: Array  # [request] how many of `block_ids` are each request's
    id_block_tokens: int  # tokens that an id covers; 0 if there are none
    classes: tuple[str, ...]  # labels, in the order of first appearance; () if there are none
    class_: Array  # [request] place in `classes`; 0 if there are none
    skipped: int  # malformed rows left out
    first_skipped: str = ""  # the line of the first of them, and what is wrong with it


class _Layout(NamedTuple):
    """The fields of a format; None for what it doesn't have."""

    prompt_tokens: str
    output_tokens: str
    arrived_at: str | None
    units: int = 1  # of time, per second
    stamped: bool = False  # time is a date and a time of day
    label: str | None = None
    max_tokens: str | None = None
    block_ids: str | None = None
    id_block_tokens: int = 0
    json: bool = False
    optional: tuple[str, ...] = ()  # columns that a csv file may lack

    def fields(self) -> dict[str, str]:
        """The format's own name of each field it has."""
        names = ("arrived_at", "prompt_tokens", "output_tokens", "max_tokens", "label", "block_ids")
        return {name: own for name in names if (own := getattr(self, name)) is not None}


_LAYOUTS = {
    "azure": _Layout("ContextTokens", "GeneratedTokens", "TIMESTAMP", units=_STAMP_UNITS, stamped=True),
    "mooncake": _Layout(
        "input_length", "output_length", "timestamp", 1000, block_ids="hash_ids", id_block_tokens=512, json=True
    ),
    "burstgpt": _Layout("Request tokens", "Response tokens", "Timestamp", label="Log Type"),
    "qwen-bailian": _Layout(
        "input_length", "output_length", "timestamp", label="type", block_ids="hash_ids", id_block_tokens=16, json=True
    ),
    "vidur": _Layout("num_prefill_tokens", "num_decode_tokens", "arrived_at", optional=("arrived_at",)),
    "csv": _Layout(
        "prompt_tokens",
        "output_tokens",
        "arrived_at",
        label="class",
        max_tokens="max_tokens",
        block_ids="block_ids",
        optional=("arrived_at", "max_tokens", "class", "block_ids"),
    ),
}
FORMATS = tuple(_LAYOUTS)

# What other people call the fields
_OTHER_NAMES = {
    "arrived_at": ("arrival", "arrival_at", "arrival_time", "arrival_timestamp", "time", "timestamp"),
    "prompt_tokens": (
        "context_tokens", "input_length", "input_tokens", "num_prefill_tokens", "prefill_tokens", "prompt_length",
        "request_tokens",
    ),
    "output_tokens": (
        "completion_tokens", "decode_tokens", "generated_tokens", "num_decode_tokens", "output_length",
        "response_tokens",
    ),
    "max_tokens": ("max_new_tokens", "max_output_tokens"),
    "label": ("class_name", "class_names", "request_class"),
    "block_ids": ("block_hashes", "hash_ids"),
}  # fmt: skip


class _MalformedError(Exception):
    """What is wrong with a row."""


class _Row(NamedTuple):
    """A request as the file has it, checked."""

    time: float  # in the format's own units; 0 if the file has no times
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    label: str
    ids: list[int]


def read_columns(
    path: str | os.PathLike[str],
    format: str,
    on_error: Literal["raise", "skip"] = "raise",
    *,
    id_block_tokens: int | None = None,
) -> Trace:
    """Read the requests of a trace.

    Requests that are out of order are sorted by time; those of one time stay in the order of the file. The first
    request arrives at 0.

    Parameters
    ----------
    path : str or path
        The file: UTF-8 text, or that compressed by gzip. A row is a line.
    format : str
        - `"azure"`: csv with TIMESTAMP (date and time; UTC unless it says otherwise), ContextTokens, GeneratedTokens.
        - `"mooncake"`: JSON lines with timestamp [ms], input_length, output_length, hash_ids (of 512 tokens each).
        - `"burstgpt"`: csv with Timestamp [s], Request tokens, Response tokens, Log Type (the class). Failed requests
          have no response tokens: they are malformed rows.
        - `"qwen-bailian"`: JSON lines with timestamp [s], input_length, output_length, type (the class), hash_ids (of
          16 tokens each).
        - `"vidur"`: csv with num_prefill_tokens, num_decode_tokens and, optionally, arrived_at [s].
        - `"csv"`: csv with prompt_tokens, output_tokens and, optionally, arrived_at [s], max_tokens, class, block_ids
          (whole numbers with spaces between them; there may be fewer than the prompt has blocks).

        Other columns are ignored, but for one whose name is like that of an optional column which isn't there.
    on_error : str
        What to do with a malformed row: `"raise"` an error, or `"skip"` the row and count it.
    id_block_tokens : int, optional
        Tokens that an id of the column block_ids covers: needed where format `"csv"` has that column. Elsewhere it can
        only be what the format says.

    Returns
    -------
    Trace
        One array per column.

    Raises
    ------
    ValueError
        When the file can't be read, lacks a column or has no valid row, when a row is malformed and `on_error` is
        `"raise"`, or when an argument is wrong: says where, and what is allowed.
    """
    if format not in _LAYOUTS:
        raise ValueError(
            f"format must be one of {', '.join(FORMATS)}, got {shown(format)}{suggestion(str(format), FORMATS)}"
        )
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, got {shown(on_error)}")
    layout = _LAYOUTS[format]
    rows = _Rows(stamped=layout.stamped)
    names: list[str] = []
    with _opened(path) as file:
        lines: Iterator[tuple[int, str]] = ((number, line) for number, line in enumerate(file, 1) if not line.isspace())
        first = next(lines, (1, ""))
        other = _other_format(first[1], format)
        if layout.json:
            lines = itertools.chain([first] if first[1] else [], lines)
        else:
            names = _column_names(first[1], path, other)
            layout = _without_missing(layout, names, path, other)
        layout = layout._replace(id_block_tokens=_tokens_per_id(layout, id_block_tokens))
        for number, line in lines:
            try:
                row = _checked(_json_fields(line) if layout.json else _csv_fields(line, names), layout)
            except _MalformedError as error:
                if on_error == "raise":
                    hint = other or ' (on_error="skip" leaves such rows out)'
                    raise ValueError(f"{path}, line {number}: {error}{hint}") from None
                rows.skip(f"line {number}: {error}")
            else:
                rows.append(row)
    if not rows.times:
        why = f" ({rows.first_skipped})" if rows.skipped else ""
        raise ValueError(f"{path}: there are no valid rows; {rows.skipped} malformed ones were skipped{why}{other}")
    return rows.trace(layout)


def write_csv(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace as a plain csv file; `read_columns` with format `"csv"` reads the same arrays back.

    A file of that name is replaced, once the new one is whole.

    Parameters
    ----------
    trace : Trace
        The requests.
    path : str or path
        A name that ends in `.csv`, or in `.gz` for a file compressed by gzip.

    Raises
    ------
    ValueError
        When the file can't be written, or a class has a label that wouldn't be read back.
    """
    from vecsim.sweep.files import check_output, write_whole  # the package `sweep` imports most of the others

    path = Path(path)
    check_output(path, (".csv", ".gz"), force=True)
    for label in trace.classes:
        if label != label.strip() or not label or "\n" in label or "\r" in label:
            raise ValueError(f"the label of a class must be one line with no space around it, got {shown(label)}")
    columns: dict[str, list[Any]] = {}
    if trace.arrived_at is not None:
        columns["arrived_at"] = trace.arrived_at.tolist()
    columns["prompt_tokens"] = trace.prompt_tokens.tolist()
    columns["output_tokens"] = trace.output_tokens.tolist()
    if trace.max_tokens is not None:
        columns["max_tokens"] = trace.max_tokens.tolist()
    if trace.classes:
        columns["class"] = [trace.classes[place] for place in trace.class_.tolist()]
    if trace.id_block_tokens:
        ids = iter(trace.block_ids.tolist())
        columns["block_ids"] = [" ".join(map(str, itertools.islice(ids, n))) for n in trace.block_counts.tolist()]

    def write(partial: Path) -> None:
        with _opener(path.suffix == ".gz")(partial, "wt", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")  # it writes floats with `repr`, so exactly
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    write_whole(path, write)


class _Rows:
    """The rows read so far, in the order of the file."""

    def __init__(self, stamped: bool) -> None:
        self.times: array[Any] = array("q" if stamped else "d")
        self.numbers = array("q")  # prompt tokens, output tokens, most tokens, place of the label, count of ids; again
        self.ids = array("q")
        self.known_labels: defaultdict[str, int] = defaultdict(None)
        self.known_ids: defaultdict[int, int] = defaultdict(None)
        # A new one gets the next number.
        self.known_labels.default_factory = self.known_labels.__len__
        self.known_ids.default_factory = self.known_ids.__len__
        self.skipped = 0
        self.first_skipped = ""

    def skip(self, why: str) -> None:
        self.skipped += 1
        self.first_skipped = self.first_skipped or why

    def append(self, row: _Row) -> None:
        label = self.known_labels[row.label]
        self.times.append(row.time)
        self.numbers.extend((row.prompt_tokens, row.output_tokens, row.max_tokens, label, len(row.ids)))
        self.ids.extend(map(self.known_ids.__getitem__, row.ids))

    def trace(self, layout: _Layout) -> Trace:
        """The arrays of the rows, sorted by time."""
        times, ids = np.array(self.times), np.array(self.ids)
        numbers = np.array(self.numbers).reshape(len(times), -1)
        classes = tuple(self.known_labels)
        if np.any(times[1:] < times[:-1]):
            order = np.argsort(times, kind="stable")
            # Each id's place in the file: where its request's ids start, and how many of them are before it.
            starts, counts = _before(numbers[:, -1])[order], numbers[order, -1]
            places = np.repeat(starts - _before(counts), counts) + np.arange(len(ids))
            times, numbers = times[order], numbers[order]
            ids, _ = _renumbered(ids[places])
            numbers[:, 3], old = _renumbered(numbers[:, 3])
            classes = tuple(classes[place] for place in old)
        prompt_tokens, output_tokens, max_tokens, class_, counts = numbers.T.copy()
        return Trace(
            arrived_at=(times - times[0]) / layout.units if layout.arrived_at else None,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            max_tokens=max_tokens if layout.max_tokens else None,
            block_ids=ids,
            block_counts=counts,
            id_block_tokens=layout.id_block_tokens,
            classes=classes if layout.label else (),
            class_=class_,
            skipped=self.skipped,
            first_skipped=self.first_skipped,
        )


def _before(counts: Array) -> Array:
    """The sum of the counts before each."""
    return np.cumsum(counts) - counts


def _renumbered(numbers: Array) -> tuple[Array, list[int]]:
    """Numbers 0, 1, 2, ... by first appearance instead, and the old number of each new one."""
    distinct, first, places = np.unique(numbers, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return np.argsort(order)[places], distinct[order].tolist()


def _opener(packed: bool) -> Callable[..., IO[str]]:
    return gzip.open if packed else open


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """The text of a file, be it compressed or not; what fails on the way is a ValueError."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with _opener(packed)(path, "rt", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} can't be read ({getattr(error, 'strerror', None) or error})") from None


def _other_format(line: str, format: str) -> str:
    """`; did you mean format=...?` where a file's first line is one of another format; else nothing."""
    try:
        names = set(_json_fields(line)) if line.lstrip().startswith("{") else {*map(str.strip, _csv_values(line))}
    except _MalformedError:
        return ""

    def found(layout: _Layout) -> int:
        fields = [own for own in layout.fields().values() if own not in layout.optional]
        return len(fields) if names.issuperset(fields) else 0

    best = max(_LAYOUTS, key=lambda name: found(_LAYOUTS[name]))
    return "" if found(_LAYOUTS[best]) <= found(_LAYOUTS[format]) else f'; did you mean format="{best}"?'


def _without_missing(layout: _Layout, names: list[str], path: str | os.PathLike[str], other: str) -> _Layout:
    """The layout without the optional columns that a file lacks."""
    missing = {field: own for field, own in layout.fields().items() if own not in names}
    unknown = [name for name in names if name not in layout.fields().values()]
    near = {own: name for field, own in missing.items() if (name := _near(field, own, unknown)) is not None}
    if needed := [own for own in missing.values() if own not in layout.optional]:
        meant = " and ".join(near[own] for own in needed if own in near)
        hint = other or (f"; did you mean {cut(meant)}?" if meant else "")
        raise ValueError(f"{path} lacks the column {', '.join(needed)}; it has {cut(', '.join(names)) or 'none'}{hint}")
    for own, name in near.items():
        raise ValueError(
            f"{path} has the column {cut(name)}, which means nothing; did you mean {own}? Rename or drop it"
        )
    if twice := [own for own in layout.fields().values() if names.count(own) > 1]:
        raise ValueError(f"{path} has the column {', '.join(twice)} more than once")
    absent: dict[str, Any] = dict.fromkeys(missing)
    return layout._replace(**absent)


def _near(field: str, own: str, names: list[str]) -> str | None:
    """The column whose name is like that of a field, if there is one."""
    plain = {_plain(name): name for name in names}
    close = [name for name in map(_plain, (own, *_OTHER_NAMES[field])) if name in plain]
    close = close or difflib.get_close_matches(_plain(own), plain, n=1, cutoff=0.8)  # num_tokens isn't max_tokens
    return plain[close[0]] if close else None


def _plain(name: str) -> str:
    """Letters and digits alone."""
    return re.sub(r"[\W_]", "", name.lower())


def _tokens_per_id(layout: _Layout, given: int | None) -> int:
    """How many tokens an id of the file covers: the format says it, or else the argument."""
    if layout.block_ids is None or layout.id_block_tokens:
        own = layout.id_block_tokens if layout.block_ids else None
        if given is not None and given != own:
            there = f"ids of {own} tokens" if own else "no block_ids"
            raise ValueError(f"id_block_tokens must be left out where the file has {there}, got {shown(given)}")
        return own or 0
    if given is None:
        raise ValueError(f"id_block_tokens is needed: the tokens that an id of the column {layout.block_ids} covers")
    return check("id_block_tokens", given, (int,), Range(1, MOST_TOKENS))


def _column_names(header: str, path: str | os.PathLike[str], other: str) -> list[str]:
    if header.lstrip().startswith("{"):
        raise ValueError(f"{path} must be csv, got JSON lines{other}")
    try:
        names = [name.strip() for name in _csv_values(header)]
    except _MalformedError as error:
        raise ValueError(f"{path}, header: {error}") from None
    for mark, what in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and mark in names[0]:
            raise ValueError(f"{path}, header: there must be commas between columns, got {what}: {shown(names[0])}")
    return names


def _csv_values(line: str) -> list[str]:
    if '"' not in line:
        return line.rstrip("\n").split(",")
    limit = csv.field_size_limit(len(line))  # a long prompt has many ids
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise _MalformedError(f"a row must be csv on one line, got {shown(line)} ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _csv_fields(line: str, names: list[str]) -> dict[str, Any]:
    values = _csv_values(line)
    if len(values) != len(names):
        raise _MalformedError(f"a row must have {len(names)} values, got {len(values)}")
    return dict(zip(names, values, strict=True))


def _json_fields(line: str) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _MalformedError(f"a row must be a JSON object, got {shown(line.strip())}")
    return fields


def _checked(fields: dict[str, Any], layout: _Layout) -> _Row:
    """The request of a row; a _MalformedError says which field is wrong."""
    time, label = 0.0, ""
    ids: list[int] = []
    if layout.arrived_at:
        time = (_stamp if layout.stamped else _seconds)(layout.arrived_at, fields, layout.units)
    prompt_tokens = _tokens(layout.prompt_tokens, fields)
    output_tokens = max_tokens = _tokens(layout.output_tokens, fields)
    if layout.max_tokens:
        max_tokens = _tokens(layout.max_tokens, fields, least=output_tokens)
    if layout.label:
        text = fields.get(layout.label)
        label = text.strip() if isinstance(text, str) else ""
        if not label:
            raise _refusal(layout.label, "a text", text)
    if layout.block_ids:
        ids = _block_ids(layout, fields, prompt_tokens)
    return _Row(time, prompt_tokens, output_tokens, max_tokens, label, ids)


def _refusal(name: str, allowed: str, value: Any) -> _MalformedError:
    return _MalformedError(f"{name} must be {allowed}, got {'nothing' if value is None else shown(value)}")


def _number(value: Any) -> float:
    """The number in a field; NaN if there is none."""
    if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # Python alone reads 1_000 as a number
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _tokens(name: str, fields: dict[str, Any], least: int = 1) -> int:
    value = _number(fields.get(name))
    if least <= value <= MOST_TOKENS and (whole := int(value)) == value:
        return whole
    most = f" and <= {MOST_TOKENS}" if value > MOST_TOKENS else ""
    raise _refusal(name, f"a whole number >= {least}{most}", fields.get(name))


def _seconds(name: str, fields: dict[str, Any], units: int) -> float:
    """A time, in its own units."""
    time = _number(fields.get(name))
    if 0 <= time <= LONGEST_TIME * units:
        return time
    most = f" and <= {LONGEST_TIME * units:g}" if time > 0 else ""
    raise _refusal(name, f"a number >= 0{most}", fields.get(name))


def _stamp(name: str, fields: dict[str, Any], units: int) -> int:
    """A date and a time of day, in `units` per second; whole, so that no digit is lost."""
    found = _STAMP.fullmatch(fields[name].strip())
    try:
        if found is None:
            raise ValueError
        whole, fraction, zone = found.groups("")
        since = datetime.fromisoformat(whole + (zone or "+00:00")) - _FIRST_DAY
    except ValueError:
        raise _refusal(name, "a time such as 2023-11-16 18:17:03.9799600", fields[name]) from None
    return (since.days * 86400 + since.seconds) * units + int(fraction.ljust(7, "0"))


def _block_ids(layout: _Layout, fields: dict[str, Any], prompt_tokens: int) -> list[int]:
    """The ids of a prompt's blocks: one for each where the format is JSON, that or fewer in csv."""
    value = ids = fields.get(str(layout.block_ids))
    blocks = -(-prompt_tokens // layout.id_block_tokens)
    if isinstance(value, str) and not layout.json and "_" not in value:
        try:
            ids = [int(part) for part in value.split()]
        except ValueError:
            ids = None
    if isinstance(ids, list) and set(map(type, ids)) <= {int}:
        if len(ids) == blocks or (len(ids) < blocks and not layout.json):
            return ids
        value = len(ids)
    most = "" if layout.json else "at most "
    raise _refusal(
        f"{layout.block_ids}",
        f"{most}{blocks} whole numbers, for {prompt_tokens} tokens in blocks of {layout.id_block_tokens}",
        value,
    )
