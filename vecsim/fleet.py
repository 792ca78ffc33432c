"""Fleets: many engines behind a router, prefill and decode together or apart."""

import itertools
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeGuard, cast

import msgspec

from vecsim.batching import AnyBatcher, TokenBudgetBatcher
from vecsim.control_plane import ControlPlane
from vecsim.declaration import Count, Declaration, Range, Time, shown
from vecsim.engine import AnyStepTime, Engine
from vecsim.kv_cache import KVCache
from vecsim.load import SLO, AnyLoadGenerator
from vecsim.overheads import Overheads
from vecsim.roofline import RooflineStepTime
from vecsim.routing import (
    ROUTERS,
    TICK_ROUTERS,
    AnyRouter,
    CustomRouter,
    KVAwareRouter,
    LeastOutstandingRouter,
    OverlapRouter,
    RoundRobinRouter,
)
from vecsim.scaling import AnyPlanner
from vecsim.step_time import TickStepTime
from vecsim.transfer import KVTransfer, check_same_kv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vecsim.run import Run

Workers = Annotated[int, Range(1, 2**16)]
Tokens = Annotated[int, Range(0, 2**30)]
Share = Annotated[float, Range(0, 1)]


class Pool(Declaration, frozen=True, kw_only=True):
    """Workers that are alike.

    Parameters
    ----------
    workers : int
        How many.
    max_batch_size : int
        Slots of the running batch of each.
    batcher : Batcher
        Who is let into the running batch.
    step_time : StepTime
        How long a step takes [seconds, or ticks with `TickStepTime`].
    kv_cache : KVCache, optional
        KV memory of each; endless unless given.
    max_model_len : int, optional
        Prompt and output tokens of the longest request that is served.
    gpus : int
        GPUs of each worker, which cost from when it begins to start.
    start_up_time, start_up_std : float
        Seconds that a worker takes to start: fixed, or lognormal with that mean and standard deviation.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    workers: Workers = 1
    max_batch_size: Count = 256
    batcher: AnyBatcher = TokenBudgetBatcher()
    step_time: AnyStepTime
    kv_cache: KVCache | None = None
    max_model_len: Annotated[int, Range(2, 2**30)] | None = None
    gpus: Count = 1
    start_up_time: Time = 0.0
    start_up_std: Time = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_up_std > 0.0 and self.start_up_time == 0.0:
            raise ValueError(f"start_up_time must be > 0 where start_up_std is, got 0 and {self.start_up_std:g}")

    @property
    def start_up(self) -> tuple[float, float]:
        """The start-up time as the kernel has it: seconds and 0, or mean and deviation of its logarithm."""
        if self.start_up_std == 0.0:
            return self.start_up_time, 0.0
        variance = math.log1p((self.start_up_std / self.start_up_time) ** 2)
        return math.log(self.start_up_time) - variance / 2, math.sqrt(variance)

    @classmethod
    def of(cls, engine: Engine, workers: int = 1, **fields: Any) -> Self:
        """Workers like an engine, whose load, overheads and SLO are for the fleet to declare.

        Parameters
        ----------
        engine : Engine
        workers : int
            How many.
        **fields
            Others of the pool, such as `start_up_time`; `gpus` are those that the step time's model is shared out
            among, unless given.

        Returns
        -------
        Pool

        Raises
        ------
        ValueError
            When it is no engine, or a field has a wrong value.
        TypeError
            When a field is unknown.
        """
        if not isinstance(engine, Engine):
            raise ValueError(f"engine must be an Engine, got {shown(engine)}")
        own = {name: getattr(engine, name) for name in cls.__struct_fields__ if name in type(engine).__struct_fields__}
        gpus = engine.step_time.tp if isinstance(engine.step_time, RooflineStepTime) else 1
        return cls(**{"gpus": gpus, **own, "workers": workers, **fields})

    def engine(self, load_generator: AnyLoadGenerator, overheads: Overheads, slo: SLO | None) -> Engine:
        """One of the workers as an engine alone."""
        return Engine(
            max_batch_size=self.max_batch_size,
            load_generator=load_generator,
            batcher=self.batcher,
            step_time=self.step_time,
            kv_cache=self.kv_cache and msgspec.structs.replace(self.kv_cache, tiers=None),  # they are the worker's own
            max_model_len=self.max_model_len,
            overheads=overheads,
            slo=slo,
        )

    @property
    def is_numbered(self) -> bool:
        """Pools of one field are told by their places: `pool.0.workers`."""
        return True

    @property
    def summary(self) -> str:
        """Short text."""
        return f"{self.workers} x ({self.batcher.label()}, {self.max_batch_size} slots)"


Pools = Pool | tuple[Pool, ...]


def listed(pools: Pools) -> tuple[Pool, ...]:
    """Pools, also where there is one."""
    return pools if isinstance(pools, tuple) else (pools,)


class Fleet(Declaration, frozen=True, kw_only=True, tag=True):
    """What all fleets have in common.

    Parameters
    ----------
    load_generator : LoadGenerator
        When requests arrive at the router and how long they are.
    overheads : Overheads
        Time outside the steps; `before_queue` passes before a request is routed.
    slo : SLO, optional
        Limits of requests whose class has none of its own.
    control_plane : ControlPlane, optional
        How workers crash, and who learns of it when; they don't unless given.
    scaling : Planner, optional
        When workers are added and taken away; never unless given.
    """

    load_generator: AnyLoadGenerator
    overheads: Overheads = Overheads()
    slo: SLO | None = None
    control_plane: ControlPlane | None = None
    scaling: AnyPlanner | None = None

    @property
    def pools(self) -> tuple[Pool, ...]:
        """All pools, in the order in which their workers are numbered."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """Short text: what serves."""
        raise NotImplementedError

    def kernel(self) -> dict[str, float]:
        """What the kernel is told besides the pools, in the order of its numbers."""
        raise NotImplementedError

    def routed(self) -> tuple[tuple[AnyRouter, tuple[Pool, ...]], ...]:
        """All routers, and the pools of each."""
        raise NotImplementedError

    def own_router(self) -> Any:
        """The rule of a router of the user's own; None if there is none."""
        return next((router.rule for router, _ in self.routed() if isinstance(router, CustomRouter)), None)

    def _check_pools(self) -> None:
        """Refuse pools that can't make up one fleet."""
        ticks = [isinstance(pool.step_time, TickStepTime) for pool in self.pools]
        if any(ticks) and not all(ticks):
            raise ValueError("step_time must be TickStepTime in all pools, or in none: ticks aren't seconds")
        if any(ticks):
            for field in ("scaling", "control_plane"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} must not be given in the tick model, got {shown(getattr(self, field))}")
            self._check_ticks()
        if self.scaling is not None:
            self._check_scaling(self.scaling)
        if self.control_plane is not None:
            for _, worker in self.control_plane.crashes:
                if worker >= sum(self.places()):
                    raise ValueError(f"crashes must be of workers below {sum(self.places())}, got {worker}")
            for field in () if self.queued else ("queue_push", "queue_pop"):
                if (value := getattr(self.control_plane, field)) > 0.0:
                    raise ValueError(
                        f"control_plane.{field} must be 0 where there is no queue for prefill, got {value:g}"
                    )
        self.engines()  # refuses what an engine would
        if len({router.rule for router, _ in self.routed() if isinstance(router, CustomRouter)}) > 1:
            raise ValueError("router and prefill_router must have the same rule of one's own, got two")
        sizes = {pool.kv_cache.block_size for pool in self.pools if pool.kv_cache and pool.kv_cache.prefix_caching}
        if len(sizes) > 1:
            raise ValueError(f"block_size must be the same in pools that cache prefixes, got {sorted(sizes)}")
        for router, pools in self.routed():
            sizes = {(pool.kv_cache or KVCache()).block_size for pool in pools}
            if isinstance(router, KVAwareRouter | OverlapRouter) and len(sizes) > 1:
                raise ValueError(
                    f"block_size must be the same in all pools of {type(router).__name__}, which counts in blocks, "
                    f"got {sorted(sizes)}"
                )

    def _check_scaling(self, planner: AnyPlanner) -> None:
        """Refuse a planner that this fleet can't have."""
        if len(self.pools) != self.roles:
            raise ValueError(f"scaling needs one pool of each kind, got {len(self.pools)} pools")
        planner.check_fleet(self.pools[-1].gpus, self.pools[0].gpus if self.roles > 1 else None)

    def places(self) -> list[int]:
        """Workers of each pool that there are places for: those that drain beside those that have come since."""
        if self.scaling is None:
            return [pool.workers for pool in self.pools]
        names = ("prefill", "decode")[-self.roles :]
        others = [pool.gpus for pool in reversed(self.pools)] if self.roles > 1 else [0]
        most = (
            self.scaling.places(name, pool.workers, pool.gpus, other)  # type: ignore[arg-type]
            for name, pool, other in zip(names, self.pools, others, strict=True)
        )
        return [2 * places for places in most]

    @property
    def changes(self) -> bool:
        """Whether workers come and go, or messages to them take time."""
        return self.scaling is not None or (self.control_plane is not None and self.control_plane.matters)

    @property
    def roles(self) -> int:
        """Kinds of work that pools are for: one, or prefill and decode."""
        return 1

    @property
    def queued(self) -> bool:
        """Whether all prefill workers share one queue."""
        return False

    def _check_ticks(self) -> None:
        """Refuse what this fleet can't be in the tick model."""
        raise ValueError(
            "step_time of a pool must be in seconds, got TickStepTime: in ticks there is TickDisaggregatedEngine"
        )

    def engines(self) -> tuple[Engine, ...]:
        """A worker of each pool as an engine alone."""
        return tuple(pool.engine(self.load_generator, self.overheads, self.slo) for pool in self.pools)

    @property
    def workers(self) -> int:
        """Workers of all pools."""
        return sum(pool.workers for pool in self.pools)

    def slots(self) -> list[int]:
        """Slots of each worker."""
        return [pool.max_batch_size for pool in self.pools for _ in range(pool.workers)]

    @property
    def max_batch_size(self) -> int:
        """Slots of all workers."""
        return sum(pool.workers * pool.max_batch_size for pool in self.pools)

    @property
    def kv_blocks(self) -> int | None:
        """Blocks of KV memory of all workers; None if that of any is endless."""
        blocks = [pool.workers * pool.kv_cache.blocks for pool in self.pools if pool.kv_cache and pool.kv_cache.blocks]
        return sum(blocks) if len(blocks) == len(self.pools) else None

    @property
    def cached_block_size(self) -> int:
        """Tokens of a block in the pools that cache prefixes."""
        return next(pool.kv_cache.block_size for pool in self.pools if pool.kv_cache and pool.kv_cache.prefix_caching)

    @property
    def caches_prefixes(self) -> bool:
        """Whether prompts find what others left in the KV memory of a worker."""
        return any(engine.caches_prefixes for engine in self.engines())

    @property
    def is_token(self) -> bool:
        """Whether this is the token model."""
        return not any(isinstance(pool.step_time, TickStepTime) for pool in self.pools)

    def run(
        self, time_limit: float | None = None, *, warmup: float = 0.0, quantiles: "Sequence[float] | None" = None
    ) -> "Run":
        """Simulate once and keep every request and step; see `Engine.run`."""
        from vecsim.run import run

        return run(cast(AnyEngine, self), time_limit, warmup=warmup, quantiles=quantiles)


def is_changing(engine: object) -> TypeGuard[Fleet]:
    """Whether an engine is a fleet whose workers come and go, or are sent messages that take time."""
    return isinstance(engine, Fleet) and engine.changes


def router_numbers(router: AnyRouter, place: Literal["all", "prefill", "decode"]) -> dict[str, float]:
    """The numbers of a router, in the order of the kernel's; `place` is what its workers do."""
    credit, scale, temperature, latency, host, disk = router.numbers()
    if place == "decode" and isinstance(router, KVAwareRouter):
        credit = 0.0  # what is cached doesn't count there
    numbers = (ROUTERS.index(type(router)), credit, scale, place != "prefill", temperature, latency, host, disk)
    names = ("code", "credit", "scale", "decode_counts", "temperature", "latency", "host_credit", "disk_credit")
    return {f"{place}.{name}": float(number) for name, number in zip(names, numbers, strict=True)}


def transfer_numbers(transfer: KVTransfer | None) -> dict[str, float]:
    """The numbers of a transfer, in the order of the kernel's; of none, all is there at once."""
    from vecsim.kernel.state import Transfer

    numbers = (transfer or KVTransfer()).kernel()
    bandwidths = (numbers[f"{place}_bandwidth"] for place in ("source", "destination", "fabric"))
    numbers["unlimited"] = min(bandwidths) == math.inf
    return {name: float(numbers[name]) for name in Transfer._fields}


class Cluster(Fleet, frozen=True, kw_only=True, tag=True):
    """Workers behind a router, each of which does prefill and decode.

    Metrics are those of all workers together; `max_queue` and `kv_peak` those of the worker with the most.

    With `TickStepTime` in its pools it is a cluster of the tick model: each worker is an engine of that model with a
    clock of its own; idle ones make steps of a tick. A request that is due is routed by how the workers are after all
    their boundaries before that instant. Its worker notices it at its first boundary from then on: its `enqueued_at`.

    A closed loop keeps `target_concurrency` requests in the whole cluster. Boundaries follow one another by time, those
    of one instant by the number of the worker. At each, after those that end there have left, as many requests as are
    missing come and are routed one by one. That worker notices its own at once, others theirs at their next boundary.

    Metrics are those of an `Engine`; `mean_queue` is the sum of the workers', each over its own boundaries, `steps` are
    those of all, and `end_time` is the latest. A request that no boundary noticed before the end hasn't arrived yet; it
    has no `enqueued_at`. `slot` is a place in the batch of its worker. Routers there are `RoundRobinRouter`,
    `RandomRouter`, `LeastOutstandingRouter`, `PowerOfTwoRouter` and `CustomRouter` (0 is all it is told of memory).

    Parameters
    ----------
    pool : Pool or tuple of Pool
        The workers; pools that differ are numbered one after the other.
    router : Router
        How a worker is chosen for each request when it arrives.
    load_generator : LoadGenerator
        When requests arrive at the router and how long they are.
    overheads : Overheads
        Time outside the steps; `before_queue` passes before a request is routed.
    slo : SLO, optional
        Limits of requests whose class has none of its own.
    control_plane : ControlPlane, optional
        How workers crash, and who learns of it when; they don't unless given.
    scaling : Planner, optional
        When workers are added and taken away; never unless given.

    Raises
    ------
    ValueError
        When a field has a wrong value, or one that another field rules out.
    """

    pool: Pools
    router: AnyRouter = RoundRobinRouter()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pools:
            raise ValueError("pool must have a worker, got none")
        self._check_pools()

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pools, also where there is one."""
        return listed(self.pool)

    @property
    def summary(self) -> str:
        """Short text: what serves."""
        return f"{self.router.label()} over {' and '.join(pool.summary for pool in self.pools)}"

    def routed(self) -> tuple[tuple[AnyRouter, tuple[Pool, ...]], ...]:
        """All routers, and the pools of each."""
        return ((self.router, self.pools),)

    def _check_ticks(self) -> None:
        for pool in self.pools:
            if pool.start_up_time > 0.0:
                raise ValueError(f"start_up_time must be 0 in the tick model, got {pool.start_up_time:g}")
        if not isinstance(self.router, TICK_ROUTERS):
            raise ValueError(f"router {type(self.router).__name__} needs a step_time in seconds, got TickStepTime")
        latency = getattr(self.router, "event_latency", 0.0)
        if latency != 0.0:
            raise ValueError(f"router.event_latency means nothing in the tick model, got {latency!r}")

    def kernel(self) -> dict[str, float]:
        """What the kernel is told besides the pools, in the order of its numbers."""
        routers = router_numbers(self.router, "all") | router_numbers(RoundRobinRouter(), "prefill")
        return routers | dict.fromkeys(SPLIT_FIELDS, 0.0) | transfer_numbers(None)


SPLIT_FIELDS = (
    *("prefill_workers", "queued", "reserves_first", "first_by_prefill", "rule"),
    *("length", "queue_size", "ratio", "busy_threshold"),
)


class LocalPrefill(Declaration, frozen=True, kw_only=True, tag=True):
    """Which requests their decode worker prefills itself, beside its decodes.

    The effective prompt is what that worker's prefix cache lacks of it.

    Parameters
    ----------
    decode_busy_threshold : float
        A request is prefilled elsewhere if more of the decode worker's KV memory is in use.
    """

    decode_busy_threshold: Share = 1.0

    def numbers(self) -> tuple[float, float, float]:
        """(length, queue size, ratio) as the kernel has them."""
        return math.inf, math.inf, math.inf


class QueueAndLengthRule(LocalPrefill, frozen=True, kw_only=True, tag=True):
    """Elsewhere if the effective prompt is long and the queue for prefill short (Dynamo's first generation).

    Parameters
    ----------
    max_local_prefill_length : int
        Tokens of the longest effective prompt that is prefilled locally.
    max_prefill_queue_size : int
        Where as many requests wait for prefill, it is local. Looked at when a request arrives; nothing blocks.
    """

    max_local_prefill_length: Tokens = 1000
    max_prefill_queue_size: Tokens = 2

    def numbers(self) -> tuple[float, float, float]:
        """(length, queue size, ratio) as the kernel has them."""
        return float(self.max_local_prefill_length), float(self.max_prefill_queue_size), 0.0


class LengthRule(LocalPrefill, frozen=True, kw_only=True, tag=True):
    """What the rules have in common that look at the prompt's length alone.

    Parameters
    ----------
    eff_isl_threshold : int
        Tokens that the effective prompt stays below.
    ratio : float
        Of the effective prompt to the prompt, that it stays below.
    """

    eff_isl_threshold: Tokens = 2048
    ratio: Annotated[float, Range(0)] = 0.7

    def numbers(self) -> tuple[float, float, float]:
        """(length, queue size, ratio) as the kernel has them."""
        return float(self.eff_isl_threshold), math.inf, self.ratio


class PromptLengthRule(LengthRule, frozen=True, kw_only=True, tag=True):
    """Local if the effective prompt is short, and a small part of the prompt (Dynamo's `isl_bounding`)."""


class PrefillLoadRule(LocalPrefill, frozen=True, kw_only=True, tag=True):
    """Local if the prefill worker that would be chosen has something to do (Dynamo's `prefill_load`)."""


class LengthOrLoadRule(LengthRule, frozen=True, kw_only=True, tag=True):
    """Local if either of `PromptLengthRule` and `PrefillLoadRule` says so (Dynamo's `isl_or_load`)."""


AnyLocalPrefill = QueueAndLengthRule | PromptLengthRule | PrefillLoadRule | LengthOrLoadRule

# In the order of the codes of `vecsim.kernel.handover`; the first of them is none
LOCAL_RULES = (QueueAndLengthRule, PromptLengthRule, PrefillLoadRule, LengthOrLoadRule)


class DisaggregatedEngine(Fleet, frozen=True, kw_only=True, tag=True):
    """Workers that compute prompts, and workers that decode: keys and values move from the former to the latter.

    Parameters
    ----------
    prefill, decode : Pool or tuple of Pool
        Those workers; prefill workers are numbered first.
    prefill_router : Router, optional
        How a prefill worker is chosen. Unless given, requests wait in one queue for a worker with a free slot.
    router : Router
        How a decode worker is chosen.
    reserve : "arrival" or "prefill"
        Whether the decode worker is chosen, and its blocks are reserved, when a request arrives, before its prefill; or
        when its prefill has ended.
    first_token : "prefill" or "decode"
        Which worker's step yields the first token: the last one of the prefill, or the first one of the decode worker.
    local_prefill : LocalPrefill, optional
        Which requests the decode worker prefills itself; none unless given.
    transfer : KVTransfer, optional
        How long keys and values take; none unless given.
    load_generator : LoadGenerator
        When requests arrive at the router and how long they are.
    overheads : Overheads
        Time outside the steps; `before_queue` passes before a request is routed.
    slo : SLO, optional
        Limits of requests whose class has none of its own.
    control_plane : ControlPlane, optional
        How workers crash, and who learns of it when; they don't unless given.
    scaling : Planner, optional
        When workers are added and taken away; never unless given.

    Raises
    ------
    ValueError
        When a field has a wrong value, or one that another field rules out: pools whose models differ in their keys and
        values, say.
    """

    prefill: Pools
    decode: Pools
    prefill_router: AnyRouter | None = None
    router: AnyRouter = LeastOutstandingRouter()
    reserve: Literal["arrival", "prefill"] = "prefill"
    first_token: Literal["prefill", "decode"] = "prefill"
    local_prefill: AnyLocalPrefill | None = None
    transfer: KVTransfer | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prefill", "decode"):
            if not listed(getattr(self, name)):
                raise ValueError(f"{name} must have a worker, got none")
        self._check_pools()
        for source, destination in itertools.product(listed(self.prefill), listed(self.decode)):
            sent, read = source.step_time, destination.step_time
            if isinstance(sent, RooflineStepTime) and isinstance(read, RooflineStepTime):
                check_same_kv(sent.model, read.model, sent.kv_dtype, read.kv_dtype)

    @property
    def queued(self) -> bool:
        """Whether all prefill workers share one queue."""
        return self.prefill_router is None

    @property
    def prefill_places(self) -> int:
        """Places for workers that prefill, those that there may be."""
        return sum(self.places()[: len(listed(self.prefill))])

    @property
    def roles(self) -> int:
        """Kinds of work that pools are for: prefill and decode."""
        return 2

    @property
    def prefill_workers(self) -> int:
        """Workers that prefill only: the first ones."""
        return sum(pool.workers for pool in listed(self.prefill))

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pools, those of prefill first."""
        return (*listed(self.prefill), *listed(self.decode))

    @property
    def summary(self) -> str:
        """Short text: what serves."""
        pools = {"prefill": listed(self.prefill), "decode": listed(self.decode)}
        return ", ".join(f"{name} {' and '.join(pool.summary for pool in part)}" for name, part in pools.items())

    def routed(self) -> tuple[tuple[AnyRouter, tuple[Pool, ...]], ...]:
        """All routers, and the pools of each."""
        decodes = (self.router, listed(self.decode))
        return (decodes,) if self.prefill_router is None else (decodes, (self.prefill_router, listed(self.prefill)))

    def kernel(self) -> dict[str, float]:
        """What the kernel is told besides the pools, in the order of its numbers."""
        rule = self.local_prefill
        length, queue_size, ratio = (0.0, 0.0, 0.0) if rule is None else rule.numbers()
        split = (
            *(self.prefill_places, self.queued),
            *(self.reserve == "arrival", self.first_token == "prefill"),
            0 if rule is None else 1 + LOCAL_RULES.index(type(rule)),
            *(length, queue_size, ratio, 1.0 if rule is None else rule.decode_busy_threshold),
        )
        return {
            **router_numbers(self.router, "decode"),
            # The queue for prefill goes to the worker with the fewest requests
            **router_numbers(self.prefill_router or LeastOutstandingRouter(), "prefill"),
            **dict(zip(SPLIT_FIELDS, map(float, split), strict=True)),
            **transfer_numbers(self.transfer),
        }


class TickDisaggregatedEngine(Declaration, frozen=True, kw_only=True, tag=True):
    """Workers that prefill and workers that decode, in ticks; each holds one request at a time.

    Requests wait in one queue for a prefill worker, then in another for a decode worker, both first come, first served;
    in between, keys and values take `kv_transfer_time` to move. A prefill takes `total_prefill_chunks` steps of
    prefill_time / total_prefill_chunks, the last of which yields the first token; each further token takes a step of
    `itl`; no step is shorter than a tick. Each worker has its own clock: an idle one looks for a request once a tick,
    the one with the lowest number first. Prefill workers notice arrivals, at any of their boundaries; `enqueued_at` is
    the first one.

    Metrics are those of an `Engine`, with these differences: the queue is of both kinds of requests that wait, its mean
    is weighted by time, and `queue_time` is the wait for prefill alone; `utilization` is that of all workers; `steps`
    are those with a request, and `end_time` is when the last worker's step ends that was under way at the time limit.

    Parameters
    ----------
    max_prefill_workers, max_decode_workers : int
        How many.
    kv_transfer_time : float
        From a request's first token until a decode worker can take it [ticks]; a request waits for none meanwhile.
    load_generator : LoadGenerator
        When requests arrive, how long they are and how long their steps take.

    Raises
    ------
    ValueError
        When a field has a wrong value, or the load is one of the token model.
    """

    max_prefill_workers: Workers
    max_decode_workers: Workers
    kv_transfer_time: Time = 0.0
    load_generator: AnyLoadGenerator

    def __post_init__(self) -> None:
        super().__post_init__()
        self.load_generator.refuse_clock(token=False)

    @property
    def max_batch_size(self) -> int:
        """Requests that are served at the same time: the workers of both kinds."""
        return self.max_prefill_workers + self.max_decode_workers

    @property
    def kv_blocks(self) -> int | None:
        """Blocks of KV memory; it is endless."""
        return None

    @property
    def caches_prefixes(self) -> bool:
        """Whether prompts find what others left in KV memory."""
        return False

    @property
    def summary(self) -> str:
        """Short text: what serves."""
        return f"{self.max_prefill_workers} prefill and {self.max_decode_workers} decode workers"

    @property
    def is_token(self) -> bool:
        """Whether this is the token model."""
        return False

    def run(self, time_limit: float, *, warmup: float = 0.0, quantiles: "Sequence[float] | None" = None) -> "Run":
        """Simulate once and keep every request.

        Requests have a `decode_started_at` and a `decode_worker` too; their `slot` is the prefill worker. Workers don't
        step together, so `steps` of the run are the times between changes. See `Engine.run`.
        """
        from vecsim.run import run

        return run(self, time_limit, warmup=warmup, quantiles=quantiles)


# What can be run and swept
AnyEngine = Engine | Cluster | DisaggregatedEngine | TickDisaggregatedEngine
