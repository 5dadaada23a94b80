"""State dicts in and out against independent references.

- timm's swinv2 and Beit: their weights in our models give the same features, ours in theirs too (strict), and timm's
  own conversion of official checkpoints agrees with ours.
- Official, Feature-Distillation, SimMIM, BEiT and DeepSpeed layouts from name lists written out here.
- Table resizing against scipy's splines; exported buffers against formulas written out here and timm's buffers.
- Files: real torch.save / safetensors / TorchScript files, whole, cut, hostile.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import pickle
import random
import re
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from scipy.interpolate import CubicSpline, RectBivariateSpline
from scipy.optimize import brentq
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2, checkpoint_filter_fn
from torch import Tensor

from fdscale import UserError
from fdscale.models import convert
from fdscale.models.convert import SOURCES, export, load
from fdscale.models.position import continuous_bias_table
from fdscale.models.resize import resize_table, spline_matrix
from fdscale.models.swin_v2 import SwinV2
from fdscale.models.vit import ViT
from fdscale.models.weights_io import read, save

SWIN = {"embed_dim": 16, "depths": (2, 2, 3, 1), "num_heads": (2, 2, 4, 4), "window_size": 4, "img_size": 64}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def randomised(model, seed: int = 0):
    """Every parameter random, so that no zero-initialised norm hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + (1.0 if "norm" in name else 0.0)
    return model.eval()


def swin(**changes) -> SwinV2:
    return SwinV2(**{**SWIN, "drop_path_rate": 0.0, **changes}).eval()


def vit(**changes) -> ViT:
    return ViT(**{**VIT, "drop_path_rate": 0.0, "position": "shared", **changes}).eval()


def timm_swin(**changes) -> SwinTransformerV2:
    return randomised(SwinTransformerV2(**{**SWIN, "num_classes": 0, **changes}))


def timm_beit(**changes) -> Beit:
    shared = {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}
    return randomised(Beit(**{**VIT, **shared, "num_classes": 0, "global_pool": "token", **changes}))


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def same_features(ours, theirs, size: int) -> None:
    got, wanted = ours(images(size)), theirs.forward_features(images(size))
    torch.testing.assert_close(got, wanted.flatten(1, 2) if wanted.ndim == 4 else wanted, rtol=0, atol=2e-6)


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


# --- the layouts, written out -----------------------------------------------------------------------------------------


def swin_shapes(mlp: str = "cpb_mlp", depths=(2, 2, 3, 1), extra_norms=()) -> dict[str, tuple[int, ...]]:
    """Parameters of microsoft/Swin-Transformer's SwinTransformerV2, width 16; Feature-Distillation says rpe_mlp."""
    shapes = {"patch_embed.proj.weight": (16, 3, 4, 4), "patch_embed.proj.bias": (16,)}
    shapes |= {"patch_embed.norm.weight": (16,), "patch_embed.norm.bias": (16,)}
    for s, (c, h) in enumerate(((16, 2), (32, 2), (64, 4), (128, 4))):
        for b in range(depths[s]):
            p = f"layers.{s}.blocks.{b}."
            shapes |= {p + "norm1.weight": (c,), p + "norm1.bias": (c,)}
            shapes |= {p + "norm2.weight": (c,), p + "norm2.bias": (c,)}
            shapes |= {p + "attn.logit_scale": (h, 1, 1), p + "attn.q_bias": (c,), p + "attn.v_bias": (c,)}
            shapes |= {p + f"attn.{mlp}.0.weight": (512, 2), p + f"attn.{mlp}.0.bias": (512,)}
            shapes |= {p + f"attn.{mlp}.2.weight": (h, 512), p + "attn.qkv.weight": (3 * c, c)}
            shapes |= {p + "attn.proj.weight": (c, c), p + "attn.proj.bias": (c,)}
            shapes |= {p + "mlp.fc1.weight": (4 * c, c), p + "mlp.fc1.bias": (4 * c,)}
            shapes |= {p + "mlp.fc2.weight": (c, 4 * c), p + "mlp.fc2.bias": (c,)}
            if (s, b) in extra_norms:
                shapes |= {p + "enorm.weight": (c,), p + "enorm.bias": (c,)}
        if s < 3:
            p = f"layers.{s}.downsample."
            shapes |= {p + "reduction.weight": (2 * c, 4 * c), p + "norm.weight": (2 * c,), p + "norm.bias": (2 * c,)}
    return shapes | {"norm.weight": (128,), "norm.bias": (128,)}


def vit_shapes(position: str = "shared", depth: int = 2, grid: int = 4) -> dict[str, tuple[int, ...]]:
    """Parameters of Feature-Distillation's and SimMIM's BEiT-like ViT, width 32, 2 heads, patch 8."""
    rows = (2 * grid - 1) ** 2 + 3
    shapes = {"cls_token": (1, 1, 32), "patch_embed.proj.weight": (32, 3, 8, 8), "patch_embed.proj.bias": (32,)}
    if position == "shared":
        shapes["rel_pos_bias.relative_position_bias_table"] = (rows, 2)
    if position == "absolute":
        shapes["pos_embed"] = (1, grid * grid + 1, 32)
    for i in range(depth):
        p = f"blocks.{i}."
        shapes |= {p + "gamma_1": (32,), p + "gamma_2": (32,), p + "norm1.weight": (32,), p + "norm1.bias": (32,)}
        shapes |= {p + "norm2.weight": (32,), p + "norm2.bias": (32,)}
        shapes |= {p + "attn.q_bias": (32,), p + "attn.v_bias": (32,)}
        shapes |= {p + "attn.qkv.weight": (96, 32), p + "attn.proj.weight": (32, 32), p + "attn.proj.bias": (32,)}
        shapes |= {p + "mlp.fc1.weight": (128, 32), p + "mlp.fc1.bias": (128,)}
        shapes |= {p + "mlp.fc2.weight": (32, 128), p + "mlp.fc2.bias": (32,)}
        if position == "per_block":
            shapes[p + "attn.relative_position_bias_table"] = (rows, 2)
    return shapes | {"norm.weight": (32,), "norm.bias": (32,)}


def coords_by_hand(window: int, normaliser: int) -> Tensor:
    """(1, 2w-1, 2w-1, 2): SwinV2's log-spaced coordinates, number by number."""

    def log8(offset: int) -> float:
        x = 8 * offset / (normaliser - 1)
        return math.copysign(math.log2(abs(x) + 1) / 3, x) if x else 0.0

    line = range(1 - window, window)
    return torch.tensor([[[[log8(y), log8(x)] for x in line] for y in line]])


def index_by_hand(window: int) -> Tensor:
    places = [(y, x) for y in range(window) for x in range(window)]
    row = [[(y - v + window - 1) * (2 * window - 1) + x - u + window - 1 for v, u in places] for y, x in places]
    return torch.tensor(row)


def mask_by_hand(side: int, window: int, shift: int) -> Tensor:
    """(windows, N, N): a pair is masked when rolling by `shift` moved just one of the two across the map's border."""
    masks = []
    for top in range(0, side, window):
        for left in range(0, side, window):
            tokens = [(y, x) for y in range(top, top + window) for x in range(left, left + window)]
            crossed = [(y + shift >= side, x + shift >= side) for y, x in tokens]
            masks.append([[0.0 if a == b else -100.0 for b in crossed] for a in crossed])
    return torch.tensor(masks)


def swin_buffers(image: int = 64, window: int = 4, normaliser: int = 0, depths=(2, 2, 3, 1)) -> dict[str, Tensor]:
    """The buffers official SwinV2 checkpoints carry."""
    buffers = {}
    for s, depth in enumerate(depths):
        side = image // 4 // 2**s
        own = min(window, side)
        for b in range(depth):
            p = f"layers.{s}.blocks.{b}."
            buffers[p + "attn.relative_coords_table"] = coords_by_hand(own, normaliser or own)
            buffers[p + "attn.relative_position_index"] = index_by_hand(own)
            if b % 2 and side > window:
                buffers[p + "attn_mask"] = mask_by_hand(side, window, window // 2)
    return buffers


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def holds(model, wanted: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    assert parameters.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(parameters[name], tensor), name


HEAD = filled({"head.weight": (10, 128), "head.bias": (10,)})
TEACHER = filled({"decoder.0.weight": (24, 128, 1), "decoder.0.bias": (24,), "feature_model.visual.proj": (24,)})
TEACHER |= filled({"feature_model.layers.0.blocks.0.attn.relative_position_bias_table": (729, 4)})


# --- timm -------------------------------------------------------------------------------------------------------------


def test_timm_swin_weights_give_timm_features():
    theirs, ours = timm_swin(), swin()
    assert load(ours, theirs.state_dict()) == "timm-swin-v2"
    same_features(ours, theirs, 64)


def test_timm_swin_with_head_and_pretrained_window():
    theirs = timm_swin(num_classes=10, img_size=128, window_size=8, pretrained_window_sizes=(4, 4, 4, 2))
    ours = swin(img_size=128, window_size=8, pretrained_window_sizes=(4, 4, 4, 2))
    assert load(ours, theirs.state_dict()) == "timm-swin-v2"
    same_features(ours, theirs, 128)


def test_our_swin_export_loads_strictly_in_timm():
    ours, theirs = randomised(swin(), seed=3), timm_swin()
    theirs.load_state_dict(export(ours, "timm"), strict=True)
    same_features(ours, theirs, 64)


@pytest.mark.parametrize("position", ["shared", "per_block", "absolute"])
def test_timm_beit_both_ways(position):
    theirs = timm_beit(
        use_shared_rel_pos_bias=position == "shared",
        use_rel_pos_bias=position == "per_block",
        use_abs_pos_emb=position == "absolute",
    )
    ours = vit(position=position)
    load(ours, theirs.state_dict())
    same_features(ours, theirs, 32)
    randomised(ours, seed=4)
    theirs.load_state_dict(export(ours, "timm"), strict=True)
    same_features(ours, theirs, 32)


def test_timm_beit_classifier_into_a_model_without_final_norm():
    theirs = timm_beit(num_classes=10, global_pool="avg")
    ours = vit(final_norm=False)
    assert load(ours, theirs.state_dict()) == "beit"
    same_features(ours, theirs, 32)
    with pytest.raises(UserError, match="final_norm=False"):
        load(vit(), theirs.state_dict())


def test_official_swin_agrees_with_timms_conversion_of_official_checkpoints():
    official = filled(swin_shapes()) | swin_buffers() | HEAD
    theirs = timm_swin(num_classes=10)
    theirs.load_state_dict(checkpoint_filter_fn(dict(official), theirs), strict=True)
    ours = swin()
    assert load(ours, official) == "official-swin-v2"
    same_features(ours, theirs, 64)


# --- each source ------------------------------------------------------------------------------------------------------


def test_fdscale_and_official_names_are_the_official_ones():
    assert {n: tuple(p.shape) for n, p in swin().named_parameters()} == swin_shapes()
    assert {n: tuple(p.shape) for n, p in vit().named_parameters()} == vit_shapes()
    weights = filled(swin_shapes())
    model = swin()
    assert load(model, weights) == "fdscale"
    holds(model, weights)
    assert load(model, weights | HEAD) == "official-swin-v2"  # the head may be there, or not
    assert load(model, weights | swin_buffers()) == "official-swin-v2"


def test_fd_swin_distillation_checkpoint():
    weights = filled(swin_shapes("rpe_mlp", extra_norms={(2, 1)}))
    model = swin(extra_norm_period=2, depths=(2, 2, 3, 1))
    weights |= filled({f"layers.{s}.blocks.1.enorm.{k}": (16 << s,) for s in (0, 1) for k in ("weight", "bias")})
    assert load(model, prefixed("encoder.", weights | swin_buffers()) | TEACHER) == "fd-swin-v2"
    holds(model, {name.replace("rpe_mlp", "cpb_mlp"): tensor for name, tensor in weights.items()})


def test_fd_swin_fine_tuned_checkpoint():
    weights = filled(swin_shapes("rpe_mlp"))
    model = swin()
    assert load(model, weights | swin_buffers() | HEAD) == "fd-swin-v2"
    holds(model, {name.replace("rpe_mlp", "cpb_mlp"): tensor for name, tensor in weights.items()})


def test_fd_swin_shared_bias_computes_what_the_shared_network_computes():
    weights = {name: tensor for name, tensor in filled(swin_shapes("rpe_mlp")).items() if "rpe_mlp" not in name}
    shared = {}
    for s, heads in enumerate((2, 2, 4, 4)):
        p = f"layers.{s}.rel_pos_bias."
        shared |= filled({f"{p}rpe_mlp.0.weight": (512, 2), f"{p}rpe_mlp.0.bias": (512,)}, seed=s)
        shared |= filled({f"{p}rpe_mlp.2.weight": (heads, 512)}, seed=s + 9)
        shared[f"{p}relative_coords_table"] = coords_by_hand(min(4, 16 >> s), min(4, 16 >> s))
        shared[f"{p}relative_position_index"] = index_by_hand(min(4, 16 >> s))
    model = swin()
    assert load(model, prefixed("encoder.", weights | shared) | TEACHER) == "fd-swin-v2"
    for s, stage in enumerate(model.layers):
        p = f"layers.{s}.rel_pos_bias."
        hidden = shared[f"{p}relative_coords_table"] @ shared[f"{p}rpe_mlp.0.weight"].T + shared[f"{p}rpe_mlp.0.bias"]
        wanted = hidden.relu() @ shared[f"{p}rpe_mlp.2.weight"].T
        for block in stage.blocks:
            got = block.attn.cpb_mlp(shared[f"{p}relative_coords_table"])
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    first, second = (block.attn.cpb_mlp[0].weight for block in model.layers[0].blocks)
    assert first.data_ptr() != second.data_ptr()  # copies: trained apart from here on


@pytest.mark.parametrize("mlp", ["rpe_mlp", "cpb_mlp"])
def test_simmim_swin(mlp):
    weights = filled(swin_shapes(mlp))
    extra = filled({"encoder.mask_token": (1, 1, 16), "decoder.0.weight": (3072, 128, 1, 1), "decoder.0.bias": (3072,)})
    model = swin()
    assert load(model, prefixed("encoder.", weights | swin_buffers()) | extra) == "simmim-swin-v2"
    holds(model, {name.replace("rpe_mlp", "cpb_mlp"): tensor for name, tensor in weights.items()})


def test_fd_simmim_and_beit_vit():
    weights = filled(vit_shapes())
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    mask = filled({"encoder.mask_token": (1, 1, 32), "decoder.0.weight": (192, 32, 1, 1), "decoder.0.bias": (192,)})
    lm = filled({"mask_token": (1, 1, 32), "lm_head.weight": (64, 32), "lm_head.bias": (64,)})
    for wanted, state in (
        ("fdscale", weights),
        ("fd-vit", prefixed("encoder.", weights | index) | TEACHER),
        ("simmim-vit", prefixed("encoder.", weights | index) | mask),
        ("beit", weights | index | lm),
    ):
        model = vit()
        assert load(model, state) == wanted
        holds(model, weights)


def test_shared_table_becomes_one_per_block_and_never_back():
    weights = filled(vit_shapes(), seed=5)
    shared, per_block = vit(), vit(position="per_block")
    load(shared, weights)
    load(per_block, prefixed("encoder.", weights) | TEACHER)
    with torch.no_grad():
        torch.testing.assert_close(per_block(images(32)), shared(images(32)), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="position='per_block'"):
        load(vit(), filled(vit_shapes("per_block")))


def test_deepspeed_checkpoints_of_a_distiller():
    weights = filled(swin_shapes())
    projector = filled({"projector.weight": (24, 128), "projector.bias": (24,)})
    distiller = prefixed("backbone.", weights) | projector
    for state in (distiller, prefixed("module.", distiller), prefixed("module.", weights)):
        model = swin()
        assert load(model, state) == "deepspeed"
        holds(model, weights)
    assert export(distiller).keys() == weights.keys()


def test_every_source_is_reached_by_a_test():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [source for source in SOURCES if f'"{source}"' not in text] == []


# --- strictness -------------------------------------------------------------------------------------------------------


def test_another_depth_is_a_readable_diff_and_changes_nothing():
    model = randomised(swin(depths=(2, 2, 5, 1)))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError) as caught:
        load(model, filled(swin_shapes()) | HEAD)
    lines = str(caught.value).splitlines()
    assert "34 missing, 0 unexpected, 0 of another shape" in lines[0]
    assert sum(line.startswith("- missing layers.2.blocks.") for line in lines) == 20
    assert "- missing ... and 14 more" in lines
    holds(model, before)


def test_wrong_shapes_and_types_are_listed():
    weights = filled(swin_shapes())
    weights["norm.weight"] = torch.zeros(7)
    weights["norm.bias"] = torch.zeros(128, dtype=torch.int64)
    with pytest.raises(UserError) as caught:
        load(swin(), weights)
    assert "~ shape norm.weight: file (7,) torch.float32, model (128,)" in str(caught.value)
    assert "~ shape norm.bias: file (128,) torch.int64" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["absolute_pos_embed", "layers.0.blocks.0.mlp.norm.bias", "layers.0.blocks.0.attn.k_bias", "decoder.0.bias"]
)
def test_unexpected_tensors_are_refused(name):
    with pytest.raises(UserError, match=re.escape(f"+ unexpected {name}")):
        load(swin(), filled(swin_shapes()) | HEAD | {name: torch.zeros(3)})


def test_extra_norms_that_the_model_lacks_are_refused():
    with pytest.raises(UserError, match="extra_norm_period"):
        load(swin(), prefixed("encoder.", filled(swin_shapes("rpe_mlp", extra_norms={(2, 1)}))) | TEACHER)


def test_other_patches_and_channels_are_refused():
    for shape, words in (((16, 3, 8, 8), "in_chans=3 and patch_size=8"), ((16, 4, 4, 4), "in_chans=4 and patch_size")):
        with pytest.raises(UserError, match=words):
            load(swin(), filled(swin_shapes()) | {"patch_embed.proj.weight": torch.zeros(shape)})


def test_unknown_layouts_and_other_networks_are_named():
    with pytest.raises(UserError, match=r"first names are: conv1\.weight.*Known sources: fdscale"):
        load(swin(), {"conv1.weight": torch.zeros(3)})
    with pytest.raises(UserError, match="unknown layout"):
        load(swin(), {})
    with pytest.raises(UserError, match="of a ViT and the model is a SwinV2"):
        load(swin(), filled(vit_shapes()))
    swin_v1 = {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(49, 2), "norm.weight": torch.zeros(4)}
    with pytest.raises(UserError, match="Swin V1"):
        load(swin(), swin_v1)


def test_one_name_twice_is_refused():
    weights = filled(swin_shapes())
    with pytest.raises(UserError, match=r"both become `norm\.weight`"):
        load(swin(), prefixed("encoder.", weights) | {"norm.weight": torch.zeros(128)} | TEACHER)
    with pytest.raises(UserError, match="two models are mixed"):
        load(swin(), weights | prefixed("_orig_mod.", weights))


def test_meta_models_are_materialised_in_their_own_memory():
    weights = filled(swin_shapes())
    with torch.device("meta"):
        model = SwinV2(**SWIN, drop_path_rate=0.0).eval()
    model.norm.weight.requires_grad_(False)
    load(model, weights)
    holds(model, weights)
    assert not model.norm.weight.requires_grad
    assert model.norm.bias.requires_grad
    assert model.norm.bias.data_ptr() != weights["norm.bias"].data_ptr()
    reference = swin()
    load(reference, weights)
    with torch.no_grad():
        assert torch.equal(model(images(64)), reference(images(64)))


def test_values_are_cast_to_the_models_dtype():
    weights = {name: tensor.bfloat16() for name, tensor in filled(swin_shapes()).items()}
    model = swin()
    load(model, weights)
    holds(model, {name: tensor.float() for name, tensor in weights.items()})


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["relative_coords_table", "relative_position_index", "attn_mask"])
def test_another_window_names_the_value_to_set(kind):
    weights = filled(swin_shapes())
    weights |= {name: tensor for name, tensor in swin_buffers().items() if kind in name}
    larger = {"img_size": 128, "window_size": 8}
    wanted = (4, 4, 0, 0) if kind == "attn_mask" else (4, 4, 4, 2)  # only shifted blocks have a mask
    with pytest.raises(UserError, match=re.escape(f"pretrained_window_sizes={list(wanted)}")):
        load(swin(**larger), weights)
    load(swin(**larger, pretrained_window_sizes=(4, 4, 4, 2)), weights)


def test_the_bias_of_a_larger_window_extends_that_of_pre_training():
    small, large = swin(), swin(img_size=128, window_size=8, pretrained_window_sizes=(4, 4, 4, 2))
    weights = filled(swin_shapes()) | swin_buffers()
    load(small, weights)
    load(large, weights)
    for ours, theirs in zip(large.layers, small.layers, strict=True):
        far, near = (
            continuous_bias_table(a.cpb_mlp, a.window, a.pretrained_window, torch.device("cpu"))
            for a in (ours.blocks[0].attn, theirs.blocks[0].attn)
        )
        margin = (far.shape[1] - near.shape[1]) // 2
        assert margin > 0
        torch.testing.assert_close(far[:, margin:-margin, margin:-margin], near)


def test_a_file_fine_tuned_at_a_larger_window_keeps_its_pre_training_window():
    weights = filled(swin_shapes()) | swin_buffers(image=128, window=8, normaliser=6)
    larger = {"img_size": 128, "window_size": 8}
    for pretrained in ((0, 0, 0, 0), (6, 6, 6, 5)):
        with pytest.raises(UserError, match=r"pretrained_window_sizes=\[6, 6, 6, 6\]"):
            load(swin(**larger, pretrained_window_sizes=pretrained), weights)
    load(swin(**larger, pretrained_window_sizes=(6, 6, 6, 6)), weights)


def test_windows_of_weights_without_buffers_are_those_of_the_network_they_come_from():
    weights, larger = filled(swin_shapes()), {"img_size": 128, "window_size": 8}
    load(swin(**larger), weights)  # nobody can tell
    with torch.device("meta"):
        small, grown = swin(), swin(**larger, pretrained_window_sizes=(4, 4, 4, 2))
    for trained in (small, grown):
        with pytest.raises(UserError, match=r"pretrained_window_sizes=\[4, 4, 4, 2\]"):
            load(swin(**larger), weights, trained)
        load(swin(**larger, pretrained_window_sizes=(4, 4, 4, 2)), weights, trained)
    load(swin(), weights, small)


def test_half_precision_buffers_are_understood():
    weights = {n: t.half() if t.is_floating_point() else t for n, t in (filled(swin_shapes()) | swin_buffers()).items()}
    load(swin(), weights)


def test_another_coordinate_function_is_refused():
    linear = torch.arange(-3, 4) / 3
    table = torch.stack(torch.meshgrid(linear, linear, indexing="ij"), dim=-1)[None]
    for wrong in (table, torch.zeros(1, 7, 7, 2), torch.full((1, 7, 7, 2), math.nan), torch.full((1, 7, 7, 2), 1e30)):
        with pytest.raises(UserError, match="other coordinates"):
            load(swin(), filled(swin_shapes()) | {"layers.0.blocks.0.attn.relative_coords_table": wrong})


# --- tables and positions ---------------------------------------------------------------------------------------------


def geometric_places(side: int, reach: int) -> np.ndarray:
    """Places of a line of `side` offsets: gaps growing by q, so that the last is at `reach`; q within [1.01, 1.5]."""

    def over(q: float) -> float:
        return (q ** (side // 2) - 1) / (q - 1) - reach

    q = 1.01 if over(1.01) > 0 else 1.5 if over(1.5) < 0 else brentq(over, 1.01, 1.5, xtol=1e-14)
    half = np.cumsum(q ** np.arange(side // 2))
    return np.concatenate((-half[::-1], [0.0], half))


@pytest.mark.parametrize(("old", "new"), [(14, 16), (14, 24), (16, 14), (3, 4), (3, 20)])
def test_table_resizing_is_scipys_spline_over_geometric_places(old, new):
    s, t = 2 * old - 1, 2 * new - 1
    table = torch.randn(s * s + 3, 2, generator=torch.Generator().manual_seed(0))
    places, asked = geometric_places(s, new - 1), np.arange(1 - new, new)
    resized = resize_table(table, (new, new))
    assert resized.shape == (t * t + 3, 2)
    assert torch.equal(resized[-3:], table[-3:])
    for head in range(2):
        spline = RectBivariateSpline(places, places, table[:-3, head].view(s, s).double().numpy(), s=0)
        inside = np.clip(asked, places[0], places[-1])
        torch.testing.assert_close(
            resized[:-3, head].view(t, t).double(), torch.from_numpy(spline(inside, inside)), rtol=1e-4, atol=1e-4
        )


def test_spline_matrix_is_scipys_not_a_knot_spline():
    known, asked = np.array([0.0, 1.0, 2.5, 4.0, 4.2, 7.0]), np.linspace(0, 7, 41)
    values = np.array([0.3, -1.0, 2.0, 0.5, 0.1, 4.0])
    got = spline_matrix(torch.from_numpy(known), torch.from_numpy(asked)) @ torch.from_numpy(values)
    np.testing.assert_allclose(got.numpy(), CubicSpline(known, values, bc_type="not-a-knot")(asked), atol=1e-12)


def test_tables_keep_constants_ramps_and_themselves():
    constant = torch.full((27 * 27 + 3, 3), 0.7)
    torch.testing.assert_close(resize_table(constant, (20, 16)), torch.full((39 * 31 + 3, 3), 0.7))
    assert resize_table(constant, (14, 14)) is constant
    index = torch.arange(27.0)
    rows = torch.cat((index[:, None].expand(27, 27).reshape(-1, 1), torch.zeros(3, 1)))
    resized = resize_table(rows, (20, 14))[:-3, 0].view(39, 27)  # the second axis keeps its length
    assert (resized.diff(dim=0) > 0).all()
    torch.testing.assert_close(resized, resized[:, :1].expand_as(resized))
    torch.testing.assert_close(resized[[0, 19, 38], 0], torch.tensor([0.0, 13.0, 26.0]), rtol=0, atol=1e-4)
    places = torch.from_numpy(geometric_places(27, 19)).float()
    linear = torch.cat((places[:, None].expand(27, 27).reshape(-1, 1), torch.zeros(3, 1)))
    wanted = torch.arange(-19.0, 20.0)[:, None].expand(39, 27)
    torch.testing.assert_close(resize_table(linear, (20, 14))[:-3, 0].view(39, 27), wanted, rtol=0, atol=1e-5)


def test_a_table_of_no_square_grid_is_refused():
    for rows in (52 + 3, 9 + 3, 36 + 3, 2):
        with pytest.raises(UserError, match="cannot be resized"):
            resize_table(torch.zeros(rows, 2), (14, 14))


@pytest.mark.parametrize("position", ["shared", "per_block"])
def test_vit_weights_for_another_image_size(position):
    weights = filled(vit_shapes("shared", grid=4), seed=7)
    model = vit(img_size=48, position=position)
    load(model, weights)
    tables = [p for n, p in model.named_parameters() if n.endswith("relative_position_bias_table")]
    wanted = resize_table(weights["rel_pos_bias.relative_position_bias_table"], (6, 6))
    assert len(tables) == (1 if position == "shared" else 2)
    assert all(torch.equal(table, wanted) for table in tables)


def test_absolute_positions_are_resized_bicubically():
    weights = filled(vit_shapes("absolute", grid=4), seed=8)
    model = vit(img_size=48, position="absolute")
    load(model, weights)
    grid = weights["pos_embed"][:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    wanted = torch.nn.Upsample(size=(6, 6), mode="bicubic")(grid).permute(0, 2, 3, 1).reshape(1, 36, 32)
    torch.testing.assert_close(model.pos_embed[:, 1:], wanted)
    assert torch.equal(model.pos_embed[:, :1], weights["pos_embed"][:, :1])
    with pytest.raises(UserError, match="not 1 \\+ n\\^2"):
        load(model, weights | {"pos_embed": torch.zeros(1, 19, 32)})


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["fdscale", "official", "timm"])
@pytest.mark.parametrize("build", [swin, vit])
def test_round_trips_are_bitwise(build, names):
    ours, again = randomised(build(), seed=11), build()
    size = SWIN["img_size"] if build is swin else VIT["img_size"]
    load(again, export(ours, names, image_size=(size, size)))
    holds(again, dict(ours.named_parameters()))
    load(again, export(export(ours), names))
    holds(again, dict(ours.named_parameters()))


def test_official_export_has_the_official_buffers():
    out = export(randomised(swin()), "official", image_size=(64, 64))
    buffers = swin_buffers()
    assert out.keys() == swin_shapes().keys() | buffers.keys()
    for name, wanted in buffers.items():
        assert out[name].dtype == wanted.dtype, name
        torch.testing.assert_close(out[name], wanted, rtol=0, atol=1e-6)
    assert len({tensor.data_ptr() for tensor in out.values()}) == len(out)  # nothing shared: it can be saved
    theirs = dict(timm_swin().named_buffers())
    for name in buffers:
        if not name.endswith("attn_mask"):
            torch.testing.assert_close(out[name].squeeze(0), theirs[name].squeeze(0), rtol=0, atol=1e-6)


def test_official_export_divides_by_the_window_of_pre_training():
    model = swin(img_size=128, window_size=8, pretrained_window_sizes=(6, 6, 6, 6))
    out = export(model, "official", image_size=(128, 128))
    for name, wanted in swin_buffers(image=128, window=8, normaliser=6).items():
        torch.testing.assert_close(out[name], wanted, rtol=0, atol=1e-6)


def test_official_vit_export_has_beits_index():
    out = export(vit(position="per_block"), "official", image_size=(32, 32))
    index = timm_beit().rel_pos_bias.relative_position_index
    for block in range(2):
        assert torch.equal(out[f"blocks.{block}.attn.relative_position_index"], index)


def test_exports_that_the_other_code_cannot_compute_are_refused():
    for names in ("official", "timm"):
        with pytest.raises(UserError, match="no extra norms"):
            export(swin(extra_norm_period=2), names)
    with pytest.raises(UserError, match="divide the map"):
        export(swin(), "official", image_size=(72, 72))
    with pytest.raises(UserError, match="Choose fdscale, official or timm"):
        export(swin(), "torchvision")
    with pytest.raises(UserError, match="not official-swin-v2"):
        export(filled(swin_shapes()) | HEAD)


# --- reading ----------------------------------------------------------------------------------------------------------


WEIGHTS = filled(vit_shapes())


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("key", ["model", "state_dict", "module", "student", "teacher"])
def test_known_nestings_are_unwrapped_and_reported(tmp_path, caplog, key):
    path = tmp_path / "a.pth"
    torch.save({key: prefixed("module.", prefixed("_orig_mod.", WEIGHTS)), "epoch": 3, "model_ema": WEIGHTS}, path)
    caplog.set_level("INFO")
    same(read(path), WEIGHTS)
    assert f"weights taken from `{key}`" in caplog.text
    assert "model_ema" in caplog.text


def test_ambiguous_and_missing_keys(tmp_path):
    path = tmp_path / "a.pth"
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    torch.save({"student": WEIGHTS, "teacher": other, "epoch": 3}, path)
    with pytest.raises(UserError, match=r"student, teacher\. Choose one with key="):
        read(path)
    same(read(path, key="teacher"), other)
    with pytest.raises(UserError, match="no entry `model`"):
        read(path, key="model")
    torch.save({"model_ema": WEIGHTS, "epoch": 3}, path)
    with pytest.raises(UserError, match="key='model_ema'"):
        read(path)
    same(read(path, key="model_ema"), WEIGHTS)
    torch.save({"model": {"student": WEIGHTS}}, path)  # EsViT inside the official loader
    same(read(path), WEIGHTS)


@pytest.mark.parametrize("content", [{}, [], 3, torch.zeros(2), {"epoch": 3}, {"model": {}}, {"model": {"a": 1}}])
def test_files_without_weights(tmp_path, content):
    path = tmp_path / "a.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read(path)


def test_weights_mixed_with_other_things_are_refused(tmp_path):
    torch.save({**WEIGHTS, "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="'epoch' among the weights"):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_official_checkpoints_with_their_pickled_settings(tmp_path, zipped, monkeypatch):
    """A yacs CfgNode is a dict subclass with attributes; its module is gone again when the file is read."""
    config = types.ModuleType("yacs.config")
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    config.CfgNode = node
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    settings = node(MODEL=node(TYPE="swin_v2", DEPTHS=[2, 2]), SEED=0)
    settings.__dict__.update(__immutable__=True, __deprecated_keys__={"OLD"}, __renamed_keys__={})
    content = {
        "model": WEIGHTS,
        "config": settings,
        "args": argparse.Namespace(lr=0.1, path=["a"]),
        "max_accuracy": np.float64(85.1),
        "numbers": np.arange(3),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    for name in ("yacs", "yacs.config"):
        monkeypatch.delitem(sys.modules, name)
    same(read(tmp_path / "a.pth"), WEIGHTS)
    assert "yacs" not in sys.modules
    before = torch.serialization.get_safe_globals()
    assert not any(isinstance(entry, tuple) and "yacs" in entry[1] for entry in before)  # allowed for that file alone


class Hostile:
    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_by_name_and_does_not_run(tmp_path, zipped):
    sentinel = tmp_path / "ran"
    for function, args, name in (
        (exec, (f"open({str(sentinel)!r}, 'w')",), "exec"),
        (os.system, (f"touch {sentinel}",), f"{os.system.__module__}.system"),
        (Path.touch, (sentinel,), "getattr"),
        (io.open, (str(sentinel), "w"), "io.open"),
    ):
        path = tmp_path / "a.pth"
        torch.save({"model": WEIGHTS, "x": Hostile(function, *args)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=re.escape(name)) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert not sentinel.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path):
    sentinel = tmp_path / "ran"
    for suffix in (".pth", ".bin", ".safetensors"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(pickle.dumps(Hostile(exec, f"open({str(sentinel)!r}, 'w')")))
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)
        assert not sentinel.exists()


def test_whole_models_are_refused_by_the_name_of_their_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        read(tmp_path / "a.pth")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/code/__torch__.py", b"")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match="TorchScript archive"):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_files_are_refused(tmp_path, kind):
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(WEIGHTS, path)
    else:
        torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=kind == "zip")
    same(read(path), WEIGHTS)
    whole = path.read_bytes()
    for length in (0, 1, 3, 7, 64, len(whole) // 3, len(whole) // 2, len(whole) - 8):
        path.unlink()  # mapped tensors of the whole file may still be alive
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, zipped):
    whole = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(2), "b": torch.zeros(3)}}, whole, _use_new_zipfile_serialization=zipped)
    randomness = random.Random(0)
    for i in range(150):
        damaged = bytearray(whole.getvalue())
        for _ in range(3):
            damaged[randomness.randrange(len(damaged))] = randomness.randrange(256)
        path = tmp_path / f"{i}.pth"
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert all(isinstance(tensor, Tensor) for tensor in read(path).values())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"<html>not found</html>")
    (tmp_path / "b.safetensors").write_bytes(b"<html>not found</html>")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    for name in ("a.pth", "b.safetensors", "c.zip", "missing.pth"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            read(tmp_path / name)


def sharded(directory: Path, index: bool) -> None:
    names = sorted(WEIGHTS)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        safetensors.torch.save_file({name: WEIGHTS[name] for name in part}, directory / file)
    if index:
        weight_map = {name: file for file, part in halves.items() for name in part}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, index):
    sharded(tmp_path, index)
    same(read(tmp_path), WEIGHTS)
    same(read(tmp_path / "model-00002-of-00002.safetensors"), WEIGHTS)
    if index:
        same(read(tmp_path / "model.safetensors.index.json"), WEIGHTS)
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    if index:
        with pytest.raises(UserError, match="not those the index lists"):
            read(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 2 shards are missing, first model-00002"):
        read(tmp_path)


def test_an_index_cannot_point_elsewhere(tmp_path):
    secret = tmp_path / "secret.safetensors"
    safetensors.torch.save_file(WEIGHTS, secret)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.safetensors.index.json"
    for file in ("../secret.safetensors", str(secret), "weights.pth"):
        path.write_text(json.dumps({"weight_map": dict.fromkeys(WEIGHTS, file)}))
        with pytest.raises(UserError, match="beside the index"):
            read(path)
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{"):
        path.write_text(text)
        with pytest.raises(UserError, match=re.escape(str(path))):
            read(path)


def test_directories(tmp_path):
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        read(tmp_path)
    torch.save(WEIGHTS, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"one of a\.pth"):
        read(tmp_path)
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.safetensors")
    same(read(tmp_path), WEIGHTS)
    safetensors.torch.save_file(WEIGHTS, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="several models"):
        read(tmp_path)


def test_a_file_read_and_loaded_into_a_meta_model(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "a.pth")
    with torch.device("meta"):
        model = ViT(**VIT, position="shared")
    assert convert.load(model, convert.read(tmp_path / "a.pth")) == "fdscale"
    (tmp_path / "a.pth").unlink()
    holds(model, WEIGHTS)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_save_keeps_every_bit_and_the_metadata(tmp_path):
    buffer = torch.arange(8.0)
    odd = {
        "half": torch.tensor([1.5, math.nan, math.inf]).bfloat16(),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "a": buffer[:4],  # parameters that ZeRO flattened are disjoint parts of one buffer
        "b": buffer[4:],
        "leaf": torch.nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "new" / "w.safetensors"
    save(odd, path, {"source": "test", "step": "3"})
    got = read(path)
    assert got.keys() == odd.keys()
    for name, tensor in odd.items():
        assert got[name].dtype == tensor.dtype
        torch.testing.assert_close(got[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"source": "test", "step": "3"}
    assert [file.name for file in path.parent.iterdir()] == ["w.safetensors"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save({"a": torch.zeros(3)}, path, {})
    old = path.read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fdscale.models.weights_io.save_file", half)
    with pytest.raises(UserError, match=r"w\.safetensors: could not be written .*No space left"):
        save({"a": torch.ones(3)}, path, {})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_backbone_of_somebodys_own_comes_back_from_an_exported_classifier() -> None:
    """Its names are its own; the head and the norm before it may be left over, and nothing else."""
    own = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    state = dict(own.state_dict()) | {"head.weight": torch.zeros(5, 2), "head.bias": torch.zeros(5)}
    state["fc_norm.weight"] = torch.ones(2)
    source, weights = convert.fitted(own, state)
    assert source == "fdscale"
    assert set(weights) == set(own.state_dict())
    with pytest.raises(UserError, match="other"):
        convert.fitted(own, {**state, "other": torch.zeros(1)})
