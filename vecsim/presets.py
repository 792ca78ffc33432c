"""Engines as they come: declarations with the defaults of a release. Nothing that couldn't be written by hand."""

from typing import Any

import msgspec

from vecsim.batching import (
    Batcher,
    ChunkedPrefillBatcher,
    IFBatcher,
    MaxUtilizationBatcher,
    NoEvictBatcher,
    PrefillFirstBatcher,
    SGLangBatcher,
    StaticBatcher,
    TokenBudgetBatcher,
)
from vecsim.declaration import suggestion
from vecsim.engine import Engine
from vecsim.kv_cache import KVCache

VLLM = ("0.6", "0.8", "0.10", "0.12", "0.14", "0.15", "0.16")


def _engine(usual: dict[str, Any], batcher: Batcher, cache: KVCache, fields: dict[str, Any]) -> Engine:
    """An engine with usual values, those that are given instead.

    `kv_blocks` gives the cache's blocks, and fields of the batcher go to the batcher.
    """
    of_batcher = {name: fields.pop(name) for name in list(fields) if name in batcher.__struct_fields__}
    blocks = fields.pop("kv_blocks", None)
    if blocks is not None:
        cache = msgspec.structs.replace(cache, blocks=blocks)
    values = {**usual, "batcher": msgspec.structs.replace(batcher, **of_batcher), "kv_cache": cache, **fields}
    return Engine(**values)


def vllm(*, version: str = "0.15", large_gpu: bool = True, **fields: Any) -> Engine:
    """VLLM's server.

    Parameters
    ----------
    version : str
        "0.6" is V0: prefills first, no prefix cache unless asked for. "0.8" and "0.10", "0.12" are V1: a token budget,
        prefix caching. From "0.14" on scheduling is asynchronous, from "0.16" on a request is admitted only if its
        whole prompt fits.
    large_gpu : bool
        Whether the GPU has 70 GiB and more and isn't an A100: then 8192 tokens a step and 1024 sequences, else 2048 and
        256.
    **fields
        Of `Engine` (`load_generator` and `step_time` are needed), of the batcher, and `kv_blocks`.

    Returns
    -------
    Engine

    Raises
    ------
    ValueError
        When the version is unknown, or a field has a wrong value.
    """
    if version not in VLLM:
        raise ValueError(f"version must be one of {', '.join(VLLM)}, got {version!r}{suggestion(str(version), VLLM)}")
    number = tuple(int(part) for part in version.split("."))
    slots = 1024 if large_gpu and number >= (0, 8) else 256
    if number < (0, 8):
        batcher: Batcher = PrefillFirstBatcher(max_num_batched_tokens=8192)
        return _engine({"max_batch_size": slots}, batcher, KVCache(watermark=0.01), fields)
    batcher = TokenBudgetBatcher(
        max_num_batched_tokens=8192 if large_gpu else 2048,
        reserve_full_prompt=number >= (0, 16),
        async_scheduling=number >= (0, 14),
    )
    return _engine({"max_batch_size": slots}, batcher, KVCache(prefix_caching=True), fields)


def sglang(**fields: Any) -> Engine:
    """SGLang: prefill first, by an estimate of what is to come; blocks of one token (radix cache)."""
    return _engine({"max_batch_size": 256}, SGLangBatcher(), KVCache(block_size=1, prefix_caching=True), fields)


def tensorrt_llm(*, policy: str = "guaranteed_no_evict", **fields: Any) -> Engine:
    """TensorRT-LLM with one of its two capacity policies.

    Parameters
    ----------
    policy : "guaranteed_no_evict" or "max_utilization"
    **fields
        As for `vllm`.

    Raises
    ------
    ValueError
        When the policy is unknown, or a field has a wrong value.
    """
    policies: dict[str, type[Batcher]] = {
        "guaranteed_no_evict": NoEvictBatcher,
        "max_utilization": MaxUtilizationBatcher,
    }
    if policy not in policies:
        raise ValueError(
            f"policy must be one of {', '.join(policies)}, got {policy!r}{suggestion(str(policy), policies)}"
        )
    return _engine({"max_batch_size": 2048}, policies[policy](), KVCache(block_size=32, prefix_caching=True), fields)


def sarathi(**fields: Any) -> Engine:
    """Sarathi-Serve: chunks of prompts beside the decodes."""
    return _engine({"max_batch_size": 128}, ChunkedPrefillBatcher(), KVCache(watermark=0.01), fields)


def orca(**fields: Any) -> Engine:
    """Orca: whole prompts join the decodes; memory for the longest sequence is reserved."""
    return _engine({"max_batch_size": 128}, IFBatcher(), KVCache(), fields)


def fastertransformer(**fields: Any) -> Engine:
    """FasterTransformer: static batches."""
    return _engine({"max_batch_size": 128}, StaticBatcher(), KVCache(), fields)
