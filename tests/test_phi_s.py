"""PHI-S against NumPy in float64, what it promises, and sums that do not depend on their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fdscale import UserError
from fdscale.phi_s import Moments, PhiS, hadamard, rotation

# Widths of teachers that timm has, and those of the maps of small ones.
WIDTHS = (1, 2, 12, 28, 40, 112, 192, 320, 352, 384, 512, 640, 768, 1024, 1152, 1280, 1408, 1536, 1664)


def parts(channels: int, count: int = 5, tokens: int = 60) -> list[torch.Tensor]:
    """Tokens (B, L, C) of very unequal and correlated channels, far from zero mean."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(channels, channels, generator=generator) * torch.logspace(-2, 1, channels)
    return [torch.randn(4, tokens // 4, channels, generator=generator) @ mix + 3.0 for _ in range(count)]


def moments(some: list[torch.Tensor], first: torch.Tensor, count: int) -> Moments:
    found = Moments(first, count)
    for one in some:
        found.add(one)
    return found


@pytest.mark.parametrize("order", WIDTHS)
def test_a_hadamard_matrix_has_orthogonal_rows_of_ones(order: int) -> None:
    found = hadamard(order).double()
    assert set(found.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [3, 6, 52, 92])
def test_a_width_without_one_is_refused(order: int) -> None:
    with pytest.raises(UserError, match=f"{order} channels.*take whiten: layer_norm"):
        PhiS(order)


def test_mean_and_covariance_are_numpys() -> None:
    data = parts(12)
    mean, covariance = moments(data, data[0], len(data)).mean_and_covariance()
    rows = torch.cat(data).reshape(-1, 12).double().numpy()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows.T, bias=True), rtol=1e-10, atol=1e-10)


def test_ranks_that_share_the_parts_get_the_same_bits() -> None:
    data = parts(12, count=7)
    whole = moments(data, data[0], 7)
    for world in (2, 3, 7):
        shares = [moments(data[rank::world][::-1], data[0], 7) for rank in range(world)]
        assert torch.equal(sum(share.sums for share in shares), whole.sums)
        assert sum(share.count for share in shares) == whole.count


def test_every_channel_has_mean_0_and_variance_1_and_distances_keep_their_ratios() -> None:
    data = parts(28, tokens=400)
    mean, covariance = moments(data, data[0], len(data)).mean_and_covariance()
    module = PhiS(28)
    assert not module.is_set
    module.set(mean, rotation(covariance))
    assert module.is_set
    rows = torch.cat(data).reshape(-1, 28)
    out = module.bfloat16()(rows).double()  # the numbers are not rounded with the weights of an engine
    assert out.mean(0).abs().max() < 1e-4
    assert out.var(0, unbiased=False).sub(1).abs().max() < 1e-4
    scale = rows.double().var(0, unbiased=False).mean().sqrt()
    ratio = torch.pdist(out[:50]) / torch.pdist(rows[:50].double())
    assert (ratio * scale - 1).abs().max() < 1e-4
    # The same by NumPy: rows of H U' / (sqrt(C) s), up to the sign of each direction, which leaves the Gram matrix.
    matrix = rotation(covariance).numpy()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(28) / scale.item() ** 2, atol=1e-9)


def test_features_that_cannot_be_scaled_are_refused() -> None:
    data = parts(12)
    with pytest.raises(UserError, match="not finite, or all zero"):
        Moments(data[0] * torch.inf, 1)
    with pytest.raises(UserError, match="more than 64 times as large"):
        moments([data[1] * 1000], data[0], 2)
    with pytest.raises(UserError, match="do not vary"):
        moments([torch.ones(4, 8, 12)], torch.ones(4, 8, 12), 1).mean_and_covariance()
