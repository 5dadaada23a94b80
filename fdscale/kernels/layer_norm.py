"""Layer norm over channels: torch's, or the fused one of NVIDIA's apex where that is installed.

The environment variable FDSCALE_LAYER_NORM (torch or apex) overrides the choice.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale import UserError

VARIABLE = "FDSCALE_LAYER_NORM"
EXTENSION = "fused_layer_norm_cuda"  # apex's compiled part; an apex built without it has the Python names only


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """torch.nn.functional.layer_norm, by apex's kernels for a tensor on a GPU where `fused` finds them.

    Not under autocast and not for weights of another precision: there torch answers in float32, and apex does not.
    """
    plain = x.is_cuda and x.dtype == weight.dtype and not torch.is_autocast_enabled("cuda")
    kernel = fused() if plain else None
    return F.layer_norm(x, shape, weight, bias, eps) if kernel is None else kernel(x, weight, bias, shape, eps)


@cache
def fused() -> Callable[..., Tensor] | None:
    """apex's function, or None where torch's is used: decided once.

    Raises UserError for an unknown word in the variable, and where it says apex and there is none.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "torch", "apex"):
        raise UserError(f"the environment variable {VARIABLE} is {wanted!r}; expected torch or apex")
    if wanted == "torch":
        return None
    try:
        if importlib.util.find_spec(EXTENSION) is None:
            raise ImportError(f"{EXTENSION} is missing")
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError as error:
        if wanted == "apex":
            raise UserError(
                f"{VARIABLE} is apex, but NVIDIA's apex with its CUDA extensions is not installed ({error}); "
                "`fdscale doctor` says how to get it"
            ) from None
        return None
    return fused_layer_norm_affine
