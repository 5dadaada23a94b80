"""Probes of frozen features against scikit-learn, MAE's LARS, and classes that can be told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from fdscale import UserError
from fdscale.tasks import probe
from fdscale.tasks.probe import Features, Heads


def blobs(count: int, classes: int = 5, channels: int = 12, noise: float = 1.0, seed: int = 0) -> Features:
    """Points around a centre of each class; centres are the same for all seeds."""
    centres = torch.randn(classes, channels, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Features(centres[labels] + noise * torch.randn(count, channels, generator=generator), labels)


def test_nearest_neighbours_are_sklearns() -> None:
    train, test = blobs(300, noise=1.5), blobs(200, noise=1.5, seed=1)
    found = probe.nearest(train, test, (1, 10, 50, 1000), 5)
    assert set(found) == {1, 10, 50}
    for k, accuracy in found.items():
        judge = KNeighborsClassifier(k, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07))
        judge.fit(train.vectors.numpy(), train.labels.numpy())
        assert accuracy == pytest.approx(judge.score(test.vectors.numpy(), test.labels.numpy()))
        assert 0.3 < accuracy < 1
    assert probe.nearest(train, test, (1000,), 5) == {}


def test_logistic_regression_is_sklearns() -> None:
    train = blobs(200, classes=4, noise=2.0)
    weight, bias = probe.logistic(train.vectors, train.labels, 4, strength=0.5)
    theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=5000).fit(
        train.vectors.double().numpy(), train.labels.numpy()
    )
    torch.testing.assert_close(weight, torch.from_numpy(theirs.coef_).float(), rtol=1e-3, atol=1e-3)
    shares = F.softmax(train.vectors @ weight.T + bias, 1)
    expected = torch.from_numpy(theirs.predict_proba(train.vectors.double().numpy())).float()
    torch.testing.assert_close(shares, expected, rtol=1e-3, atol=1e-4)


def test_few_labels_draw_as_many_of_each_class_and_more_help() -> None:
    train, test = blobs(400, noise=1.5), blobs(300, noise=1.5, seed=1)
    places = probe._drawn(train.labels, 3, seed=4)
    assert train.labels[places].bincount().tolist() == [3] * 5
    found = probe.few_shot(train, test, 5, (1, 10, 1000), seeds=4)
    assert set(found) == {1, 10}
    assert all(len(one["seeds"]) == 4 for one in found.values())
    assert found[10]["top1"] > found[1]["top1"] + 0.05
    assert found[1]["deviation"] == pytest.approx(np.std(found[1]["seeds"], ddof=1))


def maes_step(weight: torch.Tensor, gradient: torch.Tensor, moment: torch.Tensor, rate: float) -> torch.Tensor:
    """As facebookresearch/mae util/lars.py, without weight decay."""
    step = gradient.clone()
    if weight.ndim > 1:
        sizes = weight.norm(), step.norm()
        step = step * (0.001 * sizes[0] / sizes[1] if min(sizes) > 0 else 1.0)
    moment.mul_(0.9).add_(step)
    return weight - rate * moment


def test_heads_of_several_rates_learn_as_each_alone_by_maes_lars() -> None:
    data = blobs(64)
    heads = Heads(12, 5, 3, torch.Generator().manual_seed(0)).train()
    rates = torch.tensor([0.1, 1.0, 5.0])
    moments = [torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)]
    alone = [(heads.weight[h].detach().clone(), heads.bias[h].detach().clone()) for h in range(3)]
    own = [(torch.zeros(5, 12), torch.zeros(5)) for _ in range(3)]
    x = F.batch_norm(data.vectors, None, None, training=True, eps=1e-6)
    for _ in range(4):
        scores = heads(data.vectors)
        labels = data.labels.expand(3, -1)
        F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum").div(64).backward()
        probe.lars(heads, moments, rates)
        for h in range(3):
            pair = [one.requires_grad_() for one in alone[h]]
            loss = F.cross_entropy(x @ pair[0].T + pair[1], data.labels)
            gradients = torch.autograd.grad(loss, pair)
            alone[h] = tuple(
                maes_step(p.detach(), g, m, float(rates[h])) for p, g, m in zip(pair, gradients, own[h], strict=True)
            )
    for h in range(3):
        torch.testing.assert_close(heads.weight[h], alone[h][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(heads.bias[h], alone[h][1], rtol=1e-4, atol=1e-6)


def test_a_linear_probe_tells_classes_apart_and_chooses_its_rate_without_the_test_set() -> None:
    train, test = blobs(1000, noise=0.3), blobs(300, noise=0.3, seed=1)
    found = probe.linear(train, test, 5, (1e-4, 0.3, 3.0), epochs=30, batch=128, seed=0)
    assert found["top1"] > 0.9
    assert [one["rate"] for one in found["rates"]] == [1e-4, 0.3, 3.0]
    assert found["rate"] == max(found["rates"], key=lambda one: one["held_back"])["rate"] != 1e-4
    assert found == probe.linear(train, test, 5, (1e-4, 0.3, 3.0), epochs=30, batch=128, seed=0)
    with pytest.raises(UserError, match="at least 20 training images, and there are 8"):
        probe.linear(blobs(8), test, 5, (1.0,), epochs=1, batch=4, seed=0)


def test_the_rate_rises_and_falls() -> None:
    assert [probe.schedule(epoch, 90) for epoch in (0, 5, 10, 50, 90)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert probe.schedule(1, 18) == pytest.approx(0.5)
    assert math.isclose(probe.schedule(20, 20), 0, abs_tol=1e-12)
