"""Statistics against plain counting with tarfile, Pillow and numpy."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdscale import UserError
from fdscale.data.indexing import index
from fdscale.data.shards import make
from fdscale.data.stats import stats


@pytest.fixture
def shards(image_folder, tmp_path, photos, pack):
    folder = tmp_path / "shards"
    make(image_folder, folder, samples_per_shard=10)
    grey = io.BytesIO()
    Image.open(io.BytesIO(photos[0])).convert("L").save(grey, "PNG")
    pack(folder / "shard-000009.tar", {"x.png": grey.getvalue(), "y.jpg": photos[1], "z.jpg": b"no image"})
    pack(folder / "shard-000010.tar", {})
    index(folder)
    return folder


def images_of(folder: Path) -> list[bytes]:
    found = []
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(m).read() for m in tar if not m.name.endswith(".cls")]
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_are_those_of_plain_reading(shards, workers):
    seen = []
    found = stats(shards, workers=workers, progress=lambda *now: seen.append(now))
    assert seen[-1] == (5, 5)
    images = images_of(shards)
    sizes = np.array([len(data) for data in images])
    assert (found["shards"], found["samples"], found["empty_shards"]) == (5, 27, 1)
    assert found["bytes"] == sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert (found["samples_per_shard"]["min"], found["samples_per_shard"]["median"]) == (3, 4)
    assert found["samples_per_shard"]["max"] == 10
    assert found["members"] == {"cls": 24, "jpg": 14, "jpeg": 12, "png": 1}
    assert (found["image_bytes"]["min"], found["image_bytes"]["max"]) == (sizes.min(), sizes.max())
    assert found["image_bytes"]["total"] == sizes.sum()
    for name, share in (("p05", 0.05), ("median", 0.5), ("p95", 0.95)):
        exact = np.quantile(sizes, share, method="inverted_cdf")
        assert found["image_bytes"][name] == pytest.approx(exact, rel=0.025), name
    sampled = found["sampled"]
    opened = [Image.open(io.BytesIO(data)) for data in images if data != b"no image"]
    assert sampled["kinds"] == dict(Counter(f"{image.format} {image.mode}" for image in opened))
    widths = np.array([image.width for image in opened])
    assert (sampled["width"]["min"], sampled["width"]["max"]) == (widths.min(), widths.max())
    assert sampled["height"]["median"] == np.quantile([i.height for i in opened], 0.5, method="inverted_cdf")
    assert sampled["short_side"]["min"] == min(min(image.size) for image in opened)
    assert (sampled["images"], sampled["broken_headers"], sampled["labelled"], sampled["classes"]) == (27, 1, 24, 3)
    assert found["named_classes"] == 3
    assert found["left_out"] == {"samples": 0, "damaged_shards": 0}
    assert json.loads(json.dumps(found)) == found


def test_a_sample_is_a_fixed_draw(shards):
    few = stats(shards, sample=8)["sampled"]
    assert 4 <= few["images"] <= 8  # a draw that comes twice counts once
    assert few == stats(shards, sample=8)["sampled"]
    assert stats(shards, sample=0)["sampled"]["images"] == 0


def test_what_was_left_out_is_told(shards):
    path = shards / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    opened = index(shards, skip_damaged=True)
    found = stats(shards)
    assert found["left_out"] == {"samples": opened.left_out[0], "damaged_shards": 1}
    assert found["samples"] == opened.samples < 27


def test_stats_need_a_sound_index(shards):
    (shards / "index" / "shard-000001.tar.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"shard-000001\.tar\.npz: missing or damaged"):
        stats(shards)
    with pytest.raises(UserError, match="no index there"):
        stats(shards, str(shards / "nowhere"))
