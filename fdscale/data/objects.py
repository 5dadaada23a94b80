"""An image and what is on it, as training and evaluation of detectors see them, a pure function of (seed, number).

Letters: S side of the square, H W an image's own size, h w its size in the square, n objects of an image, K classes.
Boxes are x0 y0 x1 y1 in pixels.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fdscale.data.coco import lengths
from fdscale.data.decode import Picture, decode_numbers
from fdscale.data.dense import IGNORED, fitted, resized
from fdscale.data.instaboost import Scene, around, boosted
from fdscale.data.lost import Lost
from fdscale.data.order import philox
from fdscale.data.stream import MASK, OBJECTS, Seen

SMALLEST = 1.0  # pixels of a box's side below which an object is no longer there


class Annotated(NamedTuple):
    """What is said of an image of (height, width): boxes (n, 4) float32, classes (n,) int64, crowd (n,) bool, areas
    (n,) float32 in its own pixels; masks: COCO's compressed run lengths of each, or None."""

    size: tuple[int, int]
    image_id: Any
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: list[dict[str, Any]] | None


def members(stuff: bool) -> tuple[tuple[str, ...], ...]:
    """What a view needs of a sample beside its image."""
    return (OBJECTS, MASK) if stuff else (OBJECTS,)


def read(data: bytes, classes: int, masks: bool) -> Annotated:
    """The member .objects.json. masks: they are wanted. Raises Lost where it is not as `coco` makes it."""
    try:
        tree = json.loads(data)
        size = (tree["height"], tree["width"])
        found = tree["objects"]
        if not all(isinstance(side, int) and 0 < side < 2**20 for side in size) or not isinstance(found, list):
            raise ValueError(f"the size {size}")
        boxes = np.array([one["box"] for one in found], np.float32).reshape(-1, 4)
        numbers = [one["class"] for one in found]
        crowd = np.array([bool(one["crowd"]) for one in found], bool)
        areas = np.array([one["area"] for one in found], np.float32)
        runs = [_checked(one["mask"], size) for one in found] if masks else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Lost(f"its .objects.json is not as expected ({type(error).__name__}: {str(error)[:80]})") from None
    if not all(isinstance(number, int) and 0 <= number < classes for number in numbers):
        raise Lost(f"its .objects.json has a class that is not from 0 to {classes - 1}: {numbers[:20]}")
    inside = np.array([0, 0, size[1], size[0]], np.float32)
    corners, low = boxes, inside[:2]
    right = np.isfinite(boxes).all() and (corners[:, :2] >= low).all() and (corners[:, 2:] <= inside[2:] + 0.5).all()
    if not right or not (boxes[:, 2:] > boxes[:, :2]).all() or not np.isfinite(areas).all():
        raise Lost("its .objects.json has a box that is not inside the image, or of no area")
    return Annotated(size, tree.get("image_id"), boxes, np.array(numbers, np.int64), crowd, areas, runs)


def _checked(mask: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths that may be given to pycocotools. Raises ValueError."""
    counts = mask["counts"]
    if mask["size"] != list(size) or not isinstance(counts, str) or sum(lengths(counts)) != math.prod(size):
        raise ValueError("run lengths of a mask that do not sum up to the image")
    return {"size": mask["size"], "counts": counts.encode()}


def decoded(runs: dict[str, Any]) -> np.ndarray:
    """(H, W) uint8 of a mask's run lengths."""
    from pycocotools import mask

    return mask.decode(runs)


def train_scene(
    image: bytes,
    objects: bytes,
    stuff: bytes | None = None,
    *,
    number: int,
    seed: int,
    size: int,
    jitter: tuple[float, float] | None,
    short_side: tuple[int, int] | None,
    bounds: tuple[int, int] | None,
    flip: float,
    interpolation: str,
    classes: int,
    masks: bool,
    instaboost: float = 0.0,
) -> Seen:
    """An image (3, S, S) uint8, resized at random, at the top left of a square; and what is on it.

    jitter: the image is fitted into the square times a factor drawn uniformly from here, and a random part that fits is
    taken (large-scale jitter). short_side: or its short side is drawn uniformly from here, with a long side of at most
    `bounds`', or S; it is taken whole. flip: probability. instaboost: probability that objects, with their masks, are
    moved a little before (`instaboost.boosted`). number: of the sample, so that each epoch draws anew.
    stuff: the PNG with the classes of pixels.

    Beside the image: sizes (2,) int64, h and w; stuff (S, S) uint8, IGNORED beyond; and of each object that is neither
    a crowd nor cut to less than a pixel: boxes (4,) float32, classes int64, masks (S, S / 8) uint8, bits by
    numpy.packbits. Raises Lost as `read` does, and where image and objects do not belong together.
    """
    picture, known = _opened(image, objects, classes, masks)
    draws = ((philox(seed, number, (0, 11, 0, 0), 5) >> np.uint64(11)) * 2.0**-53).tolist()
    numbers = None if stuff is None else _stuff(stuff, known.size)
    whole = picture.part(0, 0, picture.height, picture.width)
    if draws[4] < instaboost:
        whole, known, numbers = _boosted(whole, known, numbers, seed, number)
    if jitter is not None:
        height, width = fitted(known.size, (size, size), jitter[0] + (jitter[1] - jitter[0]) * draws[0])
    else:
        assert short_side is not None
        short = short_side[0] + int(draws[0] * (short_side[1] - short_side[0] + 1))
        height, width = fitted(known.size, (max(max(bounds or (size,)), short), short))
        height, width = _inside(height, width, size)
    top, left = (int(draw * (max(side - size, 0) + 1)) for draw, side in zip(draws[2:4], (height, width), strict=True))
    tall, wide = min(size, height), min(size, width)
    mirrored = draws[1] < flip
    pixels = resized(whole.permute(2, 0, 1).contiguous(), (height, width), interpolation)[
        :, top : top + tall, left : left + wide
    ]
    rows = _nearest(known.size[0], height)[top : top + tall]
    columns = _nearest(known.size[1], width)[left : left + wide]
    if mirrored:
        pixels, columns = pixels.flip(2), columns[::-1]
    boxes = known.boxes * (np.array([width, height] * 2) / np.array([known.size[1], known.size[0]] * 2))
    boxes = np.clip(boxes - np.array([left, top] * 2), 0, np.array([wide, tall] * 2)).astype(np.float32)
    if mirrored:
        boxes = np.stack((wide - boxes[:, 2], boxes[:, 1], wide - boxes[:, 0], boxes[:, 3]), 1)
    there = ~known.crowd & (boxes[:, 2:] - boxes[:, :2] >= SMALLEST).all(1)
    many = {}
    if known.masks is not None:
        bits = np.zeros((len(boxes), size, -(-size // 8)), np.uint8)
        for place in there.nonzero()[0]:
            mask = decoded(known.masks[place])[np.ix_(rows, columns)]
            there[place] = mask.any()
            bits[place, :tall] = np.packbits(np.pad(mask, ((0, 0), (0, size - wide))), axis=1)
        many["masks"] = torch.from_numpy(bits[there])
    many |= {"boxes": torch.from_numpy(boxes[there]), "classes": torch.from_numpy(known.classes[there])}
    alike = {"sizes": torch.tensor([tall, wide])}
    if numbers is not None:
        numbers = numbers[np.ix_(rows, columns)]
        beyond = ((0, size - tall), (0, size - wide))
        alike["stuff"] = torch.from_numpy(np.pad(numbers, beyond, constant_values=IGNORED))
    return Seen(functional.pad(pixels, (0, size - wide, 0, size - tall)), alike, many)


def scene(
    image: bytes,
    objects: bytes,
    *,
    size: int,
    bounds: tuple[int, int] | None,
    scales: tuple[float, ...] = (1.0,),
    interpolation: str,
    classes: int,
    masks: bool,
) -> Seen:
    """A whole image, fitted into `bounds`, or the square, times each of the scales: at the top left of a square each.

    The first is the image; `images1` and so on are the others, (3, S', S') uint8, S' a multiple of 64 where a scale is
    not 1. Beside them: `sizes0` (2,) int64, h and w, and so on; objects: the bytes of what is on it, `read`, of which
    `counts` says how many.
    """
    picture, _ = _opened(image, objects, classes, masks)
    pixels = picture.part(0, 0, picture.height, picture.width).permute(2, 0, 1).contiguous()
    views, alike = [], {}
    for place, scale in enumerate(scales):
        side = size if scale == 1 else math.ceil(size * scale / 64) * 64
        height, width = _inside(*fitted((picture.height, picture.width), bounds or (size, size), scale), side)
        view = resized(pixels, (height, width), interpolation)
        views.append(functional.pad(view, (0, side - width, 0, side - height)))
        alike[f"sizes{place}"] = torch.tensor([height, width])
    alike |= {f"images{place}": view for place, view in enumerate(views) if place}
    return Seen(views[0], alike, {"objects": torch.from_numpy(np.frombuffer(objects, np.uint8).copy())})


def _opened(image: bytes, objects: bytes, classes: int, masks: bool) -> tuple[Picture, Annotated]:
    picture, known = Picture(image), read(objects, classes, masks)
    if (picture.height, picture.width) != known.size:
        is_, told = (f"{width} x {height}" for height, width in ((picture.height, picture.width), known.size))
        raise Lost(f"its objects are on {told} pixels, the image has {is_}")
    return picture, known


def _boosted(
    whole: Tensor, known: Annotated, stuff: np.ndarray | None, seed: int, number: int
) -> tuple[Tensor, Annotated, np.ndarray | None]:
    """An image (H, W, 3) whose objects are elsewhere, crowds excepted; without those that are covered now."""
    from pycocotools import mask

    assert known.masks is not None
    own = (~known.crowd).nonzero()[0]
    masks = np.array([decoded(known.masks[place]) > 0 for place in own], bool).reshape(-1, *known.size)
    seen = boosted(Scene(whole.numpy(), masks, stuff), seed, number, IGNORED)
    boxes, areas, runs = known.boxes.copy(), known.areas.copy(), list(known.masks)
    boxes[own], areas[own] = around(seen.masks), seen.masks.sum((1, 2))
    for place, one in zip(own, seen.masks, strict=True):
        runs[place] = mask.encode(np.asfortranarray(one.astype(np.uint8)))
    moved = known._replace(boxes=boxes, areas=areas, masks=runs)
    return torch.from_numpy(seen.pixels), moved, seen.stuff


def _inside(height: int, width: int, size: int) -> tuple[int, int]:
    """At most the square's, the shape kept."""
    factor = min(1.0, size / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def _nearest(before: int, after: int) -> np.ndarray:
    """(after,) which of so many pixels each of a resized line shows: the one at its centre."""
    return np.minimum(((np.arange(after) + 0.5) * before / after).astype(np.int64), before - 1)


def _stuff(data: bytes, size: tuple[int, int]) -> np.ndarray:
    numbers = decode_numbers(data)
    if numbers.shape != size:
        is_, wanted = (f"{width} x {height}" for height, width in (numbers.shape, size))
        raise Lost(f"its classes of pixels have {is_} pixels, its objects are on {wanted}")
    return numbers
