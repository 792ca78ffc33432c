"""Every picture is drawn: right axes, right labels, as many lines as there are combinations, not blank."""

import io

import matplotlib.image
import numpy as np
import xarray as xr

import vecsim as sim
from vecsim import plot
from vecsim.sweep.report import texts

ENGINE = sim.Engine(load_generator=sim.RequestRateLoadGenerator(target_output_len_tokens=8))
BATCHERS = [sim.StaticBatcher(), sim.IFBatcher(), sim.IFBatcherWithOnePrefillOnly()]


def pixels(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=60)
    buffer.seek(0)
    return matplotlib.image.imread(buffer)


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
        "batcher", "StaticBatcher", "IFBatcher", "IFBatcherWithOnePrefillOnly", "total prefill chunks", "1", "2",
    ]  # fmt: skip
    image = pixels(figure)
    assert image.std() > 0.05


def test_other_loads_and_more_axes_are_drawn_too():
    engine = sim.Engine(load_generator=sim.ConcurrentLoadGenerator(target_output_len_tokens=8))
    ds = sim.sweep(
        engine, 200, progress=False, target_concurrency=[1, 4, 16], batcher=BATCHERS, total_prefill_chunks=[1, 2],
        prefill_time=[1, 3],
    )  # fmt: skip
    figure = plot.sweep(ds)
    assert figure.axes[0].get_xlabel() == "target concurrency [requests]"
    assert "prefill_time=1" in figure.get_suptitle()
    assert len(figure.axes[0].lines) == 6


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
    figure = plot.sweep(ds)
    assert len(figure.axes[0].lines) == 49
    assert "7 of 29 values of max_batch_size; 7 of 8 values of total_prefill_chunks" in figure.get_suptitle()
    styles = {(line.get_color(), str(line.get_linestyle()), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(styles) == 49


def test_nothing_completed_draws_without_a_warning_and_says_so():
    figure = plot.sweep(sim.sweep(ENGINE, 3, progress=False, request_rate=[0.1, 0.2], seed=range(3)))
    assert [text.get_text() for text in figure.axes[1].texts] == ["no request has a first token"]
    assert pixels(figure).std() > 0.01


def test_a_sweep_without_numbers_is_drawn_as_points():
    figure = plot.sweep(sim.sweep(ENGINE, 50, progress=False, batcher=BATCHERS, seed=range(3)))
    assert len(figure.axes[0].containers) == 3
    assert pixels(figure).std() > 0.01
