"""Mixup, CutMix and erasing against timm's own code given the same draws, their laws, and that numbers decide alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup, rand_bbox

from fdscale.data.mixing import Box, Mixing, beta, cut_box, erase, mixed_images, mixed_targets
from fdscale.data.order import philox

SIZE, CLASSES = 24, 7


class Given(Mixup):
    """timm's Mixup with its two draws given."""

    given: tuple[float, bool]

    def _params_per_batch(self) -> tuple[float, bool]:
        return self.given


def mixing(**changes: float) -> Mixing:
    defaults = {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "switch_prob": 0.5, "mix_group": 1, "erase": 0.25}
    return Mixing(seed=3, size=SIZE, **{**defaults, **changes})


@pytest.mark.parametrize(("share", "cut"), [(0.3, False), (0.92, False), (0.0, True), (0.45, True), (0.8, True)])
def test_pixels_and_targets_are_timms(share: float, cut: bool) -> None:
    """A batch of two, which timm mixes with its reverse: each with its neighbour."""
    rng = np.random.default_rng(0)
    for turn in range(20):
        images = torch.from_numpy(rng.normal(size=(2, 3, SIZE, SIZE)).astype(np.float32))
        labels = torch.from_numpy(rng.integers(0, CLASSES, 2))
        theirs = Given(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
        theirs.given = (share, cut)
        np.random.seed(turn)
        expected, expected_targets = theirs(images.clone(), labels)
        np.random.seed(turn)
        row, column = np.random.randint(0, SIZE), np.random.randint(0, SIZE)  # as rand_bbox draws them
        box = cut_box(SIZE, share, row, column) if cut else Box(0, 0, 0, 0)
        label = 1 - (box.bottom - box.top) * (box.right - box.left) / SIZE**2 if cut else share
        shares = torch.full((2,), 1.0 if cut else share)
        found = mixed_images(images, shares, torch.tensor([box, box]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        targets = mixed_targets(labels, CLASSES, 0.1, torch.full((2,), label))
        torch.testing.assert_close(targets, expected_targets, rtol=0, atol=1e-6)


def test_boxes_are_timms() -> None:
    for turn in range(500):
        share = turn / 500
        np.random.seed(turn)
        top, bottom, left, right = rand_bbox((3, SIZE, SIZE), share)
        np.random.seed(turn)
        row, column = np.random.randint(0, SIZE), np.random.randint(0, SIZE)
        assert cut_box(SIZE, share, row, column) == (top, bottom, left, right)


@pytest.mark.parametrize(
    ("alpha", "law"),
    [
        (0.5, lambda x: 2 / math.pi * math.asin(math.sqrt(x))),
        (1.0, lambda x: x),
        (2.0, lambda x: 3 * x**2 - 2 * x**3),
    ],
)
def test_lambda_has_the_beta_law(alpha: float, law) -> None:
    """Kolmogorov's distance to the closed forms; 1.63 / sqrt(n) is passed by one in a hundred sets of draws."""
    draws = sorted(mixing(mixup=alpha, cutmix=0.0).mix(group).label for group in range(4000))
    distance = max(abs(law(x) - (i + 0.5) / len(draws)) for i, x in enumerate(draws))
    assert distance < 1.63 / math.sqrt(len(draws))


def test_beta_without_a_fitting_draw_is_the_mean() -> None:
    assert beta(1.0, [0.9, 0.9]) == 0.5


def test_groups_share_what_is_drawn_and_batches_do_not_matter() -> None:
    draw = mixing(mix_group=4)
    numbers = torch.arange(40, 72)
    whole = draw({"numbers": numbers})
    for group in whole["label_shares"].view(-1, 4):
        assert (group == group[0]).all()
    assert len(set(whole["label_shares"].tolist())) == 8
    for parts in (numbers.split(2), numbers.split(8), numbers.view(-1, 2)[1::2].reshape(1, -1)):
        for part in parts:
            found = draw({"numbers": part})
            for name in ("shares", "label_shares", "boxes"):
                assert torch.equal(found[name], whole[name][part - 40])
            expected = [(int(n), *rest) for n in part for place, *rest in whole["erased"] if place == n - 40]
            assert [(int(part[place]), *rest) for place, *rest in found["erased"]] == expected


def test_how_often_what_happens() -> None:
    draw = mixing(mix_prob=0.8, switch_prob=0.3)
    mixes = [draw.mix(group) for group in range(5000)]
    cut = [mix for mix in mixes if mix.box.bottom > mix.box.top]
    none = [mix for mix in mixes if mix.label == 1.0 and mix.share == 1.0]
    assert len(none) / 5000 == pytest.approx(0.2, abs=0.02)
    assert len(cut) / 5000 == pytest.approx(0.8 * 0.3, abs=0.02)
    assert all(mix.label == 1.0 for mix in map(mixing(mixup=0.0, cutmix=0.0).mix, range(50)))
    assert all(mix.share == 1.0 for mix in map(mixing(mixup=0.0).mix, range(50)))


def test_erasing_has_timms_law() -> None:
    """A quarter of the images; areas uniform in 2 to 33 %, ratios uniform in their logarithm between 0.3 and its
    inverse."""
    draw, large = mixing(), 1000  # pixels, so that rounding does not matter
    boxes = [Mixing(**{**draw.__dict__, "size": large}).erasing(number)[0] for number in range(6000)]
    kept = [box for box in boxes if box is not None]
    assert len(kept) / 6000 == pytest.approx(0.25, abs=0.02)
    heights = np.array([box.bottom - box.top for box in kept])
    widths = np.array([box.right - box.left for box in kept])
    tops, lefts = np.array([box.top for box in kept]), np.array([box.left for box in kept])
    assert (tops >= 0).all()
    assert (lefts >= 0).all()
    assert (tops + heights <= large).all()
    assert (lefts + widths <= large).all()
    areas = heights * widths / large**2
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert areas.min() > 0.0199
    assert areas.max() < 0.334
    ratios = np.log(heights / widths)
    assert abs(ratios).max() < math.log(1 / 0.3) + 0.01
    assert ratios.mean() == pytest.approx(0, abs=0.06)
    assert (tops / (large - heights)).mean() == pytest.approx(0.5, abs=0.03)


def test_erased_pixels_are_noise_that_the_number_decides() -> None:
    boxes = [(0, Box(2, 20, 4, 22), 11), (2, Box(0, 24, 0, 24), 12)]
    images = torch.ones(3, 3, SIZE, SIZE)
    erase(images, boxes)
    inside = images[0, :, 2:20, 4:22]
    assert inside.mean().item() == pytest.approx(0, abs=0.1)
    assert inside.std().item() == pytest.approx(1, abs=0.1)
    outside = torch.ones(SIZE, SIZE, dtype=torch.bool)
    outside[2:20, 4:22] = False
    assert (images[0][:, outside] == 1).all()
    assert (images[1] == 1).all()
    again = torch.zeros(1, 3, SIZE, SIZE)
    erase(again, [(0, Box(0, 24, 0, 24), 12)])
    assert torch.equal(again[0], images[2])


def test_uses_of_philox_are_apart() -> None:
    assert not set(philox(3, 5, (0, 8, 0, 0), 8)) & set(philox(3, 5, (0, 9, 0, 0), 8))
