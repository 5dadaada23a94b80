"""Which student token answers which teacher token.

The distillation loss compares feature maps token by token (arXiv 2205.14141, sec. 3), so both sides must list the same
tokens in the same order. `pair` works that out once, from the kinds of tokens before the grid and from the two grids.

Shapes: B images, L tokens, C channels, P paired prefix tokens, h x w the student's token grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale import UserError

RESAMPLE = ("bilinear", "bicubic", "area")


@dataclass(frozen=True)
class Pairing:
    """Brings both sides to (B, P + h * w, C): paired prefix tokens in the student's order, then the student's grid.

    Indices are positions among the tokens before the grid; tokens without a partner are dropped.
    """

    student_kept: tuple[int, ...]
    teacher_kept: tuple[int, ...]
    student_prefix: int
    teacher_prefix: int
    student_grid: tuple[int, int]
    teacher_grid: tuple[int, int]
    resample: str | None

    @property
    def tokens(self) -> int:
        """P + h * w."""
        return len(self.student_kept) + self.student_grid[0] * self.student_grid[1]

    def align_student(self, tokens: Tensor) -> Tensor:
        """(B, L, C) as the student gives them -> (B, P + h * w, C)."""
        grid = _after_prefix(tokens, self.student_prefix, self.student_grid, "student")
        return _joined(tokens, self.student_kept, grid)

    def align_teacher(self, tokens: Tensor) -> Tensor:
        """(B, L, C) as the teacher gives them -> (B, P + h * w, C), with a grid of another size resampled."""
        grid = _after_prefix(tokens, self.teacher_prefix, self.teacher_grid, "teacher")
        if self.teacher_grid != self.student_grid:
            assert self.resample is not None
            grid = _resampled(grid, self.teacher_grid, self.student_grid, self.resample)
        return _joined(tokens, self.teacher_kept, grid)


def pair(
    student_prefix: tuple[str, ...],
    student_grid: tuple[int, int],
    teacher_prefix: tuple[str, ...],
    teacher_grid: tuple[int, int],
    resample: str | None = None,
) -> Pairing:
    """Pairs the prefix tokens by kind (the n-th "reg" with the n-th "reg") and the grids place by place.

    student_prefix, teacher_prefix: kinds of the tokens before the grid, such as ("cls", "reg", "reg").
    student_grid, teacher_grid: (rows, columns) of tokens.
    resample: how the teacher's grid is brought to the student's where they differ: bilinear and bicubic (antialiased
    when shrinking) or area (mean of the covered cells). None: they must not differ. With equal grids it has no effect.

    Raises UserError if the grids differ and nothing is said about resampling, or for an unknown way of resampling.
    """
    student_grid, teacher_grid = (student_grid[0], student_grid[1]), (teacher_grid[0], teacher_grid[1])
    if resample is not None and resample not in RESAMPLE:
        raise UserError(f"teacher.resample: {resample!r} is unknown. Expected one of {', '.join(RESAMPLE)}, or null.")
    if student_grid != teacher_grid and resample is None:
        raise UserError(
            f"the student has {_times(student_grid)} tokens and the teacher {_times(teacher_grid)}, so they cannot be "
            "compared one to one. Choose image sizes (data.image_size, teacher.image_size) that give equal grids, or "
            f"have the teacher's resampled to {_times(student_grid)} with teacher.resample: bilinear | bicubic | area."
        )
    free = dict(enumerate(teacher_prefix))
    pairs = []
    for place, kind in enumerate(student_prefix):
        partner = next((other for other, other_kind in free.items() if other_kind == kind), None)
        if partner is not None:
            del free[partner]
            pairs.append((place, partner))
    return Pairing(
        student_kept=tuple(place for place, _ in pairs),
        teacher_kept=tuple(partner for _, partner in pairs),
        student_prefix=len(student_prefix),
        teacher_prefix=len(teacher_prefix),
        student_grid=student_grid,
        teacher_grid=teacher_grid,
        resample=resample,
    )


def _after_prefix(tokens: Tensor, prefix: int, grid: tuple[int, int], whose: str) -> Tensor:
    assert tokens.ndim == 3, tuple(tokens.shape)
    assert tokens.shape[1] == prefix + grid[0] * grid[1], (
        f"{whose}: {tokens.shape[1]} tokens, paired for {prefix} + {_times(grid)}"
    )
    return tokens[:, prefix:]


def _joined(tokens: Tensor, kept: tuple[int, ...], grid: Tensor) -> Tensor:
    if not kept:
        return grid
    return torch.cat([*(tokens[:, place : place + 1] for place in kept), grid], dim=1)  # (B, P + h * w, C)


def _resampled(tokens: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    maps = tokens.transpose(1, 2).unflatten(2, old)  # (B, C, rows, columns)
    smooth = {} if mode == "area" else {"antialias": True, "align_corners": False}
    maps = F.interpolate(maps, size=new, mode=mode, **smooth)
    return maps.flatten(2).transpose(1, 2)


def _times(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]}"
