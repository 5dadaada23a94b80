"""Effective rank, channels and CKA against plain formulas on all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fdscale.diagnose.features import LayerLikeness, Likeness, Moments, effective_rank


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019 by Gram matrices and HSIC: another way than ours."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, l = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre  # noqa: E741
    return float((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))


def test_cka_is_that_of_gram_matrices() -> None:
    rng = np.random.default_rng(0)
    left = [rng.normal(size=(60, 5)), rng.normal(size=(60, 7)) + 3]
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    right = [2.5 * left[0] @ turn, left[1] + 0.5 * rng.normal(size=(60, 7)), rng.normal(size=(60, 3))]
    found = Likeness(2, 3)
    for part in (slice(0, 13), slice(13, 60)):
        found.add([torch.tensor(x[part]) for x in left], [torch.tensor(y[part]) for y in right])
    result = found.result()
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            assert result[i, j] == pytest.approx(cka(x, y), rel=1e-9)
    assert result[0, 0] == pytest.approx(1)  # rotated and scaled is alike


def test_effective_rank_and_channels() -> None:
    assert effective_rank(torch.tensor([1.0, 1.0, 1.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([7.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    tokens = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(6) + 2
    moments = Moments()
    moments.add(tokens[0])
    moments.add(tokens[1])
    found, flat = moments.result(), tokens.flatten(0, 1).double()
    assert found.tokens == 100
    assert torch.allclose(found.mean, flat.mean(0))
    assert torch.allclose(found.std, flat.std(0, correction=0), atol=1e-9)
    wanted = torch.linalg.svdvals(flat - flat.mean(0)).square() / 100
    assert torch.allclose(found.eigenvalues, wanted, atol=1e-9)


def test_cka_of_many_layers_is_the_same_and_keeps_the_first_images_alone() -> None:
    rng = np.random.default_rng(1)
    layers = [rng.normal(size=(50, 6)).astype(np.float32) + place for place in range(3)]
    layers.append(layers[0] * 3 + 0.1 * layers[1])
    found = LayerLikeness(most=40)
    for numbers in (list(range(25, 50)), list(range(25))):
        found.add(numbers, [torch.from_numpy(layer[numbers]) for layer in layers])
    result = found.result()
    assert result.shape == (4, 4)
    for i, x in enumerate(layers):
        for j, y in enumerate(layers):
            assert result[i, j].item() == pytest.approx(cka(x[:40].astype(float), y[:40].astype(float)), rel=1e-6)
