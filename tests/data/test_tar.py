"""Header reading against Python's tarfile and webdataset's rule for keys; damage of every kind must be noticed."""

from __future__ import annotations

import io
import os
import random
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from fdscale import UserError
from fdscale.data.tar import members as read_members
from fdscale.data.tar import scan, split_name

LONG = "a-rather-long-folder-name/" * 12


def listed(path):
    file = os.open(path, os.O_RDONLY)
    try:
        return list(read_members(file, os.fstat(file).st_size))
    finally:
        os.close(file)


def by_tarfile(path):
    with tarfile.open(path) as tar:
        return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_tarfile_sees(tmp_path, pack, format):
    names = ["a.jpg", "folder/b.jpg", "x" * 60 + "/" + "y" * 90 + ".png", "größe.jpg", "empty.txt"]
    if format != tarfile.USTAR_FORMAT:
        names += [LONG + "c.jpg", LONG + "größe.jpg", "z" * 200 + ".cls"]
    path = pack(tmp_path / "a.tar", {name: os.urandom(17 * i) for i, name in enumerate(reversed(names))}, format)
    assert listed(path) == by_tarfile(path)
    assert {name for name, _, _ in listed(path)} == set(names)


def test_pax_size_and_other_records_are_followed(tmp_path, pack):
    contents = {"a.jpg": b"x" * 700, "b.jpg": b"y" * 5}
    path = pack(tmp_path / "a.tar", contents, tarfile.PAX_FORMAT, pax_headers={"size": "0700", "comment": "größe\n= 3"})
    raw = bytearray(path.read_bytes())
    first = 1024  # the pax header and its payload come before the first member
    assert raw[first : first + 5] == b"a.jpg"
    raw[first + 124 : first + 136] = b"00000000000\0"  # as writers do that give the size in the pax header alone
    raw[first + 148 : first + 156] = b" " * 8
    raw[first + 148 : first + 156] = b"%06o\0 " % sum(raw[first : first + 512])
    second = raw.index(b"size=0700", first + 1024)
    raw[second : second + 9] = b"size=0005"
    path.write_bytes(raw)
    assert listed(path) == by_tarfile(path) == [("a.jpg", 1536, 700), ("b.jpg", second // 512 * 512 + 1024, 5)]


def test_what_is_no_file_is_passed_over(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("a.jpg", tarfile.REGTYPE),
            ("b.jpg", tarfile.AREGTYPE),
            ("c.jpg", tarfile.CONTTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "l" * 150
            if info.isreg():
                info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert listed(path) == by_tarfile(path)
    assert [name for name, _, _ in listed(path)] == ["a.jpg", "b.jpg", "c.jpg"]


def test_signed_checksums_of_old_writers_are_accepted(tmp_path, pack):
    path = pack(tmp_path / "a.tar", {"größe.jpg": b"abc"}, tarfile.GNU_FORMAT)
    raw = bytearray(path.read_bytes())
    signed = sum(b - 256 if b > 127 else b for b in raw[:148] + raw[156:512]) + 8 * 32
    raw[148:156] = b"%06o\0 " % signed
    path.write_bytes(raw)
    assert listed(path) == by_tarfile(path) == [("größe.jpg", 512, 3)]


def test_names_in_another_encoding_stay_apart(tmp_path, pack):
    names = [b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), b"caf\xe8.jpg".decode("utf-8", "surrogateescape")]
    path = pack(tmp_path / "a.tar", dict.fromkeys(names, b"abc"), tarfile.GNU_FORMAT)
    assert [name for name, _, _ in listed(path)] == ["caf\\xe9.jpg", "caf\\xe8.jpg"]


@settings(max_examples=500, deadline=None)
@given(st.text("ab._/ é", min_size=1, max_size=12))
def test_keys_are_webdatasets(name):
    base, extension = base_plus_ext(name)
    hidden = name.rsplit("/", 1)[-1].startswith(".")  # stock readers give these to a sample named like the folder
    skipped = name.startswith("__") and len(first := name.split("/")[0]) > 3 and first.endswith("__")
    expected = None if base is None or hidden or skipped else (base, extension.lower())
    assert split_name(name) == expected


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_truncation_is_noticed_wherever_it_falls(tmp_path, pack, format):
    contents = {"a.jpg": b"x" * 700, "a.cls": b"1", LONG + "b.jpg": b"y" * 512, LONG + "b.cls": b"", "c.jpg": b"z"}
    raw = pack(tmp_path / "whole.tar", contents, format).read_bytes()
    data_end = listed(tmp_path / "whole.tar")[-1][1] + 512
    cuts = set(range(0, data_end + 512, 64)) | {512 * i + k for i in range(data_end // 512) for k in (-1, 0, 1)}
    for cut in sorted(cuts - {-1}):
        path = tmp_path / "cut.tar"
        path.write_bytes(raw[:cut])
        with pytest.raises(UserError, match="truncated"):
            listed(path)
    path.write_bytes(raw[: data_end + 512])  # a single end block: no data are lost
    assert len(listed(path)) == 5


def test_damaged_headers_are_noticed(tmp_path, pack, members):
    raw = pack(tmp_path / "whole.tar", members(4)).read_bytes()
    rng = random.Random(0)
    path = tmp_path / "bad.tar"
    for _, data_offset, _ in listed(tmp_path / "whole.tar"):
        at = data_offset - 512
        for damage in (bytes(512), rng.randbytes(512), b"\xff" * 512):
            path.write_bytes(raw[:at] + damage + raw[at + 512 :])
            with pytest.raises(UserError, match=rf"at byte {at}" if at else r"not a tar|but data follow"):
                listed(path)
        for position in rng.sample(range(512), 40):
            if position in range(148, 156):  # the checksum's field has room for signs that mean nothing
                continue
            byte = raw[at + position] ^ (1 << rng.randrange(8))
            path.write_bytes(raw[: at + position] + bytes([byte]) + raw[at + position + 1 :])
            with pytest.raises(UserError, match=r"damaged|not a tar"):
                listed(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\x1f\x8b" + bytes(2000), "compressed"),
        (b"BZh9" + bytes(2000), "compressed"),
        (b"<html>" * 200, "not a tar file"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path, content, message):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        listed(path)


def test_joined_tars_are_refused_since_readers_stop_at_the_first(tmp_path, pack):
    one = pack(tmp_path / "a.tar", {"a.jpg": b"abc"}).read_bytes()
    (tmp_path / "b.tar").write_bytes(one + one)
    with pytest.raises(UserError, match="data follow"):
        listed(tmp_path / "b.tar")


def test_sparse_files_are_refused(tmp_path, pack):
    pack(tmp_path / "a.tar", {"a.jpg": b"abc"}, tarfile.PAX_FORMAT, pax_headers={"GNU.sparse.major": "1"})
    with pytest.raises(UserError, match="sparse"):
        listed(tmp_path / "a.tar")
    pack(tmp_path / "b.tar", {"a.jpg": b"abc"}, tarfile.GNU_FORMAT, type=tarfile.GNUTYPE_SPARSE)
    with pytest.raises(UserError, match="sparse"):
        listed(tmp_path / "b.tar")


def test_giant_names_and_bad_pax_records_are_refused(tmp_path, pack):
    pack(tmp_path / "a.tar", {"a.jpg": b"abc"}, tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 2**20})
    with pytest.raises(UserError, match="announces"):
        listed(tmp_path / "a.tar")
    path = pack(tmp_path / "b.tar", {"a.jpg": b"abc"}, tarfile.PAX_FORMAT, pax_headers={"comment": "xxxx"})
    raw = path.read_bytes()
    for old, new in ((b"16 comment", b"99 comment"), (b"16 comment", b"-1 comment"), (b"comment=", b"comment ")):
        assert old in raw
        path.write_bytes(raw.replace(old, new, 1))
        with pytest.raises(UserError, match="pax header at byte 0 is damaged"):
            listed(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "a.cls", "b.jpg"], "sample 'b': lacks .cls"),
        (["a.jpg", "b.jpg", "a.cls"], "sample 'a': the key occurs twice"),
        (["a.jpg", "a.JPG"], "sample 'a': has two members .jpg"),
        (["a.jpg", "b.txt"], "sample 'b': has no image .found .txt"),
        (["photo.0001.jpg"], "sample 'photo': has no image .found .0001.jpg.*first dot"),
    ],
)
def test_samples_that_readers_would_split_or_lose_are_named(tmp_path, pack, names, message):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    file = os.open(tmp_path / "a.tar", os.O_RDONLY)
    _, problems = scan(file, os.fstat(file).st_size, "a.tar")
    os.close(file)
    assert any(re.search(message, str(problem)) for problem in problems), problems


def test_an_empty_image_is_named(tmp_path, pack):
    path = pack(tmp_path / "a.tar", {"a.jpg": b"abc", "b.jpg": b""})
    file = os.open(path, os.O_RDONLY)
    _, problems = scan(file, os.fstat(file).st_size, "a.tar")
    os.close(file)
    assert [str(problem) for problem in problems] == ["a.tar: sample 'b': its .jpg is empty"]
