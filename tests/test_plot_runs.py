"""The picture of a run shows what happened, slot for slot and tick for tick."""

import re

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from matplotlib.colors import to_rgb
from pictures import pixels

import vecsim as sim
from vecsim import plot
from vecsim.plot import interactive, runs, tokens
from vecsim.plot.style import DECODE, EMPTY, PREFILL


def batch_load(chunks):
    return sim.BatchLoadGenerator(
        initial_batch=100, total_prefill_chunks=chunks, target_output_len_tokens=10, target_output_len_std=5, seed=42
    )


RUNS = [
    sim.Engine(load_generator=batch_load(chunks), batcher=batcher).run(100)
    for batcher, chunks in (
        (sim.StaticBatcher(), 1),
        (sim.IFBatcher(), 1),
        (sim.IFBatcher(), 2),
        (sim.IFBatcherWithOnePrefillOnly(), 2),
    )
]
RUN = RUNS[-1]


@pytest.fixture(scope="module")
def large_run():
    load = sim.PoissonLoadGenerator(
        request_rate=1.2, prefill_time=0.2, target_output_len_tokens=200, target_output_len_std=100
    )
    return sim.Engine(max_batch_size=256, load_generator=load).run(10_000)


def phases(run, times):
    """What each slot does at some instants [slot, time]: 0 empty, 1 prefill, 2 decode. Request by request."""
    result = np.zeros((run.engine.max_batch_size, len(times)), int)
    names = ("slot", "started_at", "first_token_at", "completed_at")
    for slot, started, first, completed in zip(*(run.requests[name].values for name in names), strict=True):
        for j, time in enumerate(times):
            if started <= time and not completed <= time:
                result[slot, j] = 2 if first <= time else 1
    return result


def test_a_small_run_has_a_box_for_each_phase_of_each_request_and_its_number():
    figure = RUN.plot()
    top, middle, bottom = figure.axes
    started = int(RUN.metrics.started)
    prefill, decode = top.collections
    assert len(prefill.get_paths()) == started
    assert len(decode.get_paths()) == int((RUN.requests.output_tokens[:started] > 1).sum()) - int(
        RUN.requests.first_token_at[:started].isnull().sum()
    )
    numbers = [text.get_text() for text in top.texts]
    assert len(numbers) > started / 2
    assert set(numbers) <= {str(i) for i in range(started)}
    assert top.get_ylabel() == "slot"
    assert top.get_ylim() == (3.5, -0.5)
    assert middle.get_ylabel() == "queue\n[requests]"
    assert bottom.get_ylabel() == "latency\n[ticks]"
    assert bottom.get_xlabel() == "time [ticks]"
    assert {axis.get_xlim() for axis in figure.axes} == {(0.0, 100.0)}
    np.testing.assert_array_equal(middle.lines[0].get_ydata()[:-1], RUN.steps.queue_size)
    ttft, e2e = bottom.lines
    assert ttft.get_ydata().mean() == pytest.approx(52.13, abs=0.005)  # published
    assert e2e.get_ydata().mean() == pytest.approx(55.94, abs=0.005)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["empty", "prefill", "decode", "time to first token", "end-to-end latency"]
    assert pixels(figure).std() > 0.1
    np.testing.assert_array_equal(pixels(RUN.plot()), pixels(figure))


def colours(figure, times):
    """The colours of the slots' middles at some instants [slot, time, 3], off the finished picture."""
    axis = figure.axes[0]
    for text in axis.texts:
        text.set_visible(False)
    image = pixels(figure, figure.dpi)
    places = np.stack(np.meshgrid(times, np.arange(4)), -1).reshape(-1, 2)
    x, y = axis.transData.transform(places).astype(int).T
    return image[image.shape[0] - 1 - y, x, :3].reshape(4, -1, 3)


def test_boxes_and_image_show_the_phases(monkeypatch):
    times = np.arange(100) + 0.5
    expected = np.array([to_rgb(colour) for colour in (EMPTY, PREFILL, DECODE)])[phases(RUN, times)]
    boxes = RUN.plot()
    monkeypatch.setattr(runs, "MOST_BOXES", 0)
    image = RUN.plot()
    assert len(image.axes[0].images) == 1
    for figure in (boxes, image):
        np.testing.assert_allclose(colours(figure, times), expected, atol=0.01)


@settings(max_examples=30, deadline=None)
@given(strategies.engines)
def test_the_image_has_the_colour_of_each_slots_phase(engine):
    run = engine.run(12)
    end, columns, slots = float(run.metrics.end_time), 60, engine.max_batch_size
    image = runs.phase_image(runs.timeline(run), slots, end, slots, columns)
    edges = np.linspace(0, end, columns + 1)
    # Columns within which nothing changes have one phase.
    changes = np.unique(run.steps.time.values)
    still = np.searchsorted(changes, edges[:-1] + 1e-9) == np.searchsorted(changes, edges[1:] - 1e-9)
    middle = (edges[:-1] + edges[1:]) / 2
    colours = np.array([to_rgb(colour) for colour in (EMPTY, PREFILL, DECODE)])
    np.testing.assert_allclose(image[:, still], colours[phases(run, middle[still])], atol=1e-6)


def test_more_slots_than_rows_share_rows():
    run = sim.Engine(max_batch_size=10, load_generator=batch_load(1)).run(5)  # 8 ticks of prefill in every slot
    image = runs.phase_image(runs.timeline(run), 10, float(run.metrics.end_time), 3, 4)
    np.testing.assert_allclose(image, np.broadcast_to(to_rgb(PREFILL), (3, 4, 3)))


def test_a_large_run_is_an_image_of_a_few_hundred_kilobytes(large_run, tmp_path):
    figure = large_run.plot()
    assert len(figure.axes[0].images) == 1
    assert figure.axes[0].images[0].get_array().shape == (256, runs.COLUMNS, 3)
    assert len(figure.axes[1].lines[0].get_xdata()) < 10_000
    assert all(line.get_rasterized() for line in figure.axes[2].lines)
    for name in ("run.png", "run.svg"):
        figure.savefig(tmp_path / name)
        assert 50_000 < (tmp_path / name).stat().st_size < 4_000_000


def test_a_run_in_which_nothing_happens_is_drawn():
    load = sim.RequestRateLoadGenerator(request_rate=0.01)
    run = sim.Engine(load_generator=load).run(3)
    assert pixels(run.plot()).std() > 0.01
    assert run.plot(interactive=True).data


def test_several_runs_are_compared_on_one_time_axis_and_named_by_what_differs():
    figure = plot.compare(RUNS)
    assert [axis.get_title(loc="left").strip() for axis in figure.axes[:4]] == [
        "StaticBatcher, total_prefill_chunks=1",
        "IFBatcher, total_prefill_chunks=1",
        "IFBatcher, total_prefill_chunks=2",
        "IFBatcherWithOnePrefillOnly, total_prefill_chunks=2",
    ]
    told = [
        next(text.get_text() for text in axis.texts if "requests done" in text.get_text()) for axis in figure.axes[:4]
    ]
    assert [text.split()[0] for text in told] == ["19", "27", "31", "36"]
    queue, latency = figure.axes[4:]
    assert len(queue.lines) == 4
    assert len({line.get_color() for line in queue.lines}) == 4
    assert len(latency.lines) == 8
    assert len({axis.get_xlim() for axis in figure.axes}) == 1
    assert pixels(figure).std() > 0.1
    assert plot.compare(RUNS[:1], ["one"]).axes[0].get_title(loc="left").strip() == "one"
    twins = plot.compare([RUN, RUN])
    assert [axis.get_title(loc="left").strip() for axis in twins.axes[:2]] == ["1", "2"]
    with pytest.raises(ValueError, match=r"runs must be a list of what Engine\.run returns, got None among them"):
        plot.compare([RUN, None])
    with pytest.raises(ValueError, match="labels must be one for each of 2 runs, got 1"):
        plot.compare(RUNS[:2], ["one"])
    with pytest.raises(ValueError, match="runs must be 1 to 7, got 0"):
        plot.compare([])


@settings(max_examples=30, deadline=None)
@given(strategies.engines)
def test_what_is_told_under_the_pointer_is_what_happens(engine):
    run = engine.run(12)
    shown = interactive.cells(run)
    np.testing.assert_array_equal(shown.edges[:-1], run.steps.time)
    np.testing.assert_array_equal(shown.phase, phases(run, run.steps.time.values))
    np.testing.assert_array_equal(shown.queue[0], run.steps.queue_size)
    np.testing.assert_array_equal((shown.phase == 2).sum(axis=0), run.steps.decoding)
    requests = {name: run.requests[name].values for name in ("slot", "enqueued_at")}
    for slot, step in zip(*np.nonzero(shown.phase), strict=True):
        request = shown.request[slot, step]
        assert requests["slot"][request] == slot
        assert shown.latency[slot, step] == shown.edges[step] - requests["enqueued_at"][request]
        before = shown.phase[slot, step - 1] == 2 and shown.request[slot, step - 1] == shown.request[slot, step]
        if shown.phase[slot, step] == 1:
            assert shown.token[slot, step] == 0
        else:
            assert shown.token[slot, step] == (shown.token[slot, step - 1] + 1 if before else 1)


def test_a_large_run_is_sampled(large_run):
    shown = interactive.cells(large_run)
    assert shown.phase.size <= interactive.MOST_CELLS
    at = shown.at[0, ::40]
    step = np.searchsorted(large_run.steps.time.values, at, side="right") - 1
    np.testing.assert_array_equal((shown.phase[:, ::40] == 2).sum(axis=0), large_run.steps.decoding.values[step])


def test_an_interactive_picture_is_one_file_that_stands_on_its_own(large_run, tmp_path):
    figure = large_run.plot(interactive=True)
    assert [trace.type for trace in figure.data].count("heatmap") == 2
    for word in ("slot", "request", "token", "latency so far", "queue"):
        assert word in figure.data[1].hovertemplate
    assert set(np.unique(figure.data[1].text)) <= {"", "prefill", "decode"}
    assert [axis.title.text for axis in (figure.layout.yaxis, figure.layout.yaxis2, figure.layout.yaxis3)] == [
        "slot", "queue [requests]", "latency [ticks]",
    ]  # fmt: skip
    figure.write_html(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert len(page) < 12_000_000
    assert not re.search(r'<script[^>]+src="', page)


def test_a_notebook_shows_the_picture_by_itself():
    assert RUN.plot()._repr_png_().startswith(b"\x89PNG")


def token_engine(batcher=None, **fields):
    load = sim.PoissonLoadGenerator(request_rate=20, requests=300, prompt_tokens=100, output_tokens=40)
    usual = {"load_generator": load, "kv_cache": sim.KVCache(blocks=60), "max_batch_size": 16}
    step_time = sim.LinearStepTime(base=5e-3, per_request=1e-4, per_prefill_token=1e-3)
    return sim.Engine(**usual | {"batcher": batcher or sim.TokenBudgetBatcher(), "step_time": step_time} | fields)


@pytest.fixture(scope="module")
def token_run():
    return token_engine().run()


@pytest.fixture(scope="module")
def refused_run():
    load = sim.BatchLoadGenerator(initial_batch=12, prompt_tokens=1000, output_tokens=5)
    return token_engine(load_generator=load).run()


def test_the_tokens_of_a_step_are_spread_over_its_time(token_run):
    steps = token_run.steps
    edges = np.linspace(0.0, float(token_run.metrics.end_time), 5000)  # most steps are longer than a column
    decode, prefill = tokens.tokens_per_second(token_run, edges)
    for drawn, name in ((decode, "decoding"), (prefill, "prefill_tokens")):
        assert (drawn * np.diff(edges)).sum() == pytest.approx(float(steps[name].sum()))
        assert drawn.max() <= float((steps[name] / steps.duration).max()) * (1 + 1e-9)


def test_a_run_without_a_step_is_drawn_and_says_why(refused_run):
    figure = refused_run.plot()
    assert figure.axes[0].texts[0].get_text() == "no step was made: all 12 requests were refused"
    assert pixels(figure).std() > 0.01
    assert "all 12 requests were refused" in refused_run.plot(interactive=True).layout.annotations[0].text
    load = sim.RequestRateLoadGenerator(request_rate=0.01, prompt_tokens=10, output_tokens=5)
    nobody = token_engine(load_generator=load).run(3)
    assert nobody.plot().axes[0].texts[0].get_text() == "no step was made: no request arrived"


def test_a_title_tells_no_field_that_is_at_its_default():
    classes = [sim.RequestClass(name="chat", slo=sim.SLO(ttft=0.5)), sim.RequestClass(name="batch", share=2)]
    load = sim.PoissonLoadGenerator(request_rate=20, prompt_tokens=10, output_tokens=4, classes=classes)
    title = token_engine(load_generator=load).run(1).title
    assert "classes=(RequestClass(name='chat', slo=SLO(ttft=0.5)), RequestClass(name='batch', share=2.0))" in title
    assert "None" not in title


def test_runs_of_the_token_model_are_compared_in_seconds(token_run, refused_run):
    other = token_engine(sim.StaticBatcher()).run()
    figure = plot.compare([token_run, other, refused_run], ["budget", "static", "refused"])
    *batches, memory, queue, latency = figure.axes
    assert [axis.get_title(loc="left").strip() for axis in batches] == ["budget", "static", "refused"]
    assert len({axis.get_ylim() for axis in batches}) == 1  # batches can be compared by their height
    told = [text.get_text() for axis in batches for text in axis.texts]
    assert told[0].startswith("300 requests done, ")
    assert "tokens/s, mean TTFT" in told[0]
    assert told[2] == "no step was made: all 12 requests were refused"
    assert memory.get_ylabel() == "KV memory\n[%]"
    assert latency.get_ylabel() == "latency\n[s]"
    assert latency.get_xlabel() == "time [s]"
    np.testing.assert_array_equal(queue.lines[0].get_ydata()[:-1], token_run.steps.queue_size)
    assert pixels(figure).std() > 0.05
    endless = [one.run() for one in (token_engine(kv_cache=None), token_engine(kv_cache=None, max_batch_size=4))]
    assert len(plot.compare(endless).axes) == 4
    cached = plot.compare([endless[0], token_run]).axes
    assert [axis.get_title(loc="left").strip() for axis in cached[:2]] == ["kv_cache=None", "KVCache"]
    with pytest.raises(ValueError, match="runs must be of one model, got some in ticks and some in s"):
        plot.compare([token_run, RUN])


def test_another_kind_of_component_says_enough_in_a_comparison():
    labels = plot.compare([token_engine(batcher).run() for batcher in (sim.StaticBatcher(), sim.TokenBudgetBatcher())])
    assert [axis.get_title(loc="left").strip() for axis in labels.axes[:2]] == [
        "StaticBatcher", "TokenBudgetBatcher, max_num_batched_tokens=2048",
    ]  # fmt: skip


def test_what_is_told_under_the_pointer_of_the_token_model_is_what_happens(token_run, monkeypatch):
    shown, steps = interactive.batches(token_run), token_run.steps
    at = np.searchsorted(shown.edges, steps.time.values)
    for values, name in ((shown.prefilling, "prefilling"), (shown.decoding, "decoding"), (shown.queue, "queue_size")):
        np.testing.assert_allclose(values[at], steps[name], atol=1e-6)
    np.testing.assert_allclose(shown.memory[at] * 0.6, steps.kv_blocks, atol=1e-6)
    np.testing.assert_allclose(shown.prefill_tokens[at], steps.prefill_tokens / steps.duration, atol=1e-3)
    monkeypatch.setattr(interactive, "MOST_POINTS", 100)
    sampled = interactive.batches(token_run)
    assert sampled.queue.size == 50
    lengths = np.diff(sampled.edges)
    assert (sampled.decode_tokens * lengths).sum() == pytest.approx(float(steps.decoding.sum()))


def test_an_interactive_picture_of_the_token_model_stands_on_its_own(token_run, tmp_path):
    figure = token_run.plot(interactive=True)
    for word in ("prefill", "decode", "tokens/s", "queue", "KV memory"):
        assert word in figure.data[0].hovertemplate
    marks = figure.data[-1]
    assert "request %{customdata[0]}" in marks.hovertemplate
    np.testing.assert_array_equal(marks.customdata[:, 1], 100)
    assert figure.layout.xaxis5.title.text == "time [s]"
    assert figure.layout.yaxis5.title.text == "latency [s]"
    figure.write_html(tmp_path / "run.html")
    assert not re.search(r'<script[^>]+src="', (tmp_path / "run.html").read_text())
