"""Fine-tuning a distilled backbone as a classifier of images: the task of `fdscale.job`, and its evaluation.

Each image of an evaluation counts exactly once on any number of ranks, and what cannot be read is left out and counted.

Letters: B images, K classes, V views of an image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fdscale import UserError, config, dist
from fdscale.data.augment import eval_view
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.data.mixing import Mixing, erase, mixed_images, mixed_targets
from fdscale.data.mixture import Joined
from fdscale.data.randaugment import RandAugment
from fdscale.heldout import GoOn, HeldOut
from fdscale.inputs import (
    CLIP_STATISTICS,
    MEAN,
    STD,
    heldout_batches,
    names_of_classes,
    normalise,
    to_device,
    training_batches,
    training_samples,
)
from fdscale.labelled import Labelled
from fdscale.run import Run
from fdscale.tasks.classification import Accuracy, Tally
from fdscale.tasks.labels import Labels


class Classification(Labelled):
    """The task of `fdscale.job`: labels from the shards, mixed in pairs."""

    def __init__(self, settings: config.Config, world: int):
        super().__init__(settings, world)
        self._classify = settings.classify
        index = self.inputs.index
        named = 0 if isinstance(index, Joined) else len(names_of_classes(index))
        if named > (settings.classify.classes or 0):
            raise UserError(
                f"the classes.json of data.shards names {named} classes, and classify.classes is "
                f"{settings.classify.classes}: --set classify.classes={named}"
            )
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
        settings = self.inputs.settings
        return HeldOut(
            settings,
            run,
            lambda index, engine, go_on, averaged: evaluate(settings, index, engine, dtype, go_on),
            lambda found: {
                "heldout_loss": found.loss,
                "heldout_top1": found.top1,
                "heldout_top5": found.top5,
                "heldout_samples": found.samples,
            },
            also=("heldout_loss", "heldout_top1"),
        )


def evaluate(
    settings: config.Config,
    index: Index | Folders,
    classifier: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    go_on: GoOn,
    labels: Labels | None = None,
) -> Accuracy | None:
    """The accuracy of a classifier of normalised images on data.heldout_samples of a set; a collective.

    go_on: called with each micro-batch; all ranks leave it unfinished, and get None, where it returns False. labels: in
    place of those of the set. Raises UserError where no sample can be read.
    """
    data, classify = settings.data, settings.classify
    assert classify.classes is not None
    tally = Tally(min(data.heldout_samples or index.samples, index.samples), classify.classes)
    with torch.no_grad():
        for batch, images in seen(settings, index, dtype, classify.classes if labels is None else None):
            if not go_on(batch):
                return None
            own = batch["labels"] if labels is None else labels([key for _, key in batch["origin"]])
            tally.add(batch["numbers"], own, _scores(classifier, images), batch["weights"])
    found = tally.result()
    if found is None:
        raise UserError(f"no sample of data.heldout_shards ({data.heldout_shards}) can be read")
    return found


def seen(
    settings: config.Config, index: Index | Folders, dtype: torch.dtype, classes: int | None
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """This rank's micro-batches of the held-out samples, and their views as a classifier of the config wants them."""
    data, classify = settings.data, settings.classify
    view = functools.partial(
        eval_view,
        size=data.image_size,
        crop_ratio=classify.crop_ratio,
        interpolation=data.interpolation,
        decoding=data.decode,
        crops=classify.crops,
    )
    mean, std = CLIP_STATISTICS if classify.statistics == "clip" else (MEAN, STD)
    for batch in heldout_batches(settings, index, view, classes):
        yield batch, normalise(to_device(batch["images"]), dtype, mean, std)


def _scores(classifier: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """(B, K) of images (B, 3, H, W), or of V views of each (B, V, 3, H, W): the logarithm of their mean probability."""
    if images.ndim == 4:
        return classifier(images)
    views = torch.stack([classifier(view) for view in images.unbind(1)], 1)  # B V K
    return torch.logsumexp(F.log_softmax(views.float(), -1), 1) - math.log(images.shape[1])


def report(settings: config.Config, accuracy: Accuracy, names: list[str]) -> dict[str, Any]:
    """An accuracy as plain data, a row for each class."""
    rows = [
        {
            "class": number,
            **({"name": names[number]} if number < len(names) else {}),
            "samples": count,
            "top1": right / count if count else None,
        }
        for number, (right, count) in enumerate(accuracy.per_class.tolist())
    ]
    return {
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "loss": accuracy.loss,
        "samples": accuracy.samples,
        "crop_ratio": settings.classify.crop_ratio,
        "crops": settings.classify.crops,
        "statistics": settings.classify.statistics,
        "classes": rows,
        "confusion": accuracy.confusion.tolist(),
    }
