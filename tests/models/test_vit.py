"""fdscale.models.vit against timm's Beit with the same weights, the published cost, and itself under memory
policies."""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdscale import UserError
from fdscale.models.layers import initialise
from fdscale.models.vit import ViT

SMALL = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
FLAGS = {"shared": "use_shared_rel_pos_bias", "per_block": "use_rel_pos_bias", "absolute": "use_abs_pos_emb"}


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Of the mean square, each divided by its largest entry."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(out.square().mean(), parameters)
    return {name: grad / grad.abs().max().clamp_min(1e-30) for name, grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize("layer_scale", [0.1, None])
@pytest.mark.parametrize("position", ["shared", "per_block", "absolute"])
def test_equals_timm(position, layer_scale):
    flags = {flag: name == position for name, flag in FLAGS.items()}
    theirs = Beit(
        **SMALL,
        **flags,
        init_values=layer_scale,
        num_classes=0,
        use_fc_norm=False,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )
    randomise(theirs)
    ours = ViT(**SMALL, position=position, layer_scale=layer_scale, drop_path_rate=0.0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    expected, actual = theirs.forward_features(images), ours(images)
    assert actual.shape == (2, 1 + math.prod(ours.grid((32, 48))), ours.width)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    theirs_grads, ours_grads = gradients(theirs, expected), gradients(ours, actual)
    for name, grad in theirs_grads.items():
        torch.testing.assert_close(ours_grads[name], grad, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_published_cost_and_count():
    with torch.device("meta"):
        model = ViT(position="absolute", layer_scale=None)
        assert (
            sum(
                p.numel() for p in ViT(img_size=224, patch_size=14, embed_dim=1024, depth=24, num_heads=16).parameters()
            )
            > 3e8
        )
    # ViT-B/16 of DeiT has 86,567,656 parameters, of which 769,000 are its head's and 9,216 biases of keys.
    assert sum(p.numel() for p in model.parameters()) == 86_567_656 - 769_000 - 12 * 768
    assert 17.5e9 < model.flops((224, 224)) < 17.6e9


def test_names_are_those_of_feature_distillation():
    block = [
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "attn.q_bias",
        "attn.v_bias",
        "attn.qkv.weight",
        "attn.proj.weight",
        "attn.proj.bias",
        "mlp.fc1.weight",
        "mlp.fc1.bias",
        "mlp.fc2.weight",
        "mlp.fc2.bias",
        "gamma_1",
        "gamma_2",
    ]
    common = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    common |= {f"blocks.{i}.{name}" for i in range(3) for name in block}
    own = {
        "shared": {"rel_pos_bias.relative_position_bias_table"},
        "per_block": {f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)},
        "absolute": {"pos_embed"},
    }
    for position, names in own.items():
        state = ViT(**SMALL, position=position).state_dict()
        assert set(state) == common | names
        if position != "absolute":
            assert state[min(names)].shape == (7 * 11 + 3, 3)
    bare = ViT(**SMALL, layer_scale=0, final_norm=False).state_dict()
    assert set(bare) == {
        name for name in common | own["shared"] if "gamma" not in name and not name.startswith("norm.")
    }


def test_initial_weights_follow_feature_distillation():
    model = ViT(img_size=32, patch_size=8, embed_dim=192, depth=4, num_heads=3, layer_scale=0.1)
    initialise(model, seed=0)
    std = 0.02 * math.sqrt(
        1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5))
    )  # cut at one sigma
    for i, block in enumerate(model.blocks(), start=1):
        assert block.attn.qkv.weight.abs().max() <= 0.02
        assert block.attn.qkv.weight.std().item() == pytest.approx(std, rel=0.02)
        for layer in (block.attn.proj, block.mlp.fc2):
            assert layer.weight.std().item() == pytest.approx(std / math.sqrt(2 * i), rel=0.02)
        assert (block.gamma_1 == 0.1).all()
        assert (block.norm1.weight == 1).all()
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(std, rel=0.02)
    assert not model.rel_pos_bias.relative_position_bias_table.any()
    assert model.cls_token.any()


def test_layer_decay_ids_and_weight_decay():
    model = ViT(**SMALL, position="shared")
    ids = {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed.proj.weight": 0,
        "blocks.0.norm1.weight": 1,
        "blocks.2.mlp.fc2.bias": 3,
        "rel_pos_bias.relative_position_bias_table": 4,
        "norm.weight": 4,
    }
    assert {name: model.depth_of(name) for name in ids} == ids
    for position in ("shared", "per_block", "absolute"):
        model = ViT(**SMALL, position=position)
        decayed = {re.sub(r"\d+", "N", name) for name, _ in model.named_parameters() if name not in model.no_decay()}
        matrices = {f"blocks.N.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fcN")} | {
            "patch_embed.proj.weight"
        }
        tables = {
            "shared": {"rel_pos_bias.relative_position_bias_table"},
            "per_block": {"blocks.N.attn.relative_position_bias_table"},
            "absolute": set(),
        }
        assert decayed == matrices | tables[position]


def test_blocks_is_a_list_and_still_the_official_prefix():
    model = ViT(**SMALL)
    assert model.blocks() == [model.get_submodule(f"blocks.{i}") for i in range(3)]
    assert isinstance(model.blocks(), list)


def test_maps_are_the_grid_after_a_third_half_two_thirds_and_all_of_the_blocks():
    model = randomise(ViT(**{**SMALL, "depth": 12})).eval()
    images = torch.randn(2, 3, 32, 48)
    outputs = []
    for block in model.blocks():
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    maps = model.maps(images)
    for i, (block, found) in enumerate(zip((3, 5, 7, 11), maps, strict=True)):
        expected = outputs[block] if i < 3 else model.norm(outputs[block])
        assert torch.equal(found.flatten(2).transpose(1, 2), expected[:, 1:])
        assert found.shape == (2, 24, 4, 6)


def test_another_grid_is_an_error_for_tables_and_a_resize_for_an_absolute_embedding():
    for position in ("shared", "per_block"):
        with pytest.raises(UserError, match=r"64x64 pixels make a grid of 8x8 tokens.* 4x6"):
            ViT(**SMALL, position=position)(torch.randn(1, 3, 64, 64))
    model = randomise(ViT(**SMALL, position="absolute")).eval()
    images = torch.randn(1, 3, 64, 64)
    actual = model(images)
    other = ViT(**{**SMALL, "img_size": 64}, position="absolute").eval()
    grid = model.pos_embed[0, 1:].view(4, 6, 24).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (8, 8), mode="bicubic").flatten(2).transpose(1, 2)
    state = {**model.state_dict(), "pos_embed": torch.cat((model.pos_embed[:, :1], grid), 1)}
    other.load_state_dict(state)
    torch.testing.assert_close(actual, other(images))
    with pytest.raises(UserError, match="shared, per_block, absolute"):
        ViT(position="rope")
    with pytest.raises(UserError, match="5 heads do not divide 768"):
        ViT(num_heads=5)


@pytest.mark.parametrize("position", ["shared", "per_block", "absolute"])
@pytest.mark.parametrize("policy", ["checkpoint", "chunk"])
def test_memory_policies_do_not_change_the_result(policy, position):
    model = randomise(ViT(**SMALL, position=position, drop_path_rate=0.5))
    images, numbers = torch.randn(4, 3, 32, 48), torch.arange(100, 104)
    out = model(images, numbers)
    expected = gradients(model, out)
    for block in model.blocks():
        if policy == "checkpoint":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        else:
            block.attn.attention_chunk = 2
    torch.testing.assert_close(model(images, numbers), out, rtol=0, atol=1e-5)
    actual = gradients(model, model(images, numbers))
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_in_chunks_no_scores_are_kept_for_the_backward():
    attention = randomise(ViT(**SMALL)).blocks()[0].attn
    count = 25
    x, bias = torch.randn(2, count, 24), torch.randn(3, count, count, requires_grad=True)

    def kept() -> int:
        """Numbers in N x N tensors saved in the forward, the bias (3 heads) apart."""
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() if tensor.shape[-2:] == (count, count) and tensor.numel() > 3 * count**2 else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention(x, bias)
        return total

    assert kept() >= 2 * 3 * count**2  # images x heads
    attention.attention_chunk = 1
    assert kept() == 0


def test_drop_path_of_a_sample_does_not_depend_on_its_batch():
    model = randomise(ViT(**SMALL, drop_path_rate=0.5))
    images, numbers = torch.randn(6, 3, 32, 48), torch.arange(6)
    whole = model(images, numbers)
    parts = torch.cat([model(images[i : i + 2], numbers[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert not torch.allclose(model(images, numbers + 6), whole)


def test_bfloat16_stays_close():
    model = randomise(ViT(**SMALL)).eval()
    images = torch.randn(2, 3, 32, 48)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(images)
    for actual in (mixed, model.bfloat16()(images.bfloat16())):
        assert (actual.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("position", ["shared", "per_block"])
def test_compiles_into_one_graph(position):
    model = randomise(ViT(**{**SMALL, "depth": 1}, position=position, drop_path_rate=0.5))
    images, numbers = torch.randn(2, 3, 32, 48), torch.arange(2)
    actual, expected = (
        torch.compile(model, fullgraph=True, backend="aot_eager")(images, numbers),
        model(images, numbers),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    ours, theirs = gradients(model, actual), gradients(model, expected)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=0, atol=1e-3)
