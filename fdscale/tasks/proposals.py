"""Where objects may be: the region proposal network, torchvision's with losses and samples that do not see the batch.

Letters: B images, n objects of an image, A anchors or boxes of an image, C channels, H W a map's size. Boxes are
float32 x0 y0 x1 y1 in pixels of the images as the network gets them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.rpn import (
    AnchorGenerator,
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)

from fdscale.data.order import philox

SIDES = (32, 64, 128, 256, 512)  # of the anchors of each map, pixels
RATIOS = (0.5, 1.0, 2.0)  # height / width
SAMPLED, POSITIVE = 256, 0.5  # anchors of an image that count, and which share may be of objects
BETA = 1 / 9  # of smooth L1 (torchvision's, for codes)
TRAINING, TESTING = 2000, 1000  # boxes of an image before and after suppression


class Objects(NamedTuple):
    """On one image: boxes (n, 4), classes (n,) int64 from 0, masks (n, H, W / 8) uint8, packed bits, or None."""

    boxes: Tensor
    classes: Tensor
    masks: Tensor | None


def sampled(labels: Tensor, count: int, positive: float, key: tuple[int, int, int]) -> Tensor:
    """Which of (A,) labels are taken, ascending int64: up to `count`, of which up to a share of objects.

    labels: > 0 an object, 0 none, < 0 neither. key: (seed, sample number, use), of which the draw is a function. Where
    all fit, all are taken.
    """
    objects, rest = (labels > 0).nonzero()[:, 0], (labels == 0).nonzero()[:, 0]
    first = min(len(objects), int(count * positive))
    second = min(len(rest), count - first)
    if first < len(objects) or second < len(rest):
        seed, number, use = key
        word = int(philox(seed, number, (0, 20 + use, 0, 0), 1)[0] >> 1)
        order = torch.rand(len(labels), generator=torch.Generator().manual_seed(word)).to(labels.device)
        objects = objects[order[objects].argsort(stable=True)[:first]]
        rest = rest[order[rest].argsort(stable=True)[:second]]
    return torch.cat((objects, rest)).sort().values


class Proposals(RegionProposalNetwork):
    """Boxes that may hold something, class-agnostic. strides: of the maps, pixels, the finest first.

    seed: of what is sampled.
    """

    def __init__(self, channels: int, strides: Sequence[float], seed: int) -> None:
        with torch.device("cpu"):  # whatever makes the parameters: these are constants
            anchors = AnchorGenerator(tuple((side,) for side in SIDES), (RATIOS,) * len(SIDES))
        super().__init__(
            anchors, RPNHead(channels, len(RATIOS)), 0.7, 0.3, SAMPLED, POSITIVE,
            {"training": TRAINING, "testing": TESTING}, {"training": TRAINING, "testing": TESTING}, 0.7,
        )  # fmt: skip
        self.strides, self.seed = strides, seed

    def forward(  # type: ignore[override]
        self,
        maps: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects] | None = None,
        numbers: Sequence[int] = (),
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Boxes of each image, the likeliest first, and with objects the losses: objectness, proposal_boxes.

        maps: (B, C, H_i, W_i). sizes: height and width of what is on the images. numbers: of the samples.
        """
        scores, codes = self.head(list(maps))
        anchors = self._anchors([(x.shape[2], x.shape[3]) for x in maps], maps[0].device)
        counts = [x.shape[1] * x.shape[2] * x.shape[3] for x in scores]
        flat_scores, flat_codes = concat_box_prediction_layers(scores, codes)
        flat_scores, flat_codes = flat_scores.float().flatten(), flat_codes.float()
        count = len(maps[0])
        boxes = self.box_coder.decode(flat_codes.detach(), [anchors] * count).view(count, -1, 4)
        found, _ = self.filter_proposals(boxes, flat_scores, list(sizes), counts)
        if objects is None:
            return found, {}
        flat_scores, flat_codes = flat_scores.view(count, -1), flat_codes.view(count, -1, 4)
        return found, self._losses(flat_scores, flat_codes, anchors, sizes, objects, numbers)

    def _anchors(self, grids: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """(A, 4) of all maps, in the order of what the head says: by rows, columns, then shapes."""
        found = []
        cells = self.anchor_generator.cell_anchors
        for (height, width), stride, cell in zip(grids, self.strides, cells, strict=True):
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            corners = torch.stack((x, y, x, y), -1).view(-1, 1, 4) * stride
            found.append((corners + cell).view(-1, 4))
        return torch.cat(found).to(device, torch.float32)

    def _losses(
        self,
        scores: Tensor,
        codes: Tensor,
        anchors: Tensor,
        sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
        numbers: Sequence[int],
    ) -> dict[str, Tensor]:
        """Of each image as torchvision has them for it alone, as a mean over images.

        But for anchors whose centre is beyond what is on an image: they do not count, as in mmdetection, since most of
        a square may be empty.
        """
        targets = [{"boxes": one.boxes} for one in objects]
        labels, matched = self.assign_targets_to_anchors([anchors] * len(objects), targets)
        wanted = self.box_coder.encode(matched, [anchors] * len(objects))
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        objectness, boxes = [], []
        for score, code, label, want, size, number in zip(scores, codes, labels, wanted, sizes, numbers, strict=True):
            label = label.where((centres < centres.new_tensor([size[1], size[0]])).all(1), -1.0)
            taken = sampled(label, SAMPLED, POSITIVE, (self.seed, number, 0))
            positive = taken[label[taken] > 0]
            judged = F.binary_cross_entropy_with_logits(score[taken], label[taken], reduction="sum")
            off = F.smooth_l1_loss(code[positive], want[positive], beta=BETA, reduction="sum")
            objectness.append(judged / max(len(taken), 1))
            boxes.append(off / max(len(taken), 1))
        return {"objectness": torch.stack(objectness).mean(), "proposal_boxes": torch.stack(boxes).mean()}
