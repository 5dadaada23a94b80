"""COCO's average precision, by pycocotools, each image counted once over all ranks."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fdscale import dist
from fdscale.data.objects import Annotated

MOST = 100  # detections of an image that count
KINDS = {"box": "bbox", "mask": "segm"}
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # pycocotools' stats, in its order
RECALL = 8  # which of them is the recall with 100 detections


class Found(NamedTuple):
    """Detections on an image in its own pixels, the surest first: boxes (n, 4) x0 y0 x1 y1, scores (n,), classes (n,);
    masks: run lengths of pycocotools, or None."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: list[dict[str, Any]] | None = None


class Scores(NamedTuple):
    """Of each kind, box and perhaps mask: shares in [0, 1] by the NAMES and "ar", NaN where nothing is counted; the
    average precision of each class, NaN where it has no object. images, objects: how many were counted."""

    kinds: dict[str, dict[str, float]]
    classes: dict[str, list[float]]
    images: int
    objects: int

    def flat(self) -> dict[str, float]:
        """box_ap, box_ap50, ..., mask_ap, ..."""
        return {f"{kind}_{name}": value for kind, found in self.kinds.items() for name, value in found.items()}


class AveragePrecision:
    """Gathers what is there and what was found.

    classes: K. kinds: box, and mask where masks are there.
    """

    def __init__(self, classes: int, kinds: Sequence[str]) -> None:
        self._classes, self._kinds = classes, kinds
        self._rows: dict[int, tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]] = {}

    def add(self, number: int, known: Annotated, found: Found) -> None:
        """An image by its number in the set."""
        height, width = known.size
        objects = []
        for place, (box, kind) in enumerate(zip(known.boxes.tolist(), known.classes.tolist(), strict=True)):
            one = {
                "image_id": number,
                "category_id": kind,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "area": float(known.areas[place]),
                "iscrowd": int(known.crowd[place]),
            }
            if known.masks is not None:
                one["segmentation"] = known.masks[place]
            objects.append(one)
        about = {"id": number, "height": height, "width": width, "name": known.image_id}
        self._rows[number] = (about, objects, _listed(number, found))

    def result(self) -> Scores | None:
        """The scores over all ranks, None where there is no image; a collective."""
        rows = self._everywhere()
        if not rows:
            return None
        scores = None
        if dist.rank() == 0:
            scores = self._scores([rows[number] for number in sorted(rows)])
        return dist.gather(scores)[0]

    def submission(self, categories: Sequence[Any]) -> list[dict[str, Any]]:
        """What was found as the official server takes it; categories: the number of each class. A collective."""
        rows = self._everywhere()
        return [
            {
                **one,
                "image_id": rows[number][0]["name"],
                "category_id": categories[one["category_id"]],
                **({"segmentation": _text(one["segmentation"])} if "segmentation" in one else {}),
            }
            for number in sorted(rows)
            for one in rows[number][2]
        ]

    def _everywhere(self) -> dict[int, Any]:
        parts = dist.gather(self._rows)
        rows = {number: row for part in parts for number, row in part.items()}
        assert len(rows) == sum(map(len, parts)), "an image was counted twice"
        return rows

    def _scores(self, rows: list[tuple[dict, list, list]]) -> Scores:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        there, found = COCO(), COCO()
        categories = [{"id": number} for number in range(self._classes)]
        objects = [dict(one) for _, known, _ in rows for one in known]
        detections = [dict(one) for _, _, some in rows for one in some]
        images = [about for about, _, _ in rows]
        for number, one in enumerate([*objects, *detections], start=1):  # pycocotools takes 0 for "unmatched"
            one["id"] = number
        for one in detections:
            one["area"], one["iscrowd"] = one["bbox"][2] * one["bbox"][3], 0
        kinds, classes = {}, {}
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            for coco, annotations in ((there, objects), (found, detections)):
                coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
                coco.createIndex()
            for kind in self._kinds:
                if kind == "mask":
                    _areas_of_masks(detections)
                judged = COCOeval(there, found, KINDS[kind])
                judged.params.maxDets = [1, 10, MOST]
                judged.evaluate()
                judged.accumulate()
                judged.summarize()
                stats = [float(value) if value > -1 else math.nan for value in judged.stats]
                kinds[kind] = dict(zip(NAMES, stats, strict=False)) | {"ar": stats[RECALL]}
                precision = judged.eval["precision"][:, :, :, 0, 2]  # thresholds, recalls, classes
                classes[kind] = [_mean(precision[:, :, number]) for number in range(self._classes)]
        return Scores(kinds, classes, len(rows), sum(not one["iscrowd"] for one in objects))


def _listed(number: int, found: Found) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for place, (box, score, kind) in enumerate(
        zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
    ):
        one = {
            "image_id": number,
            "category_id": kind,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "score": score,
        }
        if found.masks is not None:
            one["segmentation"] = found.masks[place]
        rows.append(one)
    return rows


def _areas_of_masks(detections: list[dict[str, Any]]) -> None:
    """As COCO.loadRes does for masks: small, medium and large are by the pixels of the mask."""
    from pycocotools import mask

    for one in detections:
        one["area"] = float(mask.area(one["segmentation"]))


def _text(runs: dict[str, Any]) -> dict[str, Any]:
    counts = runs["counts"]
    return {"size": list(runs["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def _mean(precision: np.ndarray) -> float:
    kept = precision[precision > -1]
    return float(kept.mean()) if kept.size else math.nan
