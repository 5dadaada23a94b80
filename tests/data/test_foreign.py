"""Others' indexes of the same shards, written as their own tools write them, against shards that agree and do not.

The writers here follow the public sources of wids (wids_index.py), DALI (tools/wds2idx.py, both of its readers),
Megatron-Energon (TarIndexWriter and its .info.json), img2dataset (logger.py) and open_clip (sizes.json).
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import base_plus_ext

from fdscale import UserError
from fdscale.data import foreign
from fdscale.data import indexing as index_module
from fdscale.data.index_file import load_sidecar
from fdscale.data.indexing import index
from fdscale.data.verify import verify


def wds2idx(path: Path, version: str = "v1.2") -> Path:
    """DALI's index by its fallback reader, Python's tarfile."""
    samples, last = [], None
    with tarfile.open(path) as tar:
        for member in tar:
            if member.type != tarfile.REGTYPE:
                continue
            dot = member.name.find(".", member.name.rfind("/") + 1)
            base, extension = member.name[:dot], member.name[dot + 1 :]
            if not base or base.endswith("/"):
                continue
            if base != last:
                samples.append([])
                last = base
            about = (extension, member.offset_data, member.size, member.name)
            samples[-1].append(" ".join(map(str, about if version == "v1.2" else about[:3])))
    idx = path.parent / (path.name.split(".", 1)[0] + ".idx")
    idx.write_text(f"{version} {len(samples)}\n" + "".join(" ".join(sample) + "\n" for sample in samples))
    return idx


def wds2idx_by_gnu_tar(path: Path) -> list[tuple[str, int]]:
    """(name, offset of the data) as DALI's main reader finds them: from the block numbers that GNU tar prints."""
    listed = subprocess.run(
        ["tar", "--list", "--block-num", "--file", str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [line.removeprefix("block ").split(": ", 1) for line in listed if ": " in line]
    return [(name, (int(block) + 1) * 512) for block, name in rows if not name.startswith("**")]


def energon(path: Path) -> Path:
    """Where each sample begins, and where the last ends."""
    idx, last = path.with_suffix(".tar.idx"), None
    with tarfile.open(path) as tar, idx.open("wb") as file:
        for member in tar:
            base = base_plus_ext(member.name)[0]
            if base != last:
                file.write(struct.pack("Q", member.offset))
                last = base
            end = member.offset_data + 512 * -(-member.size // 512)
        file.write(struct.pack("Q", end))
    return idx


COUNTS = {"set-0.tar": 5, "set-1.tar": 7, "set-2.tar": 4}


def write_wids(folder: Path, counts: dict[str, int]) -> Path:
    listed = [
        {"url": f"gs://bucket/x/{name}", "md5sum": "0", "nsamples": n, "filesize": 1} for name, n in counts.items()
    ]
    file = folder / "shardindex.json"
    file.write_text(json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": listed}, indent=2))
    return file


def write_info(folder: Path, counts: dict[str, int]) -> Path:
    (folder / ".nv-meta").mkdir(exist_ok=True)
    (folder / ".nv-meta" / ".info.json").write_text(json.dumps({"energon_version": "7.4.1", "shard_counts": counts}))
    return folder / ".nv-meta" / ".info.json"


def write_info_yaml(folder: Path, counts: dict[str, int]) -> Path:
    (folder / ".nv-meta").mkdir(exist_ok=True)
    file = folder / ".nv-meta" / ".info.yaml"
    file.write_text("shard_counts:\n" + "".join(f"  {name}: {count}\n" for name, count in counts.items()))
    return file


def write_sizes(folder: Path, counts: dict[str, int]) -> Path:
    (folder / "sizes.json").write_text(json.dumps(counts))
    return folder / "sizes.json"


def write_stats(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        file = folder / f"{name.removesuffix('.tar')}_stats.json"
        file.write_text(
            json.dumps({"count": count + 3, "successes": count, "failed_to_download": 3, "status_dict": {}})
        )
    return folder / "set-1_stats.json"


@pytest.mark.parametrize("write", [write_wids, write_info, write_info_yaml, write_sizes, write_stats])
def test_counts_of_others_are_a_cross_check(shards, write):
    write(shards, COUNTS)
    assert index(shards).counts.tolist() == [5, 7, 4]
    assert verify(shards) == []
    source = write(shards, {**COUNTS, "set-1.tar": 9})
    with pytest.raises(UserError) as caught:
        index(shards)
    assert f"set-1.tar: holds 7 samples, {source} says 9" in str(caught.value)
    (problem,) = verify(shards)
    assert (problem.shard, problem.left_out) == ("set-1.tar", False)
    reported = []
    assert index(shards, skip_damaged=True, report=reported.append).counts.tolist() == [5, 7, 4]
    assert [problem.shard for problem in reported] == ["set-1.tar"]


@pytest.mark.parametrize(
    "write", [wds2idx, lambda path: wds2idx(path, "v1.1"), energon], ids=["v1.2", "v1.1", "energon"]
)
def test_indexes_of_single_shards_are_a_cross_check(shards, pack, members, write):
    """A shard cut between two samples and closed again by a careless tool: only the other index knows what is lost."""
    for path in shards.glob("*.tar"):
        write(path)
    assert index(shards).counts.tolist() == [5, 7, 4]
    assert verify(shards) == []
    pack(shards / "set-1.tar", members(6, first=100))
    with pytest.raises(UserError, match=r"set-1\.tar: holds 6 samples, .*idx says 7"):
        index(shards)
    changed, disagreeing = verify(shards)
    assert "changed since it was indexed" in changed.reason
    assert "says 7" in disagreeing.reason


def test_a_list_elsewhere_can_be_named(shards, tmp_path):
    file = write_wids(tmp_path, {**COUNTS, "set-2.tar": 40})
    assert index(shards).samples == 16
    with pytest.raises(UserError, match=r"set-2\.tar: holds 4 samples, .* says 40"):
        index(shards, counts=[str(file)])
    assert "says 40" in verify(shards, counts=[str(file)])[0].reason
    (tmp_path / "other.json").write_text('{"a": "b"}')
    for name in ("other.json", "gone.json"):
        with pytest.raises(UserError, match="says of no shard how many samples"):
            index(shards, counts=[str(tmp_path / name)])


def test_shards_of_the_same_base_name_are_told_apart(tmp_path, pack, members):
    pack(tmp_path / "a" / "0.tar", members(2))
    pack(tmp_path / "b" / "0.tar", members(3))
    pack(tmp_path / "c" / "1.tar", members(4))
    write_sizes(tmp_path, {"a/0.tar": 2, "b/0.tar": 3, "0.tar": 99, "1.tar": 4})
    assert index([tmp_path / name for name in "abc"]).counts.tolist() == [2, 3, 4]


def test_files_that_only_look_like_an_index_say_nothing(shards):
    (shards / "set-0.idx").write_bytes(b"v1.2 five\n" + b"jpg x y z\n")
    (shards / "set-1.idx").write_bytes(b"\0\1\2" * 9)
    (shards / "set-1.tar.idx").write_bytes(struct.pack("<3Q", 512, 0, 1))
    (shards / "set-2.idx").write_text("0\t0\n1\t517\n")  # MXNet's
    (shards / "sizes.json").write_text("[" * 100_000)
    (shards / "set-2_stats.json").write_text("[1]")
    (shards / "x.json").write_text('{"shardlist": [1, {"url": 3, "nsamples": "x"}]}')
    assert index(shards).samples == 16
    assert verify(shards) == []


def test_offsets_of_dali_replace_the_walk_only_if_they_bear_the_checks(shards, monkeypatch):
    walked = []
    scan_file = index_module.scan_file
    monkeypatch.setattr(index_module, "scan_file", lambda path, name: walked.append(name) or scan_file(path, name))
    for path in shards.glob("*.tar"):
        idx = wds2idx(path)
        listed = [word.split() for word in idx.read_text().splitlines()[1:]]
        offsets = [(words[i + 3], int(words[i + 1])) for words in listed for i in range(0, len(words), 4)]
        assert offsets == wds2idx_by_gnu_tar(path)
    ours = index(shards, str(shards / "ours"))
    assert walked == ["set-0.tar", "set-1.tar", "set-2.tar"]
    walked.clear()
    theirs = index(shards, str(shards / "theirs"), trust_idx=True)
    assert walked == []
    assert theirs.fingerprint == ours.fingerprint
    for name in COUNTS:
        a, b = (load_sidecar(str(shards / place / f"{name}.npz")) for place in ("ours", "theirs"))
        assert all((x == y).all() for x, y in zip(a, b, strict=True))

    raw, idx = (shards / "set-1.tar").read_bytes(), (shards / "set-1.idx").read_text()

    def spoil_header(place: int) -> None:
        (shards / "set-1.tar").write_bytes(raw[:place] + b"\xff" * 512 + raw[place + 512 :])

    lines = idx.splitlines(keepends=True)
    with tarfile.open(shards / "set-1.tar") as tar:
        last = list(tar)[-1].offset
    for spoil in (
        lambda: spoil_header(0),
        lambda: spoil_header(last),
        lambda: (shards / "set-1.tar").write_bytes(raw[: last + 1024]),  # no end mark
        lambda: (shards / "set-1.tar").write_bytes(raw[:-600] + b"more" + raw[-596:]),
        lambda: (shards / "set-1.idx").write_text("v1.2 6\n" + "".join(lines[1:4] + lines[5:])),  # one sample missing
        lambda: (shards / "set-1.idx").write_text(idx.replace("00103.jpg", "00999.jpg")),
        lambda: (shards / "set-1.idx").write_text(idx.replace(" 512 ", " 1024 ", 1)),
    ):
        (shards / "set-1.tar").write_bytes(raw)
        (shards / "set-1.idx").write_text(idx)
        spoil()
        assert foreign.layout_of(str(shards / "set-1.tar"), "set-1.tar") is None


def test_an_index_that_does_not_fit_is_not_used_but_named(shards, pack, members):
    """The shard was repacked after wds2idx ran: our own walk is used, and the other count is reported."""
    wds2idx(shards / "set-1.tar")
    pack(shards / "set-1.tar", members(9, first=100))
    with pytest.raises(UserError, match=r"holds 9 samples, .*set-1\.idx says 7"):
        index(shards, trust_idx=True)
    os.unlink(shards / "set-1.idx")
    assert index(shards, trust_idx=True).counts.tolist() == [5, 9, 4]
