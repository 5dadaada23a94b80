"""Batch-norm whose statistics are those of all ranks, on any device.

torch.nn.SyncBatchNorm needs a GPU. Here the sums are float32 whatever the precision of the network, in two passes, so
that no large numbers cancel; the reductions have a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fdscale import dist

EPS, MOMENTUM = 1e-5, 0.1  # torch's
PIXELS = (0, 2, 3)  # what is summed over


class _Normalise(torch.autograd.Function):
    """x (B, C, H, W) -> (x - mean) / sqrt(variance + eps), and mean and variance (C,), over the pixels of all ranks.

    Scale and shift are left to the caller: what is saved here must not be a parameter, which ZeRO 3 takes away.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide, count = x.float(), x.numel() // x.shape[1] * dist.world()  # micro-batches are equal on all ranks
        mean = dist.total(wide.sum(PIXELS)) / count
        centred = wide - mean[:, None, None]
        variance = dist.total(centred.square().sum(PIXELS)) / count
        scale = (variance + EPS).rsqrt()
        normal = centred.mul_(scale[:, None, None]).to(x.dtype)
        ctx.save_for_backward(normal, scale)
        ctx.count = count
        ctx.mark_non_differentiable(mean, variance)
        return normal, mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:  # type: ignore[override]
        normal, scale = ctx.saved_tensors
        wide, normal = gradient.float(), normal.float()
        sums = dist.total(torch.stack([wide.sum(PIXELS), (wide * normal).sum(PIXELS)])) / ctx.count
        along = sums[0][:, None, None] + normal * sums[1][:, None, None]
        return ((wide - along) * scale[:, None, None]).to(gradient.dtype)


class BatchNorm(nn.Module):
    """Batch-norm of maps (B, C, H, W) with the statistics of all ranks: while training a collective, forward and back.

    Parameters and buffers are named as torch's, but for num_batches_tracked, which is not there. The running statistics
    stay in float32 whatever the module is cast to, and keep their values where a batch's are not finite.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        # On the CPU even where parameters are made on the meta device: nothing else would give them values.
        self.register_buffer("running_mean", torch.zeros(channels, device="cpu"))
        self.register_buffer("running_var", torch.ones(channels, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            normal, mean, variance = _Normalise.apply(x)
            if not x.is_meta:
                self._follow(mean, variance, x.numel() // x.shape[1] * dist.world())
        else:
            scale = (self.running_var + EPS).rsqrt()
            normal = ((x.float() - self.running_mean[:, None, None]) * scale[:, None, None]).to(x.dtype)
        return torch.addcmul(self.bias[:, None, None], normal, self.weight[:, None, None])

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics towards these, the variance as that of a sample."""
        finite = mean.isfinite().all() & variance.isfinite().all()
        for running, new in ((self.running_mean, mean), (self.running_var, variance * (count / max(count - 1, 1)))):
            running.copy_(torch.where(finite, running.lerp(new, MOMENTUM), running))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BatchNorm:
        """Move, or cast, but not the running statistics: bfloat16 loses a tenth of a small change."""
        kept = [self.running_mean, self.running_var]
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = (one.to(self.running_mean.device) for one in kept)
        return self


def norm(kind: str, channels: int) -> nn.Module:
    """batch: `BatchNorm`; group: up to 32 groups of at least 4 channels, which do not see how a batch is cut."""
    if kind == "batch":
        return BatchNorm(channels)
    return nn.GroupNorm(math.gcd(min(32, channels // 4) or 1, channels), channels)
