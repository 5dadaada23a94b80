"""The Vision Transformer that Feature-Distillation trains (a BEiT without mask token), as a backbone: no head.

Parameter names are those of SwinTransformer/Feature-Distillation models/vision_transformer.py; nothing else is in the
state dict. The network is a plain single-device module; activation checkpointing and sequential attention
(`attention_chunk`) are set from outside on `blocks()`.

Letters: B images, C channels, H W token grid, N = 1 + H W tokens, h heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdscale import UserError
from fdscale.models.layers import (
    INIT_STD,
    Attended,
    LayerNorm,
    Mlp,
    PatchEmbed,
    add_branch,
    biased,
    block_masks,
    initialise_unless_meta,
    pair,
    qkv_bias,
    trunc_normal,
)
from fdscale.models.position import relative_bias, relative_rows, resize_absolute

NORM_EPS = 1e-6
POSITIONS = ("shared", "per_block", "absolute")


class Attention(nn.Module):
    """Multi-head attention with an additive bias. x (B, N, C), bias (h, N, N) or None -> (B, N, C)."""

    def __init__(self, width: int, heads: int, grid: tuple[int, int], own_table: bool) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.attention_chunk = 0  # heads at a time, recomputed in the backward; 0: all at once
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.relative_position_bias_table = nn.Parameter(torch.empty(relative_rows(grid), heads)) if own_table else None
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v, bias = self._heads(x, bias)
        attend = _in_chunks(self.attention_chunk) if self.attention_chunk > 0 else F.scaled_dot_product_attention
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, h, N, N) float32: of query i, how much of each key `forward` takes."""
        q, k, _, bias = self._heads(x, bias)
        logits = q.float() @ k.float().transpose(-2, -1) / q.shape[-1] ** 0.5
        return (logits if bias is None else logits + bias.float()).softmax(-1)

    def _heads(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v (B, h, N, d) and what is added to the scores, (1, h, N, N) or None."""
        qkv = biased(self.qkv, x, qkv_bias(self.q_bias, self.v_bias))  # B N 3C
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.relative_position_bias_table is not None:
            bias = relative_bias(self.relative_position_bias_table, self.grid)
        return q, k, v, None if bias is None else bias.to(q.dtype)[None]


def _in_chunks(step: int) -> Callable[..., Tensor]:
    """Attention `step` heads at a time, each group recomputed in the backward."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        qs, ks, vs = q.split(step, 1), k.split(step, 1), v.split(step, 1)
        biases = [None] * len(qs) if bias is None else bias.split(step, 1)
        outs = [
            checkpoint(F.scaled_dot_product_attention, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(qs, ks, vs, biases, strict=True)
        ]
        return torch.cat(outs, dim=1)

    return attend


class Block(nn.Module):
    """x + gamma_1 * attention(norm1(x)), then x + gamma_2 * mlp(norm2(x)); no gammas where layer_scale is 0."""

    def __init__(
        self, width: int, heads: int, hidden: int, grid: tuple[int, int], own_table: bool, layer_scale: bool
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads, grid, own_table)
        self.gamma_1 = nn.Parameter(torch.empty(width)) if layer_scale else None
        self.norm2 = LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, hidden)
        self.gamma_2 = nn.Parameter(torch.empty(width)) if layer_scale else None

    def forward(self, x: Tensor, bias: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """x (B, N, C); bias (h, N, N) of all blocks, or None; keep (2, B) factors of the branches, or None for 1."""
        first, second = (None, None) if keep is None else keep
        branch = self.attn(self.norm1(x), bias)
        x = add_branch(x, branch if self.gamma_1 is None else self.gamma_1 * branch, first)
        branch = self.mlp(self.norm2(x))
        return add_branch(x, branch if self.gamma_2 is None else self.gamma_2 * branch, second)


class Blocks(nn.ModuleList):
    """The blocks: under the official parameter prefix `blocks.`, and, called, the list that a backbone promises."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(blocks)

    def forward(self) -> list[nn.Module]:
        return list(self)


class SharedRelativeBias(nn.Module):
    """One BEiT relative table for all blocks. () -> (h, N, N)."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.relative_position_bias_table = nn.Parameter(torch.empty(relative_rows(grid), heads))

    def forward(self) -> Tensor:
        return relative_bias(self.relative_position_bias_table, self.grid)


class ViT(nn.Module):
    """The ViT backbone with a class token.

    position: "shared", one relative table for all blocks (distillation); "per_block", one in each block (fine-tuning);
        "absolute", a learned embedding per token, bicubically resized for other image sizes. The relative tables fit
        the token grid of img_size alone: another one is a UserError.
    layer_scale: initial value of gamma_1 and gamma_2; 0 or None: none.
    final_norm: False leaves out `norm` (fine-tuning with mean pooling norms after the pooling).

    Attributes: width (channels of the tokens), stride (pixels per token side), prefix (the class token), depths,
    drop_path_rate, drop_path_seed (both may be set from outside).
    """

    prefix: tuple[str, ...] = ("cls",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        position: Literal["shared", "per_block", "absolute"] = "shared",
        layer_scale: float | None = 0.1,
        drop_path_rate: float = 0.1,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise UserError(f"ViT: position is {position!r}; expected one of {', '.join(POSITIONS)}")
        if embed_dim % num_heads:
            raise UserError(f"ViT: {num_heads} heads do not divide {embed_dim} channels; change embed_dim or num_heads")
        self.depths = (depth,)
        self.width = embed_dim
        self.stride = patch_size
        self.drop_path_rate = drop_path_rate
        self.drop_path_seed = 0
        self.layer_scale = layer_scale

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.built_grid = self.grid(pair(img_size))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        tokens = 1 + math.prod(self.built_grid)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim)) if position == "absolute" else None
        self.rel_pos_bias = SharedRelativeBias(self.built_grid, num_heads) if position == "shared" else None
        hidden, own_table = int(embed_dim * mlp_ratio), position == "per_block"
        self.blocks = Blocks(
            Block(embed_dim, num_heads, hidden, self.built_grid, own_table, bool(layer_scale)) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim, eps=NORM_EPS) if final_norm else nn.Identity()
        initialise_unless_meta(self)

    def forward(self, images: Tensor, numbers: Tensor | None = None) -> Tensor:
        """images (B, in_chans, height, width) normalised -> tokens (B, N, C), class token first, final-normed.

        numbers: (B,) int64 sample numbers, which decide drop path in training; drawn at random where missing.
        Raises UserError for images whose grid the relative table does not fit.
        """
        return self.norm(self._outputs(images, numbers, after=(self.depths[0],))[0])

    def maps(self, images: Tensor, numbers: Tensor | None = None) -> list[Tensor]:
        """Four (B, C, H, W) maps, all of one stride, without the class token: after 1/3, 1/2, 2/3 and all of the blocks
        (3, 5, 7, 11 of 12 counted from 0, as BEiT's segmentation); the last is final-normed, the others are not."""
        depth = self.depths[0]
        after = tuple(max(depth * part // 6, 1) for part in (2, 3, 4, 6))
        outputs = self._outputs(images, numbers, after)
        grid = self.grid((images.shape[2], images.shape[3]))
        return [x[:, 1:].transpose(1, 2).unflatten(2, grid) for x in (*outputs[:-1], self.norm(outputs[-1]))]

    def levels(self) -> list[tuple[int, int]]:
        """Channels and stride, in pixels, of each of the `maps`."""
        return [(self.width, self.stride)] * 4

    def _outputs(self, images: Tensor, numbers: Tensor | None, after: tuple[int, ...]) -> list[Tensor]:
        """(B, N, C) after each of these numbers of blocks, ascending."""
        x = self.patch_embed(images)  # B H W C
        grid = (x.shape[1], x.shape[2])
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)), dim=1)  # B N C
        if self.pos_embed is not None:
            x = x + resize_absolute(self.pos_embed, self.built_grid, grid)
        elif grid != self.built_grid:
            raise UserError(
                f"ViT: images of {images.shape[2]}x{images.shape[3]} pixels make a grid of {grid[0]}x{grid[1]} tokens, "
                f"but the relative position table is for {self.built_grid[0]}x{self.built_grid[1]}; resize the images "
                "or build the model for their size"
            )
        bias = None if self.rel_pos_bias is None else self.rel_pos_bias()
        outputs = []
        for i, (block, keep) in enumerate(zip(self.blocks, block_masks(self, images, numbers), strict=True), start=1):
            x = block(x, bias, keep)
            outputs += [x] * after.count(i)
        return outputs

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Token grid, class token apart, for images of (height, width) pixels."""
        return self.patch_embed.grid(image_size)

    def flops(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds (MACs) of one forward of one (height, width) image: linear layers and attention products."""
        grid, width = math.prod(self.grid(image_size)), self.width
        tokens = grid + 1
        hidden = sum(cast(Block, block).mlp.fc1.out_features for block in self.blocks)
        total = grid * self.patch_embed.inputs * width + 2 * tokens * width * hidden
        return total + len(self.blocks) * tokens * width * (4 * width + 2 * tokens)

    def attended(self, image_size: tuple[int, int]) -> list[Attended]:
        """The attention of each block on a (height, width) image."""
        tokens = 1 + math.prod(self.grid(image_size))
        heads = [cast(Block, block).attn.heads for block in self.blocks]
        return [Attended(1, tokens, h, self.width // h) for h in heads]

    def depth_of(self, name: str) -> int:
        """Layer-decay id of a parameter: 0 the embeddings, i for the i-th block, blocks + 1 the rest, a shared relative
        table included. As Feature-Distillation's optimizer.py."""
        parts = name.split(".")
        if parts[0] in ("patch_embed", "cls_token", "pos_embed"):
            return 0
        return int(parts[1]) + 1 if parts[0] == "blocks" else self.depths[0] + 1

    def no_decay(self) -> set[str]:
        """Names of parameters without weight decay: vectors, biases, class token, absolute embedding. Relative tables
        do decay, shared or not, as in Feature-Distillation and BEiT."""
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.dim() == 1 or name.endswith(".bias") or name in ("cls_token", "pos_embed")
        }

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Feature-Distillation's: weights and embeddings normal 0.02 cut at one standard deviation, attn.proj and
        mlp.fc2 of the i-th block (from 1) divided by sqrt(2 i), biases and relative tables 0, norms 1 and 0, gammas
        `layer_scale`."""
        parts = name.split(".")
        if parts[-1] in ("gamma_1", "gamma_2"):
            tensor.fill_(cast(float, self.layer_scale))
        elif parts[-1] in ("bias", "q_bias", "v_bias", "relative_position_bias_table"):
            tensor.zero_()
        elif len(parts) > 1 and parts[-2] in ("norm", "norm1", "norm2"):
            tensor.fill_(1.0)
        elif parts[-1] in ("weight", "cls_token", "pos_embed"):
            trunc_normal(tensor, generator, bound=INIT_STD)
            if parts[0] == "blocks" and parts[-2] in ("proj", "fc2"):
                tensor.div_(math.sqrt(2.0 * self.depth_of(name)))
