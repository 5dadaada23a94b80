"""Maps and windows for the tests of window attention, the official formula, and a meter of live memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# map, window, shift: whole windows, one window, shifts along both axes and one, padded maps, maps within a window
CASES = [
    ((8, 8), (4, 4), (0, 0)),
    ((4, 4), (4, 4), (0, 0)),
    ((8, 12), (4, 4), (2, 2)),
    ((6, 12), (2, 6), (1, 3)),
    ((4, 8), (4, 4), (0, 2)),
    ((7, 10), (4, 4), (0, 0)),
    ((7, 10), (4, 4), (2, 2)),
    ((9, 5), (4, 3), (2, 1)),
    ((3, 8), (4, 4), (0, 2)),
    ((2, 3), (4, 5), (0, 0)),
]


def inputs(
    size: tuple[int, int], window: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv of 2 images, 2 heads of 3 channels; table; logit scales of which one is clamped."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, *size, 3 * 2 * 3, generator=generator, dtype=torch.float64)
    table = 16 * torch.rand(2, 2 * window[0] - 1, 2 * window[1] - 1, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), table.to(dtype), torch.tensor([1.5, 9.0], dtype=dtype)


def official(qkv: Tensor, table: Tensor, logit_scale: Tensor, window: int, shift: int, mask: float = -100.0) -> Tensor:
    """Window attention as microsoft/Swin-Transformer models/swin_transformer_v2.py writes it: rolls, partitions, N x N
    bias and mask. Maps are whole windows; differentiable; dtypes as autocast or the inputs have them."""
    batch, height, width, channels = qkv.shape
    heads, count = len(table), window**2
    cut = (batch, height // window, window, width // window, window)
    x = qkv.roll((-shift, -shift), (1, 2)).view(*cut, channels).permute(0, 1, 3, 2, 4, 5)
    q, k, v = x.reshape(-1, count, 3, heads, channels // 3 // heads).permute(2, 0, 3, 1, 4)
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logits = logits * logit_scale.view(-1, 1, 1).clamp(max=math.log(1.0 / 0.01)).exp()
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    logits = logits + table[:, y[:, None] - y + window - 1, x[:, None] - x + window - 1]
    if shift:
        image, number = torch.zeros(height, width), 0
        for rows in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            for columns in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
                image[rows, columns] = number
                number += 1
        region = image.view(cut[1:]).permute(0, 2, 1, 3).reshape(-1, count)
        apart = torch.zeros(()).masked_fill(region[:, None] != region[:, :, None], mask).to(logits.dtype)
        logits = (logits.view(batch, -1, heads, count, count) + apart[:, None]).view(-1, heads, count, count)
    out = logits.softmax(-1).to(v.dtype) @ v
    out = out.transpose(1, 2).reshape(batch, *cut[1:4:2], window, window, -1).permute(0, 1, 3, 2, 4, 5)
    return out.reshape(batch, height, width, -1).roll((shift, shift), (1, 2))


def gradients(out: Tensor, leaves: list[Tensor], rounded: torch.dtype = torch.float64) -> list[Tensor]:
    """Those of the leaves for one random gradient of `out`, which is first rounded to a dtype."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(rounded)
    return list(torch.autograd.grad(out, leaves, grad.to(out.dtype)))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it made and that are still alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.now()  # a freed storage's address may be taken again
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result
