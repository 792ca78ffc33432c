"""Models and GPUs: what they come with, what follows from it, and what is refused."""

import json
import subprocess
import sys

import msgspec
import pytest

import vecsim as sim

# Parameters and active ones [1e9] as their authors publish them, and how far rounding may have moved the latter
PUBLISHED = {
    "llama-2-7b": (6.74, 6.74, 0.01),
    "llama-2-70b": (68.98, 68.98, 0.01),
    "llama-3.1-8b": (8.03, 8.03, 0.01),
    "llama-3.1-70b": (70.6, 70.6, 0.01),
    "codellama-34b": (33.7, 33.7, 0.01),
    "mixtral-8x7b": (46.7, 12.9, 0.01),
    "qwen3-8b": (8.19, 8.19, 0.01),
    "qwen3-14b": (14.8, 14.8, 0.01),
    "qwen3-32b": (32.8, 32.8, 0.01),
    "qwen3-30b-a3b": (30.5, 3.3, 0.02),
    "deepseek-v3": (671, 37, 0.02),
}

# Blocks that servers of vLLM 0.15.1 on H100 reported, at memory_fraction 0.9 and steps of 2048 tokens
MEASURED_BLOCKS = {
    ("llama-2-7b", 1): 7462,
    ("llama-2-70b", 4): 31356,
    ("mixtral-8x7b", 2): 27510,
    ("codellama-34b", 2): 26602,
}

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
QWEN3_MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "sliding_window": None,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def config(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_every_model_and_gpu_that_comes_with_the_package_is_published_or_known():
    assert set(sim.Model.names()) == set(PUBLISHED)
    assert sim.GPU.names() == ("a100-80", "b200", "h100", "h200", "l40s", "mi300x", "rtx-4090")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name):
    model, (total, active, tolerance) = sim.Model.named(name), PUBLISHED[name]
    assert model.name == name
    assert model.parameters == pytest.approx(total * 1e9, rel=0.01)
    assert model.active_parameters == pytest.approx(active * 1e9, rel=tolerance)


@pytest.mark.parametrize("name", sim.GPU.names())
def test_gpus_are_of_this_age(name):
    gpu = sim.GPU.named(name)
    assert gpu.name == name
    assert 100e12 < gpu.bfloat16_flops < 3e15  # dense, not sparse
    assert gpu.fp8_flops is None or gpu.fp8_flops == pytest.approx(2 * gpu.bfloat16_flops, rel=0.02)
    assert 20e9 < gpu.memory < 210e9
    assert 100 < gpu.bfloat16_flops / gpu.bandwidth < 500  # FLOPs for each byte
    assert (gpu.link == "pcie") == (gpu.link_bandwidth < 100e9)


@pytest.mark.parametrize("kind", [sim.Model, sim.GPU])
def test_what_comes_with_the_package_is_written_and_read_back(kind):
    for name in kind.names():
        assert kind.from_toml(kind.named(name).to_toml()) == kind.named(name)
        assert kind.named(name.upper()) == kind.named(name)


def test_importing_the_package_reads_no_data():
    code = "import sys, vecsim; sys.exit('tomllib' in sys.modules or 'vecsim.capacity' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "size"),
    [("llama-3.1-8b", 131_072), ("llama-3.1-70b", 327_680), ("qwen3-8b", 147_456), ("deepseek-v3", 61 * 576 * 2)],
)
def test_kv_bytes_of_a_token(name, size):
    model = sim.Model.named(name)
    assert model.kv_bytes_per_token() == size
    assert model.kv_bytes_per_token("fp8") == size // 2
    assert model.kv_bytes_per_token(tp=4) == (size if model.is_mla else size // 4)


@pytest.mark.parametrize("name", sim.Model.names())
def test_gpus_share_the_matrices_and_all_hold_what_is_small(name):
    model = sim.Model.named(name)
    whole, half = model.share(), model.share(2)
    assert half.experts == whole.experts // 2
    assert half.embedding == whole.embedding // 2
    assert half.small == whole.small
    if not model.is_mla:
        assert half.matrices == whole.matrices // 2
    assert whole.matrices / 2 <= half.matrices < 0.6 * whole.matrices


def test_heads_of_keys_and_values_are_copied_where_gpus_are_more():
    model = sim.Model.named("llama-3.1-8b")
    assert model.kv_bytes_per_token(tp=8) == model.kv_bytes_per_token(tp=16) == model.kv_bytes_per_token() // 8
    assert model.share(16).matrices > model.share(8).matrices / 2


def test_fp8_halves_the_matrices_and_leaves_the_rest():
    model = sim.Model.named("llama-3.1-8b")
    share = model.share()
    assert model.weight_bytes() == 2 * model.parameters
    assert model.weight_bytes() - model.weight_bytes("fp8") == share.matrices


def test_a_mesh_gives_a_pair_one_link():
    assert sim.GPU.named("mi300x").link_bandwidth_among(2) == 64e9
    assert sim.GPU.named("mi300x").link_bandwidth_among(8) == sim.GPU.named("mi300x").link_bandwidth
    assert sim.GPU.named("h100").link_bandwidth_among(2) == 450e9


@pytest.mark.parametrize(
    ("content", "name"),
    [(LLAMA, "llama-3.1-8b"), (QWEN3_MOE, "qwen3-30b-a3b"), (DEEPSEEK_V3, "deepseek-v3"), (MIXTRAL, "mixtral-8x7b")],
)
def test_a_config_gives_the_model_of_that_name(tmp_path, content, name):
    assert sim.Model.from_config(config(tmp_path, content), name) == sim.Model.named(name)


def test_a_config_s_defaults_are_those_of_its_kind(tmp_path):
    content = {**LLAMA, "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}
    del content["num_key_value_heads"]
    model = sim.Model.from_config(config(tmp_path, content))
    assert model.name == tmp_path.name
    assert model.kv_heads == 32
    assert model.qkv_bias
    assert model.max_positions == 131072
    assert sim.Model.from_config(config(tmp_path, {**content, "num_key_value_heads": None})) == model
    content |= {"model_type": "mistral", "use_sliding_window": True, "tie_word_embeddings": True}
    model = sim.Model.from_config(config(tmp_path, content))
    assert model.max_positions == 4096
    assert model.share().head == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json can't be read as JSON"),
        ("[]", "config.json must hold an object"),
        ({}, "config.json: model_type is missing"),
        ({**LLAMA, "model_type": ["llama"]}, "config.json: model_type must be one of llama, mistral, qwen2"),
        ({**LLAMA, "model_type": "gpt2"}, "config.json: model_type must be one of llama, mistral, qwen2"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "config.json: hidden_size is missing"),
        ({**LLAMA, "vocab_size": "many"}, "config.json: vocab_size must be a whole number >= 1, got 'many'"),
        ({**LLAMA, "hidden_size": 4100}, "config.json: head_dim is missing"),
        ({**LLAMA, "num_key_value_heads": 5}, r"config.json: kv_heads must divide heads \(32\), got 5"),
        ({**LLAMA, "num_hidden_layers": 0}, "config.json: num_hidden_layers must be a whole number >= 1, got 0"),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, "config.json: decoder_sparse_step must be 1 to be modelled, got 2"),
        ({k: v for k, v in DEEPSEEK_V3.items() if k != "kv_lora_rank"}, "config.json: kv_lora_rank is missing"),
    ],
)
def test_a_config_that_says_too_little_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        sim.Model.from_config(config(tmp_path, content))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sim.Model.named("llama-3-8b"), "no Model is named 'llama-3-8b'; did you mean llama-3.1-8b"),
        (lambda: sim.GPU.named("h10"), "no GPU is named 'h10'; did you mean h100"),
        (lambda: sim.GPU.named("xyz"), "no GPU is named 'xyz'; there are a100-80, b200"),
        (lambda: sim.Model.from_config("nowhere/config.json"), "nowhere/config.json can't be read"),
        (lambda: sim.Model.named("qwen3-14b").share(3), "tp must be one of 1, 2, 4, 8 for qwen3-14b, got 3"),
        (
            lambda: sim.Model(name="m", layers=1, hidden=8, heads=3, kv_heads=2, head_dim=4, intermediate=8, vocab=9,
                              max_positions=9),
            r"kv_heads must divide heads \(3\), got 2",
        ),
        (
            lambda: sim.Model(name="m", layers=1, hidden=8, heads=2, intermediate=8, vocab=9, max_positions=9),
            "kv_heads must be >= 1 in m, got 0",
        ),
        (lambda: sim.KVCache.of("llama-3.1-8b", "h100", memory_fraction=1.5), "memory_fraction must be > 0 and <= 1"),
        (lambda: sim.KVCache.of("llama-3.1-8b", "h100", dtype="int3"), "dtype must be one of bfloat16, float16, fp8"),
        (lambda: sim.KVCache.of("llama-3.1-8b", "h100", kv_dtype="fp16"), "kv_dtype must be one of .* got .fp16"),
        (lambda: sim.Model.named("llama-3.1-8b").weight_bytes("int4"), "dtype must be one of .* got 'int4'"),
        (lambda: sim.KVCache.of("llama-3.1-8b", "h100", block_size=0), "block_size must be >= 1, got 0"),
        (lambda: sim.KVCache.of("llama-3.1-8b", "h100", memory_fraction="0.9"), "memory_fraction must be a number"),
        (lambda: sim.KVCache.of("llama-3.1-8b", "h100", max_num_seqs="a"), "max_num_seqs must be a whole number, got"),
        (lambda: sim.KVCache.of(3, "h100"), "model must be one of Model, got 3"),
        (lambda: sim.KVCache.of("llama-3.1-8b", None), "gpu must be one of GPU, got None"),
        (
            lambda: sim.KVCache.of("llama-3.1-70b", "h100"),
            "llama-3.1-70b in bfloat16 doesn't fit 1 x h100 at memory_fraction 0.9: 65.4 GB a GPU are lacking; "
            "it fits from tp=2 on",
        ),
        (lambda: sim.KVCache.of("llama-3.1-8b", "h100", memory_fraction=0.001), "nor does it with a larger tp"),
    ],
)  # fmt: skip
def test_wrong_names_and_models_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("name", "tp"), MEASURED_BLOCKS)
def test_blocks_are_those_that_real_servers_reported(name, tp):
    cache = sim.KVCache.of(name, "h100", tp=tp, prefix_caching=True)
    assert cache.blocks == pytest.approx(MEASURED_BLOCKS[name, tp], rel=0.005)
    assert cache.prefix_caching


def test_blocks_grow_with_memory_and_shrink_with_their_size():
    def blocks(**fields):
        return sim.KVCache.of("llama-3.1-8b", "h100", **fields).blocks

    assert blocks(memory_fraction=0.8) < blocks() < blocks(dtype="fp8") < blocks(tp=2)
    assert blocks(block_size=32) == blocks() // 2
    assert blocks(kv_dtype="fp8") in (2 * blocks(), 2 * blocks() + 1)
    assert blocks(max_num_batched_tokens=16384) < blocks()


def test_a_fitted_engine_has_the_memory_that_its_own_largest_step_leaves():
    load = sim.PoissonLoadGenerator(request_rate=1, prompt_tokens=10, output_tokens=2)
    for own in ({}, {"max_num_batched_tokens": 2048, "max_batch_size": 128, "block_size": 32}):
        engine = sim.presets.fitted(model="llama-3.1-8b", load_generator=load, **own)
        assert engine.kv_cache == sim.KVCache.of(
            "llama-3.1-8b",
            "h100",
            block_size=engine.kv_cache.block_size,
            prefix_caching=True,
            max_num_batched_tokens=engine.batcher.max_num_batched_tokens,
            max_num_seqs=engine.max_batch_size,
        )
    assert sim.presets.fitted(model="llama-3.1-8b", load_generator=load, kv_blocks=7).kv_cache.blocks == 7


def test_a_fitted_engine_has_the_limits_that_vllm_has_on_its_gpu():
    load = sim.PoissonLoadGenerator(request_rate=1, prompt_tokens=10, output_tokens=2)
    fit = sim.Fit.named("vllm-0.15-h100")
    for gpu, limits in {
        "h200": (8192, 1024),
        "mi300x": (8192, 1024),
        "a100-80": (2048, 256),
        "l40s": (2048, 256),
    }.items():
        engine = sim.presets.fitted(msgspec.structs.replace(fit, gpu=gpu), model="llama-3.1-8b", load_generator=load)
        assert (engine.batcher.max_num_batched_tokens, engine.max_batch_size) == limits
    assert sim.presets.fitted(model="llama-3.1-8b", load_generator=load, large_gpu=False).max_batch_size == 256
