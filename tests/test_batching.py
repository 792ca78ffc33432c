"""Batchers of a user's own: the same as built-in ones in everything but who wrote the rule."""

import numba
import numpy as np
import policies
import pytest
import strategies
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim.batching import BATCHERS

LOAD = sim.RequestRateLoadGenerator(target_output_len_tokens=10, target_output_len_std=5, request_rate=0.3)
ENGINE = sim.Engine(load_generator=LOAD)
TWINS = {
    sim.StaticBatcher: policies.static,
    sim.IFBatcher: policies.in_flight,
    sim.IFBatcherWithOnePrefillOnly: policies.one_prefill,
}


def engine_of(batcher):
    return sim.Engine(load_generator=LOAD, batcher=batcher)


def test_every_built_in_batcher_has_a_twin_here():
    assert set(TWINS) == set(BATCHERS)


@settings(max_examples=30, deadline=None)
@given(strategies.engines, strategies.time_limits, st.sampled_from(BATCHERS), st.integers(1, 3), st.booleans())
def test_a_users_copy_of_a_built_in_rule_gives_the_same_bits_in_one_sweep_with_others(
    engine, time_limit, kind, threads, batcher_last
):
    batcher = {"batcher": [policies.every_field, kind(), TWINS[kind], sim.IFBatcher(), policies.in_flight]}
    seeds = {"seed": [0, 1, 2]}
    axes = {**seeds, **batcher} if batcher_last else {**batcher, **seeds}
    ds = sim.sweep(engine, time_limit, progress=False, threads=threads, keep="requests", **axes)
    for ours, theirs in ((1, 2), (3, 4)):
        xr.testing.assert_equal(ds.isel(batcher=ours, drop=True), ds.isel(batcher=theirs, drop=True))


def test_it_is_labelled_by_its_name_and_its_parameter():
    batchers = [
        sim.IFBatcher(),
        policies.in_flight,
        sim.CustomBatcher(rule=policies.every_field, parameter=2),
        sim.CustomBatcher(rule=policies.every_field, parameter=3),
    ]
    ds = sim.sweep(ENGINE, 50, progress=False, batcher=batchers)
    labels = ["IFBatcher", "in_flight", "every_field(parameter=2)", "every_field(parameter=3)"]
    assert ds.batcher.values.tolist() == labels
    assert '"rule":"policies:every_field","parameter":2.0}' in ds.batcher.attrs["declarations"]
    assert "every_field(parameter=2.0), 4 slots" in str(engine_of(batchers[2]).run(50))


def test_its_parameter_can_be_an_axis():
    ds = sim.sweep(ENGINE, 300, progress=False, batcher=policies.every_field, parameter=[0, 1.5, 90])
    assert ds.ttft.sel(stat="mean").std() > 0
    for parameter in (0, 1.5, 90):
        run = engine_of(sim.CustomBatcher(rule=policies.every_field, parameter=parameter)).run(300)
        xr.testing.assert_equal(ds.sel(parameter=parameter, drop=True), run.metrics)


def test_it_is_written_as_toml_by_module_and_name_and_read_back():
    engine = engine_of(sim.CustomBatcher(rule=policies.every_field, parameter=2))
    assert 'rule = "policies:every_field"' in engine.to_toml()
    assert sim.Engine.from_toml(engine.to_toml()) == engine
    assert sim.Engine.from_json(engine.to_json()) == engine
    assert engine_of("policies:static").batcher == sim.CustomBatcher(rule=policies.static)


def wrong(source, batch="batch"):
    """A jitted function of one line."""
    return numba.njit(eval(f"lambda {batch}: {source}"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            policies.static.py_func,
            "rule must be compiled with numba.njit, got <function static.*: write @numba.njit above",
        ),
        (len, "rule must be compiled with numba.njit, got <built-in function len>"),
        (wrong("batch.fre"), "can't be compiled for a batch: Unknown attribute 'fre' of type Batch; did you mean free"),
        (
            wrong("batch.itll"),
            r"did you mean itl.*\(a batch of the tick model has .*, itl, .*token model has .*head_class",
        ),
        (wrong("batch.prefil_tokens"), "Unknown attribute 'prefil_tokens' of type Batch; did you mean prefill_tokens"),
        (
            wrong("batch.blocks + batch.hed_tokens"),
            "Unknown attribute 'hed_tokens' of type Batch; did you mean head_tok",
        ),
        (wrong("batch.free", "batch, x"), "can't be compiled for a batch: .* function takes 2 arguments"),
        (wrong("nothing(batch)"), "can't be compiled for a batch: NameError: name 'nothing' is not defined"),
        (wrong("batch.free / 2"), "must return a whole number on every path, got float64"),
        (wrong("batch.free if batch.queued > 1 else None"), "must return a whole number on every path, got Option"),
        (numba.njit("int64(int64)")(lambda x: x), "can't be compiled for a batch: compilation disabled"),
        (numba.njit(parallel=True)(lambda batch: batch.free), "must not be compiled with parallel=True"),
        ("nosuch:rule", "rule must be a jitted function or \"module:name\", got 'nosuch:rule': No module named"),
        ("policies:nosuch", "got 'policies:nosuch': module 'policies' has no attribute 'nosuch'"),
        ("math:floor", "rule must be compiled with numba.njit, got <built-in function floor>"),
    ],
)
def test_what_is_no_rule_is_refused_when_it_is_declared(rule, message):
    with pytest.raises(ValueError, match=message):
        engine_of(rule)
    with pytest.raises(ValueError, match=message):
        sim.sweep(ENGINE, 10, progress=False, batcher=[sim.IFBatcher(), rule])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            policies.negative_later,
            r"rule negative_later must return 0 to 4 requests \(batch.free\), got -1 at 21 ticks",
        ),
        (policies.all_queued, r"rule all_queued must return 0 to 1 requests \(batch.free\), got 2 at "),
        (policies.divides, "rule divides raised ZeroDivisionError: "),
    ],
)
@pytest.mark.parametrize("seeds", [1, 2000])
def test_a_rule_that_fails_as_it_runs_says_which_and_how(rule, message, seeds):
    with pytest.raises(ValueError, match=message):
        engine_of(rule).run(200)
    with pytest.raises(ValueError, match=message):
        sim.sweep(ENGINE, 200, progress=False, batcher=[sim.IFBatcher(), rule], seed=range(seeds))
    sim.sweep(ENGINE, 200, progress=False, batcher=[sim.IFBatcher()], seed=range(seeds))  # and all is well again


def one_prefill(kind):
    """The rule of that name, with an answer of another type."""
    return numba.njit(lambda batch: kind(batch.prefilling == 0))


# Each takes over a second to compile.
WHOLE = {kind: one_prefill(kind) for kind in (np.int8, np.uint8, np.uint64, np.bool_)}


@pytest.mark.parametrize("kind", WHOLE)
def test_any_whole_number_will_do(kind):
    ours = engine_of(WHOLE[kind]).run(300)
    xr.testing.assert_equal(ours.requests, engine_of(sim.IFBatcherWithOnePrefillOnly()).run(300).requests)


def test_rules_of_one_name_are_numbered():
    rules = list(WHOLE.values())[:3]
    ds = sim.sweep(ENGINE, 50, progress=False, batcher=[*rules, rules[1]])
    assert ds.batcher.values.tolist() == ["<lambda>", "<lambda> #2", "<lambda> #3", "<lambda> #2"]


def test_a_rule_that_nobody_could_import_is_not_written_down():
    with pytest.raises(ValueError, match="can't be written down: define the function at the top of a module"):
        engine_of(wrong("1")).to_toml()


def test_a_wrong_answer_where_no_slot_is_free_has_no_meaning():
    ds = sim.sweep(ENGINE, 500, progress=False, batcher=[sim.IFBatcher(), wrong("max(batch.free, 1)")])
    np.testing.assert_array_equal(ds.completed[0], ds.completed[1])
