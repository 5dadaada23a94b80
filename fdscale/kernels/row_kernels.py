"""The ops of rows.py as Triton kernels, and their launches. Importing this imports triton.

A program holds whole rows, ROWS at a time, in float32 from the load to the store, so that each tensor is read once and
each result rounded once. No sum uses atomic additions: results are repeatable to the bit.

Letters: M rows (tokens) of C channels, in a tile of ROWS x COLUMNS; COLUMNS >= C, a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdscale import UserError

PROGRAMS = 512  # that share the rows of a sum over all: enough for any GPU, the same on all, as it decides the order
WIDEST = 8192  # channels: beyond, gradients of a row would not fit into registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def whitened(X, at, there, C, eps):
    """(ROWS, COLUMNS) float32 with mean 0 and variance 1 in each row, 0 beyond C; and what each was divided by."""
    x = tl.load(X + at, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / C
    centred = tl.where(there, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def residual_norm_kernel(
    X, BRANCH, KEEP, WEIGHT, BIAS, OUT, M, C, tokens, eps,
    KEPT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (rows). KEPT: there is a KEEP, a factor for each `tokens` rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, COLUMNS)
    there = (row < M)[:, None] & (channel < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    unit, _ = whitened(BRANCH, at, there, C, eps)
    weight = tl.load(WEIGHT + channel, mask=channel < C, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + channel, mask=channel < C, other=0.0).to(tl.float32)
    normed = unit * weight[None, :] + bias[None, :]
    if KEPT:
        normed *= tl.load(KEEP + row // tokens, mask=row < M, other=0.0)[:, None]
    out = tl.load(X + at, mask=there, other=0.0).to(tl.float32) + normed
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=there)


@triton.jit
def residual_norm_backward_kernel(
    GRAD, BRANCH, KEEP, WEIGHT, DBRANCH, PARTS, M, C, tokens, eps, share,
    KEPT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (share of the rows, so many tiles): their gradients, and their sums for weight and bias: PARTS."""
    channel = tl.arange(0, COLUMNS)
    weight = tl.load(WEIGHT + channel, mask=channel < C, other=0.0).to(tl.float32)
    by_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    by_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(0) * share
    for tile in range(first, tl.minimum(first + share, tl.cdiv(M, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = (row < M)[:, None] & (channel < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + channel[None, :]
        grad = tl.load(GRAD + at, mask=there, other=0.0).to(tl.float32)
        if KEPT:
            grad *= tl.load(KEEP + row // tokens, mask=row < M, other=0.0)[:, None]
        unit, inverse = whitened(BRANCH, at, there, C, eps)
        by_weight += grad * unit
        by_bias += grad
        grad *= weight[None, :]
        along = tl.sum(grad * unit, 1) / C
        grad = (grad - (tl.sum(grad, 1) / C)[:, None] - unit * along[:, None]) * inverse[:, None]
        tl.store(DBRANCH + at, grad.to(DBRANCH.dtype.element_ty), mask=there)
    PARTS += tl.program_id(0).to(tl.int64) * 2 * C
    tl.store(PARTS + channel, tl.sum(by_weight, 0), mask=channel < C)
    tl.store(PARTS + C + channel, tl.sum(by_bias, 0), mask=channel < C)


@triton.jit
def token_losses_kernel(PREDICTION, TOKENS, LOSSES, M, C, beta, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Program (rows): the mean loss of each."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, COLUMNS)
    there = (row < M)[:, None] & (channel < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    target, _ = whitened(TOKENS, at, there, C, eps)
    error = tl.abs(tl.load(PREDICTION + at, mask=there, other=0.0).to(tl.float32) - target)
    loss = tl.where(error < beta, 0.5 * error * error / beta, error - 0.5 * beta)
    tl.store(LOSSES + row, tl.sum(tl.where(there, loss, 0.0), 1) / C, mask=row < M)


@triton.jit
def token_losses_backward_kernel(
    GRAD, PREDICTION, TOKENS, DPREDICTION, M, C, beta, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (rows): the gradient of the prediction from that of each row's loss."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, COLUMNS)
    there = (row < M)[:, None] & (channel < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    target, _ = whitened(TOKENS, at, there, C, eps)
    error = tl.load(PREDICTION + at, mask=there, other=0.0).to(tl.float32) - target
    sign = tl.where(error > 0.0, 1.0, tl.where(error < 0.0, -1.0, error))  # of 0, 0; of NaN, NaN
    slope = tl.where(tl.abs(error) < beta, error / beta, sign)
    grad = slope * (tl.load(GRAD + row, mask=row < M, other=0.0) / C)[:, None]
    tl.store(DPREDICTION + at, grad.to(DPREDICTION.dtype.element_ty), mask=there)


@triton.jit
def window_copy_kernel(
    X, OUT, M, C, height, width, window_rows, window_columns, shift_rows, shift_columns,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (rows of OUT, channels). X: the map and OUT: its windows, or with REVERSE the other way round."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    across = tl.cdiv(width, window_columns)
    whole_rows = tl.cdiv(height, window_rows) * window_rows  # of the padded map
    whole_columns = across * window_columns
    area = window_rows * window_columns
    if REVERSE:
        image, token = row // (height * width), row % (height * width)
        y = (token // width - shift_rows + whole_rows) % whole_rows  # in the rolled map
        x = (token % width - shift_columns + whole_columns) % whole_columns
        window = y // window_rows * across + x // window_columns
        place = y % window_rows * window_columns + x % window_columns
        source = image.to(tl.int64) * (whole_rows * whole_columns) + window * area + place
        real = row < M
    else:
        window, place = row // area, row % area
        image, window = window // (whole_rows // window_rows * across), window % (whole_rows // window_rows * across)
        y = (window // across * window_rows + place // window_columns + shift_rows) % whole_rows
        x = (window % across * window_columns + place % window_columns + shift_columns) % whole_columns
        source = image.to(tl.int64) * (height * width) + y * width + x
        real = (row < M) & (y < height) & (x < width)
    inside = (channel < C)[None, :]
    values = tl.load(X + source[:, None] * C + channel[None, :], mask=real[:, None] & inside, other=0.0)
    tl.store(OUT + row.to(tl.int64)[:, None] * C + channel[None, :], values, mask=(row < M)[:, None] & inside)


# ----------------------------------------------------------------------------------------------------------------------
# Launches: on the current stream of the tensors' device


def tile_of(channels: int) -> dict[str, int]:
    """Constants of the kernels that hold whole rows: a tile of 2048 numbers, or of one row. None was timed."""
    columns = max(16, triton.next_power_of_2(channels))
    rows = max(1, 2048 // columns)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": 32 if columns > 4096 else max(4, columns // 512)}


def copy_tile_of(channels: int) -> dict[str, int]:
    """Constants of the copy."""
    columns = min(256, max(16, triton.next_power_of_2(channels)))
    return {"ROWS": 2048 // columns, "COLUMNS": columns, "num_warps": 4}


def residual_norm(x: Tensor, branch: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `rows.residual_norm`."""
    rows, channels = _shape("residual norm", x, branch, weight, bias)
    x, branch, keep = x.contiguous(), branch.contiguous(), _factors(keep)
    out, tile = torch.empty_like(x), tile_of(channels)
    tensors = (x, branch, x if keep is None else keep, weight.contiguous(), bias.contiguous(), out)
    sizes = (rows, channels, rows // max(1, len(x)), eps)
    _launch(
        residual_norm_kernel, x, (triton.cdiv(rows, tile["ROWS"]),), *tensors, *sizes, KEPT=keep is not None, **tile
    )
    return out


def residual_norm_backward(
    grad: Tensor, branch: Tensor, keep: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of branch, weight and bias; the sums in two passes of fixed order."""
    rows, channels = _shape("residual norm", grad, branch, weight)
    grad, branch, keep = grad.contiguous(), branch.contiguous(), _factors(keep)
    d_branch, tile = torch.empty_like(branch), tile_of(channels)
    tiles = triton.cdiv(rows, tile["ROWS"])
    share = max(1, triton.cdiv(tiles, PROGRAMS))
    parts = torch.empty(triton.cdiv(tiles, share), 2, channels, device=grad.device)
    tensors = (grad, branch, grad if keep is None else keep, weight.contiguous(), d_branch, parts)
    sizes = (rows, channels, rows // max(1, len(grad)), eps, share)
    _launch(residual_norm_backward_kernel, grad, (len(parts),), *tensors, *sizes, KEPT=keep is not None, **tile)
    d_weight, d_bias = parts.sum(0).to(weight.dtype)
    return d_branch, d_weight.clone(), d_bias.clone()


def token_losses(prediction: Tensor, tokens: Tensor, beta: float, eps: float) -> Tensor:
    """As `rows.token_losses`."""
    rows, channels = _shape("feature loss", prediction, tokens)
    prediction, tokens = prediction.contiguous(), tokens.contiguous()
    losses, tile = torch.empty(prediction.shape[:-1], device=prediction.device), tile_of(channels)
    sizes = (rows, channels, beta, eps)
    _launch(token_losses_kernel, losses, (triton.cdiv(rows, tile["ROWS"]),), prediction, tokens, losses, *sizes, **tile)
    return losses


def token_losses_backward(grad: Tensor, prediction: Tensor, tokens: Tensor, beta: float, eps: float) -> Tensor:
    """The gradient of the prediction."""
    rows, channels = _shape("feature loss", prediction, tokens)
    prediction, tokens = prediction.contiguous(), tokens.contiguous()
    out, tile = torch.empty_like(prediction), tile_of(channels)
    tensors = (grad.float().contiguous(), prediction, tokens, out)
    grid = (triton.cdiv(rows, tile["ROWS"]),)
    _launch(token_losses_backward_kernel, out, grid, *tensors, rows, channels, beta, eps, **tile)
    return out


def window_copy(
    x: Tensor, out: Tensor, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], reverse: bool
) -> Tensor:
    """Fill `out` with the windows of a map of `size`, or with the map of these windows; gives it back."""
    channels = out.shape[-1]
    rows, tile = out.numel() // channels, copy_tile_of(channels)
    grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["COLUMNS"]))
    sizes = (rows, channels, *size, *window, *shift)
    _launch(window_copy_kernel, out, grid, x.contiguous(), out, *sizes, REVERSE=reverse, **tile)
    return out


def _launch(kernel: Any, like: Tensor, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel where `like` is, unless there is nothing to do."""
    if 0 in grid:
        return
    if like.is_cuda:
        with torch.cuda.device(like.device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def _factors(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.float().contiguous()


def _shape(what: str, *tensors: Tensor) -> tuple[int, int]:
    """Rows and channels of the first. Raises UserError for dtypes and widths that the kernels do not have."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise UserError(f"{what} by triton: got {tensor.dtype}; expected float32, bfloat16 or float16")
    channels = tensors[0].shape[-1]
    if not 0 < channels <= WIDEST:
        raise UserError(
            f"{what} by triton: {channels} channels; expected 1 to {WIDEST}, or set memory.kernels=reference"
        )
    return tensors[0].numel() // channels, channels
