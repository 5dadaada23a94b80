"""Teachers for trials that end badly."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """Patches of 8 x 8 pixels, each as one token."""

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images)


class Large(Plain):
    """As if more than four images at a time were too many."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().forward(images)


class Stuck(Plain):
    """Never returns, and says that it has begun."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = Path(mark)

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type != "meta":
            self.mark.touch()
            time.sleep(600)
        return super().forward(images)
