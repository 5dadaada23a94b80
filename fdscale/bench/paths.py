"""The ways of computing window attention inside a network: those of memory.kernels, and two of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fdscale.bench import baselines
from fdscale.kernels import attention
from fdscale.models import swin_v2

OTHERS: dict[str, Callable[..., Tensor]] = {"official": baselines.official, "SDPA": baselines.sdpa}
FUSED = " and fused ops"  # norms and losses by kernels too, where the network has a switch for them


def names(module: nn.Module, device: torch.device, others: bool) -> tuple[list[str], dict[str, str]]:
    """What the network can be computed by, the reference first, and why the rest cannot."""
    unable = {name: why for name in attention.NAMES if (why := attention.cannot_run(name, device))}
    able = [name for name in attention.NAMES if name not in unable]
    switched = any(hasattr(part, "fused") for part in module.modules()) and device.type == "cuda"
    fused = [name + FUSED for name in able if switched and name not in ("reference", "torch")]
    return [*able, *fused, *(OTHERS if others else ())], unable


@contextmanager
def computed_by(name: str, module: nn.Module) -> Iterator[None]:
    """Within, all window attention of the network is computed by one of `names`. Windows are square."""
    kernels = name.removesuffix(FUSED)
    before = [(part, vars(part).get("kernels"), vars(part).get("fused")) for part in module.modules()]
    part: Any
    for part in module.modules():
        if hasattr(part, "kernels"):
            part.kernels = "reference" if kernels in OTHERS else kernels
        if hasattr(part, "fused"):
            part.fused = name.endswith(FUSED)
    ours: Any = swin_v2.window_attention
    if kernels in OTHERS:
        swin_v2.window_attention = _as_ours(OTHERS[kernels])
    try:
        yield
    finally:
        swin_v2.window_attention = ours
        for part, *switches in before:
            for switch, value in zip(("kernels", "fused"), switches, strict=True):
                if value is not None:
                    setattr(part, switch, value)
                elif switch in vars(part):  # the class says it again
                    delattr(part, switch)


def _as_ours(function: Callable[..., Tensor]) -> Any:
    @cache
    def constants(size: torch.Size, window: int, shift: int, device: torch.device) -> baselines.Constants:
        return baselines.constants_of(torch.empty(size, device=device), window, shift)

    def attend(
        qkv: Tensor, table: Tensor, scale: Tensor, window: tuple[int, int], shift: tuple[int, int], **_: Any
    ) -> Tensor:
        where = (window[0], shift[0])
        size = torch.Size((1, *qkv.shape[1:3], 1))
        return function(qkv, table, scale, *where, constants=constants(size, *where, qkv.device))

    return attend
