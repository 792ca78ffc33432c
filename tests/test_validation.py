"""Validation: made-up runs are met exactly, malformed ones are told apart, and measured ones are met as asked."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vecsim as sim

FOLDER = Path(__file__).parent.parent / "benchmarks" / "validation"
OUTPUT_TOKENS = 40
PROMPTS = 100
COLUMNS = ["index", "prompt_slot", "arrival_us", "input_tokens", "output_tokens_retok", "ok", "ttft_us", "e2e_us"]
ARCH = {
    "num_layers": 40,
    "hidden_dim": 5120,
    "num_heads": 40,
    "num_kv_heads": 8,
    "intermediate_dim": 13824,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "vocab_size": 32000,
}


@pytest.fixture(scope="module")
def validation():
    """The command's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import crossvalidate
        import measured
        import replay

        yield type("Validation", (), {"measured": measured, "replay": replay, "crossvalidate": crossvalidate})


def write_run(folder: Path, name: str, **changes: object) -> None:
    """A run as its server, simulated, would have been measured; `changes` are of the JSON document."""
    run = {
        "model": {"id": "meta-llama/Llama-2-7b-hf", "short": "llama-2-7b", "arch": ARCH},
        "gpu": "NVIDIA H100 80GB HBM3 SXM",
        "tp": 1,
        "vllm_config": {
            "max_model_len": 4096,
            "max_num_seqs": 128,
            "max_num_batched_tokens": 2048,
            "block_size": 16,
            "gpu_kv_blocks": 7462,
        },
        "workload": {
            "profile": "general",
            "stages": [{"duration": 50, "rate": 4}, {"duration": 40, "rate": 10}],
            "nominal_output_tokens": OUTPUT_TOKENS,
            "per_request_csv": f"per_request/{name}.csv",
        },
        **changes,
    }
    random = np.random.default_rng(5)
    counts = [stage["duration"] * stage["rate"] for stage in run["workload"]["stages"]]
    gaps = np.concatenate(
        [random.exponential(1 / s["rate"], s["duration"] * s["rate"]) for s in run["workload"]["stages"]]
    )
    arrived_at = np.round(np.cumsum(gaps) - gaps[0], 6)
    lengths = random.permutation(PROMPTS) + 500
    slot = np.arange(sum(counts)) % PROMPTS
    prompt = slot.copy()
    prompt[[150, 151]] = prompt[[151, 150]]  # two rows that changed places
    tokens = lengths[prompt]
    model = "llama-2-7b" if run["model"]["short"] == "llama-2-7b" else made_up()
    requests = (
        sim.presets.fitted(
            model=model,
            tp=run["tp"],
            load_generator=sim.TraceLoadGenerator(
                arrived_at=arrived_at,
                prompt_tokens=tokens,
                output_tokens=np.full(tokens.size, OUTPUT_TOKENS),
                block_ids=[
                    [1000 * one + i for i in range(-(-length // 16))]
                    for one, length in zip(prompt, tokens, strict=True)
                ],
                id_block_tokens=16,
            ),
            max_batch_size=128,
            max_num_batched_tokens=2048,
            max_model_len=4096,
            kv_blocks=7462,
        )
        .run()
        .requests
    )
    ttft, e2e = (np.round(1e6 * (requests[key].values - arrived_at)) for key in ("first_token_at", "completed_at"))
    (folder / "per_request").mkdir(exist_ok=True, parents=True)
    (folder / f"{name}.json").write_text(json.dumps(run))
    with (folder / "per_request" / f"{name}.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for i in range(tokens.size):
            if i == 170:  # a failed one, of no tokens
                rows.writerow([i, slot[i], round(1e6 * arrived_at[i]), 0, 0, 0, "", int(e2e[i])])
            else:
                rows.writerow([i, slot[i], round(1e6 * arrived_at[i]), tokens[i], 7, 1, int(ttft[i]), int(e2e[i])])


def made_up() -> sim.Model:
    return sim.Model(
        name="somebody/Some-13B",
        layers=40,
        hidden=5120,
        heads=40,
        kv_heads=8,
        head_dim=128,
        intermediate=13824,
        vocab=32000,
        max_positions=4096,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that can be read, and some that can't."""
    folder = tmp_path_factory.mktemp("measured")
    write_run(folder, "a-known-model")
    stages = [{"duration": 60, "rate": 8}]
    workload = {"profile": "other", "stages": stages, "nominal_output_tokens": OUTPUT_TOKENS}
    write_run(
        folder, "b-other-model", model={"id": "somebody/Some-13B", "short": "", "arch": ARCH}, tp=2, workload=workload
    )
    good = json.loads((folder / "a-known-model.json").read_text())

    def spoil(name: str, **changes: object) -> None:
        (folder / f"{name}.json").write_text(json.dumps({**good, **changes}))

    spoil("c-no-csv", workload={**good["workload"], "per_request_csv": "per_request/none.csv"})
    spoil("d-no-length", workload={k: v for k, v in good["workload"].items() if k != "nominal_output_tokens"})
    spoil("e-no-gpu", gpu="NVIDIA Banana")
    lacking = {key: value for key, value in ARCH.items() if key != "num_kv_heads"}
    spoil("f-no-heads", model={"id": "somebody/Some-13B", "arch": lacking})
    spoil("g-pcie", gpu="NVIDIA H100 PCIe 80GB")
    (folder / "h-no-json.json").write_text("{")
    return folder


REASONS = {
    "c-no-csv": "per_request/none.csv is not there",
    "d-no-length": "workload.nominal_output_tokens is missing",
    "e-no-gpu": "gpu must tell of one of a100-80, b200, h100",
    "f-no-heads": "model.arch.num_kv_heads is missing",
    "g-pcie": "gpu must tell of one of a100-80, b200, h100",
    "h-no-json": "Expecting property name",
}


def test_the_command_meets_simulated_runs_and_names_what_it_cannot_read(
    validation, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["validation", str(folder), "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(FOLDER / "__main__.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for name, reason in REASONS.items():
        line = next(line for line in printed.splitlines() if line.startswith(f"| {name}.json"))
        assert reason in line
    assert printed.strip() == (tmp_path / "validation.md").read_text().strip()
    with (tmp_path / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"a-known-model", "b-other-model"}
    assert {row["stage"] for row in rows if row["run"] == "a-known-model"} == {"all", "1: 4/s", "2: 10/s"}
    assert max(abs(float(row["error"])) for row in rows) < 0.01
    for name in ("predicted", "distributions", "concurrency"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_runs_is_told(tmp_path):
    done = subprocess.run([sys.executable, str(FOLDER), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no measured run" in done.stderr


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("NVIDIA H100 80GB HBM3 SXM", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("A100", "a100-80"),
        ("L40S", "l40s"),
        ("NVIDIA H200", "h200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("A100-40GB", None),
        ("NVIDIA L40", None),
    ],
)
def test_gpus_are_told_from_texts(validation, text, name):
    if name is None:
        with pytest.raises(ValueError, match="gpu must tell of one of"):
            validation.measured.gpu_of(text)
    else:
        assert validation.measured.gpu_of(text) == name


def test_constants_are_found_again_on_simulated_runs(validation, folder):
    runs, _ = validation.measured.read_folder(folder)
    text = validation.crossvalidate.cross_validate(runs)
    for name in ("a-known-model", "b-other-model"):  # fitted together
        errors = next(line for line in text.splitlines() if line.startswith(f"| {name}")).split(" | ")[1:]
        assert all(abs(float(error.strip(" |"))) < 2 for error in errors)
    assert "## A profile left out" in text
    assert "## A model left out" in text
    # One load of one model doesn't tell all the constants, and says so
    assert "all but llama-2-7b: too few data" in text


def test_a_request_has_as_many_beside_it_as_were_decoding(validation):
    first, last = np.array([0.0, 1.0, 4.0]), np.array([2.0, 5.0, 6.0])
    np.testing.assert_allclose(validation.replay.beside(first, last), [0.5, 0.5, 0.5])


@pytest.fixture(scope="module")
def replays(validation, data_folder):
    runs, refused = validation.measured.read_folder(data_folder / "data" / "groundtruth")
    assert not refused
    return {f"{run.model.name} {run.profile}": validation.replay.replay(run) for run in runs}


@pytest.mark.data
def test_measured_servers_are_met(validation, replays):
    calm = [replayed for replayed in replays.values() if not replayed.run.overloaded]
    compared = validation.replay.compare(calm)
    means = compared[(compared.stage == "all") & (compared.statistic == "mean")]
    medians = means.error.abs().groupby(means.latency).median()
    assert len(calm) == 7
    assert medians["E2E"] <= 5
    assert medians["ITL"] <= 5
    assert medians["TTFT"] <= 12


@pytest.mark.data
def test_twenty_requests_a_second_are_held_by_a_small_model(replays):
    replayed = replays["llama-2-7b general"]
    assert list(replayed.run.stages) == ["8/s", "20/s"]
    queues = replayed.queues()
    assert not queues.grows.any()
    assert queues.end.max() < 10
    assert 1000 * replayed.ttft.mean() == pytest.approx(44.8, rel=0.12)


@pytest.mark.data
def test_an_overloaded_run_is_overloaded(replays):
    replayed = replays["llama-2-7b reasoning"]
    assert replayed.run.overloaded
    assert replayed.queues().grows.all()
    # Most of the requests that weren't given up on wait for more than ten seconds in both
    inside = replayed.compared
    assert np.median(replayed.ttft[inside]) > 10
    assert replayed.e2e[inside].mean() == pytest.approx(replayed.run.e2e[inside].mean(), rel=0.05)
    # Those that were given up on, after 300 s, would have waited for longer
    given_up = np.isnan(replayed.run.e2e)
    assert (replayed.e2e[given_up] > 300).mean() > 0.95
