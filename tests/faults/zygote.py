"""A process that has imported everything and is forked for each start, so that hundreds of starts take minutes.

Run as a script it reads one JSON line per start, {"argv": [...], "env": {...}, "output": FILE}, answers with the
process number of the child, which runs `fdscale ARGV` in a session of its own, and with {"pid": ..., "code": ...} when
one has ended (below zero: the signal that ended it). `Zygote` is its other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from helpers import outside


class Zygote:
    """Starts of fdscale, each a fork of a process that is warm; preload: a library for it (see shim.c)."""

    def __init__(self, preload: Path | None = None):
        env = outside() | ({"LD_PRELOAD": str(preload)} if preload else {})
        env["PYTHONPATH"] += os.pathsep + str(Path(__file__).resolve().parent.parent)
        # Not in the time of a start; and what has loaded it must not be forked.
        build = "from fdscale.engine.initialize import build_ops; build_ops({})"
        subprocess.run([sys.executable, "-c", build], env=env, check=True, stdout=subprocess.DEVNULL)
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._started: queue.Queue[int] = queue.Queue()
        self._codes: dict[int, int] = {}
        self._ended = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if "code" not in told:
                with self._ended:
                    self._codes.pop(told["pid"], None)  # of an earlier one: numbers come again
                self._started.put(told["pid"])
                continue
            with self._ended:
                self._codes[told["pid"]] = told["code"]
                self._ended.notify_all()

    def start(self, argv: Sequence[object], output: Path, env: Mapping[str, str] | None = None) -> int:
        """Start one process; its number. output: file that gets what it prints."""
        told = {"argv": [str(word) for word in argv], "env": dict(env or {}), "output": str(output)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        return self._started.get(timeout=300)

    def code(self, pid: int) -> int | None:
        """How it ended; None: it runs."""
        with self._ended:
            return self._codes.get(pid)

    def wait(self, pid: int, timeout_s: float = 300) -> int:
        """How it ended, when it has."""
        with self._ended:
            if not self._ended.wait_for(lambda: pid in self._codes, timeout_s):
                raise TimeoutError(f"process {pid} has not ended after {timeout_s} s")
            return self._codes[pid]

    def run(self, argv: Sequence[object], output: Path, env: Mapping[str, str] | None = None) -> int:
        """Start one process and wait for it."""
        return self.wait(self.start(argv, output, env))

    def close(self) -> None:
        """End the warm process and all that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def kill(pid: int) -> None:
    """kill -9 a start, with its data workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def ranks(port: int, world: int) -> list[dict[str, str]]:
    """The variables of each rank of a start of several, as torchrun sets them."""
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port), **common} for rank in range(world)]


def _child(told: dict) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(told["env"])
    file = os.open(told["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, file), (2, file)):
        os.dup2(source, target)
    from fdscale.cli import main

    sys.argv = ["fdscale", *told["argv"]]
    code = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    from fdscale.engine.initialize import prepare_environment

    prepare_environment()
    import deepspeed  # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    import fdscale.distill  # noqa: F401

    answer = os.fdopen(os.dup(1), "w", buffering=1)

    def say(**told: int) -> None:
        answer.write(json.dumps(told) + "\n")

    children: set[int] = set()
    os.set_blocking(0, False)
    pending = b""
    while True:
        with contextlib.suppress(BlockingIOError):
            read = os.read(0, 1 << 16)
            if not read:
                break
            pending += read
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            pid = os.fork()
            if pid == 0:
                _child(json.loads(line))
            children.add(pid)
            say(pid=pid)
        for pid in [*children]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.discard(pid)
                kill(pid)  # data workers that outlived it
                say(pid=pid, code=os.waitstatus_to_exitcode(status))
        time.sleep(0.005)
    for pid in children:
        kill(pid)


if __name__ == "__main__":
    _serve()
