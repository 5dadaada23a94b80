"""How much of a set's classes frozen features know: nearest neighbours, a linear probe, and few labels.

Features are one vector for each image; nothing here looks at images. All of it is a function of features, labels and
seed.

Letters: N training features, M test features, C channels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale import UserError, dist

TEMPERATURE = 0.07  # of nearest neighbours, DINO's (arXiv 2104.14294, appendix F)
CHUNK = 4096  # test features whose neighbours are looked for at a time
STRENGTH = 1.0  # of few labels against the penalty, scikit-learn's default C
WARM_UP, MOMENTUM, BASE = 1 / 9, 0.9, 256  # of the epochs; SGD's; batch that a rate is for: MAE's linear probe (A.1)


class Features(NamedTuple):
    """Of a set: (N, C) float32, and the class of each, (N,) int64; on one device."""

    vectors: Tensor
    labels: Tensor


def nearest(train: Features, test: Features, neighbours: Sequence[int], classes: int) -> dict[int, float]:
    """Top-1 accuracy by a weighted vote of so many nearest training features, by cosine, each counting exp(cos / 0.07).

    DINO's eval_knn.py. Numbers of neighbours above N are left out; of equal votes the first class wins.
    """
    wanted = [k for k in neighbours if k <= len(train.labels)]
    if not wanted:
        return {}
    known, right = F.normalize(train.vectors, dim=1), dict.fromkeys(wanted, 0)
    for some, labels in zip(test.vectors.split(CHUNK), test.labels.split(CHUNK), strict=True):
        cosines, places = (F.normalize(some, dim=1) @ known.T).topk(max(wanted), dim=1)
        votes = (cosines / TEMPERATURE).exp()
        for k in wanted:
            counted = votes.new_zeros(len(some), classes).scatter_add_(1, train.labels[places[:, :k]], votes[:, :k])
            right[k] += int((counted.argmax(1) == labels).sum())
    return {k: count / len(test.labels) for k, count in right.items()}


class Heads(nn.Module):
    """Linear heads for several learning rates behind one batch-norm without scale and shift."""

    def __init__(self, channels: int, classes: int, count: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=1e-6)
        first = torch.empty(classes, channels)
        nn.init.trunc_normal_(first, std=0.01, generator=generator)
        self.weight = nn.Parameter(first.expand(count, -1, -1).clone())  # all begin alike
        self.bias = nn.Parameter(torch.zeros(count, classes))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (heads, B, K)."""
        return torch.einsum("bc,hkc->hbk", self.norm(x), self.weight) + self.bias[:, None]


def linear(
    train: Features, test: Features, classes: int, rates: Sequence[float], *, epochs: int, batch: int, seed: int
) -> dict[str, Any]:
    """A linear probe for each learning rate, all in one pass over the features, the rates shared out among the ranks.

    MAE's recipe (arXiv 2111.06377, A.1): batch-norm without affine, LARS without weight decay, linear warm-up and
    cosine, rates for 256 samples; upon fixed features, so without its random crops. A tenth of the training set is held
    back to choose the rate; the chosen one's accuracy on the test set is the result. A collective.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.labels), generator=generator).to(train.labels.device)
    back, rest = order[: len(order) // 10], order[len(order) // 10 :]
    if not len(back) or len(rest) < 2:
        raise UserError(f"a linear probe needs at least 20 training images, and there are {len(order)}")
    mine = [*rates][dist.rank() :: dist.world()]
    found = {}
    if mine:
        kept = Features(train.vectors[rest], train.labels[rest])
        heads = _train(kept, classes, mine, epochs, min(batch, len(rest)), generator)
        chosen = _accuracies(heads, Features(train.vectors[back], train.labels[back]))
        tested = _accuracies(heads, test)
        found = dict(zip(mine, zip(chosen, tested, strict=True), strict=True))
    everywhere = {rate: both for part in dist.gather(found) for rate, both in part.items()}
    by_rate = [
        {"rate": rate, "held_back": everywhere[rate][0], "top1": everywhere[rate][1]} for rate in sorted(everywhere)
    ]
    best = max(by_rate, key=lambda one: one["held_back"])
    return {"top1": best["top1"], "rate": best["rate"], "rates": by_rate}


def _train(
    train: Features, classes: int, rates: list[float], epochs: int, batch: int, generator: torch.Generator
) -> Heads:
    heads = Heads(train.vectors.shape[1], classes, len(rates), generator).to(train.vectors.device).train()
    peak = torch.tensor(rates, device=train.vectors.device) * batch / BASE
    steps = len(train.labels) // batch
    moments = [torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)]
    for epoch in range(epochs):
        shuffled = torch.randperm(len(train.labels), generator=generator).to(train.labels.device)
        for step in range(steps):
            some = shuffled[step * batch : (step + 1) * batch]
            scores = heads(train.vectors[some])  # h B K
            labels = train.labels[some].expand(len(rates), -1)
            F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum").div(batch).backward()
            lars(heads, moments, peak * schedule(epoch + step / steps, epochs))
    return heads.eval()


@torch.no_grad()
def lars(heads: Heads, moments: list[Tensor], rates: Tensor) -> None:
    """A step of LARS as MAE's util/lars.py: each head's weights by ||w|| / ||g|| x 0.001, its biases by plain SGD."""
    for number, parameter in enumerate((heads.weight, heads.bias)):
        assert parameter.grad is not None
        gradient = parameter.grad
        if number == 0:
            size, slope = parameter.norm(dim=(1, 2)), gradient.norm(dim=(1, 2))
            trust = torch.where((size > 0) & (slope > 0), 0.001 * size / slope, 1.0)
            gradient = gradient * trust[:, None, None]
        moments[number].mul_(MOMENTUM).add_(gradient)
        parameter.sub_(moments[number] * rates.view(-1, *[1] * (parameter.ndim - 1)))
        parameter.grad = None


def schedule(epoch: float, epochs: int) -> float:
    """Factor of the rate: linear over the first ninth of the epochs (10 of MAE's 90), then a half cosine to 0."""
    warm_up = WARM_UP * epochs
    if epoch < warm_up:
        return epoch / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - warm_up) / (epochs - warm_up))


@torch.no_grad()
def _accuracies(heads: Heads, features: Features) -> list[float]:
    right = torch.zeros(len(heads.weight), device=features.labels.device)
    for some, labels in zip(features.vectors.split(CHUNK), features.labels.split(CHUNK), strict=True):
        right += (heads(some).argmax(2) == labels).sum(1)
    return (right / len(features.labels)).tolist()


def few_shot(
    train: Features, test: Features, classes: int, shots: Sequence[int], seeds: int
) -> dict[int, dict[str, Any]]:
    """Logistic regression on so many training images of each class, drawn for each seed; accuracies on the test set.

    Channels are brought to mean 0 and deviation 1 over the whole training set. Numbers of shots that some class does
    not have are left out.
    """
    counts = train.labels.bincount(minlength=classes)
    there = counts > 0
    centre, width = train.vectors.mean(0), train.vectors.std(0).clamp_min(1e-6)
    known, asked = (train.vectors - centre) / width, (test.vectors - centre) / width
    found = {}
    for shot in shots:
        if shot > int(counts[there].min()):
            continue
        scores = []
        for seed in range(seeds):
            some = _drawn(train.labels, shot, seed)
            weight, bias = logistic(known[some], train.labels[some], classes, STRENGTH)
            predicted = (asked @ weight.T + bias).masked_fill(~there, -math.inf).argmax(1)
            scores.append(int((predicted == test.labels).sum()) / len(test.labels))
        mean = sum(scores) / seeds
        spread = (sum((score - mean) ** 2 for score in scores) / max(1, seeds - 1)) ** 0.5
        found[shot] = {"top1": mean, "deviation": spread, "seeds": scores}
    return found


def _drawn(labels: Tensor, shot: int, seed: int) -> Tensor:
    """Places of `shot` samples of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    places = [order[labels.cpu()[order] == number][:shot] for number in labels.unique().tolist()]
    return torch.cat(places).to(labels.device)


def logistic(vectors: Tensor, labels: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Weights (K, C) and biases (K,) that minimise strength x sum of cross-entropies + ||weights||^2 / 2."""
    vectors = vectors.double()
    weight = vectors.new_zeros(classes, vectors.shape[1], requires_grad=True)
    bias = vectors.new_zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = strength * F.cross_entropy(vectors @ weight.T + bias, labels, reduction="sum")
        value = value + 0.5 * weight.square().sum()
        value.backward()
        return value

    search.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach().float(), bias.detach().float()
