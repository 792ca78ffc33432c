"""Sweeps: axes, coordinates, determinism, memory, files."""

import json
import re
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import strategies
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim import axes, scenarios
from vecsim import threads as threads_module
from vecsim.sweep.files import write_dataset
from vecsim.sweep.report import has_slo, stable, table
from vecsim.sweep.spec import read_spec

ENGINE = sim.Engine(
    max_batch_size=4,
    load_generator=sim.RequestRateLoadGenerator(
        request_rate=0.3, target_output_len_tokens=10, target_output_len_std=5, seed=1
    ),
)
BATCHERS = [sim.StaticBatcher(), sim.IFBatcher(), sim.IFBatcherWithOnePrefillOnly()]


def sweep(*arguments, **keywords):
    return sim.sweep(*arguments, progress=False, **keywords)


def test_every_scenario_of_a_sweep_is_its_own_run():
    ds = sweep(
        ENGINE,
        300,
        batcher=BATCHERS,
        load_generator=[
            sim.RequestRateLoadGenerator(output_tokens=9, itl=0.5),
            sim.PoissonLoadGenerator(output_tokens=sim.LogNormal(mean=9, std=9)),
        ],
        request_rate=[0.1, 0.7],
        prefill_time=[0.3, 2],
        max_batch_size=[1, 5],
        seed=range(2),
        warmup=40,
    )
    assert list(ds.sizes) == [
        "batcher", "load_generator", "request_rate", "prefill_time", "max_batch_size", "seed", "stat",
    ]  # fmt: skip
    loads = {
        "RequestRateLoadGenerator": lambda **k: sim.RequestRateLoadGenerator(output_tokens=9, itl=0.5, **k),
        "PoissonLoadGenerator": lambda **k: sim.PoissonLoadGenerator(output_tokens=sim.LogNormal(mean=9, std=9), **k),
    }
    names = {type(batcher).__name__: batcher for batcher in BATCHERS}
    cells = ds.stack(cell=[dim for dim in ds.sizes if dim != "stat"])
    for i in range(cells.sizes["cell"]):
        cell = cells.isel(cell=i)
        load = loads[cell.load_generator.item()](
            request_rate=cell.request_rate.item(),
            prefill_time=cell.prefill_time.item(),
            seed=cell.seed.item(),
        )
        engine = sim.Engine(
            max_batch_size=cell.max_batch_size.item(),
            load_generator=load,
            batcher=names[cell.batcher.item()],
        )
        alone = engine.run(300, warmup=40).metrics
        for name in alone:
            np.testing.assert_array_equal(cell[name].values, alone[name].values, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.permutations(range(8)),
    st.integers(1, 10_000),
    st.integers(1, 8),
    st.sampled_from([sim.PoissonLoadGenerator, sim.RequestRateLoadGenerator, sim.ConcurrentLoadGenerator]),
)
def test_threads_cuts_and_order_change_no_bit(threads, order, block_bytes, block_scenarios, kind):
    engine = sim.Engine(load_generator=kind(output_tokens=sim.LogNormal(mean=6, std=9)))
    whole = sweep(engine, 200, batcher=BATCHERS, seed=range(8), threads=1)
    patch = pytest.MonkeyPatch()
    with patch.context() as p:
        p.setattr(scenarios, "BLOCK_BYTES", block_bytes)
        p.setattr(scenarios, "BLOCK_SCENARIOS", block_scenarios)
        p.setattr(threads_module, "INLINE", 0)
        p.setattr(threads_module, "PIECE", 300)
        cut = sweep(engine, 200, batcher=BATCHERS, seed=list(order), threads=threads)
    xr.testing.assert_identical(cut.sel(seed=range(8)), whole)


@settings(max_examples=30, deadline=None)
@given(strategies.engines, st.floats(1.1, 3.0))
def test_too_few_drawn_requests_are_drawn_again_and_change_nothing(engine, shortage):
    whole = engine.run(60)
    patch = pytest.MonkeyPatch()
    needed = scenarios.requests_needed
    with patch.context() as p:
        closed = type(engine.load_generator) is sim.ConcurrentLoadGenerator

        def fewer(table, more):
            enough = np.maximum(needed(table, 1.0), 1.0)
            if closed or type(engine.load_generator) in (
                sim.PoissonLoadGenerator,
                sim.GammaLoadGenerator,
            ):
                return np.maximum(enough * min(more / (4 * shortage), 1.0), 1.0)
            return enough

        p.setattr(scenarios, "requests_needed", fewer)
        again = engine.run(60)
        many = sweep(engine, 60, batcher=[engine.batcher], seed=[engine.load_generator.seed])
    xr.testing.assert_identical(again.metrics, whole.metrics)
    xr.testing.assert_identical(again.requests, whole.requests)
    for name in whole.metrics:
        np.testing.assert_array_equal(many[name].values.squeeze(), whole.metrics[name].values)


def test_scenarios_of_one_seed_see_the_same_requests():
    ds = sweep(ENGINE, 300, batcher=BATCHERS, request_rate=[0.2, 0.5], seed=range(3), keep="requests")
    n = int(ds.arrived.min())
    lengths = ds.output_tokens.isel(request=slice(n))
    assert (lengths == lengths.isel(batcher=0, request_rate=0)).all()
    assert not (lengths.isel(seed=0) == lengths.isel(seed=1)).all()
    poisson = sim.Engine(load_generator=sim.PoissonLoadGenerator(output_tokens=3))
    ds = sweep(poisson, 300, batcher=BATCHERS, request_rate=[0.2, 0.4], seed=range(3), keep="requests")
    arrived = ds.arrived_at.isel(request=slice(int(ds.arrived.min())))
    np.testing.assert_allclose(arrived.sel(request_rate=0.2), 2 * arrived.sel(request_rate=0.4), rtol=1e-12)


def test_kept_requests_are_those_of_the_runs():
    ds = sweep(ENGINE, 200, batcher=BATCHERS, seed=range(2), keep="requests")
    for i, batcher in enumerate(BATCHERS):
        alone = axes.replace(axes.replace(ENGINE, "batcher", batcher), "load_generator.seed", 1).run(200).requests
        kept = ds.isel(batcher=i).sel(seed=1)
        for name in alone.data_vars:
            np.testing.assert_array_equal(kept[name].values[: alone.sizes["request"]], alone[name].values)
            rest = kept[name].values[alone.sizes["request"] :]
            assert np.isnan(rest).all() or set(rest) <= {0, -1}


def test_data_arrays_that_share_a_dimension_vary_together():
    ds = sweep(
        ENGINE,
        100,
        request_rate=xr.DataArray([0.1, 0.2, 0.3], dims="load", coords={"load": ["low", "mid", "high"]}),
        max_batch_size=xr.DataArray([1, 2, 3], dims="load"),
        seed=range(2),
    )
    assert dict(ds.sizes) == {"load": 3, "seed": 2, "stat": 6}
    assert ds.request_rate.dims == ds.max_batch_size.dims == ("load",)
    alone = sweep(ENGINE, 100, request_rate=0.2, max_batch_size=2, seed=range(2))
    for name in alone:
        np.testing.assert_array_equal(ds[name].sel(load="mid").values, alone[name].values)


def test_scalars_pin_a_field_and_are_told_in_the_declaration():
    ds = sweep(ENGINE, 100, request_rate=np.array(0.11), seed=[5], batcher=sim.StaticBatcher())
    assert dict(ds.sizes) == {"seed": 1, "stat": 6}
    declared = sim.Engine.from_json(ds.attrs["declaration"])
    assert declared.load_generator.request_rate == 0.11
    assert declared.batcher == sim.StaticBatcher()


def test_a_scalar_pins_the_field_in_every_component_of_an_axis():
    loads = [sim.RequestRateLoadGenerator(output_tokens=3), sim.PoissonLoadGenerator(output_tokens=5)]
    for base in (ENGINE, sim.Engine(load_generator=sim.BatchLoadGenerator())):
        ds = sweep(base, 100, load_generator=loads, request_rate=0.4, seed=7, total_prefill_chunks=3)
        for i, load in enumerate(loads):
            pinned = axes.replace(axes.replace(load, "request_rate", 0.4), "seed", 7)
            pinned = axes.replace(pinned, "total_prefill_chunks", 3)
            alone = axes.replace(base, "load_generator", pinned).run(100).metrics
            for name in alone:
                np.testing.assert_array_equal(ds[name].isel(load_generator=i).values, alone[name].values)


def test_labels_are_short_and_whole_declarations_are_kept_beside_them():
    lengths = [sim.Normal(mean=3), sim.Normal(mean=3, std=2), sim.Constant(value=3)]
    ds = sweep(sim.Engine(load_generator=sim.PoissonLoadGenerator()), 10, output_tokens=lengths)
    mixed = sweep(sim.Engine(load_generator=sim.PoissonLoadGenerator()), 10, output_tokens=[3, *lengths[:1]])
    assert list(mixed["load_generator.output_tokens"].values) == ["3", "Normal"]
    coordinate = ds["load_generator.output_tokens"]
    assert list(coordinate.values) == ["Normal(std=0)", "Normal(std=2)", "Constant"]
    plain = json.loads(coordinate.attrs["declarations"])
    assert plain[0] == {"type": "Normal", "mean": 3.0, "std": 0.0}


def test_a_full_path_names_an_axis_and_its_last_part_the_dimension():
    ds = sweep(ENGINE, 100, **{"load_generator.request_rate": [0.1, 0.2]})
    np.testing.assert_array_equal(ds.request_rate, [0.1, 0.2])


def test_fields_named_like_a_result_become_dimensions_under_their_path():
    ds = sweep(ENGINE, 100, itl=[1, 2.5], keep="requests")
    assert ds.itl.dims == ("load_generator.itl", "stat")
    np.testing.assert_array_equal(ds["load_generator.itl"], [1, 2.5])


def test_distributions_and_their_fields_are_axes():
    lengths = [sim.Normal(mean=9, std=3), sim.LogNormal(mean=9, std=3)]
    engine = sim.Engine(load_generator=sim.PoissonLoadGenerator(request_rate=0.3))
    ds = sweep(engine, 200, output_tokens=lengths, std=[1, 5])
    assert ds.sizes["std"] == 2
    for i, kind in enumerate((sim.Normal, sim.LogNormal)):
        alone = axes.replace(engine, "load_generator.output_tokens", kind(mean=9, std=5)).run(200).metrics
        cell = ds.isel({"load_generator.output_tokens": i}).sel(std=5)
        np.testing.assert_array_equal(cell.e2e.values, alone.e2e.values)


def test_a_sweep_of_a_finite_load_that_completes_nothing_gives_nan_and_zero():
    ds = sweep(ENGINE, 3, batcher=BATCHERS)
    assert (ds.completed == 0).all()
    assert ds.e2e.isnull().all()
    assert ds.itl.isnull().all()
    assert (ds.request_throughput == 0).all()
    assert "nan" in str(ENGINE.run(3))


def test_the_dataset_describes_itself():
    ds = sweep(ENGINE, 100, batcher=BATCHERS, quantiles=[0.999, 0.5])
    assert list(ds.stat.values) == ["mean", "p50", "p99.9", "max"]
    for variable in ds.data_vars.values():
        assert {"long_name", "units", "description"} <= set(variable.attrs)
    assert ds.attrs["time_limit"] == 100
    assert json.loads(ds.attrs["declaration"])["max_batch_size"] == 4
    assert ds.attrs["vecsim_version"] == sim.__version__


@pytest.mark.parametrize("name", ["a.nc", "a.zarr"])
def test_a_written_dataset_is_read_back_identical(tmp_path, name):
    engine = sim.Engine(load_generator=sim.RequestRateLoadGenerator(request_rate=0.3))
    lengths = [3, sim.Uniform(low=1, high=9)]
    ds = sweep(engine, 100, batcher=BATCHERS, output_tokens=lengths, seed=range(3), keep="requests")
    write_dataset(ds, tmp_path / name)
    back = xr.open_dataset(tmp_path / name, **({} if name.endswith("nc") else {"engine": "zarr"})).load()
    back.close()
    xr.testing.assert_identical(back, ds)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("given_axes", "message"),
    [
        (
            {"request_rte": [1]},
            "unknown axis 'request_rte'; did you mean request_rate",
        ),
        ({"mean": [1]}, "unknown axis 'mean'"),
        ({"seed": []}, "axis 'seed' must have at least one value, got none"),
        ({"seed": np.array([])}, "axis 'seed' must have at least one value, got none"),
        ({"seed": [0, -1]}, "seed must be >= 0, got -1"),
        ({"seed": [0.5]}, "seed must be a whole number, got 0.5"),
        ({"request_rate": [0.1, np.nan]}, "request_rate must be > 0, got nan"),
        ({"request_rate": np.ones((2, 2))}, "axis 'request_rate' must be one-dimensional"),
        ({"seed": iter([1])}, "axis 'seed' must be a list, an array or a range, got an iterator"),
        ({"batcher": ["IFBatcher"]}, "batcher must be one of StaticBatcher, IFBatcher"),
        ({"batcher": sim.IFBatcher}, "call it: IFBatcher()"),
        (
            {
                "seed": xr.DataArray([1, 2], dims="a"),
                "request_rate": xr.DataArray([1, 2, 3], dims="a"),
            },
            "axes along 'a' must have one length: request_rate has 3, seed 2",
        ),
        ({"seed": xr.DataArray([1, 2], dims="ttft")}, "dimension 'ttft' must have another name"),
        ({"seed": [1], "load_generator.seed": [2]}, "which another axis names too"),
        ({"seed": range(10**12)}, "GiB of memory"),
        ({"seed": range(10**20)}, "GiB of memory"),
        ({"seed": 10**400}, "seed must be >= 0 and <= 4294967295, got 1000"),
        ({"seed": {1, 2}}, "axis 'seed' must be a list, an array or a range, got a set"),
        (
            {
                "seed": xr.DataArray([1, 2], dims="a", coords={"a": [1, 2]}),
                "request_rate": xr.DataArray([1, 2], dims="a", coords={"a": [3, 4]}),
            },
            "axes along 'a' must have the same coordinate there",
        ),
        (
            {"output_tokens": [3], "target_output_len_std": [1]},
            "must be left out where output_tokens is given",
        ),
        (
            {
                "load_generator": [sim.BatchLoadGenerator(), sim.PoissonLoadGenerator()],
                "request_rate": [1],
            },
            "with BatchLoadGenerator",
        ),
    ],
)
def test_a_wrong_axis_is_refused_with_its_name(given_axes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        sweep(ENGINE, 100, **given_axes)
    assert message in str(error.value)


def test_an_ambiguous_axis_is_refused_with_the_candidates():
    class Pair(sim.Distribution, frozen=True, kw_only=True, tag=True):
        first: sim.Normal
        second: sim.Normal

    pair = Pair(first=sim.Normal(mean=1), second=sim.Normal(mean=2))
    with pytest.raises(ValueError, match=r"axis 'mean' is ambiguous: write one of first\.mean, second\.mean"):
        axes.plan(pair, {"mean": [1]})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"threads": 0}, "threads must be a whole number >= 1, got 0"),
        ({"keep": "steps"}, 'keep must be "requests", "queue" or left out'),
        ({"warmup": 100}, "warmup must be >= 0 and < time_limit (100), got 100"),
    ],
)
def test_a_wrong_argument_is_refused(keywords, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        sweep(ENGINE, 100, **keywords)
    assert message in str(error.value)


def test_an_interruption_stops_within_a_second():
    program = (
        "import vecsim as sim\n"
        "engine = sim.Engine(load_generator=sim.RequestRateLoadGenerator(request_rate=0.3))\n"
        "engine.run(10)\n"
        "print('ready', flush=True)\n"
        "sim.sweep(engine, 100_000_000, seed=range(4), progress=False)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        _, error = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in error
    assert time.monotonic() - begin < 5  # a second on an idle machine; this one may be busy


def test_heavy_tails_in_blocks_that_share_streams_are_drawn_for_each_block(monkeypatch):
    monkeypatch.setattr(scenarios, "BLOCK_SCENARIOS", 3)
    lengths = sim.Empirical(values=[1] * 9 + [1_000_000])
    closed = sim.ConcurrentLoadGenerator(target_concurrency=100, prefill_time=0, output_tokens=lengths)
    bursts = sim.GammaLoadGenerator(coefficient_of_variation=100, output_tokens=1, prefill_time=0)
    for load, axis, values in [(closed, "target_concurrency", [100, 2000]), (bursts, "request_rate", [0.001, 100.0])]:
        engine = sim.Engine(max_batch_size=100, load_generator=load)
        ds = sweep(engine, 60, **{axis: values}, seed=range(6), threads=2)
        for value in values:
            for seed in range(6):
                one = axes.replace_all(
                    engine, {f"load_generator.{axis}": value, "load_generator.seed": seed}
                ).run(60)  # fmt: skip
                assert ds.arrived.sel({axis: value, "seed": seed}) == one.metrics.arrived


def test_the_order_of_keywords_changes_no_result():
    load = sim.PoissonLoadGenerator(request_rate=0.5)
    base = sim.Engine(load_generator=sim.BatchLoadGenerator())
    pins = {"output_tokens": sim.Uniform(low=1, high=10), "load_generator": load, "low": 15, "high": 20}
    wanted = sweep(base, 100, load_generator=load, output_tokens=sim.Uniform(low=15, high=20))
    given = {
        "load_generator": [load, sim.RequestRateLoadGenerator()],
        "output_tokens": [sim.Normal(mean=3), sim.LogNormal(mean=3, std=3)],
        "mean": [5, 6],
    }
    there = sweep(base, 100, **given)
    for reverse in (False, True):
        order = sorted(pins, reverse=reverse)
        xr.testing.assert_equal(sweep(base, 100, **{name: pins[name] for name in order}), wanted)
        order = sorted(given, reverse=reverse)
        back = sweep(base, 100, **{name: given[name] for name in order}).transpose(*there.dims)
        xr.testing.assert_equal(back, there)


def test_zipped_axes_count_once_for_memory():
    many = xr.DataArray(np.arange(20_000), dims="k")
    rates = xr.DataArray(np.linspace(0.1, 0.2, 20_000), dims="k")
    assert sweep(ENGINE, 1, seed=many, request_rate=rates).sizes["k"] == 20_000


def test_slots_of_a_large_batch_are_the_lowest_free_ones():
    load = sim.BatchLoadGenerator(initial_batch=2**17, output_tokens=1, prefill_time=0)
    slots = sim.Engine(max_batch_size=2**16, load_generator=load).run(3).requests.slot.values
    np.testing.assert_array_equal(slots, np.tile(np.arange(2**16), 2))


@pytest.fixture(scope="module")
def schedulers():
    """The engine of the ready-made spec of the token model, and some of its batchers."""
    spec = read_spec("schedulers")
    by_name = {type(batcher).__name__: batcher for batcher in spec.keywords()["batcher"]}
    return spec.engine, [by_name[name] for name in ("TokenBudgetBatcher", "PrefillFirstBatcher", "SGLangBatcher")]


def highest_stable(ds):
    """The highest stable load of each batcher."""
    return (stable(ds) * ds.request_rate).max("request_rate").values


def test_a_load_that_is_stable_in_the_token_model_is_stable_in_a_longer_run(schedulers):
    engine, batchers = schedulers
    axes = {"batcher": batchers, "request_rate": np.arange(6, 13.1, 0.5), "seed": range(4)}
    short, long = (highest_stable(sweep(engine, time, **axes)) for time in (600, 3000))
    np.testing.assert_array_equal(long, [8.5, 10, 10.5])
    np.testing.assert_allclose(short, long, atol=0.5)


def test_a_static_batch_that_holds_its_load_is_stable_though_requests_wait_longer_than_they_run(schedulers):
    ds = sweep(schedulers[0], 600, batcher=sim.StaticBatcher(), request_rate=[1, 2, 3, 4, 6], seed=range(4))
    waits, takes = (ds[name].sel(stat="mean").median("seed") for name in ("queue_time", "e2e"))
    assert (waits > takes - waits).values[2:4].all()
    assert stable(ds).values.tolist() == [True, True, True, True, False]


def test_a_queue_that_was_served_to_the_end_was_not_stable_for_that(schedulers):
    engine, batchers = schedulers
    ds = sweep(engine, requests=4000, batcher=batchers, request_rate=[2, 6, 16], seed=range(4))
    assert (ds.final_queue == 0).all()
    assert stable(ds).values.tolist() == [[True, True, False]] * 3


def test_a_closed_loop_is_stable_while_more_run_than_wait(schedulers):
    load = sim.ConcurrentLoadGenerator(target_concurrency=1, prompt_tokens=100, output_tokens=100)
    engine = sim.Engine(max_batch_size=8, load_generator=load, step_time=schedulers[0].step_time)
    ds = sweep(engine, 100, target_concurrency=[4, 12, 100])
    assert stable(ds).values.tolist() == [True, True, False]


def test_the_table_tells_what_it_calls_stable_in_each_model(schedulers):
    ticks = table(sweep(ENGINE, 100, request_rate=[0.1, 0.2]))
    assert "no more wait than there are slots" in ticks
    seconds = table(sweep(schedulers[0], 20, request_rate=[1, 2]))
    assert "no more wait than 1.5 times the mean queue" in seconds


def test_the_table_tells_the_goodput_where_an_slo_is_declared(schedulers):
    engine, batchers = schedulers
    axes = {"request_rate": np.arange(2, 14.1, 2), "batcher": batchers[:2], "seed": range(2)}
    ds = sweep(engine, 300, **axes)
    rows = [re.split(r"  +", line) for line in table(ds).splitlines()]
    goodput, attained = (rows[0].index(head) for head in ("peak goodput requests/s", "highest at 90 % SLO"))
    for row, batcher in zip(rows[2:4], ds.batcher.values, strict=True):
        one = ds.sel(batcher=batcher).median("seed")
        assert row[goodput] == f"{float(one.goodput.max()):.1f}"
        assert float(row[attained]) == one.request_rate.values[one.slo_attainment >= 0.9].max()
    assert "90 % SLO: so many of the requests" in table(ds)
    alone = table(ds.isel(request_rate=2, drop=True)).splitlines()
    assert "SLO attainment" in alone[0]
    assert re.search(r"\b9\d\.\d %|100\.0 %", alone[2])


def test_an_slo_is_found_wherever_it_is_declared_and_told_only_then(schedulers):
    engine = msgspec.structs.replace(schedulers[0], slo=None)
    limits = sim.SLO(ttft=0.5)
    kinds = [sim.RequestClass(name="a", slo=limits), sim.RequestClass(name="b")]
    load = msgspec.structs.replace(engine.load_generator, classes=kinds)
    assert not has_slo(sweep(engine, 5, request_rate=[1, 2]))
    assert not has_slo(sweep(msgspec.structs.replace(engine, slo=sim.SLO()), 5, request_rate=[1, 2]))
    assert not has_slo(sweep(ENGINE, 5, request_rate=[1, 2]))
    for limited in ({"load_generator": load}, {"load_generator": [load]}, {"slo": limits}, {"slo": [limits]}):
        assert has_slo(sweep(engine, 5, **limited))
    with_slo = msgspec.structs.replace(engine, slo=limits)
    assert has_slo(sweep(with_slo, 5, **{"slo.ttft": [0.1, 0.2]}))
    assert "goodput" not in table(sweep(engine, 5, request_rate=[1, 2]))
    assert "Goodput" not in str(engine.run(5))
    assert "SLO" not in str(engine.run(5))
    assert "Goodput [requests/s]" in str(with_slo.run(5))
