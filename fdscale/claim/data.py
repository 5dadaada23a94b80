"""Fashion-MNIST (Xiao et al. 2017), or scikit-learn's digits as a quick stand-in, as folders of PNG files."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fdscale import UserError

DEFAULT = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
MAGIC = {1: 2049, 3: 2051}  # of files of labels and of images, by dimensions


class Part(NamedTuple):
    """Images (n, 28, 28) uint8 and labels (n,) uint8."""

    images: np.ndarray
    labels: np.ndarray


def fashion(folder: Path) -> tuple[Part, Part]:
    """Training and test part. Raises UserError where files are missing or damaged."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: on Debian and Ubuntu `apt-get install dataset-fashion-mnist` brings "
            "them, elsewhere they are at github.com/zalandoresearch/fashion-mnist; name their folder with --data"
        )
    images, labels, test_images, test_labels = (_idx(folder / name) for name in FILES)
    return Part(images, labels), Part(test_images, test_labels)


def digits() -> tuple[Part, Part]:
    """scikit-learn's 1797 digits, enlarged from 8 x 8; every fourth is in the test part."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = (found.images * 255 / 16).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(one).resize((28, 28), Image.Resampling.BICUBIC)) for one in small])
    labels, test = found.target.astype(np.uint8), np.arange(len(images)) % 4 == 3
    return Part(images[~test], labels[~test]), Part(images[test], labels[test])


def split(train: Part, labelled: int, seed: int) -> tuple[Part, Part, Part]:
    """Of the training part: `labelled` images for fine-tuning, as many to choose rates by, the rest; equally many of
    each class in the first two. Raises UserError where there are too few."""
    rng = np.random.default_rng(seed)
    each = labelled // len(np.unique(train.labels))
    chosen: list[list[int]] = [[], []]
    for kind in np.unique(train.labels):
        places = rng.permutation((train.labels == kind).nonzero()[0])
        if len(places) < 2 * each:
            raise UserError(f"{2 * labelled} labelled images were wanted, and class {kind} has {len(places)}")
        chosen[0] += places[:each].tolist()
        chosen[1] += places[each : 2 * each].tolist()
    rest = np.setdiff1d(np.arange(len(train.labels)), chosen[0] + chosen[1])
    some = [np.array(sorted(part)) for part in (*chosen, rest.tolist())]
    first, second, third = (Part(train.images[part], train.labels[part]) for part in some)
    return first, second, third


def write(part: Part, folder: Path, classes: bool) -> None:
    """PNG files, in folders of their classes or, without labels, in one."""
    for number, (pixels, label) in enumerate(zip(part.images, part.labels, strict=True)):
        where = folder / str(label) if classes else folder
        if number == 0 or classes:
            where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(where / f"{number:05d}.png", compress_level=1)


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in LeCun's IDX format."""
    try:
        data = gzip.decompress(path.read_bytes())
        dimensions = data[3]
        shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
        if struct.unpack(">I", data[:4])[0] != MAGIC.get(dimensions):
            raise ValueError("it is no IDX file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, struct.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); get it again") from None
