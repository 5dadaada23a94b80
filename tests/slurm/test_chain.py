"""Distil, fine-tune, evaluate: three jobs handed in at once on a real Slurm of two nodes, each after the one before."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY, sets
from test_finetune import FINETUNE, VIT
from test_resume import losses

from slurm.cluster import Cluster, missing

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
if missing():
    pytest.skip(f"no Slurm for tests here: {missing()}", allow_module_level=True)

from slurm.test_slurm import Jobs, cluster, jobs  # noqa: E402, F401 - the fixtures

DISTILL = (
    *TINY,
    "data.image_size=32",
    "teacher.args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "student.model=vit",
    f"student.args={{{VIT}}}",
    "schedule.steps=4",
)


def submit(jobs: Jobs, verb: str, recipe: str, run: str, *settings: str, options: tuple[str, ...] = ()) -> str:  # noqa: F811
    """`fdscale submit --verb` on two nodes; the job's id."""
    words = ["submit", recipe, "--verb", verb, "--run", run, "--nodes", "2", "--gpus-per-node", "0", "--time", "60"]
    outside = {key: value for key, value in jobs.cluster.environment.items() if key not in ("RANK", "WORLD_SIZE")}
    environment = outside | {"PYTHONPATH": str(ROOT), "FDSCALE_LOCAL": str(jobs.folder / "local")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fdscale.cli", *words, *sets(*settings), *options],
        env=environment, cwd=jobs.folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return re.search(r"submitted job (\d+)", done.stdout).group(1)


def test_distil_fine_tune_evaluate(cluster: Cluster, jobs: Jobs, shards: Path, digits: Path) -> None:  # noqa: F811
    zero3 = ("--ds", "zero3.json")
    first = submit(jobs, "distill", "demo", "chain/distilled", *DISTILL, f"data.shards={shards}", options=zero3)
    labelled = (f"data.shards={digits / 'train'}", f"data.heldout_shards={digits / 'heldout'}")
    tuning = (*FINETUNE, *labelled, "schedule.steps=4", "student.weights=chain/distilled")
    second = submit(jobs, "finetune", "demo_finetune", "chain/tuned", *tuning, options=(*zero3, "--after", first))
    third = submit(jobs, "evaluate", "demo_finetune", "chain/tuned", *tuning, options=("--after", second))
    assert [cluster.job(job)["Reason"] for job in (second, third)] == ["Dependency"] * 2
    for job in (first, second, third):
        cluster.wait(job, "COMPLETED")
        assert cluster.job(job)["Restarts"] == "0"

    tuned = jobs.folder / "chain" / "tuned"
    assert max(losses(tuned)) == 4
    assert "random weights" not in jobs.log("chain/tuned", second) + jobs.all_logs("chain/tuned")
    report = json.loads((tuned / "evaluation" / "step-00000004.json").read_text())
    last = json.loads((tuned / "metrics.jsonl").read_text().splitlines()[-1])
    assert (report["samples"], report["top1"]) == (101, last["heldout_top1"])
    assert len(report["left_out"]) == 2
