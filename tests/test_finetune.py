"""Fine-tuning and evaluation from end to end: from a distilled run on, killed, on other ranks, and whether it learns.

The images are scikit-learn's handwritten digits; mixup, CutMix, RandAugment, erasing and drop path are on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import TINY, outside, run_cli, sets
from safetensors.torch import load_file
from test_resume import SCHEDULE, assert_same, ds_file, kill_after_checkpoint, losses, samples
from timm.models.beit import Beit

from fdscale import UserError, cli, config, student
from fdscale.data.index import open_index
from fdscale.engine.checkpoint import committed
from fdscale.engine.reader import Reader
from fdscale.evaluate import measure
from fdscale.student import (
    backbone,
    build_classifier,
    find,
    initial_values,
    read_weights,
    trained_backbone,
    trained_head,
)
from fdscale.tasks.classification import Classifier

pytestmark = pytest.mark.slow

VIT = "patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, drop_path_rate: 0.2"
FINETUNE = (
    "student.model=vit",
    f"student.args={{{VIT}, position: per_block, final_norm: false}}",
    "classify.mixup=0.8",
    "classify.cutmix=1.0",
    "classify.mix_group=4",
    "classify.randaugment=rand-m9-mstd0.5-inc1",
    "classify.erase=0.25",
    "data.image_size=32",
    "data.block=16",
    "optim.batch_size=8",
    "optim.layer_decay=0.65",
    "memory.micro_batch=4",
    "schedule.epochs=null",
    "schedule.warmup_epochs=null",
    "log.every=1",
    "log.samples=true",
    "log.tensorboard=false",
)


@pytest.fixture
def tiny_finetune(digits: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny fine-tuning."""

    def arguments(run: Path, *more: str, options: Sequence[str] = ()) -> list[str]:
        own = (*FINETUNE, f"data.shards={digits / 'train'}", *more)
        return ["finetune", "demo_finetune", "--run", str(run), *sets(*own), *options]

    return arguments


@pytest.fixture(scope="module")
def distilled(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of distillation of the student whose position table all blocks share."""
    run = tmp_path_factory.mktemp("distilled") / "run"
    small = ("data.image_size=32", "teacher.args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}")
    student = ("student.model=vit", f"student.args={{{VIT}}}")
    settings = (*TINY, *small, *student, f"data.shards={shards}", "schedule.steps=2", "schedule.warmup_steps=1")
    done = run_cli("distill", "demo", "--run", run, *sets(*settings))
    assert done.returncode == 0, done.stderr
    return run


def test_it_starts_from_a_distilled_run_or_what_was_exported(distilled: Path, tmp_path: Path) -> None:
    with contextlib.closing(Reader(committed(distilled / "checkpoints")[0])) as reader:
        saved = {name: reader.full(name) for name in reader.state["parameters"]}
    exported = tmp_path / "student.safetensors"
    assert cli.main(["export", str(distilled), str(exported)]) == 0
    shared = saved["backbone.rel_pos_bias.relative_position_bias_table"]
    assert shared.any(), "two steps have changed it"
    for source in (distilled, committed(distilled / "checkpoints")[0], exported):
        settings = config.load("demo_finetune", [*FINETUNE, "schedule.steps=4", f"student.weights={source}"])
        module = build_classifier(settings, backbone(settings))
        value = initial_values(settings, module)
        for name, parameter in module.named_parameters():
            first = value(name, parameter.shape)
            if name.endswith("relative_position_bias_table"):
                assert torch.equal(first, shared)
            elif name.startswith("backbone."):
                assert torch.equal(first, saved[name]), name
        assert 0 < value("head.weight", module.head.weight.shape).abs().max() <= 2e-5


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.long)])
def test_killed_and_resumed_is_bitwise(
    tiny_finetune: Callable[..., list[str]], distilled: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    options, start = ("--ds", str(ds_file(tmp_path, stage))), f"student.weights={distilled}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_cli(*tiny_finetune(whole, *SCHEDULE, start, options=options), ranks=ranks)
    assert done.returncode == 0, done.stderr
    arguments = tiny_finetune(killed, *SCHEDULE, start, options=options)
    kill_after_checkpoint(arguments, killed, ranks)
    resumed = run_cli(*arguments, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    assert_same(whole, killed, ranks)


@pytest.mark.long
def test_other_ranks_and_micro_batches_mix_the_same(tiny_finetune: Callable[..., list[str]], tmp_path: Path) -> None:
    """One rank, then two with another micro-batch, then one again: the same samples, and the losses to rounding."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_cli(*tiny_finetune(whole, *SCHEDULE, "memory.micro_batch=8")).returncode == 0
    assert run_cli(*tiny_finetune(parts, *SCHEDULE, options=("--steps", "2"))).returncode == 0
    two = tiny_finetune(parts, *SCHEDULE, "memory.micro_batch=2", "data.workers=2", options=("--steps", "4"))
    done = run_cli(*two, ranks=2)
    assert done.returncode == 0, done.stderr
    assert run_cli(*tiny_finetune(parts, *SCHEDULE, "memory.micro_batch=4", "data.workers=0")).returncode == 0
    assert samples(parts, 2) == samples(whole, 1)
    for step, (loss, norm, lr) in losses(whole).items():
        assert losses(parts)[step] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3), lr)


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT that was trained on the digits for 21 epochs."""
    run = tmp_path_factory.mktemp("trained") / "run"
    larger = "patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2, drop_path_rate: 0, position: per_block"
    plain = ("classify.randaugment=null", "classify.erase=0", "classify.cutmix=0", "classify.mixup=0.2")
    student = (f"student.args={{{larger}, final_norm: false, layer_scale: 0}}", "classify.head_scale=1")
    rates = (
        "data.scale=[0.9, 1]",
        "optim.lr=2e-3",
        "optim.layer_decay=1",
        "optim.ema=0.9",
        "optim.batch_size=32",
        "memory.micro_batch=32",
    )
    length = ("schedule.steps=800", "schedule.warmup_steps=20", "log.every=100")
    settings = (*FINETUNE, *plain, *student, *rates, *length)
    more = (f"data.shards={digits / 'train'}", f"data.heldout_shards={digits / 'heldout'}", "log.heldout_every=1000")
    done = run_cli("finetune", "demo_finetune", "--run", run, *sets(*settings, *more))
    assert done.returncode == 0, done.stderr
    return run


def test_it_learns(trained: Path) -> None:
    """1200 digits of 8 x 8 pixels; at random 10 % of the others would be right."""
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first, last = (record for record in records if "heldout_top1" in record)
    assert (first["step"], last["step"]) == (0, 800)
    assert first["heldout_top1"] < 0.3
    assert last["heldout_top1"] > 0.85
    assert last["heldout_top1_ema"] > 0.85
    assert last["heldout_top5"] > 0.97
    assert last["heldout_samples"] == first["heldout_samples"] == 101


def test_any_number_of_ranks_counts_the_same(trained: Path, digits: Path, tmp_path: Path) -> None:
    """103 samples, 2 of them broken: to the last bit, and equal to what training said of itself."""
    found = {}
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.json"
        options = ("--out", out, "--set", "memory.micro_batch=8")
        done = run_cli("evaluate", trained, *options, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("broken") == 2
        found[ranks] = json.loads(out.read_text())
    assert found[1] == found[2] == found[3]
    report = found[1]
    assert report["samples"] == sum(row["samples"] for row in report["classes"]) == 101
    assert sorted(one["key"] for one in report["left_out"]) == ["3/broken", "7/broken"]
    right = sum(row["samples"] * row["top1"] for row in report["classes"])
    assert right == pytest.approx(report["top1"] * 101)
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert report["top1"] == last["heldout_top1"]
    assert report["loss"] == pytest.approx(last["heldout_loss"], rel=1e-5)


def test_other_labels_and_several_crops_count_the_same_on_any_number_of_ranks(
    trained: Path, digits: Path, tmp_path: Path
) -> None:
    """Zeros have no label, all others the next digit's, too."""
    index = open_index(str(digits / "heldout"))
    keys = [index.key(shard, row) for shard, count in enumerate(index.counts) for row in range(count)]
    own = {key: int(key.partition("/")[0]) for key in keys}
    labels = {key: [label, (label + 1) % 10] if label else [] for key, label in own.items()}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    found = {}
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        options = (
            "--out",
            out,
            "--labels",
            tmp_path / "labels.json",
            *sets("memory.micro_batch=8", "classify.crops=5"),
        )
        done = run_cli("evaluate", trained, *options, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found[ranks] = json.loads(out.read_text())
    assert found[1] == found[2]
    assert found[1]["samples"] == sum(label > 0 for key, label in own.items() if "broken" not in key)
    assert found[1]["crops"] == 5
    assert found[1]["top1"] > 0.5
    wrong = sum(often for _, _, often in found[1]["confusion"])
    assert found[1]["top1"] == 1 - wrong / found[1]["samples"]


def test_an_evaluation_that_hangs_says_where(trained: Path, tmp_path: Path) -> None:
    """The second micro-batch never comes."""
    hang = """
import itertools, sys, time
from fdscale import classify, cli, evaluate, watchdog
watchdog.SLACK = evaluate.SLACK = 1
batches = classify.heldout_batches
def hangs(*given):
    yield next(batches(*given))
    time.sleep(600)
classify.heldout_batches = hangs
sys.exit(cli.main(sys.argv[1:]))
"""
    out = tmp_path / "of a run" / "accuracy.json"
    words = ["evaluate", str(trained), "--out", str(out), *sets("guard.step_limit_s=5", "memory.micro_batch=8")]
    done = subprocess.run(
        [sys.executable, "-c", hang, *words], env=outside(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 74, done.stderr
    assert "hung: evaluation takes longer than 5 s" in done.stderr
    assert "in hangs" in (out.parent / "stacks-0.log").read_text()


def loaded(settings: config.Config, run: Path) -> Classifier:
    """The network alone, with the weights of a run."""
    model, weights = build_classifier(settings, backbone(settings)), read_weights(str(run))
    read = trained_backbone(settings, weights) | trained_head(model, weights)
    model.load_state_dict({name: value() for name, value in read.items()}, assign=True)
    return model


def test_accuracy_is_that_of_a_plain_loop(trained: Path, digits: Path) -> None:
    """Pillow, torchvision's transforms and the network alone, over the files that were packed."""
    from PIL import Image
    from torchvision import transforms

    settings, found = find(str(trained), None, None, [])
    model = loaded(settings, trained)
    view = transforms.Compose(
        [
            transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = [path for path in (digits / "photos" / "heldout").rglob("*.png") if path.stem != "broken"]
    images = torch.stack([view(Image.open(path).convert("RGB")) for path in files])
    labels = torch.tensor([int(path.parent.name) for path in files])
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == labels).float().mean().item()
    assert abs(measure(settings, found)["top1"] - right) <= 1 / 101 + 1e-6  # pixels differ by rounding


@pytest.mark.parametrize("names", ["official", "timm"])
def test_weights_of_others_are_evaluated_by_a_recipe(trained: Path, tmp_path: Path, names: str) -> None:
    """What was exported, head and all, as torch.save writes it."""
    settings, found = find(str(trained), None, None, [])
    ours = measure(settings, found)
    exported = tmp_path / "whole.safetensors"
    assert cli.main(["export", str(trained), str(exported), "--names", names]) == 0
    torch.save({"model": load_file(exported)}, tmp_path / "whole.pth")
    recipe, none = find(str(trained / "config.yaml"), None, str(tmp_path / "whole.pth"), [])
    assert none is None
    theirs = measure(recipe, str(tmp_path / "whole.pth"))
    assert (theirs["top1"], theirs["loss"]) == (ours["top1"], ours["loss"])


def test_an_exported_classifier_is_timms(trained: Path, tmp_path: Path) -> None:
    """A strict load into timm's mean-pooled Beit, and the same scores."""
    exported = tmp_path / "timm.safetensors"
    assert cli.main(["export", str(trained), str(exported), "--names", "timm"]) == 0
    theirs = Beit(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10, global_pool="avg",
        use_rel_pos_bias=True, use_abs_pos_emb=False, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    theirs.load_state_dict(load_file(exported), strict=True)
    settings, _ = find(str(trained), None, None, [])
    ours = loaded(settings, trained)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=1e-4)


def test_the_average_and_clips_statistics_are_something_else(trained: Path) -> None:
    settings, found = find(str(trained), None, None, ["classify.statistics=clip"])
    plain = dataclasses.replace(settings, classify=dataclasses.replace(settings.classify, statistics="training"))
    found_losses = {measure(one, found, averaged=mean)["loss"] for one in (settings, plain) for mean in (True, False)}
    assert len(found_losses) == 4


def test_a_head_is_taken_along_or_in_part(trained: Path, tmp_path: Path) -> None:
    """At another image size, and some of its classes in another order."""
    saved = read_weights(str(trained)).tensors
    rows = [7, 2, 9]
    (tmp_path / "map.txt").write_text("".join(f"{row}\n" for row in rows))
    for head, classes, kept in (("loaded", 10, list(range(10))), (str(tmp_path / "map.txt"), 3, rows)):
        more = [f"classify.head={head}", f"classify.classes={classes}", f"student.weights={trained}"]
        settings, _ = find(str(trained), None, None, [*more, "data.image_size=48"])
        module = build_classifier(settings, backbone(settings))
        value = initial_values(settings, module)
        for name in ("head.weight", "head.bias"):
            assert torch.equal(value(name, saved[name].shape), saved[name][kept])
        assert torch.equal(value("fc_norm.weight", saved["fc_norm.weight"].shape), saved["fc_norm.weight"])
    for text, classes, says in (
        ("1\n2\n", 3, "expected 3 class numbers, one a line (classify.classes), and found 2"),
        ("1\n2\nx\n", 3, "expected 3 class numbers"),
        ("1\n2\n10\n", 3, "names class 10, and the head of the weights has 10"),
    ):
        (tmp_path / "map.txt").write_text(text)
        more = [f"classify.head={tmp_path / 'map.txt'}", f"classify.classes={classes}", f"student.weights={trained}"]
        settings, _ = find(str(trained), None, None, more)
        with pytest.raises(UserError, match=re.escape(says)):
            initial_values(settings, build_classifier(settings, backbone(settings)))
    with pytest.raises(UserError, match=r"student\.weights, which holds it, is not set"):
        config.load("demo_finetune", ["classify.head=loaded"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("demo_finetune", None, None, []), ["is a recipe", "--run DIR or --weights FILE"]),
        (("demo", None, "x.pth", []), ["is for distillation", "classify.classes"]),
        (("TRAINED", "TRAINED", None, []), ["is a run itself"]),
        (("TRAINED", None, None, ["data.heldout_shards=null"]), ["data.heldout_shards is not set"]),
        (
            ("TRAINED", None, None, ["classify.classes=12"]),
            ["head.weight have the shape (10, 64)", "expected (12, 64)"],
        ),
        (("TRAINED/checkpoints/step-1", None, None, []), ["no such run directory or recipe file"]),
        (("demo_finetune", "/nowhere", None, []), ["/nowhere: no such run"]),
        (("demo_finetune", "a", "b", []), ["not both"]),
    ],
)
def test_mistakes_are_named(trained: Path, words: tuple, expected: list[str]) -> None:
    source, run, weights, settings = words
    named = [None if one is None else one.replace("TRAINED", str(trained)) for one in (source, run, weights)]
    with pytest.raises(UserError) as caught:
        measure(*find(*named, settings))
    for part in expected:
        assert part in str(caught.value)


def test_no_evaluation_takes_the_place_of_another(trained: Path, tmp_path: Path, capsys) -> None:
    for words in ([], ["--set", "classify.crops=5"], ["--set", "classify.crops=10"]):
        assert cli.main(["evaluate", str(trained), *words]) == 0
    capsys.readouterr()
    reports = [json.loads(path.read_text())["crops"] for path in (trained / "evaluation").glob("step-*.json")]
    assert sorted(reports) == [1, 5, 10]
    assert cli.main(["evaluate", str(trained), "--out", str(tmp_path / "new/folder/report")]) == 0
    assert (tmp_path / "new/folder/report").is_file()


def test_what_cannot_be_is_told_before_the_work(
    trained: Path, digits: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """A place that cannot be written, an average of a file, names of classes that are none."""
    monkeypatch.setattr(student, "loaded", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "file").write_text("")
    for words, says in (
        (["--out", str(tmp_path)], f"{tmp_path} could not be written: expected a file"),
        (["--out", str(tmp_path / "file/report.json")], "could not be written"),
        (["--weights", "weights.safetensors", "--ema"], "--ema takes the average of a run's weights"),
    ):
        assert cli.main(["evaluate", str(trained), *words]) == 2
        assert says in capsys.readouterr().err
    shards = tmp_path / "heldout"
    shutil.copytree(digits / "heldout", shards)
    for text, says in (
        ("{", "not readable"),
        ('{"0": "zero"}', "expected a list of names"),
        ("[1, 2]", "a list of names"),
    ):
        (shards / "classes.json").write_text(text)
        assert cli.main(["evaluate", str(trained), *sets(f"data.heldout_shards={shards}")]) == 2
        assert says in capsys.readouterr().err


def test_recipes_of_the_other_kind_are_named(
    tiny_finetune: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (["distill", "demo_finetune"], "run it with `fdscale finetune`"),
        (["finetune", "demo"], "`fdscale finetune` needs the number of classes"),
    ):
        assert cli.main([*words, "--run", str(tmp_path / "run"), "--set", "data.shards=x"]) == 2
        assert says in capsys.readouterr().err
    assert cli.main(tiny_finetune(tmp_path / "run", "schedule.steps=4", "memory.micro_batch=1")) == 2
    assert "needs an even number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
