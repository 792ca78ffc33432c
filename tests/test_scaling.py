"""Planners: decisions worked out by hand, predictors against NumPy, compiled rules against plain ones."""

import functools
import math
import pickle

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim import scaling

# A prompt of 1,000 tokens takes 0.01 + 0.1 s; 40 requests decode within 0.05 s a step, 800 tokens a second
PROFILE = sim.LinearStepTime(base=0.01, per_prefill_token=1e-4, per_decode_request=1e-3)


@numba.njit
def one_more(view, memory):
    """Add a decode worker at every second tick."""
    memory[0] += 1
    return 0, 1 if memory[0] % 2 == 0 else 0


PLANNERS = {
    "schedule": sim.Schedule(changes=[(10, "decode", 3), (10, "prefill", 2), (60.5, "decode", 1)]),
    "load": sim.LoadPlanner(),
    "load, later": sim.LoadPlanner.later(),
    "sla": sim.SLAPlanner(profile=PROFILE, decode_profile=sim.LinearStepTime(base=0.02, per_context_token=1e-7)),
    "sla, average": sim.SLAPlanner(profile=PROFILE, predictor="moving_average", window=3, correction=False),
    "sla, trend": sim.SLAPlanner(profile=PROFILE, predictor="linear_trend", kv_tokens=50_000),
    "sla, kalman": sim.SLAPlanner(profile=PROFILE, predictor="kalman", min_workers=2),
    "throughput": sim.ThroughputPlanner(),
    "latency": sim.ThroughputPlanner.latency(max_gpus=16),
    "reactive": sim.ReactivePlanner(ttft=1.0),
    "reactive, floor": sim.ReactivePlanner(
        interval=30, max_gpus=16, floor=sim.SLAPlanner(profile=PROFILE, interval=75, predictor="linear_trend")
    ),
    "throughput, floor": sim.ThroughputPlanner(
        floor=sim.SLAPlanner(profile=PROFILE, interval=60, correction=False, min_workers=2, max_gpus=7)
    ),
    "custom": sim.CustomPlanner(rule=one_more, interval=7.0),
}


def view(prefill=2, decode=2, **fields):
    """What a planner is told of so many workers, all ready and idle; of them an array, or one value for all."""
    workers = prefill + decode
    values = dict.fromkeys(scaling.VIEW_ARRAYS, 0.0) | {"ready": 1.0}
    values |= dict.fromkeys(scaling.PlannerView._fields[len(values) :], 0)
    values |= {"prefill_workers": prefill, "prefill_gpus": 1, "decode_gpus": 1, "context_length": 1000}
    values |= {"ttft": math.nan, "itl": math.nan, "now": 0.0} | fields
    for name in scaling.VIEW_ARRAYS:
        values[name] = np.broadcast_to(np.asarray(values[name], float), workers).copy()
    return scaling.PlannerView(**values)


class Asked:
    """A planner asked tick after tick, with what it remembers."""

    def __init__(self, planner, rules=scaling):
        self.rules = rules
        self.code = planner.code
        self.numbers = np.array(planner.numbers())
        self.memory = np.zeros(scaling.MEMORY)

    def sample(self, seen):
        self.rules.sample(self.code, self.numbers, seen, self.memory)

    def decide(self, seen):
        return self.rules.decide(self.code, self.numbers, seen, self.memory)


def load_decisions(planner, queues, workers=(2, 2), **fields):
    """Decision of a LoadPlanner at one tick, after a sample for each length of the queue."""
    asked = Asked(planner)
    for queue in queues:
        seen = view(*workers, prefill_queue=queue, **fields)
        asked.sample(seen)
    return asked.decide(seen)


FIVE = functools.partial(sim.LoadPlanner, interval=5.0)


@pytest.mark.parametrize(
    ("queues", "change"),
    [
        ([0, 0, 0, 0, 0], -1),  # 0 < 0.2
        ([0, 0, 1, 0, 0], 0),  # mean 0.2, not below 0.2
        ([1, 1, 1, 0, 1], 1),  # mean 0.8 > 0.5; 1 + 3 x (1 - 1) = 1 > 0.5
        ([0, 0, 1, 1, 1], 1),  # mean 0.6; 1 + 3 x (1 - 0) = 4
        ([4, 3, 2, 1, 1], 0),  # mean 2.2, but 1 + 3 x (1 - 4) = -8
        ([2, 2, 2, 2, 1], 0),  # mean 1.8, but 1 + 3 x (1 - 2) = -2
        ([1, 0, 0, 0, 1], 0),  # mean 0.4
    ],
)
def test_the_prefill_queue_decides_by_its_mean_and_trend(queues, change):
    assert load_decisions(FIVE(), queues, kv_use=0.7) == (change, 0)


@pytest.mark.parametrize(
    ("use", "waiting", "change"),
    [
        ([0.4, 0.5], [0, 0], -1),  # mean 0.45
        ([0.4, 0.5], [0, 6], 0),  # (0.4 + 0.5 + 6 x 0.02) / 2 = 0.51
        ([0.8, 0.9], [0, 4], 0),  # 0.89
        ([0.8, 0.9], [0, 6], 1),  # 0.91
    ],
)
def test_kv_use_and_who_waits_decide_on_decode_workers(use, waiting, change):
    fields = {"kv_use": [9.0, 9.0, *use], "waiting": [9.0, 9.0, *waiting]}  # of prefill workers it doesn't matter
    assert load_decisions(FIVE(), [0.4, 0.4], **fields) == (0, change)
    one_pool = {"kv_use": use, "waiting": waiting}
    assert load_decisions(FIVE(), [0, 0], workers=(0, 2), **one_pool) == (0, change)


def test_kv_use_is_the_mean_over_all_samples():
    asked = Asked(FIVE())
    for use in (
        0.2,
        0.9,
    ):  # mean 0.55
        asked.sample(view(kv_use=use, prefill_queue=0.4))
    assert asked.decide(view(prefill_queue=0.4)) == (0, 0)
    for use in (0.2, 0.6):  # mean 0.4: what was before the last tick is forgotten
        asked.sample(view(kv_use=use, prefill_queue=0.4))
    assert asked.decide(view(prefill_queue=0.4)) == (0, -1)
    assert asked.decide(view()) == (0, 0)  # no sample, no decision


def test_a_decode_worker_stays_for_three_intervals_after_one_was_added():
    asked = Asked(FIVE())
    decisions = []
    for use in (1.0, 0.1, 0.1, 0.1, 0.1):
        asked.sample(view(kv_use=use, prefill_queue=0.4))
        decisions.append(asked.decide(view(prefill_queue=0.4))[1])
    assert decisions == [1, 0, 0, -1, -1]


def test_nothing_is_sampled_while_a_worker_starts_nor_decided_on_other_workers():
    asked = Asked(FIVE())
    idle = view()
    starting = view(2, 3, ready=[1, 1, 1, 1, 0], starting=[0, 0, 0, 0, 1])
    asked.sample(starting)
    assert asked.decide(starting) == (0, 0)
    asked.sample(idle)
    assert asked.decide(starting) == (0, 0)
    asked.sample(idle)
    assert asked.decide(view(2, 3)) == (0, 0)  # there's another one: a new interval
    asked.sample(idle)
    assert asked.decide(idle) == (-1, -1)


@pytest.mark.parametrize(
    ("workers", "fields", "change"),
    [
        ((2, 2), {"max_gpus": 4}, (0, 0)),  # all 4 in use
        ((2, 2), {"max_gpus": 5}, (1, 0)),  # prefill first
        ((2, 2), {"max_gpus": 6}, (1, 1)),
        ((2, 2), {"max_gpus": 7, "decode_gpus": 2}, (1, 0)),  # 2 + 2 x 2 + 1 = 7
        ((2, 2), {"max_gpus": 7, "prefill_gpus": 2}, (0, 1)),  # 2 x 2 + 2 + 2 = 8, but + 1 = 7
        ((5, 5), {"max_gpus": 8}, (0, 0)),  # none is taken for being too many
    ],
)
def test_workers_are_added_within_the_gpus_that_there_are(workers, fields, change):
    planner = FIVE(max_gpus=fields.pop("max_gpus"))
    assert load_decisions(planner, [3, 3], workers, kv_use=1.0, **fields) == change


def test_a_worker_that_goes_makes_room_for_another():
    assert load_decisions(FIVE(max_gpus=4), [3, 3], kv_use=0.1) == (1, -1)
    assert load_decisions(FIVE(max_gpus=4), [0, 0], kv_use=1.0) == (-1, 1)


def test_no_pool_falls_below_its_minimum_and_one_that_is_there_is_brought_to_it():
    assert load_decisions(FIVE(), [0, 0], (1, 1)) == (0, 0)
    assert load_decisions(FIVE(min_workers=2), [0, 0], (2, 3)) == (0, -1)
    assert load_decisions(FIVE(min_workers=3), [0, 0], (2, 1)) == (1, 2)
    assert load_decisions(FIVE(min_workers=2, max_gpus=4), [0, 0], (1, 1), decode_gpus=2) == (1, 0)


def test_later_defaults_of_the_load_planner():
    planner = sim.LoadPlanner.later(max_gpus=16)
    assert (planner.interval, planner.sample_interval, planner.prefill_queue_high) == (180.0, 10.0, 5.0)
    assert (planner.prefill_queue_low, planner.kv_low, planner.kv_high, planner.max_gpus) == (0.2, 0.5, 0.9, 16)


def demand(requests, prompt=1000, output=100, now=180.0, **fields):
    return {
        "arrived": requests,
        "prompt_tokens": requests * prompt,
        "ended": requests,
        "output_tokens": requests * output,
        "now": now,
    } | fields


SLA = functools.partial(sim.SLAPlanner, profile=PROFILE, correction=False, max_gpus=100)


@pytest.mark.parametrize(
    ("fields", "planned", "workers"),
    [
        # 10 requests/s x 0.11 s = 1.1; 10 x 100 tokens/s / (40 / 0.05 tokens/s) = 1.25
        ({}, {}, (2, 2)),
        # 3,000 tokens take two steps, 0.02 + 0.3 s: 3.2
        ({"prompt": 3000}, {}, (4, 2)),
        # in one step 0.31 s: 3.1
        ({"prompt": 3000}, {"max_num_batched_tokens": 8192}, (4, 2)),
        # 20 requests at a time in 0.03 s: 1000 x 0.03 / 20 = 1.5; 5 in 0.015: 3
        ({}, {"max_batch_size": 20}, (2, 2)),
        ({}, {"max_batch_size": 5}, (2, 3)),
        # contexts of 1,050 tokens: 5,250 are five of them
        ({}, {"kv_tokens": 5250}, (2, 3)),
        # an ITL of 0.02: 10 at a time, 0.002 s a token: 2 workers; one of 0.005 isn't met: one at a time, 11
        ({}, {"itl": 0.02}, (2, 2)),
        ({}, {"itl": 0.005}, (2, 11)),
        # with an ITL of 0.0305 s 20 at a time in 0.03 s
        ({}, {"itl": 0.0305}, (2, 2)),
        ({"requests": 0, "prompt": 0, "output": 0}, {}, (1, 1)),
        # twice the time since the last tick: 5 requests/s
        ({"now": 360.0}, {}, (1, 1)),
        # contexts cost: 1,050 x 1e-6 a request besides 1e-3: 0.04 / 0.00205 = 19.5 -> 19, 0.04895 / 19 s: 2.58
        ({}, {"decode_profile": sim.LinearStepTime(base=0.01, per_request=1e-3, per_context_token=1e-6)}, (2, 3)),
    ],
)
def test_workers_are_those_that_the_load_needs_within_the_sla(fields, planned, workers):
    asked = Asked(SLA(**planned))
    if fields.get("requests") == 0:
        asked.decide(view(1, 1, **demand(1, now=1.0)))
    change = asked.decide(view(1, 1, **(demand(**({"requests": 1800} | fields)))))
    assert change == (workers[0] - 1, workers[1] - 1)


def test_one_pool_needs_what_prefill_and_decode_need_together():
    # 1.1 + 1.25 = 2.35
    assert Asked(SLA()).decide(view(0, 5, **demand(1800))) == (0, -2)


def test_nothing_is_decided_before_the_first_request_nor_on_decode_before_the_first_has_ended():
    asked = Asked(SLA())
    assert asked.decide(view(3, 3, now=180.0)) == (0, 0)
    assert asked.decide(view(3, 3, arrived=1800, prompt_tokens=1_800_000, now=360.0)) == (-1, 0)


def test_without_gpus_enough_each_pool_gets_its_share():
    # 70 requests/s: 7.7 -> 8 and 8.75 -> 9 of 8 GPUs: floor(8 x 8 / 17) = 3, and the other 5
    assert Asked(SLA(max_gpus=8)).decide(view(1, 1, **demand(12_600))) == (2, 4)
    # of two GPUs each: 8 x 2 + 9 = 25 GPUs; floor(8 x 8 / 25) = 2; 8 - 4 = 4
    assert Asked(SLA(max_gpus=8)).decide(view(1, 1, prefill_gpus=2, **demand(12_600))) == (1, 3)
    # 200 x the prefill alone: 22 and 1 of 8 GPUs: min(8 - 1, floor(22 x 8 / 23)) = 7
    seen = view(1, 1, **demand(36_000, output=1))
    assert Asked(SLA(max_gpus=8)).decide(seen) == (6, 0)
    # one pool: 7.7 + 8.75 = 16.45 -> 17
    assert Asked(SLA(max_gpus=8)).decide(view(0, 1, **demand(12_600))) == (0, 7)


@pytest.mark.parametrize(
    ("ttft", "workers"),
    [
        (math.nan, 2),
        (0.11, 2),  # as expected
        (1.1, 2),  # a queue: counts as 1
        (0.055, 1),  # half, cached: 0.55
    ],
)
def test_prefill_is_corrected_by_observed_over_expected_ttft(ttft, workers):
    asked = Asked(SLA(correction=True))
    assert asked.decide(view(1, 2, ttft=ttft, **demand(1800)))[0] == workers - 1


def test_decode_is_corrected_by_observed_over_expected_itl():
    # 15 requests/s: 1500 tokens/s x 0.05 / 40 = 1.875 -> 2 workers uncorrected.
    # Each lasts 0.11 + 99 x 0.06 = 6.05 s; in each of 4 workers 15 / 4 x 6.05 = 22.6875 at a time, for which
    # 0.0326875 s are expected: 0.06 is 1.8356 times as much. So an ITL of 0.05 / 1.8356 = 0.02724 by the profile:
    # 17 requests in 0.027 s, 1500 x 0.027 / 17 = 2.38
    seen = view(2, 4, ttft=0.11, itl=0.06, **demand(2700))
    assert Asked(SLA()).decide(seen) == (0, -2)
    asked = Asked(SLA(correction=True))
    assert asked.decide(seen) == (0, -1)
    assert asked.memory[scaling.DECODE_FACTOR] == pytest.approx(0.06 / 0.0326875)
    # What isn't observed anew stays
    assert asked.decide(view(2, 4, **demand(2700, now=360.0))) == (0, -1)


def series(values, **fields):
    """What is predicted after each value."""
    numbers = np.array(SLA(**fields).numbers())
    memory = np.zeros(scaling.MEMORY)
    return [scaling.predicted(numbers, memory, scaling.PROMPTS, float(value)) for value in values]


def test_the_constant_predictor_and_the_moving_average():
    assert series([5, 2, 8], predictor="constant") == [5, 2, 8]
    # 4; (4 + 8) / 2; (4 + 8 + 3) / 3; (8 + 3 + 1) / 3
    assert series([4, 8, 3, 1], predictor="moving_average", window=3) == pytest.approx([4, 6, 5, 4])


def test_the_linear_trend_goes_one_interval_on():
    # 4; 4, 8 -> 12; 4, 8, 3: mean 5, slope (3 - 4) / 2 = -0.5, 5 - 2 x 0.5 = 4; 8, 3, 1: 4 - 2 x 3.5 < 0
    assert series([4, 8, 3, 1], predictor="linear_trend", window=3) == pytest.approx([4, 12, 4, 0])


VALUES = st.lists(st.floats(0, 1000), min_size=1, max_size=30)


@given(values=VALUES, window=st.integers(1, scaling.MOST_WINDOW))
@settings(max_examples=50, deadline=None)
def test_windows_agree_with_numpy(values, window):
    average = series(values, predictor="moving_average", window=window)
    trend = series(values, predictor="linear_trend", window=window)
    for i in range(len(values)):
        last = np.array(values[: i + 1][-window:])
        assert average[i] == pytest.approx(last.mean(), abs=1e-6)
        if last.size > 1:
            line = np.polynomial.Polynomial.fit(np.arange(last.size), last, 1)
            assert trend[i] == pytest.approx(max(line(last.size), 0.0), abs=1e-6)


@given(values=VALUES, noises=st.tuples(*[st.floats(0.01, 100)] * 3))
@settings(max_examples=50, deadline=None)
def test_the_kalman_filter_is_that_of_the_textbook(values, noises):
    step, seen = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])
    moves, observed = np.diag(noises[:2]), np.array([[noises[2]]])
    state, covariance = np.array([[values[0]], [0.0]]), 1000.0 * np.eye(2)
    expected = []
    for i, value in enumerate(values):
        if i > 0:
            gain = covariance @ seen.T @ np.linalg.inv(seen @ covariance @ seen.T + observed)
            state = state + gain @ (np.array([[value]]) - seen @ state)
            covariance = (np.eye(2) - gain @ seen) @ covariance
        state = step @ state
        covariance = step @ covariance @ step.T + moves
        expected.append(max(float(state[0, 0]), 0.0))
    level, trend, observation = noises
    found = series(values, predictor="kalman", level_noise=level, trend_noise=trend, observation_noise=observation)
    assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_the_second_value_of_a_kalman_filter_by_hand():
    # First: level 10, trend 0, both of variance 1000; predicted: 10, variances 1000 + 1000 + 1 and 1000 + 0.1, between
    # them 1000. Then 20: gains 2001 / 2011 and 1000 / 2011 of 10: level 19.950, trend 4.973; together 24.923
    assert series([10, 20], predictor="kalman") == pytest.approx([10, 10 + 10 * 3001 / 2011])


def test_predicted_load_decides():
    asked = Asked(SLA(predictor="linear_trend"))
    # 900 then 1,800 in an interval, then 2,700 expected: 15/s x 0.11 = 1.65 -> 2, 15 x 100 x 0.00125 = 1.875 -> 2
    assert asked.decide(view(1, 1, **demand(900))) == (0, 0)
    assert asked.decide(view(1, 1, **demand(1800, now=360.0))) == (1, 1)


@pytest.mark.parametrize(
    ("queued", "queue", "change"),
    [
        ([0, 1000], 0, 1),  # any with 1.0 x the context length of 1,000
        ([0, 999], 0, 0),
        ([99, 50], 0, -1),  # all below 0.1
        ([100, 0], 0, 0),  # one isn't
        ([500, 0], 1000, 1),  # half of the shared queue each: 1,000
        ([50, 0], 98, -1),  # 99 and 49
        ([50, 0], 102, 0),
    ],
)
def test_queued_prompt_tokens_decide_on_prefill_workers(queued, queue, change):
    seen = view(queued_tokens=[*queued, 5000, 5000], queue_tokens=queue, kv_use=0.7)
    assert Asked(sim.ThroughputPlanner()).decide(seen) == (change, 0)
    unknown = seen._replace(context_length=0)
    assert Asked(sim.ThroughputPlanner()).decide(unknown) == (0, 0)


@pytest.mark.parametrize(
    ("use", "waiting", "change"),
    [
        ([0.7, 0.9], [0, 0.2], 1),  # any above 1
        ([0.7, 1.0], [0, 0], 0),
        ([0.5, 0.3], [0, 0.2], -1),  # all below 0.6
        ([0.5, 0.3], [0, 0.3], 0),
    ],
)
def test_kv_use_with_waiters_decides_on_decode_workers(use, waiting, change):
    seen = view(0, 2, kv_use=use, kv_waiting=waiting)
    assert Asked(sim.ThroughputPlanner()).decide(seen) == (0, change)
    both = view(2, 2, kv_use=[9, 9, *use], kv_waiting=[0, 0, *waiting], queued_tokens=200)
    assert Asked(sim.ThroughputPlanner()).decide(both) == (0, change)


def test_the_target_latency_has_other_thresholds():
    asked = Asked(sim.ThroughputPlanner.latency())
    assert asked.decide(view(queued_tokens=[0, 100, 0, 0], kv_use=0.41)) == (1, 1)
    assert asked.decide(view(queued_tokens=[0, 1, 0, 0], kv_use=0.4)) == (0, 0)
    assert asked.decide(view(kv_use=0.09)) == (-1, -1)


@pytest.mark.parametrize("planner", [sim.ThroughputPlanner(), sim.ReactivePlanner(), SLA()])
def test_nothing_is_changed_while_a_worker_starts(planner):
    fields = {"queued_tokens": 5000, "kv_use": 2.0, "predicted_ttft": 9.0, "predicted_itl": 9.0, **demand(9000)}
    assert Asked(planner).decide(view(2, 2, **fields)) != (0, 0)
    for pool in (0, 3):
        starting = np.arange(4) == pool
        assert Asked(planner).decide(view(2, 2, ready=~starting, starting=starting, **fields)) == (0, 0)


@pytest.mark.parametrize(
    ("ttft", "change"),
    [
        ([0.6, 0.7, 0.51], 1),  # all above 0.5
        ([0.6, 0.7, 0.5], 0),
        ([0.3, 0.2, 0.1], -1),  # the most: 0.1 of its own, 0.2 x 3 / 2 = 0.3 of waiting < 0.8 x (0.5 - 0.1) = 0.32
        ([0.32, 0.2, 0.1], 0),  # 0.33
        ([0.3, math.nan, 0.1], -1),  # no prompt has come, and none waits
        ([0.6, math.nan, 0.7], 0),
    ],
)
def test_prefill_workers_by_predicted_ttft(ttft, change):
    seen = view(3, 2, predicted_ttft=[*ttft, 0, 0], own_ttft=0.1, predicted_itl=0.045)
    assert Asked(sim.ReactivePlanner()).decide(seen) == (change, 0)


def test_an_idle_pool_shrinks_unless_prompts_wait():
    idle = {"predicted_ttft": math.nan, "own_ttft": math.nan, "predicted_itl": math.nan, "own_itl": math.nan}
    assert Asked(sim.ReactivePlanner()).decide(view(3, 2, **idle)) == (-1, -1)
    assert Asked(sim.ReactivePlanner()).decide(view(3, 2, queued_tokens=[0, 8, 0, 0, 0], **idle)) == (0, -1)


@pytest.mark.parametrize(
    ("itl", "use", "change"),
    [
        ([0.06, 0.051, 0.09], 0.1, 1),  # all above 0.05
        ([0.06, 0.049, 0.09], 0.1, 0),
        ([0.02, 0.029, 0.02], 0.6, -1),  # 0.01 + 0.019 x 3 / 2 = 0.0385 < 0.8 x 0.05 = 0.04; 0.6 x 3 / 2 = 0.9 < 1
        ([0.02, 0.031, 0.02], 0.6, 0),  # 0.0415
        ([0.02, 0.029, 0.02], 0.7, 0),  # 1.05
        ([0.02, 0.029, math.nan], 0.1, -1),  # one decodes nothing
        ([0.06, 0.07, math.nan], 0.1, 0),
        ([0.02, 0.029, math.nan], 0.7, 0),
    ],
)
def test_decode_workers_by_predicted_itl_and_kv_use(itl, use, change):
    fields = {"predicted_itl": [0, 0, *itl], "own_itl": 0.01, "kv_use": use - 0.05, "kv_waiting": 0.05}
    assert Asked(sim.ReactivePlanner()).decide(view(2, 3, predicted_ttft=0.45, **fields)) == (0, change)


@pytest.mark.parametrize(
    ("ttft", "itl", "change"),
    [
        (0.6, 0.01, 1),
        (0.1, 0.06, 1),
        (0.1, 0.01, -1),
        (0.1, 0.045, 0),  # 0.045 x 2 > 0.04
        (0.45, 0.01, 0),
    ],
)
def test_one_pool_grows_for_either_latency_and_shrinks_for_both(ttft, itl, change):
    assert Asked(sim.ReactivePlanner()).decide(view(0, 2, predicted_ttft=ttft, predicted_itl=itl)) == (0, change)


def floored(**fields):
    """With no more to do than one worker could, and a floor each 20 s that counts in 10 requests/s: (2, 2)."""
    floor = {"profile": PROFILE, "interval": 20, "correction": False, "max_gpus": 16} | fields
    return Asked(sim.ReactivePlanner(interval=10, max_gpus=16, floor=sim.SLAPlanner(**floor)))


def test_a_floor_lifts_pools_at_once_and_holds_them_there():
    asked = floored()
    # 100 requests in each 10 s: as in the tests of SLAPlanner 1.1 and 1.25 workers, so two of each
    assert asked.decide(view(3, 1, **demand(100, now=10.0))) == (-1, 0)  # no floor yet
    assert asked.decide(view(2, 1, **demand(100, now=20.0))) == (0, 1)
    assert asked.decide(view(2, 2, **demand(0, now=30.0))) == (0, 0)
    # 3 requests/s of its interval, 60 in 20 s: 0.33 and 0.375 workers
    assert asked.decide(view(2, 2, **demand(60, now=40.0))) == (-1, -1)
    assert asked.decide(view(1, 1, **demand(400, now=50.0))) == (0, 0)
    # 45 requests/s: 4.95 and 5.625 workers; all at once
    assert asked.decide(view(1, 1, **demand(500, now=60.0))) == (4, 5)
    assert asked.decide(view(7, 7, **demand(0, now=70.0))) == (-1, -1)


def test_a_floor_adds_nothing_to_what_load_asks_for_above_it():
    late = {"predicted_ttft": 9.0, "predicted_itl": 9.0}
    assert floored().decide(view(2, 4, **late, **demand(200, now=20.0))) == (1, 1)
    assert floored().decide(view(1, 1, **late, **demand(200, now=20.0))) == (1, 1)


def test_a_floor_is_set_while_a_worker_starts_and_met_afterwards():
    asked = floored()
    starting = view(1, 2, ready=[1, 1, 0], starting=[0, 0, 1], **demand(200, now=20.0))
    assert asked.decide(starting) == (0, 0)
    assert asked.decide(view(1, 2, **demand(0, now=30.0))) == (1, 0)


def test_a_floor_is_within_its_gpus_and_those_of_the_planner():
    # 45 requests/s: 5 and 6 workers. floor(5 x 8 / 11) = 3, and 5
    assert floored(max_gpus=8).decide(view(1, 1, **demand(900, now=20.0))) == (2, 4)
    # 8 workers that decode more than the floor has, of 16 GPUs: none is taken for the prefill but by their load
    busy = {"predicted_itl": 0.049}
    assert floored().decide(view(2, 14, **busy, **demand(900, now=20.0))) == (0, 0)
    assert floored().decide(view(2, 14, **demand(900, now=20.0))) == (1, -1)


def test_a_floor_of_one_pool_needs_what_prefill_and_decode_need_together():
    asked = floored()
    assert asked.decide(view(0, 1, **demand(100, now=10.0))) == (0, 0)
    assert asked.decide(view(0, 1, **demand(100, now=20.0))) == (0, 2)  # 2.35


def test_a_floor_stays_as_it_is_where_nothing_is_known():
    asked = floored()
    assert asked.decide(view(3, 3, now=20.0)) == (-1, -1)
    # Nothing has ended yet: the floor of decode workers stays at the minimum
    assert asked.decide(view(2, 2, arrived=200, prompt_tokens=200_000, now=40.0)) == (0, -1)


def test_a_floor_is_due_at_the_first_tick_after_its_interval():
    planner = sim.ReactivePlanner(interval=0.1, floor=sim.SLAPlanner(profile=PROFILE, interval=0.25, correction=False))
    asked = Asked(planner)
    changes = [asked.decide(view(1, 1, **demand(1, now=0.1 * tick)))[1] for tick in range(1, 11)]
    # At 0.3, 0.5, 0.8 and 1.0: 3, 2, 3 and 2 requests, 10 a second
    assert changes == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    ticks = Asked(sim.ReactivePlanner(interval=0.1, floor=sim.SLAPlanner(profile=PROFILE, interval=0.3)))
    over = []
    for tick in range(1, 10):
        ticks.decide(view(1, 1, **demand(1, now=tick * 0.1)))
        over.append(ticks.memory[scaling.FLOOR_TICKS])
    assert over == [0, 0, 1, 1, 1, 2, 2, 2, 3]


def test_a_floor_is_corrected_by_means_over_its_interval():
    asked = floored(correction=True)
    # First tokens after 0.11 and 0.044 s, weighed by 50 and 150 requests: 0.0605, 0.55 of what is expected; ITLs of
    # 0.05 and 0.07, weighed in the same way
    asked.decide(view(2, 2, **demand(50, ttft=0.11, itl=0.05, now=10.0)))
    asked.decide(view(2, 2, **demand(150, ttft=0.044, itl=0.07, now=20.0)))
    assert asked.memory[scaling.FLOOR_MEMORY + scaling.PREFILL_FACTOR] == pytest.approx(0.55)
    # 10 requests/s / 2 workers for 0.0605 + 99 x 0.065 s: 32.4775 at a time, for which 0.0424775 s are expected
    factor = asked.memory[scaling.FLOOR_MEMORY + scaling.DECODE_FACTOR]
    assert factor == pytest.approx(0.065 / 0.0424775)


def test_a_floor_as_often_as_the_planner_is_that_of_its_planner():
    rng = np.random.default_rng(3)
    floor = SLA(interval=30, predictor="linear_trend", correction=True)
    alone, asked = Asked(floor), Asked(sim.ReactivePlanner(interval=30, max_gpus=100, floor=floor))
    # Without load its planner goes down by one where it may
    idle = {"predicted_ttft": math.nan, "predicted_itl": math.nan}
    for tick in range(1, 9):
        there = rng.integers(1, 6, 2)
        fields = demand(int(rng.integers(1, 500)), ttft=0.2, itl=0.03, now=30.0 * tick)
        wanted = np.add(there, alone.decide(view(*there, **fields)))
        reached = np.add(there, asked.decide(view(*there, **idle, **fields)))
        assert list(reached) == list(np.maximum(wanted, there - (there > 1)))


def test_the_last_worker_is_never_taken():
    for planner in (sim.ThroughputPlanner(), sim.ReactivePlanner()):
        assert Asked(planner).decide(view(1, 1)) == (0, 0)
        assert Asked(planner).decide(view(2, 2)) == (-1, -1)


def test_a_schedule_brings_pools_to_the_workers_that_it_names():
    asked = Asked(PLANNERS["schedule"])
    assert scaling.next_change(asked.numbers, asked.memory) == 10.0
    assert asked.decide(view(1, 1, now=9.0)) == (0, 0)
    assert asked.decide(view(1, 1, now=10.0)) == (1, 2)
    assert scaling.next_change(asked.numbers, asked.memory) == 60.5
    starting = view(2, 3, ready=[1, 0, 1, 0, 0], starting=[0, 1, 0, 1, 1], now=60.5)
    assert asked.decide(starting) == (0, -2)
    assert scaling.next_change(asked.numbers, asked.memory) == math.inf
    assert asked.decide(view(2, 1, now=100.0)) == (0, 0)
    # After an outage the last one named counts: 2 and 1
    assert Asked(PLANNERS["schedule"]).decide(view(1, 2, now=100.0)) == (1, -1)


def test_changes_of_ones_own_are_kept_within_the_limits():
    numbers = np.array(sim.CustomPlanner(rule=one_more, min_workers=2, max_gpus=8).numbers())
    assert scaling.bounded(numbers, view(3, 3), 5, 5) == (2, 0)
    assert scaling.bounded(numbers, view(3, 3), -5, 5) == (-1, 3)
    assert scaling.bounded(numbers, view(0, 3), 5, 9) == (0, 5)
    memory = np.zeros(scaling.MEMORY)
    assert [one_more(view(), memory) for _ in range(4)] == [(0, 0), (0, 1), (0, 0), (0, 1)]


@functools.cache
def compiled():
    return scaling.compiled(numba.njit)


@st.composite
def views(draw):
    """A fleet at some instants."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    prefill, decode = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    seen = []
    for i in range(draw(st.integers(1, 8))):
        phase = rng.choice(3, size=prefill + decode, p=[0.1, 0.85, 0.05])
        fields = {name: rng.exponential(1.0, prefill + decode) for name in scaling.VIEW_ARRAYS[4:]}
        fields |= {"running": rng.integers(0, 9), "waiting": rng.integers(0, 9), "ready": phase == 1}
        fields |= {"starting": phase == 2, "queued_tokens": rng.integers(0, 2000, prefill + decode)}
        fields |= demand(int(rng.integers(0, 900)), ended=int(rng.integers(0, 9)), now=30.0 * (i + 1))
        fields |= {"ttft": rng.choice([math.nan, rng.exponential(0.2)]), "itl": rng.choice([math.nan, 0.04])}
        fields |= {"prefill_gpus": int(rng.integers(1, 3)), "prefill_queue": int(rng.integers(0, 3))}
        seen.append(view(prefill, decode, **fields))
    return seen


@given(seen=views(), name=st.sampled_from([name for name in PLANNERS if name != "custom"]))
@settings(max_examples=150, deadline=None)
def test_compiled_rules_say_what_plain_ones_say_within_the_limits(seen, name):
    planner = PLANNERS[name]
    plain, fast = Asked(planner), Asked(planner, compiled())
    for now in seen:
        plain.sample(now)
        fast.sample(now)
        change = plain.decide(now)
        assert fast.decide(now) == change
        np.testing.assert_allclose(fast.memory, plain.memory, rtol=1e-12)
        assert all(isinstance(one, int) for one in change)
        if name == "schedule":
            assert plain.rules.next_change(plain.numbers, plain.memory) == fast.rules.next_change(
                fast.numbers, fast.memory
            )
            continue
        gpus = (now.prefill_gpus, now.decode_gpus)
        there = now.ready + now.starting
        before = (there[: now.prefill_workers].sum(), there[now.prefill_workers :].sum())
        after = np.add(before, change)
        if max(change) > 0:
            assert np.dot(after, gpus) <= planner.max_gpus
        assert all(workers >= planner.min_workers for workers, more in zip(after, change, strict=True) if more < 0)


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_planners_are_written_and_read_back(planner):
    kind = type(planner)
    assert kind.from_toml(planner.to_toml()) == planner
    assert kind.from_json(planner.to_json()) == planner
    assert pickle.loads(pickle.dumps(planner)) == planner
    assert hash(kind.from_toml(planner.to_toml())) == hash(planner)
    assert scaling.PLANNERS[planner.code] is kind


def test_numbers_and_places():
    for name, planner in PLANNERS.items():
        numbers = planner.numbers()
        assert all(type(number) is float for number in numbers)
        assert len(numbers) == (14 if name == "schedule" else scaling.NUMBERS * (1 + name.endswith("floor")))
    assert sim.LoadPlanner().places("prefill", 1, 1, 1) == 7  # 8 GPUs, one of them for a decode worker
    assert sim.LoadPlanner(min_workers=2).places("decode", 1, 2, 1) == 3  # (8 - 2) / 2
    assert sim.LoadPlanner().places("decode", 12, 1) == 12
    assert PLANNERS["schedule"].places("decode", 1, 4) == 3
    assert PLANNERS["schedule"].places("prefill", 5, 4) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sim.LoadPlanner(interval=0), "interval must be >= 0.001, got 0"),
        (lambda: sim.LoadPlanner(interval=math.nan), "interval must be >= 0.001, got nan"),
        (
            lambda: sim.LoadPlanner(interval=25, sample_interval=10),
            "interval must be a multiple of sample_interval, got interval=25, sample_interval=10",
        ),
        (lambda: sim.LoadPlanner(interval=5, sample_interval=10), "interval must be a multiple of sample_interval"),
        (
            lambda: sim.LoadPlanner(prefill_queue_low=0.5),
            "prefill_queue_low must be < prefill_queue_high, got prefill_queue_low=0.5, prefill_queue_high=0.5",
        ),
        (lambda: sim.LoadPlanner(kv_high=0.4), "kv_low must be < kv_high, got kv_low=0.5, kv_high=0.4"),
        (lambda: sim.ThroughputPlanner(queue_low=2), "queue_low must be < queue_high, got queue_low=2, queue_high=1"),
        (lambda: sim.ThroughputPlanner(kv_low=1), "kv_low must be < kv_high, got kv_low=1, kv_high=1"),
        (
            lambda: sim.ReactivePlanner(min_workers=9),
            "min_workers must fit into max_gpus, got min_workers=9, which takes 9 GPUs, max_gpus=8",
        ),
        (lambda: sim.ReactivePlanner(min_workers=0), "min_workers must be >= 1, got 0"),
        (lambda: sim.ReactivePlanner(max_gpus=0), "max_gpus must be >= 1, got 0"),
        (lambda: sim.ReactivePlanner(ttft=0), "ttft must be > 0, got 0"),
        (lambda: sim.ReactivePlanner(down_share=1.5), "down_share must be >= 0 and <= 1, got 1.5"),
        (lambda: sim.ReactivePlanner(min_workers=3).check_fleet(2, 1), "min_workers=3, which takes 9 GPUs, max_gpus=8"),
        (
            lambda: sim.ReactivePlanner(interval=10, floor=SLA(interval=5, max_gpus=8)),
            "floor.interval must be >= interval, got floor.interval=5, interval=10",
        ),
        (
            lambda: sim.ThroughputPlanner(max_gpus=6, floor=SLA(max_gpus=8)),
            "floor.max_gpus must be <= max_gpus, got floor.max_gpus=8, max_gpus=6",
        ),
        (
            lambda: sim.ReactivePlanner(floor=SLA(min_workers=3, max_gpus=8)).check_fleet(2, 1),
            "floor: min_workers must fit into max_gpus, got min_workers=3, which takes 9 GPUs, max_gpus=8",
        ),
        (lambda: sim.ReactivePlanner(floor=sim.LoadPlanner()), "floor must be one of SLAPlanner"),
        (lambda: SLA(predictor="arima"), "predictor must be one of constant, moving_average, linear_trend, kalman"),
        (lambda: SLA(window=65), "window must be >= 1 and <= 64, got 65"),
        (lambda: SLA(observation_noise=0), "observation_noise must be > 0, got 0"),
        (lambda: sim.SLAPlanner(profile=3), "profile must be one of LinearStepTime, got 3"),
        (lambda: sim.Schedule(changes=[]), "changes must be one or more of (seconds, "),
        (lambda: sim.Schedule(changes=[(1, "decode")]), "changes must be one or more of (seconds, "),
        (
            lambda: sim.Schedule(changes=[(1, "decode", 2), (2, "decode", 0)]),
            "workers of changes[1] must be >= 1, got 0",
        ),
        (lambda: sim.Schedule(changes=[(1, "decode", 1.5)]), "workers of changes[0] must be a whole number, got 1.5"),
        (lambda: sim.Schedule(changes=[(-1, "decode", 2)]), "time of changes[0] must be >= 0, got -1"),
        (
            lambda: sim.Schedule(changes=[(1, "decod", 2)]),
            "pool of changes[0] must be one of prefill, decode, got 'decod'; did you mean decode?",
        ),
        (
            lambda: sim.Schedule(changes=[(2, "decode", 2), (1, "prefill", 2)]),
            "changes must be in order of time, got 1 after 2",
        ),
        (
            lambda: sim.Schedule(changes=[(2, "decode", 2), (2, "prefill", 2), (2, "decode", 3)]),
            "changes must name a pool once at a time, got decode twice at 2",
        ),
        (
            lambda: PLANNERS["schedule"].check_fleet(1),
            "changes must be of the pool decode, for the fleet has no other, got prefill",
        ),
        (lambda: sim.CustomPlanner(rule=max), "rule must be compiled with numba.njit, got <built-in function max>"),
        (
            lambda: sim.CustomPlanner(rule=numba.njit(lambda view, memory: view.now)),
            "must return two whole numbers on every path, got float64",
        ),
        (
            lambda: sim.CustomPlanner(rule=numba.njit(lambda view, memory: (view.now, 1))),
            "must return two whole numbers on every path, got Tuple(float64",
        ),
        (
            lambda: sim.CustomPlanner(rule=numba.njit(lambda view, memory: (view.rady[0], 1))),
            "can't be compiled for a planner's view: Unknown attribute 'rady' of type Batch; did you mean ready?",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_is_allowed(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        make()
    assert message in str(error.value)


def test_a_slip_in_toml_is_refused_too():
    with pytest.raises(ValueError, match="changes"):
        sim.Schedule.from_toml('changes = [[1.0, "decode", "two"]]')
    with pytest.raises(ValueError, match="pool of changes"):
        sim.Schedule.from_toml('changes = [[1.0, "decoder", 2]]')
