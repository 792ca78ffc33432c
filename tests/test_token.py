"""The token model, event for event against its literal oracle.

Every batcher, order, clock and cache on random scenarios.
"""

import random

import msgspec
import numpy as np
import pytest
import token_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim

ORDERS = ("fcfs", "shortest_prompt", "priority", "deadline", "shortest_output")
STEP = sim.LinearStepTime(
    base=5,
    per_request=1,
    per_prefill_token=0.125,
    per_decode_request=0.25,
    per_context_token=1 / 64,
    per_prefill_attention=1 / 128,
    per_prefill_step=2,
)


def seconds(chosen, step=STEP):
    """`STEP`, or another one, literally."""
    prefills = [one for one in chosen if one.is_prefill]
    decodes = [one for one in chosen if not one.is_prefill]
    return (
        step.base
        + step.per_request * len(chosen)
        + step.per_prefill_token * sum(one.tokens for one in prefills)
        + step.per_decode_request * len(decodes)
        + step.per_context_token * sum(one.before + 1 for one in decodes)
        + step.per_prefill_attention * sum(one.tokens * (one.before + one.tokens / 2) for one in prefills)
        + (step.per_prefill_step if prefills else 0.0)
    )


def a_batcher(rng, kind, slots, block_size, common):
    """(ours, the oracle's) of a kind, with random numbers."""
    some = rng.choice([None, slots + rng.randint(0, 40)])
    reserve = rng.choice([None, rng.randint(10, 100)])
    flag = rng.random() < 0.5
    match kind:
        case "token budget":
            budget, most = slots + rng.randint(0, 40), rng.choice([0, 0, rng.randint(1, 12)])
            return (
                sim.TokenBudgetBatcher(
                    max_num_batched_tokens=budget,
                    long_prefill_token_threshold=most,
                    reserve_full_prompt=flag,
                    **common,
                ),
                oracle.TokenBudget(budget, most, flag),
            )
        case "chunked":
            tokens = rng.randint(1, 30)
            return sim.ChunkedPrefillBatcher(chunk_tokens=tokens, **common), oracle.Chunked(tokens)
        case "in-flight" | "one prefill" | "static":
            ours, theirs = {
                "in-flight": (sim.IFBatcher, oracle.IF),
                "one prefill": (sim.IFBatcherWithOnePrefillOnly, oracle.OnePrefill),
                "static": (sim.StaticBatcher, oracle.Static),
            }[kind]
            return ours(max_num_batched_tokens=some, reserve_tokens=reserve, **common), theirs(some, reserve)
        case "prefill first":
            tokens = rng.randint(5, 70)
            return (
                sim.PrefillFirstBatcher(max_num_batched_tokens=tokens, padded=flag, **common),
                oracle.PrefillFirst(tokens, flag),
            )
        case "no evict":
            ours = sim.NoEvictBatcher(max_num_batched_tokens=some, chunked_prefill=flag, **common)
            return ours, oracle.NoEvict(some, flag)
        case "max utilization":
            ours = sim.MaxUtilizationBatcher(max_num_batched_tokens=some, chunked_prefill=flag, **common)
            return ours, oracle.MaxUtilization(some, flag)
        case _:
            chunk, most, ratio, steps = (
                rng.randint(block_size, 40), rng.choice([4096, 10]), rng.choice([0.7, 0.25]), rng.choice([600, 5]),
            )  # fmt: skip
            ours = sim.SGLangBatcher(
                chunked_prefill_size=chunk, max_new_tokens=most, init_new_token_ratio=ratio, decay_steps=steps, **common
            )
            return ours, oracle.SGLang(chunk, ratio, 0.14, steps, most)


KINDS = (
    "token budget", "chunked", "in-flight", "one prefill", "static", "prefill first", "no evict", "max utilization",
    "sglang",
)  # fmt: skip


def a_trace(rng, block_size):
    """(the oracle's requests, the load) of random requests, some of which share the begin of their prompts."""
    size = rng.randint(1, 25)
    classes = [
        sim.RequestClass(
            name=str(i),
            priority=rng.randint(0, 2),
            slo=sim.SLO(ttft=rng.choice([10, 50, 100, 200]), itl=rng.choice([None, 12.3, 25.1, 60.7])),
        )
        for i in range(3)
    ]
    requests, ids = [], []
    latest = rng.choice([5, 200])
    for arrived_at in sorted(rng.randint(0, latest) for _ in range(size)):
        prompt, output = rng.randint(1, rng.choice([20, 60])), rng.randint(1, rng.choice([3, 40]))
        group = rng.randint(0, 2)
        own_ids = [(group, i) for i in range(prompt // block_size)]
        if rng.random() < 0.3:
            own_ids = own_ids[: rng.randint(0, len(own_ids))]
        kind_of = rng.choice(classes)
        requests.append(
            oracle.Request(
                float(arrived_at), prompt, output, own_ids, output + rng.choice([0, 0, 5, 50]), kind_of.priority,
                kind_of.slo.ttft,
                itl_limit=kind_of.slo.itl or np.inf,
            )
        )  # fmt: skip
        ids.append((kind_of.name, own_ids))
    numbers = {}
    for _, own_ids in ids:
        for id_ in own_ids:
            numbers.setdefault(id_, len(numbers))
    load = sim.TraceLoadGenerator(
        arrived_at=[request.arrived_at for request in requests],
        prompt_tokens=[request.prompt_tokens for request in requests],
        output_tokens=[request.output_tokens for request in requests],
        max_tokens=[request.max_tokens for request in requests],
        class_names=[name for name, _ in ids],
        classes=classes,
        block_ids=[[numbers[id_] for id_ in own_ids] for _, own_ids in ids],
        id_block_tokens=block_size,
    )
    return requests, load


def a_scenario(seed, kind):
    """(engine, time limit, the oracle's arguments) of a random scenario with little memory."""
    rng = random.Random(seed)
    slots, block_size = rng.randint(1, 8), rng.choice([1, 4, 16, 5])
    blocks = rng.choice([200, *[rng.randint(4, 40)] * 4])
    caching, first = rng.random() < 0.6, rng.random() < 0.3
    order = rng.choice(["fcfs", *ORDERS])
    common = {"order": order, "async_scheduling": rng.random() < 0.4}
    ours, theirs = a_batcher(rng, kind, slots, block_size, common)
    if getattr(ours, "reserve_tokens", None):
        blocks = max(blocks, -(-ours.reserve_tokens // block_size))
    requests, load = a_trace(rng, block_size)
    watermark = rng.choice([0.0, 0.0, 0.1])
    overheads = {
        "before_queue": rng.choice([0.0, 3.0]),
        "per_step": rng.choice([0.0, 1.0]),
        "per_output_token": rng.choice([0.0, 0.5]),
        "at_completion": rng.choice([0.0, 2.0]),
    }
    longest = rng.choice([None, None, rng.randint(10, 100)])
    engine = sim.Engine(
        max_batch_size=slots,
        load_generator=load,
        batcher=ours,
        step_time=STEP,
        kv_cache=sim.KVCache(
            blocks=blocks, block_size=block_size, prefix_caching=caching, watermark=watermark, uncached_first=first
        ),
        max_model_len=longest,
        overheads=sim.Overheads(**overheads),
    )
    limit = rng.choice([None, None, 150.0])
    arguments = {
        "batcher": theirs,
        "slots": slots,
        "blocks": blocks,
        "block_size": block_size,
        "duration": seconds,
        "prefix_caching": caching,
        "uncached_first": first,
        "watermark": watermark,
        "order": order,
        "async_scheduling": common["async_scheduling"],
        "max_model_len": longest,
        "overheads": oracle.Overheads(**overheads),
        "time_limit": np.inf if limit is None else limit,
    }
    return engine, limit, requests, arguments


def check_against(run, result, arguments):
    """Every step, every request and every metric of a run."""
    steps = run.steps
    assert steps.time.values.tolist() == [step.begin for step in result.steps]
    assert steps.duration.values.tolist() == [step.end - step.begin for step in result.steps]
    for name, literal in (
        ("prefilling", lambda step: sum(one.is_prefill for one in step.chosen)),
        ("prefill_tokens", lambda step: sum(one.tokens for one in step.chosen if one.is_prefill)),
        ("decoding", lambda step: sum(not one.is_prefill for one in step.chosen)),
        ("kv_blocks", lambda step: step.used),
    ):
        assert steps[name].values.tolist() == [literal(step) for step in result.steps], name
    if not arguments["async_scheduling"]:  # there arrivals join the queue a step earlier than a batch
        assert steps.queue_size.values.tolist() == [step.queue for step in result.steps]

    came = [request for request in result.requests if request.dropped or request.enqueued_at is not None]
    served = [request for request in came if not request.dropped]
    overheads = arguments["overheads"]

    def column(instants):
        return [np.nan if instant is None else instant for instant in instants]

    ours = run.requests
    for name, literal in (
        ("arrived_at", [request.arrived_at for request in came]),
        ("refused", [request.dropped for request in came]),
        ("started_at", column(request.admitted_at[0] if request.admitted_at else None for request in came)),
        ("first_token_at", column(request.seen_at[0] if request.seen_at else None for request in came)),
        ("completed_at", column(request.completed_at for request in came)),
        ("hit_tokens", [request.hits[0] * arguments["block_size"] if request.hits else 0 for request in came]),
        ("preempted", [request.preempted for request in came]),
    ):
        np.testing.assert_array_equal(ours[name].values, literal, err_msg=name)

    metrics = run.metrics
    gaps = [b - a for request in served for a, b in zip(request.seen_at, request.seen_at[1:], strict=False)]
    done = [request for request in served if request.completed_at is not None]
    samples = {
        "e2e": [request.completed_at - request.arrived_at for request in done],
        "ttft": [request.seen_at[0] - request.arrived_at for request in served if request.seen_at],
        "tpot": [
            (request.seen_at[-1] - request.seen_at[0]) / (request.output_tokens - 1)
            for request in done
            if request.output_tokens > 1
        ],
        "queue_time": [request.admitted_at[0] - request.arrived_at for request in served if request.admitted_at],
        "itl": gaps,
    }
    for name, values in samples.items():
        if not values:
            assert np.isnan(metrics[name].values).all()
            continue
        found = metrics[name]
        assert float(found.sel(stat="mean")) == pytest.approx(np.mean(values), rel=1e-12)
        assert float(found.sel(stat="max")) == pytest.approx(max(values), rel=1e-12)
        quantiles = np.quantile(values, [0.5, 0.9, 0.95, 0.99])
        if name == "itl":  # between two bins of 0.4 % the histogram can't interpolate as the values would
            low = [np.quantile(values, q, method="lower") for q in (0.5, 0.9, 0.95, 0.99)]
            high = [np.quantile(values, q, method="higher") for q in (0.5, 0.9, 0.95, 0.99)]
            assert (found.values[1:-1] >= np.multiply(low, 1 - 2**-8)).all()
            assert (found.values[1:-1] <= np.multiply(high, 1 + 2**-8)).all()
        else:
            np.testing.assert_allclose(found.values[1:-1], quantiles, rtol=1e-12)
    end = float(metrics.end_time)
    busy = sum((step.end - step.begin) * len(step.chosen) for step in result.steps)
    good = [request for request in done if request.in_time]
    tokens = sum(request.generated for request in served)
    used = sum((step.end - step.begin) * step.used for step in result.steps)
    computed = sum(one.tokens for step in result.steps for one in step.chosen)
    known = sum(request.prompt_tokens for request in served if request.admitted_at)
    hit = sum(request.hits[0] for request in served if request.hits) * arguments["block_size"]
    scheduled = sum(len(step.chosen) for step in result.steps)
    assert busy >= 0
    for name, value in (
        ("arrived", len(came)),
        ("started", len(samples["queue_time"])),
        ("first_tokens", len(samples["ttft"])),
        ("completed", len(done)),
        ("dropped", len(came) - len(served)),
        ("preemptions", result.preemptions),
        ("itl_samples", len(gaps)),
        ("steps", len(result.steps)),
        ("request_throughput", len(done) / end if end else np.nan),
        ("token_throughput", tokens / end if end else np.nan),
        ("goodput", len(good) / end if end else np.nan),
        (
            "slo_attainment",
            len(good) / (len(done) + len(came) - len(served)) if len(done) + len(came) > len(served) else np.nan,
        ),
        ("kv_use", used / arguments["blocks"] / end if end else np.nan),
        ("kv_peak", max((step.used for step in result.steps), default=0) / arguments["blocks"]),
        ("prefix_hit_rate", hit / known if known else np.nan),
        ("batch_size", scheduled / len(result.steps) if result.steps else np.nan),
        ("step_tokens", computed / len(result.steps) if result.steps else np.nan),
    ):
        assert float(metrics[name]) == pytest.approx(value, rel=1e-12, nan_ok=True), name
    assert overheads.before_queue >= 0


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_event_is_that_of_the_oracle(kind, seed):
    engine, limit, requests, arguments = a_scenario(seed, kind)
    check_against(engine.run(limit), oracle.simulate(requests, **arguments), arguments)


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1), warmup=st.sampled_from([0.0, 10.0, 40.0, 149.0]))
def test_metrics_are_of_what_comes_and_begins_after_the_warmup(kind, seed, warmup):
    engine = a_scenario(seed, kind)[0]
    run = engine.run(150.0, warmup=warmup)
    metrics, blocks = run.metrics, engine.kv_cache.blocks
    steps = run.steps.isel(step=run.steps.time.values >= warmup)
    requests = run.requests.isel(request=run.requests.arrived_at.values >= warmup)
    end = float(metrics.end_time)
    queued = run.requests.arrived_at.values + engine.overheads.before_queue
    left = np.fmin(np.where(np.isnan(run.requests.started_at), end, run.requests.started_at), end)
    waiting = np.where(run.requests.refused, 0.0, np.maximum(left - np.maximum(queued, warmup), 0.0)).sum()
    number, spent = steps.sizes["step"], end - warmup
    scheduled = float((steps.prefilling + steps.decoding).sum())
    for name, value in (
        ("arrived", requests.sizes["request"]),
        ("dropped", int(requests.refused.sum())),
        ("completed", int(requests.completed_at.notnull().sum())),
        ("steps", number),
        ("max_queue", int(steps.queue_size.max()) if number and not engine.batcher.async_scheduling else None),
        ("batch_size", scheduled / number if number else np.nan),
        ("step_tokens", float((steps.prefill_tokens + steps.decoding).sum()) / number if number else np.nan),
        ("kv_peak", int(steps.kv_blocks.max()) / blocks if number else 0.0),
        ("kv_use", float((steps.kv_blocks * steps.duration).sum()) / (blocks * spent)),
        ("utilization", float((steps.running * steps.duration).sum()) / (engine.max_batch_size * spent)),
        ("mean_queue", waiting / spent if not run.requests.preempted.any() else None),
    ):
        if value is not None:
            assert float(metrics[name]) == pytest.approx(value, rel=1e-9, nan_ok=True), name


def test_nothing_of_the_warmup_is_left_where_all_is_over_before_it():
    load = sim.BatchLoadGenerator(initial_batch=5, prompt_tokens=100, output_tokens=50)
    engine = sim.Engine(
        max_batch_size=4, load_generator=load, batcher=sim.TokenBudgetBatcher(), step_time=sim.LinearStepTime(base=0.02)
    )
    metrics = engine.run(100.0, warmup=50.0).metrics
    assert float(metrics.steps) == float(metrics.utilization) == float(metrics.mean_queue) == 0.0
    assert np.isnan(metrics.itl).all()
    assert np.isnan(metrics.batch_size)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    users=st.integers(1, 9),
    think=st.sampled_from([0.0, 7.0]),
)
def test_a_closed_loop_sends_the_next_request_when_one_is_answered(kind, seed, users, think):
    engine, _, _, arguments = a_scenario(seed, kind)
    arguments |= {"order": "fcfs", "time_limit": 300.0, "concurrency": users, "think_time": think}
    load = a_closed_load(users, think, seed)

    batcher = msgspec.structs.replace(engine.batcher, order="fcfs")
    engine = msgspec.structs.replace(engine, load_generator=load, batcher=batcher)
    # One that was issued, but hadn't come at the end of a run, is missing from its record: of a longer run, later ones.
    issued = engine.run(600.0).requests
    drawn = [
        oracle.Request(0.0, prompt, output)
        for prompt, output in zip(issued.prompt_tokens.values, issued.output_tokens.values, strict=True)
    ]
    result = oracle.simulate(drawn, **arguments)
    ours = engine.run(300.0).requests.completed_at.dropna("request").values
    theirs = [request.completed_at for request in result.requests if request.completed_at is not None]
    np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    turns=st.integers(1, 4),
    prefix=st.sampled_from([0, 9, 16]),
)
def test_conversations_find_what_was_said_before(kind, seed, turns, prefix):
    engine, _, _, arguments = a_scenario(seed, kind)
    arguments |= {"order": "fcfs", "time_limit": np.inf}
    size = arguments["block_size"]
    load = sim.RequestRateLoadGenerator(
        request_rate=0.1,
        requests=6,
        prompt_tokens=sim.Uniform(low=1, high=12),
        output_tokens=sim.Uniform(low=1, high=12),
        prefix=sim.SharedPrefix(tokens=prefix, groups=2) if prefix else None,
        sessions=sim.Sessions(turns=turns, think_time=3.0),
        seed=seed,
    )

    batcher = msgspec.structs.replace(engine.batcher, order="fcfs")
    requests = turns_of(load, size)
    engine = msgspec.structs.replace(engine, load_generator=load, batcher=batcher)
    run = engine.run()
    result = oracle.simulate(requests, **arguments)
    came = [request for request in result.requests if request.dropped or request.enqueued_at is not None]
    ours = run.requests
    np.testing.assert_array_equal(ours.arrived_at.values, [request.arrived_at for request in came])
    done = [np.nan if request.completed_at is None else request.completed_at for request in came]
    np.testing.assert_array_equal(ours.completed_at.values, done)
    hits = [request.hits[0] * size if request.hits else 0 for request in came]
    np.testing.assert_array_equal(ours.hit_tokens.values, hits)


def a_closed_load(users, think, seed):
    """Users who each ask again when they are answered."""
    return sim.ConcurrentLoadGenerator(
        target_concurrency=users,
        think_time=think,
        prompt_tokens=sim.Uniform(low=1, high=30),
        output_tokens=sim.Uniform(low=1, high=20),
        seed=seed,
    )


def some_conversations(rng, seed, think_times):
    """A few conversations, some of which begin with the same text."""
    prefix = rng.choice([0, 9, 16])
    return sim.RequestRateLoadGenerator(
        request_rate=rng.choice([0.1, 0.5]),
        requests=6,
        prompt_tokens=sim.Uniform(low=1, high=12),
        output_tokens=sim.Uniform(low=1, high=12),
        prefix=sim.SharedPrefix(tokens=prefix, groups=2) if prefix else None,
        sessions=sim.Sessions(turns=rng.randint(1, 4), think_time=rng.choice(think_times)),
        seed=seed,
    )


def turns_of(load, block_size):
    """The requests of conversations that all have as many turns, as the oracle has them."""
    endless = sim.Engine(
        max_batch_size=100, load_generator=load, batcher=sim.IFBatcher(), step_time=STEP
    ).run()  # refuses none: so its record tells all lengths
    prompts, outputs = endless.requests.prompt_tokens.values.tolist(), endless.requests.output_tokens.values.tolist()
    turns, sessions = load.sessions.turns, load.requests
    prefix = load.prefix.tokens if load.prefix else 0
    groups = prefix_groups(load, sessions) if prefix else None
    requests = []
    for i in range(sessions * turns):
        session, turn = (i, 0) if i < sessions else ((i - sessions) // (turns - 1), 1 + (i - sessions) % (turns - 1))
        shared = prefix // block_size
        full = (prompts[i] + outputs[i]) // block_size
        own_ids = [("prefix", groups[session], j) if j < shared else (session, j) for j in range(full)]
        before = None if turn == 0 else (session if turn == 1 else i - 1)
        arrived_at = float(endless.requests.arrived_at.values[i]) if turn == 0 else 0.0
        think = load.sessions.think_time
        requests.append(oracle.Request(arrived_at, prompts[i], outputs[i], own_ids, after=before, think=think))
    return requests


def prefix_groups(load, sessions):
    """The group of each conversation's shared text: seen from which first turns find one another's."""
    from vecsim.kernel.scenarios import draw_lengths
    from vecsim.kernel.state import LengthParameters, Streams
    from vecsim.lengths import DRAWS
    from vecsim.load import GROUP
    from vecsim.scenarios import _seed_for

    stream = load.streams()[GROUP]
    one = {
        "code": stream.code, "a": stream.a, "b": stream.b, "table_start": 0, "table_size": len(stream.table),
        "draws": DRAWS[stream.code], "seed": int(_seed_for(np.array([load.seed]), np.array([stream.purpose]))[0]),
        "offset": 0,
    }  # fmt: skip
    drawn = Streams(np.zeros(1, np.int64), np.array([sessions]), np.zeros(1, np.int64), np.empty(sessions, np.int32))
    kinds = {"seed": np.int64, "offset": np.int64}  # others are floats; of another type all is compiled once more
    parameters = LengthParameters(**{name: np.array([one[name]], kinds.get(name, np.float64)) for name in one})
    draw_lengths(0, 1, parameters, np.array(stream.table, np.int64), drawn, np.zeros(1, np.uint8))
    return drawn.values.tolist()


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    light=st.booleans(),
    warmup=st.sampled_from([0.0, 20.0, 100.0]),
)
def test_a_sweep_gives_what_a_run_gives(kind, seed, light, warmup):
    # Without a record of the steps, and where the engine isn't overloaded, the kernel goes other ways.
    engine, limit, _, _ = a_scenario(seed, kind)
    if light:
        rng = random.Random(seed)
        memory = sim.KVCache(blocks=rng.choice([8, 20, 400]), block_size=rng.choice([4, 5, 16]))
        load = sim.PoissonLoadGenerator(
            request_rate=rng.choice([0.01, 0.03, 0.1]),
            requests=60,
            prompt_tokens=sim.Uniform(low=1, high=20),
            output_tokens=sim.Uniform(low=1, high=rng.choice([2, 20])),
            seed=seed,
        )
        batcher = msgspec.structs.replace(engine.batcher, order="fcfs", async_scheduling=rng.random() < 0.2)
        if getattr(batcher, "reserve_tokens", None):
            batcher = msgspec.structs.replace(batcher, reserve_tokens=30)
        engine = msgspec.structs.replace(engine, load_generator=load, batcher=batcher, kv_cache=memory)
    if limit is not None and warmup >= limit:
        warmup = 0.0
    run = engine.run(limit, warmup=warmup)
    swept = sim.sweep(engine, limit, warmup=warmup, keep="requests", progress=False)
    for name, ours in run.metrics.data_vars.items():
        theirs = swept[name]
        if ours.dtype.kind == "i":
            np.testing.assert_array_equal(ours, theirs, err_msg=str(name))
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9, err_msg=str(name))
    for name, ours in run.requests.data_vars.items():
        np.testing.assert_array_equal(ours, swept[name], err_msg=str(name))


def test_prompts_without_end_leave_what_was_noted_of_decodes_alone():
    # Steps of prompts alone, one after the other, and not a single decode between them.
    engine = sim.Engine(
        max_batch_size=2,
        load_generator=sim.BatchLoadGenerator(initial_batch=5000, prompt_tokens=10, output_tokens=1),
        batcher=sim.PrefillFirstBatcher(max_num_batched_tokens=20),
        step_time=STEP,
        slo=sim.SLO(itl=1),
    )
    metrics = engine.run().metrics
    assert int(metrics.completed) == 5000
    assert float(metrics.slo_attainment) == 1
