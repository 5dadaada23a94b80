"""Resharded sets hold the same members, byte for byte, read back with Python's tarfile."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from packed import contents
from webdataset.tariterators import base_plus_ext

from fdscale import UserError
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.reshard import reshard
from fdscale.data.verify import verify


def members_of(folder: Path) -> list[tuple[str, str, str]]:
    """(key, extension, hash) of every member, shard after shard."""
    found = []
    for path in sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name)):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name)
                found.append((key, extension.lower(), hashlib.sha256(tar.extractfile(member).read()).hexdigest()))
    return found


@pytest.fixture
def source(tmp_path, pack, members):
    """Five shards of 40 samples in three formats: optional members, long and odd names, large extensions."""
    folder = tmp_path / "in"
    for i, count in enumerate((5, 17, 1, 10, 7)):
        content = members(count, 100 * i, "größe/" if i == 3 else "deep/" * 30 if i == 1 else "")
        if i in (1, 3):
            content[f"zz{i}.JPEG"] = b"upper case"
            content[f"zz{i}.cls"] = b"3"
            content[f"zz{i}.seg.png"] = b"a mask"
        pack(folder / f"s-{i}.tar", content, (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[i % 3])
    (folder / "classes.json").write_text('["a"]')
    index(folder)
    return folder


def test_the_order_stays_and_shards_have_the_asked_size(source, tmp_path):
    seen = []
    (Path(source) / "categories.json").write_text("[7]")
    made = reshard(source, tmp_path / "out", samples_per_shard=9, progress=lambda *now: seen.append(now))
    assert made.counts.tolist() == [9, 9, 9, 9, 6]
    assert seen == [(9, 42), (18, 42), (27, 42), (36, 42), (42, 42)]
    before, after = members_of(source), members_of(tmp_path / "out")
    assert Counter(before) == Counter(after)
    assert list(dict.fromkeys(key for key, _, _ in before)) == list(dict.fromkeys(key for key, _, _ in after))
    assert (tmp_path / "out" / "classes.json").read_text() == '["a"]'
    assert (tmp_path / "out" / "categories.json").read_text() == "[7]"
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_shuffled_and_by_size(source, tmp_path, workers):
    made = reshard(source, tmp_path / "out", max_bytes=15_000, seed=3, workers=workers)
    assert made.samples == 42
    assert Counter(members_of(source)) == Counter(members_of(tmp_path / "out"))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) > 4
    assert max(sizes) <= 15_000 + 1024 + 10240  # the end mark, and padding to a record
    order = [made.key(shard, row) for shard, count in enumerate(made.counts) for row in range(count)]
    first = [key for key, _, _ in members_of(source)]
    assert order != list(dict.fromkeys(first))
    assert len({key.split("/")[0][:1] for key in order[:10]}) > 1  # drawn from several of the old shards
    reshard(source, tmp_path / "again", max_bytes=15_000, seed=3, workers=3 - workers)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    reshard(source, tmp_path / "other", max_bytes=15_000, seed=4)
    assert contents(tmp_path / "other") != contents(tmp_path / "out")


def test_there_and_back_again(source, tmp_path):
    """A set of our own making comes out of two reshardings as it was."""
    reshard(source, tmp_path / "a", samples_per_shard=7)
    reshard(tmp_path / "a", tmp_path / "b", max_bytes=1)  # a shard for each sample
    assert len(list((tmp_path / "b").glob("*.tar"))) == 42
    reshard(tmp_path / "b", tmp_path / "c", samples_per_shard=7, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    assert open_index(tmp_path / "a").fingerprint == open_index(tmp_path / "c").fingerprint


def test_what_the_index_leaves_out_stays_out(source, tmp_path):
    raw = (source / "s-1.tar").read_bytes()
    with tarfile.open(source / "s-1.tar") as tar:
        cut = [member for member in tar if member.name.endswith(".jpg")][10].offset_data
    (source / "s-1.tar").write_bytes(raw[:cut])
    index(source, skip_damaged=True)
    made = reshard(source, tmp_path / "out")
    assert made.samples == 5 + 10 + 1 + 11 + 7
    assert set(members_of(tmp_path / "out")) <= set(members_of_whole(source, raw, tmp_path))
    assert index(tmp_path / "out").left_out == (0, 0)


def members_of_whole(source: Path, raw: bytes, tmp_path: Path) -> list[tuple[str, str, str]]:
    shutil.copytree(source, tmp_path / "whole", ignore=shutil.ignore_patterns("index"))
    (tmp_path / "whole" / "s-1.tar").write_bytes(raw)
    return members_of(tmp_path / "whole")


def test_keys_that_would_meet(tmp_path, pack, members):
    """Every shard counts from 0: side by side in one shard two samples would be taken for one."""
    for name in ("a", "b"):
        pack(tmp_path / "in" / "sub" / f"{name}.tar", members(3))
    pack(tmp_path / "in" / "c.tar", members(2, 50))
    shards = [tmp_path / "in" / "sub", tmp_path / "in" / "c.tar"]
    index(shards)
    with pytest.raises(UserError, match=r'b\.tar: its sample "00000" meets another.*--prefix-keys'):
        reshard(shards, tmp_path / "out", index_dir=str(tmp_path / "in" / "index"))
    assert (
        reshard(shards, tmp_path / "apart", index_dir=str(tmp_path / "in" / "index"), samples_per_shard=2).samples == 8
    )
    made = reshard(shards, tmp_path / "out", index_dir=str(tmp_path / "in" / "index"), prefix_keys=True)
    assert [made.key(0, row) for row in range(8)] == [
        "c/00050",
        "c/00051",
        *(f"sub/{name}/0000{i}" for name in "ab" for i in range(3)),
    ]


def test_a_failed_reshard_leaves_nothing(source, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="no index there"):
        reshard(source, tmp_path / "out", index_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="not both"):
        reshard(source, tmp_path / "out", samples_per_shard=1, max_bytes=1)
    with pytest.raises(UserError, match="max_bytes is 0"):
        reshard(source, tmp_path / "out", max_bytes=0)
    with pytest.raises(UserError, match="exists already"):
        reshard(source, source)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard(source, tmp_path / "out", samples_per_shard=4, workers=2, progress=interrupt)
    (source / "s-3.tar").write_bytes((source / "s-3.tar").read_bytes()[:-10240])
    with pytest.raises(UserError, match=r"s-3\.tar: sample .* the shard is cut off before byte"):
        reshard(source, tmp_path / "out", workers=2)
    (source / "s-3.tar").unlink()
    with pytest.raises(UserError, match=r"s-3\.tar: in the index .*but gone"):
        reshard(source, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
