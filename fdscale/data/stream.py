"""Batches of a run, from any sample number on, for one rank of any number, by any number of workers.

The global batch of B samples that starts at number n holds the numbers n .. n + B - 1 in its slots s = 0 .. B - 1.
Rank r of W takes the slots r, r + W, r + 2 W, ..., and cuts them in micro-batches of m, in order. W divides the lanes
of the order, so in an epoch a rank keeps to its own lanes, and reads its own shards. What a sample looks like depends
on its number alone (order.py, augment.py): the state of the stream is the number to go on from.

Letters: B samples in a global batch, W ranks, m samples in a micro-batch, S side of an image in pixels.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fdscale import UserError
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.data.lost import Lost, Replaced
from fdscale.data.mixture import Joined, Mixture
from fdscale.data.order import Order, Sequential, check_world, philox
from fdscale.data.parallel import die_with_parent
from fdscale.data.prefetch import Prefetch, plan_of_lanes, plan_of_stretch
from fdscale.data.sources import end_when_told

Batches = Generator[dict[str, Any], None, None]
Complete = Callable[[dict[str, Any]], dict[str, Any]]
# A scheduler signals every process of a job; the main process decides what to do, and needs its data until then.
SETTLE_S = 0.05  # for threads to be done with what was before a fork
FOR_MAIN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LABEL = ("cls",)  # extension of the member that holds the number of a sample's class
MASK = ("seg.png",)  # of the one that holds the classes of its pixels
OBJECTS = ("objects.json",)  # of the one that says what is where, see `objects`
TRIES = 8  # others drawn for a lost sample, first from its shard, which is at hand, then as many from the whole set


class Seen(NamedTuple):
    """What a view makes of a sample that has more than an image.

    alike: tensors of one shape, stacked in a batch. many: tensors with a row for each of a sample's objects, equally
    many of each, joined in a batch, which then says how many as `counts`.
    """

    image: Tensor
    alike: dict[str, Tensor] = {}  # noqa: RUF012 - never changed
    many: dict[str, Tensor] = {}  # noqa: RUF012 - never changed


class Sample(NamedTuple):
    """A sample by its number. shard, key: what the image really is of, the replacement's where `replaced` is given."""

    image: Tensor  # (3, S, S) uint8
    number: int
    shard: str
    key: str
    label: int | None = None
    replaced: Replaced | None = None
    seen: Seen | None = None  # where it has more than an image


class Samples(Dataset):
    """The samples of a set by number: `samples[n]` is a Sample.

    index: where the bytes lie. order: which sample a number means. view: called as view(data, number=n) with the bytes
    of an image file, for instance `partial(train_view, seed=0, size=224)`. classes: how many there are, where each
    sample's member .cls is to be read, the number of its class; one without a good number is Lost. members:
    extensions of others whose bytes view is given behind the image's; it may return `Seen`. A sample that is Lost is
    replaced, at random by (seed of the order, number). Raises UserError naming shard and key where no replacement can
    be had either, or where data are not lost but out of reach.
    """

    def __init__(
        self,
        index: Index | Joined | Folders,
        order: Order | Mixture | Sequential,
        view: Callable[..., Any],
        classes: int | None = None,
        members: Sequence[tuple[str, ...]] = (),
    ) -> None:
        self.index, self.order, self.view, self.classes, self.members = index, order, view, classes, members

    def __getitem__(self, number: int) -> Sample:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[Sample]:
        _, shards, rows = self.order.locate(np.array(numbers, np.int64))
        places = zip(numbers, shards.tolist(), rows.tolist(), strict=True)
        return [self._sample(number, shard, row) for number, shard, row in places]

    def _sample(self, number: int, shard: int, row: int) -> Sample:
        try:
            return self._view(number, shard, row)
        except Lost as error:
            reason, key = str(error), self.index.key(shard, row)
        for other in self._others(number, shard):
            try:
                found = self._view(number, *other)
            except Lost:
                continue
            replaced = Replaced(number, self.index.names[shard], key, reason, found.shard, found.key)
            return found._replace(replaced=replaced)
        raise UserError(
            f"{self.index.path(shard)}: sample '{key}': {reason}; and none of {2 * TRIES} others drawn in its place "
            "can be used. fdscale shards verify --decode lists what is wrong with the set"
        )

    def _view(self, number: int, shard: int, row: int) -> Sample:
        label = None if self.classes is None else self._label(shard, row, self.classes)
        found = [self.index.read(shard, row), *(self.index.read(shard, row, member) for member in self.members)]
        seen = self.view(*found, number=self._seen(number))
        image, more = (seen.image, seen) if isinstance(seen, Seen) else (seen, None)
        return Sample(image, number, self.index.names[shard], self.index.key(shard, row), label, seen=more)

    def _label(self, shard: int, row: int, classes: int) -> int:
        text = self.index.read(shard, row, LABEL)
        if not re.fullmatch(rb"\s*\d{1,9}\s*", text) or int(text) >= classes:
            shown = text[:20].decode(errors="replace").strip()
            raise Lost(f"its .cls is '{shown}', expected a whole number from 0 to {classes - 1}")
        return int(text)

    def _seen(self, number: int) -> int:
        """The number that decides what is seen: beyond the span of the order, samples repeat as they were."""
        return number if self.order.span is None else number % self.order.span

    def _others(self, number: int, shard: int) -> Iterator[tuple[int, int]]:
        """(shard, row) of what may stand for a lost sample of `shard`: a function of (seed, number) alone."""
        words = philox(self.order.seed, self._seen(number), (0, 4, 0, 0), 2 * TRIES).tolist()
        for word in words[:TRIES]:
            yield shard, word % int(self.index.counts[shard])
        ends = np.cumsum(self.index.counts)
        for word in words[TRIES:]:
            place = word % int(ends[-1])
            where = int(np.searchsorted(ends, place, side="right"))
            yield where, place - int(ends[where] - self.index.counts[where])


def batches(
    samples: Samples,
    *,
    batch_size: int,
    micro_batch: int,
    rank: int,
    world: int,
    start: int,
    stop: int | None = None,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    complete: Complete | None = None,
    together: int = 1,
) -> Batches:
    """The micro-batches of one rank, global batch after global batch, B / (W m) of them for each.

    batch_size: B, over all ranks. start: number of the first sample of the first global batch. stop: a sample number;
    the last global batch is the last one that starts below it (None: endless). workers: processes (0: this one).
    prefetch: micro-batches each worker prepares ahead. complete: what it returns for a micro-batch, called in the
    worker, is added to it (the features of a cached teacher). together: t consecutive numbers stay in a micro-batch:
    rank r takes the slots s with (s // t) mod W = r. Yields dicts of images (m, 3, S, S) uint8, numbers (m,) int64,
    origin, m pairs (shard, key), replaced, a Replaced for each sample that was lost, labels (m,) int64 where the
    samples have them, and what else their view has `Seen`. Close the iterator to stop the workers. Raises UserError if
    the sizes do not divide, or data are out of reach.
    """
    assert not isinstance(samples.order, Sequential)
    check_world(samples.order.lanes, world, together)
    if micro_batch < 1 or batch_size < 1 or batch_size % (world * micro_batch) or micro_batch % together:
        share = batch_size // world
        fit = (m for m in range(together, share + 1, together) if share % m == 0)
        usable = [str(m) for m in fit] if batch_size % world == 0 else []
        raise UserError(
            f"a batch of {batch_size} does not divide into micro-batches of {micro_batch} on {world} ranks"
            + (f", with {together} samples at a time; " if together > 1 else "; ")
            + (
                f"usable micro-batches: {', '.join(usable)}"
                if usable
                else f"expected a batch that {world * together} divides"
            )
        )
    if start < 0:
        raise UserError(f"start is sample number {start}, expected 0 or more")
    assert 0 <= rank < world
    plan = _Slots(batch_size, micro_batch, rank, world, start, stop, together)
    need = plan_of_lanes(samples.order, rank, world, samples.index.cache.ranks, together)
    ahead = Prefetch(samples.index, need, start + rank * together) if samples.index.remote else None
    return _deliver(samples, plan, workers, prefetch, pin_memory, ahead, complete)


def chosen_batches(
    samples: Samples,
    numbers: Iterable[list[int]],
    *,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
    complete: Complete | None = None,
) -> Batches:
    """The micro-batches of these numbers, one after another, as `batches` yields them."""
    return _deliver(samples, numbers, workers, prefetch, pin_memory, complete=complete)


def evaluation_batches(
    index: Index | Folders,
    view: Callable[..., Any],
    *,
    micro_batch: int,
    rank: int,
    world: int,
    workers: int,
    limit: int | None = None,
    prefetch: int = 2,
    pin_memory: bool = False,
    classes: int | None = None,
    members: Sequence[tuple[str, ...]] = (),
) -> Batches:
    """Every sample of a set once, over all ranks, in the same number of micro-batches on each.

    view: of the bytes of an image file, for instance `partial(eval_view, size=224)`. Numbers count the samples in the
    order of the index. limit: only the first so many samples (None: all). classes, members: see `Samples`.
    Yields what `batches` does, and weights (m,) float32: 1, or 0 for a sample that only fills up the last
    micro-batches, or that stands for a lost one.
    """
    assert 0 <= rank < world
    if micro_batch < 1:
        raise UserError(f"micro-batch is {micro_batch}, expected at least 1")
    samples = Samples(index, Sequential(index.counts), partial(_without_number, view=view), classes, members)
    total = index.samples if limit is None else min(limit, index.samples)
    share = -(-total // world)  # each rank reads a stretch of its own
    mine = np.arange(-(-share // micro_batch) * micro_batch) + rank * share
    weights = (mine < min((rank + 1) * share, total)).astype(np.float32).reshape(-1, micro_batch)
    plan = np.minimum(mine, total - 1).reshape(-1, micro_batch).tolist()
    need = plan_of_stretch(Sequential(index.counts), plan[-1][-1])
    ahead = Prefetch(index, need, plan[0][0]) if index.remote else None
    return _weighted(_deliver(samples, plan, workers, prefetch, pin_memory, ahead), torch.from_numpy(weights))


class _Slots:
    """The numbers of one rank's micro-batches, in order."""

    def __init__(
        self, batch_size: int, micro_batch: int, rank: int, world: int, start: int, stop: int | None, together: int = 1
    ) -> None:
        self.batch_size, self.micro_batch, self.rank, self.world = batch_size, micro_batch, rank, world
        self.start, self.stop, self.together = start, stop, together

    def __iter__(self) -> Iterator[list[int]]:
        n, width, step = self.start, self.micro_batch * self.world, self.world * self.together
        while self.stop is None or n < self.stop:
            for first in range(n + self.rank * self.together, n + self.batch_size, width):
                yield [i + j for i in range(first, first + width, step) for j in range(self.together)]
            n += self.batch_size


class _Guarded(Dataset):
    """Samples whose errors travel as values: raised in a worker they would reach the user inside a stack trace."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, numbers: list[int]) -> list[Sample] | UserError:
        try:
            return self.samples.__getitems__(numbers)
        except UserError as error:
            return error


def _deliver(
    samples: Samples,
    plan: Any,
    workers: int,
    prefetch: int,
    pin_memory: bool,
    ahead: Prefetch | None = None,
    complete: Complete | None = None,
) -> Batches:
    told = list(os.pipe()) if ahead is not None and workers else []  # ends what the workers fetch
    loader = DataLoader(
        _Guarded(samples),
        batch_sampler=plan,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        collate_fn=partial(_collate, complete=complete),
        pin_memory=pin_memory,
        worker_init_fn=partial(_begin_worker, told=told),
        generator=torch.Generator(),  # for a worker seed that nothing here uses: the run's generator stays untouched
    )
    # A fork just when another thread, such as gloo's after a collective, takes the interpreter's lock makes a worker
    # that hangs for ever (CPython's issue 112275, in releases of 3.11, too): 5 of 3000 forks did, and 0 of 3000 so.
    time.sleep(SETTLE_S if workers else 0)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_MAIN)  # by the workers too, until they know to ignore them
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    stop = partial(_stop_workers, iterator, ahead, told)
    atexit.register(stop)  # workers ignore SIGTERM, so multiprocessing would wait for them for ever at exit
    try:
        if ahead is not None:
            ahead.start()  # after the workers: a fork copies no threads, but may copy what they hold
        for batch in iterator:
            if isinstance(batch, UserError):
                raise batch
            if ahead is not None:
                ahead.advance(int(batch["numbers"][0]))
            yield batch
    except RuntimeError as error:
        codes = [process.exitcode for process in _processes(iterator)]
        died = [code for code in codes if code]
        if not died:
            raise
        how = f"was killed by signal {-died[0]}" if died[0] < 0 else f"ended with status {died[0]}"
        raise UserError(
            f"a data worker {how}. Signal 9 mostly means that the memory ran out: use fewer workers or a smaller "
            "prefetch; signal 7, that /dev/shm is too small"
        ) from error
    finally:
        stop()
        atexit.unregister(stop)


def _weighted(stream: Batches, weights: Tensor) -> Batches:
    try:
        for batch, weight in zip(stream, weights, strict=True):
            lost = torch.tensor([replaced.number for replaced in batch["replaced"]], dtype=torch.int64)
            yield {**batch, "weights": weight * ~torch.isin(batch["numbers"], lost)}
    finally:
        stream.close()


def _collate(samples: list[Sample] | UserError, complete: Complete | None) -> dict[str, Any] | UserError:
    if isinstance(samples, UserError):
        return samples
    batch = {
        "images": torch.stack([sample.image for sample in samples]),
        "numbers": torch.tensor([sample.number for sample in samples], dtype=torch.int64),
        "origin": [(sample.shard, sample.key) for sample in samples],
        "replaced": [sample.replaced for sample in samples if sample.replaced],
    }
    if samples[0].label is not None:
        batch["labels"] = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
    if seen := [sample.seen for sample in samples if sample.seen is not None]:
        batch |= {name: torch.stack([one.alike[name] for one in seen]) for name in seen[0].alike}
        batch |= {name: torch.cat([one.many[name] for one in seen]) for name in seen[0].many}
        if seen[0].many:
            batch["counts"] = torch.tensor([len(next(iter(one.many.values()))) for one in seen])
    try:
        return batch if complete is None else batch | complete(batch)
    except UserError as error:
        return error


def _begin_worker(worker: int, told: list[int]) -> None:
    for number in FOR_MAIN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_MAIN)
    die_with_parent()
    torch.set_num_threads(1)
    if told:
        end_when_told(told[0])


def _processes(iterator: Any) -> list[Any]:
    return getattr(iterator, "_workers", [])


def _stop_workers(iterator: Any, ahead: Prefetch | None, told: list[int]) -> None:
    """End the workers now; the loader itself would only do so when its last reference is gone."""
    if told:
        os.write(told[1], bytes(len(_processes(iterator))))
    if ahead is not None:
        ahead.close()
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()
    for process in _processes(iterator):
        if process.is_alive():  # busy for longer than the loader waits
            process.kill()
            process.join()
    while told:
        os.close(told.pop())


def _without_number(*data: bytes, number: int, view: Callable[..., Any]) -> Any:
    return view(*data)
