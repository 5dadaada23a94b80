"""A backbone that names the class of every pixel: network, loss, and scores that count every pixel once.

Letters: B images, K classes, H W pixels of an image or a mask, D channels of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale import dist
from fdscale.data.dense import IGNORED
from fdscale.models.layers import keep_masks
from fdscale.tasks.tuned import Tuned
from fdscale.tasks.upernet import FCN, Norms, Rescale, UPerNet, init_parameter, resized


class Segmenter(Tuned):
    """Backbone, maps of falling size (`neck`), UPerNet, and beside it an auxiliary head on the last map but one.

    channels, auxiliary_channels: D of the heads. auxiliary: weight of that head's loss; 0 leaves the head out. dropout:
    probability with which a channel is left out before it is scored. norm: batch or group. seed: of what dropout draws.
    losses: each head's last loss by name, without its weight and without gradient. Called with masks, it gives the sum
    of the weighted losses.
    """

    def __init__(
        self,
        backbone: Any,
        classes: int,
        channels: int = 512,
        auxiliary_channels: int = 256,
        auxiliary: float = 0.4,
        dropout: float = 0.1,
        norm: str = "batch",
        seed: int = 0,
    ) -> None:
        super().__init__(backbone)
        widths, strides = zip(*backbone.levels(), strict=True)
        self.neck = Rescale(widths[0], norm) if len(set(strides)) == 1 else Norms(widths)
        levels = self.neck.levels(backbone.levels())
        self.decode_head = UPerNet(levels, channels, classes, norm)
        self.auxiliary_head = FCN(levels[-2][0], auxiliary_channels, classes, norm) if auxiliary else None
        self.auxiliary, self.dropout, self.seed = auxiliary, dropout, seed
        self.channels = (channels, auxiliary_channels)
        self.losses: dict[str, Tensor] = {}

    def forward(self, images: Tensor, masks: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) normalised -> scores (B, K, H/4, W/4), or with masks (B, H, W) uint8 the loss.

        numbers (B,): of the samples, for drop path and dropout.
        """
        maps = self.neck(self.backbone.maps(images, numbers))
        scores = self.decode_head(maps, self._keep(0, numbers))
        if masks is None:
            return scores
        loss = pixel_loss(scores, masks)
        self.losses = {"decode": loss.detach()}
        if self.auxiliary_head is None:
            return loss
        beside = pixel_loss(self.auxiliary_head(maps[-2], self._keep(1, numbers)), masks)
        self.losses["auxiliary"] = beside.detach()
        return loss + self.auxiliary * beside

    def _keep(self, head: int, numbers: Tensor | None) -> Tensor | None:
        """(B, D) factors of a head's channels, a function of (seed, number); None where none is left out."""
        if not self.training or self.dropout == 0 or numbers is None:
            return None
        rates = torch.full((self.channels[head],), self.dropout, device=numbers.device)
        return keep_masks(rates, (self.seed + 1 + head) % 2**63, numbers).t()  # drop path takes the seed itself

    def head_flops(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds (MACs) of one forward of one (height, width) image behind the backbone."""
        before = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for _, stride in self.backbone.levels()]
        grids = self.neck.grids(before)
        total = self.neck.flops(before) + self.decode_head.flops(grids)
        return total + (self.auxiliary_head.flops(grids[-2]) if self.auxiliary_head is not None else 0)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter in place, by the rules of the backbone or of `tasks.upernet`."""
        part, _, rest = name.partition(".")
        if part == "backbone":
            self.backbone.init_parameter(rest, tensor, generator)
        else:
            init_parameter(name, tensor, generator)


def pixel_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy of scores (B, K, h, w), resized to masks (B, H, W) uint8, in float32, as a mean over all pixels.

    Those that are ignored count as 0, in the mean too, which is mmsegmentation's default: so the loss does not depend
    on how a batch is cut.
    """
    wide = resized(scores.float(), masks.shape[1:])
    counted = masks != IGNORED
    labels = torch.where(counted, masks, 0).long()
    # Not F.cross_entropy, whose sum over pixels has no fixed order on a GPU.
    losses = wide.logsumexp(1) - wide.gather(1, labels[:, None])[:, 0]
    return losses.where(counted, 0).mean()


class Scores(NamedTuple):
    """An evaluation: shares in [0, 1], and (K,) of each class, NaN where there is no such pixel.

    miou: mean over classes of intersection / union of their pixels. macc: mean over classes of the share of their
    pixels that are told right. aacc: share of all pixels. confusion: (K, K) int64, label and prediction.
    """

    miou: float
    macc: float
    aacc: float
    iou: Tensor
    accuracy: Tensor
    confusion: Tensor
    images: int


class Confusion:
    """Counts pixels by label and prediction, each image once over all ranks.

    classes: K. images: of the whole set.
    """

    def __init__(self, classes: int, images: int) -> None:
        self._classes = classes
        self._pixels = torch.zeros(classes, classes, dtype=torch.int64)
        self._times = torch.zeros(images, dtype=torch.int64)

    def add(self, number: int, predicted: Tensor, mask: Tensor) -> None:
        """Count an image: classes (H, W) int64, and its mask (H, W) uint8."""
        kept = mask != IGNORED
        pairs = mask[kept].long() * self._classes + predicted[kept]
        self._pixels += pairs.bincount(minlength=self._classes**2).view(self._classes, -1).cpu()
        self._times[number] += 1

    def result(self) -> Scores | None:
        """The scores over all ranks, None where no pixel has a label; a collective."""
        pixels, times = dist.total(self._pixels.clone()), dist.total(self._times.clone())
        assert times.max() <= 1, "an image was counted twice"
        return scores_of(pixels, int(times.sum())) if pixels.sum() else None


def scores_of(confusion: Tensor, images: int) -> Scores:
    """mmsegmentation's mIoU, mAcc and aAcc of (K, K) pixels: classes that are nowhere are left out of a mean."""
    right, labels, predictions = confusion.diagonal().double(), confusion.sum(1).double(), confusion.sum(0).double()
    iou, accuracy = right / (labels + predictions - right), right / labels
    overall = float(right.sum() / labels.sum())
    return Scores(float(iou.nanmean()), float(accuracy.nanmean()), overall, iou, accuracy, confusion, images)
