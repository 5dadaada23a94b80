"""Semantic segmentation from end to end: packed, trained, killed and gone on with, evaluated on any number of ranks.

The scenes are generated: discs and squares on photographs, with exact masks.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from helpers import records, run_cli, sets
from PIL import Image
from safetensors.torch import load_file
from test_resume import SCHEDULE, assert_same, ds_file, kill_after_checkpoint, losses, samples, tensors
from torch import Tensor

from fdscale import UserError, cli, config
from fdscale.evaluate import measure
from fdscale.student import backbone, build_segmenter, find, initial_values, read_weights
from fdscale.tasks.segmentation import Segmenter

pytestmark = pytest.mark.slow

SEGMENT = (
    "student.model=swin_v2",
    "student.args={embed_dim: 16, depths: [1, 1, 2, 1], num_heads: [1, 2, 4, 4], window_size: 4, drop_path_rate: 0.1}",
    "classify.classes=null",
    "segment.classes=3",
    "segment.reduce_zero_label=true",
    "segment.channels=16",
    "segment.auxiliary_channels=16",
    "segment.bounds=[256, 64]",
    "segment.ratio=[0.8, 1.5]",
    "segment.most_of_a_class=0.9",
    "data.image_size=64",
    "data.block=16",
    "optim.batch_size=8",
    "optim.layer_decay=0.9",
    "optim.clip_grad=1.0",
    "memory.micro_batch=4",
    "schedule.shape=poly",
    "schedule.epochs=null",
    "schedule.warmup_epochs=null",
    "schedule.min_lr=0",
    "log.every=1",
    "log.samples=true",
    "log.tensorboard=false",
)
MASK2FORMER = (
    "segment.head=mask2former",
    "segment.channels=32",
    "segment.queries=8",
    "segment.encoder_layers=1",
    "segment.decoder_layers=3",
    "segment.points=256",
)
WIDE = (*scenes.SIZES, (60, 290))  # (height, width); the last takes more crops, so more calls of the network


@pytest.fixture(scope="session")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards train, heldout, and wide, whose images need different numbers of crops."""
    folder = tmp_path_factory.mktemp("scenes")
    for name, count, sizes in (("train", 48, scenes.SIZES), ("heldout", 13, scenes.SIZES), ("wide", 13, WIDE)):
        scenes.write(folder / "ADEChallengeData2016", name, count, seed=count, sizes=sizes)
        scenes.pack(folder / "ADEChallengeData2016", folder / name, name)
    return folder


@pytest.fixture
def tiny_segment(ade: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny segmentation."""

    def arguments(run: Path, *more: str, options: Sequence[str] = ()) -> list[str]:
        own = (*SEGMENT, f"data.shards={ade / 'train'}", *more)
        return ["finetune", "demo_finetune", "--run", str(run), *sets(*own), *options]

    return arguments


@pytest.mark.parametrize(
    ("ranks", "stage", "bf16"),
    [
        (1, 0, False),
        pytest.param(2, 3, False, marks=pytest.mark.long),
        pytest.param(2, 2, True, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize(
    "head", [pytest.param((), id="upernet"), pytest.param(MASK2FORMER, id="mask2former", marks=pytest.mark.long)]
)
def test_killed_and_resumed_is_bitwise(
    tiny_segment: Callable[..., list[str]],
    ade: Path,
    tmp_path: Path,
    ranks: int,
    stage: int,
    bf16: bool,
    head: tuple[str, ...],
) -> None:
    """Weights, moments and the statistics of batch-norms, evaluated on the way, at ZeRO 3 too."""
    options = ("--ds", str(ds_file(tmp_path, stage, bf16)))
    more = (*SCHEDULE, f"data.heldout_shards={ade / 'wide'}", "data.heldout_samples=5", "log.heldout_every=3", *head)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_cli(*tiny_segment(whole, *more, options=options), ranks=ranks)
    assert done.returncode == 0, done.stderr
    arguments = tiny_segment(killed, *more, options=options)
    kill_after_checkpoint(arguments, killed, ranks)
    resumed = run_cli(*arguments, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    assert_same(whole, killed, ranks)
    saved = tensors(whole, 6, ranks)
    moved = [name for name in saved if "running_mean" in name and saved[name].any()]
    assert len(moved) > 10 or head
    assert all(saved[name].dtype == torch.float32 for name in moved)
    assert [row["heldout_samples"] for row in records(whole) if "heldout_samples" in row] == [5, 5, 5]


def test_a_skipped_step_leaves_statistics_as_they_were(
    tiny_segment: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch has moved them by the time that its loss turns out to be no number."""
    usual, before, behind = Segmenter.forward, [], []

    def forward(self: Segmenter, images: Tensor, masks: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        before.append({name: value.clone() for name, value in self.state_dict().items()})
        loss = usual(self, images, masks, numbers)
        behind.append({name: value.clone() for name, value in self.state_dict().items()})
        return loss * math.nan if len(before) in (5, 6) else loss  # the third step's two micro-batches

    monkeypatch.setattr(Segmenter, "forward", forward)
    run = tmp_path / "run"
    assert cli.main(tiny_segment(run, "schedule.steps=5", "save.every=9")) == 0
    assert records(run)[-1]["skipped"] == 1
    assert len(before) == 10
    statistics = [name for name in before[0] if "running" in name]
    assert len(statistics) > 20
    assert [name for name in before[4] if not torch.equal(before[4][name], before[6][name])] == []
    for name in statistics:
        assert not torch.equal(behind[5][name], before[4][name])
        assert not torch.equal(before[8][name], before[6][name])


def test_one_image_is_no_batch(tiny_segment: Callable[..., list[str]], tmp_path: Path) -> None:
    """Pooled to one pixel it has no variance, which evaluation would divide by."""
    words = tiny_segment(tmp_path / "run", *SCHEDULE, "memory.micro_batch=1")
    done = run_cli(*words)
    assert done.returncode == 2
    assert "segment.norm=group" in done.stderr


@pytest.mark.long
def test_other_ranks_and_micro_batches_train_the_same(tiny_segment: Callable[..., list[str]], tmp_path: Path) -> None:
    """Group norm and Mask2Former do not see how a batch is cut; batch-norm sees as many images on 2 ranks x 4 as on 1 x
    8."""
    found = {}
    heads = {
        "group": ("segment.norm=group",),
        "batch": ("segment.norm=batch",),
        "mask2former": (*MASK2FORMER, "optim.lr=1e-4"),
    }
    cuts = (("group", 1, 8), ("group", 2, 2), ("batch", 1, 8), ("batch", 2, 4), ("mask2former", 1, 8))
    for kind, ranks, micro in (*cuts, ("mask2former", 2, 1)):
        run = tmp_path / f"{kind}-{ranks}"
        more = (*SCHEDULE, *heads[kind], f"memory.micro_batch={micro}")
        done = run_cli(*tiny_segment(run, *more), ranks=ranks)
        assert done.returncode == 0, done.stderr
        found[kind, ranks] = losses(run)
        assert samples(run, ranks) == samples(tmp_path / f"{kind}-1", 1)
    for kind in heads:
        for step, (loss, _, lr) in found[kind, 1].items():
            other = found[kind, 2][step]
            assert (other[0], other[2]) == (pytest.approx(loss, rel=1e-4 if kind == "mask2former" else 1e-3), lr)


@pytest.fixture(scope="module")
def trained(ade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT that was trained on 48 scenes for 50 epochs."""
    run = tmp_path_factory.mktemp("trained") / "run"
    vit = "patch_size: 8, embed_dim: 48, depth: 4, num_heads: 2, drop_path_rate: 0, position: per_block"
    student = ("student.model=vit", f"student.args={{{vit}, final_norm: false, layer_scale: 0}}")
    rates = (
        "optim.lr=4e-3",
        "optim.ema=0.95",
        "memory.micro_batch=8",
        "schedule.steps=300",
        "schedule.warmup_steps=10",
    )
    where = (f"data.shards={ade / 'train'}", f"data.heldout_shards={ade / 'heldout'}")
    settings = (*SEGMENT, *student, *rates, *where, "log.every=100", "log.heldout_every=1000")
    done = run_cli("finetune", "demo_finetune", "--run", run, *sets(*settings))
    assert done.returncode == 0, done.stderr
    return run


def test_it_learns(trained: Path) -> None:
    """Discs and squares on photographs it has not seen; ground alone would be a third."""
    first, last = (row for row in records(trained) if "heldout_miou" in row)
    assert (first["step"], last["step"]) == (0, 300)
    assert first["heldout_miou"] < 0.4
    assert last["heldout_miou"] > 0.85
    assert last["heldout_miou_ema"] > 0.8
    assert last["heldout_macc"] > 0.9
    assert last["heldout_aacc"] > 0.93
    assert last["heldout_samples"] == 13


def test_any_number_of_ranks_counts_the_same(trained: Path, ade: Path, tmp_path: Path) -> None:
    """To the last bit, with several scales and mirrored; 13 images do not divide by 2 or 3."""
    found = {}
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.json"
        more = ("memory.micro_batch=3", "segment.scales=[1.0, 1.25]", "segment.mirror=true", "segment.shown=3")
        words = sets(*more, f"data.heldout_shards={ade / 'wide'}")
        done = run_cli("evaluate", trained, "--out", out, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "mIoU" in done.stdout
        found[ranks] = json.loads(out.read_text())
        assert sorted(path.name for path in out.with_suffix("").iterdir()) == ["000000.png", "000004.png", "000008.png"]
    assert found[1] == found[2] == found[3]
    report = found[1]
    assert report["samples"] == report["samples_in_set"] == 13
    assert [row["name"] for row in report["classes"]] == ["ground", "disc", "square, blue"]
    confusion = np.array(report["confusion"])
    masks = (ade / "ADEChallengeData2016/annotations/wide").iterdir()
    assert confusion.sum() == sum(np.count_nonzero(Image.open(mask)) for mask in masks)
    wanted = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    assert report["miou"] == pytest.approx(wanted.mean())
    assert [row["iou"] for row in report["classes"]] == pytest.approx(wanted.tolist())


def test_it_is_what_training_said_and_pictures_show_it(trained: Path, ade: Path) -> None:
    settings, found = find(str(trained), None, None, [])
    assert measure(settings, found)["miou"] == records(trained)[-1]["heldout_miou"]
    assert cli.main(["evaluate", str(trained)]) == 0
    picture = np.asarray(Image.open(trained / "evaluation/step-00000300/000003.png")).astype(int)
    height, width = picture.shape[0], picture.shape[1] // 3
    assert (height, width) in scenes.SIZES
    image, truth, predicted = picture[:, :width], picture[:, width : 2 * width], picture[:, 2 * width :]
    assert abs(truth[3:, 3:] - image[3:, 3:]).mean() > 10  # coloured over
    assert np.array_equal(truth[:3, :3], image[:3, :3])  # has no class
    assert (abs(truth - predicted)[3:, 3:].max(-1) == 0).mean() > 0.85  # mostly right


def test_an_export_measures_the_same(trained: Path, tmp_path: Path) -> None:
    """Heads, and the statistics that their norms have gathered."""
    settings, found = find(str(trained), None, None, [])
    ours = measure(settings, found)
    for names in ("fdscale", "timm"):
        file = tmp_path / f"{names}.safetensors"
        assert cli.main(["export", str(trained), str(file), "--names", names]) == 0
        assert "decode_head.fpn_bottleneck.bn.running_var" in load_file(file)
        theirs = measure(settings, str(file))
        assert theirs["confusion"] == ours["confusion"]
    averaged = measure(settings, found, averaged=True)
    assert averaged["confusion"] != ours["confusion"]
    assert averaged["miou"] == records(trained)[-1]["heldout_miou_ema"]


def test_a_segmentation_starts_from_any_backbone(trained: Path) -> None:
    """Of another segmentation: its backbone at another size, its heads fresh."""
    settings, _ = find(str(trained), None, None, [f"student.weights={trained}", "data.image_size=96"])
    module = build_segmenter(settings, backbone(settings))
    value, read = initial_values(settings, module), read_weights(str(trained))
    saved = read.tensors
    name = "backbone.blocks.0.attn.qkv.weight"
    assert torch.equal(value(name, saved[name].shape), read.whole(saved[name]))
    table = "backbone.blocks.0.attn.relative_position_bias_table"
    assert value(table, torch.Size()).shape == (23**2 + 3, 2)
    head = "decode_head.conv_seg.weight"
    assert not torch.equal(value(head, saved[head].shape), saved[head])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            ["segment.classes=4"],
            ["decode_head.conv_seg.weight have the shape (3, 16", "expected (4,", "whole segmenter"],
        ),
        (["segment.classes=2"], ["whole segmenter of as many classes as segment.classes"]),
        (["data.heldout_shards=null"], ["data.heldout_shards is not set"]),
        (["segment.inference=whole"], ["relative position table is for 8x8"]),
        (["segment.stride=65"], ["segment.stride is 65, more than data.image_size 64"]),
        (["segment.norm=batch", "data.heldout_shards=FOLDER"], [".seg.png is needed beside each", "shards make"]),
    ],
)
def test_mistakes_are_named(trained: Path, ade: Path, changes: list[str], expected: list[str]) -> None:
    changes = [change.replace("FOLDER", str(ade / "ADEChallengeData2016/images")) for change in changes]
    with pytest.raises(UserError) as caught:
        measure(*find(str(trained), None, None, changes))
    for part in expected:
        assert part in str(caught.value)


def test_recipes_of_the_other_kind_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run", str(tmp_path / "run"), "--set", "data.shards=x"]
    assert cli.main(["distill", "upernet_vit_base", *words]) == 2
    assert "segment.classes is 150" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"classify\.classes and segment\.classes are set"):
        config.load("demo_finetune", ["segment.classes=3"])


@pytest.mark.long
def test_mask2former_learns_and_is_evaluated(ade: Path, tmp_path: Path) -> None:
    """On two ranks as on one to the last bit, from several views, and from its export."""
    run = tmp_path / "run"
    vit = "patch_size: 8, embed_dim: 48, depth: 4, num_heads: 2, drop_path_rate: 0, position: per_block"
    sizes = ("segment.channels=64", "segment.queries=10", "segment.encoder_layers=2", "segment.points=512")
    settings = (
        *(*SEGMENT, "student.model=vit", f"student.args={{{vit}, final_norm: false, layer_scale: 0}}"),
        *(*MASK2FORMER, *sizes, "optim.lr=1e-3", "optim.clip_grad=0.1", "memory.micro_batch=8"),
        *("schedule.steps=120", "schedule.warmup_steps=10", "log.every=40", "log.heldout_every=1000"),
        *(f"data.shards={ade / 'train'}", f"data.heldout_shards={ade / 'heldout'}"),
    )
    done = run_cli("finetune", "demo_finetune", "--run", run, *sets(*settings))
    assert done.returncode == 0, done.stderr
    assert "vit + Mask2Former -> 3 classes" in done.stderr
    rows = records(run)
    assert {"loss_class", "loss_mask", "loss_dice"} <= rows[-1].keys()
    assert rows[-1]["heldout_miou"] > 0.8
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        more = ("memory.micro_batch=3", "segment.scales=[1.0, 1.25]", "segment.mirror=true")
        done = run_cli("evaluate", run, "--out", out, *sets(*more, f"data.heldout_shards={ade / 'wide'}"), ranks=ranks)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]
    assert found[0]["miou"] > 0.6  # of photographs with red and brown
    file = tmp_path / "weights.safetensors"
    assert cli.main(["export", str(run), str(file)]) == 0
    settled, checkpoint = find(str(run), None, None, [])
    assert measure(settled, str(file))["confusion"] == measure(settled, checkpoint)["confusion"]
    with pytest.raises(UserError, match=r"whole segmenter of as many classes as segment\.classes"):
        measure(*find(str(run), None, None, ["segment.head=upernet"]))


def test_without_its_parts_mask2former_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fdscale.tasks.mask2former", None)
    settings = config.load("demo_finetune", [*SEGMENT, *MASK2FORMER, "schedule.steps=1"])
    with pytest.raises(UserError, match=r"pip install 'fdscale\[mask2former\]'"):
        build_segmenter(settings, backbone(settings))
    with pytest.raises(UserError, match=r"segment\.channels is 48; Mask2Former needs a multiple of 32"):
        config.load("demo_finetune", [*SEGMENT, *MASK2FORMER, "schedule.steps=1", "segment.channels=48"])
