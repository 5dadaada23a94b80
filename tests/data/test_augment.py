"""Views against torchvision and Pillow: pixels given the same box, and the law of the boxes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fdscale import UserError
from fdscale.data.augment import crop_box, eval_view, train_view, uniform
from fdscale.data.lost import Lost

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea()[:281, :401])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo(picture) -> bytes:
    return encoded(picture, "JPEG", quality=92)


def pixels_of(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def theirs(image: Image.Image, number: int, size: int, interpolation: str) -> torch.Tensor:
    """torchvision's crop, resize and flip on a PIL image, of the box and the flip that are ours."""
    top, left, height, width = crop_box(*image.size, uniform(5, number), SCALE, RATIO)
    view = F.resized_crop(image, top, left, height, width, [size, size], MODES[interpolation])
    return F.pil_to_tensor(F.hflip(view) if uniform(5, number)[22] < 0.5 else view)


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.int() - b.int()).abs().float()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_train_view_is_torchvisions_crop_of_the_same_box(photo, interpolation):
    image, flips = pixels_of(photo), 0
    for number in range(12):
        expected = theirs(image, number, 96, interpolation)
        view = train_view(photo, 5, number, 96, interpolation=interpolation, decoding="pillow")
        assert view.dtype == torch.uint8
        assert view.is_contiguous()
        assert torch.equal(view, expected)
        flips += uniform(5, number)[22] < 0.5
    assert 0 < flips < 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_exact_views_differ_from_torchvisions_by_rounding_alone(interpolation, kind):
    """On average over views of photographs by less than 0.1 of 255."""
    total = []
    for name in ("astronaut", "chelsea", "coffee"):
        data = encoded(Image.fromarray(getattr(skimage.data, name)()), kind)
        image = pixels_of(data)
        for number in range(8):
            view = train_view(data, 5, number, 224, interpolation=interpolation)
            assert view.shape == (3, 224, 224)
            assert view.dtype == torch.uint8
            assert view.is_contiguous()
            total.append(difference(view, theirs(image, number, 224, interpolation)).mean())
    assert np.mean(total) < 0.1
    assert max(total) < 0.4  # where a side hardly changes its length


def test_scaled_views_are_exact_ones_unless_the_crop_is_twice_the_view(photo):
    """Where it is, they are the same crop of the image that Pillow decodes at half, a quarter or an eighth."""
    image, shrunk = pixels_of(photo), set()
    for number in range(40):
        view = train_view(photo, 5, number, 56, decoding="scaled")
        top, left, height, width = crop_box(*image.size, uniform(5, number), SCALE, RATIO)
        factor = max(s for s in (1, 2, 4, 8) if s == 1 or min(height, width) >= 56 * s)
        shrunk.add(factor)
        if factor == 1:
            assert torch.equal(view, train_view(photo, 5, number, 56))
            continue
        small = Image.open(io.BytesIO(photo))
        small.draft("RGB", (image.width // factor, image.height // factor))
        assert small.size == (-(-image.width // factor), -(-image.height // factor))
        box = [round(edge / factor) for edge in (left, top, left + width, top + height)]
        expected = F.pil_to_tensor(small.crop(box).resize((56, 56), Image.Resampling.BILINEAR))
        expected = expected.flip(2) if uniform(5, number)[22] < 0.5 else expected
        assert difference(view, expected).max() <= 2  # rounding
        assert difference(view, train_view(photo, 5, number, 56)).mean() < 8  # the same picture
    assert shrunk == {1, 2, 4}
    png = encoded(image)
    assert torch.equal(train_view(png, 5, 1, 56, decoding="scaled"), train_view(png, 5, 1, 56))


@pytest.mark.parametrize("decoding", ["exact", "scaled", "pillow"])
def test_train_view_depends_on_seed_and_number_alone(photo, decoding):
    def view(seed, number, **options):
        return train_view(photo, seed, number, 64, decoding=decoding, **options)

    torch.manual_seed(0)
    first = view(1, 2**40)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first, view(1, 2**40))
    assert not torch.equal(first, view(1, 2**40 + 1))
    assert not torch.equal(first, view(2, 2**40))
    never, always = (view(1, 3, flip=flip) for flip in (0.0, 1.0))
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


def test_draws_are_those_of_a_new_generator():
    for seed, number in ((0, 0), (9, 2**40), (2**63 - 1, 3), (9, 2**40)):
        words = np.random.Philox(key=np.array([seed, number], np.uint64), counter=0).random_raw(23)
        assert uniform(seed, number) == [int(word) / 2**53 for word in words >> np.uint64(11)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_ratio", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("box", [(0, 0, 401, 281), (0, 0, 150, 281), (3, 5, 64, 66), (0, 0, 97, 96)])
def test_eval_view_is_torchvisions_resize_and_centre_crop(picture, box, crop_ratio, interpolation):
    data = encoded(picture.crop(box), "JPEG")
    image = pixels_of(data)
    short = int(64 / crop_ratio)
    theirs = F.pil_to_tensor(F.center_crop(F.resize(image, short, MODES[interpolation]), 64))
    assert torch.equal(eval_view(data, 64, crop_ratio, interpolation, "pillow"), theirs)
    exact = eval_view(data, 64, crop_ratio, interpolation)
    assert exact.is_contiguous()
    assert difference(exact, theirs).mean() < 0.1
    scaled = eval_view(data, 64, crop_ratio, interpolation, "scaled")
    assert torch.equal(scaled, exact) == (min(image.size) < 2 * short)
    assert difference(scaled, theirs).mean() < 8


def test_eval_view_refuses_a_crop_beyond_the_image(photo):
    with pytest.raises(UserError, match=r"crop_ratio is 1\.1"):
        eval_view(photo, 64, 1.1)


@pytest.mark.parametrize("decoding", ["exact", "scaled", "pillow"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 9)])
def test_one_pixel_is_enough(kind, decoding, size):
    data = encoded(Image.new("RGB", size, (255, 0, 0)), kind)
    for number in range(4):
        view = train_view(data, 0, number, 32, interpolation="bicubic", decoding=decoding)
        assert view.shape == (3, 32, 32)
        assert difference(view, torch.tensor([255, 0, 0])[:, None, None]).max() <= 2
    view = eval_view(data, 32, decoding=decoding)
    assert difference(view, torch.tensor([255, 0, 0])[:, None, None]).max() <= 2


@pytest.mark.parametrize("decoding", ["exact", "pillow"])
def test_an_image_that_fills_the_memory_when_it_is_resized_is_lost(decoding):
    data = encoded(Image.new("L", (60000, 2)))
    assert train_view(data, 0, 0, 32, decoding=decoding).shape == (3, 32, 32)
    with pytest.raises(Lost, match=r"60000 x 2 pixels: with a short side of 64 pixels it would have 1920000 x 64"):
        eval_view(data, 56, decoding=decoding)
