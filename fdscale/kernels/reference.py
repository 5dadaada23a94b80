"""Window attention in plain torch: what every faster kernel must agree with, and the path taken on a CPU.

What it computes, per window and head (SwinV2, arXiv 2111.09883 section 3; microsoft/Swin-Transformer
models/swin_transformer_v2.py):

    softmax(cos(q, k) * exp(min(logit_scale, ln 100)) + bias + mask) v

cos is the product of rows divided by max(|row|, 1e-12); bias is a (2 Wh - 1) x (2 Ww - 1) table read at the
displacement of query and key; mask is -100 between tokens that are neighbours only because the map was rolled, and -inf
for padded keys. A map is padded at the bottom and right to whole windows, then rolled by -shift, then cut: the windows
of a shifted map are those of the unshifted one, displaced by `shift`, whether or not it was padded.

Letters: B images, H W map, C channels = h heads x d, Wh Ww window, N = Wh Ww tokens of a window, w windows of a map,
n = B w windows in all, M = w h N rows of d numbers in one of the maps q, k, v.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGIT_SCALE = math.log(1.0 / 0.01)  # tau >= 0.01, SwinV2 section 3.2
MASKED = -100.0  # between regions; official value, finite
PADDED = -1  # region of padding
NORM_EPS = 1e-12


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Keeps autocast from choosing the dtypes inside (the meta device has none)."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


class Windows(NamedTuple):
    """How one map is cut into windows. Rows are runs of d numbers: one head of one token."""

    rows: Tensor  # (3, M) int32: row of the [H, W, 3, h] map that is row m of q, of k, of v in window order
    order: Tensor  # (M,) int32: row of the [H, W, h] map that is row m in window order [w, h, N]
    inverse: Tensor  # (M,) int32: order inverted
    region: Tensor | None  # (w, N) int64: tokens of equal number are true neighbours, PADDED; None where all are


@lru_cache(maxsize=32)
def windows_of(
    size: tuple[int, int],
    padding: tuple[int, int],
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
) -> Windows:
    """Indices for a map of `size` (rows, columns; padding included, of which `padding` at the bottom and right)."""
    (height, width), (wh, ww) = size, window
    # Made outside inference mode: a cached inference tensor could not be saved for a later backward.
    with torch.inference_mode(False):

        def cut(grid: Tensor) -> Tensor:  # (H, W) -> (w, N)
            grid = grid.reshape(height // wh, wh, width // ww, ww)
            return grid.transpose(1, 2).reshape(-1, wh * ww)

        tokens = torch.arange(height * width, device=device).view(height, width)
        tokens = cut(tokens.roll((-shift[0], -shift[1]), (0, 1)))[:, None]  # w 1 N
        head = torch.arange(heads, device=device).view(-1, 1)
        which = torch.arange(3, device=device).view(3, 1, 1, 1)
        rows = ((tokens * 3 + which) * heads + head).flatten(1)  # 3 M
        order = (tokens * heads + head).flatten()  # M
        region = None
        if any(shift) or any(padding):
            y, behind_y = _axis(height, padding[0], shift[0], device)
            x, behind_x = _axis(width, padding[1], shift[1], device)
            region = cut(torch.where(y[:, None] | x, PADDED, behind_y[:, None] * 2 + behind_x))
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        return Windows(rows.int(), order.int(), inverse.int(), region)


def _axis(length: int, padding: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis of the rolled map, (length,) each: places that are padding, and 1 for those behind the seam."""
    place = torch.arange(length, device=device)
    return (place + shift) % length >= length - padding, (place >= length - shift).long()


@lru_cache(maxsize=32)
def displacements(window: tuple[int, int], device: torch.device) -> Tensor:
    """(N, N) int64: cell of the flattened (2 Wh - 1, 2 Ww - 1) table for query i and key j, at (yi - yj, xi - xj)."""
    with torch.inference_mode(False):
        wh, ww = window
        y = torch.arange(wh, device=device)
        x = torch.arange(ww, device=device)
        y = (y[:, None] - y + wh - 1)[:, None, :, None]  # Wh 1 Wh 1
        x = (x[:, None] - x + ww - 1)[None, :, None, :]  # 1 Ww 1 Ww
        return (y * (2 * ww - 1) + x).reshape(wh * ww, wh * ww)


class _ToWindows(torch.autograd.Function):
    """[B, H, W, 3C] -> q, k, v, each [B, w, h, N, d] flat over rows.

    One indexed copy does roll, cut and head split. The rows are a permutation, so the gradient is the inverse indexed
    copy; autograd's own, index_add over zero-filled maps, makes the whole backward of the attention a fifth slower.
    """

    @staticmethod
    def forward(qkv: Tensor, rows: Tensor, inverse: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        flat = qkv.view(qkv.shape[0], -1, dim)  # B 3M d
        return flat.index_select(1, rows[0]), flat.index_select(1, rows[1]), flat.index_select(1, rows[2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        qkv, _, inverse, _ = inputs
        ctx.save_for_backward(inverse)
        ctx.shape = qkv.shape

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        batch, height, width, channels = ctx.shape
        grad = grads[0].new_empty(batch, height, width, 3, channels // 3)
        for i, part in enumerate(grads):
            grad[:, :, :, i] = part.index_select(1, inverse).view(batch, height, width, -1)
        return grad.view(ctx.shape), None, None, None


class _Permute(torch.autograd.Function):
    """[B, M, d] -> the same rows in the order `index`; its gradient is `inverse` applied to the gradient."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(1, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, ctx.saved_tensors[0]), None, None


class _Unit(torch.autograd.Function):
    """F.normalize(x, dim=-1, eps=1e-12), bit for bit, with a backward of half the passes of autograd's."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / norm.clamp_min(NORM_EPS), norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> Tensor:
        unit, norm = ctx.saved_tensors
        along = (grad * unit).sum(-1, keepdim=True)
        along.masked_fill_(norm < NORM_EPS, 0.0)  # these rows were divided by a constant
        return torch.addcmul(grad, unit, along, value=-1.0).div_(norm.clamp_min(NORM_EPS))


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    chunk: int = 0,
    masked: float = MASKED,
) -> Tensor:
    """Cosine attention within the windows of a map.

    qkv: (B, H, W, 3C), channels ordered q, k, v, then head, then d. Any floating dtype; logits and softmax are computed
        in float32 (float64 for float64), the attention weights are cast back for the product with v.
    bias_table: (h, 2 Wh - 1, 2 Ww - 1), added to the logits as it is: 16 * sigmoid(CPB) in SwinV2.
    logit_scale: (h,), the raw parameter; exp(min(., ln 100)) is taken here.
    shift: (rows, columns) of the cyclic shift, each less than the window.
    chunk: 0 computes all windows at once. k > 0 computes k windows at a time and, under autograd, keeps only q, k, v
        and recomputes each chunk in the backward, so that the N x N scores of one chunk alone are alive at any time.
    masked: added to the logits between regions; -inf is allowed.
    Returns (B, H, W, C), dtype of qkv.
    """
    attend = _attend if chunk == 0 else partial(_in_chunks, chunk)
    q, k, v, bias, scale, cut, size = _in_windows(qkv, bias_table, logit_scale, window, shift)
    with no_autocast(qkv.device):  # it would do the product of q and k in 16 bits
        out = attend(q, k, v, bias, scale, cut.region, masked)
    batch, height, width, _ = qkv.shape
    out = _Permute.apply(out.view(batch, -1, q.shape[-1]), cut.inverse, cut.order).view(batch, *size, -1)
    return out[:, :height, :width].contiguous() if size != (height, width) else out


def attention_weights(
    qkv: Tensor, bias_table: Tensor, logit_scale: Tensor, window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """The softmax of `window_attention`, (B, w, h, N, N): of query i, how much of each key; windows as `places_of`."""
    q, k, _, bias, scale, cut, _ = _in_windows(qkv, bias_table, logit_scale, window, shift)
    with no_autocast(qkv.device):
        return _weights(q, k, bias, scale, cut.region, MASKED).unflatten(0, (qkv.shape[0], -1))


def places_of(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(w, N, 2) int64: row and column, on a map of size (height, width), of each token of each window; -1: padding."""
    padding = (-size[0] % window[0], -size[1] % window[1])
    height, width = size[0] + padding[0], size[1] + padding[1]
    order = windows_of((height, width), padding, 1, window, shift, torch.device("cpu")).order.long()
    rows, columns = order // width, order % width
    inside = (rows < size[0]) & (columns < size[1])
    places = torch.where(inside[:, None], torch.stack((rows, columns), 1), -1)
    return places.view(-1, window[0] * window[1], 2)


def _in_windows(
    qkv: Tensor, bias_table: Tensor, logit_scale: Tensor, window: tuple[int, int], shift: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Windows, tuple[int, int]]:
    """q, k, v (n, h, N, d), bias (h, N, N), scale (h, 1, 1), how the map was cut, and its size with padding."""
    _, height, width, channels = qkv.shape
    heads = bias_table.shape[0]
    dim = channels // (3 * heads)
    padding = (-height % window[0], -width % window[1])
    if any(padding):
        qkv = F.pad(qkv, (0, 0, 0, padding[1], 0, padding[0]))
    size = (height + padding[0], width + padding[1])
    cut = windows_of(size, padding, heads, window, shift, qkv.device)
    count = window[0] * window[1]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    with no_autocast(qkv.device):
        parts = _ToWindows.apply(qkv.contiguous(), cut.rows, cut.inverse, dim)
        q, k, v = (part.view(-1, heads, count, dim) for part in parts)
        bias = bias_table.to(wide).flatten(1).index_select(1, displacements(window, qkv.device).flatten())
        scale = logit_scale.to(wide).clamp(max=MAX_LOGIT_SCALE).exp().view(heads, 1, 1)
    return q, k, v, bias.view(heads, count, count), scale, cut, size


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: Tensor, region: Tensor | None, masked: float
) -> Tensor:
    """q, k, v (n, h, N, d); bias (h, N, N); scale (h, 1, 1); region (w, N), n a multiple of w. Returns (n, h, N, d)."""
    return _weights(q, k, bias, scale, region, masked).to(v.dtype) @ v


def _weights(q: Tensor, k: Tensor, bias: Tensor, scale: Tensor, region: Tensor | None, masked: float) -> Tensor:
    """The softmax, (n, h, N, N), of what `_attend` takes."""
    q, _ = _Unit.apply(q.to(bias.dtype))
    k, _ = _Unit.apply(k.to(bias.dtype))
    # In place after the product: no gradient formula needs the sums, and fresh memory is what costs on a CPU.
    # Scaling q instead would save 1% of a training step, and the bit-equality with timm's order of operations.
    logits = ((q @ k.transpose(-2, -1)) * scale).add_(bias)  # n h N N
    if region is not None:
        queries, keys = region[:, None, :, None], region[:, None, None, :]
        # Padded queries, whose results are cut off, see all real keys; every window has one, so no row is all -inf.
        mask = torch.where((queries == keys) | (queries == PADDED), 0.0, masked).to(logits.dtype)  # w 1 N N
        mask.masked_fill_(keys == PADDED, -math.inf)
        logits.view(-1, *region.shape[:1], *logits.shape[1:]).add_(mask)
    return logits.softmax(-1)


def _in_chunks(
    chunk: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: Tensor, region: Tensor | None, masked: float
) -> Tensor:
    """`_attend` on `chunk` windows at a time, each recomputed in the backward."""
    outs = []
    start = 0
    # split, not slices: its gradient is one concatenation, that of a slice is a zero-filled whole per chunk.
    for part in zip(q.split(chunk), k.split(chunk), v.split(chunk), strict=True):
        some = None
        if region is not None:
            some = region[torch.arange(start, start + len(part[0]), device=q.device) % len(region)]
        # Without gradients checkpoint only calls the function. Nothing in it draws random numbers.
        outs.append(
            checkpoint(_attend, *part, bias, scale, some, masked, use_reentrant=False, preserve_rng_state=False)
        )
        start += len(part[0])
    return torch.cat(outs)
