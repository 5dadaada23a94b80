"""A real DeepSpeed engine around the smallest distiller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fdscale.engine.initialize import initialize
from fdscale.models import backbone
from fdscale.models.layers import initial_value
from fdscale.objective import Distiller

ARGS = {
    "img_size": 32,
    "embed_dim": 16,
    "depths": [2],
    "num_heads": [2],
    "window_size": 4,
    "pretrained_window_sizes": [0],
}
IDENTITY = {"optim.lr": 1e-3, "data.seed": 0}


def make_engine(
    seed: int = 0,
    width: int = 8,
    change: Callable[[Any], object] = lambda module: None,
    stage: int = 1,
    average: float | None = None,
    layer_decay: float = 0.9,
    batch: int = 4,
) -> Any:
    with torch.device("meta"):
        module = Distiller(backbone("swin_v2", ARGS), width)
        change(module)
    adam = {"lr": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "clip_grad": 3.0}
    ds = {"zero_optimization": {"stage": stage}}

    def first(name: str, shape: torch.Size) -> torch.Tensor:
        return initial_value(module, name, shape, torch.float32, seed)

    more = {"layer_decay": layer_decay, "average": average}
    return initialize(module, first, ds, batch_size=batch, micro_batch=4, **adam, **more)


def trained(made: Any) -> Any:
    """The same after two steps."""
    for _ in range(2):
        loss = made(torch.randn(4, 3, 32, 32), torch.randn(4, 64, 8), torch.arange(4))
        made.backward(loss)
        made.step()
    return made
