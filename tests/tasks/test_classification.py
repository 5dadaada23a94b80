"""The classifier against timm's Beit and SwinV2 with the same weights, its groups by the official rules, and accuracy
against scikit-learn's."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, top_k_accuracy_score
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from fdscale.data.mixing import mixed_targets
from fdscale.engine.optim import param_groups
from fdscale.models import backbone, convert
from fdscale.models.layers import initialise
from fdscale.tasks.classification import Classifier, Tally, places, soft_cross_entropy

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "drop_path_rate": 0.0}
SWIN = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 4, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
TOKENS = {"position": "per_block", "final_norm": False}
CLASSES = 11


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def loaded(model: str, args: dict, theirs: nn.Module, head: str) -> Classifier:
    """Ours with the weights of timm's."""
    ours = Classifier(backbone(model, args), CLASSES)
    state = theirs.state_dict()
    convert.load(ours.backbone, state)
    own = {name: state[name.replace("head.", head)] for name, _ in ours.named_parameters() if "backbone." not in name}
    ours.load_state_dict(own, strict=False)
    return ours.eval()


def test_a_vit_is_timms_mean_pooled_beit() -> None:
    theirs = randomised(
        Beit(
            **{key: value for key, value in VIT.items() if key != "drop_path_rate"},
            use_rel_pos_bias=True,
            use_abs_pos_emb=False,
            init_values=0.1,
            num_classes=CLASSES,
            global_pool="avg",
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        )
    )
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        loaded("vit", {**VIT, **TOKENS}, theirs, "head.")(images), theirs(images), rtol=0, atol=1e-5
    )


def test_a_swin_keeps_its_own_norm_as_timms() -> None:
    theirs = randomised(SwinTransformerV2(**SWIN, num_classes=CLASSES))
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = loaded("swin_v2", SWIN, theirs, "head.fc.")
    assert not any(name.startswith("fc_norm") for name, _ in ours.named_parameters())
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


def test_a_fresh_head_is_small_and_has_the_official_law() -> None:
    model = Classifier(backbone("vit", {**VIT, **TOKENS, "embed_dim": 192}), 1000, head_scale=1e-3)
    initialise(model, seed=0)
    sigma = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5)))
    assert model.head.weight.std().item() == pytest.approx(1e-3 * sigma, rel=0.02)
    assert model.head.weight.abs().max() <= 1e-3 * 0.02
    assert not model.head.bias.any()
    assert (model.fc_norm.weight == 1).all()
    images = torch.randn(2, 3, 32, 32)
    loss = model(images, mixed_targets(torch.tensor([3, 7]), 1000, 0.1, torch.tensor([0.4, 0.4])))
    assert loss.item() == pytest.approx(math.log(1000), abs=1e-3)


def test_the_loss_is_timms() -> None:
    scores = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 3, 10, 7, 5])
    mixed = mixed_targets(labels, CLASSES, 0.1, torch.tensor([0.2, 0.2, 0.9, 0.9, 1.0, 0.5]))
    torch.testing.assert_close(soft_cross_entropy(scores, mixed), SoftTargetCrossEntropy()(scores, mixed))
    plain = mixed_targets(labels, CLASSES, 0.1, torch.ones(6))
    torch.testing.assert_close(soft_cross_entropy(scores, plain), LabelSmoothingCrossEntropy(0.1)(scores, labels))


@pytest.mark.parametrize("decay", [0.65, 0.8])
def test_vit_groups_follow_the_official_rules(decay: float) -> None:
    """depth + 2 ids: embeddings 0, block i has i + 1, norm and head the last; tables decay, vectors and biases not."""
    model, top = Classifier(backbone("vit", {**VIT, **TOKENS}), CLASSES), VIT["depth"] + 1
    groups = param_groups(model, lr=2.0, weight_decay=0.05, layer_decay=decay)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert {round(group["lr"], 9) for group in groups} == {round(2.0 * decay**i, 9) for i in range(top + 1)}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("backbone.").split(".")
        depth = {"patch_embed": 0, "cls_token": 0, "blocks": int(parts[1]) + 1 if parts[0] == "blocks" else 0}.get(
            parts[0], top
        )
        plain = parameter.ndim == 1 or name.endswith((".bias", "q_bias", "v_bias", "cls_token"))
        assert found[name] == (pytest.approx(2.0 * decay ** (top - depth)), 0.0 if plain else 0.05), name
    assert found["head.weight"] == (2.0, 0.05)
    assert found["fc_norm.weight"] == (2.0, 0.0)
    assert found["backbone.blocks.1.attn.relative_position_bias_table"][1] == 0.05


def test_swin_groups_follow_the_official_rules() -> None:
    """A stage's downsample has the id of that stage's last block; the final norm goes with the head."""
    model, top = Classifier(backbone("swin_v2", SWIN), CLASSES), sum(SWIN["depths"]) + 1
    groups = param_groups(model, lr=1.0, weight_decay=0.05, layer_decay=0.8)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    for name, depth, decays in (
        ("backbone.patch_embed.proj.weight", 0, True),
        ("backbone.layers.0.downsample.reduction.weight", 2, True),
        ("backbone.layers.0.blocks.1.mlp.fc1.weight", 2, True),
        ("backbone.layers.2.blocks.3.attn.cpb_mlp.0.weight", 8, False),
        ("backbone.layers.2.downsample.norm.weight", 8, False),
        ("backbone.layers.3.blocks.1.attn.logit_scale", 10, False),
        ("backbone.norm.weight", top, False),
        ("head.weight", top, True),
        ("head.bias", top, False),
    ):
        assert found[name] == (pytest.approx(0.8 ** (top - depth)), 0.05 if decays else 0.0), name


def test_accuracy_is_sklearns_on_random_scores_with_ties() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 500)
    scores = rng.normal(size=(500, CLASSES)).astype(np.float32)
    weights = (np.arange(500) % 7 > 0).astype(np.float32)
    tally = Tally(500, CLASSES)
    for numbers in np.array_split(rng.permutation(500), 9):
        given = (torch.from_numpy(one[numbers]) for one in (labels, scores, weights))
        one, two, three = given
        tally.add(torch.from_numpy(numbers), one, two, three)
    found, kept = tally.result(), weights > 0
    assert found.samples == kept.sum()
    every = np.arange(CLASSES)
    assert found.top1 == top_k_accuracy_score(labels[kept], scores[kept], k=1, labels=every)
    assert found.top5 == top_k_accuracy_score(labels[kept], scores[kept], k=5, labels=every)
    shares = F.softmax(torch.from_numpy(scores[kept]).double(), 1).numpy()
    assert found.loss == pytest.approx(log_loss(labels[kept], shares, labels=every), abs=1e-6)
    right = scores.argmax(1) == labels
    for number in range(CLASSES):
        mine = kept & (labels == number)
        assert found.per_class[number].tolist() == [(right & mine).sum(), mine.sum()]


def test_equal_scores_and_broken_ones_do_not_count_as_right() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [math.nan, 5.0, 1.0], [math.inf, 0.0, 0.0]])
    assert places(scores, torch.tensor([0, 1, 1, 0])).tolist() == [0, 1, 3, 3]


def test_a_sample_that_would_count_twice_is_seen() -> None:
    tally, one = Tally(4, CLASSES), torch.ones(1)
    for _ in range(2):
        tally.add(torch.tensor([2]), torch.tensor([5]), torch.zeros(1, CLASSES), one)
    with pytest.raises(AssertionError, match="counted twice"):
        tally.result()
    assert Tally(4, CLASSES).result() is None


def test_a_backbone_without_a_norm_is_normed() -> None:
    """A norm of its own is no part of what a backbone has to have."""

    class Backbone(nn.Module):
        width, prefix = 8, ()

    assert isinstance(Classifier(Backbone(), 3).fc_norm, nn.Identity)
    bare = Backbone()
    bare.norm = nn.Identity()
    assert isinstance(Classifier(bare, 3).fc_norm, nn.LayerNorm)
