"""What the fault suite shares: the library that makes changes of files fail, warm starts, and the run left alone.

A short form runs with all tests; the long one with `make faults`, which tries every instant and writes its figures.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.starts import Starts
from faults.zygote import Zygote

LONG = os.environ.get("FDSCALE_FAULTS") == "long"
FIGURES = os.environ.get("FDSCALE_FAULTS_FIGURES")  # file that gets them as JSON


class Figures:
    """What was tried and what came of it, by kind of fault."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.lost_steps: dict[str, list[int]] = {}

    def write(self, path: Path) -> None:
        """As JSON: numbers by kind, and how many trained steps a restart had to repeat."""
        kinds = {
            kind: {
                "tried": count,
                "failed": self.failed[kind],
                "steps repeated, mean": round(statistics.mean(self.lost_steps.get(kind) or [0]), 2),
                "steps repeated, most": max(self.lost_steps.get(kind) or [0]),
            }
            for kind, count in self.tried.items()
        }
        path.write_text(json.dumps(kinds, indent=1) + "\n")


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    found = Figures()
    yield found
    if FIGURES:
        found.write(Path(FIGURES))


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """shim.c, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the library that injects faults (Debian: apt-get install gcc)")
    out = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(__file__).parent / "shim.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", out, source], check=True)
    return out


@pytest.fixture(scope="session")
def zygote(shim: Path) -> Iterator[Zygote]:
    warm = Zygote(shim)
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def starts(zygote: Zygote, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Starts:
    return Starts(zygote, shards, tmp_path_factory.mktemp("faults"))
