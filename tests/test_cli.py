"""`python -m vecsim.sweep` as its users call it."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import xarray as xr

import vecsim as sim
from vecsim.sweep.__main__ import main
from vecsim.sweep.spec import parse_values, read_spec, ready_made

SMALL = ["--set", "request_rate=0.1:0.4:4", "--set", "seed=0..2", "--time-limit", "300"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(folder, *arguments):
    """As a user runs it: a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "vecsim.sweep", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def cli(folder, *arguments):
    """The same without the time that a process takes to start."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        returncode = main([*map(str, arguments)])
    return Done(returncode, out.getvalue(), error.getvalue())


def test_the_default_sweep_can_be_run_twice(tmp_path):
    for run, stem in ((command, "sweep"), (cli, "sweep-2")):
        done = run(tmp_path, *SMALL)
        assert done.returncode == 0, done.stderr
        assert f"saved {stem}.nc and {stem}.png" in done.stdout
        assert "IFBatcherWithOnePrefillOnly" in done.stdout
        assert "Warning" not in done.stderr
    ds = xr.open_dataset(tmp_path / "sweep.nc")
    assert dict(ds.sizes) == {
        "batcher": 3,
        "total_prefill_chunks": 3,
        "request_rate": 4,
        "seed": 3,
        "stat": 6,
    }
    ds.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "sweep-2.nc",
        "sweep-2.png",
        "sweep.nc",
        "sweep.png",
    ]


def test_the_default_sweep_has_ten_thousand_scenarios_or_more():
    spec = read_spec("batching")
    keywords = spec.keywords()
    assert np.prod([len(values) for values in keywords.values()]) >= 10_000


@pytest.mark.parametrize("name", ready_made())
def test_every_ready_made_spec_runs(tmp_path, name):
    spec = read_spec(name)
    limit, warmup = ("20", "2") if spec.engine.is_token else ("200", "20")
    small = ["--set", "seed=0,1", "--time-limit", limit, *([] if spec.short else ["--warmup", warmup])]
    done = cli(tmp_path, name, *small, "-o", "a.zarr", "--plot", "a.svg")
    assert done.returncode == 0, done.stderr
    assert "saved a.zarr and a.svg" in done.stdout
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", ["autoscaling", "failures", "cache-tiers"])
def test_specs_of_fleets_that_change_tell_what_they_ask_for_along_their_axis(tmp_path, name):
    spec = read_spec(name)
    along, keywords = spec.x, spec.keywords()
    done = cli(tmp_path, name, "--time-limit", "20", "--warmup", "0", "--set", "seed=0,1", "-o", "a.nc")
    assert done.returncode == 0, done.stderr
    with xr.open_dataset(tmp_path / "a.nc") as ds:
        assert {axis: ds.sizes[axis] for axis in keywords} == {
            axis: len(v) for axis, v in (keywords | {"seed": (0, 1)}).items()
        }
        heads = [line for line in done.stdout.splitlines() if f", by {ds[along].attrs['long_name']}" in line]
        assert len(heads) == len(spec.variables)
        for head, variable in zip(heads, spec.variables, strict=True):
            assert ds[variable].attrs["long_name"] in head
    rows = [line.split() for line in done.stdout.splitlines()]
    columns = [f"{value:g}" for value in keywords[along]]
    assert sum(row[-len(columns) :] == columns for row in rows) == len(spec.variables)


def test_what_the_table_and_the_picture_tell_is_an_option(tmp_path):
    small = ["failures", "--time-limit", "20", "--set", "seed=0", "--set", "migration_limit=0"]
    done = cli(tmp_path, *small, "--variables", "gpu_hours, ttft", "--x", "ttl", "--plot", "a.svg")
    assert done.returncode == 0, done.stderr
    assert "GPU-hours, by lease TTL [s]\n" in done.stdout
    assert "p99 time to first token [s], by lease TTL [s]\n" in done.stdout
    assert "SLO attainment" not in done.stdout
    # An axis that is pinned can't be drawn along any more: then along another
    done = cli(tmp_path, *small, "--set", "mtbf=1800", "-o", "a.nc")
    assert "requests failed [requests], by lease TTL [s]\n" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variables", "gpu_hour"], "'gpu_hour'; did you mean gpu_hours"),
        (["--variables", "host_hit_rate", "--time-limit", "1"], "variables must be among e2e, ttft"),
        (["--x", "start_up"], "--x must be an axis, one of mtbf, migration_limit, ttl, seed, got 'start_up'"),
        (["--short", "1", "--time-limit", "2"], "--variables and --x must be left out for queue growth"),
    ],
)
def test_what_can_not_be_told_is_one_sentence_and_writes_nothing(tmp_path, arguments, message):
    done = cli(tmp_path, "failures", "--set", "seed=0", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_ready_made_specs_and_the_notation(tmp_path):
    done = command(tmp_path, "--help")
    assert done.returncode == 0
    for name in ready_made():
        assert re.search(rf"^  {name} +\S", done.stdout, re.MULTILINE)
    assert "0.05:0.6:56" in done.stdout


def test_an_existing_file_is_kept_without_force_and_named_before_computing(tmp_path):
    (tmp_path / "a.nc").write_text("precious")
    done = cli(tmp_path, "-o", "a.nc")  # the whole default sweep: it must not start
    assert done.returncode == 2
    assert done.stderr == "error: a.nc exists already: choose another name, or --force to overwrite it\n"
    assert (tmp_path / "a.nc").read_text() == "precious"
    assert cli(tmp_path, *SMALL, "-o", "a.nc", "--force", "--quiet").returncode == 0
    xr.open_dataset(tmp_path / "a.nc").close()


def test_quiet_prints_nothing(tmp_path):
    done = cli(tmp_path, *SMALL, "-o", "a.nc", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SPEC = """
time_limit = 200
[engine]
max_batch_size = 2
[engine.load_generator]
type = "PoissonLoadGenerator"
[axes]
request_rate = [0.1, 0.2]
batcher = ["StaticBatcher", { type = "IFBatcher" }]
output_tokens = "3,LogNormal(mean=9, std=3),Empirical(values=[1,2])"
[zip.size]
max_batch_size = [2, 4]
prefill_time = [1, 0.5]
"""


def test_a_spec_of_ones_own_has_lists_notation_and_zipped_axes(tmp_path):
    (tmp_path / "mine.toml").write_text(SPEC)
    done = cli(tmp_path, "mine.toml")
    assert done.returncode == 0, done.stderr
    assert "saved mine.nc and mine.png" in done.stdout
    with xr.open_dataset(tmp_path / "mine.nc") as ds:
        sizes = {
            "request_rate": 2,
            "batcher": 2,
            "load_generator.output_tokens": 3,
            "size": 2,
            "stat": 6,
        }
        assert dict(ds.sizes) == sizes
        np.testing.assert_array_equal(ds.prefill_time, [1, 0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "no spec 'nosuch': neither a file nor one of autoscaling, "),
        (["--set", "request_rte=1,2"], "unknown axis 'request_rte'; did you mean request_rate"),
        (["--set", "request_rate"], "--set takes NAME=VALUES, got 'request_rate'"),
        (["--set", "request_rate="], "--set takes NAME=VALUES, got 'request_rate='"),
        (["--set", "request_rate=0.1:0.2:x"], "--set request_rate: a range is FIRST:LAST:COUNT"),
        (
            ["--set", "seed=5..1"],
            "--set seed: whole numbers are FIRST..LAST with FIRST <= LAST",
        ),
        (["--set", "request_rate=-1,2"], "request_rate must be > 0, got -1"),
        (
            ["--set", "batcher=NoBatcher"],
            "--set batcher: can't read the value 'NoBatcher': it is neither a number nor",
        ),
        (["--set", "output_tokens=LogNormal(mean=1)"], "missing required field `std`"),
        (["--set", "seed=1", "--set", "seed=2"], "--set names 'seed' twice"),
        (["--set", "time_limit=5"], "use --time-limit for time_limit"),
        (["--set", "seed=1,,2"], "a list has a value on either side of each comma, got '1,,2'"),
        (["--set", "batcher=IFBatche"], "did you mean IFBatcher"),
        (["schedulers", "--set", "order=fcf,deadline"], "--set order: can't read the value 'fcf': it is neither a"),
        (["schedulers", "--set", "order=fcf,deadline"], "did you mean fcfs"),
        (["schedulers", "--set", "order=3"], "order must be one of fcfs, shortest_prompt, priority, "),
        (["schedulers", "--set", "prefix_caching=1,0"], "prefix_caching must be true or false, got 1"),
        (["--set", "seed=1" + 400 * "0"], "seed must be >= 0 and <= 4294967295, got 1000"),
        (["--set", "batcher=policies:nosuch"], "module 'policies' has no attribute 'nosuch'"),
        (["--at-load", "nan"], "--at-load must be a finite number, got nan"),
        (["zipped.toml"], "zip.size.seed: axes that vary together are lists, got 3"),
        (["twice.toml"], "zip.size.seed: seed is an axis already"),
        (["binary.toml"], "binary.toml can't be read as text"),
        (["--time-limit", "-5"], "time_limit must be > 0 and <= 1e+09, got -5"),
        (["--threads", "0"], "threads must be a whole number >= 1, got 0"),
        (["-o", "a.csv"], "a.csv: a name that ends in .nc or .zarr is needed"),
        (["-o", "nofolder/a.nc"], "nofolder/a.nc: there is no folder nofolder"),
        (["-o", "/proc/a.nc"], "/proc/a.nc: the folder /proc can't be written to"),
        (["--plot", "a.txt"], "a.txt: a name that ends in .png or .pdf or .svg is needed"),
        (["--set", "seed=0..9999999", "--set", "request_rate=0.1:0.6:1000"], "GiB of memory"),
        (["broken.toml"], "broken.toml: engine.load_generator: request_rate must be > 0, got -3"),
        (["typo.toml"], "typo.toml: Object contains unknown field `axs`"),
        (["syntax.toml"], "syntax.toml: Invalid value (at line 3"),
        (["values.toml"], "axes.seed: whole numbers are FIRST..LAST"),
    ],
)
def test_a_mistake_is_one_clear_sentence_and_nothing_is_written(tmp_path, arguments, message):
    load = '[engine.load_generator]\ntype = "PoissonLoadGenerator"\n'
    specs = tmp_path / "specs"
    specs.mkdir()
    (specs / "broken.toml").write_text(load + "request_rate = -3\n")
    (specs / "typo.toml").write_text(load + "[axs]\nseed = [1]\n")
    (specs / "syntax.toml").write_text(load + "request_rate = oops\n")
    (specs / "values.toml").write_text(load + "[axes]\nseed = '3..1'\n")
    (specs / "zipped.toml").write_text(load + "[zip.size]\nseed = 3\n")
    (specs / "twice.toml").write_text(load + "[axes]\nseed = [1]\n[zip.size]\nseed = [3]\n")
    (specs / "binary.toml").write_bytes(b"\xff\xfe\x00")
    before = len(list(specs.iterdir()))
    done = cli(specs, *arguments)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert len(list(specs.iterdir())) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "request_rate=0.1"],
        ["--set", "prefill_time=1e12"],
        ["--set", "output_tokens=3,LogNormal(mean=9, std=3)"],
    ],
)
def test_any_sweep_ends_with_a_table_and_a_picture(tmp_path, arguments):
    done = cli(tmp_path, "--time-limit", "300", "--set", "seed=0..2", *arguments)
    assert done.returncode == 0, done.stderr
    assert "saved sweep.nc and sweep.png" in done.stdout


def test_a_rule_of_ones_own_is_named_by_its_module(tmp_path):
    rules = "batcher=IFBatcher,policies:in_flight,CustomBatcher(rule=policies:every_field, parameter=3)"
    done = cli(tmp_path, "--time-limit", "300", "-o", "a.nc", "--set", rules)
    assert done.returncode == 0, done.stderr
    with xr.open_dataset(tmp_path / "a.nc") as ds:
        assert ds.batcher.values.tolist() == ["IFBatcher", "in_flight", "every_field"]
        np.testing.assert_array_equal(ds.completed.isel(batcher=0), ds.completed.isel(batcher=1))


def test_a_rule_that_fails_as_it_runs_is_one_sentence_too(tmp_path):
    done = cli(tmp_path, "--quiet", "--set", "batcher=policies:negative_later")
    assert done.returncode == 2
    assert done.stderr.startswith("error: rule negative_later must return 0 to 4 requests (batch.free), got -1 at ")
    assert list(tmp_path.iterdir()) == []


TEXTS = """
time_limit = 20
[engine]
kv_cache = { blocks = 1000 }
step_time = { type = "LinearStepTime", base = 6e-3 }
batcher = { type = "TokenBudgetBatcher" }
[engine.load_generator]
type = "PoissonLoadGenerator"
prompt_tokens = 100
output_tokens = 10
[axes]
order = ["fcfs", "shortest_prompt"]
prefix_caching = [true, false]
async_scheduling = "false,true"
"""


def test_words_and_truths_are_axes_in_a_spec_and_on_the_command_line(tmp_path):
    (tmp_path / "mine.toml").write_text(TEXTS)
    for arguments, order in (
        ([], ["fcfs", "shortest_prompt"]),
        (["--set", "order=deadline,fcfs"], ["deadline", "fcfs"]),
    ):
        done = cli(tmp_path, "mine.toml", *arguments, "-o", "mine.nc", "--plot", "mine.png", "--force")
        assert done.returncode == 0, done.stderr
        with xr.open_dataset(tmp_path / "mine.nc") as ds:
            assert ds.order.values.tolist() == order
            assert ds.prefix_caching.values.tolist() == ["True", "False"]
            assert ds.async_scheduling.values.tolist() == ["False", "True"]
    batchers = parse_values("TokenBudgetBatcher(order=shortest_prompt, async_scheduling=true),IFBatcher")
    assert (batchers[0].order, batchers[0].async_scheduling) == ("shortest_prompt", True)


FITTED = """
time_limit = 60
fit = "vllm-0.15-h100"
[engine]
step_time = { model = "qwen3-8b", tp = 2, step_overhead = 2e-3 }
[engine.load_generator]
type = "PoissonLoadGenerator"
prompt_tokens = 100
output_tokens = 10
[axes]
model = ["llama-3.1-8b", "qwen3-14b"]
"""


def test_a_spec_names_a_fitted_set_models_and_gpus(tmp_path):
    (tmp_path / "mine.toml").write_text(FITTED)
    step_time = read_spec(str(tmp_path / "mine.toml")).engine.step_time
    fit = sim.Fit.named("vllm-0.15-h100").fields() | {"step_overhead": 2e-3}
    assert step_time == sim.RooflineStepTime(model="qwen3-8b", tp=2, **fit)
    done = cli(tmp_path, "mine.toml", "--set", "gpu=h100,h200", "-o", "mine.nc")
    assert done.returncode == 0, done.stderr
    with xr.open_dataset(tmp_path / "mine.nc") as ds:
        assert ds.model.values.tolist() == ["llama-3.1-8b", "qwen3-14b"]
        assert ds.gpu.values.tolist() == ["h100", "h200"]
    for wrong, message in (
        (FITTED.replace("0.15", "0.99"), "mine.toml: no Fit is named 'vllm-0.99-h100'; did you mean vllm-0.15-h100"),
        (FITTED.replace("qwen3-8b", "qwen3-9b"), "mine.toml: engine.step_time.model: no Model is named 'qwen3-9b'"),
    ):
        (tmp_path / "mine.toml").write_text(wrong)
        done = cli(tmp_path, "mine.toml")
        assert done.returncode == 2
        assert message in done.stderr


def test_the_servers_on_an_h100_are_those_of_the_fit_and_their_memory_that_of_their_models():
    spec = read_spec("vllm-h100")
    preset = sim.presets.fitted(model="llama-3.1-8b", load_generator=spec.engine.load_generator)
    assert spec.engine.step_time == preset.step_time
    assert spec.engine.overheads == preset.overheads
    blocks = dict(zip(spec.zip["model"]["model"], spec.zip["model"]["blocks"], strict=True))
    assert blocks == {name: sim.KVCache.of(name, "h100").blocks for name in blocks}
    assert spec.engine.kv_cache.blocks == blocks[spec.engine.step_time.model.name]


def test_queue_growth_prints_the_published_table(tmp_path):
    done = cli(tmp_path, "queue-growth", "--set", "seed=42..44")
    assert done.returncode == 0, done.stderr
    rows = [re.split(r"  +", line.strip()) for line in done.stdout.splitlines()]
    begin = next(i for i, row in enumerate(rows) if row[0] == "RequestRateLoadGenerator(request_rate=0.46)")
    assert rows[begin][1:5] == ["grows", "final queue", "6", "1138"]
    assert [row[:3] for row in rows[begin + 1 : begin + 3]] == [
        ["mean TTFT", "11.03", "1245.77"], ["mean E2E", "17.66", "1253.78"],
    ]  # fmt: skip
    begin = next(i for i, row in enumerate(rows) if row[0] == "ConcurrentLoadGenerator")
    assert rows[begin][1:5] == ["stable", "final queue", "2", "2"]
    assert [row[:3] for row in rows[begin + 1 : begin + 3]] == [
        ["mean TTFT", "7.87", "8.61"], ["mean E2E", "15.14", "17.32"],
    ]  # fmt: skip
    assert "saved queue-growth.nc and queue-growth.png" in done.stdout


def test_any_spec_can_be_asked_whether_queues_grow(tmp_path):
    done = cli(tmp_path, *SMALL, "--short", "50")
    assert done.returncode == 0, done.stderr
    assert "(a queue grows if" in done.stdout
    done = cli(tmp_path, *SMALL, "--short", "50", "--warmup", "5")
    assert (done.returncode, done.stderr) == (2, "error: --warmup must be 0 for queue growth, got 5\n")
    done = cli(tmp_path, "schedulers", "--set", "request_rate=1,4", "--short", "20", "--time-limit", "60")
    assert "60 s, median" in done.stdout, done.stderr
    assert "saved schedulers.nc and schedulers.png" in done.stdout


def test_the_table_reads_the_nearest_load(tmp_path):
    small = ["--time-limit", "300", "-o", "a.nc", "--set", "load_generator.request_rate=0.3,0.1"]
    done = cli(tmp_path, *small, "--at-load", "1e300")
    assert "TTFT at request_rate=0.3" in done.stdout, done.stderr


def test_an_interruption_leaves_nothing_under_the_final_name(tmp_path):
    command = [
        sys.executable,
        "-m",
        "vecsim.sweep",
        "-o",
        "a.nc",
        "--time-limit",
        "500_000",
        "--set",
        "seed=0..499",
    ]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while process.stderr.read(1) != b"%":  # the bar runs
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert error.endswith(b"interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named_before_computing(tmp_path):
    tmp_path.chmod(0o500)
    done = cli(tmp_path, "-o", tmp_path / "a.nc")
    assert done.returncode == 2
    assert "can't be written to" in done.stderr


def test_values_in_short_notation():
    np.testing.assert_array_equal(parse_values("0.05:0.6:56"), np.linspace(0.05, 0.6, 56))
    assert parse_values("0..31") == range(32)
    assert parse_values("1,2.5,1e-3") == [1, 2.5, 1e-3]
    assert parse_values("7") == 7
    assert parse_values("true,false") == [True, False]
    assert parse_values("fcfs") == "fcfs"
    assert [type(value).__name__ for value in parse_values("IFBatcher,StaticBatcher")] == [
        "IFBatcher",
        "StaticBatcher",
    ]
