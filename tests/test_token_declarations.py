"""The token model's declarations: what is refused, functions of one's own, presets, loads, tables."""

import msgspec
import numba
import numpy as np
import pytest
from pictures import pixels

import vecsim as sim

LOAD = sim.PoissonLoadGenerator(request_rate=2, requests=80, prompt_tokens=100, output_tokens=20)
STEP = sim.LinearStepTime(base=5e-3, per_request=1e-4)


def engine(**fields):
    return sim.Engine(**{"load_generator": LOAD, "step_time": STEP, "batcher": sim.TokenBudgetBatcher(), **fields})


@numba.njit
def never(batch):
    return 0.0


def trace(**fields):
    return sim.TraceLoadGenerator(
        arrived_at=[0, 1, 2], prompt_tokens=[100, 200, 300], output_tokens=[10, 20, 30], **fields
    )


def talk(requests=1, **fields):
    return sim.PoissonLoadGenerator(
        output_tokens=2, requests=requests, sessions=sim.Sessions(turns=4), request_rate=1.0, **fields
    )


def preset(**fields):
    return sim.presets.vllm(load_generator=LOAD, step_time=STEP, **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: engine(max_batch_size=4096), "max_num_batched_tokens must be >= max_batch_size (4096), got 2048"),
        (
            lambda: engine(step_time=sim.TickStepTime()),
            "prompt_tokens must be left out where step_time is TickStepTime",
        ),
        (
            lambda: engine(load_generator=sim.PoissonLoadGenerator()),
            "prompt_tokens must be given where step_time isn't TickStepTime",
        ),
        (
            lambda: sim.Engine(load_generator=sim.BatchLoadGenerator(), batcher=sim.SGLangBatcher()),
            "batcher SGLangBatcher needs a step_time in seconds",
        ),
        (
            lambda: sim.Engine(load_generator=sim.BatchLoadGenerator(), kv_cache=sim.KVCache(blocks=3)),
            "kv_cache means nothing in the tick model",
        ),
        (lambda: sim.TokenBudgetBatcher(order="fifo"), "order must be one of fcfs, shortest_prompt, priority"),
        (lambda: sim.KVCache(prefix_caching=1), "prefix_caching must be true or false, got 1"),
        (lambda: sim.LinearStepTime(per_prefill_token=1), "every step must take time"),
        (
            lambda: engine(batcher=sim.IFBatcher(reserve_tokens=200), kv_cache=sim.KVCache(blocks=10)),
            "reserve_tokens must be <= the KV memory of 160 tokens, got 200",
        ),
        (
            lambda: sim.TraceLoadGenerator(prompt_tokens=[1, 0], output_tokens=[1, 1]),
            "prompt_tokens must be whole numbers >= 1 and <= 1073741824, got 0 at place 1",
        ),
        (
            lambda: sim.TraceLoadGenerator(prompt_tokens=[1, 2], output_tokens=[1]),
            "output_tokens must have as many values as prompt_tokens (2), got 1",
        ),
        (
            lambda: sim.TraceLoadGenerator(arrived_at=[2, 1], prompt_tokens=[1, 2], output_tokens=[1, 1]),
            "arrived_at must ascend",
        ),
        (
            lambda: sim.TraceLoadGenerator(prompt_tokens=[5], output_tokens=[1], block_ids=[[1, 2]], id_block_tokens=5),
            "block_ids must be at most 1 for the 5 prompt tokens of request 0, got 2",
        ),
        (
            lambda: engine(
                load_generator=sim.TraceLoadGenerator(
                    prompt_tokens=[40], output_tokens=[1], block_ids=[[1, 2]], id_block_tokens=20
                ),
                kv_cache=sim.KVCache(prefix_caching=True),
            ),
            "block_size must divide id_block_tokens (20) of the trace, got 16",
        ),
        (
            lambda: sim.PiecewiseLoadGenerator(request_rates=[1, 2], durations=[1], prompt_tokens=1, output_tokens=1),
            "request_rates and durations must be one or more, and as many, got 2 and 1",
        ),
        (lambda: sim.PiecewiseLoadGenerator(request_rates=[-1], durations=[1]), "request_rates must be numbers >= 0"),
        (
            lambda: sim.PoissonLoadGenerator(prompt_tokens=1, output_tokens=sim.Empirical(values=[1]), joint=True),
            "joint: prompt_tokens and output_tokens must be Empirical, with as many values",
        ),
        (
            lambda: engine(load_generator=sim.PoissonLoadGenerator(prompt_tokens=1, output_tokens=1)).run(),
            "time_limit must be given",
        ),
        (
            lambda: sim.PoissonLoadGenerator(prompt_tokens=100, target_output_len_std=1),
            "output_tokens must be given where prompt_tokens is",
        ),
        (
            lambda: sim.PiecewiseLoadGenerator.bursts(base_rate=1, burst_rate=2, burst_duration="1", period=3),
            "burst_duration must be a number, got '1'",
        ),
        (
            lambda: sim.PiecewiseLoadGenerator.bursts(base_rate=1, burst_rate=2, burst_duration=3, period=3),
            "burst_duration must be > 0 and < period (3), got 3",
        ),
        (lambda: sim.PiecewiseLoadGenerator.diurnal(mean_rate=None), "mean_rate must be a number, got None"),
        (lambda: sim.PiecewiseLoadGenerator.diurnal(mean_rate=1, stages=2.5), "stages must be a whole number, got 2.5"),
        (
            lambda: sim.TraceLoadGenerator(prompt_tokens=[1], output_tokens=[1], id_block_tokens=16),
            "id_block_tokens must be left out where there are no block_ids, got 16",
        ),
        (
            lambda: sim.sweep(engine(), 10, max_num_batched_tokens=[8, 2], progress=False),
            "max_num_batched_tokens must be >= max_batch_size (4), got 2",
        ),
        (
            lambda: sim.sweep(engine(), 10, step_time=[STEP, sim.TickStepTime()], progress=False),
            "prompt_tokens must be left out where step_time is TickStepTime",
        ),
        (
            lambda: sim.TableTerm(axes=("tokens",), grid=[1, 1], values=[1, 2]),
            "grid must be two or more ascending numbers",
        ),
        (
            lambda: sim.TableTerm(axes=("token",), grid=[1, 2], values=[1, 2]),
            "axes must be one or two different ones of",
        ),
        (lambda: sim.TableStepTime(file="nowhere.csv"), "file must name a file, got 'nowhere.csv'"),
        (lambda: sim.TableStepTime(terms=(3,)), "terms must be one TableTerm or more"),
        (lambda: trace(sessions=sim.Sessions()), "sessions must be left out of a trace"),
        (lambda: trace(stream_offset=1), "stream_offset must be left out of a trace, got 1"),
        (lambda: trace(class_names=3), "class_names must be a sequence, got 3"),
        (
            lambda: trace(block_ids=[1, 2], block_counts=[1, 2, 3], id_block_tokens=16),
            "block_counts must add up to the number of block_ids (2), got 6",
        ),
        (
            lambda: trace(block_ids=[[], [], []], id_block_tokens=16, prefix=sim.SharedPrefix(tokens=160)),
            "prefix must be left out of a trace with block_ids",
        ),
        (
            lambda: engine(step_time=sim.PolynomialStepTime()),
            "kv_cache must have a number of blocks: PolynomialStepTime goes by the share in use",
        ),
        (
            lambda: engine(step_time=never).run(1),
            "is more than the clock's last digit, got 0 at",
        ),
        (
            lambda: engine(load_generator=talk(prompt_tokens=10**9), batcher=sim.TokenBudgetBatcher()).run(1e9),
            "prompts of its conversations at most 1,073,741,824 tokens",
        ),
        (
            lambda: sim.sweep(
                engine(
                    load_generator=talk(prompt_tokens=10**5, requests=10**5),
                    kv_cache=sim.KVCache(block_size=1, prefix_caching=True),
                ),
                10**6,
                progress=False,
            ),
            "most of it is for",
        ),
        (lambda: preset(version="1"), "version must be one of 0.6, 0.8, 0.10, 0.12, 0.14, 0.15, 0.16, got '1'"),
        (lambda: preset(version=0.15), 'version must be a text, with quotes as in version="0.15", got 0.15'),
        (lambda: preset(large_gpu="yes"), "large_gpu must be true or false, got 'yes'"),
        (lambda: preset(kv_tokens=15), "kv_tokens must be at least a block of 16 tokens, got 15"),
        (lambda: preset(kv_tokens=100, kv_blocks=3), "kv_tokens must be left out where kv_blocks is given, got 100"),
        (lambda: preset(kv_blocks=0), "kv_blocks must be >= 1, got 0"),
        (lambda: preset(kv_cache=sim.KVCache(), block_size=8), "kv_cache must be left out where block_size is given"),
        (lambda: preset(kv_cache=sim.KVCache(), kv_tokens=64), "kv_cache must be left out where kv_tokens is given"),
        (lambda: preset(batcher=sim.IFBatcher(), order="fcfs"), "batcher must be left out where order is given"),
        (lambda: sim.presets.tensorrt_llm(policy="no_evict"), "did you mean guaranteed_no_evict?"),
        (
            lambda: sim.sweep(engine(), requests=5, keep="queue", progress=False),
            'keep must be "requests" or left out where there is no time_limit, got "queue"',
        ),
    ],
)
def test_what_cant_be_is_refused_with_its_name_and_what_is_allowed(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        make()
    assert message in str(error.value)


@numba.njit
def as_token_budget(batch):
    return 2048 - batch.decoding - batch.prefill_tokens


@numba.njit
def as_linear(batch):
    return 5e-3 + 1e-4 * (batch.prefill_requests + batch.decode_requests)


def test_functions_of_ones_own_do_as_their_built_in_twins():
    memory = sim.KVCache(blocks=60)
    load = sim.PoissonLoadGenerator(request_rate=300, requests=200, prompt_tokens=100, output_tokens=20)
    built_in = engine(load_generator=load, kv_cache=memory, max_batch_size=16)
    own = engine(load_generator=load, kv_cache=memory, max_batch_size=16, batcher=as_token_budget, step_time=as_linear)
    ours, theirs = own.run(), built_in.run()
    assert int(theirs.metrics.preemptions) > 0
    np.testing.assert_array_equal(ours.requests.completed_at, theirs.requests.completed_at)
    np.testing.assert_array_equal(ours.steps.duration, theirs.steps.duration)
    ds = sim.sweep(
        built_in, step_time=[STEP, as_linear], batcher=[as_token_budget, sim.TokenBudgetBatcher()], progress=False
    )
    assert len(np.unique(ds.e2e.sel(stat="mean"))) == 1


def test_a_step_that_takes_no_time_is_refused():
    with pytest.raises(ValueError, match="rule never must return a number of seconds > 0"):
        engine(step_time=never).run()


@pytest.mark.parametrize(
    ("preset", "fields", "batcher"),
    [
        (sim.presets.vllm, {"version": "0.6"}, sim.PrefillFirstBatcher(max_num_batched_tokens=8192)),
        (
            sim.presets.vllm,
            {"version": "0.15", "kv_blocks": 500},
            sim.TokenBudgetBatcher(max_num_batched_tokens=8192, async_scheduling=True),
        ),
        (sim.presets.sglang, {}, sim.SGLangBatcher()),
        (sim.presets.tensorrt_llm, {"policy": "max_utilization"}, sim.MaxUtilizationBatcher()),
        (sim.presets.sarathi, {"chunk_tokens": 256}, sim.ChunkedPrefillBatcher(chunk_tokens=256)),
        (sim.presets.orca, {"max_model_len": 500}, sim.IFBatcher()),
        (sim.presets.fastertransformer, {}, sim.StaticBatcher()),
    ],
)
def test_a_preset_is_a_declaration_with_values(preset, fields, batcher):
    made = preset(load_generator=LOAD, step_time=STEP, **fields)
    assert made.batcher == batcher
    assert sim.Engine.from_toml(made.to_toml()) == made
    assert int(made.run().metrics.completed) == 80


@pytest.mark.parametrize(("name", "block"), [("vllm", 16), ("sglang", 1), ("tensorrt_llm", 32), ("orca", 16)])
def test_fields_of_kv_memory_go_to_the_presets_cache(name, block):
    make = getattr(sim.presets, name)
    cache = make(load_generator=LOAD, step_time=STEP, kv_tokens=1000, watermark=0.25).kv_cache
    usual = make(load_generator=LOAD, step_time=STEP, kv_blocks=1000 // block).kv_cache
    assert cache == msgspec.structs.replace(usual, watermark=0.25)
    small = make(load_generator=LOAD, step_time=STEP, kv_tokens=1000, block_size=8, prefix_caching=False).kv_cache
    assert (small.blocks, small.block_size, small.prefix_caching) == (125, 8, False)


def test_a_patch_of_a_release_is_that_release():
    assert preset(version="0.15.1") == preset(version="0.15")
    assert preset(version="0.10.2") == preset(version="0.10")


def test_what_a_preset_lacks_or_doesnt_know_is_named():
    with pytest.raises(TypeError, match="vllm needs step_time"):
        sim.presets.vllm(load_generator=LOAD)
    with pytest.raises(TypeError, match="sglang needs load_generator and step_time"):
        sim.presets.sglang()
    with pytest.raises(
        TypeError, match=r"vllm has no field 'block'; did you mean .*block.*\(fields: version, large_gpu"
    ):
        preset(block=3)


def test_a_table_interpolates_and_extrapolates_with_one_warning(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("decode_requests,mean_decode_context,seconds\n1,0,1\n1,100,2\n3,0,3\n3,100,6\n")
    table = sim.TableStepTime(file=str(path))
    load = sim.TraceLoadGenerator(prompt_tokens=[49, 49], output_tokens=[3, 3])
    prefills = sim.TableTerm(axes=("prefill_tokens",), grid=[0, 100], values=[0.5, 0.5])
    step_time = sim.TableStepTime(terms=(*table.terms, prefills))
    run = engine(load_generator=load, step_time=step_time).run()
    # Two decodes with a context of 50, then 51, each: halfway between 1 and 3 requests.
    np.testing.assert_allclose(run.steps.duration, [0.5, (1.5 + 4.5) / 2, (1.51 + 4.53) / 2])
    assert sim.Engine.from_toml(run.engine.to_toml()) == run.engine
    with pytest.warns(UserWarning, match="steps were outside the tables"):
        engine(load_generator=sim.TraceLoadGenerator(prompt_tokens=[149], output_tokens=[2]), step_time=step_time).run()


@pytest.mark.parametrize("text", ["x," * 100_000 + "\n", '{"tokens": [' + "1," * 100_000 + "1]}\n"])
def test_a_file_that_is_no_table_is_shown_in_part(tmp_path, text):
    path = tmp_path / "steps.csv"
    for content in (text, "tokens,seconds\n" + text):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"steps\.csv") as error:
            sim.TableStepTime(file=str(path))
        assert len(str(error.value)) < 300
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"steps\.csv can't be read as csv \('utf-8' codec"):
        sim.TableStepTime(file=str(path))


def test_rates_in_stages_bring_the_requests_of_each_stage():
    load = sim.PiecewiseLoadGenerator(
        request_rates=[10, 0, 40], durations=[50, 25, 25], prompt_tokens=10, output_tokens=1, seed=3
    )
    arrived_at = engine(load_generator=load, max_batch_size=64).run(100).requests.arrived_at.values
    counts, _ = np.histogram(arrived_at, [0, 50, 75, 100])
    assert counts[1] == 0
    assert abs(counts[0] - 500) < 4 * np.sqrt(500)
    assert abs(counts[2] - 1000) < 4 * np.sqrt(1000)
    day = sim.PiecewiseLoadGenerator.diurnal(mean_rate=2, period=100, stages=20, prompt_tokens=10, output_tokens=1)
    arrived_at = engine(load_generator=day, max_batch_size=64).run(1000).requests.arrived_at.values
    assert abs(arrived_at.size - 2000) < 4 * np.sqrt(2000)
    night = ((arrived_at % 100) < 25) | ((arrived_at % 100) > 75)
    assert night.mean() < 0.4


def test_a_trace_is_rescaled_in_rate_and_length():
    trace = sim.TraceLoadGenerator(arrived_at=[0, 10, 30], prompt_tokens=[10, 21, 30], output_tokens=[4, 5, 6])
    faster = sim.TraceLoadGenerator(
        arrived_at=[0, 10, 30],
        prompt_tokens=[10, 21, 30],
        output_tokens=[4, 5, 6],
        rate_scale=2,
        prompt_scale=0.5,
        output_scale=3,
    )
    scaled = [engine(load_generator=load).run().requests for load in (trace, faster)]
    assert scaled[1].arrived_at.values.tolist() == [0, 5, 15]
    assert scaled[1].prompt_tokens.values.tolist() == [5, 11, 15]
    assert scaled[1].output_tokens.values.tolist() == [12, 15, 18]
    assert scaled[0].prompt_tokens.values.tolist() == [10, 21, 30]
    drawn = engine(load_generator=sim.PoissonLoadGenerator(requests=300, **trace.lengths())).run().requests
    pairs = set(zip(drawn.prompt_tokens.values.tolist(), drawn.output_tokens.values.tolist(), strict=True))
    assert pairs == {(10, 4), (21, 5), (30, 6)}


def test_classes_have_their_own_limits():
    classes = [
        sim.RequestClass(name="chat", share=3, slo=sim.SLO(ttft=100)),
        sim.RequestClass(name="batch", share=1, slo=sim.SLO(e2e=1e-6)),
    ]
    load = sim.PoissonLoadGenerator(request_rate=5, requests=2000, prompt_tokens=100, output_tokens=20, classes=classes)
    metrics = engine(load_generator=load).run().metrics
    assert metrics.class_slo_attainment.sel({"class": "chat"}) == 1
    assert metrics.class_slo_attainment.sel({"class": "batch"}) == 0
    share = float(metrics.class_completed.sel({"class": "chat"})) / 2000
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2000)
    assert float(metrics.slo_attainment) == pytest.approx(share)


def test_popular_prefixes_are_found_more_often():
    rates = []
    for exponent in (0.0, 2.0):
        load = sim.PoissonLoadGenerator(
            request_rate=5, requests=500, prompt_tokens=20, output_tokens=5,
            prefix=sim.SharedPrefix(tokens=160, groups=50, exponent=exponent),
        )  # fmt: skip
        cache = sim.KVCache(blocks=200, prefix_caching=True)
        rates.append(float(engine(load_generator=load, kv_cache=cache).run().metrics.prefix_hit_rate))
    assert 0.1 < rates[0] < rates[1] < 160 / 180


def test_a_bigger_cache_never_finds_less_when_prompts_come_one_by_one():
    rng = np.random.default_rng(0)
    groups = rng.zipf(1.3, 400) % 40
    load = sim.TraceLoadGenerator(
        prompt_tokens=[64] * 400,
        output_tokens=[1] * 400,
        block_ids=[[4 * int(group) + i for i in range(4)] for group in groups],
        id_block_tokens=16,
    )
    ds = sim.sweep(
        engine(load_generator=load, max_batch_size=1),
        kv_cache=[sim.KVCache(blocks=blocks, prefix_caching=True) for blocks in (5, 8, 16, 32, 64, 128, 256)],
        progress=False,
    )
    rates = ds.prefix_hit_rate.values
    assert (np.diff(rates) >= 0).all()
    assert rates[0] < 0.3
    assert rates[-1] > 0.6


def test_a_run_is_drawn():
    cache = sim.KVCache(blocks=60)
    load = sim.PoissonLoadGenerator(request_rate=20, requests=300, prompt_tokens=100, output_tokens=40)
    run = engine(load_generator=load, kv_cache=cache, max_batch_size=16).run()
    figure = run.plot()
    assert pixels(figure).std() > 0.05
    assert [axis.get_ylabel().split("\n")[0] for axis in figure.axes] == [
        "batch", "computed", "KV memory", "queue", "latency",
    ]  # fmt: skip
    assert "preemptions" in figure.axes[2].texts[0].get_text()
    short = sim.BatchLoadGenerator(initial_batch=1, prompt_tokens=1, output_tokens=1)
    assert pixels(engine(load_generator=short).run().plot()).std() > 0.05


def test_m_d_1_waits_as_long_as_the_theory_says():
    rate, service = 0.8, 1.0
    load = sim.PoissonLoadGenerator(request_rate=rate, requests=20_000, prompt_tokens=1, output_tokens=1)
    ds = sim.sweep(
        engine(load_generator=load, max_batch_size=1, step_time=sim.LinearStepTime(base=service)),
        seed=range(16),
        progress=False,
    )
    waits = ds.queue_time.sel(stat="mean").values
    expected = rate * service**2 / (2 * (1 - rate * service))
    assert abs(waits.mean() - expected) < 4 * waits.std(ddof=1) / np.sqrt(waits.size)


def test_given_ids_are_those_that_they_are_wherever_the_counts_come_from():
    cache = sim.KVCache(blocks=100, block_size=16, prefix_caching=True)
    for ids in ({"block_ids": [5, 10**8, 5], "block_counts": [1, 1, 1]}, {"block_ids": [[5], [10**8], [5]]}):
        run = engine(load_generator=trace(**ids, id_block_tokens=48), kv_cache=cache).run()
        assert run.requests.hit_tokens.values.tolist() == [0, 0, 48]


def test_alternatives_may_have_what_others_lack():
    loads = [
        sim.PoissonLoadGenerator(request_rate=3, prompt_tokens=100, output_tokens=5, **fields)
        for fields in ({}, {"sessions": sim.Sessions()}, {"prefix": sim.SharedPrefix(tokens=20)})
    ]
    names = sim.sweep(engine(), 5, load_generator=loads, progress=False).load_generator.values
    assert len(set(names)) == 3
    ds = sim.sweep(engine(batcher=sim.IFBatcher()), 10, max_num_batched_tokens=[None, 200], progress=False)
    assert ds.sizes == {"max_num_batched_tokens": 2, "stat": 6}


def test_stages_so_short_that_they_add_up_to_nothing_come_to_an_end():
    load = sim.PiecewiseLoadGenerator(
        request_rates=[1e-9], durations=[1e-9], repeat=True, requests=3, prompt_tokens=10, output_tokens=10
    )
    arrived = engine(load_generator=load).run().requests.arrived_at.values
    slow = sim.PoissonLoadGenerator(request_rate=1e-9, requests=3, prompt_tokens=10, output_tokens=10)
    np.testing.assert_allclose(arrived, engine(load_generator=slow).run().requests.arrived_at.values, rtol=1e-6)
