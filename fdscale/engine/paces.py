"""How fast each rank is, to find the one that the others wait for.

Ranks meet in every step, so all steps take as long as the slowest rank's. What differs is what a rank does before it
meets others: waiting for its data, and computing the module's inputs, mostly its teacher's forward.
"""

from __future__ import annotations

import os
import statistics
from collections import deque
from typing import Any, NamedTuple

import torch

from fdscale import dist

WINDOW = 200  # last steps
SLOWER = 1.2  # times the median rank's time,
LEAST = 20  # steps before a rank is called slow
SHARE = 0.05  # and so much of a step more, make a rank slow
SPANS = ("step_s", "data_wait_s", "inputs_s")

Events = list[tuple[torch.cuda.Event, torch.cuda.Event]]  # around what was queued


class Slow(NamedTuple):
    """A rank that keeps the others waiting."""

    rank: int
    host: str
    what: str  # the span in which it is slow
    seconds: float
    usual: float  # the median rank's seconds

    def __str__(self) -> str:
        what = "waits for data" if self.what == "data_wait_s" else "computes its inputs"
        return (
            f"rank {self.rank} on {self.host} is slow: it {what} for {self.seconds:.3g} s a step, the median rank "
            f"for {self.usual:.3g} s"
        )


class Paces:
    """The last steps of this rank, in seconds."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._queued: deque[tuple[float, float, Events]] = deque(maxlen=WINDOW)  # whose end the host has not seen

    def add(self, step_s: float, data_wait_s: float, inputs_s: float) -> None:
        """A step."""
        self._steps.append((step_s, data_wait_s, inputs_s))

    def add_queued(self, step_s: float, data_wait_s: float, inputs: Events) -> None:
        """A step whose inputs were computed on a GPU, between these events; it counts once they are over."""
        self._queued.append((step_s, data_wait_s, inputs))
        while self._queued and all(end.query() for _, end in self._queued[0][2]):
            step_s, data_wait_s, inputs = self._queued.popleft()
            self.add(step_s, data_wait_s, sum(start.elapsed_time(end) for start, end in inputs) / 1e3)

    def gather(self) -> list[dict[str, Any]]:
        """For every rank its host and the 50th, 95th and 100th percentile of each span; a collective."""
        spans = dict(zip(SPANS, zip(*self._steps, strict=True), strict=False))
        mine = {"rank": dist.rank(), "host": os.uname().nodename, "steps": len(self._steps)}
        return dist.gather(mine | {span: percentiles(spans.get(span, ())) for span in SPANS})


def percentiles(seconds: tuple[float, ...]) -> list[float]:
    """The 50th, 95th and 100th."""
    if len(seconds) < 2:
        return [*seconds] * 3 or [0.0] * 3
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return [round(value, 6) for value in (cuts[9], cuts[18], max(seconds))]


def slowest(rows: list[dict[str, Any]]) -> Slow | None:
    """The rank of `Paces.gather` that all others wait for in half of the steps or more; None where they are alike,
    or have not made LEAST steps yet."""
    if min(row["steps"] for row in rows) < LEAST:
        return None
    found = []
    step_s = statistics.median(row["step_s"][0] for row in rows)
    for span in SPANS[1:]:
        usual = statistics.median_low([row[span][0] for row in rows])
        row = max(rows, key=lambda row: row[span][0])
        more = row[span][0] - usual
        if more > (SLOWER - 1) * usual and more > SHARE * step_s:
            found.append((more, Slow(row["rank"], row["host"], span, row[span][0], usual)))
    return max(found)[1] if found else None
