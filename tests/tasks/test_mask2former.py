"""Mask2Former against transformers' own model with the same weights, given the same maps; losses, draws, and costs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from fdscale.data.order import philox
from fdscale.engine.optim import param_groups
from fdscale.models import backbone
from fdscale.models.layers import initial_value, initialise
from fdscale.tasks.mask2former import HEADS, WEIGHTS, Mask2Former, centres, directions

SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "position": "per_block"}
CLASSES, CHANNELS, QUERIES = 5, 32, 7
SIZES = {"channels": CHANNELS, "queries": QUERIES, "encoder_layers": 2, "decoder_layers": 4, "points": 200}


def made(kind: str = "swin_v2", **more: int) -> Mask2Former:
    module = Mask2Former(backbone(kind, SWIN if kind == "swin_v2" else VIT), CLASSES, **{**SIZES, **more})
    initialise(module, 0)
    return module


def shaken(module: nn.Module) -> nn.Module:
    """One none of whose values behind the backbone is its default."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if not name.startswith(("backbone.", "neck.")):
                value += torch.empty_like(value).uniform_(-0.1, 0.1, generator=generator)
    return module


def theirs(ours: Mask2Former) -> Mask2FormerForUniversalSegmentation:
    """transformers' whole model with our weights behind its backbone, which is replaced by the maps it is given."""
    config = Mask2FormerConfig(
        backbone_config={"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8],
                         "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        feature_size=CHANNELS, mask_feature_size=CHANNELS, hidden_dim=CHANNELS, encoder_feedforward_dim=4 * CHANNELS,
        dim_feedforward=8 * CHANNELS, encoder_layers=2, decoder_layers=5, num_attention_heads=HEADS,
        num_queries=QUERIES, num_labels=CLASSES, train_num_points=200,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    new = {
        name.replace("pixel_decoder.", "model.pixel_level_module.decoder.", 1)
        .replace("transformer_module.", "model.transformer_module.", 1): value
        for name, value in ours.state_dict().items()
        if not name.startswith(("backbone.", "neck."))
    }  # fmt: skip
    rest = model.load_state_dict(new, strict=False)
    assert not rest.unexpected_keys
    assert all("encoder.embed" in n or "encoder.layers" in n or "pixel_level_module.encoder" in n or "empty_weight" in n
               for n in rest.missing_keys)  # fmt: skip

    class Given(nn.Module):
        def forward(self, maps: list[Tensor], **_: object) -> object:
            return type("Found", (), {"feature_maps": maps})()

    model.model.pixel_level_module.encoder = Given()
    return model


def scenes(seed: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 64, 64, generator=generator)
    masks = torch.randint(0, CLASSES, (batch, 4, 4), generator=generator).to(torch.uint8)
    masks[0, 0], masks[1] = 255, 3
    return images, masks.repeat_interleave(16, 1).repeat_interleave(16, 2)


def test_what_it_predicts_is_transformers() -> None:
    """Scores of classes and masks behind every layer, and gradients."""
    ours = shaken(made())
    other = theirs(ours)
    images, _ = scenes(0)
    maps = [x.detach().requires_grad_() for x in ours.neck(ours.backbone.maps(images))]
    same = [x.detach().clone().requires_grad_() for x in maps]
    classes, masks = ours._predicted(maps)
    level = other.model.pixel_level_module.decoder(same, output_hidden_states=False)
    seen = other.model.transformer_module(level.multi_scale_features, level.mask_features, output_hidden_states=True)
    assert len(classes) == len(masks) == len(seen.masks_queries_logits) == 5
    for kind, hidden, one, wanted in zip(
        classes, seen.intermediate_hidden_states, masks, seen.masks_queries_logits, strict=True
    ):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kind, other.class_predictor(hidden.transpose(0, 1)), rtol=1e-4, atol=1e-4)
    weight = torch.randn(masks[-1].shape, generator=torch.Generator().manual_seed(1))
    (masks[-1] * weight).sum().backward()
    (seen.masks_queries_logits[-1] * weight).sum().backward()
    for x, y in zip(maps, same, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3)
    known = dict(other.named_parameters())
    for name, parameter in ours.pixel_decoder.named_parameters():
        wanted = known[f"model.pixel_level_module.decoder.{name}"].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("image", [0, 1, 2])
def test_the_loss_of_an_image_is_transformers(image: int) -> None:
    """With the points that it draws from the same generator; over a batch it is the mean of the images'."""
    ours = shaken(made()).train()
    other = theirs(ours)
    images, masks = scenes(0)
    numbers = torch.tensor([4, 9, 2**40])
    whole = ours(images, masks, numbers)
    parts, each = [], []
    for i in range(3):
        parts.append(ours(images[i : i + 1], masks[i : i + 1], numbers[i : i + 1]))
        each.append(ours.losses)
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=1e-4)
    classes, predicted = ours._predicted(ours.neck(ours.backbone.maps(images[image : image + 1])))
    kinds = [kind for kind in range(CLASSES) if (masks[image] == kind).any()]
    torch.manual_seed(int(philox(0, int(numbers[image]), (0, 40, 0, 0), 1)[0] >> 1))
    layers = [{"masks_queries_logits": m, "class_queries_logits": c} for m, c in zip(predicted, classes, strict=True)]
    found = other.get_loss_dict(
        **layers[-1],
        mask_labels=[torch.stack([(masks[image] == kind).float() for kind in kinds])],
        class_labels=[torch.tensor(kinds)],
        auxiliary_predictions=layers[:-1],
    )
    assert len(found) == 15
    torch.testing.assert_close(parts[image], other.get_loss(found), rtol=1e-4, atol=1e-4)
    assert parts[image].item() == pytest.approx(
        float(2 * each[image]["class"] + 5 * each[image]["mask"] + 5 * each[image]["dice"]), rel=1e-4
    )
    assert set(WEIGHTS) == set(other.weight_dict)


def test_nothing_is_drawn_from_torchs_generator_or_seen_by_it() -> None:
    ours = made().train()
    images, masks = scenes(1)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(ours(images, masks, torch.arange(3)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)
    assert not torch.equal(ours(images, masks, torch.arange(1, 4)), found[0])


def test_an_image_without_classes_has_a_loss_of_classes_alone() -> None:
    ours = made().train()
    images, masks = scenes(1)
    loss = ours(images, torch.full_like(masks, 255), torch.arange(3))
    assert loss.isfinite()
    assert (ours.losses["mask"], ours.losses["dice"]) == (0, 0)
    assert ours.losses["class"] > 0
    loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_what_is_not_finite_stays_so() -> None:
    """transformers' decoder makes a large number of it while training, and a run could not tell that it is broken."""
    ours = made().train()
    with torch.no_grad():
        ours.pixel_decoder.encoder.layers[0].fc1.weight.fill_(torch.inf)
    images, masks = scenes(1)
    assert not ours(images, masks, torch.arange(3)).isfinite()


def test_shares_of_classes_are_the_authors() -> None:
    """Masks are brought to the image's size before they become probabilities."""
    ours = shaken(made()).eval()
    images, _ = scenes(2)
    found = ours(images)
    classes, masks = ours._predicted(ours.neck(ours.backbone.maps(images)))
    wide = F.interpolate(masks[-1], (64, 64), mode="bilinear", align_corners=False).sigmoid()
    wanted = sum(classes[-1].softmax(-1)[:, q, :-1, None, None] * wide[:, q, None] for q in range(QUERIES))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["swin_v2", "vit"])
def test_it_is_built_without_memory(kind: str) -> None:
    """Every parameter gets a value by its name, there are no buffers to lose, and a plan can walk through."""
    with torch.device("meta"):
        module = Mask2Former(backbone(kind, SWIN if kind == "swin_v2" else VIT), CLASSES, **SIZES)
    assert all(value.is_meta for value in module.parameters())
    assert not [name for name in module.state_dict() if name not in dict(module.named_parameters())]
    for name, value in module.named_parameters():
        first = initial_value(module, name, value.shape, torch.float32, 3)
        assert torch.equal(first, initial_value(module, name, value.shape, torch.float32, 3))
    images = torch.empty(2, 3, 64, 64, device="meta")
    loss = module.train()(images, torch.empty(2, 64, 64, dtype=torch.uint8, device="meta"), torch.arange(2))
    assert loss.is_meta
    assert loss.requires_grad


def test_first_values_are_transformers() -> None:
    """Where those are no draws; and draws have the same spread, but for biases."""
    ours = made()
    fresh = Mask2FormerForUniversalSegmentation(theirs(ours).config)
    drawn = {
        name.replace("model.pixel_level_module.decoder.", "pixel_decoder.").replace("model.", "", 1): value
        for name, value in fresh.named_parameters()
    }
    # Xavier's, Caffe2's and torch's in the authors' code, where transformers draws normal ones.
    others = (".fc", "class_predictor", "input_proj", "adapter", "layer_1", "mask_projection")
    for name, value in ours.named_parameters():
        if name.startswith(("backbone.", "neck.")) or (name.endswith("bias") and "sampling" not in name):
            continue
        wanted = drawn[name]
        if not wanted.std() or "sampling" in name:
            torch.testing.assert_close(value, wanted)
        elif not any(part in name for part in others):
            assert value.std().item() == pytest.approx(wanted.std().item(), rel=0.25), name


def test_places_are_those_of_transformers_and_float32() -> None:
    module = theirs(made()).model.pixel_level_module.decoder.encoder
    shapes = [(3, 5), (6, 10), (200, 3)]
    found = centres(shapes, torch.ones(2, 3, 2, dtype=torch.bfloat16), torch.device("cpu"))
    torch.testing.assert_close(found, module.get_reference_points(shapes, torch.ones(2, 3, 2), "cpu"))
    assert found.dtype == torch.float32
    assert directions().shape == (HEADS * 3 * 4 * 2,)


def test_bfloat16_is_near_float32() -> None:
    ours = shaken(made()).eval()
    images, masks = scenes(3)
    exact = ours(images)
    rough = ours.bfloat16()(images.bfloat16())
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean()
    loss = ours.train()(images.bfloat16(), masks, torch.arange(3))
    loss.backward()
    assert loss.isfinite()


def test_rates_and_weight_decay() -> None:
    ours = made()
    groups = param_groups(ours, 1.0, 0.05, 0.5)
    of = {name: group for group in groups for name in group["names"]}
    still = ("level_embed", "queries_")
    for name, parameter in ours.named_parameters():
        if not name.startswith("backbone."):
            assert of[name]["lr"] == 1.0
            decays = parameter.ndim > 1 and not any(part in name for part in still)
            assert of[name]["weight_decay"] == (0.05 if decays else 0.0), name


@pytest.mark.parametrize("kind", ["swin_v2", "vit"])
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    ours = made(kind).eval()
    maps = [x.detach() for x in ours.backbone.maps(torch.zeros(1, 3, 64, 64))]
    with FlopCounterMode(display=False) as counter:
        ours._predicted(ours.neck(maps))
    assert counter.get_total_flops() == 2 * ours.head_flops((64, 64))
