"""The Triton kernels of kernels/rows.py in Triton's interpreter, on a CPU; test_fused.py starts it.

The interpreter rounds to bfloat16 towards zero, so there an error may reach a whole step of it.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from cases import leaves_of
from torch import Tensor

from fdscale import UserError
from fdscale.kernels import check, row_kernels, rows
from fdscale.models import backbone
from fdscale.models.layers import add_branch
from fdscale.objective import Distiller

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1")
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
OPS = torch.ops.fdscale
# map, window, shift: whole and padded maps, windows and shifts that are not square, a window larger than the map
MAPS = [((8, 12), (4, 4), (2, 2)), ((7, 10), (4, 4), (0, 0)), ((6, 13), (2, 6), (1, 3)), ((2, 3), (4, 5), (3, 4))]


def near(found: list[Tensor], exact: list[Tensor]) -> None:
    """In norm, within what the dtype of each rounds."""
    for a, e in zip(found, exact, strict=True):
        assert (a.double() - e).norm() <= LIMITS[a.dtype] * e.norm()


def norm_inputs(channels: int, dtype: torch.dtype, width: torch.dtype) -> list[Tensor]:
    """x, branch, weight, bias: 3 samples of 2 x 3 tokens, far from mean 0."""
    generator = torch.Generator().manual_seed(channels)
    x, branch = (torch.randn(3, 2, 3, channels, generator=generator) * 2 + 1 for _ in range(2))
    weight, bias = (torch.randn(channels, generator=generator) for _ in range(2))
    return [x.to(dtype), branch.to(dtype), weight.to(width), bias.to(width)]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("channels", "dtype", "width"),
    [
        (96, torch.float32, torch.float32),
        (50, torch.bfloat16, torch.bfloat16),
        (1, torch.float32, torch.float32),
        (2500, torch.float16, torch.float32),
    ],
)
def test_residual_norm_and_its_gradients(channels, dtype, width, kept):
    """Against the formula in float64; sums over several programs, of which the last has less to do."""
    data = norm_inputs(channels, dtype, width)
    keep = torch.tensor([1.25, 0.0, 1.25]) if kept else None
    ours, exact = leaves_of(*data), leaves_of(*(x.double() for x in data))
    x, branch, weight, bias = exact
    centred = branch - branch.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    expected = x + normed * (keep.double().view(-1, 1, 1, 1) if kept else 1.0)
    out = rows.residual_norm(*ours[:2], keep, *ours[2:], 1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    found = torch.autograd.grad(out, ours, grad)
    if channels == 1:  # a norm of one number is its bias; nothing goes back through it
        assert found[1].abs().max() < 1e-6
        found, wanted = (found[0], *found[3:]), (wanted[0], *wanted[3:])
    near([out, *found], [expected, *wanted])
    assert torch.equal(found[0], grad)


def test_sums_over_many_programs(monkeypatch):
    monkeypatch.setattr(row_kernels, "PROGRAMS", 3)
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 97, 300, generator=generator), torch.randn(4, 97, 300, generator=generator)]
    data += [torch.randn(300, generator=generator), torch.randn(300, generator=generator)]
    ours, exact = leaves_of(*data), leaves_of(*(x.double() for x in data))
    out = rows.residual_norm(*ours[:2], None, *ours[2:], 1e-5)
    grad = torch.randn(out.shape, generator=generator)
    expected = rows.plain_residual_norm(*exact[:2], None, *exact[2:], 1e-5)
    found = torch.autograd.grad(out, ours, grad, retain_graph=True)
    near(list(found), list(torch.autograd.grad(expected, exact, grad.double())))
    assert all(torch.equal(a, b) for a, b in zip(found, torch.autograd.grad(out, ours, grad), strict=True))


@pytest.mark.filterwarnings("ignore:.*encountered in divide")  # by a beta of 0, where it is not taken
@pytest.mark.parametrize("beta", [2.0, 0.5, 0.0])
@pytest.mark.parametrize(
    ("channels", "dtype"), [(24, torch.float32), (24, torch.bfloat16), (1500, torch.float16), (17, torch.float32)]
)
def test_token_losses_and_their_gradient(channels, dtype, beta):
    """Against the formula in float64, on both sides of beta."""
    generator = torch.Generator().manual_seed(channels)
    prediction = (torch.randn(2, 5, channels, generator=generator) * 2).to(dtype)
    tokens = torch.randn(2, 5, channels, generator=generator) * 3 + 1
    (ours,), (exact,) = leaves_of(prediction), leaves_of(prediction.double())
    centred = tokens.double() - tokens.double().mean(-1, keepdim=True)
    error = (exact - centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).abs()
    quadratic = error.square() / (2 * beta) if beta else error
    expected = torch.where(error < beta, quadratic, error - beta / 2).mean(-1)
    out = rows.token_losses(ours, tokens, beta)
    assert out.dtype == torch.float32
    grad = torch.rand(out.shape, generator=generator)
    near([out], [expected])
    near(list(torch.autograd.grad(out, ours, grad)), list(torch.autograd.grad(expected, exact, grad.double())))


@pytest.mark.parametrize(
    ("size", "window", "shift", "channels", "dtype"),
    [*((*case, 3, torch.float32) for case in MAPS), (*MAPS[2], 260, torch.bfloat16), (*MAPS[1], 5, torch.int64)],
)
def test_window_copies_and_their_gradients(size, window, shift, channels, dtype):
    """Bit for bit those of roll, pad and view."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-99, 99, (2, *size, channels), generator=generator).to(dtype)
    cut, plain = rows.window_partition(x, window, shift), rows.plain_window_partition(x, window, shift)
    assert torch.equal(cut, plain)
    assert torch.equal(rows.window_reverse(cut, size, shift), x)
    if dtype.is_floating_point:
        for by, other, given, where in (
            (rows.window_partition, rows.plain_window_partition, x, window),
            (rows.window_reverse, rows.plain_window_reverse, cut, size),
        ):
            results = []
            for function in (by, other):
                (leaf,) = leaves_of(given)
                out = function(leaf, where, shift)
                grad = torch.arange(out.numel()).remainder(101).view(out.shape).to(dtype)
                results.append([out, *torch.autograd.grad(out, leaf, grad)])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tensors_need_not_be_contiguous():
    generator = torch.Generator().manual_seed(0)
    x, branch = torch.randn(8, 3, 5, 2, generator=generator).transpose(0, 3).unbind(0)  # 3 5 8 each, strided
    weight, bias = torch.randn(8, 2, generator=generator).unbind(1)
    assert not x.is_contiguous()
    found = rows.residual_norm(x, branch, None, weight, bias, 1e-5)
    near(
        [found],
        [rows.plain_residual_norm(*(t.double() for t in (x, branch)), None, weight.double(), bias.double(), 1e-5)],
    )
    near([rows.token_losses(x, branch, 2.0)], [rows.plain_token_losses(x.double(), branch.double(), 2.0)])
    image = x[None]
    assert torch.equal(rows.window_partition(image, (2, 2), (1, 1)), rows.plain_window_partition(image, (2, 2), (1, 1)))
    windows = torch.randn(8, 2, 2, 6, generator=generator).transpose(1, 3)[..., :1].expand(8, 6, 2, 3)[:, :2]
    assert torch.equal(
        rows.window_reverse(windows, (3, 4), (1, 0)), rows.plain_window_reverse(windows.contiguous(), (3, 4), (1, 0))
    )
    out = rows.residual_norm(*(leaves := leaves_of(x, branch)), None, weight, bias, 1e-5)
    strided = torch.autograd.grad(out, leaves, torch.ones(1).expand_as(out), retain_graph=True)
    whole = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(strided, whole, strict=True))


def test_nothing_to_do_is_no_error():
    leaves = leaves_of(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), torch.ones(8), torch.ones(8))
    out = rows.residual_norm(*leaves[:2], torch.zeros(0), *leaves[2:], 1e-5)
    assert [x.shape for x in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]
    assert rows.token_losses(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), 2.0).shape == (0, 4)
    assert rows.window_partition(torch.zeros(0, 4, 4, 8), (2, 2)).shape == (0, 2, 2, 8)


def test_torch_finds_no_fault_with_the_ops():
    x, branch, weight, bias = norm_inputs(8, torch.float32, torch.float32)
    keep, map_ = torch.tensor([1.25, 0.0, 1.25]), torch.randn(2, 3, 5, 4)
    windows = rows.plain_window_partition(map_, (2, 2), (1, 1))
    check_op = torch.library.opcheck
    for factors in (keep, None):
        arguments = leaves_of(x, branch, weight, bias)
        check_op(OPS.residual_norm.default, (*arguments[:2], factors, *arguments[2:], 1e-5))
        check_op(OPS.residual_norm_backward.default, (x, branch, factors, weight, 1e-5))
    check_op(OPS.token_losses.default, (*leaves_of(x), branch, 2.0))
    check_op(OPS.token_losses_backward.default, (torch.ones(3, 2, 3), x, branch, 2.0))
    check_op(OPS.window_partition.default, (*leaves_of(map_), (2, 2), (1, 1)))
    check_op(OPS.window_reverse.default, (*leaves_of(windows), (3, 5), (1, 1)))


def test_what_the_kernels_do_not_have_is_named():
    wide = torch.zeros(1, 10_000)
    with pytest.raises(UserError, match="residual norm by triton: 10000 channels; expected 1 to 8192"):
        rows.residual_norm(wide, wide, None, wide[0], wide[0], 1e-5)
    with pytest.raises(UserError, match=r"feature loss by triton: got torch\.float64; expected float32"):
        rows.token_losses(torch.zeros(1, 4).double(), torch.zeros(1, 4), 2.0)


# ----------------------------------------------------------------------------------------------------------------------
# In the network and the objective


def test_a_distiller_learns_the_same_with_them():
    """Loss and all gradients of a SwinV2 under drop path, with everything fused and with nothing; and one graph."""
    args = {"img_size": 16, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2}
    torch.manual_seed(0)
    module = Distiller(backbone("swin_v2", args | {"pretrained_window_sizes": [0, 0], "post_norm_init": 0.5}), 12)
    module.backbone.drop_path_rate = 0.4
    generator = torch.Generator().manual_seed(0)
    images, tokens = torch.randn(3, 3, 16, 16, generator=generator), torch.randn(3, 4, 12, generator=generator) * 3 + 1
    names = [name for name, _ in module.named_parameters()]

    def results(weights: Tensor | None = None) -> list[Tensor]:
        loss = module(images, tokens, torch.arange(3), weights)
        return [loss, *torch.autograd.grad(loss, list(module.parameters()))]

    def fuse(fused: bool) -> None:
        for part in module.modules():
            if hasattr(part, "fused"):
                part.fused = fused

    for weights in (None, torch.tensor([1.0, 0.0, 2.0])):
        fuse(False)
        expected = results(weights)
        fuse(True)
        for name, a, e in zip(["loss", *names], results(weights), expected, strict=True):
            torch.testing.assert_close(
                a, e, rtol=0, atol=1e-5 * e.abs().max().item() + 1e-7, msg=lambda m, n=name: n + m
            )
    compiled = torch.compile(module.backbone.blocks()[0].norm1, fullgraph=True, backend="aot_eager")
    x, branch = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    norm = module.backbone.blocks()[0].norm1
    assert torch.equal(compiled(x, branch, None), norm(x, branch, None))
    torch.testing.assert_close(norm(x, branch, None), add_branch(x, torch.nn.LayerNorm.forward(norm, branch), None))


def test_the_self_check_accepts_them_and_says_what_is_off(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(check, "_failures", {})
    for function in (check.attention_is_right, check.rows_are_right):
        monkeypatch.setattr(check, function.__name__, function.__wrapped__)
    assert check.rows_are_right(cpu)
    assert check.attention_is_right("triton", cpu)
    assert check.failures() == []
    monkeypatch.setattr(row_kernels, "token_losses_backward", lambda grad, p, *_: torch.zeros_like(p))
    assert not check.rows_are_right(cpu)
    (line,) = check.failures()
    assert line.startswith("fused norm and loss by triton is not used on cpu: in bfloat16, the gradient of prediction")
    assert "differs from the reference by 1.0e+00 of its norm; at most 3e-02 was expected" in line


def test_autocast_changes_nothing():
    data = norm_inputs(8, torch.bfloat16, torch.float32)
    by = partial(rows.residual_norm, *data[:2], None, *data[2:], 1e-5)
    plain = by()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(by(), plain)
