"""COCO's layout into shards, and objects as training and evaluation see them: boxes and masks stay on their pixels."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import coco
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as runs

from fdscale import UserError, cli
from fdscale.data import objects
from fdscale.data.coco import _runs, lengths, packed
from fdscale.data.lost import Lost
from fdscale.data.order import Order
from fdscale.data.shards import make
from fdscale.data.stream import OBJECTS, Samples, batches
from fdscale.tasks.regions import unpacked

JITTER = {
    "seed": 0, "size": 64, "jitter": (0.3, 2.0), "short_side": None, "bounds": None, "flip": 0.5,
    "interpolation": "bilinear", "classes": 2, "masks": True,
}  # fmt: skip
BOOSTED = {**JITTER, "instaboost": 1.0}
SHORT = {**JITTER, "jitter": None, "short_side": (30, 60), "bounds": (64, 60)}


def sample(seed: int = 0, size: tuple[int, int] = (96, 128)) -> tuple[bytes, bytes, np.ndarray, list[dict]]:
    """An image whose objects alone are not black, what is on it, and its pixels; by the program's own packing."""
    rng = np.random.default_rng(seed)
    image, found = coco.scene(rng, np.zeros((200, 200, 3), np.uint8), size)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    rows = [{**one, "id": n, "category": one["category_id"], "class": int(one["category_id"] == 7), "crowd": False}
            for n, one in enumerate(found)]  # fmt: skip
    known = {"image_id": 5, "width": size[1], "height": size[0], "masks": True, "objects": rows}
    member, left_out = packed(json.dumps(known), buffer.getvalue())
    assert left_out == []
    return buffer.getvalue(), member, image, found


@pytest.mark.parametrize("how", [JITTER, SHORT, BOOSTED])
def test_boxes_and_masks_stay_on_their_pixels(how: dict) -> None:
    """Whatever is drawn: a mask covers what is not black, and its box is around it."""
    seen_mirrored = seen_cut = 0
    for number in range(40):
        image, member, _, found = sample(number % 5)
        seen = objects.train_scene(image, member, number=number, **how)
        tall, wide = seen.alike["sizes"].tolist()
        assert seen.image.shape == (3, 64, 64)
        assert not seen.image[:, tall:].any()
        assert not seen.image[:, :, wide:].any()
        masks = unpacked(seen.many["masks"])
        assert masks.shape == (len(seen.many["boxes"]), 64, 64)
        assert len(seen.many["classes"]) == len(masks) <= len(found)
        seen_cut += len(masks) < len(found)
        bright = seen.image.float().amax(0) > 100
        covered = masks.any(0)
        assert (bright & ~covered).sum() <= 0.15 * bright.sum() + 70  # edges are interpolated, slivers are left out
        assert (covered & ~(seen.image.float().amax(0) > 20)).sum() <= 0.15 * covered.sum() + 8
        for box, mask, kind in zip(seen.many["boxes"], masks, seen.many["classes"], strict=True):
            rows, columns = mask.nonzero().unbind(1)
            around = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            assert (box[:2] <= around[:2] + 1.5).all()
            assert (box[2:] >= around[2:] - 1.5).all()
            if int(kind) == 1:  # of a disc that is cut, less than its box may be left
                assert (box - around).abs().max() <= 1.5
            inside = seen.image[:, mask].float().mean(1)
            assert (inside[0] > inside[2]) == (int(kind) == 0)  # discs are red, squares blue
        again = objects.train_scene(image, member, number=number, **how)
        assert torch.equal(again.image, seen.image)
        plain = objects.train_scene(image, member, number=number, **{**how, "flip": 0.0})
        if not torch.equal(plain.image, seen.image):
            seen_mirrored += 1
            assert torch.equal(plain.image[:, :, :wide].flip(2), seen.image[:, :, :wide])
    assert 8 < seen_mirrored < 32
    assert how is SHORT or seen_cut > 3


def test_crowds_are_left_out_and_an_image_may_be_empty() -> None:
    image, member, _, _ = sample()
    tree = json.loads(member)
    for one in tree["objects"]:
        one["crowd"] = True
    for text in (json.dumps(tree), json.dumps({**tree, "objects": []})):
        seen = objects.train_scene(image, text.encode(), number=0, **JITTER)
        assert seen.many["boxes"].shape == (0, 4)
        assert seen.many["masks"].shape == (0, 64, 8)
    boxes_alone = objects.train_scene(image, member, number=0, **{**JITTER, "masks": False})
    assert set(boxes_alone.many) == {"boxes", "classes"}


def test_evaluation_sees_the_whole_image_at_every_scale() -> None:
    image, member, _, _ = sample(size=(96, 128))
    how = {"size": 64, "bounds": None, "interpolation": "bilinear", "classes": 2, "masks": True}
    seen = objects.scene(image, member, scales=(1.0, 1.5), **how)
    assert seen.alike["sizes0"].tolist() == [48, 64]
    assert seen.alike["sizes1"].tolist() == [72, 96]
    assert seen.alike["images1"].shape == (3, 128, 128)
    assert seen.many["objects"].numpy().tobytes() == member
    bounded = objects.scene(image, member, **{**how, "bounds": (64, 30)})
    assert bounded.alike["sizes0"].tolist() == [30, 40]
    with pytest.raises(Lost, match="its objects are on 128 x 96 pixels, the image has 96 x 128"):
        objects.scene(sample(size=(128, 96))[0], member, **how)


def broken(change: dict) -> bytes:
    tree = json.loads(sample()[1])
    for key, value in change.items():
        if key in tree:
            tree[key] = value
        else:
            tree["objects"][0][key] = value
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "is not as expected"),
        (b"[1]", "is not as expected"),
        (broken({"width": "a"}), "is not as expected"),
        (broken({"objects": {}}), "the size"),
        (broken({"class": 2}), "a class that is not from 0 to 1"),
        (broken({"class": True}), None),
        (broken({"box": [0, 0, 5]}), "is not as expected"),
        (broken({"box": [0, 0, float("nan"), 5]}), "a box that is not inside"),
        (broken({"box": [9, 0, 9, 5]}), "a box that is not inside"),
        (broken({"box": [0, 0, 900, 5]}), "a box that is not inside"),
        (broken({"mask": {"size": [96, 128], "counts": "0000"}}), "do not sum up"),
        (broken({"mask": {"size": [6, 8], "counts": "`1"}}), "do not sum up"),
        (broken({"mask": {"size": [96, 128], "counts": "\u1234"}}), "cannot be read"),
        (broken({"mask": None}), "is not as expected"),
        (broken({"area": float("inf")}), "a box that is not inside"),
    ],
)
def test_what_is_wrong_with_a_member_is_told(data: bytes, says: str | None) -> None:
    if says is None:
        objects.read(data, 2, True)
        return
    with pytest.raises(Lost, match=says):
        objects.read(data, 2, True)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_noise_is_lost_and_never_more(data: bytes) -> None:
    one = b'{"class":0,"box":[0,0,4,4],"area":1,"crowd":0,"mask":{"size":[4,4],"counts":"%s"}}'
    member = b'{"height":4,"width":4,"objects":[' + one + b"]}"
    for text in (data, member % data):
        try:
            found = objects.read(text, 2, True)
        except Lost:
            continue
        for one in found.masks:
            assert objects.decoded(one).shape == (4, 4)


def test_run_lengths_are_cocos() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = (rng.random((37, 53)) < share).astype(np.uint8)
        found = lengths(runs.encode(np.asfortranarray(mask))["counts"].decode())
        flat = np.repeat(np.arange(len(found)) % 2, found)
        assert np.array_equal(flat.reshape(53, 37).T, mask)
    with pytest.raises(ValueError, match="cut off"):
        lengths("P")


@pytest.fixture
def official(tmp_path: Path) -> Path:
    coco.write(tmp_path / "coco", "train2017", 9, seed=1, stuff=True)
    return tmp_path / "coco"


def test_cocos_layout_is_packed_and_read_back(official: Path, tmp_path: Path) -> None:
    tree = json.loads((official / "annotations/instances_train2017.json").read_text())
    made = make(official, tmp_path / "out", split="train2017", samples_per_shard=4)
    assert made.samples == 9
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["disc", "square"]
    assert json.loads((tmp_path / "out/categories.json").read_text()) == [3, 7]
    assert not (tmp_path / "out/left-out-objects.jsonl").exists()
    seen = 0
    for shard in range(len(made.names)):
        for row in range(int(made.counts[shard])):
            found = objects.read(made.read(shard, row, OBJECTS), 2, True)
            wanted = [one for one in tree["annotations"] if one["image_id"] == found.image_id]
            assert [[3, 7].index(one["category_id"]) for one in wanted] == found.classes.tolist()
            for place, one in enumerate(wanted):
                x, y, w, h = one["bbox"]
                assert found.boxes[place].tolist() == [x, y, x + w, y + h]
                assert found.areas[place] == one["area"]
                assert objects.decoded(found.masks[place]).sum() == one["area"]
            numbers = np.asarray(Image.open(io.BytesIO(made.read(shard, row, ("seg.png",)))))
            assert numbers.shape == found.size
            seen += len(wanted)
    assert seen == len(tree["annotations"]) > 9


def test_objects_come_with_their_images_on_any_number_of_ranks(official: Path, tmp_path: Path) -> None:
    made = make(official, tmp_path / "out", split="train2017", samples_per_shard=3)

    def view(image: bytes, member: bytes, stuff: bytes, number: int):
        return objects.train_scene(image, member, stuff, number=number, **JITTER)

    samples = Samples(made, Order(made.counts, 0, 4, 3), view, members=objects.members(True))
    seen: dict[int, dict] = {1: {}, 2: {}}
    for world, found in seen.items():
        for rank in range(world):
            how = {
                "batch_size": 4,
                "micro_batch": 2,
                "rank": rank,
                "world": world,
                "start": 0,
                "stop": 12,
                "workers": world - 1,
            }
            for batch in batches(samples, **how):
                assert batch["images"].shape == (2, 3, 64, 64)
                assert batch["stuff"].shape == (2, 64, 64)
                parts = [batch[name].split(batch["counts"].tolist()) for name in ("boxes", "classes", "masks")]
                for place, number in enumerate(batch["numbers"].tolist()):
                    found[number] = (batch["images"][place], batch["sizes"][place], *(part[place] for part in parts))
    assert len(seen[1]) == 12
    assert all(torch.equal(a, b) for n in seen[1] for a, b in zip(seen[1][n], seen[2][n], strict=True))


def test_objects365s_folders_and_boxes_without_masks(tmp_path: Path) -> None:
    source = tmp_path / "o365"
    tree = coco.write(source, "train", 4, seed=2)
    for place, image in enumerate(tree["images"]):
        (source / f"train/patch{place}").mkdir()
        (source / "train" / image["file_name"]).rename(source / f"train/patch{place}" / image["file_name"])
        image["file_name"] = f"images/v1/patch{place}/{image['file_name']}"
    for one in tree["annotations"]:
        del one["segmentation"]
    (source / "annotations/instances_train.json").unlink()
    (source / "annotations/zhiyuan_objv2_train.json").write_text(json.dumps(tree))
    made = make(source, tmp_path / "out", split="train")
    found = objects.read(made.read(0, 0, OBJECTS), 2, False)
    assert found.masks is None
    assert len(found.boxes) > 0
    with pytest.raises(Lost, match="KeyError"):
        objects.read(made.read(0, 0, OBJECTS), 2, True)


def test_bad_annotations_are_named_and_counted(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = official / "annotations/instances_train2017.json"
    tree = json.loads(path.read_text())
    good = len(tree["annotations"])
    size = [tree["images"][0]["height"], tree["images"][0]["width"]]
    usual = {**tree["annotations"][0], "image_id": tree["images"][0]["id"]}
    wrong = [
        ({"category_id": 99}, "category 99 is none of the categories"),
        ({"bbox": [1, 2, 0, 5]}, "its box is 0 x 5 pixels"),
        ({"bbox": [1, 2, 3]}, "its box is [1, 2, 3], expected [x, y, width, height]"),
        ({"bbox": [5000, 2, 3, 3]}, "its box is outside of the image"),
        ({"segmentation": []}, "it has no mask"),
        ({"segmentation": [[1, 2, 3, 4]]}, "its mask has no polygon of three points"),
        ({"segmentation": {"size": size, "counts": [size[0] * size[1]]}}, "its mask is empty"),
        ({"segmentation": {"size": size, "counts": [5]}}, "its mask has run lengths that do not sum up to the image"),
        ({"segmentation": {"size": [1, 1], "counts": [1]}}, f"its mask is of [1, 1], expected {size}"),
        ({"segmentation": [[1, 2, 1e9, 4, 5, 6]]},
         "its mask has a polygon far outside of the image, at 1 to 1000000000.0"),
        ({"segmentation": [[1, 2, 3, -1e5, 5, 6]]},
         "its mask has a polygon far outside of the image, at -100000.0 to 6"),
        ({"segmentation": [[1, 2, 3, "4", 5, 6]]},
         "its mask has the polygon [1, 2, 3, '4', 5, 6], expected [x, y, x, y, x, y, ...]"),
        ({"segmentation": 5}, "its mask is 5, expected polygons or run lengths"),
        ({"category_id": [1]}, "category [1] is none of the categories"),
        ({"bbox": [5, 5, 1e-5, 5]}, "of its box is nothing inside of the image"),
        ({"bbox": [5, 5, 10**400, 5]}, f"its box is [5, 5, {10**400}, 5], expected [x, y, width, height]"),
        ({"iscrowd": "no"}, "its iscrowd is 'no', expected 0 or 1"),
    ]  # fmt: skip
    for number, (change, _) in enumerate(wrong):
        tree["annotations"].append({**usual, "id": 9000 + number, **change})
    path.write_text(json.dumps(tree))
    assert cli.main(["shards", "make", str(official), str(tmp_path / "out"), "--split", "train2017"]) == 0
    assert f"{len(wrong)} objects; they are listed in" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out/left-out-objects.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in rows] == [f"annotation {9000 + n}: {says}" for n, (_, says) in enumerate(wrong)]
    tar = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*.tar"))
    assert tar.count(b'"class":') == good


def test_unusable_samples_and_files_are_named(official: Path, tmp_path: Path) -> None:
    path = official / "annotations/instances_train2017.json"
    tree = json.loads(path.read_text())
    for split, says in ((None, "choose one with --split train2017"), ("test", "has no split test")):
        with pytest.raises(UserError, match=says):
            make(official, tmp_path / "out", split=split)
    other = json.loads(path.read_text())
    other["images"][2]["width"] = 7
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"its annotations say 7 x"):
        make(official, tmp_path / "out", split="train2017")
    made = make(official, tmp_path / "left", split="train2017", skip_damaged=True)
    assert made.samples == 8
    path.write_text(json.dumps({**tree, "annotations": [{**tree["annotations"][0], "image_id": 12345}]}))
    with pytest.raises(UserError, match="is of image 12345, which is not listed"):
        make(official, tmp_path / "out", split="train2017")
    path.write_text("{}")
    with pytest.raises(UserError, match=r"expected COCO's JSON with images, annotations and categories \(KeyError"):
        make(official, tmp_path / "out", split="train2017")
    path.write_text(json.dumps(tree))
    (official / "train2017" / tree["images"][0]["file_name"]).unlink()
    with pytest.raises(UserError, match=r"1 files cannot be packed.*\n.*000000000100.jpg"):
        make(official, tmp_path / "out", split="train2017")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tree: [tree], "it is no mapping"),
        (lambda tree: {**tree, "images": {"1": 2}}, "images is no list"),
        (lambda tree: {**tree, "images": [5]}, r"images\[0\] is 5, expected a mapping"),
        (lambda tree: {**tree, "annotations": [None]}, r"annotations\[0\] is None, expected a mapping"),
        (lambda tree: {**tree, "images": tree["images"][:1] * 2}, "images has the id 100 twice"),
        (lambda tree: {**tree, "categories": tree["categories"][:1] * 2}, "categories has the id 3 twice"),
        (lambda tree: {**tree, "categories": [{"id": []}]}, r"categories\[0\] has the id \[\], expected"),
        (lambda tree: {**tree, "categories": [{"id": 1}, {"id": "a"}]}, "TypeError"),
        (lambda tree: {**tree, "images": [{"id": 1, "file_name": 7}]}, "image 1 has the file_name 7, expected text"),
        (lambda tree: {**tree, "images": [{"id": 1, "file_name": "a", "width": "9"}]}, "has the width '9', expected"),
        (lambda tree: {**tree, "annotations": [{"id": 4, "image_id": []}]}, r"annotation 4 is of image \[\], which is"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_told(official: Path, tmp_path: Path, change: Callable, says: str) -> None:
    path = official / "annotations/instances_train2017.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=says) as told:
        make(official, tmp_path / "out", split="train2017")
    assert str(path) in str(told.value)
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match="expected COCO's JSON"):
        make(official, tmp_path / "out", split="train2017")


def test_any_polygon_near_the_image_can_be_packed() -> None:
    """Up to an image's side beyond the image on every side: pycocotools must take what is let through."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 60, 2).tolist()
        points = rng.uniform(-1, 2, (int(rng.integers(3, 9)), 2)) * (width, height)
        polygons = [points.ravel().tolist(), [0, 0, width, 0, width, height, 0, height]]  # with all: it is not empty
        found, pixels = _runs(polygons, height, width)
        assert sum(lengths(found["counts"])) == height * width
        assert objects.decoded({**found, "counts": found["counts"].encode()}).sum() == pixels == height * width
