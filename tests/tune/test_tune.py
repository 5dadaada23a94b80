"""`fdscale tune` on real steps: the best by far is found, what breaks is a result, and nothing is measured twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, TINY, outside, run_cli, sets

from fdscale import config

pytestmark = pytest.mark.slow
BATCH = ("optim.batch_size=16", "memory.micro_batch=1")
TEACHERS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()[1:]]


@pytest.mark.long
def test_the_known_best_is_found_and_can_be_trained_with(shards: Path, tmp_path: Path) -> None:
    """Sixteen forwards of one image each take far longer than one of sixteen, whatever else is chosen."""
    out, given = tmp_path / "tuned", sets(*TINY, *BATCH, f"data.shards={shards}")
    words = ("tune", "demo", "--out", out, "--steps", "3", *given)
    first = run_cli(*words, "--trials", "2")
    assert first.returncode == 0, first.stderr
    before = rows(out)
    assert before[0]["micro_batch"] == 1, "what you have"
    done = run_cli(*words, "--trials", "4", "--json")
    assert done.returncode == 0, done.stderr
    assert rows(out)[: len(before)] == before, "nothing is measured again but the finalists"
    report = json.loads(done.stdout)
    assert len(report["trials"]) == 4
    assert report["best"]["micro_batch"] == 16
    assert report["own_step_s"] > 1.5 * report["best"]["step_s"]
    assert "what you have" in (out / "table.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["ds_config.json", "recipe.yaml", "table.md", "trials.jsonl"]
    tuned = config.load(str(out / "recipe.yaml"))
    assert tuned.memory.micro_batch == 16
    assert config.trajectory(tuned) == config.trajectory(config.load("demo", [*TINY, *BATCH, f"data.shards={shards}"]))
    run = run_cli(
        "distill", out / "recipe.yaml", "--ds", out / "ds_config.json", "--run", tmp_path / "run", "--steps", "1"
    )
    assert run.returncode == 0, run.stderr
    other = run_cli(*words[:4], *sets(*TINY, *BATCH, "optim.batch_size=8", f"data.shards={shards}"))
    assert other.returncode == 2
    assert "holds trials of something else (config, steps differ)" in other.stderr


@pytest.mark.long
def test_what_breaks_is_a_result(tmp_path: Path) -> None:
    """On two ranks, with data that is made."""
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 2}}')
    teacher = ("teacher.source=python:tune.teachers:Large", "teacher.args={}", "teacher.weights=own")
    own = sets(*TINY, *teacher, "optim.batch_size=16", "memory.micro_batch=8", "memory.checkpoint=[torch]")
    words = ("tune", "demo", "--out", tmp_path / "tuned", "--steps", "3", "--trials", "3", "--ranks", "2", *own)
    done = run_cli(*words, "--ds", tmp_path / "zero2.json", env=TEACHERS)
    assert done.returncode == 0, done.stderr
    found = rows(tmp_path / "tuned")
    assert [row["micro_batch"] for row in found[:1]] == [8]
    assert found[0]["state"] == "out of memory"
    assert "out of memory" in found[0]["why"]
    assert found[-1]["state"] == "done"
    assert found[-1]["micro_batch"] <= 4
    assert "what you have does not run" in done.stdout


@pytest.mark.long
def test_a_mistake_ends_it_soon(tmp_path: Path) -> None:
    """Before a trial where that is possible, after three otherwise."""
    for words, says in (
        (["demo", *sets("data.shards=/no/such/shards")], "/no/such/shards"),
        (["demo", *sets("teacher.weights=/no/such/file")], "/no/such/file is not there"),
        (["mask_rcnn_vit_base"], "masks and objects are not made up"),
    ):
        done = run_cli("tune", *words, "--out", tmp_path / "tuned", "--steps", "3")
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
        assert not (tmp_path / "tuned").exists()
    own = sets(*TINY, "teacher.weights=random", "teacher.source=timm:no_such_network")
    done = run_cli("tune", "demo", "--out", tmp_path / "tuned", "--steps", "3", *own)
    assert done.returncode == 2
    assert "no_such_network" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("how", ["limit", "signal"])
def test_a_trial_that_hangs(tmp_path: Path, how: str) -> None:
    mark = tmp_path / "began"
    teacher = ("teacher.source=python:tune.teachers:Stuck", f"teacher.args={{mark: {mark}}}", "teacher.weights=own")
    words = ["tune", "demo", "--out", str(tmp_path / "tuned"), "--steps", "3", "--trials", "1", *sets(*TINY, *teacher)]
    if how == "limit":
        done = run_cli(*words, "--limit", "20", env=TEACHERS)
        assert done.returncode == 2, done.stderr
        assert [row["state"] for row in rows(tmp_path / "tuned")] == ["timed out"]
        return
    process = subprocess.Popen([sys.executable, "-m", "fdscale.cli", *words], env={**outside(), **TEACHERS})
    deadline = time.monotonic() + 120
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130
    assert rows(tmp_path / "tuned") == []
    spec = str(tmp_path / "tuned" / "trial" / "spec.json").encode()
    alive = [entry for entry in Path("/proc").glob("[0-9]*/cmdline") if spec in _words(entry)]
    assert not alive, "the trial ended with it"


def _words(entry: Path) -> list[bytes]:
    try:
        return entry.read_bytes().split(b"\0")
    except OSError:
        return []
