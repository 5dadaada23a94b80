"""Labels from the members .cls, and samples that stay together: the same on any number of ranks, lost where bad."""

from __future__ import annotations

import io
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from fdscale import UserError
from fdscale.data.augment import eval_view, train_view
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.order import Order
from fdscale.data.prefetch import plan_of_lanes
from fdscale.data.shards import make
from fdscale.data.stream import Samples, _Slots, batches, evaluation_batches

CLASSES = 3


def test_labels_are_the_folders_numbers(image_folder: Path, tmp_path: Path) -> None:
    made = make(image_folder, tmp_path / "out", samples_per_shard=5)
    samples = Samples(made, Order(made.counts, 0, 8, 4), partial(train_view, seed=0, size=16), CLASSES)
    sizes = {"batch_size": 8, "micro_batch": 4, "world": 1, "rank": 0}
    stream = batches(samples, **sizes, start=0, stop=24, workers=0)
    seen = [
        (key, int(label)) for batch in stream for (_, key), label in zip(batch["origin"], batch["labels"], strict=True)
    ]
    assert len(seen) == 24
    assert {(key.split("photo_")[0].strip("/_"), label) for key, label in seen} == {("cat", 0), ("dog", 1), ("owl", 2)}


@pytest.fixture
def flawed(tmp_path: Path, pack) -> Path:
    """Six images, a shard each: of class 0, 1, 2, of none, of a class too many, of a class that is no number."""
    for i, label in enumerate(["0", " 1\n", "2", None, "3", "cat"]):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(buffer, "PNG")
        members = {f"{i}.png": buffer.getvalue()} | ({} if label is None else {f"{i}.cls": label.encode()})
        pack(tmp_path / "set" / f"{i}.tar", members)
    index(str(tmp_path / "set"))
    return tmp_path / "set"


def test_a_bad_label_is_a_lost_sample(flawed: Path) -> None:
    opened = open_index(str(flawed))
    view = partial(eval_view, size=16)
    for world in (1, 2):
        lost, labels = {}, {}
        for rank in range(world):
            for batch in evaluation_batches(
                opened, view, micro_batch=2, rank=rank, world=world, workers=0, classes=CLASSES
            ):
                lost |= {one.key: one.reason for one in batch["replaced"]}
                kept = batch["weights"] > 0
                labels |= dict(zip(batch["numbers"][kept].tolist(), batch["labels"][kept].tolist(), strict=True))
        assert labels == {0: 0, 1: 1, 2: 2}
        assert lost == {
            "3": "has no .cls",
            "4": "its .cls is '3', expected a whole number from 0 to 2",
            "5": "its .cls is 'cat', expected a whole number from 0 to 2",
        }
    assert "labels" not in next(iter(evaluation_batches(opened, view, micro_batch=2, rank=0, world=1, workers=0)))


def test_pairs_stay_together_on_any_number_of_ranks() -> None:
    """Worlds, batches and micro-batches change every few steps; every number comes once, beside its neighbour."""
    rng, lanes, n, seen = random.Random(0), 24, 0, []
    for _ in range(300):
        world = rng.choice([1, 2, 3, 4, 6, 12])
        batch_size = lanes * rng.choice([1, 2, 3])
        share = batch_size // world
        micro = rng.choice([m for m in range(2, share + 1, 2) if share % m == 0])
        stop = n + batch_size * rng.randint(1, 3)
        for rank in range(world):
            for numbers in _Slots(batch_size, micro, rank, world, n, stop, 2):
                assert len(numbers) == micro
                assert all(a ^ 1 == b for a, b in zip(numbers[::2], numbers[1::2], strict=True))
                assert {number // 2 % world for number in numbers} == {rank}, "lanes change their rank"
                seen += numbers
        n = stop
    assert sorted(seen) == list(range(n))


def test_what_is_fetched_ahead_is_what_pairs_read() -> None:
    order = Order([10] * 30, seed=1, lanes=12, block=5)
    for world, rank in ((1, 0), (2, 1), (3, 2), (6, 4)):
        plan = plan_of_lanes(order, rank, world, 1, 2)
        for numbers in _Slots(24, 2, rank, world, 0, 240, 2):
            need = plan(numbers[0])[1]()
            _, shards, _ = order.locate(numbers)
            assert set(shards.tolist()) <= set(need.now)


def test_sizes_that_part_pairs_are_named(image_folder: Path, tmp_path: Path) -> None:
    made = make(image_folder, tmp_path / "out", samples_per_shard=5)
    samples = Samples(made, Order(made.counts, 0, 8, 4), partial(train_view, seed=0, size=16))
    sizes = {"start": 0, "workers": 0, "rank": 0, "together": 2}
    with pytest.raises(UserError, match=r"taken 2 at a time; usable world sizes: 1, 2, 4\."):
        batches(samples, batch_size=24, micro_batch=2, world=8, **sizes)
    with pytest.raises(UserError, match="with 2 samples at a time; usable micro-batches: 2, 4, 6, 12"):
        batches(samples, batch_size=24, micro_batch=3, world=2, **sizes)
    assert torch.is_tensor(next(batches(samples, batch_size=24, micro_batch=6, world=4, **sizes))["images"])
