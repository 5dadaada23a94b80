"""timm's RandAugment from fixed seeds: the same pixels as timm's own call, whatever happened before."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from fdscale import UserError
from fdscale.data.augment import train_view
from fdscale.data.order import philox
from fdscale.data.randaugment import RandAugment, augmented_view

POLICY, MEAN = "rand-m9-mstd0.5-inc1", (0.485, 0.456, 0.406)


def test_pixels_are_timms_for_the_numbers_seed(photos: list[bytes]) -> None:
    ours = RandAugment(POLICY, 5, 48, MEAN, "bicubic")
    fill = (124, 116, 104)  # round(255 * mean)
    theirs = rand_augment_transform(
        POLICY, {"translate_const": 21, "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    )
    changed = 0
    for number, data in enumerate(photos):
        view = train_view(data, seed=5, number=number, size=48)
        word = int(philox(5, number, (0, 7, 0, 0), 1)[0])
        random.seed(word)
        np.random.seed([word & 0xFFFFFFFF, word >> 32])
        expected = np.asarray(theirs(Image.fromarray(view.permute(1, 2, 0).numpy())))
        found = ours(view, number)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)
        assert found.dtype == torch.uint8
        changed += not torch.equal(found, view)
    assert changed > len(photos) / 2


def test_numbers_decide_and_global_generators_stay(photos: list[bytes]) -> None:
    view = partial(train_view, seed=5, size=32)
    augment = RandAugment(POLICY, 5, 32, MEAN, "bilinear")
    one = [augmented_view(photos[0], n, view, augment) for n in range(8)]
    random.seed(1)
    np.random.seed(1)
    before, numpy_before = random.getstate(), np.random.get_state()[1].copy()
    other = [augmented_view(photos[0], n, view, augment) for n in reversed(range(8))]
    assert all(torch.equal(a, b) for a, b in zip(one, reversed(other), strict=True))
    assert random.getstate() == before
    assert (np.random.get_state()[1] == numpy_before).all()


@pytest.mark.parametrize("policy", ["augmix-m3", "rand-q9"])
def test_an_unknown_policy_is_named(policy: str) -> None:
    with pytest.raises(UserError, match=f"no policy '{policy}'"):
        RandAugment(policy, 0, 32, MEAN, "bilinear")
