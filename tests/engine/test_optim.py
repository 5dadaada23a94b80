"""Parameter groups against the official rules written out by hand, and AdamW against its closed form."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fdscale import UserError
from fdscale.engine.optim import adamw, param_groups, set_lr
from fdscale.models import backbone

SWIN = {"img_size": 64, "embed_dim": 16, "depths": [2, 2, 4, 2], "num_heads": [1, 2, 4, 8], "window_size": 4}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


@pytest.mark.parametrize(("model", "args"), [("swin_v2", SWIN), ("vit", VIT)])
@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_every_parameter_is_in_exactly_one_group(model: str, args: dict, layer_decay: float) -> None:
    student = backbone(model, args)
    groups = param_groups(student, lr=1.0, weight_decay=0.05, layer_decay=layer_decay)
    names = Counter(name for group in groups for name in group["names"])
    assert names == Counter(name for name, _ in student.named_parameters())
    identities = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert set(identities.values()) == {1}
    assert len(groups) == 2 if layer_decay == 1.0 else len(groups) > 6


def test_swin_rules_are_the_official_ones() -> None:
    """Official Feature-Distillation optimizer.py: no decay for 1-D, biases, position MLP; block i has layer i."""
    student = backbone("swin_v2", SWIN)
    groups = param_groups(student, lr=2.0, weight_decay=0.05, layer_decay=0.5)
    found = {name: (group["weight_decay"], group["lr"]) for group in groups for name in group["names"]}
    starts, top = {0: 0, 1: 2, 2: 4, 3: 8}, 11
    for name, parameter in student.named_parameters():
        plain = (
            parameter.ndim == 1
            or name.endswith((".bias", "q_bias", "v_bias"))
            or "cpb_mlp" in name
            or "logit_scale" in name
        )
        parts = name.split(".")
        if parts[0] == "patch_embed":
            depth = 0
        elif parts[0] == "layers" and parts[2] == "blocks":
            depth = starts[int(parts[1])] + int(parts[3]) + 1
        elif parts[0] == "layers":
            depth = starts[int(parts[1]) + 1]
        else:
            depth = top
        assert found[name] == (0.0 if plain else 0.05, pytest.approx(2.0 * 0.5 ** (top - depth))), name


def test_vit_rules_are_the_official_ones() -> None:
    """BEiT's and Feature-Distillation's ids: embeddings 0, block i has i + 1, relative table and norm the last."""
    groups = param_groups(backbone("vit", VIT), lr=1.0, weight_decay=0.05, layer_decay=0.6)
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    for name, depth, decays in (
        ("cls_token", 0, False),
        ("patch_embed.proj.weight", 0, True),
        ("blocks.0.mlp.fc1.weight", 1, True),
        ("blocks.0.gamma_1", 1, False),
        ("blocks.2.attn.proj.weight", 3, True),
        ("blocks.2.attn.q_bias", 3, False),
        ("rel_pos_bias.relative_position_bias_table", 4, True),
        ("norm.weight", 4, False),
    ):
        assert found[name] == (pytest.approx(0.6 ** (4 - depth)), 0.05 if decays else 0.0), name


def test_set_lr_keeps_the_layers_scales() -> None:
    student = backbone("vit", VIT)
    optimizer = adamw(param_groups(student, 1.0, 0.05, 0.5), (0.9, 0.999), 1e-8)
    set_lr(optimizer, 0.25)
    assert all(group["lr"] == pytest.approx(0.25 * group["lr_scale"]) for group in optimizer.param_groups)
    assert max(group["lr"] for group in optimizer.param_groups) == 0.25


def test_apex_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"optim\.fused is apex, but NVIDIA's apex .* is not installed"):
        adamw([], (0.9, 0.999), 1e-8, fused="apex")
    with pytest.raises(UserError, match=r"optim\.fused is apex, but it counts updates wrongly at ZeRO 3"):
        adamw([], (0.9, 0.999), 1e-8, stage=3, fused="apex")


def test_a_rule_for_no_parameter_is_an_error() -> None:
    student = backbone("vit", VIT)
    student.no_decay = lambda: {"blocks.9.norm1.weight"}
    with pytest.raises(UserError, match=r"blocks\.9\.norm1\.weight"):
        param_groups(student, 1.0, 0.05)


def test_adamw_is_the_closed_form() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, three steps in float64 by hand."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    groups = [{"params": [weight], "names": ["w"], "lr": 0.1, "lr_scale": 1.0, "weight_decay": 0.05}]
    optimizer = adamw(groups, (0.9, 0.999), 1e-8)
    w, m, v = weight.detach().double().clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for step in range(1, 4):
        g = torch.tensor([0.1, -0.2, 0.3]).double() * step
        weight.grad = g.float()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w * (1 - 0.1 * 0.05) - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert torch.allclose(weight.detach().double(), w, atol=1e-6)
