"""The parts of a distillation, from a config: data, teacher, student, and how they fit. Nothing here trains or writes.

Everything that has to know what a recipe builds (training, planning, diagnosis, pictures) asks this module, so that all
see the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fdscale import UserError, config, dist, student
from fdscale.data import features
from fdscale.data.augment import eval_view
from fdscale.data.features import Features, Plan
from fdscale.data.index import Index
from fdscale.data.stream import chosen_batches
from fdscale.engine import memory
from fdscale.inputs import Inputs, heldout_batches, open_inputs, training_batches, training_samples
from fdscale.kernels import attention, check
from fdscale.models.pairing import Pairing, pair
from fdscale.models.teachers import Teacher, load_teacher
from fdscale.objective import Distiller


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a distillation is made of, before any of it trains; the module lives on the meta device."""

    inputs: Inputs
    teacher: Teacher
    pairing: Pairing
    module: Distiller
    cached: Features | None  # the teacher's features, where they are replayed

    @property
    def settings(self) -> config.Config:
        """The config, with all lengths in steps."""
        return self.inputs.settings


def assemble(settings: config.Config, world: int) -> Parts:
    """Check and build everything that needs no process group; raises UserError before anything is written."""
    config.check_verb(settings, "distill")
    inputs = open_inputs(settings, world)
    settings = inputs.settings
    teacher = build_teacher(settings)
    parts = Parts(inputs, teacher, *build_student(settings, teacher), cached=None)
    if settings.cache.features is None:
        return parts
    cached = Features(settings.cache.features, cache_plan(parts))
    if dist.rank() == 0:  # one look at every file is enough for all ranks
        cached.check_sizes()
    return dataclasses.replace(parts, cached=cached)


def build_teacher(settings: config.Config, shapes_only: bool = False) -> Teacher:
    """The teacher of a config; shapes_only: without weights (`load_teacher`), and by the reference alone.

    Raises UserError where memory.kernels, or the environment, asks for what cannot run here.
    """
    teacher = load_teacher(
        settings.teacher.source,
        weights=settings.teacher.weights,
        image_size=settings.teacher.image_size,
        args=settings.teacher.args,
        dtype=settings.teacher.dtype,
        feature=settings.teacher.feature,
        key=settings.teacher.key,
        mean=settings.teacher.mean,
        std=settings.teacher.std,
        shapes_only=shapes_only,
    )
    if teacher.is_ours and not shapes_only:
        wanted = settings.memory.kernels
        memory.compute_by(teacher.network, attention.choose(wanted, dist.device()), check.fuses(wanted, dist.device()))
    return teacher


def cache_plan(parts: Parts) -> Plan:
    """What a feature cache of this distillation is. Raises UserError without `cache.epochs`."""
    settings, pairing = parts.settings, parts.pairing
    span = parts.inputs.order.span
    if span is None:
        raise UserError("cache.epochs is not set: how many epochs of features to write, such as --set cache.epochs=10")
    full = parts.inputs.identity() | teacher_identity(parts)
    plan = Plan(
        span=span,
        tokens=len(pairing.teacher_kept) + pairing.student_grid[0] * pairing.student_grid[1],
        width=parts.teacher.width,
        stored=stored_as(settings),
        micro_batch=settings.memory.micro_batch,
        per_file=1,
        # Of the student only the tokens that it can be compared with count, and of the batch only its lanes.
        identity={key: value for key, value in full.items() if key.startswith(("data.", "teacher.", "content of "))}
        | {"teacher's tokens before the grid": list(pairing.teacher_kept), "token grid": list(pairing.student_grid)},
    )
    # A file ends where a micro-batch ends, so that it does not matter which were written before a stop.
    batches = max(1, settings.cache.file_mib * 2**20 // (plan.record_bytes * plan.micro_batch))
    return dataclasses.replace(plan, per_file=batches * plan.micro_batch)


def stored_as(settings: config.Config) -> str:
    """`cache.dtype` as `fdscale.data.features` names it."""
    return "float32" if settings.cache.dtype == "same" else settings.cache.dtype


def build_student(settings: config.Config, teacher: Teacher) -> tuple[Pairing, Distiller]:
    """The pairing of tokens and the trainable module, on the meta device."""
    pairing, module = join(settings, student.build(settings), teacher)
    module.fused = check.fuses(settings.memory.kernels, dist.device())
    return pairing, module


def join(settings: config.Config, backbone: Any, teacher: Teacher) -> tuple[Pairing, Distiller]:
    """The same of a backbone that is there already, and nothing fused."""
    size = (settings.data.image_size, settings.data.image_size)
    pairing = pair(backbone.prefix, backbone.grid(size), teacher.prefix, teacher.grid(size), settings.teacher.resample)
    with torch.device("meta"):
        return pairing, Distiller(backbone, teacher.width, settings.objective.beta, pairing.align_student)


def teacher_identity(parts: Parts) -> dict[str, Any]:
    """What a distillation's trajectory depends on besides what all do (`Inputs.identity`)."""
    return {"content of teacher.weights": parts.teacher.fingerprint()}


def learnt_tokens(images: Tensor, teacher: Teacher, pairing: Pairing) -> Tensor:
    """The teacher's tokens (B, L, T) that answer the student's, from RGB in [0, 1]: float32, not whitened."""
    return pairing.align_teacher(teacher(images).float())


def training_target(parts: Parts, batch: dict[str, Any], images: Tensor) -> Tensor:
    """The teacher's tokens for a micro-batch of `train_stream`, and its RGB in [0, 1]: from the cache or live.

    Both give the same: where a cache holds 8 bits, the live teacher's tokens are rounded to them too.
    """
    if parts.cached is not None:
        return parts.cached.tokens(batch, images.device)
    tokens = learnt_tokens(images, parts.teacher, parts.pairing)
    return features.decode(*features.encode(tokens, stored_as(parts.settings)))


def train_stream(parts: Parts, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
    """This rank's micro-batches of training views of the samples start .. stop - 1."""
    return training_batches(parts.inputs, training_samples(parts.inputs), start, stop, parts.cached)


def numbered_stream(parts: Parts, numbers: Iterable[list[int]]) -> Generator[dict[str, Any], None, None]:
    """Micro-batches of the training views of these numbers, whatever the rank."""
    data = parts.settings.data
    return chosen_batches(
        training_samples(parts.inputs),
        numbers,
        workers=data.workers,
        prefetch=data.prefetch,
        pin_memory=torch.cuda.is_available(),
    )


def heldout_stream(parts: Parts, index: Index) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of centre views of the held-out samples, each exactly once over all ranks."""
    data = parts.settings.data
    view = functools.partial(eval_view, size=data.image_size, interpolation=data.interpolation, decoding=data.decode)
    return heldout_batches(parts.settings, index, view)
