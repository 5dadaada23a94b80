"""InstaBoost (arXiv 1908.07801): the objects of an image are moved, turned and resized a little where they are, and
what they leave behind is painted from around. A pure function of (seed, number).

As its authors' code with the random placement that mmdetection's configurations have, but for the edges of objects,
which are blurred where they are matted there, and for the colours, which stay.

Letters: H W the image's size, n objects of it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fdscale import UserError
from fdscale.data.order import philox

RESIZED = (0.8, 1.2)
TURNED = 1.0  # degrees to either side
MOVED = 1 / 15  # of the box's sides, to either side
AROUND = 5  # pixels that painting looks at
EDGE = 3  # pixels over which an object's edge is blurred, odd


class Scene(NamedTuple):
    """pixels (H, W, 3) uint8; masks (n, H, W) bool; stuff: classes of pixels (H, W) uint8, or None."""

    pixels: np.ndarray
    masks: np.ndarray
    stuff: np.ndarray | None


@functools.cache
def library() -> Any:
    """OpenCV, without threads of its own. Raises UserError where it is missing."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "detect.instaboost needs OpenCV, which is not installed: pip install 'fdscale[instaboost]', or leave it "
            "at 0"
        ) from None
    cv2.setNumThreads(0)
    return cv2


def boosted(scene: Scene, seed: int, number: int, unknown: int) -> Scene:
    """The objects elsewhere; those whose boxes overlap go together, and the larger are behind.

    unknown: the class of pixels that no object covers any more. A mask that is covered by others may be empty.
    """
    cv2 = library()
    if not scene.masks.any():
        return scene
    (height, width), masks = scene.masks.shape[1:], scene.masks.copy()
    left = cv2.dilate(scene.masks.any(0).astype(np.uint8), np.ones((3, 3), np.uint8))
    pixels = cv2.inpaint(scene.pixels, left, AROUND, cv2.INPAINT_NS)
    stuff = None if scene.stuff is None else np.where(left > 0, np.uint8(unknown), scene.stuff)
    together = groups(around(scene.masks))
    areas = [scene.masks[group].any(0).sum() for group in together]
    for place in np.argsort(-np.array(areas), kind="stable").tolist():
        group = together[place]
        before = scene.masks[group]
        turn = _transform(around(np.any(before, 0)[None])[0], seed, number, place)
        warp = functools.partial(cv2.warpAffine, M=turn, dsize=(width, height))
        share = cv2.GaussianBlur(before.any(0).astype(np.float32), (EDGE, EDGE), 0)
        share = warp(share, flags=cv2.INTER_LINEAR)[..., None]
        moved = warp(scene.pixels, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        pixels = (pixels + share * (moved.astype(np.float32) - pixels)).round().astype(np.uint8)
        after = np.stack([warp(mask.astype(np.uint8), flags=cv2.INTER_NEAREST) > 0 for mask in before])
        masks &= ~after.any(0)
        masks[group] = after
        if stuff is not None:
            assert scene.stuff is not None
            stuff = np.where(after.any(0), warp(scene.stuff, flags=cv2.INTER_NEAREST), stuff)
    return Scene(pixels, masks, stuff)


def around(masks: np.ndarray) -> np.ndarray:
    """(n, H, W) bool -> (n, 4) float32, x0 y0 x1 y1 around them; zeros for a mask that is empty."""
    found = np.zeros((len(masks), 4), np.float32)
    for place, mask in enumerate(masks):
        if mask.any():
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            found[place] = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return found


def groups(boxes: np.ndarray) -> list[list[int]]:
    """Places of boxes (n, 4) that hang together by overlaps; empty ones are left out."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    meet = np.all((low < boxes[None, :, 2:]) & (boxes[None, :, :2] < high), -1)
    left, found = set(np.all(boxes[:, 2:] > boxes[:, :2], 1).nonzero()[0].tolist()), []
    while left:
        group, edge = [], [min(left)]
        left.discard(edge[0])
        while edge:
            one = edge.pop()
            group.append(one)
            near = [other for other in left if meet[one, other]]
            left.difference_update(near)
            edge += near
        found.append(sorted(group))
    return found


def _transform(box: np.ndarray, seed: int, number: int, place: int) -> np.ndarray:
    """(2, 3): how the group of this place moves about the centre of its box."""
    size, turn, right, down = ((philox(seed, number, (place, 12, 0, 0), 4) >> np.uint64(11)) * 2.0**-53).tolist()
    factor = RESIZED[0] + (RESIZED[1] - RESIZED[0]) * size
    centre = ((box[:2] + box[2:]) / 2 - 0.5).tolist()  # OpenCV's pixels are centred on whole numbers
    matrix = library().getRotationMatrix2D(centre, TURNED * (2 * turn - 1), factor)
    matrix[:, 2] += MOVED * (2 * np.array([right, down]) - 1) * (box[2:] - box[:2])
    return matrix
