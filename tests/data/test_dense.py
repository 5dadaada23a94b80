"""Scenes: image and mask stay together, draws depend on (seed, number) alone, colours against colorsys, packing."""

from __future__ import annotations

import colorsys
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import scenes
import torch
from PIL import Image

from fdscale import UserError
from fdscale.data import dense
from fdscale.data.decode import decode_numbers
from fdscale.data.dense import IGNORED, OUTSIDE, classes_of, fitted, scene, train_scene, uniform
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.listing import Columns
from fdscale.data.lost import Lost
from fdscale.data.order import Order
from fdscale.data.photometric import distorted, recoloured
from fdscale.data.recode import Recoding
from fdscale.data.shards import make
from fdscale.data.stream import MASK, Samples, batches, evaluation_batches

COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 10], [10, 240, 240]], np.uint8)
USUAL = {
    "seed": 0,
    "size": 48,
    "bounds": (200, 50),
    "ratio": (0.5, 2.0),
    "most_of_a_class": 0.75,
    "flip": 0.5,
    "distort": False,
    "interpolation": "bilinear",
    "classes": 5,
    "reduce_zero_label": False,
}


def png(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def blocks(seed: int, height: int = 60, width: int = 80) -> tuple[bytes, bytes]:
    """An image of tiles of 20 pixels, each of the colour of its class, and its mask."""
    tiles = np.random.default_rng(seed).integers(0, len(COLOURS), (height // 20, width // 20))
    mask = tiles.repeat(20, 0).repeat(20, 1).astype(np.uint8)
    return png(COLOURS[mask]), png(mask)


def test_image_and_mask_stay_together() -> None:
    """Almost every pixel has its class's colour, those at edges apart; beyond the edge there is nothing."""
    flips = 0
    for number in range(40):
        image, mask = train_scene(*blocks(number % 5), number=number, **USUAL)
        assert image.shape == (3, 48, 48)
        assert mask.shape == (48, 48)
        assert image.dtype == mask.dtype == torch.uint8
        outside = mask == OUTSIDE
        assert not image[:, outside].any()
        assert outside.flatten().sort().values.diff().count_nonzero() <= 1
        shown = image.permute(1, 2, 0)[~outside].float()
        nearest = torch.cdist(shown, torch.from_numpy(COLOURS).float()).argmin(1)
        assert (nearest == mask[~outside]).float().mean() > 0.88, number
        flips += uniform(0, number)[1] < 0.5
    assert 10 < flips < 30


def test_a_view_is_a_function_of_seed_and_number() -> None:
    image, mask = blocks(1)
    first = [train_scene(image, mask, number=number, **{**USUAL, "distort": True}) for number in range(8)]
    again = [train_scene(image, mask, number=number, **{**USUAL, "distort": True}) for number in reversed(range(8))]
    for one, other in zip(first, reversed(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    other = train_scene(image, mask, number=0, **{**USUAL, "seed": 1})
    assert not torch.equal(other[0], first[0][0])
    assert len({tuple(one[0].flatten().tolist()) for one in first}) == 8


def test_a_crop_has_several_classes_where_it_can() -> None:
    """A picture three quarters of which is one class: all crops but the last tried must have less of it."""
    known = np.zeros((200, 200), np.uint8)
    known[100:, 100:] = 1
    image, mask = png(np.zeros((200, 200, 3), np.uint8)), png(known)
    settings = {**USUAL, "bounds": (200, 200), "ratio": (1.0, 1.0), "size": 60}
    shares = {most: [] for most in (0.75, 1.0)}
    for most, found in shares.items():
        for number in range(60):
            _, seen = train_scene(image, mask, number=number, **{**settings, "most_of_a_class": most})
            found.append(seen.flatten().bincount().max().item() / seen.numel() <= 0.75)
    assert np.mean(shares[1.0]) < 0.4
    assert np.mean(shares[0.75]) > 0.8


def test_mostly_ignored_crops_are_taken_as_they_are() -> None:
    empty = np.full((60, 60), IGNORED, np.uint8)
    _, seen = train_scene(png(np.zeros((60, 60, 3), np.uint8)), png(empty), number=3, **USUAL)
    assert set(seen.unique().tolist()) <= {IGNORED, OUTSIDE}


@pytest.mark.parametrize(
    ("size", "bounds", "factor", "wanted"),
    [
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((100, 900), (2048, 512), 1.0, (228, 2048)),  # the long side decides
        ((300, 200), (2048, 512), 0.5, (384, 256)),
        ((1, 5000), (2048, 512), 1.0, (1, 2048)),
        ((683, 512), (2048, 512), 1.25, (854, 640)),
    ],
)
def test_sizes_are_mmcvs(size: tuple[int, int], bounds: tuple[int, int], factor: float, wanted: tuple) -> None:
    assert fitted(size, bounds, factor) == wanted


def test_zero_is_no_class_where_asked() -> None:
    numbers = np.array([[0, 1, 150, 255]], np.uint8)
    assert classes_of(numbers, 150, True).tolist() == [[IGNORED, 0, 149, IGNORED]]
    assert classes_of(numbers, 151, False).tolist() == [[0, 1, 150, IGNORED]]
    for wrong, reduce, says in (
        (151, True, "number 151, expected 1 to 150, or 0 or 255"),
        (150, False, "number 150, expected 0 to 149, or 255"),
        (254, True, "number 254"),
    ):
        with pytest.raises(Lost, match=says):
            classes_of(np.array([[wrong]], np.uint8), 150, reduce)


def test_what_does_not_fit_is_lost() -> None:
    image, mask = blocks(0)
    how = {"classes": 5, "reduce_zero_label": False}
    for bad, says in (
        (png(np.zeros((60, 79), np.uint8)), "its mask has 79 x 60 pixels, the image 80 x 60"),
        (png(np.zeros((60, 80, 3), np.uint8)), "mode RGB, expected numbers of up to 8 bits"),
        (png(np.zeros((60, 80), np.uint16)), "mode I;16"),
        (mask[: len(mask) // 2], "cannot be decoded"),
        (b"no mask", "no JPEG, PNG"),
    ):
        with pytest.raises(Lost, match=says):
            scene(image, bad, **how)
    with pytest.raises(Lost):
        scene(image[:60], mask, **how)


def test_palettes_are_their_indices() -> None:
    image, mask = blocks(2)
    picture = Image.open(io.BytesIO(mask)).convert("L")
    indexed = Image.fromarray(np.asarray(picture), mode="P")
    indexed.putpalette(COLOURS.flatten().tolist())
    buffer = io.BytesIO()
    indexed.save(buffer, "PNG")
    how = {"classes": 5, "reduce_zero_label": False}
    assert torch.equal(scene(image, buffer.getvalue(), **how)[1], scene(image, mask, **how)[1])


def packed_png(numbers: np.ndarray, bits: int, colour: int) -> bytes:
    """A PNG of few bits, grey (colour 0) or with a palette (3), by the standard's rules."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    each = (numbers[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(each.reshape(len(numbers), -1), axis=1)
    head = struct.pack(">IIBBBBB", numbers.shape[1], len(numbers), bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(3 * 2**bits)) if colour == 3 else b""
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("colour", [0, 3])
def test_numbers_of_few_bits_are_not_spread(bits: int, colour: int) -> None:
    """Grey of 2 and 4 bits is shown as 0 to 255, but its classes are what is in the file."""
    numbers = np.random.default_rng(bits).integers(0, min(2**bits, 80), (5, 13)).astype(np.uint8)
    found = decode_numbers(packed_png(numbers, bits, colour))
    assert found.dtype == np.uint8
    assert np.array_equal(found, numbers)


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (2, 3)])
def test_the_smallest_and_thinnest_images_are_seen(shape: tuple[int, int]) -> None:
    image, mask = png(np.full((*shape, 3), 99, np.uint8)), png(np.full(shape, 3, np.uint8))
    for number in range(8):
        pixels, known = train_scene(image, mask, number=number, **{**USUAL, "distort": number % 2 == 1})
        assert pixels.shape == (3, 48, 48)
        assert set(known.unique().tolist()) <= {3, OUTSIDE}
        assert (known == 3).any()


def test_colours_are_those_of_colorsys() -> None:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, 20, 20)).astype(np.uint8))
    image[:, 0, :3] = torch.tensor([[0, 255, 90]] * 3)  # black, white, grey
    for factor, turn in ((1.0, 25.0), (0.6, 0.0), (1.4, -36.0), (1.0, 0.0)):
        found = recoloured(image, factor, turn)
        for place in range(400):
            red, green, blue = (image[:, place // 20, place % 20].double() / 255).tolist()
            hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
            wanted = colorsys.hsv_to_rgb((hue + turn / 360) % 1, min(1.0, saturation * factor), value)
            got = found[:, place // 20, place % 20].tolist()
            assert got == pytest.approx([255 * one for one in wanted], abs=0.51)


def test_each_change_is_made_where_its_draw_says() -> None:
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    never = [0.9] * 9
    assert torch.equal(distorted(image, never), image)
    assert distorted(image, [0.1, 1.0, *never[2:]]).unique().tolist() == [132]
    assert distorted(image, [*never[:2], 0.1, 0.0, *never[4:]]).unique().tolist() == [50]
    both = [0.1, 1.0, 0.1, 1.0, *never[4:]]
    assert distorted(image, both).unique().tolist() == [198]
    colourful = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    before = [*never[:2], 0.1, 1.0, 0.1, 1.0, 0.9, 0.5, 0.1]  # contrast, then saturation, or the other way round
    after = [*before[:8], 0.9]
    assert distorted(colourful, before)[:, 0, 0].tolist() == [255, 106, 0]  # 300 is clipped to 255 first
    assert distorted(colourful, after)[:, 0, 0].tolist() == [255, 100, 0]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Nine scenes in the official layout."""
    scenes.write(tmp_path / "ADE", "training", 9, seed=0)
    return tmp_path / "ADE"


def test_the_official_folder_is_packed_as_it_is(official: Path, tmp_path: Path) -> None:
    made = make(official, tmp_path / "out", split="training", samples_per_shard=4)
    assert (made.samples, len(made.names)) == (9, 3)
    for shard, count in enumerate(made.counts):
        for row in range(count):
            name = made.key(shard, row)
            assert made.read(shard, row) == (official / "images/training" / f"{name}.jpg").read_bytes()
            mask = (official / "annotations/training" / f"{name}.png").read_bytes()
            assert made.read(shard, row, ("seg.png",)) == mask
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["ground", "disc", "square, blue"]


def spoil(official: Path) -> dict[str, str]:
    """Break four of the scenes; what must be said of each."""
    masks = official / "annotations/training"
    (masks / "ADE_tra_00000001.png").unlink()
    (masks / "ADE_tra_00000002.png").write_bytes(png(np.ones((10, 12), np.uint8)))
    known = np.array(Image.open(masks / "ADE_tra_00000003.png"))
    known[0, 0] = 4
    (masks / "ADE_tra_00000003.png").write_bytes(png(known))
    (masks / "ADE_tra_00000004.png").write_bytes(b"no mask")
    return {
        "ADE_tra_00000001": "cannot be read (No such file or directory)",
        "ADE_tra_00000002": "has 12 x 10 pixels, and the image 64 x 80",
        "ADE_tra_00000003": "has the number 4, expected 0 to 3, or 255",
        "ADE_tra_00000004": "no JPEG, PNG",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_masks_stop_or_are_listed(official: Path, tmp_path: Path, workers: int) -> None:
    wanted = spoil(official)
    with pytest.raises(UserError, match=r"its mask .*--skip-damaged"):
        make(official, tmp_path / "out", split="training", workers=workers)
    assert not (tmp_path / "out").exists()
    reported: list = []
    made = make(
        official, tmp_path / "out", split="training", skip_damaged=True, report=reported.append, workers=workers
    )
    assert made.samples == 5
    listed = [json.loads(line) for line in (tmp_path / "out/left-out.jsonl").read_text().splitlines()]
    assert {one["key"] for one in listed} == {problem.key for problem in reported} == set(wanted)
    for one in listed:
        assert wanted[one["key"]] in one["reason"]


def test_what_is_meant_must_be_clear(official: Path, tmp_path: Path) -> None:
    for options, says in (
        ({}, r"holds splits \(training\); choose one with --split training"),
        ({"split": "test"}, r"has no split test \(folders: training\)"),
        ({"split": "training", "recoding": Recoding(True, 32, None)}, "--resize would make the image smaller"),
        ({"columns": Columns(label="none")}, "is a folder of masks and no table, so --label none"),
    ):
        with pytest.raises(UserError, match=says):
            make(official, tmp_path / "out", **options)
    (official / "objectInfo150.txt").write_text("1\twall\n")
    with pytest.raises(UserError, match="one of them called Name"):
        make(official, tmp_path / "out", split="training")


def test_masks_come_with_their_images_on_any_number_of_ranks(official: Path, tmp_path: Path) -> None:
    made = make(official, tmp_path / "out", split="training", samples_per_shard=2)
    how = {**USUAL, "size": 32, "classes": 3, "reduce_zero_label": True}

    def view(image: bytes, mask: bytes, number: int):
        return dense.seen(train_scene, image, mask, number=number, **how)

    samples = Samples(made, Order(made.counts, 0, 4, 4), view, members=(MASK,))
    seen: dict[int, dict] = {1: {}, 2: {}}
    for world, found in seen.items():
        for rank in range(world):
            stream = batches(samples, batch_size=4, micro_batch=2, rank=rank, world=world, start=0, stop=12, workers=0)
            for batch in stream:
                for number, image, mask in zip(batch["numbers"].tolist(), batch["images"], batch["masks"], strict=True):
                    found[number] = (image, mask)
    assert len(seen[1]) == 12
    assert all(torch.equal(a, b) for n in seen[1] for a, b in zip(seen[1][n], seen[2][n], strict=True))


def test_damaged_masks_in_a_shard_are_left_out(tmp_path: Path, pack) -> None:
    image, mask = blocks(0)
    for name, members in (("a", {"seg.png": mask}), ("b", {}), ("c", {"seg.png": png(np.full((60, 80), 9, np.uint8))})):
        pack(
            tmp_path / f"{name}.tar", {f"{name}.png": image, **{f"{name}.{ext}": data for ext, data in members.items()}}
        )
    index(str(tmp_path))

    def view(image: bytes, mask: bytes):
        return dense.seen(dense.scene, image, mask, classes=5, reduce_zero_label=False)

    opened = open_index(str(tmp_path))
    stream = evaluation_batches(opened, view, micro_batch=1, rank=0, world=1, workers=0, members=(MASK,))
    lost, counted = {}, []
    for batch in stream:
        lost |= {one.key: one.reason for one in batch["replaced"]}
        counted += [key for (_, key), weight in zip(batch["origin"], batch["weights"], strict=True) if weight]
        assert batch["masks"].shape == (1, 60, 80)
    assert counted == ["a"]
    assert lost == {
        "b": "has no .seg.png",
        "c": "its mask has the number 9, expected 0 to 4, or 255 where there is no class",
    }
