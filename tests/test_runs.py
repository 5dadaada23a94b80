"""The listing of runs: states, progress and where the time went, from records that may be torn, without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import outside

from fdscale import UserError, runs, sinks, starts

HERE = {"boot": "a", "host": "far", "pid": 7, "pid_start": 1, "pid_namespace": "pid:[1]"}


@pytest.fixture(autouse=True)
def _quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "BEAT_S", 0.2)


def start(run: Path, number: int, **fields: Any) -> None:
    """The record of a start on another machine, which ended a minute ago."""
    (run / "starts").mkdir(parents=True, exist_ok=True)
    record = HERE | {"seen": time.time() - 60, "up_s": 1000.0, "alive_s": 100.0} | fields
    starts.path_of(run, number).write_text(json.dumps(record))


def checkpoint(run: Path, step: int, size: int | None = None) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    files = [{"name": "state.json", "bytes": 2 if size is None else size, "sha256": ""}]
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def only(run: Path) -> dict[str, Any]:
    (row,) = runs.survey([run])
    return row


def life(began_s: float, alive_s: float, **fields: Any) -> dict[str, Any]:
    """A start on one machine, by its uptime; its wall clock is nonsense."""
    return {**HERE, "up_s": began_s + alive_s, "alive_s": alive_s, "began": 5e9 - began_s, "seen": 0.0, **fields}


def test_time_is_accounted_for_in_closed_form() -> None:
    """100 steps of 1 s, a crash, on from 80 for 50 more with a rollback from 110 to 90, and what is saved is 105."""
    records = [
        life(0, 150, from_step=0, step=100, steps=100, spent_s={"import": 20, "first_step": 5, "steps": 99}),
        life(200, 10, spent_s={"import": 10}),  # ended before its first step
        life(
            260, 120, from_step=80, step=110, steps=51,
            spent_s={"import": 20, "load": 5, "data": 1, "first_step": 4, "steps": 50, "evaluation": 7, "saving": 8,
                     "rollback": 2},
        ),
    ]  # fmt: skip
    told = runs.account(records, 105)
    useful = 99 * 79 / 99 + 50 * 24 / 50
    assert told["useful_s"] == pytest.approx(useful)
    assert told["lost_s"] == pytest.approx(149 - useful + 2)
    assert told["wall_s"] == 280
    assert told["goodput"] == pytest.approx(useful / 280)
    assert told["starting_s"] == 25 + 10 + 30
    assert (told["evaluation_s"], told["saving_s"], told["down_s"]) == (7, 8, 50 + 50)
    parts = ("useful_s", "lost_s", "starting_s", "evaluation_s", "saving_s", "other_s")
    assert sum(told[name] for name in parts) == pytest.approx(told["wall_s"])
    assert runs.account(records, None)["useful_s"] > told["useful_s"]


def test_a_rollback_below_an_earlier_start_costs_that_one() -> None:
    records = [
        life(0, 100, from_step=0, step=100, steps=100, spent_s={"steps": 99}),
        life(100, 100, from_step=60, step=70, steps=30, spent_s={"steps": 29}),  # came at 100, and went back to 60
    ]
    told = runs.account(records, None)
    assert told["useful_s"] == pytest.approx(59 + 9)
    assert told["lost_s"] == pytest.approx(40 + 20)


@pytest.mark.slow
@pytest.mark.parametrize("seen", [0.0, 1e9, 4e9, None, "x", float("inf")])
def test_clocks_that_jump_bend_no_share(tmp_path: Path, seen: Any) -> None:
    spent = {"import": 40, "steps": 50}
    start(tmp_path, 1, seen=seen, began=4e9, from_step=0, step=9, steps=9, spent_s=spent)
    start(tmp_path, 2, seen=seen, began=1.0, from_step=9, step=20, steps=11, spent_s=spent, boot="b")
    checkpoint(tmp_path, 20)
    row = only(tmp_path)
    assert 0 < row["goodput"] <= 1
    assert all(row[key] >= 0 for key in row if key.endswith("_s") and isinstance(row[key], float))


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"ended": {"code": 0, "why": ""}, "step": 9, "goal": 9}, "done"),
        ({"ended": {"code": 0, "why": ""}, "step": 5, "goal": 9}, "paused"),
        ({"ended": {"code": 75, "why": "SIGUSR1"}, "step": 5, "goal": 9}, "stopped"),
        ({"ended": {"code": 3, "why": ""}, "step": 5, "goal": 9}, "diverged"),
        ({"ended": {"code": 76, "why": ""}, "step": 5, "goal": 9}, "fenced"),
        ({"ended": {"code": 1, "why": "KeyError: 'x'"}}, "failed"),
        ({"step": 5, "goal": 9}, "vanished"),
    ],
)
def test_states(tmp_path: Path, fields: dict[str, Any], state: str) -> None:
    start(tmp_path, 1, **fields)
    assert only(tmp_path)["state"] == state


def test_a_start_that_was_refused_changes_no_state(tmp_path: Path) -> None:
    start(tmp_path, 1, ended={"code": 0, "why": ""}, step=9, goal=9)
    start(tmp_path, 2, ended={"code": 2, "why": "data.shards are others"})
    row = only(tmp_path)
    assert (row["state"], row["exit_code"], row["restarts"]) == ("done", 0, 1)


def test_a_live_run_here_and_there(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    owner = starts.claim(here, starts.Clock(), print)
    assert only(here)["state"] == "starting"
    owner.note(step=3, steps=3, from_step=0, goal=9)
    owner.beat()
    (row,) = runs.survey([here])
    assert (row["state"], row["step"], row["steps"], row["pid"]) == ("running", 3, 9, os.getpid())
    owner.end(0, "")
    start(there, 1, seen=time.time(), step=1, goal=9)
    assert only(there)["state"] == "running"
    assert starts.numbers(here) == [1]  # looking takes nothing


def test_torn_files(tmp_path: Path) -> None:
    """A crash in the middle of anything; the newest checkpoint whose files have their sizes counts."""
    start(tmp_path, 1, step=7, goal=9, steps=7, from_step=0, spent_s={"steps": 6})
    starts.path_of(tmp_path, 2).write_text('{"boot": ')
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 6, size=3)
    (tmp_path / "checkpoints" / "step-00000008").mkdir()
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 4, "loss": 2.5, "images_per_s": 8}\n{"step": 5, "loss": 1.5}\n{"st'
    )
    row = only(tmp_path)
    assert (row["step"], row["checkpoint_step"], row["restarts"], row["state"]) == (7, 4, 1, "vanished")
    assert (row["loss"], row["images_per_s"], row["heldout_loss"]) == (1.5, 8, None)
    assert row["useful_s"] == pytest.approx(3)
    assert row["lost_s"] == pytest.approx(3)


def test_the_command(tmp_path: Path) -> None:
    """As a person and as a script, over nested directories, and without torch."""
    for name in ("a", "deep/er/b", "deep/er/b/checkpoints/none"):
        start(tmp_path / name, 1, step=5, goal=9, ended={"code": 75, "why": "SIGUSR1"}, job="41_3")
    code = "import sys; from fdscale.cli import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, "runs", str(tmp_path)]
    said = subprocess.run(command, env=outside() | {"COLUMNS": "200"}, capture_output=True, text=True, check=True)
    assert "stopped by SIGUSR1" in said.stdout
    assert "5/9" in said.stdout
    told = subprocess.run([*command, "--json"], env=outside(), capture_output=True, text=True, check=True)
    rows = json.loads(told.stdout)
    assert [Path(row["run"]).name for row in rows] == ["a", "b"]
    assert rows[0]["job"] == "41_3"


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        runs.main([str(tmp_path / "none")], json=False)


@pytest.mark.parametrize("before", [None, "", "whole\n", "whole\ncu"])
def test_lines_are_added_behind_a_torn_one(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "samples-0.log"
    if before is not None:
        path.write_text(before)
    with sinks.open_lines(path) as file:
        file.write("next\n")
    assert path.read_text().splitlines() == [*(before or "").splitlines(), "next"]
