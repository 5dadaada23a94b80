"""The loss around trained weights, along random directions that are scaled as the weights are (Li et al. 2018).

Every direction is a function of (seed, name of the parameter). A filter is a row of the weights: what one output
channel sees; the direction's has the norm of the weights'. Vectors (norms, biases, scales of layers) stay as they are.
All of it is float32; the networks have no batch-norm whose statistics would have to be taken anew.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fdscale import dist

Values = dict[str, Tensor]
Loss = Callable[[], dict[str, float]]  # of the network as it is now, over all images; the same ones each time
EPS = 1e-10


class Surface(NamedTuple):
    """Measured values by name, each (len(rows),) or (len(rows), len(columns)), at these multiples of the directions."""

    values: dict[str, Tensor]
    rows: list[float]
    columns: list[float]


def direction(network: nn.Module, seed: int, axis: int = 0) -> Values:
    """A random direction by name, filter-normalised; parameters of fewer than two dimensions are left out."""
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        number = int.from_bytes(hashlib.sha256(f"{seed} {axis} {name}".encode()).digest()[:7], "big")
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        found[name] = normalised(noise.to(parameter.device), parameter.detach().float())
    return found


def normalised(noise: Tensor, weights: Tensor) -> Tensor:
    """Noise whose filters (along the first axis) have the norms of the weights'."""
    lengths = noise.flatten(1).norm(dim=1) + EPS
    factors = weights.flatten(1).norm(dim=1) / lengths
    return noise * factors.view(-1, *[1] * (noise.ndim - 1))


def surface(network: nn.Module, loss: Loss, directions: Sequence[Values], steps: Sequence[Sequence[float]]) -> Surface:
    """What `loss` gives at the weights + a d1, or + a d1 + b d2; the weights are as before afterwards, to the bit.

    directions: one or two. steps: of each, the multiples.
    """
    assert len(directions) == len(steps) in (1, 2)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    rows, columns = list(steps[0]), list(steps[1]) if len(steps) > 1 else [0.0]
    found: list[dict[str, float]] = []
    try:
        for a in rows:
            for b in columns:
                _place(network, before, directions, (a, b))
                found.append(loss())
    finally:
        _place(network, before, (), ())
    shape = (len(rows), len(columns)) if len(steps) > 1 else (len(rows),)
    values = {name: torch.tensor([one[name] for one in found]).view(shape) for name in found[0]}
    return Surface(values, rows, columns if len(steps) > 1 else [])


def _place(network: nn.Module, before: Values, directions: Sequence[Values], steps: Sequence[float]) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = before[name]
            for one, step in zip(directions, steps, strict=False):
                if name in one and step:
                    value = value + step * one[name]
            parameter.copy_(value)


def sharpness(
    network: nn.Module, losses: Callable[[], Iterable[Tensor]], seed: int, steps: int = 20, close: float = 1e-3
) -> tuple[float, float]:
    """The eigenvalue of largest size of a loss's Hessian over all parameters, by power iteration; and how much the last
    step changed it, relative to it. A collective.

    losses: parts of the loss, each with a graph of its own, that sum up to it over all ranks; the same at each call.
    steps: at most; fewer where a step changes the eigenvalue by less than `close`, relative to it.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(p.shape, generator=generator).to(p.device) for p in parameters]
    value = change = math.nan
    for _ in range(steps):
        length = math.sqrt(sum(float(part.double().square().sum()) for part in vector))
        if length == 0:  # no curvature along anything that was tried
            return 0.0, 0.0
        vector = [part / length for part in vector]
        after = [torch.zeros_like(parameter) for parameter in parameters]
        for loss in losses():
            _add_product(after, loss, parameters, vector)
        after = [dist.total(part) for part in after]
        before, value = value, float(sum((h * v).double().sum() for h, v in zip(after, vector, strict=True)))
        vector, change = after, abs(value - before) / max(abs(value), 1e-12)
        if change < close:
            break
    return value, change


def _add_product(found: list[Tensor], loss: Tensor, parameters: list[nn.Parameter], vector: list[Tensor]) -> None:
    """Add the Hessian of a loss times a vector."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    along = sum((g * v).sum() for g, v in zip(gradients, vector, strict=True) if g is not None)
    if isinstance(along, Tensor) and along.requires_grad:
        for part, more in zip(found, torch.autograd.grad(along, parameters, allow_unused=True), strict=True):
            if more is not None:
                part += more
