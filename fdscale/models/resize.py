"""Relative position tables of a ViT for another grid of patches, the way the official code does when it loads weights.

Shapes: s = 2n - 1 offsets on each axis of a square n x n grid, h x w the new grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdscale import UserError


def resize_table(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A relative position bias table for another grid of patches.

    table: (s^2 + 3, heads), s = 2 * side - 1 offsets on each axis of a square grid, then cls->token, token->cls and
    cls->cls, which are kept. grid: (h, w) patches. Returns ((2h-1)(2w-1) + 3, heads).

    The known offsets are put at geometrically growing distances 1, 1 + q, 1 + q + q^2, ... that reach as far as the
    new grid, and a not-a-knot bicubic spline through them is read at the new whole offsets: near offsets keep their
    meaning, far ones are stretched. So do SwinTransformer/Feature-Distillation and microsoft/SimMIM (utils.py), with
    scipy's removed interp2d and for square grids only; q lies in their [1.01, 1.5].
    Raises UserError for a table of no square grid, or of one smaller than 3 x 3.
    """
    height, width = 2 * grid[0] - 1, 2 * grid[1] - 1
    if table.ndim != 2 or len(table) == height * width + 3:
        return table
    side = math.isqrt(max(len(table) - 3, 0))
    if side * side + 3 != len(table) or side % 2 == 0 or side < 5:
        raise UserError(
            f"a relative position table of {len(table)} rows cannot be resized to a grid of {grid[0]} x {grid[1]}: "
            "expected (2n - 1)^2 + 3 rows of a square grid, n >= 3. Build the model with the grid of the weights."
        )
    offsets = table[:-3].double().unflatten(0, (side, side))  # (side, side, heads)
    down, across = (_geometric_resize(side, length, table.device) for length in (height, width))
    resized = torch.einsum("yi,xj,ijh->yxh", down, across, offsets)  # (height, width, heads)
    return torch.cat((resized.flatten(0, 1).to(table.dtype), table[-3:]))


def _geometric_resize(side: int, length: int, device: torch.device) -> Tensor:
    """(length, side) float64: reads a line of `side` offsets, spread geometrically, at `length` whole offsets."""
    if length == side:
        return torch.eye(side, dtype=torch.float64, device=device)
    steps, reach = side // 2, length // 2
    low, high = 1.01, 1.5
    for _ in range(60):  # bisection down to float64
        q = (low + high) / 2
        low, high = (low, q) if sum(q**k for k in range(steps)) > reach else (q, high)
    distance = (q ** torch.arange(steps, dtype=torch.float64, device=device)).cumsum(0)
    known = torch.cat((-distance.flip(0), distance.new_zeros(1), distance))
    asked = torch.arange(-reach, reach + 1, dtype=torch.float64, device=device)
    return spline_matrix(known, asked.clamp(known[0].item(), known[-1].item()))


def spline_matrix(known: Tensor, asked: Tensor) -> Tensor:
    """(len(asked), len(known)) float64: times the values at `known` gives the not-a-knot cubic spline at `asked`.

    known: at least 4 increasing numbers, asked: numbers between its ends. Solves for the slopes at the known points
    (C. de Boor, A Practical Guide to Splines, chapter IV), then evaluates Hermite's form on each interval.
    """
    n, gap = len(known), known.diff()
    unit = torch.eye(n, dtype=known.dtype, device=known.device)
    rise = unit.diff(dim=0) / gap[:, None]  # (n-1, n): divided differences
    system, right = torch.zeros_like(unit), torch.zeros_like(unit)
    for i in range(1, n - 1):  # equal second derivatives from both sides
        a, b = gap[i - 1], gap[i]
        system[i, i - 1], system[i, i], system[i, i + 1] = b, 2 * (a + b), a
        right[i] = 3 * (b * rise[i - 1] + a * rise[i])
    for row, beside, a, b, first, second in ((0, 1, gap[0], gap[1], 0, 1), (n - 1, n - 2, gap[-1], gap[-2], -1, -2)):
        system[row, row], system[row, beside] = b, a + b  # not-a-knot: equal third derivatives across the second point
        right[row] = ((3 * a + 2 * b) * b * rise[first] + a * a * rise[second]) / (a + b)
    slope = torch.linalg.solve(system, right)  # (n, n)
    at = (torch.searchsorted(known, asked, right=True) - 1).clamp(0, n - 2)  # the interval each asked number is in
    t, h = (asked - known[at])[:, None], gap[at][:, None]
    bend = (3 * rise[at] - 2 * slope[at] - slope[at + 1]) / h
    twist = (slope[at] + slope[at + 1] - 2 * rise[at]) / h**2
    return unit[at] + t * (slope[at] + t * (bend + t * twist))
