"""Step-time models: how long a step takes, from what the batch does. Declaration and rule side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec

from vecsim.declaration import Declaration, NonNegative, Range, check_array, shown
from vecsim.own import compiled_rule, name_of, stands_for

# Codes of the rule `duration`
TICK, LINEAR, POLYNOMIAL, TABLE, OWN, ROOFLINE = range(6)

# What a table may be about, by the place in `AXES`
AXES = (
    "tokens",
    "requests",
    "prefill_tokens",
    "prefill_requests",
    "prefill_context",
    "prefill_chunk",
    "decode_requests",
    "decode_context",
    "mean_decode_context",
)
LOOKUPS = ("linear", "up", "nearest")

Finite = Annotated[float, Range()]


class StepTime(Declaration, frozen=True, kw_only=True, tag_field="type"):
    """Base of all step-time models."""

    code: ClassVar[int]

    def coefficients(self) -> tuple[float, ...]:
        """Numbers for the kernel's rule: seven at most, of a roofline sixteen."""
        return ()


class TickStepTime(StepTime, frozen=True, kw_only=True, tag=True):
    """The tick model: a step lasts as long as its prefill chunks or its decode, and at least one tick."""

    code = TICK

    @staticmethod
    def duration(prefill_time, decode_time):
        """Duration [ticks] from the summed time of the step's chunks and the time of its decode (0 if none).

        The sum adds equal terms one by one, as the reference does: n chunks take S[n] = S[n - 1] + chunk,
        which differs from n x chunk in the last bit.
        """
        return max(prefill_time, decode_time, 1.0)


class LinearStepTime(StepTime, frozen=True, kw_only=True, tag=True):
    """A sum of what the batch does times a coefficient each.

    Parameters
    ----------
    base : float
        Of every step [s].
    per_request : float
        For each request scheduled in the step, prefilling or decoding [s].
    per_prefill_token : float
        For each prompt token computed [s].
    per_decode_request : float
        For each decoding request [s].
    per_context_token : float
        For each token in the context of the decoding requests, the one being written included [s].
    per_prefill_attention : float
        For each pair of a prompt token and one that it attends to: sum over chunks of
        tokens x (context before + tokens / 2) [s].
    per_prefill_step : float
        Of every step in which anything prefills [s].

    Raises
    ------
    ValueError
        When one is negative, or all are 0.
    """

    base: NonNegative = 0.0
    per_request: NonNegative = 0.0
    per_prefill_token: NonNegative = 0.0
    per_decode_request: NonNegative = 0.0
    per_context_token: NonNegative = 0.0
    per_prefill_attention: NonNegative = 0.0
    per_prefill_step: NonNegative = 0.0

    code = LINEAR

    def __post_init__(self) -> None:
        super().__post_init__()
        prefill = self.per_prefill_token + self.per_prefill_attention + self.per_prefill_step
        decode = self.per_decode_request + self.per_context_token
        if not (self.base + self.per_request > 0 or (prefill > 0 and decode > 0)):
            raise ValueError(
                "every step must take time: base or per_request must be > 0, "
                "or a coefficient of prefills and one of decodes"
            )

    def coefficients(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in self.__struct_fields__)


class PolynomialStepTime(StepTime, frozen=True, kw_only=True, tag=True):
    """Quadratic in the prompt tokens, quadratic in the share of KV memory in use.

    prefill = prefill_square x n^2 + prefill_linear x n + prefill_base (0 if nothing prefills), where n = k x
    floor(prompt tokens / k) over the step's k chunks; decode = max(least, decode_square x u^2 + decode_linear x u +
    decode_base) if any request decodes, where u = min(1, their context tokens / KV capacity in tokens). A step takes
    the sum [s].

    Notes
    -----
    The defaults are the baseline of NVIDIA Dynamo's mocker, published as uncalibrated.
    """

    prefill_square: Finite = 4.209989e-10
    prefill_linear: Finite = 1.518344e-5
    prefill_base: Finite = 16.50142e-3
    decode_square: Finite = -25.74e-3
    decode_linear: Finite = 54.01e-3
    decode_base: Finite = 5.74e-3
    least: NonNegative = 1e-3

    code = POLYNOMIAL

    def coefficients(self) -> tuple[float, ...]:
        return tuple(getattr(self, name) for name in self.__struct_fields__)


class TableTerm(Declaration, frozen=True, kw_only=True):
    """A measured table of one or two aggregates of the batch.

    Parameters
    ----------
    axes : tuple of str
        One or two of `AXES`: tokens (prompt and output tokens of the step), requests, prefill_tokens, prefill_requests,
        prefill_context (sum over the prefilling requests of the tokens before, each rounded up to `context_step`),
        prefill_chunk (root of the sum of the chunks' squares), decode_requests, decode_context, mean_decode_context.
        A table of prefills counts where anything prefills, one of decodes where anything decodes.
    grid, other_grid : array of float
        Ascending places along each axis.
    values : array of float
        Seconds at each place; one row for each place of the first axis.
    lookup, other_lookup : "linear", "up" or "nearest"
        Between places: interpolate, take the next above, or the nearest.
    factor_if_many : float
        Times this, where more than one request prefills (decodes).
    """

    axes: tuple[str, ...]
    grid: Any
    other_grid: Any = None
    values: Any
    lookup: Literal["linear", "up", "nearest"] = "linear"
    other_lookup: Literal["linear", "up", "nearest"] = "linear"
    factor_if_many: NonNegative = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            not 1 <= len(self.axes) <= 2
            or any(axis not in AXES for axis in self.axes)
            or len(set(self.axes)) < len(self.axes)
        ):
            raise ValueError(f"axes must be one or two different ones of {', '.join(AXES)}, got {self.axes!r}")
        grid = check_array("grid", self.grid, float)
        sizes: tuple[int, ...] = (len(grid),)
        msgspec.structs.force_setattr(self, "grid", grid)
        if (self.other_grid is None) != (len(self.axes) == 1):
            raise ValueError("other_grid must be given for two axes, and only then")
        if self.other_grid is not None:
            other = check_array("other_grid", self.other_grid, float)
            msgspec.structs.force_setattr(self, "other_grid", other)
            sizes = (*sizes, len(other))
        for name in ("grid", "other_grid")[: len(sizes)]:
            places = getattr(self, name).array
            if len(places) < 2 or (places[1:] <= places[:-1]).any():
                raise ValueError(f"{name} must be two or more ascending numbers, got {getattr(self, name)!r}")
        values = check_array("values", self.values, float, dims=len(sizes))
        if values.array.shape != sizes:
            raise ValueError(f"values must have the shape {sizes} of the grid, got {values.array.shape}")
        if (values.array < 0).any():
            raise ValueError(f"values must be >= 0, got {values.array.min():g} among them")
        msgspec.structs.force_setattr(self, "values", values)


class TableStepTime(StepTime, frozen=True, kw_only=True, tag=True):
    """A sum of measured tables of what the batch does.

    Outside a table it extrapolates linearly from the last two places, never below 0, and a run that needed it warns
    once.

    Parameters
    ----------
    terms : tuple of TableTerm
        Their values are added up [s].
    context_step : int
        What `prefill_context` is rounded up to for each request [tokens].
    file, format : str, optional
        Read the terms from a file instead. "vidur": the `step_tables_ms_per_layer.npz` of a run of Vidur's. "csv": one
        or two columns named as axes and a column `seconds`, a row for each place of the grid.

    Raises
    ------
    ValueError
        When a table isn't right, or the file can't be read.
    """

    terms: tuple[TableTerm, ...] = ()
    context_step: Annotated[int, Range(1, 2**20)] = 1
    file: str | None = None
    format: Literal["csv", "vidur"] = "csv"

    code = TABLE

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.file is not None and not self.terms:
            from vecsim.step_tables import read_terms

            terms, context_step = read_terms(Path(self.file), self.format)
            msgspec.structs.force_setattr(self, "terms", terms)
            msgspec.structs.force_setattr(self, "context_step", context_step)
        terms = tuple(self.terms) if isinstance(self.terms, Sequence) else (self.terms,)
        if not terms or any(not isinstance(term, TableTerm) for term in terms):
            raise ValueError(f"terms must be one TableTerm or more, or file name a table, got {shown(self.terms)}")
        msgspec.structs.force_setattr(self, "terms", terms)

    def label(self) -> str:
        return f"TableStepTime({self.file})" if self.file else f"TableStepTime({len(self.terms)} terms)"


class CustomStepTime(StepTime, frozen=True, kw_only=True, tag=True):
    """A step time of one's own; the function alone may stand where a step time is asked for.

    Parameters
    ----------
    rule : function
        Compiled with `numba.njit`. Gets what a step does (see `vecsim.kernel.state.StepBatch`) and returns how long it
        takes [s], > 0. Text of the form "module:name" names one to be imported; so it is written in TOML.
    parameter : float
        What the rule reads as `batch.parameter`.

    Raises
    ------
    ValueError
        When the function isn't compiled, can't be, or returns no number.
    """

    rule: Any
    parameter: Finite = 0.0

    code = OWN

    def __post_init__(self) -> None:
        super().__post_init__()
        msgspec.structs.force_setattr(self, "rule", compiled_rule(self.rule, "step"))

    @classmethod
    def standing_for(cls, value: Any) -> Self | None:
        return cls(rule=value) if stands_for(value) else None

    def coefficients(self) -> tuple[float, ...]:
        return (self.parameter,)

    @property
    def name(self) -> str:
        return name_of(self.rule)


def kernel_of(step_time: StepTime, kv_tokens: int, per_step: float) -> dict[str, Any]:
    """What a step time is in the kernel, without a table's arrays.

    Fields of `vecsim.kernel.state.Formula` by name, and `context_step`.
    """
    numbers = (*step_time.coefficients(), *[0.0] * 7)[:7]
    return {
        "code": step_time.code,
        **dict(zip("abcdefg", numbers, strict=True)),
        "per_step": per_step,
        "kv_tokens": kv_tokens,
        "context_step": step_time.context_step if isinstance(step_time, TableStepTime) else 1,
    }


def flat_tables(terms: tuple[TableTerm, ...]) -> tuple[Any, Any, Any]:
    """A table's terms, grids and values as arrays for `vecsim.kernel.duration`."""
    import numpy as np

    from vecsim.kernel.duration import AXIS, FACTOR, FIELDS, FIRST, GRID, LOOKUP, SIZE, STEP, VALUES_AT

    rows, grids, values = [], [], []
    grid_at = value_at = 0
    for term in terms:
        row = np.full(FIELDS, -1.0)
        for k, (axis, name, lookup) in enumerate(
            zip(term.axes, ("grid", "other_grid"), (term.lookup, term.other_lookup), strict=False)
        ):
            places = getattr(term, name).array
            steps = np.diff(places)
            even = bool(((places - places[0]) / steps[0] == np.arange(places.size)).all())
            row[[AXIS + k, LOOKUP + k, SIZE + k, GRID + k, FIRST + k, STEP + k]] = (
                AXES.index(axis), LOOKUPS.index(lookup), places.size, grid_at, places[0], steps[0] if even else 0.0,
            )  # fmt: skip
            grids.append(places)
            grid_at += places.size
        row[VALUES_AT], row[FACTOR] = value_at, term.factor_if_many
        values.append(term.values.array.ravel())
        value_at += term.values.array.size
        rows.append(row)
    if not rows:
        return np.empty((0, FIELDS)), np.empty(0), np.empty(0)
    return np.array(rows), np.concatenate(grids), np.concatenate(values)
