"""Window attention by the kernels of triton_kernels.py, on NVIDIA GPUs from compute capability 8.0 on.

Neither forward nor backward has N x N scores in memory. Products are taken in the dtype of qkv (float32 as torch is set
to multiply it), all else in float32. Letters: as in tiled.py.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fdscale import UserError
from fdscale.kernels import triton_kernels as kernels
from fdscale.kernels.places import on, places_of
from fdscale.kernels.reference import MAX_LOGIT_SCALE

LOG2E = 1.0 / math.log(2.0)
PROGRAMS = 1024  # of the table's kernel: enough for any GPU, and the same on all, since it decides the order of sums


class Tile(NamedTuple):
    """Tokens of a window that a program holds, those that it walks over at a time, and how it is compiled."""

    held: int
    passing: int
    warps: int
    stages: int


# By channels of a head (up to 32, up to 64, more). None was timed: each is the largest of a few that spills no register
# on either architecture, which tests/kernels/test_compiled.py repeats.
TILES = {
    kernels.forward_kernel: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    kernels.backward_q_kernel: (Tile(64, 32, 4, 3), Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
    kernels.backward_kv_kernel: (Tile(64, 32, 4, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    kernels.backward_table_kernel: (Tile(64, 64, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
}


def tile_of(kernel: Any, window: tuple[int, int], dim: int) -> Tile:
    """The tile of a kernel; not much larger than the window."""
    held, passing, warps, stages = TILES[kernel][(dim > 32) + (dim > 64)]
    whole = max(16, triton.next_power_of_2(window[0] * window[1]))
    return Tile(min(held, whole), min(passing, whole), warps, stages)


def specialisation(kernel: Any, window: tuple[int, int], dim: int, dtype: torch.dtype, masked: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel, num_warps and num_stages among them."""
    held, passing, warps, stages = tile_of(kernel, window, dim)
    exact = torch.get_float32_matmul_precision() == "highest"
    common = {
        "N": window[0] * window[1],
        "D": dim,
        "DP": max(16, triton.next_power_of_2(dim)),
        "MASKED": masked,
        "WIDE": dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1",
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": warps,
        "num_stages": stages,
    }
    if kernel is kernels.backward_table_kernel:
        rows = max(1, min(window[0], held // window[1]))
        side = max(16, triton.next_power_of_2(rows * window[1]))
        sums = (2 * rows - 1) * (2 * window[1] - 1)
        return common | {"BM": side, "ROW": window[1], "PATCH": rows, "OUTPUTS": side * triton.cdiv(sums, side)}
    if kernel is kernels.backward_kv_kernel:
        return common | {"BN": held, "BM": passing}
    return common | {"BM": held, "BN": passing}


class Job:
    """What all kernels get for one call: tensors in the order of their arguments, sizes and constants."""

    def __init__(
        self,
        qkv: Tensor,
        table: Tensor,
        logit_scale: Tensor,
        window: tuple[int, int],
        shift: tuple[int, int],
        masked: float,
    ) -> None:
        if qkv.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"window attention by triton: qkv is {qkv.dtype}; expected float32, bfloat16 or float16")
        self.batch, *self.size, channels = qkv.shape
        self.heads, self.window, self.device = len(table), window, qkv.device
        dim, self.count = channels // (3 * self.heads), window[0] * window[1]
        places = places_of((self.size[0], self.size[1]), window, shift, qkv.device)
        self.windows = self.batch * len(places.tokens)  # of all images
        scale = logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp() * LOG2E
        bias = (table.float() * LOG2E).contiguous()
        self.inputs = (qkv.contiguous(), bias, scale, places.tokens, places.cells, places.regions)
        area = table[0].numel()
        self.sizes = (math.prod(self.size), self.heads, len(places.tokens), area, max(masked * LOG2E, -1e30))
        self._what = (window, dim, qkv.dtype, any(shift))

    def specialisation(self, kernel: Any) -> dict[str, Any]:
        """As the function of this name."""
        return specialisation(kernel, *self._what)

    def rows(self) -> Tensor:
        """One float32 for each query."""
        return torch.empty(self.windows, self.heads, self.count, device=self.device)

    def blocks(self, kernel: Any) -> int:
        """Programs of a kernel for each head: those of all windows."""
        return self.windows * triton.cdiv(self.count, tile_of(kernel, *self._what[:2]).held)

    def walk(self, kernel: Any, *tensors: Tensor) -> None:
        """Run a kernel over all windows."""
        kernel[(self.blocks(kernel), self.heads)](*tensors, *self.sizes, **self.specialisation(kernel))


def forward(
    qkv: Tensor, table: Tensor, logit_scale: Tensor, window: tuple[int, int], shift: tuple[int, int], masked: float
) -> tuple[Tensor, Tensor]:
    """As `tiled.forward`; the second result is in another order, [n, h, N], and in units of log 2."""
    job = Job(qkv, table, logit_scale, window, shift, masked)
    with on(qkv.device):
        out, lse = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), job.rows()
        job.walk(kernels.forward_kernel, *job.inputs, out, lse)
    padded = [-(-length // side) * side for length, side in zip(job.size, window, strict=True)]
    return out, lse.view(job.batch, job.heads, *padded)


def backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    logit_scale: Tensor,
    out: Tensor,
    lse: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int],
    masked: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `tiled.backward`."""
    job = Job(qkv, table, logit_scale, window, shift, masked)
    grad = grad.contiguous()
    with on(qkv.device):
        d_qkv, delta = torch.empty_like(job.inputs[0]), job.rows()
        d_scale = torch.empty(job.blocks(kernels.backward_q_kernel), job.heads, device=qkv.device)
        job.walk(kernels.backward_q_kernel, grad, *job.inputs, out, lse, d_qkv, delta, d_scale)
        job.walk(kernels.backward_kv_kernel, grad, *job.inputs, lse, delta, d_qkv)
        d_table = _backward_table(job, grad, lse, delta)
    d_scale = d_scale.sum(0).masked_fill_(logit_scale >= MAX_LOGIT_SCALE, 0.0)
    return d_qkv, d_table.to(table.dtype), d_scale.to(logit_scale.dtype)


def _backward_table(job: Job, grad: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """(h, 2 Wh - 1, 2 Ww - 1) float32."""
    constants = job.specialisation(kernels.backward_table_kernel)
    rows, patches = constants["PATCH"], triton.cdiv(job.window[0], constants["PATCH"])
    shifts, across = 2 * patches - 1, 2 * job.window[1] - 1
    share = triton.cdiv(job.windows, triton.cdiv(PROGRAMS, shifts * job.heads))  # windows of a program
    shares = triton.cdiv(job.windows, share)
    parts = torch.empty(shares, shifts, job.heads, constants["OUTPUTS"], device=grad.device)
    tensors = (grad, *job.inputs, lse, delta, parts)
    kernels.backward_table_kernel[(shifts, job.heads, shares)](*tensors, *job.sizes, job.windows, share, **constants)
    sums = parts.sum(0)[..., : (2 * rows - 1) * across].unflatten(-1, (2 * rows - 1, across)).transpose(0, 1)
    # A displacement of patches writes those of rows on both sides of it. Each half, over all of them, is a table.
    whole = sums.new_zeros(job.heads, (shifts + 1) * rows, across)
    whole[:, rows:] += sums[:, :, rows - 1 :].flatten(1, 2)
    whole[:, :-rows] += F.pad(sums[:, :, : rows - 1], (0, 0, 1, 0)).flatten(1, 2)
    first = patches * rows - (job.window[0] - 1)
    return whole[:, first : first + 2 * job.window[0] - 1].contiguous()
