"""The import rules of docs/design.md, read from the source: imports flow one way and heavy packages have one home."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fdscale"

APPS = {
    "assemble", "distill", "finetune", "classify", "segment", "detect", "evaluate", "probe", "diagnosis", "landscapes",
    "submit", "export", "cache", "catalog", "doctor", "surroundings", "shards", "demo", "demo_finetune",
    "claim", "bench", "runs", "plan", "tune", "report", "svg",
}  # fmt: skip
SHARED = {"inputs", "student", "recovery", "job", "heldout", "labelled"}  # by the apps that train
# part of fdscale -> the parts it may import; fdscale itself (UserError, __version__) and durable are open to all
MAY_IMPORT = {
    "kernels": set(),
    "dist": set(),
    "strict": set(),
    "durable": set(),
    "keys": {"strict", "keys_segment", "keys_detect"},
    "keys_segment": {"strict"},
    "keys_detect": {"strict"},
    "config": {"strict", "keys"},
    "data": set(),
    "models": {"kernels"},
    "objective": {"kernels", "phi_s"},
    "phi_s": set(),
    "signals": set(),
    "starts": set(),
    "sinks": set(),
    "watchdog": {"dist"},
    "run": {"config", "keys", "dist", "signals", "sinks", "starts", "watchdog"},
    "engine": {"config", "keys", "dist", "run", "starts"},
    "train": {"engine", "run", "keys", "dist", "watchdog"},
    "recovery": {"train", "engine", "run", "dist"},
    "inputs": {"config", "keys", "data", "dist", "engine"},
    "student": {"config", "dist", "kernels", "models", "engine", "tasks"},
    "job": {"config", "data", "dist", "engine", "inputs", "kernels", "recovery", "run", "starts", "train", "watchdog"},
    "heldout": {"config", "data", "engine", "inputs", "run"},
    "labelled": {"config", "engine", "inputs", "student"},
    "tasks": {"models", "data", "dist"},
    "diagnose": {"models", "data", "dist", "kernels"},
    "verbs": {"signals"},
    "cli": {"config", "signals", "verbs", *APPS},
    **{
        app: {
            "train",
            "tasks",
            "models",
            "data",
            "objective",
            "phi_s",
            "engine",
            "run",
            "starts",
            "diagnose",
            "config",
            "keys",
            "keys_detect",
            "dist",
            "kernels",
            "signals",
            "verbs",
            "watchdog",
            *SHARED,
            *APPS,
        }
        for app in APPS
    },
}
HOMES = {  # package -> files that may import it
    "deepspeed": ("engine/",),
    "triton": ("kernels/",),
    "timm": ("models/teachers.py", "models/frozen.py", "data/randaugment.py", "demo.py", "bench/"),
    "open_clip": ("models/teachers.py",),
    "matplotlib": ("diagnose/plots.py",),
    "fairscale": ("engine/memory.py",),
    "torchao": ("engine/fp8.py",),
    "webdataset": ("data/", "bench/"),
    "transformers": ("tasks/mask2former.py",),
    "pycocotools": ("data/", "tasks/average_precision.py", "detect.py"),
}


@functools.cache
def imports(path: Path) -> list[str]:
    """Every module that a file imports, also inside functions."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            if node.module == "fdscale":
                yield from (f"fdscale.{alias.name}" for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not [name for name in imports(path) if name.startswith("fdscale")]
        return
    assert part in MAY_IMPORT, f"{part} has no place in the import rules: add it here and in docs/design.md"
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("fdscale.")}
    forbidden = ours - MAY_IMPORT[part] - {part, "UserError", "__version__", "durable"}
    assert not forbidden, f"{path} imports {forbidden}, which {part} must not know"


@pytest.mark.parametrize("package", HOMES)
def test_heavy_packages_have_one_home(package: str) -> None:
    users = [
        path.relative_to(PACKAGE).as_posix() for path in FILES if any(n.split(".")[0] == package for n in imports(path))
    ]
    strangers = [user for user in users if not user.startswith(HOMES[package])]
    assert not strangers, f"{package} belongs in {HOMES[package]}"


INHERITED = {"forward", "write", "close", "construct_mapping"}  # said where they are declared


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_all_that_is_public_says_what_it_is(path: Path) -> None:
    def silent(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for one in node.body:
            if isinstance(one, (ast.FunctionDef, ast.ClassDef)) and one.name[0] != "_":
                if not ast.get_docstring(one) and one.name not in INHERITED:
                    yield f"{prefix}{one.name}"
                if isinstance(one, ast.ClassDef):
                    yield from silent(one, f"{one.name}.")

    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name == "__init__.py", f"{path} has no docstring"
    assert not list(silent(tree, "")), path


def test_the_layout_names_each_module() -> None:
    layout = (ROOT / "docs" / "design.md").read_text().partition("## Layout")[2].partition("\n## ")[0]
    named = set(re.findall(r"\w+", layout))
    for path in FILES:
        if part_of(path) not in {"bench", "claim", "__init__"} and path.stem != "__init__":  # one line for all of those
            assert path.stem in named or f"{path.stem.split('_')[0]}_" in named, f"{path}: docs/design.md"


def test_files_and_functions_stay_small() -> None:
    """Good trees of this field have no tail: no 440-line main, no 350-line constructor."""
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 420, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno <= 75, f"{path}: {node.name}"


def test_public_definitions_are_documented() -> None:
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
