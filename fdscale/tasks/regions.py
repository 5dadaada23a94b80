"""What is in a box: classes, better boxes and masks, in one stage (Mask R-CNN) or three (Cascade R-CNN, arXiv
1906.09756; Hybrid Task Cascade, 1901.07518), of torchvision's parts.

Every part is called in every step on every rank, also where nothing was found, since ZeRO gathers parameters by calls.

Letters: B images, R boxes of all images, r of one, K classes, C channels. In the networks class 0 is "nothing".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, box_iou, clip_boxes_to_image, generalized_box_iou_loss, roi_align
from torchvision.ops.poolers import initLevelMapper

from fdscale.tasks.batch_norm import norm as normed
from fdscale.tasks.proposals import BETA, Objects, sampled
from fdscale.tasks.semantic import Semantic, stuff_loss

SAMPLED, POSITIVE = 512, 0.25  # boxes of an image that count, and which share may be of objects
BOX_GRID, MASK_GRID = 7, 14
HIDDEN = 1024
GIOU_WEIGHT = 10.0  # mmdetection's, where codes of boxes would have 1
NAMES = ("0", "1", "2", "3")  # of the maps that boxes look at, as MultiScaleRoIAlign wants them


class Stage(NamedTuple):
    """overlap: from which on a box is of an object. codes: factors of a box's codes. weight: of the losses."""

    overlap: float
    codes: tuple[float, float, float, float]
    weight: float


ONE = (Stage(0.5, (10.0, 10.0, 5.0, 5.0), 1.0),)
THREE = (  # Cascade R-CNN
    Stage(0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    Stage(0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    Stage(0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)


class BoxHead(nn.Module):
    """Pooled features (R, C, 7, 7) -> scores (R, K + 1) and codes of boxes, (R, K + 1, 4) or (R, 1, 4)."""

    def __init__(self, channels: int, classes: int, kind: str, norm: Callable[[int], nn.Module] | None, agnostic: bool):
        super().__init__()
        if kind == "2fc":
            self.box_head: nn.Module = TwoMLPHead(channels * BOX_GRID**2, HIDDEN)
        else:
            size = (channels, BOX_GRID, BOX_GRID)
            self.box_head = FastRCNNConvFCHead(size, [channels] * 4, [HIDDEN], norm)
        self.cls_score = nn.Linear(HIDDEN, classes + 1)
        self.bbox_pred = nn.Linear(HIDDEN, 4 if agnostic else 4 * (classes + 1))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.box_head(pooled)
        return self.cls_score(hidden).float(), self.bbox_pred(hidden).float().unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Pooled features (R, C, 14, 14) -> scores of masks (R, K, 28, 28), and what the next stage's head is told.

    follows: whether it is told by the one before (Hybrid Task Cascade's mask information flow).
    """

    def __init__(self, channels: int, classes: int, norm: Callable[[int], nn.Module] | None, follows: bool) -> None:
        super().__init__()
        self.mask_head = MaskRCNNHeads(channels, [channels] * 4, 1, norm)
        self.mask_predictor = MaskRCNNPredictor(channels, channels, classes + 1)
        self.conv_res = nn.Conv2d(channels, channels, 1) if follows else None

    def forward(self, pooled: Tensor, told: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(R, K, 28, 28) float32 and (R, C, 14, 14)."""
        if self.conv_res is not None and told is not None:
            pooled = pooled + F.relu(self.conv_res(told))
        features = self.mask_head(pooled)
        return self.mask_predictor(features).float()[:, 1:], features


class Matched(NamedTuple):
    """Boxes of one image (r, 4) with labels (r,), 0 nothing and class + 1 otherwise; of which object, (r,)."""

    boxes: Tensor
    labels: Tensor
    which: Tensor


class Regions(nn.Module):
    """The heads. kind: mask_rcnn, cascade or htc; see `keys.Detect` for the rest. strides: of the first four maps."""

    def __init__(
        self,
        kind: str,
        classes: int,
        channels: int,
        strides: Sequence[float],
        masks: bool,
        box_head: str,
        norm: Callable[[int], nn.Module] | None,
        box_loss: str,
        stuff: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.stages = ONE if kind == "mask_rcnn" else THREE
        self.classes, self.box_loss, self.seed, self.channels = classes, box_loss, seed, channels
        agnostic = kind != "mask_rcnn"
        self.boxes = nn.ModuleList(BoxHead(channels, classes, box_head, norm, agnostic) for _ in self.stages)
        self.flows = kind == "htc"
        heads = range(len(self.stages) if masks else 0)
        self.masks = nn.ModuleList(MaskHead(channels, classes, norm, self.flows and number > 0) for number in heads)
        self.semantic = Semantic(channels, 5, stuff, norm) if stuff else None
        self.strides = strides
        self._coders = [BoxCoder(stage.codes) for stage in self.stages]
        self._matchers = [Matcher(stage.overlap, stage.overlap, False) for stage in self.stages]
        self._pools = {grid: _aligner(grid, strides) for grid in (BOX_GRID, MASK_GRID)}

    def losses(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
        numbers: Sequence[int],
        stuff: Tensor | None,
    ) -> dict[str, Tensor]:
        """By name, weighted; each a mean over images of what an image alone would have.

        maps: five, (B, C, H_i, W_i). proposals: (A, 4) of each image. stuff: (B, H, W) uint8, 255 without class.
        """
        told, found = self._semantic(maps, stuff)
        boxes = [one.detach() for one in proposals]
        for number, stage in enumerate(self.stages):
            matched = self._match(number, boxes, objects, numbers, 1 + 2 * number)
            scores, codes = self.boxes[number](self._pool(BOX_GRID, maps, [one.boxes for one in matched], told))
            for name, loss in self._box_losses(number, matched, scores, codes, objects).items():
                found[f"{name}_{number}"] = stage.weight * loss
            aimed = matched
            if number < len(self.stages) - 1 or (self.masks and self.flows):
                boxes = self._refined(number, matched, codes, sizes, objects)
            if self.masks and self.flows:  # on boxes that this stage has made better: "interleaved"
                aimed = self._match(number, boxes, objects, numbers, 2 + 2 * number)
            if self.masks:
                found[f"masks_{number}"] = stage.weight * self._mask_loss(number, aimed, maps, objects, told)
        return found

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each image the boxes (r, K, 4), or (r, 1, 4) of all classes, and probabilities (r, K + 1)."""
        told, _ = self._semantic(maps, None)
        boxes = [_some(one, size) for one, size in zip(proposals, sizes, strict=True)]
        counts = [len(one) for one in boxes]
        total = torch.zeros(())
        decoded = torch.zeros(())
        for number in range(len(self.stages)):
            scores, codes = self.boxes[number](self._pool(BOX_GRID, maps, boxes, told))
            total = scores if number == 0 else total + scores
            whole = torch.cat(boxes)
            decoded = self._coders[number].decode(codes.flatten(1), [whole])
            if number < len(self.stages) - 1:
                parts = decoded[:, 0].split(counts)
                boxes = [clip_boxes_to_image(one, size) for one, size in zip(parts, sizes, strict=True)]
        shares = (total / len(self.stages)).softmax(-1)
        found = []
        for box, share, size in zip(decoded.split(counts), shares.split(counts), sizes, strict=True):
            box = clip_boxes_to_image(box, size)
            found.append((box if box.shape[1] == 1 else box[:, 1:], share))
        return found

    def mask(
        self, maps: Sequence[Tensor], boxes: Sequence[Tensor], classes: Sequence[Tensor], sizes: Sequence[Any]
    ) -> list[Tensor]:
        """Probabilities (r, 28, 28) of the masks of boxes (r, 4) with these classes (r,), of each image."""
        told, _ = self._semantic(maps, None)
        given = [_some(one, size) for one, size in zip(boxes, sizes, strict=True)]
        pooled = self._pool(MASK_GRID, maps, given, told)
        shares, passed = [], None
        for head in self.masks:
            scores, passed = head(pooled, passed)
            shares.append(scores.sigmoid())
        share = torch.stack(shares).mean(0).split([len(one) for one in given])
        return [
            one[: len(kind)][torch.arange(len(kind), device=kind.device), kind]
            for one, kind in zip(share, classes, strict=True)
        ]

    def _semantic(self, maps: Sequence[Tensor], stuff: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What boxes are told, (B, C, H / 8, W / 8), and its loss where there are targets."""
        if self.semantic is None:
            return None, {}
        scores, features = self.semantic(maps)
        if stuff is None:
            return features, {}
        return features, {"stuff": 0.2 * stuff_loss(scores, stuff, self.strides[1])}

    def _pool(self, grid: int, maps: Sequence[Tensor], boxes: Sequence[Tensor], told: Tensor | None) -> Tensor:
        """(R, C, grid, grid) in the maps' dtype; aligned in float32, which is what torchvision's op knows."""
        size = (int(maps[0].shape[2] * self.strides[0]), int(maps[0].shape[3] * self.strides[0]))
        named = {name: x.float() for name, x in zip(NAMES, maps, strict=False)}
        pooled = self._pools[grid](named, list(boxes), [size] * len(boxes))
        if told is not None:
            beside = roi_align(told.float(), list(boxes), MASK_GRID, 1 / self.strides[1], 2)
            pooled = pooled + (beside if grid == MASK_GRID else F.adaptive_avg_pool2d(beside, grid))
        return pooled.to(maps[0].dtype)

    def _match(
        self, stage: int, boxes: Sequence[Tensor], objects: Sequence[Objects], numbers: Sequence[int], use: int
    ) -> list[Matched]:
        """Some of the boxes and the objects' own, with what they are of."""
        found = []
        for box, one, number in zip(boxes, objects, numbers, strict=True):
            every = torch.cat((box, one.boxes))
            if not len(every):
                every = box.new_tensor([[0.0, 0.0, 1.0, 1.0]])  # no part may go without input
            labels = torch.zeros(len(every), dtype=torch.int64, device=every.device)
            which = torch.zeros_like(labels)
            if len(one.boxes):
                best = self._matchers[stage](box_iou(one.boxes, every))
                which = best.clamp(min=0)
                labels = torch.where(best >= 0, one.classes[which] + 1, 0)
            taken = sampled(labels, SAMPLED, POSITIVE, (self.seed, number, use))
            found.append(Matched(every[taken], labels[taken], which[taken]))
        return found

    def _box_losses(
        self, stage: int, matched: Sequence[Matched], scores: Tensor, codes: Tensor, objects: Sequence[Objects]
    ) -> dict[str, Tensor]:
        counts = [len(one.boxes) for one in matched]
        kinds, boxes = [], []
        for one, score, code, known in zip(matched, scores.split(counts), codes.split(counts), objects, strict=True):
            kinds.append(F.cross_entropy(score, one.labels))
            positive = (one.labels > 0).nonzero()[:, 0]
            own = code[positive, one.labels[positive] if code.shape[1] > 1 else 0]
            wanted, there = known.boxes[one.which[positive]], one.boxes[positive]
            coder = self._coders[stage]
            if self.box_loss == "giou":
                made = coder.decode(own, [there]).view(-1, 4)
                off = GIOU_WEIGHT * generalized_box_iou_loss(made, wanted, reduction="sum")
            else:
                aim = coder.encode_single(wanted, there)
                off = F.smooth_l1_loss(own, aim, beta=BETA, reduction="sum")
            boxes.append(off / len(one.labels))
        return {"classes": torch.stack(kinds).mean(), "boxes": torch.stack(boxes).mean()}

    def _refined(
        self,
        stage: int,
        matched: Sequence[Matched],
        codes: Tensor,
        sizes: Sequence[tuple[int, int]],
        objects: Sequence[Objects],
    ) -> list[Tensor]:
        """The boxes of a stage as it has moved them; without the objects' own, which come again."""
        counts = [len(one.boxes) for one in matched]
        found = []
        for one, code, size, known in zip(matched, codes.detach().split(counts), sizes, objects, strict=True):
            moved = self._coders[stage].decode(code.flatten(1), [one.boxes])[:, 0]
            own = (one.boxes[:, None] == known.boxes).all(-1).any(-1)
            found.append(clip_boxes_to_image(moved, size)[~own])
        return found

    def _mask_loss(
        self,
        stage: int,
        matched: Sequence[Matched],
        maps: Sequence[Tensor],
        objects: Sequence[Objects],
        told: Tensor | None,
    ) -> Tensor:
        """Binary cross-entropy of the mask of a box's class, mean over boxes of objects and pixels, of each image."""
        aimed = [Matched(*(part[one.labels > 0] for part in one)) for one in matched]
        size = (int(maps[0].shape[2] * self.strides[0]), int(maps[0].shape[3] * self.strides[0]))
        given = [_some(one.boxes, size) for one in aimed]
        pooled = self._pool(MASK_GRID, maps, given, told)
        passed = None
        if self.flows:
            for before in range(stage):
                _, passed = self.masks[before](pooled, passed)
        scores, _ = self.masks[stage](pooled, passed)
        losses = []
        for one, score, known in zip(aimed, scores.split([len(one) for one in given]), objects, strict=True):
            count = len(one.boxes)
            if not count:
                losses.append(0.0 * score.sum())
                continue
            own = score[torch.arange(count, device=score.device), one.labels - 1]
            assert known.masks is not None
            losses.append(F.binary_cross_entropy_with_logits(own, cut_out(known.masks, one, score.shape[-1])))
        return torch.stack(losses).mean()

    def outline(self, maps: Sequence[Tensor]) -> Tensor:
        """A sum of what all heads make of as many boxes as are sampled, without looking at where these are."""
        total = maps[0].new_zeros((), dtype=torch.float32)
        if self.semantic is not None:
            scores, features = self.semantic(maps)
            total = total + scores.logsumexp(1).sum() + features.float().sum()
        seen = torch.stack([x.float().mean((2, 3)).sum(0) for x in maps]).sum(0)  # C
        boxes, masks = SAMPLED * len(maps[0]), int(SAMPLED * POSITIVE) * len(maps[0])
        for head in self.boxes:
            pooled = seen[:, None, None].expand(boxes, -1, BOX_GRID, BOX_GRID).to(maps[0].dtype)
            scores, codes = head(pooled.contiguous())
            total = total + scores.log_softmax(-1).sum() + codes.sum()
        for number in range(len(self.masks)):
            pooled = seen[:, None, None].expand(masks, -1, MASK_GRID, MASK_GRID).to(maps[0].dtype).contiguous()
            passed = None
            for before in range(number if self.flows else 0):
                _, passed = self.masks[before](pooled, passed)
            total = total + self.masks[number](pooled, passed)[0].sigmoid().sum()
        return total

    def flops(self, size: tuple[int, int]) -> int:
        """Multiply-adds (MACs) of training on one image of (height, width), with as many boxes as are sampled."""
        total = SAMPLED * sum(_macs(head, BOX_GRID**2) for head in self.boxes)
        masks = int(SAMPLED * POSITIVE)
        for number, head in enumerate(self.masks):
            again = len(self.masks) - number if self.flows else 1
            total += masks * again * _macs(head, MASK_GRID**2)
        if self.semantic is not None:
            cells = [int(size[0] / stride) * int(size[1] / stride) for stride in (*self.strides, 2 * self.strides[-1])]
            for conv, count in zip(self.semantic.lateral_convs, cells, strict=True):
                total += _macs(conv, count)
            rest = (self.semantic.convs, self.semantic.conv_embedding, self.semantic.conv_logits)
            total += sum(_macs(part, cells[1]) for part in rest)
        return total


def _aligner(grid: int, strides: Sequence[float]) -> MultiScaleRoIAlign:
    """torchvision's, told of the strides: it would round what it sees to powers of two, and a ViT may have 3.5."""
    found = MultiScaleRoIAlign(list(NAMES), grid, 2)
    found.scales = [1 / stride for stride in strides]
    found.map_levels = initLevelMapper(round(math.log2(strides[0])), round(math.log2(strides[-1])))
    return found


def _some(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (r, 4), or where there are none one of the whole image, since no part may go without input."""
    return boxes if len(boxes) else boxes.new_tensor([[0.0, 0.0, size[1], size[0]]])


def cut_out(packed: Tensor, aimed: Matched, side: int) -> Tensor:
    """(r, side, side) float32: the masks of objects, (n, H, W / 8) packed bits, within boxes; object by object, since
    unpacked masks are large."""
    found = torch.empty(len(aimed.boxes), side, side, device=packed.device)
    for number in aimed.which.unique().tolist():
        mask = unpacked(packed[number]).float()[None, None]
        here = aimed.which == number
        found[here] = roi_align(mask, [aimed.boxes[here]], side, 1.0)[:, 0]
    return found


def unpacked(bits: Tensor) -> Tensor:
    """(..., W / 8) uint8 of numpy.packbits -> (..., W) bool."""
    powers = 1 << torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    return ((bits[..., None] & powers) > 0).flatten(-2)


def _macs(part: nn.Module, cells: int) -> int:
    """Multiply-adds of the layers of a part, convolutions on so many cells each; a transposed one makes four of one,
    for those beside it."""
    total = 0
    for layer in part.children():
        total += _macs(layer, cells)
        if isinstance(layer, nn.ConvTranspose2d):
            cells *= 4
    if isinstance(part, nn.ConvTranspose2d):
        total += 4 * part.in_channels * part.out_channels * cells
    elif isinstance(part, nn.Conv2d):
        total += part.weight.numel() * cells
    elif isinstance(part, nn.Linear):
        total += part.weight.numel()
    return total


def group_norm(kind: str) -> Callable[[int], nn.Module] | None:
    """What norms the convolutions: none, or group."""
    return None if kind == "none" else functools.partial(normed, kind)
