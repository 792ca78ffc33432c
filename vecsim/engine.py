"""What one simulates, and what one gets back from a single run."""

from typing import TYPE_CHECKING, Annotated

from vecsim.batching import AnyBatcher, CustomBatcher, IFBatcher, check_budget
from vecsim.declaration import Count, Declaration, Range
from vecsim.kv_cache import KVCache
from vecsim.load import SLO, AnyLoadGenerator, TraceLoadGenerator
from vecsim.overheads import Overheads
from vecsim.own import check_own
from vecsim.roofline import RooflineStepTime
from vecsim.step_time import CustomStepTime, LinearStepTime, PolynomialStepTime, TableStepTime, TickStepTime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vecsim.run import Run

AnyStepTime = TickStepTime | LinearStepTime | PolynomialStepTime | TableStepTime | RooflineStepTime | CustomStepTime


class Engine(Declaration, frozen=True, kw_only=True, tag=True):
    """An inference engine under a load.

    Parameters
    ----------
    max_batch_size : int
        Slots of the running batch (vLLM: `max_num_seqs`).
    load_generator : LoadGenerator
        When requests arrive and how long they are.
    batcher : Batcher
        Who is let into the running batch.
    step_time : StepTime
        How long a step takes; `TickStepTime()` is the tick model, any other one the token model, in seconds.
    kv_cache : KVCache, optional
        Token model. KV memory; endless unless given.
    max_model_len : int, optional
        Token model. Prompt and output tokens of the longest request that is served.
    overheads : Overheads
        Token model. Time outside the steps.
    slo : SLO, optional
        Token model. Limits of requests whose class has none of its own.

    Raises
    ------
    ValueError
        When a field has a wrong value, or one that the clock or another field rules out.
    """

    max_batch_size: Count = 4
    load_generator: AnyLoadGenerator
    batcher: AnyBatcher = IFBatcher()
    step_time: AnyStepTime = TickStepTime()
    kv_cache: KVCache | None = None
    max_model_len: Annotated[int, Range(2, 2**30)] | None = None
    overheads: Overheads = Overheads()
    slo: SLO | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        token = self.is_token
        clock = "token" if token else "tick"
        self.load_generator.refuse_clock(token)
        kind = type(self.batcher).__name__
        if clock not in self.batcher.clocks:
            raise ValueError(f"batcher {kind} needs a step_time in seconds, got TickStepTime")
        if isinstance(self.batcher, CustomBatcher):
            check_own(self.batcher.rule, clock)
        if token:
            budget = getattr(self.batcher, "max_num_batched_tokens", None)
            if self.batcher.needs_budget and budget is not None:
                check_budget(budget, self.max_batch_size)
            self._check_memory()
            return
        for name, value, usual in (
            ("kv_cache", self.kv_cache, None),
            ("max_model_len", self.max_model_len, None),
            ("overheads", self.overheads, Overheads()),
            ("slo", self.slo, None),
            ("batcher.order", self.batcher.order, "fcfs"),
            ("batcher.async_scheduling", self.batcher.async_scheduling, False),
            ("batcher.max_num_batched_tokens", getattr(self.batcher, "max_num_batched_tokens", None), None),
            ("batcher.reserve_tokens", getattr(self.batcher, "reserve_tokens", None), None),
        ):
            if value != usual:
                raise ValueError(f"{name} means nothing in the tick model, got {value!r}")

    def _check_memory(self) -> None:
        """Refuse an engine whose memory its batcher, its step time or its load can't use."""
        memory = self.kv_cache or KVCache()
        if memory.tiers is not None:
            raise ValueError(
                "kv_cache.tiers are there for the workers of fleets, not for an Engine: declare a Cluster with a pool "
                "of one worker, which is the same otherwise"
            )
        load = self.load_generator
        if self.kv_cache is not None and self.kv_cache.blocks is not None:
            capacity = self.kv_cache.blocks * memory.block_size
            reserve = getattr(self.batcher, "reserve_tokens", None)
            if reserve is not None and reserve > capacity:
                raise ValueError(f"reserve_tokens must be <= the KV memory of {capacity} tokens, got {reserve}")
        elif isinstance(self.step_time, PolynomialStepTime):
            raise ValueError("kv_cache must have a number of blocks: PolynomialStepTime goes by the share in use")
        if (
            isinstance(load, TraceLoadGenerator)
            and load.block_ids is not None
            and memory.prefix_caching
            and (load.id_block_tokens or 1) % memory.block_size
        ):
            raise ValueError(
                f"block_size must divide id_block_tokens ({load.id_block_tokens}) of the trace, got {memory.block_size}"
            )

    @property
    def summary(self) -> str:
        """Short text: what serves."""
        return f"{self.batcher.label()}, {self.max_batch_size} slots"

    @property
    def kv_blocks(self) -> int | None:
        """Blocks of KV memory; None if it is endless."""
        return None if self.kv_cache is None else self.kv_cache.blocks

    @property
    def caches_prefixes(self) -> bool:
        """Whether prompts find what others left in KV memory."""
        return self.kv_cache is not None and self.kv_cache.prefix_caching

    @property
    def is_token(self) -> bool:
        """Whether this is the token model."""
        return not isinstance(self.step_time, TickStepTime)

    def run(
        self, time_limit: float | None = None, *, warmup: float = 0.0, quantiles: "Sequence[float] | None" = None
    ) -> "Run":
        """Simulate once and keep every request and step.

        Parameters
        ----------
        time_limit : float, optional
            The run ends at the first boundary at or after it [ticks, or seconds in the token model]. In the token model
            a finite load can do without: the run ends when all is served.
        warmup : float
            Requests that arrive and steps that begin before it are simulated, not measured [ticks or seconds].
        quantiles : sequence of float, optional
            Quantiles of the latencies, each in [0, 1]; 0.5, 0.9, 0.95 and 0.99 unless given.

        Returns
        -------
        Run

        Raises
        ------
        ValueError
            When an argument is out of its range, or the run would not fit in memory.
        """
        from vecsim.run import run

        return run(self, time_limit, warmup=warmup, quantiles=quantiles)
