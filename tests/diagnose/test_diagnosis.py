"""`fdscale diagnose` on a run beside its teacher, on any number of ranks, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import run_cli, sets
from PIL import Image

from fdscale import cli

pytestmark = pytest.mark.slow

TEACHER = (
    "teacher.source=fdscale:vit",
    "teacher.feature=last",
    "teacher.args={img_size: 64, patch_size: 8, embed_dim: 48, depth: 3, num_heads: 2}",
    "teacher.resample=area",
)


@pytest.fixture(scope="module")
def student_of_a_vit(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher has attention, too."""
    run = tmp_path_factory.mktemp("diagnosed") / "run"
    settings = (
        "student.args={embed_dim: 16, depths: [2, 2], num_heads: [1, 2], window_size: 4, "
        "pretrained_window_sizes: [0, 0]}",
        f"data.shards={shards}", "data.image_size=64", "optim.batch_size=4", "memory.micro_batch=4", "schedule.steps=2",
        "schedule.warmup_steps=0", "teacher.weights=random", *TEACHER,
    )  # fmt: skip
    done = run_cli("distill", "demo", "--run", run, *sets(*settings))
    assert done.returncode == 0, done.stderr
    return run


def test_a_student_beside_its_teacher(student_of_a_vit: Path, shards: Path, tmp_path: Path) -> None:
    """The same numbers on one rank and on two; images that fill up the last micro-batch do not count."""
    found = {}
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        words = sets(f"data.heldout_shards={shards}", "memory.micro_batch=4", "teacher.weights=random")
        done = run_cli(
            "diagnose", student_of_a_vit, "--compare", "teacher", "--images", 7, "--out", out, *words, ranks=ranks
        )
        assert done.returncode == 0, done.stderr
        assert "teacher (ViT)" in done.stdout
        assert {path.name for path in out.iterdir()} == {"diagnosis.json", "heads.png", "offsets.png"}
        for name in ("heads.png", "offsets.png"):
            assert min(Image.open(out / name).size) > 300
        found[ranks] = json.loads((out / "diagnosis.json").read_text())
    student, teacher = found[1]["subjects"]
    assert (student["network"], teacher["network"]) == ("SwinV2", "ViT")
    assert (len(student["blocks"]), len(teacher["blocks"])) == (4, 3)
    assert student["images"] == teacher["images"] == 7
    assert student["blocks"][0]["window"] == [4, 4]
    assert teacher["blocks"][0]["window"] == [8, 8]
    for one in (student, teacher):
        for block in one["blocks"]:
            assert all(0 < distance < 64 for distance in block["distance_px"])
    assert max(student["blocks"][0]["distance_px"]) < 4 * 4 * 2**0.5  # within a window
    assert found[1]["cka_of_mean_tokens"][0][0] == pytest.approx(1)
    for one, other in zip(found[1]["subjects"], found[2]["subjects"], strict=True):
        assert one["features"]["raw"]["mean"] == pytest.approx(other["features"]["raw"]["mean"], abs=1e-5)
        for a, b in zip(one["blocks"], other["blocks"], strict=True):
            assert a["distance_px"] == pytest.approx(b["distance_px"], rel=1e-4)
            assert a["diagonality"] == pytest.approx(b["diagonality"], abs=1e-3)


def test_a_network_without_attention_has_features_alone(
    tiny: Callable[..., list[str]], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo's teacher is a convolutional network."""
    words = sets("teacher.weights=random", f"data.heldout_shards={shards}", "data.image_size=64")
    out = tmp_path / "out"
    assert cli.main(["diagnose", "demo", "--teacher", "--images", "3", "--out", str(out), *words]) == 0
    assert "has no attention to look at" in capsys.readouterr().out
    report = json.loads((out / "diagnosis.json").read_text())
    assert report["subjects"][0]["blocks"] == []
    assert report["subjects"][0]["features"]["whitened"]["effective_rank"] > 1
    for words, says in (
        (["demo", "--teacher", "other", "--out", str(out)], "the recipe has no teacher 'other'"),
        (["demo", "--out", str(out)], "say whose weights"),
        (["demo", "--teacher", "--images", "0", "--out", str(out)], "--images must be at least 1"),
        (["demo", "--teacher", "--out", str(out), "--set", "teacher.weights=random"], "data.heldout_shards is not set"),
    ):
        assert cli.main(["diagnose", *words]) == 2
        assert says in capsys.readouterr().err
