"""How well a global batch is mixed: fdscale's order of samples, against webdataset's shuffle buffer.

    fdscale bench shuffle --json shuffle.json

Nothing is read: the orders are asked which samples make up a batch. The sets are as large as ImageNet-22K and LAION-2B,
packed class by class: the worst case, and what packing without shuffling gives. webdataset does what its documentation
recommends: shards are shuffled, dealt out to ranks and workers, read one after another, and samples go through a
buffer, here of 1000 and of 5000.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import webdataset

from fdscale.bench.timing import save
from fdscale.data.order import Order, default_lanes

PER_SHARD = 10_000  # samples
FIRST, BATCHES = 100, 20  # measured are so many batches after the first ones, when buffers are full


class Set(NamedTuple):
    """A set of `shards` shards of PER_SHARD samples, in `classes` classes of equal size."""

    name: str
    shards: int
    classes: int


class Machine(NamedTuple):
    """Who reads a global batch."""

    batch: int
    ranks: int
    workers: int  # of each rank


SETS = (Set("ImageNet-22K", 1420, 21841), Set("LAION-2B", 200_000, 100_000))
MACHINE = Machine(batch=4096, ranks=8, workers=4)


def main(json: Path | None) -> int:
    """`fdscale bench shuffle`: measure, print, and write JSON."""
    result = {one.name: measure(one, MACHINE) for one in SETS}
    print_tables(result, MACHINE)
    if json:
        save(json, result)
    return 0


def measure(data: Set, machine: Machine) -> dict[str, Any]:
    """What is in a batch, for every way; means over BATCHES."""
    lanes = default_lanes(machine.batch, data.shards, data.shards * PER_SHARD)
    start = time.perf_counter()
    ours = list(by_order(data, machine, lanes))
    seconds = time.perf_counter() - start
    rows = {f"fdscale, {lanes} lanes, blocks of 4096": describe(ours, data)}
    for buffer in (1000, 5000):
        rows[f"webdataset, buffer of {buffer}"] = describe(list(by_webdataset(data, machine, buffer)), data)
    rng = np.random.default_rng(0)
    uniform = [rng.integers(0, data.shards * PER_SHARD, machine.batch) for _ in range(BATCHES)]
    rows["independent draws"] = describe(uniform, data)
    order = Order(np.full(data.shards, PER_SHARD), 0, lanes)
    start = time.perf_counter()
    order.locate(np.arange(machine.batch) + 10**9)
    return {"rows": rows, "ms_per_batch": seconds / (BATCHES + 1) * 1e3, "seek_s": time.perf_counter() - start}


def describe(batches: list[np.ndarray], data: Set) -> dict[str, float]:
    """Means over batches (B,) of places in the set."""
    size = data.shards * PER_SHARD / data.classes
    return {
        "shards": float(np.mean([len(np.unique(batch // PER_SHARD)) for batch in batches])),
        "classes": float(np.mean([len(np.unique((batch // size).astype(np.int64))) for batch in batches])),
        "most_of_one_class": float(np.mean([np.bincount((batch // size).astype(np.int64)).max() for batch in batches])),
    }


def by_order(data: Set, machine: Machine, lanes: int) -> Iterator[np.ndarray]:
    """Places in the set (B,) of batches of fdscale's order."""
    order = Order(np.full(data.shards, PER_SHARD), seed=0, lanes=lanes, block=4096)
    for k in range(FIRST, FIRST + BATCHES):
        _, shards, rows = order.locate(np.arange(machine.batch, dtype=np.int64) + k * machine.batch)
        yield shards * PER_SHARD + rows


def by_webdataset(data: Set, machine: Machine, buffer: int) -> Iterator[np.ndarray]:
    """The same of webdataset's own stages; workers of a rank take turns, a whole batch of the rank each."""
    shards = list(range(data.shards))
    random.Random(0).shuffle(shards)  # as SimpleShardList does
    share = machine.batch // machine.ranks
    streams = [
        [worker(shards[rank :: machine.ranks][w :: machine.workers], buffer) for w in range(machine.workers)]
        for rank in range(machine.ranks)
    ]
    for k in range(FIRST + BATCHES):
        batch = [islice(streams[rank][k % machine.workers], share) for rank in range(machine.ranks)]
        places = np.fromiter((place for part in batch for place in part), np.int64, machine.batch)
        if k >= FIRST:
            yield places


def worker(shards: list[int], buffer: int) -> Iterator[int]:
    """What one worker delivers: its shards one after another, through webdataset's shuffle."""
    read = partial(_read, shards)
    return iter(webdataset.DataPipeline(read, webdataset.shuffle(buffer, initial=buffer, seed=shards[0])))


def _read(shards: list[int]) -> Iterator[int]:
    for shard in shards:
        yield from range(shard * PER_SHARD, (shard + 1) * PER_SHARD)


def print_tables(result: dict[str, Any], machine: Machine) -> None:
    """Markdown."""
    print(f"Global batch {machine.batch}, {machine.ranks} ranks with {machine.workers} workers each.\n")
    for one in SETS:
        found = result[one.name]
        print(f"{one.name}: {one.shards} shards of {PER_SHARD}, {one.classes} classes, packed class by class\n")
        print("| order | distinct shards | distinct classes | most of one class |\n|---|---|---|---|")
        for name, row in found["rows"].items():
            print(f"| {name} | {row['shards']:.0f} | {row['classes']:.0f} | {row['most_of_one_class']:.0f} |")
        seconds = f"{found['ms_per_batch']:.1f} ms per batch; first batch at sample 10^9 after {found['seek_s']:.2f} s"
        print(f"\nfdscale: {seconds}.\n")
