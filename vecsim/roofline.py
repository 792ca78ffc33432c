"""A step's time from a model's architecture and a GPU's peaks: declaration, its numbers, and the rule."""

import math
from typing import Annotated, NamedTuple

from vecsim.declaration import NonNegative, Range
from vecsim.gpus import GPU, Dtype, size_of
from vecsim.models import Model
from vecsim.step_time import ROOFLINE, StepTime

Efficiency = Annotated[float, Range(0, 1, low_allowed=False)]

# Bytes of an activation
WIDE = 2


class Numbers(NamedTuple):
    """What the rule in `vecsim.kernel.roofline` multiplies its aggregates with: work / peak, on each of the GPUs."""

    base: float  # s of every step: overheads, latencies of the collectives
    per_token: float  # s: norms, rotary embedding, activation functions, writing KV, all-reduces
    per_request: float  # s: sampling, gathering the logits
    matrix_compute: float  # s per token
    matrix_weights: float  # s to read them
    matrix_moved: float  # s per token: what goes in and comes out
    expert_compute: float  # s per token
    expert_weights: float  # s to read all of them
    expert_moved: float  # s per token
    expert_missed: float  # chance that a token passes by an expert
    head_compute: float  # s per request
    head_weights: float  # s
    attention_compute: float  # s per pair of a token of a prompt and one that it attends to
    decode_compute: float  # s per token of the context of a decoding request
    kv_read: float  # s per token of context
    expand: float  # s per token before a prompt's chunk: keys and values from their compressed form (MLA)


class RooflineStepTime(StepTime, frozen=True, kw_only=True, tag=True):
    """What a step's arithmetic, memory traffic and communication take on a GPU, at declared efficiencies.

    Groups of operators follow one another: the matrices that every token passes (attention's projections, dense MLPs,
    shared experts), routed experts, attention over prompts, attention of decodes, the head. Each takes the longer of
    FLOPs / (peak x `compute_efficiency`) and bytes / (bandwidth x `bandwidth_efficiency`). To these are added
    element-wise operators, all-reduces, and overheads.

    Parameters
    ----------
    model : Model
        Or its name, as in `Model.names()`.
    gpu : GPU
        Or its name, as in `GPU.names()`.
    tp : int
        GPUs among which the model is shared out (tensor parallelism).
    dtype : "bfloat16", "float16" or "fp8"
        Of the weights. FP8 computes in FP8 where the GPU can, else in BF16.
    kv_dtype : "bfloat16", "float16" or "fp8"
        Of the KV cache. Attention computes in BF16.
    compute_efficiency : float
        Share of the peak that matrix products and attention reach.
    bandwidth_efficiency : float
        Share of the memory bandwidth that reading weights, KV cache and activations reaches.
    link_efficiency : float
        Share of the link's bandwidth that an all-reduce reaches.
    link_latency : float
        Of an all-reduce, for each doubling of the GPUs [s].
    step_overhead : float
        Of every step: scheduling, preparing inputs, launching, sampling, as far as the GPU waits for it [s].
    layer_overhead : float
        Of every layer: gaps between its kernels, and their first and last waves [s].
    expert_overhead : float
        Of every layer with experts, beside: routing, sorting tokens by expert, and bringing them together again [s].
    request_overhead : float
        For each request of a step, in what the GPU waits for [s].

    Raises
    ------
    ValueError
        When a field has a wrong value, or the model can't be shared out among `tp` GPUs.

    Notes
    -----
    A token costs 2 FLOPs for each parameter that it passes; a pair of tokens in attention costs a layer 2 x heads x
    (width of a key + width of a value). T tokens read the weights of E (1 - (1 - k / E)^T) of E experts, of which each
    takes k at random. A ring's all-reduce of b bytes sends 2 b (tp - 1) / tp from each GPU (Thakur, Rabenseifner,
    Gropp, 2005); there are two in a layer (Shoeybi et al., arXiv:1909.08053) and one after the embedding. The head is
    computed for every request of the step, as vLLM does it. With latent attention prompts expand keys and values of
    what they attend to (their own tokens' are among the matrices), decodes absorb them (arXiv:2412.19437, as vLLM does
    it), and every GPU reads the whole cache.

    The efficiencies' defaults are round figures for recent servers, not fitted to one: with them the time between
    tokens of three measured servers is met within 12 % (`tests/test_roofline.py`).
    """

    model: Model
    gpu: GPU
    tp: Annotated[int, Range(1, 64)] = 1
    dtype: Dtype = "bfloat16"
    kv_dtype: Dtype = "bfloat16"
    compute_efficiency: Efficiency = 0.6
    bandwidth_efficiency: Efficiency = 0.85
    link_efficiency: Efficiency = 0.7
    link_latency: NonNegative = 8e-6
    step_overhead: NonNegative = 1e-3
    layer_overhead: NonNegative = 10e-6
    expert_overhead: NonNegative = 30e-6
    request_overhead: NonNegative = 0.0

    code = ROOFLINE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.check_tp(self.tp)

    def coefficients(self) -> Numbers:
        """Sixteen numbers for the rule in `vecsim.kernel.roofline`."""
        model, tp, layers = self.model, self.tp, self.model.layers
        flops = self.gpu.flops(self.dtype) * self.compute_efficiency
        wide_flops = self.gpu.bfloat16_flops * self.compute_efficiency
        bandwidth = self.gpu.bandwidth * self.bandwidth_efficiency
        size = size_of(self.dtype)
        share = model.share(tp)
        head = model.vocab * model.hidden / tp
        width, hidden = attention_width(model, tp), model.hidden
        dense, routed = layers - model.expert_layers, model.experts_per_token
        expert_width = 3 * model.expert_intermediate / tp
        chosen = routed / model.experts if model.experts else 1.0

        # Elements that a token's operators read and write
        in_and_out = 2 * hidden + width + 2 * hidden
        shared = model.shared_experts * (2 * hidden + expert_width) if model.experts else 0.0
        matrix = layers * in_and_out + dense * 3 * model.intermediate / tp + model.expert_layers * shared
        expert = model.expert_layers * routed * (2 * hidden + expert_width)
        norms = layers * 2 * 4 * hidden
        gates = (
            dense * 3 * model.intermediate / tp + model.expert_layers * (routed + model.shared_experts) * expert_width
        )
        kv = model.kv_bytes_per_token(self.kv_dtype, tp)
        moved = WIDE * (norms + gates + layers * width) + kv

        base = self.step_overhead + self.layer_overhead * layers + self.expert_overhead * model.expert_layers
        sent = gathered = 0.0
        if tp > 1:
            base += self.link_latency * math.log2(tp) * (2 * layers + 2)
            link = self.gpu.link_bandwidth_among(tp) * self.link_efficiency
            sent = (2 * layers + 1) * WIDE * hidden * 2 * (tp - 1) / tp / link
            gathered = WIDE * model.vocab * (tp - 1) / tp / link
        pair, decode_pair, expansion = attention_flops(model, tp)
        return Numbers(
            base=base,
            per_token=moved / bandwidth + sent,
            # The sampler turns logits into FP32 and looks for the largest: 2 + 4 + 4 bytes
            per_request=self.request_overhead + 10 * model.vocab / bandwidth + gathered,
            matrix_compute=2 * (share.matrices + share.small) / flops,
            matrix_weights=(share.matrices * size + share.small * WIDE) / bandwidth,
            matrix_moved=WIDE * matrix / bandwidth,
            expert_compute=2 * share.experts * chosen / flops,
            expert_weights=share.experts * size / bandwidth,
            expert_moved=WIDE * expert / bandwidth,
            expert_missed=1.0 - chosen,
            head_compute=2 * head / wide_flops,
            head_weights=WIDE * head / bandwidth,
            attention_compute=pair / wide_flops,
            decode_compute=decode_pair / wide_flops,
            kv_read=kv / bandwidth,
            expand=expansion / wide_flops,
        )


def attention_width(model: Model, tp: int) -> float:
    """Elements of a token's queries, keys and values in a layer, on each of `tp` GPUs."""
    if model.is_mla:
        compressed = model.q_lora_rank + model.kv_lora_rank + model.rope_dim
        return compressed + model.heads // tp * (model.qk_nope_dim + model.rope_dim + model.v_head_dim)
    return (model.heads // tp + 2 * model.kv_heads_of(tp)) * model.head_dim


def attention_flops(model: Model, tp: int) -> tuple[float, float, float]:
    """FLOPs in all layers on each of `tp` GPUs.

    For a pair of tokens in a prompt, for a decode's token and one of its context, and for expanding a token's keys and
    values.
    """
    heads = model.layers * model.heads // tp
    if model.is_mla:
        key, value, rank = model.qk_nope_dim, model.v_head_dim, model.kv_lora_rank
        return (
            2.0 * heads * (key + model.rope_dim + value),
            2.0 * heads * (rank + model.rope_dim + rank),
            2.0 * heads * rank * (key + value),
        )
    return 4.0 * heads * model.head_dim, 4.0 * heads * model.head_dim, 0.0
