"""What `pip install` gives: source distribution and wheel, used where there is no repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, TINY, outside, sets

pytestmark = [pytest.mark.slow]
UNPACKED = ("fdscale", "slurm", "ds_configs", "docs", "tests")


def call(words: list[str], cwd: Path, **more: str) -> str:
    """What a program prints; it has to end well."""
    environment = outside() | more
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package alone, from the wheel that was made from the source distribution."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    without = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for path in ROOT.iterdir():
        if path.is_file() and path.name[0] != ".":
            shutil.copy(path, source)
        elif path.name in UNPACKED:
            shutil.copytree(path, source / path.name, ignore=without)
    call([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)], source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {
        "README.md",
        "LICENSE",
        "mkdocs.yml",
        "docs/running.md",
        "slurm/README.md",
        "ds_configs/zero1.json",
    } <= names
    words = ["wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(archive)]
    call([sys.executable, "-m", "pip", *words], folder)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == "fdscale-0.1.0-py3-none-any.whl"
    zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(source)
    return folder / "site"


def fdscale(installed: Path, cwd: Path, *words: object) -> str:
    where = f"from fdscale import cli; assert cli.__file__.startswith({str(installed)!r}), cli.__file__"
    text = f"{where}; import sys; sys.exit(cli.main(sys.argv[1:]))"
    return call([sys.executable, "-P", "-c", text, *map(str, words)], cwd, PYTHONPATH=str(installed))


def test_it_distils_without_the_repository(installed: Path, shards: Path, tmp_path: Path) -> None:
    few = sets(*TINY, f"data.shards={shards}", "schedule.steps=2", "schedule.warmup_steps=0", "data.workers=0")
    fdscale(installed, tmp_path, "distill", "demo", "--run", "run", "--ds", "ds_configs/zero1.json", *few)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    fdscale(installed, tmp_path, "report", "run")
    assert (tmp_path / "run/report.html").stat().st_size > 10_000


def test_what_came_along_is_found(installed: Path, tmp_path: Path) -> None:
    for name in ("slurm", "ds_configs"):
        there = {path.name for path in (installed / "fdscale" / name).iterdir()}
        assert there == {path.name for path in (ROOT / name).iterdir()}
    assert "swinv2_g" in fdscale(installed, tmp_path, "recipes")
    plan = fdscale(installed, tmp_path, "plan", "clip_vit_base_300", "--ds", "zero2", "--gpu", "a100-40g", "--gpus", 8)
    assert "zero2" in plan
    job = fdscale(
        installed, tmp_path, "submit", "clip_vit_base_300", "--run", "runs/x", "--time", "1:00:00", "--dry-run",
        "--ds", "zero1", *sets("data.shards=/x", "teacher.weights=/y"),
    )  # fmt: skip
    assert "#SBATCH" in job
    assert not os.listdir(tmp_path)
