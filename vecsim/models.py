"""Models: their architecture, and what follows from it: parameters, bytes, shares under tensor parallelism."""

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from vecsim.declaration import Count, Number, Range, shown
from vecsim.gpus import Dtype, size_of
from vecsim.named import Named

Extent = Annotated[int, Range(0, 2**20)]

# What `model_type` of a config.json can be, and how its experts' fields are called there
DENSE = ("llama", "mistral", "qwen2", "qwen3")
EXPERTS = {
    "mixtral": {"experts": "num_local_experts", "expert_intermediate": "intermediate_size"},
    "qwen3_moe": {"experts": "num_experts", "expert_intermediate": "moe_intermediate_size"},
    "deepseek_v3": {"experts": "n_routed_experts", "expert_intermediate": "moe_intermediate_size"},
}


class Share(NamedTuple):
    """Parameters that one GPU holds, in all layers."""

    matrices: int  # every token passes: attention, dense MLPs, shared experts
    experts: int  # routed experts, all of them
    small: int  # norms, biases, routers: whole on every GPU, and never quantised
    embedding: int  # of which a token reads one row
    head: int  # that turns a hidden state into logits; 0 if it is the embedding

    def size(self, dtype: Dtype) -> int:
        """Bytes; matrices and experts are of the type, the rest is BF16 as in published FP8 checkpoints."""
        return (self.matrices + self.experts) * size_of(dtype) + (self.small + self.embedding + self.head) * 2


class Model(Named, frozen=True, kw_only=True):
    """A decoder-only transformer with gated MLPs; all attention is full attention.

    Parameters
    ----------
    name : str
    layers, hidden, vocab : int
    heads, kv_heads, head_dim : int
        Query heads, heads of keys and values, and the width of each.
    intermediate : int
        Width of the dense MLPs; 0 if every layer has experts.
    max_positions : int
        Tokens of the longest sequence.
    tied : bool
        Whether the head is the embedding.
    qkv_bias, qk_norm : bool
        Whether queries, keys and values have a bias (Qwen2); whether queries and keys are normed (Qwen3).
    experts, experts_per_token, expert_intermediate, shared_experts : int
        Routed experts of a layer, how many of them a token passes, their width, and experts that every token passes.
    dense_layers : int
        Layers, the first ones, that have a dense MLP instead of experts.
    q_lora_rank, kv_lora_rank, qk_nope_dim, rope_dim, v_head_dim : int
        Of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) in place of kv_heads and head_dim:
        ranks of the compressed queries (0: they aren't) and keys and values, and each head's widths.

    Raises
    ------
    ValueError
        When a field has a wrong value, or doesn't go with the others.
    """

    folder = "models"

    layers: Count
    hidden: Count
    intermediate: Extent = 0
    heads: Count
    kv_heads: Extent = 0
    head_dim: Extent = 0
    vocab: Number
    max_positions: Number
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Extent = 0
    experts_per_token: Extent = 0
    expert_intermediate: Extent = 0
    shared_experts: Extent = 0
    dense_layers: Extent = 0
    q_lora_rank: Extent = 0
    kv_lora_rank: Extent = 0
    qk_nope_dim: Extent = 0
    rope_dim: Extent = 0
    v_head_dim: Extent = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        needed: tuple[str, ...]
        needed = ("qk_nope_dim", "rope_dim", "v_head_dim") if self.kv_lora_rank else ("kv_heads", "head_dim")
        needed += ("experts_per_token", "expert_intermediate") if self.experts else ("intermediate",)
        if self.dense_layers:
            needed += ("experts", "intermediate")
        for field in needed:
            if getattr(self, field) == 0:
                raise ValueError(f"{field} must be >= 1 in {self.name}, got 0")
        if self.experts_per_token > self.experts:
            raise ValueError(f"experts_per_token must be <= experts ({self.experts}), got {self.experts_per_token}")
        if self.dense_layers > self.layers:
            raise ValueError(f"dense_layers must be <= layers ({self.layers}), got {self.dense_layers}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads ({self.heads}), got {self.kv_heads}")

    @classmethod
    def from_config(cls, path: str | Path, name: str | None = None) -> Self:
        """The model of a config.json as Hugging Face's repositories have them.

        Parameters
        ----------
        path : str or Path
        name : str, optional
            The folder's name unless given.

        Returns
        -------
        Model
            Of a model of type llama, mistral, qwen2, qwen3, mixtral, qwen3_moe or deepseek_v3. A sliding window, where
            one is on, is the longest sequence: up to there it is full attention.

        Raises
        ------
        ValueError
            When the file can't be read, or a field is missing, wrong or not modelled: names both.
        """
        file = Path(path)
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} can't be read as JSON: {getattr(error, 'strerror', None) or error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file} must hold an object, got {shown(config)}")
        fields = _fields(config, file)
        try:
            return cls(name=name or file.resolve().parent.name, **fields)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @property
    def is_mla(self) -> bool:
        """Whether keys and values are kept compressed (multi-head latent attention)."""
        return self.kv_lora_rank > 0

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    def kv_heads_of(self, tp: int) -> int:
        """Heads of keys and values that each of `tp` GPUs holds: where there are more GPUs, they are copied."""
        return max(self.kv_heads // tp, 1)

    def share(self, tp: int = 1) -> Share:
        """Parameters that each of `tp` GPUs holds under tensor parallelism.

        Raises
        ------
        ValueError
            When heads or widths can't be shared out among them.
        """
        self.check_tp(tp)
        heads = self.heads // tp
        if self.is_mla:
            qk = self.qk_nope_dim + self.rope_dim
            whole = self.hidden * (self.q_lora_rank + self.kv_lora_rank + self.rope_dim)
            queries = (self.q_lora_rank or self.hidden) * heads * qk
            values = self.kv_lora_rank * heads * (self.qk_nope_dim + self.v_head_dim)
            attention = whole + queries + values + heads * self.v_head_dim * self.hidden
            small = self.q_lora_rank + self.kv_lora_rank
        else:
            kv_width = 2 * self.kv_heads_of(tp) * self.head_dim
            attention = self.hidden * (2 * heads * self.head_dim + kv_width)
            small = (heads * self.head_dim + kv_width) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        expert = 3 * self.hidden * self.expert_intermediate // tp
        dense = 3 * self.hidden * self.intermediate // tp
        return Share(
            matrices=self.layers * attention
            + (self.layers - self.expert_layers) * dense
            + self.expert_layers * self.shared_experts * expert,
            experts=self.expert_layers * self.experts * expert,
            small=self.layers * (small + 2 * self.hidden)
            + self.expert_layers * self.experts * self.hidden
            + self.hidden,
            embedding=self.vocab * self.hidden // tp,
            head=0 if self.tied else self.vocab * self.hidden // tp,
        )

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(self.share())

    @property
    def active_parameters(self) -> int:
        """Parameters without the experts that a token passes by."""
        share = self.share()
        idle = share.experts // self.experts * (self.experts - self.experts_per_token) if self.experts else 0
        return sum(share) - idle

    def weight_bytes(self, dtype: Dtype = "bfloat16", tp: int = 1) -> int:
        """Bytes of the weights on each of `tp` GPUs; see `Share.size` for what FP8 leaves in BF16.

        Raises
        ------
        ValueError
            When the model can't be shared out among so many, or there is no such type.
        """
        return self.share(tp).size(dtype)

    def kv_bytes_per_token(self, dtype: Dtype = "bfloat16", tp: int = 1) -> int:
        """Bytes of one token's keys and values on each of `tp` GPUs.

        layers x 2 x KV heads x width x bytes of an element; with latent attention layers x (rank + rotary width) x
        bytes, whole on every GPU.

        Raises
        ------
        ValueError
            When the model can't be shared out among so many, or there is no such type.
        """
        self.check_tp(tp)
        width = self.kv_lora_rank + self.rope_dim if self.is_mla else 2 * self.kv_heads_of(tp) * self.head_dim
        return self.layers * width * size_of(dtype)

    def check_tp(self, tp: int) -> None:
        """Check that the model can be shared out among so many GPUs.

        Raises
        ------
        ValueError
            When it can't: says among how many it can.
        """
        if tp not in (allowed := self.tps()):
            raise ValueError(f"tp must be one of {', '.join(map(str, allowed))} for {self.name}, got {tp!r}")

    def tps(self) -> tuple[int, ...]:
        """Among how many GPUs of a server, up to 64, the model can be shared out."""

        def fits(tp: int) -> bool:
            kv_fit = self.is_mla or self.kv_heads % tp == 0 or tp % self.kv_heads == 0
            return kv_fit and not (self.heads % tp or self.intermediate % tp or self.expert_intermediate % tp)

        return tuple(tp for tp in range(1, 65) if fits(tp))


def _fields(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Fields of `Model` from a config.json."""

    def needed(source: str, least: int = 1) -> int:
        value = config.get(source)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            what = "is missing" if value is None else f"must be a whole number >= {least}, got {shown(value)}"
            raise ValueError(f"{file}: {source} {what}")
        return value

    def only(source: str, *allowed: Any) -> None:
        if source in config and config[source] not in allowed:
            raise ValueError(
                f"{file}: {source} must be {shown(allowed[0])} to be modelled, got {shown(config[source])}"
            )

    kind = config.get("model_type")
    if kind not in (*DENSE, *EXPERTS):
        what = "is missing" if kind is None else f"must be one of {', '.join((*DENSE, *EXPERTS))}, got {shown(kind)}"
        raise ValueError(f"{file}: model_type {what}")
    fields: dict[str, Any] = {
        "layers": needed("num_hidden_layers"),
        "hidden": needed("hidden_size"),
        "heads": needed("num_attention_heads"),
        "vocab": needed("vocab_size"),
        "max_positions": needed("max_position_embeddings"),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "qk_norm": kind in ("qwen3", "qwen3_moe"),
        "qkv_bias": kind == "qwen2" or bool(config.get("attention_bias", False)),
    }
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        fields["max_positions"] = min(fields["max_positions"], needed("sliding_window"))
    if kind in DENSE or kind == "deepseek_v3":
        fields["intermediate"] = needed("intermediate_size")
    if kind in EXPERTS:
        fields |= {field: needed(source) for field, source in EXPERTS[kind].items()}
        fields["experts_per_token"] = needed("num_experts_per_tok")
    if kind == "qwen3_moe":
        only("mlp_only_layers", [], None)
        only("decoder_sparse_step", 1)
    if kind == "deepseek_v3":
        only("moe_layer_freq", 1)
        fields |= {
            "shared_experts": needed("n_shared_experts", 0),
            "dense_layers": needed("first_k_dense_replace", 0),
            "q_lora_rank": 0 if config.get("q_lora_rank", 0) is None else needed("q_lora_rank"),
            "kv_lora_rank": needed("kv_lora_rank"),
            "qk_nope_dim": needed("qk_nope_head_dim"),
            "rope_dim": needed("qk_rope_head_dim"),
            "v_head_dim": needed("v_head_dim"),
        }
        return fields
    grouped = config.get("num_key_value_heads") is not None
    fields["kv_heads"] = needed("num_key_value_heads") if grouped else fields["heads"]
    if config.get("head_dim") is not None:
        fields["head_dim"] = needed("head_dim")
    elif fields["hidden"] % fields["heads"] == 0:
        fields["head_dim"] = fields["hidden"] // fields["heads"]
    else:
        raise ValueError(f"{file}: head_dim is missing, and num_attention_heads doesn't divide hidden_size")
    return fields
