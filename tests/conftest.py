"""Shared by all tests: one thread per process, so that results do not depend on the cores, and small real data."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers import TINY, sets

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that processes that share the files end together."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def lasting_group() -> Iterator[None]:
    """Commands that are run in this process leave their process group: DeepSpeed keeps the first one's for good."""
    from fdscale import dist

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "close", lambda: None)
        yield


@pytest.fixture(scope="session")
def process_group() -> None:
    """A process group of one rank, the same for all tests."""
    from fdscale import dist
    from fdscale.engine.initialize import prepare_environment

    dist.init()
    prepare_environment()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve crops of real photographs in three shards, with an index."""
    from PIL import Image
    from skimage import data as photos

    from fdscale.data.shards import make

    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee"):
        image = Image.fromarray(getattr(photos, name)())
        for part in range(4):
            left, top = 60 * part, 40 * part
            image.crop((left, top, left + 160, top + 140)).save(folder / f"{name}-{part}.jpg", quality=92)
    out = folder.parent / f"{folder.name}-shards"
    make(folder, out, samples_per_shard=4)
    return out


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards of scikit-learn's digits: train, 1200 of them, and heldout, 101 others and 2 broken ones."""
    from PIL import Image
    from sklearn.datasets import load_digits

    from fdscale.data.recode import Recoding
    from fdscale.data.shards import make

    folder, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for number in range(1301):
        part, label = ("train" if number < 1200 else "heldout"), str(digits.target[number])
        path = folder / "photos" / part / label / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 255 / 16).astype("uint8")).save(path)
    for name in ("3/broken.png", "7/broken.png"):
        (folder / "photos" / "heldout" / name).write_bytes(b"no image")
    for part in ("train", "heldout"):
        make(folder / "photos" / part, folder / part, samples_per_shard=40, recoding=Recoding(False, None, None))
    return folder


@pytest.fixture
def tiny(shards: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny distillation on real photographs."""

    def arguments(run: Path, *more: str, options: Sequence[str] = ()) -> list[str]:
        return [
            "distill",
            "demo",
            "--run",
            str(run),
            *sets(*TINY, f"data.shards={shards}", *more),
            *options,
        ]

    return arguments
