"""Which sample is number n of a run: a pure function of (seed, n).

The samples of an epoch are the shards in random order, one after another. This sequence is cut into C lanes of equal
length (give or take one), and inside each lane every block of M samples is shuffled. Number n takes the next sample
of lane (place in the epoch) mod C. So a batch draws from C places of the set at once, while each lane reads its
shards in sequence.

No rank, world size, worker count or history enters, so a run resumes from one integer, on any number of ranks. Epochs
follow one another without a gap: a batch may hold the last samples of one and the first of the next.

Randomness is the raw output of Philox, keyed by (seed, epoch), sorted: numpy keeps raw streams the same from version
to version, which it does not promise of its `permutation`. The second word of the counter keeps the uses apart: 0
views of a sample (augment.py), 1 order of shards, 2 order inside blocks, 3 packing (shards.py, reshard.py), 4
replacements of lost samples (stream.py), 5 mixtures (mixture.py), 6 a sample for statistics (stats.py), 7 RandAugment
(randaugment.py), 8 mixup and CutMix, 9 erasing (mixing.py), 10 scenes (dense.py), 11 objects (objects.py), from 20 on
what detectors sample (proposals.py), 40 points of masks (mask2former.py).

Letters: N samples in the set, C lanes, M samples in a block, n sample number, k numbers asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from fdscale import UserError
from fdscale.data.recent import Recent

BLOCK = 8192  # samples shuffled among each other in a lane: about a shard, so that a lane needs two at a time
MOST_LANES = 512  # 64 nodes of 8: more lanes only make each rank touch more shards
FEW_SHARDS = 64  # below it lanes may share a shard: so small a set is at hand as a whole on every node
TABLE_BYTES = 64 * 2**20  # shuffled blocks kept; one of BLOCK samples takes 16 kB

# A new Philox object asks the system for entropy, even with a key: moving one to its place takes a quarter of the time.
_local = threading.local()
_EMPTY_BUFFER = {"buffer": np.zeros(4, np.uint64), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}


def philox(seed: int, word: int, counter: tuple[int, int, int, int], count: int) -> np.ndarray:
    """`count` raw words (count,) uint64 of the Philox4x64-10 stream with key (seed, word), from `counter` on."""
    generator = getattr(_local, "generator", None)
    if generator is None:
        generator = _local.generator = np.random.Philox(key=0)
    place = {"key": np.array([seed, word], np.uint64), "counter": np.array(counter, np.uint64)}
    generator.state = {"bit_generator": "Philox", "state": place, **_EMPTY_BUFFER}
    return generator.random_raw(count)


def permutation(seed: int, word: int, counter: tuple[int, int, int, int], count: int) -> np.ndarray:
    """A random order (count,) of 0..count-1, in the smallest unsigned type that holds it."""
    order = np.argsort(philox(seed, word, counter, count), kind="stable")
    return order.astype(np.min_scalar_type(max(count - 1, 0)))


class Order:
    """The endless order of samples of a set.

    counts: samples in each shard; empty shards are never named. seed: 0..2**63-1. lanes and block: see above. span:
    the numbers repeat after so many samples, n means n mod span (None: they never do).
    Raises UserError if there is no sample, or fewer samples than lanes.
    """

    def __init__(
        self, counts: Sequence[int] | np.ndarray, seed: int, lanes: int, block: int = BLOCK, span: int | None = None
    ) -> None:
        counts = np.asarray(counts, np.int64)
        self.samples = int(counts.sum())
        self.seed, self.lanes, self.block, self.span = seed, lanes, block, span
        if self.samples == 0:
            raise UserError(f"no samples to order: all {len(counts)} shards are empty; check which shards were given")
        check_seed(seed)
        if not 1 <= lanes <= self.samples:
            raise UserError(
                f"{lanes} lanes for {self.samples} samples: expected from 1 to {self.samples}; "
                "give fewer lanes, or none to have them chosen"
            )
        if block < 1:
            raise UserError(f"block is {block} samples, expected at least 1")
        if span is not None and span < 1:
            raise UserError(f"span is {span} samples, expected at least 1")
        self._shards = np.flatnonzero(counts)
        self._counts = counts[self._shards]
        self._epochs = Recent(limit=3)
        self._blocks = Recent(limit=TABLE_BYTES, weigh=_block_bytes)

    def at(self, n: int) -> tuple[int, int, int]:
        """(epoch, shard, row in the shard) of sample number n >= 0."""
        epochs, shards, rows = self.locate(np.array([n], np.int64))
        return int(epochs[0]), int(shards[0]), int(rows[0])

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs, shards, rows), each (k,) int64, of the sample numbers (k,) int64."""
        numbers = np.asarray(numbers, np.int64)
        epochs, places = np.divmod(numbers if self.span is None else numbers % self.span, self.samples)
        steps, lanes = np.divmod(places, self.lanes)  # n-th sample of which lane
        blocks, inside = np.divmod(steps, self.block)
        keys = zip(epochs.tolist(), lanes.tolist(), blocks.tolist(), strict=True)
        shuffled = [self._blocks.get(key, self._make_block)[i] for key, i in zip(keys, inside.tolist(), strict=True)]
        start = lanes * (self.samples // self.lanes) + np.minimum(lanes, self.samples % self.lanes)
        sequence = start + blocks * self.block + np.asarray(shuffled, np.int64)  # place in the sequence of shards
        shards, rows = np.empty_like(sequence), np.empty_like(sequence)
        for epoch in np.unique(epochs).tolist():
            order, ends = self._epochs.get(epoch, self._make_epoch)
            here = epochs == epoch
            k = np.searchsorted(ends, sequence[here], side="right")
            shards[here] = self._shards[order[k]]
            rows[here] = sequence[here] - (ends[k] - self._counts[order[k]])
        return epochs, shards, rows

    def places(self, n: int) -> list[tuple[Order, int, int]]:
        """(order of a set, number in it, number of its first shard) for each set that number n stands at: here one."""
        return [(self, n if self.span is None else n % self.span, 0)]

    def block_shards(self, epoch: int, lane: int, block: int) -> list[int]:
        """The shards that a block of a lane draws from, and the one that the lane reads after them, -1 if none.

        [-1] for a block after the last.
        """
        order, ends = self._epochs.get(epoch, self._make_epoch)
        start = lane * (self.samples // self.lanes) + min(lane, self.samples % self.lanes)
        end = start + self.samples // self.lanes + (lane < self.samples % self.lanes)
        first = start + block * self.block
        if first >= end:
            return [-1]
        at = np.array([first, min(first + self.block, end) - 1, end - 1])
        a, b, z = np.searchsorted(ends, at, side="right").tolist()
        shards = self._shards[order[a : b + 2]].tolist()
        return shards if b < z else [*shards[: b + 1 - a], -1]

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = permutation(self.seed, epoch, (0, 1, 0, 0), len(self._shards))
        return order, np.cumsum(self._counts[order])

    def _make_block(self, key: tuple[int, int, int]) -> np.ndarray:
        epoch, lane, block = key
        length = self.samples // self.lanes + (lane < self.samples % self.lanes)
        count = min(self.block, length - block * self.block)
        return permutation(self.seed, epoch, (0, 2, lane, block), count)


class Sequential:
    """The samples of a set once, shard by shard: number n is the n-th of them. For evaluation."""

    seed = 0  # of replacements only
    span = None

    def __init__(self, counts: Sequence[int] | np.ndarray) -> None:
        self._counts = np.asarray(counts, np.int64)
        self._ends = np.cumsum(self._counts)
        self.samples = int(self._counts.sum())

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs, shards, rows), each (k,) int64, of the sample numbers (k,) int64 below `samples`; epochs are 0."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        return np.zeros_like(numbers), shards, numbers - (self._ends[shards] - self._counts[shards])

    def shards_between(self, first: int, last: int) -> list[int]:
        """The shards of the numbers first .. last, in order."""
        a, z = np.searchsorted(self._ends, [first, last], side="right").tolist()
        return (a + np.flatnonzero(self._counts[a : z + 1])).tolist()


def default_lanes(batch_size: int, n_shards: int, samples: int) -> int:
    """How many lanes suit a set: a pure function of the batch and the set, never of the world size.

    Of the divisors of `batch_size` that are at most `samples`, at most 512, and at most `n_shards` (or 64, if there
    are fewer shards), the one with the most divisors of its own, which are the usable world sizes; among equals the
    one with the most factors of two, then the largest.
    """
    bound = min(samples, MOST_LANES, max(n_shards, FEW_SHARDS))
    usable = [d for d in _divisors(batch_size) if d <= bound]
    if not usable:
        raise UserError(f"no lanes for a batch of {batch_size} from {samples} samples: both must be at least 1")
    return max(usable, key=lambda d: (len(_divisors(d)), d & -d, d))


def check_seed(seed: int) -> None:
    """Raise UserError unless the seed is one every part of the data path can use."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}, expected a whole number from 0 to 2**63-1")


def check_world(lanes: int, world: int, together: int = 1) -> None:
    """Raise UserError, naming the usable world sizes, unless `world` ranks can share `lanes` lanes evenly.

    together: consecutive lanes that stay on one rank.
    """
    if world < 1 or lanes % (world * together):
        usable = ", ".join(str(d) for d in _divisors(lanes // together)) if lanes % together == 0 else "none"
        pairs = f", taken {together} at a time" if together > 1 else ""
        raise UserError(
            f"world size {world} does not divide the {lanes} lanes of the sample order{pairs}; usable world sizes: "
            f"{usable}. Run on one of these, or start a new run with a number of lanes (data.lanes) that "
            f"{world * together} divides"
        )


def _block_bytes(block: np.ndarray) -> int:
    return block.nbytes + 300  # the objects around a table: they outweigh it when the set is tiny


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
