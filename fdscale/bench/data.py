"""`fdscale bench data`: decoding, the whole loader and indexing, each beside its rival.

The photographs are crops of real ones, scaled, with sensor noise, in the sizes and with about the bytes per pixel that
ImageNet's have. All ways of a table take turns in random order within one process, so that whatever else the machine
does hits all alike; reported are medians, and the median of the ratio within a round.
"""

from __future__ import annotations

import io
import itertools
import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, features
from torch.utils.data import DataLoader

from fdscale import UserError
from fdscale.bench.timing import Clocks, in_turns, ratio, save
from fdscale.data import jpeg
from fdscale.data.augment import train_view
from fdscale.data.index import open_index
from fdscale.data.indexing import index
from fdscale.data.order import Order
from fdscale.data.shards import make
from fdscale.data.stream import Samples, batches
from fdscale.inputs import MEAN, STD

SIZE = 224  # pixels: side of a view
BATCH = 32  # images in a micro-batch of a loader
PREFETCH = 2  # micro-batches per worker, for all loaders
LANES = 8


class Effort(NamedTuple):
    """How much is measured."""

    images: dict[str, tuple[int, int, int]]  # name -> number, width, height
    shards: int
    images_per_shard: int
    loader_batches: int
    indexed_samples: int


FULL = Effort({"500 x 375": (96, 500, 375), "1024 x 768": (32, 1024, 768)}, 8, 120, 24, 20_000)
QUICK = Effort({"100 x 75": (3, 100, 75)}, 8, 5, 1, 200)


def main(rounds: int, quick: bool, json: Path | None) -> int:
    """Measure, print Markdown, and write JSON."""
    torch.set_num_threads(1)
    result = measure(1 if quick else rounds, QUICK if quick else FULL)
    print_tables(result)
    if json:
        save(json, result)
    return 0


def measure(rounds: int, effort: Effort) -> dict[str, Any]:
    """All tables: seconds of every round by clock and way, and what they were measured on."""
    if missing := jpeg.missing():
        print(f"note: {missing}; JPEGs are decoded by Pillow\n")
    result: dict[str, Any] = {"machine": machine(), "rounds": rounds, "decode": {}, "loader": {}}
    with one_core():
        for name, (count, width, height) in effort.images.items():
            files = photographs(count, width, height)
            seconds = in_turns(decoders(files), rounds)
            kilobytes = statistics.mean(len(data) for data in files) / 1e3
            result["decode"][name] = {"images": count, "kilobytes": kilobytes, "seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        shards = pack(Path(folder), effort)
        for workers in (1, 2):
            count = effort.loader_batches * BATCH
            ways = {"webdataset": partial(webdataset_pass, shards), "fdscale": partial(stream_pass, shards)}
            passes = {name: partial(way, workers, effort.loader_batches) for name, way in ways.items()}
            result["loader"][str(workers)] = {"images": count, "seconds": in_turns(passes, rounds)}
    with one_core(), tempfile.TemporaryDirectory() as folder:
        tar = many_members(Path(folder), effort.indexed_samples)
        walks: dict[str, Callable[[], None]] = {
            "tarfile": partial(walk_with_tarfile, tar),
            "fdscale": partial(index_anew, tar),
        }
        result["index"] = {"samples": effort.indexed_samples, "seconds": in_turns(walks, rounds)}
    return result


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "pillow", "numpy", "webdataset")}
    turbo = features.version("libjpeg_turbo")
    return {"cores": os.cpu_count(), "architecture": platform.machine(), "libjpeg-turbo": turbo, **versions}


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on one core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


# ----------------------------------------------------------------------------------------------------------------------
# What is measured on


def photographs(count: int, width: int, height: int, seed: int = 0) -> list[bytes]:
    """JPEGs of about width x height, cut from photographs of scikit-image and scikit-learn, noisy as a sensor is."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError(f"the photographs are in packages: pip install 'fdscale[demo]' ({error})") from None
    originals = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
    originals += load_sample_images().images
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        image = Image.fromarray(originals[i % len(originals)])
        w, h = (int(side * rng.uniform(0.95, 1.05)) for side in (width, height))
        zoom = rng.uniform(1.05, 1.5) * max(w / image.width, h / image.height)
        image = image.resize((int(image.width * zoom), int(image.height * zoom)), Image.Resampling.BICUBIC)
        left, top = int(rng.integers(image.width - w + 1)), int(rng.integers(image.height - h + 1))
        pixels = np.asarray(image.crop((left, top, left + w, top + h))).astype(np.float32)
        pixels += rng.normal(0, 5, (h, w, 1)) + rng.normal(0, 2, (h, w, 3))  # light, then colour
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
        found.append(buffer.getvalue())
    return found


def pack(folder: Path, effort: Effort) -> str:
    """Shards of photographs for the loaders; the pattern of their names."""
    (folder / "in").mkdir()
    _, width, height = next(iter(effort.images.values()))
    total = effort.shards * effort.images_per_shard
    for i, data in enumerate(photographs(total, width, height, seed=1)):
        (folder / "in" / f"{i:05d}.jpg").write_bytes(data)
    make(folder / "in", folder / "shards", samples_per_shard=effort.images_per_shard)
    return f"{folder}/shards/shard-{{000000..{effort.shards - 1:06d}}}.tar"


def many_members(folder: Path, samples: int) -> Path:
    """A folder with a tar of so many samples, each of an image, a class and a JSON."""
    rng = random.Random(0)
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "many.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(samples):
            for extension, size in (("jpg", rng.randrange(4000, 12000)), ("cls", 3), ("json", 300)):
                member = tarfile.TarInfo(f"{i:08d}.{extension}")
                member.size = size
                tar.addfile(member, io.BytesIO(bytes(size)))
    return folder / "tars"


# ----------------------------------------------------------------------------------------------------------------------
# The ways


def torchvision_transform() -> Callable[[Image.Image], torch.Tensor]:
    """The usual training transform."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def decoders(files: list[bytes]) -> dict[str, Callable[[], None]]:
    """Passes over all files, every pass with other crops."""
    transform = torchvision_transform()
    numbers = {name: itertools.count() for name in ("exact", "scaled", "pillow")}

    def baseline() -> None:
        for data in files:
            transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def ours(decoding: str) -> None:
        for data in files:
            train_view(data, 0, next(numbers[decoding]), SIZE, interpolation="bicubic", decoding=decoding)

    return {"PIL + torchvision": baseline, **{name: partial(ours, name) for name in numbers}}


def timed(stream: Iterator[Any], workers: int, wanted: int) -> float:
    """Seconds of `wanted` batches once the workers are running and what they prepared ahead is used up."""
    for _ in range(2 * PREFETCH * workers):
        next(stream)
    start = time.perf_counter()
    for _ in range(wanted):
        next(stream)
    return time.perf_counter() - start


def webdataset_pass(shards: str, workers: int, wanted: int) -> float:
    """webdataset as its documentation puts it together, in a DataLoader."""
    import webdataset

    data = webdataset.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg").map_tuple(torchvision_transform()).batched(BATCH)
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH)
    return timed(iter(loader), workers, wanted)


def samples_of(shards: str) -> Samples:
    """Our samples, seen as the other loader sees them; normalisation is left to the device."""
    opened = open_index(shards)
    view = partial(train_view, seed=0, size=SIZE, interpolation="bicubic")
    return Samples(opened, Order(opened.counts, 0, LANES), view)


def stream_pass(shards: str, workers: int, wanted: int) -> float:
    """Our stream with worker processes."""
    sizes: dict[str, Any] = {"batch_size": BATCH, "micro_batch": BATCH, "rank": 0, "world": 1, "start": 0}
    stream = batches(samples_of(shards), workers=workers, prefetch=PREFETCH, **sizes)
    try:
        return timed(stream, workers, wanted)
    finally:
        stream.close()


def walk_with_tarfile(folder: Path) -> None:
    """What Python's own reader takes to list the members."""
    with tarfile.open(folder / "many.tar") as tar:
        for _ in tar:
            pass


def index_anew(folder: Path) -> None:
    """Index it from nothing, written and all."""
    with tempfile.TemporaryDirectory() as out:
        index(folder, out)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def table(title: str, count: int, unit: str, clocks: Clocks, base: str) -> None:
    """One table: how many per second, and the ratio to `base` by wall clock, and by CPU time where all is in here."""
    shown = [clock for clock, of in clocks.items() if clock == "wall" or title.startswith(("Decoding", "Indexing"))]
    print(f"{title}\n")
    print(f"| way | {unit}/s | " + " | ".join(f"times {base}, {clock}" for clock in shown) + " |")
    print("|---" * (2 + len(shown)) + "|")
    for name, taken in clocks["wall"].items():
        cells = [f"{count / statistics.median(taken):.0f}", *(ratio(clocks[clock], base, name) for clock in shown)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def print_tables(result: dict[str, Any]) -> None:
    """All tables as Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    print(f"{about};\n{result['rounds']} rounds; medians, ratios within a round with quartiles\n")
    for name, of in result["decode"].items():
        title = (
            f"Decoding on one core: JPEGs of about {name}, {of['kilobytes']:.0f} kB on average, to a random crop of "
            f"{SIZE} px (bicubic)"
        )
        table(title, of["images"], "images", of["seconds"], "PIL + torchvision")
    for workers, of in result["loader"].items():
        title = f"Whole loader, worker processes: {workers}; the smaller photographs from tars"
        table(title, of["images"], "images", of["seconds"], "webdataset")
    title = "Indexing on one core: a tar of samples with three members each, from the page cache"
    table(title, result["index"]["samples"], "samples", result["index"]["seconds"], "tarfile")
