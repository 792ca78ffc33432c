"""Batchers: who is let into the running batch at a boundary. Declaration and rule side by side.

A rule gets the batch as it stands at the boundary (`vecsim.kernel.state.Batch`: running, prefilling,
decoding, free slots, queued) and returns how many requests to admit from the head of the queue, at most
`min(batch.free, batch.queued)`. It is plain Python; the kernel compiles it.
"""

from typing import Any

from vecsim.declaration import Declaration


class Batcher(Declaration, frozen=True, kw_only=True, tag_field="type"):
    """Base of all batchers."""

    @staticmethod
    def admit(batch: Any) -> int:
        """Rule: how many requests to admit."""
        raise NotImplementedError


class StaticBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """Fill an empty engine, then wait until the whole batch is done (FasterTransformer)."""

    @staticmethod
    def admit(batch: Any) -> int:
        return min(batch.free, batch.queued) if batch.running == 0 else 0


class IFBatcher(Batcher, frozen=True, kw_only=True, tag=True):
    """In-flight batching: fill every free slot at every boundary (Orca, TensorRT-LLM)."""

    @staticmethod
    def admit(batch: Any) -> int:
        return min(batch.free, batch.queued)


class IFBatcherWithOnePrefillOnly(Batcher, frozen=True, kw_only=True, tag=True):
    """In-flight batching with at most one request of the batch in prefill."""

    @staticmethod
    def admit(batch: Any) -> int:
        return int(batch.prefilling == 0 and batch.free > 0 and batch.queued > 0)


# The kernel knows a batcher by its place here.
BATCHERS: tuple[type[Batcher], ...] = (StaticBatcher, IFBatcher, IFBatcherWithOnePrefillOnly)
AnyBatcher = StaticBatcher | IFBatcher | IFBatcherWithOnePrefillOnly
