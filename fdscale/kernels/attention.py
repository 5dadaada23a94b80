"""Window attention: the one place that chooses what computes it, and the op behind which faster versions stand.

    reference   kernels/reference.py: the definition, differentiated by autograd, which keeps the N x N weights
    torch       kernels/tiled.py, on any device: one tile of the scores at a time, and none kept for the backward
    triton      kernels/fused.py, on NVIDIA GPUs: no scores in memory at all
    cuda        kernels/compiled.py, on NVIDIA GPUs: the same in CUDA C++ for bf16 and fp16, built on request

All but the reference are `torch.ops.fdscale.window_attention`: one node for torch.compile and activation checkpointing.
Its dtypes are those of its inputs, under autocast too. The environment variable FDSCALE_KERNELS overrides the config.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fdscale import UserError
from fdscale.kernels import compiled, reference, tiled

VARIABLE = "FDSCALE_KERNELS"
NAMES = ("reference", "torch", "triton", "cuda")
FASTEST = ("cuda", "triton")  # what `auto` tries on a GPU, in this order
MASKS = {"-100": reference.MASKED, "-inf": -math.inf}  # added between tokens that the roll made neighbours


def choose(wanted: str, device: torch.device) -> str:
    """What computes window attention on a device, one of NAMES: what is wanted, or what the environment variable says.

    auto: on a GPU the first of FASTEST that can run there and passes its self-check (kernels/check.py), else the
    reference. Raises UserError for an unknown name, and for one that cannot run there.
    """
    name, origin = asked(wanted)
    if name not in ("auto", *NAMES):
        raise UserError(f"{origin} is {name!r}; expected auto, {', '.join(NAMES)}")
    if name == "auto":
        return automatic(device)
    if why := cannot_run(name, device):
        raise UserError(f"{origin} is {name}, which cannot run here: {why}; choose auto")
    return name


def asked(wanted: str) -> tuple[str, str]:
    """What is asked for, and what says so: the config, or the environment variable over it."""
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE], f"the environment variable {VARIABLE}"
    return wanted, "memory.kernels"


def automatic(device: torch.device) -> str:
    """What `auto` takes on a device, after its self-check."""
    from fdscale.kernels import check  # which imports this

    if device.type == "cuda":
        for name in FASTEST:
            if cannot_run(name, device) is None and check.attention_is_right(name, device):
                return name
    return "reference"


def cannot_run(name: str, device: torch.device) -> str | None:
    """Why one of NAMES cannot run on a device, or None."""
    if name == "cuda":
        return compiled.cannot_run(device)
    if name != "triton":
        return None
    if device.type == "meta":  # shapes alone, as `fdscale plan` wants them
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":  # slow, on any device, for tests
        return None
    if device.type != "cuda" or torch.version.hip:
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, and this GPU has {major}.{minor}"


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    by: str = "reference",
    chunk: int = 0,
    mask: str = "-100",
) -> Tensor:
    """Cosine attention within the windows of a map, (B, H, W, 3C) -> (B, H, W, C), as `reference.window_attention`.

    by: one of NAMES. chunk: windows at a time of the reference; the others have no use for it.
    mask: what is added between tokens that are neighbours only because the map was rolled: -100, as in SwinV2, or -inf.
    Raises UserError where the shapes do not fit, or where `by` cannot run.
    """
    if mask not in MASKS:
        raise UserError(f"window attention: mask is {mask!r}; expected one of {', '.join(MASKS)}")
    check_shapes(qkv, bias_table, logit_scale, window, shift)
    if by == "reference":
        return reference.window_attention(qkv, bias_table, logit_scale, window, shift, chunk, MASKS[mask])
    return _forward(qkv, bias_table, logit_scale, window, shift, mask, by)[0]


def check_shapes(
    qkv: Tensor, bias_table: Tensor, logit_scale: Tensor, window: tuple[int, int], shift: tuple[int, int]
) -> None:
    """Raises UserError unless the arguments of window attention fit together."""
    heads = len(logit_scale)
    table = (heads, 2 * window[0] - 1, 2 * window[1] - 1)
    if tuple(bias_table.shape) != table:
        raise UserError(
            f"window attention: the bias table is {tuple(bias_table.shape)}; expected {table} for {heads} heads and a "
            f"window of {tuple(window)}"
        )
    if qkv.dim() != 4 or qkv.shape[-1] % (3 * heads):
        raise UserError(
            f"window attention: qkv is {tuple(qkv.shape)}; expected (B, H, W, 3C), and C a multiple of {heads} heads"
        )
    if not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise UserError(f"window attention: the shift is {tuple(shift)}; expected less than the window {tuple(window)}")


# The op. `by` is an argument, so that a backward is of the same kind as its forward and a graph says what it runs.


def _implementation(by: str, device: torch.device) -> ModuleType:
    """The module with `forward` and `backward`."""
    if by not in NAMES[1:]:
        raise UserError(f"window attention by {by!r}: expected {', '.join(NAMES)}")
    if why := cannot_run(by, device):
        raise UserError(f"window attention by {by} cannot run here: {why}")
    if by != "triton":
        return tiled if by == "torch" else compiled
    from fdscale.kernels import fused  # imports triton

    return fused


@torch.library.custom_op(
    "fdscale::window_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor bias_table, Tensor logit_scale, SymInt[2] window, SymInt[2] shift, str mask, str by)"
    " -> (Tensor, Tensor)",
)
def _forward(
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    mask: str,
    by: str,
) -> tuple[Tensor, Tensor]:
    """The map, and what the backward needs: the log-sum-exp of every query, (B, h, H', W'), in an order of its own."""
    forward = _implementation(by, qkv.device).forward
    return forward(qkv, bias_table, logit_scale, tuple(window), tuple(shift), MASKS[mask])


@_forward.register_fake
def _(
    qkv: Tensor, bias_table: Tensor, logit_scale: Tensor, window: Any, shift: Any, mask: str, by: str
) -> tuple[Tensor, Tensor]:
    batch, *size, channels = qkv.shape
    padded = [-(-length // side) * side for length, side in zip(size, window, strict=True)]
    lse = qkv.new_empty(batch, len(logit_scale), *padded, dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty(batch, *size, channels // 3), lse


@torch.library.custom_op(
    "fdscale::window_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor bias_table, Tensor logit_scale, Tensor out, Tensor lse, SymInt[2] window, "
    "SymInt[2] shift, str mask, str by) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    logit_scale: Tensor,
    out: Tensor,
    lse: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    mask: str,
    by: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias_table and logit_scale."""
    backward = _implementation(by, qkv.device).backward
    return backward(grad, qkv, bias_table, logit_scale, out, lse, tuple(window), tuple(shift), MASKS[mask])


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, bias_table: Tensor, logit_scale: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape), logit_scale.new_empty(logit_scale.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.shift, ctx.mask, ctx.by = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradients = (None, None, None)
    if grad is not None:
        gradients = _backward(grad, *ctx.saved_tensors, ctx.window, ctx.shift, ctx.mask, ctx.by)
    return (*gradients, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
