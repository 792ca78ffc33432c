"""Engines as they come: declarations with the defaults of a release. Nothing that couldn't be written by hand."""

import re
from typing import Any, Literal

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
from vecsim.control_plane import ControlPlane
from vecsim.declaration import Range, check, refuse_unknown, shown
from vecsim.engine import Engine
from vecsim.fits import Fit
from vecsim.fleet import (
    DisaggregatedEngine,
    LengthOrLoadRule,
    LocalPrefill,
    PrefillLoadRule,
    PromptLengthRule,
    QueueAndLengthRule,
)
from vecsim.kv_cache import KVCache
from vecsim.models import Model
from vecsim.roofline import RooflineStepTime
from vecsim.routing import KVAwareRouter, OverlapRouter

Release = Literal["0.6", "0.8", "0.10", "0.12", "0.14", "0.15", "0.16"]
# Tokens a step that vLLM takes on a large GPU
LARGE_BUDGET = 8192
# What such a GPU has at least [bytes]
LARGE_MEMORY = 70 * 2**30
Policy = Literal["guaranteed_no_evict", "max_utilization"]
# Dynamo's policies of prefill on the decode worker, by their names there
LOCAL: dict[str, LocalPrefill | None] = {
    "never": None,
    "isl_bounding": PromptLengthRule(),
    "prefill_load": PrefillLoadRule(),
    "isl_or_load": LengthOrLoadRule(),
}
LocalPolicy = Literal["never", "isl_bounding", "prefill_load", "isl_or_load"]


def _engine(
    preset: str, usual: dict[str, Any], batcher: Batcher, cache: KVCache, fields: dict[str, Any], *own: str
) -> Engine:
    """An engine with usual values, those that are given instead; `own` are the preset's own parameters."""
    of_cache = ("kv_blocks", "kv_tokens", *cache.__struct_fields__)
    refuse_unknown(preset, fields, (*own, *Engine.__struct_fields__, *batcher.__struct_fields__, *of_cache))
    if missing := [name for name in ("load_generator", "step_time") if name not in fields]:
        raise TypeError(f"{preset} needs {' and '.join(missing)}")
    batcher = msgspec.structs.replace(batcher, **_taken(fields, "batcher", batcher.__struct_fields__))
    cache = _memory(cache, _taken(fields, "kv_cache", of_cache))
    return Engine(**{**usual, "batcher": batcher, "kv_cache": cache, **fields})


def _taken(fields: dict[str, Any], component: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a component, taken from the others; the component itself can't be given beside them."""
    taken = {name: fields.pop(name) for name in names if name in fields}
    if taken and component in fields:
        raise ValueError(
            f"{component} must be left out where {' and '.join(taken)} is given, got {shown(fields[component])}"
        )
    return taken


def _memory(cache: KVCache, fields: dict[str, Any]) -> KVCache:
    """KV memory with other values; its size is given one way."""
    sizes = [name for name in ("kv_blocks", "kv_tokens", "blocks") if fields.get(name) is not None]
    if len(sizes) > 1:
        raise ValueError(f"{sizes[1]} must be left out where {sizes[0]} is given, got {shown(fields[sizes[1]])}")
    blocks, tokens = fields.pop("kv_blocks", None), fields.pop("kv_tokens", None)
    cache = msgspec.structs.replace(cache, **fields)
    if tokens is not None:
        blocks = check("kv_tokens", tokens, (int,), Range(1, 2**30 * cache.block_size)) // cache.block_size
        if blocks == 0:
            raise ValueError(f"kv_tokens must be at least a block of {cache.block_size} tokens, got {shown(tokens)}")
    elif blocks is not None:
        blocks = check("kv_blocks", blocks, (int,), Range(1, 2**30))
    return cache if blocks is None else msgspec.structs.replace(cache, blocks=blocks)


def vllm(*, version: str = "0.15", large_gpu: bool = True, **fields: Any) -> Engine:
    """VLLM's server.

    Parameters
    ----------
    version : str
        One of 0.6, 0.8, 0.10, 0.12, 0.14, 0.15, 0.16, or a patch of it: "0.15.1" is as "0.15". "0.6" is V0: prefills
        first, no prefix cache unless asked for. "0.8" and "0.10", "0.12" are V1: a token budget, prefix caching. From
        "0.14" on scheduling is asynchronous, from "0.16" on a request is admitted only if its whole prompt fits.
    large_gpu : bool
        Whether the GPU has 70 GiB and more and isn't an A100: then 8192 tokens a step and 1024 sequences, else 2048 and
        256.
    **fields
        Of `Engine` (`load_generator` and `step_time` are needed), of the batcher and of `KVCache`. The size of KV
        memory is `kv_tokens` in tokens, of which whole blocks count, or `kv_blocks` in blocks of 16 tokens (or of
        `block_size`, if given).

    Returns
    -------
    Engine

    Raises
    ------
    ValueError
        When the version is unknown, a field has a wrong value, or a component is given beside fields of its own.
    TypeError
        When a field is unknown, or a needed one is missing.
    """
    release = _release(version)
    own = ("version", "large_gpu")
    large_gpu = check("large_gpu", large_gpu, (bool,), None)
    number = tuple(int(part) for part in release.split("."))
    slots = 1024 if large_gpu and number >= (0, 8) else 256
    if number < (0, 8):
        batcher: Batcher = PrefillFirstBatcher(max_num_batched_tokens=LARGE_BUDGET)
        return _engine("vllm", {"max_batch_size": slots}, batcher, KVCache(watermark=0.01), fields, *own)
    batcher = TokenBudgetBatcher(
        max_num_batched_tokens=LARGE_BUDGET if large_gpu else 2048,
        reserve_full_prompt=number >= (0, 16),
        async_scheduling=number >= (0, 14),
    )
    return _engine("vllm", {"max_batch_size": slots}, batcher, KVCache(prefix_caching=True), fields, *own)


def _release(version: Any) -> str:
    """The release that a version of vLLM is of."""
    if not isinstance(version, str):
        raise ValueError(f'version must be a text, with quotes as in version="0.15", got {shown(version)}')
    patch = re.fullmatch(r"(\d+\.\d+)\.\d\w*", version)
    return str(check("version", patch[1] if patch else version, (Release,), None))


def sglang(**fields: Any) -> Engine:
    """SGLang: prefill first, by an estimate of what is to come; blocks of one token (radix cache).

    Fields are as for `vllm`; `kv_blocks` counts blocks of one token.
    """
    cache = KVCache(block_size=1, prefix_caching=True)
    return _engine("sglang", {"max_batch_size": 256}, SGLangBatcher(), cache, fields)


def tensorrt_llm(*, policy: str = "guaranteed_no_evict", **fields: Any) -> Engine:
    """TensorRT-LLM with one of its two capacity policies.

    Parameters
    ----------
    policy : "guaranteed_no_evict" or "max_utilization"
    **fields
        As for `vllm`; `kv_blocks` counts blocks of 32 tokens.

    Returns
    -------
    Engine

    Raises
    ------
    ValueError
        When the policy is unknown, a field has a wrong value, or a component is given beside fields of its own.
    TypeError
        When a field is unknown, or a needed one is missing.
    """
    policy = check("policy", policy, (Policy,), None)
    batcher = NoEvictBatcher() if policy == "guaranteed_no_evict" else MaxUtilizationBatcher()
    cache = KVCache(block_size=32, prefix_caching=True)
    return _engine("tensorrt_llm", {"max_batch_size": 2048}, batcher, cache, fields, "policy")


def sarathi(**fields: Any) -> Engine:
    """Sarathi-Serve: chunks of prompts beside the decodes.

    Fields are as for `vllm`; `kv_blocks` counts blocks of 16 tokens.
    """
    cache = KVCache(watermark=0.01)
    return _engine("sarathi", {"max_batch_size": 128}, ChunkedPrefillBatcher(), cache, fields)


def orca(**fields: Any) -> Engine:
    """Orca: whole prompts join the decodes; memory for the longest sequence is reserved.

    Fields are as for `vllm`; `kv_blocks` counts blocks of 16 tokens.
    """
    return _engine("orca", {"max_batch_size": 128}, IFBatcher(), KVCache(), fields)


def fastertransformer(**fields: Any) -> Engine:
    """FasterTransformer: static batches.

    Fields are as for `vllm`; `kv_blocks` counts blocks of 16 tokens.
    """
    return _engine("fastertransformer", {"max_batch_size": 128}, StaticBatcher(), KVCache(), fields)


def fitted(fit: Fit | str = "vllm-0.15-h100", *, model: Model | str, tp: int = 1, **fields: Any) -> Engine:
    """VLLM's server with the step times that were fitted to measured ones, for a model of any size.

    Parameters
    ----------
    fit : Fit
        Or its name, as in `Fit.names()`.
    model : Model
        Or its name, as in `Model.names()`.
    tp : int
        GPUs among which the model is shared out.
    **fields
        As for `vllm`; `load_generator` is needed. Unless they are given, `large_gpu` is as the GPU is, and KV memory
        what the model leaves of the GPU's beside the activations of this engine's largest step.

    Returns
    -------
    Engine

    Raises
    ------
    ValueError
        When a name is unknown, the model doesn't fit the GPUs, or a field has a wrong value.
    TypeError
        When a field is unknown, or a needed one is missing.
    """
    fit = Fit.named(fit) if isinstance(fit, str) else fit
    model = Model.named(model) if isinstance(model, str) else model
    step_time = RooflineStepTime(model=model, tp=tp, **fit.fields())
    usual = {
        "version": fit.version,
        "large_gpu": step_time.gpu.memory >= LARGE_MEMORY and "a100" not in step_time.gpu.name.lower(),
        "step_time": step_time,
        "overheads": fit.overheads,
    }
    engine = vllm(**{**usual, **fields})
    if {"kv_cache", "kv_blocks", "kv_tokens", "blocks"} & fields.keys():
        return engine
    return with_memory(engine, engine.step_time if isinstance(engine.step_time, RooflineStepTime) else step_time)


def with_memory(engine: Engine, step_time: RooflineStepTime) -> Engine:
    """The engine with the KV memory that the model leaves of the GPU's beside the activations of its largest step."""
    from vecsim.capacity import kv_blocks

    cache = engine.kv_cache or KVCache()
    blocks = kv_blocks(
        step_time.model,
        step_time.gpu,
        tp=step_time.tp,
        dtype=step_time.dtype,
        kv_dtype=step_time.kv_dtype,
        block_size=cache.block_size,
        max_num_batched_tokens=getattr(engine.batcher, "max_num_batched_tokens", None) or LARGE_BUDGET,
        max_num_seqs=engine.max_batch_size,
    )
    return msgspec.structs.replace(engine, kv_cache=msgspec.structs.replace(cache, blocks=blocks))


def dynamo_gen1(**fields: Any) -> DisaggregatedEngine:
    """NVIDIA Dynamo's first generation: one queue for prefill, and short prompts prefilled by their decode worker.

    The decode worker is chosen, and its blocks are reserved, when a request arrives. It prefills the prompt itself if
    that is of at most 1000 uncached tokens, or 2 requests or more wait for prefill.

    Parameters
    ----------
    **fields
        Of `DisaggregatedEngine`: `prefill`, `decode` and `load_generator` are needed, others replace the usual ones.

    Returns
    -------
    DisaggregatedEngine

    Raises
    ------
    ValueError
        When a field has a wrong value.
    TypeError
        When a field is unknown, or a needed one is missing.
    """
    usual = {
        "router": OverlapRouter(),
        "reserve": "arrival",
        "first_token": "decode",
        "local_prefill": QueueAndLengthRule(max_local_prefill_length=1000, max_prefill_queue_size=2),
    }
    return _disaggregated("dynamo_gen1", usual, fields)


def dynamo_gen2(*, policy: str = "never", **fields: Any) -> DisaggregatedEngine:
    """NVIDIA Dynamo's second generation: a router picks the prefill worker, and then the one that decodes.

    Parameters
    ----------
    policy : "never", "isl_bounding", "prefill_load" or "isl_or_load"
        Which prompts the decode worker prefills itself: none, or those that `PromptLengthRule`, `PrefillLoadRule` or
        `LengthOrLoadRule` names, with its defaults.
    **fields
        Of `DisaggregatedEngine`: `prefill`, `decode` and `load_generator` are needed, others replace the usual ones.

    Returns
    -------
    DisaggregatedEngine

    Raises
    ------
    ValueError
        When the policy is unknown, a field has a wrong value, or `local_prefill` is given beside the policy.
    TypeError
        When a field is unknown, or a needed one is missing.
    """
    policy = check("policy", policy, (LocalPolicy,), None)
    if policy != "never" and "local_prefill" in fields:
        raise ValueError(f"local_prefill must be left out where policy is given, got {shown(fields['local_prefill'])}")
    usual = {
        "prefill_router": KVAwareRouter(),
        "router": KVAwareRouter(),
        "reserve": "prefill",
        "first_token": "decode",
        "local_prefill": LOCAL[policy],
    }
    return _disaggregated("dynamo_gen2", usual, fields, "policy")


def etcd(*, jetstream: bool = False, **fields: Any) -> ControlPlane:
    """A control plane on etcd as NVIDIA Dynamo has it: leases of 10 s, renewed every 5 s, watches that take 1 ms.

    Parameters
    ----------
    jetstream : bool
        Whether the queue for prefill is a NATS JetStream: 1 ms into it, 1 ms from it. Of fleets with such a queue.
    **fields
        Of `ControlPlane`; they replace the usual ones.

    Returns
    -------
    ControlPlane

    Raises
    ------
    ValueError
        When a field has a wrong value.
    TypeError
        When a field is unknown.
    """
    refuse_unknown("etcd", fields, ("jetstream", *ControlPlane.__struct_fields__))
    message = 1e-3 if jetstream else 0.0
    usual = {"watch": 1e-3, "ttl": 10.0, "renewal": 5.0, "queue_push": message, "queue_pop": message}
    return ControlPlane(**{**usual, **fields})


def _disaggregated(preset: str, usual: dict[str, Any], fields: dict[str, Any], *own: str) -> DisaggregatedEngine:
    """A disaggregated engine with usual values, those that are given instead; `own` are the preset's parameters."""
    refuse_unknown(preset, fields, (*own, *DisaggregatedEngine.__struct_fields__))
    if missing := [name for name in ("prefill", "decode", "load_generator") if name not in fields]:
        raise TypeError(f"{preset} needs {' and '.join(missing)}")
    return DisaggregatedEngine(**{**usual, **fields})
