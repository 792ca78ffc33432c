"""KV memory: how many blocks there are, and what happens to those that are freed."""

import math
from typing import TYPE_CHECKING, Annotated, Any, Self

from vecsim.declaration import Declaration, Range

if TYPE_CHECKING:
    from vecsim.gpus import GPU
    from vecsim.models import Model

# Blocks of a memory without end
ENDLESS = 2**31 - 1

Share = Annotated[float, Range(0, 1)]


class KVCache(Declaration, frozen=True, kw_only=True):
    """The KV memory of an engine, in blocks of tokens.

    Parameters
    ----------
    blocks : int, optional
        How many there are; more than can ever be needed unless given.
    block_size : int
        Tokens of a block.
    prefix_caching : bool
        Whether full blocks stay to be found by requests that begin with the same tokens, until they're needed: the
        least recently used go first, the deepest of a request before those above it.
    watermark : float
        Share of the blocks that stays free when a request is admitted while anything runs.
    uncached_first : bool
        Whether freed blocks that nobody could find are used before all others (recent releases of vLLM).

    Raises
    ------
    ValueError
        When a field is out of its range.
    """

    blocks: Annotated[int, Range(1, 2**30)] | None = None
    block_size: Annotated[int, Range(1, 2**16)] = 16
    prefix_caching: bool = False
    watermark: Share = 0.0
    uncached_first: bool = False

    @classmethod
    def of(
        cls,
        model: "Model | str",
        gpu: "GPU | str",
        *,
        block_size: int = 16,
        prefix_caching: bool = False,
        watermark: float = 0.0,
        uncached_first: bool = False,
        **server: Any,
    ) -> Self:
        """The KV memory that is left beside a model's weights.

        Parameters
        ----------
        model, gpu : Model and GPU, or their names
        block_size, prefix_caching, watermark, uncached_first
            As declared.
        **server
            How the server runs, as for `vecsim.capacity.kv_blocks`, which makes the estimate: `tp`, `dtype`,
            `kv_dtype`, `memory_fraction`, `max_num_batched_tokens`, `max_num_seqs`.

        Returns
        -------
        KVCache

        Raises
        ------
        ValueError
            When the model doesn't fit, or a value is wrong.
        """
        from vecsim.capacity import kv_blocks

        return cls(
            blocks=kv_blocks(model, gpu, block_size=block_size, **server),
            block_size=block_size,
            prefix_caching=prefix_caching,
            watermark=watermark,
            uncached_first=uncached_first,
        )

    def kernel(self) -> dict[str, Any]:
        """Fields of `vecsim.kernel.state.Memory` by name."""
        blocks = ENDLESS if self.blocks is None else self.blocks
        shift = int(math.log2(self.block_size))
        return {
            "blocks": blocks,
            "block_size": self.block_size,
            "shift": shift if 2**shift == self.block_size else -1,
            "watermark": int(self.watermark * blocks) if self.blocks is not None else 0,
            "caching": self.prefix_caching,
            "front": self.uncached_first,
        }
