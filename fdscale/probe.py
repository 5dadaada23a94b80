"""`fdscale probe`: what frozen features know of the classes of a labelled set, without training the network.

Features are of centre views, the mean over the tokens of the grid (or the class token), of a student or of a teacher;
each image of both sets is seen once, over all ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from fdscale import UserError, assemble, config, dist, student
from fdscale.data.augment import eval_view
from fdscale.data.folders import Folders, is_folder
from fdscale.data.index import Index
from fdscale.data.mixture import Joined
from fdscale.durable import as_json, must_be_writable, write_atomically
from fdscale.engine.initialize import prepare_environment
from fdscale.inputs import heldout_batches, normalise, open_heldout, open_sets, to_device
from fdscale.tasks import probe
from fdscale.tasks.probe import Features

KINDS = ("knn", "linear", "few-shot")
NEIGHBOURS = (10, 20, 100, 200)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the linear probe; MAE's is 0.1
SHOTS, SEEDS = (1, 2, 5, 10), 5
BATCH = 4096  # of the linear probe, MAE's; a hundredth of a small set
ANY_CLASS = 10**6  # more than any set has
ROWS = 65536  # features that are summed up over the ranks at a time


def main(
    source: str, run: str | None, weights: str | None, set: list[str], teacher: str | None, pool: str,
    kinds: list[str] | None, epochs: int, out: str | None, json: bool,
) -> int:  # fmt: skip
    """Probe, print, and write JSON."""
    prepare_environment()
    dist.init()
    if out is not None:
        must_be_writable(Path(out))
    report = measure(source, run, weights, set, teacher, pool, kinds or list(KINDS), epochs)
    if dist.rank() == 0:
        text = as_json(report, indent=1)
        if out is not None:
            try:
                write_atomically(Path(out), text + "\n")
            except OSError as error:
                raise UserError(f"{out}: could not be written ({error}); name another with --out") from None
        print(text if json else for_a_person(report))
    dist.close()
    return 0


def measure(
    source: str, run: str | None, weights: str | None, overrides: Sequence[str], teacher: str | None, pool: str,
    kinds: Sequence[str], epochs: int,
) -> dict[str, Any]:  # fmt: skip
    """What the probes find, as plain data; a collective. Raises UserError for what cannot be probed."""
    if teacher is not None and (run is not None or weights is not None):
        raise UserError("--teacher is the recipe's own: leave out --run and --weights, which are a student's")
    if teacher is None:
        settings, found = student.find(source, run, weights, overrides)
        tokens, prefix = _student(settings, found if found is not None else str(weights))
        who = str(found or weights)
    else:
        settings = config.load(source, overrides)
        frozen = assemble.teacher_alone(settings, teacher)
        tokens, prefix = frozen, frozen.prefix
        who = config.teachers_of(settings)[teacher].source
    if pool == "cls" and "cls" not in prefix:
        raise UserError(f"--pool cls: {who} has no class token; take mean")
    if settings.data.shards is None or settings.data.heldout_shards is None:
        raise UserError("a probe needs two labelled sets: --set data.shards=TRAIN --set data.heldout_shards=TEST")
    pooled = functools.partial(_pooled, tokens, prefix, pool)
    folder = len(settings.data.shards) == 1 and is_folder(settings.data.shards[0])
    training = Folders(settings.data.shards[0]) if folder else open_sets(settings.data)
    train = features_of(settings, training, pooled, "training set")
    heldout = open_heldout(settings.data)
    assert heldout is not None
    test = features_of(settings, heldout, pooled, "test set")
    classes = 1 + int(max(train.labels.max(), test.labels.max()))
    report: dict[str, Any] = {"of": who, "pool": pool, "image_size": settings.data.image_size, "classes": classes}
    report |= {"training_images": len(train.labels), "test_images": len(test.labels), "width": train.vectors.shape[1]}
    if "knn" in kinds:
        report["knn"] = {str(k): value for k, value in probe.nearest(train, test, NEIGHBOURS, classes).items()}
    if "linear" in kinds:
        batch = min(BATCH, max(64, len(train.labels) // 100))
        report["linear"] = probe.linear(train, test, classes, RATES, epochs=epochs, batch=batch, seed=0)
    if "few-shot" in kinds:
        report["few-shot"] = {str(n): one for n, one in probe.few_shot(train, test, classes, SHOTS, SEEDS).items()}
    return report


Tokens = Callable[[Tensor], Tensor]  # RGB in [0, 1] -> (B, L, C)


def _student(settings: config.Config, weights: Path | str) -> tuple[Tokens, tuple[str, ...]]:
    """The backbone of a run's checkpoint, or of a file."""
    network = student.loaded_backbone(settings, weights)
    return lambda images: network(normalise(images, torch.float32)), network.prefix


def _pooled(tokens: Tokens, prefix: tuple[str, ...], pool: str, images: Tensor) -> Tensor:
    """(B, C) of RGB (B, 3, H, W) in [0, 1]."""
    found = tokens(images).float()
    return found[:, prefix.index("cls")] if pool == "cls" else found[:, len(prefix) :].mean(1)


@torch.no_grad()
def features_of(settings: config.Config, index: Index | Joined | Folders, pooled: Tokens, what: str) -> Features:
    """Of every image that can be read with its label, in the order of the set, on all ranks alike; a collective."""
    if isinstance(index, Joined):
        raise UserError("a probe takes one training set: leave out data.weights")
    data = settings.data
    view = functools.partial(eval_view, size=data.image_size, interpolation=data.interpolation, decoding=data.decode)
    everything = dataclasses.replace(settings, data=dataclasses.replace(data, heldout_samples=None))
    rows: Tensor | None = None  # label + 1, and features; zeros where another rank sees the image
    with Progress(console=Console(stderr=True), transient=True, disable=dist.rank() != 0) as progress:
        bar = progress.add_task(what, total=index.samples)
        for batch in heldout_batches(everything, index, view, ANY_CLASS):
            vectors = pooled(to_device(batch["images"])).cpu()
            if rows is None:
                rows = torch.zeros(index.samples, 1 + vectors.shape[1])
            kept = batch["weights"].bool()
            own = torch.cat([batch["labels"][:, None] + 1.0, vectors], 1)
            rows[batch["numbers"][kept]] = own[kept]
            progress.update(bar, advance=len(batch["numbers"]) * dist.world())
    assert rows is not None
    whole = torch.cat([dist.total(some.to(dist.device())) for some in rows.split(ROWS)])
    whole = whole[whole[:, 0] > 0]
    if not len(whole):
        raise UserError(f"no image of the {what} can be read with a label: `fdscale shards stats` counts classes")
    if not whole.isfinite().all():
        raise UserError(f"features of the {what} are not finite")
    return Features(whole[:, 1:].contiguous(), whole[:, 0].long() - 1)


def for_a_person(report: dict[str, Any]) -> str:
    """A line for each kind."""
    images = (
        f"{report['training_images']} training and {report['test_images']} test images, {report['classes']} classes"
    )
    lines = [f"{report['of']}, {report['pool']} of {report['width']} channels: {images}"]
    if "knn" in report:
        lines.append("knn       " + ", ".join(f"{value:.2%} (k = {k})" for k, value in report["knn"].items()))
    if "linear" in report:
        rate = report["linear"]["rate"]
        edge = " that was tried: others may be better" if rate in (RATES[0], RATES[-1]) else ""
        largest = f", the {'largest' if rate == RATES[-1] else 'smallest'}{edge}" if edge else ""
        lines.append(f"linear    {report['linear']['top1']:.2%} (rate {rate:g}{largest})")
    if "few-shot" in report:
        shots = (f"{one['top1']:.2%} +- {one['deviation']:.2%} ({n})" for n, one in report["few-shot"].items())
        lines.append("few-shot  " + ", ".join(shots))
    return "\n".join(lines)
