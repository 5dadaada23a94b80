"""Maps and windows for the tests of window attention, the official formula, and a meter of live memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdscale.bench.attention import official

# map, window, shift: whole windows, one window, shifts along both axes and one, padded maps, maps within a window
CASES = [
    ((8, 8), (4, 4), (0, 0)),
    ((4, 4), (4, 4), (0, 0)),
    ((8, 12), (4, 4), (2, 2)),
    ((6, 12), (2, 6), (1, 3)),
    ((4, 8), (4, 4), (0, 2)),
    ((7, 10), (4, 4), (0, 0)),
    ((7, 10), (4, 4), (2, 2)),
    ((9, 5), (4, 3), (2, 1)),
    ((3, 8), (4, 4), (0, 2)),
    ((2, 3), (4, 5), (0, 0)),
]


def inputs(
    size: tuple[int, int], window: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv of 2 images, 2 heads of 3 channels; table; logit scales of which one is clamped."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, *size, 3 * 2 * 3, generator=generator, dtype=torch.float64)
    table = 16 * torch.rand(2, 2 * window[0] - 1, 2 * window[1] - 1, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), table.to(dtype), torch.tensor([1.5, 9.0], dtype=dtype)


def gradients(out: Tensor, leaves: list[Tensor], rounded: torch.dtype = torch.float64) -> list[Tensor]:
    """Those of the leaves for one random gradient of `out`, which is first rounded to a dtype."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(rounded)
    return list(torch.autograd.grad(out, leaves, grad.to(out)))


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def random_inputs(batch: int, size: tuple[int, int], heads: int, dim: int, window: int) -> tuple[Tensor, ...]:
    """float64: qkv, a table in (0, 16), and log scales of 10, 30, 100 and beyond the clamp, in turn."""
    generator = torch.Generator().manual_seed(window)
    qkv = torch.randn(batch, *size, 3 * heads * dim, generator=generator, dtype=torch.float64)
    table = torch.randn(heads, 2 * window - 1, 2 * window - 1, generator=generator, dtype=torch.float64)
    scales = torch.tensor([10.0, 30.0, 100.0, 1000.0], dtype=torch.float64).log()
    return qkv, 16 * table.sigmoid(), scales[torch.arange(heads) % 4]


ADVERSARIAL = ("random", "equal keys", "rows of zeros", "huge bias", "tiny rows")


def adversarial(case: str) -> tuple[Tensor, ...]:
    """float64 inputs at which rounding or a wrong formula shows: 2 images of 16 x 16, windows of 8, 4 heads of 32."""
    qkv, table, scale = random_inputs(2, (16, 16), 4, 32, 8)
    if case == "equal keys":
        qkv[..., 128:256] = qkv[:, :1, :1, 128:256].clone()
    elif case == "rows of zeros":
        qkv[:, ::3, :, :256] = 0.0
    elif case == "tiny rows":
        qkv[..., :256] *= 1e-6
    elif case == "huge bias":
        table[:, 3, 5], table[:, 9, 2] = 500.0, -500.0
    return qkv, table, scale


def assert_as_exact_as_eager(
    attend: Callable[..., Tensor], case: str, dtype: torch.dtype, factor: float = 1.5, wide_sums: bool = True
) -> None:
    """The error of each result is at most 1.5 times, or `factor`, that of the official code under the same autocast.

    wide_sums: nothing is rounded to 16 bits on the way to the gradients of table and scale.

    Against the official formula in float64 on the same rounded inputs; scales from 10 to beyond the clamp.
    """
    qkv, table, scale = adversarial(case)
    data = (qkv.to(dtype), table.float(), scale.float())
    exact, eager, ours = leaves_of(*(x.double() for x in data)), leaves_of(*data), leaves_of(*data)
    out = official(*exact, 8, 4)
    expected = [out, *gradients(out, exact, dtype)]
    narrow = dtype != torch.float32
    with torch.autocast("cpu", dtype=dtype if narrow else torch.bfloat16, enabled=narrow):
        out = official(*eager, 8, 4)
        theirs = [out, *gradients(out, eager, dtype)]
        out = attend(*ours, (8, 8), (4, 4))
        mine = [out, *gradients(out, ours, dtype)]
    for name, e, t, m in zip(("out", "qkv", "table", "scale"), expected, theirs, mine, strict=True):
        limits = torch.finfo(m.dtype)
        if e.abs().max() > limits.max:  # rows of zeros are divided by 1e-12
            continue
        assert m.isfinite().all(), name
        error = [(x.double() - e).norm().nan_to_num(math.inf).item() for x in (m, t)]
        # Where eager happens to be exact, a rounding of the result is no error; and with equal keys the gradient of the
        # scale is zero, as a sum of a thousand numbers.
        size = 1000.0 if (name, case) == ("scale", "equal keys") else e.norm().item()
        assert error[0] <= max(factor * error[1], 2 * limits.eps * size), (name, error)
        if narrow and wide_sums and name in ("table", "scale"):
            assert error[0] <= 1e-5 * size, (name, error)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations under it made and that are still alive, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def now(self) -> int:
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        return sum(size for _, size in self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.now()  # a freed storage's address may be taken again
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.storages[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result
