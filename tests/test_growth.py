"""Short and long runs of the same engine: published figures, and what tells a growing queue."""

import msgspec
import numpy as np
import pytest
import xarray as xr

import vecsim as sim
from vecsim import plot, token_simulate
from vecsim.sweep.report import growth_table
from vecsim.sweep.spec import read_spec

COMMON = {
    "prefill_time": 2, "itl": 1, "total_prefill_chunks": 2, "target_output_len_tokens": 10,
    "target_output_len_std": 5, "seed": 42,
}  # fmt: skip


def engine(load):
    return sim.Engine(max_batch_size=4, load_generator=load, batcher=sim.IFBatcherWithOnePrefillOnly())


@pytest.mark.parametrize(
    ("load", "short", "long", "grows"),
    [
        (
            sim.RequestRateLoadGenerator(request_rate=0.46, **COMMON),
            ("6", "11.03", "17.66"),
            ("1138", "1245.77", "1253.78"),
            True,
        ),
        (
            sim.ConcurrentLoadGenerator(target_concurrency=6, **COMMON),
            ("2", "7.87", "15.14"),
            ("2", "8.61", "17.32"),
            False,
        ),
    ],
)
def test_the_published_short_and_long_figures(load, short, long, grows):
    ds = sim.queue_growth(engine(load), short=100, long=10_000, progress=False)
    for run, published in (("short", short), ("long", long)):
        values = ds.sel(run=run)
        assert (
            f"{values.final_queue.item()}", f"{values.ttft[0].item():.2f}", f"{values.e2e[0].item():.2f}",
        ) == published  # fmt: skip
    assert bool(ds.grows) is grows
    table = growth_table(ds)
    for value in (*short, *long):
        assert f" {value}" in table
    assert ("grows" in table.splitlines()[2]) is grows


def test_with_axes_it_is_the_same_engine_by_engine():
    ds = sim.queue_growth(
        engine(sim.PoissonLoadGenerator(**COMMON)), 50, 600, progress=False, seed=[3, 4],
        batcher=[sim.IFBatcher(), sim.StaticBatcher()], request_rate=xr.DataArray([0.1, 0.6], dims="load"),
    )  # fmt: skip
    assert ds.final_queue.dims == ("run", "seed", "batcher", "load")
    for index in np.ndindex(2, 2, 2):
        place = dict(zip(("seed", "batcher", "load"), index, strict=True))
        one = ds.isel(place)
        load = sim.PoissonLoadGenerator(**COMMON | {"seed": one.seed.item(), "request_rate": one.request_rate.item()})
        batcher = (sim.IFBatcher(), sim.StaticBatcher())[place["batcher"]]
        alone = sim.queue_growth(sim.Engine(load_generator=load, batcher=batcher), 50, 600, progress=False)
        for name in ("e2e", "final_queue", "queue_size"):
            np.testing.assert_array_equal(one[name], alone[name])


def test_the_long_run_goes_on_where_the_stream_of_lengths_stopped():
    load = sim.RequestRateLoadGenerator(request_rate=0.46, **COMMON)
    run = engine(load).run(500)
    later = engine(sim.RequestRateLoadGenerator(request_rate=0.46, stream_offset=17, **COMMON)).run(500)
    np.testing.assert_array_equal(later.requests.output_tokens[:-17], run.requests.output_tokens[17:])
    np.testing.assert_array_equal(later.requests.arrived_at, run.requests.arrived_at)


def test_an_offset_of_the_load_is_added_to_whoever_declares_it():
    load = sim.PoissonLoadGenerator(request_rate=0.3, stream_offset=1000, **COMMON)
    expected = sim.queue_growth(engine(load), 100, 1000, progress=False)
    base = engine(sim.PoissonLoadGenerator())
    pinned = sim.queue_growth(base, 100, 1000, progress=False, load_generator=load)
    listed = sim.queue_growth(base, 100, 1000, progress=False, load_generator=[load])
    xr.testing.assert_equal(pinned, expected)
    xr.testing.assert_equal(listed.isel(load_generator=0, drop=True), expected)


def test_the_kept_queue_is_that_of_the_steps():
    load = sim.PoissonLoadGenerator(request_rate=0.4, **COMMON)
    ds = sim.sweep(engine(load), 300, progress=False, keep="queue", seed=[1, 2], max_batch_size=[2, 40])
    for place in np.ndindex(2, 2):
        one = ds.isel(seed=place[0], max_batch_size=place[1])
        alone = sim.Engine(
            max_batch_size=one.max_batch_size.item(),
            batcher=sim.IFBatcherWithOnePrefillOnly(),
            load_generator=sim.PoissonLoadGenerator(request_rate=0.4, **COMMON | {"seed": one.seed.item()}),
        ).run(300)
        step = np.searchsorted(alone.steps.time.values, ds.time.values, side="right") - 1
        np.testing.assert_array_equal(one.queue_size, alone.steps.queue_size.values[step])


def token_engine(batcher=None, rate=8.0):
    spec = read_spec("schedulers")
    load = msgspec.structs.replace(spec.engine.load_generator, request_rate=rate)
    batcher = batcher or sim.TokenBudgetBatcher(max_num_batched_tokens=2048)
    return msgspec.structs.replace(spec.engine, load_generator=load, batcher=batcher)


def test_the_kept_queue_of_the_token_model_is_that_of_the_steps(monkeypatch):
    monkeypatch.setattr(token_simulate, "FEW_STEPS", 50)
    batchers = [sim.StaticBatcher(), sim.TokenBudgetBatcher(max_num_batched_tokens=2048)]
    ds = sim.sweep(
        token_engine(), 60, progress=False, keep="queue", seed=[1, 2], batcher=batchers, request_rate=[3, 14]
    )
    plain = sim.sweep(token_engine(), 60, progress=False, seed=[1, 2], batcher=batchers, request_rate=[3, 14])
    xr.testing.assert_allclose(ds[list(plain.data_vars)], plain, rtol=1e-9)  # sums of steps may round otherwise
    assert ds.time.attrs["units"] == "s"
    for place in np.ndindex(2, 2, 2):
        one = ds.isel(seed=place[0], batcher=place[1], request_rate=place[2])
        alone = token_engine(batchers[place[1]], one.request_rate.item())
        load = msgspec.structs.replace(alone.load_generator, seed=one.seed.item())
        steps = msgspec.structs.replace(alone, load_generator=load).run(60).steps
        step = np.searchsorted(steps.time.values, ds.time.values, side="right") - 1
        np.testing.assert_array_equal(one.queue_size, np.where(step < 0, 0, steps.queue_size.values[step]))


def test_queues_of_the_token_model_grow_above_what_the_engine_holds():
    ds = sim.queue_growth(token_engine(), 60, 3000, progress=False, request_rate=[4, 8, 9.5], seed=range(3))
    assert ds.grows.values.tolist() == [False, False, True]
    for run, limit in (("short", 60), ("long", 3000)):  # both of the same requests
        alone = sim.sweep(token_engine(), limit, progress=False, request_rate=[4, 8, 9.5], seed=range(3))
        np.testing.assert_array_equal(ds.e2e.sel(run=run), alone.e2e)
    text = growth_table(ds)
    assert "60 s, median" in text
    assert "3,000 s, median" in text
    assert "tick" not in text
    figure = plot.queue_growth(ds)
    assert [axis.get_title() for axis in figure.axes] == ["stable queues", "growing queues"]
    assert figure.axes[0].get_xlabel() == "time [s]"


def test_a_closed_loop_never_grows_however_long_its_queue():
    load = sim.ConcurrentLoadGenerator(**COMMON)
    ds = sim.queue_growth(engine(load), 100, 5_000, progress=False, target_concurrency=[1, 10, 500])
    assert ds.final_queue.sel(run="long").values.tolist() == [0, 6, 496]
    assert not ds.grows.any()


def test_a_dataset_of_it_is_written_and_read_back(tmp_path):
    load = sim.PoissonLoadGenerator(**COMMON)
    ds = sim.queue_growth(engine(load), 50, 500, progress=False, request_rate=[0.1, 0.9], seed=range(3))
    ds.to_netcdf(tmp_path / "growth.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "growth.nc") as read:
        xr.testing.assert_identical(read.load(), ds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short": 100, "long": 100}, "must be > short"),
        ({"short": 0}, "short must be > 0"),
        ({"stream_offset": [1, 2]}, "stream_offset can't be given here"),
        ({"warmup": 5}, "warmup can't be given here"),
        ({"keep": "requests"}, "keep can't be given here"),
        ({"short": [1, 2]}, "short must be a number"),
        ({"max_batch_size": xr.DataArray([1, 2], dims="seed")}, "dimension 'seed' must have another name"),
        ({"request_rte": [1]}, "unknown axis 'request_rte'; did you mean request_rate"),
    ],
)
def test_mistakes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sim.queue_growth(engine(sim.PoissonLoadGenerator()), progress=False, **arguments)
