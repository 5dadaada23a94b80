"""Position information: SwinV2's continuous bias, BEiT's relative table, resizing of absolute embeddings.

Coordinates and indices are computed from cached functions when they are used. They are no buffers: nothing of them is
in a state dict, a model built on the meta device has them right, and casting a model to 16 bits does not touch them.

Letters: h heads, Wh Ww window, N tokens of a window or of a ViT (class token included), C channels.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.kernels.reference import displacements, no_autocast

CPB_HIDDEN = 512
CPB_SCALE = 16.0  # 16 * sigmoid(mlp) is in microsoft/Swin-Transformer models/swin_transformer_v2.py, not in the paper


@lru_cache(maxsize=64)
def log_coordinates(window: tuple[int, int], pretrained_window: int, device: torch.device) -> Tensor:
    """((2 Wh - 1) * (2 Ww - 1), 2) float32: log-spaced displacements (rows, columns) of a window.

    sign(x) * log2(1 + |x|) / log2(8) of x = 8 * displacement / (window - 1), where window is the one of pre-training if
    there was another (pretrained_window > 0), so that a larger window extends the range instead of stretching it.
    SwinV2 (arXiv 2111.09883) section 3.3 has sign(x) * log(1 + |x|) of the raw displacement; the scaling is the
    official code's.
    """
    with torch.inference_mode(False):  # see kernels.reference.windows_of

        def axis(length: int) -> Tensor:
            x = torch.arange(1 - length, length, dtype=torch.float32, device=device)
            x = x / max((pretrained_window or length) - 1, 1) * 8
            return torch.sign(x) * torch.log2(x.abs() + 1.0) / math.log2(8)

        return torch.cartesian_prod(axis(window[0]), axis(window[1]))


class WideLinear(nn.Linear):
    """A linear layer computed in float32 (float64 if its weights are) whatever dtype its weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


def continuous_bias_mlp(heads: int) -> nn.Sequential:
    """Displacement -> one number per head. Named and shaped as the official `cpb_mlp`."""
    return nn.Sequential(WideLinear(2, CPB_HIDDEN), nn.ReLU(inplace=True), WideLinear(CPB_HIDDEN, heads, bias=False))


def continuous_bias_table(
    mlp: nn.Module, window: tuple[int, int], pretrained_window: int, device: torch.device
) -> Tensor:
    """(h, 2 Wh - 1, 2 Ww - 1) float32 bias of every displacement, in (0, 16)."""
    with no_autocast(device):
        table = CPB_SCALE * torch.sigmoid(mlp(log_coordinates(window, pretrained_window, device)))  # cells h
    return table.t().reshape(-1, 2 * window[0] - 1, 2 * window[1] - 1)


@lru_cache(maxsize=8)
def relative_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(N, N) int64 with N = 1 + grid tokens: row of a BEiT relative table for query i and key j.

    The table holds the displacements, then 3 rows: class token -> token, token -> class token, class token -> itself
    (microsoft/unilm beit/modeling_finetune.py).
    """
    with torch.inference_mode(False):  # see kernels.reference.windows_of
        cells = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        index = F.pad(displacements(grid, device), (1, 0, 1, 0))
        index[0, :] = cells
        index[:, 0] = cells + 1
        index[0, 0] = cells + 2
        return index


def relative_rows(grid: tuple[int, int]) -> int:
    """Rows of a BEiT relative table."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(h, N, N) bias from a (rows, h) BEiT relative table."""
    index = relative_index(grid, table.device)
    return table.t().index_select(1, index.flatten()).view(-1, *index.shape)


def resize_absolute(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1, 1 + old tokens, C) -> (1, 1 + new tokens, C): grid part resized bicubically, class token's entry kept."""
    if old == new:
        return pos_embed
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    grid = grid.transpose(1, 2).unflatten(2, old)  # 1 C H W
    wide = torch.promote_types(grid.dtype, torch.float32)
    grid = F.interpolate(grid.to(wide), size=new, mode="bicubic", align_corners=False).to(pos_embed.dtype)
    return torch.cat((cls, grid.flatten(2).transpose(1, 2)), dim=1)
