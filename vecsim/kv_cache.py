"""KV memory: how many blocks there are, and what happens to those that are freed."""

import math
from typing import TYPE_CHECKING, Annotated, Any, Self

from vecsim.declaration import Count, Declaration, Positive, Range

if TYPE_CHECKING:
    from vecsim.gpus import GPU
    from vecsim.models import Model

# Blocks of a memory without end
ENDLESS = 2**31 - 1

Share = Annotated[float, Range(0, 1)]
Bandwidth = Annotated[float, Range(0, low_allowed=False, infinity_allowed=True)]
TierBlocks = Annotated[int, Range(0, 2**30)]


class CacheTiers(Declaration, frozen=True, kw_only=True):
    """Lower tiers of a worker's prefix cache: its own host memory, and its own disk.

    Each is a set of blocks with given ids, those of prompts and conversations; the least recently used goes when it is
    full. Blocks stay where they were when they move to another tier.

    *Down.* A block that a worker registers in its GPU memory is offered to its host memory at its first boundary from
    then on, if it's still there: for prompts the end of the step that computed it. What decoding fills is registered
    when its request has ended and leaves, or before that when another looks for blocks. Of several the one registered
    last goes first, so that what prompts begin with is the most recent. If it is there already it counts as used.
    Else it waits for a place in a batch: one leaves as soon as fewer than `offloads_in_flight` move, with what waits,
    at most `offload_batch` blocks, the first that came; an offer whose block has gone from GPU memory by then is
    dropped. Batches share the host's downward link equally. Blocks are in host memory when all of their batch has
    moved, whatever has become of them in GPU memory. From host memory blocks are offered to the disk by the same
    rules, with batches and a link of their own: when they come there, or are offered anew while there, if they have
    been offered to it `disk_after` times by then.

    *Up.* When a request comes to a worker, what counts as found is the blocks that its prompt begins with in GPU
    memory, then those that follow in host memory or on disk (host memory if in both). If there are any of the latter,
    GPU blocks for them are taken and those in GPU memory held, once there are slots for it beside those that run and
    those ahead that don't yet, and blocks for all tokens of it and of the latter. Until then it stands in a line, looks
    anew each time, and whoever comes stands behind it. Then they move: those of each tier over its upward link, shared
    equally by the requests that are on it. Requests that want the same blocks bring up a copy each. When all have come
    they are registered, and the request joins its worker's queue. Should the worker find nothing that it can do then,
    the last that waits gives its blocks back, and computes all anew. Requests that were preempted look in GPU memory
    alone, and so does a decode worker for a prompt that is prefilled elsewhere: what it lacks is moved there.

    A worker that starts, or starts again, has nothing in any tier.

    Parameters
    ----------
    host_blocks : int
        Blocks of host memory of each worker.
    disk_blocks : int
        Blocks of disk of each worker.
    host_bandwidth, disk_bandwidth : float
        Bytes a second in each direction.
    kv_bytes_per_token : float, optional
        Bytes of a token's keys and values in a worker's GPUs; needed where a bandwidth is finite.
    offload_batch : int
        Blocks of the largest batch that moves down.
    offloads_in_flight : int
        Batches that move down at a time, to each tier.
    disk_after : int
        Times that a block must have been offered to host memory before it is offered to the disk.

    Raises
    ------
    ValueError
        When a field is out of its range, there is a disk without host memory, or a bandwidth is finite and bytes are
        unknown.
    """

    host_blocks: TierBlocks
    disk_blocks: TierBlocks = 0
    host_bandwidth: Bandwidth = 14e9
    disk_bandwidth: Bandwidth = 7e9
    kv_bytes_per_token: Positive | None = None
    offload_batch: Annotated[int, Range(1, 2**16)] = 16
    offloads_in_flight: Annotated[int, Range(1, 64)] = 4
    disk_after: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.disk_blocks > 0 and self.host_blocks == 0:
            raise ValueError(f"host_blocks must be > 0 where disk_blocks is, got 0 and {self.disk_blocks}")
        used = {"host_bandwidth": self.host_blocks, "disk_bandwidth": self.disk_blocks}
        for name, blocks in used.items():
            value = getattr(self, name)
            if blocks > 0 and self.kv_bytes_per_token is None and value < math.inf:
                raise ValueError(f"kv_bytes_per_token must be given where {name} is finite, got {value:g}")

    def numbers(self, block_size: int) -> tuple[float, ...]:
        """What the kernel is told, in the order of `TIER_FIELDS`."""
        return (
            *(self.host_blocks, self.disk_blocks, self.host_bandwidth, self.disk_bandwidth),
            *(self.offload_batch, self.offloads_in_flight, self.disk_after),
            block_size * (self.kv_bytes_per_token or 0.0),
        )


# Of a worker without lower tiers they are 0
TIER_FIELDS = (
    *("host_blocks", "disk_blocks", "host_bandwidth", "disk_bandwidth"),
    *("offload_batch", "offloads_in_flight", "disk_after", "block_bytes"),
)


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
    tiers : CacheTiers, optional
        Host memory and disk below the prefix cache of each worker of a fleet; none unless given.

    Raises
    ------
    ValueError
        When a field is out of its range, or there are tiers without `prefix_caching`.
    """

    blocks: Annotated[int, Range(1, 2**30)] | None = None
    block_size: Annotated[int, Range(1, 2**16)] = 16
    prefix_caching: bool = False
    watermark: Share = 0.0
    uncached_first: bool = False
    tiers: CacheTiers | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tiers is not None and not self.prefix_caching:
            raise ValueError("prefix_caching must be true where there are tiers, got false")

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
        tiers: CacheTiers | None = None,
        **server: Any,
    ) -> Self:
        """The KV memory that is left beside a model's weights.

        Parameters
        ----------
        model, gpu : Model and GPU, or their names
        block_size, prefix_caching, watermark, uncached_first, tiers
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
            tiers=tiers,
        )

    def tier_numbers(self) -> tuple[float, ...]:
        """What the kernel is told of lower tiers, in the order of `TIER_FIELDS`."""
        if self.tiers is None or self.tiers.host_blocks == 0:
            return (0.0,) * len(TIER_FIELDS)
        return self.tiers.numbers(self.block_size)

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
            "returns": False,
        }
