"""What a training step is measured against: the same student as the official code, or timm's, computes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdscale import UserError, config
from fdscale.bench.paths import computed_by
from fdscale.models import BACKBONES, backbone

POSITIONS = {
    "absolute": "use_abs_pos_emb",
    "per_block": "use_rel_pos_bias",
    "shared": "use_shared_rel_pos_bias",
}  # timm's Beit has a flag for each


@contextmanager
def eager_and_official(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, nothing is compiled or fused, and the official code computes window attention: in the same modules."""
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            stack.enter_context(computed_by("official", module))
        yield


def has_window_attention(module: nn.Module) -> bool:
    """Whether the official code has another way to compute it."""
    return any(hasattr(part, "kernels") for part in module.modules())


class TimmBackbone(nn.Module):
    """A student of a config as timm has it, with what a `Distiller` or `Classifier` asks of a backbone.

    Extra norms of SwinV2-G are left out, since timm has none. Raises UserError for what timm has not at all.
    """

    def __init__(self, settings: config.Config) -> None:
        super().__init__()
        if settings.student.model not in BACKBONES:
            raise UserError(f"timm has no {settings.student.model}: there is nothing to compare it with")
        with torch.device("meta"):
            ours: Any = backbone(settings.student.model, _arguments(settings))
        self.prefix, self.depths, self.width = ours.prefix, ours.depths, ours.width
        self.grid, self.norm = ours.grid, nn.Identity() if isinstance(ours.norm, nn.Identity) else None
        self.network = {"swin_v2": _swin_v2, "vit": _vit}[settings.student.model](_arguments(settings))
        if set(settings.memory.checkpoint) != {"none"}:
            self.network.set_grad_checkpointing(True)

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Tokens (B, L, C); timm draws its drop path itself."""
        tokens = self.network.forward_features(images)
        return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens

    def no_decay(self) -> set[str]:
        """As usual: vectors."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def depth_of(self, name: str) -> int:
        """All alike."""
        return sum(self.depths)


def _arguments(settings: config.Config) -> dict[str, Any]:
    return {"img_size": settings.data.image_size, **settings.student.args}


def _swin_v2(args: dict[str, Any]) -> Any:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    known = inspect.signature(SwinTransformerV2.__init__).parameters
    return SwinTransformerV2(**{name: value for name, value in args.items() if name in known}, num_classes=0)


def _vit(args: dict[str, Any]) -> Any:
    from timm.models.beit import Beit

    args = dict(args)
    final, scale, position = args.pop("final_norm", True), args.pop("layer_scale", 0.1), args.pop("position", "shared")
    flags = {flag: name == position for name, flag in POSITIONS.items()}
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    try:
        network = Beit(**args, **flags, init_values=scale, num_classes=0, use_fc_norm=not final, norm_layer=norm)
        network.fc_norm = nn.Identity()  # the norm behind the pooling is the classifier's
    except TypeError as error:
        raise UserError(f"timm's network does not take student.args: {error}; choose another --against") from None
    return network
