"""Every command of docs/tutorial-data.md, run in a shell as it stands there, on small photographs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, outside
from PIL import Image
from skimage import data

PAGE = ROOT / "docs" / "tutorial-data.md"


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if kind == language]


def commands(text: str) -> list[tuple[str, int]]:
    """(command, exit code that a comment after it announces) of the page, in order."""
    joined = "".join(blocks(text, "bash")).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip()]
    return [(line, int(code[1]) if (code := re.search(r"# exit code (\d+)", line)) else 0) for line in lines]


@pytest.mark.slow
def test_every_command_of_the_tutorial(tmp_path: Path) -> None:
    for name in ("astronaut", "chelsea", "coffee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        image = Image.fromarray(getattr(data, name)())
        for part in range(8):
            box = (20 * part, 15 * part, 20 * part + 240, 15 * part + (200 if part % 2 else 140))
            image.crop(box).save(tmp_path / "photos" / name / f"{part}.jpg", quality=92)
    shim = tmp_path / "bin" / "fdscale"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m fdscale.cli "$@"\n')
    shim.chmod(0o755)
    environment = outside()
    environment["PATH"] = f"{shim.parent}:{environment['PATH']}"
    printed = {}
    for command, code in commands(PAGE.read_text()):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
        printed[command] = done.stdout + done.stderr
    shown = " ".join(" ".join(printed.values()).split())
    for line in "".join(blocks(PAGE.read_text(), "")).splitlines():
        if not line.startswith("photos/"):
            assert " ".join(line.removesuffix("...").split()) in shown, line
    log = (tmp_path / "runs" / "photos" / "samples-0.log").read_text().splitlines()
    rows = [line.split("\t") for line in log]
    assert [int(number) for number, _, _ in rows] == list(range(96))
    for epoch in (rows[first : first + 24] for first in range(0, 96, 24)):
        assert len({key for _, _, key in epoch}) == 24
    left_out = tmp_path / "shards" / "damaged" / "index" / "left-out.jsonl"
    assert all({"shard", "key", "reason"} == set(json.loads(line)) for line in left_out.read_text().splitlines())
    assert sum("no problems" in text for text in printed.values()) == 2
