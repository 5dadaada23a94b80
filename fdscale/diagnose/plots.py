"""Pictures; the only home of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
