"""What is learnt: the teacher's whitened feature map, under smooth-L1 (arXiv 2205.14141, section 3).

Shapes: B batch, L tokens, C student width, T teacher width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.kernels.rows import WHITEN_EPS, can_run, token_losses


def whiten(x: Tensor) -> Tensor:
    """Layer norm over channels without affine parameters, eps 1e-5, in float32: each token gets mean 0 and variance 1.

    x: (..., T). Official repository, models/feature_distillation.py. It is applied after the teacher's own final norm.
    """
    return F.layer_norm(x.float(), x.shape[-1:], eps=WHITEN_EPS)


def feature_loss(prediction: Tensor, target: Tensor, beta: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """Mean smooth-L1 over batch, tokens and channels, in float32: d^2 / (2 beta) where |d| < beta, else |d| - beta / 2.

    prediction, target: equal shapes (B, L, T); the target is already whitened. Raises ValueError where the shapes
    differ, since broadcasting would silently compare the wrong tokens. weights (B,): the weighted sum of the samples'
    losses instead, for evaluation.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have the same shape"
        )
    if weights is None:
        return F.smooth_l1_loss(prediction.float(), target.float(), beta=beta)
    losses = F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="none")
    return (losses.flatten(1).mean(1) * weights).sum()


class Distiller(nn.Module):
    """The trainable module: backbone, then a per-token linear projector to the teacher's width (the official 1x1
    Conv1d), then the loss.

    align: picks, from the student's tokens (B, L, C), those that have a partner in the target; None: all of them. The
    teacher is deliberately not in here, so that no checkpoint ever holds it.
    fused: whitening and loss in one kernel where it can run (kernels/rows.py); set from outside.
    """

    fused = False

    def __init__(
        self,
        backbone: Any,
        teacher_width: int,
        beta: float = 2.0,
        align: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Linear(backbone.width, teacher_width)
        self.beta = beta
        self.align = align

    def predict(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """The student's guess of the target, (B, L, T)."""
        tokens = self.backbone(images, numbers)
        return self.projector(tokens if self.align is None else self.align(tokens))

    def forward(
        self, images: Tensor, target: Tensor, numbers: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Loss of a batch. images: normalised (B, 3, H, W); target: the teacher's tokens (B, L, T), which are whitened
        here; numbers: sample numbers (B,) for drop path.

        weights: see `feature_loss`.
        """
        prediction = self.predict(images, numbers)
        if self.fused and can_run(prediction.device):
            losses = token_losses(prediction, target, self.beta)
            return losses.mean() if weights is None else (losses.mean(1) * weights).sum()
        return feature_loss(prediction, whiten(target), self.beta, weights)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter in place.

        The projector as the backbone's own linear layers (truncated normal 0.02, bias 0).
        """
        part, _, rest = name.partition(".")
        if part == "backbone":
            self.backbone.init_parameter(rest, tensor, generator)
        elif rest == "bias":
            tensor.zero_()
        else:
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)

    def depth_of(self, name: str) -> int:
        """Layer-decay id of a parameter; the projector belongs to the output."""
        part, _, rest = name.partition(".")
        return self.backbone.depth_of(rest) if part == "backbone" else sum(self.backbone.depths) + 1

    def no_decay(self) -> set[str]:
        """Parameters without weight decay."""
        return {f"backbone.{name}" for name in self.backbone.no_decay()} | {"projector.bias"}
