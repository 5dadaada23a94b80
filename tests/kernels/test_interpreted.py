"""The Triton kernels in Triton's interpreter, on a CPU, which rounds as a GPU does but adds up in another order.

TRITON_INTERPRET is read when a kernel is defined, so these tests run in a process of their own, which test_fused.py
starts.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from cases import ADVERSARIAL, CASES, assert_as_exact_as_eager, gradients, inputs, leaves_of, random_inputs

from fdscale import UserError
from fdscale.bench.attention import official
from fdscale.kernels import attention
from fdscale.kernels.attention import window_attention

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1")
attend = partial(window_attention, by="triton")


@pytest.mark.parametrize("mask", ["-100", "-inf"])
@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_equals_the_reference(size, window, shift, mask):
    """Maps that are and are not whole windows, windows that are not square, heads of 3 channels."""
    exact = leaves_of(*inputs(size, window))
    out = window_attention(*exact, window, shift, mask=mask)
    expected = [out, *gradients(out, exact, torch.float32)]
    ours = leaves_of(*(x.float() for x in exact))
    out = attend(*ours, window, shift, mask=mask)
    actual = [out, *gradients(out, ours, torch.float32)]
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 1e-4 * e.abs().max()


@pytest.mark.parametrize(
    ("window", "down", "across", "heads", "dim"),
    [(6, 1, 1, 2, 16), (7, 2, 1, 1, 32), (12, 1, 1, 1, 44), (16, 1, 1, 1, 16), (20, 1, 1, 1, 16), (24, 1, 1, 1, 16)],
)
def test_equals_the_official_formula(window, down, across, heads, dim):
    """Windows that are one tile, and several; their rows one patch of the table's kernel, and several."""
    data = [x.float() for x in random_inputs(1, (down * window, across * window), heads, dim, window)]
    exact, ours = leaves_of(*(x.double() for x in data)), leaves_of(*data)
    out = official(*exact, window, 0)
    expected = [out, *gradients(out, exact, torch.float32)]
    out = attend(*ours, (window, window), (0, 0))
    actual = [out, *gradients(out, ours, torch.float32)]
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_the_error_is_at_most_one_and_a_half_times_that_of_eager_autocast(case):
    assert_as_exact_as_eager(attend, case, torch.bfloat16)


@pytest.mark.parametrize(
    ("case", "dtype", "factor"), [("random", torch.float16, 1.5), ("equal keys", torch.float32, 4)]
)
def test_so_it_is_in_other_dtypes(case, dtype, factor):
    """In float32, weights recomputed from a rounded log-sum-exp have up to three times eager's error."""
    assert_as_exact_as_eager(attend, case, dtype, factor)


def test_it_repeats_to_the_bit_and_torch_finds_no_fault():
    data = inputs((7, 10), (4, 4), torch.float32)
    results: list[list[torch.Tensor]] = []
    for _ in range(2):
        leaves = leaves_of(*data)
        out = attend(*leaves, (4, 4), (2, 2))
        results.append([out, *gradients(out, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    op = torch.ops.fdscale.window_attention.default
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = ((4, 4), (2, 2), "-100", "triton")
    torch.library.opcheck(op, (*leaves_of(*data), *arguments), test_utils=utils)
    out, lse = op(*data, *arguments)
    backward = torch.ops.fdscale.window_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), *data, out, lse, *arguments), test_utils=utils)


def test_float64_is_refused_by_name():
    assert attention.choose("triton", torch.device("cpu")) == "triton"  # the interpreter needs no GPU
    with pytest.raises(UserError, match=r"by triton: qkv is torch\.float64; expected float32, bfloat16 or float16"):
        attend(*inputs((4, 4), (4, 4)), (4, 4), (0, 0))
