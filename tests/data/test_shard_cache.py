"""The shared cache of shards: many processes at once, killed ones, a bound, damage, and people who may not touch it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from web_server import WebServer

from fdscale import UserError
from fdscale.data.shard_cache import ShardCache
from fdscale.data.sources import Settings, State, Stop, Stopped

pytestmark = pytest.mark.slow  # together they are: left out of `make quick`

QUICK = Settings(tries=3, timeout_s=2.0, wait_s=0.01)
SIZE = 400_000
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def web():
    rng = np.random.default_rng(1)
    with WebServer({f"{i}.tar": rng.bytes(SIZE) for i in range(12)}) as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return ShardCache(str(tmp_path / "cache"), 10 * SIZE, QUICK)


def state_of(web, i) -> State:
    return State(SIZE, ShardCache(settings=QUICK).look(f"{web.url}/{i}.tar").version)


def got(cache, web, i, expected=None) -> bytes:
    """The bytes of a shard through the cache."""
    file, _ = cache.open(f"{web.url}/{i}.tar", expected or state_of(web, i))
    with os.fdopen(file, "rb") as opened:
        return opened.read()


def kept(cache) -> list[str]:
    names = os.listdir(cache.path) if os.path.isdir(cache.path) else []
    return sorted(name for name in names if name != "room.lock")


def waited(condition, seconds=30.0) -> bool:
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(found)


def test_a_shard_is_fetched_once_and_stays(cache, web):
    for _ in range(3):
        assert got(cache, web, 0) == web.files["0.tar"]
    assert web.gets("0.tar") == 1
    (name,) = kept(cache)
    assert os.path.getsize(os.path.join(cache.path, name)) == SIZE
    assert stat.S_IMODE(os.stat(cache.path).st_mode) == 0o700


def test_what_is_at_the_location_now_is_fetched_anew(cache, web):
    file, first = cache.open(f"{web.url}/0.tar", State())
    os.close(file)
    assert first == state_of(web, 0)
    assert got(cache, web, 0, first) == web.files["0.tar"]
    assert web.gets("0.tar") == 1
    web.files["0.tar"] = web.files["1.tar"]
    file, second = cache.open(f"{web.url}/0.tar", State())
    os.close(file)
    assert second.version != first.version
    assert got(cache, web, 0, second) == web.files["1.tar"]


def test_a_changed_shard_is_an_error_though_an_older_one_is_kept(cache, web):
    before = state_of(web, 0)
    web.files["0.tar"] = web.files["0.tar"][::-1]
    with pytest.raises(UserError, match=r"/0\.tar: changed since it was indexed"):
        got(cache, web, 0, before)
    assert kept(cache) == []


def race(cache, web, i, expected, go, results):
    go.wait()
    try:
        results.put(hashlib.sha256(got(cache, web, i, expected)).hexdigest())
    except UserError as error:
        results.put(str(error))


def raced(cache, web, wanted, count):
    """What `count` processes get that want the same shards at the same time."""
    go, results = FORK.Event(), FORK.Queue()
    expected = {i: state_of(web, i) for i in set(wanted)}
    processes = [
        FORK.Process(target=race, args=(cache, web, i, expected[i], go, results), daemon=True)
        for i in wanted
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    go.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return found


def test_many_processes_that_want_a_shard_fetch_it_once(cache, web):
    web.pace_s = 0.02
    found = raced(cache, web, [3, 4], 6)
    assert sorted(found) == sorted(hashlib.sha256(web.files[f"{i}.tar"]).hexdigest() for i in (3, 4) for _ in range(6))
    assert (web.gets("3.tar"), web.gets("4.tar")) == (1, 1)
    assert len(kept(cache)) == 2  # no parts, no locks


def test_those_who_wait_learn_why_it_failed(cache, web):
    """Each on its own would try as often again, one after another."""
    expected = state_of(web, 3)
    web.faults["3.tar"] = ["stall 10"] * 100
    cache = ShardCache(cache.path, cache.limit, Settings(3, 0.4, 0.01))
    results: list[str] = []

    def want():
        with pytest.raises(UserError) as caught:
            got(cache, web, 3, expected)
        results.append(str(caught.value))

    threads = [threading.Thread(target=want, daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 5
    assert len(set(results)) == 1
    assert "3.tar: does not answer (tried 3 times" in results[0]
    assert web.gets("3.tar") == 3
    assert kept(cache) == []
    web.faults.clear()
    assert got(cache, web, 3, expected) == web.files["3.tar"]


def test_whoever_waits_goes_on_for_one_that_is_killed(cache, web):
    expected = state_of(web, 5)
    web.faults["5.tar"] = ["stall 100000"]
    cache = ShardCache(cache.path, cache.limit, QUICK._replace(timeout_s=600.0))
    first = FORK.Process(target=got, args=(cache, web, 5, expected), daemon=True)
    first.start()
    assert waited(lambda: [name for name in kept(cache) if name.endswith(".part")])
    results: list[bytes] = []
    second = threading.Thread(target=lambda: results.append(got(cache, web, 5, expected)), daemon=True)
    second.start()
    time.sleep(0.2)
    assert not results
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second.join(60)
    assert results == [web.files["5.tar"]]
    assert web.gets("5.tar") == 2
    assert len(kept(cache)) == 1  # the dead one's part went when room was made


def test_leftovers_of_the_dead_go_and_parts_of_the_living_stay(cache, web):
    got(cache, web, 0)
    dead = os.path.join(cache.path, f".{'0' * 32}-77.77.{'0' * 16}.part")
    lock = os.path.join(cache.path, f"{'1' * 32}-77.lock")
    foreign = os.path.join(cache.path, "notes.txt")
    for path in (dead, lock, foreign):
        with open(path, "w") as file:
            file.write("x")
    web.faults["1.tar"] = ["stall 100000"]
    stop = Stop()
    expected = state_of(web, 1)

    def fetch():
        with pytest.raises(Stopped):
            cache.open(f"{web.url}/1.tar", expected, stop)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()

    def only_its_own() -> bool:
        parts = [name for name in kept(cache) if name.endswith(".part")]
        return len(parts) == 1 and os.path.basename(dead) not in parts

    assert waited(only_its_own)
    got(cache, web, 2)
    assert not os.path.exists(lock)
    assert os.path.exists(foreign)
    assert len([name for name in kept(cache) if name.endswith((".part", ".lock"))]) == 2
    stop.set()
    thread.join(30)
    assert len(kept(cache)) == 3  # two shards and what is none of ours


def test_what_was_not_used_for_longest_goes_and_open_files_are_read_on(cache, web):
    cache = ShardCache(cache.path, 3 * SIZE + 1, QUICK)
    first, _ = cache.open(f"{web.url}/0.tar", state_of(web, 0))
    for i in (1, 2):
        got(cache, web, i)
    got(cache, web, 1)  # used again
    got(cache, web, 3)
    got(cache, web, 4)
    assert sum(os.path.getsize(os.path.join(cache.path, name)) for name in kept(cache)) == 3 * SIZE
    with os.fdopen(first, "rb") as opened:
        assert opened.read() == web.files["0.tar"]
    web.asked.clear()
    for i in (1, 3, 4):
        got(cache, web, i, state_of(web, i))
    assert web.gets() == 0
    got(cache, web, 0)
    assert web.gets() == 1


def test_uses_right_after_one_another_are_told_apart(cache, web):
    """Several within a tick of the clock by which the kernel dates files, as when all lanes change blocks."""
    expected = {i: state_of(web, i) for i in range(10)}
    for i in range(10):
        got(cache, web, i, expected[i])
    order = np.random.default_rng(0).permutation(10).tolist()
    for i in order:
        os.close(cache.open(f"{web.url}/{i}.tar", expected[i])[0])
    for left in range(9, 0, -1):
        smaller = ShardCache(cache.path, left * SIZE, QUICK)
        assert smaller.make_room(0, "none")
        there = [i for i in order if os.path.exists(smaller._file(f"{web.url}/{i}.tar", expected[i]))]
        assert there == order[-left:]


def test_a_part_becomes_a_shard_only_while_nobody_counts(cache, web):
    """Renamed between the listing of the folder and a look at its size, it would be counted under neither name."""
    expected = state_of(web, 0)
    web.faults["0.tar"] = ["stall 399999"]
    thread = threading.Thread(target=lambda: got(cache, web, 0, expected), daemon=True)
    thread.start()
    assert waited(lambda: [name for name in kept(cache) if name.endswith(".part")])
    with cache.room(Stop()):
        (part,) = [os.path.join(cache.path, name) for name in kept(cache) if name.endswith(".part")]
        web.closing.set()  # the server goes on
        assert waited(lambda: os.path.getsize(part) == SIZE)
        time.sleep(0.3)
        assert os.path.exists(part)
    thread.join(30)
    assert [name.rpartition(".")[2] for name in kept(cache)] == ["tar"]


@pytest.mark.slow
def test_the_bound_holds_while_many_fetch_at_once(cache, web):
    web.pace_s = 0.01
    cache = ShardCache(cache.path, 3 * SIZE + 1, QUICK)
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            with cache.room(Stop()):  # without it a look at the folder may see a shard that went and one that came
                sizes = [os.path.getsize(os.path.join(cache.path, name)) for name in kept(cache) if ".lock" not in name]
            most[0] = max(most[0], sum(sizes))

    os.makedirs(cache.path)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        found = raced(cache, web, list(range(12)), 1)
    finally:
        done.set()
        watcher.join()
    assert sorted(found) == sorted(hashlib.sha256(data).hexdigest() for data in web.files.values())
    assert SIZE <= most[0] <= 3 * SIZE + 1


def test_a_shard_larger_than_the_bound_is_an_error(cache, web):
    cache = ShardCache(cache.path, SIZE // 2, QUICK)
    with pytest.raises(UserError, match=r"/0\.tar: has 0\.00 GiB, the cache .* may hold 0\.00 GiB; give a larger data"):
        got(cache, web, 0)
    assert web.gets() == 0
    web.heads = web.etags = False
    with pytest.raises(UserError, match=r"/0\.tar: has more, the cache .* give a larger data\.shard_cache_gib"):
        cache.open(f"{web.url}/0.tar", State())
    with pytest.raises(UserError, match=r"zero\.tar: has more, the cache"):  # it would never end
        cache.open("pipe:cat /dev/zero # zero.tar", State())
    assert kept(cache) == []


@pytest.mark.parametrize("damage", ["shorter", "longer", "empty", "a link"])
def test_a_kept_file_of_the_wrong_size_or_kind_is_fetched_anew(cache, web, damage, tmp_path):
    expected = state_of(web, 0)
    got(cache, web, 0, expected)
    (name,) = kept(cache)
    path = os.path.join(cache.path, name)
    if damage == "a link":
        os.unlink(path)
        (tmp_path / "other").write_bytes(bytes(SIZE))
        os.symlink(tmp_path / "other", path)
        with pytest.raises(UserError, match="cannot be opened"):
            got(cache, web, 0, expected)
        return
    with open(path, "r+b") as file:
        file.truncate({"shorter": SIZE - 1, "longer": SIZE + 1, "empty": 0}[damage])
    assert got(cache, web, 0, expected) == web.files["0.tar"]
    assert web.gets("0.tar") == 2


def test_what_reads_wrong_is_fetched_anew_once(cache, web):
    expected, url = state_of(web, 0), f"{web.url}/0.tar"
    first, _ = cache.open(url, expected)
    assert cache.renew(url, expected, first)
    second, _ = cache.open(url, expected)
    assert web.gets("0.tar") == 2
    assert cache.renew(url, expected, first)  # another copy is there since
    assert not cache.renew(url, expected, second)
    for file in (first, second):
        os.close(file)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path, monkeypatch, web):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = ShardCache(settings=QUICK)
    assert cache.path == str(tmp_path / f"fdscale-shards-{os.getuid()}")
    got(cache, web, 0)
    os.chmod(cache.path, 0o777)
    with pytest.raises(
        UserError, match=r"is not a folder of yours alone; remove it, or name another data\.shard_cache"
    ):
        got(cache, web, 0)
    os.rename(cache.path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", cache.path)
    with pytest.raises(UserError, match="is not a folder of yours alone"):
        got(cache, web, 0)


def test_a_place_that_cannot_be_written_is_named(tmp_path, web):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(UserError, match=r"(data\.shard_cache|name another)"):
            got(ShardCache(str(place), settings=QUICK), web, 0)


def test_a_disk_that_fills_up_is_named_and_nothing_is_left(cache, web):
    """The system's bound on the size of a file makes the write fail as a full disk does."""
    expected = state_of(web, 0)
    code = f"""
import resource, sys
sys.path.insert(0, {os.getcwd()!r})
from fdscale.data.shard_cache import ShardCache
from fdscale.data.sources import State
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
ShardCache({cache.path!r}).open({web.url + "/0.tar"!r}, State(*{tuple(expected)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "cannot be kept on the local disk (File too large); free some space, or choose another" in done.stderr
    assert kept(cache) == []


def test_an_unknown_size_counts_as_it_grows(cache, web):
    web.heads = web.etags = False
    cache = ShardCache(cache.path, 2 * SIZE + 1, QUICK)
    for i in range(4):
        file, state = cache.open(f"{web.url}/{i}.tar", State())
        os.close(file)
        assert state == State(SIZE, "sha256:" + hashlib.sha256(web.files[f"{i}.tar"]).hexdigest())
        assert got(cache, web, i, state) == web.files[f"{i}.tar"]
    assert len(kept(cache)) <= 2
    assert web.gets() == 4
