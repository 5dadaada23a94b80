"""Real signals at every stage of a run: it ends soon, saved, with the documented code, and goes on bitwise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, outside, records, sets
from test_resume import losses, samples, tensors

from faults.starts import Starts
from faults.test_guard import TEACHER

pytestmark = [pytest.mark.slow, pytest.mark.faults]
SLOW = {"FAULT": "slow"}


def send(pids: list[int], *numbers: int) -> None:
    for number in numbers:
        for pid in pids:
            os.kill(pid, number)
        time.sleep(0.05)


def wait_for(condition, starts: Starts, run: Path, pids: list[int]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert all(starts.zygote.code(pid) is None for pid in pids), starts.output(run).read_text()
        assert time.monotonic() < end, starts.output(run).read_text()
        time.sleep(0.002)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_while_it_starts(shards: Path, tmp_path: Path, number: int, code: int) -> None:
    """While torch is being imported."""
    words = ["distill", "demo", "--run", str(tmp_path / "run"), *sets(*TINY, f"data.shards={shards}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "fdscale.cli", *words], env=outside(), stderr=subprocess.PIPE, text=True
    )
    maps = Path(f"/proc/{process.pid}/maps")
    while "libtorch" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert "before training began" in said
    assert "Traceback" not in said


def test_in_the_pass_before_the_first_evaluation(starts: Starts, shards: Path, tmp_path: Path) -> None:
    run, mark = starts.new(), tmp_path / "mark"
    env = {**SLOW, "FAULT_CALLS": "1-9999", "FAULT_MARK": str(mark)}
    pids = starts.begin(run, env, more=(*TEACHER, f"data.heldout_shards={shards}"))
    wait_for(mark.exists, starts, run, pids)
    send(pids, signal.SIGUSR1)
    assert starts.end(pids) == [75], starts.output(run).read_text()
    assert records(run) == []


def test_in_an_evaluation_of_two_ranks(starts: Starts, shards: Path, tmp_path: Path) -> None:
    """It is abandoned, nothing of it is logged, and the step before it is saved."""
    run, mark = starts.new(), tmp_path / "mark"
    env = {**SLOW, "FAULT_CALLS": "72-74", "FAULT_MARK": str(mark)}
    more = (*TEACHER, f"data.heldout_shards={shards}", "memory.micro_batch=2", "log.heldout_every=2", "save.every=9")
    pids = starts.begin(run, env, 2, more=more)
    wait_for(mark.exists, starts, run, pids)
    send(pids, signal.SIGTERM)
    assert starts.end(pids) == [75, 75], starts.output(run).read_text()
    assert [record["step"] for record in records(run) if "heldout_loss" in record] == [0]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]


def test_repeated(starts: Starts, tmp_path: Path) -> None:
    """Only a second Ctrl-C ends at once; one after another signal is the first."""
    for numbers, code in (
        ((signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT), 75),
        ((signal.SIGTERM, signal.SIGINT, signal.SIGINT), 130),
    ):
        run, mark = starts.new(), tmp_path / f"mark-{code}"
        env = {**SLOW, "FAULT_CALLS": "6-99", "FAULT_MARK": str(mark)}
        pids = starts.begin(run, env, more=TEACHER)
        wait_for(mark.exists, starts, run, pids)
        send(pids, *numbers)
        assert starts.end(pids) == [code], starts.output(run).read_text()


@pytest.mark.parametrize(
    ("world", "stage", "teacher"), [(1, 0, "replicated"), (2, 0, "sharded"), (2, 3, "replicated"), (2, 3, "sharded")]
)
def test_in_a_wait_for_data(starts: Starts, world: int, stage: int, teacher: str) -> None:
    """A rank's data workers hang: the step is taken back on all ranks, and the next start makes the same run."""
    steps = 40
    more = (
        *(TEACHER if teacher == "replicated" else ()),
        f"memory.teacher={teacher}",
        f"schedule.steps={steps}",
        "save.every=1000",
    )
    run, whole = starts.new(), starts.new()
    pids = starts.begin(run, None, world, stage, more)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run)) > 2, starts, run, pids)
    workers = children(pids[-1])
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(2)
    send(pids, signal.SIGTERM)
    assert starts.end(pids) == [75] * world, starts.output(run).read_text()
    (kept,) = (run / "checkpoints").glob("step-*")
    saved = json.loads((kept / "state.json").read_text())
    assert saved["step"] < steps
    assert saved["samples"] == saved["step"] * 8
    assert saved["optimizer_step"] == saved["step"]
    assert saved["guard"]["skipped"] == 0
    assert starts.run(run, None, world, stage, more) == [0] * world, starts.output(run).read_text()
    assert starts.run(whole, None, world, stage, more) == [0] * world
    assert losses(run) == losses(whole)
    assert samples(run, world) == samples(whole, world)
    a, b = tensors(run, steps, world), tensors(whole, steps, world)
    assert a
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def children(pid: int) -> list[int]:
    """Processes that a process forked."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
