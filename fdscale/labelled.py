"""What the tasks of fine-tuning have in common: a backbone, a head on it, and labels from the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdscale import config, student
from fdscale.engine.metrics import Work
from fdscale.inputs import open_inputs


class Labelled:
    """The part of a `fdscale.job.Task` that does not depend on what the labels are of."""

    def __init__(self, settings: config.Config, world: int):
        self.inputs = open_inputs(settings, world)
        self.module = student.build_labelled(settings, student.build(settings))
        self._data = settings.data

    def goal(self) -> list[str]:
        """For a person: what the backbone becomes, as the end of a line, and further lines."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Nothing besides the settings and the data."""
        return {}

    def initial_values(self) -> Callable[[str, torch.Size], Tensor]:
        """Fresh heads, or those that fit, on the weights of the config."""
        return student.initial_values(self.inputs.settings, self.module)

    def place(self) -> None:
        """Nothing is outside the module; cuDNN is told to sum in a fixed order, or no run would go on as it was."""
        torch.backends.cudnn.deterministic = True

    def about(self) -> list[str]:
        """The backbone, what stands behind it, where its weights come from, and what computes."""
        settings = self.inputs.settings.student
        first, *more = self.goal()
        lines = [f"{settings.model} {first}", *more]
        if settings.weights is None:
            lines.append("student.weights is not set: the backbone began with random weights")
        return [*lines, *student.about_kernels(self.module.backbone)]

    def work(self) -> Work:
        """Of backbone and heads."""
        heads = self.module.head_flops((self._data.image_size,) * 2)
        return student.work_per_image(self.inputs.settings, self.module.backbone, heads=heads)
