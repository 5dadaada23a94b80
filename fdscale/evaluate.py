"""`fdscale evaluate`: a fine-tuned network of any kind on the held-out set.

Each image counts exactly once on any number of ranks, and what cannot be read is left out and counted.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fdscale import UserError, classify, config, detect, dist, segment, student
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.durable import as_json, must_be_writable, write_atomically
from fdscale.engine.initialize import prepare_environment
from fdscale.inputs import names_of_classes, open_heldout
from fdscale.kernels import check
from fdscale.tasks.labels import read_labels
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
    settings, found = student.find(source, run, weights, set)
    other = [*set, *([] if labels is None else [labels]), *([] if dtype == "float32" else [dtype])]
    out = out or _default_out(found, ema, other)
    for file in (out, results):
        if file is not None:
            must_be_writable(Path(file))
    watchdog = Watchdog(settings.guard.step_limit_s, Path(out or ".").parent, lambda code, why: None)
    watchdog.begin("evaluation", SLACK)
    watchdog.start()
    try:
        what = found if found is not None else str(weights)
        pictures = None if out is None else _pictures(Path(out))
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
    if averaged and not isinstance(weights, Path):
        raise UserError(f"--ema takes the average of a run's weights, and {weights} is a file: leave it out")
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
        work, describe = functools.partial(classify.evaluate, labels=others), classify.report
    names = names_of_classes(index)
    module = student.loaded(settings, weights, averaged, precision)
    found, left_out = _with_progress(
        settings, index, moves, lambda go_on: work(settings, index, module, precision, go_on)
    )
    return {
        **describe(settings, found, names),
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


def _default_out(found: Path | None, averaged: bool, changes: list[str]) -> str | None:
    """RUN/evaluation/step-00001000.json, with something for what is other than in the run; None where no run is
    evaluated."""
    if found is None or found.parent.name != "checkpoints":
        return None
    other = hashlib.sha256("\n".join(changes).encode()).hexdigest()[:8] if changes else ""
    name = "-".join(part for part in (found.name, "ema" if averaged else "", other) if part)
    return str(found.parent.parent / "evaluation" / f"{name}.json")


def _pictures(out: Path) -> Path:
    """The folder beside a report."""
    return out.with_suffix("") if out.suffix else out.with_name(f"{out.name}-pictures")


def _write(report: dict[str, Any], out: str | None, json: bool) -> None:
    """For rank 0: the file, and what a person or a script reads."""
    text = as_json(report, indent=1)
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
