"""Running a function over many files in a few processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from fdscale import UserError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_AHEAD = 4  # jobs per worker that are handed out or done but not yet taken: what bounds the memory


def parallel(function: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[Any]:
    """`function(job)` of each job, in order, from `workers` processes (0 or 1: in this one).

    Jobs are taken only a few ahead of the results, so both may be endless. An error, or Ctrl-C, lets running jobs end
    and starts no more. Raises UserError if a worker is killed.
    """
    few = len(jobs) if isinstance(jobs, list) else workers
    if min(workers, few) <= 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(min(workers, few), initializer=_begin) as pool:
        waiting: deque[Future] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(function, job))
                if len(waiting) >= _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException as error:
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError("a worker process was killed, mostly for lack of memory; use fewer --workers") from None
            raise


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    die_with_parent()


def die_with_parent() -> None:
    """Have the kernel kill this worker when the thread that started it ends, in whatever way (Linux; else nothing)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        parent = multiprocessing.parent_process()
        if parent is None:
            return
        # It may have died before the call. Its pipe does not tell for sure: a command that it was just starting may
        # hold that open. Its number does, but for a fork server, which is another process than the one meant.
        adopted = multiprocessing.get_start_method() != "forkserver" and os.getppid() != parent.pid
        if adopted or not parent.is_alive():
            os._exit(1)
