"""Average precision against an implementation of others, and a plain loop, on random and adversarial detections."""

from __future__ import annotations

import math

import numpy as np
import pytest
from faster_coco_eval import COCO as TheirCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools import mask as runs

from fdscale.data.objects import Annotated
from fdscale.tasks.average_precision import AveragePrecision, Found

SIZE, CLASSES = (60, 80), 3


def encoded(box: np.ndarray, rng: np.random.Generator) -> dict:
    """A mask that fills most of a box."""
    mask = np.zeros(SIZE, np.uint8)
    x0, y0, x1, y1 = box.round().astype(int)
    mask[y0:y1, x0:x1] = rng.random((max(y1 - y0, 0), max(x1 - x0, 0))) < 0.9
    return runs.encode(np.asfortranarray(mask))


def some_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    low = np.stack((rng.uniform(0, 70, count), rng.uniform(0, 50, count)), 1)
    high = np.minimum(low + rng.uniform(3, 60, (count, 2)), [SIZE[1], SIZE[0]])
    return np.concatenate((low, high), 1).astype(np.float32)


def image(rng: np.random.Generator, kind: str) -> tuple[Annotated, Found]:
    """Objects, and detections near some of them."""
    count = 0 if kind == "nothing there" else int(rng.integers(1, 8))
    boxes, classes = some_boxes(rng, count), rng.integers(0, CLASSES, count)
    crowd = np.full(count, kind == "crowds") | (rng.random(count) < 0.1)
    masks = [encoded(box, rng) for box in boxes]
    areas = np.array([float(runs.area(one)) for one in masks], np.float32)
    known = Annotated(SIZE, f"name {rng.integers(1000)}", boxes, classes.astype(np.int64), crowd, areas, masks)
    near = boxes + rng.normal(scale=3, size=boxes.shape).astype(np.float32)
    near = np.clip(near, 0, [SIZE[1], SIZE[0]] * 2).astype(np.float32)
    near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
    found = np.concatenate((near, some_boxes(rng, 5), boxes if kind == "twice" else boxes[:0]))
    labels = np.concatenate((classes, rng.integers(0, CLASSES, len(found) - count)))
    scores = rng.random(len(found))
    if kind == "ties":
        scores = scores.round(1)
    if kind == "nothing found":
        found, labels, scores = found[:0], labels[:0], scores[:0]
    order = np.argsort(-scores, kind="stable")
    shapes = [encoded(box, rng) if kind != "empty masks" else encoded(box * 0, rng) for box in found[order]]
    return known, Found(found[order], scores[order], labels[order], shapes)


def theirs(images: list[tuple[Annotated, Found]], kind: str) -> dict[str, float]:
    tree: dict = {"images": [], "annotations": [], "categories": [{"id": n, "name": str(n)} for n in range(CLASSES)]}
    rows = []
    for number, (known, found) in enumerate(images):
        tree["images"].append({"id": number, "height": SIZE[0], "width": SIZE[1]})
        for place, box in enumerate(known.boxes.tolist()):
            tree["annotations"].append({
                "id": len(tree["annotations"]) + 1, "image_id": number, "category_id": int(known.classes[place]),
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "area": float(known.areas[place]),
                "iscrowd": int(known.crowd[place]),
                "segmentation": {"size": list(SIZE), "counts": known.masks[place]["counts"].decode()},
            })  # fmt: skip
        for place, box in enumerate(found.boxes.tolist()):
            rows.append({
                "image_id": number, "category_id": int(found.classes[place]), "score": float(found.scores[place]),
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "segmentation": {"size": list(SIZE), "counts": found.masks[place]["counts"].decode()},
            })  # fmt: skip
    if kind == "mask":  # as Detectron2 and mmdetection do: with a box, its area would decide what is small
        rows = [{name: value for name, value in row.items() if name != "bbox"} for row in rows]
    there = TheirCOCO(tree)
    judged = COCOeval_faster(
        there, there.loadRes(rows), "bbox" if kind == "box" else "segm", print_function=lambda *_: None
    )
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    stats = [value if value > -1 else math.nan for value in judged.stats]
    return dict(zip(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"), stats, strict=False)) | {
        "ar": stats[8]
    }


@pytest.mark.parametrize("kind", ["usual", "nothing there", "nothing found", "crowds", "ties", "twice", "empty masks"])
def test_equals_faster_coco_eval(kind: str) -> None:
    """Some images of a kind among usual ones."""
    rng = np.random.default_rng(len(kind))
    images = [image(rng, kind if number % 2 else "usual") for number in range(12)]
    tally = AveragePrecision(CLASSES, ("box", "mask"))
    for number in reversed(range(12)):
        tally.add(number, *images[number])
    scores = tally.result()
    assert scores.images == 12
    assert scores.objects == sum(int((~known.crowd).sum()) for known, _ in images)
    for which in ("box", "mask"):
        wanted = theirs(images, which)
        assert scores.kinds[which] == pytest.approx(wanted, rel=1e-9, nan_ok=True)
        known = [value for value in scores.classes[which] if not math.isnan(value)]
        assert scores.kinds[which]["ap"] == pytest.approx(np.mean(known))


def test_a_plain_loop_at_one_threshold_agrees() -> None:
    """AP50 of one class: detections by score, each takes the best free object, precision made monotone, 101 points."""
    rng = np.random.default_rng(5)
    images = []
    for _ in range(8):
        boxes = some_boxes(rng, 4)
        count = len(boxes)
        known = Annotated(
            SIZE, 0, boxes, np.zeros(count, np.int64), np.zeros(count, bool), np.full(count, 2000, np.float32), None
        )
        near = np.clip(boxes + rng.normal(scale=4, size=boxes.shape), 0, 80).astype(np.float32)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        found = np.concatenate((near, some_boxes(rng, 3)))
        images.append((known, Found(found, rng.random(len(found)), np.zeros(len(found), np.int64))))
    tally = AveragePrecision(1, ("box",))
    for number, one in enumerate(images):
        tally.add(number, *one)

    def iou(a: np.ndarray, b: np.ndarray) -> float:
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        shared = float(np.prod(np.maximum(sides, 0)))
        return shared / (float(np.prod(a[2:] - a[:2])) + float(np.prod(b[2:] - b[:2])) - shared)

    rows = sorted(((s, n, p) for n, (_, f) in enumerate(images) for p, s in enumerate(f.scores)), reverse=True)
    free, right = {(n, p) for n in range(8) for p in range(4)}, []
    for _, n, p in rows:
        known, found = images[n]
        best = max(((iou(found.boxes[p], known.boxes[q]), q) for q in range(4) if (n, q) in free), default=(0, 0))
        right.append(best[0] >= 0.5)
        if right[-1]:
            free.discard((n, best[1]))
    hits = np.cumsum(right)
    precision, recall = hits / (np.arange(len(rows)) + 1), hits / 32
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    points = [monotone[recall >= r].max() if (recall >= r).any() else 0.0 for r in np.linspace(0, 1, 101)]
    assert tally.result().kinds["box"]["ap50"] == pytest.approx(np.mean(points), rel=1e-9)


def test_nothing_at_all_is_none_and_a_submission_has_the_official_numbers() -> None:
    tally = AveragePrecision(CLASSES, ("box", "mask"))
    assert tally.result() is None
    rng = np.random.default_rng(0)
    known, found = image(rng, "usual")
    tally.add(4, known, found)
    rows = tally.submission([1, 5, 90])
    assert [row["score"] for row in rows] == found.scores.tolist()
    assert {row["image_id"] for row in rows} == {known.image_id}
    assert [row["category_id"] for row in rows] == [[1, 5, 90][number] for number in found.classes]
    assert all(isinstance(row["segmentation"]["counts"], str) for row in rows)
    box = found.boxes[0]
    assert rows[0]["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]])
