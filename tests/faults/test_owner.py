"""Two starts on one run directory: one of another job is refused, a requeue takes over, and the stale one is fenced."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from helpers import records
from test_resume import losses, samples

from faults.conftest import Figures
from faults.starts import STEPS, Starts
from faults.test_faults import changes, instants
from faults.test_guard import TEACHER, equal
from fdscale import runs
from fdscale.starts import path_of, read

pytestmark = [pytest.mark.slow, pytest.mark.faults]
SLOW = {"FAULT": "slow", "FAULT_CALLS": "3-9999", "SLURM_JOB_ID": "42"}
REQUEUED = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "1"}


def wait_for(condition, said) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, said()
        time.sleep(0.002)


def look(run: Path) -> dict:
    (row,) = runs.survey([run])
    return row


def below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its inode and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if not path.name.startswith(".writing-")
    }


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (2, 3)])
def test_the_stale_one_is_fenced(starts: Starts, world: int, stage: int) -> None:
    run = starts.new()
    said = lambda: starts.output(run).read_text()  # noqa: E731
    held = starts.folder / "held"
    stale = starts.begin(run, SLOW | {"FAULT_HOLD": str(held)}, world, stage, TEACHER)
    wait_for(lambda: (run / "checkpoints" / "latest").exists(), said)
    held.touch()  # it must live until the other one has looked, however long that takes
    assert look(run)["state"] == "running"

    assert set(starts.run(run, {"SLURM_JOB_ID": "43"}, world, stage, TEACHER)) == {2}
    assert f"{run} is in use: Slurm job 42, host {os.uname().nodename}, process {stale[0]} is running there" in said()

    for pid in stale:  # a node that hangs, or a network that is cut
        os.kill(pid, signal.SIGSTOP)
    assert starts.run(run, REQUEUED, world, stage, TEACHER) == [0] * world, said()
    assert "taken over from restart 0 of this Slurm job" in said()
    before = below(run / "checkpoints")
    held.unlink()
    for pid in stale:
        os.kill(pid, signal.SIGCONT)
    assert starts.end(stale) == [76] * world, said()
    assert "another start has taken" in said()
    assert below(run / "checkpoints") == before

    whole = starts.new()
    assert starts.run(whole, None, world, stage, TEACHER) == [0] * world
    equal(run, whole, STEPS, world=world)
    assert losses(run) == losses(whole)
    assert set(samples(whole, world)) <= set(samples(run, world))
    row = look(run)
    assert (row["state"], row["step"], row["restarts"], row["checkpoint_step"]) == ("done", STEPS, 1, STEPS)
    assert 0 < row["goodput"] < 1
    assert [read(path_of(run, number))["ended"]["code"] for number in (1, 2)] == [76, 0]
    assert "Traceback" not in said()


def test_time_to_the_first_step_is_told_and_kept(starts: Starts) -> None:
    """Split so that nothing is left over, at the first start and when it goes on; what was done again is lost."""
    run = starts.new()
    assert starts.run(run, options=("--steps", "3"), more=(*TEACHER, "save.every=9")) == [0]
    assert look(run)["state"] == "paused"
    assert starts.run(run, more=TEACHER) == [0]
    said = [
        line for line in starts.output(run).read_text().splitlines() if line.startswith("step ") and "after" in line
    ]
    assert [line.split()[1] for line in said] == ["1", "4"]
    parts = ("import", "build", "init", "load", "data", "first step")
    assert all(f" {part} " in line for line in said for part in parts)
    for number in (1, 2):
        record = read(path_of(run, number))
        assert sum(record["spent_s"].values()) <= record["alive_s"]
    row = look(run)
    shares = ("useful_s", "lost_s", "starting_s", "evaluation_s", "saving_s", "other_s")
    assert sum(row[name] for name in shares) == pytest.approx(row["wall_s"])
    assert row["lost_s"] == 0
    assert row["steps"] == STEPS
    assert row["loss"] == records(run)[-1]["loss"]
    assert json.loads(json.dumps(row)) == row


def test_stopped_at_any_change_it_changes_nothing_more(starts: Starts, figures: Figures) -> None:
    """Asleep just before a change below checkpoints/, taken over by a requeue that finishes, and awake again."""
    for at in instants(changes(starts, below="checkpoints"), 6):
        run = starts.new()
        fault = {"FAULT_BELOW": str(run / "checkpoints"), "FAULT_AT": str(at), "FAULT_DO": "stop"}
        (stale,) = starts.begin(run, {**fault, "SLURM_JOB_ID": "42"})
        said = lambda run=run: starts.output(run).read_text()  # noqa: E731
        wait_for(lambda pid=stale: starts.zygote.code(pid) is not None or state_of(pid) == "T", said)
        if starts.zygote.code(stale) is None:
            with figures.trial("asleep at a change of a checkpoint, and taken over"):
                assert starts.run(run, REQUEUED) == [0], said()
                before = below(run / "checkpoints")
                os.kill(stale, signal.SIGCONT)
                assert starts.end([stale])[0] in (76, 0), said()  # 0: nothing was left to save
                assert below(run / "checkpoints") == before, (at, said())
        starts.same(run)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
