"""What is measured of attention, block by block, over any number of images in memory that does not grow with them.

Letters as in `attention`: B images, w windows, h heads, N tokens of a window.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale import dist
from fdscale.diagnose.attention import Attended


class Look(NamedTuple):
    """The heads of one block; every number is a mean over images, and over the windows of a map where there are any.

    distance: (h,) pixels between a query and what it looks at: sum of weight x Euclidean distance, mean over queries.
    spread: (h,) its standard deviation over images. similarity: (h, h) cosine of heads' maps, flattened. average:
    (h, N, N) the maps. offsets: (h, 2 Wh - 1, 2 Ww - 1) mean weight at (key - query), down and across.
    diagonality, columns: (h,) share of the variance of an average map's entries that is explained by the offset alone,
    by the key alone; 0 where all entries are equal. images: how many.
    """

    distance: Tensor
    spread: Tensor
    similarity: Tensor
    average: Tensor
    offsets: Tensor
    diagonality: Tensor
    columns: Tensor
    cell: tuple[float, float]
    window: tuple[int, int]
    images: int

    def likeness(self) -> float:
        """Mean cosine of two different heads; NaN where there is one."""
        count = len(self.similarity)
        return (
            float((self.similarity.sum() - self.similarity.diagonal().sum()) / max(count * (count - 1), 1))
            if (count > 1)
            else float("nan")
        )


class Heads:
    """Gathers the attention of one block."""

    def __init__(self) -> None:
        self._images = 0
        self._sums: dict[str, Tensor] = {}
        self._cell: tuple[float, float] | None = None
        self._window = (0, 0)

    def add(self, attended: Attended, counted: Tensor | None = None) -> None:
        """Some images. counted: (B,) which of them; None: all. Raises ValueError where maps differ in shape."""
        attended = attended.on_the_map()
        weights = attended.weights if counted is None else attended.weights[counted.to(attended.weights.device)]
        places = attended.places.to(weights.device)
        if self._cell not in (None, attended.cell):
            raise ValueError("images of one size were expected")
        self._cell, self._window = attended.cell, window_of(attended.places)
        real = (places >= 0).all(-1)  # w N
        pairs = (real[:, :, None] & real[:, None]).double()
        where = places.double() * torch.tensor(attended.cell, device=weights.device, dtype=torch.float64)
        apart = (where[:, :, None] - where[:, None]).norm(dim=-1) * pairs  # w N N
        distance = torch.einsum("bwhij,wij->bh", weights.double(), apart) / real.sum()
        flat = weights.transpose(1, 2).flatten(2)  # B h (w N N)
        flat = flat / flat.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        self._images += len(weights)
        self._gather("distance", distance.sum(0))
        self._gather("squares", distance.square().sum(0))
        self._gather("similarity", (flat @ flat.transpose(1, 2)).double().sum(0))
        self._gather("maps", weights.sum((0, 1)).double())
        self._gather("times", pairs.sum(0) * len(weights))

    def _gather(self, name: str, value: Tensor) -> None:
        value = value.cpu()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def result(self) -> Look:
        """Of all images of all ranks; a collective. Raises ValueError where there are none."""
        images = int(dist.total(torch.tensor(self._images)))
        if not images or self._cell is None:
            raise ValueError("no image was seen")
        sums = {name: dist.total(value.clone()) for name, value in sorted(self._sums.items())}
        mean = sums["distance"] / images
        average = sums["maps"] / sums["times"].clamp_min(1)
        offsets, diagonality, columns = by_offset(average, sums["times"], self._window)
        return Look(
            mean,
            (sums["squares"] / images - mean.square()).clamp_min(0).sqrt(),
            sums["similarity"] / images,
            average,
            offsets,
            diagonality,
            columns,
            self._cell,
            self._window,
            images,
        )


def window_of(places: Tensor) -> tuple[int, int]:
    """Rows and columns of a window, from `places` (w, N, 2) without class tokens."""
    first = next(one for one in places if (one >= 0).all()) if len(places) > 1 else places[0]
    columns = int((first[:, 0] == first[0, 0]).sum())
    return len(first) // columns, columns


def by_offset(average: Tensor, times: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(h, 2 Wh - 1, 2 Ww - 1) means by offset, and (h,) the shares of variance that offset and key explain.

    average: (h, N, N); times: (N, N) how often a pair was there; pairs that never were are left out.
    """
    rows, columns = window
    y, x = (part.flatten() for part in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    down, across = y - y[:, None], x - x[:, None]  # key - query
    offset = ((down + rows - 1) * (2 * columns - 1) + across + columns - 1).flatten()
    key = torch.arange(rows * columns).expand(rows * columns, -1).flatten()
    kept = (times > 0).flatten()
    values = average.flatten(1)[:, kept]
    means = grouped(values, offset[kept], (2 * rows - 1) * (2 * columns - 1))
    return (
        means.view(-1, 2 * rows - 1, 2 * columns - 1),
        explained(values, means[:, offset[kept]]),
        explained(values, grouped(values, key[kept], rows * columns)[:, key[kept]]),
    )


def grouped(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """(h, M) values and (M,) their groups -> (h, groups) means, 0 of an empty one."""
    sums = values.new_zeros(len(values), groups).index_add_(1, group, values)
    return sums / group.bincount(minlength=groups).clamp_min(1)


def explained(values: Tensor, fit: Tensor) -> Tensor:
    """(h,) 1 - residual variance / variance of (h, M); 0 where there is none."""
    about = (values - values.mean(1, keepdim=True)).square().sum(1)
    rest = (values - fit).square().sum(1)
    scale = values.square().sum(1)
    share = (1 - rest / about.clamp_min(1e-300)).clamp(0, 1)
    return torch.where(about > 1e-20 * scale, share, 0.0)


def as_data(look: Look) -> dict[str, Any]:
    """Plain numbers of a block, without its maps."""
    return {
        "distance_px": look.distance.tolist(),
        "distance_std_px": look.spread.tolist(),
        "distance_cells": (look.distance / (look.cell[0] * look.cell[1]) ** 0.5).tolist(),
        "similarity": None if math.isnan(look.likeness()) else look.likeness(),
        "diagonality": look.diagonality.tolist(),
        "columns": look.columns.tolist(),
        "window": list(look.window),
        "cell_px": list(look.cell),
    }
