"""`fdscale bench attention`: window attention, forward and backward, against the official code and torch's own SDPA.

All ways go from the same map, table and scale to the same map, and back to their three gradients, so that rolls,
windows and bias are charged to all. They take turns in random order within one process.

On a CPU: a few layers, wall time in float32; reported are medians, and the median of the ratio within a round with its
quartiles. On a GPU: the layers of SwinV2-G in bf16 by the protocol of bench/protocol.py.

Letters: B images, H W map, C channels = h heads x d, N tokens of a window, w windows of a map.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale import UserError, dist
from fdscale.bench.baselines import official, sdpa
from fdscale.bench.timing import in_turns, ratio, save
from fdscale.kernels import attention


class Shape(NamedTuple):
    """A layer of a published model."""

    layer: str
    batch: int
    side: int  # of the map
    window: int
    shift: int
    heads: int
    columns: int = 0  # of the map, where it is not square

    @property
    def size(self) -> tuple[int, int]:
        """Of the map."""
        return self.side, self.columns or self.side


SHAPES = (  # on so few images that a CPU is done in a moment
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


def main(
    rounds: int | None,
    threads: int | None,
    quick: bool,
    json: Path | None,
    seconds: float,
    limit: float | None,
    compiled: int | None,
    resume: bool,
) -> int:
    """Measure, print Markdown, and write JSON. `rounds` counts on a CPU, what follows `json` on a GPU."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    device = dist.device()
    if resume and not json:
        raise UserError("--resume goes on with the layers of a file: name it with --json")
    if device.type == "cuda":
        from fdscale.bench import protocol

        rows = protocol.QUICK if quick else protocol.ROWS
        return protocol.run(rows, device, protocol.Effort(seconds, limit, compiled), json, resume)
    result: dict[str, Any] = {
        "device": "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(torch.float32),
        "rounds": 1 if quick else rounds or 12,
        "layers": {},
    }
    for shape in QUICK if quick else SHAPES:
        result["layers"][shape.layer] = measure(shape, result["rounds"])
    print_tables(result)
    if json:
        save(json, result)
    return 0


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Wall seconds of forward, and of forward and backward, of every round; bytes kept for the backward."""
    device = torch.device("cpu")
    leaves = random_inputs(shape, device, torch.float32)
    grad = torch.randn(*leaves[0].shape[:3], shape.heads * HEAD)
    found = {"shape": shape._asdict(), "kept_bytes": {}, "seconds": {}}
    forward, both = {}, {}
    for name, attend in ways(shape, device).items():
        forward[name] = partial(run_forward, attend, leaves)
        both[name] = partial(run_both, attend, leaves, grad)
        found["kept_bytes"][name] = kept_bytes(attend, leaves)
    for what, passes in (("forward", forward), ("forward and backward", both)):
        found["seconds"][what] = in_turns(passes, rounds)["wall"]
    return found


def random_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """qkv, table and logit scales of 10, 30 and 100, as leaves."""
    generator = torch.Generator(device).manual_seed(seed)
    side = 2 * shape.window - 1
    size = (shape.batch, *shape.size, 3 * shape.heads * HEAD)
    qkv = torch.randn(size, generator=generator, device=device)
    table = 16 * torch.randn(shape.heads, side, side, generator=generator, device=device).sigmoid()
    scale = torch.tensor([10.0, 30.0, 100.0], device=device).log()[torch.arange(shape.heads, device=device) % 3]
    return [x.requires_grad_() for x in (qkv.to(dtype), table, scale)]


def ways(shape: Shape, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Functions of qkv, table and logit scale."""
    where = (shape.window, shape.shift)
    return {"official": partial(_at, official, *where), "SDPA": partial(_at, sdpa, *where), **ours(shape, device)[0]}


def ours(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """Those of memory.kernels that can run there, and why the others cannot."""
    found: dict[str, Callable[..., Tensor]] = {}
    left_out = {}
    pairs = ((shape.window,) * 2, (shape.shift,) * 2)
    for name in attention.NAMES:
        if why := attention.cannot_run(name, device):
            left_out[name] = why
        else:
            found[name] = partial(_at, partial(attention.window_attention, by=name), *pairs)
    return found, left_out


def _at(function: Callable[..., Tensor], window: Any, shift: Any, *leaves: Tensor) -> Tensor:
    return function(*leaves, window, shift)


def run_forward(attend: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Without gradients."""
    with torch.no_grad():
        attend(*leaves)


def run_both(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> None:
    """Forward and backward."""
    torch.autograd.grad(attend(*leaves), leaves, grad)


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
