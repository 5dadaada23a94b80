"""Networks: students (`swin_v2`, `vit`), teachers, and conversion of weights between them and the world."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from fdscale import UserError

BACKBONES = {"swin_v2": "SwinV2", "vit": "ViT"}  # module and class


def backbone(model: str, args: Mapping[str, Any], where: str = "student.args") -> nn.Module:
    """Build one of our backbones by name. Raises UserError for an unknown name or constructor argument."""
    if model not in BACKBONES:
        raise UserError(f"unknown backbone {model!r}; known: {', '.join(BACKBONES)}")
    build = getattr(importlib.import_module(f"fdscale.models.{model}"), BACKBONES[model])
    known = list(inspect.signature(build).parameters)
    unknown = sorted(set(args) - set(known))
    if unknown:
        raise UserError(f"{where}: {model} has no argument {unknown[0]}; it has {', '.join(known)}")
    try:
        return build(**args)
    except (TypeError, AssertionError) as error:
        raise UserError(f"{where}: {model} cannot be built: {error}") from error
