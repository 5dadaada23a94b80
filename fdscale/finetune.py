"""`fdscale finetune`: a distilled backbone as a classifier of images (`classify`), of their pixels (`segment`), or to
find objects (`detect`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from fdscale import config, dist
from fdscale.classify import Classification
from fdscale.detect import Detection
from fdscale.job import Task, run_job
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
