"""Running a function over many files in a few processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def parallel(function: Callable[[Any], Any], jobs: list[Any], workers: int) -> Iterator[Any]:
    """`function(job)` of each job, in order, from `workers` processes (0 or 1: in this one).

    An error, or Ctrl-C, lets running jobs end and starts no more.
    """
    if min(workers, len(jobs)) <= 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), initializer=_begin) as pool:
        try:
            yield from pool.map(function, jobs)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    die_with_parent()


def die_with_parent() -> None:
    """Have the kernel kill this worker when the thread that started it ends, in whatever way (Linux; else nothing)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it died before the call
            os._exit(1)
