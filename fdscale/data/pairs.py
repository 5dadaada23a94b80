"""Images and masks to pack together: the layout of ADEChallengeData2016.

    images/training/NAME.jpg ...         and, with --split validation, images/validation/; or images alone
    annotations/training/NAME.png ...    the classes of its pixels, numbers of up to 8 bits
    objectInfo150.txt                    names of the classes 1 to 150, by tabs; others have none, and no bound

A mask goes into the shard as it is, as the member .seg.png of its image.
"""

from __future__ import annotations

import os

import numpy as np

from fdscale import UserError
from fdscale.data.decode import Picture, decode_numbers
from fdscale.data.listing import Listing
from fdscale.data.lost import Lost

IMAGES, MASKS, NAMES = "images", "annotations", "objectInfo150.txt"
NONE = 255  # a number that means no class in every set


def has_masks(source: str) -> bool:
    """Whether a folder is one of images and masks."""
    return all(os.path.isdir(os.path.join(source, part)) for part in (IMAGES, MASKS))


def list_pairs(source: str, split: str | None, listing: Listing) -> None:
    """List the images of a split with the masks that belong to them, there or not: what is wrong is found in packing.

    Raises UserError where it is not clear which split is meant.
    """
    folder = os.path.join(source, IMAGES)
    entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda e: e.name)
    splits = [entry.name for entry in entries if entry.is_dir()]
    if split is None and splits:
        raise UserError(f"{source}: holds splits ({', '.join(splits)}); choose one with --split {splits[0]}")
    if split is not None and split not in splits:
        raise UserError(f"{source}: has no split {split} (folders: {', '.join(splits) or 'none'})")
    part = split or ""
    names = _names(source)
    if names:
        listing.give_classes(names, source)
    for name in sorted(os.listdir(os.path.join(folder, part))):
        if not name.startswith("."):
            mask = os.path.join(source, MASKS, part, f"{os.path.splitext(name)[0]}.png")
            listing.add(os.path.join(folder, part, name), None, name=name, mask=mask, most=len(names) or NONE)


def _names(source: str) -> list[str]:
    """The classes from number 1 on, none where they are not told."""
    path = os.path.join(source, NAMES)
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            rows = [[cell.strip() for cell in line.split("\t")] for line in file if line.strip()]
        column = rows[0].index("Name")
        return [row[column] for row in rows[1:]]
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: expected columns by tabs, one of them called Name ({error})") from None


def read_mask(path: str, image: bytes, most: int, check: bool) -> bytes:
    """The bytes of a mask. Raises UserError, naming the file, where it is missing.

    check: and where it is damaged, of another size than the image, or has numbers above `most` other than 255.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"its mask {path} cannot be read ({error.strerror})") from None
    if not check:
        return data
    try:
        numbers, picture = decode_numbers(data), Picture(image)
    except Lost as error:
        raise UserError(f"its mask {path}: {error}") from None
    height, width = numbers.shape
    if (height, width) != (picture.height, picture.width):
        raise UserError(
            f"its mask {path} has {width} x {height} pixels, and the image {picture.width} x {picture.height}"
        )
    largest = int(np.where(numbers == NONE, 0, numbers).max())
    if largest > most:
        raise UserError(f"its mask {path} has the number {largest}, expected 0 to {most}, or {NONE}")
    return data
