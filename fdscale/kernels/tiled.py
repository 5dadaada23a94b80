"""Window attention in plain torch, one tile of the scores at a time, differentiated in closed form. On any device.

The function is `reference.window_attention`'s; what differs is the memory: of the N x N scores of a window and head, no
more than about TILE are alive at once, forward and backward, and nothing of that size is kept between the two. The
backward recomputes the weights from the log-sum-exp of each row (FlashAttention, arXiv 2205.14135, section 3):

    P = exp(S - lse)    dV = P^T dO    dS = P * (dP - D),  dP = dO V^T,  D = rowsum(P * dP)

with S = s q^ k^T + bias, q^ = q / |q|, s = exp(logit_scale). So dq^ = s dS k^, and since S depends on s through
q^ . k^ alone, the gradient of logit_scale is the sum of q^ . dq^, which the gradient of q needs anyway.

Windows of equal mask are neighbours in the order of work, so that mask and bias are one tensor, shared by the windows
of a tile; and a tile of the bias stays while all windows pass, so that its gradient is folded into the table's once.
All sums have a fixed order: results are repeatable to the bit.

Letters: as in reference.py; T tokens of the padded map; n windows of all images, ordered by mask, then window, then
image; of a tile, g heads, R queries and c windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.kernels.reference import MAX_LOGIT_SCALE, NORM_EPS, PADDED, no_autocast, windows_of

TILE = 2**18  # scores at a time: 1 MiB in float32, so that the few tensors of a tile stay in a core's cache


class Kinds(NamedTuple):
    """The windows of one map, those of equal mask together."""

    tokens: Tensor  # (w, N) int64: token of the map at each place
    inverse: Tensor  # (T,) int64: tokens.flatten() inverted
    spans: list[tuple[int, int, Tensor | None]]  # first window of a kind, the one behind its last, (N,) regions


@lru_cache(maxsize=32)
def kinds_of(
    size: tuple[int, int],
    padding: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
) -> Kinds:
    """The windows of a map of `size`, as `reference.windows_of` cuts it. Regions are None where nothing is masked."""
    with torch.inference_mode(False):
        cut = windows_of(size, padding, 1, window, shift, device)
        tokens = cut.order.long().view(-1, window[0] * window[1])
        if cut.region is None:
            return Kinds(tokens, cut.inverse.long(), [(0, len(tokens), None)])
        regions, kind = torch.unique(cut.region, dim=0, return_inverse=True)
        tokens = tokens[kind.argsort(stable=True)]
        inverse = torch.empty_like(cut.inverse, dtype=torch.int64)
        inverse[tokens.flatten()] = torch.arange(tokens.numel(), device=device)
        ends = kind.bincount().cumsum(0).tolist()
        masked = [region if (region != region[0]).any() else None for region in regions]
        return Kinds(tokens, inverse, list(zip([0, *ends[:-1]], ends, masked, strict=True)))


class Tiles:
    """How the scores of one map are cut into tiles, and the way from the map to windows and back."""

    def __init__(self, qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int], masked: float) -> None:
        self.batch, self.height, self.width, channels = qkv.shape
        self.heads, self.dim = heads, channels // (3 * heads)
        self.window, self.masked, self.count = window, masked, window[0] * window[1]
        padding = (-self.height % window[0], -self.width % window[1])
        self.size = (self.height + padding[0], self.width + padding[1])
        self.kinds = kinds_of(self.size, padding, window, shift, qkv.device)
        image = torch.arange(self.batch, device=qkv.device)[:, None]
        self._tokens = (self.kinds.tokens[:, None] + image * math.prod(self.size)).flatten(0, 1)  # n N, of all images
        self._owners = self.kinds.inverse // self.count * self.batch + image  # B T: which of the n
        self._places = self.kinds.inverse % self.count  # T
        alike = self.batch * max(end - first for first, end, _ in self.kinds.spans)
        self._rows = window[1] * max(1, min(window[0], TILE // (self.count * window[1])))  # R: whole rows of the window
        self._windows = max(1, min(alike, TILE // (self._rows * self.count)))  # c
        self._heads = max(1, min(heads, TILE // (self._windows * self._rows * self.count)))  # g

    def head_groups(self) -> list[slice]:
        """Slices of the heads."""
        return _slices(0, self.heads, self._heads)

    def query_blocks(self) -> list[slice]:
        """Slices of the tokens of a window."""
        return _slices(0, self.count, self._rows)

    def windows(self, bias: Tensor, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the n windows, of equal mask each, and the bias (g, R, N) with that mask in it."""
        for first, end, region in self.kinds.spans:
            masked = bias if region is None else bias + self._mask(region, rows, bias.dtype)
            for some in _slices(first * self.batch, end * self.batch, self._windows):
                yield some, masked

    def _mask(self, region: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
        """(R, N). Padded queries, whose results are cut off, see all real keys, so that no query is without a key."""
        queries = region[rows, None]
        mask = torch.where((queries == region) | (queries == PADDED), 0.0, self.masked).to(dtype)
        return mask.masked_fill_(region == PADDED, -math.inf)

    def pad(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C), contiguous."""
        below, right = self.size[0] - self.height, self.size[1] - self.width
        return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x.contiguous()

    def crop(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B, H, W, C)."""
        x = x.view(self.batch, *self.size, -1)
        return x[:, : self.height, : self.width].contiguous()

    def take(self, x: Tensor, heads: slice, parts: int, dtype: torch.dtype) -> Tensor:
        """Rows of d numbers of a padded map (B, H', W', p h d) -> (p, n, g, N, d), contiguous."""
        head = torch.arange(heads.start, heads.stop, device=x.device)[:, None]
        part = torch.arange(parts, device=x.device).view(-1, 1, 1, 1)
        index = (self._tokens[:, None] * parts + part) * self.heads + head  # p n g N
        rows = x.view(-1, x.shape[-1] // (parts * self.heads)).index_select(0, index.flatten())
        return rows.view(*index.shape, -1).to(dtype)

    def put(self, values: Tensor, into: Tensor, heads: slice) -> None:
        """(n, g, N, d) -> these heads of (B, T, h, d)."""
        groups = values.shape[1]
        head = torch.arange(groups, device=values.device)
        index = (self._owners[..., None] * groups + head) * self.count + self._places[..., None]  # B T g
        rows = values.view(-1, values.shape[-1]).index_select(0, index.flatten())
        into[:, :, heads] = rows.view(*index.shape, -1)


def _slices(start: int, end: int, step: int) -> list[slice]:
    return [slice(a, min(a + step, end)) for a in range(start, end, step)]


def spread(table: Tensor, rows: slice, window: tuple[int, int]) -> Tensor:
    """(g, 2 Wh - 1, 2 Ww - 1) -> (g, R, N), the bias of these queries and all keys."""
    token = torch.arange(window[0] * window[1], device=table.device)
    cell = token // window[1] * (2 * window[1] - 1) + token % window[1]
    middle = (window[0] - 1) * (2 * window[1] - 1) + window[1] - 1
    cells = cell[rows, None] - cell + middle
    flat = cells.flatten().expand(len(table), -1)
    return table.flatten(1).gather(1, flat).view(-1, *cells.shape)  # a third of the time of index_select


def fold(tile: Tensor, rows: slice, into: Tensor, window: tuple[int, int]) -> None:
    """The adjoint of `spread`: adds a tile (g, R, N) to the tables `into` it came from. R is whole rows of the window.

    A row longer by one than it is read turns the diagonals of a square into columns; indices would need atomic sums.
    """
    wh, ww = window
    tile = tile.view(len(tile), -1, ww, wh, ww).transpose(2, 3).flip(-1)  # g yi yj xi xj, xj backwards
    tile = F.pad(tile, (0, ww)).flatten(-2)[..., : ww * (2 * ww - 1)]
    tile = tile.unflatten(-1, (ww, 2 * ww - 1)).sum(-2).flip(2)  # g yi yj dx, yj backwards
    for i, y in enumerate(range(rows.start // ww, rows.stop // ww)):
        into[:, y : y + wh] += tile[:, i]


def _exp(x: Tensor) -> Tensor:
    """In place, of numbers of which the largest is about 0. What is below 1e-37 becomes 0, and no denormal number.

    A CPU takes several times as long for those, and a mask of -100 makes many.
    """
    return torch.threshold_(x, -86.0, -math.inf).exp_()


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(NORM_EPS), norm


def _unit_backward(grad: Tensor, unit: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x for that of x / |x|, and unit . grad of each row."""
    along = (grad * unit).sum(-1, keepdim=True)
    projected = torch.addcmul(grad, unit, along.masked_fill(norm < NORM_EPS, 0.0), value=-1.0)  # else by a constant
    return projected.div_(norm.clamp_min(NORM_EPS)), along


def forward(
    qkv: Tensor, table: Tensor, logit_scale: Tensor, window: tuple[int, int], shift: tuple[int, int], masked: float
) -> tuple[Tensor, Tensor]:
    """As `reference.window_attention`, which says what the arguments are; `masked` stands between regions.

    Returns (B, H, W, C), dtype of qkv, and (B, h, H', W') over the padded map: the log of the sum of a query's
    exponentials, float32 or float64.
    """
    with no_autocast(qkv.device):
        tiles = Tiles(qkv, len(table), window, shift, masked)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        qkv, table = tiles.pad(qkv), table.to(wide)
        scale = logit_scale.to(wide).clamp(max=MAX_LOGIT_SCALE).exp().view(-1, 1, 1)
        tokens = math.prod(tiles.size)
        out = qkv.new_empty(tiles.batch, tokens, tiles.heads, tiles.dim)
        lse = qkv.new_empty(tiles.batch, tokens, tiles.heads, 1, dtype=wide)
        for heads in tiles.head_groups():
            q, k, v = tiles.take(qkv, heads, 3, wide)
            q, k = _unit(q)[0].mul_(scale[heads]), _unit(k)[0]
            o, log_sum = torch.empty_like(v), torch.empty_like(v[..., :1])
            for rows in tiles.query_blocks():
                for some, bias in tiles.windows(spread(table[heads], rows, window), rows):
                    scores = (q[some, :, rows] @ k[some].mT).add_(bias)  # c g R N
                    top = scores.amax(-1, keepdim=True)
                    weights = _exp(scores.sub_(top))
                    total = weights.sum(-1, keepdim=True)
                    o[some, :, rows] = (weights @ v[some]).div_(total)
                    log_sum[some, :, rows] = total.log_().add_(top)
            tiles.put(o, out, heads)
            tiles.put(log_sum, lse, heads)
        return tiles.crop(out), lse.view(tiles.batch, *tiles.size, -1).permute(0, 3, 1, 2).contiguous()


def backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    logit_scale: Tensor,
    out: Tensor,
    lse: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    masked: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, table and logit_scale, in their dtypes, for that of the first result of `forward`.

    `out` is not looked at: D from the tile's own P and dP does not suffer from its rounding to 16 bits.
    """
    with no_autocast(qkv.device):
        tiles = Tiles(qkv, len(table), window, shift, masked)
        wide = lse.dtype
        qkv, grad, lse = tiles.pad(qkv), tiles.pad(grad), lse.permute(0, 2, 3, 1).contiguous()
        scale = logit_scale.to(wide).clamp(max=MAX_LOGIT_SCALE).exp().view(-1, 1, 1)
        d_qkv = qkv.new_empty(tiles.batch, math.prod(tiles.size), 3, tiles.heads, tiles.dim)
        # contiguous, as the op says, whatever the order of the table in memory
        d_table, d_scale = table.new_zeros(table.shape, dtype=wide), logit_scale.new_empty(len(table), dtype=wide)
        for heads in tiles.head_groups():
            qkv_heads = tiles.take(qkv, heads, 3, wide)
            grad_heads, lse_heads = tiles.take(grad, heads, 1, wide)[0], tiles.take(lse, heads, 1, wide)[0]
            gradients = _backward_heads(tiles, qkv_heads, grad_heads, lse_heads, table[heads].to(wide), scale[heads])
            *parts, d_table[heads], d_scale[heads] = gradients
            for i, part in enumerate(parts):
                tiles.put(part, d_qkv[:, :, i], heads)
        d_scale.masked_fill_(logit_scale >= MAX_LOGIT_SCALE, 0.0)  # as torch differentiates clamp
        return tiles.crop(d_qkv), d_table.to(table.dtype), d_scale.to(logit_scale.dtype)


def _backward_heads(
    tiles: Tiles, qkv: Tensor, grad: Tensor, lse: Tensor, table: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, (n, g, N, d) each, of table and of logit_scale. lse (n, g, N, 1); scale (g, 1, 1)."""
    q, k, v = qkv
    (q, q_norm), (k, k_norm) = _unit(q), _unit(k)
    scaled = q * scale
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_table = torch.zeros_like(table)
    for rows in tiles.query_blocks():
        bias = spread(table, rows, tiles.window)
        d_bias = torch.zeros_like(bias)
        for some, masked in tiles.windows(bias, rows):
            queries = scaled[some, :, rows]
            weights = _exp((queries @ k[some].mT).add_(masked).sub_(lse[some, :, rows]))  # c g R N
            # Their sums are 1 but for the rounding of lse, 1e-5 at logits of 100. Dividing by them makes that vanish.
            total = weights.sum(-1, keepdim=True)
            d_out = grad[some, :, rows] / total
            d_v[some] += weights.mT @ d_out
            d_scores = (d_out @ v[some].mT).mul_(weights)
            d_scores.addcmul_(weights, d_scores.sum(-1, keepdim=True).div_(total), value=-1.0)
            d_bias += d_scores.sum(0)
            d_k[some] += d_scores.mT @ queries
            d_q[some, :, rows] = d_scores @ k[some]
        fold(d_bias, rows, d_table, tiles.window)
    d_q, along = _unit_backward(d_q.mul_(scale), q, q_norm)
    d_k, _ = _unit_backward(d_k, k, k_norm)
    return d_q, d_k, d_v, d_table, along.sum((0, 2, 3))
