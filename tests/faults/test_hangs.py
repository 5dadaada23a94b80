"""Runs in which one rank hangs: it is named, the run ends with code 74, and the next start goes on bitwise."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers import records
from test_resume import losses, tensors

from faults.starts import Starts
from faults.test_guard import TEACHER
from faults.test_signals import children, wait_for
from fdscale import runs

pytestmark = [pytest.mark.slow, pytest.mark.faults]
LIMIT = "guard.step_limit_s=4"  # a start takes at most 5 times that
MORE = (*TEACHER, LIMIT, "save.every=2", "save.keep=9", "schedule.steps=12")


@pytest.mark.parametrize(("stage", "late"), [(0, 0), (3, 1)])
def test_a_rank_that_hangs_in_its_teacher(starts: Starts, tmp_path: Path, stage: int, late: int) -> None:
    run, hold = starts.new(), tmp_path / "hold"
    hold.touch()
    env = {"FAULT": "slow", "FAULT_CALLS": "10-10", "FAULT_RANK": str(late), "FAULT_HOLD": str(hold)}
    assert starts.run(run, env, 2, stage, MORE) == [74, 74], starts.output(run).read_text()
    said = starts.output(run).read_text()
    assert f"Late: rank {late} on {os.uname().nodename} at step 10: inputs; the others are at step 10: " in said
    assert "faults/teachers.py" in (run / f"stacks-{late}.log").read_text()
    assert (run / f"stacks-{1 - late}.log").exists()
    (row,) = runs.survey([run])
    assert (row["state"], row["exit_code"]) == ("hung", 74)
    assert row["checkpoint_step"] in (6, 8), "the last but one, where the last was not committed yet"
    assert f"rank {late}" in row["why"]
    assert starts.run(run, None, 2, stage, MORE) == [0, 0], starts.output(run).read_text()
    whole = starts.new()
    assert starts.run(whole, None, 2, stage, MORE) == [0, 0]
    assert losses(run) == losses(whole)
    a, b = tensors(run, 12, 2), tensors(whole, 12, 2)
    assert a
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)


@pytest.mark.parametrize("what", ["rank 0", "data of rank 1"])
def test_a_rank_that_is_stopped(starts: Starts, what: str) -> None:
    """A rank that no longer runs cannot answer; one that waits for its data workers says so."""
    run = starts.new()
    more = (*MORE, "schedule.steps=1000", "save.every=1000")
    pids = starts.begin(run, None, 2, 0, more)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run)) > 2, starts, run, pids)
    stopped = pids[what.endswith("1")]
    for pid in children(stopped) if what.startswith("data") else [stopped]:
        os.kill(pid, signal.SIGSTOP)
    codes = starts.end(pids)
    said = starts.output(run).read_text()
    if what.startswith("data"):
        assert codes == [74, 74], said
        assert "Late: rank 1 on" in said
        assert ": data; the others are at" in said
    else:
        assert sorted(codes) == [-signal.SIGKILL, 74], said
        gone = (
            "Rank 0, where ranks find each other, does not answer" if what == "rank 0" else "Late: rank 1, without an"
        )
        assert gone in said


def test_a_slow_rank_is_named_and_training_goes_on(starts: Starts) -> None:
    run = starts.new()
    env = {"FAULT": "slow", "FAULT_CALLS": "2-999", "FAULT_RANK": "1"}
    more = (*MORE, "schedule.steps=24", "log.every=12")  # no rank is called slow before its twentieth step
    assert starts.run(run, env, 2, 0, more) == [0, 0], starts.output(run).read_text()
    said = starts.output(run).read_text()
    assert said.count(f"rank 1 on {os.uname().nodename} is slow: it computes its inputs for") == 1
    assert [record.get("slow_rank") for record in records(run)] == [None, 1]
    first, second = runs.read_ranks(run)
    assert (first["rank"], second["rank"]) == (1, 0)
    assert first["inputs_s"][0] > 0.4 > second["inputs_s"][0]
    assert first["step_s"][0] == pytest.approx(second["step_s"][0], rel=0.5)
    assert json.loads((run / "starts" / "000001.json").read_text())["ended"]["code"] == 0
