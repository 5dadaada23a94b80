"""Teachers, against timm called directly, CLIP's vision tower written out in torch, and closed forms.

All networks are tiny and their weights random; weight files are written by the tests in the names of the official ones.
"""

from __future__ import annotations

import sys
import types

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from fdscale import UserError
from fdscale.models.teachers import load_teacher

VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}
VIT_NAME = "vit_tiny_patch16_224.augreg_in21k"  # mean and std 0.5
SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "img_size": 64, "window_size": 2}
SWIN_NAME = "swin_base_patch4_window7_224"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

torch.set_num_threads(1)


def images(size=64, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def normalised(x, mean_std):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in mean_std)
    return (x - mean) / std


def reference(name, seed=3, **args):
    """A timm network with all parameters random, also those that start as 0 or 1."""
    torch.manual_seed(seed)
    network = timm.create_model(name, pretrained=False, **args).eval()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1) if p.ndim > 1 else nn.init.uniform_(p, 0.2, 1.0)
    return network.requires_grad_(False)


def saved(tmp_path, network):
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


# --- the features -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "prefix", "mean_std"),
    [
        (VIT_NAME, VIT, ("cls",), HALF),
        ("vit_base_patch16_224.dino", VIT, ("cls",), IMAGENET),
        ("vit_base_patch16_siglip_224.webli", VIT, (), HALF),
        ("vit_base_patch16_clip_quickgelu_224.openai", VIT, ("cls",), CLIP),
        ("vit_small_patch14_reg4_dinov2", VIT | {"img_size": 56}, ("cls", "reg", "reg", "reg", "reg"), IMAGENET),
        ("deit_tiny_distilled_patch16_224", VIT, ("cls", "dist"), IMAGENET),
        ("vit_small_patch16_dinov3.lvd1689m", VIT, ("cls", "reg", "reg", "reg", "reg"), IMAGENET),
    ],
)
def test_vision_transformers_give_forward_features_and_know_their_prefix(tmp_path, name, args, prefix, mean_std):
    network = reference(name, **args)
    teacher = load_teacher(f"timm:{name}", weights=saved(tmp_path, network), args=args)
    x = images(args["img_size"])
    torch.testing.assert_close(teacher(x), network.forward_features(normalised(x, mean_std)))
    assert teacher.prefix == prefix
    assert teacher.width == 32
    assert teacher.grid((args["img_size"],) * 2) == (4, 4)


@pytest.mark.parametrize("name", [VIT_NAME, "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_fc_norm_is_applied_to_all_tokens_where_norm_is_identity(tmp_path, name):
    args = VIT | {"global_pool": "avg", "img_size": 56 if "patch14" in name else 64}
    network = reference(name, **args)
    assert isinstance(network.norm, nn.Identity)
    teacher = load_teacher(f"timm:{name}", weights=saved(tmp_path, network), args=args, mean=HALF[0], std=HALF[1])
    x = images(args["img_size"])
    expected = network.fc_norm(network.forward_features(normalised(x, HALF)))
    torch.testing.assert_close(teacher(x), expected)
    assert not torch.allclose(expected, network.forward_features(normalised(x, HALF)))


def test_swin_maps_become_tokens_row_by_row(tmp_path):
    network = reference(SWIN_NAME, **SWIN)
    teacher = load_teacher(f"timm:{SWIN_NAME}", weights=saved(tmp_path, network), args=SWIN)
    expected = network.forward_features(normalised(images(), IMAGENET))  # (B, 2, 2, C)
    torch.testing.assert_close(
        teacher(images()), torch.stack([expected[:, r, c] for r in (0, 1) for c in (0, 1)], dim=1)
    )
    assert (teacher.prefix, teacher.width, teacher.grid((64, 64))) == ((), 128, (2, 2))


def test_stride16_of_a_swin_is_what_leaves_the_blocks_of_stage_three(tmp_path):
    network = reference(SWIN_NAME, **SWIN)
    teacher = load_teacher(f"timm:{SWIN_NAME}", weights=saved(tmp_path, network), args=SWIN, feature="stride16")
    left = []
    network.layers[2].blocks[-1].register_forward_hook(lambda module, inputs, output: left.append(output))
    network.forward_features(normalised(images(), IMAGENET))
    torch.testing.assert_close(teacher(images()), left[0].flatten(1, 2))
    assert (teacher.width, teacher.grid((64, 64))) == (64, (4, 4))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("tf_efficientnet_lite0", 1280)])
def test_convolutional_maps_become_tokens(tmp_path, name, width):
    network = timm.create_model(name, pretrained=False).eval()  # with its classifier, which the file may hold
    teacher = load_teacher(f"timm:{name}", weights=saved(tmp_path, network))
    x = images()[..., :32]  # not square
    mean_std = HALF if "efficientnet" in name else IMAGENET
    expected = network.forward_features(normalised(x, mean_std))  # (B, C, 2, 1)
    torch.testing.assert_close(teacher(x), expected[..., 0].transpose(1, 2))
    assert (teacher.prefix, teacher.width, teacher.grid((64, 32))) == ((), width, (2, 1))


def test_convnexts_norm_behind_the_pooling_is_applied_to_the_map(tmp_path):
    args = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}
    network = reference("convnext_atto.d2_in1k", **args)
    teacher = load_teacher("timm:convnext_atto.d2_in1k", weights=saved(tmp_path, network), args=args)
    features = network.forward_features(normalised(images(), IMAGENET)).permute(0, 2, 3, 1)
    norm = network.head.norm
    expected = F.layer_norm(features, (16,), norm.weight, norm.bias, norm.eps).flatten(1, 2)
    torch.testing.assert_close(teacher(images()), expected)


@pytest.mark.slow
def test_a_network_without_final_norm_is_refused():
    with pytest.raises(UserError, match="no final norm"):
        load_teacher("timm:nfnet_f0", weights="random")


# --- CLIP -------------------------------------------------------------------------------------------------------------


def clip_state(width=32, depth=2, patch=16, grid=4):
    """A state dict in the names of OpenAI's CLIP: vision tower, its projection, and pieces of the text tower."""
    g = torch.Generator().manual_seed(5)
    shapes = {
        "conv1.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "positional_embedding": (grid * grid + 1, width),
        "proj": (width, 24),
    }
    for norm in ("ln_pre", "ln_post", *(f"transformer.resblocks.{b}.ln_{i}" for b in range(depth) for i in (1, 2))):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for b in range(depth):
        block = f"transformer.resblocks.{b}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= {f"{block}.attn.out_proj.weight": (width, width), f"{block}.attn.out_proj.bias": (width,)}
        shapes |= {f"{block}.mlp.c_fc.weight": (4 * width, width), f"{block}.mlp.c_fc.bias": (4 * width,)}
        shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
    state = {f"visual.{name}": torch.randn(shape, generator=g) * 0.3 for name, shape in shapes.items()}
    text = {
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": torch.zeros(8, 16),
        "text_projection": torch.zeros(16, 24),
    }
    return state | text


def clip_tokens(state, x, heads, activation):
    """OpenAI's vision tower up to `ln_post`, which is applied to all tokens here; the projection is not."""
    s = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    width = s["class_embedding"].numel()

    def norm(x, name):
        return F.layer_norm(x, (width,), s[f"{name}.weight"], s[f"{name}.bias"], 1e-5)

    x = F.conv2d(x, s["conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([s["class_embedding"].expand(len(x), 1, -1), x], dim=1) + s["positional_embedding"]
    x = norm(x, "ln_pre")
    for b in range(2):
        block = f"transformer.resblocks.{b}"
        attention = nn.MultiheadAttention(width, heads, batch_first=True)
        own = {
            n: s[f"{block}.attn.{n}"] for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        }
        attention.load_state_dict(own)
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = activation(F.linear(norm(x, f"{block}.ln_2"), s[f"{block}.mlp.c_fc.weight"], s[f"{block}.mlp.c_fc.bias"]))
        x = x + F.linear(y, s[f"{block}.mlp.c_proj.weight"], s[f"{block}.mlp.c_proj.bias"])
    return norm(x, "ln_post")


def test_openai_weights_give_clips_tokens_with_quickgelu(tmp_path):
    torch.save(clip_state(), tmp_path / "clip.pt")
    teacher = load_teacher(
        "timm:vit_base_patch16_clip_quickgelu_224.openai", weights=str(tmp_path / "clip.pt"), args=VIT
    )
    with torch.no_grad():
        x = normalised(images(), CLIP)
        expected = clip_tokens(clip_state(), x, heads=2, activation=lambda y: y * torch.sigmoid(1.702 * y))
        plain = clip_tokens(clip_state(), x, heads=2, activation=F.gelu)
    torch.testing.assert_close(teacher(images()), expected, rtol=1e-5, atol=1e-5)
    assert (plain - expected).abs().max() > 100 * 1e-5  # so GELU would have been noticed


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_224"])
def test_openai_weights_in_a_network_with_gelu_are_refused_with_the_right_name(tmp_path, name):
    torch.save(clip_state(), tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"QuickGELU.*vit_base_patch16_clip_quickgelu_224\.openai"):
        load_teacher(f"timm:{name}", weights=str(tmp_path / "clip.pt"), args=VIT)


def test_openais_file_is_recognised_whatever_the_tag_says(tmp_path):
    torch.save(clip_state() | {"input_resolution": torch.tensor(64)}, tmp_path / "clip.pt")
    with pytest.raises(UserError, match=r"one of OpenAI's CLIP files.*vit_base_patch16_clip_quickgelu_224"):
        load_teacher("timm:vit_base_patch16_clip_224.laion2b", weights=str(tmp_path / "clip.pt"), args=VIT)


def test_clip_weights_trained_with_gelu_load_under_their_tag(tmp_path):
    torch.save(clip_state(), tmp_path / "clip.pt")
    teacher = load_teacher("timm:vit_base_patch16_clip_224.laion2b", weights=str(tmp_path / "clip.pt"), args=VIT)
    with torch.no_grad():
        expected = clip_tokens(clip_state(), normalised(images(), CLIP), heads=2, activation=F.gelu)
    torch.testing.assert_close(teacher(images()), expected, rtol=1e-4, atol=1e-4)


# --- names, arguments, weights ----------------------------------------------------------------------------------------


def test_a_name_without_tag_is_refused_where_weights_normalise_differently():
    with pytest.raises(UserError, match=r"vit_base_patch16_224\.augreg.*vit_base_patch16_224\.dino"):
        load_teacher("timm:vit_base_patch16_224", weights="random", args=VIT)
    load_teacher("timm:vit_base_patch16_224", weights="random", args=VIT, mean=IMAGENET[0], std=IMAGENET[1])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("resnet18", {}, "Expected timm:NAME"),
        ("timm:", {}, "Expected timm:NAME"),
        ("timm:resnet19", {}, "resnet18"),
        ("timm:hf-hub:someone/model", {}, "no model"),
        ("timm:resnet18.nonsense", {}, "Known: "),
        ("timm:resnet18", {"weights": None}, "nothing is downloaded.*teacher.weights=random"),
        ("timm:resnet18", {"weights": ""}, "teacher.weights is missing"),
        ("timm:resnet18", {"weights": "own"}, "python:"),
        ("timm:resnet18", {"weights": "nowhere.pth"}, "no such file"),
        ("timm:resnet18", {"args": {"pretrained": True}}, "pretrained cannot be set"),
        ("timm:resnet18", {"args": {"window": 3}}, "window"),
        ("timm:resnet18", {"dtype": "half"}, "float32, bfloat16, float16"),
        ("timm:resnet18", {"feature": "stage3"}, "stride4"),
        (f"timm:{VIT_NAME}", {"feature": "stride16", "args": VIT}, "no map of stride16"),
        ("timm:resnet18", {"mean": (0.5, 0.5, 0.5)}, "together"),
        ("timm:flexivit_small.1200ep_in1k", {}, "python:"),
        ("fdscale:resnet", {}, "fdscale:swin_v2 or fdscale:vit"),
        ("python:no.such.module:build", {"weights": "own"}, "PYTHONPATH"),
        ("python:fdscale", {"weights": "own"}, "PYTHONPATH"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_to_do(source, options, message):
    with pytest.raises(UserError, match=message):
        load_teacher(source, **{"weights": "random"} | options)


def test_random_weights_are_the_same_each_time_and_leave_torchs_generator_alone():
    torch.manual_seed(7)
    first = load_teacher(f"timm:{VIT_NAME}", weights="random", args=VIT)
    drawn = torch.rand(())
    torch.manual_seed(7)
    assert torch.rand(()) == drawn
    second = load_teacher(f"timm:{VIT_NAME}", weights="random", args=VIT)
    assert torch.equal(first(images()), second(images()))
    assert first.fingerprint() == second.fingerprint()


def test_weights_of_another_network_are_refused_with_the_differences(tmp_path):
    network = reference(VIT_NAME, **VIT | {"depth": 3})
    state = network.state_dict()
    del state["norm.weight"]
    state["blocks.0.attn.qkv.weight"] = torch.zeros(5, 32)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError) as caught:
        load_teacher(f"timm:{VIT_NAME}", weights=str(tmp_path / "weights.pth"), args=VIT)
    message = str(caught.value)
    assert "weights.pth" in message
    assert "1 missing in the file: norm.weight" in message
    assert "blocks.0.attn.qkv.weight (file (5, 32), network (96, 32))" in message
    assert "12 in the file but not in the network: blocks.2." in message
    assert "head" not in message  # a classifier may be left over


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit itself is on its way out
def test_torchscript_is_refused_with_the_way_out(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "ViT-B-16.pt"))
    with pytest.raises(UserError, match=r"TorchScript.*torch\.save"):
        load_teacher("timm:vit_base_patch16_clip_quickgelu_224.openai", weights=str(tmp_path / "ViT-B-16.pt"), args=VIT)


def test_esvits_file_loads_with_its_prefixes_old_names_and_projection_head(tmp_path):
    args = SWIN | {"window_size": 4}
    network = reference(SWIN_NAME, **args)
    official = {}
    for name, tensor in network.state_dict().items():
        if not name.startswith("head."):
            stage = name.split(".")[1] if ".downsample." in name else None  # official: at the end of the stage before
            official[name if stage is None else name.replace(f"layers.{stage}", f"layers.{int(stage) - 1}")] = tensor
    extra = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)}
    student = {f"module.backbone.{name}": tensor for name, tensor in (official | extra).items()}
    student |= {
        "module.head.mlp.0.weight": torch.zeros(4, 4),
        "module.head_dense.last_layer.weight_v": torch.zeros(4, 4),
    }
    torch.save({"student": student, "teacher": {"x": torch.zeros(1)}, "epoch": 3}, tmp_path / "esvit.pth")
    with pytest.raises(UserError, match="student, teacher"):
        load_teacher(f"timm:{SWIN_NAME}", weights=str(tmp_path / "esvit.pth"), args=args)
    teacher = load_teacher(f"timm:{SWIN_NAME}", weights=str(tmp_path / "esvit.pth"), args=args, key="student")
    expected = network.forward_features(normalised(images(), IMAGENET)).flatten(1, 2)
    torch.testing.assert_close(teacher(images()), expected)


def test_image_size_resizes_the_position_embedding_as_timm_does(tmp_path):
    small = reference("vit_base_patch16_224.dino", **VIT)
    teacher = load_teacher(
        "timm:vit_base_patch16_224.dino",
        weights=saved(tmp_path, small),
        image_size=96,
        args={name: value for name, value in VIT.items() if name != "img_size"},
    )
    small.set_input_size(img_size=(96, 96))
    torch.testing.assert_close(teacher(images(96)), small.forward_features(normalised(images(96), IMAGENET)))


# --- behaviour --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit():
    return load_teacher(f"timm:{VIT_NAME}", weights="random", args=VIT)


def test_views_of_another_size_are_resized_before_normalising(tmp_path):
    network = reference(VIT_NAME, **VIT)
    teacher = load_teacher(f"timm:{VIT_NAME}", weights=saved(tmp_path, network), args=VIT, image_size=64)
    view = images(96)
    resized = F.interpolate(view, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(teacher(view), network.forward_features(normalised(resized, HALF)))
    assert teacher.grid((96, 96)) == (4, 4)
    assert teacher.flops((96, 96)) == teacher.flops((64, 64))


def test_a_size_the_network_refuses_is_an_error_that_names_the_key(vit):
    with pytest.raises(UserError, match=r"96 x 96.*teacher\.image_size"):
        vit.grid((96, 96))


def test_the_target_is_constant_and_serves_a_students_backward(vit):
    student = nn.Linear(32, 32)
    target = vit(images())
    assert not target.requires_grad
    F.smooth_l1_loss(student(target), target * 1.0).backward()
    assert student.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in vit.network.parameters())


def test_train_does_not_switch_it_and_it_is_no_module(vit):
    assert vit.train() is vit
    assert vit.train(True).network.training is False
    holder = nn.Module()
    holder.teacher = vit
    assert list(holder.parameters()) == []
    assert holder.train().teacher.network.training is False
    assert holder.state_dict() == {}


def test_drop_path_and_dropout_are_off():
    args = VIT | {"drop_path_rate": 0.5, "pos_drop_rate": 0.5}
    teacher = load_teacher(f"timm:{VIT_NAME}", weights="random", args=args)
    assert torch.equal(teacher(images()), teacher(images()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "args"), [(VIT_NAME, VIT), (SWIN_NAME, SWIN), ("resnet18", {})])
def test_bfloat16_is_close_to_float32_and_returned_as_float32(tmp_path, name, args):
    weights = saved(tmp_path, reference(name, **args)) if args else "random"
    full = load_teacher(f"timm:{name}", weights=weights, args=args)
    half = load_teacher(f"timm:{name}", weights=weights, args=args, dtype="bfloat16")
    a, b = full(images()), half(images())
    assert b.dtype == torch.float32
    assert 0 < (a - b).norm() / a.norm() < 0.03  # bfloat16 has 8 bits: 2^-8 = 0.4 % per product
    assert (half.grid((64, 64)), half.flops((64, 64))) == (full.grid((64, 64)), full.flops((64, 64)))
    assert half.fingerprint() == full.fingerprint()
    kept = {m.weight.dtype for m in half.network.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)}
    assert kept == {torch.float32}


def test_an_autocast_around_the_call_has_no_effect(vit):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = vit(images())
    assert torch.equal(inside, vit(images()))


def test_flops_of_a_vision_transformer_are_the_textbook_count(vit):
    c, tokens, depth, patch = 32, 17, 2, 16
    block = tokens * 12 * c * c + 2 * tokens * tokens * c  # qkv, projection, MLP; scores and their product with values
    assert vit.flops((64, 64)) == 16 * patch * patch * 3 * c + depth * block


def test_the_fingerprint_knows_weights_and_normalisation_but_not_files(tmp_path):
    network = reference(VIT_NAME, **VIT)
    source = f"timm:{VIT_NAME}"
    torch.save({"model": network.state_dict()}, tmp_path / "a.pth")
    save_file(network.state_dict(), tmp_path / "b.safetensors")
    with torch.no_grad():
        network.blocks[1].mlp.fc2.weight.mul_(1.001)
    torch.save(network.state_dict(), tmp_path / "c.pth")
    a, b, c = (
        load_teacher(source, weights=str(tmp_path / n), args=VIT).fingerprint()
        for n in ("a.pth", "b.safetensors", "c.pth")
    )
    assert a == b != c
    other = load_teacher(source, weights=str(tmp_path / "a.pth"), args=VIT, mean=IMAGENET[0], std=IMAGENET[1])
    assert other.fingerprint() != a


# --- python: and fdscale: ---------------------------------------------------------------------------------------------


class Patches(nn.Module):
    """Tokens, or a map, linear in the pixels of each 8 x 8 patch; with `extra` tokens of zeros in front."""

    def __init__(self, extra=0, as_map=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, stride=8)
        self.extra, self.as_map = extra, as_map

    def forward(self, x):
        x = self.conv(x)
        return (
            x if self.as_map else torch.cat([x.new_zeros(len(x), self.extra, 6), x.flatten(2).transpose(1, 2)], dim=1)
        )


@pytest.fixture
def user_module(monkeypatch):
    module = types.ModuleType("a_users_module")
    module.Patches = Patches
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return module


@pytest.mark.parametrize("as_map", [False, True])
def test_a_python_teacher_of_tokens_or_maps(user_module, tmp_path, as_map):
    torch.manual_seed(0)
    network = Patches(as_map=as_map)
    teacher = load_teacher("python:a_users_module:Patches", weights=saved(tmp_path, network), args={"as_map": as_map})
    x = images(32)[..., :16]
    expected = network.conv(normalised(x, IMAGENET)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(teacher(x), expected.detach())
    assert (teacher.grid((32, 16)), teacher.width, teacher.prefix) == ((4, 2), 6, ())
    assert teacher.flops((32, 16)) == 8 * 192 * 6


def test_a_python_teacher_may_bring_weights_normalisation_prefix_and_grid(user_module):
    def build():
        network = Patches(extra=2)
        nn.init.constant_(network.conv.weight, 0.5)
        nn.init.constant_(network.conv.bias, 0.25)
        network.mean, network.std, network.prefix, network.width = *HALF, ("cls", "reg"), 6
        network.grid = lambda size: (size[0] // 8, size[1] // 8)
        return network

    user_module.build = build
    teacher = load_teacher("python:a_users_module:build", weights="own")
    expected = build().conv(normalised(images(16), HALF)).flatten(2).mT
    torch.testing.assert_close(teacher(images(16))[:, 2:], expected.detach())
    assert (teacher.prefix, teacher.grid((24, 16)), teacher.width) == (("cls", "reg"), (3, 2), 6)


def test_tokens_that_are_no_grid_ask_for_a_grid_method(user_module):
    teacher = load_teacher("python:a_users_module:Patches", weights="random", args={"extra": 1})
    with pytest.raises(UserError, match=r"17 tokens.*`grid` method"):
        teacher.grid((32, 32))


def test_a_python_callable_must_return_a_module_and_strict_weights(user_module, tmp_path):
    user_module.nothing = lambda: 3
    with pytest.raises(UserError, match="returned int"):
        load_teacher("python:a_users_module:nothing", weights="own")
    with pytest.raises(UserError, match=r"unknown|not in the network: weight"):
        load_teacher("python:a_users_module:Patches", weights=saved(tmp_path, nn.Linear(2, 2)))


def test_an_own_network_is_a_teacher_too(tmp_path):
    swin_v2 = pytest.importorskip("fdscale.models.swin_v2")
    args = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "img_size": 32}
    args["pretrained_window_sizes"] = (0, 0)
    torch.manual_seed(0)
    network = swin_v2.SwinV2(**args, post_norm_init=1.0).eval()
    source, weights = "fdscale:swin_v2", saved(tmp_path, network)
    teacher = load_teacher(source, weights=weights, args=args)
    x = normalised(images(32), IMAGENET)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images(32)), network(x))
        early = load_teacher(source, weights=weights, args=args, feature="stride4")
        torch.testing.assert_close(early(images(32)), network.maps(x)[0].flatten(2).mT)
    assert (teacher.prefix, teacher.width, teacher.grid((32, 32))) == ((), 32, (4, 4))
    assert (early.width, early.grid((32, 32))) == (16, (8, 8))
    assert teacher.flops((32, 32)) == network.flops((32, 32))
