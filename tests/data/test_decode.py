"""Decoding against Pillow's own conversions, known colours, hostile sizes, and thousands of damaged files."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import skimage.data
from helpers import outside
from PIL import Image, ImageOps

from fdscale import UserError
from fdscale.data.decode import MOST_SCANS, Picture, decode
from fdscale.data.lost import Lost

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()[:281, :401])


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def whole(data: bytes) -> np.ndarray:
    """All pixels by way of Picture, which must also give each part of them."""
    found = Picture(data)
    height, width = found.height, found.width
    pixels = found.part(0, 0, height, width).numpy()
    top, left = height // 3, width // 4
    part = Picture(data).part(top, left, height - top - height // 5, width - left - width // 5)
    assert np.array_equal(part.numpy(), pixels[top : height - height // 5, left : width - width // 5])
    return pixels


def test_pixels_are_pillows(picture):
    """Of every mode that photos come in, as torchvision.datasets.folder.pil_loader does it."""
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    files = {
        "rgb": encoded(picture, "JPEG"),
        "progressive": encoded(picture, "JPEG", progressive=True),
        "grey": encoded(picture.convert("L"), "JPEG"),
        "cmyk": encoded(picture.convert("CMYK"), "JPEG"),
        "palette": encoded(picture.quantize(32)),
        "palette, one colour clear": encoded(picture.quantize(32), transparency=3),
        "palette, some clear": encoded(picture.quantize(32), transparency=bytes(range(0, 256, 8))),
        "alpha": encoded(alpha),
        "grey and alpha": encoded(alpha.convert("LA")),
        "one bit": encoded(picture.convert("1")),
        "webp": encoded(picture, "WEBP"),
        "webp with alpha": encoded(alpha, "WEBP"),
        "gif": encoded(picture, "GIF"),
        "bmp": encoded(picture, "BMP"),
        "tiff": encoded(picture, "TIFF"),
        "tiff, cmyk": encoded(picture.convert("CMYK"), "TIFF"),
        "tiff, jpeg inside": encoded(picture, "TIFF", compression="jpeg"),
        "ppm": encoded(picture, "PPM"),
    }
    for name, data in files.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of palettes with some colours clear
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert decode(data).mode == "RGB", name
        assert np.array_equal(np.asarray(decode(data)), expected), name
        assert np.array_equal(whole(data), expected), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "JPEG grey", "JPEG cmyk", "JPEG XMP", "PNG", "WEBP", "TIFF", "TIFF jpeg"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_upright(picture, kind, orientation):
    if kind.startswith("TIFF") and orientation in (0, 9):
        pytest.skip("libtiff does not write it")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"exif": exif}
    if kind.endswith("XMP"):
        options = {"xmp": b"<x:xmpmeta><tiff:Orientation>%d</tiff:Orientation></x:xmpmeta>" % orientation}
    if kind.startswith("TIFF"):
        options["compression"] = "jpeg" if kind.endswith("jpeg") else "tiff_lzw"
    image = picture.convert("L" if kind.endswith("grey") else "CMYK" if kind.endswith("cmyk") else "RGB")
    data = encoded(image, kind.split()[0], **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == (picture.size[::-1] if 5 <= orientation <= 8 else picture.size)
    assert np.array_equal(np.asarray(decode(data)), np.asarray(expected))
    found = Picture(data)
    assert (found.width, found.height) == expected.size
    assert np.array_equal(whole(data), np.asarray(expected))
    if kind.startswith("JPEG"):
        half = found.part(3, 5, 100, 90, shrink=2).float().mean((0, 1))
        full = found.part(6, 10, 200, 180).float().mean((0, 1))
        assert (half - full).abs().max() < 1.5  # the same place


def test_an_orientation_in_either_byte_order_counts_and_nonsense_does_not(picture):
    for order, head in ((">", b"MM\x00*\x00\x00\x00\x08"), ("<", b"II*\x00\x08\x00\x00\x00")):
        big = {">": "big", "<": "little"}[order]

        def number(value: int, size: int, big: str = big) -> bytes:
            return value.to_bytes(size, big)

        entry = number(ORIENTATION, 2) + number(3, 2) + number(1, 4) + number(6, 2) + b"\0\0"
        tiff = head + number(1, 2) + entry + b"\0\0\0\0"
        assert decode(encoded(picture, "JPEG", exif=b"Exif\0\0" + tiff)).size == picture.size[::-1]
        assert Picture(encoded(picture, "JPEG", exif=b"Exif\0\0" + tiff)).width == picture.height
        for broken in (tiff[:12], tiff[:4], tiff.replace(number(6, 2), number(77, 2))):
            data = encoded(picture, "JPEG", exif=b"Exif\0\0" + broken)
            assert decode(data).size == picture.size
            assert whole(data).shape[:2] == picture.size[::-1]


COLOURS = {
    (0, 0, 0, 0): (255, 255, 255),
    (0, 0, 0, 255): (0, 0, 0),
    (255, 0, 0, 0): (0, 255, 255),
    (0, 255, 0, 0): (255, 0, 255),
    (0, 0, 255, 0): (255, 255, 0),
    (0, 255, 255, 0): (255, 0, 0),
    (0, 0, 0, 128): (127, 127, 127),
}


@pytest.mark.parametrize("inks", COLOURS)
def test_cmyk_has_the_right_colours(inks):
    """Inverted inks, as Adobe writes them and as Pillow takes them even without Adobe's mark; and plain ones."""
    adobe = encoded(Image.new("CMYK", (24, 16), inks), "JPEG", quality=95)
    at = adobe.index(b"\xff\xee\x00\x0eAdobe")
    assert np.abs(whole(adobe).astype(int) - COLOURS[inks]).max() <= 4
    assert np.array_equal(whole(adobe[:at] + adobe[at + 16 :]), whole(adobe))
    tiff = encoded(Image.new("CMYK", (24, 16), inks), "TIFF")
    assert np.abs(whole(tiff).astype(int) - COLOURS[inks]).max() == 0


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 200, 30), (20, 40, 250), (255, 255, 255)])
def test_ycck_has_the_right_colours(colour):
    """Adobe's YCCK: luma and chroma of 255 - colour, and 255 for no black."""
    planes = Image.new("RGB", (24, 16), tuple(255 - value for value in colour)).convert("YCbCr").split()
    raw = [plane.point(lambda value: 255 - value) for plane in planes]  # Pillow inverts what it writes
    data = encoded(Image.merge("CMYK", (*raw, Image.new("L", (24, 16), 0))), "JPEG", quality=95)
    at = data.index(b"\xff\xee\x00\x0eAdobe")
    data = data[: at + 15] + b"\x02" + data[at + 16 :]  # the transform: YCCK
    assert np.abs(whole(data).astype(int) - colour).max() <= 5


def test_alpha_is_dropped_and_the_colour_below_it_kept():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert decode(encoded(image)).getpixel((0, 0)) == (200, 100, 50)


def test_16_bit_grey_keeps_its_upper_bits():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = np.repeat((values // 256).astype(np.uint8)[..., None], 3, 2)
    assert np.array_equal(whole(encoded(Image.fromarray(values))), expected)


def reasons(data: bytes) -> list[str]:
    """Why an image is lost, by both ways to it."""
    found = []
    for read in (decode, lambda data: Picture(data).part(0, 0, 1, 1)):
        with pytest.raises(Lost) as caught:
            read(data)
        found.append(str(caught.value))
        assert "\n" not in found[-1]
    return found


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "cannot be decoded .*truncated"),
        (lambda data: data[:-200], "cannot be decoded .*truncated"),
        (lambda data: data[:30], "cannot be decoded|no JPEG"),
        (lambda data: b"", "the 0 bytes are no JPEG"),
        (lambda data: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + data, "are no JPEG"),
        (lambda data: b"<svg/>", "are no JPEG"),
    ],
)
@pytest.mark.parametrize("progressive", [False, True])
def test_damage_is_lost_with_its_reason(picture, spoil, message, progressive):
    for reason in reasons(spoil(encoded(picture, "JPEG", progressive=progressive))):
        assert re.search(message, reason)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says so, whatever follows."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize("side", [9500, 20000, 65500])  # Pillow itself warns of the first and refuses the others
def test_images_that_would_fill_the_memory_are_lost(side):
    for data in (png_of(side, side), jpeg_of(side, side)):
        assert all("pixels" in reason for reason in reasons(data))
    assert all("pixels" in reason for reason in reasons(png_of(2**31 - 1, 2**31 - 1)))
    assert reasons(png_of(0, 5))


def test_the_bound_on_pixels_can_be_set():
    for kind in ("PNG", "JPEG"):
        data = encoded(Image.new("L", (8, 8)), kind)
        for read in (decode, Picture):
            with pytest.raises(Lost, match=r"8 x 8 pixels, more than the 63 allowed"):
                read(data, most_pixels=63)
            assert read(data, most_pixels=64).width == 8


def test_a_jpeg_of_endless_scans_is_lost(picture):
    data = encoded(picture, "JPEG", progressive=True)
    scans = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    last = data[scans[-1] : -2]
    assert whole(data).shape == (281, 401, 3)
    for count in (MOST_SCANS, 20000):
        for reason in reasons(data[:-2] + last * count + data[-2:]):
            assert reason.startswith(f"the JPEG has {count + len(scans)} scans")


def test_floating_point_images_are_lost():
    assert all("floating-point" in reason for reason in reasons(encoded(Image.new("F", (4, 4)), "TIFF")))


def test_what_is_lost_is_a_user_error():
    with pytest.raises(UserError):
        decode(b"")


FUZZ = """
import io, random, sys, time
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
import skimage.data, torch
from PIL import Image
from fdscale.data.augment import eval_view, train_view
from fdscale.data.lost import Lost
from test_decode import encoded

torch.set_num_threads(1)
rng = random.Random({seed})
picture = Image.fromarray(skimage.data.chelsea()[:60, :80])
exif = Image.Exif()
exif[0x0112] = 6
files = [
    *(encoded(picture, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")),
    encoded(picture, "JPEG", progressive=True, exif=exif),
    encoded(picture.convert("CMYK"), "JPEG"),
    encoded(picture.convert("L"), "JPEG", restart_marker_rows=1),
    encoded(picture.quantize(16), transparency=bytes(range(0, 256, 16))),
    encoded(picture.convert("RGBA"), "WEBP", lossless=True),
    encoded(picture, "TIFF", compression="jpeg"),
    encoded(picture, "TIFF", compression="tiff_lzw", exif=exif),
    encoded(picture, "TIFF", compression="tiff_deflate"),
    encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)]),
]
ways = ("exact", "scaled", "pillow")
views = lost = 0
slowest = 0.0
for _ in range({count}):
    data = bytearray(rng.choice(files))
    reach = rng.choice([40, 200, len(data)])
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(min(reach, len(data)))
        what = rng.random()
        if what < 0.7:
            data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif what < 0.8:
            data[at : at + 4] = rng.choice([2**32 - 1, 0, 2**14, 2**31 - 1]).to_bytes(4, "big")
        elif what < 0.9:
            del data[at : at + rng.choice([1, 4, 100, len(data)])]
            data = data or bytearray(b"x")
        else:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
    data = bytes(data)
    start = time.process_time()
    try:
        if rng.random() < 0.7:
            view = train_view(data, 0, rng.randrange(99), 24, decoding=rng.choice(ways))
        else:
            view = eval_view(data, 24, decoding=rng.choice(ways))
        assert view.shape == (3, 24, 24) and view.dtype == torch.uint8
        views += 1
    except Lost as error:
        assert str(error) and "\\n" not in str(error)
        lost += 1
    slowest = max(slowest, time.process_time() - start)
print(views, lost, slowest)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_give_a_view_or_are_lost(seed):
    """In a process of its own, so that a crash would be seen, and every word of warning."""
    code = FUZZ.format(tests=os.path.dirname(__file__), seed=seed, count=3000)
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        capture_output=True,
        text=True,
        env=outside(),
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    views, lost, _ = (float(word) for word in done.stdout.split())
    assert views + lost == 3000
    assert min(views, lost) > 600
