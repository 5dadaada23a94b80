"""Heads in stages against a plain loop, boxes on grids that are no powers of two, and what heads cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_detection import SIDE, all_taken, detector, one_of, scene, sharpened  # noqa: F401
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou_loss, roi_align

from fdscale.models.vit import ViT
from fdscale.tasks.detection import Detector, soft_nms
from fdscale.tasks.regions import BOX_GRID, MASK_GRID, unpacked
from fdscale.tasks.semantic import stuff_loss


def pooled(maps: list[Tensor], boxes: Tensor, grid: int, told: Tensor | None) -> Tensor:
    """Box by box, from the map whose cells fit it (FPN's equation 1)."""
    found = []
    for box in boxes:
        side = ((box[2] - box[0]) * (box[3] - box[1])).sqrt()
        level = int((4 + torch.log2(side / 224) + 1e-6).floor().clamp(2, 5)) - 2
        one = roi_align(maps[level], [box[None]], grid, 1 / 2 ** (level + 2), 2)
        if told is not None:
            beside = roi_align(told, [box[None]], MASK_GRID, 1 / 8, 2)
            one = one + (F.avg_pool2d(beside, 2) if grid == BOX_GRID else beside)
        found.append(one)
    return torch.cat(found)


def plain_losses(network: Detector, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the heads on one image, where all boxes are taken: mmdetection's loops, without batches or samplers."""
    heads, size = network.regions, (SIDE, SIDE)
    maps = network._maps(batch["images"], batch["numbers"])
    proposals, _ = network.rpn(maps, [size])
    known, masks, htc = batch["boxes"], unpacked(batch["masks"]).float(), heads.flows
    told = None if heads.semantic is None else heads.semantic(maps)[1]
    boxes, losses = proposals[0].detach(), {}

    def labelled(boxes: Tensor, least: float) -> tuple[Tensor, Tensor]:
        best, which = box_iou(boxes, known).max(1)
        return torch.where(best >= least, batch["classes"][which] + 1, 0), which

    for stage in range(3):
        least, weight, scale = 0.5 + stage / 10, 0.5**stage, float(stage + 1)
        coder = BoxCoder((10 * scale, 10 * scale, 5 * scale, 5 * scale))
        seen = torch.cat((boxes, known))
        labels, which = labelled(seen, least)
        objects = (labels > 0).nonzero()[:, 0]
        scores, codes = heads.boxes[stage](pooled(maps, seen, BOX_GRID, told))
        losses[f"classes_{stage}"] = weight * F.cross_entropy(scores, labels)
        moved = coder.decode(codes.flatten(1), [seen])[:, 0]
        if heads.box_loss == "giou":
            off = 10 * generalized_box_iou_loss(moved[objects], known[which[objects]]).sum()
        else:
            aim = coder.encode_single(known[which[objects]], seen[objects])
            off = F.smooth_l1_loss(codes[objects, 0], aim, beta=1 / 9, reduction="sum")
        losses[f"boxes_{stage}"] = weight * off / len(seen)
        given = seen
        own = (seen[:, None] == known).all(-1).any(-1)
        boxes = clip_boxes_to_image(moved.detach()[~own], size)
        if htc:
            given = torch.cat((boxes, known))
            labels, which = labelled(given, least)
            objects = (labels > 0).nonzero()[:, 0]
        x, passed = pooled(maps, given[objects], MASK_GRID, told), None
        for head in heads.masks[: stage + 1] if htc else heads.masks[stage : stage + 1]:
            inner = x if passed is None else x + F.relu(head.conv_res(passed))
            passed = head.mask_head(inner)
            out = head.mask_predictor(passed)
        pairs = []
        for row, place in enumerate(objects.tolist()):
            aim = roi_align(masks[which[place]][None, None], [given[place : place + 1]], 28, 1.0)[0, 0]
            pairs.append(F.binary_cross_entropy_with_logits(out[row, labels[place]], aim))
        losses[f"masks_{stage}"] = weight * torch.stack(pairs).mean()
    return losses


@pytest.mark.parametrize(
    ("kind", "more"), [("cascade", {}), ("cascade", {"box_loss": "giou"}), ("htc", {}), ("htc", {"stuff": 4})]
)
@pytest.mark.usefixtures("all_taken")
def test_losses_of_three_stages_are_those_of_a_plain_loop(kind: str, more: dict[str, Any]) -> None:
    network = sharpened(detector(kind, **more)).train()
    batch = one_of(scene(), 0)
    if not more.get("stuff"):
        batch.pop("stuff")
    network(**batch)
    wanted = plain_losses(network, batch)
    assert set(wanted) == set(network.losses) - {"objectness", "proposal_boxes", "stuff"}
    for name, value in wanted.items():
        assert network.losses[name].item() == pytest.approx(value.item(), rel=2e-4, abs=1e-7), name


def where(strides: list[float], side: int) -> list[Tensor]:
    """Maps whose two channels say where a cell's centre is, x and y in pixels."""
    maps = []
    for stride in strides:
        line = (torch.arange(int(side / stride)) + 0.5) * stride
        maps.append(torch.stack(torch.meshgrid(line, line, indexing="xy"))[None])
    return maps


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_a_box_sees_what_is_in_it_whatever_the_patch(patch: int) -> None:
    """torchvision takes the scales of maps for powers of two: with patches of 14 pixels it looks elsewhere."""
    side = 16 * patch
    vit = ViT(img_size=side, patch_size=patch, embed_dim=32, depth=4, num_heads=2, position="per_block")
    network = detector(backbone=vit)
    maps = where([*network.regions.strides], side)
    boxes = torch.tensor([[0.6, 0.2, 0.7, 0.3], [0.3, 0.1, 0.9, 0.7]]) * side
    for grid in (BOX_GRID, MASK_GRID):
        seen = network.regions._pool(grid, maps, [boxes], None).mean((2, 3))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert (seen - centres).abs().max() <= network.regions.strides[1] / 2 + 1e-3  # unaligned: half a cell


@pytest.mark.parametrize(("side", "stride", "cells"), [(96, 8, 12), (100, 8, 13), (1024, 7, 148)])
def test_stuff_is_looked_at_where_the_cells_are(side: int, stride: float, cells: int) -> None:
    """Also where the map is of a padded image: a cell's class is that of the pixel at its centre, or none."""
    stuff = torch.randint(0, 5, (2, side, side), dtype=torch.uint8)
    scores = torch.randn(2, 5, cells, cells)
    aim = torch.full((2, cells, cells), 255)
    for row in range(cells):
        for column in range(cells):
            y, x = int((row + 0.5) * stride), int((column + 0.5) * stride)
            if y < side and x < side:
                aim[:, row, column] = stuff[:, y, x].long()
    each = [F.cross_entropy(scores[i : i + 1], aim[i : i + 1], ignore_index=255) for i in range(2)]
    assert stuff_loss(scores, stuff, stride).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_soft_nms_of_very_many_boxes() -> None:
    """1000 proposals of 80 classes: pairs of them all would need 25 GB."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(80_000, 2, generator=generator) * 900
    boxes = torch.cat((corners, corners + 20 + 80 * torch.rand(80_000, 2, generator=generator)), 1)
    scores = torch.rand(80_000, generator=generator)
    kept, lowered = soft_nms(boxes, scores, torch.arange(80).repeat(1000), "gaussian", 0.5, 0.001, 20)
    assert len(kept) == 20
    assert kept[0] == scores.argmax()
    assert (lowered[kept].diff() <= 0).all()


@pytest.mark.parametrize("more", [{}, {"masks": False}, {"box_head": "4conv1fc"}, {"stuff": 4}])
def test_multiply_adds_are_those_that_torch_counts(more: dict[str, Any]) -> None:
    """Of the heads on as many boxes as are sampled."""
    network = detector("htc", **more)
    heads = network.regions
    maps = [torch.zeros(1, 16, -(-SIDE // stride), -(-SIDE // stride)) for stride in (4, 8, 16, 32, 64)]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        heads.outline(maps)
    counted = sum(
        count
        for name, count in counter.get_flop_counts()["Global"].items()
        if any(word in str(name) for word in ("convolution", "addmm", "aten.mm"))
    )
    assert isinstance(heads.boxes, nn.ModuleList)
    assert heads.flops((SIDE, SIDE)) == pytest.approx(counted / 2, rel=2e-3)
