"""Whole shards from real servers and commands that fail in the ways they do, against the bytes that were put there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
from web_server import WebServer

from fdscale import UserError
from fdscale.data import files, sources
from fdscale.data.sources import Settings, State, Stop, Stopped, fetch, is_remote, look, place_hash, shown, where

pytestmark = pytest.mark.slow  # together they are: left out of `make quick`

QUICK = Settings(tries=4, timeout_s=0.4, wait_s=0.01)
DATA = np.random.default_rng(0).bytes(3 * 2**20 + 77)
UNKNOWN = State()
SHA = "sha256:" + hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def web():
    with WebServer({"set/a.tar": DATA}) as server:
        yield server


def got(location, expected=UNKNOWN, settings=QUICK, stop=None):
    """(bytes, state) of what is fetched."""
    with tempfile.TemporaryFile() as file:
        state = fetch(location, file.fileno(), expected, settings, stop or Stop())
        file.seek(0)
        return file.read(), state


# ----------------------------------------------------------------------------------------------------------------------
# Web servers


def test_a_whole_shard_and_its_state(web):
    url = f"{web.url}/set/a.tar"
    version = f"{place_hash(url)} {web.etag('set/a.tar')}"
    assert got(url) == (DATA, State(len(DATA), version))
    assert look(url, QUICK, Stop()) == State(len(DATA), version)
    assert got(url, State(len(DATA), version)) == (DATA, State(len(DATA), version))
    assert web.gets() == 2


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        (["500"], []),
        (["503 0", "429 0", "408"], []),
        (["drop"], []),
        (["cut 100000"], ["bytes=100000-"]),
        (["cut 100000", "cut 200000", "500"], ["bytes=100000-", "bytes=300000-", "bytes=300000-"]),
        (["stall 0"], []),
        (["stall 70000"], ["bytes=70000-"]),
        (["long 10"], [f"bytes={len(DATA)}-"]),
        (["cut 100000", "shift"], ["bytes=100000-", None]),
        (["cut 100000", "416"], ["bytes=100000-", "bytes=100000-"]),
    ],
)
def test_failures_that_pass_are_retried_from_where_they_happened(web, faults, ranges):
    web.faults["set/a.tar"] = list(faults)
    assert got(f"{web.url}/set/a.tar")[0] == DATA
    asked = [range for _, _, range in web.asked]
    assert asked[: 1 + len(ranges)] == [None, *ranges] if ranges else set(asked) == {None}


@pytest.mark.parametrize("lacks", ["ranges", "etags", "weak"])
def test_without_ranges_or_etags_an_attempt_begins_anew(web, lacks):
    setattr(web, lacks, lacks == "weak")
    web.faults["set/a.tar"] = ["cut 100000", "cut 2000000"]
    data, state = got(f"{web.url}/set/a.tar")
    assert data == DATA
    assert web.gets() == 3
    assert state.version == (
        SHA if lacks == "etags" else f"{place_hash(web.url + '/set/a.tar')} {web.etag('set/a.tar')}"
    )


def test_a_date_serves_where_there_is_no_strong_etag(web):
    web.weak, web.dates = True, True
    web.faults["set/a.tar"] = ["cut 100000"]
    assert got(f"{web.url}/set/a.tar")[0] == DATA
    assert [range for _, _, range in web.asked] == [None, "bytes=100000-"]


def test_a_shard_that_changes_under_way_is_not_mixed_from_two(web):
    other = DATA[::-1]
    web.faults["set/a.tar"] = ["stall 100000"]
    timer = threading.Timer(0.2, lambda: web.files.update({"set/a.tar": other}))
    timer.start()
    assert got(f"{web.url}/set/a.tar")[0] == other
    timer.join()


def test_progress_makes_the_attempts_count_anew(web):
    """A poor line that breaks more often than is allowed in a row, but always brings something."""
    web.faults["set/a.tar"] = ["cut 1100000", "500", "500", "500", "cut 1100000", "500", "500", "500"]
    assert got(f"{web.url}/set/a.tar", settings=QUICK._replace(tries=5))[0] == DATA
    web.faults["set/a.tar"] = ["cut 1000"] * 6
    with pytest.raises(UserError, match=r"a\.tar: the connection ended after 5000 of \d+ bytes .tried 5 times in 0 s"):
        got(f"{web.url}/set/a.tar", settings=QUICK._replace(tries=5))


@pytest.mark.parametrize(
    ("faults", "message", "gets"),
    [
        (["500"] * 9, r"/set/a\.tar: the server answers 500 .* \(tried 4 times in \d+ s\)", 4),
        (["drop"] * 9, r"/set/a\.tar: cannot be reached .* \(tried 4 times", 4),
        (["stall 10"] * 9, r"/set/a\.tar: does not answer \(tried 4 times", 4),
        (["403"] * 9, r"/set/a\.tar: the server refuses it \(403", 1),
        (["404"] * 9, r"/set/a\.tar: is not there \(the server answers 404", 1),
        (["gzip"] * 9, r"compresses the shard", 1),
        (["drip 10"] * 9, r"/set/a\.tar: sends next to nothing \(\d+ bytes in \d s\) \(tried 4 times", 4),
    ],
)
def test_a_source_that_is_down_is_named_with_how_long_it_was_tried(web, faults, message, gets):
    web.faults["set/a.tar"] = list(faults)
    with pytest.raises(UserError, match=message) as caught:
        got(f"{web.url}/set/a.tar")
    assert "\n" not in str(caught.value)
    assert web.gets() == gets


def test_a_shard_of_the_index_may_be_missing_once(web):
    state = got(f"{web.url}/set/a.tar")[1]
    web.faults["set/a.tar"] = ["500", "404", "500"]
    assert got(f"{web.url}/set/a.tar", state)[0] == DATA
    web.faults["set/a.tar"] = ["404", "404"]
    with pytest.raises(UserError, match=r"is not there .*\(tried 2 times"):
        got(f"{web.url}/set/a.tar", state)


def test_no_server_at_all():
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9/a\.tar: cannot be reached \(.*refused\) .tried 4 times"
    ):
        got("http://127.0.0.1:9/a.tar")
    with pytest.raises(UserError, match=r"cannot be reached"):
        look("http://127.0.0.1:9/a.tar", QUICK, Stop())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda web: web.files.update({"set/a.tar": DATA[:-1] + b"x"}), "the source calls its state"),
        (lambda web: web.files.update({"set/a.tar": DATA[:-9]}), f"it has {len(DATA) - 9} bytes, the index says"),
        (lambda web: web.files.update({"set/a.tar": DATA + b"x"}), f"it has {len(DATA) + 1} bytes, the index says"),
        (lambda web: web.faults.update({"set/a.tar": ["short 500"] * 9}), "it has 500 bytes, the index says"),
    ],
)
def test_a_changed_shard_is_refused(web, change, message):
    state = got(f"{web.url}/set/a.tar")[1]
    change(web)
    with pytest.raises(UserError, match=rf"a\.tar: changed since it was indexed: {message}.*index it anew"):
        got(f"{web.url}/set/a.tar", state)
    assert web.gets() <= 3


def test_bytes_are_compared_where_the_server_has_no_version(web):
    web.etags = False
    state = got(f"{web.url}/set/a.tar")[1]
    assert state == State(len(DATA), SHA)
    assert got(f"{web.url}/set/a.tar", state)[0] == DATA
    web.files["set/a.tar"] = DATA[:-1] + b"x"
    with pytest.raises(UserError, match="changed since it was indexed: its bytes are others"):
        got(f"{web.url}/set/a.tar", state)


def test_a_version_counts_only_where_it_was_seen(web):
    web.files["copy/a.tar"] = DATA
    state = got(f"{web.url}/set/a.tar")[1]
    web.weak = True  # another server may call the same bytes something else
    assert got(f"{web.url}/copy/a.tar", state)[0] == DATA


def test_a_server_without_head_is_asked_by_get(web):
    web.heads = False
    assert look(f"{web.url}/set/a.tar", QUICK, Stop()) == State(None, "")


def test_redirects_stay_on_the_web_and_keep_passwords_to_their_host(web):
    with WebServer({"b.tar": DATA}) as other:
        web.redirects["to.tar"] = f"{other.url}/b.tar"
        assert got(web.url.replace("//", "//me:secret@") + "/to.tar")[0] == DATA
        assert web.authorization == ["Basic bWU6c2VjcmV0"]
        assert other.authorization == [None]
    web.redirects["passwd.tar"] = "file:///etc/passwd"
    with pytest.raises(UserError, match=r"the server refuses it \(302"):
        got(f"{web.url}/passwd.tar")


def test_a_drip_is_ended_by_stop_and_so_is_a_wait(web):
    for fault in ("drip 100", "stall 100"):
        web.faults["set/a.tar"] = [fault]
        stop = Stop()
        ends: list[BaseException] = []

        def run(stop=stop, ends=ends):
            try:
                got(f"{web.url}/set/a.tar", settings=Settings(timeout_s=600), stop=stop)
            except Stopped as error:
                ends.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while not web.gets():
            time.sleep(0.01)
        stop.set()
        thread.join(60)
        assert len(ends) == 1
        web.asked.clear()


# ----------------------------------------------------------------------------------------------------------------------
# Commands


def test_a_command_that_writes_the_shard(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    assert got(f"pipe:cat {tmp_path}/a.tar") == (DATA, State(len(DATA), SHA))
    assert got(f"pipe:cat {tmp_path}/a.tar | cat", State(len(DATA), SHA))[0] == DATA
    assert look(f"pipe:cat {tmp_path}/a.tar", QUICK, Stop()) == State(None, "")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("head -c 1000 {}; exit 3", r"the command ended with status 3 after 1000 bytes \(tried 4 times"),
        ("head -c 1000 {}; echo what is wrong >&2; false", r"status 1 after 1000 bytes: what is wrong \(tried 4"),
        ("head -c 1000 {} | cat; exit 1", "status 1"),
        ("(head -c 1000 {}; exit 7) | cat", "status 7"),
        ("kill -9 $$ {}", "was killed by signal 9"),
        ("head -c 1000 {}; sleep 61.73", r"wrote nothing for 0\.4 s"),
        ("no-such-command {}", r"status 127 after 0 bytes: .*no-such-command: command not found$"),
    ],
)
def test_a_command_that_fails_is_tried_again_and_then_named(tmp_path, command, message):
    (tmp_path / "a.tar").write_bytes(DATA)
    with pytest.raises(UserError, match=message) as caught:
        got("pipe:" + command.format(tmp_path / "a.tar"))
    assert str(caught.value).startswith("pipe:")
    assert subprocess.run(["pgrep", "-fx", "sleep 61.73"], capture_output=True, check=False).stdout == b""


def test_a_command_that_fails_in_the_middle_once(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA)
    once = f"if mkdir {tmp_path}/once 2>/dev/null; then head -c 9999 {tmp_path}/a.tar; exit 1; fi"
    assert got(f"pipe:{once}; cat {tmp_path}/a.tar")[0] == DATA


def test_a_command_that_writes_something_else_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(DATA[:-1] + b"x")
    with pytest.raises(UserError, match="changed since it was indexed: its bytes are others"):
        got(f"pipe:cat {tmp_path}/a.tar", State(len(DATA), SHA))
    with pytest.raises(UserError, match="it has more than the 1000000 bytes"):
        got(f"pipe:cat /dev/zero {tmp_path}/a.tar", State(1_000_000, SHA))
    with pytest.raises(UserError, match="it has 5 bytes, the index says 7"):
        got("pipe:printf 12345 # a.tar", State(7, ""))


# ----------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("/data/a.tar", "/data/a.tar"),
        ("https://me:pw@host:81/x/a.tar?X-Signature=abc#part", "https://host:81/x/a.tar"),
        ("s3://bucket/x/a.tar", "s3://bucket/x/a.tar"),
        ("pipe:cat /data/x/a-0.tar", "/data/x/a-0.tar"),
        ("pipe:cat x/a-0.tar", "/x/a-0.tar"),
        ("pipe:aws s3 cp s3://bucket/x/a-0.tar -", "s3://bucket/x/a-0.tar"),
        ("pipe:zstd -dc '/data/x/a 0/b.tar.zst' | cat", "/0/b.tar"),
        ("pipe:curl -s 'https://host/x/a.tar?key=1'", "https://host/x/a.tar"),
    ],
)
def test_the_path_that_names_a_shard(location, path):
    assert where(location) == path


@pytest.mark.parametrize(
    "location", ["https://host/../a.tar", "s3://bucket//a.tar", "pipe:cat /data/../a.tar", "pipe:cat /data/a.zip"]
)
def test_paths_that_lead_elsewhere_are_refused(location):
    with pytest.raises(UserError, match=r"without them|which shard"):
        where(location)


def test_secrets_are_not_shown():
    assert shown("https://me:pw@host/a.tar?sig=x") == "https://host/a.tar"
    assert shown("pipe:curl 'https://me:pw@host/a.tar?sig=x' -o -") == "pipe:curl 'https://host/a.tar' -o -"
    with pytest.raises(UserError) as caught:
        got("http://me:secret@127.0.0.1:9/a.tar?sig=secret", settings=Settings(1, 0.2))
    assert "secret" not in str(caught.value)


def test_names_do_not_depend_on_where_the_set_lies(tmp_path):
    for i in (2, 10):
        (tmp_path / "v1").mkdir(exist_ok=True)
        (tmp_path / "v1" / f"a-{i}.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"")
    parts = ("v1/a-{2,10}.tar", "b.tar")
    for place in (
        f"{tmp_path}/",
        "https://host/set/",
        "s3://bucket/set/",
        "pipe:cat /data/",
        "pipe:gsutil cat gs://b/",
    ):
        paths = files.expand([place + part for part in parts])
        root = files.common_folder(paths)
        assert [files.name_of(path, root) for path in paths] in (
            ["b.tar", "v1/a-2.tar", "v1/a-10.tar"],
            ["v1/a-2.tar", "v1/a-10.tar", "b.tar"],
        )
        assert is_remote(root) == ("://" in place)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("https://host/a-*.tar", "web servers have no listing; name the shards with braces"),
        ("https://host/folder/", "web servers have no listing"),
        ("https://host/a-{0..3.tar", "the braces of this pattern do not match"),
        (["https://host/a.tar?x=1", "https://host/a.tar?x=2"], "named twice"),
        ("nothing-known://bucket/x", "cannot be opened .*expected a protocol of fsspec"),
    ],
)
def test_patterns_that_cannot_be_meant(pattern, message):
    with pytest.raises(UserError, match=message):
        files.expand(pattern)


def test_shards_in_no_common_place_are_refused(tmp_path):
    for pair in (["https://one/a.tar", "https://two/b.tar"], ["s3://b/a.tar", "/data/b.tar"]):
        with pytest.raises(UserError, match="lie in no common folder"):
            files.common_folder(pair)
    (tmp_path / "a.tar").write_bytes(b"")
    assert files.expand(f"file://{tmp_path}/a.tar") == [f"{tmp_path}/a.tar"]


def test_the_wait_between_attempts_grows_and_is_bounded(monkeypatch):
    waits: list[float] = []

    def fail():
        raise sources.Trouble("no")

    stop = Stop()
    monkeypatch.setattr(stop, "wait", waits.append)
    with pytest.raises(UserError, match=r"x: no \(tried 12 times"):
        sources.persist("x", fail, Settings(tries=12, wait_s=0.5), stop)
    bounds = [min(0.5 * 2**i, 30.0) for i in range(11)]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))


def test_a_full_disk_is_not_taken_for_a_failing_source(web, tmp_path):
    """A file may grow to a bound that the system sets; beyond it a write fails as on a full disk."""
    code = f"""
import os, resource, sys
sys.path.insert(0, {os.getcwd()!r})
from fdscale.data.sources import Settings, State, Stop, fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
fetch({web.url + "/set/a.tar"!r}, os.open({str(tmp_path / "x")!r}, os.O_RDWR | os.O_CREAT), State(), Settings(), Stop())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UserError" in done.stderr
    assert "cannot be kept on the local disk (File too large); free some space" in done.stderr
    assert web.gets() == 1
