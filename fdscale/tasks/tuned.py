"""A backbone with what a task puts behind it: what all of these have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

PREFIX = "backbone."


class Tuned(nn.Module):
    """The backbone's parameters are called backbone.*, whatever else there is stands behind it."""

    undecayed: tuple[str, ...] = ()  # parts of names of further parameters without weight decay

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def head_flops(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds of all that stands behind the backbone; none worth counting unless a task says so."""
        return 0

    def depth_of(self, name: str) -> int:
        """Layer-decay id of a parameter; all that is behind the backbone belongs to the output."""
        if name.startswith(PREFIX):
            return self.backbone.depth_of(name.removeprefix(PREFIX))
        return sum(self.backbone.depths) + 1

    def no_decay(self) -> set[str]:
        """Parameters without weight decay: the backbone's, norms and biases."""
        own = {
            name
            for name, value in self.named_parameters()
            if not name.startswith(PREFIX) and (value.ndim == 1 or any(part in name for part in self.undecayed))
        }
        return own | {f"{PREFIX}{name}" for name in self.backbone.no_decay()}
