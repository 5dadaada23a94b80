"""The shipped job scripts and `fdscale submit` on a real Slurm of two nodes: limits, lost nodes, arrays, dependencies.

Runs are tiny distillations at ZeRO 3, one rank on each node, compared with one that nothing happened to.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, sets
from test_resume import losses, samples, tensors
from torch.utils import cpp_extension

from slurm.cluster import Cluster, missing, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
if missing():
    pytest.skip(f"no Slurm for tests here: {missing()}", allow_module_level=True)

STEPS, RANKS = 48, 2
SETTINGS = (
    *TINY,
    "teacher.source=python:patient:Patient",
    "teacher.weights=own",
    "teacher.args={}",
    f"schedule.steps={STEPS}",
    "save.every=4",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Jobs:
    """Submits runs below a folder, from a copy of the source that may be changed."""

    def __init__(self, cluster: Cluster, shards: Path, folder: Path):
        self.cluster, self.folder, self.source = cluster, folder, folder / "source"
        self._shards = shards
        (folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
        for part in ("fdscale", "slurm"):
            shutil.copytree(ROOT / part, self.source / part, ignore=shutil.ignore_patterns("__pycache__"))

    def submit(self, run: str, *more: str, options: Sequence[str] = (), nodes: int = RANKS, **env: str) -> str:
        """`fdscale submit`; the job's id."""
        words = ["submit", "demo", "--run", run, "--nodes", str(nodes), "--gpus-per-node", "0", "--time", "60"]
        words += [*sets(*SETTINGS, f"data.shards={self._shards}", *more), "--ds", "zero3.json", *options]
        outside = {key: value for key, value in self.cluster.environment.items() if key not in ("RANK", "WORLD_SIZE")}
        built = Path(cpp_extension._get_build_directory("any", False)).parent  # by earlier tests
        environment = {
            **outside,
            "PYTHONPATH": f"{self.source}:{ROOT / 'tests'}:{ROOT / 'tests' / 'slurm'}",
            "TORCH_EXTENSIONS_DIR": str(built),
            "FDSCALE_LOCAL": str(self.folder / "local"),
            "LET_GO": str(self.folder / f"{run}-may-go"),
            **env,
        }
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fdscale.cli", *words],
            env=environment, cwd=self.folder, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return re.search(r"submitted job (\d+)", done.stdout).group(1)

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

    def train_on(self, run: str, steps: int = 3) -> None:
        """Wait until so many more steps are done, and a newer checkpoint is committed."""
        step, saved = self.step(run), self.saved(run)
        wait_for(lambda: self.step(run) >= step + steps and self.saved(run) > saved, lambda: self.all_logs(run))

    def all_logs(self, run: str) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in (self.folder / run).rglob("*.log"))


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, shards, tmp_path_factory.mktemp("jobs"))


def test_a_run_survives_the_cluster(cluster: Cluster, jobs: Jobs) -> None:
    """Time limit, a lost node, the lost first node, scancel: in the end equal to the last bit to a run left alone."""
    jobs.let_go("whole")
    whole = jobs.submit("whole")
    run = "run"
    warning = ("--after", whole, "--sbatch", "--signal=B:USR1@600")
    job = jobs.submit(run, options=warning)
    assert cluster.job(job)["Reason"] == "Dependency"
    shutil.rmtree(jobs.source)  # edits after submitting, at the worst: the jobs have their own copy
    cluster.wait(whole, "COMPLETED")

    jobs.train_on(run)
    assert cluster.job(job)["TimeLimit"] == "01:00:00"
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=9")  # less than 600 s are left
    cluster.wait(job, "PENDING", restarts=1)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert jobs.saved(run) == jobs.step(run) < STEPS, "the step at which it stopped is saved"
    assert "USR1: saving, then stopping" in jobs.log(run, job)
    assert "the ranks ended with codes 75 " in jobs.log(run, job)
    cluster.wait(job, "RUNNING", restarts=1)

    jobs.train_on(run)
    cluster.kill_node(2)
    cluster.wait(job, "PENDING", restarts=2)
    cluster.start_node(2)
    cluster.wait(job, "RUNNING", restarts=2)
    jobs.train_on(run)
    cluster.kill_node(1)  # with the job script
    cluster.wait(job, "PENDING", restarts=3)
    cluster.start_node(1)
    cluster.wait(job, "RUNNING", restarts=3)
    jobs.train_on(run)

    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED")
    assert cluster.job(job)["Restarts"] == "3"
    assert jobs.saved(run) == jobs.step(run) < STEPS
    assert "stopped from outside, and not requeued from here" in jobs.log(run, job)

    shutil.copytree(ROOT / "fdscale", jobs.source / "fdscale")
    shutil.copytree(ROOT / "slurm", jobs.source / "slurm")
    jobs.let_go(run)
    last = jobs.submit(run)
    cluster.wait(last, "COMPLETED")
    assert_same(jobs.folder / "whole", jobs.folder / run)
    starts = [json.loads(path.read_text()) for path in sorted((jobs.folder / run / "starts").iterdir())]
    assert [start.get("from_step") == 0 for start in starts] == [True, False, False, False, False]
    assert {Path(start["command"][0]) for start in starts} == {
        jobs.folder / run / "slurm" / f"submit-{number:03d}" / "fdscale" / "cli.py" for number in (1, 2)
    }


def assert_same(one: Path, other: Path) -> None:
    """Bitwise equality of two finished runs."""
    assert losses(one) == losses(other)
    assert sorted(losses(one)) == list(range(1, STEPS + 1))
    assert samples(one, RANKS) == samples(other, RANKS)
    a, b = tensors(one, STEPS, RANKS), tensors(other, STEPS, RANKS)
    assert a
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_an_array_and_what_is_not_worth_another_start(cluster: Cluster, jobs: Jobs) -> None:
    """One line of an array is done, one breaks at every start, one has a mistake; what depends on all never starts."""
    (jobs.folder / "lines").write_text(
        "data.seed=1 schedule.steps=4\nteacher.source=python:patient:Broken\nteacher.source=python:patient:Absent\n"
    )
    run = "an array"  # spaces are for trouble
    jobs.let_go(run)
    array = jobs.submit(run, options=("--array", "lines"), nodes=1, FDSCALE_FRUITLESS_RESTARTS="1")
    never = jobs.submit("never", options=("--after", array))
    tasks = [f"{array}_{number}" for number in range(3)]
    for task in tasks:
        cluster.wait(task, "COMPLETED", "FAILED")
    assert [cluster.job(task)["JobState"] for task in tasks] == ["COMPLETED", "FAILED", "FAILED"]
    assert [cluster.job(task)["Restarts"] for task in tasks] == ["0", "1", "0"]
    assert [cluster.job(task)["ExitCode"] for task in tasks] == ["0:0", "1:0", "2:0"]
    assert "seed: 1" in (jobs.folder / run / "0/config.yaml").read_text()
    assert max(losses(jobs.folder / run / "0")) == 4
    log = (jobs.folder / run / "slurm" / f"job-{tasks[1]}.log").read_text()
    assert "gave up: 1 restarts in a row made no checkpoint newer than none" in log
    rank = jobs.folder / run / "1/slurm" / f"job-{tasks[1]}" / "rank-00000.log"
    assert rank.read_text().count("AssertionError: broken on purpose") == 2, "the log of the first start is kept"
    cluster.wait(never, "CANCELLED")
    assert not (jobs.folder / "never/starts").exists()
