"""KV transfer: published figures, links shared by transfers, block allocators, and what is refused."""

import itertools
import json
import math

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vecsim.kernel import links as link_rules
from vecsim.kernel import runs as run_rules
from vecsim.transfer import KVTransfer, Link, check_same_kv, fragmentation

GB, MIB, GIB = 1e9, 2**20, 2**30
TOKENS = 8000

begin, end, next_end = link_rules.begin, link_rules.end, link_rules.next_end
reset_links, settle = link_rules.reset, link_rules.settle


def llama(link="roce-100g", **fields):
    return KVTransfer.of("llama-3.1-8b", link, **fields)


# Figures


def test_bytes_are_those_published():
    assert llama().size(TOKENS) == 1_048_576_000
    assert llama(kv_dtype="fp8").size(TOKENS) == 1_048_576_000 / 2
    assert llama(tp=8).size(TOKENS) == 1_048_576_000 / 8


@pytest.mark.parametrize(
    ("fields", "block_size", "runs", "descriptors"),
    [
        ({}, 16, None, 32_000),
        ({}, 16, 3, 32_000),
        ({}, 64, None, 8_000),
        ({"layout": "contiguous"}, 16, 1, 500),
        ({"merges_blocks": True}, 16, 1, 64),
        ({"merges_blocks": True}, 16, None, 32_000),
        ({"merges_blocks": True, "layout": "contiguous"}, 16, 1, 1),
        ({"merges_blocks": True, "layout": "contiguous"}, 16, 7, 7),
    ],
)
def test_descriptors_are_those_published(fields, block_size, runs, descriptors):
    assert llama(**fields).descriptors(TOKENS // block_size, runs) == descriptors


def test_latent_attention_keeps_one_tensor_a_layer():
    assert KVTransfer.of("deepseek-v3", "nvlink").descriptors(1) == 61


def test_a_published_benchmark_of_eight_nics_is_met():
    transfer = llama("roce-8x")
    assert transfer.effective_bandwidth(20 * MIB) == pytest.approx(36 * GB, rel=0.12)
    assert transfer.effective_bandwidth(4.5 * GIB) == pytest.approx(142 * GB, rel=0.12)


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("nvlink", 450),
        ("infiniband-ndr", 50),
        ("infiniband-hdr", 25),
        ("roce-100g", 11),
        ("roce-8x", 146),
        ("tcp", 1),
        ("pcie5", 64),
    ],
)
def test_links_have_the_bandwidths_of_the_spec(name, bandwidth):
    assert Link.named(name).bandwidth == bandwidth * GB
    assert set(Link.names()) >= {name}
    assert Link.from_toml(Link.named(name).to_toml()) == Link.named(name)


def test_an_unloaded_transfer_is_the_sum_of_its_parts():
    transfer = llama(latency=1e-3, descriptor_cost=2e-6, destination_tp=1, transpose=True, gpu="h100")
    size, descriptors = transfer.size(TOKENS), transfer.descriptors(500)
    parts = (1e-3, 32_000 * 2e-6, size / 11e9, 2 * size / (0.8 * 3.35e12) + 3e-6)
    assert transfer.unloaded_time(size, descriptors) == pytest.approx(sum(parts), rel=1e-12)
    assert transfer.unloaded_time(0, 0) == 0
    assert llama(destination_tp=2, gpu="h100").transpose
    assert llama(destination_tp=2, gpu="h100").size(1) == llama().size(1)


def test_kernels_get_the_numbers_of_the_formulas():
    transfer = llama(latency=1e-3, descriptor_cost=2e-6, transpose=True, gpu="h100", fabric_bandwidth=3 * GB)
    numbers = transfer.kernel()
    size = 500 * numbers["bytes_per_token"]
    least = min(numbers[f"{name}_bandwidth"] for name in ("source", "destination", "fabric"))
    setup = numbers["latency"] + 77 * numbers["descriptors_per_run"] * numbers["descriptor_cost"]
    rearranged = numbers["transpose_launch"] + size * numbers["transpose_per_byte"]
    expected = transfer.unloaded_time(transfer.size(500), transfer.descriptors(77))
    assert setup + size / least + rearranged == pytest.approx(expected, rel=1e-12)


def test_layers_overlap_with_the_prefill():
    transfer = llama(overlap="layers")
    assert transfer.visible_time(0.32, prefill=0) == 0.32
    assert transfer.visible_time(0.32, prefill=0.16) == pytest.approx(0.32 - 0.16 * 31 / 32)
    assert transfer.visible_time(0.32, prefill=1.0) == pytest.approx(0.01)
    assert transfer.head_start(0.32) == pytest.approx(0.31)
    assert llama().visible_time(0.32, prefill=1.0) == 0.32
    assert llama().head_start(0.32) == 0


@pytest.mark.parametrize("polling", [0, 1e-3, 5e-3])
def test_an_end_is_noticed_at_the_next_poll(polling):
    transfer = llama(polling=polling)
    for time in (0.0, 1e-4, 0.005, 0.0051, 0.01):
        noticed = transfer.noticed_time(time)
        assert time <= noticed < time + polling + 1e-12
        assert polling == 0 or noticed / polling == pytest.approx(round(noticed / polling))
    assert transfer.noticed_time(0.005) == 0.005


# Laws of one transfer


@given(st.floats(1e3, 1e15), st.floats(1, 100), st.floats(0, 1e13))
def test_more_bandwidth_is_never_slower(bandwidth, factor, size):
    slow, fast = (KVTransfer(bandwidth=b, kv_bytes_per_token=1.0) for b in (bandwidth, bandwidth * factor))
    assert fast.unloaded_time(size) <= slow.unloaded_time(size)


def test_infinite_bandwidth_takes_no_time():
    assert KVTransfer().unloaded_time(1e15, 10**6) == 0
    assert llama(bandwidth=math.inf).unloaded_time(1e15) == 0
    assert llama("tcp", bandwidth=math.inf, destination_bandwidth=1e9).unloaded_time(1e9) == 1
    assert KVTransfer().effective_bandwidth(1e9) == math.inf


def test_declarations_with_infinity_are_written_and_read_back():
    transfer = llama(source_bandwidth=math.inf)
    assert KVTransfer.from_json(transfer.to_json()) == transfer
    assert KVTransfer.from_toml(transfer.to_toml()) == transfer
    assert json.loads(transfer.to_json())["fabric_bandwidth"] == "inf"
    with pytest.raises(ValueError, match=r"latency must be >= 0 and <= 1e\+12, got inf"):
        KVTransfer.from_json('{"latency": "inf"}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KVTransfer(bandwidth=0), "bandwidth must be > 0, got 0"),
        (lambda: KVTransfer(bandwidth=math.nan), "bandwidth must be > 0, got nan"),
        (lambda: KVTransfer(source_bandwidth=-1), "source_bandwidth must be > 0, got -1"),
        (lambda: KVTransfer(fabric_bandwidth="fast"), "fabric_bandwidth must be a number, got 'fast'"),
        (lambda: KVTransfer(bandwidth=1e9), "kv_bytes_per_token must be given where bandwidth is finite, got 1000000"),
        (lambda: KVTransfer(transpose=True), "kv_bytes_per_token must be given where transpose is true"),
        (lambda: llama(transpose=True), "hbm_bandwidth must be given where transpose is true"),
        (lambda: llama(destination_tp=2), "hbm_bandwidth must be given where transpose is true"),
        (lambda: KVTransfer(overlap="layers"), "layers must be given where overlap is 'layers'"),
        (lambda: KVTransfer(descriptor_cost=2e-6), "layers must be given where layout .* got descriptor_cost=2e-06"),
        (lambda: llama(layout="layer"), "layout must be one of layers, contiguous, got 'layer'; did you mean layers"),
        (lambda: llama(allocator="buddy"), "allocator must be one of paged, contiguous, got 'buddy'"),
        (lambda: llama(polling=-1), "polling must be >= 0"),
        (lambda: llama(tensors=3), "tensors must be >= 1 and <= 2, got 3"),
        (lambda: llama("roce-100"), "no Link is named 'roce-100'; did you mean roce-100g"),
        (lambda: llama("xyz"), "no Link is named 'xyz'; there are infiniband-hdr"),
        (lambda: KVTransfer.of("llama", "tcp"), "no Model is named 'llama'"),
        (lambda: llama(tp=3), "tp must be one of 1, 2, 4, 8"),
        (lambda: KVTransfer().size(1), "kv_bytes_per_token must be given"),
        (lambda: llama().descriptors(4, 5), r"runs must be >= 1 and <= blocks \(4\), got 5"),
        (lambda: llama().descriptors(4, 0), r"runs must be >= 1 and <= blocks \(4\), got 0"),
        (
            lambda: check_same_kv("llama-3.1-8b", "llama-3.1-70b"),
            "layers must be the same on both sides of a KV transfer, got 32 from llama-3.1-8b and 80 in llama-3.1-70b",
        ),
        (lambda: check_same_kv("llama-3.1-8b", "llama-2-7b"), "kv_heads must be the same .* got 8 .* and 32"),
        (lambda: check_same_kv("qwen3-32b", "deepseek-v3"), "layers must be the same .* got 64 .* and 61"),
        (
            lambda: check_same_kv("llama-3.1-8b", "llama-3.1-8b", destination_dtype="fp8"),
            "kv_dtype must be the same .* got 'bfloat16' .* and 'fp8'",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_models_of_the_same_cache_go_together():
    check_same_kv("llama-3.1-8b", "llama-3.1-8b")
    check_same_kv("llama-3.1-8b", "mixtral-8x7b")
    assert fragmentation(5, 20) == 0.25
    assert math.isnan(fragmentation(0, 0))


# Links shared by transfers


@numba.njit
def serve(links, bandwidths, begun_at, routes, sizes, cut_at, checks, ended_at, order, left):
    """Begin transfers in order of time and end each when it is due, the first at `cut_at`; ends come before begins."""
    reset_links(links, bandwidths)
    now, begun, ended = 0.0, checks[0], 0
    while ended < sizes.size:
        due, transfer = next_end(links)
        checks[0] += due < now
        if cut_at < min(due, begun_at[begun] if begun < sizes.size else np.inf):
            due, transfer, cut_at = cut_at, order[0], np.inf
        if begun == sizes.size or due <= begun_at[begun]:
            now = due
            left[transfer] = end(links, now, transfer)
            ended_at[transfer] = now
            order[ended] = transfer
            ended += 1
        else:
            now = begun_at[begun]
            begin(links, now, begun, routes[begun, 0], routes[begun, 1], routes[begun, 2], sizes[begun])
            begun += 1
            if begun == sizes.size // 2:
                settle(links, now)


def transfers(bandwidths, begun_at, routes, sizes, cut_at=math.inf):
    """(when each transfer ended, in which order, the links, what was left of each)."""
    bandwidths, begun_at, sizes = (np.array(values, float) for values in (bandwidths, begun_at, sizes))
    links = link_rules.links_for(bandwidths.size, sizes.size)
    ended_at, left = np.full(sizes.size, np.nan), np.full(sizes.size, np.nan)
    order, checks = np.zeros(sizes.size, np.int64), np.zeros(1, np.int64)
    serve(links, bandwidths, begun_at, np.array(routes, np.int64), sizes, cut_at, checks, ended_at, order, left)
    assert not checks.any()
    assert links.size[0] == 0
    assert not links.members[link_rules.COUNT].any()
    return ended_at, order, links, left


def transfers_step_by_step(bandwidths, begun_at, routes, sizes):
    """The same, all recomputed at each event."""
    ended_at, left, now, waiting = {}, {}, 0.0, list(range(len(sizes)))
    while left or waiting:
        users = {link: sum(link in routes[t] for t in left) for link in range(len(bandwidths))}
        rates = {t: min(bandwidths[link] / users[link] for link in routes[t] if link >= 0) for t in left}
        next_begin = begun_at[waiting[0]] if waiting else math.inf
        ends = {t: now + left[t] / rates[t] for t in left}
        due = min(ends.values(), default=math.inf)
        then = min(due, next_begin)
        for t in list(left):
            if ends[t] <= then * (1 + 1e-13):
                ended_at[t] = then
                del left[t]
            else:
                left[t] -= rates[t] * (then - now)
        if due > next_begin:
            t = waiting.pop(0)
            left[t] = sizes[t]
        now = then
    return [ended_at[t] for t in range(len(sizes))]


@st.composite
def cases(draw):
    """Bandwidths of sources, destinations and the fabric, and transfers over them."""
    sources, destinations = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    speeds = st.sampled_from([0.5, 1.0, 1.0, 3.0, 0.7, math.inf])
    bandwidths = draw(st.lists(speeds, min_size=sources + destinations + 1, max_size=sources + destinations + 1))
    number = draw(st.integers(1, 12))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.25, 1.0, 1 / 3]), min_size=number, max_size=number))
    sizes = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, 0.1, 5.5]), min_size=number, max_size=number))
    fabric = draw(st.sampled_from([link_rules.NO_LINK, sources + destinations]))
    routes = [
        (draw(st.integers(0, sources - 1)), sources + draw(st.integers(0, destinations - 1)), fabric)
        for _ in range(number)
    ]
    return bandwidths, list(np.cumsum(gaps)), routes, sizes


@settings(max_examples=300, deadline=None)
@given(cases())
def test_shared_links_serve_as_if_all_were_recomputed_at_each_event(case):
    bandwidths, _, routes, sizes = case
    ended_at, order, links, left = transfers(*case)
    np.testing.assert_allclose(ended_at, transfers_step_by_step(*case), rtol=1e-9, atol=1e-9)
    assert sorted(order) == list(range(len(sizes)))
    assert not left.any()
    assert (np.diff(ended_at[order]) >= 0).all()
    moved, busy = links.loads[link_rules.MOVED], links.loads[link_rules.BUSY]
    for link, bandwidth in enumerate(bandwidths):
        expected = sum(size for route, size in zip(routes, sizes, strict=True) if link in route)
        assert moved[link] == pytest.approx(expected, rel=1e-12)
        assert moved[link] / bandwidth <= busy[link] * (1 + 1e-12) + 1e-12


def test_ten_transfers_over_a_slow_path_take_as_long_as_all_their_bytes():
    size = llama().size(TOKENS)
    ended_at, order, links, _ = transfers([0.1 * GB, math.inf], [0.0] * 10, [(0, 1, -1)] * 10, [size] * 10)
    np.testing.assert_allclose(ended_at, 104.8576, rtol=1e-12)
    assert list(order) == list(range(10))
    assert links.loads[link_rules.MOVED, 0] == 10 * size
    assert links.loads[link_rules.BUSY, 0] == pytest.approx(104.8576)


def test_two_transfers_that_share_no_link_do_not_slow_each_other():
    ended_at, *_ = transfers([1, 1, 1, 1], [0, 0.5], [(0, 2, -1), (1, 3, -1)], [1, 1])
    assert list(ended_at) == [1, 1.5]
    ended_at, *_ = transfers([1, 1, 1, 1, 1], [0, 0.5], [(0, 2, 4), (1, 3, 4)], [1, 1])
    assert list(ended_at) == [1.5, 2]


def test_infinite_links_end_transfers_as_they_begin():
    begun_at = [0, 0, 1e9 / 3]
    ended_at, _, links, _ = transfers([math.inf] * 3, begun_at, [(0, 1, 2)] * 3, [1e12] * 3)
    assert list(ended_at) == begun_at
    assert not links.loads[link_rules.BUSY].any()


def test_many_transfers_at_a_late_time_all_end():
    rng = np.random.default_rng(1)
    begun_at = 1e9 + np.sort(rng.uniform(0, 10, 400))
    routes = np.stack([rng.integers(0, 4, 400), rng.integers(4, 8, 400), np.full(400, 8)], axis=1)
    sizes = rng.uniform(0, 1e9, 400)
    ended_at, _, links, _ = transfers([1e10] * 8 + [2e10], begun_at, routes, sizes)
    assert (ended_at >= begun_at).all()
    assert links.loads[link_rules.MOVED, 8] == pytest.approx(sizes.sum(), rel=1e-12)


def test_a_transfer_that_is_cut_off_leaves_its_links_to_the_others():
    ended_at, _, links, left = transfers([1, 1], [0, 1], [(0, 1, -1)] * 2, [4, 4], cut_at=2.0)
    assert list(left) == [2.5, 0]
    assert list(ended_at) == [2, 5.5]
    assert list(links.loads[link_rules.MOVED]) == [5.5, 5.5]
    assert list(links.loads[link_rules.BUSY]) == [5.5, 5.5]


# Block allocators

reset_blocks, take, release = run_rules.reset, run_rules.take, run_rules.release
runs_of, runs_of_both = run_rules.runs, run_rules.runs_on_both


@numba.njit
def allocate_all(allocator, blocks, counts, latest, deepest_first, places, begins, free):
    """The last worker takes `counts` blocks, or frees those of the request of a number below 0."""
    worker = allocator.counts.shape[1] - 1
    for each in range(worker + 1):
        reset_blocks(allocator, each, blocks)
    for i in range(counts.size):
        if counts[i] >= 0:
            take(allocator, worker, counts[i], places, begins[i], latest)
        else:
            of = -1 - counts[i]
            release(allocator, worker, counts[of], places, begins[of], deepest_first)
        free[i] = allocator.counts[run_rules.FREE, worker]


@numba.njit
def count_runs(source, destination, start, count, out):
    out[0] = runs_of(source, start, count)
    out[1] = runs_of_both(source, start, destination, start, count)


@st.composite
def traffic(draw):
    """Blocks of a worker, and what is taken and freed."""
    blocks = draw(st.integers(1, 40))
    free, held, counts = blocks, [], []
    for _ in range(draw(st.integers(0, 25))):
        if held and (free == 0 or draw(st.booleans())):
            of = held.pop(draw(st.integers(0, len(held) - 1)))
            counts.append(-1 - of)
            free += counts[of]
        else:
            count = draw(st.integers(0, free))
            held.append(len(counts))
            counts.append(count)
            free -= count
    return blocks, counts


def play(blocks, counts, first_fit, latest=False, deepest_first=False):
    """(places of each request, blocks free after each event)."""
    allocator = run_rules.allocator_for(2, blocks, first_fit)
    counts = np.array(counts, np.int64)
    begins = np.concatenate([[0], np.cumsum(np.maximum(counts, 0))]).astype(np.int64)
    places, free = np.full(begins[-1] + 1, -1, np.int32), np.empty(counts.size, np.int64)
    allocate_all(allocator, blocks, counts, latest, deepest_first, places, begins, free)
    return [list(places[a:b]) for a, b in itertools.pairwise(begins)], free


def stretches(free):
    """[first, length] of each stretch of free places, the lowest first."""
    found = []
    for place in sorted(free):
        if found and sum(found[-1]) == place:
            found[-1][1] += 1
        else:
            found.append([place, 1])
    return found


def lowest_fit(free, count):
    taken = []
    while count:
        wanted = min(count, max(length for _, length in stretches(free)))
        first = next(first for first, length in stretches(free) if length >= wanted)
        taken += range(first, first + wanted)
        free.difference_update(taken)
        count -= wanted
    return taken


@settings(max_examples=200, deadline=None)
@given(traffic(), st.booleans(), st.booleans(), st.booleans())
def test_allocators_give_the_blocks_that_plain_lists_give(case, first_fit, latest, deepest_first):
    blocks, counts = case
    queue, free_places = list(range(blocks)), set(range(blocks))
    given_out, free_after = play(blocks, counts, first_fit, latest, deepest_first)
    for i, count in enumerate(counts):
        if count < 0:
            back = given_out[-1 - count]
            queue += back[::-1] if deepest_first else back
            free_places.update(back)
        elif first_fit:
            assert given_out[i] == lowest_fit(free_places, count)
        elif latest:
            assert given_out[i] == [queue.pop() for _ in range(count)]
        else:
            assert given_out[i] == [queue.pop(0) for _ in range(count)]
        assert free_after[i] == len(free_places if first_fit else queue)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.integers(0, 3))
def test_runs_are_counted_where_neighbours_are_in_order(pairs, start):
    start = min(start, len(pairs))
    source, destination = (np.array([pair[side] for pair in pairs], np.int32) for side in (0, 1))
    out = np.empty(2, np.int64)
    count_runs(source, destination, start, len(pairs) - start, out)
    rest = pairs[start:]
    steps = [(b[0] - a[0] == 1, b[1] - a[1] == 1) for a, b in itertools.pairwise(rest)]
    assert out[0] == bool(rest) + sum(not source for source, _ in steps)
    assert out[1] == bool(rest) + sum(not all(both) for both in steps)


def test_first_fit_keeps_runs_long_where_a_queue_scatters_them():
    """Requests of 10 blocks come and go at random."""
    rng, counts, held = np.random.default_rng(0), [], []
    for _ in range(400):
        if len(held) == 90:
            counts.append(-1 - held.pop(rng.integers(90)))
        held.append(len(counts))
        counts.append(int(rng.integers(5, 15)))
    shares = []
    for first_fit in (False, True):
        places, _ = play(1400, counts, first_fit)
        last = [np.array(p) for p in places[-100:] if p]
        shares.append(fragmentation(sum(1 + (np.diff(p) != 1).sum() for p in last), sum(map(len, last))))
    paged, fitted = shares
    assert fitted < paged
