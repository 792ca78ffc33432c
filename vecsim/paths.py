"""Where the requests of a fleet went, what their time to first token was made of, and what workers and links did."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vecsim.kernel.state import Array, Fleet, StepRecord, Tiers
from vecsim.series import mean_in_intervals
from vecsim.variables import PARTS, Variable

if TYPE_CHECKING:
    import xarray as xr

    from vecsim.overheads import Overheads
    from vecsim.transfer import KVTransfer


class Path(NamedTuple):
    """What the kernel noted of each request [request], and of each link [link]; instants are NaN if they never came."""

    prefill_worker: Array
    remote: Array
    prefill_hit_tokens: Array
    reserved_at: Array
    prefill_queued_at: Array
    prefill_sent_at: Array
    prefilled_at: Array
    transfer_began_at: Array
    flow_began_at: Array
    flow_ended_at: Array
    transfer_noticed_at: Array
    decode_started_at: Array
    transfer_bytes: Array
    transfer_runs: Array
    transfer_left: Array
    bandwidth: Array
    moved: Array
    busy: Array


class Rise(NamedTuple):
    """What the kernel noted of what lower tiers had of each request [request], and of each worker's tiers."""

    host_hit_blocks: Array
    disk_hit_blocks: Array
    onboarding_began_at: Array
    onboarding_ended_at: Array
    held: Array  # [worker, tier] blocks at the end
    came: Array
    went: Array
    dropped: Array  # offers
    bandwidth: Array  # [worker, tier, way]
    moved: Array
    busy: Array


RISE_VARIABLES = (
    Variable(
        "host_hit_tokens",
        "prompt tokens in host memory",
        "tokens",
        "of `hit_tokens`, those brought up from host memory; of remote prefills of `prefill_hit_tokens`",
        whole=True,
    ),
    Variable("disk_hit_tokens", "prompt tokens on disk", "tokens", "the same of the disk", whole=True),
    Variable("onboarding_began_at", "begin of onboarding", "s", "when blocks of lower tiers began to come up for it"),
    Variable("onboarding_ended_at", "end of onboarding", "s", "when they were there"),
    Variable("onboarding_time", "time to bring blocks up", "s", "from the begin to the end of the onboarding"),
)

# Names of tiers, in the order of the kernel's, and of the ways of their links
TIERS, WAYS = ("host", "disk"), ("down", "up")

PATH_VARIABLES = (
    Variable("prefill_worker", "prefill worker", "", "worker that prefilled the request; -1: none yet", whole=True),
    Variable("remote", "prefilled remotely", "1", "1: prefilled elsewhere than at the worker that decodes", whole=True),
    Variable(
        "prefill_hit_tokens",
        "cached prompt tokens at the prefill worker",
        "tokens",
        "found in the prefix cache when its remote prefill was admitted; `hit_tokens` are those of the decode worker",
        whole=True,
    ),
    Variable("reserved_at", "reservation", "s", "when its blocks were reserved at the decode worker"),
    Variable(
        "prefill_queued_at", "begin of the wait for prefill", "s", "when it was sent to prefill, or queued for it"
    ),
    Variable("prefill_sent_at", "arrival at the prefill worker", "s", "when it was sent to its prefill worker"),
    Variable("prefilled_at", "end of prefill", "s", "when its remote prefill had ended"),
    Variable("transfer_began_at", "begin of transfer", "s", "when the transfer of its keys and values was set up"),
    Variable("flow_began_at", "begin of flow", "s", "when their bytes began to flow"),
    Variable("flow_ended_at", "end of flow", "s", "when all of their bytes had come"),
    Variable("transfer_noticed_at", "end of transfer", "s", "when their arrival was noticed"),
    Variable(
        "decode_started_at", "start at the decode worker", "s", "begin of its first step there after a remote prefill"
    ),
    Variable("transfer_bytes", "bytes moved", "B", "keys and values that the decode worker lacked"),
    Variable("transfer_runs", "runs moved", "1", "stretches of blocks that moved at once", whole=True),
    Variable("transfer_left", "share moved after the prefill", "1", "what wasn't hidden behind the prefill; 1: all"),
)

TRANSFER_TIME = Variable("transfer_time", "transfer time", "s", "from its begin until its end was noticed")
HOP_TIME = Variable("hop_time", "wait at each hop", "s", "for decode blocks, in the prefill queue, at either worker")

# Where a request of a disaggregated fleet may wait
HOPS = ("decode blocks", "prefill queue", "prefill worker", "decode worker")

# The parts where each worker does both
TOGETHER = ("before routing", "wait for prefill", "prefill", "until seen")

# Parts before the wait for prefill, where caches have lower tiers
ONBOARDING = ("wait for onboarding", "onboarding")

TRANSFER_PARTS = ("set-up", "flow", "transpose", "polling")


def path_of(fleet: Fleet, came: Array) -> Path:
    """What is kept of a scenario's fleet; `came` is which requests came [request]."""
    from vecsim.kernel import handover, links
    from vecsim.kernel.token_state import HIT, STARTED_AT

    requests = np.flatnonzero(came)
    way, instants = fleet.way[:, requests], fleet.instants[:, requests]
    workers = fleet.group.size
    loads = fleet.links.loads[:, : workers + 1]
    remote = way[handover.REMOTE].copy()
    began = instants[handover.TRANSFER_AT].copy()
    return Path(
        prefill_worker=np.where(remote == 1, way[handover.PREFILLS_AT], way[handover.DECODES_AT]),
        remote=remote,
        prefill_hit_tokens=np.where(remote == 1, fleet.own[HIT, requests], 0),
        reserved_at=instants[handover.RESERVED_AT].copy(),
        prefill_queued_at=instants[handover.TO_PREFILL_AT].copy(),
        prefill_sent_at=instants[handover.SENT_AT].copy(),
        prefilled_at=instants[handover.PREFILLED_AT].copy(),
        transfer_began_at=began,
        flow_began_at=instants[handover.FLOW_AT].copy(),
        flow_ended_at=instants[handover.FLOWED_AT].copy(),
        transfer_noticed_at=instants[handover.NOTICED_AT].copy(),
        decode_started_at=np.where(remote == 1, fleet.times[STARTED_AT, requests], np.nan),
        transfer_bytes=fleet.moved[requests],
        transfer_runs=fleet.runs[requests],
        transfer_left=np.where(np.isnan(began), np.nan, fleet.left[requests]),
        bandwidth=loads[links.BANDWIDTH].copy(),
        moved=loads[links.MOVED].copy(),
        busy=loads[links.BUSY].copy(),
    )


def rise_of(tiers: Tiers, fleet: Fleet, came: Array) -> Rise:
    """What is kept of a scenario's tiers; `came` is which requests came [request]."""
    from vecsim.kernel import links
    from vecsim.kernel import tier_sets as sets
    from vecsim.kernel import tiers as rows

    requests, workers = np.flatnonzero(came), fleet.group.size
    way, instants = tiers.way[:, requests], tiers.instants[:, requests]
    shape = (workers, sets.LEVELS, rows.WAYS)
    loads = tiers.links.loads[:, : workers * sets.LEVELS * rows.WAYS]

    def of_tiers(first: int) -> Array:
        return tiers.numbers[first : first + sets.LEVELS, :workers].T.copy()

    return Rise(
        host_hit_blocks=way[sets.HOST_BLOCKS].copy(),
        disk_hit_blocks=way[sets.DISK_BLOCKS].copy(),
        onboarding_began_at=instants[sets.BEGAN_AT].copy(),
        onboarding_ended_at=instants[sets.ENDED_AT].copy(),
        held=tiers.lists[:workers, :, sets.COUNT].copy(),
        came=of_tiers(sets.HOST_IN),
        went=of_tiers(sets.HOST_OUT),
        dropped=of_tiers(sets.HOST_DROPPED),
        bandwidth=loads[links.BANDWIDTH].reshape(shape).copy(),
        moved=loads[links.MOVED].reshape(shape).copy(),
        busy=loads[links.BUSY].reshape(shape).copy(),
    )


def rise_values(rise: Rise, block_size: int) -> dict[str, Array]:
    """The values of `RISE_VARIABLES` [request]."""
    return {
        "host_hit_tokens": rise.host_hit_blocks * block_size,
        "disk_hit_tokens": rise.disk_hit_blocks * block_size,
        "onboarding_began_at": rise.onboarding_began_at,
        "onboarding_ended_at": rise.onboarding_ended_at,
        "onboarding_time": rise.onboarding_ended_at - rise.onboarding_began_at,
    }


def tiers_dataset(rise: Rise, time: float) -> "xr.Dataset":
    """What is below each worker's cache: blocks, and the use of its links [worker, tier, way]."""
    import xarray as xr

    with np.errstate(invalid="ignore", divide="ignore"):
        use = np.where(np.isfinite(rise.bandwidth) & (rise.bandwidth > 0), rise.moved / (rise.bandwidth * time), 0.0)
    dims, ways = ("worker", "tier"), ("worker", "tier", "way")
    return xr.Dataset(
        {
            "blocks": labelled(dims, rise.held, "blocks held at the end", "blocks"),
            "came": labelled(dims, rise.came, "blocks that came", "blocks"),
            "went": labelled(dims, rise.went, "blocks that made room for others", "blocks"),
            "dropped": labelled(dims, rise.dropped, "offers dropped, their blocks being gone", "blocks"),
            "bandwidth": labelled(ways, rise.bandwidth, "bandwidth", "B/s"),
            "moved": labelled(ways, rise.moved, "bytes moved", "B"),
            "busy": labelled(ways, rise.busy, "time with something on the link", "s"),
            "use": labelled(ways, use, "share of the bandwidth in use", "1"),
        },
        {"worker": np.arange(rise.held.shape[0]), "tier": list(TIERS), "way": list(WAYS)},
    )


def hop_times(value: dict[str, Array], before_queue: float) -> Array:
    """Seconds that each request waited at each of `HOPS` [hop, request]; NaN where it hasn't left it."""
    remote = value["remote"] == 1
    routed = value["arrived_at"] + before_queue
    asked = np.where(value["prefilled_at"] <= value["reserved_at"], value["prefilled_at"], routed)
    return np.array(
        [
            np.where(remote, value["reserved_at"] - asked, 0.0),
            np.where(remote, value["prefill_sent_at"] - value["prefill_queued_at"], 0.0),
            np.where(remote, value["started_at"] - value["prefill_sent_at"], 0.0),
            np.where(
                remote, value["decode_started_at"] - value["transfer_noticed_at"], value["started_at"] - routed
            ),
        ]
    )  # fmt: skip


def first_token_moments(requests: "xr.Dataset", overheads: "Overheads", first_by_prefill: bool) -> Array:
    """When each part of each request's time to first token ended [part, request], seconds.

    They ascend but for what rounding does. `vecsim.kernel.parts` has the same moments.
    """
    value = {str(name): requests[name].values for name in requests}
    seen = value["first_token_at"]
    token = seen - overheads.per_output_token
    routed = value["arrived_at"] + overheads.before_queue
    reserved = routed
    if "remote" in value:
        remote = value["remote"] == 1
        first = remote & (value["reserved_at"] <= value["prefill_queued_at"])  # blocks were reserved before the prefill
        reserved = np.where(first, value["reserved_at"], routed)
    rise = []
    if "onboarding_ended_at" in value:
        rose = np.isfinite(value["onboarding_ended_at"])
        rise = [np.where(rose, value[f"onboarding_{which}_at"], reserved) for which in ("began", "ended")]
    if "remote" not in value:
        return np.array([routed, *rise, value["started_at"], token, seen])
    prefilled = np.where(remote, value["prefilled_at"], token)
    moves = remote & (not first_by_prefill)
    noticed = np.where(moves, value["transfer_noticed_at"], prefilled)
    decodes = value["decode_started_at"]  # NaN if it lost its blocks before it was admitted
    return np.array(
        [
            routed,
            reserved,
            *rise,
            value["started_at"],
            prefilled,
            np.where(moves, value["transfer_began_at"], prefilled),
            noticed,
            np.where(moves & np.isfinite(decodes), decodes, noticed),
            token,
            seen,
        ]
    )


def exact_parts(begin: Array, moments: Array) -> Array:
    """Differences between moments that add up to the last one less the begin to the last bit, in any order; none < 0.

    Moments are rounded to the unit of the last place of that total: then parts are whole multiples of it, and no sum
    of them is rounded.
    """
    total = moments[-1] - begin
    with np.errstate(invalid="ignore"):
        offsets = np.maximum.accumulate(np.clip(moments - begin, 0.0, total), axis=0)
        offsets[-1] = total
        unit = np.spacing(total)
        offsets = np.rint(offsets / unit) * unit
    return np.diff(offsets, axis=0, prepend=np.zeros((1, total.size)))


def ttft_parts(requests: "xr.Dataset", overheads: "Overheads", first_by_prefill: bool) -> "xr.DataArray":
    """The parts of each request's time to first token [part, request], seconds; NaN where it has no first token."""
    moments = first_token_moments(requests, overheads, first_by_prefill)
    moments[:, np.isnan(moments[-1])] = np.nan
    if "migrations" in requests:  # what was lost in a crash and done anew may be missing, or come after the token
        for at in range(len(moments) - 2, -1, -1):
            moments[at] = np.fmin(moments[at], moments[at + 1])
    names: tuple[str, ...] = PARTS if "remote" in requests else TOGETHER
    if "onboarding_ended_at" in requests:
        at = names.index("wait for prefill")
        names = (*names[:at], *ONBOARDING, *names[at:])
    return _parts(
        requests, names, exact_parts(requests.arrived_at.values, moments), "ttft_parts", "time to first token"
    )


def transfer_parts(requests: "xr.Dataset", transfer: "KVTransfer") -> "xr.DataArray":
    """The parts of each request's transfer [part, request], seconds; NaN where none has been noticed."""
    numbers = transfer.kernel()
    moved, flowed = requests.transfer_bytes.values, requests.flow_ended_at.values
    transpose = moved * numbers["transpose_per_byte"] + numbers["transpose_launch"]
    transpose = np.where(moved > 0, requests.transfer_left.values * transpose, 0.0)
    noticed = requests.transfer_noticed_at.values
    moments = np.array([requests.flow_began_at.values, flowed, flowed + transpose, noticed])
    moments[:, np.isnan(noticed)] = np.nan
    parts = exact_parts(requests.transfer_began_at.values, moments)
    return _parts(requests, TRANSFER_PARTS, parts, "transfer_parts", "transfer time")


def _parts(requests: "xr.Dataset", names: tuple[str, ...], parts: Array, name: str, whole: str) -> "xr.DataArray":
    import xarray as xr

    return xr.DataArray(
        parts,
        {"part": list(names), "request": requests.request.values},
        ("part", "request"),
        name,
        {"long_name": f"parts of the {whole}", "units": "s"},
    )


def labelled(dims: tuple[str, ...], values: Any, long_name: str, units: str) -> "xr.Variable":
    import xarray as xr

    return xr.Variable(dims, values, {"long_name": long_name, "units": units})


def links_dataset(path: Path, requests: "xr.Dataset", time: float, prefill_workers: int) -> "xr.Dataset":
    """Each NIC, and the fabric if it has a bandwidth: what moved over it, how long that took, and its use."""
    import xarray as xr

    workers = path.bandwidth.size - 1
    names = [f"{'source' if worker < prefill_workers else 'destination'} {worker}" for worker in range(workers)]
    kept = np.append(np.arange(workers), workers if np.isfinite(path.bandwidth[-1]) else [])
    kept = kept.astype(np.int64)
    names = [[*names, "fabric"][i] for i in kept]

    noticed = np.flatnonzero(np.isfinite(path.transfer_noticed_at) & (path.transfer_bytes > 0))
    ends = np.append(path.prefill_worker[noticed], requests.worker.values[noticed])

    def of_each(values: Array) -> Array:
        """Sums over the transfers of each link."""
        return np.append(np.bincount(ends, np.tile(values[noticed], 2), workers), values[noticed].sum())[kept]

    bandwidth, moved = path.bandwidth[kept], path.moved[kept]
    if not np.isfinite(path.bandwidth).any():  # all is there at once, and links don't count
        moved = of_each(path.transfer_bytes * path.transfer_left)
    transfers = of_each(np.ones(path.remote.size)).astype(np.int64)
    with np.errstate(invalid="ignore", divide="ignore"):
        use = np.where(np.isfinite(bandwidth), moved / (bandwidth * time), 0.0)
        mean = of_each(requests.transfer_time.values) / transfers
    dims = ("link",)
    return xr.Dataset(
        {
            "bandwidth": labelled(dims, bandwidth, "bandwidth", "B/s"),
            "moved": labelled(dims, moved, "bytes moved after their prefill", "B"),
            "busy": labelled(dims, path.busy[kept], "time with a transfer", "s"),
            "use": labelled(dims, use, "share of the bandwidth in use", "1"),
            "transfers": labelled(dims, transfers, "transfers that have ended", "transfers"),
            "mean_transfer_time": labelled(dims, mean, "mean transfer time, set-up to notice", "s"),
        },
        {"link": names},
    )


def workers_dataset(
    steps: StepRecord, requests: "xr.Dataset", pools: list[int], blocks: list[int | None], time: float
) -> "xr.Dataset":
    """What each worker did, over the whole run [worker], from the steps and the requests.

    Parameters
    ----------
    steps : StepRecord
    requests : xarray.Dataset
        `Run.requests`.
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

    def most(name: int) -> Array:
        highest = np.zeros(number)
        np.maximum.at(highest, worker, row(name))
        return highest

    busy = of_each(lasts)
    room = np.repeat([np.nan if size is None else float(size) for size in blocks], pools)
    sent, prompts, hits = requests_of_workers(requests, number)
    dims = ("worker",)
    with np.errstate(invalid="ignore", divide="ignore"):
        return xr.Dataset(
            {
                "pool": labelled(dims, np.repeat(np.arange(len(pools)), pools), "number of the pool", ""),
                "requests": labelled(dims, sent, "requests sent there", "requests"),
                "steps": labelled(dims, np.bincount(worker, minlength=number), "steps", "1"),
                "busy": labelled(dims, busy, "time in steps", "s"),
                "utilization": labelled(dims, busy / time, "share of the time in steps", "1"),
                "prefill_tokens": labelled(
                    dims, of_each(row(rows.STEP_PREFILL_TOKENS)), "prompt tokens computed", "tokens"
                ),
                "decode_tokens": labelled(dims, of_each(row(rows.STEP_DECODES)), "tokens decoded", "tokens"),
                "prompt_tokens": labelled(dims, prompts, "prompt tokens looked up in the cache", "tokens"),
                "hit_tokens": labelled(dims, hits, "of these, tokens found", "tokens"),
                "prefix_hit_rate": labelled(dims, hits / prompts, "prefix hit rate", "1"),
                "batch_size": labelled(
                    dims, of_each(row(rows.STEP_RUNNING) * lasts) / busy, "mean requests", "requests"
                ),
                "mean_queue": labelled(
                    dims, of_each(row(rows.STEP_QUEUE) * lasts) / busy, "mean queue in steps", "requests"
                ),
                "max_queue": labelled(dims, most(rows.STEP_QUEUE), "largest queue in a step", "requests"),
                "kv_use": labelled(
                    dims, of_each(row(rows.STEP_USED) * lasts) / busy / room, "mean share of KV memory in steps", "1"
                ),
                "kv_peak": labelled(dims, most(rows.STEP_USED) / room, "largest share of KV memory in a step", "1"),
            },
            {"worker": np.arange(number)},
        )


def requests_of_workers(requests: "xr.Dataset", number: int) -> tuple[Array, Array, Array]:
    """(requests sent there, prompt tokens that its cache was asked for, tokens found) of each worker [worker]."""
    value = {str(name): requests[name].values for name in requests}
    worker, started = value["worker"], np.isfinite(value["started_at"])
    remote = value["remote"] == 1 if "remote" in value else np.zeros(worker.size, bool)

    def of_each(where: Array, which: Array, weights: Array) -> Array:
        return np.bincount(where[which], weights[which], number)

    ones = np.ones(worker.size)
    sent = of_each(worker, worker >= 0, ones)
    asked = ~remote & started
    if remote.any():
        asked |= remote & np.isfinite(value["reserved_at"])
    prompts, hits = (of_each(worker, asked, value[name]) for name in ("prompt_tokens", "hit_tokens"))
    if remote.any():
        there, began = value["prefill_worker"], remote & started
        sent = sent + of_each(there, remote & (there >= 0), ones)
        prompts = prompts + of_each(there, began, value["prompt_tokens"])
        hits = hits + of_each(there, began, value["prefill_hit_tokens"])
    return sent.astype(np.int64), prompts, hits


def workers_over_time(
    steps: StepRecord, pools: list[int], blocks: list[int | None], time: float, intervals: int
) -> "xr.Dataset":
    """Means of what each worker did in equal intervals of the run [worker, time]; see `workers_dataset`."""
    import xarray as xr

    from vecsim.kernel import token_state as rows

    edges = np.linspace(0.0, time, intervals + 1)
    own = [np.flatnonzero(steps.counts[rows.STEP_WORKER] == worker) for worker in range(sum(pools))]

    def means(values: Array) -> Array:
        return np.array(
            [
                mean_in_intervals(steps.times[rows.BEGIN, of], steps.times[rows.LASTS, of], values[of], edges)
                for of in own
            ]
        )

    room = np.repeat([np.nan if size is None else float(size) for size in blocks], pools)[:, np.newaxis]
    dims = ("worker", "time")
    return xr.Dataset(
        {
            "utilization": labelled(dims, means(np.ones(steps.times.shape[1])), "share of the time in steps", "1"),
            "prefilling": labelled(dims, means(steps.counts[rows.STEP_PREFILLS]), "prefilling requests", "requests"),
            "decoding": labelled(dims, means(steps.counts[rows.STEP_DECODES]), "decoding requests", "requests"),
            "running": labelled(dims, means(steps.counts[rows.STEP_RUNNING]), "running requests", "requests"),
            "queue_size": labelled(dims, means(steps.counts[rows.STEP_QUEUE]), "queue size", "requests"),
            "kv_use": labelled(dims, means(steps.counts[rows.STEP_USED]) / room, "share of KV memory in use", "1"),
        },
        {
            "worker": np.arange(sum(pools)),
            "time": labelled(("time",), (edges[:-1] + edges[1:]) / 2, "middle of the interval", "s"),
        },
    )
