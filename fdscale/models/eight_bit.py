"""Frozen linear layers whose weights are held in 8 bits: `teacher.hold`.

Each output channel has a scale of its own, its largest weight over the largest number of the format. int8 and e4m3 are
exact in bfloat16, float16 and float32, so the product is that of the rounded weights in the precision of the input, and
the scale is applied to its result: nothing but the weights is rounded. float16 ends at 65504, so there the values are
divided by a power of two first, exactly: a channel's result overflows beyond 65504 times its largest weight.

Letters: O outputs, I inputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}  # and the largest number of each


class EightBitLinear(nn.Module):
    """In place of an nn.Linear: values (O, I) of 8 bits, scale (O,) and bias (O,) in float32, all of them buffers."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.power = 2.0 ** math.ceil(math.log2(KINDS[kind][1]))
        values, scale = rounded(weight.detach(), kind)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O) in the dtype of x, or autocast's."""
        device = x.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # meta has none
            return self._product(x)
        with torch.autocast(device, enabled=False):
            return self._product(x.to(torch.get_autocast_dtype(device)))

    def _product(self, x: Tensor) -> Tensor:
        values, scale = self.values.to(x.dtype), self.scale
        if x.dtype == torch.float16:
            values, scale = values / self.power, scale * self.power
        product = F.linear(x, values).float() * scale
        return (product if self.bias is None else product + self.bias).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        """(O, I) float32, for code that takes the weight of a layer and multiplies by itself."""
        return self.values.float() * self.scale[:, None]


def rounded(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Values (O, I) of 8 bits and scales (O,) float32 of a weight (O, I); a row of zeros has scale 1."""
    dtype, most = KINDS[kind]
    weight = weight.float()
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, largest / most, 1.0)
    scaled = weight / scale[:, None]
    values = (scaled.round() if dtype == torch.int8 else scaled).clamp(-most, most).to(dtype)
    return values, scale
