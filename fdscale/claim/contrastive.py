"""A teacher that has seen no label: two views of an image are told from those of others (SimCLR, arXiv 2002.05709).

Plain and small: it is part of the experiment, not of the training system.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fdscale.inputs import normalise
from fdscale.models import convert
from fdscale.models.layers import initial_value
from fdscale.models.vit import ViT

TEMPERATURE, PROJECTED = 0.2, 64
BATCH, LR, DECAY, WARMUP = 256, 3e-3, 0.05, 100


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1, H, W) in [0, 1] -> random crops of 20 to 100 % of the area, mirrored, with another contrast and light."""
    count = len(images)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    area, ratio = draw(0.2, 1.0), draw(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    transform = torch.zeros(count, 2, 3)
    transform[:, 0, 0], transform[:, 1, 1] = width * mirror, height
    transform[:, 0, 2], transform[:, 1, 2] = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    seen = F.grid_sample(images, grid, align_corners=False)
    contrast, light = draw(0.6, 1.4), draw(-0.2, 0.2)
    return (seen * contrast[:, None, None, None] + light[:, None, None, None]).clamp(0, 1)


def info_nce(first: Tensor, second: Tensor) -> Tensor:
    """The loss of pairs (B, C) and (B, C): each has to find its other among the 2 B - 1 (NT-Xent)."""
    both = F.normalize(torch.cat((first, second)), dim=1)
    alike = both @ both.t() / TEMPERATURE
    alike.fill_diagonal_(-math.inf)
    count = len(first)
    other = torch.cat((torch.arange(count, 2 * count), torch.arange(count)))
    return F.cross_entropy(alike, other)


def train(
    images: np.ndarray,
    args: dict,
    epochs: int,
    seed: int,
    path: Path,
    start: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Train a ViT on images (n, H, W) uint8, from random weights or from a file, and write its weights.

    A function of images, args and seed.
    """
    with torch.device("meta"):
        network: nn.Module = ViT(**args)
    network.to_empty(device="cpu")
    for name, parameter in network.named_parameters():
        parameter.data.copy_(initial_value(network, name, parameter.shape, torch.float32, seed))
    if start is not None:
        network.load_state_dict(load_file(start))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(args["embed_dim"], 128), nn.GELU(), nn.Linear(128, PROJECTED))
    matrices = [one for one in (*network.parameters(), *head.parameters()) if one.ndim > 1]
    vectors = [one for one in (*network.parameters(), *head.parameters()) if one.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    each = len(images) // BATCH
    total, known, step = epochs * each, torch.from_numpy(images)[:, None], 0
    for epoch in range(epochs):
        order, losses = torch.randperm(len(images), generator=generator), 0.0
        for place in range(each):
            rate = LR * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = known[order[place * BATCH : (place + 1) * BATCH]].float() / 255
            pair = torch.cat((views(batch, generator), views(batch, generator))).expand(-1, 3, -1, -1)
            first, second = head(network(normalise(pair, torch.float32))[:, 1:].mean(1)).chunk(2)
            loss = info_nce(first, second)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses, step = losses + loss.item(), step + 1
        say(f"contrastive: epoch {epoch + 1} of {epochs}, loss {losses / each:.4f}")
    convert.save(dict(network.state_dict()), path, {"source": "contrastive"})
