"""Batchers: who is let into the running batch at a boundary. Declaration and rule side by side.

In the tick model a rule gets the batch as it stands at the boundary (`vecsim.kernel.state.Batch`: running, prefilling,
decoding, free slots, queued, ...) and returns how many requests to admit from the head of the queue, at most
`min(batch.free, batch.queued)`. It is plain Python; the kernel compiles it. In the token model a batcher is the values
of a `vecsim.kernel.state.Policy`, and `policy` gives those that differ from what most of them are.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import msgspec

from vecsim.declaration import Count, Declaration, Number, Offset, Range
from vecsim.kernel.state import AS_SCHEDULED, FEWEST_TOKENS, LAST, LEAST_URGENT, RESERVED, WHOLE_PROMPT
from vecsim.own import compiled_rule, name_of, stands_for

Order = Literal["fcfs", "shortest_prompt", "priority", "deadline", "shortest_output"]
ORDERS: tuple[str, ...] = get_args(Order)

# More than any budget, length or number of blocks
ENDLESS = 2**40


class Batcher(Declaration, frozen=True, kw_only=True, tag_field="type"):
    """Base of all batchers.

    Parameters
    ----------
    order : str
        Token model. In which order requests leave the queue: "fcfs" (first come, first served), "shortest_prompt",
        "priority" (of their class), "deadline" (arrival + the TTFT limit of their class), or "shortest_output" (an
        oracle, for no engine knows it). Nobody overtakes the first. A preempted request goes to the front in "fcfs",
        else by its rank; under "priority" the least urgent, latest one is preempted.
    async_scheduling : bool
        Token model. The next step's batch is formed when a step starts: who arrives during step n joins step n + 2, and
        what step n frees is usable from step n + 2.
    """

    order: Order = "fcfs"
    async_scheduling: bool = False

    clocks: ClassVar[tuple[str, ...]] = ("token",)
    needs_budget: ClassVar[bool] = False  # whether a step's tokens must be at least the slots

    @staticmethod
    def admit(batch: Any) -> int:
        """Rule of the tick model: how many requests to admit."""
        raise NotImplementedError

    def policy(self) -> dict[str, Any]:
        """Fields of `vecsim.kernel.state.Policy` that differ from the usual, by name."""
        raise NotImplementedError


def budget_of(tokens: int | None) -> int:
    return ENDLESS if tokens is None else tokens


def check_budget(budget: float, slots: float) -> None:
    """A decode is never left out for want of budget.

    Raises
    ------
    ValueError
        When there are more slots than tokens.
    """
    if budget < slots:
        raise ValueError(f"max_num_batched_tokens must be >= max_batch_size ({slots:g}), got {budget:g}")


class Reserving(Batcher, frozen=True, kw_only=True):
    """Batchers of both models; in the token model a request's blocks are reserved when it is admitted.

    Parameters
    ----------
    max_num_batched_tokens : int, optional
        Token model. Tokens of a step, a decode counting as one; a longer prompt is refused. No limit unless given.
    reserve_tokens : int, optional
        Token model. Tokens whose blocks each request gets; a longer one is refused. Unless given: the engine's
        `max_model_len`, and without one the request's prompt and `max_tokens`.
    """

    max_num_batched_tokens: Number | None = None
    reserve_tokens: Number | None = None

    clocks = ("tick", "token")

    def policy(self) -> dict[str, Any]:
        return {
            "budget": budget_of(self.max_num_batched_tokens),
            "longest": budget_of(self.reserve_tokens),
            "reserve_tokens": self.reserve_tokens or 0,
            "chunked": False,
            "hold": RESERVED,
        }


class StaticBatcher(Reserving, frozen=True, kw_only=True, tag=True):
    """Fill an empty engine, then wait until the whole batch is done (FasterTransformer).

    In the token model slots and blocks stay taken until then.
    """

    @staticmethod
    def admit(batch: Any) -> int:
        return min(batch.free, batch.queued) if batch.running == 0 else 0

    def policy(self) -> dict[str, Any]:
        return {**super().policy(), "into_empty": True}


class IFBatcher(Reserving, frozen=True, kw_only=True, tag=True):
    """In-flight batching: fill every free slot at every boundary (Orca, TensorRT-LLM).

    In the token model whole prompts join the running decodes.
    """

    @staticmethod
    def admit(batch: Any) -> int:
        return min(batch.free, batch.queued)


class IFBatcherWithOnePrefillOnly(Reserving, frozen=True, kw_only=True, tag=True):
    """In-flight batching with at most one request of the batch in prefill."""

    @staticmethod
    def admit(batch: Any) -> int:
        return int(batch.prefilling == 0 and batch.free > 0 and batch.queued > 0)

    def policy(self) -> dict[str, Any]:
        return {**super().policy(), "one_prompt": True}


class PrefillFirstBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """A step of whole prompts if one can be admitted, else a step of decodes (vLLM V0).

    Parameters
    ----------
    max_num_batched_tokens : int
        Prompt tokens of a step; a longer prompt is refused.
    padded : bool
        Whether each prompt of a step costs as much as the longest (Vidur's model of vLLM).
    """

    max_num_batched_tokens: Number = 2048
    padded: bool = False

    def policy(self) -> dict[str, Any]:
        return {
            "budget": self.max_num_batched_tokens,
            "padded": self.padded,
            "chunked": False,
            "prefill_only": True,
            "hold": WHOLE_PROMPT,
            "admits_after_preemption": True,
        }


class ChunkedPrefillBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """Decodes first; what they leave of a fixed budget goes to chunks of prompts (Sarathi-Serve).

    A request gets the blocks of its whole prompt when it is admitted.

    Parameters
    ----------
    chunk_tokens : int
        Tokens of a step, a decode counting as one. Decodes are never left out.
    """

    chunk_tokens: Number = 512

    def policy(self) -> dict[str, Any]:
        return {"budget": self.chunk_tokens, "hold": WHOLE_PROMPT, "admits_after_preemption": True}


class TokenBudgetBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """Running requests first, then waiting ones, within a budget of tokens a step; prompts are split (vLLM V1).

    Blocks are taken as tokens are computed; where there are none the last admitted request is preempted, to be computed
    again.

    Parameters
    ----------
    max_num_batched_tokens : int
        Tokens of a step; at least the engine's `max_batch_size`.
    long_prefill_token_threshold : int
        Prompt tokens of one request in a step, at most; 0 is no limit.
    reserve_full_prompt : bool
        Admit a request only when the blocks of its whole prompt are free (releases after 0.15).
    """

    max_num_batched_tokens: Number = 2048
    long_prefill_token_threshold: Offset = 0
    reserve_full_prompt: bool = False

    needs_budget = True

    def policy(self) -> dict[str, Any]:
        return {
            "budget": self.max_num_batched_tokens,
            "threshold": self.long_prefill_token_threshold,
            "reserve_full_prompt": self.reserve_full_prompt,
        }


class TensorRTBatcher(Batcher, frozen=True, kw_only=True):
    """TensorRT-LLM's batchers.

    Parameters
    ----------
    max_num_batched_tokens : int, optional
        Tokens of a step, a decode counting as one. No limit unless given.
    chunked_prefill : bool
        Whether prompts may be split; unless they may, one that is longer than the budget is refused.
    """

    max_num_batched_tokens: Number | None = 8192
    chunked_prefill: bool = False

    needs_budget = True

    def policy(self) -> dict[str, Any]:
        return {"budget": budget_of(self.max_num_batched_tokens), "chunked": self.chunked_prefill}


class NoEvictBatcher(TensorRTBatcher, frozen=True, kw_only=True, tag=True):
    """A request is admitted if its blocks to completion are free; none is ever preempted (TensorRT-LLM's default)."""

    def policy(self) -> dict[str, Any]:
        return {**super().policy(), "hold": RESERVED, "own_reserve": True}


class MaxUtilizationBatcher(TensorRTBatcher, frozen=True, kw_only=True, tag=True):
    """Only the blocks of this step; where there are none the last started request is paused (TensorRT-LLM)."""


class SGLangBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """Prefill first, admitting by an estimate of what the running requests will still need (SGLang).

    A waiting request is admitted if its uncached prompt, min(max_tokens, `max_new_tokens`) and a block fit into the
    free memory less the sum over the running ones of min(remaining max_tokens, `max_new_tokens`) x a ratio. Each decode
    step the ratio falls, from `init_new_token_ratio` to `min_new_token_ratio_factor` of it in `decay_steps` steps. Out
    of memory, the request with the fewest output tokens goes back to the end of the queue (ties: the longest prompt),
    and the ratio becomes (tokens so far + 20 x running) / sum of their min(max_tokens, `max_new_tokens`), at most 1.

    Parameters
    ----------
    chunked_prefill_size : int
        Prompt tokens of a step; a longer prompt is split.
    init_new_token_ratio, min_new_token_ratio_factor, decay_steps, max_new_tokens
        Of the estimate.
    """

    chunked_prefill_size: Number = 8192
    init_new_token_ratio: Annotated[float, Range(0, 1, low_allowed=False)] = 0.7
    min_new_token_ratio_factor: Annotated[float, Range(0, 1)] = 0.14
    decay_steps: Count = 600
    max_new_tokens: Number = 4096

    def policy(self) -> dict[str, Any]:
        least = self.init_new_token_ratio * self.min_new_token_ratio_factor
        return {
            "budget": self.chunked_prefill_size,
            "prefill_only": True,
            "victim": FEWEST_TOKENS,
            "to_back": True,
            "admits_after_preemption": True,
            "ratio": self.init_new_token_ratio,
            "least_ratio": least,
            "ratio_decay": (self.init_new_token_ratio - least) / self.decay_steps,
            "room_tokens": self.max_new_tokens,
            "retract_steps": 20,
        }


class CustomBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """A policy of one's own; the function alone may stand where a batcher is asked for.

    Parameters
    ----------
    rule : function
        Compiled with `numba.njit`. Text of the form "module:name" names one to be imported; so it is written in TOML.
        It must depend on the batch alone.

        In the tick model it gets the batch at each boundary where a request is queued (see `vecsim.kernel.state.Batch`)
        and returns how many to admit from the head of the queue: 0 to `batch.free`, more than are queued meaning all of
        them. Where no slot is free its answer has no meaning.

        In the token model it is asked at each boundary for each request that could compute prompt tokens (see
        `vecsim.kernel.state.TokenBatch`): those in prefill, then the head of the queue if a slot is free, then the next
        one. It returns how many tokens to compute in this step. More than there are mean all of them; 0 leaves a
        request in prefill alone, and one in the queue unadmitted, with all behind it. Decodes are never left out, and
        blocks are taken and preempted as in `TokenBudgetBatcher`. An idle engine asks again when the next request
        arrives.
    parameter : float
        What the rule reads as `batch.parameter`.

    Raises
    ------
    ValueError
        When the function isn't compiled, can't be, or returns no whole number.
    """

    rule: Any
    parameter: Annotated[float, Range()] = 0.0

    clocks = ("tick", "token")

    def __post_init__(self) -> None:
        super().__post_init__()
        msgspec.structs.force_setattr(self, "rule", compiled_rule(self.rule, "tick", "token"))

    @classmethod
    def standing_for(cls, value: Any) -> Self | None:
        return cls(rule=value) if stands_for(value) else None

    @property
    def name(self) -> str:
        return name_of(self.rule)

    def policy(self) -> dict[str, Any]:
        return {"custom": True, "parameter": self.parameter, "budget": ENDLESS}


# The tick model's kernel knows a batcher by its place here.
BATCHERS: tuple[type[Batcher], ...] = (StaticBatcher, IFBatcher, IFBatcherWithOnePrefillOnly)
AnyBatcher = (
    StaticBatcher
    | IFBatcher
    | IFBatcherWithOnePrefillOnly
    | PrefillFirstBatcher
    | ChunkedPrefillBatcher
    | TokenBudgetBatcher
    | NoEvictBatcher
    | MaxUtilizationBatcher
    | SGLangBatcher
    | CustomBatcher
)


def policy_of(batcher: Batcher, slots: int, max_model_len: int | None, block_size: int) -> dict[str, Any]:
    """A batcher as all fields of `vecsim.kernel.state.Policy`, by name."""
    own = batcher.policy()
    own_reserve = own.pop("own_reserve", False)
    longest = min(own.pop("longest", ENDLESS), budget_of(max_model_len))
    if own.get("hold") == RESERVED and not own.get("reserve_tokens") and not own_reserve:
        own["reserve_tokens"] = max_model_len or 0
    usual = {
        "slots": slots,
        "budget": ENDLESS,
        "longest": longest,
        "chunked": True,
        "threshold": 0,
        "padded": False,
        "prefill_only": False,
        "one_prompt": False,
        "into_empty": False,
        "hold": AS_SCHEDULED,
        "reserve_tokens": 0,
        "reserve_full_prompt": False,
        "admits_after_preemption": False,
        "victim": LEAST_URGENT if batcher.order == "priority" else LAST,
        "to_back": False,
        "order": ORDERS.index(batcher.order),
        "asynchronous": batcher.async_scheduling,
        "ratio": 0.0,
        "least_ratio": 0.0,
        "ratio_decay": 0.0,
        "room_tokens": 0,
        "page": block_size,
        "retract_steps": 0,
        "custom": False,
        "parameter": 0.0,
    }
    return {**usual, **own}
