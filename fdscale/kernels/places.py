"""Where the tokens of each window lie in a map: what kernels read instead of rolling and cutting it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fdscale.kernels.reference import windows_of


class Places(NamedTuple):
    """The windows of one map, int32."""

    tokens: Tensor  # (w, N) token of the map (not padded) at each place, -1 for padding
    regions: Tensor  # (w, N) as in reference.Windows; zeros where nothing is masked
    cells: Tensor  # (N,) the table's cell of query i and key j is that in its middle + cells[i] - cells[j]


@lru_cache(maxsize=32)
def places_of(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Places:
    """The windows of a map of `size`, as the reference cuts it."""
    padding = (-size[0] % window[0], -size[1] % window[1])
    padded = (size[0] + padding[0], size[1] + padding[1])
    with torch.inference_mode(False):
        cut = windows_of(padded, padding, 1, window, shift, device)
        y, x = cut.order // padded[1], cut.order % padded[1]
        tokens = torch.where((y < size[0]) & (x < size[1]), y * size[1] + x, -1)
        regions = torch.zeros_like(tokens) if cut.region is None else cut.region
        place = torch.arange(window[0] * window[1], device=device)
        cells = place // window[1] * (2 * window[1] - 1) + place % window[1]
        shape = (-1, len(place))
        return Places(tokens.int().view(shape), regions.int().view(shape).contiguous(), cells.int())


def on(device: torch.device) -> AbstractContextManager:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
