"""Linear layers whose products are of 8-bit floats, by torchao: `student.linear=fp8`.

Weights, gradients and the optimizer are as ever, and so are parameters' names. In each product both sides are rounded
to 8 bits, e4m3 in the forward and e5m2 for gradients, with one scale for each tensor of that product, taken from its
own largest element; so nothing is remembered from step to step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fdscale import UserError

CAPABILITY = (8, 9)  # of NVIDIA GPUs that multiply 8-bit floats: Ada, Hopper and later
MULTIPLE = 16  # of rows and columns that such products want


def convert(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Replace the linear layers of blocks, in place; on a CPU the rounding is imitated, for tests.

    Small networks that compute in float32 on purpose (the position MLPs) stay, and so do layers whose sides are no
    multiple of 16. Raises UserError where torchao is missing, or the GPU has no such products.
    """
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import uses what torch will change
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            "student.linear=fp8 needs torchao, which is not installed: pip install 'fdscale[fp8]', or leave it at same"
        ) from None
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"student.linear=fp8 needs a GPU that multiplies 8-bit floats, from H100 on; this is a "
            f"{torch.cuda.get_device_name(device)}"
        )
    how = Float8LinearConfig(pad_inner_dim=True, emulate=device.type != "cuda")
    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=_suits, config=how)


def _suits(module: nn.Module, _: str) -> bool:
    return type(module) is nn.Linear and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)


def describe(module: nn.Module) -> str:
    """A line for a person; empty where no layer was converted."""
    found: list[Any] = [part for part in module.modules() if type(part).__name__ == "Float8Linear"]
    if not found:
        return ""
    imitated = ", imitated on this CPU: as exact, and slower" if found[0].config.emulate else ""
    return f"{len(found)} linear layers multiply 8-bit floats (fp8){imitated}"
