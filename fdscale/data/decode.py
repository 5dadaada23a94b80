"""Bytes of an image file -> its pixels, upright and RGB; where it can be, only the part that is asked for.

JPEGs go through jpeg.py, which decodes a rectangle alone; whatever it is not sure of, and every other format, is
decoded whole by Pillow. Both give the same pixels. Images are turned upright as their EXIF orientation says. Otherwise
decoding follows what ImageNet pipelines do (torchvision's and timm's `Image.open(...).convert("RGB")`), so that results
compare: colour profiles are ignored, an alpha channel is dropped and the colour below it shows, CMYK is converted by
Pillow's plain formula. 16-bit grey, which that call clips to white, keeps its upper 8 bits.

Whatever is wrong with an image is Lost; sizes are checked before anything is decoded.
"""

from __future__ import annotations

import ctypes
import functools
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from fdscale.data import jpeg
from fdscale.data.lost import Lost

# Only formats decoded inside Pillow: others start programs (EPS) or serve no purpose here.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MOST_PIXELS = 89_478_485  # 256 MiB as RGB: Pillow's own bound (PIL.Image.MAX_IMAGE_PIXELS)
MOST_SCANS = 500  # of a JPEG: each goes over the whole image, and real files have about ten (libjpeg-turbo's fuzzers)
SHRINKS = (8, 4, 2)  # by which a JPEG can be decoded smaller, for less work than whole

# A JPEG whose header has none of these is upright: EXIF's tag and type, in either byte order, and XMP's name.
_MAY_BE_TURNED = re.compile(rb"\x01\x12\x00|\x12\x01.\x00|Orientation", re.DOTALL)
_UPRIGHT = {  # EXIF orientation -> how to turn
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_JPEGS = ("JPEG", "MPO")  # MPO: several JPEGs in one file, of which the first counts


class Picture:
    """An image whose size, upright, is known, and whose pixels are decoded when a part of them is asked for.

    width, height: pixels. shrinks: whether it can also be decoded at 1/2, 1/4 and 1/8 of its size (JPEGs). Raises Lost
    for what `decode` refuses, as soon as it is seen.
    """

    def __init__(self, data: bytes, most_pixels: int = MOST_PIXELS) -> None:
        self._data, self._most_pixels = data, most_pixels
        self._image: Image.Image | None = None
        head = jpeg.head(data) if data[:2] == b"\xff\xd8" else None
        self._plain = head is not None and _MAY_BE_TURNED.search(data, 0, head.before_pixels) is None
        self.shrinks = self._plain
        if head is not None and self._plain:
            self.width, self.height = head.width, head.height
            _check_size(head.width, head.height, most_pixels)
            if head.many_scans:
                _check_scans(data)
            return
        with _failures_are_lost(data):
            image = _opened(data, most_pixels)
            self.width, self.height = image.size
            self.shrinks = image.format in _JPEGS
            if not self.shrinks:  # only when decoded do all of them say how they are turned
                self._image = _upright(image)
                self.width, self.height = self._image.size
            elif _orientation(image) in _SIDEWAYS:
                self.width, self.height = self.height, self.width

    def part(self, top: int, left: int, height: int, width: int, shrink: int = 1) -> Tensor:
        """The pixels (height, width, 3) uint8 of a rectangle of the image at 1/shrink of its size, rounded up."""
        if self._plain:
            pixels = jpeg.part(self._data, shrink, left, top, width, height)
            if pixels is not None:
                return torch.from_numpy(pixels)
        image = self._image
        if image is None:
            with _failures_are_lost(self._data):
                image = _upright(_opened(self._data, self._most_pixels), shrink)
            if image.size != (-(-self.width // shrink), -(-self.height // shrink)):
                raise Lost(f"the image is {image.width} x {image.height} pixels, other than its header says")
        return torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))


def decode(data: bytes, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """The image in a file's bytes, upright and RGB, by Pillow.

    Raises Lost if it is damaged, cut short, too large or of no known kind.
    """
    with _failures_are_lost(data):
        return _upright(_opened(data, most_pixels))


def decode_numbers(data: bytes, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The numbers (H, W) uint8 that the pixels of a PNG hold, of up to 8 bits: grey, or indices of its palette.

    Raises Lost for what `decode` refuses, and for a PNG of another kind.
    """
    with _failures_are_lost(data):
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        _check_size(image.width, image.height, most_pixels)
        if image.mode not in ("1", "L", "P"):
            raise Lost(f"the PNG is of mode {image.mode}, expected numbers of up to 8 bits: grey, or a palette's")
        numbers = np.array(image).astype(np.uint8)
        bits, colour = data[24], data[25]  # of the header, which is a PNG's first chunk
        # Pillow spreads grey of 2 and 4 bits from 0 to 255, where it would mean other classes.
        return numbers // (255 // (2**bits - 1)) if image.mode == "L" and colour == 0 else numbers


def _opened(data: bytes, most_pixels: int) -> Image.Image:
    """With its size checked, not yet decoded."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image.width, image.height, most_pixels)
    if image.format in _JPEGS:
        _check_scans(data)
    elif image.format == "TIFF":
        _silence_libtiff()
    return image


def _upright(image: Image.Image, shrink: int = 1) -> Image.Image:
    if shrink > 1:
        image.draft(image.mode, (image.width // shrink, image.height // shrink))
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    return _to_rgb(image if turn is None else image.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """From 1, upright, to 8 (EXIF, or XMP where that has none); 1 if it cannot be read: the pixels are sound."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever parsing trips over
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; "I" holds it in 32 bits
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 2**16 - 1) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Lost("the image holds floating-point values, whose range is not known; convert it to 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; the direct way warns of every such image
    return image.convert("RGB")


def _check_size(width: int, height: int, most_pixels: int) -> None:
    if width < 1 or height < 1:
        raise Lost(f"the image has {width} x {height} pixels")
    if width * height > most_pixels:
        raise Lost(
            f"the image has {width} x {height} pixels, more than the {most_pixels} allowed "
            "(a guard against files that fill the memory); make it smaller or leave it out"
        )


def _check_scans(data: bytes) -> None:
    scans = data.count(b"\xff\xda")
    if scans > MOST_SCANS:
        raise Lost(f"the JPEG has {scans} scans, more than the {MOST_SCANS} allowed (a guard against endless decoding)")


@functools.cache
def _silence_libtiff() -> None:
    """It prints errors besides reporting them; the loss is told with shard and key elsewhere."""
    from PIL import _imaging

    with suppress(OSError, AttributeError):  # where Pillow was built otherwise, it prints
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


@contextmanager
def _failures_are_lost(data: bytes) -> Iterator[None]:
    """Pillow's readers raise whatever their parsing trips over, and warn of what the reason will say anyway."""
    log = logging.getLogger("PIL.TiffImagePlugin")
    enabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Lost:
        raise
    except Image.UnidentifiedImageError:
        raise Lost(f"the {len(data)} bytes are no {', '.join(FORMATS)} image") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise Lost(f"the image cannot be decoded ({reason})") from None
    finally:
        log.disabled = enabled
