"""`fdscale shards` as a person and a script meet it: exit codes, JSON, tables, one line for every mistake, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import outside
from PIL import Image

from fdscale import cli


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photographs in two class folders."""
    for i in range(12):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return tmp_path / "photos"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `fdscale shards`."""
    code = cli.main(["shards", *(str(word) for word in words), "--workers", "1"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, object]:
    code, out, _ = run(capsys, *words, "--json")
    return code, json.loads(out)


def test_make_stats_reshard(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, about = run_json(capsys, "make", photos, out, "--samples-per-shard", 5, "--resize", 20)
    assert (code, about["samples"], about["shards"], about["left_out"]) == (0, 12, 3, 0)
    code, found = run_json(capsys, "stats", out)
    assert (code, found["samples"], found["sampled"]["short_side"]["max"]) == (0, 12, 20)
    code, text, _ = run(capsys, "stats", out)
    assert code == 0
    for expected in ("samples            12", "12 .cls, 12 .jpg", "12 JPEG RGB", "2 seen, 2 are named", "short side"):
        assert expected in text
    code, again = run_json(capsys, "reshard", out, tmp_path / "again", "--shard-mib", "1", "--shuffle", "--seed", 3)
    assert (code, again["samples"], again["shards"]) == (0, 12, 1)
    with tarfile.open(tmp_path / "again" / "shard-000000.tar") as tar:
        assert len(tar.getnames()) == 24
    code, text, _ = run(capsys, "make", photos, tmp_path / "plain", "--keep-order", "--index", tmp_path / "elsewhere")
    assert code == 0
    assert f"index: {tmp_path / 'elsewhere'}" in text
    with tarfile.open(tmp_path / "plain" / "shard-000000.tar") as tar:
        assert [name for name in tar.getnames() if name.endswith(".jpg")] == sorted(
            f"{path.parent.name}/{path.name}" for path in photos.rglob("*.jpg")
        )


def test_a_folder_without_its_labels(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "make", photos, tmp_path / "out", "--label", "none")[0] == 0
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        names = tar.getnames()
    assert sorted(names) == sorted(f"{path.parent.name}/{path.name}" for path in photos.rglob("*.jpg"))
    assert not (tmp_path / "out/classes.json").exists()


def test_damage_from_first_error_to_a_usable_index(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(capsys, "make", photos, out, "--samples-per-shard", 4)[0] == 0
    shard = out / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[: -4096 - 9000])
    code, text, _ = run(capsys, "verify", out)
    assert code == 2
    assert "shard-000001.tar: truncated" in text
    code, _, error = run(capsys, "index", out)
    assert code == 2
    assert "--skip-damaged" in error
    code, text, error = run(capsys, "index", out, "--skip-damaged")
    assert code == 0
    assert "left out: shard-000001.tar: " in error
    assert "the rest of 1 damaged shards; they are listed in" in text
    assert str(out / "index" / "left-out.jsonl") in text
    code, about = run_json(capsys, "index", out, "--skip-damaged")
    assert (code, about["damaged_shards"]) == (0, 1)
    assert 8 < about["samples"] + about["left_out"] < 12
    code, problems = run_json(capsys, "verify", out, "--decode")
    assert code == 0  # all that is wrong is left out of the index
    assert {problem["shard"] for problem in problems} == {"shard-000001.tar"}
    assert all(problem["left_out"] for problem in problems)
    code, text, _ = run(capsys, "stats", out)
    assert "the rest of 1 damaged shards" in text


def test_broken_images_from_first_error_to_shards(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = photos / "cat" / "02.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    code, _, error = run(capsys, "make", photos, tmp_path / "out")
    assert (code, error.count("\n")) == (2, 1)
    assert f"{victim}: the image cannot be decoded" in error
    assert "--skip-damaged" in error
    assert not (tmp_path / "out").exists()
    code, text, error = run(capsys, "make", photos, tmp_path / "out", "--skip-damaged")
    assert code == 0
    assert "11 samples" in text
    assert "left out: 1 samples; they are listed in" in text
    assert f"left out: {victim}: sample 'cat/02'" in error


def test_counts_of_others(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(capsys, "make", photos, out)[0] == 0
    (tmp_path / "wids.json").write_text(json.dumps({"shardlist": [{"url": "shard-000000.tar", "nsamples": 13}]}))
    for verb in ("index", "verify"):
        code, text, error = run(capsys, verb, out, "--counts", tmp_path / "wids.json")
        assert code == 2
        assert "holds 12 samples" in text + error
        assert "says 13" in text + error
    assert run(capsys, "index", out, "--trust-idx")[0] == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("make", "/nowhere", "out"), "/nowhere: neither a folder nor a table"),
        (("make", "PHOTOS", "OUT", "--resize", "0"), "--resize is 0"),
        (("make", "PHOTOS", "OUT", "--quality", "100"), "--quality is 100"),
        (("make", "PHOTOS", "OUT", "--shard-mib", "1e-9"), "max_bytes is 0"),
        (("make", "PHOTOS", "OUT", "--shard-mib", "1", "--samples-per-shard", "2"), "not both"),
        (("make", "PHOTOS", "OUT", "--split", "train"), "has no split train"),
        (("make", "PHOTOS", "PHOTOS"), "exists already"),
        (("make", "PHOTOS", "OUT", "--image", "path", "--key", "k"), "no table, so --image path and --key k"),
        (("make", "PHOTOS", "OUT", "--label", "kind"), "no table, so --label kind"),
        (("index", "/nowhere/*.tar"), "no shards found"),
        (("verify", "PHOTOS"), "no shards found"),
        (("stats", "/nowhere.tar"), "do not exist"),
        (("reshard", "/nowhere.tar", "OUT"), "do not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: str
) -> None:
    places = {"PHOTOS": str(photos), "OUT": str(tmp_path / "out")}
    code, text, error = run(capsys, *(places.get(word, word) for word in words))
    assert (code, text, error.count("\n")) == (2, "", 1)
    assert expected in error
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """While a set is being packed, as a terminal does it: the signal goes to the whole group."""
    (tmp_path / "photos").mkdir()
    data = picture(0, (800, 600))
    for i in range(300):
        (tmp_path / "photos" / f"{i:03d}.jpg").write_bytes(data)
    command = [sys.executable, "-m", "fdscale.cli", "shards", "make", tmp_path / "photos", tmp_path / "out"]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2", "--resize", "300", "--samples-per-shard", "10"],
        env=outside(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(tmp_path.glob(".out.*.part/shard-000001.tar")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "fdscale: interrupted" in error
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
