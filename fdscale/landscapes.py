"""`fdscale diagnose --landscape`: loss and accuracy of fine-tuned classifiers around their weights, and sharpness.

arXiv 2205.14141, section 4, by the method of Li et al. 2018; `diagnose.landscape` has the definitions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fdscale import UserError, classify, config, dist, student
from fdscale.diagnose.landscape import direction, sharpness, surface
from fdscale.inputs import open_heldout
from fdscale.kernels import attention

AROUND = ("loss", "top1")
KERNELS = "reference"  # the implementation of window attention that has second derivatives


class Wanted(NamedTuple):
    """shape: line or plane. points: on each axis, from -reach to reach times the direction, with the weights in the
    middle. seeds: of directions, or of pairs of them."""

    shape: str
    points: int
    reach: float
    seeds: int

    def check(self) -> None:
        """Raises UserError."""
        if self.points < 3 or self.points % 2 == 0:
            raise UserError(
                f"--points must be odd and at least 3, so that the weights are in the middle: {self.points}"
            )
        if not 0 < self.reach < float("inf") or self.seeds < 1:
            raise UserError(f"--reach and --seeds must be positive, got {self.reach:g} and {self.seeds}")
        chosen, source = attention.asked(KERNELS)
        if chosen != KERNELS:
            raise UserError(
                f"{source} asks for {chosen}, but a landscape's sharpness needs second derivatives: unset it, and "
                f"{KERNELS} is taken"
            )


def around(settings: config.Config, weights: Path | str, images: int, wanted: Wanted) -> dict[str, Any]:
    """The landscape of a classifier on so many images of data.heldout_shards, as plain data; a collective.

    multiples: of the directions. loss, top1: by seed; of a plane, by multiples of the first and of the second
    direction. sharpness: the Hessian's largest eigenvalue, and how much its last step changed it.
    """
    index = open_heldout(settings.data)
    if index is None:
        raise UserError("data.heldout_shards is not set: --set data.heldout_shards=DIRECTORY_OR_PATTERN")
    data = dataclasses.replace(settings.data, heldout_samples=min(images, index.samples))
    # No checkpointing, since some kinds have no second derivatives.
    memory = dataclasses.replace(settings.memory, kernels=KERNELS, attention_chunk=(0,), checkpoint=("none",))
    once = dataclasses.replace(settings.classify, crops=1)
    settings = dataclasses.replace(settings, data=data, memory=memory, classify=once)
    network = student.loaded(settings, weights)

    counted = 0  # images that can be read

    def measured() -> dict[str, float]:
        nonlocal counted
        found = classify.evaluate(settings, index, network, torch.float32, lambda batch: True)
        assert found is not None
        counted = found.samples
        return {"loss": found.loss, "top1": found.top1}

    half = wanted.points // 2
    multiples = [wanted.reach * (place - half) / half for place in range(wanted.points)]
    axes = 2 if wanted.shape == "plane" else 1
    surfaces = [
        surface(network, measured, [direction(network, seed, axis) for axis in range(axes)], [multiples] * axes)
        for seed in range(wanted.seeds)
    ]
    with sdpa_kernel(SDPBackend.MATH):
        eigenvalue, change = sharpness(network, functools.partial(_losses, settings, index, network, counted), seed=0)
    return {
        "images": counted,
        "multiples": multiples,
        **{name: [one.values[name].tolist() for one in surfaces] for name in AROUND},
        "sharpness": eigenvalue,
        "sharpness_changed_by": change,
    }


def _losses(settings: config.Config, index: Any, network: nn.Module, counted: int) -> Iterator[Tensor]:
    """This rank's parts of the mean cross-entropy of so many images."""
    for batch, images in classify.seen(settings, index, torch.float32, settings.classify.classes):
        labels, kept = (batch[name].to(dist.device()) for name in ("labels", "weights"))
        losses = F.cross_entropy(network(images).float(), labels, reduction="none")
        yield losses[kept.bool()].sum() / counted


def for_a_person(name: str, found: dict[str, Any]) -> str:
    """A line or two."""
    middle = len(found["multiples"]) // 2
    losses = torch.tensor(found["loss"])
    here = losses[:, middle] if losses.ndim == 2 else losses[:, middle, middle]
    ends = losses[:, [0, -1]] if losses.ndim == 2 else losses[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    return (
        f"{name}: loss {float(here.mean()):.4f}, at the ends {float(ends.mean()):.4f}; largest eigenvalue of the "
        f"Hessian {found['sharpness']:.3g} (changed by {found['sharpness_changed_by']:.1%} in the last step)"
    )
