"""Means, intervals, a table and a plot of the experiment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fdscale.claim.experiment import STARTS

# Two-sided 95 % points of Student's t by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
PAIRS = (
    ("supervised-fd", "supervised"),
    ("contrastive-fd", "contrastive"),
    ("contrastive-fd", "contrastive-more"),
    ("contrastive", "random"),
)


class Mean(NamedTuple):
    """A mean and half its 95 % interval, by Student's t over seeds; NaN of one seed."""

    value: float
    half: float


def mean(values: list[float]) -> Mean:
    """Of at most 16 values."""
    count = len(values)
    if count < 2:
        return Mean(float(np.mean(values)), math.nan)
    return Mean(float(np.mean(values)), STUDENT[count - 2] * float(np.std(values, ddof=1)) / math.sqrt(count))


def summarise(results: dict[str, Any]) -> dict[str, Any]:
    """Means by start, and differences of PAIRS, seed by seed: a seed orders the images and fills heads alike."""
    top1 = results["top1"]
    return {
        "starts": {name: mean(values)._asdict() for name, values in top1.items()},
        "differences": {
            f"{one} - {other}": mean([a - b for a, b in zip(top1[one], top1[other], strict=True)])._asdict()
            for one, other in PAIRS
        },
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each start, and one for each difference."""
    found, lines = (
        summarise(results),
        ["| fine-tuned from | rate | top-1, mean of seeds | 95 % interval |", "|---|---|---|---|"],
    )
    for name, text in STARTS.items():
        one = found["starts"][name]
        rate = f"{results['rates'][name]:g}"
        lines.append(f"| {_called(name, text)} | {rate} | {one['value']:.2%} | ± {100 * one['half']:.2f} |")
    lines += ["", "| difference, seed by seed | points | 95 % interval |", "|---|---|---|"]
    for pair, one in found["differences"].items():
        ours, theirs = pair.split(" - ")
        name = f"{_called(ours, STARTS[ours])} - {_called(theirs, STARTS[theirs])}"
        lines.append(f"| {name} | {100 * one['value']:+.2f} | ± {100 * one['half']:.2f} |")
    return "\n".join(lines) + "\n"


def _called(name: str, text: str) -> str:
    return f"{name.split('-')[0]} teacher's student" if name.endswith("-fd") else text


def plot(results: dict[str, Any], path: Path) -> None:
    """Every seed a dot, means with their intervals; students in one colour, teachers in the other."""
    from fdscale.diagnose.plots import dots

    found = summarise(results)["starts"]
    rows = [
        (_called(name, text), results["top1"][name], found[name]["value"], found[name]["half"], name.endswith("-fd"))
        for name, text in STARTS.items()
    ]
    what = "digits of scikit-learn" if results["quick"] else "Fashion-MNIST"
    dots(rows, f"Fine-tuned on {results['sizes']['labelled']} labels of {what}", "top-1 on the test set, %", path)
