"""The kernel's pieces against NumPy and exact arithmetic."""

import ast
import math
from fractions import Fraction
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from vecsim.kernel import jit, kv, streams
from vecsim.kernel import quantiles as kernel_quantiles
from vecsim.kernel.state import EXPONENTIAL_DRAWS, GAMMA_DRAWS, NORMAL_DRAWS, UNIFORM_DRAWS
from vecsim.lengths import EMPIRICAL, UNIFORM, output_tokens
from vecsim.load import EVENLY, arrival_time

standard, gaps = streams.standard, streams.gaps


@numba.njit
def draw(kind, shape, seed, out):
    standard(kind, seed, out)
    gaps(kind, shape, seed, out)


select_quantiles = kernel_quantiles.quantiles


@numba.njit
def quantiles(values, wanted, counts, places, bins, kept, out):
    select_quantiles(values, values.min(), values.max(), wanted, counts, places, bins, kept, out)


weigh_quantiles = kernel_quantiles.weighted_quantiles


@numba.njit
def weighted_quantiles(values, weights, wanted, out):
    weigh_quantiles(values, weights, weights.sum(), wanted, out)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1])
@pytest.mark.parametrize("size", [1, 2, 3, 311, 312, 313, 5000])
def test_normals_and_uniforms_are_those_of_random_state_bit_for_bit(seed, size):
    out = np.empty(size)
    draw(NORMAL_DRAWS, 1.0, seed, out)
    np.testing.assert_array_equal(out, np.random.RandomState(seed).normal(size=size))
    draw(UNIFORM_DRAWS, 1.0, seed, out)
    np.testing.assert_array_equal(out, np.random.RandomState(seed).random_sample(size))


def test_exponential_and_gamma_streams_follow_their_laws():
    out = np.empty(20_000)
    draw(EXPONENTIAL_DRAWS, 1.0, 7, out)
    assert stats.kstest(out, stats.expon.cdf).pvalue > 1e-3
    for shape in (0.25, 1.0, 4.0):
        draw(GAMMA_DRAWS, shape, 7, out)
        assert stats.kstest(out, stats.gamma(shape, scale=1 / shape).cdf).pvalue > 1e-3


values = st.one_of(
    st.floats(0, 1e6, allow_subnormal=True),
    st.floats(0, 1e300),
    st.integers(0, 20).map(float),
    st.sampled_from([0.0, 1.0, 1e-12, 2.0**-20, 2.0**40, 1.1]),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(values, min_size=1, max_size=200), st.lists(st.floats(0, 1), min_size=1, max_size=7))
@example([0.0] * 50 + [5.0] * 50, [0.49, 0.5, 0.51])
def test_quantiles_are_those_of_numpy_to_the_bit(sample, wanted):
    sample, wanted = np.array(sample), np.sort(wanted)
    tables = np.empty((2, kernel_quantiles.BINS), np.int32)
    out = np.empty(wanted.size)
    quantiles(sample, wanted, *tables, np.empty(sample.size, np.uint16), np.empty(sample.size + 1), out)
    np.testing.assert_array_equal(out, np.quantile(sample, wanted))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 9)), min_size=1, max_size=20).filter(
        lambda pairs: any(weight for _, weight in pairs)
    ),
    st.lists(st.floats(0, 1), min_size=1, max_size=7),
)
def test_weighted_quantiles_are_those_of_the_repeated_sample(pairs, wanted):
    pairs.sort()
    sample = np.array([value for value, _ in pairs])
    weights = np.array([weight for _, weight in pairs])
    wanted = np.sort(wanted)
    out = np.empty(wanted.size)
    weighted_quantiles(sample, weights, wanted, out)
    np.testing.assert_array_equal(out, np.quantile(np.repeat(sample, weights), wanted))


@settings(max_examples=500)
@given(st.floats(1e-6, 1e6), st.integers(0, 10**9))
@example(10.0, 9)
@example(0.46, 459)
def test_evenly_spaced_arrivals_are_due_at_the_first_float_that_floor_division_accepts(rate, i):
    due = arrival_time(EVENLY, rate, i, 0.0)
    exact = Fraction(1 / rate) * (i + 1)
    before = math.nextafter(due, 0.0)
    assert Fraction(before) < exact <= Fraction(due)
    assert due // (1 / rate) >= i + 1 > before // (1 / rate)


def test_every_whole_length_of_a_uniform_can_be_drawn_and_no_other():
    draws = np.linspace(0, np.nextafter(1, 0), 1000)
    assert {output_tokens(UNIFORM, 3.0, 5.0, (), 0, u) for u in draws} == {3, 4, 5}
    assert {output_tokens(EMPIRICAL, 0.0, 0.0, (7, 9), 0, u) for u in draws} == {7, 9}


def imported(path: Path) -> set[Path]:
    """The package's files that a file imports as it is loaded."""
    names = {
        f"{statement.module}{end}"
        for statement in ast.parse(path.read_text()).body
        if isinstance(statement, ast.ImportFrom) and str(statement.module).startswith("vecsim")
        for end in ("", *(f".{alias.name}" for alias in statement.names))
    }
    files = (jit.PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in names)
    return {file for file in files if file.is_file()}


def test_cached_kernels_know_every_file_that_they_are_made_of():
    known = set(jit.sources())
    assert set().union(*map(imported, known)) <= known


@numba.njit
def use_up_nodes(counters, nodes, node_of, owned, rounds, free, evicted):
    seen = np.zeros(0)
    kv.reset(counters, nodes, node_of, seen, 1)
    for i in range(node_of.size):
        node_of[i] = kv.new_node(counters, nodes, i, 1)
        kv.link(counters, nodes, node_of[i], False)
    for i in range(rounds):  # a block is used, and others that nobody can find come free
        node = node_of[i % node_of.size]
        kv.unlink(counters, nodes, node)
        kv.link(counters, nodes, node, False)
        kv.push(counters, nodes, kv.ANONYMOUS, 2, False)
        free[i] = counters[kv.FREE]
    number = 0
    while counters[kv.FREE] > 0:
        there = node_of >= 0
        kv.take(counters, nodes, node_of, seen, owned, 1)
        for i in np.flatnonzero(there & (node_of < 0)):
            evicted[number] = i
            number += 1


def test_where_nodes_run_out_cached_blocks_keep_their_order():
    ids, rounds = 3, 50
    counters = np.zeros(3, np.int64)
    nodes = np.zeros((kv.NODE_ROWS, 1 + ids + 2), np.int32)  # the least that does
    node_of, owned = np.full(ids, -1, np.int32), np.zeros((kv.OWNED_ROWS, 1), np.int32)
    free, evicted = np.zeros(rounds, np.int64), np.zeros(ids, np.int64)
    use_up_nodes(counters, nodes, node_of, owned, rounds, free, evicted)
    assert counters[kv.UNUSED] == nodes.shape[1]
    assert free.tolist() == [1 + ids + 2 * (i + 1) for i in range(rounds)]
    assert evicted.tolist() == [(rounds + i) % ids for i in range(ids)]
