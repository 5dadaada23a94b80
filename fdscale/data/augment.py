"""Bytes of an image file -> RGB image -> the view of it that a network sees, a pure function of (seed, number).

Decoding follows what ImageNet pipelines do (torchvision's and timm's `Image.open(...).convert("RGB")`), so that
results compare: EXIF orientation and colour profiles are ignored, an alpha channel is dropped and the colour below it
shows, CMYK is converted by Pillow's plain formula. 16-bit grey, which that call clips to white, keeps its upper 8 bits.

Letters: S side of a view in pixels; images are (3, S, S) uint8 RGB.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fdscale import UserError
from fdscale.data.lost import Lost
from fdscale.data.order import philox

# Only formats decoded inside Pillow: others start programs (EPS) or serve no purpose here.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MOST_PIXELS = 89_478_485  # 256 MiB as RGB: Pillow's own bound (PIL.Image.MAX_IMAGE_PIXELS)
TRIES = 10  # torchvision.transforms.RandomResizedCrop.get_params
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """The RGB image in a file's bytes. Raises Lost if it is damaged, cut short, too large or of no known kind."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > most_pixels:
            raise Lost(
                f"the image has {image.width} x {image.height} pixels, more than the {most_pixels} allowed "
                "(a guard against files that fill the memory); make it smaller or leave it out"
            )
        image.load()
        return _to_rgb(image)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise Lost(f"the {len(data)} bytes are no {', '.join(FORMATS)} image") from None
    except Exception as error:  # Pillow's readers raise whatever their parsing trips over
        raise Lost(f"the image cannot be decoded ({type(error).__name__}: {error})") from None


def train_view(
    image: Image.Image,
    seed: int,
    number: int,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
    flip: float = 0.5,
) -> Tensor:
    """A random part of an RGB image, resized to (3, size, size) uint8, mirrored with probability `flip`.

    seed: 0..2**63-1. number: of the sample, so that each epoch draws anew. scale: share of the image's area. ratio:
    width to height. The law is that of torchvision.transforms.RandomResizedCrop and RandomHorizontalFlip.
    """
    draws = uniform(seed, number)
    top, left, height, width = crop_box(image.width, image.height, draws, scale, ratio)
    part = image.crop((left, top, left + width, top + height))
    view = to_tensor(part.resize((size, size), RESAMPLING[interpolation]))
    return view.flip(2) if draws[2 * TRIES + 2] < flip else view


def eval_view(image: Image.Image, size: int, crop_ratio: float = 0.875, interpolation: str = "bilinear") -> Tensor:
    """The centre of an RGB image as (3, size, size) uint8: its short side is resized to size / crop_ratio, rounded
    down.

    Rounding as in torchvision's Resize and CenterCrop. crop_ratio: over 0, at most 1.
    """
    if not 0 < crop_ratio <= 1:
        raise UserError(f"crop_ratio is {crop_ratio}, expected a number over 0 and at most 1")
    short = math.floor(size / crop_ratio)
    width, height = image.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), RESAMPLING[interpolation])
    return to_tensor(image.crop((left, top, left + size, top + size)))


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


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a (3, height, width) uint8 tensor."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; "I" holds it in 32 bits
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 2**16 - 1) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Lost("the image holds floating-point values, whose range is not known; convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; the direct way warns of every such image
    return image.convert("RGB")
