"""Fine-tuning a distilled backbone to find objects, boxes and masks: the task of `fdscale.job`, and its evaluation.

Letters: B images, S side of the square that they are fitted into, n objects of an image, H W its own size.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fdscale import UserError, config, dist
from fdscale.data import instaboost, objects
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.data.stream import Samples
from fdscale.durable import write_atomically
from fdscale.heldout import GoOn, HeldOut
from fdscale.inputs import heldout_batches, normalise, to_device, training_batches
from fdscale.keys_detect import Detect
from fdscale.labelled import Labelled
from fdscale.run import Run
from fdscale.segment import colours
from fdscale.tasks.average_precision import AveragePrecision, Found, Scores
from fdscale.tasks.detection import Detections, View, moved, pasted

SURE = 0.5  # of what is drawn

Network = Callable[..., list[Detections]]  # as `tasks.detection.Detector` without objects


class Detection(Labelled):
    """The task of `fdscale.job`: objects from the shards."""

    def __init__(self, settings: config.Config, world: int):
        super().__init__(settings, world)
        self._detect = settings.detect

    def goal(self) -> list[str]:
        """The heads, and what they give."""
        detect = self._detect
        return [f"+ {detect.kind} -> {'boxes and masks' if detect.masks else 'boxes'} of {detect.classes} classes"]

    def stream(self, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
        """Scenes, resized at random into the square."""
        data, detect = self._data, self._detect
        if detect.instaboost:
            instaboost.library()  # now, rather than at the first such sample of a worker
        view = functools.partial(
            objects.train_scene,
            seed=data.seed,
            size=data.image_size,
            jitter=detect.jitter if detect.resize == "jitter" else None,
            short_side=detect.short_side if detect.resize == "short_side" else None,
            bounds=detect.bounds,
            flip=data.flip,
            interpolation=data.interpolation,
            instaboost=detect.instaboost,
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

        def look(index: Index | Folders, engine: Any, go_on: GoOn, averaged: bool) -> Scores | None:
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
    index: Index | Folders,
    network: Network,
    dtype: torch.dtype,
    go_on: GoOn,
    pictures: Path | None = None,
    results: Path | None = None,
) -> Scores | None:
    """The average precision of a detector on data.heldout_samples of a set; a collective.

    go_on: called with each micro-batch; all ranks leave it unfinished, and get None, where it returns False. pictures:
    a folder for detect.shown images with what was found. results: a file for what the official server takes. Raises
    UserError where no sample can be read.
    """
    detect = settings.detect
    assert detect.classes is not None
    categories = None if results is None else _categories(index)
    images = min(settings.data.heldout_samples or index.samples, index.samples)
    tally = AveragePrecision(detect.classes, kinds(settings))
    shown = {place * images // max(1, detect.shown) for place in range(detect.shown)}
    view = functools.partial(
        objects.scene,
        size=settings.data.image_size,
        bounds=detect.bounds,
        scales=detect.scales,
        interpolation=settings.data.interpolation,
        **_what(settings),
    )
    with torch.no_grad():
        for batch in heldout_batches(settings, index, view, members=objects.members(False)):
            if not go_on(batch):
                return None
            first, *others = _views(batch, detect, dtype)
            everything = network(first.images, first.sizes, others=others)
            texts = batch["objects"].split(batch["counts"].tolist())
            for place, number in enumerate(batch["numbers"].tolist()):
                if not batch["weights"][place]:
                    continue
                known = objects.read(texts[place].numpy().tobytes(), **_what(settings))
                size = batch["sizes0"][place].tolist()
                found = everything[place]
                found = found._replace(boxes=moved(found.boxes, size, known.size))
                tally.add(number, known, _plain(found, known.size))
                if pictures is not None and number in shown:
                    content = batch["images"][place, :, : size[0], : size[1]]
                    draw(content, known, found, pictures / f"{number:06d}.png")
    if results is not None:
        _submit(tally, categories, results)
    scores = tally.result()
    if scores is None:
        raise UserError(f"no sample of data.heldout_shards ({settings.data.heldout_shards}) can be read")
    return scores


def _views(batch: dict[str, Any], detect: Detect, dtype: torch.dtype) -> list[View]:
    """The images at each scale, plain and mirrored."""
    views = []
    for scale in range(len(detect.scales)):
        sizes = batch[f"sizes{scale}"].to(dist.device())
        images = on_canvas(batch[f"images{scale}" if scale else "images"], sizes).to(dtype)
        views.append(View(images, sizes))
        if detect.mirror:
            images = images.clone()
            for image, (_, width) in zip(images, sizes.tolist(), strict=True):
                image[:, :, :width] = image[:, :, :width].flip(2)
            views.append(View(images, sizes, True))
    return views


def _plain(found: Detections, size: tuple[int, int]) -> Found:
    """For what counts them: masks as run lengths on an image of (height, width)."""
    runs = None
    if found.masks is not None:
        from pycocotools import mask

        whole = pasted(found, size).cpu().numpy().astype(np.uint8)
        runs = [mask.encode(np.asfortranarray(one)) for one in whole]
    return Found(found.boxes.cpu().numpy(), found.scores.cpu().numpy(), found.classes.cpu().numpy(), runs)


def _categories(index: Index | Folders) -> Any:
    """Of the classes, what the official server calls them. Raises UserError where they are not known."""
    try:
        return json.loads((Path(index.root) / "categories.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{index.root}: holds no categories.json ({error}), which `fdscale shards make` writes: without it the "
            "categories have no numbers"
        ) from None


def _submit(tally: AveragePrecision, categories: Any, path: Path) -> None:
    """Write what was found as the official server takes it; a collective."""
    rows = tally.submission(categories)
    if dist.rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(rows))
        except OSError as error:
            raise UserError(f"{path}: could not be written ({error})") from None


def _record(found: Scores) -> dict[str, float]:
    flat = {f"heldout_{name}": value for name, value in found.flat().items() if not math.isnan(value)}
    return flat | {"heldout_samples": found.images}


def report(settings: config.Config, found: Scores, names: list[str]) -> dict[str, Any]:
    """Scores as plain data, a row for each class; names: of the classes, as far as they are known."""

    def plain(value: float) -> float | None:
        return None if math.isnan(value) else value

    detect = settings.detect
    rows = [
        {
            "class": number,
            **({"name": names[number]} if number < len(names) else {}),
            **{f"{kind}_ap": plain(values[number]) for kind, values in found.classes.items()},
        }
        for number in range(detect.classes or 0)
    ]
    how = ("bounds", "suppress", "overlap", "least_score", "most", "scales", "mirror")
    return {
        **{name: plain(value) for name, value in found.flat().items()},
        "samples": found.images,
        "objects": found.objects,
        **{name: getattr(detect, name) for name in how},
        "classes": rows,
    }


def draw(image: Tensor, known: objects.Annotated, found: Detections, path: Path) -> None:
    """Write image (3, h, w) uint8 twice side by side: with the objects that are there, and with those that were found.

    Boxes and masks are in the colours of their classes; of what was found, what has a score of at least SURE. Raises
    UserError where it cannot be written.
    """
    height, width = image.shape[1:]
    sure = found.scores >= SURE
    masks = None if found.masks is None else found.masks[sure]
    shown = Detections(found.boxes[sure], found.scores[sure], found.classes[sure], masks)
    whole = None if shown.masks is None else pasted(shown, known.size).cpu().numpy()
    truth = None if known.masks is None else [objects.decoded(one) for one in known.masks]
    sides = ((known.boxes, known.classes, truth), (shown.boxes.cpu().numpy(), shown.classes.cpu().numpy(), whole))
    parts = []
    for boxes, classes, outlines in sides:
        pixels = image.permute(1, 2, 0).numpy().astype(np.float32)
        tones = colours((classes % 256)[None])[0]
        for mask, tone in zip(() if outlines is None else outlines, tones, strict=outlines is not None):
            there = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST))
            pixels = np.where(there[..., None] > 0, 0.5 * pixels + 0.5 * tone, pixels)
        picture = Image.fromarray(pixels.round().astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        for box, tone in zip(boxes, tones, strict=True):
            corners = box * np.array([width / known.size[1], height / known.size[0]] * 2)
            pen.rectangle(corners.tolist(), outline=tuple(int(part) for part in tone), width=max(1, height // 200))
        parts.append(np.asarray(picture))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(parts, 1)).save(path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error}); detect.shown=0 does without") from None


def _what(settings: config.Config) -> dict[str, Any]:
    """What is asked of the objects in a sample."""
    return {"classes": settings.detect.classes, "masks": settings.detect.masks}
