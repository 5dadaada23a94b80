"""One owner per run directory: races, dead and silent owners, requeues, clocks that jump, kills at any instant."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import outside

from fdscale import UserError, config, starts
from fdscale.durable import write_atomically
from fdscale.run import Run

pytestmark = pytest.mark.slow  # signs of life are waited for
CLAIM = """
import sys, time
from pathlib import Path
from fdscale import UserError, starts
starts.BEAT_S = float(sys.argv[2])
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
try:
    start = starts.claim(Path(sys.argv[1]), starts.Clock(), lambda line: print(line, flush=True))
except UserError as error:
    print("refused", error, flush=True)
    sys.exit()
print("owner", start.number, flush=True)
sys.stdin.readline()
print("fenced" if start.fenced else "mine", flush=True)
start.end(0, "")
"""


@pytest.fixture(autouse=True)
def _quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "BEAT_S", 0.3)
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def claimant(run: Path, go: Path, beat_s: float = 0.3, **env: str) -> subprocess.Popen[str]:
    """A process that wants the directory as soon as the file `go` is there, and holds it until it reads a line."""
    command = [sys.executable, "-c", CLAIM, str(run), str(beat_s), str(go)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, env={**outside(), **env}, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def go(tmp_path: Path) -> Path:
    path = tmp_path / "go"
    path.touch()
    return path


def claim(run: Path) -> tuple[starts.Start, list[str]]:
    said: list[str] = []
    return starts.claim(run, starts.Clock(), said.append), said


def stranger(run: Path, number: int = 1, **fields: object) -> Path:
    """The record of a start on another machine."""
    (run / "starts").mkdir(parents=True, exist_ok=True)
    path = starts.path_of(run, number)
    record = {"host": "far", "boot": "another", "pid": 7, "pid_start": 1, "pid_namespace": "pid:[1]", "beats": 0}
    path.write_text(json.dumps(record | fields))
    return path


@pytest.mark.parametrize("before", ["fresh", "dead"])
def test_of_many_at_the_same_moment_one_wins(tmp_path: Path, before: str) -> None:
    run, go = tmp_path / "run", tmp_path / "go"
    if before == "dead":
        stranger(run, 1, boot=starts._boot(), pid_namespace=starts._pid_namespace(), pid=os.getpid(), pid_start=1)
    processes = [claimant(run, go) for _ in range(8)]
    go.touch()
    answers = []
    for process in processes:
        line = process.stdout.readline()
        while not line.startswith(("owner", "refused")):
            assert line, "it ended without an answer"
            line = process.stdout.readline()
        answers.append(line.split()[0])
        refused = line.startswith("refused")
        assert not refused or f"host {os.uname().nodename}" in line
    assert sorted(answers) == ["owner"] + ["refused"] * 7
    winner = processes[answers.index("owner")]
    assert winner.communicate("\n")[0] == "mine\n"
    assert starts.numbers(run) == ([1] if before == "fresh" else [1, 2])
    for process in processes:
        process.communicate()


def test_ended_is_free_and_a_live_one_refuses(tmp_path: Path, go: Path) -> None:
    owner = claimant(tmp_path / "run", go)
    assert owner.stdout.readline() == "owner 1\n"
    with pytest.raises(UserError, match=rf"in use: host {os.uname().nodename}, process {owner.pid} is running"):
        claim(tmp_path / "run")
    owner.communicate("\n")
    start, said = claim(tmp_path / "run")
    start.end(0, "")
    assert start.number == 2
    assert not said


def test_killed_at_any_instant_leaves_a_directory_that_can_be_taken(tmp_path: Path) -> None:
    """Claiming, beating a thousand times a second, giving back: kill -9 in the middle of each."""
    run, go, chance = tmp_path / "run", tmp_path / "go", random.Random(0)
    for turn in range(40):
        go.unlink(missing_ok=True)
        process = claimant(run, go, beat_s=0.001)
        go.touch()
        if turn % 2:  # claiming, or beating
            time.sleep(chance.uniform(0, 0.006))
        else:  # beating, or giving back
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.02))
            process.stdin.write("\n")
            process.stdin.flush()
            time.sleep(chance.uniform(0, 0.004))
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
        newest = max(starts.numbers(run), default=0)
        start, _ = claim(run)
        assert start.number == newest + 1
        start.end(0, "")


def test_a_requeue_takes_over_at_once_and_the_stale_one_is_fenced(tmp_path: Path, go: Path) -> None:
    run = tmp_path / "run"
    job = {"SLURM_JOB_ID": "42", "SLURM_CLUSTER_NAME": "fx"}
    stale = claimant(run, go, **job)
    assert stale.stdout.readline() == "owner 1\n"
    twin = claimant(run, go, **job)  # a second step of the same job is no requeue
    assert "looking whether it lives" in twin.stdout.readline()
    assert "in use: Slurm job 42" in twin.stdout.readline()
    fresh = claimant(run, go, **job, SLURM_RESTART_COUNT="1")
    assert "taken over from restart 0 of this Slurm job" in fresh.stdout.readline()
    assert fresh.stdout.readline() == "owner 2\n"
    late = claimant(run, go, **job)  # of the first life, only starting now
    assert "this is restart 0, which Slurm has given up" in late.stdout.readline()
    time.sleep(1)  # several beats
    assert stale.communicate("\n")[0] == "fenced\n"
    assert fresh.communicate("\n")[0] == "mine\n"
    for process in (twin, late):
        process.communicate()
    assert [starts.read(starts.path_of(run, n))["ended"]["code"] for n in (1, 2)] == [0, 0]


@pytest.fixture(params=[0.0, 1e9, 4e9], ids=["mtime-1970", "mtime-2001", "mtime-2096"])
def odd_clock(request: pytest.FixtureRequest) -> Iterator[float]:
    return request.param


def test_a_silent_stranger_is_taken_over_whatever_the_clock_says(tmp_path: Path, odd_clock: float) -> None:
    path = stranger(tmp_path, 3)
    os.utime(path, (odd_clock, odd_clock))
    began = time.monotonic()
    start, said = claim(tmp_path)
    assert time.monotonic() - began >= starts.SILENT_BEATS * starts.BEAT_S
    assert start.number == 4
    assert "host far, process 7; looking whether it lives" in said[0]
    assert "no sign of life" in said[1]
    start.end(0, "")


def test_a_stranger_that_beats_is_refused_whatever_the_clock_says(tmp_path: Path, odd_clock: float) -> None:
    path, stop = stranger(tmp_path, job="77"), threading.Event()

    def live() -> None:
        beats = 0
        while not stop.wait(0.1):
            beats += 1
            write_atomically(path, path.read_text().replace('"beats": 0', f'"beats": {beats % 2}'))
            os.utime(path, (odd_clock, odd_clock))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use: Slurm job 77, host far, process 7 is running there"):
            claim(tmp_path)
    finally:
        stop.set()
        thread.join()
    assert starts.numbers(tmp_path) == [1]


@pytest.mark.parametrize("torn", ["", "{", '{"boot": ', "[1, 2]", '{"pid": "x", "pid_start": {}}'])
def test_a_torn_record_is_watched_and_then_taken(tmp_path: Path, torn: str) -> None:
    stranger(tmp_path).write_text(torn)
    start, _ = claim(tmp_path)
    assert start.number == 2
    start.end(0, "")


def test_a_full_disk_is_no_sign_of_death(tmp_path: Path) -> None:
    start, _ = claim(tmp_path)
    before = starts.sign(starts.path_of(tmp_path, 1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        start.beat()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert starts.sign(starts.path_of(tmp_path, 1)) != before
    assert starts.read(starts.path_of(tmp_path, 1))["token"] == start.token
    start.end(0, "")


def test_how_it_ended_is_said_once_and_the_time_is_accounted_for(tmp_path: Path) -> None:
    clock = starts.Clock()
    clock.mark("import")
    start = starts.claim(tmp_path, clock, print)
    start.note(step=3)
    time.sleep(0.05)
    clock.mark("steps")
    start.end(75, "SIGTERM")
    start.end(0, "")
    record = starts.read(starts.path_of(tmp_path, 1))
    assert record["ended"] == {"code": 75, "why": "SIGTERM"}
    assert record["step"] == 3
    assert record["spent_s"]["steps"] >= 0.05
    assert sum(record["spent_s"].values()) == pytest.approx(record["alive_s"], abs=5)
    assert sum(record["spent_s"].values()) <= record["alive_s"]
    assert record["began"] + record["alive_s"] == pytest.approx(record["seen"], abs=5)
    with Path(f"/proc/{os.getpid()}/stat").open() as file:  # the same by the wall clock
        ticks = int(file.read().rpartition(")")[2].split()[19])
    booted = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
    assert record["began"] == pytest.approx(booted + ticks / os.sysconf("SC_CLK_TCK"), abs=5)


def test_a_stopped_process_does_not_count_as_gone(tmp_path: Path, go: Path) -> None:
    owner = claimant(tmp_path / "run", go)
    assert owner.stdout.readline() == "owner 1\n"
    owner.send_signal(signal.SIGSTOP)
    assert not starts.is_gone(starts.read(starts.path_of(tmp_path / "run", 1)))
    start, said = claim(tmp_path / "run")  # but it is silent
    assert "no sign of life" in said[-1]
    owner.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert owner.communicate("\n")[0] == "fenced\n"
    assert not start.fenced
    start.end(0, "")


def test_withdrawn_it_never_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start, _ = claim(run)
    start.withdraw()
    start.beat()
    start.end(2, "a mistake")
    assert not run.exists()
    start, _ = claim(run)
    assert start.number == 1
    (run / "config.yaml").touch()
    start.withdraw()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_fenced_and_not_ended_it_is_told_to_leave(tmp_path: Path) -> None:
    start, _ = claim(tmp_path)
    left = threading.Event()
    start.leave = left.set
    assert not start.look()
    stranger(tmp_path, number=2)
    assert start.look()
    assert left.wait(60)
    start.end(76, "")


def test_an_error_behind_a_takeover_is_the_takeover(tmp_path: Path) -> None:
    """Such as the loss of a peer that Slurm has ended."""

    def work(token: str) -> int:
        stranger(tmp_path, number=2)
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(starts.Fenced):
        Run(tmp_path, config.load("demo", [])).own(work)
