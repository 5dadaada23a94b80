"""Parameter groups and the optimizer: which weights decay, and how fast each layer learns."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from fdscale import UserError


def param_groups(model: Any, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """One group per (layer, decayed or not): dicts with params, names, lr, lr_scale, weight_decay.

    The model says what belongs where: `no_decay()` are the names without weight decay, `depth_of(name)` is 0 at the
    input and largest at the output; a layer's rate is lr * layer_decay ** (largest - depth). Every trainable parameter
    is in exactly one group. Raises UserError when the model names a parameter that it does not have.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    undecayed = model.no_decay()
    unknown = undecayed - {name for name, _ in model.named_parameters()}
    if unknown:
        raise UserError(
            f"{type(model).__name__}.no_decay() names parameters that do not exist: {', '.join(sorted(unknown)[:5])}"
        )
    depths = {name: model.depth_of(name) for name in trainable}
    top = max(depths.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        decays = name not in undecayed
        # Without layer decay all layers share a rate, and two groups are enough.
        layer = depths[name] if layer_decay != 1.0 else top
        if (layer, decays) not in groups:
            scale = layer_decay ** (top - layer)
            group = {
                "params": [],
                "names": [],
                "lr": lr * scale,
                "lr_scale": scale,
                "weight_decay": weight_decay if decays else 0.0,
            }
            groups[layer, decays] = group
        groups[layer, decays]["params"].append(parameter)
        groups[layer, decays]["names"].append(name)
    ordered = [groups[key] for key in sorted(groups)]
    placed = [name for group in ordered for name in group["names"]]
    assert sorted(placed) == sorted(trainable), "every trainable parameter must be in exactly one group"
    return ordered


def set_lr(optimizer: Any, lr: float) -> None:
    """Set the rate of every group to lr times its layer's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def adamw(
    groups: list[dict[str, Any]],
    betas: tuple[float, float],
    eps: float,
    *,
    stage: int = 0,
    offloaded: bool = False,
    fused: str = "auto",
) -> torch.optim.Optimizer:
    """AdamW: torch's fused one, NVIDIA apex's, or DeepSpeed's CPU one where the optimizer state is offloaded.

    stage: of ZeRO. fused: torch, apex, or auto, which is apex's on a GPU where it is installed and the stage allows it.
    Raises UserError when apex is asked for and cannot be had.
    """
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, betas=betas, eps=eps, adamw_mode=True)
    if fused == "apex" or (fused == "auto" and torch.cuda.is_available()):
        problem, kind = _apex(stage)
        if kind is not None:
            return kind(groups, betas=betas, eps=eps, adam_w_mode=True)
        if fused == "apex":
            raise UserError(f"optim.fused is apex, but {problem}; --set optim.fused=torch does without")
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def _apex(stage: int) -> tuple[str, Any]:
    """(why not, None), or ("", apex's FusedAdam)."""
    if stage == 3:
        return "it counts updates wrongly at ZeRO 3, which steps in parts", None
    try:
        importlib.import_module("amp_C")  # its kernels; an apex built without them fails only when it is constructed
        from apex.optimizers import FusedAdam
    except ImportError:
        missing = "NVIDIA's apex with its CUDA extensions is not installed (`fdscale doctor` says how to get it)"
        return missing, None
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if stage and FusedAdam not in ZERO_SUPPORTED_OPTIMIZERS:
        return "this DeepSpeed does not know it as an optimizer for ZeRO", None
    return "", FusedAdam
