"""Fleets as their users declare and sweep them: names of fields, presets, specs, what is refused."""

import contextlib
import io
import re

import numpy as np
import pytest
import xarray as xr

import vecsim as sim
from vecsim.sweep.__main__ import main
from vecsim.sweep.spec import read_spec

STEP = sim.LinearStepTime(base=6e-3, per_request=6e-5, per_prefill_token=4e-5)
POOL = sim.Pool(max_batch_size=64, step_time=STEP, kv_cache=sim.KVCache(blocks=2000, prefix_caching=True))
LOAD = sim.PoissonLoadGenerator(request_rate=10, requests=40, prompt_tokens=300, output_tokens=20)
TRANSFER = sim.KVTransfer(bandwidth=1e9, kv_bytes_per_token=131_072)
CLUSTER = sim.Cluster(pool=POOL, load_generator=LOAD)
APART = sim.DisaggregatedEngine(prefill=POOL, decode=POOL, load_generator=LOAD, transfer=TRANSFER)
TWO = sim.Cluster(pool=(POOL, POOL), load_generator=LOAD)


def swept(fleet, **axes):
    return sim.sweep(fleet, progress=False, **axes)


def roofline(model):
    return sim.Pool(step_time=sim.RooflineStepTime(model=model, gpu="h100"))


def test_workers_router_and_rate_are_axes_and_each_scenario_is_that_fleet_alone():
    routers = [sim.RoundRobinRouter(), sim.KVAwareRouter()]
    ds = swept(CLUSTER, workers=[1, 2], router=routers, request_rate=[10, 30])
    assert dict(ds.sizes) == {"workers": 2, "router": 2, "request_rate": 2, "stat": 6}
    for i, router in enumerate(routers):
        load = sim.PoissonLoadGenerator(request_rate=30, requests=40, prompt_tokens=300, output_tokens=20)
        pool = sim.Pool(
            workers=2, max_batch_size=64, step_time=STEP, kv_cache=sim.KVCache(blocks=2000, prefix_caching=True)
        )
        one = sim.Cluster(pool=pool, router=router, load_generator=load).run().metrics
        np.testing.assert_array_equal(ds.ttft.sel(workers=2, request_rate=30).isel(router=i), one.ttft)


def test_the_pools_of_a_disaggregated_engine_are_told_by_their_fields():
    ds = swept(APART, prefill_workers=[1, 2], decode_workers=[1, 3], bandwidth=[1e8, 1e10])
    assert list(ds.sizes)[:3] == ["prefill_workers", "decode_workers", "bandwidth"]
    dotted = swept(APART, **{"prefill.workers": [1, 2], "decode.workers": [1, 3], "transfer.bandwidth": [1e8, 1e10]})
    assert list(dotted.sizes)[:3] == ["prefill.workers", "decode.workers", "bandwidth"]
    np.testing.assert_array_equal(ds.e2e, dotted.e2e)
    assert ds.prefill_workers.attrs["long_name"] == dotted["prefill.workers"].attrs["long_name"] == "prefill workers"
    # Whatever else varies, the name tells of which pool
    assert "prefill.workers" in swept(APART, **{"prefill.workers": [1, 2]}).dims


def test_prefill_and_decode_workers_vary_together_at_a_constant_number():
    prefill, decode = (xr.DataArray(counts, dims="ratio") for counts in ([1, 2, 3], [3, 2, 1]))
    ds = swept(APART, prefill_workers=prefill, decode_workers=decode, request_rate=[10, 20])
    assert dict(ds.sizes) == {"ratio": 3, "request_rate": 2, "stat": 6, "part": 9}
    np.testing.assert_array_equal(ds.prefill_workers + ds.decode_workers, 4)


def test_one_of_several_pools_is_told_by_its_place():
    ds = swept(TWO, **{"pool.1.max_batch_size": [1, 64]}, pool_0_workers=[1, 2])
    assert list(ds.sizes)[:2] == ["pool.1.max_batch_size", "pool_0_workers"]
    pools = swept(CLUSTER, pool=[POOL, (POOL, POOL)])
    assert pools.pool.values.tolist() == ["Pool", "Pool + Pool"]


def test_an_optional_part_and_a_field_of_it_can_not_both_vary():
    ds = swept(APART, local_prefill=[None, sim.QueueAndLengthRule(), sim.LengthOrLoadRule()])
    assert ds.local_prefill.values.tolist() == ["None", "QueueAndLengthRule", "LengthOrLoadRule"]
    with pytest.raises(ValueError, match=r"unknown axis 'transfer\.bandwidth'"):
        swept(APART, transfer=None, **{"transfer.bandwidth": [1e9]})


@pytest.mark.parametrize(
    ("fleet", "axes", "message"),
    [
        (APART, {"workers": [1]}, "axis 'workers' is ambiguous: write one of prefill.workers, decode.workers"),
        (TWO, {"workers": [1]}, "axis 'workers' is ambiguous: write one of pool.0.workers, pool.1.workers"),
        (APART, {"prefil_workers": [1]}, "unknown axis 'prefil_workers'; did you mean prefill_workers"),
        (APART, {"size": [16]}, "unknown axis 'size'"),
        (APART, {"prefill_workers": [1, 0]}, "workers must be >= 1, got 0"),
        (APART, {"bandwidth": [0]}, "bandwidth must be > 0, got 0"),
        (APART, {"prefill_workers": [1], "prefill.workers": [2]}, "which another axis names too"),
        (
            sim.DisaggregatedEngine(prefill=roofline("qwen3-8b"), decode=roofline("qwen3-8b"), load_generator=LOAD),
            {"decode_step_time_model": ["qwen3-14b"]},
            "layers must be the same on both sides of a KV transfer, got 36 from qwen3-8b and 40 in qwen3-14b",
        ),
    ],
)
def test_a_wrong_axis_is_one_clear_sentence(fleet, axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        swept(fleet, **axes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sim.KVTransfer(bandwidth=0, kv_bytes_per_token=1), "bandwidth must be > 0, got 0"),
        (lambda: sim.Link(name="mine", bandwidth=0), "bandwidth must be > 0, got 0"),
        (
            lambda: sim.DisaggregatedEngine(
                prefill=roofline("llama-3.1-8b"), decode=roofline("qwen3-14b"), load_generator=LOAD
            ),
            "layers must be the same on both sides of a KV transfer, got 32 from llama-3.1-8b and 40 in qwen3-14b",
        ),
        (lambda: sim.DisaggregatedEngine(prefill=(), decode=POOL, load_generator=LOAD), "prefill must have a worker"),
        (lambda: sim.Pool.of(POOL), "engine must be an Engine, got Pool"),
        (lambda: sim.Pool.of(sim.Engine(step_time=STEP, load_generator=LOAD), 0), "workers must be >= 1, got 0"),
        (lambda: sim.presets.dynamo_gen2(policy="isl", prefill=POOL, decode=POOL, load_generator=LOAD), "policy must"),
        (
            lambda: sim.presets.dynamo_gen2(
                policy="prefill_load", local_prefill=None, prefill=POOL, decode=POOL, load_generator=LOAD
            ),
            "local_prefill must be left out where policy is given, got None",
        ),
    ],
)
def test_what_is_no_fleet_is_refused_when_declared(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_presets_of_fleets_name_what_is_missing_or_unknown():
    with pytest.raises(TypeError, match="dynamo_gen1 needs decode and load_generator"):
        sim.presets.dynamo_gen1(prefill=POOL)
    with pytest.raises(TypeError, match="dynamo_gen2 has no field 'polcy'; did you mean policy"):
        sim.presets.dynamo_gen2(prefill=POOL, decode=POOL, load_generator=LOAD, polcy="never")


def test_the_control_plane_of_etcd_has_its_latencies():
    plane = sim.presets.etcd(migration_limit=3)
    assert (plane.watch, plane.ttl, plane.renewal, plane.queue_pop, plane.migration_limit) == (1e-3, 10, 5, 0, 3)
    queue = sim.presets.etcd(jetstream=True, queue_pop=2e-3)
    assert (queue.queue_push, queue.queue_pop) == (1e-3, 2e-3)
    assert sim.presets.dynamo_gen1(prefill=POOL, decode=POOL, load_generator=LOAD, control_plane=queue).changes
    with pytest.raises(TypeError, match="etcd has no field 'wach'; did you mean watch"):
        sim.presets.etcd(wach=1.0)


def test_a_pool_of_an_engine_has_its_fields():
    engine = sim.presets.vllm(kv_tokens=32_000, load_generator=LOAD, step_time=STEP)
    pool = sim.Pool.of(engine, workers=3)
    assert pool.workers == 3
    assert pool.engine(LOAD, engine.overheads, engine.slo) == engine


def test_a_pool_of_an_engine_has_the_gpus_that_its_model_is_shared_out_among_and_what_else_is_given():
    engine = sim.presets.fitted(model="qwen3-32b", tp=2, load_generator=LOAD)
    assert sim.Pool.of(engine).gpus == 2
    assert sim.Pool.of(sim.Engine(step_time=STEP, load_generator=LOAD)).gpus == 1
    pool = sim.Pool.of(engine, 3, gpus=4, start_up_time=60, max_batch_size=8)
    assert (pool.workers, pool.gpus, pool.start_up_time, pool.max_batch_size) == (3, 4, 60.0, 8)
    with pytest.raises(TypeError, match="start_up"):
        sim.Pool.of(engine, start_up=60)


def test_dynamos_generations_are_declarations_that_can_be_written_by_hand():
    parts = {"prefill": POOL, "decode": POOL, "load_generator": LOAD, "transfer": TRANSFER}
    assert sim.presets.dynamo_gen1(**parts) == sim.DisaggregatedEngine(
        **parts,
        router=sim.OverlapRouter(),
        prefill_router=None,
        reserve="arrival",
        first_token="decode",
        local_prefill=sim.QueueAndLengthRule(max_local_prefill_length=1000, max_prefill_queue_size=2),
    )
    second = {
        "router": sim.KVAwareRouter(),
        "prefill_router": sim.KVAwareRouter(),
        "reserve": "prefill",
        "first_token": "decode",
    }
    assert sim.presets.dynamo_gen2(**parts) == sim.DisaggregatedEngine(**parts, **second, local_prefill=None)
    for policy, rule in (
        ("isl_bounding", sim.PromptLengthRule(eff_isl_threshold=2048, ratio=0.7)),
        ("prefill_load", sim.PrefillLoadRule()),
        ("isl_or_load", sim.LengthOrLoadRule(eff_isl_threshold=2048, ratio=0.7)),
    ):
        made = sim.presets.dynamo_gen2(**parts, policy=policy)
        assert made == sim.DisaggregatedEngine(**parts, **second, local_prefill=rule)
        assert sim.DisaggregatedEngine.from_toml(made.to_toml()) == made


@pytest.mark.parametrize(("generation", "is_local"), [("dynamo_gen1", True), ("dynamo_gen2", False)])
def test_a_lone_short_prompt_is_local_in_the_first_generation_and_remote_in_the_second(generation, is_local):
    load = sim.TraceLoadGenerator(arrived_at=[0], prompt_tokens=[200], output_tokens=[5])
    run = getattr(sim.presets, generation)(prefill=POOL, decode=POOL, load_generator=load).run()
    computed = run.steps.worker.values[run.steps.prefill_tokens.values >= 200]
    assert computed.tolist() == [1 if is_local else 0]


def cli(folder, *arguments):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main([*map(str, arguments)])
    return code, out.getvalue(), error.getvalue()


SPEC = """
time_limit = 20
[engine]
type = "Cluster"
[engine.load_generator]
type = "PoissonLoadGenerator"
prompt_tokens = 100
output_tokens = 10
[[engine.pool]]
workers = 2
step_time = { type = "LinearStepTime", base = 6e-3 }
[[engine.pool]]
step_time = { type = "LinearStepTime", base = 3e-3 }
[axes]
router = ["RandomRouter", "PowerOfTwoRouter"]
"pool.0.workers" = [1, 2]
"""


def test_a_spec_declares_a_fleet_of_pools_that_differ(tmp_path):
    (tmp_path / "mine.toml").write_text(SPEC)
    code, _, error = cli(tmp_path, "mine.toml", "--set", "pool.0.workers=1..3")
    assert code == 0, error
    with xr.open_dataset(tmp_path / "mine.nc") as ds:
        assert dict(ds.sizes) == {"router": 2, "pool.0.workers": 3, "stat": 6}


@pytest.mark.parametrize(
    ("wrong", "arguments", "message"),
    [
        (('"Cluster"', '"Clustr"'), [], "engine.type: Invalid value 'Clustr'; did you mean Cluster?"),
        (("workers = 2", "workers = 0"), [], "engine.pool[0]: workers must be >= 1, got 0"),
        (("RandomRouter", "RandmRouter"), [], "can't read the value 'RandmRouter'"),
        (("", ""), ["--set", "workers=1"], "is ambiguous: write one of pool.0.workers, pool.1.workers"),
        (("", ""), ["--set", "router=none"], "router must be one of RoundRobinRouter, "),
    ],
)
def test_a_mistake_in_a_spec_of_a_fleet_is_one_sentence(tmp_path, wrong, arguments, message):
    (tmp_path / "mine.toml").write_text(SPEC.replace(*wrong))
    code, _, error = cli(tmp_path, "mine.toml", *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_fitted_set_is_for_every_pool_and_a_change_replaces_one_axis_of_two_that_vary_together(tmp_path):
    spec = read_spec("disaggregated")
    fit = sim.Fit.named("vllm-0.15-h100")
    assert spec.engine.overheads == fit.overheads
    expected = sim.RooflineStepTime(model="llama-3.1-8b", **fit.fields())
    assert spec.engine.prefill.step_time == spec.engine.decode.step_time == expected
    small = ["--time-limit", "5", "--set", "seed=0", "--set", "request_rate=4", "--quiet", "-o", "a.nc", "--force"]
    for change in ("prefill_workers=2,3", "prefill.workers=2,3"):
        code, _, error = cli(tmp_path, "disaggregated", *small, "--set", change)
        assert code == 0, error
        with xr.open_dataset(tmp_path / "a.nc") as ds:
            assert dict(ds.sizes) == {
                "transfer.bandwidth": 3,
                "ratio": 4,
                change.partition("=")[0]: 2,
                "stat": 6,
                "part": 9,
            }
    code, _, error = cli(tmp_path, "disaggregated", *small, "--set", "local_prefill=none,PromptLengthRule")
    assert code == 0, error
