"""Teachers whose linear layers are held in 8 bits: how weights are rounded, what is computed, and where it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import TINY
from torch import Tensor, nn

from fdscale import UserError, assemble, config
from fdscale.models.eight_bit import EightBitLinear, rounded
from fdscale.models.swin_v2 import SwinV2
from fdscale.models.teachers import load_teacher
from fdscale.objective import whiten
from fdscale.plan.shapes import Networks

SWIN = {"embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 32}
SWIN["pretrained_window_sizes"] = (0, 0)
VIEWS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_hand(row: list[float], kind: str) -> list[float]:
    """A row rounded to the 8-bit numbers that are nearest, one at a time."""
    if kind == "int8":
        numbers = [float(n) for n in range(-127, 128)]
    else:  # e4m3: 3 bits behind the point, exponents -6 to 8, and what is below the smallest
        numbers = [sign * (1 + m / 8) * 2.0**e for sign in (1, -1) for e in range(-6, 9) for m in range(8)]
        numbers = [n for n in numbers if abs(n) <= 448] + [s * m * 2.0**-9 for s in (1, -1) for m in range(8)]
    unit = max(map(abs, row)) / max(numbers)
    return [min(numbers, key=lambda n: abs(n - value / unit)) * unit for value in row]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_become_the_nearest_numbers(kind: str) -> None:
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-4], [1], [30], [2], [0]]
    )
    values, scale = rounded(weight, kind)
    assert values.element_size() == 1
    expected = torch.tensor([by_hand(row, kind) for row in weight[:4].tolist()])
    torch.testing.assert_close((values.float() * scale[:, None])[:4], expected, rtol=1e-5, atol=0)
    assert not values[4].float().any()
    assert scale[4] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_nothing_but_the_weights_is_rounded(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 24)
    layer = EightBitLinear(plain.weight, plain.bias, kind)
    x = torch.randn(7, 48).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), plain.bias.double())
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(layer(x).double(), exact, **near)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, F.linear(x, layer.weight, plain.bias), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_values_are_exact_in_float16(kind: str) -> None:
    """All 8-bit numbers, by an identity: also where they are divided by a power of two."""
    numbers = torch.arange(-128, 128).to(torch.int8)
    numbers = numbers[1:] if kind == "int8" else numbers.view(torch.float8_e4m3fn)
    numbers = numbers[numbers.float().isfinite()]
    layer = EightBitLinear(numbers.float()[:, None], None, kind)
    layer.values, layer.scale = numbers[:, None], torch.ones(len(numbers))
    assert torch.equal(layer(torch.ones(1, 1).half())[0].float(), numbers.float())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_float16_does_not_overflow_where_the_plain_layer_does_not(kind: str) -> None:
    """Small weights, and a few large inputs, as in the last layers of vision transformers."""
    torch.manual_seed(0)
    plain = nn.Linear(1024, 256)
    nn.init.normal_(plain.weight, std=0.01)
    x = 5 * torch.randn(16, 1024)
    x[:, :4] *= 100
    layer = EightBitLinear(plain.weight, plain.bias, kind)
    exact = F.linear(x.half().double(), layer.weight.double(), plain.bias.double())
    assert exact.abs().max() > 448 * layer.scale.min(), "the sum of the values alone is out of range"
    torch.testing.assert_close(layer(x.half()).double(), exact, rtol=2e-3, atol=2e-2)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network of ours."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("own") / "weights.pth"
    torch.save(SwinV2(**SWIN, post_norm_init=1.0).state_dict(), path)
    return path


def difference(a: Tensor, b: Tensor) -> float:
    return (whiten(a) - whiten(b)).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_of_ours_from_a_file(own: Path, dtype: str) -> None:
    plain = load_teacher("fdscale:swin_v2", weights=str(own), args=SWIN)
    tokens = plain.to("cpu")(VIEWS)
    for kind, most in (("int8", 0.03), ("fp8", 0.12)):
        held = load_teacher("fdscale:swin_v2", weights=str(own), args=SWIN, dtype=dtype, hold=kind)
        assert held.fingerprint() == plain.fingerprint()
        assert 0 < difference(held(VIEWS), tokens) < most
        layers = [part for part in held.network.modules() if isinstance(part, EightBitLinear)]
        assert len(layers) == 2 * 4 + 1  # of each block, and the merging; the position MLPs stay
        assert not any(type(part) is nn.Linear for part in held.network.modules())


def test_a_teacher_that_multiplies_by_a_layers_weight_itself(tmp_path: Path) -> None:
    """timm's Beit takes qkv.weight: it finds the rounded one."""
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("beit_base_patch16_224", num_classes=0, **args).state_dict(), path)
    name = "timm:beit_base_patch16_224.in22k_ft_in22k"
    plain = load_teacher(name, weights=str(path), args=args)
    held = load_teacher(name, weights=str(path), args=args, hold="int8")
    assert 0 < difference(held(VIEWS), plain(VIEWS)) < 0.05
    assert held.grid((32, 32)) == plain.grid((32, 32))
    assert held.width == plain.width


def test_it_is_part_of_what_is_learnt_and_planned() -> None:
    ours = (
        "teacher.source=fdscale:swin_v2",
        "teacher.args={embed_dim: 64, depths: [2, 2], num_heads: [2, 4], window_size: 4, img_size: 64, "
        "pretrained_window_sizes: [0, 0]}",
    )
    settings = {kind: config.load("demo", [*TINY, *ours, f"teacher.hold={kind}"]) for kind in ("same", "int8")}
    assert "teacher.hold" not in config.trajectory(settings["same"])
    assert config.trajectory(settings["int8"])["teacher.hold"] == "int8"
    planned = {kind: Networks(one).teacher_bytes[""] for kind, one in settings.items()}
    built = assemble.build_teacher(settings["int8"]).network
    assert planned["int8"] == sum(t.numel() * t.element_size() for t in [*built.parameters(), *built.buffers()])
    assert planned["int8"] < 0.5 * planned["same"]
    peaks = {kind: Networks(one).teacher_peak() for kind, one in settings.items()}
    assert peaks["int8"] is not None, "it runs on the meta device, where nothing is computed"
    assert peaks["same"] <= peaks["int8"] < 2 * peaks["same"]  # and a layer's weights, brought back
    flops = {kind: assemble.build_teacher(one).flops((64, 64)) for kind, one in settings.items()}
    assert flops["int8"] == flops["same"] > 0
    with pytest.raises(UserError, match=r"teacher\.hold must be one of same, int8, fp8"):
        config.load("demo", [*TINY, "teacher.hold=int4"])


def test_a_cache_belongs_to_what_the_teacher_is_held_in(shards: Path) -> None:
    def identity(*more: str) -> dict[str, object]:
        settings = config.load("demo", [*TINY, f"data.shards={shards}", "cache.epochs=1", *more])
        return assemble.cache_plan(assemble.assemble(settings, 1)).identity

    assert "teacher.hold" not in identity()  # those from before there was the key still fit
    assert identity("teacher.hold=int8") == identity() | {"teacher.hold": "int8"}
