"""Numbers that break while training: skipped on all ranks, or left out by going back, exactly."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from helpers import records
from test_resume import losses, tensors

from faults.starts import Starts, kill_all

pytestmark = [pytest.mark.slow, pytest.mark.faults]
TEACHER = ("teacher.source=python:faults.teachers:Teacher", "teacher.args={}", "teacher.weights=own")
BF16 = {
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}


def fault(kind: str, calls: str, rank: int | None = None) -> dict[str, str]:
    return {"FAULT": kind, "FAULT_CALLS": calls} | ({} if rank is None else {"FAULT_RANK": str(rank)})


def state(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def equal(one: Path, other: Path, step: int, other_step: int | None = None, world: int = 1) -> None:
    a, b = tensors(one, step, world), tensors(other, step if other_step is None else other_step, world)
    assert a
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    ("stage", "bf16"), [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
)
def test_not_a_number_on_one_rank_once(starts: Starts, stage: int, bf16: bool) -> None:
    """The update is skipped on both ranks, nothing of the state changes, and it is counted over a resume."""
    run = starts.new()
    settings = (*TEACHER, "save.every=1", "save.keep=9")
    more = {**BF16} if bf16 else {}
    broken = fault("nan", "4-4", rank=1)
    assert starts.run(run, broken, 2, stage, (*settings, "schedule.steps=9"), ("--steps", "4"), more) == [0, 0], (
        starts.output(run).read_text()
    )
    equal(run, run, 3, 4, world=2)
    assert (state(run, 4)["optimizer_step"], state(run, 4)["guard"]["skipped"]) == (3, 1)
    assert starts.run(run, None, 2, stage, (*settings, "schedule.steps=9"), ("--steps", "6"), more) == [0, 0]
    assert (state(run, 6)["optimizer_step"], records(run)[-1]["skipped"]) == (5, 1)
    assert all(value.isfinite().all() for value in tensors(run, 6, 2).values())


LONG = (*TEACHER, "schedule.steps=14", "save.every=2", "save.keep=9", "guard.skips=2", "guard.window=4")


def reference(starts: Starts, back_to: int, at: int, to: int, world: int = 1, more: tuple[str, ...] = ()) -> Path:
    """A run that takes the detour without ever having met the trouble."""
    run = starts.new()
    run.mkdir()
    (run / "rollbacks.json").write_text(json.dumps([{"back_to": back_to, "at": at, "to": to}]))
    assert set(starts.run(run, world=world, more=(*LONG, *more))) == {0}, starts.output(run).read_text()
    return run


@pytest.mark.parametrize("world", [1, 2])
def test_not_a_number_for_long(starts: Starts, world: int) -> None:
    """Back to before it, on behind it; the weights are those of a run that never saw these samples."""
    run, calls = starts.new(), "9-14" if world == 1 else "5-7"
    assert set(starts.run(run, fault("nan", calls, rank=world - 1), world, more=LONG)) == {0}, starts.output(
        run
    ).read_text()
    told = json.loads((run / "rollbacks.json").read_text())
    assert [(one["step"], one["back_to"], one["at"], one["to"]) for one in told] == [(7, 4, 32, 56)]
    assert "left out" in starts.output(run).read_text()
    equal(run, reference(starts, 4, 32, 56, world), 14, world=world)
    assert records(run)[-1]["samples"] == 14 * 8 + 24
    assert records(run)[-1]["skipped"] == 3


def test_killed_right_after_going_back(starts: Starts) -> None:
    """At whatever moment behind the note of it: the next start takes the same samples."""
    whole = reference(starts, 4, 32, 56)
    for delay_s in (0.0, 0.01, 0.05):
        run = starts.new()
        pids = starts.begin(run, fault("nan", "9-14"), more=LONG)
        while not (run / "rollbacks.json").exists():
            assert starts.zygote.code(pids[0]) is None, starts.output(run).read_text()
            time.sleep(0.0005)
        time.sleep(delay_s)
        kill_all(pids)
        starts.end(pids)
        assert starts.run(run, more=LONG) == [0], starts.output(run).read_text()
        equal(run, whole, 14)


def test_a_spike(starts: Starts) -> None:
    run, more = starts.new(), (*LONG, "guard.spike=1.5", "guard.spike_steps=2", "optim.clip_grad=1", "optim.lr=2e-2")
    assert starts.run(run, fault("spike", "17-20"), more=more) == [0], starts.output(run).read_text()
    told = json.loads((run / "rollbacks.json").read_text())
    assert [(one["step"], one["back_to"], one["at"], one["to"]) for one in told] == [(10, 8, 64, 80)]
    equal(run, reference(starts, 8, 64, 80, more=more[len(LONG) :]), 14)


def test_trouble_that_stays_ends_as_diverged(starts: Starts) -> None:
    """After guard.rollbacks times, with what is good kept; without a checkpoint to go back to, at once."""
    run = starts.new()
    assert starts.run(run, fault("nan", "9-9999"), more=(*LONG, "guard.rollbacks=2")) == [3]
    said = starts.output(run).read_text()
    assert "after 2 rollbacks" in said, said
    assert len(json.loads((run / "rollbacks.json").read_text())) == 2
    equal(run, reference(starts, 99, 0, 0), 4)
    assert losses(run)
    fresh = starts.new()
    assert starts.run(fresh, fault("nan", "1-9999"), more=LONG) == [3]
    assert not list((fresh / "checkpoints").glob("step-*"))
