"""Runs that are killed at chosen and at random instants, on disks that fail, with clocks that jump.

Always the same three questions: what was committed is there, the run goes on with the same command, and in the end it
equals the run that nothing happened to, to the last bit.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from faults.conftest import LONG, Figures
from faults.starts import EVERY, STEPS, Starts, kill_all, newest, trained
from faults.zygote import kill

pytestmark = [pytest.mark.slow, pytest.mark.faults]

SEED = 0
KINDS = {"kill": "kill -9 before a change of a file", "torn": "kill -9 in the middle of a write"}


def changes(starts: Starts, world: int = 1, below: str = "") -> int:
    """How many changes of files a whole start makes below its run directory, or a folder of it."""
    run, count = starts.new(), starts.folder / "count"
    count.unlink(missing_ok=True)
    assert starts.run(run, {"FAULT_BELOW": str(run / below), "FAULT_COUNT": str(count)}, world) == [0] * world
    return int(count.read_text())


def instants(total: int, short: int) -> list[int]:
    """All of 1 .. total in the long form, else so many of them, at random but always the same."""
    return list(range(1, total + 1)) if LONG else sorted(random.Random(SEED).sample(range(1, total + 1), short))


def went_on(starts: Starts, run: Path, kind: str, figures: Figures, world: int = 1, at_most: int = 2 * EVERY) -> None:
    """Whatever ended the run: little is lost, the same command goes on, and the end is the same.

    at_most: steps that may have to be done again. A save is under way while the next steps are trained, so these are
    two intervals.
    """
    with figures.trial(kind):
        before, done = newest(run), trained(run)
        assert done - before <= at_most, f"step {done} was trained, and the newest valid checkpoint is of step {before}"
        figures.lost_steps.setdefault(kind, []).append(done - before)
        assert starts.run(run, world=world) == [0] * world, starts.output(run).read_text()
        starts.same(run, world)
        left = {path.name for path in (run / "checkpoints").iterdir()}
        assert {"latest", f"step-{STEPS:08d}"} <= left
        assert sum(name.startswith(".") for name in left) <= 1, left
    if before < STEPS:
        figures.resumed(starts.output(run).read_text())
    shutil.rmtree(run)


@pytest.mark.parametrize("how", ["kill", "torn"])
def test_killed_at_a_change_of_a_file(starts: Starts, figures: Figures, how: str) -> None:
    """Before every single change below the run directory, and in the middle of every write."""
    for at in instants(changes(starts), 12):
        run = starts.new()
        below = run if how == "kill" else run / "checkpoints"
        code = starts.run(run, {"FAULT_BELOW": str(below), "FAULT_AT": str(at), "FAULT_DO": how})
        assert code in ([-9], [0]), starts.output(run).read_text()  # 0: fewer changes than `at` below checkpoints/
        if code == [-9]:
            went_on(starts, run, KINDS[how], figures)


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_any_time_again_and_again(starts: Starts, figures: Figures, world: int) -> None:
    """All ranks or one of them, at random times of a start, up to four times in a row."""
    draw = random.Random(SEED + world)
    began = time.monotonic()
    starts.whole(world)
    usual_s = time.monotonic() - began
    for _ in range(60 if LONG else 3):
        run = starts.new()
        for _ in range(draw.randint(1, 4)):
            with figures.trial(f"kill -9 at a random time, {world} rank(s)"):
                pids = starts.begin(run, world=world)
                time.sleep(draw.uniform(0, usual_s))
                if world > 1 and draw.random() < 0.5:
                    kill(draw.choice(pids))  # the other notices by itself
                else:
                    kill_all(pids)
                codes = starts.end(pids)
                assert set(codes) <= {0, 1, -9}, starts.output(run).read_text()
        starts.output(run).unlink()  # a rank whose peer was killed may say so with a traceback of the library
        went_on(starts, run, f"chain of up to four kills, {world} rank(s)", figures, world)


@pytest.mark.parametrize("error", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_disk_that_fails(starts: Starts, figures: Figures, error: str, lasting: bool) -> None:
    """At every change below checkpoints/: the run ends well, or with one line; nothing that was committed is lost."""
    total = changes(starts)
    for at in instants(total, 3) if LONG or error == "ENOSPC" else instants(total, 1):
        run = starts.new()
        number = f"{getattr(errno, error)}{'+' if lasting else ''}"
        fault = {"FAULT_BELOW": str(run / "checkpoints"), "FAULT_AT": str(at), "FAULT_DO": number}
        code = starts.run(run, fault)
        said = starts.output(run).read_text()
        assert code in ([0], [2]), said
        if code == [2]:
            assert "fdscale: " in said, said
        kind = f"{error} {'from a change on' if lasting else 'at a change'}"
        went_on(starts, run, kind, figures, at_most=STEPS if lasting else 2 * EVERY)  # while it lasts, nothing is saved


def test_a_disk_that_is_really_full(starts: Starts) -> None:
    """There is room for one checkpoint and a half: the first is saved, no other; with more room all goes on."""
    sizes = [path.stat().st_size for path in (starts.whole() / "checkpoints" / f"step-{STEPS:08d}").iterdir()]
    run = starts.new()
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={sum(sizes) * 3 // 2}", "tmpfs", str(run)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted as root")
    try:
        assert starts.run(run) == [2], starts.output(run).read_text()
        said = starts.output(run).read_text()
        assert said.count("No space left on device") >= 2, said
        assert f"the last good checkpoint is {run}/checkpoints/step-{EVERY:08d}" in said
        assert newest(run) == EVERY
        subprocess.run(["mount", "-o", "remount,size=1g", str(run)], check=True)
        assert starts.run(run) == [0], starts.output(run).read_text()
        starts.same(run)
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)


def test_a_disk_that_fails_on_one_rank(starts: Starts) -> None:
    """The save is given up on both, its files are gone, and training goes on."""
    run = starts.new()
    fault = {"FAULT_BELOW": str(run / "checkpoints"), "FAULT_AT": "2", "FAULT_DO": str(errno.EDQUOT)}
    pids = starts.begin(run, fault, world=2, stage=3, more=("save.keep=9",), only=1)
    assert starts.end(pids) == [0, 0], starts.output(run).read_text()
    said = starts.output(run).read_text()
    assert said.count("could not be written") == 1, said
    assert f"the checkpoint of step {EVERY} could not be written" in said
    assert "(rank 1 on " in said
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"latest", *(f"step-{step:08d}" for step in range(2 * EVERY, STEPS + 1, EVERY))}
    starts.same(run, world=2, stage=3)


@pytest.mark.parametrize("jump_s", [-10_000_000, 10_000_000])
def test_a_clock_that_jumps(starts: Starts, figures: Figures, jump_s: int) -> None:
    for at in instants(changes(starts), 2)[:: 1 if not LONG else 8]:
        run = starts.new()
        fault = {"FAULT_BELOW": str(run), "FAULT_AT": str(at), "FAULT_CLOCK": str(jump_s)}
        with figures.trial("clock jump"):
            assert starts.run(run, fault) == [0], starts.output(run).read_text()
            starts.same(run)
        shutil.rmtree(run)


def damage(path: Path, how: str, draw: random.Random) -> None:
    """Tear a file short, flip one of its bits, or remove it."""
    content = bytearray(path.read_bytes())
    if how == "torn":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif how == "flipped":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    else:
        path.unlink()


def test_each_rank_verifies_a_share(starts: Starts) -> None:
    """What only the second rank looks at is found by both; they go on from the checkpoint before."""
    run = starts.new()
    shutil.copytree(starts.whole(2), run)
    files = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())["files"]
    damage(run / "checkpoints" / f"step-{STEPS:08d}" / files[1]["name"], "flipped", random.Random(SEED))
    assert starts.run(run, world=2, more=("save.keep=3",)) == [0, 0], starts.output(run).read_text()
    assert f"the content of {files[1]['name']} does not match its hash" in starts.output(run).read_text()
    starts.same(run, 2)


@pytest.mark.parametrize("how", ["torn", "flipped", "missing"])
def test_damaged_files_of_the_newest_checkpoint(starts: Starts, figures: Figures, how: str) -> None:
    draw = random.Random(SEED)
    for number in range(40 if LONG else 1):
        run = starts.new()
        shutil.copytree(starts.whole(), run)
        checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
        files = sorted(checkpoint.iterdir())
        damage(files[number % len(files)], how, draw)
        if how == "flipped" and newest(run) == STEPS:
            continue  # the bit does not matter, such as one in the manifest's list of versions
        with figures.trial(f"{how} file of the newest checkpoint"):
            assert newest(run) == STEPS - EVERY
            assert starts.run(run, more=("save.keep=3",)) == [0], starts.output(run).read_text()
            starts.same(run)
        shutil.rmtree(run)
