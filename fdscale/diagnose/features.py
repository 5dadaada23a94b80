"""Properties of features, gathered over any number of images in memory that does not grow with them.

Letters: n tokens, C D channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdscale import dist


class Spectrum(NamedTuple):
    """Of tokens: effective_rank, exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007),
    from 1 to C; mean and standard deviation of each channel, (C,); eigenvalues (C,), falling; tokens: how many."""

    effective_rank: float
    mean: Tensor
    std: Tensor
    eigenvalues: Tensor
    tokens: int


class Moments:
    """Sums of tokens (n, C) and of their products, float64."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = self._products = torch.zeros(())

    def add(self, tokens: Tensor) -> None:
        """Some tokens (..., C)."""
        wide = tokens.flatten(0, -2).double()
        self._sum = self._sum + wide.sum(0).cpu()
        self._products = self._products + (wide.t() @ wide).cpu()
        self._count += len(wide)

    def result(self) -> Spectrum:
        """Of the tokens of all ranks; a collective."""
        count = int(dist.total(torch.tensor(self._count)))
        mean = dist.total(self._sum.clone()) / count
        covariance = dist.total(self._products.clone()) / count - mean[:, None] * mean
        values = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
        return Spectrum(effective_rank(values), mean, covariance.diagonal().clamp_min(0).sqrt(), values, count)


def effective_rank(values: Tensor) -> float:
    """exp(entropy) of eigenvalues (C,) that are scaled to sum to 1; 0 where all are 0."""
    if float(values.sum()) <= 0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


class Likeness:
    """Linear CKA (Kornblith et al. 2019) between sets of features of the same tokens: 1 alike but for rotation and
    scale, 0 unrelated. From sums alone: |cov(x, y)|^2 / (|cov(x, x)| |cov(y, y)|), Frobenius norms."""

    def __init__(self, left: int, right: int) -> None:
        """So many sets on either side."""
        self._left, self._right = left, right
        self._count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, left: list[Tensor], right: list[Tensor]) -> None:
        """Tokens (n, C_i) of each set, rows of all in the same order."""
        self._count += len(left[0])
        wide = [[one.double() for one in side] for side in (left, right)]
        for side, name in zip(wide, ("x", "y"), strict=True):
            for place, one in enumerate(side):
                self._gather(f"{name}{place}", one.sum(0))
                self._gather(f"{name}{name}{place}", one.t() @ one)
        for i, x in enumerate(wide[0]):
            for j, y in enumerate(wide[1]):
                self._gather(f"xy{i},{j}", x.t() @ y)

    def _gather(self, name: str, value: Tensor) -> None:
        value = value.cpu()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def result(self) -> Tensor:
        """(left, right) over all ranks; a collective."""
        count = int(dist.total(torch.tensor(self._count)))
        sums = {name: dist.total(value.clone()) / count for name, value in sorted(self._sums.items())}

        def covariance(product: str, left: str, right: str) -> Tensor:
            return (sums[product] - sums[left][:, None] * sums[right]).norm()

        own = {
            f"{name}{place}": covariance(f"{name}{name}{place}", f"{name}{place}", f"{name}{place}")
            for name, many in (("x", self._left), ("y", self._right))
            for place in range(many)
        }
        return torch.stack(
            [
                torch.stack(
                    [
                        covariance(f"xy{i},{j}", f"x{i}", f"y{j}").square()
                        / (own[f"x{i}"] * own[f"y{j}"]).clamp_min(1e-300)
                        for j in range(self._right)
                    ]
                )
                for i in range(self._left)
            ]
        )


class LayerLikeness:
    """Linear CKA between any two sets of features of the same images, many sets of few images: rows are kept, of the
    first `most` images, since products of all pairs of wide layers would not fit."""

    def __init__(self, most: int = 512) -> None:
        self._most = most
        self._rows: dict[int, list[Tensor]] = {}

    def add(self, numbers: list[int], sets: list[Tensor]) -> None:
        """Rows (n, C_i) of each set, of images with these numbers."""
        for place, number in enumerate(numbers):
            if number < self._most:
                self._rows[number] = [one[place].float().cpu() for one in sets]

    def result(self) -> Tensor:
        """(sets, sets) over the images of all ranks; a collective."""
        rows = {number: row for part in dist.gather(self._rows) for number, row in part.items()}
        kept = [rows[number] for number in sorted(rows)]
        grams = []
        for layer in zip(*kept, strict=True):
            centred = torch.stack(layer).double()
            centred = centred - centred.mean(0)
            gram = (centred @ centred.t()).flatten()
            grams.append(gram / gram.norm().clamp_min(1e-300))
        together = torch.stack(grams)
        return together @ together.t()
