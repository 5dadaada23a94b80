"""Which layer norm is taken, and that it is torch's where it is not apex's. apex itself needs a GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fdscale import UserError
from fdscale.kernels import layer_norm as module
from fdscale.models import layers


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    """The choice is made once per process: made anew around every test."""
    monkeypatch.delenv(module.VARIABLE, raising=False)
    module.fused.cache_clear()
    yield monkeypatch
    module.fused.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of apex's names; the function is torch's, in apex's order of arguments."""
    for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", module.EXTENSION):
        fake = types.ModuleType(name)
        fake.__spec__ = types.SimpleNamespace(name=name)
        fake.__path__ = []
        monkeypatch.setitem(sys.modules, name, fake)
    sys.modules["apex.normalization.fused_layer_norm"].fused_layer_norm_affine = lambda x, weight, bias, shape, eps: (
        F.layer_norm(x, shape, weight, bias, eps)
    )


def test_on_a_cpu_it_is_torchs_module_bit_for_bit(fresh: pytest.MonkeyPatch) -> None:
    pretend(fresh)
    ours, theirs = layers.LayerNorm(12, eps=1e-5), torch.nn.LayerNorm(12, eps=1e-5)
    state = {"weight": torch.randn(12), "bias": torch.randn(12)}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(3, 4, 12, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = ours(x), theirs(y)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_apex_is_taken_where_it_is_importable_unless_the_variable_says_torch(fresh: pytest.MonkeyPatch) -> None:
    assert module.fused() is None
    pretend(fresh)
    module.fused.cache_clear()
    kernel = module.fused()
    assert kernel is sys.modules["apex.normalization.fused_layer_norm"].fused_layer_norm_affine
    fresh.setenv(module.VARIABLE, "torch")
    module.fused.cache_clear()
    assert module.fused() is None


def test_the_variable_is_checked(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv(module.VARIABLE, "apex")
    with pytest.raises(UserError, match="FDSCALE_LAYER_NORM is apex, but NVIDIA's apex"):
        module.fused()
    fresh.setenv(module.VARIABLE, "fast")
    with pytest.raises(UserError, match="expected torch or apex"):
        module.fused()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_it_agrees_with_torch(dtype: torch.dtype) -> None:
    norm = layers.LayerNorm(96).to("cuda", dtype)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(64, 96, device="cuda", dtype=dtype, requires_grad=True)
    out = norm(x)
    expected = F.layer_norm(x.double(), (96,), norm.weight.double(), norm.bias.double(), norm.eps)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)
