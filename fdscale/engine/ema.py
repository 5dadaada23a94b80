"""A moving average of the weights, kept beside the Adam moments: in float32, partitioned as they are, never gathered.

After every update that is applied, average = decay * average + (1 - decay) * weights. It starts as the initial weights.
Saving, loading at another world or stage, and export take it as one more vector of `fdscale.engine.state`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from fdscale.engine import state as local

PIECE = 1 << 24  # elements that change places at a time


def keep(engine: Any, decay: float) -> None:
    """Average the weights of an engine from now on."""
    local.create_moments(engine, 0)  # AdamW makes them only where it finds no state at all
    base = local.base_optimizer(engine)
    for master in local.masters(engine):
        base.state[master][local.EMA] = master.detach().clone()
    base.register_step_post_hook(functools.partial(_update, decay=decay))


@torch.no_grad()
def _update(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any, *, decay: float) -> None:
    """Follow the weights that this step has updated: at stage 3 DeepSpeed steps group by group."""
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    averages = [optimizer.state[master][local.EMA] for master in masters]
    skipped = getattr(optimizer, "found_inf", None)  # of torch's fused AdamW, which decides on the device
    if skipped is None:
        torch._foreach_lerp_(averages, masters, 1 - decay)
        return
    weight = (1 - decay) * (1 - skipped)
    for average, master in zip(averages, masters, strict=True):
        average.lerp_(master, weight)


@contextlib.contextmanager
def in_place_of_weights(engine: Any) -> Iterator[None]:
    """The average takes the place of the weights, which come back to the last bit; a collective at both ends.

    Not while a save copies the state.
    """
    _swap(engine)
    try:
        yield
    finally:
        _swap(engine)


@torch.no_grad()
def _swap(engine: Any) -> None:
    states = local.base_optimizer(engine).state
    for master in local.masters(engine):
        pieces = (tensor.view(-1).split(PIECE) for tensor in (master, states[master][local.EMA]))
        for weights, average in zip(*pieces, strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
    local.refresh(engine)
