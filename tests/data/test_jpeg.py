"""The compiled part of JPEG decoding: the pixels of Pillow's full decode, or nothing; and how it gets compiled."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from helpers import outside
from PIL import Image

from fdscale.data import jpeg

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
SIZES = [(401, 281), (64, 48), (17, 33), (1, 1), (2, 3), (31, 5), (333, 9)]


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea())


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def pillows(data: bytes, factor: int = 1) -> np.ndarray | None:
    """Pillow's decode of the whole at 1/factor; None if it does not offer that factor for so small an image."""
    image = Image.open(io.BytesIO(data))
    if factor > 1:
        image.draft(image.mode, (max(1, image.width // factor), max(1, image.height // factor)))
        if image.decoderconfig[0] != factor:
            return None
    return np.asarray(image.convert("RGB"))


def boxes(width: int, height: int, rng: random.Random, count: int) -> list[tuple[int, int, int, int]]:
    """The whole, its edges and corners, and random rectangles: (left, top, width, height)."""
    found = [(0, 0, width, height), (0, 0, 1, 1), (width - 1, height - 1, 1, 1), (width - 1, 0, 1, height)]
    found += [(0, height - 1, width, 1), (width // 2, height // 2, width - width // 2, height - height // 2)]
    for _ in range(count):
        left, top = rng.randrange(width), rng.randrange(height)
        widest, highest = width - left, height - top
        found.append((left, top, rng.randint(1, widest), rng.randint(1, highest)))
        found.append((left, top, min(3, widest), min(3, highest)))
    return found


def assert_equal_everywhere(data: bytes, rng: random.Random, count: int = 12, factors=(1, 2, 4, 8)) -> None:
    for factor in factors:
        expected = pillows(data, factor)
        if expected is None:
            continue
        height, width = expected.shape[:2]
        for box in boxes(width, height, rng, count):
            found = jpeg.part(data, factor, *box)
            left, top, w, h = box
            assert found is not None, (factor, box)
            assert np.array_equal(found, expected[top : top + h, left : left + w]), (factor, box)


def test_it_is_in_use_here():
    assert jpeg.missing() is None


@pytest.mark.slow
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "grey"])
def test_every_part_is_pillows_to_the_bit(picture, subsampling):
    rng = random.Random(0)
    for size, progressive, restarts in product(SIZES, (False, True), (0, 1)):
        image = picture.crop((0, 0, *size))
        options = {"quality": 85, "progressive": progressive, "restart_marker_rows": restarts}
        if subsampling == "grey":
            assert_equal_everywhere(encoded(image.convert("L"), **options), rng)
        else:
            assert_equal_everywhere(encoded(image, subsampling=subsampling, **options), rng)


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_every_part_is_pillows_in_rarer_samplings(picture, subsampling):
    simplejpeg = pytest.importorskip("simplejpeg")
    for width, height in SIZES:
        pixels = np.ascontiguousarray(np.asarray(picture)[:height, :width])
        data = simplejpeg.encode_jpeg(pixels, quality=85, colorsubsampling=subsampling)
        assert_equal_everywhere(data, random.Random(0))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("quality", [1, 30, 75, 97, 100])
def test_codes_of_every_length_are_read_right(picture, quality, optimize):
    """Noise has the longest codes and fills blocks to the last coefficient; lone dots have long runs of zeros."""
    rng = np.random.default_rng(quality)
    noise = rng.integers(0, 256, (120, 130, 3), np.uint8)
    extremes = 255 * rng.integers(0, 2, (120, 130, 3), np.uint8)
    dots = np.full((120, 130, 3), 128, np.uint8)
    dots[rng.integers(0, 120, 40), rng.integers(0, 130, 40)] = 255
    ripples = np.stack([128 + 9 * (-1) ** (np.arange(120)[:, None] + np.arange(130))] * 3, 2).astype(np.uint8)
    for pixels in (noise, extremes, dots, ripples, np.asarray(picture)[:120, :130]):
        for subsampling in ("4:4:4", "4:2:0"):
            data = encoded(Image.fromarray(pixels), quality=quality, optimize=optimize, subsampling=subsampling)
            assert_equal_everywhere(data, random.Random(0), 4, factors=(1, 4))


def test_head_says_size_and_kind(picture):
    for progressive in (False, True):
        data = encoded(picture, progressive=progressive)
        head = jpeg.head(data)
        assert (head.width, head.height) == picture.size
        assert head.many_scans is progressive
        scan = data.index(b"\xff\xda")
        assert head.before_pixels == scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")


def test_what_is_not_plain_is_left_to_pillow(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    for data in (b"", b"\xff", b"\xff\xd8\xff", buffer.getvalue(), encoded(picture.convert("CMYK"))):
        assert jpeg.head(data) is None
        assert jpeg.part(data, 1, 0, 0, 1, 1) is None


def test_boxes_beyond_the_image_give_nothing(picture):
    data = encoded(picture.crop((0, 0, 40, 30)))
    for box in (
        (0, 0, 41, 30),
        (0, 0, 40, 31),
        (40, 0, 1, 1),
        (0, 30, 1, 1),
        (2**32 - 1, 0, 2, 1),
        (0, 2**32 - 1, 1, 2),
    ):
        assert jpeg.part(data, 1, *box) is None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": "4:4:4"}])
def test_a_file_cut_off_anywhere_gives_nothing(picture, options):
    """Even where the part that is asked for lies before the cut: Pillow would find the file truncated."""
    data = encoded(picture.crop((0, 0, 90, 70)), **options)
    for length in range(0, len(data) - 2, 7):
        for box in ((0, 0, 90, 70), (0, 0, 20, 10), (60, 40, 20, 10)):
            assert jpeg.part(data[:length], 1, *box) is None


def test_an_image_without_all_of_its_scans_is_left_to_pillow(picture):
    """Its blocks are smoothed by their neighbours', which reach further than a margin."""
    data = encoded(picture, progressive=True)
    scans = [i for i in range(len(data)) if data[i : i + 2] == b"\xff\xda"]
    cut = data[: scans[4]] + b"\xff\xd9"
    assert Image.open(io.BytesIO(cut)).convert("RGB").size == picture.size
    assert jpeg.part(cut, 1, 30, 30, 50, 50) is None


DAMAGE = """
import io, random, sys, warnings
sys.path[:0] = [{tests!r}, {tests!r} + '/..']
import numpy as np
from PIL import Image
from test_jpeg import encoded, pillows
from fdscale.data import jpeg
import skimage.data

assert jpeg.missing() is None
rng = random.Random({seed})
picture = Image.fromarray(skimage.data.chelsea()[:70, :90])
kinds = [{{}}, {{"progressive": True}}, {{"restart_marker_rows": 1}}, {{"subsampling": "4:4:4"}}, {{"optimize": True}}]
files = [encoded(picture, **kind) for kind in kinds] + [encoded(picture.convert("L"))]
given = 0
for _ in range({count}):
    data = bytearray(rng.choice(files))
    start = rng.choice([0, 600])
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(start, len(data))
        what = rng.random()
        if what < 0.6:
            data[at] = rng.choice([0, 0xFF, 0xD9, 0xD0, 0xC4, rng.randrange(256)])
        elif what < 0.8:
            del data[at : at + rng.choice([1, 2, 50])]
            data += b"\\0" * (start - len(data) + 1)
        else:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 50]))
    data = bytes(data)
    head = jpeg.head(data)
    if head is None or head.width * head.height > 10**6:
        continue
    w, h = rng.randint(1, head.width), rng.randint(1, head.height)
    left, top = rng.randint(0, head.width - w), rng.randint(0, head.height - h)
    found = jpeg.part(data, 1, left, top, w, h)
    if found is None:
        continue
    given += 1
    try:
        expected = pillows(data)
    except OSError as error:
        assert "truncated" not in str(error), error
    except Exception:  # Pillow's own reading of the header
        pass
    else:
        assert np.array_equal(found, expected[top : top + h, left : left + w])
print(given)
"""


@pytest.mark.slow
def test_damage_gives_pillows_pixels_or_nothing_and_never_a_crash():
    """In a process of its own, so that a crash would be seen."""
    code = DAMAGE.format(tests=os.path.dirname(__file__), seed=1, count=6000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=outside(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout) > 500  # changes that a decoder cannot see: another coefficient


SAY = "from fdscale.data import jpeg; print(jpeg.missing())"


def start(cache: Path, code: str = SAY, **env: str) -> subprocess.Popen[str]:
    environment = {**outside(), "XDG_CACHE_HOME": str(cache), **env}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def said(process: subprocess.Popen[str]) -> str:
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    return out.strip()


@pytest.mark.slow
def test_it_is_compiled_once_also_by_processes_that_race(tmp_path):
    processes = [start(tmp_path) for _ in range(4)]
    assert [said(process) for process in processes] == ["None"] * 4
    (library,) = (tmp_path / "fdscale").iterdir()
    before = library.stat().st_mtime_ns
    time.sleep(0.01)
    assert said(start(tmp_path, CC="/nowhere/cc", PATH="")) == "None"  # nothing is left to compile
    assert library.stat().st_mtime_ns == before


SAME = """
import hashlib, io, sys
import skimage.data
from PIL import Image
from fdscale.data import jpeg
from fdscale.data.augment import eval_view, train_view
files = []
for image in (Image.fromarray(skimage.data.chelsea()), Image.fromarray(skimage.data.coffee()).convert("L")):
    for options in ({}, {"progressive": True}):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
pixels = hashlib.sha256()
for decoding in ("exact", "scaled"):
    for data in files:
        for number in range(6):
            pixels.update(train_view(data, 0, number, 64, decoding=decoding).numpy())
        pixels.update(eval_view(data, 64, decoding=decoding).numpy())
print(jpeg.missing() or "in use", "|", pixels.hexdigest())
"""


@pytest.mark.slow
def test_without_a_compiler_the_pixels_are_the_same(tmp_path):
    with_it = said(start(tmp_path / "a", SAME)).split(" | ")
    without = said(start(tmp_path / "b", SAME, CC="", PATH="")).split(" | ")
    broken = said(start(tmp_path / "c", SAME, CC="false")).split(" | ")
    assert with_it[0] == "in use"
    assert without[0] == "there is no C compiler; install gcc, or name one in CC"
    assert broken[0].endswith("false cannot compile jpeg.c ()")
    assert with_it[1] == without[1] == broken[1]
    assert not any((tmp_path / "c" / "fdscale").iterdir())


def test_a_cache_that_others_may_write_to_is_not_trusted(tmp_path):
    (tmp_path / "fdscale").mkdir()
    (tmp_path / "fdscale").chmod(0o777)
    assert "others may write to it" in said(start(tmp_path))


def test_a_damaged_cache_is_left_alone(tmp_path):
    assert said(start(tmp_path)) == "None"
    (library,) = (tmp_path / "fdscale").iterdir()
    library.write_bytes(b"not a library")
    assert "cannot be loaded" in said(start(tmp_path))
