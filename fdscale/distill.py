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
    teacher_identity,
    train_stream,
    training_target,
)
from fdscale.engine import ema, memory
from fdscale.engine.metrics import Work
from fdscale.inputs import normalise, open_heldout, to_device
from fdscale.job import run_job
from fdscale.objective import feature_loss, whiten
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
    """The task of `fdscale.job`: a teacher's features are the target."""

    def __init__(self, parts: Parts):
        self.parts, self.inputs, self.module = parts, parts.inputs, parts.module

    def identity(self) -> dict[str, Any]:
        """The content of the teacher's weights."""
        return teacher_identity(self.parts)

    def initial_values(self) -> Callable[[str, torch.Size], Tensor]:
        """Those of the config."""
        return student.initial_values(self.parts.settings, self.module)

    def place(self) -> None:
        """The teacher, where it runs; a collective."""
        if self.parts.teacher.is_ours:
            memory.agree_on_kernels(self.parts.teacher.network)
        if self.parts.cached is None:
            self.parts.teacher.to(dist.device())
        elif not self.parts.settings.data.heldout_shards:
            self.parts.teacher.to("meta")  # nothing computes with it: its memory is free again

    def about(self) -> list[str]:
        """Teacher and student, where the features come from, and what computes."""
        settings, cached = self.parts.settings, self.parts.cached
        lines = [f"{settings.teacher.source} -> {settings.student.model}"]
        if cached is not None:
            lines.append(f"the teacher's features come from {cached.folder}; it does not run")
        elif self.parts.teacher.is_ours:
            lines += [f"the teacher's {line}" for line in student.about_kernels(self.parts.teacher.network)]
        loss = f"whitening and loss: {student.by(self.module.fused)}"
        return [*lines, *student.about_kernels(self.module.backbone), loss]

    def work(self) -> Work:
        """Of the student, and of the teacher where it runs."""
        size = (self.parts.settings.data.image_size,) * 2
        teacher = self.parts.teacher.flops(size) if self.parts.cached is None else 0
        return student.work_per_image(self.parts.settings, self.module.backbone, teacher)

    def stream(self, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
        """Training views, with the teacher's features where they are replayed."""
        return train_stream(self.parts, start, stop)

    def prepare(self, batch: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Images, the teacher's tokens and sample numbers."""
        images = to_device(batch["images"])
        numbers = batch["numbers"].to(dist.device(), non_blocking=True)
        return normalise(images, dtype), training_target(self.parts, batch, images), numbers

    def blank(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Zeros for all of them."""
        parts, size = self.parts, self.parts.settings.data.image_size
        images = torch.zeros(parts.settings.memory.micro_batch, 3, size, size, device=dist.device())
        numbers = torch.zeros(len(images), dtype=torch.int64, device=dist.device())
        rows, columns = parts.pairing.student_grid
        tokens = len(parts.pairing.student_kept) + rows * columns
        target = torch.zeros(len(images), tokens, parts.teacher.width, device=dist.device())
        return normalise(images, dtype), target, numbers

    def evaluation(self, run: Run, dtype: torch.dtype) -> Callable[[Any], dict[str, Any]]:
        """The held-out loss."""
        return HeldOut(self.parts, dtype, run)


class HeldOut:
    """Held-out loss, beside that of a trivial predictor: the training set's mean token, predicted everywhere."""

    def __init__(self, parts: Parts, dtype: torch.dtype, run: Run):
        self._parts, self._dtype, self._run = parts, dtype, run
        self._index = open_heldout(parts.settings.data)
        self._constant: Tensor | None = None

    def __call__(self, engine: Any) -> dict[str, Any]:
        """The record of one evaluation; a collective. Empty where there is no held-out set, or a signal came."""
        if self._index is None:
            return {}
        first = self._constant is None
        if self._constant is None:
            self._constant = self._mean_training_token()
        if self._constant is None:
            return {}
        record = self._evaluate(engine, first)
        if record and self._parts.settings.optim.ema is not None:
            with ema.in_place_of_weights(engine):
                averaged = self._evaluate(engine, False)
            record = record | {"heldout_loss_ema": averaged["heldout_loss"]} if averaged else {}
        return record

    def _evaluate(self, engine: Any, first: bool) -> dict[str, Any]:
        """The losses of the weights that are in place; empty where a signal came."""
        parts, beta = self._parts, self._parts.settings.objective.beta
        sums = torch.zeros(3, dtype=torch.float64, device=dist.device())
        engine.eval()
        if parts.cached is not None:  # the teacher is needed here alone, and is on the device only as long
            parts.teacher.to(dist.device())
        with torch.no_grad():
            for batch in heldout_stream(parts, self._index):
                if self._run.interrupted():
                    break
                if first:  # every evaluation loses the same samples
                    self._run.report_lost(batch["replaced"])
                images, weights = to_device(batch["images"]), batch["weights"].to(dist.device())
                tokens = learnt_tokens(images, parts.teacher, parts.pairing)
                loss = engine(normalise(images, self._dtype), tokens, None, weights)
                target = whiten(tokens)
                trivial = feature_loss(self._constant.expand_as(target), target, beta, weights)
                sums += torch.stack([loss.double(), trivial.double(), weights.sum().double()])
        engine.train()
        if parts.cached is not None:
            parts.teacher.to("cpu")
        if self._run.stopped_by:
            return {}
        loss, trivial, count = dist.total(sums).tolist()
        if not count:
            raise UserError(f"no sample of data.heldout_shards ({parts.settings.data.heldout_shards}) can be read")
        return {"heldout_loss": loss / count, "heldout_trivial": trivial / count, "heldout_samples": int(count)}

    def _mean_training_token(self) -> Tensor | None:
        """(T,) over as many training views as there are held-out samples, but at least MEAN_VIEWS; a collective.

        None: a signal came.
        """
        parts = self._parts
        most = parts.settings.data.heldout_samples or parts.inputs.index.samples
        wanted = max(MEAN_VIEWS, min(most, parts.inputs.index.samples))
        sums = torch.zeros(parts.teacher.width + 1, dtype=torch.float64, device=dist.device())
        for batch in train_stream(parts, 0, wanted):
            if self._run.interrupted():
                return None
            target = whiten(training_target(parts, batch, to_device(batch["images"]))).flatten(0, 1)
            sums[:-1] += target.double().sum(0)
            sums[-1] += target.shape[0]
        sums = dist.total(sums)
        return (sums[:-1] / sums[-1]).float()
