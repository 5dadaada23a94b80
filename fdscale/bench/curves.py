"""A short training of a small SwinV2 by each path of attention, from one seed: do the loss curves agree?

The student learns the whitened features of a fixed random network on fixed random images, with drop path, under bf16
autocast on a GPU. Each path starts from the same weights and sees the same batches. The scale to judge by: the
reference with another seed (other weights and batches), and the reference once more with the same seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.bench import paths, tables
from fdscale.bench.protocol import explain
from fdscale.bench.timing import save
from fdscale.models.swin_v2 import SwinV2
from fdscale.objective import Distiller, whiten

SIDE, PATCH, WIDTH = 64, 8, 48  # pixels, pixels of a token, channels of the teacher

STUDENT: dict[str, Any] = {
    "embed_dim": 64,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 8,
    "pretrained_window_sizes": (0, 0),
    "post_norm_init": 1.0,  # so that attention has a say from the first step
}


class Length(NamedTuple):
    """How much is trained."""

    steps: int
    batch: int
    images: int


GPU, CPU = Length(200, 64, 512), Length(4, 4, 8)


def run(device: torch.device, path: Path) -> None:
    """Train by every path, compare, and write JSON after each."""
    length = GPU if device.type == "cuda" else CPU
    names, left_out = paths.names(student(0), device, others=False)
    result: dict[str, Any] = {"length": length._asdict(), "left_out": left_out, "losses": {}, "failed": {}}
    runs = [("reference", "reference", 0), ("reference, another seed", "reference", 1)]
    runs += [("reference, again", "reference", 0), *((name, name, 0) for name in names if name != "reference")]
    for label, name, seed in runs:
        try:
            result["losses"][label] = losses(name, seed, length, device)
        except Exception as error:
            result["failed"][label] = explain(error)
        first = result["losses"].get("reference")
        result["differences"] = {k: difference(v, first) for k, v in result["losses"].items() if first is not None}
        save(path, result)


def student(seed: int) -> Distiller:
    """Heads of 32 channels, shifted windows of 8 on a map of 16, then one window."""
    torch.manual_seed(seed)
    return Distiller(SwinV2(img_size=SIDE, **STUDENT), WIDTH)


def data(length: Length) -> tuple[Tensor, Tensor]:
    """Images of coloured blobs, and what the teacher says of each patch."""
    generator = torch.Generator().manual_seed(0)
    blobs = torch.randn(length.images, 3, SIDE // 4, SIDE // 4, generator=generator)
    images = F.interpolate(blobs, size=(SIDE, SIDE), mode="bicubic")
    first = torch.randn(64, 3, 3 * PATCH, 3 * PATCH, generator=generator) / PATCH
    second = torch.randn(WIDTH, 64, 1, 1, generator=generator)
    features = F.conv2d(F.conv2d(images, first, stride=PATCH, padding=PATCH).tanh(), second)
    return images, whiten(features.flatten(2).transpose(1, 2))


def losses(name: str, seed: int, length: Length, device: torch.device) -> list[float]:
    """Of every step."""
    images, targets = (x.to(device) for x in data(length))
    module = student(seed).to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.05)
    order = torch.Generator().manual_seed(seed)
    found = []
    with paths.computed_by(name, module):
        for _ in range(length.steps):
            chosen = torch.randint(length.images, (length.batch,), generator=order).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = module(images[chosen], targets[chosen], chosen)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
    return torch.stack(found).tolist()


def difference(ours: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Largest and mean relative difference of two curves, and the mean loss of the last tenth."""
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    return {
        "max": max(apart),
        "mean": statistics.mean(apart),
        "last": statistics.mean(ours[-max(1, len(ours) // 10) :]),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        (name, f"{found['last']:.5f}", f"{found['mean']:.1e}", f"{found['max']:.1e}")
        for name, found in result.get("differences", {}).items()
    ]
    rows += [(name, f"failed: {why}", "", "") for name, why in result.get("failed", {}).items()]
    head = ("path", "loss, mean of the last tenth", "mean difference from the reference", "largest")
    lines = [f"- {name} left out: {why}" for name, why in result.get("left_out", {}).items()]
    length = result.get("length", {})
    about = f"{length.get('steps')} steps of {length.get('batch')} images; differences are relative, step by step."
    return tables.paragraphs(about, tables.table(head, rows), "\n".join(lines))
