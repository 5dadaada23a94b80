"""Scores of pixels against scikit-learn's, and images of any size against the plain loops of mmsegmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torch import Tensor

from fdscale.data.dense import IGNORED
from fdscale.tasks import inference
from fdscale.tasks.inference import Inference, likeliest
from fdscale.tasks.segmentation import Confusion

CLASSES = 6


def counted(predictions: list[np.ndarray], masks: list[np.ndarray]):
    confusion = Confusion(CLASSES, len(masks))
    for number, (predicted, mask) in enumerate(zip(predictions, masks, strict=True)):
        confusion.add(number, torch.from_numpy(predicted), torch.from_numpy(mask))
    return confusion.result()


def check(predictions: list[np.ndarray], masks: list[np.ndarray]) -> None:
    found = counted(predictions, masks)
    truth = np.concatenate([mask.ravel() for mask in masks])
    said = np.concatenate([one.ravel() for one in predictions])[truth != IGNORED]
    truth = truth[truth != IGNORED]
    labels = sorted({*truth.tolist(), *said.tolist()})  # classes that are nowhere do not count
    assert found is not None
    assert found.images == len(masks)
    assert np.array_equal(found.confusion.numpy(), confusion_matrix(truth, said, labels=range(CLASSES)))
    assert found.miou == pytest.approx(jaccard_score(truth, said, labels=labels, average="macro"))
    assert found.aacc == pytest.approx(accuracy_score(truth, said))
    there = sorted(set(truth.tolist()))
    assert found.macc == pytest.approx(np.mean([(said[truth == label] == label).mean() for label in there]))


def test_scores_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 30, (4, 2))
        masks = [rng.choice([*range(CLASSES), IGNORED], size).astype(np.uint8) for size in sizes]
        check([rng.integers(0, CLASSES, size) for size in sizes], masks)


@pytest.mark.parametrize("present", [[0], [1, 4], [5]])
def test_absent_classes_are_left_out(present: list[int]) -> None:
    """In the masks, in the predictions, or in both."""
    rng = np.random.default_rng(1)
    mask = rng.choice([*present, IGNORED], (9, 7)).astype(np.uint8)
    for said in (np.full((9, 7), 3), np.full((9, 7), present[0]), rng.integers(0, CLASSES, (9, 7))):
        check([said.astype(np.int64)], [mask])


def test_all_ignored_is_nothing() -> None:
    zeros = np.zeros((4, 4), np.int64)
    empty = np.full((4, 4), IGNORED, np.uint8)
    assert counted([zeros], [empty]) is None
    alone, beside = counted([zeros], [empty // 255]), counted([zeros, zeros], [empty // 255, empty])
    assert alone is not None
    assert beside is not None
    assert (alone.miou, alone.images, beside.miou, beside.images) == (beside.miou, 1, alone.miou, 2)


def test_an_image_that_is_counted_twice_is_noticed() -> None:
    confusion = Confusion(CLASSES, 2)
    for _ in range(2):
        confusion.add(1, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="counted twice"):
        confusion.result()


WEIGHT = torch.randn(CLASSES, 3, 3, 3, generator=torch.Generator().manual_seed(3))


def network(images: Tensor) -> Tensor:
    """Scores at half the size, which see a pixel's neighbours and where in the crop they are."""
    place = torch.linspace(0, 1, images.shape[3])
    return F.conv2d(images + place, WEIGHT, stride=2, padding=1)


def look(**changes: object) -> Inference:
    usual = {"crop": 16, "stride": 10, "whole": False, "bounds": (80, 24), "scales": (1.0,), "mirror": False}
    return Inference(**{**usual, "interpolation": "bilinear", "batch": 3, **changes})  # type: ignore[arg-type]


def slid(view: Tensor, crop: int, stride: int) -> Tensor:
    """mmsegmentation's EncoderDecoder.slide_inference, crop after crop."""
    height, width = view.shape[2:]
    total, times = torch.zeros(1, CLASSES, height, width), torch.zeros(1, 1, height, width)
    for down in range(max(height - crop + stride - 1, 0) // stride + 1):
        for across in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(down * stride + crop, height), min(across * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            scores = F.interpolate(network(view[:, :, top:bottom, left:right]), (crop, crop), mode="bilinear")
            total += F.pad(scores, (left, width - right, top, height - bottom))
            times[:, :, top:bottom, left:right] += 1
    assert times.min() > 0
    return total / times


@pytest.mark.parametrize("size", [(30, 50), (24, 24), (90, 33)])
@pytest.mark.parametrize("whole", [False, True])
def test_one_view_is_mmsegmentations(size: tuple[int, int], whole: bool) -> None:
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(4))
    short = min(24, int(80 * min(size) / max(size) + 0.5))
    fit = [short if length == min(size) else int(length * short / min(size) + 0.5) for length in size]
    view = F.interpolate(image[None], fit, mode="bilinear", antialias=True)
    scores = F.interpolate(network(view), fit, mode="bilinear") if whole else slid(view, 16, 10)
    wanted = F.interpolate(scores, size, mode="bilinear")[0]
    found = look(whole=whole)(network, image, size)
    best, second = wanted.topk(2, 0).values
    clear = best - second > 1e-3  # of equal scores either may win
    assert clear.float().mean() > 0.9
    assert torch.equal(found[clear], wanted.argmax(0)[clear])


def test_several_views_average_probabilities() -> None:
    size = (40, 44)
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(5))
    total = torch.zeros(CLASSES, *size)
    for scale in (1.0, 1.5):
        fit = [int(24 * scale), int(24 * scale * 44 / 40 + 0.5)]
        view = F.interpolate(image[None], fit, mode="bilinear", antialias=True)
        for turned in (False, True):
            scores = slid(view.flip(3) if turned else view, 16, 10)
            scores = scores.flip(3) if turned else scores
            total += F.interpolate(scores, size, mode="bilinear")[0].softmax(0)
    found = look(scales=(1.0, 1.5), mirror=True)(network, image, size)
    best, second = total.topk(2, 0).values
    clear = best - second > 1e-3
    assert clear.float().mean() > 0.9
    assert torch.equal(found[clear], total.argmax(0)[clear])


def test_shares_are_averaged_as_they_are() -> None:
    """Mask2Former's are no scores of a softmax."""
    views = [torch.rand(CLASSES, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    wanted = sum(F.interpolate(view[None], (20, 21), mode="bilinear")[0] for view in views)
    assert torch.equal(likeliest(views, (20, 21), logits=False), wanted.argmax(0))
    assert not torch.equal(likeliest(views, (20, 21)), wanted.argmax(0))


def test_an_image_smaller_than_a_crop_is_padded() -> None:
    """With the mean colour; its classes are those of its own part."""
    image = torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(6))
    found = look(bounds=(40, 10))(network, image, (10, 40))
    padded = F.pad(image, (0, 0, 0, 6))
    scores = slid(padded[None], 16, 10)[0, :, :10]
    assert torch.equal(found, scores.argmax(0))


def test_classes_some_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [torch.randn(CLASSES, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    scores[0][4] = scores[0][2]  # of equal ones the first wins
    alone, several = likeliest(scores[:1], (20, 21)), likeliest(scores, (20, 21))
    monkeypatch.setattr(inference, "MOST_AT_ONCE", 2 * 20 * 21)
    assert torch.equal(likeliest(scores[:1], (20, 21)), alone)
    assert torch.equal(likeliest(scores, (20, 21)), several)
    assert not (alone == 4).any()


def test_ranks_call_the_network_equally_often() -> None:
    calls: list[Tensor] = []

    def noted(images: Tensor) -> Tensor:
        calls.append(images)
        return network(images)

    image = torch.randn(3, 30, 50, generator=torch.Generator().manual_seed(7))
    told: list[int] = []
    found = look(rounds=lambda mine: told.append(mine) or mine + 3)(noted, image, (30, 50))
    assert len(calls) == told[0] + 3
    assert torch.equal(found, look()(network, image, (30, 50)))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (700, 2)])
@pytest.mark.parametrize("whole", [False, True])
def test_the_smallest_and_thinnest_images_have_classes(size: tuple[int, int], whole: bool) -> None:
    """And an image's mirror has the mirrored classes, though both are padded on the same side."""
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(8))
    for more in ({}, {"mirror": True, "scales": (0.5, 1.0)}):
        assert look(whole=whole, **more)(network, image, size).shape == size
    turned = torch.randn(3, 10, 40, generator=torch.Generator().manual_seed(9))
    both = look(bounds=(40, 10), mirror=True, whole=whole)
    assert torch.equal(both(network, turned.flip(2), (10, 40)).flip(1), both(network, turned, (10, 40)))
