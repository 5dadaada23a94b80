"""The semantic branch of Hybrid Task Cascade (arXiv 1901.07518): classes of pixels, whose features boxes are told.

Letters: B images, C channels, K classes of pixels, H W pixels of an image, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from fdscale.tasks.upernet import resized


class Semantic(nn.Module):
    """The classes of pixels beside the objects, from all maps at a stride of 8 (Hybrid Task Cascade).

    After mmdetection's FusedSemanticHead: each map through a 1 x 1 convolution, summed at the second map's size, four
    convolutions; from there to what boxes are told and to the scores.
    """

    def __init__(self, channels: int, levels: int, classes: int, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(levels))
        self.convs = MaskRCNNHeads(channels, [channels] * 4, 1, norm)
        self.conv_embedding = nn.Conv2d(channels, channels, 1)
        self.conv_logits = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scores (B, classes, H / 8, W / 8) float32 and features (B, C, H / 8, W / 8)."""
        size = maps[1].shape[2:]
        laterals = [F.relu(conv(x)) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        x = self.convs(torch.stack([resized(one, size) for one in laterals]).sum(0))
        return self.conv_logits(x).float(), F.relu(self.conv_embedding(x))


def stuff_loss(scores: Tensor, stuff: Tensor, stride: float) -> Tensor:
    """Cross-entropy of scores (B, K, h, w) with the pixels of (B, H, W) at the centres of cells, one every so many
    pixels, as a mean over images of the mean over cells that have a class."""
    labels = stuff.long()
    for axis in (1, 2):
        at = ((torch.arange(scores.shape[axis + 1], device=stuff.device) + 0.5) * stride).long()
        beyond = at >= stuff.shape[axis]  # cells of padding
        labels = labels.index_select(axis, at.clamp(max=stuff.shape[axis] - 1))
        labels = labels.masked_fill(beyond.unsqueeze(-1) if axis == 1 else beyond, 255)
    known = labels != 255
    chosen = scores.gather(1, torch.where(known, labels, 0)[:, None])[:, 0]
    losses = (scores.logsumexp(1) - chosen) * known
    return (losses.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)).mean()
