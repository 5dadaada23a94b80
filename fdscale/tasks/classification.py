"""A backbone as a classifier of images: the head, its loss, and accuracy that counts every image once.

Letters: B images, L tokens, C channels, K classes, N samples of an evaluation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale import dist
from fdscale.models.layers import LayerNorm, trunc_normal
from fdscale.tasks.tuned import Tuned

NORM_EPS = 1e-6  # of a fresh norm, which only a ViT gets: BEiT's
HEAD_BOUND = 0.02  # BEiT cuts the head's normal distribution at one standard deviation, as all its weights


class Classifier(Tuned):
    """Mean over the tokens of the grid, a fresh norm where the backbone has no final one, and a linear head.

    So does the official code (models/vision_transformer.py with USE_MEAN_POOLING, and Swin's). Called with targets, it
    gives the loss: cross-entropy with soft targets, in float32. Names beside the backbone's are those of BEiT: fc_norm
    and head.
    """

    def __init__(self, backbone: Any, classes: int, head_scale: float = 1e-3) -> None:
        super().__init__(backbone)
        bare = isinstance(getattr(backbone, "norm", None), nn.Identity)  # one without any says that it is normed
        self.fc_norm = LayerNorm(backbone.width, eps=NORM_EPS) if bare else nn.Identity()
        self.head = nn.Linear(backbone.width, classes)
        self.head_scale = head_scale

    def forward(self, images: Tensor, targets: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) normalised -> scores (B, K), or with targets (B, K) the mean loss.

        numbers (B,): of the samples, for drop path.
        """
        tokens = self.backbone(images, numbers)[:, len(self.backbone.prefix) :]
        scores = self.head(self.fc_norm(tokens.mean(1)))
        return scores if targets is None else soft_cross_entropy(scores, targets)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter in place: the head as BEiT's weights times head_scale, the norm 1 and 0."""
        part, _, rest = name.partition(".")
        if part == "backbone":
            self.backbone.init_parameter(rest, tensor, generator)
        elif rest == "bias":
            tensor.zero_()
        elif part == "fc_norm":
            tensor.fill_(1.0)
        else:
            trunc_normal(tensor, generator, bound=HEAD_BOUND)
            tensor.mul_(self.head_scale)


def soft_cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum(targets * log softmax(scores)), in float32 (timm's SoftTargetCrossEntropy)."""
    return -(targets * F.log_softmax(scores.float(), dim=-1)).sum(-1).mean()


class Accuracy(NamedTuple):
    """An evaluation. samples: whose label and image could be read. per_class: (K, 2) int64, right (top-1) and all.

    confusion: (P, 3) int64, label, predicted class and how often, for those that differ; the most frequent first.
    """

    samples: int
    loss: float  # cross-entropy with the labels, without smoothing
    top1: float
    top5: float
    per_class: Tensor
    confusion: Tensor


class Tally:
    """Where each sample's label stands among a classifier's scores, sample by sample, over all ranks.

    Every sample has a row of its own, so that the result is the same, to the last bit, on any number of ranks, and none
    can count twice.
    """

    def __init__(self, samples: int, classes: int) -> None:
        self._classes = classes
        self._rows = torch.zeros(samples, 5, dtype=torch.float64, device=dist.device())  # see `add`

    def add(self, numbers: Tensor, labels: Tensor, scores: Tensor, weights: Tensor) -> None:
        """Account a micro-batch: scores (B, K), and on the CPU numbers, labels, and weights (B,) of 1 or 0.

        labels: (B,), or (B, M) where a sample may have several, -1 in place of missing ones: the one that stands first
        among the scores counts. A sample with none does not.
        """
        labels = labels[:, None] if labels.ndim == 1 else labels
        kept, device = (weights.bool() & (labels >= 0).any(1)).nonzero()[:, 0], self._rows.device
        numbers, labels, scores = numbers[kept].to(device), labels[kept].to(device), scores[kept.to(device)].float()
        stand = torch.stack([places(scores, one.clamp_min(0)) for one in labels.unbind(1)], 1)
        place, which = stand.masked_fill(labels < 0, scores.shape[1] + 1).min(1)
        label = labels.gather(1, which[:, None])[:, 0]
        losses = F.cross_entropy(scores, label, reduction="none").double()
        rows = torch.stack([torch.ones_like(label), label, place, scores.argmax(1)], 1).double()
        self._rows[numbers] += torch.cat([rows, losses[:, None]], 1)

    def result(self) -> Accuracy | None:
        """The accuracy over all ranks, None where no sample could be read; a collective."""
        rows = dist.total(self._rows.clone()).cpu()
        assert rows[:, 0].max() <= 1, "a sample was counted twice"
        _, labels, place, predicted, losses = rows[rows[:, 0] > 0].unbind(1)
        if not len(labels):
            return None
        right = place == 0
        count = [labels[mask].long().bincount(minlength=self._classes) for mask in (right, torch.ones_like(right))]
        top1, top5 = (int((place < most).sum()) / len(place) for most in (1, 5))
        pairs, often = torch.stack([labels, predicted], 1)[~right].long().unique(dim=0, return_counts=True)
        confusion = torch.cat([pairs, often[:, None]], 1)[often.argsort(descending=True, stable=True)]
        return Accuracy(len(labels), float(losses.mean()), top1, top5, torch.stack(count, 1), confusion)


def places(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the label (B,): those with a higher score, and of equal ones the earlier.

    Scores that are not finite put it last.
    """
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    before = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    return torch.where(scores.isfinite().all(1), before.sum(1), scores.shape[1])
