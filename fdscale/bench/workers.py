"""Worker processes against worker threads, inside a training step and alone.

    fdscale bench workers --json workers.json

The step is what a GPU's step is to the host: much Python that launches many small operations, and little computing in
this process (a narrow SwinV2 on tiny images, 12 blocks forward, backward and AdamW), while a batch of BATCH views has
to be there for each. What threads cost such a loop is time for Python's lock; what processes cost is copying batches
and waking up. All ways take turns in random order within a round, beside the same steps without any loader.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdscale.bench.data import BATCH, PREFETCH, Effort, in_turns, machine, pack, ratio, samples_of
from fdscale.bench.timing import save
from fdscale.data.stream import batches
from fdscale.models import backbone

COUNTS = (1, 2, 4)
FULL = Effort({"500 x 375": (0, 500, 375)}, 8, 120, 24, 0)
QUICK = Effort({"100 x 75": (0, 100, 75)}, 8, 5, 1, 0)
NARROW = {
    "img_size": 64,
    "embed_dim": 12,
    "depths": [2, 2, 6, 2],
    "num_heads": [1, 2, 4, 8],
    "window_size": 2,
    "drop_path_rate": 0.2,
}
Loader = Callable[[], Any]  # opens a stream of batches of images, in a context


def main(rounds: int, quick: bool, json: Path | None) -> int:
    """`fdscale bench workers`: measure, print Markdown, and write JSON."""
    torch.set_num_threads(1)
    result = measure(1 if quick else rounds, QUICK if quick else FULL)
    print_tables(result)
    if json:
        save(json, result)
    return 0


def measure(rounds: int, effort: Effort) -> dict[str, Any]:
    """Seconds per batch of every round by way and clock: alone, in a step, and the step's wait for data."""
    steps = effort.loader_batches
    with tempfile.TemporaryDirectory() as folder:
        shards = pack(Path(folder), effort)
        loaders: dict[str, Loader] = {"no loader": still}
        for count in COUNTS:
            loaders[f"{count} process{'es' if count > 1 else ''}"] = partial(processes, shards, count)
            loaders[f"{count} thread{'s' if count > 1 else ''}"] = partial(threads, shards, count)
        train = training_step()
        waits: dict[str, list[float]] = {name: [] for name in loaders}
        stepping = {name: partial(in_step, loader, steps, train, waits[name]) for name, loader in loaders.items()}
        alone = {name: partial(drain, loader, steps) for name, loader in loaders.items() if name != "no loader"}
        result = {"machine": machine(), "rounds": rounds, "images": BATCH}
        result["step"] = in_turns(stepping, rounds)["wall"]
        result["wait"] = {name: taken[1:] for name, taken in waits.items()}  # without the warm-up
        result["alone"] = in_turns(alone, rounds)["wall"]
    return result


def training_step() -> Callable[[Tensor], None]:
    """A step on a batch of uint8 views: all of them arrive, a thumbnail of one is trained on."""
    student = backbone("swin_v2", NARROW)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)

    def step(images: Tensor) -> None:
        small = images[:1, :, ::4, ::4][..., :56, :56].float() / 255
        student(torch.nn.functional.pad(small, (0, 8, 0, 8))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_step(loader: Loader, steps: int, train: Callable[[Tensor], None], waits: list[float]) -> float:
    """Seconds per training step; the part that was waiting for data is added to waits."""
    waited = 0.0
    with loader() as stream:
        for _ in range(2):
            train(next(stream))
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            images = next(stream)
            waited += time.perf_counter() - asked
            train(images)
        taken = time.perf_counter() - start
    waits.append(waited / steps)
    return taken / steps


def drain(loader: Loader, wanted: int) -> float:
    """Seconds per batch of a loader alone, once what was prepared ahead is used up."""
    with loader() as stream:
        for _ in range(2 * PREFETCH * max(COUNTS)):
            next(stream)
        start = time.perf_counter()
        for _ in range(wanted):
            next(stream)
        return (time.perf_counter() - start) / wanted


@contextmanager
def still() -> Iterator[Iterator[Tensor]]:
    """The same batch again and again."""
    yield itertools.repeat(torch.zeros(BATCH, 3, 224, 224, dtype=torch.uint8))


@contextmanager
def processes(shards: str, workers: int) -> Iterator[Iterator[Tensor]]:
    """The stream that `fdscale distill` reads."""
    sizes: dict[str, Any] = {"batch_size": BATCH, "micro_batch": BATCH, "rank": 0, "world": 1, "start": 0}
    stream = batches(samples_of(shards), workers=workers, prefetch=PREFETCH, **sizes)
    try:
        yield (batch["images"] for batch in stream)
    finally:
        stream.close()


@contextmanager
def threads(shards: str, workers: int) -> Iterator[Iterator[Tensor]]:
    """The same samples by a pool of threads in this process, a batch per thread at a time, as many ahead."""
    samples = samples_of(shards)

    def batch(number: int) -> Tensor:
        numbers = list(range(number * BATCH, (number + 1) * BATCH))
        return torch.stack([sample.image for sample in samples.__getitems__(numbers)])

    def stream() -> Iterator[Tensor]:
        ahead = [pool.submit(batch, number) for number in range(PREFETCH * workers)]
        for number in itertools.count(len(ahead)):
            ahead.append(pool.submit(batch, number))
            yield ahead.pop(0).result()

    with ThreadPoolExecutor(workers) as pool:
        try:
            yield stream()
        finally:
            pool.shutdown(cancel_futures=True)


def print_tables(result: dict[str, Any]) -> None:
    """One Markdown table: ratios are of processes to as many threads, within a round."""
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    print(f"{about};\n{result['rounds']} rounds; medians; ratios within a round with quartiles\n")
    print("| way | step, ms | of it waiting, ms | step, processes / threads | alone, images/s |")
    print("|---|---|---|---|---|")
    for name, taken in result["step"].items():
        other = name.replace("processes", "threads").replace("process", "thread")
        against = ratio(result["step"], name, other) if other != name else ""
        alone = f"{result['images'] / statistics.median(result['alone'][name]):.0f}" if name in result["alone"] else ""
        step, wait = (1e3 * statistics.median(seconds) for seconds in (taken, result["wait"][name]))
        print(f"| {name} | {step:.1f} | {wait:.1f} | {against} | {alone} |")
    print()
