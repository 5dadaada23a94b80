"""`fdscale bench fused`: the ops of kernels/rows.py against the same expression in eager torch and by torch.compile.

Forward and backward in the dtype of training (bf16 on a GPU, float32 on a CPU), at the shapes of published models. The
ways take turns in random order; reported are medians, the ratio within a round with its quartiles, and what autograd
keeps from forward to backward. On a GPU times are those between CUDA events, one pair around several calls; on a CPU
there are no kernels, and it shows only that the rest runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale import dist
from fdscale.bench import tables
from fdscale.bench.attention import kept_bytes
from fdscale.bench.timing import in_turns, ratio, save
from fdscale.kernels import rows

CALLS = 20  # between two events
ROUNDS = 30
KEEP = 0.8  # of the samples, at a drop path rate of 0.2


class Shape(NamedTuple):
    """B images with a map of side x side tokens of C channels; the window of its copy."""

    layer: str
    batch: int
    side: int
    channels: int
    window: int


SHAPES = (
    Shape("SwinV2-T/224, stage 1", 128, 56, 96, 7),
    Shape("SwinV2-B/256, stage 3", 64, 16, 512, 16),
    Shape("SwinV2-G/640, stage 1", 2, 160, 512, 40),
    Shape("SwinV2-G/640, stage 3", 2, 40, 2048, 40),
)
QUICK = (Shape("tiny", 2, 6, 16, 4),)
Way = Callable[..., Tensor]


def main(quick: bool, json: Path | None) -> int:
    """Measure, print Markdown, and write JSON."""
    print(table(measure(dist.device(), quick, json)))
    return 0


def measure(device: torch.device, quick: bool = False, path: Path | None = None) -> dict[str, Any]:
    """Seconds of one forward and backward in every round, and bytes kept, by op, layer and way.

    quick, and always on a CPU: one small shape and one round. path: where JSON goes after each op of each shape.
    """
    gpu = device.type == "cuda"
    quick = quick or not gpu
    dtype = torch.bfloat16 if gpu else torch.float32
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        "torch": torch.__version__,
        "dtype": str(dtype),
        "rounds": 1 if quick else ROUNDS,
        "ops": {},
    }
    for shape in QUICK if quick else SHAPES:
        for op, (leaves, ways) in cases(shape, device, dtype).items():
            passes = {name: partial(seconds_of, way, leaves, 1 if quick else CALLS) for name, way in ways.items()}
            result["ops"].setdefault(op, {})[shape.layer] = {
                "seconds": in_turns(passes, result["rounds"])["wall"],
                "kept_bytes": {name: kept_bytes(way, leaves) for name, way in ways.items()},
            }
            if path:
                save(path, result)
        torch.compiler.reset()  # the next shapes are compiled for themselves, not for any size
    return result


def cases(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[list[Tensor], dict[str, Way]]]:
    """By op: its leaves, and the ways to compute it from them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    whole = (shape.batch, shape.side, shape.side, shape.channels)
    keep = torch.where(torch.rand(shape.batch, generator=generator) < KEEP, 1 / KEEP, 0.0).to(device)
    tokens = normal(*whole).float()
    window, shift = (shape.window,) * 2, (shape.window // 2,) * 2

    def norm(by: Way, x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return by(x, branch, keep, weight, bias, 1e-5)

    def loss(by: Way, prediction: Tensor) -> Tensor:
        return by(prediction, tokens, 2.0).mean()

    def cut(by: Way, x: Tensor) -> Tensor:
        return by(x, window, shift)

    found: dict[str, tuple[list[Tensor], dict[str, Way]]] = {}
    for op, leaves, plain, fused in (
        (
            "residual, drop path and norm",
            [normal(*whole), normal(*whole), normal(shape.channels), normal(shape.channels)],
            partial(norm, rows.plain_residual_norm),
            partial(norm, rows.residual_norm),
        ),
        (
            "whitening and smooth-L1",
            [normal(*whole)],
            partial(loss, rows.plain_token_losses),
            partial(loss, rows.token_losses),
        ),
        (
            "into shifted windows, and gradients back",
            [normal(*whole)],
            partial(cut, rows.plain_window_partition),
            partial(cut, rows.window_partition),
        ),
    ):
        ways: dict[str, Callable[..., Tensor]] = {"eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
        if rows.can_run(device):
            ways["triton"] = fused
        found[op] = ([x.requires_grad_() for x in leaves], ways)
    return found


def seconds_of(way: Way, leaves: list[Tensor], calls: int) -> float:
    """Of one forward and backward, on average over so many."""
    device = leaves[0].device

    def run() -> None:
        for _ in range(calls):
            out = way(*leaves)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / calls
    with torch.cuda.device(device):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / calls


def table(result: dict[str, Any]) -> str:
    """Markdown: one row for each op, layer and way."""
    lines = []
    for op, layers in result["ops"].items():
        for layer, found in layers.items():
            for name, taken in found["seconds"].items():
                milliseconds = f"{1e3 * statistics.median(taken):.3f} ({1e3 * min(taken):.3f})"
                kept = f"{found['kept_bytes'][name] / 1e6:.1f}"
                lines.append((op, layer, name, milliseconds, ratio(found["seconds"], name, "torch.compile"), kept))
    head = ("op", "layer", "way", "forward and backward, ms: median (least)", "share of torch.compile's", "kept, MB")
    about = f"{result['device']}, torch {result['torch']}, {result['dtype']}, {result['rounds']} rounds"
    return tables.paragraphs(about, tables.table(head, lines))
