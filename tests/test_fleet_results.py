"""What is told of a fleet's run: the way of each request, the parts of its time to first token, workers and links."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim import plot
from vecsim.paths import HOPS, TOGETHER, exact_parts, first_token_moments
from vecsim.sweep.report import table
from vecsim.variables import PARTS

STEP_TIME = sim.LinearStepTime(base=2e-3, per_request=1e-4, per_prefill_token=2e-5)
TRANSFER = sim.KVTransfer(
    bandwidth=1e9,
    fabric_bandwidth=1.5e9,
    kv_bytes_per_token=131_072,
    latency=1e-3,
    layers=8,
    descriptor_cost=2e-6,
    polling=1e-3,
)


def pool(blocks=600, **fields):
    cache = sim.KVCache(blocks=blocks, block_size=16, prefix_caching=True)
    return sim.Pool(**{"workers": 2, "max_batch_size": 8, "step_time": STEP_TIME, "kv_cache": cache, **fields})


def load(**fields):
    return sim.PoissonLoadGenerator(
        **{
            "request_rate": 20.0,
            "requests": 60,
            "prompt_tokens": sim.LogNormal(mean=600, std=600),
            "output_tokens": sim.LogNormal(mean=40, std=60),
            "prefix": sim.SharedPrefix(tokens=128, groups=3),
            **fields,
        }
    )


def apart(**fields):
    usual = {"prefill": pool(), "decode": pool(), "load_generator": load(), "transfer": TRANSFER}
    return sim.DisaggregatedEngine(**{**usual, **fields})


@pytest.fixture(scope="module")
def run():
    return apart(first_token="decode", overheads=sim.Overheads(before_queue=1e-3, per_output_token=1e-4)).run()


@pytest.fixture(scope="module")
def cluster():
    return sim.Cluster(pool=pool(), load_generator=load()).run()


def check_parts(parts, total):
    """They are what the whole is, to the last bit and in any order, and none is below 0."""
    whole = total.values
    there = np.isfinite(whole)
    values = parts.values
    assert (np.isnan(values) == ~there).all()
    assert (values[:, there] >= 0).all()
    for order in (range(len(values)), range(len(values))[::-1]):
        added = np.zeros(whole.size)
        for part in order:
            added = added + values[part]
        np.testing.assert_array_equal(added[there], whole[there])


TRANSFERS = [
    None,
    TRANSFER,
    sim.KVTransfer(bandwidth=3e8, kv_bytes_per_token=131_072, latency=5e-3, layers=8, overlap="layers", polling=5e-3),
    sim.KVTransfer(
        kv_bytes_per_token=131_072,
        latency=1e-3,
        layers=8,
        merges_blocks=True,
        descriptor_cost=4e-6,
        transpose=True,
        hbm_bandwidth=2e12,
    ),
]
OVERHEADS = [
    sim.Overheads(),
    sim.Overheads(before_queue=3e-3, per_output_token=1e-4, at_completion=1e-3),
    sim.Overheads(per_output_token=0.7),
]


@settings(max_examples=40, deadline=None)
@given(
    reserve=st.sampled_from(["arrival", "prefill"]),
    first_token=st.sampled_from(["prefill", "decode"]),
    prefill_router=st.sampled_from([None, sim.RoundRobinRouter(), sim.LeastOutstandingRouter()]),
    local_prefill=st.sampled_from([None, sim.QueueAndLengthRule(max_local_prefill_length=300), sim.PrefillLoadRule()]),
    transfer=st.sampled_from(range(len(TRANSFERS))),
    overheads=st.sampled_from(OVERHEADS),
    blocks=st.sampled_from([350, 600, 5000]),
    request_rate=st.sampled_from([5.0, 40.0]),
    seed=st.integers(0, 2**31),
    time_limit=st.sampled_from([None, 1.5]),
)
def test_parts_add_up_and_what_happens_later_is_later(
    reserve, first_token, prefill_router, local_prefill, transfer, overheads, blocks, request_rate, seed, time_limit
):
    engine = apart(
        reserve=reserve,
        first_token=first_token,
        prefill_router=prefill_router,
        local_prefill=local_prefill,
        transfer=TRANSFERS[transfer],
        overheads=overheads,
        prefill=pool(blocks),
        decode=pool(blocks, max_batch_size=4),
        load_generator=load(request_rate=request_rate, seed=seed),
    )
    result = engine.run(time_limit)
    requests, metrics = result.requests, result.metrics
    check_parts(result.ttft_parts, requests.first_token_at - requests.arrived_at)
    check_parts(result.transfer_parts, requests.transfer_time)
    # Nothing is hidden by what makes the parts exact
    moments = first_token_moments(requests, engine.overheads, first_token == "prefill")
    moments = np.concatenate([requests.arrived_at.values[np.newaxis], moments])
    assert np.nanmin(np.diff(moments, axis=0), initial=0.0) > -1e-9
    if reserve == "prefill":
        at = [
            "arrived_at", "prefill_queued_at", "prefill_sent_at", "started_at", "prefilled_at", "reserved_at",
            "transfer_began_at", "flow_began_at", "flow_ended_at", "transfer_noticed_at", "decode_started_at",
        ]  # fmt: skip
    else:
        at = ["arrived_at", "reserved_at", "prefill_queued_at", "prefill_sent_at", "started_at", "prefilled_at"]
        at += ["transfer_began_at", "flow_began_at", "flow_ended_at", "transfer_noticed_at", "decode_started_at"]
    remote = requests.remote.values == 1
    for before, after in itertools.pairwise(at):
        assert not (requests[after].values < requests[before].values)[remote].any(), (before, after)
    assert np.nanmin(requests.hop_time.values, initial=0.0) > -1e-9
    # Means of all requests are those that sweeps have
    np.testing.assert_allclose(metrics.ttft_parts, result.ttft_parts.mean("request"), rtol=1e-9, atol=1e-12)
    first = np.isfinite(requests.first_token_at.values)
    assert float(metrics.remote_share) == pytest.approx(remote[first].mean() if first.any() else np.nan, nan_ok=True)
    moved = requests.transfer_time.values[first & np.isfinite(requests.transfer_time.values)]
    assert float(metrics.transfer_time) == pytest.approx(moved.mean() if moved.size else np.nan, nan_ok=True)
    # No link moves more than it could in the time that it was busy
    links = result.links
    limited = np.isfinite(links.bandwidth.values)
    with np.errstate(invalid="ignore"):
        needed = (links.moved / links.bandwidth).values[limited]
    assert (needed <= links.busy.values[limited] * (1 + 1e-9)).all()
    assert (links.busy <= metrics.end_time * (1 + 1e-12)).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=12), st.floats(0, 1e9))
def test_parts_of_any_moments_are_exact(gaps, begin):
    moments = (begin + np.cumsum(gaps))[:, np.newaxis]
    parts = exact_parts(np.array([begin]), moments)[:, 0]
    assert (parts >= 0).all()
    rng = np.random.default_rng(len(gaps))
    for _ in range(3):
        assert sum(rng.permutation(parts).tolist(), 0.0) == moments[-1, 0] - begin
    spacing = np.spacing(moments[-1, 0])
    np.testing.assert_allclose(parts[:1], moments[0] - begin, rtol=0, atol=spacing)


def test_a_transfer_is_made_of_what_was_declared(run):
    requests, parts = run.requests, run.transfer_parts
    there = requests.transfer_bytes.values > 0
    blocks = -(-(requests.prompt_tokens - requests.hit_tokens) // 16)
    np.testing.assert_array_equal(requests.transfer_runs, blocks)
    np.testing.assert_allclose(parts.sel(part="set-up"), 1e-3 + 2e-6 * 16 * blocks, rtol=1e-9)
    assert (parts.sel(part="flow").values[there] >= (requests.transfer_bytes.values / 1e9)[there] * (1 - 1e-9)).all()
    assert (parts.sel(part="polling") <= 1e-3 * (1 + 1e-9)).all()
    assert (parts.sel(part="transpose") == 0).all()


def test_a_request_alone_waits_for_nothing():
    one = sim.TraceLoadGenerator(arrived_at=[0.0, 50.0], prompt_tokens=[1000, 1000], output_tokens=[5, 5])
    parts = apart(load_generator=one, first_token="decode").run().ttft_parts
    for part in PARTS:
        waits = part.startswith("wait") or part in ("before routing", "until seen")
        assert (parts.sel(part=part) < 1e-12 if waits else parts.sel(part=part) > 1e-4).all(), part
    np.testing.assert_allclose(parts.sel(part="prefill"), 2e-3 + 1e-4 + 2e-5 * 1000, rtol=1e-9)
    np.testing.assert_allclose(parts.sel(part="first decode step"), 2e-3 + 1e-4, rtol=1e-9)


def test_workers_did_together_what_the_fleet_did(run, cluster):
    for result in (run, cluster):
        workers, metrics, requests = result.workers, result.metrics, result.requests
        assert int(workers.steps.sum()) == int(metrics.steps)
        hit_rate = workers.hit_tokens.sum() / workers.prompt_tokens.sum()
        assert float(hit_rate) == pytest.approx(float(metrics.prefix_hit_rate))
        assert 0 < float(hit_rate) < 1
        hops = 1 if result is cluster else 2
        assert int(workers.requests.sum()) == hops * requests.sizes["request"]
        assert float(workers.max_queue.max()) == float(metrics.max_queue)
        assert float(workers.kv_peak.max()) == pytest.approx(float(metrics.kv_peak), abs=1e-3)
        over_time = result.workers_over_time(50)
        assert over_time.sizes == {"worker": workers.sizes["worker"], "time": 50}
        width = float(metrics.end_time) / 50
        np.testing.assert_allclose(over_time.utilization.sum("time") * width, workers.busy)
        slot_time = float(over_time.running.sum() * width)
        slots = result.engine.max_batch_size * float(metrics.end_time)
        assert slot_time / slots == pytest.approx(float(metrics.utilization))
        assert (over_time.utilization <= 1 + 1e-9).all()


def test_links_tell_how_many_transfers_they_had(run):
    links, requests = run.links, run.requests
    fabric = links.sel(link="fabric")
    assert int(fabric.transfers) == int((requests.transfer_bytes > 0).sum())
    assert float(fabric.moved) == pytest.approx(float(requests.transfer_bytes.sum()))
    moved = requests.transfer_bytes.values > 0
    assert float(fabric.mean_transfer_time) == pytest.approx(requests.transfer_time.values[moved].mean())
    sides = links.transfers.values[:-1]
    assert sides[:2].sum() == sides[2:].sum() == int(fabric.transfers)
    at_once = apart(transfer=None).run().links
    assert (at_once.busy == 0).all()


def test_a_cluster_has_the_parts_of_an_engine(cluster):
    requests, parts = cluster.requests, cluster.ttft_parts
    assert tuple(parts.part.values) == TOGETHER
    check_parts(parts, requests.first_token_at - requests.arrived_at)
    np.testing.assert_allclose(parts.sel(part="wait for prefill"), requests.started_at - requests.arrived_at)
    assert "ttft_parts" not in cluster.metrics
    alone = sim.Engine(load_generator=load(), step_time=STEP_TIME, batcher=sim.TokenBudgetBatcher()).run()
    check_parts(alone.ttft_parts, alone.requests.first_token_at - alone.requests.arrived_at)
    ticks = sim.Engine(load_generator=sim.BatchLoadGenerator(initial_batch=3)).run(20)
    with pytest.raises(ValueError, match="ttft_parts are there for runs in seconds"):
        _ = ticks.ttft_parts
    with pytest.raises(ValueError, match="links are there for a DisaggregatedEngine"):
        _ = cluster.links
    with pytest.raises(ValueError, match="intervals must be a whole number >= 1, got 0"):
        cluster.workers_over_time(0)


def test_all_that_is_told_has_units_and_survives_a_file(run, tmp_path):
    for data in (run.requests, run.workers, run.workers_over_time(), run.links, run.metrics):
        for name in data.data_vars:
            assert {"long_name", "units"} <= set(data[name].attrs), name
        data.to_netcdf(tmp_path / "data.nc")
    assert tuple(run.requests.hop.values) == HOPS


@pytest.fixture(scope="module")
def swept():
    classes = [sim.RequestClass(name="chat"), sim.RequestClass(name="batch", share=2)]
    engine = apart(load_generator=load(classes=classes), first_token="decode")
    return sim.sweep(engine, request_rate=[5.0, 20.0], reserve=["arrival", "prefill"], seed=range(2), progress=False)


def test_a_sweep_has_the_means_of_the_parts_beside_those_of_classes(swept):
    assert swept.ttft_parts.dims == ("request_rate", "reserve", "seed", "part")
    np.testing.assert_allclose(swept.ttft_parts.sum("part"), swept.ttft.sel(stat="mean"))
    np.testing.assert_array_equal(swept.remote_share, 1.0)
    assert (swept.transfer_time > 1e-3).all()
    np.testing.assert_array_equal(swept.class_completed.sum("class"), swept.completed)
    assert (swept.ttft_parts.sel(reserve="prefill", part="wait for decode blocks") == 0).all()


def test_bars_are_as_long_as_the_parts(run, cluster, swept):
    figure = plot.ttft_parts(run, cluster, labels=["apart", "together"])
    top, _ = figure.axes
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["apart", "together"]
    assert next(text.get_text() for text in top.get_yticklabels()) == "faster half"
    ttft = np.sort((run.requests.first_token_at - run.requests.arrived_at).values)
    ends = [bar.get_x() + bar.get_width() for bar in top.patches]
    assert max(ends) == pytest.approx(ttft[54:].mean())
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [part for part in PARTS if part in names]
    assert {"prefill", "transfer"} <= set(names)
    panels = plot.ttft_parts(swept).axes
    assert [axis.get_title(loc="left") for axis in panels] == ["request rate 5", "request rate 20"]
    assert [[text.get_text() for text in axis.get_yticklabels()] for axis in panels] == 2 * [["arrival", "prefill"]]
    ends = max(bar.get_x() + bar.get_width() for axis in panels for bar in axis.patches)
    (alone,) = plot.ttft_parts(swept.isel(reserve=0)).axes
    assert alone.get_title(loc="left") == "all requests served; means over 2 seeds"
    assert [text.get_text() for text in alone.get_yticklabels()] == ["request rate 5", "request rate 20"]
    assert ends == pytest.approx(float(swept.ttft.sel(stat="mean").mean("seed").max()))
    by_class = plot.ttft_parts(run, by="class").axes[0]
    assert [text.get_text() for text in by_class.get_yticklabels()] == ["all requests"]
    assert table(swept).count("\n") > 3  # neither classes nor parts make rows
    assert plot.lines(swept).axes[0].lines
    for name, lines in (("ttft_parts", 7), ("class_goodput", 2)):  # as many as there are colours
        assert (
            len(
                {
                    line.get_color()
                    for axis in plot.lines(swept.isel(reserve=0), variables=name).axes
                    for line in axis.lines
                }
            )
            == lines
        )
    with pytest.raises(ValueError, match="variables must all be over part or none of them, got ttft, ttft_parts"):
        plot.lines(swept, variables=["ttft", "ttft_parts"])
    with pytest.raises(ValueError, match='by must be "rank" or "class"'):
        plot.ttft_parts(run, by="size")
    with pytest.raises(ValueError, match="dataset must be the only one, got 2"):
        plot.ttft_parts(swept, run)


def test_the_picture_of_a_run_has_a_line_for_each_transfer(run):
    workers = run.plot().axes[0]
    (lines,) = workers.collections
    segments = lines.get_segments()
    assert len(segments) == int(np.isfinite(run.requests.transfer_noticed_at).sum())
    requests = run.requests
    for number in (0, 17):
        np.testing.assert_allclose(
            segments[number],
            [
                [requests.transfer_began_at[number], requests.prefill_worker[number]],
                [requests.transfer_noticed_at[number], requests.worker[number]],
            ],
        )
    assert "transfer" in [text.get_text() for text in run.plot().legends[0].get_texts()]
