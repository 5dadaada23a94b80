"""timm's RandAugment as a pure function of (seed, sample number).

timm draws from Python's and numpy's global generators. They are set from Philox for each image, and put back after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fdscale import UserError
from fdscale.data.augment import RESAMPLING
from fdscale.data.order import philox


class RandAugment:
    """A policy by timm's name, such as rand-m9-mstd0.5-inc1, for views of one size.

    mean: RGB in [0, 1] of what fills up a view that was moved or turned. Raises UserError for a name that is none.
    """

    def __init__(self, policy: str, seed: int, size: int, mean: tuple[float, ...], interpolation: str) -> None:
        from timm.data.auto_augment import rand_augment_transform

        self._seed = seed
        # As timm.data.transforms_factory.transforms_imagenet_train sets them.
        fill = tuple(min(255, round(255 * channel)) for channel in mean)
        more = {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": RESAMPLING[interpolation]}
        try:
            self._transform = rand_augment_transform(policy, more)
        except (AssertionError, ValueError, TypeError):
            raise UserError(
                f"classify.randaugment: timm knows no policy {policy!r}; expected one such as rand-m9-mstd0.5-inc1"
            ) from None

    def __call__(self, view: Tensor, number: int) -> Tensor:
        """(3, S, S) uint8 -> the same, augmented."""
        image = Image.fromarray(view.permute(1, 2, 0).numpy())
        with _seeded(int(philox(self._seed, number, (0, 7, 0, 0), 1)[0])):
            image = self._transform(image)
        return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def augmented_view(
    data: bytes, number: int, view: Callable[..., Tensor], augment: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """A view of an image file's bytes, then what an augmentation makes of it."""
    return augment(view(data, number=number), number)


@contextmanager
def _seeded(word: int) -> Iterator[None]:
    """Python's and numpy's global generators started from a word of 64 bits, and as they were afterwards."""
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(word)
    np.random.seed([word & 0xFFFFFFFF, word >> 32])
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
