"""What is in a set of shards: counted from its index, and measured on a few of its images."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from fdscale import UserError
from fdscale.data.files import Shards
from fdscale.data.index import Index, open_index
from fdscale.data.index_file import Entry, read_layout
from fdscale.data.indexing import Progress
from fdscale.data.lost import Lost
from fdscale.data.order import philox
from fdscale.data.parallel import parallel
from fdscale.data.recent import Recent
from fdscale.data.shard_cache import ShardCache
from fdscale.data.tar import IMAGE_EXTENSIONS

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_PER_OCTAVE = 32  # classes of sizes per factor of two: quantiles of sizes are good to 2 %
_LONGEST_CLASS = 20  # bytes of a .cls: a number


def stats(
    shards: Shards,
    index_dir: str | None = None,
    *,
    sample: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
    cache: ShardCache | None = None,
) -> dict[str, Any]:
    """What is in a set, as plain numbers for JSON.

    Counts, bytes and members of all samples, from the index; of `sample` images drawn at random (fixed seed): width and
    height from their headers, kind, and class. progress: called with (shards done, shards). cache: for shards that lie
    elsewhere. Raises UserError if there is no index.
    """
    opened = open_index(shards, index_dir, cache)
    counts = opened.counts
    total: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    smallest, largest, image_bytes = None, 0, 0
    jobs = ((opened.index_dir, entry) for entry in opened.entries)
    for done, found in enumerate(parallel(_count, jobs, min(workers, len(counts))), 1):
        total.update(found.members)
        sizes.update(found.sizes)
        image_bytes += found.image_bytes
        if found.largest:
            smallest = found.smallest if smallest is None else min(smallest, found.smallest)
            largest = max(largest, found.largest)
        if progress:
            progress(done, len(counts))
    left_out, damaged = opened.left_out
    names = os.path.join(opened.root, "classes.json")
    return {
        "shards": len(counts),
        "samples": opened.samples,
        "bytes": sum(entry.bytes for entry in opened.entries),
        "samples_per_shard": _quantiles(counts[counts > 0]),
        "empty_shards": int((counts == 0).sum()),
        "left_out": {"samples": left_out, "damaged_shards": damaged},
        "members": dict(total.most_common()),
        "image_bytes": {"total": image_bytes, **_quantiles_of(sizes, smallest or 0, largest)},
        "named_classes": _names_in(names),
        "sampled": _sampled(opened, min(sample, opened.samples)),
    }


def _names_in(path: str) -> int | None:
    try:
        with open(path, encoding="utf-8") as file:
            names = json.load(file)
        return len(names) if isinstance(names, list) else None
    except (OSError, ValueError, RecursionError):
        return None


class _Counted(NamedTuple):
    members: Counter[str]  # extension -> members
    sizes: Counter[int]  # class of sizes -> images
    image_bytes: int
    smallest: int
    largest: int


def _count(job: tuple[str, Entry]) -> _Counted:
    index_dir, entry = job
    layout = read_layout(index_dir, entry)
    names = [name.decode() for name in layout.extensions.tolist()]
    counts = np.bincount(layout.kinds, minlength=len(names)).tolist()
    images = np.isin(layout.kinds, [kind for kind, name in enumerate(names) if name in IMAGE_EXTENSIONS])
    sizes = layout.sizes[images]
    if not len(sizes):
        return _Counted(Counter(dict(zip(names, counts, strict=True))), Counter(), 0, 0, 0)
    classes = np.floor(np.log2(np.maximum(sizes, 1)) * _PER_OCTAVE).astype(int)
    which, how_many = np.unique(classes, return_counts=True)
    return _Counted(
        Counter(dict(zip(names, counts, strict=True))),
        Counter(dict(zip(which.tolist(), how_many.tolist(), strict=True))),
        int(sizes.sum()),
        int(sizes.min()),
        int(sizes.max()),
    )


def _quantiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    found = np.quantile(values, QUANTILES, method="inverted_cdf").tolist()
    return {_quantile_name(q): int(value) for q, value in zip(QUANTILES, found, strict=True)}


def _quantiles_of(classes: Counter[int], smallest: int, largest: int) -> dict[str, int]:
    """Quantiles of sizes that were counted in classes: the middle of the class, the extremes exactly."""
    if not classes:
        return {}
    order = sorted(classes)
    filled = np.cumsum([classes[one] for one in order])
    places = np.searchsorted(filled, np.array(QUANTILES) * filled[-1]).clip(max=len(order) - 1)
    middles = [round(2 ** ((order[place] + 0.5) / _PER_OCTAVE)) for place in places.tolist()]
    middles[0], middles[-1] = smallest, largest
    return {_quantile_name(q): min(max(m, smallest), largest) for q, m in zip(QUANTILES, middles, strict=True)}


def _quantile_name(q: float) -> str:
    return {0.0: "min", 0.5: "median", 1.0: "max"}.get(q, f"p{round(100 * q):02d}")


def _sampled(opened: Index, count: int) -> dict[str, Any]:
    """Widths, heights, kinds and classes of some images."""
    from PIL import Image

    every = count == opened.samples
    chosen = np.arange(count) if every else np.unique(philox(0, 0, (0, 6, 0, 0), count) % np.uint64(opened.samples))
    chosen = chosen.astype(np.int64)
    starts = np.cumsum(opened.counts) - opened.counts
    shards = np.searchsorted(starts, chosen, side="right") - 1
    kinds: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    broken, layouts = 0, Recent(1)  # chosen are in order, shard after shard
    for shard, row in zip(shards.tolist(), (chosen - starts[shards]).tolist(), strict=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(opened.read(shard, row))) as image:  # the header alone is read
                    sizes.append(image.size)
                    kinds[f"{image.format} {image.mode}"] += 1
        except Lost:  # cut off or damaged since it was indexed
            broken += 1
            continue
        except UserError:
            raise
        except Exception:  # Pillow's readers raise whatever their parsing trips over
            broken += 1
        layout = layouts.get(shard, lambda shard: read_layout(opened.index_dir, opened.entries[shard]))
        if b"cls" in layout.extensions[layout.kinds[layout.starts[row] : layout.starts[row + 1]]]:
            classes[opened.read(shard, row, ("cls",))[:_LONGEST_CLASS].decode(errors="replace").strip()] += 1
    sides = np.array(sizes, np.int64).reshape(-1, 2)
    return {
        "images": len(chosen),
        "broken_headers": broken,
        "kinds": dict(kinds.most_common()),
        "width": _quantiles(sides[:, 0]),
        "height": _quantiles(sides[:, 1]),
        "short_side": _quantiles(sides.min(1)) if len(sides) else {},
        "classes": len(classes),
        "labelled": sum(classes.values()),
    }
