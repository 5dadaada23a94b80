"""fdscale.models.swin_v2 against timm's SwinTransformerV2 with the same weights, published parameter counts and costs,
and itself under memory policies that must not change the result."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdscale import UserError
from fdscale.models.layers import initial_value, initialise
from fdscale.models.swin_v2 import SIZES, SwinV2, swin_v2

SMALL = {"embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 4)}


def small(**overrides) -> SwinV2:
    return SwinV2(**{"img_size": 32, "window_size": 4, "pretrained_window_sizes": (0, 0, 0), **SMALL, **overrides})


def randomise(model: nn.Module) -> nn.Module:
    """Large weights everywhere: the official start, norms of weight 0, would hide every block."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 0.5)
                )
    return model


def from_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm has each merging at the start of the next stage."""
    return {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k): v
        for k, v in state.items()
    }


# img_size, window_size: several windows with shifts; non-square image; non-square window; odd maps (14, 7, 4); window
# larger than the last maps; pretrained window
PAIRS = [
    (64, 4, 0),
    ((64, 128), 8, 0),
    ((64, 32), (4, 8), 0),
    (56, 7, 0),
    (32, 8, 0),
    (64, 8, 4),
]


@pytest.mark.parametrize(("img_size", "window", "pretrained"), PAIRS)
def test_equals_timm(img_size, window, pretrained):
    stages = len(SMALL["depths"])
    theirs = SwinTransformerV2(
        img_size=img_size,
        window_size=window if isinstance(window, int) else (window,) * stages,
        pretrained_window_sizes=(pretrained,) * stages,
        num_classes=0,
        global_pool="",
        **SMALL,
    )
    randomise(theirs)
    ours = small(img_size=img_size, window_size=window, pretrained_window_sizes=(pretrained,) * stages)
    ours.load_state_dict(from_timm(theirs.state_dict()), strict=True)
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = theirs.eval().forward_features(images).flatten(1, 2)
    actual = ours.eval()(images)
    # Bit-equal but for the sigmoid of the bias, which torch rounds by the place of a number in memory.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)
    assert actual.shape[1] == math.prod(ours.grid(size))

    expected.square().mean().backward()
    actual.square().mean().backward()
    gradients = from_timm({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        scale = gradients[name].abs().max()
        torch.testing.assert_close(
            parameter.grad / scale, gradients[name] / scale, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_final_map_is_the_token_grid_and_earlier_maps_come_before_merging():
    model = randomise(small()).eval()
    images = torch.randn(2, 3, 32, 48)
    maps = model.maps(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), model(images))
    merged = model.layers[0].downsample(maps[0].permute(0, 2, 3, 1))
    for block in model.layers[1].blocks:
        merged = block(merged)
    torch.testing.assert_close(merged.permute(0, 3, 1, 2), maps[1])


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (20, 44), (30, 33), (7, 9)])
def test_one_model_takes_images_of_other_sizes(size):
    model = randomise(small())
    tokens = model(torch.randn(1, 3, *size))
    assert tokens.shape == (1, math.prod(model.grid(size)), model.width)
    tokens.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_padding_of_a_map_does_not_reach_real_tokens():
    """A map padded by hand with junk, whose attention is cut off, gives the same: keys of padding have no weight."""
    attention = randomise(small(depths=(2,), num_heads=(2,), pretrained_window_sizes=(0,))).layers[0].blocks[1].attn
    x = torch.randn(1, 7, 9, 16)
    assert attention.shift(7, 9) == (2, 2)
    out = attention(x)
    changed = x.clone()
    changed[:, 6, 8] += 100.0  # last real token: only the window holding it may change
    touched = (attention(changed) - out).abs().amax((0, 3)) > 0
    assert touched[6, 8]
    assert not touched[
        :6
    ].any()  # row 6 is in the window of rows 6..9, of which 7 and 8..9 are padding and wrapped rows
    assert touched[6].tolist() == [False] * 6 + [True] * 3


def test_parameter_counts():
    expected = {
        "T": 27_578_154,
        "S": 48_959_418,
        "B": 86_893_816,
        "L": 195_202_932,
        "H": 655_210_922,
        "G": 2_997_815_008,
    }
    with torch.device("meta"):
        for size, count in expected.items():
            assert sum(p.numel() for p in swin_v2(size).parameters()) == count, size
        model = swin_v2("G", extra_norm_period=6)
    assert sum(p.numel() for p in model.parameters()) == 2_997_843_680
    norms = [name for name, _ in model.named_parameters() if name.endswith("enorm.weight")]
    assert norms == [f"layers.2.blocks.{b}.enorm.weight" for b in (5, 11, 17, 23, 29, 35, 41)]


def test_published_costs():
    with torch.device("meta"):
        for size, pixels, window, gmacs in [("B", 256, 16, 21.8), ("L", 256, 16, 47.5), ("L", 384, 24, 115.4)]:
            model = swin_v2(size, img_size=pixels, window_size=window)
            assert round(model.flops((pixels, pixels)) / 1e9, 1) == gmacs
        for pixels, gmacs in [(192, 370.7), (224, 506.9), (256, 665.5), (384, 1538.5), (640, 4639.3)]:
            model = swin_v2("G", img_size=pixels, window_size=pixels // 16)
            assert round(model.flops((pixels, pixels)) / 1e9, 1) == gmacs


def test_names_are_the_official_ones_and_nothing_else_is_saved():
    state = small(extra_norm_period=2).state_dict()
    block = [
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "attn.logit_scale",
        "attn.q_bias",
        "attn.v_bias",
        "attn.qkv.weight",
        "attn.proj.weight",
        "attn.proj.bias",
        "attn.cpb_mlp.0.weight",
        "attn.cpb_mlp.0.bias",
        "attn.cpb_mlp.2.weight",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
    ]
    expected = {f"patch_embed.{n}.{k}" for n in ("proj", "norm") for k in ("weight", "bias")} | {
        "norm.weight",
        "norm.bias",
    }
    for s in range(3):
        expected |= {f"layers.{s}.blocks.{b}.{name}" for b in range(2) for name in block}
        expected |= {f"layers.{s}.blocks.1.enorm.{k}" for k in ("weight", "bias")}
        if s < 2:
            expected |= {f"layers.{s}.downsample.{k}" for k in ("reduction.weight", "norm.weight", "norm.bias")}
    assert set(state) == expected
    assert state["layers.0.blocks.0.attn.logit_scale"].shape == (2, 1, 1)


def test_extra_norms_norm_the_main_branch():
    model = randomise(small(extra_norm_period=2)).eval()
    block = model.layers[0].blocks[1]
    out = block(torch.randn(1, 8, 8, 16))
    normed = (out - block.enorm.bias) / block.enorm.weight
    torch.testing.assert_close(normed.mean(-1), torch.zeros(1, 8, 8), rtol=0, atol=1e-4)
    torch.testing.assert_close(normed.var(-1, correction=0), torch.ones(1, 8, 8), rtol=0, atol=1e-3)


def test_layer_decay_ids():
    model = SwinV2(img_size=32, embed_dim=8, depths=(2, 2, 6, 2), num_heads=(1, 1, 1, 1), window_size=4)
    ids = {
        "patch_embed.proj.weight": 0,
        "patch_embed.norm.bias": 0,
        "layers.0.blocks.0.attn.logit_scale": 1,
        "layers.0.blocks.1.norm1.weight": 2,
        "layers.0.downsample.reduction.weight": 2,
        "layers.1.blocks.0.mlp.fc1.weight": 3,
        "layers.2.blocks.5.attn.qkv.weight": 10,
        "layers.2.downsample.norm.weight": 10,
        "layers.3.blocks.1.attn.proj.bias": 12,
        "norm.weight": 13,
    }
    assert {name: model.depth_of(name) for name in ids} == ids
    assert {model.depth_of(name) for name, _ in model.named_parameters()} == set(range(14))
    assert [id(b) for b in model.blocks()] == [id(b) for s in model.layers for b in s.blocks]


def test_weight_decay_touches_matrices_but_no_bias_machinery():
    model = small()
    decayed = {name for name, _ in model.named_parameters()} - model.no_decay()
    assert {re.sub(r"\d+", "N", name) for name in decayed} == {
        "patch_embed.proj.weight",
        *(f"layers.N.blocks.N.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fcN")),
        "layers.N.downsample.reduction.weight",
    }


def test_the_official_start_is_the_identity_and_feature_distillations_is_not():
    model = small().eval()
    x = torch.randn(1, 8, 8, 16)
    for block in model.layers[0].blocks:
        assert torch.equal(block(x), x)
    attention = model.layers[0].blocks[0].attn
    assert attention.logit_scale.flatten().tolist() == pytest.approx([math.log(10)] * 2)
    assert model.layers[1].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)

    other = small(post_norm_init=1e-5, depth_scaled_init=True)
    assert (other.layers[0].blocks[0].norm1.weight == 1e-5).all()
    initialise(model, seed=3)
    initialise(other, seed=3)
    for i, (plain, scaled) in enumerate(zip(model.blocks(), other.blocks(), strict=True), start=1):
        for name in ("attn.proj", "mlp.fc2"):
            weights = plain.get_submodule(name).weight, scaled.get_submodule(name).weight
            torch.testing.assert_close(weights[1] * math.sqrt(2 * i), weights[0])
        assert torch.equal(plain.mlp.fc1.weight, scaled.mlp.fc1.weight)
    assert torch.equal(model.patch_embed.proj.weight, other.patch_embed.proj.weight)  # also called proj, not in a block


def test_construction_follows_the_seed_and_equals_materialising_from_meta_one_by_one():
    torch.manual_seed(4)
    first = small().state_dict()
    torch.randn(10)
    again = small().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.device("meta"):
        model = small()
    for name, parameter in model.named_parameters():
        assert parameter.is_meta
        assert torch.equal(initial_value(model, name, parameter.shape, torch.float32, 4), first[name])


def test_a_model_filled_after_the_meta_device_computes_the_same():
    model = randomise(small()).eval()
    with torch.device("meta"):
        other = small()
    other = other.to_empty(device="cpu").eval()
    other.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(images), model(images))


def test_bfloat16_weights_and_autocast_stay_close():
    model = randomise(small()).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(images)
    narrow = model.bfloat16()(images.bfloat16())
    assert narrow.dtype is torch.bfloat16
    for actual in (mixed, narrow):
        assert (actual.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("policy", ["checkpoint", "chunk"])
def test_memory_policies_do_not_change_the_result(policy):
    model = randomise(small(drop_path_rate=0.5))
    images, numbers = torch.randn(4, 3, 32, 32), torch.arange(100, 104)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        out = model(images, numbers)
        out.square().mean().backward()
        return [out.detach(), *(p.grad / p.grad.abs().max().clamp_min(1e-30) for p in model.parameters())]

    plain = gradients()
    for block in model.blocks():
        if policy == "checkpoint":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        else:
            block.attn.attention_chunk = 3
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if policy == "checkpoint" else 1e-5)


def test_attention_in_tiles_gives_the_same_network():
    model = randomise(small(drop_path_rate=0.5)).double()
    images, numbers = torch.randn(4, 3, 32, 40, dtype=torch.float64), torch.arange(4)
    results = []
    for kernels in ("reference", "torch"):
        for block in model.blocks():
            block.attn.kernels = kernels
        out = model(images, numbers)
        results.append([out, *torch.autograd.grad(out.square().mean(), list(model.parameters()))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_drop_path_of_a_sample_does_not_depend_on_its_batch():
    model = randomise(small(drop_path_rate=0.5))
    images, numbers = torch.randn(6, 3, 32, 32), torch.arange(6) + 2**40
    whole = model(images, numbers)
    parts = torch.cat([model(images[i : i + 2], numbers[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(model(images, numbers + 6), whole)
    model.drop_path_seed = 1
    assert not torch.allclose(model(images, numbers), whole)
    model.eval()
    assert torch.equal(model(images, numbers), model(images))


def test_errors_name_what_does_not_fit():
    with pytest.raises(UserError, match="T, S, B, L, H, G"):
        swin_v2("XL")
    with pytest.raises(UserError, match="one value per stage"):
        SwinV2(depths=(2, 2))
    with pytest.raises(UserError, match="stage 0 has 96 channels, which 5 heads"):
        SwinV2(num_heads=(5, 6, 12, 24))
    assert set(SIZES) == set("TSBLHG")


@pytest.mark.slow
def test_compiles_into_one_graph():
    model = randomise(small(depths=(2,), num_heads=(2,), pretrained_window_sizes=(0,), drop_path_rate=0.5))
    images, numbers = torch.randn(2, 3, 32, 40), torch.arange(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(images, numbers), model(images, numbers)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    gradients = [torch.autograd.grad(out.square().mean(), list(model.parameters())) for out in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
