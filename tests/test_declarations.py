"""Declarations: frozen, compared by value, checked when made, written as TOML and back."""

import inspect
import math
import pickle

import msgspec
import numpy as np
import pytest
import strategies
from hypothesis import given, settings

import vecsim as sim
from vecsim.declaration import Declaration

LOAD = sim.BatchLoadGenerator()


@settings(max_examples=200, deadline=None)
@given(strategies.engines)
def test_toml_json_and_pickle_give_an_equal_declaration_back(engine):
    assert sim.Engine.from_toml(engine.to_toml()) == engine
    assert sim.Engine.from_json(engine.to_json()) == engine
    assert pickle.loads(pickle.dumps(engine)) == engine
    assert hash(sim.Engine.from_toml(engine.to_toml())) == hash(engine)


def test_declarations_are_frozen():
    with pytest.raises(AttributeError):
        LOAD.initial_batch = 3


def test_numpy_scalars_become_plain_numbers():
    load = sim.RequestRateLoadGenerator(
        request_rate=np.float32(0.5), total_prefill_chunks=np.int64(2), output_tokens=np.int32(9)
    )
    assert type(load.request_rate) is float
    assert type(load.total_prefill_chunks) is int
    assert load == sim.RequestRateLoadGenerator(request_rate=0.5, total_prefill_chunks=2.0, output_tokens=9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sim.RequestRateLoadGenerator(request_rate=-1), "request_rate must be > 0, got -1"),
        (lambda: sim.RequestRateLoadGenerator(request_rate=0), "request_rate must be > 0, got 0"),
        (
            lambda: sim.PoissonLoadGenerator(request_rate=math.nan),
            "request_rate must be > 0, got nan",
        ),
        (
            lambda: sim.PoissonLoadGenerator(request_rate=math.inf),
            "request_rate must be > 0 and finite, got inf",
        ),
        (
            lambda: sim.PoissonLoadGenerator(request_rate="1"),
            "request_rate must be a number, got '1'",
        ),
        (
            lambda: sim.PoissonLoadGenerator(request_rate=True),
            "request_rate must be a number, got True",
        ),
        (
            lambda: sim.PoissonLoadGenerator(request_rate=None),
            "request_rate must be a number, got None",
        ),
        (
            lambda: sim.GammaLoadGenerator(coefficient_of_variation=0),
            "coefficient_of_variation must be >= 0.001, got 0",
        ),
        (lambda: sim.BatchLoadGenerator(initial_batch=0), "initial_batch must be >= 1, got 0"),
        (
            lambda: sim.BatchLoadGenerator(initial_batch=2.5),
            "initial_batch must be a whole number, got 2.5",
        ),
        (
            lambda: sim.ConcurrentLoadGenerator(target_concurrency=-3),
            "target_concurrency must be >= 1, got -3",
        ),
        (lambda: sim.BatchLoadGenerator(prefill_time=-0.1), "prefill_time must be >= 0, got -0.1"),
        (
            lambda: sim.BatchLoadGenerator(prefill_time=1e13),
            "prefill_time must be >= 0 and <= 1e+12, got 10000000000000.0",
        ),
        (lambda: sim.BatchLoadGenerator(itl=math.inf), "itl must be >= 0 and <= 1e+12, got inf"),
        (
            lambda: sim.BatchLoadGenerator(total_prefill_chunks=0),
            "total_prefill_chunks must be >= 1, got 0",
        ),
        (lambda: sim.BatchLoadGenerator(seed=-1), "seed must be >= 0, got -1"),
        (
            lambda: sim.BatchLoadGenerator(seed=2**32),
            "seed must be >= 0 and <= 4294967295, got 4294967296",
        ),
        (
            lambda: sim.BatchLoadGenerator(target_output_len_tokens=-1),
            "target_output_len_tokens must be >= 0, got -1",
        ),
        (
            lambda: sim.BatchLoadGenerator(output_tokens=3, target_output_len_std=0),
            "target_output_len_std must be left out where output_tokens is given, got 0",
        ),
        (lambda: sim.BatchLoadGenerator(output_tokens=0), "output_tokens must be >= 1, got 0"),
        (
            lambda: sim.BatchLoadGenerator(output_tokens="x"),
            "output_tokens must be a whole number or one of Constant, Normal, Uniform, LogNormal, Empirical, Zipf, "
            "got 'x'",
        ),
        (
            lambda: sim.Engine(load_generator=LOAD, max_batch_size=0),
            "max_batch_size must be >= 1, got 0",
        ),
        (
            lambda: sim.Engine(load_generator=LOAD, max_batch_size=2**21),
            "max_batch_size must be >= 1 and <= 1048576, got 2097152",
        ),
        (
            lambda: sim.Engine(load_generator=None),
            "load_generator must be one of BatchLoadGenerator, ",
        ),
        (
            lambda: sim.Engine(load_generator=LOAD, batcher="static"),
            "batcher must be one of StaticBatcher, IFBatcher",
        ),
        (lambda: sim.Engine(load_generator=LOAD, batcher=sim.IFBatcher), "call it: IFBatcher()"),
        (lambda: sim.Normal(mean=-1), "mean must be >= 0, got -1"),
        (lambda: sim.Normal(mean=1, std=-1), "std must be >= 0, got -1"),
        (lambda: sim.Constant(value=0), "value must be >= 1, got 0"),
        (lambda: sim.LogNormal(mean=0, std=1), "mean must be > 0, got 0"),
        (lambda: sim.LogNormal(mean=1e-300, std=1), "std must be <= 1e6 x mean, got std=1, mean=1e-300"),
        (lambda: sim.PoissonLoadGenerator(request_rate=10**400), "request_rate must be > 0 and finite, got 1000"),
        (
            lambda: sim.Engine(load_generator=LOAD, max_batch_size=10**5000),
            "max_batch_size must be >= 1 and <= 1048576",
        ),
        (lambda: sim.Empirical(values=[math.inf]), "values must be one or more whole numbers >= 1"),
        (lambda: sim.Engine(load_generator=LOAD).run("10"), "time_limit must be a number, got '10'"),
        (lambda: sim.Engine(load_generator=LOAD).run(True), "time_limit must be a number, got True"),
        (lambda: sim.Engine(load_generator=LOAD).run(10**400), "time_limit must be > 0 and <= 1e+09, got 1000"),
        (lambda: sim.Engine(load_generator=LOAD).run(10, quantiles="01"), "quantiles must be one or more numbers"),
        (lambda: sim.Uniform(low=3, high=2), "low must be <= high, got low=3, high=2"),
        (lambda: sim.Empirical(values=[]), "values must be one or more whole numbers >= 1"),
        (lambda: sim.Empirical(values=[1, 0]), "values must be one or more whole numbers >= 1"),
        (lambda: sim.Empirical(values=[1.5]), "values must be one or more whole numbers >= 1"),
        (lambda: sim.Empirical(values=3), "values must be one or more whole numbers >= 1"),
        (
            lambda: sim.Engine(load_generator=LOAD).run(0),
            "time_limit must be > 0 and <= 1e+09, got 0",
        ),
        (
            lambda: sim.Engine(load_generator=LOAD).run(math.nan),
            "time_limit must be > 0 and <= 1e+09, got nan",
        ),
        (lambda: sim.Engine(load_generator=LOAD).run("x"), "time_limit must be a number, got 'x'"),
        (
            lambda: sim.Engine(load_generator=LOAD).run(10, warmup=10),
            "warmup must be >= 0 and < time_limit (10), got",
        ),
        (
            lambda: sim.Engine(load_generator=LOAD).run(10, quantiles=[1.5]),
            "quantiles must be in [0, 1], got 1.5",
        ),
        (
            lambda: sim.Engine(load_generator=LOAD).run(10, quantiles=[0.5, 0.5]),
            "quantiles must differ",
        ),
        (
            lambda: sim.Engine(load_generator=LOAD).run(10, quantiles=0.5),
            "quantiles must be one or more numbers in [0, 1]",
        ),
        (
            lambda: sim.Engine(load_generator=sim.BatchLoadGenerator(initial_batch=10**9)).run(10),
            "GiB of memory",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_is_allowed(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: sim.BatchLoadGenerator(initial_bach=3),
            "BatchLoadGenerator has no field 'initial_bach'; did you mean",
        ),
        (lambda: sim.SLO(tbt=1), "SLO has no field 'tbt'; did you mean ttft or tpot? (fields: ttft, tpot, itl, e2e)"),
        (lambda: sim.KVCache(xyz=1), "KVCache has no field 'xyz' (fields: blocks, block_size, prefix_caching, "),
        (lambda: sim.SLO(0.5), "SLO takes its fields by name: ttft, tpot, itl, e2e"),
        (lambda: sim.Engine(max_batch_size=3), "Engine needs load_generator"),
        (sim.Uniform, "Uniform needs low and high"),
    ],
)
def test_an_unknown_or_missing_field_is_refused_with_those_there_are(make, message):
    with pytest.raises(TypeError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_batch_size = = 3", "not valid TOML: Invalid value (at line 1"),
        (
            "max_batch_sze = 3\n[load_generator]\ntype = 'BatchLoadGenerator'",
            "unknown field `max_batch_sze`",
        ),
        (
            "[load_generator]\ntype = 'BatchLoadGenerator'\ninitial_bach = 3",
            "load_generator: Object contains unknown field `initial_bach`; did you mean initial_batch?",
        ),
        (
            "[load_generator]\ntype = 'BachLoadGenerator'",
            "load_generator.type: Invalid value 'BachLoadGenerator'; did you mean BatchLoadGenerator",
        ),
        (
            "[load_generator]\ntype = 'BatchLoadGenerator'\nprefill_time = -2",
            "load_generator: prefill_time must be >= 0, got -2",
        ),
        (
            "[load_generator]\ntype = 'BatchLoadGenerator'\nprefill_time = 'two'",
            "load_generator.prefill_time: Expected `float`, got `str`",
        ),
        (
            "kv_cache = {block = 4000}\n[load_generator]\ntype = 'BatchLoadGenerator'",
            "kv_cache: Object contains unknown field `block`; did you mean blocks or block_size?",
        ),
        (
            "slo = {xyz = 4000}\n[load_generator]\ntype = 'BatchLoadGenerator'",
            "slo: Object contains unknown field `xyz`; SLO has ttft, tpot, itl, e2e",
        ),
        (
            "[load_generator]\ntype = 'BatchLoadGenerator'\nclasses = [{name = 'a', slo = {tbt = 1}}]",
            "load_generator.classes[0].slo: Object contains unknown field `tbt`; did you mean ttft or tpot?",
        ),
        (
            "batcher = {type = 'IFBatcher', chunk_tokens = 3}\n[load_generator]\ntype = 'BatchLoadGenerator'",
            "batcher: Object contains unknown field `chunk_tokens`; did you mean reserve_tokens",
        ),
        (
            "batcher = {type = 'Vllm'}\n[load_generator]\ntype = 'BatchLoadGenerator'",
            "batcher.type: Invalid value 'Vllm'; there are StaticBatcher, IFBatcher, ",
        ),
        ("max_batch_size = 3", "missing required field `load_generator`"),
    ],
)
def test_a_slip_in_toml_is_refused_with_its_place(text, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        sim.Engine.from_toml(text)
    assert message in str(error.value)


def test_every_public_name_has_a_docstring():
    for name in sim.__all__:
        documented = getattr(sim, name)
        assert inspect.getdoc(documented), name
        if inspect.isclass(documented) and issubclass(documented, Declaration):
            own = set(documented.__struct_fields__) - set(documented.__base__.__struct_fields__)
            doc = inspect.getdoc(documented)
            for field in own:
                assert field in doc, f"{name}.{field}"


def test_labels_name_what_differs_from_the_default():
    assert sim.IFBatcher().label() == "IFBatcher"
    assert sim.LogNormal(mean=3, std=1).label() == "LogNormal(mean=3.0, std=1.0)"
    assert sim.PoissonLoadGenerator(output_tokens=sim.Constant(value=2)).label() == (
        "PoissonLoadGenerator(output_tokens=Constant(value=2))"
    )


def test_structs_replace_is_checked_too():
    with pytest.raises(ValueError, match="initial_batch must be >= 1"):
        msgspec.structs.replace(LOAD, initial_batch=0)
