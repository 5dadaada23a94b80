"""Window attention by the CUDA kernels of kernels/cuda, for bf16 and fp16 and heads of 32 channels, on NVIDIA GPUs.

They are built on request (`python -m fdscale.kernels.build`) to one library that knows nothing of torch, and are called
through ctypes. All other dtypes and heads are computed by fused.py. Letters: as in kernels/cuda/problem.cuh.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale import UserError
from fdscale.kernels.places import on, places_of

LIBRARY = Path(__file__).with_name("libfdscale_cuda.so")
HEAD = 32  # channels
WARPS = 8  # of a block, at most
CHUNK = 24  # rows of patches in shared memory at a time, at most: what an A100 has room for
BLOCKS = 1024  # of the backward for q: enough for any GPU, and the same on all, since it decides the order of sums


@cache
def library() -> ctypes.CDLL:
    """The kernels' launchers. Raises OSError where they are not built, or not for this machine."""
    lib = ctypes.CDLL(str(LIBRARY))
    lib.window_attention_error.restype = ctypes.c_char_p
    return lib


def cannot_run(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None. Asked at every call: it must not look at the disk again."""
    try:
        lib = library()
    except OSError as error:
        if LIBRARY.exists():
            return f"its library cannot be loaded: {error}"
        return (
            "its library is not built (python -m fdscale.kernels.build does it; it needs nvcc, and the driver of that "
            "CUDA: 525.60 or later for 12, 580.65 or later for 13)"
        )
    if hasattr(lib, "emulator_seed"):  # the same source, compiled for a CPU: see tests/kernels/emulated
        return None
    if device.type != "cuda" or torch.version.hip:
        return "it needs an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, and this GPU has {major}.{minor}"


class Layout(NamedTuple):
    """How a window's tokens are cut into patches, and these given to warps."""

    patch: int  # columns of a patch of 8 tokens: 8 or 4
    tall: int  # pairs of patches that a warp holds: 2 or 3
    columns: int  # of patches
    rows: int  # of patches, whole tiles of warps
    walked: int  # rows with tokens, in whole chunks
    chunk: int  # rows in shared memory at a time
    warps: int
    groups: int
    exact: bool  # every slot that is walked over has a token

    @property
    def block_rows(self) -> int:
        """Rows of patches that the tiles of a block span, at most."""
        firsts = range(0, self.groups * self.warps, self.warps)
        spans = [(first + self.warps - 1) // self.columns - first // self.columns + 1 for first in firsts]
        return max(spans) * 2 * self.tall

    @property
    def part_cells(self) -> int:
        """Cells of the table that a block sees."""
        return ((self.block_rows + self.walked) * (8 // self.patch) - 1) * (2 * self.columns * self.patch - 1)


@cache
def layout_of(window: tuple[int, int], masked: bool) -> Layout:
    """The layout with the fewest slots; those first in which none stays empty.

    masked: there is a mask, or a map that is not whole windows.
    """
    found = []
    for patch, tall in ((8, 2), (4, 2), (4, 3)):
        high = 8 // patch
        columns, rows = -(-window[1] // patch), -(-window[0] // high)
        parts = -(-rows // CHUNK)
        chunk = -(-rows // (2 * parts)) * 2
        walked = chunk * parts
        rows = -(-walked // (2 * tall)) * 2 * tall
        tiles = columns * rows // (2 * tall)
        warps = max(w for w in range(1, WARPS + 1) if tiles % w == 0)
        exact = (walked * high, columns * patch) == window
        if tall == 2 or (exact and not masked):
            found.append(Layout(patch, tall, columns, rows, walked, chunk, warps, tiles // warps, exact))
    return min(found, key=lambda it: (not it.exact, it.columns * it.rows))


class Slots(NamedTuple):
    """Tokens and regions of all windows of a map in the order of a layout, (w, slots) int32; -1: there is none."""

    tokens: Tensor
    regions: Tensor


@lru_cache(maxsize=32)
def slots_of(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], layout: Layout, device: torch.device
) -> Slots:
    """Of a map of `size`."""
    places = places_of(size, window, shift, device)
    with torch.inference_mode(False):
        high = 8 // layout.patch
        slot = torch.arange(layout.columns * layout.rows * 8, device=device)
        patch, token = slot // 8, slot % 8
        y = patch % layout.rows * high + token // layout.patch
        x = patch // layout.rows * layout.patch + token % layout.patch
        there = (y < window[0]) & (x < window[1])
        place = torch.where(there, y * window[1] + x, 0)
        tokens = torch.where(there, places.tokens[:, place], -1)
        regions = torch.where(tokens >= 0, places.regions[:, place], -1)
        return Slots(tokens.int().contiguous(), regions.int().contiguous())


class Problem(ctypes.Structure):
    """As kernels/cuda/problem.cuh."""

    POINTERS = (
        *("qkv", "table", "logit_scale", "tokens", "regions", "out", "lse", "grad", "delta", "d_qkv"),
        *("table_parts", "scale_parts", "d_table", "d_scale"),
    )
    NUMBERS = (
        *("size", "heads", "windows", "count", "window_rows", "window_columns", "columns", "rows", "walked", "chunk"),
        *("warps", "groups", "shares", "block_rows"),
    )
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("masked", ctypes.c_float),
        *((name, ctypes.c_int) for name in NUMBERS),
        ("stream", ctypes.c_void_p),
    ]


class Job:
    """One call: its layout, and its problem as far as forward and backward share it."""

    def __init__(
        self,
        qkv: Tensor,
        table: Tensor,
        logit_scale: Tensor,
        window: tuple[int, int],
        shift: tuple[int, int],
        masked: float,
    ) -> None:
        batch, height, width, _ = qkv.shape
        self.heads, self.window, self.half = len(table), window, qkv.dtype == torch.float16
        self.masked = any(shift) or height % window[0] > 0 or width % window[1] > 0
        self.layout = layout_of(window, self.masked)
        slots = slots_of((height, width), window, shift, self.layout, qkv.device)
        self.count = batch * len(slots.tokens)
        self.tensors = {
            "qkv": aligned(qkv),
            "table": table.float().contiguous(),
            "logit_scale": logit_scale.float().contiguous(),
            "tokens": slots.tokens,
            "regions": slots.regions,
        }
        self.numbers = {
            **{"size": height * width, "heads": self.heads, "windows": len(slots.tokens), "count": self.count},
            **{
                "window_rows": window[0],
                "window_columns": window[1],
                "shares": 1,
                "masked": masked / 0.6931471805599453,
            },
            **{
                name: getattr(self.layout, name)
                for name in ("columns", "rows", "walked", "chunk", "warps", "groups", "block_rows")
            },
        }

    def run(self, name: str, numbers: dict[str, Any] | None = None, **tensors: Tensor) -> None:
        """Call window_attention_NAME. Raises UserError with what CUDA says where it fails."""
        device = tensors[next(iter(tensors))].device
        tensors = self.tensors | tensors
        on_gpu = device.type == "cuda"
        problem = Problem(
            **{key: tensor.data_ptr() for key, tensor in tensors.items()},
            **self.numbers | (numbers or {}),
            stream=torch.cuda.current_stream(device).cuda_stream if on_gpu else None,
        )
        masked = self.masked or not self.layout.exact
        arguments = (ctypes.byref(problem), int(self.half), self.layout.patch, self.layout.tall, int(masked))
        with on(device):
            error = getattr(library(), f"window_attention_{name}")(*arguments)
        if error:
            said = library().window_attention_error(error).decode()
            raise UserError(
                f"window attention by cuda failed ({name}, window {self.window}, {self.heads} heads): {said}; "
                "memory.kernels: triton computes the same"
            )

    def rows(self) -> Tensor:
        """One float32 for each query."""
        count = self.window[0] * self.window[1]
        return torch.empty(self.count, self.heads, count, device=self.tensors["qkv"].device)


def aligned(x: Tensor) -> Tensor:
    """Contiguous, from an address that 16 bytes divide."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def has_kernels(qkv: Tensor, heads: int) -> bool:
    """Whether it is computed here."""
    return qkv.dtype in (torch.bfloat16, torch.float16) and qkv.shape[3] == 3 * heads * HEAD


def forward(
    qkv: Tensor, table: Tensor, logit_scale: Tensor, window: tuple[int, int], shift: tuple[int, int], masked: float
) -> tuple[Tensor, Tensor]:
    """As `tiled.forward`; the second result is in another order, [n, h, N], and in units of log 2."""
    if not has_kernels(qkv, len(table)):
        from fdscale.kernels import fused  # imports triton

        return fused.forward(qkv, table, logit_scale, window, shift, masked)
    job = Job(qkv, table, logit_scale, window, shift, masked)
    out, lse = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3), job.rows()
    job.run("forward", out=out, lse=lse)
    padded = [-(-length // side) * side for length, side in zip(qkv.shape[1:3], window, strict=True)]
    return out, lse.view(len(qkv), job.heads, *padded)


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
    if not has_kernels(qkv, len(table)):
        from fdscale.kernels import fused

        return fused.backward(grad, qkv, table, logit_scale, out, lse, window, shift, masked)
    job = Job(qkv, table, logit_scale, window, shift, masked)
    layout = job.layout
    new: dict[str, Any] = {"device": qkv.device, "dtype": torch.float32}
    share = -(-job.count // -(-BLOCKS // (job.heads * layout.groups)))  # windows of a block
    shares = -(-job.count // share)
    d_qkv = torch.empty_like(job.tensors["qkv"])
    d_table, d_scale = torch.empty(table.shape, **new), torch.empty(logit_scale.shape, **new)
    parts = torch.empty(shares, job.heads, layout.groups, layout.part_cells, **new)
    job.run(
        "backward",
        {"shares": shares},
        grad=aligned(grad),
        out=out,
        lse=lse,
        delta=job.rows(),
        d_qkv=d_qkv,
        table_parts=parts,
        scale_parts=torch.empty(parts.shape[:3], **new),
        d_table=d_table,
        d_scale=d_scale,
    )
    return d_qkv, d_table.to(table.dtype), d_scale.to(logit_scale.dtype)
