"""Kernel results -> labelled xarray Datasets that describe themselves."""

from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.axes import TAKEN, Plan
from vecsim.declaration import Declaration, as_json, to_plain
from vecsim.kernel.state import Array, TokenRecord
from vecsim.variables import (
    APART_VARIABLES,
    CHANGING_VARIABLES,
    CLASS_VARIABLES,
    FLEET_REQUEST_VARIABLES,
    PARTS,
    REQUEST_VARIABLES,
    STEP_VARIABLES,
    TIER_VARIABLES,
    TOKEN_REQUEST_VARIABLES,
    TOKEN_STEP_VARIABLES,
    VIEW_VARIABLES,
    Variable,
    metric_variables,
    stat_labels,
)

if TYPE_CHECKING:
    import xarray as xr


def metrics_dataset(
    metrics: Array,
    sizes: dict[str, int],
    coords: dict[str, Any],
    quantiles: tuple[float, ...],
    attrs: dict[str, Any],
    token: bool = False,
    classes: tuple[str, ...] = (),
    apart: bool = False,
    changing: bool = False,
    tiered: bool = False,
    viewing: bool = False,
) -> "xr.Dataset":
    """A Dataset of all output variables over the dimensions in `sizes` (and `stat`, and `class` if there are any).

    `apart` is whether it is of fleets that keep prefill apart: then there is `part` too; `changing` whether workers of
    any fleet come and go, `tiered` whether any worker has tiers below its cache, `viewing` whether any router goes by
    what is cached.
    """
    import xarray as xr

    dims = tuple(sizes)
    shape = tuple(sizes.values())
    stats = stat_labels(quantiles)
    variables = {}
    at = 0
    for variable in metric_variables(token):
        width = len(stats) if variable.over_stat else 1
        values = metrics[:, at : at + width]  # a view; the reshape below copies nothing
        at += width
        if variable.over_stat:
            variables[variable.name] = describe(variable, (*dims, "stat"), values.reshape(*shape, width))
        else:
            variables[variable.name] = describe(variable, dims, values.reshape(shape))
    coords = {**coords, "stat": ("stat", np.array(stats))}
    if classes:
        width = len(classes) * len(CLASS_VARIABLES)
        by_class = metrics[:, at : at + width].reshape(*shape, len(classes), len(CLASS_VARIABLES))
        at += width
        for i, variable in enumerate(CLASS_VARIABLES):
            variables[variable.name] = describe(variable, (*dims, "class"), by_class[..., i])
        coords["class"] = ("class", np.array(classes))
    if apart:
        *scalars, parts = APART_VARIABLES
        for i, variable in enumerate(scalars):
            variables[variable.name] = describe(variable, dims, metrics[:, at + i].reshape(shape))
        at += len(scalars)
        values = metrics[:, at : at + len(PARTS)].reshape(*shape, len(PARTS))
        at += len(PARTS)
        variables[parts.name] = describe(parts, (*dims, "part"), values)
        coords["part"] = ("part", np.array(PARTS))
    more = (
        *(VIEW_VARIABLES if viewing else ()),
        *(TIER_VARIABLES if tiered else ()),
        *(CHANGING_VARIABLES if changing else ()),
    )
    if more:
        for i, variable in enumerate(more):
            variables[variable.name] = describe(variable, dims, metrics[:, at + i].reshape(shape))
    return xr.Dataset(variables, coords, attrs)


def describe(variable: Variable, dims: tuple[str, ...], values: Array) -> "xr.Variable":
    """A labelled array of one output variable."""
    import xarray as xr

    if variable.whole:
        values = values.astype(np.int64)
    attrs = {"long_name": variable.long_name, "units": variable.units, "description": variable.doc}
    return xr.Variable(dims, values, attrs)


def record_variables(
    record: Any, dims: tuple[str, ...], shape: tuple[int, ...], fleet: bool = False
) -> "dict[str, xr.Variable]":
    """The per-request arrays, over `dims` and `request`."""
    variables = [*(TOKEN_REQUEST_VARIABLES if isinstance(record, TokenRecord) else REQUEST_VARIABLES)]
    variables += FLEET_REQUEST_VARIABLES if fleet else ()
    return {
        variable.name: describe(variable, (*dims, "request"), getattr(record, variable.name).reshape(*shape, -1))
        for variable in variables
    }


def queue_variables(
    queue: Array, instants: Array, dims: tuple[str, ...], shape: tuple[int, ...], token: bool = False
) -> "dict[str, xr.Variable]":
    """The queue size, over `dims` and `time`, and its instants."""
    by_name = {variable.name: variable for variable in (TOKEN_STEP_VARIABLES if token else STEP_VARIABLES)}
    time = by_name["time"]._replace(long_name="time", doc="instant")
    return {
        "queue_size": describe(by_name["queue_size"], (*dims, "time"), queue.reshape(*shape, -1)),
        "time": describe(time, ("time",), instants),
    }


def axis_coords(plan: Plan) -> dict[str, Any]:
    """Coordinates of a plan's axes: plain data, with units where the field has them."""
    coords: dict[str, Any] = {}
    for name, values in plan.coords.items():
        coords[name] = (name, values)
    for axis in plan.axes:
        if not axis.dims:
            continue
        field = axis.path.rpartition(".")[2]
        # `workers` alone would not tell of which pool
        named = field if axis.name == axis.path and field in TAKEN else axis.name
        attrs = {"long_name": named.replace(field, FIELD_WORDS.get(field, field)).replace("_", " ").replace(".", " ")}
        if units := field_units(field, plan.engine.is_token):
            attrs["units"] = units
        if axis.is_component:
            # Labels are short; the whole declarations are kept beside them.
            plain = [to_plain(value) if isinstance(value, Declaration) else value for value in axis.values.flat]
            attrs["declarations"] = as_json(plain)
        coords[axis.name] = (axis.dims, axis.labels(), attrs)
    return coords


def field_units(field: str, token: bool) -> str:
    """The unit of a field; none if it has none."""
    units = FIELD_UNITS.get(field, "")
    return units.replace("per tick", "per second").replace("ticks", "s") if token else units


# Where a field's own name isn't what one calls it
FIELD_WORDS = {
    "start_up_time": "start-up time",
    "mtbf": "mean time between failures",
    "ttl": "lease TTL",
    "scaling": "planner",
}

FIELD_UNITS = {
    "request_rate": "requests per tick",
    "prefill_time": "ticks",
    "itl": "ticks",
    "max_batch_size": "slots",
    "total_prefill_chunks": "chunks",
    "target_output_len_tokens": "tokens",
    "target_output_len_std": "tokens",
    "output_tokens": "tokens",
    "prompt_tokens": "tokens",
    "max_num_batched_tokens": "tokens",
    "chunk_tokens": "tokens",
    "block_size": "tokens",
    "initial_batch": "requests",
    "target_concurrency": "requests",
    "think_time": "ticks",
    "kv_transfer_time": "ticks",
    "start_up_time": "ticks",
    "start_up_std": "ticks",
    "mtbf": "ticks",
    "ttl": "ticks",
    "renewal": "ticks",
    "connect_timeout": "ticks",
    "shun": "ticks",
    "break_delay": "ticks",
    "watch": "ticks",
    "request_plane": "ticks",
    "queue_push": "ticks",
    "queue_pop": "ticks",
    "interval": "ticks",
    "bandwidth": "bytes per tick",
    "host_bandwidth": "bytes per tick",
    "disk_bandwidth": "bytes per tick",
    "host_blocks": "blocks",
    "disk_blocks": "blocks",
    "kv_bytes_per_token": "bytes",
}


def base_attrs(engine: Any, time_limit: float, warmup: float) -> dict[str, Any]:
    """What made a Dataset: the declaration as JSON, the package's version, the times."""
    from vecsim import __version__

    return {
        "declaration": engine.to_json(),
        "vecsim_version": __version__,
        "time_limit": time_limit,  # infinite if there was none
        "warmup": warmup,
    }
