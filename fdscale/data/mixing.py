"""Mixup, CutMix and random erasing, each a pure function of (seed, sample number), with timm's mathematics.

Sample n is mixed with sample n xor 1: the two are neighbours in the order, so they come from different lanes, and they
stay in one micro-batch on any number of ranks (`stream.batches` with pairs). Lambda and box belong to a group of g
consecutive samples: g = 1 is timm's mode "elem", 2 is "pair", and the official code's "batch" is one for each batch of
a GPU. The draws are made beside the decoding; the pixels are mixed on the device.

Letters: B samples in a micro-batch, S side of an image in pixels, K classes, n sample number.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.data.order import philox

BETA_TRIES = 128  # at alpha 2, the largest, one of six succeeds: all fail once in 10^10 draws
ERASE_TRIES = 10  # of this line and the next two: timm.data.random_erasing.RandomErasing
ERASE_AREA = (0.02, 1 / 3)
ERASE_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))


class Box(NamedTuple):
    """A part of an image, in pixels; empty where top and bottom are equal."""

    top: int
    bottom: int
    left: int
    right: int


class Mix(NamedTuple):
    """How a sample is mixed with its partner.

    share: of its own pixels outside the box, where the rest is the partner's; inside the box all is. label: of its own
    label.
    """

    share: float
    label: float
    box: Box


@dataclasses.dataclass(frozen=True)
class Mixing:
    """The draws for a micro-batch; called by the stream in its workers (`data.stream.Complete`).

    Meaning of the fields: `keys.Classify`. size: S.
    """

    seed: int
    size: int
    mixup: float
    cutmix: float
    mix_prob: float
    switch_prob: float
    mix_group: int
    erase: float

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """shares (B,), label_shares (B,) float32, boxes (B, 4) int64, and erased: (place in the batch, box, seed)."""
        numbers = batch["numbers"].tolist()
        groups = {number // self.mix_group for number in numbers}
        drawn = {group: self.mix(group) for group in groups}
        mixes = [drawn[number // self.mix_group] for number in numbers]
        boxes = [(place, *self.erasing(number)) for place, number in enumerate(numbers)]
        return {
            "shares": torch.tensor([mix.share for mix in mixes]),
            "label_shares": torch.tensor([mix.label for mix in mixes]),
            "boxes": torch.tensor([mix.box for mix in mixes]),
            "erased": [(place, box, seed) for place, box, seed in boxes if box is not None],
        }

    def mix(self, group: int) -> Mix:
        """How the samples of a group are mixed (timm.data.mixup.Mixup)."""
        draws = _uniform(self.seed, group, 8, 4 + 2 * BETA_TRIES)
        cut = self.cutmix > 0 and (self.mixup == 0 or draws[1] < self.switch_prob)
        alpha = self.cutmix if cut else self.mixup
        if draws[0] >= self.mix_prob or alpha == 0:
            return Mix(1.0, 1.0, Box(0, 0, 0, 0))
        own = beta(alpha, draws[4:])
        if not cut:
            return Mix(own, own, Box(0, 0, 0, 0))
        box = cut_box(self.size, own, int(draws[2] * self.size), int(draws[3] * self.size))
        area = (box.bottom - box.top) * (box.right - box.left)
        return Mix(1.0, 1.0 - area / self.size**2, box)

    def erasing(self, number: int) -> tuple[Box | None, int]:
        """The part of a sample that is erased, or None, and the seed of the noise there."""
        draws = _uniform(self.seed, number, 9, 4 + 2 * ERASE_TRIES)
        if draws[0] >= self.erase:
            return None, 0
        low, high = ERASE_LOG_RATIO
        for area, ratio in zip(draws[4::2], draws[5::2], strict=True):
            pixels = (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area) * self.size**2
            aspect = math.exp(low + (high - low) * ratio)
            height, width = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if height < self.size and width < self.size:
                top = int(draws[1] * (self.size - height + 1))
                left = int(draws[2] * (self.size - width + 1))
                return Box(top, top + height, left, left + width), int(draws[3] * 2**53)
        return None, 0


def beta(alpha: float, draws: list[float]) -> float:
    """A number of the distribution Beta(alpha, alpha) from uniform ones, by Jöhnk's method.

    It needs no more than powers, so it gives the same everywhere, which numpy does not promise of its generators.
    """
    for u, v in zip(draws[::2], draws[1::2], strict=True):
        x, y = u ** (1 / alpha), v ** (1 / alpha)
        if 0 < x + y <= 1:
            return x / (x + y)
    return 0.5


def cut_box(size: int, own: float, row: int, column: int) -> Box:
    """CutMix's square around a centre, of the share 1 - own of the image before it is cut at the edges."""
    side = int(size * math.sqrt(1 - own))

    def span(centre: int) -> tuple[int, int]:
        return max(centre - side // 2, 0), min(centre + (side + 1) // 2, size)

    return Box(*span(row), *span(column))


def erase(images: Tensor, erased: list[tuple[int, Box, int]]) -> None:
    """Fill boxes of normalised images (B, 3, S, S) with normal noise, in place (timm's mode "pixel")."""
    generator = torch.Generator(images.device)
    for place, (top, bottom, left, right), seed in erased:
        part = images[place, :, top:bottom, left:right]
        part.copy_(torch.randn(part.shape, generator=generator.manual_seed(seed), device=images.device))


def mixed_images(images: Tensor, shares: Tensor, boxes: Tensor) -> Tensor:
    """Images (B, 3, S, S) float32, each mixed with its neighbour in the batch, by shares (B,) and boxes (B, 4)."""
    top, bottom, left, right = (edge[:, None] for edge in boxes.unbind(1))
    place = torch.arange(images.shape[-1], device=images.device)
    rows, columns = (place >= top) & (place < bottom), (place >= left) & (place < right)  # (B, S) each
    inside = rows[:, :, None] & columns[:, None, :]
    own = torch.where(inside, 0.0, shares[:, None, None])[:, None]  # (B, 1, S, S)
    return images * own + _partners(images) * (1 - own)


def mixed_targets(labels: Tensor, classes: int, smoothing: float, label_shares: Tensor) -> Tensor:
    """Labels (B,) -> (B, K) float32: smoothed, each mixed with its neighbour's by label_shares (B,)."""
    targets = F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes
    own = label_shares[:, None]
    return targets * own + _partners(targets) * (1 - own)


def _partners(values: Tensor) -> Tensor:
    """Each value's neighbour: 1, 0, 3, 2, ..."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _uniform(seed: int, word: int, use: int, count: int) -> list[float]:
    """Draws in [0, 1), see `order` for the uses."""
    return [(draw >> 11) * 2.0**-53 for draw in philox(seed, word, (0, use, 0, 0), count).tolist()]
