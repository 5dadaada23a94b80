"""Shards that are damaged after they were indexed, in hundreds of ways: every sample that is whole arrives unchanged,
every other one is replaced and named, and nothing else happens."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from fdscale import UserError
from fdscale.data.augment import train_view
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.order import Order
from fdscale.data.stream import Samples
from fdscale.data.tar import BLOCK, IMAGE_EXTENSIONS

pytestmark = pytest.mark.slow  # together they are: left out of `make quick`


def samples_of(folder: Path) -> Samples:
    opened = open_index(folder)
    return Samples(opened, Order(opened.counts, 3, 2, 8), partial(train_view, seed=3, size=16))


def flip_bits(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 2, 20])):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)


def overwrite(raw: bytearray, rng: random.Random) -> None:
    start, length = rng.randrange(len(raw)), rng.choice([16, 512, 5000])
    raw[start : start + length] = rng.choice([bytes(length), rng.randbytes(length)])[: len(raw) - start]


def cut(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def remove_blocks(raw: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(raw) // BLOCK) * BLOCK
    del raw[start : start + BLOCK * rng.randint(1, 4)]


def swap_headers(raw: bytearray, rng: random.Random) -> None:
    a, b = (rng.randrange(len(raw) // BLOCK) * BLOCK for _ in range(2))
    raw[a : a + BLOCK], raw[b : b + BLOCK] = raw[b : b + BLOCK], raw[a : a + BLOCK]


DAMAGE = (flip_bits, overwrite, cut, remove_blocks, swap_headers)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda one: one.__name__)
def test_what_is_whole_arrives_and_what_is_not_is_named(tmp_path, photos, pack, damage):
    for shard in range(3):
        pack(tmp_path / f"{shard}.tar", {f"{i:02d}.jpg": photos[i] for i in range(8 * shard, 8 * shard + 8)})
    index(tmp_path)
    clean = samples_of(tmp_path)
    expected = {n: clean[n] for n in range(24)}
    places = {n: clean.order.at(n)[1:] for n in range(24)}
    path = tmp_path / "1.tar"
    original, seen = path.read_bytes(), Counter()
    for seed in range(60):
        raw = bytearray(original)
        damage(raw, random.Random(seed))
        path.write_bytes(raw)
        samples = samples_of(tmp_path)
        for n in range(24):
            shard, row = places[n]
            _, offsets, sizes = clean.index._load_column((shard, IMAGE_EXTENSIONS))
            offset, size = int(offsets[row]), int(sizes[row])
            whole = shard != 1 or raw[offset - BLOCK : offset + size] == original[offset - BLOCK : offset + size]
            try:
                found = samples[n]
            except UserError as error:  # so much is out of place that this is not the shard that was indexed
                named = "truncated or changed since it was indexed" in str(error)
                seen["another shard" if named and not whole else "wrongly refused"] += 1
                continue
            if whole:
                assert found.replaced is None
                assert found.image.equal(expected[n].image)
                seen["whole"] += 1
            elif found.replaced is None:  # damage inside an image that still decodes shows in no header
                assert found.key == expected[n].key
                seen["decodes all the same"] += 1
            else:
                assert (found.replaced.shard, found.replaced.key) == ("1.tar", expected[n].key)
                assert (found.shard, found.key) != ("1.tar", expected[n].key)
                seen["replaced"] += 1
    assert sum(seen.values()) == 60 * 24
    assert not seen["wrongly refused"]
    assert seen["replaced"] > 30
    assert seen["whole"] > 900
