"""Where the requests of a disaggregated fleet went, and what their time to first token was made of."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vecsim.kernel.state import Array, Fleet, StepRecord
from vecsim.variables import Variable

if TYPE_CHECKING:
    import xarray as xr


class Path(NamedTuple):
    """What the kernel noted of each request [request], and of each link [link]; instants are NaN if they never came."""

    prefill_worker: Array
    remote: Array
    reserved_at: Array
    prefill_queued_at: Array
    prefilled_at: Array
    transfer_began_at: Array
    transfer_noticed_at: Array
    transfer_bytes: Array
    transfer_runs: Array
    bandwidth: Array
    moved: Array
    busy: Array


PATH_VARIABLES = (
    Variable("prefill_worker", "prefill worker", "", "worker that prefilled the request; -1: none yet", whole=True),
    Variable("remote", "prefilled remotely", "1", "1: prefilled elsewhere than at the worker that decodes", whole=True),
    Variable("reserved_at", "reservation", "s", "when its blocks were reserved at the decode worker"),
    Variable("prefill_queued_at", "begin of the wait for prefill", "s", "when it was sent to prefill"),
    Variable("prefilled_at", "end of prefill", "s", "when its remote prefill had ended"),
    Variable("transfer_began_at", "begin of transfer", "s", "when its keys and values began to move"),
    Variable("transfer_noticed_at", "end of transfer", "s", "when their arrival was noticed"),
    Variable("transfer_bytes", "bytes moved", "B", "keys and values that the decode worker lacked"),
    Variable("transfer_runs", "runs moved", "1", "stretches of blocks that moved at once", whole=True),
)

# Parts of the time to first token, in the order in which they pass
PARTS = (
    "before routing",
    "wait for decode blocks",
    "wait for prefill",
    "prefill",
    "wait for decode blocks after prefill",
    "transfer",
    "first decode step",
    "until seen",
)


def path_of(fleet: Fleet, came: Array) -> Path:
    """What is kept of a scenario's fleet; `came` is which requests came [request]."""
    from vecsim.kernel import handover, links

    requests = np.flatnonzero(came)
    way, instants = fleet.way[:, requests], fleet.instants[:, requests]
    workers = fleet.group.size
    loads = fleet.links.loads[:, : workers + 1]
    return Path(
        prefill_worker=np.where(way[handover.REMOTE] == 1, way[handover.PREFILLS_AT], way[handover.DECODES_AT]),
        remote=way[handover.REMOTE].copy(),
        reserved_at=instants[handover.RESERVED_AT].copy(),
        prefill_queued_at=instants[handover.TO_PREFILL_AT].copy(),
        prefilled_at=instants[handover.PREFILLED_AT].copy(),
        transfer_began_at=instants[handover.TRANSFER_AT].copy(),
        transfer_noticed_at=instants[handover.NOTICED_AT].copy(),
        transfer_bytes=fleet.moved[requests],
        transfer_runs=fleet.runs[requests],
        bandwidth=loads[links.BANDWIDTH].copy(),
        moved=loads[links.MOVED].copy(),
        busy=loads[links.BUSY].copy(),
    )


def ttft_parts(requests: "xr.Dataset", before_queue: float, per_token: float, first_by_prefill: bool) -> "xr.DataArray":
    """The parts of each request's time to first token [part, request], seconds; NaN where it has no first token.

    Added up in the order of `part`, they are the time to first token to the last bit: what rounding leaves is in the
    last of them.
    """
    import xarray as xr

    value = {name: requests[name].values for name in requests}
    routed = value["arrived_at"] + before_queue
    remote = value["remote"] == 1
    nothing = np.zeros(routed.size)
    reserved, queued, began = value["reserved_at"], value["prefill_queued_at"], value["transfer_began_at"]
    prefilled = np.where(remote, value["prefilled_at"], value["first_token_at"] - per_token)
    first = remote & (reserved <= queued)  # blocks were reserved before the prefill
    moves = remote & (not first_by_prefill)
    arrived = value["transfer_noticed_at"]
    parts = np.array(
        [
            nothing + before_queue,
            np.where(first, reserved - routed, 0.0),
            value["started_at"] - np.where(remote, queued, routed),
            prefilled - value["started_at"],
            np.where(moves, began - prefilled, 0.0),
            np.where(moves, arrived - began, 0.0),
            np.where(moves, value["first_token_at"] - per_token - arrived, 0.0),
            nothing + per_token,
        ]
    )
    total = value["first_token_at"] - value["arrived_at"]
    parts[:, np.isnan(total)] = np.nan
    # So near to the total, the difference is exact (Sterbenz), and so is the sum.
    parts[-1] = total - np.cumsum(parts[:-1], axis=0)[-1]
    return xr.DataArray(
        parts,
        {"part": list(PARTS), "request": requests.request.values},
        ("part", "request"),
        "ttft_parts",
        {"long_name": "parts of the time to first token", "units": "s"},
    )


def links_dataset(path: Path, time: float, prefill_workers: int) -> "xr.Dataset":
    """Each NIC, and the fabric if it has a bandwidth: bytes moved, seconds with a transfer, share of what it could."""
    import xarray as xr

    workers = path.bandwidth.size - 1
    names = [f"{'source' if worker < prefill_workers else 'destination'} {worker}" for worker in range(workers)]
    kept = np.append(np.arange(workers), workers if np.isfinite(path.bandwidth[-1]) else [])
    kept = kept.astype(np.int64)
    names = [[*names, "fabric"][i] for i in kept]
    moved, bandwidth = path.moved[kept], path.bandwidth[kept]

    def variable(values: Any, long_name: str, units: str) -> Any:
        return xr.Variable(("link",), values, {"long_name": long_name, "units": units})

    with np.errstate(invalid="ignore", divide="ignore"):
        use = np.where(np.isfinite(bandwidth), moved / (bandwidth * time), 0.0)
    return xr.Dataset(
        {
            "bandwidth": variable(bandwidth, "bandwidth", "B/s"),
            "moved": variable(moved, "bytes moved", "B"),
            "busy": variable(path.busy[kept], "time with a transfer", "s"),
            "use": variable(use, "share of the bandwidth in use", "1"),
        },
        {"link": names},
    )


def workers_dataset(steps: StepRecord, pools: list[int], blocks: list[int | None], time: float) -> "xr.Dataset":
    """What each worker did, over the whole run [worker], from the steps.

    Parameters
    ----------
    steps : StepRecord
    pools : list of int
        Workers of each pool.
    blocks : list of int or None
        Of KV memory of a worker of each pool.
    time : float
        Seconds of the run.
    """
    import xarray as xr

    from vecsim.kernel import token_state as rows

    number = sum(pools)
    worker = steps.counts[rows.STEP_WORKER]
    lasts = steps.times[rows.LASTS]

    def of_each(weights: Array) -> Array:
        return np.bincount(worker, weights, number)

    def row(name: int) -> Array:
        return steps.counts[name].astype(np.float64)

    busy = of_each(lasts)
    room = np.repeat([np.nan if size is None else float(size) for size in blocks], pools)

    def variable(values: Any, long_name: str, units: str) -> Any:
        return xr.Variable(("worker",), values, {"long_name": long_name, "units": units})

    with np.errstate(invalid="ignore", divide="ignore"):
        return xr.Dataset(
            {
                "pool": variable(np.repeat(np.arange(len(pools)), pools), "number of the pool", ""),
                "steps": variable(np.bincount(worker, minlength=number), "steps", "1"),
                "busy": variable(busy, "time in steps", "s"),
                "utilization": variable(busy / time, "share of the time in steps", "1"),
                "prefill_tokens": variable(of_each(row(rows.STEP_PREFILL_TOKENS)), "prompt tokens computed", "tokens"),
                "decode_tokens": variable(of_each(row(rows.STEP_DECODES)), "tokens decoded", "tokens"),
                "batch_size": variable(of_each(row(rows.STEP_RUNNING) * lasts) / busy, "mean requests", "requests"),
                "mean_queue": variable(of_each(row(rows.STEP_QUEUE) * lasts) / busy, "mean queue in steps", "requests"),
                "kv_use": variable(of_each(row(rows.STEP_USED) * lasts) / busy / room, "mean share of KV memory", "1"),
            },
            {"worker": np.arange(number)},
        )
