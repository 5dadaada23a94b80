"""Every recipe: its student's size as published, its effective numbers as the official repository's, two real steps.

The two steps run on a variant that keeps the recipe's structure (architecture, position scheme, teacher family, pairing
of tokens, schedule shape) and shrinks widths, depths, images and batch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import coco
import pytest
import scenes
import torch

from fdscale import config, keys, student
from fdscale.assemble import build_student
from fdscale.catalog import parameters
from fdscale.data.shards import make
from fdscale.distill import distill
from fdscale.finetune import finetune
from fdscale.models import frozen, teachers
from fdscale.models.frozen import Teacher
from fdscale.student import backbone

# Backbone parameters. SwinV2-B and G as verified against the official model; ViT with one shared position table and
# without k bias: 12 (or 24) blocks of 12 C^2 + 14 C, patch and cls embedding, final norm and the table.
COUNTS = {
    "clip_dino_vit_base": 85_665_360,
    "clip_vit_base_100": 85_665_360,
    "clip_vit_base_300": 85_665_360,
    "clip_vit_large_300": 302_955_584,
    "deit_vit_base_300": 85_665_360,
    "dino_vit_base_300": 85_665_360,
    "esvit_swinv2_base_300": 86_893_816,
    "swinv2_g": 2_997_843_680,
    "swinv2_g_224": 2_997_843_680,
    "clip_swinv2_g": 2_997_843_680,
    "eva_swinv2_g": 2_997_843_680,
    "clip_swinv2_h": 655_210_922 + 3 * 2 * 1408,  # as in the paper's table, and three norms behind blocks of stage 3
    "clip_swinv2_l": 195_202_932,
}
# The same with a table in each block and without the final norm; SwinV2 as it was distilled.
FINETUNED = {
    "clip_vit_base_100_finetune": 85_760_448,
    "clip_vit_base_300_finetune": 85_760_448,
    "clip_vit_large_300_finetune": 303_308_288,
    "deit_vit_base_300_finetune": 85_760_448,
    "dino_vit_base_300_finetune": 85_760_448,
    "esvit_swinv2_base_300_finetune": 86_893_816,
    "swinv2_g_finetune": 2_997_843_680,
    "clip_vit_large_300_22k_finetune": 303_308_288,
    "clip_vit_large_300_336_finetune": 303_308_288 + 24 * 16 * (47**2 - 31**2),  # tables of 24 x 24 tokens, not 16 x 16
}
# Position tables of 32 x 32 and 37 x 37 tokens.
SEGMENTED = {
    "upernet_vit_base": 85_760_448 + 12 * 12 * (63**2 - 27**2),
    "upernet_vit_large": 303_308_288 + 24 * 16 * (73**2 - 31**2),
    "upernet_swinv2_base": 86_893_816,
    "upernet_swinv2_g": 2_997_843_680,
    "mask2former_swinv2_base": 86_893_816,
}
DETECTED = {
    "mask_rcnn_vit_base": 85_760_448 + 12 * 12 * (127**2 - 27**2),  # tables of 64 x 64 tokens
    "cascade_swinv2_base": 86_893_816,
    "htc_swinv2_g_objects365": 2_997_843_680,
    "htc_swinv2_g": 2_997_843_680,
}
PIXELS = {**SEGMENTED, **DETECTED}
IMAGES = {
    "118 287": 118_287,
    "1.28 M": 1_281_167,
    "14.2 M": 14_197_122,
    "20 210": 20_210,
}  # of ImageNet-1K, 22K and ADE20K
GIANTS = {
    # tokens a side of the student and of the teacher, and how those are brought to these; the teacher's width, GMACs
    "swinv2_g": (6, 6, None, 4096, 370.7),
    "swinv2_g_224": (7, 7, None, 4096, 506.9),
    "clip_swinv2_g": (8, 16, "area", 1024, 81.0),
    "eva_swinv2_g": (8, 16, "area", 1408, 267.0),
    "clip_swinv2_h": (8, 16, "area", 1024, 81.0),
    "clip_swinv2_l": (8, 16, "area", 1024, 81.0),
}


def distilled(name: str) -> str:
    """The recipe whose student a fine-tuning goes on with."""
    return re.sub(r"(_22k|_336)?_finetune$", "", name)


def weightless(settings: config.Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, Teacher]:
    """The teachers of a recipe as adapters build them for weight files, on the meta device and with no weights."""
    monkeypatch.setattr(teachers.convert, "read", lambda *_: {})
    monkeypatch.setattr(teachers.convert, "load", lambda *_, **__: None)
    monkeypatch.setattr(teachers, "_load_timm", lambda *_: None)
    monkeypatch.setattr(frozen, "_hash_weights", lambda *_: "")
    found = {}
    for name, section in config.teachers_of(settings).items():
        arguments = {**dataclasses.asdict(section), "weights": "a file"}
        for key in ("resample", "weight", "whiten"):
            del arguments[key]
        with torch.device("meta"):
            found[name] = teachers.load_teacher(**arguments)
    return found


def vit_count(width: int, depth: int, patch: int, heads: int, grid: int) -> int:
    block = 4 * width**2 + 3 * width + 8 * width**2 + 5 * width + 4 * width + 2 * width  # attention, mlp, norms, scales
    embeddings = 3 * patch**2 * width + width + width + 2 * width
    return depth * block + embeddings + ((2 * grid - 1) ** 2 + 3) * heads


def test_all_recipes_are_counted() -> None:
    assert set(config.recipes()) == {*COUNTS, *FINETUNED, *PIXELS, "demo", "demo_finetune"}


@pytest.mark.parametrize("name", [*COUNTS, *FINETUNED, *PIXELS])
def test_parameters_on_the_meta_device(name: str) -> None:
    assert parameters(config.load(name)) == {**COUNTS, **FINETUNED, **PIXELS}[name]


def test_vit_counts_are_the_closed_form() -> None:
    assert vit_count(768, 12, 16, 12, 14) == COUNTS["clip_vit_base_300"]
    assert vit_count(1024, 24, 14, 16, 16) == COUNTS["clip_vit_large_300"]
    for name, width, depth, table in (("base", 768, 12, 732 * 12), ("large", 1024, 24, 964 * 16)):
        distilled, finetuned = COUNTS[f"clip_vit_{name}_300"], FINETUNED[f"clip_vit_{name}_300_finetune"]
        assert finetuned == distilled + (depth - 1) * table - 2 * width


@pytest.mark.parametrize(
    ("name", "epochs", "drop_path", "min_scale", "base_lr", "warmup_base", "min_base"),
    [
        ("clip_vit_base_100", 100, 0.1, 0.67, 3e-4, 5e-7, 5e-6),
        ("clip_vit_base_300", 300, 0.2, 0.08, 3e-4, 5e-7, 5e-6),
        ("clip_vit_large_300", 300, 0.3, 0.08, 3e-4, 5e-7, 5e-6),
        ("deit_vit_base_300", 300, 0.3, 0.08, 3e-4, 5e-7, 5e-6),
        ("dino_vit_base_300", 300, 0.3, 0.08, 3e-4, 5e-7, 5e-6),
        ("esvit_swinv2_base_300", 300, 0.3, 0.08, 2e-4, 1e-6, 1e-5),
    ],
)
def test_effective_numbers_are_the_official_ones(
    name: str, epochs: int, drop_path: float, min_scale: float, base_lr: float, warmup_base: float, min_base: float
) -> None:
    """SwinTransformer/Feature-Distillation configs/pretrain: rates are given per 512 samples, the batch is 16 x 128."""
    settings = config.load(name)
    scale = settings.optim.batch_size / 512
    assert settings.optim.batch_size == 2048
    assert settings.optim.lr == pytest.approx(base_lr * scale)
    assert settings.schedule.warmup_lr == pytest.approx(warmup_base * scale)
    assert settings.schedule.min_lr == pytest.approx(min_base * scale)
    assert (settings.schedule.epochs, settings.schedule.warmup_epochs) == (epochs, 10)
    assert settings.student.args["drop_path_rate"] == drop_path
    assert settings.data.scale == (min_scale, 1.0)
    assert (settings.optim.weight_decay, settings.optim.clip_grad, settings.objective.beta) == (0.05, 3.0, 2.0)
    assert settings.data.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "batch", "base_lr", "low_base", "drop_path", "decay"),
    [
        ("clip_vit_base_100", 100, 20, 2048, 1.25e-3, 2.5e-7, 0.1, 0.65),
        ("clip_vit_base_300", 100, 20, 2048, 1.25e-3, 2.5e-7, 0.3, 0.60),
        ("deit_vit_base_300", 100, 20, 2048, 1.25e-3, 2.5e-7, 0.3, 0.65),
        ("dino_vit_base_300", 100, 20, 2048, 1.5e-3, 2.5e-7, 0.2, 0.60),
        ("clip_vit_large_300", 50, 5, 2048, 2.5e-4, 5e-7, 0.4, 0.75),
        ("esvit_swinv2_base_300", 100, 20, 1024, 1.25e-3, 2.5e-7, 0.4, 0.80),
    ],
)
def test_fine_tuning_numbers_are_the_official_ones(
    name: str, epochs: int, warmup: int, batch: int, base_lr: float, low_base: float, drop_path: float, decay: float
) -> None:
    """SwinTransformer/Feature-Distillation configs/finetune: rates are given per 512 samples."""
    settings, distilled = config.load(f"{name}_finetune"), config.load(name)
    optim, schedule, classify = settings.optim, settings.schedule, settings.classify
    assert optim.batch_size == batch == settings.memory.micro_batch * 16
    assert optim.lr == pytest.approx(base_lr * batch / 512)
    assert schedule.warmup_lr == schedule.min_lr == pytest.approx(low_base * batch / 512)
    assert (schedule.epochs, schedule.warmup_epochs) == (epochs, warmup)
    assert (optim.weight_decay, optim.clip_grad, optim.layer_decay, optim.ema) == (0.05, 5.0, decay, None)
    assert (classify.classes, classify.head_scale, classify.label_smoothing) == (1000, 1e-3, 0.1)
    assert (classify.mixup, classify.cutmix, classify.mix_prob, classify.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (classify.randaugment, classify.erase) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (settings.data.interpolation, settings.data.image_size, classify.crop_ratio) == ("bicubic", 224, 224 / 256)
    same = {key: value for key, value in distilled.student.args.items() if key in settings.student.args}
    assert settings.student.args == {
        **same,
        "drop_path_rate": drop_path,
        **({"position": "per_block", "final_norm": False} if settings.student.model == "vit" else {}),
    }


def test_swinv2_g_is_fine_tuned_as_in_its_paper() -> None:
    """arXiv 2111.09883: 640 px, 10 epochs, 2 of warm-up; the windows are those it was distilled with."""
    settings, distilled = config.load("swinv2_g_finetune"), config.load("swinv2_g")
    optim, schedule, args = settings.optim, settings.schedule, settings.student.args
    assert (optim.batch_size, optim.lr, optim.weight_decay, optim.clip_grad) == (576, 2.1e-5, 0.1, 100.0)
    assert (schedule.epochs, schedule.warmup_epochs, settings.data.image_size) == (10, 2, 640)
    assert args["drop_path_rate"] == 0.5
    before, now = backbone(distilled), backbone(settings)
    trained = [stage.blocks[0].attn.window[0] for stage in before.layers]
    assert args["pretrained_window_sizes"] == trained == [12, 12, 12, 6]
    assert [stage.blocks[0].attn.window[0] for stage in now.layers] == [40, 40, 40, 20]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_the_teacher_is_known_and_its_tokens_meet_the_students(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config.load(name)
    known = weightless(settings, monkeypatch)
    pairings, module = build_student(settings, known)
    for one, pairing in pairings.items():
        assert module.projectors[one].weight.shape[0] == known[one].width
        assert (pairing.student_grid == pairing.teacher_grid) or settings.teacher.resample
    if name not in GIANTS:
        return
    teacher, pairing = known[""], pairings[""]
    student_side, teacher_side, resample, width, gmacs = GIANTS[name]
    assert pairing.student_grid == (student_side, student_side)
    assert pairing.teacher_grid == (teacher_side, teacher_side)
    assert settings.teacher.resample == resample
    assert teacher_side % student_side == 0  # each token of the student has whole ones of the teacher
    assert teacher.width == width
    assert teacher.flops((settings.data.image_size,) * 2) / 1e9 == pytest.approx(gmacs, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COUNTS, *FINETUNED, *PIXELS])
def test_the_cost_in_the_header_is_that_of_the_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps from images, epochs and batch; FLOP of 3 forwards, of the teacher's and of what is recomputed."""
    settings, text = config.load(name), config.recipes()[name].read_text()
    images = next((count for said, count in IMAGES.items() if f"{said} images" in text), 0)
    assert images or settings.schedule.epochs is None
    found = re.search(
        r"# Cost: ([\d ]+) steps; ([\d.]+) TFLOP per image, ([\d.e+]+) in all: ([\d .]+) A100-days?", text
    )
    assert found
    steps, per_image, total, days = (float(word.replace(" ", "")) for word in found.groups())
    epochs, batch = settings.schedule.epochs, settings.optim.batch_size
    assert config.in_steps(settings, images).schedule.steps == steps
    assert steps == (settings.schedule.steps if epochs is None else round(epochs * images / batch))
    size = (settings.data.image_size,) * 2
    network = backbone(settings)
    forward = 2 * network.flops(size)
    known = weightless(settings, monkeypatch) if name in COUNTS else {}
    heads = student.build_labelled(settings, network).head_flops(size) if name in PIXELS else 0
    teacher = 2 * sum(one.flops(size) for one in known.values())
    again = forward if settings.memory.checkpoint == ("torch",) else 0
    wanted = 3 * (forward + 2 * heads) + teacher + again
    assert per_image * 1e12 == pytest.approx(wanted, rel=0.06)
    assert sum(dataclasses.astuple(student.work_per_image(settings, network, teacher // 2, heads))) == wanted
    assert total == pytest.approx(wanted * steps * settings.optim.batch_size, rel=0.06)
    assert days == pytest.approx(wanted * steps * settings.optim.batch_size / (0.4 * 312e12 * 86400), rel=0.06, abs=0.5)


def test_two_teachers_of_one_student() -> None:
    """Each as where it teaches alone; the losses have equal weights, which sum up to 1."""
    both, clip, dino = (config.load(name) for name in ("clip_dino_vit_base", "clip_vit_base_300", "dino_vit_base_300"))
    alone = {"clip": clip.teacher, "dino": dino.teacher}
    assert both.teachers == {name: dataclasses.replace(one, weight=0.5) for name, one in alone.items()}
    assert dataclasses.replace(both, teachers={}, teacher=clip.teacher) == clip


@pytest.mark.parametrize("name", GIANTS)
def test_giants_are_distilled_alike(name: str) -> None:
    """What is not published follows the other distillations; the commands name a ds_config that is there."""
    settings, text = config.load(name), config.recipes()[name].read_text()
    args = settings.student.args
    assert (settings.optim.batch_size, settings.schedule.epochs, settings.schedule.warmup_epochs) == (2048, 100, 10)
    assert (args["post_norm_init"], args["depth_scaled_init"], args["drop_path_rate"]) == (1e-5, True, 0.3)
    assert 2048 % (settings.memory.micro_batch * 64) == 0  # ranks
    assert "none is published" in text or name == "swinv2_g"
    ds = re.search(r"--ds (ds_configs/\w+\.json)", text)
    assert ds
    assert (Path(__file__).resolve().parent.parent / ds[1]).is_file()
    assert all("ours" in text[text.index(key) :].partition("\n")[0] for key in ("batch_size:", "lr:", "epochs:"))
    if settings.teacher.source == "fdscale:swin_v2":  # trained at 192 px, window 12; the student is of the same shape
        shape = {key: args[key] for key in ("embed_dim", "depths", "num_heads", "window_size", "extra_norm_period")}
        old = {"pretrained_window_sizes": [12, 12, 12, 6]} if settings.data.image_size != 192 else {}
        assert settings.teacher.args == {**shape, **old, "img_size": settings.data.image_size}


def test_the_path_over_imagenet_22k() -> None:
    """From 16 x 16 tokens to 24 x 24, with BEiT-L's settings after the same step (microsoft/unilm, beit)."""
    first, last = (config.load(f"clip_vit_large_300_{step}_finetune") for step in ("22k", "336"))
    usual = config.load("clip_vit_large_300_finetune")
    assert first.classify.classes == 21841
    assert (first.optim, first.classify.mixup) == (usual.optim, usual.classify.mixup)
    assert (last.classify.classes, last.data.image_size, last.classify.mixup, last.classify.cutmix) == (1000, 336, 0, 0)
    optim, schedule = last.optim, last.schedule
    assert (optim.batch_size, optim.lr, optim.weight_decay, optim.layer_decay) == (512, 2e-5, 1e-8, 0.9)
    assert (schedule.epochs, schedule.warmup_epochs, last.student.args["drop_path_rate"]) == (30, 5, 0.4)
    assert backbone(last).grid((336, 336)) == (24, 24)


@pytest.mark.parametrize(
    ("name", "lr", "decay", "layer_decay", "drop_path", "steps", "batch", "warmup", "size"),
    [
        ("vit_base", 7e-4, 0.05, 0.65, 0.1, 160_000, 16, 1500, 512),  # microsoft/unilm beit/semantic_segmentation
        ("swinv2_base", 6e-5, 0.01, 1.0, 0.3, 160_000, 16, 1500, 512),  # Swin-Transformer-Semantic-Segmentation
        ("swinv2_g", 4e-5, 0.05, 1.0, 0.4, 80_000, 32, 750, 640),  # arXiv 2111.09883
    ],
)
def test_segmentation_numbers_are_the_published_ones(
    name: str, lr: float, decay: float, layer_decay: float, drop_path: float, steps: int, batch: int, warmup: int,
    size: int,
) -> None:  # fmt: skip
    settings = config.load(f"upernet_{name}")
    optim, schedule, segment = settings.optim, settings.schedule, settings.segment
    assert (optim.lr, optim.weight_decay, optim.layer_decay, optim.batch_size) == (lr, decay, layer_decay, batch)
    assert settings.student.args["drop_path_rate"] == drop_path
    assert (schedule.shape, schedule.power, schedule.steps, schedule.warmup_steps) == ("poly", 1.0, steps, warmup)
    assert (settings.data.image_size, segment.bounds) == (size, (4 * size, size))
    assert (segment.classes, segment.reduce_zero_label, segment.norm, segment.auxiliary_weight) == (
        150,
        True,
        "batch",
        0.4,
    )
    assert (segment.ratio, segment.most_of_a_class, segment.distort, segment.dropout) == ((0.5, 2.0), 0.75, True, 0.1)


def test_mask2formers_numbers_are_the_published_ones() -> None:
    """facebookresearch/Mask2Former, configs/ade20k/semantic-segmentation; the whole model has 107 M parameters."""
    settings = config.load("mask2former_swinv2_base")
    optim, schedule, segment = settings.optim, settings.schedule, settings.segment
    assert (optim.lr, optim.weight_decay, optim.clip_grad, optim.batch_size) == (1e-4, 0.05, 0.01, 16)
    assert (schedule.shape, schedule.power, schedule.steps, schedule.warmup_steps) == ("poly", 0.9, 160_000, 0)
    assert (settings.data.image_size, segment.bounds, segment.inference) == (640, (2560, 640), "whole")
    assert (segment.queries, segment.encoder_layers, segment.decoder_layers, segment.points) == (100, 6, 9, 12544)
    assert (segment.channels, segment.ratio, segment.most_of_a_class, segment.distort) == (256, (0.5, 2.0), 1.0, True)
    assert settings.student.args["drop_path_rate"] == 0.3
    module = student.build_labelled(settings, backbone(settings))
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(107e6, rel=0.01)


def test_the_larger_window_of_swinv2_g_is_a_setting() -> None:
    """What the header says for 896 px: 56 x 56 tokens a window, and a batch of any number of ranks up to 32."""
    text = config.recipes()["upernet_swinv2_g"].read_text()
    line = next(line for line in text.splitlines() if line.startswith("# At 896 px"))
    changes = [word for word in shlex.split(line.partition(":")[2]) if word != "--set"]
    settings = config.load("upernet_swinv2_g", changes)
    assert [stage.blocks[0].attn.window[0] for stage in backbone(settings).layers] == [56, 56, 56, 28]
    before = backbone(config.load("upernet_swinv2_g"))
    assert [stage.blocks[0].attn.window[0] for stage in before.layers] == [40, 40, 40, 20]


@pytest.mark.parametrize("name", [*COUNTS, *FINETUNED, *PIXELS, "demo", "demo_finetune"])
def test_the_header_says_source_command_and_expectation(name: str) -> None:
    text = config.recipes()[name].read_text()
    for part in ("# Source:", "# Command:", "# Expected:"):
        assert part in text
    verb = "finetune" if "finetune" in name or name in PIXELS else "distill"
    assert "demo" in name or f"fdscale {verb} {name} " in text


# Widths, depths and images; the rest stays as the recipe has it.
SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_PAIR = {
    "student": {"embed_dim": 16, "depths": [1, 1, 6, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
    "teacher": SMALL_VIT,
    "image_size": 64,
    "teacher_size": 56,
}
SHRINK: dict[str, dict] = {
    "clip_dino_vit_base": {"student": SMALL_VIT, "teacher": SMALL_VIT, "image_size": 32},
    "clip_vit_base_100": {"student": SMALL_VIT, "teacher": SMALL_VIT, "image_size": 32},
    "clip_vit_base_300": {"student": SMALL_VIT, "teacher": SMALL_VIT, "image_size": 32},
    "clip_vit_large_300": {"student": SMALL_VIT, "teacher": SMALL_VIT, "image_size": 28},
    "deit_vit_base_300": {"student": SMALL_VIT, "teacher": SMALL_VIT, "image_size": 32},
    "dino_vit_base_300": {"student": SMALL_VIT, "teacher": SMALL_VIT, "image_size": 32},
    "esvit_swinv2_base_300": {
        "student": {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        "teacher": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        "image_size": 64,
    },
    "swinv2_g": {
        "student": {"embed_dim": 16, "depths": [1, 1, 6, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
        "teacher": {
            "img_size": 64,
            "embed_dim": 16,
            "depths": [1, 1, 6, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 4,
        },
        "image_size": 64,
    },
    **dict.fromkeys(("clip_swinv2_g", "eva_swinv2_g", "clip_swinv2_h", "clip_swinv2_l"), SMALL_PAIR),
    "demo": {
        "student": {"embed_dim": 16, "num_heads": [1, 2], "window_size": 4},
        "teacher": {},
        "image_size": 64,
    },
}


SHRINK["swinv2_g_224"] = SHRINK["swinv2_g"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FINETUNED, "demo_finetune"])
def test_a_tiny_fine_tuning_takes_two_real_steps(name: str, digits: Path, tmp_path: Path, process_group: None) -> None:
    settings, small, change = config.load(name), SHRINK[distilled(name)], dataclasses.replace
    settings = change(
        settings,
        student=change(settings.student, args={**settings.student.args, **small["student"]}),
        data=change(
            settings.data,
            shards=(str(digits / "train"),),
            heldout_shards=str(digits / "heldout"),
            heldout_samples=10,
            image_size=small["image_size"],
            workers=0,
        ),
        optim=change(settings.optim, batch_size=4),
        schedule=change(settings.schedule, steps=2, epochs=None, warmup_steps=1, warmup_epochs=None),
        memory=change(settings.memory, micro_batch=2),
        log=change(settings.log, every=1, tensorboard=False),
    )
    assert finetune(settings, tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[-1]["heldout_samples"] == 10
    start = math.log(settings.classify.classes)  # a small head knows nothing yet
    assert records[1]["loss"] == pytest.approx(start, rel=0.02)
    assert all(record["grad_norm"] > 0 for record in records[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTED)
def test_a_tiny_segmentation_takes_two_real_steps(name: str, tmp_path: Path, process_group: None) -> None:
    settings, change = config.load(name), dataclasses.replace
    vit = settings.student.model == "vit"
    small = (
        SMALL_VIT | {"depth": 4} if vit else SHRINK["swinv2_g" if "_g" in name else "esvit_swinv2_base_300"]["student"]
    )
    size = 4 * settings.student.args["patch_size"] if vit else 64
    scenes.write(tmp_path / "ADE", "training", 8, seed=1)
    scenes.pack(tmp_path / "ADE", tmp_path / "shards", "training")
    settings = change(
        settings,
        student=change(settings.student, args={**settings.student.args, **small}),
        segment=change(
            settings.segment, channels=32, auxiliary_channels=16, bounds=(4 * size, size), stride=size // 2,
            queries=8, encoder_layers=1, decoder_layers=3, points=64,
        ),
        data=change(
            settings.data, shards=(str(tmp_path / "shards"),), heldout_shards=str(tmp_path / "shards"),
            heldout_samples=3, image_size=size, workers=0,
        ),
        optim=change(settings.optim, batch_size=4),
        schedule=change(settings.schedule, steps=2, warmup_steps=1),
        memory=change(settings.memory, micro_batch=2),
        log=change(settings.log, every=1, tensorboard=False),
    )  # fmt: skip
    assert finetune(settings, tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[-1]["heldout_samples"] == 3
    first = records[1]
    if settings.segment.head == "mask2former":
        assert first["loss"] == pytest.approx(
            2 * first["loss_class"] + 5 * first["loss_mask"] + 5 * first["loss_dice"], rel=1e-4
        )
    else:
        assert first["loss_decode"] < 1.2 * math.log(150)  # as a mean over all pixels, those beyond the edges too
        assert first["loss"] == pytest.approx(first["loss_decode"] + 0.4 * first["loss_auxiliary"])
    assert all(record["grad_norm"] > 0 for record in records[1:])


@pytest.mark.parametrize(
    ("name", "lr", "decay", "layer_decay", "drop_path", "length", "batch", "size"),
    [
        ("mask_rcnn_vit_base", 1e-4, 0.1, 0.7, 0.1, 100, 64, 1024),  # arXiv 2203.16527
        ("cascade_swinv2_base", 1e-4, 0.05, 1.0, 0.2, 36, 16, 1344),  # Swin-Transformer-Object-Detection
        ("htc_swinv2_g_objects365", 1.2e-3, 0.05, 1.0, 0.4, 67_500, 96, 1024),  # arXiv 2111.09883
        ("htc_swinv2_g", 6e-4, 0.05, 1.0, 0.4, 45_000, 96, 1536),  # the same
    ],
)
def test_detection_numbers_are_the_published_ones(
    name: str, lr: float, decay: float, layer_decay: float, drop_path: float, length: int, batch: int, size: int
) -> None:
    settings = config.load(name)
    optim, schedule, detect = settings.optim, settings.schedule, settings.detect
    assert (optim.lr, optim.weight_decay, optim.layer_decay, optim.batch_size) == (lr, decay, layer_decay, batch)
    assert settings.student.args["drop_path_rate"] == drop_path
    assert (schedule.epochs or schedule.steps, settings.data.image_size) == (length, size)
    if name.startswith("htc"):
        network = backbone(settings)
        assert [stage.blocks[0].attn.window[0] for stage in network.layers] == [32] * 4
        assert (detect.masks, detect.classes) == ((True, 80) if name == "htc_swinv2_g" else (False, 365))
    if name == "cascade_swinv2_base":
        drops = [round(share * 36) for share in schedule.drops]
        assert (drops, detect.short_side, detect.bounds, detect.box_loss) == ([27, 33], (480, 800), (1333, 800), "giou")


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTED)
def test_a_tiny_detection_takes_two_real_steps(name: str, tmp_path: Path, process_group: None) -> None:
    settings, change = config.load(name), dataclasses.replace
    vit = settings.student.model == "vit"
    small = (
        SMALL_VIT | {"depth": 4} if vit else SHRINK["swinv2_g" if "_g" in name else "esvit_swinv2_base_300"]["student"]
    )
    stuff = settings.detect.stuff
    coco.write(tmp_path / "coco", "train2017", 8, seed=1, stuff=stuff > 0)
    make(tmp_path / "coco", tmp_path / "shards", split="train2017")
    detect = change(
        settings.detect, channels=16, jitter=(0.8, 1.5), short_side=(64, 96), bounds=None, stuff=stuff and 3
    )
    settings = change(
        settings,
        student=change(settings.student, args={**settings.student.args, **small}),
        detect=change(detect, classes=2, norm="none"),
        data=change(
            settings.data, shards=(str(tmp_path / "shards"),), heldout_shards=str(tmp_path / "shards"),
            heldout_samples=3, image_size=128, workers=0,
        ),
        optim=change(settings.optim, batch_size=4),
        schedule=change(settings.schedule, steps=2, epochs=None, warmup_steps=1),
        memory=change(settings.memory, micro_batch=2),
        log=change(settings.log, every=1, tensorboard=False),
    )  # fmt: skip
    assert finetune(settings, tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[-1]["heldout_samples"] == 3
    assert 0.8 < records[1]["loss_classes_0"] / math.log(3) < 1.6  # heads know nothing yet
    assert all(record["grad_norm"] > 0 for record in records[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRINK)
def test_a_tiny_variant_takes_two_real_steps(name: str, shards: Path, tmp_path: Path, process_group: None) -> None:
    settings, small = config.load(name), SHRINK[name]
    change = dataclasses.replace
    image = {"img_size": small["image_size"]} if settings.student.model == "vit" else {}
    image |= {"img_size": small["image_size"]} if settings.teacher.source.startswith("timm:swin") else {}

    def shrunk(teacher: keys.Teacher) -> keys.Teacher:
        args = {**teacher.args, **small["teacher"], **image}
        return change(teacher, args=args, weights="random", key=None, image_size=small.get("teacher_size"))

    settings = change(
        settings,
        student=change(settings.student, args={**settings.student.args, **small["student"]}),
        teacher=settings.teacher if settings.teachers else shrunk(settings.teacher),
        teachers={name: shrunk(teacher) for name, teacher in settings.teachers.items()},
        data=change(settings.data, shards=(str(shards),), image_size=small["image_size"], workers=0),
        optim=change(settings.optim, batch_size=4),
        schedule=change(settings.schedule, steps=2, epochs=None, warmup_steps=1, warmup_epochs=None),
        memory=change(settings.memory, micro_batch=2),
        log=change(settings.log, every=1, tensorboard=False),
    )
    assert distill(settings, tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(0 < record["loss"] < 2 and record["grad_norm"] > 0 for record in records)
    assert torch.isfinite(torch.tensor([record["loss"] for record in records])).all()
