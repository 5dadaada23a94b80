"""What to do: the whole typed configuration of a run, every field with its unit and source.

A recipe is YAML, read with a safe loader into frozen sections; `--set section.key=value` overrides it. Anything
unknown, of the wrong type or out of range is a `UserError` that names the file, the key, what was expected and the
nearest valid name. How the run fits the machine (ZeRO stage, offload, precision, buckets) is not here: that is the
ds_config, see `fdscale.engine.initialize`.

The keys themselves, and which of them fix the sequence of weights, are in `fdscale.keys`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fdscale import UserError
from fdscale.keys import Config, Teacher
from fdscale.strict import hints_of, nearest, read_yaml, section, value_of

VERBS = {  # and their tasks
    "distill": ("distill",),
    "cache": ("distill",),
    "finetune": ("finetune", "segment", "detect"),
    "evaluate": ("finetune", "segment", "detect"),
}
MODELS, OWN = ("swin_v2", "vit"), "python:"  # of students: ours, and what the names of others begin with
LABELLED = {
    "finetune": "classify",
    "segment": "segment",
    "detect": "detect",
}  # the task's section, whose classes say so
UNUSED = {  # sections that a task leaves aside
    "distill": tuple(LABELLED.values()),
    **{
        task: ("teacher", "teachers", "objective", "cache", *(one for one in LABELLED.values() if one != own))
        for task, own in LABELLED.items()
    },
}

# ----------------------------------------------------------------------------------------------------------------------
# Reading


def recipes() -> dict[str, Path]:
    """The recipes that ship with fdscale, by name."""
    folder = Path(str(resources.files("fdscale"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe (a shipped name or a YAML file) and apply `section.key=value` overrides.

    Raises UserError naming the file and key for anything unknown, mistyped or out of range.
    """
    path = recipe_path(recipe)
    try:
        tree = read_yaml(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return from_dict(tree if tree is not None else {}, str(path), overrides)


def from_dict(tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """The config of `as_dict` back, with the same checks as a recipe."""
    config = section(Config, tree, "", where)
    for text in overrides:
        config = _override(config, text)
    check(config, f"{where}{' with --set' if overrides else ''}")
    return config


def recipe_path(recipe: str) -> Path:
    """The file of a shipped recipe or a given path. Raises UserError with the nearest name."""
    named = recipes()
    if recipe in named:
        return named[recipe]
    path = Path(recipe)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in recipe:
        raise UserError(f"{recipe}: no such recipe file")
    raise UserError(
        f"no recipe is called {recipe!r}{nearest(recipe, named)}; `fdscale recipes` lists them, and a path to a "
        "YAML file works too"
    )


def _override(config: Config, text: str) -> Config:
    """Apply one `section.key=value`; inside args, `student.args.depths=[2,2,2,2]`."""
    where = f"--set {text}"
    path, equals, raw = text.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2:
        raise UserError(f"{where}: expected section.key=value, for example --set optim.lr=2e-4")
    try:
        value = read_yaml(raw)
    except ValueError:
        raise UserError(
            f"{where}: the value is not readable as YAML; quote it for the shell, for example --set "
            "'data.scale=[0.08, 1]'"
        ) from None
    hints = hints_of(Config)
    if keys[0] not in hints:
        raise UserError(f"{where}: unknown section {keys[0]}{nearest(keys[0], hints)}; known: {', '.join(hints)}")
    if keys[0] == "teachers":
        taught = _override_teacher(config.teachers, keys[1:], value, where)
        return dataclasses.replace(config, teachers={**config.teachers, keys[1]: taught})
    changed = _override_section(getattr(config, keys[0]), keys[1:], value, f"{keys[0]}.", where)
    return dataclasses.replace(config, **{keys[0]: changed})


def _override_teacher(teachers: dict[str, Teacher], keys: list[str], value: Any, where: str) -> Teacher:
    if not teachers:
        raise UserError(f"{where}: the recipe has no `teachers`; its one teacher is the section teacher")
    if keys[0] not in teachers:
        raise UserError(
            f"{where}: the recipe has no teacher {keys[0]}{nearest(keys[0], teachers)}; it has {', '.join(teachers)}"
        )
    if len(keys) < 2:
        raise UserError(f"{where}: expected teachers.{keys[0]}.key=value")
    return _override_section(teachers[keys[0]], keys[1:], value, f"teachers.{keys[0]}.", where)


def _override_section(section: Any, keys: list[str], value: Any, prefix: str, where: str) -> Any:
    """The section with another value; keys: one of its own, and perhaps one inside it."""
    kind = type(section)
    inner = hints_of(kind)
    if keys[0] not in inner:
        raise UserError(
            f"{where}: unknown key {prefix}{keys[0]}{nearest(keys[0], inner)}; known here: {', '.join(inner)}"
        )
    if len(keys) > 1:
        current = getattr(section, keys[0])
        if not isinstance(current, dict) or len(keys) > 2:
            raise UserError(f"{where}: {prefix}{keys[0]} has no keys inside")
        value = {**current, keys[1]: value}
    converted = value_of(kind, keys[0], inner[keys[0]], value, prefix, where)
    return dataclasses.replace(section, **{keys[0]: converted})


def task_of(config: Config) -> str:
    """What a recipe is for, a key of UNUSED."""
    return next((task for task in LABELLED if classes_of(config, task) is not None), "distill")


def classes_of(config: Config, task: str) -> int | None:
    """How many classes a task of LABELLED tells apart; None: the recipe is not for it."""
    return getattr(config, LABELLED[task]).classes


def teachers_of(config: Config) -> dict[str, Teacher]:
    """The teachers of a distillation by name, sorted by it; the one of the section `teacher` is called ""."""
    return dict(sorted(config.teachers.items())) or {"": config.teacher}


def key_of(name: str) -> str:
    """Where a teacher of `teachers_of` stands in a recipe."""
    return f"teachers.{name}" if name else "teacher"


def check_verb(config: Config, verb: str) -> None:
    """Raise UserError where a verb is given a recipe of another kind."""
    task, wanted = task_of(config), VERBS.get(verb)
    if wanted is None or task in wanted:
        return
    if task == "distill":
        raise UserError(
            f"the recipe is for distillation (classify.classes is not set), and `fdscale {verb}` needs the number of "
            "classes: take a recipe for fine-tuning (`fdscale recipes`), or --set classify.classes=1000 (of pixels: "
            "segment.classes, of objects: detect.classes)"
        )
    key = f"{LABELLED[task]}.classes"
    raise UserError(
        f"the recipe is for fine-tuning ({key} is {classes_of(config, task)}): run it with `fdscale finetune`, or set "
        f"{key}=null"
    )


def together(config: Config) -> int:
    """Consecutive samples that must be in one micro-batch: a classifier's training mixes pairs (`data.mixing`)."""
    return 2 if task_of(config) == "finetune" else 1


def check(config: Config, where: str) -> None:
    """Rules that span several keys."""
    schedule = config.schedule
    if (schedule.steps is None) == (schedule.epochs is None):
        raise UserError(
            f"{where}: the schedule needs exactly one of schedule.steps and schedule.epochs (set the other to null)"
        )
    if sorted(schedule.drops) != list(schedule.drops):
        raise UserError(f"{where}: schedule.drops must rise, got {list(schedule.drops)}")
    if schedule.warmup_steps is not None and schedule.warmup_epochs is not None:
        raise UserError(f"{where}: set only one of schedule.warmup_steps and schedule.warmup_epochs")
    if max(schedule.min_lr, schedule.warmup_lr) > config.optim.lr:
        raise UserError(
            f"{where}: schedule.min_lr and schedule.warmup_lr must not exceed optim.lr ({config.optim.lr:g})"
        )
    cache = config.cache
    if cache.epochs is None and (cache.features is not None or cache.dtype != "same"):
        raise UserError(
            f"{where}: cache.features and cache.dtype need cache.epochs, the epochs after which samples repeat"
        )
    _check_teachers(config, where)
    if config.student.model not in MODELS and not config.student.model.startswith(OWN):
        raise UserError(
            f"{where}: student.model is {config.student.model!r}; expected one of {', '.join(MODELS)}, or "
            f"{OWN}MODULE:CLASS for one of your own"
        )
    if task_of(config) != "distill" and cache.epochs is not None:
        raise UserError(f"{where}: cache.epochs is for distillation; leave it out where classify.classes is set")
    named = [f"{LABELLED[task]}.classes" for task in LABELLED if classes_of(config, task) is not None]
    if len(named) > 1:
        raise UserError(f"{where}: {' and '.join(named)} are set; set all but one to null")
    if config.classify.head != "fresh" and config.student.weights is None:
        raise UserError(
            f"{where}: classify.head is {config.classify.head}, but student.weights, which holds it, is not set"
        )
    if config.detect.head != "fresh" and config.student.weights is None:
        raise UserError(f"{where}: detect.head is fitting, but student.weights, another detector, is not set")
    if config.detect.instaboost and not config.detect.masks:
        raise UserError(f"{where}: detect.instaboost moves objects by their masks, but detect.masks is false")
    if config.detect.bounds is not None and max(config.detect.bounds) > config.data.image_size:
        raise UserError(
            f"{where}: detect.bounds {list(config.detect.bounds)} do not fit into the square of data.image_size "
            f"{config.data.image_size}"
        )
    segment = config.segment
    if segment.inference == "slide" and (segment.stride or 0) > config.data.image_size:
        raise UserError(
            f"{where}: segment.stride is {segment.stride}, more than data.image_size {config.data.image_size}: no crop "
            "would see the pixels between"
        )
    if segment.classes and segment.head == "mask2former" and segment.channels % 32:
        raise UserError(
            f"{where}: segment.channels is {segment.channels}; Mask2Former needs a multiple of 32, such as 256"
        )
    if config.memory.micro_batch % together(config):
        raise UserError(
            f"{where}: memory.micro_batch is {config.memory.micro_batch}; fine-tuning mixes samples in pairs and needs "
            "an even number"
        )
    for key, (low, high) in (
        ("data.scale", config.data.scale),
        ("data.ratio", config.data.ratio),
        ("segment.ratio", config.segment.ratio),
        ("detect.jitter", config.detect.jitter),
        ("detect.short_side", config.detect.short_side),
    ):
        if not 0 < low <= high:
            raise UserError(f"{where}: {key} must be two rising positive numbers, got [{low:g}, {high:g}]")


def _check_teachers(config: Config, where: str) -> None:
    """One way of naming teachers, and names that can be part of a column's, a parameter's and a directory's; and what
    sharing them out goes with."""
    if config.memory.teacher == "sharded":
        if "teacher" in config.memory.compile:
            raise UserError(f"{where}: memory.teacher is sharded, and memory.compile names teacher; take one of them")
        for name, teacher in teachers_of(config).items():
            if teacher.hold != "same":
                raise UserError(
                    f"{where}: memory.teacher is sharded, and {key_of(name)}.hold is {teacher.hold}; take one of them"
                )
    if config.teachers and config.teacher != Teacher():
        raise UserError(f"{where}: set either teacher, for one, or teachers, for several by name")
    for name in config.teachers:
        if not re.fullmatch("[a-z][a-z0-9_]{0,31}", str(name)) or str(name).rpartition("_")[2] == "ema":
            raise UserError(
                f"{where}: teachers.{name}: a teacher's name must be up to 32 small letters, digits and underscores, "
                "beginning with a letter, and not ending in ema, which names the average of the weights"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Using


def in_steps(config: Config, samples_per_epoch: int) -> Config:
    """The same config with lengths in steps, so that it means the same run whatever the data is called."""
    schedule = config.schedule
    epoch = samples_per_epoch / config.optim.batch_size  # steps
    steps = schedule.steps if schedule.epochs is None else max(1, round(schedule.epochs * epoch))
    warmup = schedule.warmup_steps or 0 if schedule.warmup_epochs is None else round(schedule.warmup_epochs * epoch)
    assert steps is not None
    if warmup >= steps:
        raise UserError(
            f"schedule: the warm-up of {warmup} steps is not shorter than the run of {steps} steps: lower "
            "schedule.warmup_steps or schedule.warmup_epochs, or train longer"
        )
    resolved = dataclasses.replace(schedule, steps=steps, epochs=None, warmup_steps=warmup, warmup_epochs=None)
    return dataclasses.replace(config, schedule=resolved)


def as_dict(config: Any) -> dict[str, Any]:
    """Plain dictionaries and lists, as YAML and JSON have them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def dump(config: Config) -> str:
    """YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, default_flow_style=None, width=120)


def fields() -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, default, dataclass field) of every option: the reference that `fdscale recipes --keys` prints.

    Those of `teachers`, which are the ones of `teacher` for each name, are left out.
    """
    for name, kind in hints_of(Config).items():
        for entry in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
            yield f"{name}.{entry.name}", getattr(kind(), entry.name), entry


def trajectory(config: Config) -> dict[str, Any]:
    """The dotted keys that fix the sequence of weights, with their values.

    Files are identified by their content elsewhere.
    """
    # Keys that do nothing as they are set are left out, so that runs from before they were there go on.
    excluded = {"student.weights", "classify.head", "detect.head", "teacher.weights"}
    if config.cache.epochs is None:
        excluded |= {"cache.epochs", "cache.dtype"}
    if config.student.linear == "same":
        excluded |= {"student.linear"}
    if config.schedule.shape == "cosine":
        excluded |= {"schedule.shape", "schedule.power"}
    if config.schedule.shape != "steps":
        excluded |= {"schedule.drops"}
    if config.segment.head == "upernet":
        excluded |= {f"segment.{key}" for key in ("head", "queries", "encoder_layers", "decoder_layers", "points")}
    if not config.detect.instaboost:
        excluded |= {"detect.instaboost"}
    teachers = teachers_of(config)
    if all(teacher.whiten != "phi_s" for teacher in teachers.values()):
        excluded |= {"objective.whiten_samples"}
    values = {}
    for key, default, entry in fields():
        section, name = key.split(".")
        if entry.metadata["neutral"] or key in excluded or section in UNUSED[task_of(config)]:
            continue
        if section != "teacher":
            values[key] = getattr(getattr(config, section), name)
            continue
        for named, teacher in teachers.items():
            if name not in ("weight", "whiten", "hold") or getattr(teacher, name) != default:
                values[f"{key_of(named)}.{name}"] = getattr(teacher, name)
    return json.loads(json.dumps(values))


def digest(values: Any) -> str:
    """A short stable hash of plain data."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
