"""Detectors: equal to torchvision's with copied weights, losses that do not see the batch, and what has no library."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou

from fdscale.engine.optim import param_groups
from fdscale.models.layers import initial_value
from fdscale.models.swin_v2 import SwinV2
from fdscale.models.vit import ViT
from fdscale.tasks import proposals, regions
from fdscale.tasks.detection import Detections, Detector, Thinning, View, joined, moved, pasted, soft_nms, thinned
from fdscale.tasks.proposals import sampled
from fdscale.tasks.regions import unpacked
from fdscale.tasks.semantic import stuff_loss

SIDE, CLASSES = 96, 3
SWIN = {
    "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 4, "drop_path_rate": 0.0,
    "post_norm_init": 1.0, "img_size": SIDE,
}  # fmt: skip


def detector(kind: str = "mask_rcnn", backbone: nn.Module | None = None, **more: Any) -> Detector:
    with torch.device("meta"):
        network = Detector(backbone or SwinV2(**SWIN), CLASSES, kind, channels=16, **more)
    network.to_empty(device="cpu")
    for name, parameter in network.named_parameters():
        parameter.data.copy_(initial_value(network, name, parameter.shape, torch.float32, 0))
    return network


def scene(counts: tuple[int, ...] = (3, 0, 2), seed: int = 0) -> dict[str, Tensor]:
    """Images with boxes whose masks are discs in them, the arguments of a Detector."""
    rng = np.random.default_rng(seed)
    boxes, masks = [], []
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for _ in range(sum(counts)):
        side = rng.integers(20, 50, 2)
        at = rng.integers(0, 64 - side.min() // 2, 2)
        box = np.array([*at, *np.minimum(at + side, SIDE - 1)], np.float32)
        y, x = (box[1] + box[3]) / 2, (box[0] + box[2]) / 2
        disc = ((rows - y) / (box[3] - box[1])) ** 2 + ((columns - x) / (box[2] - box[0])) ** 2 < 0.25
        boxes.append(box)
        masks.append(np.packbits(disc, axis=-1))
    images = torch.from_numpy(rng.normal(size=(len(counts), 3, SIDE, SIDE)).astype(np.float32))
    images[1:, :, 80:] = 0
    return {
        "images": images,
        "sizes": torch.tensor([[SIDE, SIDE]] + [[80, SIDE]] * (len(counts) - 1)),
        "counts": torch.tensor(counts),
        "boxes": torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4)),
        "classes": torch.from_numpy(rng.integers(0, CLASSES, sum(counts))),
        "masks": torch.from_numpy(np.array(masks, np.uint8).reshape(-1, SIDE, SIDE // 8)),
        "numbers": torch.arange(len(counts)) + 7,
        "stuff": torch.from_numpy(rng.integers(0, 4, (len(counts), SIDE, SIDE)).astype(np.uint8)),
    }


def one_of(batch: dict[str, Tensor], place: int) -> dict[str, Tensor]:
    """An image of a batch alone."""
    start = int(batch["counts"][:place].sum())
    some = slice(start, start + int(batch["counts"][place]))
    return {
        name: value[some] if name in ("boxes", "classes", "masks") else value[place : place + 1]
        for name, value in batch.items()
    }


class Maps(nn.Module):
    out_channels = 16

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError


def torchvisions(ours: Detector, **more: Any) -> MaskRCNN:
    theirs = MaskRCNN(Maps(), CLASSES + 1, rpn_anchor_generator=ours.rpn.anchor_generator, **more)
    theirs.roi_heads.mask_head = type(theirs.roi_heads.mask_head)(16, [16] * 4, 1)
    theirs.roi_heads.mask_predictor = type(theirs.roi_heads.mask_predictor)(16, 16, CLASSES + 1)
    state = {}
    for name, value in ours.state_dict().items():
        name = name.replace("regions.boxes.0.box_head", "roi_heads.box_head")
        name = name.replace("regions.boxes.0", "roi_heads.box_predictor").replace("regions.masks.0", "roi_heads")
        state[name] = value
    told = theirs.load_state_dict(state, strict=False)
    assert not told.missing_keys
    assert all(name.startswith(("backbone.", "neck.", "fpn.")) for name in told.unexpected_keys)
    return theirs


def features(ours: Detector, batch: dict[str, Tensor]) -> OrderedDict:
    maps = ours._maps(batch["images"], batch["numbers"])
    return OrderedDict(zip(("0", "1", "2", "3", "pool"), maps, strict=True))


def sharpened(network: Detector) -> Detector:
    """Heads that are sure of something, so that there is something to find."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if name.endswith(("cls_score.weight", "cls_logits.weight", "bbox_pred.weight")):
            parameter.data.normal_(std=0.2, generator=generator)
    return network


@pytest.fixture
def all_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many places that nothing is drawn."""
    for module in (proposals, regions):
        monkeypatch.setattr(module, "SAMPLED", 10**6)


def test_losses_are_torchvisions(all_taken: None) -> None:
    ours = sharpened(detector()).train()
    theirs = torchvisions(ours, rpn_batch_size_per_image=10**6, box_batch_size_per_image=10**6).train()
    for place in range(3):
        batch = one_of(scene(), place)
        batch["sizes"] = torch.tensor([[SIDE, SIDE]])  # torchvision counts anchors beyond the image, too
        total = ours(**{name: value for name, value in batch.items() if name != "stuff"})
        sizes = [tuple(batch["sizes"][0].tolist())]
        masks = unpacked(batch["masks"]).to(torch.uint8)
        targets = [{"boxes": batch["boxes"], "labels": batch["classes"] + 1, "masks": masks}]
        maps = features(ours, batch)
        found, first = theirs.rpn(ImageList(batch["images"], sizes), maps, targets)
        _, second = theirs.roi_heads(maps, found, sizes, targets)
        names = {
            "objectness": "loss_objectness",
            "proposal_boxes": "loss_rpn_box_reg",
            "classes_0": "loss_classifier",
            "boxes_0": "loss_box_reg",
            "masks_0": "loss_mask",
        }
        assert set(ours.losses) == set(names)
        for name, theirs_name in names.items():
            assert ours.losses[name].item() == pytest.approx((first | second)[theirs_name].item(), rel=1e-4, abs=1e-7)
        assert total.item() == pytest.approx(sum(value.item() for value in ours.losses.values()), rel=1e-5)


def test_detections_are_torchvisions() -> None:
    ours = sharpened(detector(thinning=Thinning(least_score=0.3))).eval()
    theirs = torchvisions(ours, box_score_thresh=0.3).eval()
    batch = scene()
    with torch.no_grad():
        found = ours(batch["images"], batch["sizes"])
        sizes = [tuple(size) for size in batch["sizes"].tolist()]
        maps = features(ours, batch)
        boxes, _ = theirs.rpn(ImageList(batch["images"], sizes), maps)
        wanted, _ = theirs.roi_heads(maps, boxes, sizes)
    assert sum(len(one.scores) for one in found) > 20
    for one, want, size in zip(found, wanted, sizes, strict=True):
        assert torch.equal(one.classes, want["labels"] - 1)
        assert torch.allclose(one.boxes, want["boxes"], atol=1e-3)
        assert torch.allclose(one.scores, want["scores"], atol=1e-5)
        assert torch.allclose(one.masks, want["masks"][:, 0], atol=1e-5)
        assert pasted(one, size).shape == (len(one.scores), *size)
        assert (one.scores.diff() <= 0).all()


KINDS = [
    ("mask_rcnn", {}),
    ("mask_rcnn", {"masks": False, "box_head": "4conv1fc", "norm": "group"}),
    ("cascade", {"box_head": "4conv1fc", "norm": "group", "box_loss": "giou"}),
    ("htc", {"stuff": 4, "global_block": True}),
    ("htc", {"masks": False, "box_loss": "giou"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_losses_are_means_over_images_and_every_parameter_learns(kind: str, more: dict[str, Any]) -> None:
    """An image alone has the loss that it has among others, also one without objects, after which none is without
    gradient: ZeRO waits for each of them."""
    network = detector(kind, **more).train()
    batch = scene()
    if not more.get("stuff"):
        batch.pop("stuff")
    if not more.get("masks", True):
        batch.pop("masks")
    alone = []
    for place in range(3):
        network.zero_grad()
        loss = network(**one_of(batch, place))
        loss.backward()
        alone.append(loss.item())
        without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
        assert without == []
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    together = network(**batch)
    assert together.item() == pytest.approx(sum(alone) / 3, rel=1e-4)
    assert network(**batch).item() == together.item()
    others = network(**{**batch, "numbers": batch["numbers"] + 1})
    assert others.item() != together.item()  # other anchors and boxes are drawn
    stages = 1 if kind == "mask_rcnn" else 3
    parts = {f"{part}_{n}" for part in ("classes", "boxes", "masks") for n in range(stages)}
    parts = {part for part in parts if more.get("masks", True) or not part.startswith("masks")}
    assert set(network.losses) == parts | {"objectness", "proposal_boxes"} | ({"stuff"} if more.get("stuff") else set())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_every_kind_finds_in_any_precision(kind: str, more: dict[str, Any]) -> None:
    network = sharpened(detector(kind, **more)).eval()
    batch = scene()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            found = network.to(dtype)(batch["images"].to(dtype), batch["sizes"])
        for one, size in zip(found, batch["sizes"], strict=True):
            assert one.boxes.dtype == one.scores.dtype == torch.float32
            assert len(one.scores) <= 100
            assert (one.boxes[:, 2:] <= size.flip(0)).all()
            assert (one.boxes >= 0).all()
            assert (one.masks is None) == (not more.get("masks", True))
            assert one.masks is None or one.masks.shape == (len(one.scores), 28, 28)
    none = detector(kind, thinning=Thinning(least_score=1.0), **more).eval()
    with torch.no_grad():
        assert [len(one.scores) for one in none(batch["images"], batch["sizes"])] == [0, 0, 0]


def test_a_plain_vit_has_the_same_strides() -> None:
    vit = ViT(img_size=SIDE, patch_size=16, embed_dim=32, depth=4, num_heads=2, position="per_block")
    network = detector(backbone=vit).train()
    assert network.rpn.strides == [4, 8, 16, 32, 64]
    batch = scene()
    batch.pop("stuff")
    network(**batch).backward()
    assert network.head_flops((SIDE, SIDE)) > 0


@pytest.mark.parametrize("kind", ["mask_rcnn", "htc"])
def test_layers_decay_towards_the_input_and_vectors_have_no_weight_decay(kind: str) -> None:
    """The backbone's layers as they are alone, all behind it at the top rate."""
    network = detector(kind, stuff=4 if kind == "htc" else 0, global_block=kind == "htc", norm="group")
    groups = param_groups(network, lr=1.0, weight_decay=0.05, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    alone = {name: group["lr"] for group in param_groups(network.backbone, 1.0, 0.05, 0.5) for name in group["names"]}
    top = max(network.depth_of(name) for name in rates)
    assert top == sum(network.backbone.depths) + 1
    for name, parameter in network.named_parameters():
        part, _, rest = name.partition(".")
        if part != "backbone":
            assert rates[name] == 1.0
            assert decays[name] == (0.0 if parameter.ndim == 1 else 0.05)
            continue
        assert rates[name] == 0.5 ** (top - network.backbone.depth_of(rest))
        assert (decays[name] == 0) == (rest in network.backbone.no_decay())
        assert rates[name] <= alone[rest]


def test_three_stages_move_boxes_on() -> None:
    """A cascade whose later stages' codes are zero leaves the first stage's boxes, and means their scores."""
    network = sharpened(detector("cascade", masks=False)).eval()
    for number in (1, 2):
        network.regions.boxes[number].bbox_pred.weight.data.zero_()
        network.regions.boxes[number].bbox_pred.bias.data.zero_()
    batch = scene()
    with torch.no_grad():
        maps = network._maps(batch["images"], None)
        sizes = [tuple(size) for size in batch["sizes"].tolist()]
        given, _ = network.rpn(maps, sizes)
        for (boxes, shares), before in zip(network.regions.detect(maps, given, sizes), given, strict=True):
            assert boxes.shape == (len(before), 1, 4)
            assert torch.allclose(shares.sum(-1), torch.ones(()))
            _, codes = network.regions.boxes[0](network.regions._pool(7, maps, given, None))
            first = network.regions._coders[0].decode(codes.flatten(1), given)[:, 0]
            break
    start = first[: len(boxes)].clamp(min=0)
    start[:, 0::2].clamp_(max=sizes[0][1])
    start[:, 1::2].clamp_(max=sizes[0][0])
    assert torch.allclose(boxes[:, 0], start, atol=1e-2)


@pytest.mark.parametrize("kind", ["linear", "gaussian"])
def test_soft_nms_is_the_papers_loop(kind: str) -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (40, 2))
    boxes = torch.tensor(np.concatenate((corners, corners + rng.uniform(10, 40, (40, 2))), 1), dtype=torch.float32)
    scores, classes = torch.tensor(rng.uniform(0.1, 1, 40), dtype=torch.float32), torch.tensor(rng.integers(0, 2, 40))
    kept, lowered = soft_nms(boxes, scores, classes, kind, 0.4, 0.05, 100)
    wanted: list[tuple[int, float]] = []
    for which in (0, 1):
        left = {int(i): float(scores[i]) for i in (classes == which).nonzero()[:, 0]}
        while left:
            best = max(left, key=lambda i: left[i])
            score = left.pop(best)
            if score <= 0.05:
                break
            wanted.append((best, score))
            for i in left:
                iou = float(box_iou(boxes[best][None], boxes[i][None]))
                left[i] *= float(np.exp(-(iou**2) / 0.5)) if kind == "gaussian" else (1 - iou if iou > 0.4 else 1)
    wanted.sort(key=lambda pair: -pair[1])
    assert kept.tolist() == [place for place, _ in wanted]
    assert lowered[kept].tolist() == pytest.approx([score for _, score in wanted], rel=1e-5)
    assert len(soft_nms(boxes[:0], scores[:0], classes[:0], kind, 0.4, 0.05, 100)[0]) == 0


def test_what_is_sampled_is_a_function_of_seed_number_and_use() -> None:
    labels = torch.tensor([1] * 30 + [0] * 60 + [-1] * 10)
    taken = sampled(labels, 20, 0.25, (0, 5, 0))
    assert len(taken) == 20
    assert (labels[taken] > 0).sum() == 5
    assert (labels[taken] == 0).sum() == 15
    assert torch.equal(taken, taken.sort().values)
    assert torch.equal(taken, sampled(labels, 20, 0.25, (0, 5, 0)))
    for other in ((1, 5, 0), (0, 6, 0), (0, 5, 1)):
        assert not torch.equal(taken, sampled(labels, 20, 0.25, other))
    assert sampled(labels, 1000, 0.5, (0, 0, 0)).tolist() == list(range(90))
    few = sampled(torch.tensor([1, 0, 0, 0, 0]), 4, 0.5, (0, 0, 0))
    assert len(few) == 4  # the rest is filled with what is none
    assert few[0] == 0


def test_anchors_beyond_the_image_do_not_count() -> None:
    """What the square holds beyond it changes no loss of proposals."""
    network = detector(norm="none").train()
    batch = one_of(scene((2,)), 0)
    batch["sizes"] = torch.tensor([[64, 64]])
    batch["boxes"] = batch["boxes"].clamp(max=63)
    maps = [x.detach() for x in network._maps(batch["images"], None)]
    objects = [proposals.Objects(batch["boxes"], batch["classes"], None)]
    _, before = network.rpn(maps, [(64, 64)], objects, [3])
    for x, stride in zip(maps, network.rpn.strides, strict=True):
        edge = int(64 / stride) + 2  # a 3 x 3 convolution sees one further
        x[:, :, edge:], x[..., edge:] = 9.0, 9.0
    _, after = network.rpn(maps, [(64, 64)], objects, [3])
    for name, value in after.items():
        assert value.item() == pytest.approx(before[name].item()), name
    _, counted = network.rpn(maps, [(SIDE, SIDE)], objects, [3])
    assert counted["objectness"] != after["objectness"]


def test_packed_masks_and_stuff() -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (2, 5, 24)).astype(bool)
    assert torch.equal(unpacked(torch.from_numpy(np.packbits(mask, axis=-1))), torch.from_numpy(mask))
    scores = torch.randn(2, 4, 3, 3)
    stuff = torch.full((2, 24, 24), 255, dtype=torch.uint8)
    assert stuff_loss(scores, stuff, 8).item() == 0
    stuff[0] = 2
    wanted = nn.functional.cross_entropy(scores[:1], torch.full((1, 3, 3), 2)) / 2
    assert stuff_loss(scores, stuff, 8).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_thinning_keeps_the_surest_of_a_class() -> None:
    box = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
    found = Detections(box, torch.tensor([0.5, 0.9, 0.7, 0.2]), torch.tensor([0, 0, 1, 0]), None)
    kept = thinned(found, Thinning())
    assert kept.classes.tolist() == [0, 1, 0]
    assert kept.scores.tolist() == pytest.approx([0.9, 0.7, 0.2])
    apart = [Detections(*(part[some] for part in found[:3]), None) for some in (slice(0, 2), slice(2, 4))]
    assert all(torch.equal(a, b) for a, b in zip(joined(apart, Thinning())[:3], kept[:3], strict=True))
    assert joined(apart[:1], Thinning()) is apart[0]


@pytest.mark.slow
def test_views_are_merged_and_their_masks_averaged() -> None:
    """Twice the same view says what it says alone; a mirrored one the mirror image; several what a plain loop says."""
    how = Thinning(least_score=0.3)
    network = sharpened(detector(thinning=how)).eval()
    batch = scene()
    images, sizes = batch["images"], batch["sizes"]
    other = images.clone()
    for image, (_, width) in zip(other, sizes.tolist(), strict=True):
        image[:, :, :width] = image[:, :, :width].flip(2)
    small, fewer = images[:, :, ::2, ::2].contiguous(), -(-sizes // 2)
    with torch.no_grad():
        alone = network(images, sizes)
        twice = network(images, sizes, others=[View(images, sizes)])
        both = network(images, sizes, others=[View(other, sizes, True), View(small, fewer)])
        back = network(other, sizes, others=[View(images, sizes, True), View(small, fewer, True)])
        views = [(images, sizes, False), (other, sizes, True), (small, fewer, False)]
        seen = [network(at, size) for at, size, _ in views]
    assert sum(len(one.scores) for one in alone) > 20
    for one, two in zip(alone, twice, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for place, (one, two, size) in enumerate(zip(both, back, sizes.tolist(), strict=True)):
        assert torch.allclose(one.scores, two.scores, atol=1e-5)
        assert torch.equal(one.classes, two.classes)
        assert torch.allclose(one.boxes, moved(two.boxes, size, size, True), atol=1e-3)
        assert torch.allclose(one.masks, two.masks.flip(2), atol=1e-4)
        boxes = torch.cat(
            [
                moved(some[place].boxes, at[place].tolist(), size, flip)
                for some, (_, at, flip) in zip(seen, views, strict=True)
            ]
        )
        scores, classes = (torch.cat([getattr(some[place], part) for some in seen]) for part in ("scores", "classes"))
        kept = batched_nms(boxes, scores, classes, how.overlap)[: how.most]
        assert torch.allclose(one.boxes, boxes[kept], atol=1e-3)
        assert torch.equal(one.classes, classes[kept])
        means = []
        for at, inside, flip in views:
            with torch.no_grad():
                maps = network._maps(at[place : place + 1], None)
                here = moved(boxes[kept], size, inside[place].tolist(), flip)
                share = network.regions.mask(maps, [here], [classes[kept]], [inside[place].tolist()])[0]
            means.append(share.flip(2) if flip else share)
        assert torch.allclose(one.masks, sum(means) / 3, atol=1e-4)


@pytest.mark.slow
def test_the_plan_sees_what_training_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device every place for a box is taken; where images fill them all, that is what training keeps."""
    from fdscale.plan.shapes import _measure

    monkeypatch.setattr(regions, "SAMPLED", 60)
    for kind, more, most in (
        ("mask_rcnn", {}, 1.03),
        ("cascade", {"box_loss": "giou"}, 1.5),
        ("htc", {"stuff": 4}, 1.5),
    ):
        batch = scene((3, 2, 2))
        if not more.get("stuff"):
            batch.pop("stuff")
        real = _measure(detector(kind, **more).train(), tuple(batch.values()), [], False)
        shapes = tuple(batch[name].to("meta") for name in ("images", "sizes"))
        planned = _measure(detector(kind, **more).to("meta").train(), shapes, [], False)
        assert 0.97 < planned.kept / real.kept < most
        assert 0.97 < planned.peak / real.peak < most
