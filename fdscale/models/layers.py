"""What both student networks are made of: patch embedding, MLP, drop path, initialisation.

Letters: B images, C channels, H W token map.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.kernels.layer_norm import layer_norm
from fdscale.kernels.rows import can_run, residual_norm

INIT_STD = 0.02


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(rows, columns) from one number for both or from two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class Attended(NamedTuple):
    """The attention of one block on one image: sequences (windows) of tokens, each attended to by all heads."""

    sequences: int
    tokens: int  # of a sequence, padding included
    heads: int
    dim: int  # channels of a head


class LayerNorm(nn.LayerNorm):
    """torch's module, which takes the faster kernel where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ResidualNorm(LayerNorm):
    """x + keep * LN(branch): the norm behind a branch, with the addition that follows it (SwinV2 section 3.2).

    fused: one kernel for it all where it can run (kernels/rows.py); set from outside. Parameters are a LayerNorm's.
    """

    fused = False

    def forward(self, x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:  # type: ignore[override]  # of three
        """x, branch (B, ..., C); keep (B,) or None for 1."""
        if self.fused and can_run(x.device):
            return residual_norm(x, branch, keep, self.weight, self.bias, self.eps)
        return add_branch(x, super().forward(branch), keep)


class PatchEmbed(nn.Module):
    """(B, in_chans, h, w) images -> (B, H, W, C) map: each patch mapped linearly, then LayerNorm if norm_eps is given.

    Images that are no multiple of the patch are padded with zeros (the mean colour) at the bottom and right.
    """

    def __init__(self, patch_size: int, in_chans: int, width: int, norm_eps: float | None = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, width, patch_size, stride=patch_size)
        self.inputs = in_chans * patch_size**2  # numbers per patch; the weight's own shape is empty under ZeRO-3
        self.norm = nn.Identity() if norm_eps is None else LayerNorm(width, eps=norm_eps)

    def forward(self, images: Tensor) -> Tensor:
        patch = self.proj.stride[0]
        height, width = images.shape[-2:]
        if height % patch or width % patch:
            images = F.pad(images, (0, -width % patch, 0, -height % patch))
        return self.norm(self.proj(images).permute(0, 2, 3, 1))  # B H W C

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Tokens per side for images of (height, width) pixels."""
        patch = self.proj.stride[0]
        return math.ceil(image_size[0] / patch), math.ceil(image_size[1] / patch)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def biased(linear: nn.Linear, x: Tensor, bias: Tensor) -> Tensor:
    """A linear layer without a bias of its own, and this one; what replaced it in other precision does its product."""
    if type(linear) is nn.Linear:
        return F.linear(x, linear.weight, bias)
    out = linear(x)
    return out + bias.to(out.dtype)


def qkv_bias(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    """(3C,) bias of the joint projection of q, k, v. The keys have none, in BEiT as in SwinV2."""
    return torch.cat((q_bias, torch.zeros_like(q_bias), v_bias))


# --- drop path --------------------------------------------------------------------------------------------------------


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return word - (1 << 64) if word >> 63 else word


WORD = (1 << 64) - 1
GOLDEN = _signed(0x9E3779B97F4A7C15)  # increment and multipliers of splitmix64 (Steele, Lea, Flood 2014)
FIRST, SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


@lru_cache(maxsize=8)
def _steps(count: int, device: torch.device) -> Tensor:
    """(count,) int64: i * GOLDEN, i from 1.

    Wrapped here and not on the device: a compiler may take a multiplied arange for an index, whose arithmetic must not
    overflow (torch 2.14's inductor does, and gets other numbers).
    """
    with torch.inference_mode(False):  # kept for calls outside of it
        return torch.tensor([_signed(i * GOLDEN & WORD) for i in range(1, count + 1)], device=device)


def _mix(z: Tensor) -> Tensor:
    """splitmix64 finaliser on int64, which wraps; a shift right keeps the sign, so the copied bits are masked away."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * FIRST
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * SECOND
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def keep_masks(rates: Tensor, seed: int, numbers: Tensor) -> Tensor:
    """Which residual branches each sample keeps: (branches, B) float32 of 0 or 1 / (1 - rate), mean 1.

    rates: (branches,) chance of dropping, each in [0, 1). numbers: (B,) int64 sample numbers, same device.
    A pure function of (seed, number, position of the branch): the same for a sample in whatever batch, process or
    recomputation it appears.
    """
    states = _mix(_mix(numbers * GOLDEN) + torch.full_like(numbers, seed) * GOLDEN)  # B
    words = _mix(states + _steps(len(rates), numbers.device)[:, None])  # branches B
    uniform = ((words >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
    keep = 1.0 - rates.double()[:, None]
    return torch.where(uniform < keep, 1.0 / keep, 0.0).float()


def block_masks(model: Any, images: Tensor, numbers: Tensor | None) -> list[Tensor | None]:
    """(2, B) masks for the two branches of each block, from drop_path_rate, drop_path_seed and depths of a backbone.

    None for each where nothing is dropped (evaluation, rate 0). The rate rises linearly from 0 at the first block, as
    in both official repositories. Sample numbers that are missing are drawn at random.
    """
    depth = sum(model.depths)
    if not model.training or model.drop_path_rate == 0.0:
        return [None] * depth
    if numbers is None:
        numbers = torch.randint(0, 2**62, (len(images),), device=images.device)
    rates = torch.linspace(0.0, model.drop_path_rate, depth, dtype=torch.float64, device=images.device)
    masks = keep_masks(rates.repeat_interleave(2), model.drop_path_seed, numbers.to(images.device))
    return list(masks.view(depth, 2, -1).unbind(0))


def add_branch(x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """x + keep * branch; keep (B,) or None for 1."""
    if keep is None:
        return x + branch
    return torch.addcmul(x, branch, keep.to(x.dtype).view(-1, *[1] * (x.dim() - 1)))


# --- initialisation ---------------------------------------------------------------------------------------------------


def initial_value(model: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """The initial value of one parameter, on the CPU, by `model.init_parameter(name, tensor, generator)`.

    It depends on that rule, the name, the shape and the seed, and on nothing else: it is drawn in float32 with a
    generator of its own and then cast, so that neither the order of construction, the rank, the device nor the
    precision of a run changes a weight. The value starts as NaN; a parameter that `init_parameter` forgets is an
    AssertionError with its name.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    with torch.no_grad():
        value = torch.full(tuple(shape), math.nan, dtype=torch.float32, device="cpu")
        model.init_parameter(name, value, generator)
    assert not value.isnan().any(), f"{type(model).__name__}.init_parameter left {name} unset"
    return value.to(dtype)


def initialise(model: Any, seed: int) -> None:
    """Set every parameter of `model`, one at a time, to its `initial_value`. Nothing may be on the meta device."""
    for name, parameter in model.named_parameters():
        value = initial_value(model, name, parameter.shape, parameter.dtype, seed)
        with torch.no_grad():
            parameter.copy_(value)


def initialise_unless_meta(model: nn.Module) -> None:
    """The last line of a constructor: weights from torch's seed; on the meta device there is nothing to fill yet."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        initialise(model, torch.initial_seed())


def trunc_normal(tensor: Tensor, generator: torch.Generator, bound: float) -> None:
    """Normal with standard deviation 0.02 cut at +-bound."""
    nn.init.trunc_normal_(tensor, std=INIT_STD, a=-bound, b=bound, generator=generator)
