"""Mixtures of sets against their definition, and their shares against the weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale import UserError
from fdscale.data.augment import train_view
from fdscale.data.indexing import index
from fdscale.data.mixture import PERIOD, Joined, Mixture, quotas
from fdscale.data.stream import Samples, batches


@st.composite
def mixtures(draw):
    """(counts per set and shard, weights, seed, lanes, block)."""
    sets = draw(st.integers(1, 4))
    lanes = draw(st.sampled_from([1, 2, 3, 8]))
    counts = [draw(st.lists(st.integers(0, 30), min_size=1, max_size=5)) for _ in range(sets)]
    counts = [[*some, 8] for some in counts]  # at least as many samples as lanes
    weights = draw(st.lists(st.floats(0.01, 1), min_size=sets, max_size=sets))
    return (
        [np.array(some) for some in counts],
        weights,
        draw(st.integers(0, 2**63 - 1)),
        lanes,
        draw(st.integers(1, 20)),
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_every_set_is_gone_through_epoch_by_epoch_and_shares_are_exact(m):
    """Two periods of every lane, one number at a time: nothing is lost or twice within an epoch of a set."""
    counts, weights, seed, lanes, block = m
    mixture = Mixture(counts, weights, seed, lanes, block)
    firsts = np.cumsum([0, *(len(some) for some in counts)])
    epochs, shards, rows = mixture.locate(np.arange(2 * PERIOD * lanes))
    sets = np.searchsorted(firsts, shards, side="right") - 1
    for lane in range(lanes):
        for period in range(2):
            mine = sets[lane::lanes][period * PERIOD : (period + 1) * PERIOD]
            assert np.bincount(mine, minlength=len(counts)).tolist() == quotas(weights, len(counts)).tolist()
    for s, some in enumerate(counts):
        seen: dict[int, list] = {}
        for epoch, shard, row in zip(epochs[sets == s], shards[sets == s] - firsts[s], rows[sets == s], strict=True):
            seen.setdefault(int(epoch), []).append((int(shard), int(row)))
        everything = sorted((shard, row) for shard, count in enumerate(some.tolist()) for row in range(count))
        whole = [epoch for epoch in sorted(seen) if len(seen[epoch]) == len(everything)]
        assert all(sorted(seen[epoch]) == everything for epoch in whole)
        assert all(len(set(found)) == len(found) for found in seen.values())
        total = int((sets == s).sum())
        assert len(whole) >= total // len(everything) - 1  # all but the one under way, and lanes differ by one


@settings(max_examples=20, deadline=None)
@given(mixtures(), st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_number_means_the_same_whatever_is_asked_with_it(m, numbers):
    mixture, other = Mixture(*m), Mixture(*m)
    together = list(zip(*(found.tolist() for found in mixture.locate(np.array(numbers))), strict=True))
    assert together == [other.at(n) for n in reversed(numbers)][::-1]


def test_a_batch_has_its_share_of_each_set():
    counts = [np.full(50, 200), np.full(10, 1000), np.full(400, 100)]
    mixture = Mixture(counts, [6, 3, 1], 0, 64)
    shards = mixture.locate(np.arange(1000 * 512))[1].reshape(1000, 512)
    share = np.stack([(shards < 50).mean(1), ((shards >= 50) & (shards < 60)).mean(1), (shards >= 60).mean(1)])
    assert np.allclose(share.mean(1), [0.6, 0.3, 0.1], atol=2e-3)
    assert np.abs(share - [[0.6], [0.3], [0.1]]).max() < 0.15


def test_sets_of_one_kind_are_shuffled_apart():
    """Two sets that look the same must not go through their shards in the same order."""
    mixture = Mixture([np.full(40, 10), np.full(40, 10)], [1, 1], 3, 1)
    assert [mixture.orders[s].at(n)[1] for s in (0,) for n in range(400)] != [
        mixture.orders[1].at(n)[1] for n in range(400)
    ]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 values for 2 entries"),
        ([1.0, 0.0], "numbers over 0"),
        ([1.0, -1.0], "numbers over 0"),
        ([1.0, float("inf")], "numbers over 0"),
        ([1.0, 1e-4], "number 2 is under a thousandth"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        quotas(weights, 2)


def test_quotas_are_the_nearest_whole_numbers():
    assert quotas([1, 1, 1], 3).tolist() == [334, 333, 333]
    assert quotas([0.25, 0.75], 2).tolist() == [250, 750]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_two_sets_is_what_its_numbers_mean(tmp_path, photos, pack, workers):
    for name, some in (("a", range(10)), ("b", range(10, 24))):
        pack(tmp_path / name / "x.tar", {f"{i}.jpg": photos[i] for i in some})
    joined = Joined([index(tmp_path / "a"), index(tmp_path / "b")])
    assert (joined.samples, len(joined.names), len(set(joined.names))) == (24, 2, 2)
    mixture = Mixture([one.counts for one in joined.indexes], [3, 1], 5, 4)
    samples = Samples(joined, mixture, partial(train_view, seed=5, size=16))
    seen = []
    for rank in range(2):
        stream = batches(samples, batch_size=8, micro_batch=2, rank=rank, world=2, start=0, stop=64, workers=workers)
        for batch in stream:
            seen += zip(batch["numbers"].tolist(), batch["origin"], strict=True)
    assert sorted(number for number, _ in seen) == list(range(64))
    for number, (shard, key) in seen:
        _, where, row = mixture.at(number)
        assert (shard, key) == (joined.path(where), joined.key(where, row))
    assert joined.fingerprint != Joined([joined.indexes[1], joined.indexes[0]]).fingerprint
