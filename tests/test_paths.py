"""Where requests of a disaggregated fleet went, and what their time to first token was made of."""

import numpy as np
import pytest

import vecsim as sim
from vecsim.transfer import KVTransfer

POOL = sim.Pool(
    workers=2,
    max_batch_size=8,
    step_time=sim.LinearStepTime(base=2e-3, per_prefill_token=2e-5),
    kv_cache=sim.KVCache(blocks=600, block_size=16),
)
LOAD = sim.PoissonLoadGenerator(
    request_rate=9.0,
    requests=300,
    prompt_tokens=sim.LogNormal(mean=600, std=600),
    output_tokens=sim.LogNormal(mean=60, std=60),
    seed=5,
)


def run(**fields):
    return sim.DisaggregatedEngine(
        **{
            "prefill": POOL,
            "decode": POOL,
            "load_generator": LOAD,
            "transfer": KVTransfer(bandwidth=1e9, fabric_bandwidth=1.5e9, kv_bytes_per_token=131_072, latency=0.002),
            "overheads": sim.Overheads(before_queue=1e-3, per_output_token=1e-4),
            **fields,
        }
    ).run()


@pytest.mark.parametrize("reserve", ["arrival", "prefill"])
@pytest.mark.parametrize("first_token", ["prefill", "decode"])
@pytest.mark.parametrize("router", [None, sim.RoundRobinRouter()])
@pytest.mark.parametrize("local", [None, sim.QueueAndLengthRule(max_local_prefill_length=300)])
def test_parts_add_up_to_the_time_to_first_token(reserve, first_token, router, local):
    result = run(reserve=reserve, first_token=first_token, prefill_router=router, local_prefill=local)
    requests, parts = result.requests, result.ttft_parts
    total = 0.0
    for part in parts.values:
        total = total + part
    np.testing.assert_array_equal(total, (requests.first_token_at - requests.arrived_at).values)
    assert float(parts.min()) > -1e-12
    local_ones = requests.remote.values == 0
    assert local_ones.any() == (local is not None)
    assert (parts.sel(part="transfer").values[local_ones] == 0).all()
    if first_token == "decode":
        assert (parts.sel(part="transfer").values[~local_ones] > 0.002).all()


def test_links_move_what_requests_need_and_never_more_than_their_bandwidth():
    result = run()
    links, requests = result.links, result.requests
    np.testing.assert_array_equal(requests.transfer_bytes, 131_072.0 * requests.prompt_tokens * (requests.remote == 1))
    assert float(links.moved.sel(link="fabric")) == pytest.approx(float(requests.transfer_bytes.sum()))
    for kind, worker in (("source", requests.prefill_worker), ("destination", requests.worker)):
        moved = np.bincount(worker, requests.transfer_bytes, 4)
        for number in np.unique(worker):
            assert float(links.moved.sel(link=f"{kind} {number}")) == pytest.approx(moved[number])
    assert (links.moved / links.bandwidth <= links.busy * (1 + 1e-9)).all()


def test_workers_did_together_what_the_fleet_did():
    roomy = sim.Pool(workers=2, max_batch_size=8, step_time=POOL.step_time)  # nothing is computed twice
    result = run(prefill=roomy, decode=roomy)
    workers, metrics = result.workers, result.metrics
    assert float(workers.busy.sum()) == pytest.approx(float(result.steps.duration.sum()))
    assert int(workers.steps.sum()) == int(metrics.steps)
    assert float(workers.prefill_tokens[:2].sum()) == float(result.requests.prompt_tokens.sum())
    assert float(workers.prefill_tokens[2:].sum()) == 0
    assert (workers.utilization <= 1).all()


def test_what_is_not_there_is_refused():
    engine = sim.Engine(
        max_batch_size=4, load_generator=LOAD, batcher=sim.TokenBudgetBatcher(), step_time=POOL.step_time
    ).run()
    with pytest.raises(ValueError, match="workers are there for fleets"):
        _ = engine.workers
    with pytest.raises(ValueError, match="transfer_parts are there for a DisaggregatedEngine"):
        _ = sim.Cluster(pool=POOL, load_generator=LOAD).run().transfer_parts


def test_pictures_show_transfers_and_parts():
    one = run(first_token="decode")
    workers = one.plot().axes[0]
    lines = workers.collections[-1].get_segments()
    assert len(lines) == 300
    np.testing.assert_allclose(
        lines[7], [[one.requests[at][7] for at in pair] for pair in (
            ("transfer_began_at", "prefill_worker"), ("transfer_noticed_at", "worker"))]
    )  # fmt: skip
    figure = sim.plot.ttft_parts(one, run())
    assert len(figure.axes) == 2
    ends = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
    ttft = np.sort((one.requests.first_token_at - one.requests.arrived_at).values)
    assert max(ends) == pytest.approx(ttft[-3:].mean())
    with pytest.raises(ValueError, match="runs must be one or more"):
        sim.plot.ttft_parts()
