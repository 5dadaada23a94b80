"""Bytes of an image file -> the view of it that a network sees, a pure function of (seed, number).

Three ways to decode and resize, which give slightly different pixels:

    exact    decode only what is cropped (decode.py), every pixel as Pillow decodes it; torch's antialiased resize,
             which differs from Pillow's by less than 0.1 of 255 on average
    scaled   the same, but where the part is at least twice the view a JPEG is decoded at half its size, or less
    pillow   decode the whole image, crop and resize by Pillow, as torchvision and timm do on PIL images

Letters: S side of a view in pixels; images are (3, S, S) uint8 RGB.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fdscale import UserError
from fdscale.data.decode import MOST_PIXELS, SHRINKS, Picture, decode
from fdscale.data.lost import Lost
from fdscale.data.order import philox

TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def train_view(
    data: bytes,
    seed: int,
    number: int,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
    flip: float = 0.5,
    decoding: str = "exact",
) -> Tensor:
    """A random part of the image in a file's bytes, (3, size, size) uint8, mirrored with probability `flip`.

    seed: 0..2**63-1. number: of the sample, so that each epoch draws anew. scale: share of the image's area. ratio:
    width to height. The law is that of torchvision.transforms.RandomResizedCrop and RandomHorizontalFlip. decoding:
    see the top of this file. Raises Lost if the image cannot be decoded.
    """
    draws = uniform(seed, number)
    mirrored = draws[2 * TRIES + 2] < flip
    if decoding == "pillow":
        image = decode(data)
        top, left, height, width = crop_box(image.width, image.height, draws, scale, ratio)
        part = image.crop((left, top, left + width, top + height))
        view = torch.from_numpy(np.array(part.resize((size, size), RESAMPLING[interpolation])))
        return _planar(view, mirrored)
    picture = Picture(data)
    top, left, height, width = crop_box(picture.width, picture.height, draws, scale, ratio)
    shrink = _shrink(picture, min(height, width), size) if decoding == "scaled" else 1
    if shrink > 1:  # the edges of the box, rounded to whole pixels of the smaller image
        bottom, right = round((top + height) / shrink), round((left + width) / shrink)
        top, left = round(top / shrink), round(left / shrink)
        height, width = bottom - top, right - left
    return _planar(_resize(picture.part(top, left, height, width, shrink), size, size, interpolation), mirrored)


def eval_view(
    data: bytes,
    size: int,
    crop_ratio: float = 0.875,
    interpolation: str = "bilinear",
    decoding: str = "exact",
    crops: int = 1,
) -> Tensor:
    """The centre of the image in a file's bytes, (3, size, size) uint8: its short side is resized to size / crop_ratio,
    rounded down.

    Rounding as in torchvision's Resize and CenterCrop. crop_ratio: over 0, at most 1. decoding: see the top of this
    file. crops: 5 gives (5, 3, size, size), the corners of the resized image (top left, top right, bottom left, bottom
    right) and its centre, and 10 all of them mirrored, too, as torchvision's FiveCrop and TenCrop. Raises Lost if the
    image cannot be decoded, or is so elongated that it would fill the memory.
    """
    if not 0 < crop_ratio <= 1:
        raise UserError(f"crop_ratio is {crop_ratio}, expected a number over 0 and at most 1")
    short = math.floor(size / crop_ratio)
    source = decode(data) if decoding == "pillow" else Picture(data)
    width, height = source.width, source.height
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    if width * height > MOST_PIXELS:
        raise Lost(
            f"the image has {source.width} x {source.height} pixels: with a short side of {short} pixels it would have "
            f"{width} x {height}, more than the {MOST_PIXELS} allowed; crop it or leave it out"
        )
    if isinstance(source, Picture):
        shrink = _shrink(source, min(source.width, source.height), short) if decoding == "scaled" else 1
        whole = source.part(0, 0, -(-source.height // shrink), -(-source.width // shrink), shrink)
        image = _resize(whole, height, width, interpolation)
    else:
        image = torch.from_numpy(np.array(source.resize((width, height), RESAMPLING[interpolation])))
    right, bottom = width - size, height - size
    places = [(round(bottom / 2), round(right / 2))]
    if crops > 1:
        places = [(0, 0), (0, right), (bottom, 0), (bottom, right), *places]
    views = [
        _planar(image[top : top + size, left : left + size], mirrored=mirrored)
        for mirrored in ((False, True) if crops == 10 else (False,))
        for top, left in places
    ]
    return views[0] if crops == 1 else torch.stack(views)


def _shrink(picture: Picture, side: int, wanted: int) -> int:
    """By how much an image may be decoded smaller, if `side` pixels of it are to become `wanted`."""
    fitting = (shrink for shrink in SHRINKS if picture.shrinks and side >= shrink * wanted)
    return next(fitting, 1)


def _resize(pixels: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """(h, w, 3) uint8 -> (height, width, 3) uint8, antialiased as Pillow does it."""
    planes = pixels[None].permute(0, 3, 1, 2)  # channels last in memory, for which torch has its fastest loop
    return functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)[0].permute(1, 2, 0)


def _planar(view: Tensor, mirrored: bool) -> Tensor:
    """(S, S, 3) -> (3, S, S), contiguous; numpy copies this pattern twice as fast as torch."""
    pixels = view.numpy()[:, ::-1] if mirrored else view.numpy()
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def uniform(seed: int, number: int) -> list[float]:
    """The draws of a view, each in [0, 1), from Philox(key=(seed, number)), counter from 0, 53 bits each.

    Draws 2t and 2t + 1 are area and ratio of try t (of 10), 20 and 21 are top and left, 22 is the flip; unused ones
    are passed over, so a draw means the same whatever came before.
    """
    words = philox(seed, number, (0, 0, 0, 0), 2 * TRIES + 3)
    return ((words >> np.uint64(11)) * 2.0**-53).tolist()


def crop_box(
    width: int, height: int, draws: list[float], scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of an image.

    Ten tries at an area uniform in `scale` and a ratio uniform in its logarithm; if none fits, the largest centred
    part of an allowed ratio (torchvision.transforms.RandomResizedCrop.get_params).
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for t in range(TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * draws[2 * t])
        aspect = math.exp(low + (high - low) * draws[2 * t + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draws[2 * TRIES] * (height - h + 1))
            left = int(draws[2 * TRIES + 1] * (width - w + 1))
            return top, left, h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w
