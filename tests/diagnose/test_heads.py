"""Attention distance, similarity of heads and average maps: closed forms, constructed maps, and networks of others."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor

from fdscale import UserError
from fdscale.diagnose.attention import Attended, watched
from fdscale.diagnose.heads import Heads, Look
from fdscale.models.swin_v2 import SwinV2
from fdscale.models.vit import ViT

GRID, CELL = (4, 6), (16.0, 8.0)


def places(grid: tuple[int, int], classes: int = 0) -> Tensor:
    found = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))
    return torch.cat((torch.full((classes, 2), -1), found))[None]


def look(weights: Tensor, classes: int = 0, grid: tuple[int, int] = GRID, cell: tuple[float, float] = CELL) -> Look:
    """Of maps (B, h, N, N)."""
    heads = Heads()
    for image in weights:
        heads.add(Attended(image[None, None], places(grid, classes), cell))
    return heads.result()


def test_uniform_attention_has_the_mean_distance_of_two_places() -> None:
    count = math.prod(GRID)
    found = look(torch.full((2, 3, count, count), 1 / count))
    spots = [(y * CELL[0], x * CELL[1]) for y in range(GRID[0]) for x in range(GRID[1])]
    wanted = sum(math.dist(a, b) for a in spots for b in spots) / count**2
    assert found.distance.tolist() == pytest.approx([wanted] * 3, rel=1e-6)
    assert found.spread.tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert found.similarity.flatten().tolist() == pytest.approx([1] * 9, rel=1e-6)
    assert found.likeness() == pytest.approx(1)
    assert found.diagonality.tolist() == found.columns.tolist() == [0, 0, 0]  # there is nothing to explain
    assert found.images == 2


def test_a_fixed_offset_is_its_length_and_wholly_diagonal() -> None:
    """Identity, and one down and two to the right, where the edge of the map allows it."""
    count, (rows, columns) = math.prod(GRID), GRID
    weights = torch.zeros(1, 2, count, count)
    weights[0, 0] = torch.eye(count)
    for y in range(rows):
        for x in range(columns):
            to = (y + 1) * columns + x + 2
            weights[0, 1, y * columns + x] = torch.eye(count)[to] if y + 1 < rows and x + 2 < columns else 0
    found = look(weights)
    inside = (rows - 1) * (columns - 2) / count
    assert found.distance.tolist() == pytest.approx([0, inside * math.hypot(16, 16)])
    assert found.diagonality.tolist() == pytest.approx([1, 1])
    assert found.columns.max() < 0.2
    assert found.offsets.shape == (2, 7, 11)
    for head, (down, across) in enumerate(((0, 0), (1, 2))):
        only = torch.zeros(7, 11)
        only[3 + down, 5 + across] = 1
        assert torch.equal(found.offsets[head].float(), only)
    assert found.similarity[0, 1] == 0


def test_a_column_is_explained_by_the_key() -> None:
    """All look at one place: nothing of it is a function of the offset alone but by chance."""
    count = math.prod(GRID)
    weights = torch.zeros(1, 1, count, count)
    weights[..., 9] = 1.0
    found = look(weights)
    assert found.columns.item() == pytest.approx(1)
    assert found.diagonality.item() < 0.2
    assert found.likeness() != found.likeness()  # one head has nobody to be like


def test_class_tokens_are_left_out_and_rows_sum_to_one_again() -> None:
    count, generator = math.prod(GRID), torch.Generator().manual_seed(0)
    inner = torch.rand(1, 2, count, count, generator=generator).softmax(-1)
    whole = torch.zeros(1, 2, count + 1, count + 1)
    whole[..., 0, :] = 1 / (count + 1)
    whole[..., 1:, 0] = 0.6
    whole[..., 1:, 1:] = 0.4 * inner
    ours, theirs = look(whole, classes=1), look(inner)
    for name in ("distance", "similarity", "average", "diagonality", "offsets"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), atol=1e-6), name


def test_images_come_in_any_portions() -> None:
    weights = torch.rand(5, 2, 24, 24, generator=torch.Generator().manual_seed(1)).softmax(-1)
    one, other = Heads(), look(weights)
    one.add(Attended(weights[:, None], places(GRID), CELL), torch.tensor([True] * 5))
    for a, b in zip(one.result()[:7], other[:7], strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    some = Heads()
    some.add(Attended(weights[:, None], places(GRID), CELL), torch.tensor([True, False, True, False, False]))
    assert torch.allclose(some.result().distance, look(weights[[0, 2]]).distance, atol=1e-6)
    with pytest.raises(ValueError, match="no image"):
        Heads().result()


def seen(network: torch.nn.Module, images: Tensor) -> dict[int, Attended]:
    found: dict[int, Attended] = {}
    with torch.no_grad(), watched(network.eval(), tuple(images.shape[2:]), found.__setitem__):
        network(images)
    return found


SWIN = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def test_ours_is_timms_with_the_same_weights() -> None:
    """Swin V2 with shifted windows: weights, windows, places and cells."""
    torch.manual_seed(0)
    ours = SwinV2(**SWIN, img_size=(32, 64), pretrained_window_sizes=(0, 0), post_norm_init=1.0)
    theirs = timm.models.swin_transformer_v2.SwinTransformerV2(img_size=(32, 64), num_classes=0, **SWIN)
    state = {
        name.replace("layers.0.downsample", "layers.1.downsample"): value for name, value in ours.state_dict().items()
    }
    missing = theirs.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if "relative" not in name and "mask" not in name and "k_bias" not in name]
    images = torch.rand(2, 3, 32, 64)
    one, other = seen(ours, images), seen(theirs, images)
    assert sorted(one) == sorted(other) == [0, 1, 2, 3]
    for number in one:
        assert one[number].cell == other[number].cell
        assert torch.equal(one[number].places, other[number].places)
        assert torch.allclose(one[number].weights, other[number].weights, atol=2e-6)
    assert one[1].places.unique(dim=0).shape[0] == 8  # windows
    assert one[0].cell == (4.0, 4.0)
    assert one[2].cell == (8.0, 8.0)


@pytest.mark.parametrize("position", ["shared", "per_block", "absolute"])
def test_a_vits_weights_are_those_that_make_its_output(position: str) -> None:
    torch.manual_seed(0)
    network = ViT(img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2, position=position)
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3)
    images, inputs = torch.rand(2, 3, 32, 48), {}
    for number, block in enumerate(network.blocks):
        block.attn.register_forward_hook(lambda m, a, out, n=number: inputs.update({n: (m, a, out)}))
    found = seen(network, images)
    for number, (attn, arguments, out) in inputs.items():
        weights = found[number].weights[:, 0]
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        qkv = attn.qkv(arguments[0]) + torch.cat((attn.q_bias, torch.zeros(32), attn.v_bias))
        v = qkv.unflatten(2, (3, 2, -1))[:, :, 2].transpose(1, 2)
        assert torch.allclose(attn.proj((weights @ v).transpose(1, 2).flatten(2)), out, atol=1e-4)
        assert found[number].places.tolist()[0][:2] == [[-1, -1], [0, 0]]


@pytest.mark.parametrize(
    ("name", "size", "blocks", "queries"),
    [
        ("vit_tiny_patch16_224", 224, 12, 197),
        pytest.param("beit_base_patch16_224", 224, 12, 197, marks=pytest.mark.slow),
        ("deit_tiny_distilled_patch16_224", 224, 12, 198),
        pytest.param("vit_small_patch14_reg4_dinov2", 518, 12, 1374, marks=pytest.mark.slow),
        ("swin_tiny_patch4_window7_224", 224, 12, 49),
        ("swinv2_tiny_window8_256", 256, 12, 64),
    ],
)
def test_networks_of_timm(name: str, size: int, blocks: int, queries: int) -> None:
    network = timm.create_model(name, num_classes=0)
    found = {}

    def see(number: int, attended: Attended) -> None:
        heads = Heads()
        heads.add(attended)
        found[number] = (attended.weights.shape[-1], heads.result())

    before = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = network.eval()(before)
        with watched(network, (size, size), see):
            again = network(before)
        assert torch.allclose(wanted, again, atol=1e-4)
        assert torch.equal(network(before), wanted)  # as it was
    assert sorted(found) == list(range(blocks))
    assert found[0][0] == queries
    for _, one in found.values():
        assert (one.distance > 0).all()
        assert (one.distance < size).all()


def test_others_are_named() -> None:
    network = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(UserError, match="no block of ResNet has attention"), watched(network, (64, 64), print):
        pass
