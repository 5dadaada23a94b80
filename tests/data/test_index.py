"""The index against webdataset's own reading of the same shards, and its reaction to every change of them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import webdataset

from fdscale import UserError
from fdscale.data import indexing as index_module
from fdscale.data.files import expand
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.lost import Lost
from fdscale.data.verify import verify


def by_webdataset(paths):
    return [
        (os.path.basename(sample["__url__"]), sample["__key__"], sample["jpg"], sample["cls"])
        for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)
    ]


def by_index(opened):
    return [
        (opened.names[shard], opened.key(shard, row), opened.read(shard, row), opened.read(shard, row, ("cls",)))
        for shard, count in enumerate(opened.counts)
        for row in range(count)
    ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("workers", [1, 2])
def test_samples_are_those_webdataset_reads(tmp_path, pack, members, format, workers):
    long = "" if format == tarfile.USTAR_FORMAT else "deep/" * 40
    first = {**members(3), **members(2, 50, "folder.v1/"), "__meta__/x.jpg": b"1"}
    second = {"readme": b"no extension", **members(4, 7, long), "é.jpg": b"x", "é.cls": b"1"}
    paths = [
        pack(tmp_path / "s" / "a-2.tar", first, format),
        pack(tmp_path / "s" / "a-10.tar", second, format),
    ]
    opened = index(tmp_path / "s", workers=workers)
    assert opened.names == ["a-2.tar", "a-10.tar"]
    assert by_index(opened) == by_webdataset(paths)
    assert opened.samples == 10
    assert by_index(pickle.loads(pickle.dumps(opened))) == by_webdataset(paths)


def test_an_image_is_found_under_any_known_extension(tmp_path, pack):
    names = ("a.JPEG", "b.png", "c.webp", "d.cls", "d.png", "d.jpg")
    pack(tmp_path / "a.tar", {name: str(i).encode() for i, name in enumerate(names)})
    opened = index(tmp_path, str(tmp_path / "index"))
    assert [opened.read(0, row) for row in range(4)] == [b"0", b"1", b"2", b"5"]
    with pytest.raises(Lost, match=r"has no \.cls"):
        opened.read(0, 0, ("cls",))


def test_all_problems_are_listed_by_shard_and_place(shards, pack):
    whole = (shards / "set-0.tar").read_bytes()
    (shards / "set-0.tar").write_bytes(whole[:3000])
    pack(shards / "set-1.tar", {"a.jpg": b"1", "b.txt": b"2"})
    with pytest.raises(UserError) as caught:
        index(shards)
    assert "2 of 3 shards" in str(caught.value)
    assert "set-0.tar: truncated: " in str(caught.value)
    assert "3000" in str(caught.value)
    assert "set-1.tar: sample 'b': has no image" in str(caught.value)
    assert not (shards / "index" / "index.json").exists()


def test_only_changed_shards_are_read_again(shards, pack, members, monkeypatch):
    before = index(shards)
    scanned = []
    scan_file = index_module.scan_file
    monkeypatch.setattr(index_module, "scan_file", lambda path, name: scanned.append(name) or scan_file(path, name))
    assert index(shards).fingerprint == before.fingerprint
    assert scanned == []
    pack(shards / "set-1.tar", members(8, first=100))
    pack(shards / "set-3.tar", members(2, first=300))
    after = index(shards)
    assert scanned == ["set-1.tar", "set-3.tar"]
    assert after.counts.tolist() == [5, 8, 4, 2]
    assert after.fingerprint != before.fingerprint


def test_what_was_read_before_an_error_is_kept(shards, monkeypatch):
    whole = (shards / "set-2.tar").read_bytes()
    (shards / "set-2.tar").write_bytes(whole[:1000])
    with pytest.raises(UserError):
        index(shards)
    (shards / "set-2.tar").write_bytes(whole)
    scanned = []
    scan_file = index_module.scan_file
    monkeypatch.setattr(index_module, "scan_file", lambda path, name: scanned.append(name) or scan_file(path, name))
    assert index(shards).counts.tolist() == [5, 7, 4]
    assert scanned == ["set-2.tar"]


def test_the_fingerprint_is_of_the_data_not_of_the_place(shards, tmp_path, pack):
    first = index(shards).fingerprint
    shutil.copytree(shards, tmp_path / "copy")  # new times of change
    assert open_index(tmp_path / "copy").fingerprint == first
    assert index(tmp_path / "copy", str(tmp_path / "elsewhere")).fingerprint == first
    moved = {f"x{i}.jpg": b"abc" for i in range(5)}
    os.rename(tmp_path / "copy" / "set-0.tar", tmp_path / "copy" / "set-9.tar")
    assert index(tmp_path / "copy").fingerprint != first
    a = index(pack(tmp_path / "b" / "s.tar", moved)).fingerprint
    b = index(pack(tmp_path / "c" / "s.tar", dict(reversed(moved.items())))).fingerprint  # same names, other places
    assert a != b


def test_a_part_of_the_shards_can_be_opened(shards):
    whole = index(shards)
    part = open_index(str(shards / "set-{0,2}.tar"))
    assert part.names == ["set-0.tar", "set-2.tar"]
    assert by_index(part) == by_webdataset([shards / "set-0.tar", shards / "set-2.tar"])
    assert part.fingerprint != whole.fingerprint
    assert open_index([shards / "set-2.tar", shards / "set-0.tar"]).fingerprint == part.fingerprint


def test_one_folder_may_hold_two_sets(tmp_path, pack, members):
    for name in ("train-0", "train-1", "val-0"):
        pack(tmp_path / f"{name}.tar", members(3))
    index(str(tmp_path / "train-*.tar"))
    index(str(tmp_path / "val-*.tar"))
    assert open_index(str(tmp_path / "train-*.tar")).names == ["train-0.tar", "train-1.tar"]
    assert open_index(str(tmp_path / "val-*.tar")).names == ["val-0.tar"]
    assert open_index(tmp_path).samples == 9


def test_shards_in_several_folders(tmp_path, pack, members):
    pack(tmp_path / "a" / "0.tar", members(2))
    pack(tmp_path / "b" / "0.tar", members(3))
    pack(tmp_path / "0.tar", members(4))
    everything = [tmp_path / "a", tmp_path / "b" / "0.tar", tmp_path / "0.tar"]
    assert dict(zip((o := index(everything)).names, o.counts, strict=True)) == {"0.tar": 4, "a/0.tar": 2, "b/0.tar": 3}
    assert open_index(tmp_path / "a", str(tmp_path / "index")).counts.tolist() == [2]
    assert open_index(tmp_path / "0.tar").counts.tolist() == [4]


def test_new_and_lost_shards_are_noticed(shards, pack, members):
    index(shards)
    pack(shards / "set-3.tar", members(2))
    with pytest.raises(UserError, match=r"set-3\.tar: not in the index"):
        open_index(shards)
    (shards / "set-3.tar").unlink()
    (shards / "set-1.tar").unlink()
    for pattern in (shards, str(shards / "*.tar")):
        with pytest.raises(UserError, match=r"set-1\.tar: in the index .* but gone"):
            open_index(pattern)
    assert [(p.shard, p.reason) for p in verify(shards)] == [(str(shards / "set-1.tar"), "is in the index, but gone")]
    with pytest.raises(UserError, match="1 of 3 shards do not exist"):
        open_index(str(shards / "set-{0..2}.tar"))
    assert index(shards).names == ["set-0.tar", "set-2.tar"]


def cut_places(path):
    with tarfile.open(path) as tar:
        listed = list(tar)
    return {
        "between samples": listed[4].offset,
        "between the members of a sample": listed[5].offset,
        "in a header": listed[4].offset + 100,
        "in an image": listed[4].offset_data + 1,
        "before the end mark": listed[-1].offset_data + 512,
    }


@pytest.mark.parametrize(
    "place",
    ["between samples", "between the members of a sample", "in a header", "in an image", "before the end mark"],
)
def test_truncation_that_webdataset_does_not_notice(shards, place):
    """Before the index is made, after it, and when reading."""
    path = shards / "set-1.tar"
    raw = path.read_bytes()
    with tarfile.open(path) as tar:
        whole = [(m.offset_data, tar.extractfile(m).read()) for m in tar if m.name.endswith(".jpg")]
    index(shards)
    path.write_bytes(raw[: cut_places(path)[place]])
    assert len(by_webdataset([path]) if "members" not in place and "image" not in place else []) < 8  # no exception
    problems = verify(shards)
    assert {problem.shard for problem in problems} == {"set-1.tar"}
    assert "truncated" in problems[-1].reason
    assert len(problems) == (2 if place == "between the members of a sample" else 1)
    opened = open_index(shards)
    opened.read(0, 0)
    for row, (offset, data) in enumerate(whole):
        if offset + len(data) <= path.stat().st_size:
            assert opened.read(1, row) == data
        else:
            with pytest.raises(Lost, match="the shard is cut off before byte"):
                opened.read(1, row)
    with pytest.raises(UserError, match=r"(?s)1 of 3 shards cannot be used.*\n  set-1\.tar: truncated"):
        index(shards)
    shutil.rmtree(shards / "index")
    with pytest.raises(UserError, match=r"set-1\.tar: truncated"):
        index(shards)


def test_a_shard_rewritten_at_the_same_size_is_noticed(tmp_path, pack):
    path = pack(tmp_path / "a.tar", {"a.jpg": b"x" * 600, "b.jpg": b"y" * 100})
    opened = index(path)
    pack(path, {"a.jpg": b"x" * 100, "b.jpg": b"y" * 600})
    with pytest.raises(UserError, match=r"a\.tar: truncated or changed.*sample 'a' is not at byte 512"):
        opened.read(0, 0)
    with pytest.raises(UserError, match=r"sample 'b' is not at byte"):
        opened.read(0, 1)
    assert any("changed since it was indexed" in problem.reason for problem in verify(path))


def test_a_lost_shard_is_an_error_when_read(shards):
    opened = index(shards)
    (shards / "set-2.tar").unlink()
    with pytest.raises(UserError, match=r"set-2\.tar: in the index, but cannot be opened .No such file"):
        opened.read(2, 0)


def test_few_files_and_tables_stay_open(tmp_path, pack, members):
    for i in range(12):
        pack(tmp_path / f"{i}.tar", members(3, first=i))
    opened = index(tmp_path)
    opened._files.limit = 4
    opened._columns.limit = 200
    expected = by_webdataset([tmp_path / f"{i}.tar" for i in range(12)])
    assert by_index(opened) == expected
    assert len(opened._files) == 4
    assert opened._columns.weight < 500
    file = next(iter(opened._files._values.values()))
    del opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_shards_without_samples(tmp_path, pack, members):
    pack(tmp_path / "0.tar", {})
    with pytest.raises(UserError, match="hold no samples at all"):
        index(tmp_path)
    pack(tmp_path / "1.tar", members(2))
    assert index(tmp_path).counts.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-20], "cannot be read as an index"),
        (lambda text: "[]", "cannot be read as an index"),
        (lambda text: text.replace('"samples": 5', '"samples": 6'), "was changed"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "has version 99"),
        (lambda text: text.replace('"sidecar": "', '"sidecar": "../'), "outside its folder"),
    ],
)
def test_a_damaged_index_is_refused_and_can_be_made_anew(shards, spoil, message):
    index(shards)
    file = shards / "index" / "index.json"
    file.write_text(spoil(file.read_text()))
    with pytest.raises(UserError, match=message):
        open_index(shards)
    assert index(shards).samples == 16


def test_a_damaged_sidecar_is_refused(shards):
    opened = index(shards)
    sidecar = shards / "index" / "set-1.tar.npz"
    raw = sidecar.read_bytes()
    other = (shards / "index" / "set-0.tar.npz").read_bytes()
    objects = {"keys": np.array([{}], dtype=object)}
    for content in (raw[:-100], b"", other, b"\x93NUMPY"):
        sidecar.write_bytes(content)
        with pytest.raises(UserError, match=r"set-1\.tar\.npz: missing or damaged"):
            opened.read(1, 0)
    right, noticed = by_webdataset([shards / "set-1.tar"])[3][2], 0
    for position in range(0, len(raw), 11):
        sidecar.write_bytes(raw[:position] + bytes([raw[position] ^ 0x55]) + raw[position + 1 :])
        try:
            assert open_index(shards).read(1, 3) == right
        except UserError:
            noticed += 1
    assert noticed > len(raw) / 11 / 2
    np.savez(sidecar, **objects)  # needs a pickle
    with pytest.raises(UserError, match="missing or damaged"):
        opened.read(1, 0)
    assert [problem.shard for problem in verify(shards)] == ["set-1.tar"]
    sidecar.unlink()
    assert by_index(index(shards)) == by_webdataset(sorted(shards.glob("*.tar")))


def test_without_an_index_the_error_says_how_to_make_one(shards):
    with pytest.raises(UserError, match=r"no index there; run fdscale shards index, .*--index, data.index"):
        open_index(shards)


def test_an_index_needs_a_place_to_write(shards):
    (shards / "index").write_text("a file in its way")
    with pytest.raises(UserError, match=r"index: cannot write there .*--index DIR"):
        index(shards)
    assert index(shards, str(shards.parent / "other")).samples == 16
    assert open_index(shards, str(shards.parent / "other")).samples == 16


def test_index_json_is_as_documented(shards):
    opened = index(shards)
    content = json.loads((shards / "index" / "index.json").read_text())
    assert set(content) == {"version", "fingerprint", "shards"}
    assert content["fingerprint"] == opened.fingerprint
    entry = content["shards"][1]
    stat = os.stat(shards / "set-1.tar")
    assert (entry["name"], entry["samples"], entry["bytes"]) == ("set-1.tar", 7, stat.st_size)
    assert (entry["mtime_ns"], entry["sidecar"]) == (stat.st_mtime_ns, "set-1.tar.npz")
    with np.load(shards / "index" / "set-1.tar.npz", allow_pickle=False) as arrays:
        assert arrays["keys"].tolist() == [f"{i:05d}".encode() for i in range(100, 107)]
        assert sorted(arrays["extensions"].tolist()) == [b"cls", b"jpg"]
        assert arrays["starts"].tolist() == list(range(0, 15, 2))
        with tarfile.open(shards / "set-1.tar") as tar:
            assert arrays["offsets"].tolist() == [member.offset_data for member in tar]
    assert not [path for path in (shards / "index").iterdir() if path.name.startswith(".")]


def test_progress_counts_the_shards(shards):
    seen = []
    index(shards, workers=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_expand(tmp_path):
    for name in ("s-10.tar", "s-2.tar", "s-1.tar", "other.txt", "odd[1].tar"):
        (tmp_path / name).write_text("")
    at = str(tmp_path) + "/"
    assert expand(at + "s-*.tar") == [at + "s-1.tar", at + "s-2.tar", at + "s-10.tar"]
    assert expand(tmp_path) == [at + "odd[1].tar", at + "s-1.tar", at + "s-2.tar", at + "s-10.tar"]
    assert expand(at + "s-{1,10}.tar") == [at + "s-1.tar", at + "s-10.tar"]
    assert expand(at + "s-{1..2}.tar") == [at + "s-1.tar", at + "s-2.tar"]
    assert expand(at + "odd[1].tar") == [at + "odd[1].tar"]
    assert expand([at + "s-2.tar", at + "s-1*.tar"]) == [at + "s-1.tar", at + "s-2.tar", at + "s-10.tar"]
    (tmp_path / "empty").mkdir()
    for pattern, message in (
        (at + "empty", "no shards found"),
        (at + "x*.tar", "no shards found"),
        (at + "s-{1..3}.tar", "1 of 3 shards do not exist, the first: .*s-3.tar"),
        (at + "nothing.tar", "do not exist"),
        ([], "no shards given"),
        ("", "no shards given: an empty text"),
        ([at + "s-1.tar", at + "s-{1,2}.tar"], "named twice"),
        (at + "s-{1.tar", "do not exist|do not match"),
    ):
        with pytest.raises(UserError, match=message):
            expand(pattern)
