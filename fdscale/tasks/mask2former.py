"""Mask2Former (arXiv 2112.01527) on the maps of a backbone: queries that each predict a mask and the class of it.

Pixel decoder, transformer decoder, matching and losses are those of Hugging Face's transformers, under its names. Ours
is what a run here needs: first values by name, points that are a function of (seed, sample number), losses that do not
depend on how a batch is cut, and places in float32 whatever the precision of the network.

Letters: B images, K classes, Q queries, D channels, N cells of three maps, L levels of maps, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    Mask2FormerPixelDecoder,
    Mask2FormerSinePositionEmbedding,
    Mask2FormerTransformerModule,
    multi_scale_deformable_attention,
)

from fdscale.data.dense import IGNORED
from fdscale.data.order import philox
from fdscale.tasks import upernet
from fdscale.tasks.tuned import Tuned
from fdscale.tasks.upernet import Norms, Rescale, resized

HEADS, LEVELS, POINTS = 8, 3, 4  # of attention; maps that queries look at; places that a cell looks at in each
WEIGHTS = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}  # the authors', as all that is not a key
SHOWN = {"loss_cross_entropy": "class", "loss_mask": "mask", "loss_dice": "dice"}  # as logs name them


class Mask2Former(Tuned):
    """Backbone, maps of falling size (`neck`), pixel decoder, transformer decoder, and a score of classes.

    channels: D. queries: Q. encoder_layers, decoder_layers: of the two decoders. points: pixels on which a mask is
    compared. seed: of what they are drawn from. losses: the last ones by name, over all layers, without weights and
    gradient. Called with masks, it gives the sum of the weighted losses.
    """

    undecayed = ("level_embed", "queries_")  # what stands for levels and queries

    def __init__(
        self,
        backbone: Any,
        classes: int,
        channels: int = 256,
        queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        points: int = 112 * 112,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone)
        widths, strides = zip(*backbone.levels(), strict=True)
        self.neck = Rescale(widths[0], "group") if len(set(strides)) == 1 else Norms(widths)
        theirs: Any = Mask2FormerConfig
        self.head_config = theirs(
            feature_size=channels,
            mask_feature_size=channels,
            hidden_dim=channels,
            encoder_feedforward_dim=4 * channels,
            dim_feedforward=8 * channels,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers + 1,  # the class counts what is predicted before the first, too
            num_attention_heads=HEADS,
            num_queries=queries,
            num_labels=classes,
            train_num_points=points,
        )
        self.widths = [width for width, _ in self.neck.levels(backbone.levels())]
        self.pixel_decoder = Mask2FormerPixelDecoder(self.head_config, self.widths)
        self.pixel_decoder.level_embed = nn.Parameter(
            torch.empty(LEVELS, channels)
        )  # theirs ignores the device asked for
        self.transformer_module = Mask2FormerTransformerModule(channels, self.head_config)
        self.class_predictor = nn.Linear(channels, classes + 1)
        encoder: Any = self.pixel_decoder.encoder
        for layer in encoder.layers:
            layer.self_attn = DeformableAttention(channels)
        encoder.get_reference_points = centres
        self.pixel_decoder.position_embedding = Positions(channels // 2, normalize=True)
        self.transformer_module.position_embedder = Positions(channels // 2, normalize=True)
        self.pixel_decoder.eval()
        self.seed = seed
        self.losses: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Mask2Former:
        """But for the pixel decoder, which has nothing to switch: while training, theirs hides what is not finite."""
        super().train(mode)
        self.pixel_decoder.eval()
        return self

    def forward(self, images: Tensor, masks: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) normalised -> shares of classes (B, K, H, W) float32, of which several may be sure of a
        pixel; or with masks (B, H, W) uint8 and the numbers of the samples (B,) the loss.
        """
        maps = self.neck(self.backbone.maps(images, numbers))
        classes, predicted = self._predicted(maps)
        if images.is_meta:  # for the plan: what is matched depends on content
            return torch.stack([x.float().sum() for x in (*classes, *predicted)]).sum()
        if masks is None:
            return shares(classes[-1], predicted[-1], images.shape[2:])
        assert numbers is not None
        each = [
            self._losses([x[i : i + 1] for x in classes], [x[i : i + 1] for x in predicted], masks[i], number)
            for i, number in enumerate(numbers.tolist())
        ]
        means = {name: torch.stack([one[name] for one in each]).mean() for name in WEIGHTS}
        self.losses = {SHOWN[name]: value.detach() for name, value in means.items()}
        return torch.stack([WEIGHTS[name] * value for name, value in means.items()]).sum()

    def _predicted(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores of classes (B, Q, K + 1), the last for none, and of masks (B, Q, H/4, W/4), before and behind each
        layer of the decoder."""
        pixels = self.pixel_decoder(maps, output_hidden_states=False)
        seen = self.transformer_module(pixels.multi_scale_features, pixels.mask_features)
        classes = [self.class_predictor(x.transpose(0, 1)) for x in seen.intermediate_hidden_states]
        return classes, list(seen.masks_queries_logits)

    def _losses(
        self, classes: Sequence[Tensor], predicted: Sequence[Tensor], mask: Tensor, number: int
    ) -> dict[str, Tensor]:
        """Of one image, each summed over layers. What is ignored is outside of all masks, as in the authors' code."""
        kinds = mask.unique()
        kinds = kinds[kinds != IGNORED]
        wanted = (mask == kinds[:, None, None]).float()
        layers = [
            {"masks_queries_logits": one.float(), "class_queries_logits": kind.float()}
            for kind, one in zip(classes, predicted, strict=True)
        ]
        word = int(philox(self.seed, number, (0, 40, 0, 0), 1)[0] >> 1)
        with torch.random.fork_rng([mask.device] if mask.is_cuda else []):
            torch.manual_seed(word)
            criterion = Criterion(self.head_config, WEIGHTS).to(mask.device)
            found = criterion(
                **layers[-1], mask_labels=[wanted], class_labels=[kinds.long()], auxiliary_predictions=layers[:-1]
            )
        return {name: torch.stack([v for key, v in found.items() if key.startswith(name)]).sum() for name in WEIGHTS}

    def head_flops(self, image_size: tuple[int, int]) -> int:
        """Multiply-adds (MACs) of the products of one forward of one (height, width) image behind the backbone, without
        the loss; what deformable attention looks up is not counted."""
        before = [(-(-image_size[0] // stride), -(-image_size[1] // stride)) for _, stride in self.backbone.levels()]
        cells = [math.prod(grid) for grid in self.neck.grids(before)]
        wide, queries, places = self.head_config.hidden_dim, self.head_config.num_queries, HEADS * LEVELS * POINTS
        pixels = sum(width * wide * count for width, count in zip(self.widths, cells, strict=True))  # projections
        pixels += self.head_config.encoder_layers * sum(cells[1:]) * wide * (3 * places + 2 * wide + 8 * wide)
        pixels += 10 * wide**2 * cells[0]  # a convolution on the finest map, and the features of masks
        layers = self.head_config.decoder_layers - 1
        decoder = layers * queries * (6 * wide**2 + 2 * queries * wide + 16 * wide**2)
        for layer in range(layers):
            looked_at = cells[LEVELS - layer % LEVELS]
            decoder += 2 * looked_at * wide**2 + 2 * queries * looked_at * wide
        each = 3 * wide**2 + wide * cells[0] + wide * (self.head_config.num_labels + 1)
        return self.neck.flops(before) + pixels + decoder + (layers + 1) * queries * each

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill one parameter in place: the backbone's and the neck's by their rules, others by the authors', but that
        biases are 0.

        Queries and levels: normal 1. Scores of classes and what makes queries masks: torch's uniform. Convolutions of
        the finest map: uniform by what comes in; other products Xavier's; places around a cell: in eight directions.
        """
        part, _, rest = name.partition(".")
        layer = name.split(".")[-2]
        if part == "backbone":
            self.backbone.init_parameter(rest, tensor, generator)
        elif part == "neck":
            upernet.init_parameter(name, tensor, generator)
        elif "level_embed" in name or "queries_" in name:
            nn.init.normal_(tensor, generator=generator)
        elif name.endswith("sampling_offsets.bias"):
            tensor.copy_(directions())
        elif name.endswith("bias") or layer in ("sampling_offsets", "attention_weights"):
            tensor.zero_()
        elif tensor.ndim == 1:
            tensor.fill_(1.0)
        elif part == "class_predictor" or "mask_embedder" in name:
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        elif name.startswith(("pixel_decoder.adapter_", "pixel_decoder.layer_", "pixel_decoder.mask_projection")):
            nn.init.kaiming_uniform_(tensor, a=1, generator=generator)
        else:
            nn.init.xavier_uniform_(tensor, generator=generator)


class Criterion(Mask2FormerLoss):
    """Theirs, of one image: with as many masks as that has, and not as all images of all ranks have on average."""

    def get_num_masks(self, class_labels: Any, device: torch.device) -> Tensor:
        """At least 1."""
        return torch.tensor(float(max(1, len(class_labels[0]))), device=device)


class DeformableAttention(nn.Module):
    """Theirs, with places in float32: bfloat16 has no half pixels beyond the 128th."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        places = HEADS * LEVELS * POINTS
        self.sampling_offsets = nn.Linear(channels, 2 * places)
        self.attention_weights = nn.Linear(channels, places)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Tensor,
        encoder_hidden_states: Tensor,
        reference_points: Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states, position_embeddings, encoder_hidden_states (B, N, D), reference_points (B, N, L, 2) -> (B, N,
        D); no cell is left out."""
        asking = hidden_states + position_embeddings
        shape = (*asking.shape[:2], HEADS, LEVELS, POINTS)
        value = self.value_proj(encoder_hidden_states)
        offsets = self.sampling_offsets(asking).float().view(*shape, 2)
        weights = self.attention_weights(asking).float().unflatten(2, (HEADS, -1)).softmax(-1).view(shape)
        sizes = torch.tensor([(width, height) for height, width in spatial_shapes_list], device=asking.device)
        places = reference_points[:, :, None, :, None] + offsets / sizes[:, None]
        wide = value.float().unflatten(2, (HEADS, -1))
        found = multi_scale_deformable_attention(wide, spatial_shapes_list, places, weights)
        return self.output_proj(found.to(value.dtype)), None


class Positions(Mask2FormerSinePositionEmbedding):
    """Theirs, computed in float32."""

    def forward(self, shape: torch.Size, device: Any, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
        """(B, D, H, W) for maps of such a shape."""
        return super().forward(shape, device, torch.float32, mask).to(dtype)


def centres(shapes: Sequence[tuple[int, int]], ratios: Tensor, device: torch.device) -> Tensor:
    """(B, N, L, 2) float32 from 0 to 1: of the cells of maps (height, width), as `encoder.get_reference_points`."""
    lines = []
    for height, width in shapes:
        down, across = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
        lines.append(torch.stack(torch.meshgrid(across, down, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(lines)[None, :, None].expand(len(ratios), -1, len(shapes), -1)


def directions() -> Tensor:
    """(HEADS * LEVELS * POINTS * 2,): where a cell looks at first, each head in its own direction, 1 to 4 cells off."""
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    towards = torch.stack([angles.cos(), angles.sin()], -1)
    towards = towards / towards.abs().amax(-1, keepdim=True)
    far = torch.arange(1.0, POINTS + 1)[:, None]
    return (towards[:, None, None] * far).expand(HEADS, LEVELS, POINTS, 2).flatten()


def shares(classes: Tensor, masks: Tensor, size: Sequence[int]) -> Tensor:
    """The authors' semantic inference: classes (B, Q, K + 1) and masks (B, Q, h, w), both scores -> (B, K, *size), the
    sum over queries of the probability of a class times that of being in the mask."""
    return torch.einsum("bqk,bqhw->bkhw", classes.float().softmax(-1)[..., :-1], resized(masks.float(), size).sigmoid())
