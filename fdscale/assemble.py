"""The parts of a distillation, from a config: data, teacher, student, and how they fit. Nothing here trains or writes.

Everything that has to know what a recipe builds (training, planning, diagnosis, pictures) asks this module, so that all
see the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fdscale import UserError, config, dist, student
from fdscale.data import features
from fdscale.data.augment import eval_view
from fdscale.data.features import Features, Plan
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.data.stream import Complete, chosen_batches
from fdscale.engine import memory
from fdscale.inputs import Inputs, heldout_batches, open_inputs, training_batches, training_samples
from fdscale.kernels import attention, check
from fdscale.models.pairing import Pairing, pair
from fdscale.models.teachers import Teacher, load_teacher
from fdscale.objective import Distiller, Goal


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a distillation is made of, before any of it trains; the module lives on the meta device."""

    inputs: Inputs
    teachers: dict[str, Teacher]  # by name, here and below; one teacher is called "" (`config.teachers_of`)
    pairings: dict[str, Pairing]
    module: Distiller
    cached: dict[str, Features]  # the teachers' features, where they are replayed; else empty

    @property
    def settings(self) -> config.Config:
        """The config, with all lengths in steps."""
        return self.inputs.settings


def assemble(settings: config.Config, world: int, teachers: dict[str, Teacher] | None = None) -> Parts:
    """Check and build everything that needs no process group; raises UserError before anything is written.

    teachers: those of the config, where they are built already.
    """
    config.check_verb(settings, "distill")
    inputs = open_inputs(settings, world)
    settings = inputs.settings
    teachers = teachers or build_teachers(settings)
    parts = Parts(inputs, teachers, *build_student(settings, teachers), cached={})
    folder = settings.cache.features
    if folder is None:
        return parts
    cached = {name: Features(cache_folder(folder, name), cache_plan(parts, name)) for name in teachers}
    if dist.rank() == 0:  # one look at every file is enough for all ranks
        for one in cached.values():
            one.check_sizes()
    return dataclasses.replace(parts, cached=cached)


def build_teachers(settings: config.Config, shapes_only: bool = False) -> dict[str, Teacher]:
    """All teachers of a config by name; see `build_teacher`."""
    return {name: build_teacher(settings, name, shapes_only) for name in config.teachers_of(settings)}


def build_teacher(settings: config.Config, name: str = "", shapes_only: bool = False) -> Teacher:
    """A teacher of a config; shapes_only: without weights (`load_teacher`), and by the reference alone.

    Raises UserError where memory.kernels, or the environment, asks for what cannot run here.
    """
    of = config.teachers_of(settings)[name]
    with _keys_named(name):
        teacher = load_teacher(
            of.source,
            weights=of.weights,
            image_size=of.image_size,
            args=of.args,
            dtype=of.dtype,
            hold=of.hold,
            feature=of.feature,
            key=of.key,
            mean=of.mean,
            std=of.std,
            shapes_only=shapes_only,
        )
    if not shapes_only:
        let_compute(teacher, settings)
    return teacher


def teacher_alone(settings: config.Config, name: str = "") -> Teacher:
    """The teacher of a recipe, of several the one of this name, on the device; for verbs that look at it itself.

    Raises UserError where the recipe has none such.
    """
    known = {name: teacher for name, teacher in config.teachers_of(settings).items() if teacher.source}
    if name not in known:
        called = ", ".join(one or "one without a name" for one in known) or "none"
        raise UserError(f"the recipe has no teacher {name or 'without a name'}: it has {called}")
    return build_teacher(settings, name).to(dist.device())


def let_compute(teacher: Teacher, settings: config.Config) -> None:
    """Give a teacher the kernels and the compiling of the section `memory`. Raises UserError as `build_teacher`."""
    if teacher.is_ours:
        wanted = settings.memory.kernels
        memory.compute_by(teacher.network, attention.choose(wanted, dist.device()), check.fuses(wanted, dist.device()))
    if "teacher" in settings.memory.compile:
        teacher.compile()


@contextlib.contextmanager
def _keys_named(name: str) -> Iterator[None]:
    """Errors speak of keys of `teacher`; of several teachers, say which one's they are."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"\bteacher\.(?=[a-z])", f"{config.key_of(name)}.", str(error))) from error


def cache_folder(folder: str, name: str) -> str:
    """Where a teacher's features lie: in a directory of its own for each of several."""
    return os.path.join(folder, name) if name else folder


def cache_plan(parts: Parts, name: str = "") -> Plan:
    """What a feature cache of this distillation is, for one teacher. Raises UserError without `cache.epochs`."""
    settings, pairing = parts.settings, parts.pairings[name]
    span = parts.inputs.order.span
    if span is None:
        raise UserError("cache.epochs is not set: how many epochs of features to write, such as --set cache.epochs=10")
    full = parts.inputs.identity() | teachers_identity(parts)
    key = config.key_of(name)
    plan = Plan(
        span=span,
        tokens=pairing.tokens,
        width=parts.teachers[name].width,
        stored=stored_as(settings),
        micro_batch=settings.memory.micro_batch,
        per_file=1,
        # Of the student only the tokens that it can be compared with count, and of the batch only its lanes.
        # A teacher of several has the same features as the same one alone, whatever they are weighted or whitened by.
        identity={key: value for key, value in full.items() if key.startswith(("data.", "content of data."))}
        | {
            known.replace(key, "teacher"): value
            for known, value in full.items()
            if known.removeprefix("content of ").startswith(f"{key}.")
            and known not in (f"{key}.weight", f"{key}.whiten")
        }
        | {"teacher's tokens before the grid": list(pairing.teacher_kept), "token grid": list(pairing.student_grid)},
    )
    # A file ends where a micro-batch ends, so that it does not matter which were written before a stop.
    batches = max(1, settings.cache.file_mib * 2**20 // (plan.record_bytes * plan.micro_batch))
    return dataclasses.replace(plan, per_file=batches * plan.micro_batch)


def stored_as(settings: config.Config) -> str:
    """`cache.dtype` as `fdscale.data.features` names it."""
    return "float32" if settings.cache.dtype == "same" else settings.cache.dtype


def build_student(settings: config.Config, teachers: dict[str, Teacher]) -> tuple[dict[str, Pairing], Distiller]:
    """The pairing of tokens with each teacher, and the trainable module, on the meta device."""
    pairings, module = join(settings, student.build(settings), teachers)
    module.fused = check.fuses(settings.memory.kernels, dist.device())
    return pairings, module


def join(settings: config.Config, backbone: Any, teachers: dict[str, Teacher]) -> tuple[dict[str, Pairing], Distiller]:
    """The same of a backbone that is there already, and nothing fused."""
    size = (settings.data.image_size, settings.data.image_size)
    pairings, goals = {}, {}
    for name, teacher in teachers.items():
        of = config.teachers_of(settings)[name]
        if name and hasattr(nn.ModuleDict(), name):
            raise UserError(f"teachers.{name}: torch has another use for this name; choose another one")
        with _keys_named(name):
            paired = pair(backbone.prefix, backbone.grid(size), teacher.prefix, teacher.grid(size), of.resample)
        pairings[name] = paired
        goals[name] = Goal(teacher.width, paired.align_student, of.weight, phi_s=of.whiten == "phi_s")
    with torch.device("meta"):
        return pairings, Distiller(backbone, goals, settings.objective.beta)


def teachers_identity(parts: Parts) -> dict[str, Any]:
    """What a distillation's trajectory depends on besides what all do (`Inputs.identity`)."""
    return {
        f"content of {config.key_of(name)}.weights": teacher.fingerprint() for name, teacher in parts.teachers.items()
    }


def learnt_tokens(images: Tensor, teacher: Teacher, pairing: Pairing) -> Tensor:
    """The teacher's tokens (B, L, T) that answer the student's, from RGB in [0, 1]: float32, not whitened."""
    return pairing.align_teacher(teacher(images).float())


def training_target(parts: Parts, batch: dict[str, Any], images: Tensor, name: str = "") -> Tensor:
    """A teacher's tokens for a micro-batch of `train_stream`, and its RGB in [0, 1]: from the cache or live.

    Both give the same: where a cache holds 8 bits, the live teacher's tokens are rounded to them too.
    """
    if parts.cached:
        return parts.cached[name].tokens(batch["cached"][name], images.device)
    tokens = learnt_tokens(images, parts.teachers[name], parts.pairings[name])
    return features.decode(*features.encode(tokens, stored_as(parts.settings)))


def train_stream(parts: Parts, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
    """This rank's micro-batches of training views of the samples start .. stop - 1."""
    return training_batches(parts.inputs, training_samples(parts.inputs), start, stop, _complete(parts.cached))


def numbered_stream(parts: Parts, numbers: Iterable[list[int]]) -> Generator[dict[str, Any], None, None]:
    """Micro-batches of the training views of these numbers, whatever the rank."""
    data = parts.settings.data
    return chosen_batches(
        training_samples(parts.inputs),
        numbers,
        workers=data.workers,
        prefetch=data.prefetch,
        pin_memory=torch.cuda.is_available(),
        complete=_complete(parts.cached),
    )


def _complete(cached: dict[str, Features]) -> Complete | None:
    """What adds the features of a micro-batch to it, in a data worker."""
    return functools.partial(_with_features, cached) if cached else None


def _with_features(cached: dict[str, Features], batch: dict[str, Any]) -> dict[str, Any]:
    return {"cached": {name: one(batch) for name, one in cached.items()}}


def heldout_stream(parts: Parts, index: Index | Folders) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of centre views of the held-out samples, each exactly once over all ranks."""
    data = parts.settings.data
    view = functools.partial(eval_view, size=data.image_size, interpolation=data.interpolation, decoding=data.decode)
    return heldout_batches(parts.settings, index, view)
