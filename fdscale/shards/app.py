"""`fdscale shards`: make, index, verify, describe and reshard WebDataset tars, with a progress bar."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fdscale import UserError
from fdscale.data.index import Index
from fdscale.data.indexing import index as index_shards
from fdscale.data.listing import Columns
from fdscale.data.recode import Recoding
from fdscale.data.reshard import reshard as reshard_shards
from fdscale.data.shard_cache import GIB, ShardCache
from fdscale.data.shards import LOST_OBJECTS
from fdscale.data.shards import make as make_shards
from fdscale.data.stats import stats as stats_of
from fdscale.data.tar import Problem
from fdscale.data.verify import verify as verify_shards

PROBLEMS_FOUND = 2
MOST_SHOWN = 10  # problems printed one by one where a file lists them all
SAMPLES_PER_SHARD = 10_000
MIB = 2**20


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Passed:
    """Problems that were passed over: the first few, and how many there are."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def __call__(self, problem: Problem) -> None:
        self.count += 1
        if len(self.first) < MOST_SHOWN:
            self.first.append(problem)

    def show(self, listed_in: str) -> None:
        """Print them to stderr."""
        for problem in self.first:
            print(f"left out: {problem}", file=sys.stderr)
        if self.count > len(self.first):
            print(f"left out: {self.count - len(self.first)} more, see {listed_in}", file=sys.stderr)


def make(
    source: str,
    out: str,
    samples_per_shard: int | None,
    shard_mib: float | None,
    seed: int,
    keep_order: bool,
    split: str | None,
    image: str | None,
    label: str | None,
    key: str | None,
    resize: int | None,
    quality: int | None,
    no_check: bool,
    skip_damaged: bool,
    workers: int,
    index: str | None,
    json: bool,
) -> int:
    """`fdscale shards make`."""
    passed = _Passed()
    with _bar("packing") as progress:
        made = make_shards(
            source,
            out,
            **_sizes(samples_per_shard, shard_mib),
            seed=None if keep_order else seed,
            split=split,
            columns=Columns(image, label, key),
            recoding=Recoding(not no_check, resize, quality),
            skip_damaged=skip_damaged,
            workers=workers,
            index_dir=index,
            progress=progress,
            report=passed,
        )
    passed.show(f"{out}/left-out.jsonl")
    lost = Path(out) / LOST_OBJECTS
    objects = sum(1 for _ in lost.open()) if lost.exists() else 0
    _print_made(made, out, json, passed.count, f"{out}/left-out.jsonl", objects=objects)
    if objects:
        print(f"left out of the others: {objects} objects; they are listed in {lost}", file=sys.stderr)
    return 0


def index(
    shards: list[str],
    shard_cache: str | None,
    shard_cache_gib: float,
    index: str | None,
    skip_damaged: bool,
    trust_idx: bool,
    counts: list[str],
    workers: int,
    json: bool,
) -> int:
    """`fdscale shards index`."""
    passed = _Passed()
    with _bar("indexing") as progress:
        made = index_shards(
            shards,
            index,
            workers=workers,
            progress=progress,
            cache=_cache(shard_cache, shard_cache_gib),
            skip_damaged=skip_damaged,
            trust_idx=trust_idx,
            counts=counts,
            report=passed,
        )
    passed.show(f"{made.index_dir}/left-out.jsonl")
    samples, damaged = made.left_out
    _print_made(made, None, json, samples, f"{made.index_dir}/left-out.jsonl", damaged)
    return 0


def verify(
    shards: list[str],
    shard_cache: str | None,
    shard_cache_gib: float,
    index: str | None,
    decode: bool,
    unique_keys: bool,
    counts: list[str],
    workers: int,
    json: bool,
) -> int:
    """`fdscale shards verify`; exit code 2 when anything is wrong that the index does not leave out."""
    with _bar("verifying") as progress:
        problems = verify_shards(
            shards,
            index,
            decode=decode,
            unique_keys=unique_keys,
            counts=counts,
            workers=workers,
            progress=progress,
            cache=_cache(shard_cache, shard_cache_gib),
        )
    if json:
        _print_json([problem._asdict() for problem in problems])
    else:
        print("\n".join(str(problem) for problem in problems) or "no problems")
    return 0 if all(problem.left_out for problem in problems) else PROBLEMS_FOUND


def stats(
    shards: list[str],
    shard_cache: str | None,
    shard_cache_gib: float,
    index: str | None,
    sample: int,
    workers: int,
    json: bool,
) -> int:
    """`fdscale shards stats`."""
    cache = _cache(shard_cache, shard_cache_gib)
    with _bar("counting") as progress:
        found = stats_of(shards, index, sample=sample, workers=workers, progress=progress, cache=cache)
    if json:
        _print_json(found)
    else:
        print("\n".join(f"{name:<18} {value}" for name, value in _readable(found)))
    return 0


def reshard(
    shards: str,
    shard_cache: str | None,
    shard_cache_gib: float,
    out: str,
    samples_per_shard: int | None,
    shard_mib: float | None,
    shuffle: bool,
    seed: int,
    prefix_keys: bool,
    index: str | None,
    out_index: str | None,
    workers: int,
    json: bool,
) -> int:
    """`fdscale shards reshard`."""
    with _bar("resharding") as progress:
        made = reshard_shards(
            shards,
            out,
            index_dir=index,
            **_sizes(samples_per_shard, shard_mib),
            seed=seed if shuffle else None,
            prefix_keys=prefix_keys,
            out_index_dir=out_index,
            workers=workers,
            progress=progress,
            cache=_cache(shard_cache, shard_cache_gib),
        )
    _print_made(made, out, json)
    return 0


def _cache(folder: str | None, gib: float) -> ShardCache:
    return ShardCache(folder, int(gib * GIB))


def _sizes(samples_per_shard: int | None, shard_mib: float | None) -> dict[str, Any]:
    if samples_per_shard is not None and shard_mib is not None:
        raise UserError("give --samples-per-shard or --shard-mib, not both")
    if shard_mib is not None:
        return {"max_bytes": int(shard_mib * MIB)}
    return {"samples_per_shard": SAMPLES_PER_SHARD if samples_per_shard is None else samples_per_shard}


def _print_made(
    made: Index,
    out: str | None,
    as_json: bool,
    left_out: int = 0,
    listed_in: str = "",
    damaged: int = 0,
    objects: int = 0,
) -> None:
    if as_json:
        about = {"samples": made.samples, "shards": len(made.names), "left_out": left_out, "damaged_shards": damaged}
        _print_json({**about, "left_out_objects": objects, "index": made.index_dir, "fingerprint": made.fingerprint})
        return
    where = f": {out}\nindex: " if out else ", index: "
    print(f"{made.samples} samples in {len(made.names)} shards{where}{made.index_dir}")
    if left_out or damaged:
        rest = f", and the rest of {damaged} damaged shards" if damaged else ""
        print(f"left out: {left_out} samples{rest}; they are listed in {listed_in}")


def _readable(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows (name, value) of the table that a person reads."""

    def spread(values: dict[str, int], show: Callable[[int], str] = str) -> str:
        return ", ".join(f"{name} {show(value)}" for name, value in values.items() if name != "total") or "none"

    left, sampled, images = found["left_out"], found["sampled"], found["image_bytes"]
    yield "shards", f"{found['shards']}" + (f" ({found['empty_shards']} empty)" if found["empty_shards"] else "")
    yield "samples", str(found["samples"])
    yield "bytes", _bytes(found["bytes"])
    yield "samples per shard", spread(found["samples_per_shard"])
    yield "members", ", ".join(f"{count} .{name}" for name, count in found["members"].items())
    yield "image files", f"{_bytes(images['total'])}; {spread(images, _bytes)}"
    if left["samples"] or left["damaged_shards"]:
        yield "left out", f"{left['samples']} samples, and the rest of {left['damaged_shards']} damaged shards"
    yield f"of {sampled['images']} images", ", ".join(f"{count} {kind}" for kind, count in sampled["kinds"].items())
    for name in ("width", "height", "short_side"):
        yield f"  {name.replace('_', ' ')}", spread(sampled[name])
    if sampled["broken_headers"]:
        yield "  broken headers", str(sampled["broken_headers"])
    if sampled["labelled"]:
        named = f", {found['named_classes']} are named in classes.json" if found["named_classes"] else ""
        yield "  classes", f"{sampled['classes']} seen{named}"


def _bytes(count: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _print_json(content: Any) -> None:
    print(json.dumps(content))
