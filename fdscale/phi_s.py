"""PHI-S: a teacher's features rotated and scaled so that every channel has mean 0 and variance 1 over the data.

Ranzinger et al., PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation, arXiv 2410.01680. With the
mean m and the covariance U diag(v) U' of a teacher's tokens (rows of U', the principal directions), and a Hadamard
matrix H of ones and minus ones,

    y = H U' (x - m) / (sqrt(C) s),    s^2 = mean of v.

Each channel of y is a sum of all principal components with weights of one size, so all have the same variance, 1 after
the division by one number. Unlike whitening by the covariance it loses nothing: directions keep their share.

Shapes: N tokens, C channels of the teacher.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from fdscale import UserError

SPREAD = 6  # bits: a part's sums may be so much larger than the first one's


class PhiS(nn.Module):
    """y of x, float32. Its numbers are buffers: in every checkpoint, and so the same after a resume.

    They are held as the bits of float32 in int32, since engines round whatever is a float to the precision of the
    weights. Until `set` they are zero.
    """

    constant = True  # no step writes to its buffers
    mean: Tensor
    rotation: Tensor

    def __init__(self, channels: int):
        super().__init__()
        hadamard(channels)  # a width without one is an error now
        for name, shape in (("mean", (channels,)), ("rotation", (channels, channels))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device="cpu"))

    @property
    def is_set(self) -> bool:
        """Whether the numbers are known."""
        return bool(self.rotation.any())

    def set(self, mean: Tensor, rotation: Tensor) -> None:
        """Take these, of `Moments` and `rotation`."""
        self.mean.copy_(mean.float().view(torch.int32))
        self.rotation.copy_(rotation.float().view(torch.int32))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return (tokens.float() - self.mean.view(torch.float32)) @ self.rotation.view(torch.float32)


class Moments:
    """Sums over tokens and over their products, as whole numbers: in whatever order they are added, they are the same.

    So any number of ranks gives the same bits, as long as each part does. first: the tokens (..., C) of the first part,
    which say what one unit is; they are not added. parts: how many there will be.
    """

    def __init__(self, first: Tensor, parts: int):
        largest = float(_sums(first).abs().max())
        if not 0 < largest < math.inf:
            raise UserError(
                "phi_s: the teacher's features are not finite, or all zero; a dtype of float16 can overflow: take "
                "bfloat16 or float32"
            )
        self._limit = 2.0**SPREAD * largest
        self._unit = 2.0 ** (math.frexp(self._limit)[1] + math.frexp(parts)[1] - 62)  # all parts are below 2^62
        channels = first.shape[-1]
        self.sums = torch.zeros(channels + 1, channels, dtype=torch.int64, device=first.device)  # of tokens: last row
        self.count = torch.zeros(1, dtype=torch.int64, device=first.device)

    def add(self, tokens: Tensor) -> None:
        """One part: (..., C). Raises UserError where it is out of all proportion to the first one, or not finite."""
        sums = _sums(tokens)
        if not bool((sums.abs() <= self._limit).all()):
            raise UserError(
                f"phi_s: the teacher's features of some images are not finite, or more than {2**SPREAD} times as large "
                "as others'; whiten: layer_norm can do with such"
            )
        self.sums += (sums / self._unit).round().long()
        self.count += tokens[..., 0].numel()

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """(C,) and (C, C), float64 on the CPU. Raises UserError for features that do not vary."""
        count, sums = self.count.item(), self.sums.cpu().double() * self._unit
        mean = sums[-1] / count
        covariance = sums[:-1] / count - torch.outer(mean, mean)
        if not covariance.trace() > 1e-9 * mean.square().sum():
            raise UserError("phi_s: the teacher's features do not vary, so there is nothing to scale")
        return mean, covariance


def rotation(covariance: Tensor) -> Tensor:
    """The matrix (C, C) that x - m is multiplied by from the right."""
    _, directions = torch.linalg.eigh(covariance)  # columns of U
    return directions @ hadamard(len(covariance)).double().T / covariance.trace().sqrt()  # trace = C s^2


def _sums(tokens: Tensor) -> Tensor:
    """(C + 1, C) in float64: of the products of channels, and of the channels."""
    rows = tokens.flatten(0, -2).double()
    return torch.cat([rows.T @ rows, rows.sum(0, keepdim=True)])


def hadamard(order: int) -> Tensor:
    """An order x order matrix of ones and minus ones whose rows are orthogonal, int8.

    Sylvester's doubling, and Paley's two constructions for primes. Raises UserError where these lead to none.
    """
    found = _hadamard(order)
    if found is None:
        raise UserError(
            f"phi_s needs a Hadamard matrix for the teacher's {order} channels, and Paley's and Sylvester's "
            "constructions give none; take whiten: layer_norm"
        )
    return found


def _hadamard(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if order % 4 == 0 and _is_prime(order - 1):
        return _paley_1(order - 1)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return _paley_2(order // 2 - 1)
    half = _hadamard(order // 2) if order % 2 == 0 else None
    return None if half is None else torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), half)


def _paley_1(q: int) -> Tensor:
    """For a prime q of the form 4k + 3: I + S with S = [[0, 1], [-1, Q]], Q the Jacobsthal matrix of q."""
    found = torch.eye(q + 1, dtype=torch.int8)
    found[0, 1:], found[1:, 0] = 1, -1
    found[1:, 1:] += _jacobsthal(q)
    return found


def _paley_2(q: int) -> Tensor:
    """For a prime q of the form 4k + 1: each entry of [[0, 1], [1, Q]] stands for 2 x 2."""
    core = torch.ones(q + 1, q + 1, dtype=torch.int8)
    core[0, 0] = 0
    core[1:, 1:] = _jacobsthal(q)
    zero, one = torch.tensor([[[1, -1], [-1, -1]], [[1, 1], [1, -1]]], dtype=torch.int8)
    return torch.kron(core, one) + torch.kron((core == 0).to(torch.int8), zero)


def _jacobsthal(q: int) -> Tensor:
    """Entry (a, b): 1 where a - b is a square modulo the prime q, -1 where not, 0 where a = b."""
    character = torch.full((q,), -1, dtype=torch.int8)
    character[torch.arange(1, q).square() % q] = 1
    character[0] = 0
    places = torch.arange(q)
    return character[(places[:, None] - places) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in itertools.takewhile(lambda i: i * i <= number, itertools.count(2)))
