"""What the heads of a transformer look at: the attention of every block, as it computes, and what can be said of it.

Definitions, where the figures of arXiv 2205.14141 leave them open: what a query gives to a class token, to register
tokens and to padding is left out, and the rest of its row is scaled to sum to 1; distances are between the centres of
patches on the image, in pixels, also where windows are shifted; rows of class tokens are no queries.

Letters: B images, w windows of a map (1 where all tokens see each other), h heads, N tokens of a window, T tokens of a
map, L blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdscale import UserError
from fdscale.kernels.reference import places_of
from fdscale.models.swin_v2 import SwinV2
from fdscale.models.vit import ViT


class Attended(NamedTuple):
    """The attention of one block on some images.

    weights: (B, w, h, N, N) float32, rows of queries, each summing to 1. places: (w, N, 2) int64, row and column of
    each token on the map; -1 for class tokens and padding. cell: pixels from one token to the next, down and across.
    """

    weights: Tensor
    places: Tensor
    cell: tuple[float, float]

    def on_the_map(self) -> Attended:
        """The same without class tokens, and without padding, whose rows and columns are 0; rows scaled to sum to 1."""
        real = (self.places >= 0).all(-1)
        weights, places = self.weights, self.places
        if len(real) == 1:
            kept = real[0].nonzero()[:, 0].to(weights.device)
            weights, places, real = weights[..., kept, :][..., kept], places[:, real[0]], real[:, real[0]]
        inside = real.to(weights.device)
        weights = weights * inside[:, None, None, :] * inside[:, None, :, None]
        return Attended(weights / weights.sum(-1, keepdim=True).clamp_min(1e-12), places, self.cell)


See = Callable[[int, Attended], None]


@contextmanager
def watched(network: nn.Module, size: tuple[int, int], see: See) -> Iterator[None]:
    """Within it, each block of a network that computes on images of (height, width) calls see(its number, attention).

    For fdscale's ViT and SwinV2, and timm's ViT, BEiT, Swin and Swin V2 with all of their attention classes alike.
    Raises UserError for others.
    """
    handles = []
    found = list(_blocks(network))
    if not found:
        raise UserError(
            f"no block of {type(network).__name__} has attention that can be looked at; see docs/diagnose.md"
        )
    fused = [(attn, attn.fused_attn) for _, attn in found if getattr(attn, "fused_attn", False)]
    for attn, _ in fused:
        attn.fused_attn = False
    for number, (block, attn) in enumerate(found):
        if hasattr(attn, "weights"):
            seen = functools.partial(_ours, see, number, size)
            handles.append(attn.register_forward_pre_hook(seen))
        else:
            seen = functools.partial(_timms, see, number, size, network, block)
            handles.append(attn.attn_drop.register_forward_pre_hook(seen))
            if hasattr(block, "window_size"):
                handles.append(block.register_forward_pre_hook(_note_size))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for attn, was in fused:
            attn.fused_attn = was


@contextmanager
def block_outputs(network: nn.Module, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within it, each block that `watched` knows calls see(its number, what it gives: (B, N, C) or (B, h, w, C))."""

    def given(number: int, block: nn.Module, arguments: Any, output: Any) -> None:
        see(number, (output[0] if isinstance(output, tuple) else output).detach())

    handles = [
        block.register_forward_hook(functools.partial(given, number))
        for number, (block, _) in enumerate(_blocks(network))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def has_attention(network: nn.Module) -> bool:
    """Whether `watched` finds a block in it."""
    return next(_blocks(network), None) is not None


def _blocks(network: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Every block with its attention, from the input on."""
    if isinstance(network, (ViT, SwinV2)):
        blocks = network.blocks if isinstance(network, ViT) else network.blocks()
        yield from ((block, block.attn) for block in blocks)
        return
    for module in network.modules():
        attn = getattr(module, "attn", None)
        if isinstance(getattr(attn, "attn_drop", None), nn.Module):
            yield module, attn


def _ours(see: See, number: int, size: tuple[int, int], attn: Any, arguments: tuple[Any, ...]) -> None:
    with torch.no_grad():
        weights = attn.weights(*arguments)
        x = arguments[0]
        if weights.ndim == 4:
            see(number, Attended(weights[:, None], *_grid(attn.grid, 1, size)))
            return
        grid = (x.shape[1], x.shape[2])
        places = places_of(grid, attn.window, attn.shift(*grid))
        see(number, Attended(weights, places, (size[0] / grid[0], size[1] / grid[1])))


def _note_size(block: Any, arguments: tuple[Any, ...]) -> None:
    block.seen_size = tuple(arguments[0].shape[1:3])


def _timms(
    see: See, number: int, size: tuple[int, int], network: Any, block: Any, _: Any, arguments: tuple[Tensor, ...]
) -> None:
    weights = arguments[0].detach().float()  # (B w, h, N, N)
    if hasattr(block, "window_size"):
        grid = block.seen_size
        places = timm_places(grid, block.window_size, block.shift_size)
        cell = (size[0] / grid[0], size[1] / grid[1])
        see(number, Attended(weights.unflatten(0, (-1, len(places))), places, cell))
        return
    patches: Any = getattr(network, "patch_embed", None)
    grid = patches.dynamic_feat_size(size) if hasattr(patches, "dynamic_feat_size") else None
    first = weights.shape[-1] - math.prod(grid) if grid is not None else -1
    if grid is None or first < 0:
        raise UserError(f"{type(network).__name__} attends to {weights.shape[-1]} tokens, which are no grid of patches")
    see(number, Attended(weights[:, None], *_grid(grid, first, size)))


def _grid(grid: tuple[int, int], first: int, size: tuple[int, int]) -> tuple[Tensor, tuple[float, float]]:
    """Places and cell of a map in one sequence behind `first` tokens that are not on it."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack((rows.flatten(), columns.flatten()), 1)
    places = torch.cat((torch.full((first, 2), -1), places))
    return places[None], (size[0] / grid[0], size[1] / grid[1])


def timm_places(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """As `places_of`, for timm, which rolls before it pads where fdscale and torchvision pad first."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    map_ = torch.stack((rows, columns), -1).roll((-shift[0], -shift[1]), (0, 1))
    down, across = -grid[0] % window[0], -grid[1] % window[1]
    map_ = torch.nn.functional.pad(map_, (0, 0, 0, across, 0, down), value=-1)
    height, width = map_.shape[:2]
    cut = map_.view(height // window[0], window[0], width // window[1], window[1], 2)
    return cut.transpose(1, 2).reshape(-1, window[0] * window[1], 2)
