"""Being told to stop: before a run can save it means to end at once, then to come to an agreed stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED, INTERRUPTED = 75, 130  # exit codes, see docs/running.md


def leave_at_once(when: str = "before training began") -> None:
    """End the process when a stop signal comes: there is nothing new to save, and the last commit stands.

    when: it came, for a person. A thread does it, since the main one may be in a long call that is not Python's (an
    import, a rendezvous). What takes the signals over says so by `signal.set_wakeup_fd`.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)  # the byte in the pipe tells
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, when), name="signals", daemon=True).start()


def _watch(reader: int, when: str) -> None:
    while True:
        number = os.read(reader, 1)[0]
        if number in STOP_SIGNALS:
            os.write(2, f"\n{signal.Signals(number).name} {when}: nothing to save\n".encode())
            os._exit(INTERRUPTED if number == signal.SIGINT else STOPPED)


class _LeaveWait(BaseException):
    """Out of a wait for data, through whatever waits."""


class Stop:
    """Notes the first signal that says to stop, while used as a context manager.

    Further ones are ignored, but for a second Ctrl-C, which ends the process. patience_s: how long after the signal a
    wait for data may take.
    """

    def __init__(self, patience_s: float):
        self.signal: str | None = None  # name of the signal that came
        self._patience_s = patience_s
        self._interrupted = self._waiting = self._left = False
        self._previous: dict[int, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> Stop:
        with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
            self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            os._exit(INTERRUPTED)  # at once, the last committed checkpoint stands
        self._interrupted |= number == signal.SIGINT
        if self.signal is None:
            self.signal = signal.Signals(number).name
            os.write(2, f"\n{self.signal}: stopping after this step, then saving\n".encode())
            signal.setitimer(signal.ITIMER_REAL, self._patience_s, 0.1)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._waiting:
            self._waiting = False
            raise _LeaveWait

    def wait(self, batches: Iterator[Any]) -> Any:
        """The next batch; None where it did not come and a signal has, and ever after: the iterator is closed then."""
        if self._left:
            return None
        try:
            self._waiting = True
            try:
                return next(batches)
            finally:
                self._waiting = False
        except _LeaveWait:
            self._left = True
            return None
