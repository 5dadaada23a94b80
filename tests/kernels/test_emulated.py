"""What the CUDA kernels are emulated in: its layouts are those of the PTX ISA, and it finds what is wrong with one."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow


class Given(ctypes.Structure):
    """As in emulated/probe.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("a", "b", "rows", "out", "tiles")] + [("what", ctypes.c_int)]


def bits(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_product_of_fragments_as_the_isa_lays_them_out(probe, dtype):
    """PTX ISA 8.5, 9.7.14.5.8: row and column of element i of a lane, with groupID and threadID_in_group."""
    random = np.random.default_rng(0)
    left = torch.from_numpy(random.standard_normal((16, 16))).to(dtype)
    right = torch.from_numpy(random.standard_normal((16, 8))).to(dtype)
    a, b = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            a[lane, i] = left[row, column].view(torch.int16).item() & 0xFFFF
        for i in range(4):
            row = thread * 2 + (i & 1) + (8 if i >= 2 else 0)
            b[lane, i] = right[row, group].view(torch.int16).item() & 0xFFFF
    out = np.zeros((32, 4), np.float32)
    given = Given(a=a.ctypes.data, b=b.ctypes.data, out=out.ctypes.data)
    assert probe.product(ctypes.byref(given), int(dtype == torch.float16)) == 0
    expected = (left.double() @ right.double()).numpy()
    for lane in range(32):
        for i in range(4):
            row = (lane >> 2) + (0 if i < 2 else 8)
            assert math.isclose(out[lane, i], expected[row, lane % 4 * 2 + (i & 1)], rel_tol=1e-5, abs_tol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_from_shared_memory_as_the_isa_lays_them_out(probe, transposed):
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)  # tile, row, column
    padded = np.zeros((32 * 8 + 8,), np.uint16)
    start = -padded.ctypes.data % 16 // 2
    padded[start : start + 256] = rows.ravel()
    tiles = np.zeros((32, 4), np.uint32)
    given = Given(rows=padded.ctypes.data + 2 * start, tiles=tiles.ctypes.data, what=int(transposed))
    assert probe.tiles(ctypes.byref(given)) == 0
    for lane in range(32):
        for tile in range(4):
            matrix = rows[tile].T if transposed else rows[tile]
            first, second = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            assert tiles[lane, tile] == int(first) | int(second) << 16


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (2, "some threads wait for others that have ended"),
        (3, "some threads wait|different places"),
        (4, "written beside shared memory"),
        (5, "a tile's row is not in shared memory"),
    ],
)
def test_a_kernel_that_is_wrong_is_found(probe, what, said):
    out = np.zeros(64, np.float32)
    given = Given(out=out.ctypes.data, what=what)
    assert probe.wrong(ctypes.byref(given)) == 1
    text = probe.text().decode()
    assert any(part in text for part in said.split("|")), text


@pytest.mark.parametrize("what", [0, 1])
def test_a_kernel_that_does_not_wait_reads_nan(probe, what):
    out, memory = np.zeros(64, np.float32), np.zeros(32 * 8 + 8, np.uint16)
    given = Given(out=out.ctypes.data, rows=memory.ctypes.data + -memory.ctypes.data % 16, what=what)
    assert probe.wrong(ctypes.byref(given)) == 0
    assert np.isnan(out).any()
