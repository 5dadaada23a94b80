"""The report of the GPU suite: what is wrong with each part, and Markdown of all of them, whole or not."""

from __future__ import annotations

import re
from typing import Any

from fdscale.bench import checks, curves, fused, model, tables

TITLES = {
    "machine": "Machine",
    "build": "Building the CUDA kernels",
    "tests": "Tests that need a GPU",
    "determinism": "Repetition to the bit",
    "curves": "A short training by each path",
    "attention": "Window attention",
    "fused": "Fused ops",
    "model": "Whole networks",
    "memcheck": "compute-sanitizer, memcheck",
    "racecheck": "compute-sanitizer, racecheck",
}


def problems(name: str, result: dict[str, Any]) -> list[str]:
    """What must not be so: one line each."""
    if name == "tests":
        return [f"{test}: {message}" for test, message in result.get("failures", {}).items()]
    if name == "determinism":
        return checks.bad(result)
    if name == "curves":
        return [f"{path}: {why}" for path, why in result.get("failed", {}).items()]
    if name == "attention":
        broken = [f"{way} broke the GPU's context: {why}" for way, why in result.get("broken", {}).items()]
        return broken + [line for line in _failed_ways(result) if "broke the GPU's context" not in line]
    if name == "model":
        failed = [(p, name, r) for name, case in result.get("cases", {}).items() for p, r in case["paths"].items()]
        return [f"{path}, {name}: {record['failed']}" for path, name, record in failed if _ours(path, record)]
    if name in ("memcheck", "racecheck"):
        lines = [line for line in result.get("summary", []) if not re.search(r": 0 (errors|hazards)", line)]
        return lines or ([] if result.get("summary") else ["no summary was printed"])
    return []


def _failed_ways(result: dict[str, Any]) -> list[str]:
    """Of ours: that a baseline fails is told in the table, and is no problem of ours."""
    failed = [(w, name, r) for name, layer in result.get("layers", {}).items() for w, r in layer["ways"].items()]
    return [f"{way}, {name}: {record['failed']}" for way, name, record in failed if _ours(way, record)]


def _ours(path: str, record: dict[str, Any]) -> bool:
    from fdscale.kernels.attention import NAMES

    return "failed" in record and path.split(" ")[0] in NAMES


def verdict(name: str, record: dict[str, Any]) -> str:
    """One line: state, what came of it, problems."""
    said = record["state"] + (f": {record['why']}" if record["why"] else "")
    if detail := _detail(name, record["result"]):
        said += f"; {detail}"
    return said + (f"; {len(record['problems'])} problems" if record["problems"] else "")


def _detail(name: str, result: dict[str, Any]) -> str:
    if not result:
        return ""
    if name == "machine":
        return str(result.get("device"))
    if name == "build":
        return result["said"].splitlines()[-1] if result["said"] else ""
    if name == "fused":
        return f"{len(result['ops'])} ops"
    if name == "tests":
        return f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
    if name == "determinism":
        found = [said for cases in result["paths"].values() for said in cases.values()]
        return f"{found.count('same')} of {len(found)} cases are the same in {result['runs']} runs"
    if name == "attention":
        return f"{len(result['layers'])} layers, {len(result['not_measured'])} for which there was no time"
    if name == "model":
        return f"{len(result['cases'])} networks, {len(result['not_measured'])} for which there was no time"
    if name == "curves":
        return f"{len(result['losses'])} trainings of {result['length']['steps']} steps"
    return "; ".join(result.get("summary", []))


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    parts = report["parts"]
    head = [
        "# Kernels of window attention on a GPU" if report["device"] == "cuda" else "# The GPU suite, tried on a CPU",
        f"Made by `make gpu`, started {report['started']}, {report['seconds']:.0f} s at most.",
        tables.machine(parts.get("machine", {}).get("result", {})),
        tables.table(
            ("part", "what came of it", "s"),
            [(TITLES[name], verdict(name, record), f"{record['seconds']:.0f}") for name, record in parts.items()],
        ),
    ]
    return tables.paragraphs(*head, *(_section(name, record) for name, record in parts.items())) + "\n"


def _section(name: str, record: dict[str, Any]) -> str:
    lines = [f"## {TITLES[name]}", verdict(name, record)]
    lines.append("\n".join(f"- **{' '.join(problem.split())}**" for problem in record["problems"]))
    write = {
        "determinism": checks.table,
        "curves": curves.table,
        "attention": tables.attention,
        "fused": fused.table,
        "model": model.table,
    }
    if name in write and record["result"]:
        lines.append(write[name](record["result"]))
    if record.get("log_end"):
        lines.append("The end of what it printed:\n\n" + _block(record["log_end"]))
    return tables.paragraphs(*lines)


def _block(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())
