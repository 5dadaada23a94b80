"""`fdscale bench attention`: window attention, forward and backward, against the official code and torch's own SDPA.

All ways go from the same map, table and scale to the same map, and back to their three gradients, so that rolls,
windows and bias are charged to all. They take turns in random order within one process; reported are medians, and the
median of the ratio within a round with its quartiles.

    official   microsoft/Swin-Transformer models/swin_transformer_v2.py, as it is written there
    SDPA       unit q and k, bias and mask as one tensor, torch's scaled_dot_product_attention
    others     memory.kernels, those of them that can run here

Letters: B images, H W map, C channels = h heads x d, N tokens of a window, w windows of a map.
"""

from __future__ import annotations

import json as json_module
import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale import dist
from fdscale.bench.data import in_turns, ratio
from fdscale.kernels import attention


class Shape(NamedTuple):
    """A layer of a published model, on so few images that a CPU is done in a moment."""

    layer: str
    batch: int
    side: int  # of the map
    window: int
    shift: int
    heads: int


SHAPES = (
    Shape("T/224, stage 1, shifted", 4, 56, 7, 3, 3),
    Shape("T/224, stage 3", 8, 14, 7, 0, 12),
    Shape("B/192, stage 2, shifted", 2, 24, 12, 6, 8),
    Shape("B/256, stage 1, shifted", 1, 64, 16, 8, 4),
    Shape("B/256, stage 3", 4, 16, 16, 0, 16),
    Shape("L/384, stage 3", 1, 24, 24, 0, 24),
    Shape("G/640, stage 3, 8 of its 64 heads", 1, 40, 40, 0, 8),
)
QUICK = (Shape("tiny", 1, 8, 4, 2, 2),)
HEAD = 32  # channels


def main(rounds: int, threads: int | None, quick: bool, json: str | None) -> int:
    """Measure, print Markdown, and write JSON."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = dist.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype),
        "rounds": 1 if quick else rounds,
        "layers": {},
    }
    for shape in QUICK if quick else SHAPES:
        result["layers"][shape.layer] = measure(shape, result["rounds"], device, dtype)
    print_tables(result)
    if json:
        Path(json).write_text(json_module.dumps(result, indent=1) + "\n")
    return 0


def measure(shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Wall seconds of forward, and of forward and backward, of every round; bytes kept for the backward."""
    leaves = random_inputs(shape, device, dtype)
    grad = torch.randn(*leaves[0].shape[:3], shape.heads * HEAD, device=device, dtype=dtype)
    found = {"shape": shape._asdict(), "kept_bytes": {}, "seconds": {}}
    forward, both = {}, {}
    for name, way in ways(shape, device).items():
        attend = under_autocast(way, device, dtype)
        forward[name] = partial(run_forward, attend, leaves)
        both[name] = partial(run_both, attend, leaves, grad)
        found["kept_bytes"][name] = kept_bytes(attend, leaves)
    for what, passes in (("forward", forward), ("forward and backward", both)):
        found["seconds"][what] = in_turns(passes, rounds)["wall"]
    return found


def random_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """qkv, table and logit scales of 10, 30 and 100, as leaves."""
    generator = torch.Generator().manual_seed(0)
    side = 2 * shape.window - 1
    qkv = torch.randn(shape.batch, shape.side, shape.side, 3 * shape.heads * HEAD, generator=generator)
    table = 16 * torch.randn(shape.heads, side, side, generator=generator).sigmoid()
    scale = torch.tensor([10.0, 30.0, 100.0]).log()[torch.arange(shape.heads) % 3]
    return [x.to(device).requires_grad_() for x in (qkv.to(dtype), table, scale)]


def ways(shape: Shape, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Functions of qkv, table and logit scale."""
    where = (shape.window, shape.shift)
    found = {"official": partial(_at, official, *where), "SDPA": partial(_at, sdpa, *where)}
    for name in attention.NAMES:
        if attention.cannot_run(name, device) is None:
            pairs = ((shape.window,) * 2, (shape.shift,) * 2)
            found[name] = partial(_at, partial(attention.window_attention, by=name), *pairs)
    return found


def _at(function: Callable[..., Tensor], window: Any, shift: Any, *leaves: Tensor) -> Tensor:
    return function(*leaves, window, shift)


def under_autocast(way: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The way as training calls it."""

    def attend(*leaves: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return way(*leaves)

    return attend


def run_forward(attend: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Without gradients, to its end."""
    with torch.no_grad():
        attend(*leaves)
    _wait(leaves[0].device)


def run_both(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> None:
    """Forward and backward, to their end."""
    torch.autograd.grad(attend(*leaves), leaves, grad)
    _wait(leaves[0].device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kept_bytes(attend: Callable[..., Tensor], leaves: list[Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward, without the leaves."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attend(*leaves)
    for leaf in leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values())


# ----------------------------------------------------------------------------------------------------------------------
# The ways of others


def official(
    qkv: Tensor, table: Tensor, logit_scale: Tensor, window: int, shift: int, masked: float = -100.0
) -> Tensor:
    """Window attention as in microsoft/Swin-Transformer swin_transformer_v2.py: rolls, windows, N x N bias and mask.

    Maps are whole windows; dtypes are as autocast or the inputs have them.
    """
    q, k, v = to_windows(qkv, len(table), window, shift)  # B w h N d each
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logits = logits * logit_scale.view(-1, 1, 1).clamp(max=math.log(1.0 / 0.01)).exp()
    logits = logits + bias(table, window)
    if shift:
        logits = logits + mask(qkv, window, shift, masked).to(logits.dtype)
    return from_windows(logits.softmax(-1).to(v.dtype) @ v, qkv, window, shift)


def sdpa(qkv: Tensor, table: Tensor, logit_scale: Tensor, window: int, shift: int) -> Tensor:
    """The same by torch's scaled_dot_product_attention, with one tensor for bias and mask."""
    q, k, v = to_windows(qkv, len(table), window, shift)
    scale = logit_scale.view(-1, 1, 1).clamp(max=math.log(1.0 / 0.01)).exp()
    q, k = (F.normalize(q, dim=-1) * scale).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
    added = bias(table, window)[None]  # w h N N
    if shift:
        added = added + mask(qkv, window, shift, -100.0)
    batch, windows, heads, *rest = q.shape
    added = added.to(v.dtype).expand(windows, -1, -1, -1).reshape(1, windows * heads, window**2, window**2)
    flat = [x.reshape(batch, windows * heads, *rest) for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*flat, attn_mask=added, scale=1.0)
    return from_windows(out.view(batch, windows, heads, *rest), qkv, window, shift)


def to_windows(qkv: Tensor, heads: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, W, 3C) -> q, k, v, (B, w, h, N, d) each."""
    batch, height, width, channels = qkv.shape
    x = qkv.roll((-shift, -shift), (1, 2)).view(batch, height // window, window, width // window, window, channels)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, window**2, 3, heads, channels // 3 // heads)
    q, k, v = x.permute(3, 0, 1, 4, 2, 5)
    return q, k, v


def from_windows(out: Tensor, qkv: Tensor, window: int, shift: int) -> Tensor:
    """(B, w, h, N, d) -> (B, H, W, C)."""
    batch, height, width, _ = qkv.shape
    out = out.transpose(2, 3).reshape(batch, height // window, width // window, window, window, -1)
    return out.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1).roll((shift, shift), (1, 2))


def bias(table: Tensor, window: int) -> Tensor:
    """(h, N, N) from a table of displacements."""
    y, x = torch.meshgrid(*(torch.arange(window, device=table.device),) * 2, indexing="ij")
    y, x = y.flatten(), x.flatten()
    return table[:, y[:, None] - y + window - 1, x[:, None] - x + window - 1]


def mask(qkv: Tensor, window: int, shift: int, masked: float) -> Tensor:
    """(w, 1, N, N): `masked` between tokens that the roll made neighbours."""
    _, height, width, _ = qkv.shape
    image, number = torch.zeros(height, width, device=qkv.device), 0
    for rows in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
        for columns in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            image[rows, columns] = number
            number += 1
    cut = image.view(height // window, window, width // window, window).permute(0, 2, 1, 3).reshape(-1, 1, window**2)
    return torch.zeros((), device=qkv.device).masked_fill(cut[..., None] != cut[..., None, :], masked)


def print_tables(result: dict[str, Any]) -> None:
    """Markdown: one row for each layer and way."""
    print(
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}, {result['dtype']}, "
        f"{result['rounds']} rounds\n"
    )
    for what in ("forward", "forward and backward"):
        print(f"| {what} | way | ms: median (least) | share of official's: median (quartiles) | kept, MB |")
        print("|---|---|---|---|---|")
        for layer, found in result["layers"].items():
            seconds = found["seconds"][what]
            for name, taken in seconds.items():
                milliseconds = f"{1e3 * statistics.median(taken):.2f} ({1e3 * min(taken):.2f})"
                kept = f"{found['kept_bytes'][name] / 1e6:.1f}"
                print(f"| {layer} | {name} | {milliseconds} | {ratio(seconds, name, 'official')} | {kept} |")
        print()
