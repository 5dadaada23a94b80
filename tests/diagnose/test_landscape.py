"""The landscape of a quadratic is exact, filter normalisation does not see scales, power iteration finds curvature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fdscale.diagnose.landscape import direction, normalised, sharpness, surface


class Quadratic(nn.Module):
    """0.5 w' A w with a filter a row, and a vector that has no direction."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = nn.Parameter(torch.ones(3))
        self.curve = torch.diag(torch.linspace(-1.0, 5.0, 12))

    def forward(self) -> Tensor:
        flat = self.weight.flatten()
        return 0.5 * flat @ self.curve @ flat + self.bias.square().sum()


def test_a_quadratics_surface_is_exact_and_leaves_the_weights() -> None:
    network = Quadratic()
    before = network.weight.detach().clone()
    one, two = direction(network, seed=3), direction(network, seed=3, axis=1)
    assert set(one) == {"weight"}
    steps = ([-1.0, -0.5, 0.0, 0.5], [0.0, 2.0])
    found = surface(network, lambda: {"loss": network().item(), "twice": 2 * network().item()}, (one, two), steps)
    assert torch.equal(network.weight, before)
    for row, a in enumerate(steps[0]):
        for column, b in enumerate(steps[1]):
            flat = (before + a * one["weight"] + b * two["weight"]).flatten()
            wanted = float(0.5 * flat @ network.curve @ flat) + 3
            assert found.values["loss"][row, column] == pytest.approx(wanted, rel=1e-5)
    assert torch.allclose(found.values["twice"], 2 * found.values["loss"])
    line = surface(network, lambda: {"loss": network().item()}, (one,), (steps[0],))
    assert torch.allclose(line.values["loss"], found.values["loss"][:, 0])
    assert line.columns == []


def test_directions_are_functions_of_seed_and_name_with_the_filters_norms() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.LayerNorm(5), nn.Linear(5, 2))
    one = direction(network, seed=1)
    assert set(one) == {"0.weight", "2.weight"}
    for name, value in one.items():
        weights = network.get_parameter(name)
        assert torch.allclose(value.flatten(1).norm(dim=1), weights.flatten(1).norm(dim=1), rtol=1e-4)
        assert torch.equal(value, direction(network, seed=1)[name])
        assert not torch.equal(value, direction(network, seed=2)[name])
        assert not torch.equal(value, direction(network, seed=1, axis=1)[name])
    assert not normalised(torch.ones(2, 3), torch.zeros(2, 3)).any()


def test_the_scale_of_a_network_does_not_matter() -> None:
    """Two layers with a ReLU between: one times 10, the other times 0.1 is the same function, and the same surface."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    x, y = torch.randn(32, 4), torch.randn(32, 3)

    def loss() -> dict[str, float]:
        return {"loss": nn.functional.mse_loss(network(x), y).item()}

    def line() -> Tensor:
        return surface(network, loss, (direction(network, seed=0),), ([-0.5, 0.0, 0.25, 1.0],)).values["loss"]

    before = line()
    with torch.no_grad():
        network[0].weight *= 10
        network[2].weight *= 0.1
    assert torch.allclose(line(), before, rtol=1e-4)


def test_the_sharpest_direction_of_a_quadratic() -> None:
    network = Quadratic()
    value, change = sharpness(network, lambda: [network()], seed=0, steps=60, close=1e-6)
    assert value == pytest.approx(5.0, rel=1e-3)
    parts = sharpness(network, lambda: (network() * share for share in (0.3, 0.7)), seed=0, steps=60, close=1e-6)
    assert parts[0] == pytest.approx(value, rel=1e-5)
    assert change < 1e-3
    flat = nn.Linear(3, 1)
    assert sharpness(flat, lambda: [flat(torch.ones(3)).sum()], seed=0) == (0.0, 0.0)  # linear: no curvature
