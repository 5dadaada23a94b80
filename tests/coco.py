"""Generated images with objects whose boxes and masks are exact, as COCO 2017 lays them out: discs and squares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as runs

NAMES = {3: "disc", 7: "square"}  # category ids, as COCO's with gaps
SIZES = ((96, 128), (128, 96), (112, 112))


def scene(rng: np.random.Generator, photo: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, list[dict]]:
    """An image and its objects, of which none covers another."""
    height, width = size
    top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
    image = photo[top : top + height, left : left + width].copy()
    rows, columns = np.mgrid[:height, :width]
    taken, found = np.zeros(size, bool), []
    for _ in range(rng.integers(1, 5)):
        radius, kind = int(rng.integers(9, 22)), int(rng.choice(list(NAMES)))
        y, x = int(rng.integers(radius, height - radius)), int(rng.integers(radius, width - radius))
        square = np.maximum(abs(rows - y), abs(columns - x)) < radius
        inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2 if kind == 3 else square
        if (taken & square).any():
            continue
        taken |= square
        image[inside] = ((230, 60, 40) if kind == 3 else (40, 60, 220)) + rng.integers(-20, 20, 3)
        ys, xs = inside.nonzero()
        box = [int(xs.min()), int(ys.min()), int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)]
        encoded = runs.encode(np.asfortranarray(inside.astype(np.uint8)))
        polygon = [box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]
        shape = [polygon] if kind == 7 else {"size": list(size), "counts": encoded["counts"].decode()}
        found.append({"category_id": kind, "bbox": box, "area": int(inside.sum()), "segmentation": shape, "iscrowd": 0})
    return image, found


def write(folder: Path, split: str, count: int, seed: int, stuff: bool = False) -> dict:
    """So many scenes in COCO's layout; what its file says."""
    from skimage import data as photos

    rng = np.random.default_rng(seed)
    sources = [photos.astronaut(), photos.chelsea(), photos.coffee()]
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    tree: dict = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in NAMES.items()]}
    for number in range(count):
        image, found = scene(rng, sources[number % 3], SIZES[number % 3])
        name, image_id = f"{number + 100:012d}.jpg", number + 100
        Image.fromarray(image).save(folder / split / name, quality=95)
        height, width = image.shape[:2]
        tree["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for one in found:
            tree["annotations"].append({**one, "id": len(tree["annotations"]) + 1, "image_id": image_id})
        if stuff:
            where = folder / "stuffthingmaps" / split
            where.mkdir(parents=True, exist_ok=True)
            above = np.repeat((np.arange(height) > height // 2).astype(np.uint8)[:, None], width, 1)
            Image.fromarray(above).save(where / f"{number + 100:012d}.png")
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(tree))
    return tree
