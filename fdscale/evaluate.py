"""Evaluating on the held-out set: a classifier while it is fine-tuned, and all kinds by `fdscale evaluate`.

Each image counts exactly once on any number of ranks, and what cannot be read is left out and counted.
"""

from __future__ import annotations

import contextlib
import functools
import json as json_module
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from fdscale import UserError, config, detect, dist, segment, student
from fdscale.data.augment import eval_view
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.engine import checkpoint, memory
from fdscale.engine.initialize import materialise, prepare_environment
from fdscale.heldout import GoOn, HeldOut
from fdscale.inputs import CLIP_STATISTICS, MEAN, STD, heldout_batches, normalise, open_heldout, to_device
from fdscale.kernels import check
from fdscale.run import Run
from fdscale.starts import write_atomically
from fdscale.tasks.classification import Accuracy, Tally
from fdscale.tasks.labels import Labels, read_labels
from fdscale.watchdog import SLACK, Watchdog

SHOWN = 5  # samples that were left out, on the console


def main(
    source: str,
    run: str | None,
    weights: str | None,
    set: list[str],
    ema: bool,
    dtype: str,
    labels: str | None,
    results: str | None,
    out: str | None,
    json: bool,
) -> int:
    """`fdscale evaluate`."""
    prepare_environment()
    dist.init()
    settings, found = find(source, run, weights, set)
    out = out or _default_out(found, ema)
    watchdog = Watchdog(settings.guard.step_limit_s, Path(out or ".").parent, lambda code, why: None)
    watchdog.begin("evaluation", SLACK)
    watchdog.start()
    try:
        what = found if found is not None else str(weights)
        pictures = None if out is None else Path(out).with_suffix("")
        report = measure(
            settings,
            what,
            averaged=ema,
            dtype=dtype,
            labels=labels,
            moves=watchdog.again,
            pictures=pictures,
            results=results,
        )
    finally:
        watchdog.stop()
    if dist.rank() == 0:
        _write(report, out, json)
    dist.close()
    return 0


def measure(
    settings: config.Config,
    weights: Path | str,
    *,
    averaged: bool = False,
    dtype: str = "float32",
    labels: str | None = None,
    moves: Callable[[], object] = lambda: None,
    pictures: Path | None = None,
    results: str | None = None,
) -> dict[str, Any]:
    """The accuracy of a checkpoint, or of a file of weights, on the held-out set, as plain data; a collective.

    averaged: take the average of the weights. labels: a file of `tasks.labels`, in place of those of the set. moves:
    called with each micro-batch. pictures: of a segmenter or detector, a folder for some predictions. results: of a
    detector, a file for the official server. Raises UserError for what cannot be evaluated.
    """
    config.check_verb(settings, "evaluate")
    index = open_heldout(settings.data)
    if index is None:
        raise UserError("data.heldout_shards is not set: --set data.heldout_shards=DIRECTORY_OR_PATTERN")
    precision = getattr(torch, dtype)
    task = config.task_of(settings)
    if labels is not None and task != "finetune":
        raise UserError("--labels is for classifiers; masks and objects are in the shards")
    if results is not None and task != "detect":
        raise UserError("--results is for detectors")
    describe: Callable[..., dict[str, Any]]
    work: Callable[..., Any]
    if task == "segment":
        work, describe = functools.partial(segment.evaluate, pictures=pictures), segment.report
    elif task == "detect":
        file = None if results is None else Path(results)
        work, describe = functools.partial(detect.evaluate, pictures=pictures, results=file), detect.report
    else:
        assert settings.classify.classes is not None
        others = None if labels is None else read_labels(labels, settings.classify.classes)
        work, describe = functools.partial(evaluate, labels=others), _report
    module = loaded(settings, weights, averaged, precision)
    found, left_out = _with_progress(
        settings, index, moves, lambda go_on: work(settings, index, module, precision, go_on)
    )
    return {
        **describe(settings, found, names_of_classes(index)),
        "left_out": left_out,
        "samples_in_set": index.samples,
        "weights": str(weights),
        "averaged": averaged,
        "dtype": dtype,
        "image_size": settings.data.image_size,
        "labels": labels,
        "interpolation": settings.data.interpolation,
        "heldout_shards": settings.data.heldout_shards,
        "content of data.heldout_shards": index.fingerprint,
    }


def loaded(
    settings: config.Config, weights: Path | str, averaged: bool = False, precision: torch.dtype = torch.float32
) -> nn.Module:
    """A backbone and its head with the weights of a checkpoint, or of a file, on this rank's device, for evaluation."""
    module = student.build_labelled(settings, student.build(settings, training=False))
    memory.agree_on_kernels(module)
    file = student.read_checkpoint(weights, averaged) if isinstance(weights, Path) else student.read_weights(weights)
    values = student.trained_backbone(settings, file) | student.trained_head(module, file)
    student.fill_buffers(module, file)
    materialise(module, lambda name, shape: values[name](), precision, dist.device())
    return module.to(dist.device()).eval()


def find(
    source: str, run: str | None, weights: str | None, overrides: Sequence[str]
) -> tuple[config.Config, Path | None]:
    """The config, and the checkpoint that is evaluated, None where it is a file of weights; a collective."""
    if run is not None and weights is not None:
        raise UserError("give --run or --weights, not both")
    found = None
    if student.is_run(Path(source)):
        if run is not None:
            raise UserError(f"{source} is a run itself; leave out --run, or give a recipe with it")
        found = student.find_checkpoint(Path(source))
        settings = config.from_dict(checkpoint.read_state(found)["config"], str(found), overrides)
    else:
        settings = config.load(source, overrides)
        if run is not None:
            found = student.find_checkpoint(Path(run))
        elif weights is None:
            raise UserError(f"{source} is a recipe: say whose weights, with --run DIR or --weights FILE")
    return settings, (found if weights is None else None)


def _with_progress(
    settings: config.Config,
    index: Index | Folders,
    moves: Callable[[], object],
    work: Callable[[Callable[[dict[str, Any]], bool]], Any],
) -> tuple[Any, list[dict[str, str]]]:
    """What work(go_on) finds, with a bar on rank 0, and the samples of all ranks that could not be read."""
    samples = min(settings.data.heldout_samples or index.samples, index.samples)
    lost: dict[int, Any] = {}  # those that fill up the last micro-batches come again

    def go_on(batch: dict[str, Any]) -> bool:
        moves()
        lost.update({one.number: one for one in batch["replaced"]})
        progress.update(task, advance=len(batch["numbers"]) * dist.world())
        return True

    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=dist.rank() != 0) as progress:
        task = progress.add_task("", total=samples)
        found = work(go_on)
    assert found is not None
    everywhere = {number: one for part in dist.gather(lost) for number, one in part.items()}
    rows = [everywhere[number] for number in sorted(everywhere)]
    return found, [{"shard": one.shard, "key": one.key, "reason": one.reason} for one in rows]


def names_of_classes(index: Index | Folders) -> list[str]:
    """By number, where classes.json lies beside the shards, or of the folders."""
    if isinstance(index, Folders):
        return index.names
    with contextlib.suppress(OSError, ValueError):
        return json_module.loads((Path(index.root) / "classes.json").read_text())
    return []


def _report(settings: config.Config, accuracy: Accuracy, names: list[str]) -> dict[str, Any]:
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


def _default_out(found: Path | None, averaged: bool) -> str | None:
    """RUN/evaluation/step-00001000.json; None where no run is evaluated."""
    if found is None or found.parent.name != "checkpoints":
        return None
    return str(found.parent.parent / "evaluation" / f"{found.name}{'-ema' if averaged else ''}.json")


def _write(report: dict[str, Any], out: str | None, json: bool) -> None:
    """For rank 0: the file, and what a person or a script reads."""
    text = json_module.dumps(report, indent=1)
    if out is not None:
        try:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(out), text + "\n")
        except OSError as error:
            raise UserError(f"{out}: could not be written ({error}); name another with --out") from None
    if json:
        print(text)
        return
    for line in check.failures():
        print(line, file=sys.stderr)
    for one in report["left_out"][:SHOWN]:
        print(f"left out: {one['shard']}: sample '{one['key']}': {one['reason']}", file=sys.stderr)
    if len(report["left_out"]) > SHOWN:
        print(f"left out: {len(report['left_out']) - SHOWN} more", file=sys.stderr)
    if "box_ap" in report:
        found = ", ".join(
            f"{kind} AP {_share(report[f'{kind}_ap'])}, AP50 {_share(report[f'{kind}_ap50'])}"
            for kind in ("box", "mask")
            if f"{kind}_ap" in report
        )
    elif "miou" in report:
        found = f"mIoU {report['miou']:.2%}, mAcc {report['macc']:.2%}, aAcc {report['aacc']:.2%}"
    else:
        found = f"top-1 {report['top1']:.2%}, top-5 {report['top5']:.2%}, loss {report['loss']:.4f}"
    print(
        f"{report['weights']}: {found} on {report['samples']} of {report['samples_in_set']} images "
        f"({len(report['left_out'])} could not be read)"
    )
    if out is not None:
        print(f"per class: {out}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def held_out(settings: config.Config, dtype: torch.dtype, run: Run) -> HeldOut:
    """Loss and accuracy of a classifier on the held-out set, as records of a run."""
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
