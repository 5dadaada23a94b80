"""UPerNet against transformers' with the same weights, its parts against torch's, batch-norm on two ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import outside
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

from fdscale.engine.optim import param_groups
from fdscale.models import backbone
from fdscale.models.layers import initialise
from fdscale.tasks.batch_norm import BatchNorm
from fdscale.tasks.segmentation import Segmenter, pixel_loss
from fdscale.tasks.upernet import FCN, UPerNet, pooled, resized

SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
VIT = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 3, "position": "per_block"}
WIDTHS, CHANNELS, CLASSES = (8, 12, 20, 28), 16, 5
LEVELS = [(width, 4 * 2**i) for i, width in enumerate(WIDTHS)]


def maps(seed: int, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sides = ((24, 20), (12, 10), (6, 5), (3, 3))
    return [torch.randn(batch, width, *side, generator=generator) for width, side in zip(WIDTHS, sides, strict=True)]


def theirs(ours: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """transformers' head with the weights and statistics of ours."""
    config = UperNetConfig(
        backbone_config={"model_type": "swin", "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        hidden_size=CHANNELS, pool_scales=[1, 2, 3, 6], auxiliary_channels=CHANNELS, num_labels=CLASSES,
    )  # fmt: skip
    other = kind(config, in_channels=list(WIDTHS))
    renamed = {
        name.replace("bn.", "batch_norm.").replace("conv_seg", "classifier"): value
        for name, value in ours.state_dict().items()
    }
    rest = other.load_state_dict(renamed, strict=False)
    assert not rest.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in rest.missing_keys)
    return other


def shaken(head: nn.Module) -> nn.Module:
    """A head none of whose values is that of another or its default."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in head.state_dict().values():
            value.uniform_(-0.3, 0.3, generator=generator)
            if (value < 0).any() and value.ndim == 1:
                value.abs_().add_(0.2)
    return head


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("ours", "kind"), [("upernet", UperNetHead), ("fcn", UperNetFCNHead)])
def test_heads_are_transformers(ours: str, kind: type[nn.Module], training: bool) -> None:
    """Scores, gradients of weights and inputs, and running statistics."""
    made = UPerNet(LEVELS, CHANNELS, CLASSES, "batch") if ours == "upernet" else FCN(20, CHANNELS, CLASSES, "batch")
    head = shaken(made).train(training)
    other = theirs(head, kind).train(training)
    own, same = maps(1), maps(1)
    for x in (*own, *same):
        x.requires_grad_()
    scores, expected = head(own if ours == "upernet" else own[2]), other(same)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))
    (scores * weight).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(own, same, strict=True):
        if y.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-3)
    known = dict(other.named_parameters())
    for name, parameter in head.named_parameters():
        wanted = known[name.replace("bn.", "batch_norm.").replace("conv_seg", "classifier")].grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=2e-3)
    for name, value in theirs(head, kind).state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 5), (24, 40), (6, 10), (96, 3)])
def test_resizing_and_pooling_are_torchs(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = F.interpolate(x, size, mode="bilinear")
    torch.testing.assert_close(resized(x, size), wanted, rtol=0, atol=1e-5)  # its weights are float32
    for side in (1, 2, 3, 6):
        torch.testing.assert_close(pooled(x, side), F.adaptive_avg_pool2d(x, side), rtol=0, atol=1e-5)


def test_batch_norm_is_torchs_and_keeps_its_statistics_in_float32() -> None:
    x = 100 + torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    ours, other = shaken(BatchNorm(6)), nn.BatchNorm2d(6)
    other.load_state_dict(ours.state_dict(), strict=False)
    for _ in range(3):
        torch.testing.assert_close(ours(x), other(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x), other.eval()(x), rtol=1e-5, atol=1e-4)
    before = ours.running_var.clone()
    assert ours.bfloat16().weight.dtype == torch.bfloat16
    assert torch.equal(ours.running_var, before)
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_statistics_that_are_not_finite_are_not_followed() -> None:
    norm = shaken(BatchNorm(3)).train()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.full((2, 3, 4, 4), torch.inf))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.slow
def test_two_ranks_norm_as_one(tmp_path: Path) -> None:
    """Outputs, gradients and running statistics of half a batch each, against torch's on the whole."""
    script = Path(__file__).parent.parent / "norms.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, env=outside(), timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    other = nn.BatchNorm2d(3)
    y = other(x)
    (y**3).sum().backward()
    torch.testing.assert_close(torch.cat([part["y"] for part in parts]), y.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([part["gradient"] for part in parts]), x.grad, rtol=1e-4, atol=1e-4)
    for name in ("running_mean", "running_var"):
        assert torch.equal(parts[0][name], parts[1][name])
        torch.testing.assert_close(parts[0][name], getattr(other, name), rtol=1e-5, atol=1e-6)


@pytest.fixture(params=["vit", "swin_v2"])
def segmenter(request: pytest.FixtureRequest) -> Segmenter:
    body = backbone(request.param, VIT if request.param == "vit" else SWIN)
    made = Segmenter(body, CLASSES, CHANNELS, CHANNELS)
    initialise(made, 0)
    return made


def test_a_vits_maps_become_a_pyramid(segmenter: Segmenter) -> None:
    """x4, x2, x1 and x1/2 of its grid of 8; a Swin's are one already."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = segmenter.backbone.maps(images)
    found = segmenter.neck(before)
    sides = [32, 16, 8, 4] if len({x.shape[2] for x in before}) == 1 else [16, 8, 4, 2]
    assert [x.shape[2] for x in found] == sides
    levels = segmenter.neck.levels(segmenter.backbone.levels())
    assert [(x.shape[1], 64 // x.shape[2]) for x in found] == levels
    assert [(x.shape[1], 64 // x.shape[2]) for x in before] == segmenter.backbone.levels()


def test_the_loss_is_torchs_over_all_pixels(segmenter: Segmenter) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, CLASSES, 16, 16, generator=generator)
    masks = torch.randint(0, CLASSES, (2, 64, 64), generator=generator, dtype=torch.uint8)
    masks[0, :20] = 255
    wide = F.interpolate(scores, (64, 64), mode="bilinear")
    wanted = F.cross_entropy(wide, masks.long(), ignore_index=255, reduction="sum") / masks.numel()
    torch.testing.assert_close(pixel_loss(scores, masks), wanted, rtol=1e-5, atol=1e-6)
    assert pixel_loss(scores, torch.full_like(masks, 255)) == 0
    images = torch.randn(2, 3, 64, 64, generator=generator)
    total = segmenter.eval()(images, masks)
    parts = segmenter.losses
    torch.testing.assert_close(total, parts["decode"] + 0.4 * parts["auxiliary"])
    torch.testing.assert_close(parts["decode"], pixel_loss(segmenter(images), masks).detach())


def test_dropout_is_a_function_of_the_number(segmenter: Segmenter) -> None:
    """And leaves out a tenth of the channels, others in the two heads."""
    segmenter.train()
    numbers = torch.arange(2000)
    both = [segmenter._keep(head, numbers) for head in (0, 1)]
    for head, keep in enumerate(both):
        assert keep is not None
        assert keep.shape == (2000, CHANNELS)
        again = segmenter._keep(head, torch.tensor([7, 3]))
        assert again is not None
        assert torch.equal(keep[[7, 3]], again)
        assert (keep == 0).float().mean() == pytest.approx(0.1, abs=0.01)
        assert keep.mean() == pytest.approx(1.0, abs=0.01)
    assert not torch.equal(*both)
    assert segmenter.eval()._keep(0, numbers) is None


def test_rates_and_weight_decay(segmenter: Segmenter) -> None:
    """Heads and neck learn at the rate of the output; vectors do not decay."""
    groups = param_groups(segmenter, 1.0, 0.05, 0.5)
    of = {name: group for group in groups for name in group["names"]}
    for name, parameter in segmenter.named_parameters():
        if not name.startswith("backbone."):
            assert of[name]["lr"] == 1.0
            assert of[name]["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.05), name
    assert of["backbone.patch_embed.proj.weight"]["lr"] == 0.5 ** (sum(segmenter.backbone.depths) + 1)


def test_flops_are_those_that_torch_counts(segmenter: Segmenter) -> None:
    """Of the convolutions; the products that resize and pool are counted by torch alone."""
    found = segmenter.neck(segmenter.backbone.maps(torch.zeros(1, 3, 64, 64)))
    keep = [x.detach() for x in found]
    segmenter.eval()
    with FlopCounterMode(display=False) as counter:
        segmenter.neck(segmenter.backbone.maps(torch.zeros(1, 3, 64, 64)))
        segmenter.decode_head(keep)
        segmenter.auxiliary_head(keep[-2])
    counted = counter.get_flop_counts()["Global"]
    convolutions = sum(count for op, count in counted.items() if "convolution" in str(op)) // 2
    patches = segmenter.backbone.patch_embed
    embedding = patches.inputs * patches.proj.out_channels * (64 // patches.proj.stride[0]) ** 2
    assert convolutions == segmenter.head_flops((64, 64)) + embedding


def test_group_norm_does_not_see_other_images() -> None:
    made = Segmenter(backbone("swin_v2", SWIN), CLASSES, 32, 32, norm="group")
    initialise(made, 0)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert not list(made.buffers())
    torch.testing.assert_close(made(images)[:1], made(images[:1]), rtol=1e-4, atol=1e-4)
