"""`fdscale diagnose` on a run beside its teacher, on any number of ranks, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import run_cli, sets
from PIL import Image

from fdscale import cli, dist, landscapes, student

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
        pictures = {"heads.png", "offsets.png", "average.png", "blocks.png", "features.jpg"}
        assert {path.name for path in out.iterdir()} == {"diagnosis.json", "maps.npz", *pictures}
        for name in pictures:
            assert min(Image.open(out / name).size) > 300
        maps = np.load(out / "maps.npz")
        assert maps["teacher/average/2"].shape == (64, 64)
        assert maps["student/offsets/3"].shape == (7, 7)
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
    blocks = np.array(found[1]["cka_of_blocks"])
    assert blocks.shape == (7, 7)
    assert np.allclose(blocks, np.array(found[2]["cka_of_blocks"]), atol=1e-3)
    assert np.allclose(blocks.diagonal(), 1)
    assert np.allclose(blocks, blocks.T)
    assert ((blocks >= 0) & (blocks <= 1 + 1e-9)).all()
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
        (["demo", "--teacher", "--weights", "no.safetensors"], "--teacher is the recipe's own"),
        (
            ["demo", "--teacher", "other", "--out", str(out)],
            "the recipe has no teacher other: it has one without a name",
        ),
        (["demo", "--out", str(out)], "say whose weights"),
        (["demo", "--teacher", "--images", "0", "--out", str(out)], "--images must be at least 1"),
        (["demo", "--teacher", "--out", str(out), "--set", "teacher.weights=random"], "data.heldout_shards is not set"),
    ):
        assert cli.main(["diagnose", *words]) == 2
        assert says in capsys.readouterr().err


def test_several_teachers_are_compared_by_name(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"source": "timm:vit_tiny_patch16_224", "weights": "random", "feature": "last", "resample": "area"}
    tiny["args"] = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    data = {"image_size": 64, "heldout_shards": str(shards)}
    tree = {"teachers": {"dino": tiny, "clip": tiny}, "data": data, "schedule": {"steps": 1}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(tree))
    words = [
        "diagnose",
        str(tmp_path / "two.yaml"),
        "--images",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--teacher",
        "dino",
    ]
    for compare, names in (("teacher:clip", ["dino", "clip"]), ("teacher", ["dino", "clip", "dino (2)"])):
        assert cli.main([*words, "--compare", compare]) == 0
        report = json.loads((tmp_path / "out/diagnosis.json").read_text())
        assert [subject["name"] for subject in report["subjects"]] == [f"teacher {name}" for name in names]
    assert cli.main([*words, "--compare", "teacher:sam"]) == 2
    assert "the recipe has no teacher sam: it has clip, dino" in capsys.readouterr().err


@pytest.fixture(scope="module")
def classifier(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of digits after some steps."""
    run = tmp_path_factory.mktemp("landscape") / "run"
    settings = (
        "student.model=vit",
        "student.args={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 1, position: absolute}",
        f"data.shards={digits / 'train'}", f"data.heldout_shards={digits / 'heldout'}", "data.image_size=32",
        "optim.batch_size=32", "memory.micro_batch=32", "schedule.epochs=1", "schedule.warmup_epochs=0.2",
        "classify.head_scale=1.0", "log.heldout_every=1000",
    )  # fmt: skip
    done = run_cli("finetune", "demo_finetune", "--run", run, *sets(*settings))
    assert done.returncode == 0, done.stderr
    return run


def test_around_the_weights_of_a_classifier(classifier: Path, tmp_path: Path) -> None:
    """The middle is what `evaluate` finds; two ranks find what one does; a plane's row is a line."""
    found = {}
    for ranks, words in ((1, ()), (2, ()), (1, ("plane", "--seeds", 1))):
        out = tmp_path / f"out{len(found)}"
        how = (*(words or ("line", "--seeds", 2)), "--points", 3, "--reach", 0.5)
        done = run_cli(
            "diagnose", classifier, "--landscape", *how, "--images", 60, "--out", out,
            "--compare", classifier, ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "largest eigenvalue" in done.stdout
        assert min(Image.open(out / "landscape.png").size) > 300
        around = json.loads((out / "diagnosis.json").read_text())["landscapes"]
        assert list(around) == ["student", "run"]
        assert around["run"] == around["student"]
        found[len(found)] = around["run"]
    line, shared, plane = found.values()
    assert line["multiples"] == [-0.5, 0.0, 0.5]
    report = tmp_path / "evaluation.json"
    words = sets("data.heldout_samples=60")
    assert run_cli("evaluate", classifier, "--out", report, *words).returncode == 0
    whole = json.loads(report.read_text())
    for seed in range(2):
        assert line["loss"][seed][1] == pytest.approx(whole["loss"], rel=1e-6)
        assert line["top1"][seed][1] == pytest.approx(whole["top1"])
        assert line["loss"][seed][0] != line["loss"][1 - seed][0]
        assert shared["loss"][seed] == pytest.approx(line["loss"][seed], rel=1e-5)
    assert shared["sharpness"] == pytest.approx(line["sharpness"], rel=1e-2)
    assert line["sharpness"] > 0
    assert [row[1] for row in plane["loss"][0]] == pytest.approx(line["loss"][0], rel=1e-5)


def test_sharpness_is_of_the_loss_of_images_that_can_be_read(classifier: Path, monkeypatch) -> None:
    """Two of 103 are broken: the parts of the loss whose curvature is measured sum up to the loss in the middle."""
    parts = {}

    def kept(network, losses, seed):
        parts["loss"] = sum(part.item() for part in losses())
        return 0.0, 0.0

    monkeypatch.setattr(landscapes, "sharpness", kept)
    dist.init()
    settings, checkpoint = student.find(str(classifier), None, None, [])
    found = landscapes.around(settings, checkpoint, 103, landscapes.Wanted("line", 3, 0.5, 1))
    assert found["images"] == 101
    assert parts["loss"] == pytest.approx(found["loss"][0][1], rel=1e-5)


def test_landscapes_that_cannot_be(classifier: Path, student_of_a_vit: Path, shards: Path, capsys, monkeypatch) -> None:
    for words, says in (
        ((classifier, "--points", 4), "--points must be odd"),
        ((classifier, "--reach", 0), "--reach and --seeds must be positive"),
        ((classifier, "--compare", student_of_a_vit), "is no classifier of images"),
        ((student_of_a_vit, *sets(f"data.heldout_shards={shards}")), "is no classifier of images"),
    ):
        assert cli.main(["diagnose", *map(str, words), "--landscape", "line"]) == 2
        assert says in capsys.readouterr().err
    monkeypatch.setenv("FDSCALE_KERNELS", "torch")
    assert cli.main(["diagnose", str(classifier), "--landscape", "line"]) == 2
    assert "the environment variable FDSCALE_KERNELS asks for torch" in capsys.readouterr().err
