"""Pictures; the only home of matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

Basis = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pca_to_rgb(tokens: np.ndarray) -> Basis:
    """The three main directions of tokens (n, C), and the range of their projections.

    Returns (mean (C,), directions (C, 3), low (3,), high (3,)). Directions are signed so that their largest entry is
    positive; low and high are the 2nd and 98th percentiles.
    """
    mean = tokens.mean(0)
    _, _, right = np.linalg.svd(tokens - mean, full_matrices=False)
    directions = right[:3].T
    directions = directions * np.sign(directions[np.abs(directions).argmax(0), range(3)])
    projected = (tokens - mean) @ directions
    return mean, directions, np.percentile(projected, 2, axis=0), np.percentile(projected, 98, axis=0)


def project(tokens: np.ndarray, basis: Basis) -> np.ndarray:
    """Tokens (..., C) to colours (..., 3) in [0, 1] by a basis of `pca_to_rgb`."""
    mean, directions, low, high = basis
    return np.clip(((tokens - mean) @ directions - low) / (high - low), 0, 1)


# Okabe and Ito's palette, told apart by colour-blind eyes; teachers and students have the same in all figures.
TEACHER, STUDENT = "#0072B2", "#D55E00"
TEACHERS = (TEACHER, "#56B4E9", "#000000")
OTHERS = (STUDENT, "#009E73", "#CC79A7", "#666666")


def looks_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """(colour, marker) of each network: one whose name begins with "teacher" has a teacher's wherever it stands."""
    teachers = itertools.cycle(zip(TEACHERS, "sPX", strict=True))
    others = itertools.cycle(zip(OTHERS, "oD^v", strict=True))
    return [next(teachers if name.startswith("teacher") else others) for name in names]


def dots(rows: Sequence[tuple[str, Sequence[float], float, float, bool]], title: str, axis: str, path: Path) -> None:
    """Shares as dots, one row for each (name, values, mean, half of its interval, whether a student), as percent."""
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(rows) + 1.3), layout="constrained")
    for y, (_, values, mean, half, student) in enumerate(rows):
        colour = STUDENT if student else TEACHER
        axes.plot([100 * value for value in values], [y] * len(values), "o", color=colour, alpha=0.35, markersize=5)
        axes.errorbar(100 * mean, y, xerr=100 * half, fmt="D", color=colour, capsize=4, markersize=6)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=11)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def by_depth(subjects: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[float]]], path: Path) -> None:
    """Of each (name, distances of the heads by block, likeness by block): dots and lines against depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    looks = looks_of([name for name, *_ in subjects])
    for (name, distances, likeness), (colour, mark) in zip(subjects, looks, strict=True):
        depth = [block for block, heads in enumerate(distances) for _ in heads]
        values = [value for heads in distances for value in heads]
        left.plot(depth, values, mark, color=colour, alpha=0.6, markersize=5, label=name)
        right.plot(range(len(likeness)), likeness, f"-{mark}", color=colour, markersize=5, label=name)
    left.set_title("Attention distance, a dot for each head", fontsize=11)
    left.set_ylabel("pixels between a query and what it looks at")
    right.set_title("Likeness of heads", fontsize=11)
    right.set_ylabel("mean cosine of two heads' attention")
    if not np.isfinite([value for *_, likeness in subjects for value in likeness]).any():
        right.text(0.5, 0.5, "each block has one head", ha="center", transform=right.transAxes)
    for axes in (left, right):
        axes.set_xlabel("block, from the input on")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def offset_maps(subjects: Sequence[tuple[str, Sequence[np.ndarray]]], path: Path) -> None:
    """Of each (name, mean weight by (key - query) of each block): first, middle and last block, logarithmic."""
    axes = ("where the key lies from the query: tokens across", "tokens down")
    _three_maps(subjects, axes, centred=True, path=path)


def average_maps(subjects: Sequence[tuple[str, Sequence[np.ndarray]]], path: Path) -> None:
    """Of each (name, mean weight (N, N) of query and key of each block): first, middle and last block, logarithmic."""
    _three_maps(subjects, ("key, tokens row by row", "query"), centred=False, path=path)


def _three_maps(
    subjects: Sequence[tuple[str, Sequence[np.ndarray]]], labels: tuple[str, str], centred: bool, path: Path
) -> None:
    figure, grid = plt.subplots(
        len(subjects), 3, figsize=(9, 2.9 * len(subjects) + 0.4), layout="constrained", squeeze=False
    )
    for (name, maps), row in zip(subjects, grid, strict=True):
        chosen = sorted({0, len(maps) // 2, len(maps) - 1})
        for axes in row[len(chosen) :]:
            axes.set_axis_off()
        for number, axes in zip(chosen, row, strict=False):
            seen = maps[number]
            height, width = seen.shape[0] // 2, seen.shape[1] // 2
            extent = (-width - 0.5, width + 0.5, height + 0.5, -height - 0.5) if centred else None
            shown = axes.imshow(np.log10(np.maximum(seen, 1e-6)), cmap="cividis", extent=extent)
            axes.set_title(f"{name}, block {number}", fontsize=10)
            figure.colorbar(shown, ax=axes, shrink=0.8, label="log10 of mean weight")
    figure.supxlabel(labels[0], fontsize=10)
    figure.supylabel(labels[1], fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def block_likeness(subjects: Sequence[tuple[str, int]], values: np.ndarray, path: Path) -> None:
    """CKA (n, n) of the blocks of all (name, number of blocks), one subject after the other."""
    figure, axes = plt.subplots(figsize=(6, 5), layout="constrained")
    shown = axes.imshow(values, vmin=0, vmax=1, cmap="cividis")
    edges = np.cumsum([0, *(count for _, count in subjects)]) - 0.5
    for edge in edges[1:-1]:
        axes.axhline(edge, color="white", linewidth=1.5)
        axes.axvline(edge, color="white", linewidth=1.5)
    middles = (edges[:-1] + edges[1:]) / 2
    axes.set_xticks(middles, [name for name, _ in subjects])
    axes.set_yticks(middles, [name for name, _ in subjects], rotation=90, va="center")
    axes.set_title("Likeness of blocks, from the input on", fontsize=11)
    figure.colorbar(shown, ax=axes, label="linear CKA of mean tokens")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def landscape(subjects: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Loss around the weights, as `fdscale.landscapes` gives it by name: lines of all seeds, with accuracy beside, or a
    plane for each subject, the first seed's."""
    first = next(iter(subjects.values()))
    if np.ndim(first["loss"]) == 3:
        values = [np.array(one["loss"][0]) for one in subjects.values()]
        finite = [some[np.isfinite(some)] for some in values]
        top = max((np.percentile(some, 90) for some in finite if some.size), default=1.0)
        low = min((some.min() for some in finite if some.size), default=0.0)
        figure, grid = plt.subplots(
            1, len(subjects), figsize=(4.2 * len(subjects) + 0.6, 4), layout="constrained", squeeze=False
        )
        for (name, one), axes in zip(subjects.items(), grid[0], strict=True):
            at = one["multiples"]
            levels = np.linspace(low, max(top, low + 1e-6), 15)
            loss = np.ma.masked_invalid(np.array(one["loss"][0]))  # what is not finite stays white
            drawn = axes.contourf(at, at, loss, levels=levels, cmap="cividis", extend="max")
            axes.set_title(name, fontsize=11)
            axes.set_aspect("equal")
        figure.colorbar(drawn, ax=grid[0].tolist(), label="cross-entropy", shrink=0.85)
        figure.supxlabel("multiple of the second direction", fontsize=10)
        figure.supylabel("multiple of the first direction", fontsize=10)
    else:
        figure, pair = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axes, key, label, factor in zip(
            pair, ("loss", "top1"), ("cross-entropy", "top-1, %"), (1, 100), strict=True
        ):
            for (name, one), (colour, mark) in zip(subjects.items(), looks_of(list(subjects)), strict=True):
                for place, line in enumerate(one[key]):
                    kept = {"label": name} if place == 0 else {}
                    axes.plot(
                        one["multiples"],
                        factor * np.array(line),
                        f"-{mark}",
                        color=colour,
                        alpha=0.6,
                        markersize=4,
                        **kept,
                    )
            axes.set_ylabel(label)
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        pair[0].legend(frameon=False)
        figure.supxlabel("multiple of a random direction that is as long as the weights, filter by filter", fontsize=10)
        figure.suptitle("Around the weights, a line for each seed", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def picture_table(
    rows: Sequence[Sequence[np.ndarray]],
    labels: Sequence[str],
    columns: Sequence[str],
    title: str,
    caption: str,
    path: Path,
) -> None:
    """A table of square pictures (side, side, 3) in [0, 1], written to the .jpg `path`; sides may differ.

    labels: of the rows; columns: heads of the columns. Small pictures are enlarged smoothly.
    """
    side, gap, left, top, bottom = 1.9, 0.06, 0.36, 0.84, 0.58  # inches
    width, height = left + len(columns) * (side + gap), top + len(rows) * (side + gap) + bottom
    figure = plt.figure(figsize=(width, height), facecolor="white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            place = (left + x * (side + gap), height - top - (y + 1) * side - y * gap, side, side)
            axes = figure.add_axes((place[0] / width, place[1] / height, side / width, side / height))
            axes.imshow(picture, interpolation="bicubic" if picture.shape[0] < 200 else "antialiased", aspect="auto")
            axes.set_axis_off()
            if y == 0:
                axes.set_title(columns[x], fontsize=10, pad=5)
        middle = height - top - y * (side + gap) - side / 2
        figure.text(left / 2 / width, middle / height, labels[y], rotation=90, ha="center", va="center", fontsize=10)
    middle = (left + width - gap) / 2 / width
    figure.text(middle, 1 - 0.2 / height, title, ha="center", va="center", fontsize=13, weight="bold")
    figure.text(middle, bottom / 2 / height, caption, ha="center", va="center", fontsize=9, color="0.25")
    figure.savefig(path, dpi=120, pil_kwargs={"quality": 90, "subsampling": 0})
    plt.close(figure)
