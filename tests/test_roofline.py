"""The roofline's laws: signs, monotone in work and hardware, its limits, and what real servers measured."""

import msgspec
import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vecsim as sim
from vecsim.kernel.roofline import seconds
from vecsim.roofline import Numbers, RooflineStepTime

IDEAL = {"compute_efficiency": 1, "bandwidth_efficiency": 1, "link_efficiency": 1, "link_latency": 0,
         "step_overhead": 0, "layer_overhead": 0, "expert_overhead": 0}  # fmt: skip
ENDLESS = 1e30


def declared(model="llama-3.1-8b", gpu="h100", **fields):
    return RooflineStepTime(model=model, gpu=gpu, **fields)


def faster(gpu="h100", **fields):
    return msgspec.structs.replace(sim.GPU.named(gpu), **fields)


def prefill(step_time, tokens, context=0, requests=1):
    work = requests, tokens * requests, requests * tokens * (context + tokens / 2), requests * context, 0, 0
    return seconds(step_time.coefficients(), *work)


def decode(step_time, requests, context):
    return seconds(step_time.coefficients(), 0, 0, 0.0, 0, requests, requests * context)


pairs = st.sampled_from(
    [
        (m, g, tp)
        for m in sim.Model.names()
        for g in sim.GPU.names()
        for tp in (1, 2, 8)
        if tp in sim.Model.named(m).tps()
    ]
)
works = st.tuples(
    st.integers(0, 8), st.integers(1, 2048), st.integers(0, 10**5), st.integers(0, 256), st.integers(1, 10**5)
).filter(lambda work: work[0] + work[3] > 0)


def aggregates(work):
    prefills, chunk, context, decodes, decode_context = work
    tokens = prefills * chunk
    return [prefills, tokens, tokens * (context + chunk / 2), prefills * context, decodes, decodes * decode_context]


@given(pairs, works, st.integers(0, 5), st.sampled_from(["bfloat16", "fp8"]))
def test_times_are_positive_and_grow_with_every_aggregate(pair, work, grows, dtype):
    model, gpu, tp = pair
    numbers = declared(model, gpu, tp=tp, dtype=dtype).coefficients()
    assert min(numbers) >= 0
    less = aggregates(work)
    more = list(less)
    more[grows] += 1
    assert 0 < seconds(numbers, *less) <= seconds(numbers, *more)


@given(pairs, works, st.sampled_from(["bfloat16_flops", "bandwidth", "link_bandwidth"]))
def test_better_hardware_is_never_slower(pair, work, field):
    name, gpu, tp = pair
    better = faster(gpu, **{field: 2 * getattr(sim.GPU.named(gpu), field)})
    for dtype in ("bfloat16", "fp8"):
        slow, fast = (declared(name, kind, tp=tp, dtype=dtype).coefficients() for kind in (gpu, better))
        assert seconds(fast, *aggregates(work)) <= seconds(slow, *aggregates(work))


@pytest.mark.parametrize("name", sim.Model.names())
def test_with_endless_bandwidth_a_prompt_takes_its_flops(name):
    model = sim.Model.named(name)
    step_time = declared(model, faster(bandwidth=ENDLESS), **IDEAL)
    idle = model.active_parameters - model.share().embedding - model.share().head
    flops = 2 * idle * 1000 + 2 * model.vocab * model.hidden
    numbers = step_time.coefficients()._replace(attention_compute=0.0)
    assert seconds(numbers, 1, 1000, 5e5, 0, 0, 0) == pytest.approx(flops / 989.5e12, rel=1e-3)


@pytest.mark.parametrize("name", sim.Model.names())
def test_with_endless_flops_a_token_takes_the_weights_that_it_reads(name):
    model = sim.Model.named(name)
    step_time = declared(model, faster(bfloat16_flops=ENDLESS), **IDEAL)
    read = 2 * (model.active_parameters - model.share().embedding)
    read += 2 * model.share().embedding if model.tied else 0
    assert decode(step_time, 1, 1) == pytest.approx(read / 3.35e12, rel=0.01)
    context = 10_000
    grown = decode(step_time, 1, context) - decode(step_time, 1, 0)
    assert grown == pytest.approx(context * model.kv_bytes_per_token() / 3.35e12)


def test_attention_of_prompts_costs_four_flops_for_each_pair_head_and_width():
    step_time = declared(gpu=faster(bandwidth=ENDLESS), **IDEAL)
    more = prefill(step_time, 1000, context=7000) - prefill(step_time, 1000)
    assert more == pytest.approx(4 * 32 * 32 * 128 * 1000 * 7000 / 989.5e12)


def test_tokens_touch_as_many_experts_as_chance_has_it():
    step_time = declared("mixtral-8x7b", faster(bfloat16_flops=ENDLESS), **IDEAL)
    numbers = step_time.coefficients()._replace(per_token=0.0, per_request=0.0, matrix_moved=0.0, expert_moved=0.0)

    def experts(tokens):
        rest = numbers.matrix_weights + numbers.head_weights
        return (seconds(numbers, 0, 0, 0.0, 0, tokens, 0) - rest) / numbers.expert_weights

    assert experts(1) == pytest.approx(2 / 8)
    assert experts(2) == pytest.approx(1 - (6 / 8) ** 2)
    assert experts(1000) == pytest.approx(1)


@pytest.mark.parametrize("name", ["llama-3.1-70b", "mixtral-8x7b"])
def test_two_gpus_halve_arithmetic_and_bytes_and_add_collectives(name):
    fields = {"step_overhead": 0, "layer_overhead": 0, "expert_overhead": 0, "link_latency": 5e-6}
    one, two = (declared(name, tp=tp, **fields).coefficients() for tp in (1, 2))
    for field in ("matrix_compute", "matrix_weights", "expert_compute", "expert_weights", "head_weights", "kv_read",
                  "attention_compute", "decode_compute"):  # fmt: skip
        assert getattr(two, field) == pytest.approx(getattr(one, field) / 2, rel=0.01)
    layers, hidden = sim.Model.named(name).layers, sim.Model.named(name).hidden
    assert two.base == pytest.approx((2 * layers + 2) * 5e-6)
    # A ring of two sends each byte once; norms are not shared
    sent = (2 * layers + 1) * 2 * hidden / (0.7 * 450e9)
    assert two.per_token > sent
    assert two.per_token - sent < one.per_token
    assert declared(name, tp=2, **fields, link_efficiency=0.35).coefficients().per_token == pytest.approx(
        two.per_token + sent
    )


def test_latent_attention_is_not_shared_and_its_decodes_read_little():
    one, eight = (declared("deepseek-v3", tp=tp).coefficients() for tp in (1, 8))
    assert eight.kv_read == one.kv_read
    assert eight.decode_compute == pytest.approx(one.decode_compute / 8)
    assert one.kv_read * sim.GPU.named("h100").bandwidth * 0.85 == pytest.approx(61 * (512 + 64) * 2)
    assert one.decode_compute / one.attention_compute == pytest.approx((512 + 64 + 512) / (128 + 64 + 128))


def test_latent_attention_expands_again_what_came_before_a_chunk():
    step_time = declared("deepseek-v3", faster(bandwidth=ENDLESS), **IDEAL)
    numbers = step_time.coefficients()._replace(attention_compute=0.0)
    more = seconds(numbers, 1, 1000, 0.0, 7000, 0, 0) - seconds(numbers, 1, 1000, 0.0, 0, 0, 0)
    assert more == pytest.approx(2 * 61 * 128 * 512 * (128 + 128) * 7000 / 989.5e12)


def test_fp8_computes_in_bfloat16_where_the_gpu_has_none():
    half, eighth = (declared(gpu="a100-80", dtype=dtype).coefficients() for dtype in ("bfloat16", "fp8"))
    assert eighth.matrix_compute == half.matrix_compute
    assert eighth.matrix_weights < 0.51 * half.matrix_weights
    assert declared(dtype="fp8").coefficients().matrix_compute == declared().coefficients().matrix_compute / 2


@pytest.mark.parametrize(
    ("name", "tp", "base", "per_request"),
    [("llama-2-7b", 1, 5.996, 0.128), ("llama-2-70b", 4, 16.89, 0.0474), ("codellama-34b", 2, 13.56, 0.0405)],
)
def test_decodes_take_what_real_servers_took(name, tp, base, per_request):
    """Lines through the measured time between tokens [ms] over requests; vLLM 0.15.1, H100, 700 tokens each."""
    step_time = declared(name, tp=tp)
    for requests in (1, 20, 60, 120):
        assert 1e3 * decode(step_time, requests, 700) == pytest.approx(base + per_request * requests, rel=0.12)


def test_a_single_decode_of_an_8b_model_takes_some_seven_milliseconds():
    assert decode(declared(), 1, 500) == pytest.approx(7e-3, rel=0.1)
    assert decode(declared(gpu="h200"), 1, 500) < decode(declared(), 1, 500) < decode(declared(gpu="a100-80"), 1, 500)


def test_the_rule_compiles_and_gives_the_same():
    compiled = numba.njit(seconds)
    for name in ("llama-3.1-8b", "mixtral-8x7b"):
        numbers = declared(name).coefficients()
        assert len(numbers) == 16
        assert all(type(number) is float for number in numbers)
        work = 2, 300, 4e4, 64, 5, 700
        assert compiled(numbers, *work) == pytest.approx(seconds(numbers, *work), rel=1e-14)
        assert compiled(tuple(numbers), *work) == compiled(Numbers(*numbers), *work)


def test_a_declaration_is_written_and_read_back_and_told_by_its_names():
    step_time = declared(tp=2, dtype="fp8")
    assert RooflineStepTime.from_toml(step_time.to_toml()) == step_time
    assert step_time.label() == "RooflineStepTime(model=llama-3.1-8b, gpu=h100, tp=2, dtype='fp8')"
    assert declared(sim.Model.named("llama-3.1-8b"), sim.GPU.named("h100")) == declared()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "llama"}, "no Model is named 'llama'"),
        ({"gpu": 3}, "gpu must be one of GPU, got 3"),
        ({"tp": 3}, "tp must be one of 1, 2, 4, 8, 16, 32 for llama-3.1-8b, got 3"),
        ({"dtype": "int4"}, "dtype must be one of bfloat16, float16, fp8, got 'int4'"),
        ({"compute_efficiency": 0}, "compute_efficiency must be > 0, got 0"),
        ({"bandwidth_efficiency": 1.1}, "bandwidth_efficiency must be > 0 and <= 1, got 1.1"),
        ({"layer_overhead": -1e-6}, "layer_overhead must be >= 0, got -1e-06"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        declared(**fields)


def test_a_run_takes_what_the_rule_says_and_models_and_gpus_can_be_axes():
    step_time = RooflineStepTime(model="llama-3.1-8b", gpu="h100")
    load = sim.BatchLoadGenerator(initial_batch=3, prompt_tokens=700, output_tokens=4)
    engine = sim.Engine(
        max_batch_size=4,
        load_generator=load,
        batcher=sim.TokenBudgetBatcher(max_num_batched_tokens=2048),
        step_time=step_time,
        kv_cache=sim.KVCache.of("llama-3.1-8b", "h100"),
    )
    numbers = step_time.coefficients()
    prompts = [seconds(numbers, 3, 2048, 700 * 350.0 * 2 + 648 * 324.0, 0, 0, 0)]
    prompts.append(seconds(numbers, 1, 52, 52 * 674.0, 648, 2, 2 * 701))
    decodes = [seconds(numbers, 0, 0, 0.0, 0, 3, 2 * (702 + i) + 701 + i) for i in range(2)]
    last = seconds(numbers, 0, 0, 0.0, 0, 1, 703)
    np.testing.assert_allclose(engine.run().steps.duration, [*prompts, *decodes, last], rtol=1e-12)
    ds = sim.sweep(engine, gpu=["a100-80", "h100"], model=["llama-2-7b", "llama-3.1-8b"], progress=False)
    assert (ds.e2e.sel(stat="mean").diff("gpu") < 0).all()
    assert ds.gpu.values.tolist() == ["a100-80", "h100"]
