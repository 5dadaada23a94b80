"""The learning rate against timm's CosineLRScheduler, at every step."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from fdscale.engine.schedule import cosine


@pytest.mark.parametrize(
    ("steps", "warmup", "warmup_lr", "min_lr"), [(50, 0, 0.0, 0.0), (100, 10, 1e-6, 1e-5), (7, 3, 2e-4, 0.0)]
)
def test_equals_timm_at_every_step(steps: int, warmup: int, warmup_lr: float, min_lr: float) -> None:
    lr = 1.2e-3
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    timm = CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=min_lr,
        warmup_t=warmup,
        warmup_lr_init=warmup_lr,
        cycle_limit=1,
        t_in_epochs=False,
    )
    for step in range(steps + 3):
        timm.step_update(step)
        ours = cosine(step, steps=steps, lr=lr, min_lr=min_lr, warmup_steps=warmup, warmup_lr=warmup_lr)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
