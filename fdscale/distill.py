"""The main job: train a student on the whitened features of a frozen teacher."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdscale import UserError, config, dist, student
from fdscale.assemble import (
    Parts,
    assemble,
    heldout_stream,
    learnt_tokens,
    numbered_stream,
    teachers_identity,
    train_stream,
    training_target,
)
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.engine import memory, sharding
from fdscale.engine.metrics import Work
from fdscale.heldout import GoOn, HeldOut
from fdscale.inputs import normalise, to_device
from fdscale.job import run_job
from fdscale.objective import feature_loss
from fdscale.phi_s import Moments, rotation
from fdscale.run import Run

MEAN_VIEWS = 256  # fewer make the mean token noisy, and a trivial predictor that is easily beaten


def main(recipe: str, run: str, steps: int | None, set: list[str], ds: str | None, resume: str | None) -> int:
    """`fdscale distill`."""
    code = distill(config.load(recipe, set), Path(run), ds=ds, stop_at=steps, resume=resume)
    dist.close()
    return code


def distill(
    settings: config.Config,
    directory: Path,
    *,
    ds: str | None = None,
    stop_at: int | None = None,
    resume: str | None = None,
    saves: bool = True,
) -> int:
    """Run or continue a distillation; returns the process's exit code."""
    return run_job(
        lambda: Distillation(assemble(settings, dist.world())),
        directory,
        ds=ds,
        stop_at=stop_at,
        resume=resume,
        saves=saves,
    )


class Distillation:
    """The task of `fdscale.job`: the features of a teacher, or of several, are the target."""

    def __init__(self, parts: Parts):
        self.parts, self.inputs, self.module = parts, parts.inputs, parts.module

    @property
    def _sharded(self) -> bool:
        """Whether ranks hold shares of the teachers."""
        return self.parts.settings.memory.teacher == "sharded" and not self.parts.cached and dist.world() > 1

    def identity(self) -> dict[str, Any]:
        """The content of the teachers' weights."""
        return teachers_identity(self.parts)

    def initial_values(self) -> Callable[[str, torch.Size], Tensor]:
        """Those of the config."""
        return student.initial_values(self.parts.settings, self.module)

    def place(self) -> None:
        """The teachers, where they run, and what phi_s has to know of their features; a collective."""
        parts = self.parts
        for teacher in parts.teachers.values():
            if teacher.is_ours:
                memory.agree_on_kernels(teacher.network)
            if self._sharded:
                teacher.spread(dist.device(), sharding.splitter(dist.device()))
            elif not parts.cached:
                teacher.to(dist.device())
            elif not parts.settings.data.heldout_shards:
                teacher.to("meta")  # nothing computes with it: its memory is free again
        learn_phi_s(parts)

    def about(self) -> list[str]:
        """Teachers and student, where the features come from, and what computes."""
        parts, settings = self.parts, self.parts.settings
        sources = " + ".join(teacher.source for teacher in config.teachers_of(settings).values())
        lines = [f"{sources} -> {settings.student.model}"]
        for name, teacher in parts.teachers.items():
            whose = f"the teacher {name}'s" if name else "the teacher's"
            if parts.cached:
                lines.append(f"{whose} features come from {parts.cached[name].folder}; it does not run")
            elif self._sharded:
                lines.append(f"{whose} blocks are shared out among the ranks")
            if teacher.is_ours and not parts.cached:
                lines += [f"{whose} {line}" for line in student.about_kernels(teacher.network)]
            if self.module.projectors[name].phi_s is not None:
                samples = settings.objective.whiten_samples
                lines.append(f"{whose} features are whitened by phi_s, by torch, as {samples} samples have them")
        loss = f"whitening and loss: {student.by(self.module.fused)}"
        return [*lines, *student.about_kernels(self.module.backbone), loss]

    def work(self) -> Work:
        """Of the student, and of the teachers where they run."""
        parts, size = self.parts, (self.parts.settings.data.image_size,) * 2
        teachers = 0 if parts.cached else sum(teacher.flops(size) for teacher in parts.teachers.values())
        return student.work_per_image(parts.settings, self.module.backbone, teachers)

    def stream(self, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
        """Training views, with the teacher's features where they are replayed."""
        return train_stream(self.parts, start, stop)

    def prepare(self, batch: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
        """Images, each teacher's tokens, and sample numbers."""
        images = to_device(batch["images"])
        numbers = batch["numbers"].to(dist.device(), non_blocking=True)
        targets = tuple(training_target(self.parts, batch, images, name) for name in self.parts.teachers)
        return normalise(images, dtype), targets, numbers

    def blank(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Zeros for all of them.

        Where other ranks gather a teacher's parts for their images, this one does, too.
        """
        parts, size = self.parts, self.parts.settings.data.image_size
        images = torch.zeros(parts.settings.memory.micro_batch, 3, size, size, device=dist.device())
        numbers = torch.zeros(len(images), dtype=torch.int64, device=dist.device())
        targets = tuple(
            torch.zeros(len(images), parts.pairings[name].tokens, teacher.width, device=dist.device())
            for name, teacher in parts.teachers.items()
        )
        if self._sharded:
            for teacher in parts.teachers.values():
                teacher(images)
        return normalise(images, dtype), targets, numbers

    def evaluation(self, run: Run, dtype: torch.dtype) -> Callable[[Any], dict[str, Any]]:
        """The held-out loss."""
        look = HeldOutLoss(self.parts, dtype, run.interrupted)
        return HeldOut(self.parts.settings, run, look, dict, also=look.losses)


@torch.no_grad()
def learn_phi_s(parts: Parts) -> None:
    """Mean and covariance of the teachers' tokens for `phi_s`, unless a checkpoint brought them; a collective.

    They are of the training views 0 .. objective.whiten_samples - 1, in parts of a micro-batch of consecutive numbers
    which ranks take in turns: equal to the last bit on any number of ranks, live or replayed.
    """
    wanted = {name: one for name, one in parts.module.projectors.items() if one.phi_s and not one.phi_s.is_set}
    if not wanted:
        return
    samples, size, world = parts.settings.objective.whiten_samples, parts.settings.memory.micro_batch, dist.world()
    count = -(-samples // size)
    # Every rank begins with the first part, and all have as many, since a teacher's forward may be a collective.
    mine = [0, *range(dist.rank(), -(-count // world) * world, world)]
    moments: dict[str, Moments] = {}
    stream = numbered_stream(parts, [list(range(part * size, (part + 1) * size)) for part in mine])
    try:
        for part, batch in zip(mine, stream, strict=True):
            images = to_device(batch["images"])
            for name in wanted:
                tokens = training_target(parts, batch, images, name)
                if name not in moments:
                    moments[name] = Moments(tokens, count)
                elif part < count:
                    moments[name].add(tokens[: samples - part * size])
    finally:
        stream.close()
    for name, projector in wanted.items():
        assert projector.phi_s is not None
        dist.total(moments[name].sums)
        dist.total(moments[name].count)
        mean, covariance = moments[name].mean_and_covariance()
        # Machines may differ in the principal directions: all take rank 0's.
        matrix = rotation(covariance) if dist.rank() == 0 else torch.zeros_like(covariance)
        projector.phi_s.set(mean, dist.total(matrix))


class HeldOutLoss:
    """Held-out loss, beside that of a trivial predictor: the training set's mean token, predicted everywhere.

    Of several teachers it is the weighted sum that is trained on, and each one's own losses stand beside it.
    interrupted: whether to leave off, which all ranks ask together.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype, interrupted: Callable[[], bool]):
        self._parts, self._dtype, self._interrupted = parts, dtype, interrupted
        self._constants: dict[str, Tensor] | None = None  # mean token of each teacher, whitened
        self._teachers = [f"_{name}" for name in parts.teachers if name]
        self.losses = tuple(f"heldout_loss{name}" for name in ("", *self._teachers))

    @torch.no_grad()
    def __call__(self, index: Index | Folders, engine: Any, go_on: GoOn, averaged: bool) -> dict[str, Any] | None:
        """What `HeldOut` looks for."""
        parts = self._parts
        if self._constants is None:
            self._constants = self._mean_training_tokens()
        if self._constants is None:
            return None
        sums = torch.zeros(3 + 2 * len(self._teachers), dtype=torch.float64, device=dist.device())
        if parts.cached:  # the teachers are needed here alone, and are on the device only as long
            for teacher in parts.teachers.values():
                teacher.to(dist.device())
        try:
            for batch in heldout_stream(parts, index):
                if not go_on(batch):
                    return None
                sums += self._losses(engine, batch)
        finally:
            if parts.cached:
                for teacher in parts.teachers.values():
                    teacher.to("cpu")
        loss, trivial, count, *more = dist.total(sums).tolist()
        if not count:
            raise UserError(f"no sample of data.heldout_shards ({parts.settings.data.heldout_shards}) can be read")
        record = {"heldout_loss": loss / count, "heldout_trivial": trivial / count, "heldout_samples": int(count)}
        keys = [f"{kind}{name}" for kind in ("heldout_loss", "heldout_trivial") for name in self._teachers]
        return record | {key: value / count for key, value in zip(keys, more, strict=True)}

    def _losses(self, engine: Any, batch: dict[str, Any]) -> Tensor:
        """Sums over a micro-batch: loss, trivial loss, samples; and of several teachers each one's losses, then each
        one's trivial losses."""
        parts, beta, module = self._parts, self._parts.settings.objective.beta, self._parts.module
        assert self._constants is not None
        images, weights = to_device(batch["images"]), batch["weights"].to(dist.device())
        tokens = {name: learnt_tokens(images, parts.teachers[name], parts.pairings[name]) for name in parts.teachers}
        loss = engine(normalise(images, self._dtype), tuple(tokens.values()), None, weights)
        trivial = []
        for name, projector in module.projectors.items():
            target = projector.whiten(tokens[name])
            trivial.append(feature_loss(self._constants[name].expand_as(target), target, beta, weights))
        factors = [projector.factor for projector in module.projectors.values()]
        total = sum(factor * one for factor, one in zip(factors, trivial, strict=True))
        own = [*module.losses.values(), *trivial] if module.losses else []
        return torch.stack([one.double() for one in (loss, total, weights.sum(), *own)])

    def _mean_training_tokens(self) -> dict[str, Tensor] | None:
        """(T,) of each, over as many training views as there are held-out samples, but at least MEAN_VIEWS; a
        collective.

        None: a signal came.
        """
        parts = self._parts
        most = parts.settings.data.heldout_samples or parts.inputs.index.samples
        wanted = max(MEAN_VIEWS, min(most, parts.inputs.index.samples))
        sums = {
            name: torch.zeros(teacher.width + 1, dtype=torch.float64, device=dist.device())
            for name, teacher in parts.teachers.items()
        }
        for batch in train_stream(parts, 0, wanted):
            if self._interrupted():
                return None
            images = to_device(batch["images"])
            for name, projector in parts.module.projectors.items():
                target = projector.whiten(training_target(parts, batch, images, name)).flatten(0, 1)
                sums[name][:-1] += target.double().sum(0)
                sums[name][-1] += target.shape[0]
        totals = {name: dist.total(one) for name, one in sums.items()}
        return {name: (one[:-1] / one[-1]).float() for name, one in totals.items()}
