"""`fdscale recipes`: what can be run, and every key that a recipe may set."""

from __future__ import annotations

import json as json_module
from typing import Any

from rich.console import Console
from rich.table import Table

from fdscale import UserError, config, student


def main(recipe: str | None, keys: bool, json: bool) -> int:
    """`fdscale recipes`."""
    if keys and recipe is not None:
        raise UserError(f"--keys lists those of every recipe: leave out {recipe}, or --keys to show that one")
    if keys:
        _print_keys(json)
    elif recipe is not None:
        settings = config.load(recipe)
        print(
            json_module.dumps(config.as_dict(settings), indent=1) if json else config.recipe_path(recipe).read_text(),
            end="",
        )
    else:
        _print_list(json)
    return 0


def parameters(settings: config.Config) -> int:
    """Number of parameters of the student's backbone, counted on the meta device."""
    return sum(parameter.numel() for parameter in student.backbone(settings).parameters())


def _print_list(json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for name, path in config.recipes().items():
        settings = config.load(name)
        schedule = settings.schedule
        rows.append(
            {
                "recipe": name,
                "task": config.task_of(settings),
                "student": settings.student.model,
                "parameters": parameters(settings),
                "teacher": " + ".join(teacher.source for teacher in config.teachers_of(settings).values()) or None,
                "classes": next(filter(None, (config.classes_of(settings, task) for task in config.LABELLED)), None),
                "image_size": settings.data.image_size,
                "batch_size": settings.optim.batch_size,
                "length": f"{schedule.epochs:g} epochs" if schedule.epochs else f"{schedule.steps} steps",
                "what": path.read_text().splitlines()[0].lstrip("# ").rstrip("."),
            }
        )
    if json:
        print(json_module.dumps(rows, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "parameters", "learns from", "px", "batch", "length"):
        table.add_column(column, justify="right" if column in ("parameters", "px", "batch") else "left", no_wrap=True)
    for row in rows:
        count = f"{row['parameters']:,}"
        source = row["teacher"] or f"labels of {row['classes']} classes"
        table.add_row(row["recipe"], count, source, str(row["image_size"]), str(row["batch_size"]), row["length"])
    Console(width=140, highlight=False).print(table)
    print(
        "\n`fdscale recipes NAME` shows one with its source, command and expected result; `fdscale recipes --keys` "
        "explains every key."
    )


def _print_keys(json: bool) -> None:
    rows = []
    for key, default, entry in config.fields():
        bounds = {name: entry.metadata[name] for name in ("low", "high", "choices") if entry.metadata[name] is not None}
        rows.append(
            {
                "key": key,
                "default": default,
                **bounds,
                "meaning": entry.metadata["doc"],
                "changes_the_run": not entry.metadata["neutral"],
            }
        )
    if json:
        print(json_module.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['key']:<24} {json_module.dumps(row['default']):<22} {row['meaning']}")
    print("teachers.NAME.KEY        several teachers instead of the one of `teacher`, with its keys for each")
