"""The objective against closed forms and against the official projector, a 1x1 convolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fdscale.models import backbone
from fdscale.objective import Distiller, feature_loss, whiten


def test_whitening_gives_each_token_mean_zero_and_variance_one() -> None:
    x = torch.randn(3, 5, 64, dtype=torch.float64) * 7 + 3
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    closed = (x - mean) / torch.sqrt(variance + 1e-5)
    assert whiten(x.float()).sub(closed).abs().max() < 1e-6 * 3
    assert whiten(x.bfloat16()).dtype == torch.float32


def test_loss_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = (torch.randn(4, 6, 32, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    target = torch.randn(4, 6, 32, generator=generator, dtype=torch.float64)
    for beta in (0.5, 2.0):
        d = (prediction - target).abs()
        closed = torch.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean()
        assert (d > beta).any()
        assert (d < beta).any()
        ours = feature_loss(prediction, target, beta)
        assert abs(ours.item() - closed.item()) < 1e-6
        (gradient,) = torch.autograd.grad(closed, prediction)
        (own,) = torch.autograd.grad(feature_loss(prediction, target, beta), prediction)
        assert (gradient - own).abs().max() < 1e-6


def test_weighted_loss_is_the_sum_of_the_samples_losses() -> None:
    prediction, target = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    single = [feature_loss(prediction[i : i + 1], target[i : i + 1]).item() for i in range(4)]
    weighted = feature_loss(prediction, target, weights=torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert weighted.item() == pytest.approx(single[0] + 2 * single[2], rel=1e-6)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="same shape"):
        feature_loss(torch.zeros(2, 4, 8), torch.zeros(2, 1, 8))


def test_distiller_is_backbone_then_convolution_then_loss() -> None:
    torch.manual_seed(0)
    student = backbone(
        "swin_v2",
        {
            "img_size": 32,
            "embed_dim": 16,
            "depths": [2],
            "num_heads": [2],
            "window_size": 4,
            "pretrained_window_sizes": [0],
        },
    ).eval()
    distiller = Distiller(student, 24)
    conv = nn.Conv1d(16, 24, 1)
    conv.weight.data = distiller.projector.weight.data[:, :, None].clone()
    conv.bias.data = distiller.projector.bias.data.clone()
    images, tokens = torch.randn(2, 3, 32, 32), torch.randn(2, 64, 24) * 3 + 1
    expected = nn.SmoothL1Loss(beta=2.0)(conv(student(images).transpose(1, 2)).transpose(1, 2), whiten(tokens))
    assert torch.allclose(distiller(images, tokens), expected, atol=1e-7)
    assert {name for name, _ in distiller.named_parameters() if "teacher" in name} == set()
    assert distiller.no_decay() <= {name for name, _ in distiller.named_parameters()}
    assert distiller.depth_of("projector.weight") == distiller.depth_of("backbone.norm.weight") == 3
