"""UPerNet (arXiv 1807.10221) on the maps of a backbone, and the fully convolutional head that helps while training.

Parameters are named as in mmsegmentation (UPerHead, FCNHead; for a ViT the fpn1 .. fpn4 of BEiT's segmentation). Maps
are resized and pooled by matrix products, whose gradients are sums in a fixed order: those of torch's own are not on a
GPU, and a run that goes on would not be the run that was not stopped.

Letters: B images, C channels of a map, D channels of the head, K classes, H W pixels of a map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.models.layers import LayerNorm
from fdscale.tasks.batch_norm import norm

POOLED = (1, 2, 3, 6)  # sides of the pooled maps of the pyramid (UPerHead's pool_scales)
SCORE_STD = 0.01  # of the first weights that score classes (mmsegmentation's BaseDecodeHead)

Level = tuple[int, int]  # channels and stride, in pixels, of a map


@functools.lru_cache(maxsize=64)
def _matrix(before: int, after: int, pools: bool, device: torch.device) -> Tensor:
    """(after, before) float32: what resizing, or average pooling, does to a line."""
    with torch.inference_mode(False):
        lines = torch.eye(before, device=device)[None]
        found = F.adaptive_avg_pool1d(lines, after) if pools else F.interpolate(lines, size=after, mode="linear")
        return found[0].t().contiguous()


def _along_both(x: Tensor, size: Sequence[int], pools: bool) -> Tensor:
    height, width = (
        _matrix(x.shape[axis], to, pools, x.device).to(x.dtype) for axis, to in zip((2, 3), size, strict=True)
    )
    return height @ (x @ width.t())


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear, corners not aligned: F.interpolate(x, size, mode="bilinear")."""
    return x if tuple(x.shape[2:]) == tuple(size) else _along_both(x, size, False)


def pooled(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side): F.adaptive_avg_pool2d(x, side)."""
    return _along_both(x, (side, side), True)


class Pool(nn.Module):
    """`pooled`, as a part of a sequence."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return pooled(x, self.side)


class ConvNorm(nn.Module):
    """Convolution without bias, norm, ReLU. (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, before: int, after: int, kernel: int, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        self.bn = norm(kind, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class UPerNet(nn.Module):
    """Pyramid pooling on the last map, a feature pyramid over all, and scores on the first map's grid.

    levels: of the maps, the finest first. kind: of norm.
    """

    def __init__(self, levels: Sequence[Level], channels: int, classes: int, kind: str) -> None:
        super().__init__()
        widths = [width for width, _ in levels]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(Pool(side), ConvNorm(widths[-1], channels, 1, kind)) for side in POOLED
        )
        self.bottleneck = ConvNorm(widths[-1] + len(POOLED) * channels, channels, 3, kind)
        self.lateral_convs = nn.ModuleList(ConvNorm(width, channels, 1, kind) for width in widths[:-1])
        self.fpn_convs = nn.ModuleList(ConvNorm(channels, channels, 3, kind) for _ in widths[:-1])
        self.fpn_bottleneck = ConvNorm(len(widths) * channels, channels, 3, kind)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Maps (B, C_i, H_i, W_i) -> scores (B, K, H_0, W_0). keep (B, D): factors of the channels that are scored."""
        last = maps[-1]
        pyramid = [last, *(resized(part(last), last.shape[2:]) for part in self.psp_modules)]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        laterals.append(self.bottleneck(torch.cat(pyramid, 1)))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + resized(laterals[i], laterals[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
        outputs = [resized(x, outputs[0].shape[2:]) for x in outputs]
        return self.conv_seg(dropped(self.fpn_bottleneck(torch.cat(outputs, 1)), keep))

    def flops(self, grids: Sequence[tuple[int, int]]) -> int:
        """Multiply-adds (MACs) of the convolutions on maps of these (height, width); resizing is not counted."""
        cells = [math.prod(grid) for grid in grids]
        pools = cast("list[nn.Sequential]", self.psp_modules)
        total = sum(_macs(part[1], side**2) for part, side in zip(pools, POOLED, strict=True))
        total += _macs(self.bottleneck, cells[-1]) + _macs(self.fpn_bottleneck, cells[0])
        for lateral, smooth, count in zip(self.lateral_convs, self.fpn_convs, cells[:-1], strict=True):
            total += _macs(lateral, count) + _macs(smooth, count)
        return total + _macs(self.conv_seg, cells[0])


class FCN(nn.Module):
    """One convolution and scores on one map (mmsegmentation's auxiliary FCNHead)."""

    def __init__(self, width: int, channels: int, classes: int, kind: str) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(width, channels, 3, kind))
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> scores (B, K, H, W). keep (B, D): see UPerNet."""
        return self.conv_seg(dropped(self.convs(x), keep))

    def flops(self, grid: tuple[int, int]) -> int:
        """Multiply-adds (MACs) on a map of (height, width)."""
        return _macs(self.convs[0], math.prod(grid)) + _macs(self.conv_seg, math.prod(grid))


class Rescale(nn.Module):
    """Four maps of one stride -> x4, x2, x1 and x1/2 of their size (BEiT's and MAE's segmentation)."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2), norm(kind, width), nn.GELU(), nn.ConvTranspose2d(width, width, 2, 2)
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(width, width, 2, 2))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps
        return [self.fpn1(first), self.fpn2(second), third, F.max_pool2d(fourth, 2)]

    def levels(self, before: Sequence[Level]) -> list[Level]:
        """Channels and strides of what comes out."""
        width, stride = before[0]
        return [(width, stride // 4), (width, stride // 2), (width, stride), (width, 2 * stride)]

    def grids(self, before: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """(height, width) of what comes out, from those of what goes in."""
        height, width = before[0]
        return [(4 * height, 4 * width), (2 * height, 2 * width), (height, width), (height // 2, width // 2)]

    def flops(self, before: Sequence[tuple[int, int]]) -> int:
        """Multiply-adds (MACs): each transposed convolution takes a pixel to four."""
        square, cells = cast(nn.ConvTranspose2d, self.fpn2[0]).in_channels ** 2, math.prod(before[0])
        return 4 * square * cells * (1 + 4 + 1)


class Norms(nn.Module):
    """A LayerNorm over the channels of each map of a pyramid but the last, which its backbone has normed (Swin's)."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(width) for width in widths[:-1])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        normed = [layer(x.permute(0, 2, 3, 1)) for layer, x in zip(self.norms, maps[:-1], strict=True)]
        return [*(x.permute(0, 3, 1, 2) for x in normed), maps[-1]]

    def levels(self, before: Sequence[Level]) -> list[Level]:
        """What goes in."""
        return list(before)

    def grids(self, before: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """What goes in."""
        return list(before)

    def flops(self, before: Sequence[tuple[int, int]]) -> int:
        """Next to nothing."""
        return 0


def dropped(x: Tensor, keep: Tensor | None) -> Tensor:
    """Whole channels of (B, D, H, W) times keep (B, D), or None for 1."""
    return x if keep is None else x * keep[:, :, None, None].to(x.dtype)


def init_parameter(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Fill one parameter of what is above in place, as mmsegmentation does; biases 0.

    Convolutions: Kaiming's normal for ReLU, by what comes out (mmcv's ConvModule); transposed ones: torch's uniform;
    scores: normal 0.01; norms: 1 and 0.
    """
    parts = name.split(".")
    if parts[-1] == "bias":
        tensor.zero_()
    elif tensor.ndim == 1:
        tensor.fill_(1.0)
    elif parts[-2] == "conv_seg":
        nn.init.normal_(tensor, std=SCORE_STD, generator=generator)
    elif "neck" in parts:
        nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
    else:
        nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu", generator=generator)


def _macs(conv: nn.Module, cells: int) -> int:
    layer = conv.conv if isinstance(conv, ConvNorm) else cast(nn.Conv2d, conv)
    return layer.in_channels * layer.out_channels * math.prod(layer.kernel_size) * cells
