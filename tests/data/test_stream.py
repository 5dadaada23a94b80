"""Batches against the samples their numbers mean, while ranks, workers and batch sizes change under way."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fdscale import UserError
from fdscale.data.augment import eval_view, train_view
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.order import Order
from fdscale.data.shards import make
from fdscale.data.stream import Samples, _Slots, batches, chosen_batches, evaluation_batches

LANES = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory, photos):
    """24 photos in four shards of 7, 7, 7 and 3."""
    root = tmp_path_factory.mktemp("stream")
    (root / "in").mkdir()
    for i, data in enumerate(photos):
        (root / "in" / f"{i:02d}.jpg").write_bytes(data)
    make(root / "in", root / "out", samples_per_shard=7)
    return root / "out"


@pytest.fixture
def samples(shards) -> Samples:
    opened = open_index(shards)
    return Samples(opened, Order(opened.counts, 5, LANES, 4), partial(train_view, seed=5, size=16))


def draw(samples, start, steps, *, world=1, workers=0, batch_size=24, micro_batch=2):
    """`steps` global batches from all ranks, put back in slot order: [(number, origin, pixels)]."""
    slots = []
    for rank in range(world):
        sizes = {"batch_size": batch_size, "micro_batch": micro_batch, "world": world}
        stream = batches(samples, **sizes, rank=rank, start=start, workers=workers)
        mine = []
        for _ in range(steps * batch_size // (world * micro_batch)):
            batch = next(stream)
            assert batch["images"].shape == (micro_batch, 3, 16, 16)
            assert batch["images"].dtype == torch.uint8
            assert batch["numbers"].dtype == torch.int64
            pixels = [image.numpy().tobytes() for image in batch["images"]]
            mine += zip(batch["numbers"].tolist(), batch["origin"], pixels, strict=True)
        stream.close()
        slots.append(mine)
    return [one for turn in zip(*slots, strict=True) for one in turn]


def test_plans_of_all_ranks_are_the_sequence_whatever_changes():
    """Worlds, batches and micro-batches change every few steps, as after a resume; only the number carries over."""
    rng = random.Random(0)
    for _ in range(200):
        n, seen = rng.randrange(1000), []
        first = n
        for _ in range(6):
            batch_size = LANES * rng.choice([1, 2, 3, 5])
            world = rng.choice([1, 2, 3, 4, 6, 12])
            micro = rng.choice([m for m in range(1, batch_size + 1) if batch_size % (world * m) == 0])
            stop = n + batch_size * rng.randint(1, 4)
            plans = [list(_Slots(batch_size, micro, rank, world, n, stop)) for rank in range(world)]
            assert all(len(numbers) == micro for plan in plans for numbers in plan)
            ranks = [[number for numbers in plan for number in numbers] for plan in plans]
            seen += [number for turn in zip(*ranks, strict=True) for number in turn]
            n = stop
        assert seen == list(range(first, n))


def test_a_rank_keeps_to_its_lanes_in_an_epoch():
    order = Order([25] * 40, 0, LANES)  # 12 does not divide 1000 samples: ranks change lanes from epoch to epoch
    for world in (2, 3, 4, 6):
        for start in (0, 7, 1000, 2000):
            for rank in range(world):
                stop = (start // 1000 + 1) * 1000 - 48
                numbers = np.array([n for m in _Slots(48, 48 // world, rank, world, start, stop) for n in m])
                lanes = set((numbers % order.samples % LANES).tolist())
                assert len(lanes) == LANES // world


def test_batches_are_the_samples_of_their_numbers(samples, shards):
    opened = open_index(shards)
    for number, (shard, key), pixels in draw(samples, 30, 2):
        _, where, row = samples.order.at(number)
        assert (shard, key) == (opened.names[where], opened.key(where, row))
        data = opened.read(where, row)
        assert pixels == train_view(data, 5, number, 16).numpy().tobytes()
        one = samples[number]
        assert (one[1:], one.image.numpy().tobytes()) == ((number, shard, key, None, None, None), pixels)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_the_sequence_and_the_pixels_survive_every_change(samples):
    """Seven and a half epochs of the set on changing ranks, workers, batches and micro-batches."""
    reference = draw(samples, 0, 8)
    assert [number for number, _, _ in reference] == list(range(192))
    epochs = [{origin for _, origin, _ in reference[i : i + 24]} for i in range(0, 192, 24)]
    assert all(len(epoch) == 24 for epoch in epochs)
    got = []
    for world, workers, batch_size, micro, steps in (
        (2, 0, 24, 4, 1),
        (1, 2, 12, 3, 2),
        (3, 1, 36, 12, 1),
        (1, 3, 24, 24, 1),
        (12, 0, 12, 1, 1),
        (4, 1, 24, 6, 1),
        (6, 0, 36, 3, 1),
        (1, 5, 12, 1, 1),
    ):
        got += draw(samples, len(got), steps, world=world, workers=workers, batch_size=batch_size, micro_batch=micro)
    assert got == reference[: len(got)]
    assert len(got) == 192


def test_beyond_the_span_samples_and_their_views_repeat_under_new_numbers(samples):
    """On any ranks and workers, with a span that nothing divides; what `complete` adds comes along."""
    span = 29
    order = Order(samples.index.counts, 5, LANES, 4, span=span)
    repeating = Samples(samples.index, order, samples.view)
    plain = {number: (origin, pixels) for number, origin, pixels in draw(samples, 0, 2)}
    for start, world, workers, batch_size in ((0, 1, 0, 24), (24, 3, 1, 24), (48, 2, 0, 48)):
        drawn = draw(repeating, start, 2, world=world, workers=workers, batch_size=batch_size)
        assert [number for number, _, _ in drawn] == list(range(start, start + 2 * batch_size))
        assert all((origin, pixels) == plain[number % span] for number, origin, pixels in drawn)


@pytest.mark.parametrize("workers", [0, 1])
def test_complete_adds_to_each_micro_batch_and_its_errors_stop_the_stream(samples, workers):
    def complete(batch):
        if 9 in batch["numbers"].tolist():
            raise UserError("there is no ninth")
        return {"sums": batch["images"].flatten(1).sum(1)}

    stream = batches(
        samples, batch_size=12, micro_batch=3, rank=0, world=1, start=0, workers=workers, complete=complete
    )
    for _ in range(3):
        batch = next(stream)
        assert torch.equal(batch["sums"], batch["images"].long().sum((1, 2, 3)))
    with pytest.raises(UserError, match="there is no ninth"):
        next(stream)


def test_chosen_numbers_come_as_they_are_given(samples):
    chosen = [[5, 3], [100, 5]]
    got = list(chosen_batches(samples, iter(chosen), workers=1))
    assert [batch["numbers"].tolist() for batch in got] == chosen
    for batch in got:
        for number, image in zip(batch["numbers"].tolist(), batch["images"], strict=True):
            assert torch.equal(image, samples[number][0])


def test_stop_ends_the_stream_after_whole_batches(samples):
    for workers in (0, 1):
        stream = batches(samples, batch_size=12, micro_batch=6, rank=0, world=2, start=5, stop=5 + 24, workers=workers)
        assert [batch["numbers"].tolist() for batch in stream] == [[5, 7, 9, 11, 13, 15], [17, 19, 21, 23, 25, 27]]


def test_the_runs_generator_is_left_alone(samples):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    draw(samples, 0, 1, workers=1)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"world": 5}, "world size 5 does not divide the 12 lanes"),
        ({"world": 2, "micro_batch": 8}, r"24 does not divide into .* of 8 on 2 ranks; .*: 1, 2, 3, 4, 6, 12"),
        ({"world": 4, "batch_size": 18}, "expected a batch that 4 divides"),
        ({"micro_batch": 0}, "usable micro-batches: 1, 2, 3"),
        ({"start": -1}, "start is sample number -1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_at_once(samples, sizes, message):
    right = {"batch_size": 24, "micro_batch": 2, "rank": 0, "world": 1, "start": 0, "workers": 0}
    with pytest.raises(UserError, match=message):
        batches(samples, **{**right, **sizes})


@pytest.fixture
def damaged(tmp_path, photos, pack) -> Samples:
    """Two shards of 8: a.tar with one broken image and one that is no image, b.tar cut off in its sixth sample."""
    members = {f"{i}.jpg": photos[i] for i in range(16)}
    members |= {"3.jpg": photos[3][:500], "5.jpg": b"GIF, not quite"}
    pack(tmp_path / "a.tar", {f"{i}.jpg": members[f"{i}.jpg"] for i in range(8)})
    path = pack(tmp_path / "b.tar", {f"{i}.jpg": members[f"{i}.jpg"] for i in range(8, 16)})
    opened = index(tmp_path)
    place = path.read_bytes().index(photos[13])
    path.write_bytes(path.read_bytes()[: place + 100])
    return Samples(opened, Order(opened.counts, 7, 4, 4), partial(train_view, seed=7, size=16))


def drawn(samples, *, steps=12, world=1, workers=0, micro_batch=2) -> tuple[list, list]:
    """(every image with its number and origin, every replacement), from all ranks, in the order of numbers."""
    images, replaced = [], []
    for rank in range(world):
        sizes = {"batch_size": 8, "micro_batch": micro_batch, "world": world, "stop": 8 * steps}
        for batch in batches(samples, **sizes, rank=rank, start=0, workers=workers):
            pixels = [image.numpy().tobytes() for image in batch["images"]]
            images += zip(batch["numbers"].tolist(), batch["origin"], pixels, strict=True)
            replaced += batch["replaced"]
    return sorted(images), sorted(replaced)


def test_lost_samples_are_replaced_and_each_is_named(damaged):
    """Against a plain reading of the order: who is lost is known, everybody else is where he was."""
    images, replaced = drawn(damaged)
    lost = {("a.tar", "3"), ("a.tar", "5"), ("b.tar", "13"), ("b.tar", "14"), ("b.tar", "15")}
    expected = []
    for number, origin, _ in images:
        _, shard, row = damaged.order.at(number)
        wanted = (damaged.index.names[shard], damaged.index.key(shard, row))
        if wanted in lost:
            expected.append((number, *wanted))
            assert origin[0] == wanted[0]  # first choice: its own shard, which is at hand
            assert origin not in lost
        else:
            assert origin == wanted
    assert [(one.number, one.shard, one.key) for one in replaced] == expected
    assert len(expected) == 6 * len(lost)  # 96 numbers are 6 epochs of 16
    reasons = {(one.shard, one.key): one.reason for one in replaced}
    assert reasons["a.tar", "3"].startswith("the image cannot be decoded (OSError: ")
    assert "are no JPEG" in reasons["a.tar", "5"]
    assert reasons["b.tar", "13"].startswith("the shard is cut off before byte ")
    assert len({one.by_key for one in replaced}) > 3


@pytest.mark.parametrize(("world", "workers", "micro_batch"), [(1, 2, 4), (2, 0, 1), (4, 1, 2)])
def test_replacements_are_the_same_however_the_work_is_cut(damaged, world, workers, micro_batch):
    assert drawn(damaged, world=world, workers=workers, micro_batch=micro_batch) == drawn(damaged)


def test_replacements_come_from_other_shards_where_their_own_has_none(tmp_path, photos, pack):
    pack(tmp_path / "a.tar", {f"{i}.jpg": b"nothing" for i in range(4)})
    pack(tmp_path / "b.tar", {f"{i}.jpg": photos[i] for i in range(4)})
    opened = index(tmp_path)
    images, replaced = drawn(Samples(opened, Order(opened.counts, 0, 4), partial(train_view, seed=0, size=16)), steps=2)
    assert {origin[0] for _, origin, _ in images} == {"b.tar"}
    assert len(replaced) == len(images) // 2


@pytest.mark.parametrize("workers", [0, 2])
def test_where_nothing_can_be_had_the_run_stops_with_the_first_reason(tmp_path, pack, workers):
    pack(tmp_path / "a.tar", {f"{i}.jpg": b"nothing" for i in range(8)})
    opened = index(tmp_path)
    broken = Samples(opened, Order(opened.counts, 0, 1), partial(train_view, seed=0, size=16))
    stream = batches(broken, batch_size=2, micro_batch=2, rank=0, world=1, start=0, workers=workers)
    with pytest.raises(UserError, match=r"a\.tar: sample '\d': the 7 bytes are no .* and none of 16 others") as caught:
        next(stream)
    assert "Traceback" not in str(caught.value)
    with pytest.raises(StopIteration):
        next(stream)


def test_lost_samples_have_no_weight_in_an_evaluation(damaged):
    view = partial(eval_view, size=16)
    seen = list(evaluation_batches(damaged.index, view, micro_batch=3, rank=0, world=1, workers=0))
    weights = torch.cat([batch["weights"] for batch in seen])
    numbers = torch.cat([batch["numbers"] for batch in seen])
    assert numbers[weights > 0].tolist() == [i for i in range(16) if i not in (3, 5, 13, 14, 15)]
    assert [one.number for batch in seen for one in batch["replaced"]][:2] == [3, 5]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_was_exchanged_stops_the_run(tmp_path, photos, pack, workers):
    path = pack(tmp_path / "a.tar", {f"{i}.jpg": photos[i] for i in range(6)})
    opened = index(tmp_path)
    size = path.stat().st_size
    pack(tmp_path / "a.tar", {f"{i}.jpg": photos[5 - i] + bytes(512) for i in range(6)})
    path.write_bytes(path.read_bytes()[:size])
    other = Samples(opened, Order(opened.counts, 0, 1), partial(train_view, seed=0, size=16))
    stream = batches(other, batch_size=2, micro_batch=2, rank=0, world=1, start=0, workers=workers)
    with pytest.raises(UserError, match=r"a\.tar: truncated or changed since .* nor are others in place"):
        next(stream)


def slow(data: bytes, number: int, seconds: float) -> torch.Tensor:
    time.sleep(seconds)
    return eval_view(data, 16)


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_closing_stops_the_workers_and_so_does_forgetting(samples):
    for forget in (False, True):
        before = children()
        stream = batches(samples, batch_size=12, micro_batch=6, rank=0, world=1, start=0, workers=2)
        next(stream)
        workers = children() - before
        assert len(workers) == 2
        if forget:
            del stream
            gc.collect()
        else:
            stream.close()
        assert not workers & children()


def test_signals_of_a_scheduler_do_not_stop_the_workers(samples):
    before = children()
    stream = batches(samples, batch_size=12, micro_batch=2, rank=0, world=1, start=0, workers=2)
    next(stream)  # by one of them; the other may not have begun
    for pid in children() - before:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    numbers = [number for _ in range(30) for number in next(stream)["numbers"].tolist()]
    assert numbers == list(range(2, 62))
    stream.close()
    assert children() == before


@pytest.mark.slow
def test_a_killed_worker_is_reported(samples):
    before = children()
    samples.view = partial(slow, seconds=0.05)
    stream = batches(samples, batch_size=12, micro_batch=2, rank=0, world=1, start=0, workers=1)
    next(stream)
    (worker,) = children() - before
    handler = signal.getsignal(signal.SIGCHLD)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own would raise wherever this test happens to be
    try:
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(UserError, match=r"a data worker was killed by signal 9.*memory"):
            list(islice(stream, 20))
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert children() == before


SCRIPT = """
import os, signal, sys, time
from functools import partial
sys.path.insert(0, {tests!r})
from test_stream import children, slow
from fdscale.data.index import open_index
from fdscale.data.order import Order
from fdscale.data.stream import Samples, batches
opened = open_index({shards!r})
samples = Samples(opened, Order(opened.counts, 0, 12), partial(slow, seconds={seconds}))
stream = batches(samples, batch_size=12, micro_batch=1, rank=0, world=1, start=0, workers=2, prefetch=1)
next(stream)
print(*children(), flush=True)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "seconds", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 0.01, -9),  # nobody is left to stop the workers
        ("raise SystemExit(3)", 0.01, 3),  # the stream is never closed
        ("time.sleep(0.2); raise SystemExit(4)", 3.0, 4),  # and the workers are busy
    ],
)
def test_workers_end_with_the_process_that_made_them(shards, end, seconds, status):
    code = SCRIPT.format(tests=os.path.dirname(__file__), shards=str(shards), seconds=seconds, end=end)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("world", "micro_batch", "workers"), [(1, 24, 0), (1, 5, 2), (2, 5, 0), (5, 2, 1), (7, 3, 0), (30, 1, 0)]
)
def test_evaluation_takes_every_sample_once(shards, world, micro_batch, workers):
    opened = open_index(shards)
    view = partial(eval_view, size=16)
    steps, seen = set(), []
    for rank in range(world):
        stream = list(
            evaluation_batches(opened, view, micro_batch=micro_batch, rank=rank, world=world, workers=workers)
        )
        steps.add(len(stream))
        for batch in stream:
            assert batch["images"].shape == (micro_batch, 3, 16, 16)
            assert batch["weights"].dtype == torch.float32
            assert set(batch["weights"].tolist()) <= {0.0, 1.0}
            kept = batch["weights"] == 1
            origins = [origin for origin, keep in zip(batch["origin"], kept.tolist(), strict=True) if keep]
            seen += zip(batch["numbers"][kept].tolist(), origins, batch["images"][kept], strict=True)
    assert len(steps) == 1
    assert [number for number, _, _ in seen] == list(range(24))
    places = [(shard, row) for shard, count in enumerate(opened.counts) for row in range(count)]
    for (_, origin, image), (shard, row) in zip(seen, places, strict=True):
        assert origin == (opened.names[shard], opened.key(shard, row))
        assert torch.equal(image, view(opened.read(shard, row)))


def test_evaluation_can_be_cut_short(shards):
    before = children()
    stream = evaluation_batches(
        open_index(shards), partial(eval_view, size=16), micro_batch=2, rank=0, world=1, workers=2
    )
    next(stream)
    stream.close()
    assert children() == before
    with pytest.raises(UserError, match="micro-batch is 0"):
        evaluation_batches(open_index(shards), partial(eval_view, size=16), micro_batch=0, rank=0, world=1, workers=0)
