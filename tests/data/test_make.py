"""Shards made of every kind of source hold the very bytes and labels of the source, read back by webdataset."""

from __future__ import annotations

import io
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from packed import contents, read
from PIL import Image

from fdscale import UserError
from fdscale.data import shards as shards_module
from fdscale.data.listing import Columns
from fdscale.data.recode import Recoding, recode
from fdscale.data.shards import make
from fdscale.data.verify import verify


def photo(size: tuple[int, int], kind: str = "JPEG", mode: str = "RGB", seed: int = 0, **options) -> bytes:
    """A picture with structure and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    base = 127 + 60 * np.sin(x / 9)[..., None] + 60 * np.cos(y / 7)[..., None] * np.ones(3)
    image = Image.fromarray((base + rng.normal(0, 6, base.shape)).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Folders and tables in Hugging Face's layout


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("place", ["in the split", "above"])
def test_hugging_face_folders_with_a_table(tmp_path, photos, kind, place):
    root = tmp_path / "in"
    rows = []
    for i, data in enumerate(photos[:9]):
        split = "test" if i % 3 == 0 else "train"
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / split / f"{i}.jpg").write_bytes(data)
        rows.append((split, f"{i}.jpg", f"a {i % 2}"))
    places = {root: rows} if place == "above" else {root / s: [r for r in rows if r[0] == s] for s in ("train", "test")}
    for folder, part in places.items():
        table = [{"file_name": (f"{r[0]}/" if place == "above" else "") + r[1], "label": r[2]} for r in part]
        if kind == "csv":
            lines = ["file_name,label", *(f"{row['file_name']},{row['label']}" for row in table)]
            (folder / "metadata.csv").write_text("\n".join(lines))
        elif kind == "jsonl":
            (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in table))
        else:
            pa = pytest.importorskip("pyarrow")
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(table), folder / "metadata.parquet")
    if place == "in the split":
        with pytest.raises(UserError, match=r"holds splits .test, train., not classes; choose one with --split test"):
            make(root, tmp_path / "out")
    else:
        assert make(root, tmp_path / "all").samples == 9
    make(root, tmp_path / "out", split="train", seed=None)
    found = read(tmp_path / "out")
    assert sorted((data, cls) for _, data, cls in found.values()) == sorted(
        (data, i % 2) for i, data in enumerate(photos[:9]) if i % 3
    )
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a 0", "a 1"]


def test_splits_of_class_folders(image_folder, tmp_path):
    for split in ("train", "validation"):
        shutil.copytree(image_folder, tmp_path / "in" / split)
    assert make(tmp_path / "in", tmp_path / "out", split="validation").samples == 24
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog", "owl"]
    with pytest.raises(UserError, match=r"has no split dev .folders: train, validation"):
        make(tmp_path / "in", tmp_path / "no", split="dev")
    with pytest.raises(UserError, match="is no folder, so it has no split"):
        make(next((tmp_path / "in" / "train" / "cat").iterdir()), tmp_path / "no", split="dev")


def test_json_lines_that_are_not(tmp_path, photos):
    (tmp_path / "a.jpg").write_bytes(photos[0])
    file = tmp_path / "t.jsonl"
    cases = {
        "line 2: is no JSON": '{"path": "a.jpg"}\n{"path"',
        "line 2: expected an object": '{"path": "a.jpg"}\n[1]',
        "line 2: expected 1 columns .path., with path filled in": '{"path": "a.jpg"}\n{"x": 1}',
        "line 1: path is no path": '{"path": 5}',
        "has the columns ": "",
        "labels are of several kinds": '{"path": "a.jpg", "label": 1}\n{"path": "a.jpg", "label": "x"}',
    }
    for message, text in cases.items():
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            make(file, tmp_path / "out")
    file.write_text('{"path": "a.jpg", "label": 12}\n\n{"path": "a.jpg", "label": 3}\n')
    make(file, tmp_path / "out", seed=None)
    assert [cls for _, _, cls in read(tmp_path / "out").values()] == [12, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Checking and recoding


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_images_stop_or_are_listed(tmp_path, photos, workers):
    files = {f"{i}.jpg": data for i, data in enumerate(photos[:8])}
    files |= {"a.jpg": photos[0][: len(photos[0]) // 2], "b.png": b"\x89PNG\r\n\x1a\n" + bytes(50), "c.jpg": b"<html>"}
    source = folder_of(tmp_path / "in", files)
    with pytest.raises(UserError, match=r"in/[abc]\.(jpg|png): the .*--skip-damaged"):
        make(source, tmp_path / "out", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    reported = []
    made = make(
        source, tmp_path / "out", workers=workers, skip_damaged=True, report=reported.append, samples_per_shard=3
    )
    assert made.counts.tolist() == [3, 3, 2]
    assert {data for _, data, _ in read(tmp_path / "out").values()} == set(photos[:8])
    listed = [json.loads(line) for line in (tmp_path / "out" / "left-out.jsonl").read_text().splitlines()]
    assert sorted((Path(one["file"]).name, one["key"]) for one in listed) == [
        ("a.jpg", "a"),
        ("b.png", "b"),
        ("c.jpg", "c"),
    ]
    assert sorted(problem.shard for problem in reported) == sorted(one["file"] for one in listed)
    assert verify(tmp_path / "out", decode=True) == []
    assert make(source, tmp_path / "raw", recoding=Recoding(check=False)).samples == 11
    with pytest.raises(UserError, match=r"all 3 images are broken, the first: .*in2/"):
        make(
            folder_of(tmp_path / "in2", {k: files[k] for k in ("a.jpg", "b.png", "c.jpg")}),
            tmp_path / "x",
            skip_damaged=True,
        )


def test_resize_makes_large_ones_smaller_and_leaves_the_rest_alone(tmp_path):
    files = {
        "wide.jpg": photo((300, 120)),
        "tall.png": photo((90, 200), "PNG"),
        "grey.jpg": photo((150, 150), mode="L"),
        "small.jpg": photo((400, 64)),
        "tiny.webp": photo((10, 20), "WEBP"),
    }
    make(folder_of(tmp_path / "in", files), tmp_path / "out", recoding=Recoding(resize=64))
    found = read(tmp_path / "out")
    assert {key: found[key][1] for key in ("small", "tiny")} == {
        "small": files["small.jpg"],
        "tiny": files["tiny.webp"],
    }
    for key, name, size in (
        ("wide", "wide.jpg", (160, 64)),
        ("tall", "tall.png", (64, 142)),
        ("grey", "grey.jpg", (64, 64)),
    ):
        extension, data, _ = found[key]
        image = Image.open(io.BytesIO(data))
        assert (extension, image.format, image.size) == ("jpg", "JPEG", size)
        whole = Image.open(io.BytesIO(files[name])).resize(size, Image.Resampling.LANCZOS)
        difference = np.asarray(image, np.float32) - np.asarray(whole.convert(image.mode), np.float32)
        assert np.abs(difference).mean() < 4
    assert Image.open(io.BytesIO(found["grey"][1])).mode == "L"
    make(tmp_path / "in", tmp_path / "again", recoding=Recoding(resize=64), workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_quality_alone_rewrites_only_what_gets_smaller(tmp_path):
    files = {
        "fine.jpg": photo((80, 80), quality=98),
        "coarse.jpg": photo((80, 80), quality=30),
        "p.png": photo((80, 80), "PNG"),
    }
    make(folder_of(tmp_path / "in", files), tmp_path / "out", recoding=Recoding(quality=80))
    found = read(tmp_path / "out")
    assert found["coarse"][1] == files["coarse.jpg"]
    assert len(found["fine"][1]) < len(files["fine.jpg"]) / 2
    assert (found["p"][0], Image.open(io.BytesIO(found["p"][1])).size) == ("jpg", (80, 80))
    for recoding, message in (
        (Recoding(resize=0), "--resize is 0"),
        (Recoding(quality=0), "--quality is 0"),
        (Recoding(quality=100), "--quality is 100"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "in", tmp_path / "x", recoding=recoding)


def test_what_is_written_anew_is_upright_and_opaque():
    turned = Image.fromarray(np.full((40, 90, 3), (250, 10, 10), np.uint8))
    turned.paste((10, 10, 250), (0, 0, 45, 40))  # the left half blue
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: left becomes top
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif, quality=95)
    data, extension = recode(buffer.getvalue(), "jpeg", Recoding(resize=20))
    image = Image.open(io.BytesIO(data))
    assert (extension, image.size, dict(image.getexif())) == ("jpg", (20, 45), {})
    assert np.abs(np.asarray(image)[5, 10].astype(int) - (10, 10, 250)).max() < 12
    assert np.abs(np.asarray(image)[40, 10].astype(int) - (250, 10, 10)).max() < 12
    buffer = io.BytesIO()
    Image.fromarray(np.full((50, 50, 4), (20, 200, 40, 0), np.uint8)).save(buffer, "PNG")
    image = Image.open(io.BytesIO(recode(buffer.getvalue(), "png", Recoding(resize=10))[0]))
    assert np.abs(np.asarray(image)[5, 5].astype(int) - (20, 200, 40)).max() < 5
    buffer = io.BytesIO()
    Image.fromarray(np.full((50, 50), 0x8000, np.uint16)).save(buffer, "PNG")
    image = Image.open(io.BytesIO(recode(buffer.getvalue(), "png", Recoding(resize=10))[0]))
    assert abs(int(np.asarray(image.convert("L"))[5, 5]) - 128) <= 1


@pytest.mark.slow
def test_a_decompression_bomb_is_refused_unopened():
    buffer = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 200_000
    with pytest.raises(UserError, match="more than 178956970 pixels, and is not opened"):
        recode(buffer.getvalue(), "png", Recoding())
    buffer = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(buffer, "PNG")  # a run would refuse it
    with pytest.raises(UserError, match="10000 x 9000 pixels, more than the"):
        recode(buffer.getvalue(), "png", Recoding())
    assert recode(buffer.getvalue(), "png", Recoding(resize=9))[1] == "jpg"


def test_shards_reach_their_size_although_images_shrink(tmp_path):
    files = {f"{i:02d}.jpg": photo((200, 160), seed=i, quality=97) for i in range(30)}
    source = folder_of(tmp_path / "in", files)
    make(source, tmp_path / "out", recoding=Recoding(resize=50), max_bytes=20_000)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(sizes) > 2
    assert all(15_000 < size <= 20_480 + 10_240 for size in sizes[:-1])
    assert sum(len(data) for data in files.values()) > 5 * sum(sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Size


def table_of(path: Path, count: int) -> Path:
    path.write_text("path,key,label\n" + "".join(f"a.jpg,key/{i:08d},class {i % 100}\n" for i in range(count)))
    return path


@pytest.mark.slow
def test_many_rows_need_little_memory(tmp_path, photos):
    """The growth per row, so that millions fit: most of it tells keys apart."""
    from fdscale.data.listing import Listing, find

    (tmp_path / "a.jpg").write_bytes(photos[0])
    make(table_of(tmp_path / "warm.csv", 1), tmp_path / "warm")  # whatever is imported and cached
    used = []
    for count in (1_000, 11_000):
        table = table_of(tmp_path / f"{count}.csv", count)
        tracemalloc.start()
        listing = Listing(str(tmp_path / f"rows-{count}"))
        find(str(table), None, Columns(), listing)
        used.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        row = listing.row(count - 1)
        assert (row.key, row.cls) == (
            f"key/{count - 1:08d}",
            sorted(f"class {i}" for i in range(100)).index("class 99"),
        )
        listing.close()
    assert (used[1] - used[0]) / 10_000 < 250


def test_keys_of_one_hash_are_told_apart(tmp_path, photos, monkeypatch):
    """A hash of 64 bits may meet another: then the keys themselves decide."""
    from fdscale.data import listing

    (tmp_path / "a.jpg").write_bytes(photos[0])
    monkeypatch.setattr(listing.hashlib, "blake2b", lambda raw, digest_size: __import__("hashlib").md5(b"same"))
    (tmp_path / "t.csv").write_text("path,key\na.jpg,x\na.jpg,y\n")
    make(tmp_path / "t.csv", tmp_path / "out", seed=None)
    assert list(read(tmp_path / "out")) == ["x", "y"]


def test_chunks_are_bounded_by_bytes(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(shards_module, "CHUNK_BYTES", 3 * max(map(len, photos)))
    seen = []
    source = folder_of(tmp_path / "in", {f"{i:02d}.jpg": data for i, data in enumerate(photos)})
    make(source, tmp_path / "out", progress=lambda done, total: seen.append(done))
    steps = np.diff([0, *seen])
    assert steps.sum() == 24
    assert 3 <= steps.max() < 12
