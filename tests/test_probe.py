"""`fdscale probe` on digits: a student, its teacher, any number of ranks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import TINY, run_cli, sets
from test_finetune import VIT

from fdscale import UserError, dist
from fdscale.probe import measure

pytestmark = pytest.mark.slow
OWN = (
    *TINY,
    "student.model=vit",
    f"student.args={{{VIT}}}",
    "data.image_size=32",
    "teacher.args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "memory.micro_batch=8",
)


@pytest.fixture(scope="module")
def student(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("probe") / "run"
    done = run_cli("distill", "demo", "--run", run, *sets(*OWN, f"data.shards={shards}", "schedule.steps=4"))
    assert done.returncode == 0, done.stderr
    return run


def test_a_student_on_any_number_of_ranks(student: Path, digits: Path, tmp_path: Path) -> None:
    sides = sets(f"data.shards={digits / 'train'}", f"data.heldout_shards={digits / 'heldout'}")
    found = {}
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        done = run_cli("probe", student, *sides, "--epochs", "30", "--out", out, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found[ranks] = json.loads(out.read_text())
    report = found[2]
    assert (report["training_images"], report["test_images"], report["classes"]) == (1200, 101, 10)
    assert report["knn"] == found[1]["knn"]
    assert report["few-shot"] == found[1]["few-shot"]
    assert report["linear"]["top1"] == pytest.approx(found[1]["linear"]["top1"], abs=0.02)
    assert report["knn"]["10"] > 0.3  # chance is 0.1
    assert report["linear"]["top1"] > 0.3
    assert [one["rate"] for one in report["linear"]["rates"]] == [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
    assert "knn       " in done.stdout


def test_a_teacher_and_what_is_refused(digits: Path) -> None:
    dist.init()
    own = [*OWN, f"data.shards={digits / 'train'}", f"data.heldout_shards={digits / 'heldout'}"]
    report = measure("demo", None, None, own, "", "cls", ["knn"], 1)
    assert set(report["knn"]) == {"10", "20", "100", "200"}
    assert report["of"] == "timm:vit_tiny_patch16_224.augreg_in21k"
    assert "linear" not in report
    with pytest.raises(UserError, match="--teacher is the recipe's own: leave out --run and --weights"):
        measure("demo", None, "no.safetensors", own, "", "cls", ["knn"], 1)
    for overrides, teacher, pool, message in (
        ([*OWN], "", "mean", "needs two labelled sets"),
        (own, "dino", "mean", "the recipe has no teacher dino: it has one without a name"),
        ([*own, "teacher.source=timm:tf_efficientnet_lite0", "teacher.args={}"], "", "cls", "has no class token"),
    ):
        with pytest.raises(UserError, match=message):
            measure("demo", None, None, overrides, teacher, pool, ["knn"], 1)
