"""What is learnt: the teacher's whitened feature map, under smooth-L1 (arXiv 2205.14141, section 3).

Shapes: B batch, L tokens, C student width, T teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.kernels.rows import WHITEN_EPS, can_run, token_losses
from fdscale.phi_s import PhiS


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


class Goal(NamedTuple):
    """What one teacher asks of the student.

    width: T. align: picks, from the student's tokens (B, L, C), those that have a partner in the target; None: all of
    them. weight: of its loss in the sum. phi_s: its tokens are whitened by `PhiS` instead of each for itself.
    """

    width: int
    align: Callable[[Tensor], Tensor] | None = None
    weight: float = 1.0
    phi_s: bool = False


class Projector(nn.Linear):
    """A per-token linear projector to one teacher's width (the official 1x1 Conv1d), and the loss of what it gives."""

    def __init__(self, student_width: int, goal: Goal):
        super().__init__(student_width, goal.width)
        self.align, self.factor = goal.align, goal.weight
        self.phi_s = PhiS(goal.width) if goal.phi_s else None

    def forward(self, tokens: Tensor) -> Tensor:
        """The student's tokens (B, L, C) -> its guess of the target (B, L', T)."""
        return super().forward(tokens if self.align is None else self.align(tokens))

    def whiten(self, target: Tensor) -> Tensor:
        """The teacher's tokens as the student is to guess them, float32."""
        return whiten(target) if self.phi_s is None else self.phi_s(target)

    def loss(self, prediction: Tensor, target: Tensor, beta: float, weights: Tensor | None, fused: bool) -> Tensor:
        """`feature_loss` of a guess and the teacher's tokens, which are whitened here."""
        if fused and self.phi_s is None and can_run(prediction.device):
            losses = token_losses(prediction, target, beta)
            return losses.mean() if weights is None else (losses.mean(1) * weights).sum()
        return feature_loss(prediction, self.whiten(target), beta, weights)


class Distiller(nn.Module):
    """The trainable module: backbone, a projector for each teacher, and the sum of their losses, weighted.

    goals: of each teacher by name; of one alone, it may be called "", or be given as a width. Teachers are deliberately
    not in here, so that no checkpoint ever holds one.
    fused: whitening and loss in one kernel where it can run (kernels/rows.py); set from outside.
    losses: of several teachers, each one's last loss by name, without its weight and without gradient.
    """

    fused = False

    def __init__(self, backbone: Any, goals: int | Mapping[str, Goal], beta: float = 2.0):
        super().__init__()
        self.backbone = backbone
        goals = {"": Goal(goals)} if isinstance(goals, int) else goals
        made = {name: Projector(backbone.width, goal) for name, goal in goals.items()}
        self.projector: nn.Module = made[""] if "" in made else nn.ModuleDict(made)
        self.beta = beta
        self.losses: dict[str, Tensor] = {}

    @property
    def projectors(self) -> dict[str, Projector]:
        """By the name of the teacher."""
        one = {"": self.projector} if isinstance(self.projector, Projector) else dict(self.projector.named_children())
        return one  # type: ignore[return-value]

    def predict(self, images: Tensor, numbers: Tensor | None = None) -> list[Tensor]:
        """The student's guess of each target, (B, L, T)."""
        tokens = self.backbone(images, numbers)
        return [projector(tokens) for projector in self.projectors.values()]

    def forward(
        self,
        images: Tensor,
        target: Tensor | tuple[Tensor, ...],
        numbers: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch. images: normalised (B, 3, H, W); target: the teacher's tokens (B, L, T), which are whitened
        here, or those of each teacher in the order of `projectors`; numbers: sample numbers (B,) for drop path.

        weights: see `feature_loss`.
        """
        targets = (target,) if isinstance(target, Tensor) else target
        losses, total = {}, None
        for guess, one, (name, projector) in zip(
            self.predict(images, numbers), targets, self.projectors.items(), strict=True
        ):
            loss = projector.loss(guess, one, self.beta, weights, self.fused)
            losses[name] = loss.detach()
            total = projector.factor * loss if total is None else total + projector.factor * loss
        self.losses = losses if "" not in losses else {}
        assert total is not None
        return total

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter in place.

        The projectors as the backbone's own linear layers (truncated normal 0.02, bias 0).
        """
        part, _, rest = name.partition(".")
        if part == "backbone":
            self.backbone.init_parameter(rest, tensor, generator)
        elif name.endswith(".bias"):
            tensor.zero_()
        else:
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)

    def depth_of(self, name: str) -> int:
        """Layer-decay id of a parameter; projectors belong to the output."""
        part, _, rest = name.partition(".")
        return self.backbone.depth_of(rest) if part == "backbone" else sum(self.backbone.depths) + 1

    def no_decay(self) -> set[str]:
        """Parameters without weight decay."""
        own = (f"projector.{name}" for name, _ in self.projector.named_parameters())
        biases = {name for name in own if name.endswith(".bias")}
        return {f"backbone.{name}" for name in self.backbone.no_decay()} | biases
