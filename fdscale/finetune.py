"""Fine-tuning a distilled backbone: as a classifier of images, here, of their pixels (`segment`), or to find objects
(`detect`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdscale import config, dist
from fdscale.data.mixing import Mixing, erase, mixed_images, mixed_targets
from fdscale.data.randaugment import RandAugment
from fdscale.detect import Detection
from fdscale.evaluate import held_out
from fdscale.inputs import MEAN, normalise, to_device, training_batches, training_samples
from fdscale.job import Task, run_job
from fdscale.labelled import Labelled
from fdscale.run import Run
from fdscale.segment import Segmentation


def main(recipe: str, run: str, steps: int | None, set: list[str], ds: str | None, resume: str | None) -> int:
    """`fdscale finetune`."""
    code = finetune(config.load(recipe, set), Path(run), ds=ds, stop_at=steps, resume=resume)
    dist.close()
    return code


def finetune(
    settings: config.Config,
    directory: Path,
    *,
    ds: str | None = None,
    stop_at: int | None = None,
    resume: str | None = None,
    saves: bool = True,
) -> int:
    """Run or continue a fine-tuning; returns the process's exit code."""
    config.check_verb(settings, "finetune")
    build = functools.partial(task_for, settings, dist.world())
    return run_job(build, directory, ds=ds, stop_at=stop_at, resume=resume, saves=saves)


def task_for(settings: config.Config, world: int) -> Task:
    """The task that a recipe for fine-tuning describes. Raises UserError where its data cannot be had."""
    tasks: dict[str, Callable[[config.Config, int], Task]] = {
        "finetune": Classification,
        "segment": Segmentation,
        "detect": Detection,
    }
    return tasks[config.task_of(settings)](settings, world)


class Classification(Labelled):
    """The task of `fdscale.job`: labels from the shards, mixed in pairs."""

    def __init__(self, settings: config.Config, world: int):
        super().__init__(settings, world)
        self._classify = settings.classify
        self._augment = None
        if settings.classify.randaugment is not None:
            data = settings.data
            self._augment = RandAugment(
                settings.classify.randaugment, data.seed, data.image_size, MEAN, data.interpolation
            )

    def goal(self) -> list[str]:
        """How many classes there are."""
        return [f"-> {self._classify.classes} classes"]

    def stream(self, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
        """Augmented views with labels, and how they are mixed."""
        data, classify = self._data, self._classify
        mixing = Mixing(
            seed=data.seed,
            size=data.image_size,
            mixup=classify.mixup,
            cutmix=classify.cutmix,
            mix_prob=classify.mix_prob,
            switch_prob=classify.switch_prob,
            mix_group=classify.mix_group,
            erase=classify.erase,
        )
        samples = training_samples(self.inputs, self._augment, classify.classes)
        return training_batches(self.inputs, samples, start, stop, mixing)

    def prepare(self, batch: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Images, soft targets and sample numbers."""
        images = normalise(to_device(batch["images"]), torch.float32)
        erase(images, batch["erased"])
        names = ("shares", "boxes", "labels", "label_shares", "numbers")
        shares, boxes, labels, label_shares, numbers = (
            batch[name].to(dist.device(), non_blocking=True) for name in names
        )
        classes, smoothing = self._classify.classes, self._classify.label_smoothing
        assert classes is not None
        targets = mixed_targets(labels, classes, smoothing, label_shares)
        return mixed_images(images, shares, boxes).to(dtype), targets, numbers

    def blank(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Zeros for all of them."""
        size, count = self._data.image_size, self.inputs.settings.memory.micro_batch
        images = torch.zeros(count, 3, size, size, device=dist.device(), dtype=dtype)
        targets = torch.zeros(count, self._classify.classes or 0, device=dist.device())
        return images, targets, torch.zeros(count, dtype=torch.int64, device=dist.device())

    def evaluation(self, run: Run, dtype: torch.dtype) -> Callable[[Any], dict[str, Any]]:
        """Loss and accuracy on the held-out set."""
        return held_out(self.inputs.settings, dtype, run)
