"""Indexing what is whole of damaged shards: nothing that is left out goes unsaid, and nothing damaged comes in."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import base_plus_ext

from fdscale import UserError
from fdscale.data.index import open_index
from fdscale.data.index_file import load_entries
from fdscale.data.indexing import index
from fdscale.data.tar import scan
from fdscale.data.verify import shared_keys, verify


def listed(folder: Path) -> list[dict[str, str]]:
    file = folder / "index" / "left-out.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keys(opened, shard: int = 0) -> list[str]:
    return [opened.key(shard, row) for row in range(opened.counts[shard])]


@pytest.fixture
def spoilt(tmp_path, pack, members):
    """0: whole; 1: cut inside sample 105; 2: samples 201 without class, 203 empty, 200 again at the end; 3: no tar."""
    folder = tmp_path / "shards"
    pack(folder / "0.tar", members(4))
    cut = pack(folder / "1.tar", members(8, 100))
    with tarfile.open(cut) as tar:
        place = tar.getmember("00105.cls").offset
    cut.write_bytes(cut.read_bytes()[:place])
    some = members(6, 200)
    some["00203.jpg"] = b""
    del some["00201.cls"]
    with tarfile.open(pack(folder / "2.tar", some), "a") as tar, tarfile.open(folder / "0.tar") as source:
        for old, new in (("00000.jpg", "00200.jpg"), ("00000.cls", "00200.cls")):
            info = source.getmember(old)
            data = source.extractfile(info)
            info.name = new
            tar.addfile(info, data)
    (folder / "3.tar").write_bytes(b"no tar at all" * 100)
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_whole_is_indexed_and_the_rest_listed(spoilt, workers):
    with pytest.raises(UserError, match=r"3 of 4 shards cannot be used.*--skip-damaged"):
        index(spoilt, workers=workers)
    assert not (spoilt / "index" / "index.json").exists()
    reported = []
    opened = index(spoilt, workers=workers, skip_damaged=True, report=reported.append)
    assert opened.counts.tolist() == [4, 5, 4, 0]
    assert keys(opened, 1) == [f"{i:05d}" for i in range(100, 105)]
    assert keys(opened, 2) == ["00200", "00202", "00204", "00205"]
    assert opened.left_out == (1 + 3, 2)
    left = listed(spoilt)
    assert [(one["shard"], one["key"]) for one in left] == [
        ("1.tar", "00105"),
        ("1.tar", ""),
        ("2.tar", "00201"),
        ("2.tar", "00203"),
        ("2.tar", "00200"),
        ("3.tar", ""),
    ]
    for one, text in zip(
        left, ("lacks .cls", "truncated", "lacks .cls", "is empty", "twice", "not a tar"), strict=True
    ):
        assert text in one["reason"]
    assert [(p.shard, p.key, p.reason) for p in reported] == [(o["shard"], o["key"], o["reason"]) for o in left]
    with tarfile.open(spoilt / "2.tar") as tar:
        first = tar.extractfile(next(m for m in tar if m.name == "00200.jpg")).read()
    assert opened.read(2, 0) == first  # of two samples with one key the first stays


def test_the_list_follows_the_shards(spoilt, pack, members):
    index(spoilt, skip_damaged=True)
    before = listed(spoilt)
    again = index(spoilt, skip_damaged=True)  # nothing is read again
    assert (again.counts.tolist(), listed(spoilt)) == ([4, 5, 4, 0], before)
    with pytest.raises(UserError, match="3 of 4 shards"):
        index(spoilt)  # being listed does not make it acceptable
    assert open_index(spoilt).fingerprint == again.fingerprint
    os.unlink(spoilt / "3.tar")
    pack(spoilt / "1.tar", members(8, 100))
    whole = index(spoilt, skip_damaged=True)
    assert whole.counts.tolist() == [4, 8, 4]
    assert {one["shard"] for one in listed(spoilt)} == {"2.tar"}
    assert whole.fingerprint != again.fingerprint
    pack(spoilt / "2.tar", members(2))
    assert index(spoilt).counts.tolist() == [4, 8, 2]
    assert not (spoilt / "index" / "left-out.jsonl").exists()


def test_sets_in_one_folder_keep_each_others_lists(spoilt):
    index(str(spoilt / "{0,1}.tar"), skip_damaged=True)
    index(str(spoilt / "2.tar"), skip_damaged=True)
    assert {one["shard"] for one in listed(spoilt)} == {"1.tar", "2.tar"}
    assert index(str(spoilt / "0.tar")).samples == 4


def test_the_fingerprint_covers_what_is_in(tmp_path, pack, members):
    """A set without the damaged samples has the same layout but for its places, and other samples another print."""
    content = members(5)
    pack(tmp_path / "a" / "0.tar", content)
    broken = {**content, "00004.jpg": b""}
    pack(tmp_path / "b" / "0.tar", broken)
    four, five = index(tmp_path / "b", skip_damaged=True), index(tmp_path / "a")
    assert (four.samples, five.samples) == (4, 5)
    assert four.fingerprint != five.fingerprint
    assert four.fingerprint == open_index(tmp_path / "b").fingerprint


def test_verify_tells_known_damage_from_new(spoilt):
    index(spoilt, skip_damaged=True)
    problems = verify(spoilt)
    assert len(problems) == 6
    assert all(problem.left_out for problem in problems)
    assert "(left out of the index)" in str(problems[0])
    path = spoilt / "0.tar"
    path.write_bytes(path.read_bytes()[:2000])
    new = [problem for problem in verify(spoilt) if not problem.left_out]
    assert {problem.shard for problem in new} == {"0.tar"}
    assert any("truncated" in problem.reason for problem in new)


def test_a_read_error_leaves_the_shard_out_for_now(tmp_path, pack, members, monkeypatch):
    """A disk that fails while the headers are read; it works again at the next call."""
    pack(tmp_path / "0.tar", members(3))
    pack(tmp_path / "1.tar", members(2, 10))
    pread, failing = os.pread, os.stat(tmp_path / "1.tar").st_ino

    def broken(file, size, offset):
        if os.fstat(file).st_ino == failing and offset > 0:
            raise OSError(5, "Input/output error")
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", broken)
    pack(tmp_path / "1.tar", {**members(2, 10), "big.jpg": bytes(9000), "big.cls": b"1"})
    failing = os.stat(tmp_path / "1.tar").st_ino
    with pytest.raises(UserError, match=r"1\.tar: cannot be read .Input/output error"):
        index(tmp_path)
    assert index(tmp_path, skip_damaged=True).counts.tolist() == [3, 0]
    assert listed(tmp_path)[0]["reason"].startswith("cannot be read")
    monkeypatch.undo()
    assert index(tmp_path).counts.tolist() == [3, 3]


def test_the_sample_before_the_damage_is_kept_only_if_it_is_surely_whole(tmp_path, pack):
    """Optional members: what was cut off could have been another of them."""
    content = {}
    for i in range(6):
        content[f"{i}.jpg"] = b"x" * 600
        content[f"{i}.cls"] = b"1"
        if i in (2, 4):
            content[f"{i}.json"] = b"{}"
    path = pack(tmp_path / "0.tar", content)
    raw = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {m.name: m.offset_data + 512 * -(-m.size // 512) for m in tar}
    expected = {"1.cls": ["0", "1"], "2.json": ["0", "1", "2"], "3.cls": ["0", "1", "2"], "0.cls": []}
    for member, kept in expected.items():
        path.write_bytes(raw[: ends[member]])
        if kept:
            assert keys(index(path, skip_damaged=True)) == kept, member
        else:
            with pytest.raises(UserError, match="no samples at all that are whole"):
                index(path, skip_damaged=True)


def test_index_json_stays_readable_and_counts_what_is_left_out(spoilt):
    index(spoilt, skip_damaged=True)
    entries = load_entries(str(spoilt / "index" / "index.json"))
    assert [(entry.left_out, entry.damaged) for entry in entries] == [(0, False), (1, True), (3, False), (0, True)]
    content = json.loads((spoilt / "index" / "index.json").read_text())
    assert set(content["shards"][0]) == {"name", "samples", "bytes", "mtime_ns", "layout", "sidecar"}
    text = (spoilt / "index" / "index.json").read_text()
    for old, new in (('"samples": 4', '"samples": -4'), ('"bytes": ', '"bytes": "x", "more": '), ("[", "[" * 100_000)):
        (spoilt / "index" / "index.json").write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match="index"):
            open_index(spoilt)


def test_keys_that_several_shards_share(tmp_path, pack, members, monkeypatch):
    from fdscale.data import verify as verify_module

    pack(tmp_path / "0.tar", members(300))
    pack(tmp_path / "1.tar", members(300, 298))
    pack(tmp_path / "2.tar", members(3, 299))
    index(tmp_path)
    assert verify(tmp_path) == []
    expected = {("1.tar", "00298"), ("1.tar", "00299"), ("2.tar", "00300"), ("2.tar", "00301")}
    for bucket in (2**24, 100):  # in one file of hashes, and in seven
        monkeypatch.setattr(verify_module, "BUCKET", bucket)
        problems = verify(tmp_path, unique_keys=True)
        assert {(problem.shard, problem.key) for problem in problems} == expected
        assert "0.tar holds a sample of the same key" in problems[0].reason
    entries = load_entries(str(tmp_path / "index" / "index.json"))
    assert shared_keys(str(tmp_path / "index"), entries[:1]) == []


# ---------------------------------------------------------------------------------------------------------------------
# Fuzz


def original(path: Path, rng: random.Random, format: int) -> dict[str, dict[str, bytes]]:
    """Write a shard of 12 samples; {key: {extension: bytes}}."""
    samples = {}
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(12):
            long = "folder/" * 20 if format != tarfile.USTAR_FORMAT and i % 3 == 0 else ""
            key = f"{long}{i:04d}"
            samples[key] = {"cls": str(i).encode(), "jpg": rng.randbytes(rng.randrange(1, 1800)), "txt": b"a" * (i + 1)}
            for extension, data in samples[key].items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return samples


def mutate(raw: bytes, headers: list[int], rng: random.Random) -> tuple[str, bytes]:
    """(kind of damage, damaged bytes)."""
    kind = rng.choice(("bit in a header", "bit anywhere", "cut", "block removed", "block doubled", "zeros", "noise"))
    data = bytearray(raw)
    block = 512 * rng.randrange(len(raw) // 512)
    if kind == "bit in a header":
        data[rng.choice(headers) + rng.randrange(512)] ^= 1 << rng.randrange(8)
    elif kind == "bit anywhere":
        data[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.choice((rng.randrange(len(raw)), block)) :]
    elif kind == "block removed":
        del data[block : block + 512 * rng.randrange(1, 4)]
    elif kind == "block doubled":
        data[block:block] = data[block : block + 512 * rng.randrange(1, 4)]
    elif kind == "zeros":
        data[block : block + 512] = bytes(512)
    else:
        data[block : block + 512] = rng.randbytes(512)
    return kind, bytes(data)


def by_tarfile(path: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Members of each key, as far as Python's own reader gets: an independent reading of the intact part."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    try:
        with tarfile.open(path, errorlevel=2) as tar:
            for member in tar:
                base, extension = base_plus_ext(member.name)
                if member.isreg() and base is not None:
                    data = tar.extractfile(member).read()
                    if len(data) == member.size:
                        found.setdefault(base, []).append((extension.lower(), data))
    except (tarfile.TarError, OSError, ValueError, OverflowError):
        pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_thousands_of_damaged_tars(tmp_path, format):
    """Every sample is indexed with its bytes, or named, or its shard is said to be damaged before it.

    The exception are changes that no header shows: a flipped bit in the data of a member, or in a long name that GNU
    and pax formats keep as data; and a doubled or removed stretch of blocks that again makes a sound tar. Then what is
    indexed is what Python's tarfile reads.
    """
    rng = random.Random(format)
    path = tmp_path / "0.tar"
    samples = original(path, rng, format)
    raw = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset_data - 512 for member in tar]
    outcomes = {"whole": 0, "left out": 0, "unseen in headers": 0}
    for _ in range(1200):
        kind, damaged = mutate(raw, headers, rng)
        path.write_bytes(damaged)
        file = os.open(path, os.O_RDONLY)
        try:
            layout, problems = scan(file, len(damaged), "0.tar")
        finally:
            os.close(file)
        theirs = by_tarfile(path)
        named = {problem.key for problem in problems}
        names = [name.decode() for name in layout.extensions.tolist()]
        found = {}
        for i, key in enumerate(layout.keys.tolist()):
            places = range(layout.starts[i], layout.starts[i + 1])
            found[key.decode()] = {
                names[layout.kinds[j]]: damaged[layout.offsets[j] : layout.offsets[j] + layout.sizes[j]] for j in places
            }
        for key, members in found.items():
            assert "jpg" in members, kind
            assert [pair for pair in theirs[key] if pair in members.items()] == list(members.items()), (kind, key)
        for key, members in samples.items():
            if found.get(key) == members:
                outcomes["whole"] += 1
            elif key not in found and (key in named or "" in named):
                outcomes["left out"] += 1
            else:  # changed or gone without a word: headers cannot show it, and tarfile reads the same
                assert dict(theirs.get(key, ())) == found.get(key, {}), (kind, key)
                outcomes["unseen in headers"] += 1
    assert outcomes["whole"] > 5000
    assert outcomes["left out"] > 2000
    assert outcomes["unseen in headers"] < 0.1 * sum(outcomes.values())
