"""Coefficients are found again from what servers with known ones do, and what can't be told is refused."""

import numpy as np
import pytest

import vecsim as sim
from vecsim import calibrate

TRUE = {"base": 6e-3, "per_request": 5e-5, "per_context_token": 1.2e-7, "per_prefill_token": 3e-5}


def served(engine):
    """The same engine with its load as a trace, and what its clients measure."""
    requests = engine.run().requests
    load = sim.TraceLoadGenerator(
        **{name: requests[name].values for name in ("arrived_at", "prompt_tokens", "output_tokens")}
    )
    arrived_at = requests.arrived_at.values
    measured = sim.Measured(
        ttft=requests.first_token_at.values - arrived_at, e2e=requests.completed_at.values - arrived_at
    )
    return load, measured


def server(load, **fields):
    return sim.presets.vllm(**{"load_generator": load, "kv_tokens": 200_000, "max_batch_size": 128, **fields})


LOAD = sim.PoissonLoadGenerator(
    request_rate=8,
    requests=3000,
    prompt_tokens=sim.LogNormal(mean=600, std=400),
    output_tokens=sim.LogNormal(mean=100, std=60),
)


def test_coefficients_of_a_server_are_found_again_within_their_own_uncertainty():
    overheads = sim.Overheads(before_queue=7e-3)
    load, measured = served(server(LOAD, step_time=sim.LinearStepTime(**TRUE), overheads=overheads))
    found = sim.fit_step_time([(server(load, step_time=sim.LinearStepTime(base=1e-2)), measured)])
    for name, value in (TRUE | {"before_queue": 7e-3}).items():
        assert abs(found.estimates[name] - value) < 3 * found.standard_errors[name] < value, name
    assert all(abs(error) < 0.01 for error in found.errors[0].values())
    assert found.engines[0].step_time == found.step_time
    assert found.engines[0].overheads.before_queue == found.estimates["before_queue"]
    assert "before_queue" in str(found)


def test_several_servers_share_what_is_fitted():
    true = {"bandwidth_efficiency": 0.8, "step_overhead": 3e-3}
    fit = sim.Fit.named("vllm-0.15-h100")
    pairs = []
    for model, tp in (("llama-3.1-8b", 1), ("codellama-34b", 2)):
        engine = sim.presets.fitted(fit, model=model, tp=tp, load_generator=LOAD, max_batch_size=128)
        known = sim.RooflineStepTime(model=model, tp=tp, **(fit.fields() | true))
        load, measured = served(sim.presets.fitted(fit, model=model, tp=tp, load_generator=LOAD, step_time=known))
        pairs.append((server(load, step_time=engine.step_time, overheads=engine.overheads), measured))
    found = sim.fit_step_time(pairs, list(true))
    for name, value in true.items():
        assert abs(found.estimates[name] - value) < 3 * found.standard_errors[name] < 0.2 * value
    assert {engine.step_time.bandwidth_efficiency for engine in found.engines} == {
        found.estimates["bandwidth_efficiency"]
    }


def a_log(steps=400, seed=0):
    rng = np.random.default_rng(seed)
    log = {
        "prefill_requests": rng.integers(0, 3, steps),
        "decode_requests": rng.integers(1, 100, steps),
    }
    log["prefill_tokens"] = log["prefill_requests"] * rng.integers(1, 600, steps)
    log["decode_context"] = log["decode_requests"] * rng.integers(100, 2000, steps)
    log["duration"] = (
        6e-3
        + 3e-5 * log["prefill_tokens"]
        + 5e-5 * log["decode_requests"]
        + 1.2e-7 * log["decode_context"]
        + 1e-3 * (log["prefill_tokens"] > 0)
    )
    return log


def test_coefficients_of_a_log_of_steps_are_found_again():
    found = sim.fit_step_time(a_log())
    expected = sim.LinearStepTime(
        base=6e-3,
        per_prefill_token=3e-5,
        per_decode_request=5e-5,
        per_context_token=1.2e-7,
        per_prefill_step=1e-3,
    )
    np.testing.assert_allclose(found.step_time.coefficients(), expected.coefficients(), rtol=1e-6, atol=1e-15)
    noisy = a_log()
    noisy["duration"] = noisy["duration"] * (1 + 0.03 * np.random.default_rng(1).standard_normal(400))
    found = sim.fit_step_time(noisy)
    for name, value in found.estimates.items():
        assert abs(value - getattr(expected, name)) < 4 * found.standard_errors[name]


LINEAR = sim.LinearStepTime(base=1e-2)
ROOFLINE = sim.RooflineStepTime(model="llama-3.1-8b", gpu="h100")
TWO = sim.TraceLoadGenerator(arrived_at=[0, 1], prompt_tokens=[9, 9], output_tokens=[5, 5])
SEEN = sim.Measured(ttft=[0.1, 0.1], e2e=[0.2, 0.2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sim.Measured(ttft=[1.0], e2e=[0.5]), "ttft must be > 0 and at most e2e, got 1 and 0.5 of request 0"),
        (lambda: sim.Measured(ttft=[np.nan], e2e=[1.0]), "one request or more that didn't fail, got none"),
        (lambda: sim.Measured(ttft=[1.0], e2e=[2.0], stage=[-1]), "stage must be a whole number >= 0"),
        (lambda: sim.fit_step_time([]), "measured must be one (engine, measured) or more, got none"),
        (lambda: sim.fit_step_time([server(TWO, step_time=LINEAR)]), "measured must be pairs (Engine, Measured)"),
        (
            lambda: sim.fit_step_time([(server(LOAD, step_time=LINEAR), SEEN)]),
            "engine must have a trace for its load, got PoissonLoadGenerator",
        ),
        (
            lambda: sim.fit_step_time([(server(TWO, step_time=LINEAR), sim.Measured(ttft=[0.1], e2e=[0.2]))]),
            "measured must be of the load's 2 requests, got 1",
        ),
        (
            lambda: sim.fit_step_time([(server(TWO, step_time=LINEAR), SEEN)], ["bse"]),
            "got 'bse'; did you mean base?",
        ),
        (
            lambda: sim.fit_step_time([(server(TWO, step_time=ROOFLINE), SEEN)], ["tp"]),
            "fields must be of compute_efficiency, bandwidth_efficiency",
        ),
        (
            lambda: sim.fit_step_time([(server(TWO, step_time=LINEAR), SEEN)], ["base", "base"]),
            "fields must be one or more that differ, got base, base",
        ),
        (lambda: sim.fit_step_time(a_log(), []), "fields must be one or more that differ, got none"),
        (
            lambda: sim.fit_step_time([(server(TWO, step_time=LINEAR), SEEN)], ["base", "per_prefill_attention"]),
            "too few data: per_prefill_attention is undetermined, for it hardly changes what was measured",
        ),
        (
            lambda: sim.fit_step_time([(server(TWO, step_time=LINEAR), SEEN)], ["base", "per_request"]),
            "too few data: ",
        ),
        (
            lambda: sim.fit_step_time({"duration": [1.0] * 9, "decode_requests": [1] * 9}),
            "does the same to what was measured; leave one out of fields, or measure at other loads",
        ),
        (lambda: sim.fit_step_time({"duration": [1.0, 0.0]}), "duration must be a number > 0, got 0 of step 1"),
        (
            lambda: sim.fit_step_time(a_log(), ["per_prefill_attention"]),
            "per_prefill_attention needs the column prefill_attention in a log of steps",
        ),
    ],
)
def test_what_tells_nothing_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        make()
    assert message in str(error.value)


HEAD = "arrived_at,prompt_tokens,output_tokens,ttft,e2e\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column arrived_at"),
        ("arrival,prompt_tokens,output_tokens,ttft,e2e\n", "no column arrived_at; did you mean arrival?"),
        (HEAD, "no request in it"),
        (HEAD + "0,5,5,x,1\n", "line 2: ttft must be a number, got 'x'"),
        (HEAD + "0,5,5,1,2\n0,5,0,1,2\n", "line 3: output_tokens must be a whole number >= 1, got 0"),
        (HEAD + "5,5,5,1,2\n4,5,5,1,2\n", "line 3: arrived_at must ascend, got 4 after 5"),
        (HEAD + "0,5,5,2,1\n", "line 2: e2e must be at least ttft (2), got 1"),
        (HEAD + "0,5,5,2,\n", "line 2: ttft and e2e must both be there, or both be empty"),
        (HEAD + "0,5,5,0,1\n", "line 2: ttft must be > 0, got 0"),
    ],
)
def test_impossible_rows_are_named_with_line_and_reason(tmp_path, text, message):
    (tmp_path / "server.csv").write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        calibrate.read_measured(tmp_path / "server.csv")
    assert message in str(error.value)


def test_the_command_writes_an_engine_that_does_as_the_server_did(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    engine = sim.presets.fitted(model="llama-3.1-8b", load_generator=LOAD, max_batch_size=128)
    requests = engine.run().requests
    rows = [HEAD]
    for came, prompt, output, first, last in zip(
        *(requests[name].values for name in ("arrived_at", "prompt_tokens", "output_tokens")),
        requests.first_token_at.values,
        requests.completed_at.values,
        strict=True,
    ):
        rows.append(f"{came:.6f},{prompt},{output},{first - came:.6f},{last - came:.6f}\n")
    rows[5] = rows[5].rsplit(",", 2)[0] + ",,\n"  # one that failed
    (tmp_path / "server.csv").write_text("".join(rows))
    command = ["server.csv", "--set", "max_batch_size=128", "-o", "mine.toml", "--plot", "mine.png"]
    assert calibrate.main([*command, "--model", "llama-3.1-8b", "--gpu", "h100"]) == 0
    out = capsys.readouterr().out
    assert "step_overhead" in out
    assert "saved mine.toml" in out
    found = sim.Engine.from_toml((tmp_path / "mine.toml").read_text()).run()
    assert float(found.metrics.e2e.sel(stat="mean")) == pytest.approx(
        float(engine.run().metrics.e2e.sel(stat="mean")), rel=0.01
    )
    assert (tmp_path / "mine.png").stat().st_size > 10_000
    assert calibrate.main([*command, "--model", "llama-3.1-8b", "--gpu", "h100"]) == 2
    assert "mine.toml" in capsys.readouterr().err
    assert calibrate.main(["server.csv", "--model", "llama-3.1-8b"]) == 2
    assert "--model and --gpu must be given together" in capsys.readouterr().err
    assert calibrate.main(["server.csv", "--model", "llama-3.1-8", "--gpu", "h100"]) == 2
    assert "did you mean llama-3.1-8b" in capsys.readouterr().err


def test_the_memory_of_a_calibrated_server_goes_by_what_is_set(tmp_path):
    (tmp_path / "server.csv").write_text(HEAD + "0,10,5,0.1,0.2\n")
    load, _ = calibrate.read_measured(tmp_path / "server.csv")

    def blocks(*changes, model="llama-3.1-70b", gpu="h200"):
        line = [str(tmp_path / "server.csv"), "--model", model, "--gpu", gpu, *changes]
        return calibrate.server(calibrate.parser().parse_args(line), load).kv_cache.blocks

    sizes = {"max_num_batched_tokens": 8192, "max_num_seqs": 1024}
    expected = sim.KVCache.of("llama-3.1-70b", "h200", dtype="fp8", **sizes).blocks
    assert blocks("--set", "dtype=fp8") == expected  # in BF16 the model doesn't fit
    small = {"model": "llama-3.1-8b", "gpu": "h100"}
    assert blocks("--set", "kv_dtype=fp8", **small) in (2 * blocks(**small), 2 * blocks(**small) + 1)
    assert blocks("--set", "max_batch_size=128", **small) > blocks(**small)
    assert blocks("--set", "blocks=7", **small) == blocks("--kv-blocks", "7", **small) == 7
