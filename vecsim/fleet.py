"""Fleets: many engines behind a router."""

from typing import TYPE_CHECKING, Annotated

from vecsim.batching import AnyBatcher, TokenBudgetBatcher
from vecsim.declaration import Count, Declaration, Range
from vecsim.engine import AnyStepTime, Engine
from vecsim.kv_cache import KVCache
from vecsim.load import SLO, AnyLoadGenerator
from vecsim.overheads import Overheads
from vecsim.routing import AnyRouter, RoundRobinRouter
from vecsim.step_time import TickStepTime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vecsim.run import Run

Workers = Annotated[int, Range(1, 2**16)]


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
        How long a step takes [seconds].
    kv_cache : KVCache, optional
        KV memory of each; endless unless given.
    max_model_len : int, optional
        Prompt and output tokens of the longest request that is served.

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

    def engine(self, load_generator: AnyLoadGenerator, overheads: Overheads, slo: SLO | None) -> Engine:
        """One of the workers as an engine alone."""
        return Engine(
            max_batch_size=self.max_batch_size,
            load_generator=load_generator,
            batcher=self.batcher,
            step_time=self.step_time,
            kv_cache=self.kv_cache,
            max_model_len=self.max_model_len,
            overheads=overheads,
            slo=slo,
        )


class Cluster(Declaration, frozen=True, kw_only=True):
    """Workers behind a router, each of which does prefill and decode.

    Metrics are those of all workers together; `max_queue` and `kv_peak` those of the worker with the most.

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

    Raises
    ------
    ValueError
        When a field has a wrong value, or one that another field rules out.
    """

    pool: Pool | tuple[Pool, ...]
    router: AnyRouter = RoundRobinRouter()
    load_generator: AnyLoadGenerator
    overheads: Overheads = Overheads()
    slo: SLO | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pools:
            raise ValueError("pool must have a worker, got none")
        if any(isinstance(pool.step_time, TickStepTime) for pool in self.pools):
            raise ValueError("step_time of a pool must be in seconds, got TickStepTime")
        self.engines()  # refuses what an engine would
        sizes = {pool.kv_cache.block_size for pool in self.pools if pool.kv_cache and pool.kv_cache.prefix_caching}
        if len(sizes) > 1:
            raise ValueError(f"block_size must be the same in pools that cache prefixes, got {sorted(sizes)}")

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The pools, also where there is one."""
        return self.pool if isinstance(self.pool, tuple) else (self.pool,)

    def engines(self) -> tuple[Engine, ...]:
        """A worker of each pool as an engine alone."""
        return tuple(pool.engine(self.load_generator, self.overheads, self.slo) for pool in self.pools)

    @property
    def workers(self) -> int:
        """Workers of all pools."""
        return sum(pool.workers for pool in self.pools)

    @property
    def summary(self) -> str:
        """Short text: what serves."""
        pools = " and ".join(
            f"{pool.workers} x ({pool.batcher.label()}, {pool.max_batch_size} slots)" for pool in self.pools
        )
        return f"{self.router.label()} over {pools}"

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
    def caches_prefixes(self) -> bool:
        """Whether prompts find what others left in the KV memory of a worker."""
        return any(pool.kv_cache is not None and pool.kv_cache.prefix_caching for pool in self.pools)

    @property
    def is_token(self) -> bool:
        """Whether this is the token model."""
        return True

    def run(
        self, time_limit: float | None = None, *, warmup: float = 0.0, quantiles: "Sequence[float] | None" = None
    ) -> "Run":
        """Simulate once and keep every request and step; see `Engine.run`."""
        from vecsim.run import run

        return run(self, time_limit, warmup=warmup, quantiles=quantiles)
