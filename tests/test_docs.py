"""The documents against the code: links lead somewhere, commands parse, keys, fields, files and tests exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from fdscale import cli, config

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "ds_configs" / "README.md",
    ROOT / "slurm" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page_id(page)}: {target}"


def commands(text: str) -> list[str]:
    """fdscale commands in code blocks and spans, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`((?:torchrun|srun|fdscale) [^`\n]+)`", text)
    found = []
    for line in [*lines, *spans]:
        line = line.split("  #")[0].strip()
        match = re.search(
            r"(?:^|\s)(?:fdscale|fdscale\.cli --) "
            r"((?:distill|finetune|evaluate|probe|diagnose|plan|tune|submit|cache|export|runs|report|recipes|doctor|shards|bench)\b.*)",
            line,
        )
        if match:
            found.append(match.group(1))
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_parse(page: Path) -> None:
    for command in commands(page.read_text()):
        words = [
            word for word in shlex.split(command) if word not in ("...", "[--set", "[--ds", "[--steps", "[--resume")
        ]
        if (
            "RECIPE" in words
            or "[" in command
            or len(words) == (2 if words[0] == "shards" else 1)  # a verb is named
            or (words[0] == "submit" and "--time" not in words)
        ):
            continue  # a synopsis
        if words[0] in ("distill", "finetune", "submit") and "--run" not in words:
            words += ["--run", "x"]
        arguments = cli.parser().parse_args(words)
        for setting in getattr(arguments, "set", None) or []:
            named = re.sub(r"^teachers\.\w+\.", "teacher.", setting.split("=")[0])
            assert named in {key for key, _, _ in config.fields()}, f"{page_id(page)}: {setting}"
        recipe = getattr(arguments, "recipe", None)
        if recipe and "/" not in recipe and recipe.islower():
            assert recipe in config.recipes(), f"{page_id(page)}: {recipe}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_code_blocks_are_well_formed(page: Path) -> None:
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.S | re.M):
        if language == "python":
            compile(block, page_id(page), "exec")
        elif language == "yaml":
            yaml.safe_load(block)
        elif language == "json":
            json.loads(block)
        else:
            assert language in ("bash", "text"), language
            if language == "bash":
                done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
                assert done.returncode == 0 or "..." in block, f"{page_id(page)}: {done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\b((?:fdscale|tests|docs|ds_configs|slurm)/[\w/]+\.(?:py|md|json|yaml|sh|sbatch))", text):
        assert (ROOT / name).exists(), f"{page_id(page)}: {name}"
    for name in re.findall(r"`((?:engine|models|data|kernels)/\w+\.py)`", text):
        assert (ROOT / "fdscale" / name).exists(), f"{page_id(page)}: {name}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(
            r"^make (\w+)", "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)), re.M
        ):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page_id(page)}: make {target}"


def test_the_table_of_metrics_is_complete() -> None:
    from types import SimpleNamespace

    import torch

    from fdscale.engine.metrics import Meter, Work

    meter = Meter(8, Work(1, 1, 1), 1.0)
    meter.add(torch.tensor(1.0))
    meter.end_step(applied=True)
    engine = SimpleNamespace(
        get_global_grad_norm=lambda: 1.0, skipped_steps=0, optimizer=SimpleNamespace(param_groups=[{"lr": 1.0}])
    )
    text = (ROOT / "docs" / "running.md").read_text()
    for field in meter.read(engine):
        assert re.search(rf"\b{field}\b", text), field
