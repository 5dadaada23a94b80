"""An image and the classes of its pixels, as training and evaluation see them, a pure function of (seed, number).

The steps are those of mmsegmentation's pipeline for ADE20K (configs/_base_/datasets/ade20k.py): resized by a random
ratio, cropped so that no class fills too much of it, mirrored, distorted in colour, padded.

Letters: S side of a view in pixels, H W an image's own; images are uint8 RGB, masks uint8 classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fdscale.data.decode import Picture, decode_numbers
from fdscale.data.lost import Lost
from fdscale.data.order import philox
from fdscale.data.photometric import distorted
from fdscale.data.stream import Seen

IGNORED = 255  # in a mask: a pixel without a class
OUTSIDE = 254  # in a training view's: a pixel beyond the edge of the image
CROPS = 10  # tried, mmsegmentation's RandomCrop
_NUMBERS = np.arange(256, dtype=np.uint8)


def scene(image: bytes, mask: bytes, *, classes: int, reduce_zero_label: bool) -> tuple[Tensor, Tensor]:
    """(3, H, W) and (H, W) of the bytes of an image file and of the PNG with its classes.

    reduce_zero_label: 0 in the PNG is no class, and n class n - 1 (ADE20K). Raises Lost where one of the two cannot be
    decoded, where they differ in size, and where there is a class that is not below `classes` nor IGNORED.
    """
    picture = Picture(image)
    numbers = decode_numbers(mask)
    if numbers.shape != (picture.height, picture.width):
        raise Lost(
            f"its mask has {numbers.shape[1]} x {numbers.shape[0]} pixels, the image {picture.width} x {picture.height}"
        )
    numbers = classes_of(numbers, classes, reduce_zero_label)
    pixels = picture.part(0, 0, picture.height, picture.width)
    return pixels.permute(2, 0, 1).contiguous(), torch.from_numpy(numbers)


def seen(view: Callable[..., tuple[Tensor, Tensor]], *data: bytes, **more: Any) -> Seen:
    """What a view of image and mask gives, as a stream takes it: `masks` beside the images."""
    image, mask = view(*data, **more)
    return Seen(image, {"masks": mask})


def classes_of(numbers: np.ndarray, classes: int, reduce_zero_label: bool) -> np.ndarray:
    """The classes (H, W) that the numbers of a mask mean. Raises Lost where one is not below `classes` nor IGNORED."""
    there = np.bincount(numbers.ravel(), minlength=256) > 0
    meant = np.roll(_NUMBERS, 1) if reduce_zero_label else _NUMBERS.copy()  # 1 -> 0, ..., and 0 -> 255
    meant[IGNORED] = IGNORED
    wrong = there & (meant >= classes) & (meant != IGNORED)
    if wrong.any():
        first = 1 if reduce_zero_label else 0
        raise Lost(
            f"its mask has the number {int(wrong.argmax())}, expected {first} to {classes - 1 + first}, or "
            f"{'0 or ' if first else ''}{IGNORED} where there is no class"
        )
    return meant[numbers]


def train_scene(
    image: bytes,
    mask: bytes,
    *,
    number: int,
    seed: int,
    size: int,
    bounds: tuple[int, int],
    ratio: tuple[float, float],
    most_of_a_class: float,
    flip: float,
    distort: bool,
    interpolation: str,
    classes: int,
    reduce_zero_label: bool,
) -> tuple[Tensor, Tensor]:
    """A random part of a scene: (3, S, S) and (S, S), both OUTSIDE of the mask beyond the edge of the image.

    number: of the sample, so that each epoch draws anew. size: S. bounds: pixels, of the long and the short side, into
    which an image is fitted, times a factor drawn uniformly from `ratio`. most_of_a_class: share of the pixels with a
    class that one class may have; the last of 10 crops is taken as it is. flip: probability. distort: colours, too.
    Raises Lost as `scene` does.
    """
    pixels, known = scene(image, mask, classes=classes, reduce_zero_label=reduce_zero_label)
    draws = uniform(seed, number)
    height, width = fitted((pixels.shape[1], pixels.shape[2]), bounds, ratio[0] + (ratio[1] - ratio[0]) * draws[0])
    known = functional.interpolate(known[None, None], (height, width), mode="nearest")[0, 0]
    top, left = _crop(known, size, draws[12:], most_of_a_class)
    # Resized whole, as the edges of a crop see what is beyond them.
    pixels = resized(pixels, (height, width), interpolation)[:, top : top + size, left : left + size]
    known = known[top : top + size, left : left + size]
    if draws[1] < flip:
        pixels, known = pixels.flip(2), known.flip(1)
    if distort:
        pixels = distorted(pixels, draws[2:11])
    missing = (0, size - pixels.shape[2], 0, size - pixels.shape[1])
    return functional.pad(pixels, missing), functional.pad(known, missing, value=OUTSIDE)


def fitted(size: tuple[int, int], bounds: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """(height, width) of an image resized so that its long and short side just fit into bounds x factor, rounded.

    mmcv's imrescale; at least one pixel.
    """
    long, short = int(max(bounds) * factor), int(min(bounds) * factor)
    scale = min(long / max(size), short / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def resized(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """(3, H, W) -> (3, *size), antialiased as Pillow does it; uint8 or float32."""
    return functional.interpolate(pixels[None], size, mode=interpolation, antialias=True)[0]


def _crop(known: Tensor, size: int, draws: list[float], most_of_a_class: float) -> tuple[int, int]:
    """Top and left of the first crop with several classes of which none has more than its share, else of the last."""
    height, width = known.shape
    for down, across in zip(draws[::2], draws[1::2], strict=True):
        top, left = int(down * (max(height - size, 0) + 1)), int(across * (max(width - size, 0) + 1))
        if most_of_a_class >= 1:
            break
        counts = known[top : top + size, left : left + size].flatten().bincount(minlength=256)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() < most_of_a_class * counts.sum():
            break
    return top, left


def uniform(seed: int, number: int) -> list[float]:
    """The draws of a view, each in [0, 1), see `order` for the uses: 0 the ratio, 1 the flip, 2 to 10 the colours
    (`photometric`), from 12 on top and left of each crop."""
    words = philox(seed, number, (0, 10, 0, 0), 12 + 2 * CROPS)
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()
