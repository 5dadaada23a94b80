"""Fine-tuning a distilled backbone to name the class of every pixel: the task of `fdscale.job`, and its evaluation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fdscale import UserError, config, dist
from fdscale.data import dense
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.data.stream import MASK, Samples
from fdscale.heldout import GoOn, HeldOut
from fdscale.inputs import heldout_batches, normalise, to_device, training_batches
from fdscale.labelled import Labelled
from fdscale.run import Run
from fdscale.tasks.inference import Inference, Network
from fdscale.tasks.segmentation import Confusion, Scores


class Segmentation(Labelled):
    """The task of `fdscale.job`: masks from the shards."""

    def __init__(self, settings: config.Config, world: int):
        super().__init__(settings, world)
        self._segment = settings.segment
        if self._batch_norm and settings.memory.micro_batch * world == 1:
            raise UserError(
                "segment.norm is batch, and a micro-batch is one image on one rank: what is pooled to a single pixel "
                "has no variance; take a larger memory.micro_batch, or --set segment.norm=group"
            )

    @property
    def _batch_norm(self) -> bool:
        return self._segment.head == "upernet" and self._segment.norm == "batch"

    def goal(self) -> list[str]:
        """The head, how many classes there are, and what batch-norm sees."""
        head = {"upernet": "UPerNet", "mask2former": "Mask2Former"}[self._segment.head]
        lines = [f"+ {head} -> {self._segment.classes} classes of pixels"]
        if self._batch_norm:
            images = self.inputs.settings.memory.micro_batch * dist.world()
            lines.append(f"batch-norm over {images} images (micro-batch x ranks)")
        return lines

    def stream(self, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
        """Random parts of scenes."""
        data, segment = self._data, self._segment
        view = functools.partial(
            dense.seen,
            dense.train_scene,
            seed=data.seed,
            size=data.image_size,
            bounds=segment.bounds,
            ratio=segment.ratio,
            most_of_a_class=segment.most_of_a_class,
            flip=data.flip,
            distort=segment.distort,
            interpolation=data.interpolation,
            **_classes(self.inputs.settings),
        )
        samples = Samples(self.inputs.index, self.inputs.order, view, members=(MASK,))
        return training_batches(self.inputs, samples, start, stop)

    def prepare(self, batch: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Images, 0 beyond their edges, masks and sample numbers."""
        masks, numbers = (batch[name].to(dist.device(), non_blocking=True) for name in ("masks", "numbers"))
        beyond = masks == dense.OUTSIDE
        images = normalise(to_device(batch["images"]), torch.float32).masked_fill(beyond[:, None], 0)
        return images.to(dtype), masks.masked_fill(beyond, dense.IGNORED), numbers

    def blank(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Such without content."""
        size, count = self._data.image_size, self.inputs.settings.memory.micro_batch
        images = torch.zeros(count, 3, size, size, device=dist.device(), dtype=dtype)
        masks = torch.full((count, size, size), dense.IGNORED, dtype=torch.uint8, device=dist.device())
        return images, masks, torch.zeros(count, dtype=torch.int64, device=dist.device())

    def evaluation(self, run: Run, dtype: torch.dtype) -> Callable[[Any], dict[str, Any]]:
        """mIoU, mAcc and aAcc on the held-out set, with pictures."""
        settings = self.inputs.settings

        def look(index: Index | Folders, engine: Any, go_on: GoOn, averaged: bool) -> Scores | None:
            pictures = None if averaged else run.directory / "predictions"
            in_step = engine.zero_optimization_stage() == 3
            return evaluate(settings, index, engine, dtype, go_on, pictures, in_step)

        return HeldOut(settings, run, look, _record, also=("heldout_miou",))


def evaluate(
    settings: config.Config,
    index: Index | Folders,
    network: Network,
    dtype: torch.dtype,
    go_on: GoOn,
    pictures: Path | None = None,
    in_step: bool = False,
) -> Scores | None:
    """The scores of a network of normalised images on data.heldout_samples of a set; a collective.

    go_on: called with each image; all ranks leave it unfinished, and get None, where it returns False. pictures: a
    folder for segment.shown images with what was predicted. in_step: the network must be called equally often on all
    ranks. Raises UserError where there is no pixel with a class.
    """
    images = min(settings.data.heldout_samples or index.samples, index.samples)
    look = inference(settings, in_step)
    confusion = Confusion(settings.segment.classes or 0, images)
    shown = {place * images // max(1, settings.segment.shown) for place in range(settings.segment.shown)}
    with torch.no_grad():
        view = functools.partial(dense.seen, dense.scene, **_classes(settings))
        for batch in heldout_batches(settings, index, view, members=(MASK,), micro_batch=1):
            if not go_on(batch):
                return None
            image, mask = normalise(to_device(batch["images"]), torch.float32)[0], batch["masks"][0].to(dist.device())
            predicted = look(lambda crops: network(crops.to(dtype)), image, mask.shape)
            if not batch["weights"][0]:
                continue
            number = int(batch["numbers"][0])
            confusion.add(number, predicted, mask)
            if pictures is not None and number in shown:
                draw(batch["images"][0], batch["masks"][0], predicted.cpu(), pictures / f"{number:06d}.png")
    found = confusion.result()
    if found is None:
        raise UserError(
            f"no pixel of data.heldout_shards ({settings.data.heldout_shards}) has a class: no sample can be read, or "
            "all of their masks are empty"
        )
    return found


def _record(found: Scores) -> dict[str, float]:
    scores = {"heldout_miou": found.miou, "heldout_macc": found.macc, "heldout_aacc": found.aacc}
    return scores | {"heldout_samples": found.images}


def report(settings: config.Config, found: Scores, names: list[str]) -> dict[str, Any]:
    """Scores as plain data, a row for each class; names: of the classes, as far as they are known."""
    segment = settings.segment
    rows = [
        {
            "class": number,
            **({"name": names[number]} if number < len(names) else {}),
            "pixels": int(found.confusion[number].sum()),
            "iou": None if math.isnan(iou) else iou,
            "accuracy": None if math.isnan(accuracy) else accuracy,
        }
        for number, (iou, accuracy) in enumerate(zip(found.iou.tolist(), found.accuracy.tolist(), strict=True))
    ]
    how = ("inference", "stride", "bounds", "scales", "mirror")
    return {
        "miou": found.miou,
        "macc": found.macc,
        "aacc": found.aacc,
        "samples": found.images,
        **{name: getattr(segment, name) for name in how},
        "classes": rows,
        "confusion": found.confusion.tolist(),
    }


def inference(settings: config.Config, in_step: bool = False) -> Inference:
    """How a config looks at an image."""
    segment, size = settings.segment, settings.data.image_size
    return Inference(
        crop=size,
        stride=segment.stride or max(1, 2 * size // 3),
        whole=segment.inference == "whole",
        bounds=segment.bounds,
        scales=segment.scales,
        mirror=segment.mirror,
        interpolation=settings.data.interpolation,
        batch=settings.memory.micro_batch,
        rounds=(lambda mine: max(dist.gather(mine))) if in_step else None,
        logits=segment.head == "upernet",
    )


def draw(image: Tensor, mask: Tensor, predicted: Tensor, path: Path) -> None:
    """Write image (3, H, W) uint8, classes (H, W) and prediction (H, W) side by side, colours over the image.

    Raises UserError where it cannot be written.
    """
    pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
    parts = [pixels]
    for classes in (mask.numpy(), predicted.numpy()):
        known = (classes != dense.IGNORED)[..., None]
        parts.append(np.where(known, 0.4 * pixels + 0.6 * colours(classes), pixels))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(parts, 1).round().astype(np.uint8)).save(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error}); segment.shown=0 does without") from None


def colours(classes: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3) float32 from 0 to 255: hues that are far apart for neighbouring numbers."""
    hue = (np.arange(256) * 0.618034) % 1.0  # the golden ratio
    phase = (np.array([5, 3, 1]) + 6 * hue[:, None]) % 6
    table = 255 * (1 - 0.8 * np.clip(np.minimum(phase, 4 - phase), 0, 1))
    return table.astype(np.float32)[classes]


def _classes(settings: config.Config) -> dict[str, Any]:
    """What the numbers of a mask mean."""
    return {"classes": settings.segment.classes, "reduce_zero_label": settings.segment.reduce_zero_label}
