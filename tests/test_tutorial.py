"""Every command of the tutorials, run in a shell as it stands there, with the files that readers are told to save."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, outside
from PIL import Image
from safetensors.torch import load_file
from skimage import data

from fdscale.data.shards import make

DOCS = ROOT / "docs"


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if kind == language]


def commands(text: str) -> list[tuple[str, int]]:
    """(command, exit code that a comment after it announces) of the page, in order."""
    joined = "".join(blocks(text, "bash")).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip()]
    return [(line, int(code[1]) if (code := re.search(r"# exit code (\d+)", line)) else 0) for line in lines]


def follow(page: str, folder: Path) -> dict[str, str]:
    """Do what a page says in a folder, and see that it prints what the page shows; the output by command."""
    text = (DOCS / page).read_text()
    for block in blocks(text, "python"):  # the first line is the name under which it is to be saved
        (folder / block.splitlines()[0].removeprefix("# ")).write_text(block)
    programs = folder / "bin"
    programs.mkdir()
    for name, call in (("fdscale", "-m fdscale.cli"), ("python", ""), ("torchrun", "-m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {call} "$@"\n')
        (programs / name).chmod(0o755)
    environment = outside()
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    printed = {}
    for command, code in commands(text):
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
        printed[command] = done.stdout + done.stderr
    shown = " ".join(" ".join(printed.values()).split())
    for line in "".join(blocks(text, "")).splitlines():
        if not line.startswith("photos/"):
            assert " ".join(line.removesuffix("...").split()) in shown, line
    return printed


def photographs(folder: Path) -> None:
    for name in ("astronaut", "chelsea", "coffee"):
        (folder / "photos" / name).mkdir(parents=True)
        image = Image.fromarray(getattr(data, name)())
        for part in range(8):
            box = (20 * part, 15 * part, 20 * part + 240, 15 * part + (200 if part % 2 else 140))
            image.crop(box).save(folder / "photos" / name / f"{part}.jpg", quality=92)


@pytest.mark.slow
def test_from_photographs_to_a_resumed_run(tmp_path: Path) -> None:
    photographs(tmp_path)
    printed = follow("tutorial-data.md", tmp_path)
    log = (tmp_path / "runs" / "photos" / "samples-0.log").read_text().splitlines()
    rows = [line.split("\t") for line in log]
    assert [int(number) for number, _, _ in rows] == list(range(96))
    for epoch in (rows[first : first + 24] for first in range(0, 96, 24)):
        assert len({key for _, _, key in epoch}) == 24
    left_out = tmp_path / "shards" / "damaged" / "index" / "left-out.jsonl"
    assert all({"shard", "key", "reason"} == set(json.loads(line)) for line in left_out.read_text().splitlines())
    assert sum("no problems" in text for text in printed.values()) == 2


@pytest.mark.long
@pytest.mark.slow
def test_from_images_and_an_own_teacher_to_a_classifier(tmp_path: Path) -> None:
    printed = follow("tutorial-classifier.md", tmp_path)
    assert json.loads((tmp_path / "classifier.json").read_text())["top1"] > 0.85
    assert any(re.search(r"linear +[6-9]\d\.\d\d%", text) for text in printed.values())
    assert {path.name for path in (tmp_path / "diagnosis").iterdir()} >= {"diagnosis.json", "heads.png", "offsets.png"}
    assert (tmp_path / "digits.html").read_text().count("data:image/png") >= 2


@pytest.mark.slow
def test_a_backbone_of_ones_own(tmp_path: Path) -> None:
    photographs(tmp_path)
    make(tmp_path / "photos", tmp_path / "shards/photos", samples_per_shard=8)
    printed = follow("tutorial-backbone.md", tmp_path)
    weights = load_file(tmp_path / "mixer.safetensors")
    assert weights["layers.2.mix.weight"].shape == (32, 1, 5, 5)
    assert any("of 24 images" in text for text in printed.values())


@pytest.mark.slow
def test_a_run_that_moves(tmp_path: Path) -> None:
    photographs(tmp_path)
    make(tmp_path / "photos", tmp_path / "shards/photos", samples_per_shard=8)
    follow("tutorial-move.md", tmp_path)
    folder = tmp_path / "there/run"
    rows = [line.split("\t") for path in folder.glob("samples-*.log") for line in path.read_text().splitlines()]
    assert sorted(int(number) for number, _, _ in rows) == list(range(96))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 13))
