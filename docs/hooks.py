"""What the site has beside the pages in docs/: the repository's other documents, and a reference made from the code.

An mkdocs hook. Links are written for the repository, where they are read as files; here they are turned to the pages.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "110"  # of the help texts

from mkdocs.structure.files import File, Files

from fdscale import cli, config

ROOT = Path(__file__).resolve().parents[1]
TAKEN = {  # path in the repository -> in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "ds_configs/README.md": "ds_configs.md",
    "slurm/README.md": "slurm.md",
}
PYTHON = {  # what is meant for other people's Python code
    "Runs": (
        "config.load", "distill.distill", "finetune.finetune", "evaluate.measure", "export.export", "config.recipes",
    ),
    "Networks": (
        "models.swin_v2.SwinV2", "models.vit.ViT", "models.teachers.load_teacher", "models.frozen.Teacher",
        "student.backbone", "student.read_weights",
    ),
    "Objective and kernels": (
        "objective.whiten", "objective.feature_loss", "objective.Distiller", "kernels.attention.window_attention",
    ),
    "Data": (
        "data.shards.make", "data.index.open_index", "data.index.Index", "data.order.Order", "data.stream.Samples",
        "data.stream.batches",
    ),
    "Checkpoints": ("engine.checkpoint.newest_valid", "engine.checkpoint.verify", "engine.checkpoint.Reader"),
    "Tasks": (
        "job.Task", "tasks.classification.Classifier", "tasks.upernet.UPerNet", "tasks.mask2former.Mask2Former",
        "tasks.detection.Detector",
    ),
    "Diagnosis": (
        "diagnose.attention.watched", "diagnose.heads.Heads", "diagnose.heads.Look", "diagnose.features.Moments",
        "diagnose.features.Likeness", "diagnose.features.LayerLikeness", "diagnose.landscape.direction",
        "diagnose.landscape.surface", "diagnose.landscape.sharpness",
    ),
    "Errors": ("UserError",),
}  # fmt: skip
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for path, name in TAKEN.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    for name, text in (("keys", keys()), ("verbs", verbs()), ("recipes", recipes()), ("python", python())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository to links between pages."""
    name = page.file.src_uri
    before = next((path for path, taken in TAKEN.items() if taken == name), f"docs/{name}")

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(before), match[1]))
        there = TAKEN.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(there, posixpath.dirname(name) or '.')}{match[2] or ''})"

    return LINK.sub(turned, markdown)


def keys() -> str:
    """Every key of a recipe, a table for each section."""
    lines = [
        "# Keys\n",
        "Everything that a recipe may set, and `--set section.key=value` on any command line. A key marked * does not "
        "change what is learnt beyond rounding, so it may change on resume; all others are part of a run's identity.\n",
    ]
    last = ""
    for key, default, entry in config.fields():
        section, name = key.split(".")
        if section != last:
            lines += [f"\n## {section}\n", "| key | default | meaning |", "|---|---|---|"]
            last = section
        about = entry.metadata
        bounds = [f"{word} {about[end]:g}" for end, word in (("low", "from"), ("high", "to")) if about[end] is not None]
        if about["choices"]:
            bounds.append("one of " + ", ".join("null" if one is None else str(one) for one in about["choices"]))
        meaning = about["doc"].replace("|", "\\|") + (f" ({' '.join(bounds)})" if bounds else "")
        lines.append(f"| `{name}`{'*' if about['neutral'] else ''} | `{json.dumps(default)}` | {meaning} |")
    lines.append("\n`teachers.NAME.KEY`: several teachers instead of the one of `teacher`, with its keys for each.")
    return "\n".join(lines) + "\n"


def verbs() -> str:
    """The help of every verb."""
    lines = ["# Verbs\n", "What `fdscale VERB --help` says.\n"]
    for name, parser in sorted(_parsers(cli.parser(), "fdscale").items()):
        lines.append(f"## {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    return "\n".join(lines)


def _parsers(parser: argparse.ArgumentParser, name: str) -> dict[str, argparse.ArgumentParser]:
    """A parser, or those of the verbs below it."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = {} if below else {name: parser}
    for action in below:
        for verb, one in action.choices.items():
            found |= _parsers(one, f"{name} {verb}")
    return found


def recipes() -> str:
    """Every recipe as it is."""
    lines = ["# Recipes\n", "`fdscale recipes NAME` shows one, `fdscale distill` or `fdscale finetune NAME` runs it.\n"]
    for name, path in config.recipes().items():
        lines.append(f"## {name}\n\n```yaml\n{path.read_text().rstrip()}\n```\n")
    return "\n".join(lines)


def python() -> str:
    """Docstrings of PYTHON, by mkdocstrings."""
    lines = ["# Python\n", "What other people's code may call. All else may change without a word in the changelog.\n"]
    for title, names in PYTHON.items():
        lines.append(f"## {title}\n")
        lines += [f"::: fdscale.{name}\n" for name in names]
    return "\n".join(lines)
