"""Views and decoding against torchvision and Pillow: pixels given the same box, and the law of the boxes."""

from __future__ import annotations

import io
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fdscale import UserError
from fdscale.data.augment import crop_box, decode, eval_view, train_view, uniform

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()[:281, :401])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_train_view_is_torchvisions_crop_of_the_same_box(picture, interpolation):
    flips = 0
    for number in range(12):
        top, left, height, width = crop_box(*picture.size, uniform(5, number), SCALE, RATIO)
        expected = F.resized_crop(picture, top, left, height, width, [96, 96], MODES[interpolation])
        flip = uniform(5, number)[22] < 0.5
        expected = F.pil_to_tensor(F.hflip(expected) if flip else expected)
        view = train_view(picture, 5, number, 96, interpolation=interpolation)
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
        assert torch.equal(view, expected)
        flips += flip
    assert 0 < flips < 12


def test_train_view_depends_on_seed_and_number_alone(picture):
    torch.manual_seed(0)
    first = train_view(picture, 1, 2**40, 64)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first, train_view(picture, 1, 2**40, 64))
    assert not torch.equal(first, train_view(picture, 1, 2**40 + 1, 64))
    assert not torch.equal(first, train_view(picture, 2, 2**40, 64))
    never, always = (train_view(picture, 1, 3, 64, flip=flip) for flip in (0.0, 1.0))
    assert torch.equal(never.flip(2), always)


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (40, 300)])
def test_boxes_have_torchvisions_law(size):
    """Kolmogorov-Smirnov distance of area, ratio and place, at a level that a right law fails once in 10 000 seeds."""
    torch.manual_seed(0)
    n = 2000
    blank = Image.new("RGB", size)
    theirs = np.array([transforms.RandomResizedCrop.get_params(blank, SCALE, RATIO) for _ in range(n)], float)
    ours = np.array([crop_box(*size, uniform(0, number), SCALE, RATIO) for number in range(n)], float)

    def features(box):
        top, left, height, width = box.T
        return height * width, width / height, top / (size[1] - height + 1), left / (size[0] - width + 1)

    for a, b in zip(features(ours), features(theirs), strict=True):
        points = np.concatenate([a, b])
        distance = np.abs(
            np.searchsorted(np.sort(a), points, "right") - np.searchsorted(np.sort(b), points, "right")
        ).max()
        assert distance / n < 2.23 * np.sqrt(2 / n)


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (50, 50), (1, 1), (7, 1)])
def test_boxes_fall_back_as_torchvisions(size):
    """With a scale that no try can meet, the fallback is all there is."""
    blank = Image.new("RGB", size)
    expected = transforms.RandomResizedCrop.get_params(blank, (4.0, 5.0), RATIO)
    assert crop_box(*size, uniform(0, 0), (4.0, 5.0), RATIO) == expected


def test_draws_are_uniform_and_use_53_bits():
    draws = np.array([uniform(9, number) for number in range(2000)])
    assert draws.shape == (2000, 23)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 2000)
    assert np.abs(np.corrcoef(draws.T) - np.eye(23)).max() < 5 / np.sqrt(2000)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_ratio", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("box", [(0, 0, 401, 281), (0, 0, 150, 281), (3, 5, 64, 66), (0, 0, 97, 96)])
def test_eval_view_is_torchvisions_resize_and_centre_crop(picture, box, crop_ratio, interpolation):
    image = picture.crop(box)
    short = int(64 / crop_ratio)
    theirs = F.center_crop(F.resize(image, short, MODES[interpolation]), 64)
    assert torch.equal(eval_view(image, 64, crop_ratio, interpolation), F.pil_to_tensor(theirs))


def test_eval_view_refuses_a_crop_beyond_the_image(picture):
    with pytest.raises(UserError, match=r"crop_ratio is 1\.1"):
        eval_view(picture, 64, 1.1)


def test_decode_is_pillows_conversion(picture):
    """Of every mode that photos come in, as torchvision.datasets.folder.pil_loader does it."""
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    files = {
        "rgb": encoded(picture, "JPEG"),
        "grey": encoded(picture.convert("L"), "JPEG"),
        "cmyk": encoded(picture.convert("CMYK"), "JPEG"),
        "palette": encoded(picture.quantize(32)),
        "palette, one colour clear": encoded(picture.quantize(32), transparency=3),
        "palette, some clear": encoded(picture.quantize(32), transparency=bytes(range(0, 256, 8))),
        "alpha": encoded(alpha),
        "grey and alpha": encoded(alpha.convert("LA")),
        "one bit": encoded(picture.convert("1")),
        "webp": encoded(picture, "WEBP"),
        "gif": encoded(picture, "GIF"),
        "bmp": encoded(picture, "BMP"),
        "tiff": encoded(picture, "TIFF"),
    }
    for name, data in files.items():
        image = decode(data)
        assert image.mode == "RGB", name
        with pytest.warns() if "some clear" in name else nullcontext():
            expected = Image.open(io.BytesIO(data)).convert("RGB")
        assert np.array_equal(np.asarray(image), np.asarray(expected)), name


def test_decode_drops_alpha_and_keeps_the_colour_below():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert decode(encoded(image)).getpixel((0, 0)) == (200, 100, 50)


def test_decode_does_not_turn_images(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture, "JPEG", exif=exif)).size == picture.size


def test_decode_keeps_the_upper_bits_of_16_bit_grey():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image = decode(encoded(Image.fromarray(values)))
    assert np.array_equal(np.asarray(image), np.repeat((values // 256).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "cannot be decoded .*truncated"),
        (lambda data: data[:30], "cannot be decoded|no JPEG"),
        (lambda data: b"", "the 0 bytes are no JPEG"),
        (lambda data: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + data, "are no JPEG"),
        (lambda data: b"<svg/>", "are no JPEG"),
    ],
)
def test_decode_refuses_damage(picture, spoil, message):
    with pytest.raises(UserError, match=message):
        decode(spoil(encoded(picture, "JPEG")))


def test_decode_refuses_images_that_would_fill_the_memory():
    for side in (9500, 20000):  # Pillow itself warns of the first and refuses the second
        data = bytearray(encoded(Image.new("1", (8, 8))))
        data[16:24] = side.to_bytes(4, "big") * 2  # the header of a PNG: width and height, then their checksum
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        with pytest.raises(UserError, match="pixels"), pytest.warns() if side == 9500 else nullcontext():
            decode(bytes(data))
    with pytest.raises(UserError, match=r"8 x 8 pixels, more than the 63 allowed"):
        decode(encoded(Image.new("L", (8, 8))), most_pixels=63)


def test_decode_refuses_floating_point_images():
    with pytest.raises(UserError, match="floating-point"):
        decode(encoded(Image.new("F", (4, 4)), "TIFF"))
