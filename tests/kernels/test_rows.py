"""The ops of kernels/rows.py in plain torch, where they are used, and on a GPU. Their kernels on a CPU: see
test_rows_interpreted.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import leaves_of
from torch import Tensor

from fdscale import UserError
from fdscale.kernels import rows
from fdscale.models.layers import ResidualNorm, add_branch

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("on a CPU, torch is meant", allow_module_level=True)


def at(x: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Shifted windows of a map, number by number."""
    batch, height, width, channels = x.shape
    down, across = -(-height // window[0]), -(-width // window[1])
    out = torch.zeros(batch * down * across, *window, channels, dtype=x.dtype)
    for image in range(batch):
        for i in range(down * window[0]):
            for j in range(across * window[1]):
                y, x_ = (i + shift[0]) % (down * window[0]), (j + shift[1]) % (across * window[1])
                n = (image * down + i // window[0]) * across + j // window[1]
                if y < height and x_ < width:
                    out[n, i % window[0], j % window[1]] = x[image, y, x_]
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [((8, 12), (4, 4), (2, 2)), ((7, 10), (4, 4), (0, 0)), ((6, 13), (2, 6), (1, 3)), ((2, 3), (4, 5), (3, 4))],
)
def test_windows_hold_what_they_should_and_go_back(size, window, shift):
    (x,) = leaves_of(torch.randn(2, *size, 3, dtype=torch.float64))
    windows = rows.window_partition(x, window, shift)
    assert torch.equal(windows, at(x, window, shift))
    assert torch.equal(rows.window_reverse(windows, size, shift), x)
    assert torch.autograd.gradcheck(lambda m: rows.window_partition(m, window, shift), x)
    (cut,) = leaves_of(windows)
    assert torch.autograd.gradcheck(lambda w: rows.window_reverse(w, size, shift), cut)


@pytest.mark.parametrize("keep", [None, torch.tensor([0.0, 1.25])])
def test_on_a_cpu_a_residual_norm_is_norm_and_addition_bit_for_bit(keep):
    """Also where kernels are wanted, which cannot run there; under the names of a LayerNorm."""
    plain, ours = torch.nn.LayerNorm(12), ResidualNorm(12)
    ours.load_state_dict({"weight": torch.randn(12), "bias": torch.randn(12)})
    plain.load_state_dict(ours.state_dict())
    ours.fused = True
    x, branch = torch.randn(2, 3, 3, 12), torch.randn(2, 3, 3, 12)
    assert torch.equal(ours(x, branch, keep), add_branch(x, plain(branch), keep))
    assert torch.equal(ours(x, branch, keep), rows.plain_residual_norm(x, branch, keep, ours.weight, ours.bias, 1e-5))


def test_what_cannot_be_is_named():
    x, one = torch.zeros(2, 3, 8), torch.ones(8)
    with pytest.raises(UserError, match="residual norm by triton cannot run here: it needs an NVIDIA GPU"):
        rows.residual_norm(x, x, None, one, one, 1e-5)
    with pytest.raises(UserError, match="feature loss by triton cannot run here: it needs an NVIDIA GPU"):
        rows.token_losses(x, x, 2.0)
    with pytest.raises(UserError, match=r"branch \(2, 3, 7\)"):
        rows.residual_norm(x, x[..., 1:], None, one, one, 1e-5)
    with pytest.raises(UserError, match=r"keep is \(3,\); expected \(2,\)"):
        rows.residual_norm(x, x, torch.ones(3), one, one, 1e-5)
    with pytest.raises(ValueError, match="must have the same shape"):
        rows.token_losses(x, x[:, :1], 2.0)
    with pytest.raises(UserError, match=r"a shift of at least 0 and less than the window"):
        rows.window_partition(x[None], (2, 2), (0, 2))
    with pytest.raises(UserError, match=r"n a multiple of the 2 x 3 windows of a map of \(4, 5\)"):
        rows.window_reverse(torch.zeros(5, 2, 2, 1), (4, 5))
    with pytest.raises(UserError, match=r"the shift is \(0, 2\); expected less than \(2, 2\)"):
        rows.window_reverse(torch.zeros(6, 2, 2, 1), (4, 5), (0, 2))


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU: as exact as eager, the same to the bit in every run

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def assert_exact(
    fused: Callable[..., Tensor], eager: Callable[..., Tensor], data: list[Tensor], dtype: torch.dtype
) -> None:
    """Every result at most as far from float64 as eager's, or one and a half roundings; three times the same."""
    grad = torch.randn(fused(*data).shape, device="cuda").to(fused(*data).dtype)
    exact, theirs = leaves_of(*(x.double() for x in data)), leaves_of(*data)
    out = eager(*exact)
    expected = [out, *torch.autograd.grad(out, exact, grad.double())]
    out = eager(*theirs)
    other = [out, *torch.autograd.grad(out, theirs, grad.to(out.dtype))]
    runs = []
    for _ in range(3):
        ours = leaves_of(*data)
        out = fused(*ours)
        runs.append([out, *torch.autograd.grad(out, ours, grad)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    for e, o, m in zip(expected, other, runs[0], strict=True):
        errors = [(x.double() - e).norm().item() for x in (m, o)]
        assert errors[0] <= max(1.5 * errors[1], 1.5 * torch.finfo(m.dtype).eps * e.norm().item())


@pytest.mark.gpu
@gpu
@DTYPES
@pytest.mark.parametrize("channels", [96, 100, 704, 4096, 8192])
def test_on_a_gpu_the_residual_norm_is_exact(channels, dtype):
    x, branch = (torch.randn(4, 17, 19, channels, device="cuda").mul(2).add(1).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(channels, device="cuda").to(dtype) for _ in range(2))
    keep = torch.tensor([0.0, 1.25, 1.25, 0.0], device="cuda")

    def fused(*given: Tensor) -> Tensor:
        return rows.residual_norm(*given[:2], keep, *given[2:], 1e-5)

    def eager(*given: Tensor) -> Tensor:
        return rows.plain_residual_norm(*given[:2], keep, *given[2:], 1e-5)

    assert_exact(fused, eager, [x, branch, weight, bias], dtype)


@pytest.mark.gpu
@gpu
@DTYPES
@pytest.mark.parametrize("channels", [100, 768, 4096])
def test_on_a_gpu_the_loss_is_exact(channels, dtype):
    prediction = torch.randn(4, 201, channels, device="cuda").mul(2).to(dtype)
    tokens = torch.randn(4, 201, channels, device="cuda") * 3 + 1

    def eager(given: Tensor) -> Tensor:
        return rows.plain_token_losses(given, tokens.to(torch.promote_types(given.dtype, torch.float32)), 2.0)

    assert_exact(lambda given: rows.token_losses(given, tokens, 2.0), eager, [prediction], dtype)
    target = F.layer_norm(tokens, (channels,))
    whole = F.smooth_l1_loss(prediction.float(), target, beta=2.0)
    assert rows.token_losses(prediction, tokens, 2.0).mean().item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize(("size", "window", "shift"), [((56, 84), (7, 7), (3, 3)), ((30, 45), (8, 12), (4, 0))])
@pytest.mark.parametrize("channels", [96, 3, 257])
def test_on_a_gpu_windows_are_copied_on_the_current_stream(size, window, shift, dtype, channels):
    x = torch.randint(0, 99, (3, *size, channels), device="cuda").to(dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what runs on another stream would be done before x is
        y = x + 1
        windows = rows.window_partition(y, window, shift)
        back = rows.window_reverse(windows, size, shift)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(windows, rows.plain_window_partition(y, window, shift))
    assert torch.equal(back, y)
    if dtype.is_floating_point:
        (leaf,) = leaves_of(y)
        out = rows.window_partition(leaf, window, shift)
        (grad,) = torch.autograd.grad(out, leaf, windows)
        assert torch.equal(grad, y)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_gpu_than_the_current_one():
    x = torch.randn(2, 8, 8, 32, device="cuda:1")
    assert rows.window_partition(x, (4, 4), (2, 2)).device == x.device
    out = rows.residual_norm(x, x, None, x[0, 0, 0], x[0, 0, 1], 1e-5)
    torch.testing.assert_close(out, rows.plain_residual_norm(x, x, None, x[0, 0, 0], x[0, 0, 1], 1e-5))
