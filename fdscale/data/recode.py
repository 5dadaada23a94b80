"""Checking the image files that go into shards, and making large ones smaller.

The result is a function of the bytes, the settings and the version of Pillow, so shards come out the same every time.
"""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from PIL import Image, ImageOps

from fdscale import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MOST_PIXELS = 89_478_485  # of what is packed: as many as a run decodes (decode.py)
MOST_PIXELS_READ = 2 * MOST_PIXELS  # of what is made smaller: Pillow's own bound
QUALITY = 90
_MAGIC = {  # how a file begins -> the extension under which it is packed
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"P5": "ppm",
    b"P6": "ppm",
}


class Recoding(NamedTuple):
    """What happens to an image on its way into a shard.

    check: decode it, so that a broken one is noticed. resize: the most pixels its short side may have (None: any).
    quality: JPEG quality 1..95 of what is written anew; without resize every image is written anew where that makes it
    smaller (None: nothing is, but for what resize asks for, at QUALITY).
    """

    check: bool = True
    resize: int | None = None
    quality: int | None = None


def extension_of(data: bytes) -> str:
    """The extension (jpg, png, ...) that the first bytes of an image file ask for; "" if they are of no known kind."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for magic, extension in _MAGIC.items() if data.startswith(magic)), "")


def check_recoding(recoding: Recoding) -> None:
    """Raises UserError for settings that make no sense."""
    if recoding.resize is not None and recoding.resize < 1:
        raise UserError(f"--resize is {recoding.resize}, expected the pixels of the short side, 1 or more")
    if recoding.quality is not None and not 1 <= recoding.quality <= 95:
        raise UserError(f"--quality is {recoding.quality}, expected 1 to 95")


def recode(data: bytes, extension: str, recoding: Recoding) -> tuple[bytes, str]:
    """(bytes, extension) to pack of the image file in `data`: the same where nothing changes.

    What is written anew is an upright JPEG, grey or RGB: EXIF rotation is applied, alpha, EXIF and colour profile are
    dropped. Raises UserError if the image is broken, of no known kind or too large.
    """
    if recoding == Recoding(check=False):
        return data, extension
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, and Pillow's own bound on pixels
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return _recode(image, data, extension, recoding)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"the image has more than {MOST_PIXELS_READ} pixels, and is not opened") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"the {len(data)} bytes are no {', '.join(FORMATS)} image") from None
    except Exception as error:  # Pillow's readers raise whatever their parsing trips over
        raise UserError(f"the image cannot be decoded ({type(error).__name__}: {error})") from None


def _recode(image: Image.Image, data: bytes, extension: str, recoding: Recoding) -> tuple[bytes, str]:
    short = min(image.size)
    smaller = recoding.resize is not None and short > recoding.resize
    if not smaller and image.width * image.height > MOST_PIXELS:
        raise UserError(f"the image has {image.width} x {image.height} pixels, more than the {MOST_PIXELS} allowed")
    if not smaller and (recoding.resize is not None or recoding.quality is None):
        if recoding.check:
            if image.format == "JPEG":
                image.draft(None, (1, 1))  # at 1/8 of the size: still every byte is read
            image.load()
        return data, extension
    upright = ImageOps.exif_transpose(image)
    upright = upright if upright.mode == "L" else _to_rgb(upright)
    if smaller:
        assert recoding.resize is not None
        scale = recoding.resize / short
        size = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
        upright = upright.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=recoding.quality or QUALITY)
    written = buffer.getvalue()
    return (written, "jpg") if smaller or len(written) < len(data) else (data, extension)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() alone would clip it to white
        image = image.point(lambda value: value / 256).convert("L")
    return image.convert("RGB")
