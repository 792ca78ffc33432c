"""Step-time tables from files."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from vecsim.declaration import cut, shown, suggestion
from vecsim.step_time import AXES, TableTerm

TIME = "seconds"


def read_terms(path: Path, format: str) -> tuple[tuple[TableTerm, ...], int]:
    """The terms of a `TableStepTime`, and what prefill contexts are rounded up to.

    Raises
    ------
    ValueError
        When the file can't be read, or isn't a whole grid: says what is wrong.
    """
    if not path.is_file():
        raise ValueError(f"file must name a file, got {str(path)!r}: there is none")
    return _vidur(path) if format == "vidur" else ((_from_csv(path),), 1)


def _from_csv(path: Path) -> TableTerm:
    """A table with a row for each place of its grid."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(f"{path} can't be read as csv ({cut(str(error))})") from None
    heads = [head.strip() for head in rows[0]] if rows else []
    axes = tuple(head for head in heads if head != TIME)
    if TIME not in heads or not 1 <= len(axes) <= 2:
        raise ValueError(
            f"{path}: the header must have one or two axes and {TIME!r}, got {cut(', '.join(heads)) or 'nothing'}"
        )
    for axis in axes:
        if axis not in AXES:
            raise ValueError(f"{path}: axis {shown(axis)} is none of {', '.join(AXES)}{suggestion(axis, AXES)}")
    places: dict[tuple[float, ...], float] = {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        try:
            values = dict(zip(heads, map(float, row), strict=True))
        except ValueError:
            raise ValueError(f"{path}, line {number}: every field must be a number, got {shown(row)}") from None
        place = tuple(values[axis] for axis in axes)
        if place in places:
            raise ValueError(f"{path}, line {number}: {dict(zip(axes, place, strict=True))} is there twice")
        places[place] = values[TIME]
    grids = [sorted({place[i] for place in places}) for i in range(len(axes))]
    whole = int(np.prod([len(grid) for grid in grids]))
    if whole != len(places):
        raise ValueError(f"{path}: a whole grid needs {whole} rows, got {len(places)}")
    values_there = np.array([places[place] for place in sorted(places)]).reshape([len(grid) for grid in grids])
    return TableTerm(axes=axes, grid=grids[0], other_grid=grids[1] if len(grids) > 1 else None, values=values_there)


def _vidur(path: Path) -> tuple[tuple[TableTerm, ...], int]:
    """The tables of milliseconds a layer that Vidur's predictor makes.

    A step takes layers x (compute for its tokens, rounded up to 8, + KV cache save + decode attention + prefill
    attention); attention of more than one request takes a factor more. Vidur's `ExecutionTime` adds up the same.
    """
    try:
        with np.load(path) as data:
            tables: dict[str, Any] = {name: np.asarray(data[name], np.float64) for name in data.files}
        layers, step = float(tables["num_layers"]) * 1e-3, int(tables["kv_granularity"])
        tokens = tables["num_tokens"]
        size = int(tokens.size)
        rounded = np.minimum(-(-np.arange(1, size + 1) // 8) * 8, size) - 1
        compute = sum(table[rounded] for name, table in tables.items() if name.startswith("comp_"))
        per_token = layers * (compute + tables["kv_cache_save"])
        decode, prefill = layers * tables["attn_decode"], layers * tables["attn_prefill"]
        many = 1.0 + float(tables["decode_batching_overhead"]), 1.0 + float(tables["prefill_batching_overhead"])
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{path} isn't a file of Vidur's tables: {cut(str(error))}") from None
    contexts = step * np.arange(decode.shape[1], dtype=np.float64)
    return (
        TableTerm(axes=("tokens",), grid=np.arange(1.0, size + 1), values=per_token),
        TableTerm(
            axes=("decode_requests", "mean_decode_context"),
            grid=np.arange(1.0, decode.shape[0] + 1),
            other_grid=contexts,
            values=decode,
            other_lookup="up",
            factor_if_many=many[0],
        ),
        TableTerm(
            axes=("prefill_context", "prefill_chunk"),
            grid=step * np.arange(prefill.shape[0], dtype=np.float64),
            other_grid=np.arange(1.0, prefill.shape[1] + 1),
            values=prefill,
            other_lookup="nearest",
            factor_if_many=many[1],
        ),
    ), step
