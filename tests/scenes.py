"""Generated scenes with exact masks: bright discs and dark squares on parts of photographs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# In the PNGs 1 is ground, 2 disc, 3 square, and 0 what has no class.
SIZES = ((80, 64), (64, 80))


def scene(rng: np.random.Generator, photo: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (height, width, 3) uint8 and its mask (height, width) uint8."""
    top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
    image = photo[top : top + height, left : left + width].copy()
    mask = np.ones((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(2):
        y, x, radius = rng.integers(10, height - 10), rng.integers(10, width - 10), rng.integers(10, 18)
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        image[inside], mask[inside] = (240, 60, 40), 2
        y, x, side = rng.integers(10, height - 10), rng.integers(10, width - 10), rng.integers(9, 15)
        inside = (abs(rows - y) < side) & (abs(columns - x) < side)
        image[inside], mask[inside] = (30, 60, 220), 3
    mask[:3, :3] = 0
    return image, mask


def write(folder: Path, split: str, count: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES) -> None:
    """So many scenes of (height, width) in turn as the official ADEChallengeData2016 has them, and its classes."""
    from skimage import data as photos

    rng = np.random.default_rng(seed)
    sources = [photos.astronaut(), photos.chelsea(), photos.coffee()]
    for part in ("images", "annotations"):
        (folder / part / split).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, mask = scene(rng, sources[number % 3], *sizes[number % len(sizes)])
        name = f"ADE_{split[:3]}_{number:08d}"
        Image.fromarray(image).save(folder / "images" / split / f"{name}.jpg", quality=95)
        Image.fromarray(mask).save(folder / "annotations" / split / f"{name}.png")
    names = ["ground", "disc", "square, blue"]
    rows = [f"{number}\t0.1\t10\t2\t{name}" for number, name in enumerate(names, 1)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + "\n".join(rows) + "\n")


def pack(folder: Path, out: Path, split: str, per_shard: int = 8) -> None:
    """The scenes as shards, by the program itself."""
    from fdscale.data.shards import make

    make(folder, out, split=split, samples_per_shard=per_shard)
    assert json.loads((out / "classes.json").read_text()) == ["ground", "disc", "square, blue"]
