"""Every picture of a sweep is drawn: right axes, right labels, as many artists as there are combinations, not blank."""

import numpy as np
import pytest
import xarray as xr
from pictures import pixels

import vecsim as sim
from vecsim import plot
from vecsim.sweep.report import texts

ENGINE = sim.Engine(load_generator=sim.RequestRateLoadGenerator(target_output_len_tokens=8))
BATCHERS = [sim.StaticBatcher(), sim.IFBatcher(), sim.IFBatcherWithOnePrefillOnly()]


def test_a_sweep_is_drawn_with_a_line_for_each_combination_and_a_band_over_seeds():
    ds = sim.sweep(
        ENGINE, 400, progress=False, batcher=BATCHERS, total_prefill_chunks=[1, 2],
        request_rate=np.linspace(0.05, 0.5, 6), seed=range(4),
    )  # fmt: skip
    figure = plot.sweep(ds)
    left, right = figure.axes
    assert left.get_xlabel() == right.get_xlabel() == "request rate [requests per tick]"
    assert left.get_ylabel() == "token throughput [tokens per 1000 ticks]"
    assert right.get_ylabel() == "p99 time to first token [ticks]"
    assert right.get_yscale() == "log"
    for axis in figure.axes:
        assert len(axis.lines) == 6
        assert len(axis.collections) == 6
    np.testing.assert_array_equal(
        left.lines[0].get_ydata(),
        ds.token_throughput.isel(batcher=0, total_prefill_chunks=0).median("seed"),
    )
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        "batcher", "StaticBatcher", "IFBatcher", "IFBatcherWithOnePrefillOnly",
        "total prefill chunks [chunks]", "1", "2",
    ]  # fmt: skip
    image = pixels(figure)
    assert image.std() > 0.05


def test_other_loads_and_more_axes_are_drawn_too():
    engine = sim.Engine(load_generator=sim.ConcurrentLoadGenerator(target_output_len_tokens=8))
    ds = sim.sweep(
        engine, 200, progress=False, target_concurrency=[1, 4, 16], batcher=BATCHERS, total_prefill_chunks=[1, 2],
        prefill_time=[1, 3], itl=[1, 2],
    )  # fmt: skip
    figure = plot.sweep(ds)
    assert figure.axes[0].get_xlabel() == "target concurrency [requests]"
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["prefill time: 1", "", "prefill time: 3", ""]
    assert figure.axes[1].lines[0].get_ydata().max() < figure.axes[3].lines[0].get_ydata().max()
    assert "load_generator.itl=1" in figure.get_suptitle()
    assert all(len(axis.lines) == 6 for axis in figure.axes)


def test_loads_that_grow_by_multiples_are_drawn_on_a_logarithmic_scale():
    for rates, scale in (([0.01, 0.03, 0.1, 0.3], "log"), (np.linspace(0.05, 0.6, 56), "linear")):
        figure = plot.sweep(sim.sweep(ENGINE, 100, progress=False, request_rate=rates))
        assert {axis.get_xscale() for axis in figure.axes} == {scale}


def test_a_shared_dimension_is_drawn_along_the_load_and_named_by_its_axes_elsewhere():
    rates = xr.DataArray([0.3, 0.1], dims="size")
    slots = xr.DataArray([4, 2], dims="size")
    ds = sim.sweep(ENGINE, 200, progress=False, request_rate=rates, max_batch_size=slots, batcher=BATCHERS)
    figure = plot.sweep(ds)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [0.1, 0.3])
    assert texts(ds, "size") == ["request_rate=0.3, max_batch_size=4", "request_rate=0.1, max_batch_size=2"]


def test_more_values_than_colours_are_thinned_out_and_said_to_be():
    ds = sim.sweep(
        ENGINE,
        50,
        progress=False,
        max_batch_size=range(1, 30),
        total_prefill_chunks=range(1, 9),
        request_rate=[0.1, 0.2],
    )
    figure = plot.lines(ds)
    assert len(figure.axes[0].lines) == 49
    assert "7 of 29 values of max_batch_size; 7 of 8 values of total_prefill_chunks" in figure.get_suptitle()
    styles = {(line.get_color(), str(line.get_linestyle()), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(styles) == 49


def test_nothing_completed_draws_without_a_warning_and_says_so():
    figure = plot.sweep(sim.sweep(ENGINE, 3, progress=False, request_rate=[0.1, 0.2], seed=range(3)))
    assert [text.get_text() for text in figure.axes[1].texts] == ["no value of ttft"]
    assert pixels(figure).std() > 0.01


def test_a_sweep_without_numbers_is_drawn_as_points():
    figure = plot.sweep(sim.sweep(ENGINE, 50, progress=False, batcher=BATCHERS, seed=range(3)))
    assert len(figure.axes[0].containers) == 3
    assert pixels(figure).std() > 0.01


def test_the_best_picture_is_chosen_from_the_dims():
    rates, few, many = np.linspace(0.1, 0.5, 4), [1, 2], range(1, 10)

    def kind(**axes):
        figure = plot.sweep(sim.sweep(ENGINE, 100, progress=False, **axes))
        return "lines" if figure.axes[0].lines else "map" if figure.axes[0].collections else "points"

    assert kind(request_rate=rates, total_prefill_chunks=few, batcher=BATCHERS) == "lines"
    assert kind(max_batch_size=many) == "lines"
    assert kind(max_batch_size=many, total_prefill_chunks=few) == "lines"
    assert kind(request_rate=rates, max_batch_size=many) == "map"
    assert kind(max_batch_size=many, total_prefill_chunks=[1, 2, 3, 4]) == "map"


def test_a_heat_map_has_a_row_for_each_variable_and_a_column_for_each_batcher():
    ds = sim.sweep(
        ENGINE, 400, progress=False, max_batch_size=range(1, 10), batcher=BATCHERS,
        request_rate=np.linspace(0.05, 0.6, 12), seed=range(3),
    )  # fmt: skip
    figure = plot.sweep(ds)
    maps, bars = figure.axes[:6], figure.axes[6:]
    assert [axis.get_title() for axis in maps[:3]] == [f"batcher: {name}" for name in ds.batcher.values]
    assert {axis.get_xlabel() for axis in maps[3:]} == {"request rate [requests per tick]"}
    assert maps[0].get_ylabel() == "max batch size [slots]"
    assert [bar.get_ylabel() for bar in bars] == [
        "token throughput [tokens per 1000 ticks]", "p99 time to first token [ticks]",
    ]  # fmt: skip
    np.testing.assert_array_equal(
        maps[1].collections[0].get_array(), ds.token_throughput.isel(batcher=1).median("seed").values
    )
    scales = [axis.collections[0].norm for axis in maps[:3]]
    assert scales[0] is scales[1] is scales[2]  # colours mean the same in all columns
    assert len(maps[1].collections) == 2  # the map, and where queues begin to grow
    assert pixels(figure).std() > 0.05


def test_a_heat_map_of_uneven_numbers_and_of_texts_names_its_places():
    ds = sim.sweep(ENGINE, 100, progress=False, max_batch_size=[1, 2, 4, 32], batcher=BATCHERS)
    axis = plot.heat_map(ds, variables=["utilization"]).axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2", "4", "32"]
    assert [text.get_text() for text in axis.get_yticklabels()] == list(ds.batcher.values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ds: plot.lines(ds, x="rate"), "x must be one of request_rate, batcher, got 'rate'"),
        (lambda ds: plot.lines(ds, x="seed"), "x must be one of request_rate, batcher, got 'seed'"),
        (lambda ds: plot.heat_map(ds, y="nope"), "y must be one of request_rate, batcher, got 'nope'"),
        (lambda ds: plot.lines(ds, variables=[]), "variables must be one or more names"),
        (lambda ds: plot.sweep(ds.ttft), "dataset must be one from vecsim.sweep or vecsim.queue_growth, got DataArray"),
        (lambda ds: plot.lines(ds, variables=["tftt"]), "variable must be one of e2e, ttft, .* got 'tftt'"),
        (lambda ds: plot.lines(ds, stat="p98"), "stat must be one of mean, .* got 'p98'"),
        (lambda ds: plot.heat_map(ds, x="batcher", y="batcher"), "x and y must be along two dimensions"),
        (
            lambda ds: plot.heat_map(ds.isel(batcher=0, drop=True)),
            "needs two axes along two dimensions: the Dataset has request_rate",
        ),
        (plot.queue_growth, "a Dataset from vecsim.queue_growth is needed"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    ds = sim.sweep(ENGINE, 50, progress=False, request_rate=[0.1, 0.2, 0.3], batcher=BATCHERS)
    with pytest.raises(ValueError, match=message):
        call(ds)


def test_stable_and_growing_queues_are_drawn_apart():
    ds = sim.queue_growth(ENGINE, 50, 1000, progress=False, request_rate=[0.1, 0.2, 0.8, 1.2], seed=range(5))
    figure = plot.sweep(ds)
    assert [axis.get_title() for axis in figure.axes] == ["stable queues", "growing queues"]
    for axis, names in zip(figure.axes, (["0.1", "0.2"], ["0.8", "1.2"]), strict=True):
        assert [text.get_text() for text in axis.get_legend().get_texts()] == names
        assert axis.get_xlabel() == "time [ticks]"
        assert axis.get_ylabel() == "queue size [requests]"
        assert len(axis.lines) == len(axis.collections) == 2
    np.testing.assert_array_equal(
        figure.axes[1].lines[0].get_ydata(), ds.queue_size.sel(request_rate=0.8).median("seed").values
    )
    assert "gains more than there are slots" in figure.get_suptitle()
    assert pixels(figure).std() > 0.05


def test_a_heat_map_of_one_row_or_over_zipped_axes_is_drawn():
    ds = sim.sweep(ENGINE, 100, progress=False, batcher=BATCHERS[:1], request_rate=[0.1, 0.2, 0.3])
    figure = plot.heat_map(ds)
    assert figure.axes[0].get_ylim() == (-0.5, 0.5)
    zipped = {name: xr.DataArray([1, 2], dims="p") for name in ("prefill_time", "max_batch_size")}
    ds = sim.sweep(ENGINE, 100, progress=False, **zipped, request_rate=[0.1, 0.2, 0.3])
    assert plot.heat_map(ds).axes[0].get_ylabel() == "prefill time [ticks]"


def test_what_varies_along_with_an_axis_is_said():
    size = {"request_rate": xr.DataArray([0.1, 0.2], dims="size"), "max_batch_size": xr.DataArray([2, 4], dims="size")}
    ds = sim.sweep(ENGINE, 100, progress=False, **size, batcher=BATCHERS)
    assert "max_batch_size varies with request_rate" in plot.lines(ds).get_suptitle()


def test_texts_stay_in_the_order_of_the_axis():
    ds = sim.sweep(ENGINE, 100, progress=False, batcher=BATCHERS, request_rate=[0.1, 0.2])
    assert plot.lines(ds, x="batcher", variables="utilization").axes[0].lines[0].get_xdata().tolist() == list(
        ds.batcher.values
    )


def test_the_thinned_queues_of_several_batchers_can_be_compared():
    axes = {"batcher": BATCHERS, "request_rate": np.linspace(0.05, 0.4, 12)}
    figure = plot.queue_growth(sim.queue_growth(ENGINE, 50, 500, progress=False, **axes))
    names = [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]
    rates = [name.partition("request_rate=")[2] for name in names]
    assert len(names) == 12
    assert {rates.count(rate) for rate in rates} == {3}
    assert "4 of 12 values of request_rate" in figure.get_suptitle()


def test_goodput_is_drawn_where_an_slo_is_declared_and_only_there():
    load = sim.PoissonLoadGenerator(prompt_tokens=100, output_tokens=10)
    step_time = sim.LinearStepTime(base=5e-3, per_request=1e-4, per_prefill_token=1e-3)
    engine = sim.Engine(load_generator=load, step_time=step_time)
    strict = sim.Engine(load_generator=load, step_time=step_time, slo=sim.SLO(ttft=0.3))
    axes = {"request_rate": [1, 4, 12], "progress": False}
    labels = ["token throughput [tokens/s]", "p99 time to first token [s]", "goodput [requests/s]"]
    assert [axis.get_ylabel() for axis in plot.sweep(sim.sweep(engine, 20, **axes)).axes] == labels[:2]
    figure = plot.sweep(sim.sweep(strict, 20, **axes))
    assert [axis.get_ylabel() for axis in figure.axes] == labels
    assert figure.axes[2].get_yscale() == "linear"
    many = plot.sweep(sim.sweep(strict, 20, max_batch_size=range(1, 9), **axes))
    assert [axis.get_ylabel() for axis in many.axes[3:]] == labels
    assert pixels(many).std() > 0.05
