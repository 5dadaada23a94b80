"""Linear layers of 8-bit products: which they are, what they compute, and what refuses them."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import TINY
from torch import Tensor, nn

from fdscale import UserError, config, student
from fdscale.engine import fp8
from fdscale.engine.ds_config import check_linear
from fdscale.models import backbone
from fdscale.models.layers import initialise

CPU = torch.device("cpu")
SWIN = {
    "img_size": 32,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "pretrained_window_sizes": [0, 0],
    "post_norm_init": 1.0,
}


def rounded(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """To 8 bits, in units that make the largest element the largest number of that kind; as float64."""
    unit = tensor.abs().max().double() / torch.finfo(kind).max
    return (tensor.double() / unit).float().to(kind).double() * unit


def test_products_are_of_8_bits_forward_and_backward() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 32, dtype=torch.bfloat16)
    holder = nn.Sequential(nn.Linear(48, 32, dtype=torch.bfloat16))
    holder[0].load_state_dict(plain.state_dict())
    fp8.convert([holder], CPU)
    x = torch.randn(37, 48, dtype=torch.bfloat16, requires_grad=True)  # 37: padded where it is what is summed over
    grad = torch.randn(37, 32, dtype=torch.bfloat16)
    out = holder(x)
    out.backward(grad)
    x8, w8 = rounded(x.detach(), torch.float8_e4m3fn), rounded(plain.weight.detach(), torch.float8_e4m3fn)
    g8 = rounded(grad, torch.float8_e5m2)
    near = {"rtol": 2e-2, "atol": 2e-2}  # a number on the border of two may go either way
    torch.testing.assert_close(out.double(), x8 @ w8.T + plain.bias.double(), **near)
    torch.testing.assert_close(x.grad.double(), g8 @ w8, **near)
    torch.testing.assert_close(holder[0].weight.grad.double(), g8.T @ x8, rtol=2e-2, atol=5e-2)
    assert (out - plain(x)).abs().max() > 0.01  # it is no bf16 product


@pytest.mark.parametrize("model", ["swin_v2", "vit"])
def test_a_backbone_keeps_its_names_and_nearly_its_output(model: str) -> None:
    args = (
        SWIN if model == "swin_v2" else {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    )
    network = backbone(model, args).eval()
    initialise(network, 0)
    network = network.to(torch.bfloat16)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    names, before = [*network.state_dict()], network(images).float()
    fp8.convert(network.blocks(), CPU)
    converted = [name for name, part in network.named_modules() if type(part).__name__ == "Float8Linear"]
    for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        assert sum(name.endswith(part) for name in converted) == len(network.blocks())
    assert len(converted) == 4 * len(network.blocks())
    assert not any("cpb_mlp" in name for name in converted)
    assert [*network.state_dict()] == names
    difference = (network(images).float() - before).norm() / before.norm()
    assert 0 < difference < 0.2  # the norms behind branches make small ones large
    assert fp8.describe(network).startswith(f"{len(converted)} linear layers multiply 8-bit floats")


def test_it_is_part_of_what_is_learnt_and_old_runs_go_on() -> None:
    plain, eight = (config.load("demo", [*TINY, f"student.linear={kind}"]) for kind in ("same", "fp8"))
    assert "student.linear" not in config.trajectory(plain)
    assert config.trajectory(eight)["student.linear"] == "fp8"


def test_what_is_only_evaluated_multiplies_as_ever() -> None:
    settings = config.load("demo", [*TINY, "student.linear=fp8", "memory.compile=[student]"])
    assert fp8.describe(student.build(settings))
    assert not fp8.describe(student.build(settings, training=False))


def test_what_cannot_multiply_8_bits_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    check_linear({"bf16": {"enabled": True}}, "fp8")
    check_linear({}, "same")
    with pytest.raises(UserError, match=r"student\.linear=fp8 needs a ds_config with bf16 enabled"):
        check_linear({}, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(UserError, match="from H100 on; this is a NVIDIA A100"):
        fp8.convert([], torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match="needs torchao, which is not installed: pip install"):
        student.build(config.load("demo", [*TINY, "student.linear=fp8"]))
