"""The least time that window attention can take on a device: work that nothing avoids, at rates measured there.

A fused kernel must at least read and write what goes in and out, take one exponential for each score, forward and again
backward, and multiply matrices: two products forward, five backward. The floor is the longest of the three. Counted for
16-bit maps; per token and head of d channels, forward: q, k, v, the result and a log-sum-exp, 8 d + 4 bytes; backward:
those, the gradients of the result, of q, of k and of v, 16 d + 4 bytes. Tables are a little on top.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale.bench.attention import HEAD, Shape
from fdscale.bench.timing import times

CHAIN = 32  # exponentials one after the other, so that they take longer than reading and writing
SECONDS = 0.3  # of each measurement
LARGE, SMALL = 2**28, 2**16  # float32 numbers of a copy, on a GPU and on a CPU


class Rates(NamedTuple):
    """What a device does in a second, each measured alone; 0: it could not be measured."""

    bytes: float  # read and written by a large copy
    exps: float
    flops: float  # of a large product of matrices in 16 bits


def measure(device: torch.device) -> Rates:
    """Medians, on random numbers."""
    gpu = device.type == "cuda"
    count = LARGE if gpu else SMALL
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copied_s = _median(lambda: target.copy_(source), device)
    few = source[: count // 16]
    try:
        chain = torch.compile(_chain, dynamic=False) if gpu else _chain  # else each step reads and writes
        exps = CHAIN * len(few) / _median(lambda: chain(few), device)
    except Exception as error:  # whatever a compiler raises: the floor then lacks them
        print(f"exponentials are not measured: {error}", file=sys.stderr)
        exps = 0.0
    side = 8192 if gpu else 256
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    product_s = _median(lambda: left @ right, device)
    return Rates(2 * source.nbytes / copied_s, exps, 2 * side**3 / product_s)


def _chain(x: Tensor) -> Tensor:
    for _ in range(CHAIN):
        x = torch.exp2(-x)
    return x


def _median(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        call()
    return statistics.median(times([call], SECONDS, device))


def counts(shape: Shape) -> dict[str, Rates]:
    """Bytes, exponentials and floating-point operations of forward and backward."""
    rows = shape.batch * shape.size[0] * shape.size[1] * shape.heads  # tokens of all heads
    scores = rows * shape.window**2
    table = 4 * shape.heads * (2 * shape.window - 1) ** 2
    forward = Rates(rows * (8 * HEAD + 4) + table, scores, 4 * HEAD * scores)
    backward = Rates(rows * (16 * HEAD + 4) + 3 * table, scores, 10 * HEAD * scores)
    return {"forward": forward, "backward": backward}


def floors(shape: Shape, rates: Rates) -> dict[str, dict[str, float | str]]:
    """Seconds of forward and backward, and which of bytes, exps and flops they are."""
    found: dict[str, dict[str, float | str]] = {}
    for what, work in counts(shape).items():
        seconds = {name: getattr(work, name) / rate for name, rate in rates._asdict().items() if rate}
        binds = max(seconds, key=lambda name: seconds[name])
        found[what] = {"seconds": seconds[binds], "binds": binds}
    return found
