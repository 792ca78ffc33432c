"""Published figures and another simulator's results, to the printed digit."""

import json

import numpy as np
import pytest
from cases import GOLDEN, PUBLISHED, PUBLISHED_LONG, golden_engine, published_engine


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: "-".join(map(str, case[:4])))
def test_published_short_runs_are_met_to_the_printed_digit(case):
    batcher, load, value, chunks, e2e, ttft, itl, requests, tokens, final_queue, end_time = case
    run = published_engine(batcher, load, value, chunks).run(time_limit=100)
    m = run.metrics
    assert round(float(m.e2e.sel(stat="mean")), 2) == e2e
    assert round(float(m.ttft.sel(stat="mean")), 2) == ttft
    assert round(float(m.itl.sel(stat="mean")), 2) == itl
    assert round(float(m.request_throughput), 2) == requests
    assert round(float(m.token_throughput), 2) == tokens
    assert int(m.final_queue) == final_queue
    assert float(m.end_time) == end_time
    text = str(run)
    assert f"Average E2E Latency: {e2e:.2f}\n" in text
    assert f"Tokens/(1K ticks)/instance = {tokens:.2f}\n" in text


@pytest.mark.parametrize("case", PUBLISHED_LONG, ids=lambda case: case[0])
def test_published_long_runs_are_met_to_the_printed_digit(case):
    load, value, final_queue, ttft, e2e, requests, tokens = case
    m = published_engine("one_prefill", load, value, 2).run(time_limit=10_000).metrics
    assert int(m.final_queue) == final_queue
    assert round(float(m.ttft.sel(stat="mean")), 2) == ttft
    assert round(float(m.e2e.sel(stat="mean")), 2) == e2e
    assert round(float(m.request_throughput), 2) == requests
    assert round(float(m.token_throughput), 2) == tokens


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_case_is_met_exactly(case):
    run = golden_engine(case["config"]).run(time_limit=case["config"]["time_limit"])
    m, expect = run.metrics, case["expect"]

    for name, key in [
        ("completed", "n_completed"),
        ("first_tokens", "n_first_tokens"),
        ("itl_samples", "n_itl"),
        ("final_queue", "final_queue"),
        ("max_queue", "max_queue"),
        ("steps", "n_steps"),
        ("end_time", "end_time"),
    ]:
        assert m[name].item() == expect[key], name

    means = {
        "e2e_mean": m.e2e.sel(stat="mean"),
        "ttft_mean": m.ttft.sel(stat="mean"),
        "itl_mean": m.itl.sel(stat="mean"),
        "requests_per_1k_ticks": m.request_throughput,
        "tokens_per_1k_ticks": m.token_throughput,
        "mean_queue": m.mean_queue,
    }
    for key, value in means.items():
        wanted = np.nan if expect[key] is None else expect[key]
        np.testing.assert_allclose(float(value), wanted, rtol=1e-12, err_msg=key)

    requests = expect["requests"]
    n = len(requests["output_len"])
    ours = run.requests.isel(request=slice(n))
    assert ours.output_tokens.values.tolist() == requests["output_len"]
    for name in ("enqueued_at", "started_at", "first_token_at", "completed_at"):
        wanted = np.array(requests[name], dtype=float)  # null becomes NaN
        np.testing.assert_array_equal(ours[name].values, wanted, err_msg=name)
    if n < 400:
        assert run.requests.sizes["request"] == n


@pytest.mark.data
def test_the_copied_golden_cases_are_those_of_the_data_folder(data_folder):
    assert json.loads((data_folder / "golden" / "tick-cases.json").read_text()) == GOLDEN
