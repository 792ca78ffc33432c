"""How many blocks of KV memory a server has beside a model's weights."""

from vecsim.declaration import Range, check
from vecsim.gpus import GPU, Dtype, size_of
from vecsim.models import Model

# Bytes that a process holds beside weights, activations and KV cache, on each GPU, and more where GPUs talk to each
# other: CUDA's context and libraries, NCCL's and the all-reduce's buffers. Chosen to meet what four servers of vLLM
# 0.15.1 on H100 reported (`tests/test_hardware.py`): they do within 0.3 %.
CONTEXT = 0.26 * 2**30
COLLECTIVES = 0.43 * 2**30


def kv_blocks(
    model: Model | str,
    gpu: GPU | str,
    *,
    tp: int = 1,
    dtype: Dtype = "bfloat16",
    kv_dtype: Dtype = "bfloat16",
    memory_fraction: float = 0.9,
    block_size: int = 16,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 128,
) -> int:
    """Blocks of KV memory that vLLM would find.

    Of each GPU: (memory x fraction - weights - activations' peak - what the process holds beside) / bytes of a block,
    as vLLM's profiling run does it (`determine_available_memory` of its worker), with estimates for what it measures.

    Parameters
    ----------
    model, gpu : Model and GPU, or their names
    tp : int
        GPUs among which the model is shared out.
    dtype, kv_dtype : "bfloat16", "float16" or "fp8"
        Of the weights, and of the KV cache.
    memory_fraction : float
        Share of a GPU's memory that the server may use (vLLM's `gpu_memory_utilization`).
    block_size : int
        Tokens of a block.
    max_num_batched_tokens, max_num_seqs : int
        Tokens and requests of the largest step, from which the activations' peak is estimated.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        When the model doesn't fit, with what is lacking and the least `tp` that would do; or a value is wrong.
    """
    model = Model.named(model) if isinstance(model, str) else model
    gpu = GPU.named(gpu) if isinstance(gpu, str) else gpu
    check("model", model, (Model,), None)
    check("gpu", gpu, (GPU,), None)
    check("memory_fraction", memory_fraction, (float,), Range(0, 1, low_allowed=False))
    counts = {"block_size": block_size, "max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs}
    for field, count in counts.items():
        check(field, count, (int,), Range(1))
    size_of(dtype)
    size_of(kv_dtype, "kv_dtype")

    def room(tp: int) -> float:
        """Bytes for KV cache on each GPU."""
        held = CONTEXT + (COLLECTIVES if tp > 1 else 0.0)
        peak = activation_peak(model, tp, max_num_batched_tokens, max_num_seqs)
        return memory_fraction * gpu.memory - model.weight_bytes(dtype, tp) - peak - held

    block = model.kv_bytes_per_token(kv_dtype, tp) * block_size
    free = room(tp)
    if free >= block:
        return int(free // block)
    enough = next(
        (n for n in model.tps() if n > tp and room(n) >= model.kv_bytes_per_token(kv_dtype, n) * block_size), None
    )
    raise ValueError(
        f"{model.name} in {dtype} doesn't fit {tp} x {gpu.name} at memory_fraction {memory_fraction:g}: "
        f"{(block - free) / 1e9:.1f} GB a GPU are lacking; "
        + (f"it fits from tp={enough} on" if enough else "nor does it with a larger tp")
    )


def activation_peak(model: Model, tp: int, tokens: int, requests: int) -> float:
    """Bytes of activations at their peak in a step, on each of `tp` GPUs (an estimate).

    The larger of: hidden state and residual, the MLP's input, gate and product in BF16 for every token, once for each
    expert that it passes; and the logits of every request in BF16 and twice in FP32, as a sampler sorts them.
    """
    widths = []
    if model.intermediate:
        widths.append(3 * model.intermediate / tp)
    if model.experts:
        widths.append(model.experts_per_token * (3 * model.expert_intermediate / tp + model.hidden))
    layer = 2.0 * tokens * (2 * model.hidden + max(widths))
    return max(layer, 10.0 * requests * model.vocab)
