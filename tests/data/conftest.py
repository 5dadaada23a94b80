"""Small photos and tars for the tests of the data path."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    """24 different JPEGs of about 90 x 70 pixels, cut from photos of scikit-image."""
    rng = np.random.default_rng(0)
    found = []
    for picture in (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()):
        for _ in range(6):
            h, w = rng.integers(60, 100, 2)
            y, x = rng.integers(0, picture.shape[0] - h), rng.integers(0, picture.shape[1] - w)
            buffer = io.BytesIO()
            Image.fromarray(picture[y : y + h, x : x + w]).save(buffer, "JPEG", quality=90)
            found.append(buffer.getvalue())
    return found


@pytest.fixture
def image_folder(tmp_path: Path, photos: list[bytes]) -> Path:
    """24 images in three class folders."""
    root = tmp_path / "images"
    for i, data in enumerate(photos):
        path = root / ("cat", "dog", "owl")[i % 3] / f"photo_{i:02d}.{'JPEG' if i % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.fixture
def pack():
    """pack(path, {member name: bytes}, format=..., **attributes of TarInfo) writes a tar with Python's own tarfile."""

    def write(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT, **attributes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                for attribute, value in attributes.items():
                    setattr(info, attribute, value)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def members():
    """members(n, first=0, prefix="") are n samples of a small .jpg (noise, not an image) and a .cls."""

    def of(n: int, first: int = 0, prefix: str = "") -> dict[str, bytes]:
        rng = np.random.default_rng(first)
        found = {}
        for i in range(first, first + n):
            found[f"{prefix}{i:05d}.jpg"] = rng.bytes(int(rng.integers(1, 1500)))
            found[f"{prefix}{i:05d}.cls"] = str(i % 7).encode()
        return found

    return of


@pytest.fixture
def shards(tmp_path: Path, pack, members) -> Path:
    """Three shards of 5, 7 and 4 samples."""
    folder = tmp_path / "shards"
    for i, count in enumerate((5, 7, 4)):
        pack(folder / f"set-{i}.tar", members(count, first=100 * i))
    return folder
