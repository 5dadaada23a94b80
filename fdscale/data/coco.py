"""Images and their objects to pack together: the layouts of COCO and of Objects365.

    train2017/NAME.jpg ...                        --split train2017
    annotations/instances_train2017.json
    stuffthingmaps/train2017/NAME.png ...         optional: the classes of pixels, 255 for none

    train/patch0/NAME.jpg ...                     --split train
    annotations/zhiyuan_objv2_train.json          or train/zhiyuan_objv2_train.json

Objects go into the shard as the member .objects.json of their image:

    {"image_id": 139, "width": W, "height": H, "objects": [{"class": 0, "box": [x0, y0, x1, y1], "area": 1.5,
     "crowd": false, "mask": {"size": [H, W], "counts": "..."}}, ...]}

where a class is the place of a category in the order of ids (categories.json lists these beside the shards), boxes are
corners in pixels, and masks, where a set has any, are run lengths as COCO compresses them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from fdscale import UserError
from fdscale.data.decode import Picture
from fdscale.data.listing import Listing
from fdscale.data.lost import Lost

FOLDER, STUFF = "annotations", "stuffthingmaps"
FILES = ("instances_{}.json", "zhiyuan_objv2_{}.json")
MOST = 2**31  # no number of an annotation is as large


def splits_of(source: str) -> dict[str, str]:
    """The file with the objects of each split of a folder; empty where it has no such layout."""
    splits = sorted(entry.name for entry in os.scandir(source) if entry.is_dir() and not entry.name.startswith("."))
    found: dict[str, str] = {}
    for pattern in FILES:  # asked for by name: a folder of images may hold more than one wants to list
        for split in splits:
            for folder in (FOLDER, split):
                path = os.path.join(source, folder, pattern.format(split))
                if os.path.isfile(path):
                    found.setdefault(split, path)
    return found


def list_objects(source: str, split: str | None, listing: Listing) -> None:
    """List the images of a split with what is on them. Raises UserError where the file cannot be understood."""
    splits = splits_of(source)
    if split not in splits:
        wrong = "choose one with" if split is None else f"has no split {split}; choose one with"
        raise UserError(f"{source}: holds objects ({', '.join(splits)}); {wrong} --split {next(iter(splits))}")
    path = splits[split]
    images, annotations, categories = _read(path)
    listing.give_classes([str(one.get("name", one["id"])) for one in categories], path)
    listing.categories = [one["id"] for one in categories]
    number_of = {one["id"]: number for number, one in enumerate(categories)}
    of_image: dict[Any, list[dict[str, Any]]] = {one["id"]: [] for one in images}
    masks = any(_has_mask(one) for one in annotations)
    for one in annotations:
        if not _is_id(one.get("image_id")) or one["image_id"] not in of_image:
            raise UserError(
                f"{path}: annotation {one.get('id')} is of image {one.get('image_id')}, which is not listed"
            )
        of_image[one["image_id"]].append(one)
    for image in images:
        name = image["file_name"]
        known = {
            "image_id": image["id"],
            "width": image.get("width"),
            "height": image.get("height"),
            "masks": masks,
            "objects": [_object(one, number_of) for one in of_image.pop(image["id"])],
        }
        stuff = os.path.join(source, STUFF, split, f"{os.path.splitext(name)[0]}.png")
        listing.add(
            _place(source, split, name),
            None,
            name=os.path.basename(name),
            mask=stuff if os.path.isdir(os.path.dirname(stuff)) else "",
            most=255,
            objects=json.dumps(known),
        )


def _place(source: str, split: str, name: str) -> str:
    """Where an image lies: COCO tells its name, Objects365 folders that are not those of its archives."""
    parts = name.split("/")
    patch = [part for part in parts[:-1] if part.startswith("patch")]
    return os.path.join(source, split, *patch[-1:], parts[-1])


def _read(path: str) -> tuple[list[dict], list[dict], list[dict]]:
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
        images, annotations, categories = (_rows(tree, name) for name in ("images", "annotations", "categories"))
        _tell_apart("images", images)
        _tell_apart("categories", categories)
        for one in images:
            if not isinstance(one.get("file_name"), str):
                raise ValueError(f"image {one['id']} has the file_name {one.get('file_name')!r}, expected text")
            for side in ("width", "height"):
                if not isinstance(one.get(side), int | None) or isinstance(one.get(side), bool):
                    raise ValueError(f"image {one['id']} has the {side} {one[side]!r}, expected a number of pixels")
        return images, annotations, sorted(categories, key=lambda one: one["id"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected COCO's JSON with images, annotations and categories ({type(error).__name__}: {error})"
        ) from None


def _rows(tree: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(tree, dict) or not isinstance(tree[name], list):
        raise ValueError(f"{name} is no list" if isinstance(tree, dict) else "it is no mapping")
    for place, one in enumerate(tree[name]):
        if not isinstance(one, dict):
            raise ValueError(f"{name}[{place}] is {str(one)[:80]}, expected a mapping")
    return tree[name]


def _tell_apart(name: str, rows: list[dict[str, Any]]) -> None:
    """Raises ValueError where an id is missing or comes twice."""
    seen = set()
    for place, one in enumerate(rows):
        if not _is_id(one.get("id")):
            raise ValueError(f"{name}[{place}] has the id {one.get('id')!r}, expected a whole number or text")
        if one["id"] in seen:
            raise ValueError(f"{name} has the id {one['id']!r} twice")
        seen.add(one["id"])


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _has_mask(annotation: dict[str, Any]) -> bool:
    return bool(annotation.get("segmentation"))


def _object(annotation: dict[str, Any], number_of: dict[Any, int]) -> dict[str, Any]:
    """What of an annotation is packed, not looked at yet."""
    category = annotation.get("category_id")
    return {
        "id": annotation.get("id"),
        "category": category,
        "class": number_of.get(category) if _is_id(category) else None,
        "bbox": annotation.get("bbox"),
        "area": annotation.get("area"),
        "crowd": annotation.get("iscrowd", annotation.get("isfake", 0)),
        "segmentation": annotation.get("segmentation"),
    }


def packed(objects: str, image: bytes) -> tuple[bytes, list[str]]:
    """The member .objects.json of what `list_objects` has listed, and what was left out of it and why.

    Raises UserError where the image has another size than was said.
    """
    known = json.loads(objects)
    try:
        picture = Picture(image)
    except Lost as error:
        raise UserError(str(error)) from None
    height, width = picture.height, picture.width
    told = known["height"], known["width"]
    if None not in told and told != (height, width):
        raise UserError(f"the image has {width} x {height} pixels, its annotations say {told[1]} x {told[0]}")
    kept, left_out = [], []
    for one in known["objects"]:
        try:
            kept.append(_checked(one, height, width, known["masks"]))
        except ValueError as error:
            left_out.append(f"annotation {one['id']}: {error}")
    member = {"image_id": known["image_id"], "width": width, "height": height, "objects": kept}
    return json.dumps(member, separators=(",", ":")).encode(), left_out


def _checked(one: dict[str, Any], height: int, width: int, masks: bool) -> dict[str, Any]:
    """An object as it is packed. Raises ValueError where it cannot be used."""
    if one["class"] is None:
        raise ValueError(f"category {one['category']} is none of the categories")
    box = one["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise ValueError(f"its box is {box}, expected [x, y, width, height]")
    x, y, w, h = (float(value) for value in box)
    if w <= 0 or h <= 0:
        raise ValueError(f"its box is {w:g} x {h:g} pixels")
    corners = [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
    if corners[2] <= corners[0] or corners[3] <= corners[1]:
        raise ValueError("its box is outside of the image")
    corners = [round(value, 3) for value in corners]
    if not (np.diff(np.array(corners, np.float32).reshape(2, 2), axis=0) > 0).all():  # as they are read again
        raise ValueError("of its box is nothing inside of the image")
    if one["crowd"] not in (0, 1):
        raise ValueError(f"its iscrowd is {one['crowd']!r}, expected 0 or 1")
    found = {"class": one["class"], "box": corners, "crowd": bool(one["crowd"])}
    area = w * h
    if masks:
        found["mask"], area = _runs(one["segmentation"], height, width)
    found["area"] = float(one["area"]) if _is_number(one["area"]) and one["area"] >= 0 else area
    return found


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a picture may have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST


def _runs(segmentation: Any, height: int, width: int) -> tuple[dict[str, Any], float]:
    """A mask as compressed run lengths, and its pixels, from polygons or run lengths. Raises ValueError."""
    from pycocotools import mask as runs

    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if size != [height, width]:
            raise ValueError(f"its mask is of {size}, expected {[height, width]}")
        if isinstance(counts, list):
            if not all(isinstance(run, int) and run >= 0 for run in counts) or sum(counts) != height * width:
                raise ValueError("its mask has run lengths that do not sum up to the image")
            found = runs.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        elif isinstance(counts, str):
            found = {"size": [height, width], "counts": counts.encode()}
            if sum(lengths(counts)) != height * width:
                raise ValueError("its mask has run lengths that do not sum up to the image")
        else:
            raise ValueError("its mask has no run lengths")
    else:
        found = runs.merge(runs.frPyObjects(_polygons(segmentation, height, width), height, width))
    pixels = float(runs.area(found))
    if pixels == 0:
        raise ValueError("its mask is empty")
    return {"size": [height, width], "counts": found["counts"].decode()}, pixels


def _polygons(segmentation: Any, height: int, width: int) -> list[list[float]]:
    """Those of three points and more; two enclose nothing. Raises ValueError where there are none, or strange ones."""
    if not segmentation:
        raise ValueError("it has no mask")
    if not isinstance(segmentation, list):
        raise ValueError(f"its mask is {str(segmentation)[:80]}, expected polygons or run lengths")
    for line in segmentation:
        if not isinstance(line, list) or len(line) % 2 or not all(_is_number(value) for value in line):
            raise ValueError(f"its mask has the polygon {str(line)[:80]}, expected [x, y, x, y, x, y, ...]")
        for values, side in ((line[::2], width), (line[1::2], height)):
            # pycocotools follows edges point by point, without a look at memory or at what an int can hold
            if values and not -side <= min(values) <= max(values) <= 2 * side:
                raise ValueError(f"its mask has a polygon far outside of the image, at {min(values)} to {max(values)}")
    polygons = [line for line in segmentation if len(line) >= 6]
    if not polygons:
        raise ValueError("its mask has no polygon of three points")
    return polygons


def lengths(counts: str) -> list[int]:
    """The run lengths of a compressed mask: 5 bits a character, and from the third on what is added to the one but
    last (COCO's maskApi). Raises ValueError for what is none."""
    found: list[int] = []
    for run in _numbers(counts):
        found.append(run + (found[-2] if len(found) > 2 else 0))
        if found[-1] < 0:
            raise ValueError("its mask has a negative run length")
    return found


def _numbers(counts: str) -> Iterator[int]:
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise ValueError("its mask has run lengths that cannot be read")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            yield value - (1 << shift) if bits & 16 else value
            value = shift = 0
    if shift:
        raise ValueError("its mask has run lengths that are cut off")
