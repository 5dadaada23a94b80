"""Signals before training: until a run can save, being told to stop means to end at once."""

from __future__ import annotations

import os
import signal
import threading

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOPPED, INTERRUPTED = 75, 130  # exit codes, see docs/running.md


def leave_at_once() -> None:
    """End the process when a stop signal comes: there is nothing new to save, and the last commit stands.

    A thread does it, since the main one may be in a long call that is not Python's (an import, a rendezvous). What
    takes the signals over says so by `signal.set_wakeup_fd`.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: None)  # the byte in the pipe tells
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def _watch(reader: int) -> None:
    while True:
        number = os.read(reader, 1)[0]
        if number in STOP_SIGNALS:
            os.write(2, f"\n{signal.Signals(number).name} before training began: nothing to save\n".encode())
            os._exit(INTERRUPTED if number == signal.SIGINT else STOPPED)
