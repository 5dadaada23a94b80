"""Distil, fine-tune, evaluate: three jobs handed in at once on a real Slurm of two nodes, each after the one before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import TINY, sets
from test_finetune import FINETUNE, VIT
from test_resume import losses

from slurm.cluster import Cluster, missing
from slurm.jobs import Jobs

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
if missing():
    pytest.skip(f"no Slurm for tests here: {missing()}", allow_module_level=True)

DISTILL = (
    *TINY,
    "data.image_size=32",
    "teacher.args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "student.model=vit",
    f"student.args={{{VIT}}}",
    "schedule.steps=4",
)


def test_distil_fine_tune_evaluate(cluster: Cluster, jobs: Jobs, shards: Path, digits: Path) -> None:
    zero3, distilled, tuned = ("--ds", "zero3.json"), "chain/distilled", "chain/tuned"
    labelled = (f"data.shards={digits / 'train'}", f"data.heldout_shards={digits / 'heldout'}")
    tuning = sets(*FINETUNE, *labelled, "schedule.steps=4", f"student.weights={distilled}")
    first = jobs.hand_in("demo", distilled, *sets(*DISTILL, f"data.shards={shards}"), *zero3)
    second = jobs.hand_in("demo_finetune", tuned, "--verb", "finetune", *tuning, *zero3, "--after", first)
    third = jobs.hand_in("demo_finetune", tuned, "--verb", "evaluate", *tuning, "--after", second)
    assert [cluster.job(job)["Reason"] for job in (second, third)] == ["Dependency"] * 2
    for job in (first, second, third):
        cluster.wait(job, "COMPLETED")
        assert cluster.job(job)["Restarts"] == "0"

    run = jobs.folder / tuned
    assert max(losses(run)) == 4
    said = (run / "slurm" / f"job-{second}" / "rank-00000.log").read_text()
    assert "vit -> 10 classes" in said
    assert "random weights" not in said
    report = json.loads((run / "evaluation" / "step-00000004.json").read_text())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (report["samples"], report["top1"]) == (101, last["heldout_top1"])
    assert len(report["left_out"]) == 2
