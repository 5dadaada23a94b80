"""InstaBoost: objects move with their masks and their pixels, and nothing of them stays behind."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from test_objects import BOOSTED, sample

from fdscale import UserError
from fdscale.data import instaboost, objects
from fdscale.data.instaboost import Scene, around, boosted, groups

UNKNOWN = 255


def scene(*spots: tuple[int, int, int, int], size: tuple[int, int] = (60, 80)) -> Scene:
    """Rectangles x0 y0 x1 y1 of their own colours on a grey image."""
    pixels = np.full((*size, 3), 60, np.uint8)
    masks, stuff = np.zeros((len(spots), *size), bool), np.zeros(size, np.uint8)
    for place, (left, top, right, bottom) in enumerate(spots):
        masks[place, top:bottom, left:right] = True
        masks[:place] &= ~masks[place]
        pixels[top:bottom, left:right] = (250, 200 - 60 * place, 40 * place)
        stuff[top:bottom, left:right] = 7 + place
    return Scene(pixels, masks, stuff)


def test_objects_take_their_pixels_and_classes_along() -> None:
    before = scene((10, 10, 34, 40), (44, 20, 70, 50))
    moved = 0
    for number in range(30):
        after = boosted(before, 0, number, UNKNOWN)
        again = boosted(before, 0, number, UNKNOWN)
        assert all(np.array_equal(a, b) for a, b in zip(after, again, strict=True))
        covered = after.masks.any(0)
        for place, mask in enumerate(after.masks):
            assert 0.6 * before.masks[place].sum() < mask.sum() < 1.5 * before.masks[place].sum()
            shift = np.abs(around(after.masks)[place] - around(before.masks)[place]).max()
            assert shift <= 30 * (1 / 15 + 0.1 + 0.02) + 2
            moved += shift > 1
            inside = after.pixels[instaboost.library().erode(mask.astype(np.uint8), np.ones((5, 5))) > 0]
            assert np.abs(inside.astype(int) - (250, 200 - 60 * place, 40 * place)).max() <= 2
            assert (after.stuff[mask] == 7 + place).mean() > 0.9
        near = instaboost.library().dilate(covered.astype(np.uint8), np.ones((5, 5))) > 0
        assert np.abs(after.pixels[~near].astype(int) - 60).max() <= 4  # painted from around
        left = before.masks.any(0) & ~covered
        assert (after.stuff[left & ~near] == UNKNOWN).all()
        assert not (after.stuff[~near] >= 7)[after.stuff[~near] != UNKNOWN].any()
    assert moved > 40


def test_without_movement_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, still in (("RESIZED", (1.0, 1.0)), ("TURNED", 0.0), ("MOVED", 0.0)):
        monkeypatch.setattr(instaboost, name, still)
    before = scene((10, 10, 30, 40), (22, 20, 50, 50))
    after = boosted(before, 0, 0, UNKNOWN)
    assert np.array_equal(after.masks, before.masks)
    assert np.array_equal(after.stuff[after.masks.any(0)], before.stuff[after.masks.any(0)])
    assert np.abs(after.pixels.astype(int) - before.pixels).max() <= 250 * 0.5  # edges alone are blurred
    assert (after.pixels == before.pixels).all(-1).mean() > 0.9


def test_what_overlaps_goes_together() -> None:
    before = scene((10, 10, 30, 40), (20, 20, 46, 50), (56, 10, 70, 20))
    assert groups(around(before.masks)) == [[0, 1], [2]]
    assert groups(np.array([[0, 0, 2, 2], [2, 0, 4, 2], [0, 0, 0, 0], [1, 1, 3, 2.0]])) == [[0, 1, 3]]
    for number in range(20):
        after = boosted(before, 1, number, UNKNOWN)
        first, second = (around(after.masks)[place] for place in (0, 1))
        assert not (after.masks.sum(0) > 1).any()
        factor = (second[2] - second[0]) / 26
        assert first[0] - second[0] == pytest.approx(-10 * factor, abs=2)


def test_the_smaller_is_in_front() -> None:
    for number in range(50):
        after = boosted(scene((4, 4, 60, 56), (61, 28, 67, 34)), 2, number, UNKNOWN)
        assert not (after.masks.sum(0) > 1).any()
        assert after.masks[1].sum() >= 16


def test_what_vanishes_has_no_box(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instaboost, "RESIZED", (0.1, 0.2))
    before = scene((4, 4, 50, 56), (45, 2, 46, 58))  # together, and the line falls between pixels
    lines = [boosted(before, 2, number, UNKNOWN).masks[1] for number in range(20)]
    assert any(not line.any() for line in lines)
    assert around(np.zeros((1, 4, 4), bool)).tolist() == [[0, 0, 0, 0]]
    nothing = scene()
    assert boosted(nothing, 0, 0, UNKNOWN) is nothing


def test_only_so_many_images_and_no_crowd() -> None:
    image, member, pixels, _ = sample(1)
    plain = {**BOOSTED, "instaboost": 0.0, "jitter": (1.0, 1.0), "flip": 0.0}
    changed = 0
    for number in range(60):
        alone = objects.train_scene(image, member, number=number, **plain)
        seen = objects.train_scene(image, member, number=number, **{**plain, "instaboost": 0.5})
        changed += not np.array_equal(alone.image, seen.image)
    assert 18 < changed < 42
    tree = json.loads(member)
    for one in tree["objects"]:
        one["crowd"] = True
    crowds = objects.train_scene(image, json.dumps(tree).encode(), number=0, **{**plain, "instaboost": 1.0})
    assert np.array_equal(crowds.image, objects.train_scene(image, member, number=0, **plain).image)
    stuff = io.BytesIO()
    Image.fromarray(np.full(pixels.shape[:2], 3, np.uint8)).save(stuff, "PNG")
    seen = objects.train_scene(image, member, stuff.getvalue(), number=0, **{**plain, "instaboost": 1.0})
    assert {3, UNKNOWN} == set(seen.alike["stuff"].unique().tolist())


def test_without_opencv_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    instaboost.library.cache_clear()
    try:
        with pytest.raises(UserError, match=r"detect.instaboost needs OpenCV.*pip install 'fdscale\[instaboost\]'"):
            instaboost.library()
    finally:
        instaboost.library.cache_clear()
