"""Saving while training goes on: what is saved is the state of the moment, and what a disk or another start may do.

One rank and a real engine; other ranks and stages are in test_state.py, whole runs in tests/test_resume.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import IDENTITY, make_engine
from safetensors.torch import load_file, save_file

from fdscale import UserError, config
from fdscale.engine import checkpoint, saver, state, tensor_file
from fdscale.engine.room import Fenced, Room, open_room
from fdscale.engine.saver import Saver
from fdscale.run import Run


class Training:
    """A start of a run: an engine that trains and saves as the loop does."""

    def __init__(self, engine: Any, folder: Path, token: str = "a", *settings: str):
        self.run = Run(folder, config.load("demo", [*settings]))
        self.said: list[str] = []
        self.run.say = lambda text, style=None: self.said.append(f"{style}: {text}")  # type: ignore[method-assign]
        self.room = open_room(folder / "checkpoints", token)
        self.saver = Saver(engine, self.room, self.run, IDENTITY)
        self.engine, self.folder = engine, folder / "checkpoints"

    def step(self) -> None:
        """One step of the loop."""
        self.run.should_stop(0)
        self.saver.poll()
        self.engine.backward(self.engine(torch.randn(4, 3, 32, 32), torch.randn(4, 64, 8), torch.arange(4)))
        self.saver.before_update()
        self.engine.step()

    def save(self, step: int, samples: int) -> bool:
        """As at the end of a run."""
        self.saver.begin(step, samples)
        return self.saver.has_saved(step)

    def steps_until_saved(self, step: int) -> int:
        """Train until a save is committed; how many steps that were."""
        for done in range(100_000):
            if self.saver.saved_step == step:
                return done
            self.step()
        raise AssertionError("never saved")

    def committed(self) -> list[int]:
        return [checkpoint.step_of(path) for path in checkpoint.committed(self.folder)]


def state_of(engine: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {(part.name, key): value.clone() for part, values in state.read(engine) for key, value in values.items()}


def assert_saved(path: Path, state: dict[tuple[str, str], torch.Tensor]) -> None:
    """Bitwise what it was."""
    assert checkpoint.verify(path) is None
    reader = checkpoint.Reader(path)
    for (name, key), value in state.items():
        assert torch.equal(reader.full(name, key).flatten(), value), (name, key)


@pytest.mark.slow
def test_what_is_saved_is_the_state_of_the_moment_however_slow_the_copy(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = np.copyto

    def slowly(*pair: Any) -> None:
        time.sleep(0.02)
        copy(*pair)

    monkeypatch.setattr(saver.np, "copyto", slowly)
    training = Training(engine, tmp_path)
    training.step()
    before, updates = state_of(engine), state.optimizer_step(engine)
    training.saver.begin(7, 28, {"guard": {"losses": [1.0]}})
    steps = training.steps_until_saved(7)
    assert steps > 2
    after = state_of(engine)
    assert not any(torch.equal(before[key], after[key]) for key in before)
    assert_saved(training.folder / "step-00000007", before)
    saved = checkpoint.read_state(training.folder / "step-00000007")
    assert (saved["step"], saved["samples"], saved["optimizer_step"]) == (7, 28, updates)
    assert saved["guard"] == {"losses": [1.0]}
    assert training.saver.take_stall_s() >= 0.02 * len(before)
    assert training.saver.take_stall_s() == 0


def test_a_save_that_falls_due_while_one_is_under_way_waits_for_it(engine: Any, tmp_path: Path) -> None:
    training = Training(engine, tmp_path, "a", "save.keep=3")
    states = {}
    for step in range(1, 6):
        training.step()
        states[step] = state_of(engine)
        training.saver.begin(step, 4 * step)
    training.saver.finish()
    assert training.committed() == [5, 4, 3]
    for step in (3, 4, 5):
        assert_saved(training.folder / checkpoint.name_of(step), states[step])
    memory = training.saver._snapshot._memory
    training.save(6, 24)
    assert training.saver._snapshot._memory is memory


def test_a_state_that_is_not_finite_is_not_committed(process_group: None, tmp_path: Path) -> None:
    training = Training(make_engine(), tmp_path)
    training.step()
    training.save(1, 4)
    part, values = list(state.read(training.engine))[-1]
    values["exp_avg_sq"][-1] = torch.inf
    training.save(2, 8)
    assert training.saver.broken
    assert training.committed() == [1]
    assert f"exp_avg_sq/{part.name} holds a value that is not finite" in training.said[0]
    assert os.listdir(training.room.path) == []


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A real file system of next to nothing."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(engine: Any, tmp_path: Path) -> None:
    """A save that does not fit is given up, room is made, the next one is whole; then no more room, and it stops."""
    with full_disk(tmp_path / "disk"):
        training = Training(engine, tmp_path / "disk", "a", "save.keep=9", "save.failures=2")
        training.save(1, 4)
        size = sum(file.stat().st_size for file in (training.folder / "step-00000001").iterdir())
        filler = tmp_path / "disk" / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(tmp_path / "disk").free - size // 2))
        training.saver.begin(2, 8)
        training.saver.finish()
        assert training.committed() == [1]
        assert os.listdir(training.room.path) == []
        (said,) = training.said
        assert said.startswith("red: the checkpoint of step 2 could not be written")
        assert "No space left on device" in said
        assert "the last good checkpoint is" in said
        filler.unlink()
        before = state_of(engine)
        training.saver.begin(3, 12)
        training.steps_until_saved(3)
        assert_saved(training.folder / "step-00000003", before)
        filler.write_bytes(b"x" * (shutil.disk_usage(tmp_path / "disk").free - size // 2))
        with pytest.raises(UserError, match=r"step 4 could not be written, see above; the last good .*step-00000003"):
            training.save(4, 16)
        training.saver.begin(5, 20)
        with pytest.raises(UserError, match=r"2 saves in a row have failed .*No space left.*step-00000003"):
            training.steps_until_saved(5)
        assert training.committed() == [3, 1]
        assert (training.folder / "latest").read_text() == "step-00000003\n"


def test_a_file_that_may_not_grow(engine: Any, tmp_path: Path) -> None:
    """As a quota does, the limit lets a file begin and cuts it."""
    training = Training(engine, tmp_path)
    training.save(1, 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        training.saver.begin(2, 8)
        training.saver.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}" in training.said[0]
    assert training.committed() == [1]
    assert os.listdir(training.room.path) == []


def test_a_bug_is_the_same_error_on_all_ranks_and_ends_the_run(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    training = Training(engine, tmp_path)
    monkeypatch.setattr(saver.local, "read", lambda engine: 1 / 0)
    with pytest.raises(UserError, match=r"step 3 could not be written .*rank 0 .* ZeroDivisionError.* no earlier"):
        training.save(3, 12)
    assert "1 / 0" in capfd.readouterr().err


def test_who_takes_over_fences_whatever_the_other_was_doing(engine: Any, tmp_path: Path) -> None:
    """The first start is caught with a draft, before a commit, before the pointer, and before pruning."""
    first = Training(engine, tmp_path, "1", "save.keep=1")
    first.save(1, 4)
    draft = first.room.draft("step-00000002")
    (draft / "rank-00000.safetensors").write_bytes(b"half")
    pointer = first.room.path / "latest"
    pointer.write_text("step-00000002\n")
    second = Training(engine, tmp_path, "2", "save.keep=1")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(Fenced, match="another start has taken over the run"):
        first.room.commit("step-00000002")
    with pytest.raises(Fenced):
        first.room.discard(first.folder / "step-00000001")
    with pytest.raises(Fenced):
        first.room.draft("step-00000003")
    with pytest.raises(FileNotFoundError):
        os.replace(pointer, first.folder / "latest")
    with pytest.raises(Fenced):
        first.save(3, 12)
    first.saver.close()
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert second.committed() == [1]
    second.save(2, 8)
    second.saver.close()
    assert sorted(os.listdir(second.folder)) == ["latest", "step-00000002"]


def test_a_save_under_way_is_fenced(engine: Any, tmp_path: Path) -> None:
    first = Training(engine, tmp_path, "1")
    first.saver.begin(1, 4)
    Training(engine, tmp_path, "2")
    with pytest.raises(Fenced):
        first.steps_until_saved(1)
    assert first.committed() == []


def test_leftovers_of_a_crash_are_removed_and_never_read(engine: Any, tmp_path: Path) -> None:
    crashed = Room(tmp_path, "crashed")
    crashed.path.mkdir()
    (crashed.draft("step-00000007") / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".writing-file").write_text("in the way")
    assert checkpoint.newest_valid(tmp_path) == (None, [])
    room = open_room(tmp_path, "new")
    assert os.listdir(tmp_path) == [room.path.name]
    assert os.listdir(room.path) == []


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*checkpoints"):
        open_room(tmp_path / "checkpoints", "a")


@pytest.mark.parametrize("piece", [1, 7, 4 << 20])
def test_a_tensor_file_is_what_the_library_reads_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", piece)
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(4, 4).t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "half": torch.randn(7).bfloat16(),
        "number": torch.tensor([2**40]),
        "ü": torch.tensor([True, False]),
    }
    entry = tensor_file.write(tmp_path / "ours", tensors, iter(tensors.values()), {"key": "value"})
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    plain = {name: torch.full((3,), index, dtype=torch.float32) for index, name in enumerate("abc")}
    tensor_file.write(tmp_path / "plain", plain, plain.values(), {"key": "value"})
    save_file(plain, tmp_path / "theirs", {"key": "value"})
    ours, theirs = (tmp_path / "plain").read_bytes(), (tmp_path / "theirs").read_bytes()
    assert ours[-36:] == theirs[-36:]
    assert len(ours) <= len(theirs) + 64
    assert entry["name"] == "ours"
    checked = {
        "bytes": (tmp_path / "ours").stat().st_size,
        "sha256": hashlib.sha256((tmp_path / "ours").read_bytes()).hexdigest(),
    }
    assert {key: entry[key] for key in checked} == checked
