"""KV transfer: what it takes to move a request's keys and values from one worker to another."""

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from vecsim.declaration import Count, Declaration, Positive, Range, Time
from vecsim.named import Named

if TYPE_CHECKING:
    from vecsim.gpus import GPU, Dtype
    from vecsim.models import Model

Bandwidth = Annotated[float, Range(0, low_allowed=False, infinity_allowed=True)]

# A transposing kernel reads and writes every byte at this share of the memory's bandwidth, after its launch [s]
TRANSPOSE_EFFICIENCY = 0.8
TRANSPOSE_LAUNCH = 3e-6


# A transfer that ends this share of an interval after a poll has ended by then: multiples of it aren't exact
POLL_SLACK = 1e-9


def noticed_at(began, ended, polling):
    """Rule: when a transfer's end is noticed that is looked for each `polling` since it began."""
    if polling == 0.0:
        return ended
    return max(ended, began + math.ceil((ended - began) / polling - POLL_SLACK) * polling)


class Link(Named, frozen=True, kw_only=True):
    """What joins workers: a NIC, or the links inside a server.

    Parameters
    ----------
    name : str
    bandwidth : float
        Bytes a second in one direction.
    latency : float
        Seconds before the first byte.
    descriptor_cost : float
        Seconds for each descriptor.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    folder = "links"

    bandwidth: Bandwidth
    latency: Time = 0.0
    descriptor_cost: Time = 0.0


class KVTransfer(Declaration, frozen=True, kw_only=True):
    """How KV caches move between workers.

    A transfer of some bytes takes latency + descriptors x descriptor_cost + bytes / bandwidth + transposition. The
    links are shared: it gets the least of (bandwidth / transfers on it) over the source's NIC, the destination's NIC
    and the fabric (egalitarian processor sharing of each link: Kleinrock, Queueing Systems II, section 4.4).

    Parameters
    ----------
    bandwidth : float
        Bytes a second of a worker's NIC, in each direction; may be infinite. With tensor parallelism: of each rank's.
    source_bandwidth, destination_bandwidth : float, optional
        Where the NIC of the sending or of the receiving worker differs from that.
    fabric_bandwidth : float
        Bytes a second of all transfers together.
    latency : float
        Seconds before the first byte.
    descriptor_cost : float
        Seconds for each descriptor; 2 to 4 us with RDMA, by transport.
    kv_bytes_per_token : float, optional
        Bytes of a token's keys and values that each rank sends; needed where they take time.
    layers : int, optional
        Layers of the model; needed where they decide the time.
    tensors : int
        Tensors that a layer's cache is kept in: keys and values, or one with latent attention.
    layout : "layers" or "contiguous"
        Whether each layer's tensors lie by themselves, so that a run of blocks takes layers x tensors descriptors, or
        a block is one piece of memory with all its layers on both sides, so that it takes one.
    merges_blocks : bool
        Whether blocks that are adjacent, in order, on both sides are one run; else each block is.
    allocator : "paged" or "contiguous"
        Whether a request gets any free blocks, those first that are free for longest, or the first stretch that
        holds it.
    overlap : "none" or "layers"
        Whether all moves once the prefill has ended, or each layer as soon as it is computed (Splitwise,
        arXiv:2311.18677, section IV-C).
    transpose : bool
        Whether the destination must rearrange what comes, since its tensor parallelism or layout differs.
    hbm_bandwidth : float, optional
        Bytes a second of the destination GPU's memory; needed to transpose.
    polling : float
        Seconds between two looks at whether a transfer has ended; 0 if that is told at once.

    Raises
    ------
    ValueError
        When a field has a wrong value, or another one needs it.
    """

    bandwidth: Bandwidth = math.inf
    source_bandwidth: Bandwidth | None = None
    destination_bandwidth: Bandwidth | None = None
    fabric_bandwidth: Bandwidth = math.inf
    latency: Time = 0.0
    descriptor_cost: Time = 0.0
    kv_bytes_per_token: Positive | None = None
    layers: Count | None = None
    tensors: Annotated[int, Range(1, 2)] = 2
    layout: Literal["layers", "contiguous"] = "layers"
    merges_blocks: bool = False
    allocator: Literal["paged", "contiguous"] = "paged"
    overlap: Literal["none", "layers"] = "none"
    transpose: bool = False
    hbm_bandwidth: Positive | None = None
    polling: Time = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_bytes_per_token is None:
            for name in ("bandwidth", "source_bandwidth", "destination_bandwidth", "fabric_bandwidth"):
                if (value := getattr(self, name)) is not None and value < math.inf:
                    raise ValueError(f"kv_bytes_per_token must be given where {name} is finite, got {value!r}")
            if self.transpose:
                raise ValueError("kv_bytes_per_token must be given where transpose is true")
        if self.layers is None:
            if self.overlap == "layers":
                raise ValueError("layers must be given where overlap is 'layers'")
            if self.layout == "layers" and self.descriptor_cost > 0:
                raise ValueError(
                    f"layers must be given where layout is 'layers' and descriptors cost time, "
                    f"got descriptor_cost={self.descriptor_cost!r}"
                )
        if self.transpose and self.hbm_bandwidth is None:
            raise ValueError("hbm_bandwidth must be given where transpose is true")

    @classmethod
    def of(
        cls,
        model: "Model | str",
        link: Link | str,
        *,
        gpu: "GPU | str | None" = None,
        kv_dtype: "Dtype" = "bfloat16",
        tp: int = 1,
        destination_tp: int | None = None,
        **fields: Any,
    ) -> Self:
        """The transfer of a model's KV cache over a link.

        Parameters
        ----------
        model, link, gpu : Model, Link and GPU, or their names
            The GPU is the destination's.
        kv_dtype : "bfloat16", "float16" or "fp8"
            Of keys and values.
        tp, destination_tp : int
            Tensor parallelism of both sides, or of each: every rank sends its share over a NIC of its own. Where they
            differ, the side with fewer ranks decides, and the cache is transposed.
        **fields
            Others of `KVTransfer`, in place of what follows from these.

        Returns
        -------
        KVTransfer

        Raises
        ------
        ValueError
            When there is no model, link or GPU of that name, the model can't be shared out so, or a field is wrong.
        """
        from vecsim.gpus import GPU
        from vecsim.models import Model

        model = Model.named(model) if isinstance(model, str) else model
        link = Link.named(link) if isinstance(link, str) else link
        gpu = GPU.named(gpu) if isinstance(gpu, str) else gpu
        other = tp if destination_tp is None else destination_tp
        made: dict[str, Any] = {
            "bandwidth": link.bandwidth,
            "latency": link.latency,
            "descriptor_cost": link.descriptor_cost,
            "kv_bytes_per_token": max(model.kv_bytes_per_token(kv_dtype, each) for each in (tp, other)),
            "layers": model.layers,
            "tensors": 1 if model.is_mla else 2,
            "transpose": other != tp,
            "hbm_bandwidth": gpu.bandwidth if gpu is not None else None,
        }
        return cls(**made | fields)

    @property
    def path_bandwidth(self) -> float:
        """Bytes a second of a transfer that is alone: of the slowest of NICs and fabric."""
        return min(self.nic_bandwidth("source"), self.nic_bandwidth("destination"), self.fabric_bandwidth)

    def nic_bandwidth(self, side: Literal["source", "destination"]) -> float:
        """Bytes a second of the NIC on one side."""
        own = self.source_bandwidth if side == "source" else self.destination_bandwidth
        return self.bandwidth if own is None else own

    @property
    def descriptors_per_run(self) -> int:
        """Descriptors of one run of blocks: layers x tensors, or 1 if the layout is contiguous."""
        return 1 if self.layout == "contiguous" else (self.layers or 1) * self.tensors

    def size(self, tokens: float) -> float:
        """Bytes of tokens that the destination lacks: tokens x kv_bytes_per_token.

        Raises
        ------
        ValueError
            When `kv_bytes_per_token` isn't given.
        """
        if self.kv_bytes_per_token is None:
            raise ValueError("kv_bytes_per_token must be given to know a transfer's bytes")
        return tokens * self.kv_bytes_per_token

    def descriptors(self, blocks: int, runs: int | None = None) -> int:
        """Descriptors of a transfer.

        Parameters
        ----------
        blocks : int
            Blocks that move.
        runs : int, optional
            Stretches of them that are adjacent, in order, on both sides; each block is one unless given. Without
            `merges_blocks` each is one in any case.

        Returns
        -------
        int
            runs x `descriptors_per_run`.

        Raises
        ------
        ValueError
            When there are more runs than blocks, or none of some blocks.
        """
        if runs is not None and not min(blocks, 1) <= runs <= blocks:
            raise ValueError(f"runs must be >= {min(blocks, 1)} and <= blocks ({blocks}), got {runs!r}")
        return (runs if self.merges_blocks and runs is not None else blocks) * self.descriptors_per_run

    def transpose_time(self, size: float) -> float:
        """Seconds to rearrange bytes: 2 x size / (0.8 x hbm_bandwidth) + 3 us; 0 unless `transpose`."""
        if not self.transpose or self.hbm_bandwidth is None:
            return 0.0
        return 2 * size / (TRANSPOSE_EFFICIENCY * self.hbm_bandwidth) + TRANSPOSE_LAUNCH

    def unloaded_time(self, size: float, descriptors: int = 0) -> float:
        """Seconds of a transfer that shares no link; none if nothing moves.

        latency + descriptors x descriptor_cost + size / `path_bandwidth` + `transpose_time(size)`.

        Parameters
        ----------
        size : float
            Bytes.
        descriptors : int
        """
        if size == 0:
            return 0.0
        setup = self.latency + descriptors * self.descriptor_cost
        return setup + size / self.path_bandwidth + self.transpose_time(size)

    def head_start(self, prefill: float) -> float:
        """Seconds before the end of a prefill of so many at which a transfer begins.

        prefill x (layers - 1) / layers where layers overlap: the first one is computed by then; else 0.
        """
        return prefill * (self.layers - 1) / self.layers if self.overlap == "layers" and self.layers else 0.0

    def visible_time(self, time: float, prefill: float = 0.0) -> float:
        """Seconds of a transfer that come after the prefill.

        max(time / layers, time - `head_start(prefill)`) where layers overlap: the last layer can't leave before it is
        computed; else the whole.

        Parameters
        ----------
        time : float
            Seconds of the whole transfer.
        prefill : float
            Seconds of the prefill before it.
        """
        if self.overlap == "none" or not self.layers:
            return time
        return max(time / self.layers, time - self.head_start(prefill))

    def noticed_time(self, time: float) -> float:
        """Seconds until the end of a transfer of so many is noticed: the next multiple of `polling`."""
        return noticed_at(0.0, time, self.polling)

    def effective_bandwidth(self, size: float, descriptors: int = 0) -> float:
        """Bytes a second that a transfer alone attains, all told: size / `unloaded_time`; infinite if that is 0."""
        time = self.unloaded_time(size, descriptors)
        return size / time if time > 0 else math.inf

    def kernel(self) -> dict[str, Any]:
        """Numbers of the formulas above, by name, as kernels take them."""
        transposes = self.transpose and self.hbm_bandwidth is not None
        return {
            "source_bandwidth": self.nic_bandwidth("source"),
            "destination_bandwidth": self.nic_bandwidth("destination"),
            "fabric_bandwidth": self.fabric_bandwidth,
            "latency": self.latency,
            "descriptor_cost": self.descriptor_cost,
            "descriptors_per_run": self.descriptors_per_run,
            "bytes_per_token": self.kv_bytes_per_token or 0.0,
            "merges": self.merges_blocks,
            "first_fit": self.allocator == "contiguous",
            "overlapped_layers": self.layers if self.overlap == "layers" else 1,
            "transpose_per_byte": 2 / (TRANSPOSE_EFFICIENCY * (self.hbm_bandwidth or 1.0)) if transposes else 0.0,
            "transpose_launch": TRANSPOSE_LAUNCH if transposes else 0.0,
            "polling": self.polling,
        }


def fragmentation(runs: int, blocks: int) -> float:
    """Runs / blocks: 1 if no two blocks of a request are neighbours, 1 / blocks if all are; NaN of none."""
    return runs / blocks if blocks else math.nan


def check_same_kv(
    source: "Model | str",
    destination: "Model | str",
    source_dtype: "Dtype" = "bfloat16",
    destination_dtype: "Dtype" = "bfloat16",
) -> None:
    """Check that what one model's workers compute can be read by another's.

    Parameters
    ----------
    source, destination : Model, or their names
    source_dtype, destination_dtype : "bfloat16", "float16" or "fp8"
        Of keys and values.

    Raises
    ------
    ValueError
        When the caches differ: names the first field that does, and both values.
    """
    from vecsim.models import Model

    source = Model.named(source) if isinstance(source, str) else source
    destination = Model.named(destination) if isinstance(destination, str) else destination
    # The width of a latent cache doesn't depend on the heads
    widths = ("rope_dim",) if source.is_mla and destination.is_mla else ("kv_heads", "head_dim")
    pairs = {field: (getattr(source, field), getattr(destination, field)) for field in ("kv_lora_rank", *widths)}
    pairs = {"layers": (source.layers, destination.layers)} | pairs | {"kv_dtype": (source_dtype, destination_dtype)}
    for field, (own, other) in pairs.items():
        if own != other:
            raise ValueError(
                f"{field} must be the same on both sides of a KV transfer, "
                f"got {own!r} from {source.name} and {other!r} in {destination.name}"
            )
