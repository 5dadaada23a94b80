"""Fetching remote shards before they are needed: while a rank trains on number n, its lanes' next shards come in.

What a rank needs follows from the order alone. In each of its lanes it reads the shards of the block that number n is
in, then those of the next block; all lanes change blocks at the same time, and epochs at the same time. Threads fetch
first what is missing of the present block, then what the next one needs and the shard after it. The workers that read
take part: what they need and do not find, they fetch themselves, or wait for whoever is at it (shard_cache.py).

Being fetched ahead counts as being used, so what the lanes are done with is removed first. What would not fit beside
the present blocks is not fetched ahead; if these alone do not fit, the run stops and says so, since it would fetch
every shard again and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from itertools import chain
from threading import Condition, Thread
from typing import Any, NamedTuple

from fdscale import UserError
from fdscale.data.mixture import Mixture
from fdscale.data.order import Order, Sequential
from fdscale.data.shard_cache import GIB
from fdscale.data.sources import Stop, Stopped

AGAIN_S = 30.0  # between two looks at shards that should be there, which keep them from being removed
JOIN_S = 2.0  # a thread that waits for a server to answer ends by itself a little later
SOON = 2  # shards fetched ahead where they are read one after another


class Need(NamedTuple):
    """Shards by number: now, those this rank reads at present; soon, those after them, the nearest first; here, those
    that all ranks of this machine read at present."""

    now: list[int]
    soon: list[int]
    here: list[int]


Plan = Callable[[int], tuple[Hashable, Callable[[], Need]]]  # of a number: (changes when the need does, the need)


def plan_of_lanes(order: Order | Mixture, rank: int, world: int, ranks: int, together: int = 1) -> Plan:
    """What a rank that goes through an order needs. ranks: on each machine, numbered one after another.

    together: consecutive numbers that a rank takes at a time.
    """
    first = rank - rank % ranks
    near = [other - rank for other in range(first, min(first + ranks, world))]

    def plan(number: int) -> tuple[Hashable, Callable[[], Need]]:
        places = order.places(number)
        key = tuple((own // one.samples, own % one.samples // one.lanes // one.block) for one, own, _ in places)
        return key, lambda: _joined(_need(one, own, world, near, shift, together) for one, own, shift in places)

    return plan


def plan_of_stretch(order: Sequential, last: int) -> Plan:
    """What a rank needs that reads one sample after another, up to number `last`."""

    def plan(number: int) -> tuple[Hashable, Callable[[], Need]]:
        shards = order.shards_between(number, last)[: 1 + SOON]
        return shards[0], lambda: Need(shards[:1], shards[1:], shards[:1])

    return plan


def _need(order: Order, number: int, world: int, near: list[int], shift: int, together: int) -> Need:
    """The need at a number of one set, whose shards are numbered from `shift` on; the first that is taken at a time."""
    epoch, place = divmod(number, order.samples)
    step, lane = divmod(place, order.lanes)
    block = step // order.block

    def lanes(epoch: int, block: int, residue: int) -> list[list[int]]:
        step = world * together
        firsts = range(residue, residue + together)
        mine = (lane for first in firsts for lane in range(first % step, order.lanes, step))
        return [order.block_shards(epoch, one, block) for one in mine]

    present, next_block = lanes(epoch, block, lane), lanes(epoch, block + 1, lane)
    if any(len(one) == 1 for one in next_block):  # of some lanes the present block is the last of the epoch
        next_block += lanes(epoch + 1, 0, number - (epoch + 1) * order.samples)
    here = [one for other in near for one in lanes(epoch, block, lane + other * together)]
    now, following, held = (
        dict.fromkeys(shard + shift for one in some for shard in one[:-1]) for some in (present, next_block, here)
    )
    beyond = dict.fromkeys(one[-1] + shift for one in present if one[-1] >= 0)
    return Need(list(now), [shard for shard in {**following, **beyond} if shard not in now], list(held))


def _joined(needs: Iterable[Need]) -> Need:
    return Need(*(list(chain(*parts)) for parts in zip(*needs, strict=True)))


class Prefetch:
    """Fetches ahead for one rank, in threads, from `start` to `close`.

    index: whose shards (an Index, or mixture.Joined). plan: see `plan_of_lanes`. first: the number that comes first.
    """

    def __init__(self, index: Any, plan: Plan, first: int) -> None:
        self._index, self._plan, self._first = index, plan, first
        self._stop, self._changed = Stop(), Condition()
        self._queue: list[int] = []
        self._busy: set[int] = set()
        self._key: Hashable = None
        self._planned_s = 0.0
        self._threads: list[Thread] = []

    def start(self) -> None:
        """Begin. Raises UserError if the cache is too small for what the lanes read at a time."""
        self.advance(self._first)
        for i in range(self._index.cache.downloads):
            self._threads.append(Thread(target=self._work, name=f"prefetch-{i}", daemon=True))
            self._threads[-1].start()

    def advance(self, number: int) -> None:
        """This rank has come to a number. Raises UserError as `start` does."""
        key, need = self._plan(number)
        if key == self._key and time.monotonic() - self._planned_s < AGAIN_S:
            return
        self._key, self._planned_s = key, time.monotonic()
        wanted = self._fitting(need())
        with self._changed:
            self._queue = [shard for shard in wanted if shard not in self._busy]
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads, and with them what they fetch."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        end = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _fitting(self, need: Need) -> list[int]:
        """What to fetch, in this order."""
        cache, size = self._index.cache, self._index.remote_bytes
        bound = cache.limit
        present = sum(map(size, set(need.here)))
        if present > bound:
            whose = f"the {cache.ranks} ranks of this machine" if cache.ranks > 1 else "the lanes"
            shards = len(set(need.here))
            raise UserError(
                f"the shard cache {cache.path} may hold {bound / GIB:.3g} GiB, but {whose} read {shards} shards of "
                f"{present / GIB:.3g} GiB at a time; give data.shard_cache_gib at least {2 * present / GIB:.3g}, so "
                "that the next ones fit as well, or start a run with fewer data.lanes"
            )
        left, wanted = (bound - present) / cache.ranks, list(need.now)
        for shard in need.soon:
            left -= size(shard)
            if left < 0:
                break
            wanted.append(shard)
        return [shard for shard in wanted if size(shard)]

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._stop.is_set():
                    self._changed.wait()
                if self._stop.is_set():
                    return
                shard = self._queue.pop(0)
                self._busy.add(shard)
            try:
                self._index.fetch(shard, self._stop)
            except Stopped:
                return
            except UserError:
                pass  # it may pass until the shard is needed; else whoever needs it finds the same, and says it
            finally:
                with self._changed:
                    self._busy.discard(shard)
