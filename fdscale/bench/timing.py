"""How the benchmarks take time: ways in turns, ratios within a round, CUDA events, and results written as they come."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Clocks = dict[str, dict[str, list[float]]]  # clock -> way -> seconds of each round
LEAST, MOST = 10, 400  # calls that `times` takes
QUEUED = 8  # calls in flight on a GPU, so that the limit in seconds holds


def in_turns(ways: Mapping[str, Callable[[], float | None]], rounds: int) -> Clocks:
    """Wall and CPU seconds of each way in every round after a warm-up; a way may return the wall seconds that count.

    CPU seconds are of this process alone, without its workers.
    """
    seconds: Clocks = {clock: {name: [] for name in ways} for clock in ("wall", "cpu")}
    for turn in range(rounds + 1):
        for name in random.Random(turn).sample([*ways], len(ways)):
            wall, cpu = time.perf_counter(), time.process_time()
            counted = ways[name]()
            if turn:
                seconds["wall"][name].append(time.perf_counter() - wall if counted is None else counted)
                seconds["cpu"][name].append(time.process_time() - cpu)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str, digits: int = 2) -> str:
    """Median and quartiles of how many times faster `other` is than `one`, within each round."""
    within = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
    if len(within) < 2:
        return f"{within[0]:.{digits}f}"
    low, median, high = statistics.quantiles(within, n=4, method="inclusive")
    return f"{median:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def times(calls: Sequence[Callable[[], Any]], seconds: float, device: torch.device) -> list[float]:
    """Seconds of single calls, by turns, for about as long as given: by CUDA events on a GPU, by wall clock elsewhere.

    What precedes is waited for; between events nothing is, so a call that the GPU outruns counts its launches.
    """
    if device.type != "cuda":
        return _wall_times(calls, seconds)
    torch.cuda.synchronize(device)
    end_s, pairs = time.perf_counter() + seconds, list[tuple[torch.cuda.Event, torch.cuda.Event]]()
    while len(pairs) < LEAST or (len(pairs) < MOST and time.perf_counter() < end_s):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls[len(pairs) % len(calls)]()
        end.record()
        pairs.append((begin, end))
        if len(pairs) % QUEUED == 0:
            end.synchronize()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def _wall_times(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    end_s, found = time.perf_counter() + seconds, list[float]()
    while len(found) < 1 or (len(found) < MOST and time.perf_counter() < end_s):
        start = time.perf_counter()
        calls[len(found) % len(calls)]()
        found.append(time.perf_counter() - start)
    return found


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile in seconds, and how many there were."""
    if len(seconds) < 2:
        return {"median": seconds[0], "p10": seconds[0], "p90": seconds[0], "count": len(seconds)}
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median": statistics.median(seconds), "p10": tenths[0], "p90": tenths[-1], "count": len(seconds)}


def save(path: Path, result: dict[str, Any]) -> None:
    """Write JSON in one move, so that whoever reads, or interrupts, never sees half of it."""
    half = path.with_name(f".{path.name}.half")
    half.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(half, path)
