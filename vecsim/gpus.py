"""GPUs: what they compute, hold and move in a second, from their vendors' datasheets."""

from typing import Literal

from vecsim.declaration import Count, Positive, suggestion
from vecsim.named import Named

Dtype = Literal["bfloat16", "float16", "fp8"]

# Bytes of an element
SIZES = {"bfloat16": 2, "float16": 2, "fp8": 1}


def size_of(dtype: Dtype, field: str = "dtype") -> int:
    """Bytes of an element.

    Raises
    ------
    ValueError
        When there is no such type: names the field.
    """
    if dtype not in SIZES:
        raise ValueError(f"{field} must be one of {', '.join(SIZES)}, got {dtype!r}{suggestion(str(dtype), SIZES)}")
    return SIZES[dtype]


class GPU(Named, frozen=True, kw_only=True):
    """A GPU.

    Parameters
    ----------
    name : str
    bfloat16_flops : float
        Dense BF16 or FP16 operations a second; datasheets often quote twice that, with sparsity.
    fp8_flops : float, optional
        The same of FP8; none if the GPU computes FP8 weights in BF16.
    memory : float
        Bytes that a process finds (`torch.cuda.mem_get_info`); less than the datasheet's GiB, more than its GB.
    bandwidth : float
        Bytes of memory read or written in a second.
    link : "nvlink", "infinity-fabric" or "pcie"
        What joins the GPUs of a server.
    link_bandwidth : float
        Bytes a second from a GPU to the others, in one direction; datasheets often quote both together.
    link_peers : int, optional
        How many others that is split among, where each has a link of its own (a mesh); none behind a switch.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    folder = "gpus"

    bfloat16_flops: Positive
    fp8_flops: Positive | None = None
    memory: Positive
    bandwidth: Positive
    link: Literal["nvlink", "infinity-fabric", "pcie"]
    link_bandwidth: Positive
    link_peers: Count | None = None

    def flops(self, dtype: Dtype = "bfloat16") -> float:
        """Dense operations a second on weights of a type."""
        return self.fp8_flops if dtype == "fp8" and self.fp8_flops is not None else self.bfloat16_flops

    def link_bandwidth_among(self, gpus: int) -> float:
        """Bytes a second that a GPU sends to the others of a group of that size."""
        if self.link_peers is None:
            return self.link_bandwidth
        return self.link_bandwidth * min(gpus - 1, self.link_peers) / self.link_peers
