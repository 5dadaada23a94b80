"""Networks: students (`swin_v2`, `vit`), teachers, and conversion of weights between them and the world."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fdscale import UserError

SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "depths", "num_heads", "window_size", "mlp_ratio")
BACKBONES = {"swin_v2": "SwinV2", "vit": "ViT"}  # module and class
OWN = "python:"
PROTOCOL = (  # see docs/design.md
    "forward", "maps", "levels", "blocks", "depths", "depth_of", "no_decay", "width", "stride", "prefix", "grid",
    "attended", "flops", "init_parameter",
)  # fmt: skip


def backbone(model: str, args: Mapping[str, Any], where: str = "student.args") -> nn.Module:
    """Build one of our backbones by name, or python:MODULE:CLASS.

    Raises UserError for an unknown name or constructor argument, and for a class without the protocol of a backbone.
    """
    build = _class_of(model)
    known = list(inspect.signature(build).parameters)
    unknown = sorted(set(args) - set(known))
    if unknown:
        raise UserError(f"{where}: {model} has no argument {unknown[0]}; it has {', '.join(known)}")
    for name, value in args.items():
        _check(name, value, f"{where}.{name}")
    try:
        network = build(**args)
    except (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: {model} cannot be built: {error}") from error
    missing = [name for name in PROTOCOL if not hasattr(network, name)]
    if missing:
        raise UserError(f"{model} lacks {', '.join(missing)}, which a backbone has; see docs/tutorial-backbone.md")
    return network


def _class_of(model: str) -> Any:
    if model in BACKBONES:
        return getattr(importlib.import_module(f"fdscale.models.{model}"), BACKBONES[model])
    if not model.startswith(OWN):
        raise UserError(f"unknown backbone {model!r}; known: {', '.join(BACKBONES)}, {OWN}MODULE:CLASS")
    module, _, name = model.removeprefix(OWN).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(
            f"student.model: {model} cannot be imported ({error}). Expected {OWN}MODULE:CLASS with a module that is "
            "installed or on PYTHONPATH."
        ) from error


def _check(name: str, value: Any, where: str) -> None:
    """Sizes are positive, one number or a list; the drop path rate is a probability below 1."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if name in SIZES and not all(type(n) in (int, float) and n > 0 for n in numbers):
        raise UserError(f"{where} must be positive, got {value!r}")
    if name == "drop_path_rate" and not (type(value) in (int, float) and 0 <= value < 1):
        raise UserError(f"{where} must be at least 0 and below 1, got {value!r}")
