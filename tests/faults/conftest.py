"""What the fault suite shares: the library that makes changes of files fail, warm starts, and the run left alone.

A short form runs with all tests; the long one with `make faults`, which tries every instant and writes its figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
    """What was tried and what came of it, by kind of fault, and how the tests ended."""

    def __init__(self) -> None:
        self.tried: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.lost_steps: dict[str, list[int]] = {}
        self.resume_s: list[dict[str, float]] = []
        self.tests: dict[str, Counter[str]] = {}

    @contextlib.contextmanager
    def trial(self, kind: str) -> Iterator[None]:
        """One more of a kind; failed unless the block comes to its end."""
        self.tried[kind] += 1
        self.failed[kind] += 1
        yield
        self.failed[kind] -= 1

    def resumed(self, output: str) -> None:
        """Take from what the ranks printed how long the last start needed to its first step."""
        parts = re.findall(r"^step \d+ after [\d.]+ s: (.*)$", output, re.MULTILINE)[-1].split(", ")
        self.resume_s.append({name: float(spent) for name, spent in (part.rsplit(" ", 1) for part in parts)})

    def write(self, path: Path) -> None:
        """As JSON: numbers by kind, how many trained steps a restart had to repeat, and the seconds it needed."""
        kinds = {
            kind: {
                "tried": count,
                "failed": self.failed[kind],
                "steps repeated, mean": round(statistics.mean(self.lost_steps.get(kind) or [0]), 2),
                "steps repeated, most": max(self.lost_steps.get(kind) or [0]),
            }
            for kind, count in self.tried.items()
        }
        seconds = {
            part: {"median": statistics.median(spent), "most": max(spent)}
            for part in {name: 0 for each in self.resume_s for name in each}
            if (spent := [each.get(part, 0.0) for each in self.resume_s])
        }
        found = {"kinds": kinds, "starts that went on": len(self.resume_s), "seconds to the first step": seconds}
        path.write_text(json.dumps({**found, "tests": self.tests}, indent=1) + "\n")


FOUND = Figures()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Every test of the suite by name, over its parameters."""
    if "/faults/" in report.nodeid and (report.when == "call" or report.skipped or report.failed):
        name = report.nodeid.rpartition("/")[2].partition("[")[0]
        FOUND.tests.setdefault(name, Counter())[report.outcome] += 1


def pytest_sessionfinish() -> None:
    if FIGURES:
        FOUND.write(Path(FIGURES))


@pytest.fixture(scope="session")
def figures() -> Figures:
    return FOUND


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
