"""Several sets in one stream, each with a share of it: a pure function of (seed, n) like the order of one set.

Number n belongs to lane n mod C, as everywhere. In each lane every run of PERIOD numbers is dealt out to the sets in
proportion to their weights, in random order; the j-th number that a set gets in a lane is number j C + lane of the
set's own order (order.py). So shares are exact in every period of every lane, a set's epochs follow one another without
loss whatever its weight, and lanes read their shards in sequence as they do alone.

Letters: C lanes, S sets, n sample number, k numbers asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from fdscale import UserError
from fdscale.data.index import Index
from fdscale.data.order import BLOCK, TABLE_BYTES, Order, permutation, philox
from fdscale.data.recent import Recent
from fdscale.data.sources import Stop
from fdscale.data.tar import IMAGE_EXTENSIONS

PERIOD = 1000  # numbers of a lane that are dealt out together: weights hold to a thousandth


class Mixture:
    """The endless order of samples of several sets. `locate` numbers the shards of all sets through, set by set.

    counts: of each set, the samples in each shard. weights: of each set, over 0; only their ratio counts. seed, lanes,
    block, span: see `Order`. Raises UserError for weights that do not fit, or one below a thousandth of their sum.
    """

    def __init__(
        self,
        counts: Sequence[np.ndarray],
        weights: Sequence[float],
        seed: int,
        lanes: int,
        block: int = BLOCK,
        span: int | None = None,
    ) -> None:
        self.quotas = quotas(weights, len(counts))  # (S,) numbers of a period
        seeds = (philox(seed, 0, (0, 5, 1, 0), len(counts)) >> np.uint64(1)).tolist()
        self.orders = [Order(one, own, lanes, block) for one, own in zip(counts, seeds, strict=True)]
        self.samples = sum(order.samples for order in self.orders)
        self.seed, self.lanes, self.block, self.span = seed, lanes, block, span
        self._first = np.cumsum([0, *(len(one) for one in counts)])  # number of each set's first shard
        self._deals = Recent(limit=TABLE_BYTES, weigh=lambda deal: deal[0].nbytes + deal[1].nbytes + 300)

    def at(self, n: int) -> tuple[int, int, int]:
        """(epoch of its set, shard, row in the shard) of sample number n >= 0."""
        epochs, shards, rows = self.locate(np.array([n], np.int64))
        return int(epochs[0]), int(shards[0]), int(rows[0])

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epochs of their sets, shards, rows), each (k,) int64, of the sample numbers (k,) int64."""
        numbers = np.asarray(numbers, np.int64)
        steps, lanes = np.divmod(numbers if self.span is None else numbers % self.span, self.lanes)
        periods, inside = np.divmod(steps, PERIOD)
        deals = [self._deals.get(key, self._deal) for key in zip(lanes.tolist(), periods.tolist(), strict=True)]
        sets = np.array([deal[0][i] for deal, i in zip(deals, inside.tolist(), strict=True)], np.int64)
        turns = np.array([deal[1][i] for deal, i in zip(deals, inside.tolist(), strict=True)], np.int64)
        own = (periods * self.quotas[sets] + turns) * self.lanes + lanes  # number in the set's own order
        epochs, shards, rows = (np.empty_like(own) for _ in range(3))
        for s in np.unique(sets).tolist():
            here = sets == s
            epochs[here], shards[here], rows[here] = self.orders[s].locate(own[here])
            shards[here] += self._first[s]
        return epochs, shards, rows

    def places(self, n: int) -> list[tuple[Order, int, int]]:
        """(order of a set, number in it, number of its first shard) for each set, about where number n stands.

        Lanes are at the same place to within a period.
        """
        step, lane = divmod(n if self.span is None else n % self.span, self.lanes)
        steps = (step * self.quotas // PERIOD).tolist()
        return [
            (order, own * self.lanes + lane, first)
            for order, own, first in zip(self.orders, steps, self._first.tolist(), strict=False)
        ]

    def _deal(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Which set each number of a period of a lane goes to, and its how-manieth there: (PERIOD,) uint16 each."""
        order = permutation(self.seed, 0, (0, 5, key[0] + 2, key[1]), PERIOD)
        dealt = np.repeat(np.arange(len(self.quotas), dtype=np.uint16), self.quotas)[order]
        turns = np.empty(PERIOD, np.uint16)
        for s, quota in enumerate(self.quotas.tolist()):
            turns[dealt == s] = np.arange(quota)
        return dealt, turns


def quotas(weights: Sequence[float], sets: int) -> np.ndarray:
    """Of PERIOD numbers, how many each set gets (S,) int64: largest remainders."""
    if len(weights) != sets:
        raise UserError(f"data.weights has {len(weights)} values for {sets} entries of data.shards; give one for each")
    share = np.asarray(weights, np.float64)
    if not (share > 0).all() or not np.isfinite(share).all():
        raise UserError(f"data.weights {list(weights)}: expected numbers over 0; leave out a set that has none")
    share = share / share.sum() * PERIOD
    if share.min() < 1:
        small = int(share.argmin())
        raise UserError(
            f"data.weights {list(weights)}: number {small + 1} is under a thousandth of their sum; give it more, or "
            "leave the set out"
        )
    whole = np.floor(share).astype(np.int64)
    whole[np.argsort(whole - share, kind="stable")[: PERIOD - whole.sum()]] += 1
    return whole


class Joined:
    """Several opened indexes as one, shards numbered through: what `stream.Samples` asks of an Index."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self.indexes = list(indexes)
        self._where = [(index, shard) for index in indexes for shard in range(len(index.names))]
        self.names = [index.path(shard) for index, shard in self._where]  # names alone would not be unique
        self.counts = np.concatenate([index.counts for index in indexes])  # (shards,)
        self.samples = int(self.counts.sum())
        self.remote = any(index.remote for index in indexes)
        self.cache = self.indexes[0].cache
        listed = json.dumps([index.fingerprint for index in indexes])
        self.fingerprint = hashlib.sha256(listed.encode()).hexdigest()

    def key(self, shard: int, row: int) -> str:
        """The key of a sample."""
        index, own = self._where[shard]
        return index.key(own, row)

    def read(self, shard: int, row: int, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> bytes:
        """See `Index.read`."""
        index, own = self._where[shard]
        return index.read(own, row, extensions)

    def path(self, shard: int) -> str:
        """Where a shard lies."""
        index, own = self._where[shard]
        return index.path(own)

    def remote_bytes(self, shard: int) -> int:
        """See `Index.remote_bytes`."""
        index, own = self._where[shard]
        return index.remote_bytes(own)

    def fetch(self, shard: int, stop: Stop) -> None:
        """See `Index.fetch`."""
        index, own = self._where[shard]
        index.fetch(own, stop)
