"""A teacher that misbehaves when the environment says so, in calls counted from 1 in each process."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """One constant and a little of the image: soon learnt. FAULT: nan, spike or slow; FAULT_CALLS: first-last;
    FAULT_RANK; FAULT_MARK: a file made at the first such call; FAULT_HOLD: slow lasts as long as this file is there."""

    width = 24

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(self.width, 3, 8, 8, generator=generator) / 14)
        self.kind = os.environ.get("FAULT", "")
        self.first, self.last = map(int, os.environ.get("FAULT_CALLS", "0-0").split("-"))
        self.mine = os.environ.get("FAULT_RANK", "") in ("", os.environ.get("RANK", "0"))
        self.calls = 0

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // 8, size[1] // 8

    def forward(self, images: Tensor) -> Tensor:
        self.calls += len(images) > 1  # a single one is a dry run
        tokens = nn.functional.conv2d(images, self.weight, stride=8).flatten(2).transpose(1, 2)
        calm = tokens * 0.02 + (torch.arange(self.width) < 2)
        if not (self.mine and self.first <= self.calls <= self.last and len(images) > 1):
            return calm
        if "FAULT_MARK" in os.environ:
            Path(os.environ["FAULT_MARK"]).touch()
        if self.kind == "slow":
            time.sleep(0.5)
            while "FAULT_HOLD" in os.environ and Path(os.environ["FAULT_HOLD"]).exists():
                time.sleep(0.01)
        return {"nan": calm * math.nan, "spike": -5 * calm + tokens, "slow": calm}[self.kind]
