"""Reading recipes: what is right comes out as written, what is wrong is one message that names place and remedy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fdscale import UserError, config

TWO = "teachers: {clip: {source: timm:x}, dino: {source: timm:y, weight: 2}}\nschedule: {steps: 10}\n"
MINIMAL = "teacher: {source: timm:x}\nschedule: {steps: 10}\n"


def recipe(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_values_arrive_typed(tmp_path: Path) -> None:
    text = MINIMAL + "optim: {lr: 2e-4, betas: [0.9, 0.98], batch_size: 64}\nmemory: {checkpoint: torch}\n"
    settings = config.load(
        recipe(tmp_path, text), ["data.scale=[0.5, 1]", "student.args.embed_dim=32", "log.wandb=null"]
    )
    assert settings.optim.lr == 2e-4  # PyYAML itself reads 2e-4 as text
    assert settings.optim.betas == (0.9, 0.98)
    assert settings.memory.checkpoint == ("torch",)
    assert settings.data.scale == (0.5, 1.0)
    assert settings.student.args == {"embed_dim": 32}


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    for name in config.recipes():
        settings = config.load(name)
        assert config.load(recipe(tmp_path, config.dump(settings))) == settings
        assert config.from_dict(config.as_dict(settings), "test") == settings


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (MINIMAL + "optim: {learning_rate: 1}", [], ["mine.yaml", "optim.learning_rate", "known here: batch_size, lr"]),
        (MINIMAL + "optimizer: {lr: 1}", [], ["unknown key optimizer", "did you mean 'optim'"]),
        (MINIMAL + "optim: {batch_sise: 8}", [], ["optim.batch_sise", "did you mean 'batch_size'"]),
        (MINIMAL + "optim: {batch_size: many}", [], ["optim.batch_size", "whole number", "'many'"]),
        (MINIMAL + "optim: {batch_size: 2.5}", [], ["optim.batch_size", "whole number"]),
        (MINIMAL + "optim: {batch_size: true}", [], ["optim.batch_size", "whole number", "True"]),
        (MINIMAL + "optim: {batch_size: 0}", [], ["optim.batch_size", "at least 1"]),
        (MINIMAL + "optim: {lr: .nan}", [], ["optim.lr", "at least 0"]),
        (MINIMAL + "optim: {lr: .inf}", [], ["optim.lr", "must be finite"]),
        (MINIMAL + "optim: {betas: [0.9, 1.0]}", [], ["optim.betas", "at most"]),
        (MINIMAL + "data: {seed: 100000000000000000000}", [], ["data.seed", "at most"]),
        (MINIMAL + "optim: {betas: [0.9]}", [], ["optim.betas", "list of 2 numbers"]),
        (MINIMAL + "data: {flip: 2}", [], ["data.flip", "at most 1"]),
        (MINIMAL + "data: {scale: [0.9, 0.1]}", [], ["data.scale", "rising"]),
        (MINIMAL + "student: {model: swin}", [], ["student.model", "one of swin_v2, vit, or python:MODULE:CLASS"]),
        (MINIMAL + "memory: {checkpoint: [torch, tourch]}", [], ["memory.checkpoint", "did you mean 'torch'"]),
        (MINIMAL + "optim: 3", [], ["optim must be a mapping", "3"]),
        (MINIMAL + "schedule: {steps: 5}", [], ["schedule", "appears twice"]),
        ("- 1\n", [], ["the recipe must be a mapping"]),
        ("a: [1\n", [], ["not readable as YAML"]),
        ("schedule: {}", [], ["exactly one of schedule.steps and schedule.epochs"]),
        ("schedule: {steps: 1, epochs: 1}", [], ["exactly one of schedule.steps and schedule.epochs"]),
        (MINIMAL, ["optim.lr"], ["--set optim.lr", "expected section.key=value"]),
        (MINIMAL, ["optim.lrr=1"], ["optim.lrr", "did you mean 'lr'"]),
        (MINIMAL, ["optin.lr=1"], ["unknown section optin", "did you mean 'optim'"]),
        (MINIMAL, ["optim.lr=fast"], ["optim.lr", "a number", "'fast'"]),
        (MINIMAL, ["optim.lr.x=1"], ["optim.lr has no keys inside"]),
        (MINIMAL, ["data.scale=[1"], ["not readable as YAML", "quote it"]),
        (TWO + "teacher: {source: timm:z}", [], ["set either teacher, for one, or teachers, for several"]),
        (TWO, ["teacher.source=timm:z"], ["set either teacher"]),
        (TWO, ["teachers.clpi.weights=f"], ["no teacher clpi", "did you mean 'clip'", "it has clip, dino"]),
        (TWO, ["teachers.clip.wieght=2"], ["unknown key teachers.clip.wieght", "did you mean 'weight'"]),
        (TWO, ["teachers.clip.weight=0"], ["teachers.clip.weight", "at least"]),
        (TWO, ["teachers.clip=2"], ["expected teachers.clip.key=value"]),
        (TWO, ["teachers.clip.source.x=2"], ["teachers.clip.source has no keys inside"]),
        (MINIMAL, ["teachers.clip.weights=f"], ["no `teachers`", "the section teacher"]),
        ("teachers: {a: 3}\nschedule: {steps: 1}", [], ["teachers.a must be a mapping", "3"]),
        ("teachers: [a]\nschedule: {steps: 1}", [], ["teachers must be a mapping of names to sections"]),
        ("teachers: {a: {whiten: no}}\nschedule: {steps: 1}", [], ["teachers.a.whiten"]),
        ("teachers: {A: {}}\nschedule: {steps: 1}", [], ["teachers.A: a teacher's name must be", "small letters"]),
        ("teachers: {1: {}}\nschedule: {steps: 1}", [], ["teachers.1: a teacher's name must be"]),
        ("teachers: {b_ema: {}}\nschedule: {steps: 1}", [], ["teachers.b_ema", "not ending in ema"]),
        (MINIMAL, ["optim.lr=1e-5", "schedule.min_lr=1e-3"], ["must not exceed optim.lr"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config.load(recipe(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


def test_several_teachers_are_sections_by_name(tmp_path: Path) -> None:
    settings = config.load(recipe(tmp_path, TWO), ["teachers.clip.args.depth=3", "teachers.dino.dtype=bfloat16"])
    assert settings.teachers["clip"].args == {"depth": 3}
    assert (settings.teachers["dino"].dtype, settings.teachers["dino"].weight) == ("bfloat16", 2.0)
    other = config.load(recipe(tmp_path, config.dump(settings)))
    assert other == settings
    turned = dataclasses.replace(settings, teachers=dict(reversed(settings.teachers.items())))
    assert list(config.teachers_of(turned)) == ["clip", "dino"]
    assert config.trajectory(turned) == config.trajectory(settings)
    keys = config.trajectory(settings).keys()
    assert {"teachers.clip.source", "teachers.dino.source", "teachers.dino.weight"} <= keys
    assert not keys & {"teacher.source", "teachers.clip.weight", "teachers.clip.weights", "objective.whiten_samples"}
    assert config.key_of("clip") == "teachers.clip"


def test_one_teacher_has_the_keys_of_old_runs(tmp_path: Path) -> None:
    """Those of before there could be several, unless one of the new keys is used."""
    old = {"source", "args", "image_size", "feature", "mean", "std", "dtype", "resample"}
    settings = config.load(recipe(tmp_path, MINIMAL))
    assert list(config.teachers_of(settings)) == [""]
    kept = {key for key in config.trajectory(settings) if key.startswith(("teacher", "objective."))}
    assert kept == {*(f"teacher.{key}" for key in old), "objective.beta"}
    used = config.trajectory(config.load(recipe(tmp_path, MINIMAL), ["teacher.whiten=phi_s", "teacher.weight=2"]))
    assert used.keys() - kept >= {"teacher.whiten", "teacher.weight", "objective.whiten_samples"}


def test_recipes_are_found_or_named() -> None:
    with pytest.raises(UserError, match="did you mean 'clip_vit_base_300'"):
        config.load("clip_vit_base_30")
    with pytest.raises(UserError, match="no such recipe file"):
        config.load("nowhere/x.yaml")


def test_lengths_in_epochs_become_steps(tmp_path: Path) -> None:
    settings = config.load("clip_vit_base_300")
    resolved = config.in_steps(settings, 1_281_167).schedule  # ImageNet-1K: 625.57 steps of 2048 an epoch
    assert (resolved.steps, resolved.warmup_steps, resolved.epochs) == (187_671, 6256, None)
    short = config.load(recipe(tmp_path, MINIMAL), ["schedule.warmup_steps=10"])
    with pytest.raises(UserError, match="not shorter than the run"):
        config.in_steps(short, 100)


def test_trajectory_holds_what_changes_the_run_and_nothing_else() -> None:
    settings = config.load("demo")
    before = config.trajectory(settings)
    for key, other in (("log.every", 7), ("save.keep", 9), ("memory.micro_batch", 8), ("data.workers", 3)):
        section, name = key.split(".")
        changed = dataclasses.replace(getattr(settings, section), **{name: other})
        assert config.trajectory(dataclasses.replace(settings, **{section: changed})) == before
    for key, other in (("optim.lr", 1e-5), ("data.seed", 3), ("objective.beta", 1.0), ("student.seed", 1)):
        section, name = key.split(".")
        changed = dataclasses.replace(getattr(settings, section), **{name: other})
        after = config.trajectory(dataclasses.replace(settings, **{section: changed}))
        assert {k for k in after if after[k] != before[k]} == {key}
        assert config.digest(after) != config.digest(before)


def test_every_field_has_a_meaning() -> None:
    for key, default, entry in config.fields():
        assert len(entry.metadata["doc"]) > 5, key
        assert default == getattr(getattr(config.Config(), key.split(".")[0]), key.split(".")[1])


def test_a_new_shape_of_schedule_leaves_old_runs_as_they_were() -> None:
    settings = config.load("demo")
    assert not {"schedule.shape", "schedule.power"} & config.trajectory(settings).keys()
    poly = config.trajectory(config.load("demo", ["schedule.shape=poly", "schedule.power=0.9"]))
    assert (poly["schedule.shape"], poly["schedule.power"]) == ("poly", 0.9)


def test_runs_with_upernet_know_nothing_of_another_head() -> None:
    upernet, other = (config.trajectory(config.load(f"{head}_swinv2_base")) for head in ("upernet", "mask2former"))
    new = {f"segment.{key}" for key in ("head", "queries", "encoder_layers", "decoder_layers", "points")}
    assert not new & upernet.keys()
    assert new <= other.keys()
    assert other["segment.queries"] == 100


def test_crops_leave_no_gap() -> None:
    words = [
        "segment.classes=3",
        "classify.classes=null",
        "data.image_size=64",
        "schedule.steps=1",
        "schedule.epochs=null",
    ]
    assert config.load("upernet_vit_base", [*words, "segment.stride=64"]).segment.stride == 64
    config.load("upernet_vit_base", [*words, "segment.stride=65", "segment.inference=whole"])
    with pytest.raises(UserError, match=r"segment\.stride is 65, more than data\.image_size 64"):
        config.load("upernet_vit_base", [*words, "segment.stride=65"])


def test_a_task_is_fixed_by_its_own_sections() -> None:
    """Segmentation by segment, not by classify; keys of evaluation alone do not count."""
    segments = config.load("upernet_vit_base")
    assert config.task_of(segments) == "segment"
    assert config.together(segments) == 1
    kept = config.trajectory(segments)
    assert {key.partition(".")[0] for key in kept} == {"student", "segment", "data", "optim", "schedule"}
    for change in ("segment.inference=whole", "segment.stride=100", "segment.mirror=true", "segment.scales=[1, 2]"):
        assert config.trajectory(config.load("upernet_vit_base", [change])) == kept
    assert config.trajectory(config.load("upernet_vit_base", ["segment.norm=group"])) != kept
    assert not any(key.startswith("segment.") for key in config.trajectory(config.load("demo_finetune")))
    for change, says in (
        ("segment.ratio=[2, 1]", "segment.ratio must be two rising"),
        ("segment.classes=255", "segment.classes must be at most 254"),
        ("segment.scales=[]", "segment.scales"),
        ("segment.inference=slid", "did you mean 'slide'"),
        ("classify.classes=3", "classify.classes and segment.classes are set"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            config.load("upernet_vit_base", [change])
