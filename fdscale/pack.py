"""`fdscale shards`: make, index and verify WebDataset tars, with a progress bar."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress

from fdscale.data import shards as data
from fdscale.data.index import index as index_shards
from fdscale.data.tar import Problem
from fdscale.data.verify import verify as verify_shards

PROBLEMS_FOUND = 2


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def make(source: str, out: str, samples_per_shard: int, seed: int, workers: int, index: str | None) -> int:
    """`fdscale shards make`."""
    with _bar("packing") as progress:
        made = data.make(
            source,
            out,
            samples_per_shard=samples_per_shard,
            seed=seed,
            workers=workers,
            index_dir=index,
            progress=progress,
        )
    print(f"{made.samples} samples in {len(made.names)} shards: {out}\nindex: {made.index_dir}")
    return 0


def index(shards: str, index: str | None, workers: int) -> int:
    """`fdscale shards index`."""
    with _bar("indexing") as progress:
        made = index_shards(shards, index, workers=workers, progress=progress)
    print(f"{made.samples} samples in {len(made.names)} shards, index: {made.index_dir}")
    return 0


def verify(shards: str, index: str | None, decode: bool, workers: int, json: bool) -> int:
    """`fdscale shards verify`; exit code 2 when anything is wrong."""
    with _bar("verifying") as progress:
        problems = verify_shards(shards, index, decode=decode, workers=workers, progress=progress)
    _print(problems, json)
    return PROBLEMS_FOUND if problems else 0


def _print(problems: list[Problem], as_json: bool) -> None:
    if as_json:
        print(json.dumps([problem._asdict() for problem in problems]))
    else:
        print("\n".join(str(problem) for problem in problems) or "no problems")
