"""Three small ops that work on the channels of one token at a time, fused for GPUs.

    residual_norm       x + keep * LN(branch): residual, drop path and res-post-norm of a SwinV2 block
    token_losses        smooth-L1 of the student's tokens against the whitened ones of the teacher
    window_partition    roll, pad and cut of a map into shifted windows; window_reverse puts it together again

Each has its definition in plain torch (`plain_...`), which is what CPUs run, and is one op of torch.library, whose
kernels are in row_kernels.py: one pass over memory forward and one backward, float32 within, each result rounded once,
sums in a fixed order. They have first derivatives, not second ones, and their dtypes are those of their inputs, under
autocast too.

Letters: B images, C channels, H W map, Wh Ww window, w windows of a map, n = B w windows in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale import UserError
from fdscale.kernels.attention import cannot_run

WHITEN_EPS = 1e-5


@torch.compiler.assume_constant_result
def can_run(device: torch.device) -> bool:
    """Whether the kernels can run on a device."""
    return _can_run(device)


@cache
def _can_run(device: torch.device) -> bool:
    return cannot_run("triton", device) is None


def _kernels(what: str, device: torch.device) -> ModuleType:
    """row_kernels.py. Raises UserError where it cannot run."""
    if why := cannot_run("triton", device):
        raise UserError(f"{what} by triton cannot run here: {why}")
    from fdscale.kernels import row_kernels  # imports triton

    return row_kernels


# ----------------------------------------------------------------------------------------------------------------------
# Residual, drop path and res-post-norm (SwinV2, arXiv 2111.09883, section 3.2)


def plain_residual_norm(
    x: Tensor, branch: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """`residual_norm` in plain torch, any floating dtype."""
    normed = F.layer_norm(branch, branch.shape[-1:], weight, bias, eps)
    return x + normed if keep is None else torch.addcmul(x, normed, keep.to(x.dtype).view(-1, *[1] * (x.dim() - 1)))


def residual_norm(x: Tensor, branch: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + keep * LN(branch), in x's dtype, by Triton.

    x, branch: (B, ..., C), float32, bf16 or fp16, each its own; keep: (B,), 0 or 1 / (1 - rate) as drop path drew it,
    or None for 1; weight, bias: (C,). Kept for the backward is the branch alone; the gradient of x is that of the
    result itself. keep has no gradient. Raises UserError where the kernels cannot run, or the shapes do not fit.
    """
    if x.shape != branch.shape or not x.shape[-1:] == weight.shape == bias.shape:
        raise UserError(
            f"residual norm: x is {tuple(x.shape)}, branch {tuple(branch.shape)}, weight {tuple(weight.shape)}, bias "
            f"{tuple(bias.shape)}; expected (B, ..., C) twice and (C,) twice"
        )
    if keep is not None and keep.shape != x.shape[:1]:
        raise UserError(
            f"residual norm: keep is {tuple(keep.shape)}; expected {tuple(x.shape[:1])}, one for each sample"
        )
    return _residual_norm(x, branch, keep, weight, bias, eps)


@torch.library.custom_op(
    "fdscale::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor branch, Tensor? keep, Tensor weight, Tensor bias, float eps) -> Tensor",
)
def _residual_norm(x: Tensor, branch: Tensor, keep: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _kernels("residual norm", x.device).residual_norm(x, branch, keep, weight, bias, eps)


@_residual_norm.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "fdscale::residual_norm_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor branch, Tensor? keep, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
)
def _residual_norm_backward(
    grad: Tensor, branch: Tensor, keep: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels("residual norm", grad.device).residual_norm_backward(grad, branch, keep, weight, eps)


@_residual_norm_backward.register_fake
def _(grad: Tensor, branch: Tensor, keep: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return branch.new_empty(branch.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _save_norm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, branch, keep, weight, _, ctx.eps = inputs
    ctx.save_for_backward(branch, keep, weight)


def _differentiate_norm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, keep, weight = ctx.saved_tensors
    d_branch, d_weight, d_bias = _residual_norm_backward(grad, branch, keep, weight, ctx.eps)
    return grad, d_branch, None, d_weight, d_bias, None


_residual_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)


# ----------------------------------------------------------------------------------------------------------------------
# Whitening and smooth-L1 (arXiv 2205.14141, section 3)


def plain_token_losses(prediction: Tensor, tokens: Tensor, beta: float) -> Tensor:
    """`token_losses` in plain torch."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    target = F.layer_norm(tokens.to(wide), tokens.shape[-1:], eps=WHITEN_EPS)
    return F.smooth_l1_loss(prediction.to(wide), target, beta=beta, reduction="none").mean(-1)


def token_losses(prediction: Tensor, tokens: Tensor, beta: float) -> Tensor:
    """Mean smooth-L1 over the channels of each token, (..., C) -> (...) float32, by Triton.

    prediction: the student's; tokens: the teacher's, of equal shape, not yet whitened, without gradient. float32, bf16
    or fp16, each its own. Nothing but these two is kept for the backward, which whitens again.
    Raises UserError where the kernels cannot run, ValueError where the shapes differ.
    """
    if prediction.shape != tokens.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(tokens.shape)} must have the same shape"
        )
    return _token_losses(prediction, tokens, beta)


@torch.library.custom_op(
    "fdscale::token_losses", mutates_args=(), schema="(Tensor prediction, Tensor tokens, float beta) -> Tensor"
)
def _token_losses(prediction: Tensor, tokens: Tensor, beta: float) -> Tensor:
    return _kernels("feature loss", prediction.device).token_losses(prediction, tokens, beta, WHITEN_EPS)


@_token_losses.register_fake
def _(prediction: Tensor, *_: Any) -> Tensor:
    return prediction.new_empty(prediction.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "fdscale::token_losses_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor prediction, Tensor tokens, float beta) -> Tensor",
)
def _token_losses_backward(grad: Tensor, prediction: Tensor, tokens: Tensor, beta: float) -> Tensor:
    kernels = _kernels("feature loss", prediction.device)
    return kernels.token_losses_backward(grad, prediction, tokens, beta, WHITEN_EPS)


@_token_losses_backward.register_fake
def _(grad: Tensor, prediction: Tensor, *_: Any) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _save_losses(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.beta = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_losses(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _token_losses_backward(grad, *ctx.saved_tensors, ctx.beta), None, None


_token_losses.register_autograd(_differentiate_losses, setup_context=_save_losses)


# ----------------------------------------------------------------------------------------------------------------------
# Shifted windows, for models that need only these copies (microsoft/Swin-Transformer kernels/window_process)


def window_partition(x: Tensor, window: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """A map's shifted windows: (B, H, W, C) -> (n, Wh, Ww, C), windows of an image row by row.

    The map is padded with zeros at the bottom and right to whole windows, rolled by -shift, and cut. Any dtype and
    number of channels; one copy by Triton where that can run, plain torch elsewhere. Raises UserError unless 0 <= shift
    < window.
    """
    if x.dim() != 4 or not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise UserError(
            f"window partition: a map of {tuple(x.shape)}, window {tuple(window)} and shift {tuple(shift)}; expected "
            "(B, H, W, C), and a shift of at least 0 and less than the window"
        )
    by = _partition if can_run(x.device) else plain_window_partition
    return by(x, window, shift)


def window_reverse(windows: Tensor, size: tuple[int, int], shift: tuple[int, int] = (0, 0)) -> Tensor:
    """The map of `size` (H, W) that `window_partition` cut into these windows: (n, Wh, Ww, C) -> (B, H, W, C).

    What was padding is dropped. Raises UserError unless n is a multiple of the windows of a map, and for a shift as
    above.
    """
    whole = [-(-length // side) for length, side in zip(size, windows.shape[1:3], strict=True)]
    if windows.dim() != 4 or len(windows) % (whole[0] * whole[1]):
        raise UserError(
            f"window reverse: windows are {tuple(windows.shape)}; expected (n, Wh, Ww, C), and n a multiple of the "
            f"{whole[0]} x {whole[1]} windows of a map of {tuple(size)}"
        )
    if not all(0 <= s < w for s, w in zip(shift, windows.shape[1:3], strict=True)):
        raise UserError(f"window reverse: the shift is {tuple(shift)}; expected less than {tuple(windows.shape[1:3])}")
    by = _reverse if can_run(windows.device) else plain_window_reverse
    return by(windows, size, shift)


def plain_window_partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """`window_partition` in plain torch."""
    (height, width), (wh, ww), channels = x.shape[1:3], window, x.shape[3]
    x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh)).roll((-shift[0], -shift[1]), (1, 2))
    x = x.view(len(x), x.shape[1] // wh, wh, x.shape[2] // ww, ww, channels)
    return x.transpose(2, 3).reshape(-1, wh, ww, channels)


def plain_window_reverse(windows: Tensor, size: Sequence[int], shift: Sequence[int]) -> Tensor:
    """`window_reverse` in plain torch."""
    _, wh, ww, channels = windows.shape
    down, across = -(-size[0] // wh), -(-size[1] // ww)
    x = windows.view(-1, down, across, wh, ww, channels).transpose(2, 3).reshape(-1, down * wh, across * ww, channels)
    return x.roll((shift[0], shift[1]), (1, 2))[:, : size[0], : size[1]].contiguous()


@torch.library.custom_op(
    "fdscale::window_partition", mutates_args=(), schema="(Tensor x, SymInt[2] window, SymInt[2] shift) -> Tensor"
)
def _partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    out = x.new_empty(_partitioned(x, window))
    kernels = _kernels("window partition", x.device)
    return kernels.window_copy(x, out, tuple(x.shape[1:3]), tuple(window), tuple(shift), False)


@_partition.register_fake
def _(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    return x.new_empty(_partitioned(x, window))


def _partitioned(x: Tensor, window: Sequence[int]) -> tuple[int, ...]:
    """Shape of the windows of a map."""
    batch, height, width, channels = x.shape
    return batch * -(-height // window[0]) * -(-width // window[1]), *window, channels


@torch.library.custom_op(
    "fdscale::window_reverse", mutates_args=(), schema="(Tensor windows, SymInt[2] size, SymInt[2] shift) -> Tensor"
)
def _reverse(windows: Tensor, size: Sequence[int], shift: Sequence[int]) -> Tensor:
    out = windows.new_empty(_reversed(windows, size))
    kernels = _kernels("window reverse", windows.device)
    return kernels.window_copy(windows, out, tuple(size), tuple(windows.shape[1:3]), tuple(shift), True)


@_reverse.register_fake
def _(windows: Tensor, size: Sequence[int], shift: Sequence[int]) -> Tensor:
    return windows.new_empty(_reversed(windows, size))


def _reversed(windows: Tensor, size: Sequence[int]) -> tuple[int, ...]:
    """Shape of the map of some windows."""
    count, wh, ww, channels = windows.shape
    return count // (-(-size[0] // wh) * -(-size[1] // ww)), *size, channels


def _save_map(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, ctx.shift = inputs
    ctx.size = tuple(x.shape[1:3])


def _save_windows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    windows, _, ctx.shift = inputs
    ctx.window = tuple(windows.shape[1:3])


# Each is the other's gradient: padding neither comes from the map nor goes back to it.
_partition.register_autograd(
    lambda ctx, grad: (_reverse(grad, ctx.size, ctx.shift), None, None), setup_context=_save_map
)
_reverse.register_autograd(
    lambda ctx, grad: (_partition(grad, ctx.window, ctx.shift), None, None), setup_context=_save_windows
)
