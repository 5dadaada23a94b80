"""Swin Transformer V2 (arXiv 2111.09883), from T (28M) to G (3B), as a backbone: no head.

Parameter names are those of microsoft/Swin-Transformer models/swin_transformer_v2.py; nothing else is in the state
dict. The network is a plain single-device module; activation checkpointing, sequential attention (`attention_chunk`)
and what computes attention (`kernels`) are set from outside on `blocks()`.

Letters: B images, C channels, H W token map, h heads, Wh Ww window.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale import UserError
from fdscale.kernels.attention import window_attention
from fdscale.kernels.reference import attention_weights
from fdscale.models.layers import (
    Attended,
    LayerNorm,
    Mlp,
    PatchEmbed,
    ResidualNorm,
    biased,
    block_masks,
    initialise_unless_meta,
    pair,
    qkv_bias,
    trunc_normal,
)
from fdscale.models.position import continuous_bias_mlp, continuous_bias_table

NORM_EPS = 1e-5

# Width and depth: SwinV2, "Model configurations". The heads of H and G are not in the paper: head dim 32, that of all
# other sizes (mmpretrain agrees for G; its H has 8, 16, 32, 64). The paper gives H and G a norm on the main branch
# every 6 layers: extra_norm_period=6. It is not set here, since public code for H weights does not have it.
SIZES: dict[str, dict[str, Any]] = {
    "T": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "S": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "B": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "L": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    "H": {"embed_dim": 352, "depths": (2, 2, 18, 2), "num_heads": (11, 22, 44, 88)},
    "G": {"embed_dim": 512, "depths": (2, 2, 42, 4), "num_heads": (16, 32, 64, 128)},
}


class WindowAttention(nn.Module):
    """Cosine attention in (shifted) windows with a continuous position bias. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, width: int, heads: int, window: tuple[int, int], shifted: bool, pretrained_window: int) -> None:
        super().__init__()
        self.window = window
        self.shifted = shifted
        self.pretrained_window = pretrained_window
        self.kernels = "reference"  # what computes the attention: a name of kernels.attention
        self.attention_chunk = 0  # windows at a time of the reference, recomputed in the backward; 0: all at once
        self.logit_scale = nn.Parameter(torch.empty(heads, 1, 1))
        self.cpb_mlp = continuous_bias_mlp(heads)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(window_attention(*self._cut(x), by=self.kernels, chunk=self.attention_chunk))

    def weights(self, x: Tensor) -> Tensor:
        """(B, w, h, N, N) float32: in each window, of query i, how much of each key `forward` takes."""
        return attention_weights(*self._cut(x))

    def _cut(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int], tuple[int, int]]:
        """(B, H, W, 3C), the table of the bias, scales, window and shift."""
        qkv = biased(self.qkv, x, qkv_bias(self.q_bias, self.v_bias))
        table = continuous_bias_table(self.cpb_mlp, self.window, self.pretrained_window, x.device)
        return qkv, table, self.logit_scale.flatten(), self.window, self.shift(x.shape[1], x.shape[2])

    def shift(self, height: int, width: int) -> tuple[int, int]:
        """Half a window in every other block, except along an axis that one window covers."""
        if not self.shifted:
            return 0, 0
        rows, columns = self.window
        return (rows // 2 if height > rows else 0), (columns // 2 if width > columns else 0)


class Block(nn.Module):
    """x + norm1(attention(x)), then x + norm2(mlp(x)): norms behind branches (res-post-norm, SwinV2 section 3.2)."""

    def __init__(self, width: int, hidden: int, extra_norm: bool, **attention: Any) -> None:
        super().__init__()
        self.attn = WindowAttention(width, **attention)
        self.norm1 = ResidualNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, hidden)
        self.norm2 = ResidualNorm(width, eps=NORM_EPS)
        self.enorm = LayerNorm(width, eps=NORM_EPS) if extra_norm else None

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, H, W, C); keep (2, B) factors of the two branches, or None for 1."""
        first, second = (None, None) if keep is None else keep
        x = self.norm1(x, self.attn(x), first)
        x = self.norm2(x, self.mlp(x), second)
        return x if self.enorm is None else self.enorm(x)


class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H/2, W/2, 2C): 2 x 2 neighbours joined, mapped, normed. Odd maps are padded with zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = LayerNorm(2 * width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
        return self.norm(self.reduction(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))  # column before row, as in the weights


class Stage(nn.Module):
    """Blocks of one width, then (but for the last stage) the merging into the next."""

    def __init__(self, blocks: list[Block], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinV2(nn.Module):
    """The SwinV2 backbone.

    img_size, window_size: int or (height, width). In a stage whose map (for img_size) is no larger than the window
        along an axis, the window becomes the map along that axis; this fixes the windows of the model. Images of other
        sizes are welcome in forward: shift and mask follow the actual map, maps that are no multiple of the window are
        padded.
    pretrained_window_sizes: per stage, the window the weights were pre-trained with; 0: the present one.
    extra_norm_period: p > 0 puts a LayerNorm behind every p-th block of each stage (`enorm`; counted within the stage,
        which is SwinTransformer/Feature-Distillation's count: 7 norms in G at p = 6).
    post_norm_init: initial weight of norm1 and norm2: 0 is microsoft's, so that blocks start as the identity; Feature-
        Distillation has 1e-5, together with
    depth_scaled_init: attn.proj and mlp.fc2 weights divided by sqrt(2 i) in the i-th block of the network, from 1.

    Attributes: width (channels of the tokens), stride (pixels per token side), prefix (no tokens before the grid),
    depths, drop_path_rate, drop_path_seed (both may be set from outside).
    """

    prefix: tuple[str, ...] = ()

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0),
        extra_norm_period: int = 0,
        post_norm_init: float = 0.0,
        depth_scaled_init: bool = False,
    ) -> None:
        super().__init__()
        _check(embed_dim, depths, num_heads, pretrained_window_sizes)
        self.depths = tuple(depths)
        self.width = embed_dim * 2 ** (len(depths) - 1)
        self.stride = patch_size * 2 ** (len(depths) - 1)
        self.drop_path_rate = drop_path_rate
        self.drop_path_seed = 0
        self.post_norm_init = post_norm_init
        self.depth_scaled_init = depth_scaled_init

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, NORM_EPS)
        window = pair(window_size)
        height, width = self.patch_embed.grid(pair(img_size))
        stages = []
        for s, depth in enumerate(depths):
            channels = embed_dim * 2**s
            blocks = [
                Block(
                    channels,
                    int(channels * mlp_ratio),
                    extra_norm=extra_norm_period > 0 and (b + 1) % extra_norm_period == 0,
                    heads=num_heads[s],
                    window=(min(height, window[0]), min(width, window[1])),
                    shifted=b % 2 == 1,
                    pretrained_window=pretrained_window_sizes[s],
                )
                for b in range(depth)
            ]
            stages.append(Stage(blocks, PatchMerging(channels) if s < len(depths) - 1 else None))
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        self.layers = nn.ModuleList(stages)
        self.norm = LayerNorm(self.width, eps=NORM_EPS)
        initialise_unless_meta(self)

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """images (B, in_chans, height, width) normalised -> tokens (B, L, C) of the last map, row by row, final-normed.

        numbers: (B,) int64 sample numbers, which decide drop path in training; drawn at random where missing.
        """
        return self._stages(images, numbers)[-1].flatten(1, 2)

    def maps(self, images: Tensor, numbers: Tensor | None = None) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) map per stage, before its merging; the last is final-normed, the others are not."""
        return [x.permute(0, 3, 1, 2) for x in self._stages(images, numbers)]

    def levels(self) -> list[tuple[int, int]]:
        """Channels and stride, in pixels, of each of the `maps`."""
        last = len(self.depths) - 1
        return [(self.width >> last - stage, self.stride >> last - stage) for stage in range(last + 1)]

    def _stages(self, images: Tensor, numbers: Tensor | None) -> list[Tensor]:
        """(B, H_i, W_i, C_i) of each stage."""
        masks = iter(block_masks(self, images, numbers))
        x = self.patch_embed(images)
        outs = []
        for blocks, downsample in self._staged():
            for block in blocks:
                x = block(x, next(masks))
            outs.append(x)
            if downsample is not None:
                x = downsample(x)
        return [*outs[:-1], self.norm(outs[-1])]

    def blocks(self) -> list[nn.Module]:
        """All blocks, from the input on."""
        return [block for blocks, _ in self._staged() for block in blocks]

    def _staged(self) -> list[tuple[list[Block], PatchMerging | None]]:
        """The blocks of each stage and the merging behind them."""
        stages = cast("list[Stage]", self.layers)
        return [(cast("list[Block]", list(stage.blocks)), stage.downsample) for stage in stages]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Token grid of forward for images of (height, width) pixels."""
        height, width = self.patch_embed.grid(image_size)
        factor = 2 ** (len(self.depths) - 1)
        return math.ceil(height / factor), math.ceil(width / factor)

    def flops(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds (MACs) of one forward of one (height, width) image: linear layers, attention products, and one
        per element of a norm, which is the official count. Padding and the bias MLP are not counted."""
        height, width = self.patch_embed.grid(image_size)
        channels = self.patch_embed.proj.out_channels
        total = height * width * channels * (self.patch_embed.inputs + 1)
        for blocks, downsample in self._staged():
            tokens = height * width
            for block in blocks:
                attended = block.attn.window[0] * block.attn.window[1]
                hidden = block.mlp.fc1.out_features
                norms = 2 if block.enorm is None else 3
                total += tokens * channels * (4 * channels + 2 * attended + 2 * hidden + norms)
            if downsample is not None:
                height, width, channels = math.ceil(height / 2), math.ceil(width / 2), 2 * channels
                total += height * width * channels * (2 * channels + 1)
        return total + height * width * channels

    def attended(self, image_size: tuple[int, int]) -> list[Attended]:
        """The attention of each block on a (height, width) image."""
        height, width = self.patch_embed.grid(image_size)
        found = []
        for blocks, _ in self._staged():
            for block in blocks:
                (rows, columns), heads = block.attn.window, len(block.attn.logit_scale)
                windows = math.ceil(height / rows) * math.ceil(width / columns)
                found.append(Attended(windows, rows * columns, heads, block.attn.proj.in_features // heads))
            height, width = math.ceil(height / 2), math.ceil(width / 2)
        return found

    def depth_of(self, name: str) -> int:
        """Layer-decay id of a parameter: 0 patch embedding, i for the i-th block (a merging goes with the block before
        it), blocks + 1 the rest. As Feature-Distillation's optimizer.py."""
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] == "layers":
            stage = int(parts[1])
            if parts[2] == "downsample":
                return sum(self.depths[: stage + 1])
            return sum(self.depths[:stage]) + int(parts[3]) + 1
        return sum(self.depths) + 1

    def no_decay(self) -> set[str]:
        """Names of parameters without weight decay: vectors, biases, bias MLPs, logit scales, as officially."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() == 1 or name.endswith(".bias") or "cpb_mlp" in name or "logit_scale" in name
        }

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Weights normal 0.02, biases 0, norms 1 and 0, but norm1 and norm2 `post_norm_init` and 0, logit scale ln 10.

        Official but for the patch projection, drawn as in Feature-Distillation (microsoft leaves torch's default)."""
        parts = name.split(".")
        if parts[-1] == "logit_scale":
            tensor.fill_(math.log(10.0))
        elif parts[-1] in ("bias", "q_bias", "v_bias"):
            tensor.zero_()
        elif parts[-2] in ("norm1", "norm2"):
            tensor.fill_(self.post_norm_init)
        elif parts[-2] in ("norm", "enorm"):
            tensor.fill_(1.0)
        elif parts[-1] == "weight":
            trunc_normal(tensor, generator, bound=2.0)
            if self.depth_scaled_init and parts[-2] in ("proj", "fc2") and parts[0] == "layers":
                tensor.div_(math.sqrt(2.0 * self.depth_of(name)))


def _check(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...], pretrained: tuple[int, ...]) -> None:
    """Raises UserError unless the per-stage values fit together."""
    if not len(depths) == len(num_heads) == len(pretrained):
        raise UserError(
            f"SwinV2: depths {tuple(depths)}, num_heads {tuple(num_heads)} and pretrained_window_sizes "
            f"{tuple(pretrained)} must have one value per stage each"
        )
    for stage, heads in enumerate(num_heads):
        if (embed_dim * 2**stage) % heads:
            raise UserError(
                f"SwinV2: stage {stage} has {embed_dim * 2**stage} channels, which {heads} heads do not divide; "
                "change embed_dim or num_heads"
            )


def swin_v2(size: str, **overrides: Any) -> SwinV2:
    """A SwinV2 of a published size, a key of SIZES; `overrides` are arguments of SwinV2. Raises UserError otherwise."""
    if size not in SIZES:
        raise UserError(f"unknown SwinV2 size {size!r}; expected one of {', '.join(SIZES)}")
    return SwinV2(**{**SIZES[size], **overrides})
