"""Teacher: a frozen network that turns images in [0, 1] into the tokens a student learns.

What is distilled is the output of the last block after the teacher's own final norm, every token (official repository
SwinTransformer/Feature-Distillation, models/feature_distillation.py). models/teachers.py builds teachers.

Shapes: B images, H x W pixels, L = P + h * w tokens (P before the grid), C channels.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fdscale import UserError
from fdscale.models.eight_bit import EightBitLinear
from fdscale.models.layers import pair

Forward = Callable[[nn.Module, Tensor], Tensor]  # (network, normalised images) -> (B, L, C) or (B, C, h, w)


@dataclass(frozen=True)
class Parts:
    """A network and what is known of it. `forward` takes the network as an argument, so that a twin can be passed."""

    network: nn.Module
    forward: Forward
    prefix: tuple[str, ...]  # kinds of the tokens before the grid
    mean: Sequence[float]  # of RGB in [0, 1]
    std: Sequence[float]
    width: int | None = None  # None here and below: found by a dry run
    grid: Callable[[tuple[int, int]], tuple[int, int]] | None = None
    flops: Callable[[tuple[int, int]], int] | None = None
    mapped: bool = False  # whether its parameters are views into a weight file, of any dtype, meant as float32


class Teacher:
    """A frozen network. Call it with images to get the tokens a student learns.

    It is not an nn.Module, so it never becomes part of a trained module or of a checkpoint.

    prefix: kinds of the P tokens before the grid, such as ("cls", "reg"). image_size: the (H, W) it works at, or None
    where it takes the views as they are. network: the torch module itself, for diagnosis.
    """

    def __init__(
        self, parts: Parts, source: str, image_size: tuple[int, int] | None, dtype: torch.dtype, hold: str = "same"
    ):
        self.source, self.image_size, self.dtype, self.hold = source, image_size, dtype, hold
        self.prefix = tuple(parts.prefix)
        self.network = parts.network.requires_grad_(False).eval()
        self._parts, self._forward = parts, parts.forward
        self._mean = torch.tensor(parts.mean, dtype=torch.float32).view(1, 3, 1, 1)
        self._std = torch.tensor(parts.std, dtype=torch.float32).view(1, 3, 1, 1)
        self._dry_runs: dict[tuple[int, int], tuple[torch.Size, int]] = {}
        only_shapes = any(parameter.is_meta for parameter in self.network.parameters())
        self._mapped = parts.mapped
        self._fingerprint = "" if only_shapes else _hash_weights(self.network, parts.mean, parts.std, parts.mapped)
        if not parts.mapped:
            _hold_matrices(self.network, dtype, hold)

    @torch.no_grad()  # inference_mode would not do: the loss keeps its target for the backward
    def __call__(self, images: Tensor) -> Tensor:
        """Tokens (B, L, C), float32, without grad, of RGB images (B, 3, H, W) in [0, 1] on the teacher's device.

        H x W is the student's view; it is resized (bicubic, antialiased, clamped to [0, 1]) where the teacher has
        another size of its own. An autocast around the call has no effect: the teacher runs in its own dtype.
        """
        assert not self.network.training, "the teacher's network was switched to training mode"
        assert images.ndim == 4, tuple(images.shape)
        assert images.is_floating_point(), images.dtype
        if self._mapped:
            self.to("cpu")
        images = images.float()
        size = self.image_size or tuple(images.shape[-2:])
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        images = (images - self._mean) / self._std
        with _precision(images.device, self.dtype):
            output = self._forward(self.network, images)
        if output.ndim == 4:
            output = output.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h * w, C)
        return output.float()

    @property
    def is_ours(self) -> bool:
        """Whether the network is one of this project's, which takes kernels and policies as students do."""
        return self.source.startswith("fdscale:")

    def train(self, mode: bool = True) -> Teacher:
        """Does nothing: a teacher stays in eval mode."""
        return self

    def compile(self) -> None:
        """Let torch.compile compile the forward, at the first call and for each size of batch."""
        self._forward = torch.compile(self._parts.forward, dynamic=False)

    def to(self, device: torch.device | str) -> Teacher:
        """Moves the teacher, in place.

        What lies in a weight file is read here, one parameter at a time: host memory never holds it whole, but for the
        pages of the file, which the processes of a machine share.
        """
        if self._mapped and torch.device(device).type != "meta":
            _take_in([*self.network.modules()], torch.device(device), self.dtype, self.hold)
        self._mapped = False
        self.network.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def spread(self, device: torch.device, split: Callable[[nn.Module], None]) -> None:
        """Moves the teacher, in place, block by block, with `split` called on each as soon as it is there, and at last
        on a module whose forward is all that the teacher computes.

        Raises UserError where the network has no blocks.
        """
        blocks = self.blocks()
        inside = {part for block in blocks for part in block.modules()}
        for block in blocks:
            if self._mapped:
                _take_in([*block.modules()], device, self.dtype, self.hold)
            split(block.to(device))
        if self._mapped:
            _take_in([part for part in self.network.modules() if part not in inside], device, self.dtype, self.hold)
        self._mapped = False
        self.to(device)
        whole = _Whole(self.network, self._forward)
        split(whole)
        self._forward = lambda _, images: whole(images)

    def blocks(self) -> list[nn.Module]:
        """The network's blocks, from the input on. Raises UserError where it has none."""
        if self.is_ours:
            return self.network.blocks()  # type: ignore[operator, no-any-return]
        found = [part for name, part in self.network.named_modules() if re.search(r"(^|\.)blocks\.\d+$", name)]
        if not found:
            raise UserError(
                f"memory.teacher is sharded, and the teacher {self.source} has no blocks to share out; take replicated"
            )
        return found

    @property
    def width(self) -> int:
        """C, channels of a token."""
        if self._parts.width is not None:
            return self._parts.width
        shape, _ = self._dry_run(self.image_size or built_for(self.network))
        return shape[2] if len(shape) == 3 else shape[1]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the token grid for views of image_size = (H, W). UserError where the network refuses that size."""
        size = self.image_size or pair(image_size)
        if self._parts.grid is not None:
            return pair(self._parts.grid(size))
        shape, _ = self._dry_run(size)
        if len(shape) == 4:
            return pair(shape[2:])
        tokens = shape[1] - len(self.prefix)
        rows = round(math.sqrt(max(tokens, 0) * size[0] / size[1]))
        columns = tokens // max(rows, 1)
        if tokens <= 0 or rows * columns != tokens or rows * size[1] != columns * size[0]:
            raise UserError(
                f"the teacher {self.source} gives {shape[1]} tokens for a {size[0]} x {size[1]} image; without "
                f"{len(self.prefix)} before the grid {self.prefix} that is no grid of square patches. Wrap it as a "
                "python: teacher with a `grid` method."
            )
        return rows, columns

    def flops(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds (MACs) of one forward of one view of image_size = (H, W): matrix products and convolutions."""
        size = self.image_size or pair(image_size)
        return self._parts.flops(size) if self._parts.flops is not None else self._dry_run(size)[1]

    def fingerprint(self) -> str:
        """Identifies weights and normalisation, whatever file they came from: 32 hex digits, equal on all machines.

        Names, shapes and about 4096 evenly spread entries of every tensor, as loaded and before any cast, are hashed;
        for 3 billion parameters that takes a second. A network that was trained further, rounded or resized differs
        everywhere; a hand-made change of a few entries may go unseen.
        """
        assert self._fingerprint, "a teacher on the meta device has no weights"
        return self._fingerprint

    def without_content(self) -> tuple[nn.Module, Forward]:
        """The network in float32 on the meta device, and what it computes of normalised images; both are new."""
        return _twin(self.network), self._parts.forward

    def _dry_run(self, size: tuple[int, int]) -> tuple[torch.Size, int]:
        if size not in self._dry_runs:
            try:
                self._dry_runs[size] = dry_run(self.network, self._parts.forward, size, self.dtype)
            except Exception as error:  # every network refuses a size in its own way
                raise UserError(
                    f"the teacher {self.source} does not run on {size[0]} x {size[1]} images ({short(error)}). Give "
                    "teacher.image_size, the size it works at: views are then resized to it."
                ) from error
        return self._dry_runs[size]


class _Whole(nn.Module):
    """What a teacher computes, as the forward of one module."""

    def __init__(self, network: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.network, self._compute = network, forward

    def forward(self, images: Tensor) -> Tensor:
        return self._compute(self.network, images)


def _precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=None if dtype == torch.float32 else dtype, enabled=dtype != torch.float32)


def _hold_matrices(network: nn.Module, dtype: torch.dtype, hold: str) -> None:
    """Linear and Conv2d parameters in the autocast dtype: same products, half the memory, no cast in every call.

    Norms, position embeddings and the like stay in float32, as autocast wants them; so do subclasses, which may want
    float32 products, as the position MLP of our SwinV2 does. hold: "int8" or "fp8", for Linear (`EightBitLinear`).
    """
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if type(child) is nn.Linear and hold != "same":
                setattr(module, name, EightBitLinear(child.weight, child.bias, hold).eval())
            elif type(child) in (nn.Linear, nn.Conv2d):
                child.to(dtype)


def _take_in(modules: list[nn.Module], device: torch.device, dtype: torch.dtype, hold: str) -> None:
    """Their own parameters in memory of their own on the device, in float32, or as `_hold_matrices` has them."""
    for module in modules:
        for name, child in module.named_children():
            if type(child) is nn.Linear and hold != "same":
                bias = None if child.bias is None else child.bias.float()
                setattr(module, name, EightBitLinear(child.weight, bias, hold).to(device).eval())
        if type(module) is nn.Linear and hold != "same":  # it was replaced
            continue
        wanted = dtype if type(module) in (nn.Linear, nn.Conv2d) else torch.float32
        for parameter in module.parameters(recurse=False):
            value = parameter.data.to(torch.float32, copy=True)  # rounded from there, as ever
            parameter.data = value.to(device=device, dtype=wanted)


def _hash_weights(network: nn.Module, mean: Sequence[float], std: Sequence[float], mapped: bool) -> str:
    """Of what the network computes with before any cast; mapped: that is float32, whatever dtype a file has."""
    digest = hashlib.sha256(repr(([float(m) for m in mean], [float(s) for s in std])).encode())
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // 4096) | 1  # odd: even steps would stay in one column of most matrices
        some = flat[::step].float() if mapped and flat.is_floating_point() else flat[::step]
        digest.update(f"{name} {tuple(tensor.shape)} {some.dtype}".encode())
        digest.update(some.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


# --- dry runs ---------------------------------------------------------------------------------------------------------


def dry_run(
    network: nn.Module, forward: Forward, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[torch.Size, int]:
    """(output shape, multiply-adds) for one image of that size; nothing is computed where the network allows it."""
    try:
        return _counted(_twin(network), forward, torch.empty(1, 3, *size, device="meta"))
    except Exception:  # e.g. tensors that are neither parameters nor buffers; a refused size fails again below
        device = next(iter(network.parameters()), torch.empty(0)).device
        with _precision(device, dtype):
            return _counted(network, forward, torch.zeros(1, 3, *size, device=device))


@torch.no_grad()
def _counted(network: nn.Module, forward: Forward, images: Tensor) -> tuple[torch.Size, int]:
    # the math backend spells attention out as matrix products, which the counter sees on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = forward(network, images)
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"its output is {found}; expected tokens (B, L, C) or a map (B, C, h, w)")
    return output.shape, counter.get_total_flops() // 2


def _twin(network: nn.Module) -> nn.Module:
    """The network with float32 meta tensors in place of its parameters and buffers; costs no memory."""
    tensors: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta", dtype=torch.float32), requires_grad=False)
        for p in network.parameters()
    }
    tensors |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in network.buffers()}
    return copy.deepcopy(network, tensors)


def built_for(network: nn.Module) -> tuple[int, int]:
    """The image size a network with position embeddings was built for; 224 x 224 for any other."""
    size = getattr(getattr(network, "patch_embed", None), "img_size", None) or (224, 224)
    return pair(size)


def short(error: Exception) -> str:
    """The first line of an error that is somebody else's."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
