"""Shards made from images against stock webdataset's reading of them, and what verification finds in spoilt ones."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from packed import contents, read
from PIL import Image

from fdscale import UserError
from fdscale.data import shards as shards_module
from fdscale.data.indexing import index
from fdscale.data.shards import make
from fdscale.data.verify import verify


def table(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


@pytest.mark.parametrize("workers", [1, 2])
def test_class_folders(image_folder, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(shards_module, "CHUNK_ROWS", 10)
    seen = []
    made = make(
        image_folder, tmp_path / "out", samples_per_shard=10, workers=workers, progress=lambda *p: seen.append(p)
    )
    assert made.counts.tolist() == [10, 10, 4]
    assert seen == [(10, 24), (20, 24), (24, 24)]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog", "owl"]
    found = read(tmp_path / "out")
    files = [path for path in image_folder.rglob("*") if path.is_file()]
    assert len(found) == len(files) == 24
    for path in files:
        key = f"{path.parent.name}/{path.stem}"
        expected = (path.suffix[1:].lower(), path.read_bytes(), ["cat", "dog", "owl"].index(path.parent.name))
        assert found[key] == expected
    order = [made.key(shard, row) for shard in range(3) for row in range(made.counts[shard])]
    assert order == list(found)
    assert order != sorted(order)  # shuffled
    assert verify(tmp_path / "out", decode=True, workers=workers) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_flat_folder_has_no_classes(tmp_path, photos):
    for i in range(5):
        (tmp_path / "in" / f"{i}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{i}.jpg").write_bytes(photos[i])
    (tmp_path / "in" / ".DS_Store").write_bytes(b"hidden files are left out")
    make(tmp_path / "in", tmp_path / "out", seed=None)
    assert read(tmp_path / "out") == {str(i): ("jpg", photos[i], None) for i in range(5)}
    assert set(contents(tmp_path / "out")) == {"shard-000000.tar"}


def test_the_same_source_gives_the_same_bytes(image_folder, tmp_path):
    make(image_folder, tmp_path / "a", samples_per_shard=7)
    for path in image_folder.rglob("*.jpg"):
        os.utime(path, (1, 1))
    make(image_folder, tmp_path / "b", samples_per_shard=7, workers=2)
    make(image_folder, tmp_path / "c", samples_per_shard=7, seed=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")
    assert sorted(read(tmp_path / "a").items()) == sorted(read(tmp_path / "c").items())
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_shards_keep_to_their_size(image_folder, tmp_path):
    make(image_folder, tmp_path / "out", max_bytes=12_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert len(sizes) > 2
    assert max(sizes) <= 12_000 + 1024 + 10240  # the end mark, and padding to a record
    assert len(read(tmp_path / "out")) == 24
    make(image_folder, tmp_path / "tiny", max_bytes=1)
    assert len(list((tmp_path / "tiny").glob("*.tar"))) == 24


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_tables(image_folder, tmp_path, kind):
    files = sorted(path for path in image_folder.rglob("*") if path.is_file())[:5]
    rows = [["label", "path"]] + [[f"name, {i % 2}", str(path.relative_to(tmp_path))] for i, path in enumerate(files)]
    make(table(tmp_path / f"t.{kind}", rows), tmp_path / "out", seed=None)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["name, 0", "name, 1"]
    found = read(tmp_path / "out")
    assert [(data, cls) for _, data, cls in found.values()] == [(p.read_bytes(), i % 2) for i, p in enumerate(files)]
    rows = [["path", "cls", "key"]] + [[str(path), 10 - i, f"k{i}"] for i, path in enumerate(files)]
    make(table(tmp_path / f"n.{kind}", rows), tmp_path / "numbers", seed=None)
    found = read(tmp_path / "numbers")
    assert [(key, cls) for key, (_, _, cls) in found.items()] == [(f"k{i}", 10 - i) for i in range(5)]
    assert not (tmp_path / "numbers" / "classes.json").exists()


def test_keys_are_unique_and_read_back_whole(tmp_path, photos):
    names = ["a.b.jpg", "a_b.jpg", "a.b.png", "dir.v2/c.jpg", "x" * 120 + "/" + "y" * 150 + ".jpg", "größe.jpg"]
    names += ["__meta__/z.jpg", "plain.jpg", "plain.jpg", "../in2/up.jpg"]
    for i, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos[i])
    source = table(tmp_path / "in" / "t.csv", [["path"], *([name] for name in names)])
    made = make(source, tmp_path / "out", seed=None)
    found = read(tmp_path / "out")
    assert list(found) == [
        "a_b",
        "a_b-2",
        "a_b-3",
        "dir.v2/c",
        "x" * 120 + "/" + "y" * 150,
        "größe",
        "_meta__/z",
        "plain",
        "plain-2",
        "in2/up",
    ]
    assert [made.key(0, row) for row in range(10)] == list(found)
    assert [data for _, data, _ in found.values()] == [(tmp_path / "in" / name).read_bytes() for name in names]


def test_sources_that_cannot_be_packed(image_folder, tmp_path, photos):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.jpg").write_bytes(photos[0])
    (tmp_path / "t" / "a.txt").write_bytes(b"x")
    (tmp_path / "t" / "zero.jpg").write_bytes(b"")
    tables = {
        "line 3: .*gone.jpg: No such file": [["path"], ["a.jpg"], ["gone.jpg"]],
        'line 2: .*a.txt: unknown extension "txt" .known: jpg': [["path"], ["a.txt"]],
        "line 2: .*zero.jpg: is empty": [["path"], ["zero.jpg"]],
        'line 3: has the same key "k" as .*t.csv, line 2': [["path", "key"], ["a.jpg", "k"], ["a.jpg", "k"]],
        'unusable key "k.1"': [["path", "key"], ["a.jpg", "k.1"]],
        'unusable key "../k"': [["path", "key"], ["a.jpg", "../k"]],
        'unusable key ""': [["path", "key"], ["a.jpg", ""]],
        'unusable key "__x__/k"': [["path", "key"], ["a.jpg", "__x__/k"]],
        'line 2: cls is "cat"': [["path", "cls"], ["a.jpg", "cat"]],
        "has the columns": [["file", "cls"], ["a.jpg", "1"]],
        'at most one of "label" and "cls"': [["path", "cls", "label"], ["a.jpg", "1", "x"]],
        "line 2: expected 2 columns": [["path", "cls"], ["a.jpg"]],
        "lists no images": [["path"]],
        "3 files cannot be packed": [["path"], ["gone.jpg"], ["a.txt"], ["zero.jpg"]],
    }
    for message, rows in tables.items():
        with pytest.raises(UserError, match=message):
            make(table(tmp_path / "t" / "t.csv", rows), tmp_path / "out")
    folders = {"no images there": "empty", "neither a folder nor a table": "nowhere"}
    (tmp_path / "empty").mkdir()
    for message, name in folders.items():
        with pytest.raises(UserError, match=message):
            make(tmp_path / name, tmp_path / "out")
    (image_folder / "notes.jpg").write_bytes(photos[0])
    with pytest.raises(UserError, match=r"holds folders .cat, .* and files .notes\.jpg"):
        make(image_folder, tmp_path / "out")
    (image_folder / "notes.jpg").unlink()
    (image_folder / "yak").mkdir()
    with pytest.raises(UserError, match="yak: this class holds no images"):
        make(image_folder, tmp_path / "out")
    (image_folder / "yak" / "Thumbs.db").write_bytes(b"x")
    with pytest.raises(UserError, match=r'Thumbs\.db: unknown extension "db"'):
        make(image_folder, tmp_path / "out")
    (image_folder / "yak" / "Thumbs.db").unlink()
    (image_folder / "yak" / "link.jpg").symlink_to("gone.jpg")
    with pytest.raises(UserError, match=r"link\.jpg: No such file"):
        make(image_folder, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_arguments_that_contradict(image_folder, tmp_path):
    with pytest.raises(UserError, match="not both"):
        make(image_folder, tmp_path / "out", samples_per_shard=1, max_bytes=1)
    with pytest.raises(UserError, match="samples_per_shard is 0"):
        make(image_folder, tmp_path / "out", samples_per_shard=0)
    with pytest.raises(UserError, match="seed is -1"):
        make(image_folder, tmp_path / "out", seed=-1)
    with pytest.raises(UserError, match="exists already"):
        make(image_folder, image_folder)
    with pytest.raises(UserError, match=r"cannot write there .*--index DIR"):
        make(image_folder, tmp_path / "out", index_dir=str(next(image_folder.rglob("*.jpg")) / "index"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_make_leaves_nothing(image_folder, tmp_path, monkeypatch, workers):
    """An image that vanishes halfway, Ctrl-C, and a full disk."""
    victim = sorted(image_folder.rglob("*.jpg"))[-1]

    def vanish(done, total):
        victim.unlink(missing_ok=True)

    files = sorted(path for path in image_folder.rglob("*") if path.is_file() and path != victim)
    rows = [["path"], *([str(path)] for path in [*files, victim])]
    source = table(tmp_path / "t.csv", rows)
    before = sorted(tmp_path.iterdir())
    if workers == 1:  # with more, the shard of the victim may be written before the first is reported
        monkeypatch.setattr(shards_module, "CHUNK_ROWS", 4)
        with pytest.raises(UserError, match=re.escape(f"{victim}: cannot be read (No such file")):
            make(source, tmp_path / "out", samples_per_shard=4, seed=None, progress=vanish)
    assert sorted(tmp_path.iterdir()) == before

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(image_folder, tmp_path / "out", samples_per_shard=4, workers=workers, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"out: cannot be written .No space left on device.; nothing was kept"):
        make(image_folder, tmp_path / "out", samples_per_shard=4, workers=workers)
    assert sorted(tmp_path.iterdir()) == before


def alive(pid: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_killed_make_leaves_no_shards_and_no_workers(image_folder, tmp_path):
    code = (
        "import os, signal, sys, multiprocessing; from fdscale.data.shards import make\n"
        "def stop(done, total):\n"
        "    print(*[p.pid for p in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"make({str(image_folder)!r}, {str(tmp_path / 'out')!r}, samples_per_shard=1, workers=2, progress=stop)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert not (tmp_path / "out").exists()
    for pid in done.stdout.split():
        for _ in range(100):
            if not alive(pid):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"worker {pid} lives on")


def test_verify_names_images_that_cannot_be_decoded(tmp_path, photos, pack):
    png = io.BytesIO()
    Image.new("RGB", (5, 5)).save(png, "PNG")
    pack(
        tmp_path / "a.tar",
        {"a.jpg": photos[0], "b.jpg": photos[1][:-400], "c.jpg": b"<html>", "d.png": png.getvalue()},
    )
    index(tmp_path)
    assert verify(tmp_path) == []
    problems = verify(tmp_path, decode=True)
    assert [(problem.shard, problem.key) for problem in problems] == [("a.tar", "b"), ("a.tar", "c")]
    assert "truncated" in problems[0].reason
    assert str(problems[1]).startswith("a.tar: sample 'c': the 6 bytes are no JPEG")


def test_verify_counts_its_progress_and_needs_an_index(image_folder, tmp_path):
    seen = []
    make(image_folder, tmp_path / "out", samples_per_shard=12)
    assert verify(tmp_path / "out", workers=2, progress=lambda *p: seen.append(p)) == []
    assert seen == [(1, 2), (2, 2)]
    with pytest.raises(UserError, match="no index there"):
        verify(tmp_path / "out", str(tmp_path / "nowhere"))
