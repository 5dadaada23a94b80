"""The learning rate at every step: cosine against timm's CosineLRScheduler, poly and stairs against torch's."""

from __future__ import annotations

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from fdscale.engine.schedule import cosine, poly, stairs


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


@pytest.mark.parametrize("power", [1.0, 0.9, 2.0])
def test_poly_equals_torch_at_every_step(power: float) -> None:
    lr, steps = 6e-5, 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=power)
    for step in range(steps + 3):
        wanted = optimizer.param_groups[0]["lr"]
        assert poly(step, steps=steps, lr=lr, power=power) == pytest.approx(wanted, rel=1e-9, abs=1e-18)
        optimizer.step()
        theirs.step()


def test_polys_warm_up_is_mmcvs() -> None:
    """mmcv/runner/hooks/lr_updater.py: LrUpdaterHook.get_warmup_lr, linear, of the rate of PolyLrUpdaterHook."""
    lr, low, steps, warmup, ratio = 6e-5, 1e-6, 160, 15, 1e-2
    for step in range(steps):
        regular = (lr - low) * (1 - step / steps) ** 0.9 + low
        wanted = regular * (1 - (1 - step / warmup) * (1 - ratio)) if step < warmup else regular
        ours = poly(step, steps=steps, lr=lr, min_lr=low, warmup_steps=warmup, warmup_lr=ratio * lr, power=0.9)
        assert ours == pytest.approx(wanted, rel=1e-9)


def test_stairs_equal_torch_at_every_step() -> None:
    lr, steps, drops = 1e-4, 36, (0.75, 11 / 12)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[27, 33], gamma=0.1)
    for step in range(steps + 2):
        wanted = optimizer.param_groups[0]["lr"]
        assert stairs(step, steps=steps, lr=lr, drops=drops) == pytest.approx(wanted, rel=1e-9)
        optimizer.step()
        theirs.step()
    warm = [stairs(step, steps=steps, lr=lr, warmup_steps=4, warmup_lr=2e-5, drops=drops) for step in range(5)]
    assert warm == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 1e-4])
    assert stairs(40, steps=steps, lr=lr, min_lr=5e-6, drops=drops) == 5e-6
