"""Streams of shards that lie on a web server, against the same shards on disk; and what is fetched ahead for them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from functools import partial
from itertools import islice

import numpy as np
import pytest
from web_server import WebServer

from fdscale import UserError
from fdscale.data.augment import eval_view, train_view
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.mixture import Joined, Mixture
from fdscale.data.order import Order, Sequential
from fdscale.data.prefetch import plan_of_lanes, plan_of_stretch
from fdscale.data.shard_cache import ShardCache
from fdscale.data.shards import make
from fdscale.data.sources import Settings
from fdscale.data.stream import Samples, batches, evaluation_batches

pytestmark = pytest.mark.slow  # together they are: left out of `make quick`

QUICK = Settings(tries=4, timeout_s=2.0, wait_s=0.01)


# ----------------------------------------------------------------------------------------------------------------------
# What is needed when


def shards_of(order, numbers) -> set[int]:
    return set(order.locate(np.array(sorted(numbers), np.int64))[1].tolist())


def block_numbers(order, number, residue, world):
    """All numbers of the same block and epoch as `number`, in the lanes that are `residue` modulo `world`."""
    epoch, place = divmod(number, order.samples)
    block = place // order.lanes // order.block
    steps = range(block * order.block, (block + 1) * order.block)
    places = (step * order.lanes + lane for step in steps for lane in range(residue % world, order.lanes, world))
    return {epoch * order.samples + place for place in places if place < order.samples}


@pytest.mark.parametrize("seed", range(6))
def test_the_shards_of_now_are_those_that_the_block_reads(seed):
    rng = random.Random(seed)
    world, ranks = rng.choice([(1, 1), (2, 2), (4, 2), (6, 3), (12, 8)])
    order = Order([rng.randrange(0, 30) for _ in range(40)], seed, lanes=12, block=rng.choice([3, 8, 50]))
    for _ in range(60):
        rank = rng.randrange(world)
        number = rng.randrange(3 * order.samples)
        _, need = plan_of_lanes(order, rank, world, ranks)(number)
        lane = number % order.samples % order.lanes
        assert set(need().now) == shards_of(order, block_numbers(order, number, lane, world))
        first = rank - rank % ranks
        together = set().union(
            *(
                block_numbers(order, number, lane + other - rank, world)
                for other in range(first, min(first + ranks, world))
            )
        )
        assert set(need().here) == shards_of(order, together)
        assert not set(need().soon) & set(need().now)
        assert len(set(need().soon)) == len(need().soon)


@pytest.mark.parametrize("seed", range(4))
def test_everything_a_rank_reads_was_announced_a_block_before(seed):
    """Through three epochs, whose boundary the lanes of a rank cross together, onto other lanes."""
    rng = random.Random(seed)
    world = rng.choice([1, 2, 3, 4])
    order = Order([rng.randrange(1, 30) for _ in range(50)], seed, lanes=12, block=rng.choice([4, 10, 40]))
    for rank in range(world):
        plan = plan_of_lanes(order, rank, world, 1)
        announced, key, changes = None, None, 0
        for number in range(rank, 3 * order.samples, world):
            now, need = plan(number)
            if now == key:
                continue
            found = need()
            if announced is not None:
                assert set(found.now) <= announced
            announced, key, changes = {*found.now, *found.soon}, now, changes + 1
        assert changes >= 3


def test_lanes_with_shards_larger_than_a_block_announce_the_next_shard():
    order = Order([100] * 24, 0, lanes=2, block=10)
    for number in range(0, 1800, 20):
        _, need = plan_of_lanes(order, 0, 1, 1)(number)
        assert len(need().soon) >= 2
        later = range(number, number + 2 * 110)
        assert shards_of(order, later) <= {*need().now, *need().soon}


def test_a_mixture_is_announced_for_each_of_its_sets():
    """Its lanes are not all at the same place of a set, but near: in this block, the one before, or the one after."""
    counts = [np.full(30, 200), np.full(10, 350)]
    order = Mixture(counts, [3.0, 1.0], seed=1, lanes=4, block=100)
    for rank in range(2):
        plan = plan_of_lanes(order, rank, 2, 2)
        key, before, announced = None, set(), set()
        for number in range(rank, 24_000, 2):
            now, need = plan(number)
            if now != key:
                found = need()
                key, before, announced = now, announced, {*found.now, *found.soon}
            assert order.at(number)[1] in before | announced
        assert len(announced) < 40


def test_a_stretch_is_announced_shard_by_shard():
    order = Sequential([5, 0, 5, 5, 0, 5])
    plan = plan_of_stretch(order, 16)
    assert [plan(n)[1]() for n in (0, 4, 5, 14, 15)] == [
        ([0], [2, 3], [0]),
        ([0], [2, 3], [0]),
        ([2], [3, 5], [2]),
        ([3], [5], [3]),
        ([5], [], [5]),
    ]


def test_the_plan_of_a_large_run_is_made_at_once():
    """LAION's 200 000 shards in 512 lanes: what is asked is bounded by the lanes, not by the set."""
    order = Order(np.full(200_000, 10_000), 0, lanes=512, block=4096)
    _, need = plan_of_lanes(order, 3, 64, 8)(123_456_789_003)
    found = need()
    assert 8 <= len(found.now) <= 8 * 2
    assert 64 <= len(found.here) <= 64 * 2
    assert len(found.soon) <= 8 * 3


# ----------------------------------------------------------------------------------------------------------------------
# Streams


@pytest.fixture(scope="module")
def shards(tmp_path_factory, photos):
    """24 photos in eight shards of 3."""
    root = tmp_path_factory.mktemp("remote")
    (root / "in").mkdir()
    for i, data in enumerate(photos):
        (root / "in" / f"{i:02d}.jpg").write_bytes(data)
    make(root / "in", root / "out", samples_per_shard=3)
    return root / "out"


@pytest.fixture
def web(shards):
    with WebServer({path.name: path.read_bytes() for path in shards.glob("*.tar")}) as server:
        server.pattern = server.url + "/shard-{000000..000007}.tar"
        server.largest = max(map(len, server.files.values()))
        yield server


@pytest.fixture
def cache(tmp_path):
    return ShardCache(str(tmp_path / "cache"), settings=QUICK)


def samples_of(opened, lanes=4, block=3, seed=5):
    return Samples(opened, Order(opened.counts, seed, lanes, block), partial(train_view, seed=seed, size=16))


def draw(samples, start, steps, *, world=1, workers=0, batch_size=12, micro_batch=2):
    """[(number, origin, pixels)] of all ranks in slot order."""
    slots = []
    for rank in range(world):
        stream = batches(
            samples,
            batch_size=batch_size,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
            start=start,
            workers=workers,
        )
        mine = []
        for batch in islice(stream, steps * batch_size // (world * micro_batch)):
            pixels = [image.numpy().tobytes() for image in batch["images"]]
            mine += zip(batch["numbers"].tolist(), batch["origin"], pixels, strict=True)
            assert batch["replaced"] == []
        stream.close()
        slots.append(mine)
    return [one for turn in zip(*slots, strict=True) for one in turn]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def leftovers(cache) -> list[str]:
    return [name for name in os.listdir(cache.path) if name.endswith((".part", ".lock")) and name != "room.lock"]


def test_an_index_made_over_the_web_is_the_one_made_on_disk(web, shards, cache, tmp_path):
    made = index(web.pattern, str(tmp_path / "index"), cache=cache)
    here = open_index(shards)
    assert (made.names, made.counts.tolist(), made.fingerprint) == (here.names, here.counts.tolist(), here.fingerprint)
    assert made.remote
    assert not here.remote
    for shard, count in enumerate(made.counts):
        for row in range(count):
            assert (made.key(shard, row), made.read(shard, row)) == (here.key(shard, row), here.read(shard, row))
    assert web.gets() == 8
    moved = open_index(web.pattern, str(shards / "index"), cache)  # the index of the disk, the shards of the web
    assert moved.fingerprint == here.fingerprint
    assert moved.read(3, 1) == here.read(3, 1)


def test_only_changed_shards_are_fetched_to_index_them_again(web, cache, tmp_path):
    index(web.pattern, str(tmp_path / "index"), cache=cache)
    empty = ShardCache(str(tmp_path / "other"), settings=QUICK)
    web.asked.clear()
    index(web.pattern, str(tmp_path / "index"), cache=empty)
    assert web.gets() == 0
    web.files["shard-000001.tar"] = web.files["shard-000002.tar"]
    index(web.pattern, str(tmp_path / "index"), workers=2, cache=empty)
    assert [path for method, path, _ in web.asked if method == "GET"] == ["shard-000001.tar"]
    part = index(web.url + "/shard-{000000..000001}.tar", str(tmp_path / "index"), cache=empty)
    assert part.counts.tolist() == [3, 3]
    assert open_index(web.pattern, str(tmp_path / "index")).samples == 24  # the others are still listed


def test_an_index_of_the_web_says_what_is_wrong(web, cache, tmp_path):
    place = str(tmp_path / "index")
    with pytest.raises(UserError, match=r"nothing can be written beside these shards; say where their index lies"):
        index(web.pattern, cache=cache)
    with pytest.raises(UserError, match=r"/shard-000008\.tar: is not there"):
        index(web.url + "/shard-{000000..000008}.tar", place, cache=cache)
    whole = web.files["shard-000001.tar"]
    web.files["shard-000001.tar"] = whole[:2000]
    with pytest.raises(UserError, match=r"1 of 8 shards cannot be used.*\n  shard-000001\.tar: truncated"):
        index(web.pattern, place, cache=cache)
    web.files["shard-000001.tar"] = whole
    assert index(web.pattern, place, cache=cache).samples == 24


def test_commands_and_their_index(shards, cache, tmp_path):
    pattern = f"pipe:cat {shards}/shard-{{000000..000007}}.tar | cat"
    made = index(pattern, str(tmp_path / "index"), cache=cache)
    here = open_index(shards)
    assert (made.names, made.fingerprint) == (here.names, here.fingerprint)
    assert draw(samples_of(made), 0, 3) == draw(samples_of(here), 0, 3)
    broken = pattern.replace("| cat", "| head -c 1000; false")
    opened = open_index(broken, str(tmp_path / "index"), ShardCache(str(tmp_path / "other"), settings=QUICK))
    with pytest.raises(
        UserError, match=r"pipe:cat .* the command ended with status 1 after 1000 bytes \(tried 4 times"
    ):
        opened.read(0, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world", "workers"), [(1, 2), (1, 0), (2, 1)])
def test_a_stream_over_the_web_is_the_one_from_disk(web, shards, cache, world, workers):
    """Three epochs, while the server fails in every way again and again."""
    expected = draw(samples_of(open_index(shards)), 7, 6)
    failing = ["500", "cut 1000", "drop", "404", "stall 100", "long 5"]
    for i, path in enumerate(sorted(web.files)):
        web.faults[path] = failing[i % 6 :][:2]
    hasty = ShardCache(cache.path, cache.limit, QUICK._replace(tries=6, timeout_s=0.5))
    opened = open_index(web.pattern, str(shards / "index"), hasty)
    assert draw(samples_of(opened), 7, 6, world=world, workers=workers) == expected
    assert threads() == leftovers(cache) == []
    assert web.gets() <= 8 * 3


@pytest.mark.slow
def test_a_stream_through_a_small_cache(web, shards, cache):
    """Half of the set fits: shards go and come again, each once or twice in an epoch, and the bound holds."""
    limit = 5 * web.largest
    expected = draw(samples_of(open_index(shards), lanes=2, block=2), 0, 10)
    opened = open_index(web.pattern, str(shards / "index"), ShardCache(cache.path, limit, QUICK))
    assert draw(samples_of(opened, lanes=2, block=2), 0, 10, workers=2) == expected
    assert sum(entry.stat().st_size for entry in os.scandir(cache.path)) <= limit
    assert 8 < web.gets() <= 8 * 5 * 3


def test_shards_come_before_they_are_read(web, shards, cache):
    """Without a worker nothing is fetched but by the threads and by the reading itself, which here waits for them."""
    opened = open_index(web.pattern, str(shards / "index"), cache)
    order = Order(opened.counts, 0, 2, 1)
    samples = Samples(opened, order, partial(train_view, seed=0, size=16))
    _, need = plan_of_lanes(order, 0, 1, 1)(0)
    wanted = {opened.names[shard] for shard in [*need().now, *need().soon]}
    stream = batches(samples, batch_size=2, micro_batch=2, rank=0, world=1, start=0, workers=0)
    next(stream)
    end = time.monotonic() + 30
    while {path for _, path, _ in web.asked} != wanted and time.monotonic() < end:
        time.sleep(0.01)
    assert {path for _, path, _ in web.asked} == wanted
    assert len(wanted) < 8
    stream.close()
    assert threads() == []


def test_a_cache_that_is_too_small_for_the_lanes_is_refused(web, shards, cache):
    small = ShardCache(cache.path, 2 * web.largest, QUICK)
    opened = open_index(web.pattern, str(shards / "index"), small)
    stream = batches(samples_of(opened), batch_size=12, micro_batch=2, rank=0, world=1, start=0, workers=1)
    message = (
        r"the shard cache .* may hold .* GiB, but the lanes read 4 shards of .* GiB at a time; give data\.shard_cache"
    )
    with pytest.raises(UserError, match=message):
        next(stream)
    assert web.gets() == 0
    assert threads() == []


def test_evaluation_over_the_web(web, shards, cache):
    view = partial(eval_view, size=16)
    small = ShardCache(cache.path, 3 * web.largest, QUICK)
    for rank in range(2):
        sizes = {"micro_batch": 5, "rank": rank, "world": 2, "workers": 1}
        here = list(evaluation_batches(open_index(shards), view, **sizes))
        there = list(evaluation_batches(open_index(web.pattern, str(shards / "index"), small), view, **sizes))
        assert [b["origin"] for b in here] == [b["origin"] for b in there]
        assert all(bool((a["images"] == b["images"]).all()) for a, b in zip(here, there, strict=True))
    assert threads() == []


def test_sets_here_and_there_in_one_mixture(web, shards, cache, tmp_path, photos, pack):
    pack(tmp_path / "here" / "x.tar", {f"{i}.jpg": photos[i] for i in range(9)})
    local = index(tmp_path / "here")
    weights = [2.0, 1.0]

    def joined(remote):
        both = Joined([remote, local])
        order = Mixture([one.counts for one in both.indexes], weights, 3, lanes=4, block=3)
        return Samples(both, order, partial(train_view, seed=3, size=16))

    expected = draw(joined(open_index(shards)), 0, 4)
    got = draw(joined(open_index(web.pattern, str(shards / "index"), cache)), 0, 4, workers=1)
    assert [(n, key, pixels) for n, (_, key), pixels in got] == [(n, key, pixels) for n, (_, key), pixels in expected]
    assert threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_is_down_stops_the_run(web, shards, cache, workers):
    opened = open_index(web.pattern, str(shards / "index"), cache)
    for path in web.files:
        web.faults[path] = ["503"] * 100
    stream = batches(samples_of(opened), batch_size=12, micro_batch=2, rank=0, world=1, start=0, workers=workers)
    with pytest.raises(UserError) as caught:
        next(stream)
    text = str(caught.value)
    assert text.startswith(f"{web.url}/shard-00000")
    assert "the server answers 503 Service Unavailable (tried 4 times in " in text
    assert "\n" not in text
    assert threads() == leftovers(cache) == []


def test_a_shard_that_changed_stops_the_run(web, cache, tmp_path):
    opened = index(web.pattern, str(tmp_path / "index"), cache=ShardCache(str(tmp_path / "first"), settings=QUICK))
    opened.cache = cache
    web.files["shard-000003.tar"] = web.files["shard-000003.tar"][:-512] + bytes(511) + b"\1"
    with pytest.raises(
        UserError, match=r"/shard-000003\.tar: changed since it was indexed: the source calls its state"
    ):
        list(islice(batches(samples_of(opened), batch_size=12, micro_batch=12, rank=0, world=1, start=0, workers=0), 2))


def test_a_damaged_copy_is_fetched_anew_and_a_damaged_source_loses_samples(web, shards, cache):
    here = open_index(shards)
    opened = open_index(web.pattern, str(shards / "index"), cache)
    opened.read(2, 0)
    (kept,) = [entry.path for entry in os.scandir(cache.path) if entry.name.endswith(".tar")]
    with open(kept, "r+b") as file:
        file.write(bytes(512))  # the header of its first sample
    assert opened.read(2, 0) == here.read(2, 0)
    assert web.gets() == 2
    raw = web.files["shard-000004.tar"]
    web.files["shard-000004.tar"] = bytes(512) + raw[512:]
    samples = samples_of(opened)
    lost = [sample.replaced for sample in samples.__getitems__(list(range(24))) if sample.replaced]
    assert [one.shard for one in lost] == ["shard-000004.tar"]
    assert "the shard is damaged at byte 512" in lost[0].reason
    assert web.gets("shard-000004.tar") == 2  # once more, to be sure


def test_open_shards_that_had_to_go_are_closed(web, shards, cache):
    """They would take room on the disk beyond the bound for as long as they are open."""
    small = ShardCache(cache.path, 2 * web.largest, QUICK)
    opened = open_index(web.pattern, str(shards / "index"), small)
    for shard in range(8):
        opened.read(shard, 0)
        kept = sum(entry.name.endswith(".tar") for entry in os.scandir(cache.path))
        assert len(opened._files) <= kept + 2  # at most what the newest has just replaced
    assert kept < 5


SCRIPT = """
import os, signal, sys, time
from functools import partial
sys.path.insert(0, {cwd!r})
sys.path.insert(0, {tests!r})
from test_prefetch import samples_of
from fdscale.data.index import open_index
from fdscale.data.shard_cache import ShardCache
from fdscale.data.sources import Settings
from fdscale.data.stream import batches
opened = open_index({pattern!r}, {index!r}, ShardCache({cache!r}, settings=Settings(timeout_s=600)))
stream = batches(samples_of(opened), batch_size=12, micro_batch=2, rank=0, world=1, start=0, workers={workers})
def later():
    while not [name for name in os.listdir({cache!r}) if name.endswith(".part")]:
        time.sleep(0.01)
    {end}
import threading
os.makedirs({cache!r}, exist_ok=True)
threading.Thread(target=later, daemon=True).start()
next(stream)
"""


def alive(mark: str) -> bool:
    """Whether a process has these characters in its command line."""
    return subprocess.run(["pgrep", "-f", mark], capture_output=True, check=False).returncode == 0


INTERRUPT = "os.kill(os.getpid(), signal.SIGINT)"
TERMINATE = "os.kill(os.getpid(), signal.SIGTERM)"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "workers", "end"),
    [
        *(("web", workers, end) for workers in (0, 1) for end in (INTERRUPT, TERMINATE, KILL)),
        ("silent pipe", 0, INTERRUPT),
        ("silent pipe", 1, INTERRUPT),
        ("pipe", 1, KILL),  # a command notices when it writes and nobody listens
    ],
)
def test_a_run_that_is_stopped_while_it_fetches(web, shards, tmp_path, how, workers, end):
    """It ends at once though its source hangs; nothing goes on without it; the next run finds nothing in its way."""
    for path in web.files:
        web.faults[path] = ["stall 100"] * 20
    mark = f"{600 + random.SystemRandom().random():.9f}"  # seconds of a sleep that is nobody else's
    shard = f"{shards}/shard-{{000000..000007}}.tar"
    patterns = {
        "web": web.pattern,
        "silent pipe": f"pipe:sleep {mark}; cat {shard}",
        "pipe": f"pipe:while true; do printf x; sleep 0.1; done; sleep {mark}; cat {shard}",
    }
    mark = str(tmp_path / "cache") if how == "web" else mark
    fill = {"cwd": os.getcwd(), "tests": os.path.dirname(__file__), "cache": str(tmp_path / "cache"), "end": end}
    code = SCRIPT.format(**fill, pattern=patterns[how], index=str(shards / "index"), workers=workers)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode in {INTERRUPT: (-2, 130, 1), TERMINATE: (-15,), KILL: (-9,)}[end], done.stderr
    limit = time.monotonic() + 20
    while alive(mark) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not alive(mark)
    web.faults.clear()
    cache = ShardCache(str(tmp_path / "cache"), settings=QUICK)
    opened = open_index(web.pattern, str(shards / "index"), cache)
    assert opened.read(0, 0) == open_index(shards).read(0, 0)
    assert not [name for name in leftovers(cache) if name.endswith(".part")]
