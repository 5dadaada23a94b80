"""Runs as jobs of a `Cluster`: tiny distillations at ZeRO 3, one rank on each node, and the same ones left alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import ROOT, TINY, outside, run_cli, sets
from test_resume import losses, samples, tensors

from fdscale import starts
from fdscale.engine.initialize import prepare_environment
from slurm.cluster import Cluster, wait_for

STEPS = 48
SETTINGS = (
    *TINY,
    "teacher.source=python:patient:Patient",
    "teacher.weights=own",
    "teacher.args={}",
    f"schedule.steps={STEPS}",
    "save.every=2",
)


class Jobs:
    """Submits runs below a folder, from a copy of the source that may be changed."""

    def __init__(self, cluster: Cluster, shards: Path, folder: Path):
        self.cluster, self.folder, self.source = cluster, folder, folder / "source"
        self._shards = shards
        cluster.watched.append(folder)
        prepare_environment()  # where the ops are that earlier tests compiled: the jobs use them too
        (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
        for part in ("fdscale", "slurm"):
            shutil.copytree(ROOT / part, self.source / part, ignore=shutil.ignore_patterns("__pycache__"))

    def submit(self, run: str, *more: str, options: Sequence[str] = (), nodes: int = 2, **env: str) -> str:
        """`fdscale submit`; the job's id."""
        return self.hand_in("demo", run, *self._settings(*more), *options, nodes=nodes, **self._teacher(run), **env)

    def hand_in(self, recipe: str, run: str, *words: str, nodes: int = 2, **env: str) -> str:
        """`fdscale submit` of any recipe, with these words; the job's id."""
        size = ["--nodes", str(nodes), "--gpus-per-node", "0", "--time", "60"]
        local = {"PYTHONPATH": str(self.source), "FDSCALE_LOCAL": str(self.folder / "local")}
        environment = {**outside(), **self.cluster.environment, **local, **env}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fdscale.cli", "submit", recipe, "--run", run, *size, *words],
            env=environment, cwd=self.folder, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return re.search(r"submitted job (\d+)", done.stdout).group(1)

    def leave_alone(self, run: str, ranks: int = 2) -> None:
        """The same run outside Slurm, with nothing happening to it."""
        self.let_go(run)
        words = ["distill", "demo", "--run", self.folder / run, *self._settings()]
        done = run_cli(*words, ranks=ranks, env=self._teacher(run, ROOT))
        assert done.returncode == 0, done.stderr

    def _settings(self, *more: str) -> list[str]:
        return [*sets(*SETTINGS, f"data.shards={self._shards}", *more), "--ds", str(self.folder / "zero3.json")]

    def _teacher(self, run: str, source: Path | None = None) -> dict[str, str]:
        return {
            "PYTHONPATH": f"{source or self.source}:{ROOT / 'tests'}:{ROOT / 'tests' / 'slurm'}",
            "LET_GO": str(self.folder / f"{run}-may-go"),
        }

    def let_go(self, run: str) -> None:
        """The teacher no longer takes its time."""
        (self.folder / f"{run}-may-go").touch()

    def log(self, run: str, job: str) -> str:
        """What the job script said, over all restarts."""
        return (self.folder / run / "slurm" / f"job-{job}.log").read_text()

    def step(self, run: str) -> int:
        """The last step that was logged."""
        path = self.folder / run / "metrics.jsonl"
        return max(losses(self.folder / run), default=0) if path.exists() else 0

    def saved(self, run: str) -> int:
        """The newest committed checkpoint's step."""
        path = self.folder / run / "checkpoints" / "latest"
        return int(path.read_text().strip()[5:]) if path.exists() else 0

    def starts(self, run: str) -> list[dict[str, Any]]:
        """The records of a run's starts."""
        return [starts.read(starts.path_of(self.folder / run, n)) for n in starts.numbers(self.folder / run)]

    def train_on(self, *runs: str) -> None:
        """Wait until each of these has done two more steps, and a newer checkpoint is committed."""
        before = {run: (self.step(run), self.saved(run)) for run in runs}
        wait_for(
            lambda: all(
                self.step(run) >= step + 2 and self.saved(run) > saved for run, (step, saved) in before.items()
            ),
            self.cluster.report,
        )

    def assert_same(self, one: str, other: str, ranks: int = 2) -> None:
        """Bitwise equality of two finished runs."""
        a, b = self.folder / one, self.folder / other
        assert losses(a) == losses(b)
        assert sorted(losses(a)) == list(range(1, STEPS + 1))
        assert samples(a, ranks) == samples(b, ranks)
        mine, others = tensors(a, STEPS, ranks), tensors(b, STEPS, ranks)
        assert mine
        assert mine.keys() == others.keys()
        for name in mine:
            assert torch.equal(mine[name], others[name]), name
