"""The classes of all pixels of an image of any size, by a network that sees crops, or the image at once.

Letters: K classes, H W an image's own size, h w its size as the network sees it, S side of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.data.dense import fitted
from fdscale.data.dense import resized as resized_image
from fdscale.tasks.upernet import resized

MOST_AT_ONCE = 2**26  # scores of a whole image that are in memory at a time, by classes

Network = Callable[[Tensor], Tensor]  # images (B, 3, h, w) normalised -> scores (B, K, any, any)


@dataclass(frozen=True)
class Inference:
    """How an image is looked at; meaning of the fields: `keys.Segment`.

    crop: S. batch: crops at a time. rounds: of the calls of the network for an image, what all ranks make at least (a
    collective); without it they may differ, which ZeRO 3 does not bear. logits: scores become probabilities by a
    softmax, else they are such.
    """

    crop: int
    stride: int
    whole: bool
    bounds: tuple[int, int]
    scales: tuple[float, ...]
    mirror: bool
    interpolation: str
    batch: int
    rounds: Callable[[int], int] | None = None
    logits: bool = True

    def __call__(self, network: Network, image: Tensor, size: Sequence[int]) -> Tensor:
        """The classes (H, W) int64 of an image (3, H, W), float32 and normalised; size: (H, W)."""
        views = [self._view(image, scale) for scale in self.scales]
        views = [turned for view in views for turned in ((view, view.flip(2)) if self.mirror else (view,))]
        if self.rounds is not None:
            mine = sum(self._calls(view) for view in views)
            for _ in range(self.rounds(mine) - mine):
                network(image.new_zeros(1, 3, self.crop, self.crop))
        scores = [self._scores(network, view) for view in views]
        if self.mirror:
            scores = [one.flip(2) if place % 2 else one for place, one in enumerate(scores)]
        return likeliest(scores, size, self.logits)

    def _view(self, image: Tensor, scale: float) -> Tensor:
        size = fitted((image.shape[1], image.shape[2]), self.bounds, scale)
        return resized_image(image, size, self.interpolation)

    def _places(self, view: Tensor) -> list[tuple[int, int]]:
        height, width = (max(length, self.crop) for length in view.shape[1:])
        return windows((height, width), self.crop, self.stride)

    def _calls(self, view: Tensor) -> int:
        return 1 if self.whole else math.ceil(len(self._places(view)) / self.batch)

    def _scores(self, network: Network, view: Tensor) -> Tensor:
        """(K, h, w) of a view (3, h, w): the mean over the crops that see a pixel."""
        if self.whole:
            return resized(network(view[None]).float(), view.shape[1:])[0]
        height, width = view.shape[1:]
        side = self.crop
        view = F.pad(view, (0, max(0, side - width), 0, max(0, side - height)))  # with the mean colour
        places = self._places(view)
        total, times = view.new_zeros(0), view.new_zeros(view.shape[1:])
        for first in range(0, len(places), self.batch):
            some = places[first : first + self.batch]
            crops = torch.stack([view[:, top : top + side, left : left + side] for top, left in some])
            scores = resized(network(crops).float(), (side, side))
            if first == 0:
                total = scores.new_zeros(scores.shape[1], *view.shape[1:])
            for (top, left), one in zip(some, scores, strict=True):
                total[:, top : top + side, left : left + side] += one
                times[top : top + side, left : left + side] += 1
        return (total / times)[:, :height, :width]


def windows(size: tuple[int, int], crop: int, stride: int) -> list[tuple[int, int]]:
    """Top and left of the crops that cover an image of (height, width) >= crop, mmsegmentation's slide_inference."""

    def starts(length: int) -> list[int]:
        return [min(i * stride, length - crop) for i in range(max(length - crop + stride - 1, 0) // stride + 1)]

    return [(top, left) for top in starts(size[0]) for left in starts(size[1])]


def likeliest(scores: Sequence[Tensor], size: Sequence[int], logits: bool = True) -> Tensor:
    """The classes (H, W) int64 that several views (K, h, w) of an image agree on: by their mean probability at its
    size, or by the scores themselves of a single one. logits: see `Inference`.

    Some classes at a time, since all of them at the size of a large image do not fit. Of equal ones the first wins.
    """
    height, width = size
    at_once = max(1, MOST_AT_ONCE // (height * width))
    parts = [one.split(at_once) for one in scores]
    norms: list[Tensor] = []
    if len(scores) > 1 and logits:
        for some in parts:
            each = [resized(part[None], size)[0].logsumexp(0) for part in some]
            norms.append(torch.stack(each).logsumexp(0))
    best = scores[0].new_full((height, width), -math.inf)
    classes, first = torch.zeros_like(best, dtype=torch.int64), 0
    for group in zip(*parts, strict=True):
        wide = [resized(part[None], size)[0] for part in group]
        if norms:
            wide = [(one - norm).exp() for one, norm in zip(wide, norms, strict=True)]
        if len(wide) > 1:
            wide = [torch.stack(wide).sum(0)]
        value, which = wide[0].max(0)
        better = value > best
        best, classes = torch.where(better, value, best), torch.where(better, which + first, classes)
        first += len(group[0])
    return classes
