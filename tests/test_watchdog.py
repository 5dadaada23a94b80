"""The watchdog: who is late, and that nothing else ends a process. In real processes; tests/faults hangs real runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.starts import free_port
from faults.zygote import ranks
from helpers import outside

from fdscale import starts
from fdscale.watchdog import Answer, verdict

Start = Callable[..., list[subprocess.Popen[str]]]
RANK = """
import ctypes, os, signal, sys, time
from pathlib import Path
import torch.distributed as torch_dist
from fdscale import dist, watchdog
watchdog.GRACE_S, watchdog.TICK_S = 5.0, 0.2
folder, kind, late = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init()
dog = watchdog.Watchdog(float(sys.argv[4]), folder, lambda code, why: print("ended", code, why, flush=True))
dog.start()
try:
    for step in range(1, 40):
        dog.begin(f"step {step}")
        dog.at("data")
        time.sleep(0.02)
        dog.at("inputs")
        if step == 3 and dist.rank() == late:
            print("late", flush=True)
            if kind == "sleep":
                time.sleep(600)
            if kind == "native":  # holds the lock of Python: no thread runs
                ctypes.PyDLL(None).usleep(600_000_000)
            if kind == "slow":
                time.sleep(0.5)
            if kind == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "aside" and step == 3:
            dog.begin("evaluation", watchdog.SLACK)
            time.sleep(1.5 * (dist.rank() == late))
        dog.at("forward")
        dist.gather(step)
finally:
    dog.stop()
dist.close()
print("done", flush=True)
"""

GIVING_UP = """
import sys, threading, time
from pathlib import Path
from fdscale import config, dist, watchdog
from fdscale.run import Run
dist.init()
begun = threading.Event()
def dump(self, mine):
    begun.set()
    time.sleep(1)
watchdog.Watchdog._dump = dump
def work(token):
    begun.wait()
    raise RuntimeError("Connection closed by peer")
Run(Path(sys.argv[1]), config.load("demo", ["guard.step_limit_s=0.1"])).own(work)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    started: list[subprocess.Popen[str]] = []

    def start(kind: str, late: int, world: int = 1, limit_s: float = 1.0) -> list[subprocess.Popen[str]]:
        each = ranks(free_port(), world) if world > 1 else [{}]
        words = [sys.executable, "-c", RANK, str(tmp_path), kind, str(late), str(limit_s)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.extend(subprocess.Popen(words, env={**outside(), **env}, **pipes) for env in each)
        return started

    yield start
    for process in started:
        process.kill()


def finish(processes: list[subprocess.Popen[str]], timeout_s: float = 60) -> list[str]:
    return [process.communicate(timeout=timeout_s)[0] for process in processes]


@pytest.mark.slow
def test_alone_it_names_where(start: Start, tmp_path: Path) -> None:
    (process,) = start("sleep", 0)
    (said,) = finish([process])
    assert process.returncode == 74, said
    assert "step 3 takes longer than 1 s" in said
    assert "at step 3: inputs" in said
    assert "ended 74 hung: step 3" in said
    assert "time.sleep" not in said
    stacks = (tmp_path / "stacks-0.log").read_text()
    assert 'File "<string>", line 20' in stacks
    assert "watchdog.py" in stacks, "all threads"


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 2])
def test_of_three_the_late_one_is_named_by_all(start: Start, tmp_path: Path, late: int) -> None:
    processes = start("sleep", late, 3)
    for said, process in zip(finish(processes), processes, strict=True):
        assert process.returncode == 74, said
        assert (
            f"Late: rank {late} on {os.uname().nodename} at step 3: inputs; the others are at step 3: forward" in said
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"stacks-{rank}.log" for rank in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "late"), [("native", 0), ("stopped", 0), ("stopped", 1)])
def test_one_without_an_answer(start: Start, kind: str, late: int) -> None:
    """No thread of it runs: the others name it and end; one that is not stopped writes its stacks all the same."""
    processes = start(kind, late, 2)
    (said,) = finish([processes[1 - late]])
    assert processes[1 - late].returncode == 74, said
    gone = "Rank 0, where ranks find each other, does not answer"
    assert (gone if (kind, late) == ("stopped", 0) else f"Late: rank {late}, without an answer") in said
    processes[late].kill()
    (said,) = finish([processes[late]])
    assert ('File "<string>", line 22' in said) == (kind == "native")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slow", "aside"])
def test_what_takes_its_time_goes_on(start: Start, kind: str) -> None:
    processes = start(kind, 1, 2)
    for said, process in zip(finish(processes), processes, strict=True):
        assert (process.returncode, said.splitlines()[-1]) == (0, "done"), said


@pytest.mark.slow
def test_losing_a_peer_while_giving_up_is_a_hang(tmp_path: Path) -> None:
    """The rank that the others gave up on may be gone first: what its loss raises does not count."""
    done = subprocess.run(
        [sys.executable, "-c", GIVING_UP, str(tmp_path)], env=outside(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 74, done.stderr
    ended = starts.read(starts.path_of(tmp_path, 1))["ended"]
    assert ended["code"] == 74, ended
    assert ended["why"].startswith("hung: start takes longer")


@pytest.mark.slow
def test_stopped_as_a_whole_is_not_hung(start: Start) -> None:
    """As Slurm suspends a job."""
    processes = start("slow", 0, 2)
    assert processes[0].stdout is not None
    assert processes[0].stdout.readline() == "late\n"
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            process.send_signal(number)
        time.sleep(2.5)
    for said, process in zip(finish(processes), processes, strict=True):
        assert process.returncode == 0, said


@pytest.mark.slow
def test_without_a_limit_nothing_looks(start: Start) -> None:
    (process,) = start("slow", 0, limit_s=0)
    (said,) = finish([process])
    assert process.returncode == 0, said


def test_verdicts() -> None:
    def at(count: int, waits: bool, where: str, rank: int) -> Answer:
        return Answer(count, waits, f"rank {rank} on a at {where}")

    forward = {rank: at(7, True, "step 3: forward", rank) for rank in range(3)}
    assert verdict(forward, 3) == "All ranks are at the same place: step 3: forward"
    assert verdict(forward | {1: at(7, False, "step 3: forward", 1)}, 3).startswith(
        "Late: rank 1 on a at step 3: forward"
    )
    assert verdict(forward | {2: at(6, True, "step 3: data", 2)}, 3).startswith("Late: rank 2 on a at step 3: data;")
    assert verdict({0: forward[0]}, 3).startswith("Late: rank 1, 2, without an answer")
