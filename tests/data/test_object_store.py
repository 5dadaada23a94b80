"""Shards in a real S3-compatible server, directly and over a line that breaks and stalls."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import suppress

import pytest
from test_prefetch import draw, samples_of, threads

from fdscale import UserError
from fdscale.data import files
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.shard_cache import ShardCache
from fdscale.data.shards import make
from fdscale.data.sources import Settings

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")

pytestmark = pytest.mark.slow  # together they are: left out of `make quick`

QUICK = Settings(tries=3, timeout_s=3.0, wait_s=0.01)


class Line:
    """A TCP line to a server: passes everything on, until `broken` says that it cuts or stalls large answers."""

    def __init__(self, port: int) -> None:
        self._to, self.broken, self.large = port, [], 10_000
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._done = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._done.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                for one, other, back in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._pass, args=(one, other, back), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket, back: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := one.recv(4096):
                passed += len(data)
                if back and passed > self.large and self.broken:
                    if self.broken.pop(0) == "stall":
                        self._done.wait(60)
                    break
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, photos):
    """24 photos in eight shards of 3."""
    root = tmp_path_factory.mktemp("store")
    (root / "in").mkdir()
    for i, data in enumerate(photos):
        (root / "in" / f"{i:02d}.jpg").write_bytes(data)
    make(root / "in", root / "out", samples_per_shard=3)
    return root / "out"


@pytest.fixture(scope="module")
def server():
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def store(server, shards, monkeypatch):
    """A bucket with the shards below data/set, behind a line; (file system, line)."""
    import fsspec
    import s3fs

    line = Line(server)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "y"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{line.port}"})
    s3fs.S3FileSystem.clear_instance_cache()
    direct = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{server}", skip_instance_cache=True)
    direct.mkdir("data")
    for path in shards.glob("*.tar"):
        direct.pipe_file(f"data/set/{path.name}", path.read_bytes())
    yield direct, line
    line.close()
    direct.rm("data", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def cache(tmp_path):
    return ShardCache(str(tmp_path / "cache"), settings=QUICK)


def test_a_folder_a_glob_and_braces_mean_the_same_shards(store, shards):
    wanted = [f"s3://data/set/shard-{i:06d}.tar" for i in range(8)]
    for pattern in (
        "s3://data/set",
        "s3://data/set/",
        "s3://data/set/*.tar",
        "s3://data/set/shard-{000000..000007}.tar",
    ):
        assert files.expand(pattern) == wanted
    assert files.expand("s3://data/set/shard-00000[2-4].tar") == wanted[2:5]
    with pytest.raises(UserError, match="s3://data/nothing: no shards found"):
        files.expand("s3://data/nothing")
    with pytest.raises(UserError, match="s3://nowhere/set"):
        files.expand("s3://nowhere/set/*.tar")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_from_the_store_is_the_one_from_disk(store, shards, cache, tmp_path, workers):
    _, line = store
    line.broken = ["cut", "stall", "cut"]
    here = open_index(shards)
    made = index("s3://data/set", str(tmp_path / "index"), cache=ShardCache(str(tmp_path / "first"), settings=QUICK))
    assert (made.names, made.fingerprint) == (here.names, here.fingerprint)
    assert line.broken == []
    line.broken = ["cut", "stall", "cut"]
    opened = open_index("s3://data/set", str(tmp_path / "index"), cache)
    assert draw(samples_of(opened), 3, 4, workers=workers) == draw(samples_of(here), 3, 4)
    assert line.broken == []
    assert threads() == []


def test_what_changes_or_goes_is_noticed(store, cache, tmp_path):
    direct, _ = store
    place = str(tmp_path / "index")
    opened = index("s3://data/set", place, cache=ShardCache(str(tmp_path / "first"), settings=QUICK))
    assert all(entry.version for entry in opened._entries)
    opened.cache = cache
    raw = direct.cat_file("data/set/shard-000003.tar")
    direct.pipe_file("data/set/shard-000003.tar", raw[:-512] + bytes(511) + b"\1")
    with pytest.raises(
        UserError, match=r"s3://data/set/shard-000003\.tar: changed since it was indexed: the source calls"
    ):
        opened.read(3, 0)
    direct.rm_file("data/set/shard-000004.tar")
    with pytest.raises(UserError, match=r"shard-000004\.tar: is not there \(tried 2 times"):
        opened.read(4, 0)
    with pytest.raises(UserError, match=r"s3://data/set/shard-000004\.tar: in the index .* but gone"):
        open_index("s3://data/set", place)
    direct.pipe_file("data/set/shard-000009.tar", raw)
    with pytest.raises(UserError, match=r"shard-000009\.tar: not in the index"):
        open_index("s3://data/set/shard-*[!4].tar", place)


def test_a_store_that_is_down_is_named(store, cache, shards, monkeypatch):
    _, line = store
    opened = open_index("s3://data/set", str(shards / "index"), cache)
    line.close()
    with pytest.raises(
        UserError, match=r"^s3://data/set/shard-000000\.tar: .* \(tried 3 times in \d+ s\); when it answers"
    ):
        opened.read(0, 0)


def test_no_keys_is_said_at_once(store, cache, shards, monkeypatch):
    import s3fs

    opened = open_index("s3://data/set", str(shards / "index"), cache)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"shard-000000\.tar: .*credentials"):
        opened.read(0, 0)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"s3://data/set/.*pip install 'fdscale\[remote\]'"):
        files.expand("s3://data/set")


def test_another_protocol_of_fsspec(cache, tmp_path, shards):
    """One that lies in this process's memory: it has no etag, but a time."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        memory.pipe_file(f"/set/{path.name}", path.read_bytes())
    opened = index("memory://set/*.tar", str(tmp_path / "index"), cache=cache)
    here = open_index(shards)
    assert opened.fingerprint == here.fingerprint
    assert opened.read(5, 1) == here.read(5, 1)
