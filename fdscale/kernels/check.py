"""A self-check of the kernels that `auto` would take on a GPU: small inputs, against the reference in float64.

Done once per process and device. Where a kernel is wrong there, or fails to compile or start, it is not taken, and
`failures` says what was off. An illegal access to memory cannot be caught so: CUDA ends the process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fdscale.kernels import attention, reference, rows

# Relative error in norm. In Triton's interpreter it is at most 1e-2 in bf16 and 1e-6 in float32.
LIMITS = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
TF32_LIMIT = 3e-2  # of float32 where torch is set to multiply it so

_failures: dict[tuple[str, torch.device], str] = {}


def failures() -> list[str]:
    """What was found off in this process: one line for each kernel that `auto` left out."""
    return [f"{what} is not used on {device}: {why}" for (what, device), why in _failures.items()]


def fuses(wanted: str, device: torch.device) -> bool:
    """Whether norm and loss are fused (rows.py): where window attention is by kernels, as chosen or by name.

    wanted: as in `attention.choose`, which raises UserError. Where it was `auto`, they are checked first.
    """
    chosen = attention.choose(wanted, device)
    if device.type != "cuda" or chosen not in attention.FASTEST or attention.cannot_run("triton", device):
        return False
    return attention.asked(wanted)[0] != "auto" or rows_are_right(device)


@cache
def attention_is_right(name: str, device: torch.device) -> bool:
    """Whether window attention by `name` agrees with the reference: shifted windows of a padded map, 2 heads of 32."""

    def problem(dtype: torch.dtype) -> str | None:
        size, window, shift = (13, 16), (8, 8), (4, 4)
        qkv = _normal(2, *size, 3 * 64)
        table, scale = 16 * _normal(2, 15, 15).sigmoid(), torch.tensor([10.0, 30.0]).log()
        given = [qkv.to(device, dtype), table.to(device), scale.to(device)]
        return _difference(
            lambda qkv, table, scale: attention.window_attention(qkv, table, scale, window, shift, by=name),
            lambda qkv, table, scale: reference.window_attention(qkv, table, scale, window, shift),
            given,
            ("qkv", "bias table", "logit scale"),
        )

    return _passes(f"window attention by {name}", device, problem)


@cache
def rows_are_right(device: torch.device) -> bool:
    """Whether the fused norm and loss of rows.py agree with their definitions."""

    def problem(dtype: torch.dtype) -> str | None:
        x, branch = (_normal(3, 50, 96).to(device, dtype) for _ in range(2))
        keep = torch.tensor([0.0, 1.25, 1.25], device=device)
        weight, bias = (_normal(96).to(device, dtype) for _ in range(2))
        found = _difference(
            lambda x, b, w, c: rows.residual_norm(x, b, keep, w, c, 1e-5),
            lambda x, b, w, c: rows.plain_residual_norm(x, b, keep.double(), w, c, 1e-5),
            [x, branch, weight, bias],
            ("x", "branch", "weight", "bias"),
        )
        tokens = (3 * _normal(3, 50, 96) + 1).to(device)
        return found or _difference(
            lambda p: rows.token_losses(p, tokens, 2.0),
            lambda p: rows.plain_token_losses(p, tokens.double(), 2.0),
            [4 * x],
            ("prediction",),
        )

    return _passes("fused norm and loss by triton", device, problem)


def _passes(what: str, device: torch.device, problem: Callable[[torch.dtype], str | None]) -> bool:
    """Whether there is no problem in any dtype; the first is kept for `failures`."""
    for dtype in LIMITS:
        try:
            why = problem(dtype)
        except Exception as error:  # whatever a compiler or a driver raises: training goes on without the kernel
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if why:
            _failures[what, device] = f"in {str(dtype).removeprefix('torch.')}, {why}"
            return False
    return True


def _difference(
    by: Callable[..., Tensor], definition: Callable[..., Tensor], given: list[Tensor], names: tuple[str, ...]
) -> str | None:
    """What is off in the result or the gradients, on the same rounded inputs; None where nothing is."""
    dtype = given[0].dtype
    limit = LIMITS[dtype]
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        limit = TF32_LIMIT
    with torch.inference_mode(False), torch.enable_grad():
        ours = [x.clone().requires_grad_() for x in given]
        exact = [x.double().requires_grad_() for x in given]
        out, expected = by(*ours), definition(*exact)
        grad = _normal(*expected.shape).to(expected.device, dtype)
        found = [out, *torch.autograd.grad(out, ours, grad.to(out.dtype))]
        wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for name, a, e in zip(("the result", *(f"the gradient of {n}" for n in names)), found, wanted, strict=True):
        error = ((a.double() - e).norm() / e.norm()).item()
        if not error <= limit:  # or NaN
            return f"{name} differs from the reference by {error:.1e} of its norm; at most {limit:.0e} was expected"
    return None


def _normal(*shape: int) -> Tensor:
    """Numbers that depend on the shape alone, from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
