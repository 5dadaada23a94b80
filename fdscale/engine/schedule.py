"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine(
    step: int, *, steps: int, lr: float, min_lr: float = 0.0, warmup_steps: int = 0, warmup_lr: float = 0.0
) -> float:
    """Linear warm-up from warmup_lr to lr over warmup_steps, then the cosine of the whole run from lr to min_lr.

    The cosine counts from step 0, not from the end of the warm-up, as timm's CosineLRScheduler(t_initial=steps,
    warmup_t=warmup_steps, t_in_epochs=False) does, which the official repository uses. After the last step the rate
    stays at min_lr.
    """
    if step < warmup_steps:
        return warmup_lr + step * (lr - warmup_lr) / warmup_steps
    if step >= steps:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1.0 + math.cos(math.pi * step / steps))


def poly(
    step: int,
    *,
    steps: int,
    lr: float,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    warmup_lr: float = 0.0,
    power: float = 1.0,
) -> float:
    """(1 - step / steps) ^ power, of the whole run from lr to min_lr, times a linear warm-up.

    The warm-up goes from warmup_lr / lr to 1 over warmup_steps and multiplies the rate that falls already, as mmcv's
    PolyLrUpdaterHook with warmup="linear" does. After the last step the rate stays at min_lr.
    """
    if step >= steps:
        return min_lr
    rate = min_lr + (lr - min_lr) * (1.0 - step / steps) ** power
    if step >= warmup_steps or lr == 0:
        return rate
    return rate * (1.0 - (1.0 - step / warmup_steps) * (1.0 - warmup_lr / lr))


def stairs(
    step: int,
    *,
    steps: int,
    lr: float,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    warmup_lr: float = 0.0,
    drops: Sequence[float] = (),
) -> float:
    """Linear warm-up from warmup_lr to lr, then lr, a tenth of it from each of these shares of the run on.

    As torchvision's and mmdetection's for detectors; never below min_lr.
    """
    rate = max(min_lr, lr * 0.1 ** sum(step >= round(share * steps) for share in drops))
    if step < warmup_steps:
        return warmup_lr + step * (rate - warmup_lr) / warmup_steps
    return rate
