"""Detection from end to end: packed, trained, killed and gone on with, evaluated on any number of ranks.

The scenes are generated: discs and squares on photographs, with exact boxes and masks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import coco
import numpy as np
import pytest
import torch
from helpers import records, run_cli, sets
from PIL import Image
from test_resume import SCHEDULE, assert_same, ds_file, kill_after_checkpoint, losses, samples

from fdscale import UserError, cli, config, detect, dist
from fdscale.data.index import open_index
from fdscale.data.shards import make
from fdscale.detect import evaluate
from fdscale.evaluate import measure
from fdscale.student import backbone, build_detector, find, initial_values, read_weights

pytestmark = pytest.mark.slow

DETECT = (
    "student.model=swin_v2",
    "student.args={embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 2, 2, 2], window_size: 4, drop_path_rate: 0.1}",
    "classify.classes=null",
    "detect.classes=2",
    "detect.channels=16",
    "detect.jitter=[0.8, 1.5]",
    "data.image_size=96",
    "data.block=16",
    "optim.batch_size=4",
    "optim.clip_grad=1.0",
    "memory.micro_batch=2",
    "schedule.epochs=null",
    "schedule.warmup_epochs=null",
    "schedule.min_lr=0",
    "log.every=1",
    "log.samples=true",
    "log.tensorboard=false",
)


@pytest.fixture(scope="session")
def found_things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards train, with classes of pixels, and heldout."""
    folder = tmp_path_factory.mktemp("objects")
    for name, count in (("train", 48), ("heldout", 11)):
        coco.write(folder / "coco", name, count, seed=count, stuff=name == "train")
        make(folder / "coco", folder / name, split=name, samples_per_shard=6)
    return folder


@pytest.fixture
def tiny_detect(found_things: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny detection."""

    def arguments(run: Path, *more: str, options: Sequence[str] = ()) -> list[str]:
        own = (*DETECT, f"data.shards={found_things / 'train'}", *more)
        return ["finetune", "demo_finetune", "--run", str(run), *sets(*own), *options]

    return arguments


@pytest.mark.parametrize(
    ("ranks", "stage", "bf16", "kind"),
    [
        (1, 0, False, "mask_rcnn"),
        pytest.param(2, 3, False, "htc", marks=pytest.mark.long),
        pytest.param(2, 2, True, "cascade", marks=pytest.mark.long),
    ],
)
def test_killed_and_resumed_is_bitwise(
    tiny_detect: Callable[..., list[str]],
    found_things: Path,
    tmp_path: Path,
    ranks: int,
    stage: int,
    bf16: bool,
    kind: str,
) -> None:  # fmt: skip
    """Evaluated on the way, under ZeRO 3 too, where an image may have nothing on it."""
    options = ("--ds", str(ds_file(tmp_path, stage, bf16)))
    heldout = (f"data.heldout_shards={found_things / 'heldout'}", "data.heldout_samples=3", "log.heldout_every=3")
    more = (*SCHEDULE, *heldout, f"detect.kind={kind}", "detect.jitter=[0.5, 3.0]", "memory.checkpoint=[torch]")
    more += ("detect.instaboost=0.5", "detect.mirror=true")
    if kind == "htc":
        more += ("detect.stuff=3", "detect.norm=group", "detect.box_head=4conv1fc")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_cli(*tiny_detect(whole, *more, options=options), ranks=ranks)
    assert done.returncode == 0, done.stderr
    arguments = tiny_detect(killed, *more, options=options)
    kill_after_checkpoint(arguments, killed, ranks)
    resumed = run_cli(*arguments, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    assert_same(whole, killed, ranks)
    assert [row["heldout_samples"] for row in records(whole) if "heldout_samples" in row] == [3, 3, 3]


@pytest.mark.long
def test_other_ranks_and_micro_batches_train_the_same(tiny_detect: Callable[..., list[str]], tmp_path: Path) -> None:
    """Losses are means over images, whatever else is in a micro-batch."""
    found = {}
    for ranks, micro in ((1, 4), (2, 1)):
        run = tmp_path / f"{ranks}"
        done = run_cli(*tiny_detect(run, "schedule.steps=4", f"memory.micro_batch={micro}"), ranks=ranks)
        assert done.returncode == 0, done.stderr
        found[ranks] = losses(run)
        assert samples(run, ranks) == samples(tmp_path / "1", 1)
    for step, (loss, _, lr) in found[1].items():
        near = 1e-5 if step == 1 else 2e-2  # of boxes that nearly tie, others may be sampled then
        assert (found[2][step][0], found[2][step][2]) == (pytest.approx(loss, rel=near), lr)


@pytest.fixture(scope="module")
def trained(found_things: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SwinV2 with Mask R-CNN that was trained on 48 scenes for 20 epochs."""
    run = tmp_path_factory.mktemp("detected") / "run"
    more = (
        "optim.lr=3e-3",
        "optim.batch_size=8",
        "memory.micro_batch=8",
        "schedule.steps=100",
        "schedule.warmup_steps=10",
        "log.every=40",
        "log.heldout_every=1000",
        "log.tensorboard=true",
    )
    where = (f"data.shards={found_things / 'train'}", f"data.heldout_shards={found_things / 'heldout'}")
    done = run_cli("finetune", "demo_finetune", "--run", run, *sets(*DETECT, *more, *where), timeout=500)
    assert done.returncode == 0, done.stderr
    assert "box AP" in done.stderr
    return run


def test_it_learns(trained: Path) -> None:
    """Discs and squares on photographs it has not seen."""
    first, last = (row for row in records(trained) if "heldout_box_ap" in row)
    assert (first["step"], last["step"]) == (0, 100)
    assert first["heldout_box_ap"] < 0.05
    assert last["heldout_box_ap50"] > 0.6
    assert last["heldout_mask_ap50"] > 0.6
    assert last["heldout_samples"] == 11


def test_events_and_pictures_are_written(trained: Path) -> None:
    """Both sides of a picture show the scene; where it is sure, boxes are drawn."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert {"heldout_box_ap", "loss_masks_0", "loss"} <= {tag.rpartition("/")[2] for tag in events.Tags()["scalars"]}
    pictures = sorted((trained / "predictions").iterdir())
    assert len(pictures) == 4
    for path in pictures:
        picture = np.asarray(Image.open(path)).astype(int)
        height, width = picture.shape[0], picture.shape[1] // 2
        assert max(height, width) == 96
        truth, found = picture[:, :width], picture[:, width:]
        assert (abs(truth - found).max(-1) < 60).mean() > 0.7


@pytest.mark.long
def test_any_number_of_ranks_counts_the_same(trained: Path, found_things: Path, tmp_path: Path) -> None:
    """To the last bit, with several scales and mirrored; 11 images do not divide by 2 or 3."""
    reports, server = {}, {}
    for ranks in (1, 2, 3):
        out, results = tmp_path / f"{ranks}.json", tmp_path / f"results-{ranks}.json"
        more = sets("memory.micro_batch=2", "detect.scales=[1.0, 1.25]", "detect.mirror=true", "detect.suppress=linear")
        done = run_cli("evaluate", trained, "--out", out, "--results", results, *more, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "box AP" in done.stdout
        reports[ranks], server[ranks] = json.loads(out.read_text()), json.loads(results.read_text())
    assert reports[1] == reports[2] == reports[3]
    assert server[1] == server[2] == server[3]
    report = reports[1]
    assert report["samples"] == report["samples_in_set"] == 11
    tree = json.loads((found_things / "coco/annotations/instances_heldout.json").read_text())
    assert report["objects"] == len(tree["annotations"])
    assert [row["name"] for row in report["classes"]] == ["disc", "square"]
    assert report["box_ap"] == pytest.approx(np.mean([row["box_ap"] for row in report["classes"]]))
    assert judged(tree, server[1]) == pytest.approx([report["box_ap"], report["box_ap50"]])


def judged(tree: dict, rows: list[dict]) -> list[float]:
    """By another implementation, from the official file and what would be sent to the server."""
    from faster_coco_eval import COCO, COCOeval_faster

    there = COCO(tree)
    found = COCOeval_faster(there, there.loadRes(rows), "bbox", print_function=lambda *_: None)
    found.evaluate()
    found.accumulate()
    found.summarize()
    return [float(value) for value in found.stats[:2]]


def test_it_is_what_training_said_and_an_export_measures_the_same(trained: Path, tmp_path: Path) -> None:
    settings, found = find(str(trained), None, None, [])
    ours = measure(settings, found)
    assert ours["box_ap"] == records(trained)[-1]["heldout_box_ap"]
    assert ours["mask_ap"] == records(trained)[-1]["heldout_mask_ap"]
    file = tmp_path / "detector.safetensors"
    assert cli.main(["export", str(trained), str(file)]) == 0
    theirs = measure(settings, str(file))
    assert {name: theirs[name] for name in ("box_ap", "mask_ap", "classes")} == {
        name: ours[name] for name in ("box_ap", "mask_ap", "classes")
    }


def test_a_detection_goes_on_from_another_as_far_as_it_fits(trained: Path) -> None:
    """As from Objects365 to COCO: other classes, and three stages where there was one."""
    changes = [f"student.weights={trained}", "detect.classes=5", "detect.kind=cascade"]
    for head, same in (("fresh", False), ("fitting", True)):
        settings, _ = find(str(trained), None, None, [*changes, f"detect.head={head}"])
        module = build_detector(settings, backbone(settings))
        value, read = initial_values(settings, module), read_weights(str(trained))
        for name, kept in (
            ("backbone.patch_embed.proj.weight", True),
            ("fpn.inner_blocks.0.0.weight", same),
            ("regions.boxes.0.box_head.fc6.weight", same),
            ("regions.boxes.0.cls_score.weight", False),
        ):
            saved, shape = read.tensors[name], module.get_parameter(name).shape
            assert (saved.shape == shape and torch.equal(value(name, shape), read.whole(saved))) == kept, name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["detect.classes=4"], ["cls_score.weight have the shape (3, 1024)", "whole detector", "detect.classes"]),
        (["detect.classes=1"], ["whole detector of as many classes as detect.classes"]),
        (["data.heldout_shards=null"], ["data.heldout_shards is not set"]),
    ],
)
def test_mistakes_are_named(trained: Path, changes: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        measure(*find(str(trained), None, None, changes))
    for part in expected:
        assert part in str(caught.value)


def test_a_set_without_numbers_of_categories_is_told_before_the_work(
    trained: Path, found_things: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "heldout"
    shutil.copytree(found_things / "heldout", shards)
    (shards / "categories.json").unlink()
    settings, _ = find(str(trained), None, None, [f"data.heldout_shards={shards}"])
    with pytest.raises(UserError, match=r"holds no categories\.json"):
        evaluate(
            settings, open_index(str(shards)), None, torch.float32, lambda batch: True, results=tmp_path / "results"
        )


def test_sizes_are_where_the_network_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch lies in host memory; its views are made on the device, here one that only pretends."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(dist, "device", lambda: torch.device("cuda"))
    settings = config.load("cascade_swinv2_base", ["detect.mirror=false"])
    with FakeTensorMode():
        batch = {"images": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "sizes0": torch.full((2, 2), 64)}
        (view,) = detect._views(batch, settings.detect, torch.float32)
    assert (view.images.device.type, view.sizes.device.type) == ("cuda", "cuda")


def test_settings_that_do_not_go_together_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run", str(tmp_path / "run"), "--set", "data.shards=x"]
    assert cli.main(["distill", "cascade_swinv2_base", *words]) == 2
    assert "detect.classes is 80" in capsys.readouterr().err
    for change, says in (
        ("segment.classes=3", "segment.classes and detect.classes are set"),
        (["detect.instaboost=0.5", "detect.masks=false"], "moves objects by their masks, but detect.masks is false"),
        ("detect.bounds=[2000, 800]", r"detect.bounds \[2000, 800\] do not fit into the square"),
        ("detect.jitter=[2, 1]", "detect.jitter must be two rising"),
        ("detect.head=fitting", "student.weights, another detector, is not set"),
        ("schedule.drops=[0.9, 0.5]", "schedule.drops must rise"),
        ("detect.kind=yolo", "detect.kind must be one of mask_rcnn, cascade, htc"),
    ):
        with pytest.raises(UserError, match=says):
            config.load("cascade_swinv2_base", [change] if isinstance(change, str) else change)
