"""The order of samples against the properties it promises, and against a second implementation in plain Python.

The random numbers are compared with a plain Philox4x64-10 and the known answer of its authors (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011; Random123, tests/kat_vectors).
"""

from __future__ import annotations

import pickle
from bisect import bisect_right
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale import UserError
from fdscale.data import order as order_module
from fdscale.data.order import Order, Sequential, check_world, default_lanes, philox

MASK = 2**64 - 1
sets = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
        "seed": st.integers(0, 2**63 - 1),
        "lanes": st.integers(1, 24),
        "block": st.integers(1, 50),
    }
).map(lambda s: {**s, "lanes": min(s["lanes"], sum(s["counts"]))})


def plain_philox(seed, word, counter, count):
    words, (a, b, c, d) = [], counter
    while len(words) < count:
        a = (a + 1) & MASK  # numpy counts before it draws
        x, k0, k1 = (a, b, c, d), seed, word
        for _ in range(10):
            p, q = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = ((q >> 64) ^ x[1] ^ k0, q & MASK, (p >> 64) ^ x[3] ^ k1, p & MASK)
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
        words += x
    return words[:count]


def plain_permutation(seed, word, counter, count):
    words = plain_philox(seed, word, counter, count)
    return sorted(range(count), key=lambda i: words[i])


def plain_at(n, counts, seed, lanes, block):
    """The definition of the order, word by word."""
    shards = [i for i, count in enumerate(counts) if count]
    total = sum(counts)
    epoch, place = divmod(n, total)
    step, lane = divmod(place, lanes)
    b, i = divmod(step, block)
    shuffled = [shards[j] for j in plain_permutation(seed, epoch, (0, 1, 0, 0), len(shards))]
    lengths = [total // lanes + (k < total % lanes) for k in range(lanes)]
    inside = plain_permutation(seed, epoch, (0, 2, lane, b), min(block, lengths[lane] - b * block))[i]
    at = sum(lengths[:lane]) + b * block + inside
    ends = list(accumulate(counts[shard] for shard in shuffled))
    k = bisect_right(ends, at)
    return epoch, shuffled[k], at - (ends[k] - counts[shuffled[k]])


def test_philox_is_philox():
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox(0, 0, (MASK, MASK, MASK, MASK), 4).tolist() == known
    for seed, word in ((1, 2), (2**63 - 1, 2**40)):
        assert philox(seed, word, (0, 2, 3, 4), 23).tolist() == plain_philox(seed, word, (0, 2, 3, 4), 23)


@settings(max_examples=30, deadline=None)
@given(sets)
def test_at_is_the_definition(s):
    order = Order(**s)
    for n in range(0, 2 * order.samples + 3, 7):
        assert order.at(n) == plain_at(n, **s)


@settings(max_examples=60, deadline=None)
@given(sets)
def test_every_epoch_names_every_sample_once(s):
    order = Order(**s)
    everything = {(shard, row) for shard, count in enumerate(s["counts"]) for row in range(count)}
    epochs, shards, rows = order.locate(np.arange(3 * order.samples))
    for epoch in range(3):
        named = list(zip(shards[epochs == epoch].tolist(), rows[epochs == epoch].tolist(), strict=True))
        assert len(named) == order.samples
        assert set(named) == everything


@settings(max_examples=30, deadline=None)
@given(sets, st.randoms(use_true_random=False))
def test_answers_do_not_depend_on_what_was_asked_before(s, random):
    numbers = list(range(2 * sum(s["counts"])))
    expected = [Order(**s).at(n) for n in numbers[::9]]
    order = pickle.loads(pickle.dumps(Order(**s)))
    random.shuffle(numbers)
    columns = (column.tolist() for column in order.locate(np.array(numbers)))
    table = dict(zip(numbers, zip(*columns, strict=True), strict=True))
    assert [table[n] for n in sorted(numbers)[::9]] == expected


@settings(max_examples=30, deadline=None)
@given(sets, st.integers(1, 300))
def test_numbers_beyond_the_span_repeat(s, span):
    order = Order(**s, span=span)
    for n in (0, span - 1, span, 2 * span - 1, 7 * span, 10**12):
        assert order.at(n) == Order(**s).at(n % span)


def test_seeds_and_epochs_differ():
    counts = [50] * 20
    orders = [np.array(Order(counts, seed, 10).locate(np.arange(2000))[1:]) for seed in (0, 1, 2**63 - 1)]
    assert len({half.tobytes() for order in orders for half in (order[:, :1000], order[:, 1000:])}) == 6


def test_a_batch_mixes_the_set():
    order = Order([100] * 50, seed=3, lanes=64, block=128)
    for start in (0, 1024, 4096):
        assert len(set(order.locate(np.arange(start, start + 64))[1].tolist())) >= 30  # of 50 shards


@pytest.mark.slow
def test_lookup_tables_stay_small_at_two_thousand_million_samples():
    order = Order(np.full(200_000, 10_000), seed=1, lanes=480)
    rng = np.random.default_rng(0)
    for _ in range(3):
        epochs, shards, rows = order.locate(rng.integers(0, 5 * 2 * 10**9, 500))
        assert epochs.max() < 5
        assert shards.max() < 200_000
        assert rows.max() < 10_000
        assert order._blocks.weight <= order_module.TABLE_BYTES
        assert len(order._epochs) <= 3  # of 200 000 shards each
    assert order.at(10**12)[0] == 500
    order._blocks.limit = 2**20  # and a full table lets go
    order.locate(np.arange(480))
    assert order._blocks.weight <= 2**20


def test_two_thousand_million_numbers_near_one_place_are_distinct():
    order = Order(np.full(200_000, 10_000), seed=1, lanes=480)
    _, shards, rows = order.locate(np.arange(10**9, 10**9 + 4800))
    assert len(set(zip(shards.tolist(), rows.tolist(), strict=True))) == 4800


def test_sequential_goes_through_the_set_once():
    epochs, shards, rows = Sequential([2, 0, 3]).locate(np.arange(5))
    assert epochs.tolist() == [0] * 5
    assert shards.tolist() == [0, 0, 2, 2, 2]
    assert rows.tolist() == [0, 1, 0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 10**7))
def test_default_lanes_divide_the_batch_and_fit_the_set(batch, shards, samples):
    lanes = default_lanes(batch, shards, samples)
    assert batch % lanes == 0
    assert 1 <= lanes <= min(samples, 512, max(shards, 64))


@pytest.mark.parametrize(
    ("batch", "shards", "samples", "lanes"),
    [
        (2048, 1281, 1281167, 512),  # ImageNet-1K: 1, 2, 4, ..., 512 ranks
        (256, 100, 100_000, 64),
        (768, 9999, 10**7, 384),  # 16 usable world sizes, among them 3, 6, 12; 256 lanes had 9
        (1000, 2000, 10**6, 200),  # as many world sizes as 500 lanes have, and 8 among them
        (64, 1, 10, 8),
        (4, 1, 3, 2),
        (1, 1, 1, 1),
    ],
)
def test_default_lanes_of_known_sets(batch, shards, samples, lanes):
    assert default_lanes(batch, shards, samples) == lanes


def test_check_world_names_the_usable_sizes():
    for world in (1, 2, 3, 4, 6, 8, 12, 24):
        check_world(24, world)
    with pytest.raises(UserError, match=r"world size 5 .* 24 lanes.*: 1, 2, 3, 4, 6, 8, 12, 24\."):
        check_world(24, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": [0, 0]}, "all 2 shards are empty"),
        ({"counts": []}, "no samples"),
        ({"counts": [3], "lanes": 4}, "4 lanes for 3 samples"),
        ({"counts": [3], "seed": -1}, "seed is -1"),
        ({"counts": [3], "seed": 2**63}, "seed is"),
        ({"counts": [3], "block": 0}, "block is 0"),
        ({"counts": [3], "span": 0}, "span is 0"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Order(**{"seed": 0, "lanes": 1, **arguments})
