"""A backbone that finds objects, with boxes and masks: pyramid, proposals and heads of torchvision's parts; inference.

Letters: B images, S side of the square they are fitted into, N objects of all images, n of one, K classes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FeaturePyramidNetwork, batched_nms, box_iou, remove_small_boxes
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fdscale.models.vit import Block
from fdscale.tasks.proposals import RATIOS, Objects, Proposals
from fdscale.tasks.regions import Regions, group_norm
from fdscale.tasks.tuned import Tuned
from fdscale.tasks.upernet import Norms, Rescale

SMALLEST = 1e-2  # side of a box that is kept, pixels (torchvision's)
SIGMA = 0.5  # of soft-NMS with a Gaussian (arXiv 1704.04503)


class Detections(NamedTuple):
    """What was found on one image, the surest first: boxes (n, 4) x0 y0 x1 y1 in pixels, scores (n,), classes (n,)
    int64, masks (n, 28, 28) probabilities within the boxes, or None."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor | None


class View(NamedTuple):
    """Images at a size: (B, 3, S, S) normalised, 0 beyond sizes (B, 2), height and width; mirrored: within these."""

    images: Tensor
    sizes: Tensor
    mirrored: bool = False


class Thinning(NamedTuple):
    """How boxes that overlap are thinned out; see `keys.Detect`."""

    suppress: str = "hard"
    overlap: float = 0.5
    least_score: float = 0.05
    most: int = 100


class Detector(Tuned):
    """Backbone, neck, feature pyramid, proposals and heads; what the arguments mean: `keys.Detect`.

    losses: each part's last loss by name, weighted and without gradient. Called with objects, it gives their sum.
    """

    def __init__(
        self,
        backbone: Any,
        classes: int,
        kind: str = "mask_rcnn",
        masks: bool = True,
        channels: int = 256,
        box_head: str = "2fc",
        norm: str = "none",
        box_loss: str = "smooth_l1",
        stuff: int = 0,
        global_block: bool = False,
        thinning: Thinning | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone)
        widths, strides = zip(*backbone.levels(), strict=True)
        self.block = None
        if global_block:
            heads = next(count for count in range(max(1, widths[-1] // 32), 0, -1) if widths[-1] % count == 0)
            self.block = Block(widths[-1], heads, 4 * widths[-1], (0, 0), False, True)
        self.neck = Rescale(widths[0], "group") if len(set(strides)) == 1 else Norms(widths)
        levels = self.neck.levels(backbone.levels())
        normed = group_norm(norm)
        self.fpn = FeaturePyramidNetwork([width for width, _ in levels], channels, LastLevelMaxPool(), normed)
        steps = [backbone.levels()[0][1] / 4 * 2**i for i in range(4)] if len(set(strides)) == 1 else list(strides)
        self.rpn = Proposals(channels, [*steps, 2 * steps[-1]], seed)
        self.regions = Regions(kind, classes, channels, steps, masks, box_head, normed, box_loss, stuff, seed)
        self.channels, self.thinning = channels, thinning or Thinning()
        self.losses: dict[str, Tensor] = {}

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        counts: Tensor | None = None,
        boxes: Tensor | None = None,
        classes: Tensor | None = None,
        masks: Tensor | None = None,
        numbers: Tensor | None = None,
        stuff: Tensor | None = None,
        others: Sequence[View] = (),
    ) -> Any:
        """images (B, 3, S, S) normalised, 0 beyond sizes (B, 2) -> list of B `Detections`; or with objects the loss.

        others: further views of the images to find objects in. What all have found is merged, in the pixels of the
        first, and each mask is the mean of those that all views see in its box (Detectron2's test-time augmentation).
        counts (B,): objects of each image, of boxes (N, 4), classes (N,) and masks (N, S, S / 8) uint8, packed bits.
        numbers (B,): of the samples, for drop path and what is sampled. stuff (B, S, S) uint8, 255 without class.
        """
        if images.is_meta:
            return self._outline(images)
        if counts is None:
            return self._found([View(images, sizes), *others])
        content = _pairs(sizes)
        maps = self._maps(images, numbers)
        assert boxes is not None
        assert classes is not None
        assert numbers is not None
        many = counts.tolist()
        parts = [boxes.split(many), classes.split(many), [None] * len(many) if masks is None else masks.split(many)]
        objects = [Objects(*one) for one in zip(*parts, strict=True)]
        marks = numbers.tolist()
        proposals, losses = self.rpn(maps, content, objects, marks)
        losses |= self.regions.losses(maps, proposals, content, objects, marks, stuff)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack(list(losses.values())).sum()

    def _maps(self, images: Tensor, numbers: Tensor | None) -> list[Tensor]:
        """Five maps of the pyramid, the finest first."""
        maps = self.backbone.maps(images, numbers)
        if self.block is not None:
            last = maps[-1]
            seen = self.block(last.flatten(2).transpose(1, 2))
            maps = [*maps[:-1], seen.transpose(1, 2).unflatten(2, last.shape[2:])]
        named = OrderedDict((str(place), x) for place, x in enumerate(self.neck(maps)))
        return list(self.fpn(named).values())

    def _outline(self, images: Tensor) -> Tensor:
        """For the plan, where images have a shape alone: a sum of what all parts make of as many boxes as can be."""
        maps = self._maps(images, None)
        scores, codes = self.rpn.head(list(maps))
        return sum((x.float().sum() for x in (*scores, *codes)), start=self.regions.outline(maps))

    def _found(self, views: Sequence[View]) -> list[Detections]:
        maps = [self._maps(view.images, None) for view in views]  # of all views, since their masks come later
        sizes = [_pairs(view.sizes) for view in views]
        seen: list[list[Detections]] = [[] for _ in sizes[0]]
        for view, its, inside in zip(views, maps, sizes, strict=True):
            for place, one in enumerate(self._boxes(its, inside)):
                boxes = moved(one.boxes, inside[place], sizes[0][place], view.mirrored)
                seen[place].append(one._replace(boxes=boxes))
        found = [joined(every, self.thinning) for every in seen]
        if not self.regions.masks:
            return found
        classes = [one.classes for one in found]
        masks = []
        for view, its, inside in zip(views, maps, sizes, strict=True):
            spots = zip(found, sizes[0], inside, strict=True)
            here = [moved(one.boxes, first, own, view.mirrored) for one, first, own in spots]
            shares = self.regions.mask(its, here, classes, inside)
            masks.append([share.flip(2) if view.mirrored else share for share in shares])
        means = (torch.stack(every).mean(0) for every in zip(*masks, strict=True))
        return [one._replace(masks=mean) for one, mean in zip(found, means, strict=True)]

    def _boxes(self, maps: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """What one view finds, without masks."""
        proposals, _ = self.rpn(maps, sizes)
        found = []
        for boxes, shares in self.regions.detect(maps, proposals, sizes):
            kinds = shares.shape[1] - 1
            flat = boxes.expand(-1, kinds, -1).reshape(-1, 4)
            scores = shares[:, 1:].reshape(-1)
            classes = torch.arange(kinds, device=flat.device).repeat(len(shares))
            kept = (scores > self.thinning.least_score).nonzero()[:, 0]
            kept = kept[remove_small_boxes(flat[kept], SMALLEST)]
            found.append(thinned(Detections(flat[kept], scores[kept], classes[kept], None), self.thinning))
        return found

    def head_flops(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds (MACs) of training on one (height, width) image behind the backbone."""
        before = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for _, stride in self.backbone.levels()]
        cells = [math.prod(grid) for grid in self.neck.grids(before)]
        total = self.neck.flops(before)
        for width, count in zip((width for width, _ in self.neck.levels(self.backbone.levels())), cells, strict=True):
            total += self.channels * (width + 9 * self.channels) * count
        shapes = len(RATIOS)
        each = 9 * self.channels**2 + 5 * shapes * self.channels
        total += each * (sum(cells) + math.ceil(cells[-1] / 4))
        if self.block is not None:
            width, count = self.backbone.levels()[-1][0], math.prod(before[-1])
            total += count * (12 * width**2 + 2 * count * width)
        return total + self.regions.flops(image_size)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter in place, by the rules of the backbone or Detectron2's for what is behind it.

        Biases 0, norms 1; scores of classes normal 0.01, boxes and masks 0.001, of proposals 0.01; the pyramid and
        linear layers uniform by what comes in (Xavier's, of Caffe2); other convolutions Kaiming's normal by what comes
        out.
        """
        part, _, rest = name.partition(".")
        last = name.split(".")[-2]
        if part == "backbone":
            self.backbone.init_parameter(rest, tensor, generator)
        elif part == "block":
            _init_block(rest, tensor, generator)
        elif name.endswith("bias"):
            tensor.zero_()
        elif tensor.ndim == 1:
            tensor.fill_(1.0)
        elif part == "rpn" or last == "cls_score":
            nn.init.normal_(tensor, std=0.01, generator=generator)
        elif last in ("bbox_pred", "mask_fcn_logits"):
            nn.init.normal_(tensor, std=0.001, generator=generator)
        elif part in ("fpn", "neck") or tensor.ndim == 2:
            nn.init.kaiming_uniform_(tensor, a=1, generator=generator)
        else:
            nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu", generator=generator)


def thinned(found: Detections, how: Thinning) -> Detections:
    """The surest, without those that overlap a surer one of their class, or with lower scores for them."""
    if how.suppress == "hard":
        kept, scores = batched_nms(found.boxes, found.scores, found.classes, how.overlap), found.scores
    else:
        kept, scores = soft_nms(
            found.boxes, found.scores, found.classes, how.suppress, how.overlap, how.least_score, how.most
        )
    kept = kept[: how.most]
    return Detections(found.boxes[kept], scores[kept], found.classes[kept], None)


def joined(views: Sequence[Detections], how: Thinning) -> Detections:
    """What several views of an image have found, in the same pixels, without masks."""
    if len(views) == 1:
        return views[0]
    boxes, scores, classes = (torch.cat(part) for part in list(zip(*(view[:3] for view in views), strict=True)))
    return thinned(Detections(boxes, scores, classes, None), how)


def moved(boxes: Tensor, before: Sequence[float], after: Sequence[float], mirrored: bool = False) -> Tensor:
    """Boxes (n, 4) on an image of (height, width) before, where it has (height, width) after, and is mirrored."""
    factors = [after[1] / before[1], after[0] / before[0]] * 2
    left, top, right, bottom = (boxes * boxes.new_tensor(factors)).unbind(1)
    return torch.stack((after[1] - right, top, after[1] - left, bottom) if mirrored else (left, top, right, bottom), 1)


def soft_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, kind: str, overlap: float, least: float, most: int
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (arXiv 1704.04503), class by class: which of the boxes (n, 4), the surest first, and all scores (n,).

    A box that overlaps a surer one of its class by IoU u keeps, where kind is linear, 1 - u of its score if u is above
    `overlap`; where it is gaussian, exp(-u^2 / 0.5). Those that fall to `least` are left out. Memory is that of n: with
    a low score to start from there may be tens of thousands of boxes.
    """
    scores, left, kept = scores.clone(), torch.ones_like(scores, dtype=torch.bool), []
    if not len(boxes):
        return scores.new_zeros(0, dtype=torch.int64), scores
    for _ in range(min(most, len(boxes))):
        best = int(torch.where(left, scores, -1.0).argmax())
        if not left[best] or scores[best] <= least:
            break
        kept.append(best)
        left[best] = False
        alike = box_iou(boxes[best : best + 1], boxes)[0] * (classes == classes[best])
        factors = (
            (-alike.square() / SIGMA).exp() if kind == "gaussian" else torch.where(alike > overlap, 1 - alike, 1.0)
        )
        scores = torch.where(left, scores * factors, scores)
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device), scores


def _pairs(sizes: Tensor) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def pasted(found: Detections, size: Sequence[int]) -> Tensor:
    """(n, H, W) bool: the masks of what was found on an image of (height, width), by torchvision's paste at 0.5."""
    assert found.masks is not None
    return paste_masks_in_image(found.masks[:, None], found.boxes, (int(size[0]), int(size[1])))[:, 0] > 0.5


def _init_block(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """A transformer's block: matrices truncated normal 0.02, biases 0, norms 1, layer scales 0.1."""
    if name.startswith("gamma"):
        tensor.fill_(0.1)
    elif name.endswith("bias"):
        tensor.zero_()
    elif tensor.ndim == 1:
        tensor.fill_(1.0)
    else:
        nn.init.trunc_normal_(tensor, std=0.02, a=-0.04, b=0.04, generator=generator)
