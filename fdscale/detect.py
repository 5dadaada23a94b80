"""Fine-tuning a distilled backbone to find objects, with boxes and masks: the task of `fdscale.job`, and its evaluation.

Letters: B images, S side of the square that they are fitted into, n objects of an image, H W its own size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fdscale import UserError, config, dist, student
from fdscale.data import objects
from fdscale.data.index import Index
from fdscale.data.stream import Samples
from fdscale.engine.metrics import Work
from fdscale.heldout import GoOn, HeldOut
from fdscale.inputs import heldout_batches, normalise, open_inputs, to_device, training_batches
from fdscale.run import Run
from fdscale.segment import colours
from fdscale.tasks.average_precision import AveragePrecision, Scores
from fdscale.tasks.detection import Detections, merged, pasted

Network = Callable[[Tensor, Tensor], list[Detections]]  # images (B, 3, S, S), normalised, and sizes (B, 2)


class Detection:
    """The task of `fdscale.job`: objects from the shards."""

    def __init__(self, settings: config.Config, world: int):
        self.inputs = open_inputs(settings, world)
        self.module = student.build_detector(settings, student.build(settings))
        self._data, self._detect = settings.data, settings.detect

    def identity(self) -> dict[str, Any]:
        """Nothing besides the settings and the data."""
        return {}

    def initial_values(self) -> Callable[[str, torch.Size], Tensor]:
        """Fresh heads, or those that fit, on the weights of the config."""
        return student.initial_values(self.inputs.settings, self.module)

    def place(self) -> None:
        """Nothing is outside the module."""
        torch.backends.cudnn.deterministic = True

    def about(self) -> list[str]:
        """The backbone, what stands behind it, where its weights come from, and what computes."""
        settings, detect = self.inputs.settings, self._detect
        what = "boxes and masks" if detect.masks else "boxes"
        lines = [f"{settings.student.model} + {detect.kind} -> {what} of {detect.classes} classes"]
        if settings.student.weights is None:
            lines.append("student.weights is not set: the backbone began with random weights")
        return [*lines, *student.about_kernels(self.module.backbone)]

    def work(self) -> Work:
        """Of backbone and heads."""
        heads = self.module.head_flops((self._data.image_size,) * 2)
        return student.work_per_image(self.inputs.settings, self.module.backbone, heads=heads)

    def stream(self, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
        """Scenes, resized at random into the square."""
        data, detect = self._data, self._detect
        view = functools.partial(
            objects.train_scene,
            seed=data.seed,
            size=data.image_size,
            jitter=detect.jitter if detect.resize == "jitter" else None,
            short_side=detect.short_side if detect.resize == "short_side" else None,
            bounds=detect.bounds,
            flip=data.flip,
            interpolation=data.interpolation,
            **_what(self.inputs.settings),
        )
        samples = Samples(self.inputs.index, self.inputs.order, view, members=objects.members(detect.stuff > 0))
        return training_batches(self.inputs, samples, start, stop)

    def prepare(self, batch: dict[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments of `tasks.detection.Detector`: images, 0 beyond their edges, and what is on them."""
        there = {
            name: batch[name].to(dist.device(), non_blocking=True)
            for name in ("sizes", "counts", "boxes", "classes", "masks", "numbers", "stuff")
            if name in batch
        }
        images = on_canvas(batch["images"], there["sizes"])
        given = [there.get(name) for name in ("sizes", "counts", "boxes", "classes", "masks", "numbers", "stuff")]
        return (images.to(dtype), *given)

    def blank(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Such without content and without objects."""
        size, count, device = self._data.image_size, self.inputs.settings.memory.micro_batch, dist.device()
        whole = functools.partial(torch.zeros, dtype=torch.int64, device=device)
        masks = torch.zeros(0, size, -(-size // 8), dtype=torch.uint8, device=device) if self._detect.masks else None
        stuff = torch.full((count, size, size), 255, dtype=torch.uint8, device=device) if self._detect.stuff else None
        return (
            torch.zeros(count, 3, size, size, device=device, dtype=dtype),
            torch.full((count, 2), size, dtype=torch.int64, device=device),
            whole(count),
            torch.zeros(0, 4, device=device),
            whole(0),
            masks,
            whole(count),
            stuff,
        )

    def evaluation(self, run: Run, dtype: torch.dtype) -> Callable[[Any], dict[str, Any]]:
        """AP of boxes and masks on the held-out set, with pictures."""
        settings = self.inputs.settings

        def look(index: Index, engine: Any, go_on: GoOn, averaged: bool) -> Scores | None:
            pictures = None if averaged else run.directory / "predictions"
            return evaluate(settings, index, engine, dtype, go_on, pictures)

        return HeldOut(settings, run, look, _record, also=tuple(f"heldout_{kind}_ap" for kind in kinds(settings)))


def on_canvas(images: Tensor, sizes: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 -> a network's input, float32, 0 beyond sizes (B, 2), the height and width of the content."""
    there = normalise(to_device(images), torch.float32)
    line = torch.arange(images.shape[-1], device=there.device)
    inside = (line < sizes[:, :1])[:, :, None] & (line < sizes[:, 1:])[:, None]
    return there * inside[:, None]


def kinds(settings: config.Config) -> tuple[str, ...]:
    """What is measured."""
    return ("box", "mask") if settings.detect.masks else ("box",)


def evaluate(
    settings: config.Config,
    index: Index,
    network: Network,
    dtype: torch.dtype,
    go_on: GoOn,
    pictures: Path | None = None,
    results: Path | None = None,
) -> Scores | None:
    """The average precision of a detector on data.heldout_samples of a set; a collective.

    go_on: called with each micro-batch; all ranks leave it unfinished, and get None, where it returns False. pictures: a
    folder for detect.shown images with what was found. results: a file for what the official server takes. Raises
    UserError where no sample can be read.
    """
    detect = settings.detect
    assert detect.classes is not None
    images = min(settings.data.heldout_samples or index.samples, index.samples)
    tally = AveragePrecision(detect.classes, images, kinds(settings))
    shown = {place * images // max(1, detect.shown) for place in range(detect.shown)}
    raise NotImplementedError


def _record(found: Scores) -> dict[str, float]:
    return {f"heldout_{name}": value for name, value in found.summary().items()} | {"heldout_samples": found.images}
