"""`fdscale tune` in an allocation of a real Slurm: its trials are steps of the job, started by srun, on both nodes."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from helpers import TINY, sets

from slurm.cluster import Cluster, missing
from slurm.jobs import Jobs

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
if missing():
    pytest.skip(f"no Slurm for tests here: {missing()}", allow_module_level=True)


def test_trials_are_steps_of_the_allocation(cluster: Cluster, jobs: Jobs, shards: Path) -> None:
    given = sets(*TINY, "optim.batch_size=16", "memory.micro_batch=1", f"data.shards={shards}")
    words = ["tune", "demo", "--out", "tuned", "--ranks", "2", "--trials", "2", "--steps", "3", "--ds", "zero3.json"]
    command = shlex.join([sys.executable, "-P", "-m", "fdscale.cli", *words, *given])
    size = ("--nodes=2", "--ntasks-per-node=1", "--output=tune.log", f"--chdir={jobs.folder}")
    told = cluster.run("sbatch", "--parsable", *size, f"--wrap=PYTHONPATH={jobs.source} {command}")
    job = told.strip()
    cluster.wait(job, "COMPLETED")
    rows = [json.loads(line) for line in (jobs.folder / "tuned" / "trials.jsonl").read_text().splitlines()[1:]]
    assert [row["state"] for row in rows][:2] == ["done", "done"], (jobs.folder / "tune.log").read_text()
    assert "what you have" in (jobs.folder / "tuned" / "table.md").read_text()
    assert (jobs.folder / "tuned" / "recipe.yaml").is_file()
