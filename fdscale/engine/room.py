"""Changing a folder of checkpoints, so that every change is there or not, and no start changes it after another has.

    checkpoints/.writing-TOKEN/    the room of one start, made when it takes the run over, and never again

Whatever appears under checkpoints/, a checkpoint or the pointer to the newest, is written in the room and renamed out
of it; whatever leaves is renamed into it and removed there. Who takes a run over first moves all other rooms into its
own: from then on every rename of an earlier start fails, whatever it was doing and however long it was asleep.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fdscale import UserError, dist
from fdscale.durable import sync, write
from fdscale.engine.checkpoint import committed, read_state, step_of
from fdscale.starts import Fenced

PREFIX = ".writing-"


class Room:
    """The room of this start. Its methods raise Fenced where it is gone, and OSError where the disk fails."""

    def __init__(self, folder: Path, token: str):
        self.folder = folder
        self.path = folder / f"{PREFIX}{token}"

    def draft(self, name: str) -> Path:
        """A directory to write a checkpoint in, until `commit` gives it its name. Any rank may call."""
        path = self.path / name
        with self.fenced_if_gone(), contextlib.suppress(FileExistsError):
            path.mkdir()
        return path

    def commit(self, name: str) -> None:
        """Give a draft its name, in place of what had it, durably. Rank 0."""
        draft, final, old = self.path / name, self.folder / name, self.path / f"old-{name}"
        with self.fenced_if_gone():
            sync(draft)
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():  # the same step again, after a resume from an earlier checkpoint
                os.replace(final, old)
            try:
                os.replace(draft, final)
            except OSError:
                with contextlib.suppress(OSError):
                    os.replace(old, final)
                raise
            sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def point(self) -> None:
        """Let `latest` name the newest checkpoint. Rank 0."""
        pointer = self.path / "latest"
        with self.fenced_if_gone():
            for newest in committed(self.folder)[:1]:
                write(pointer, newest.name + "\n")
                os.replace(pointer, self.folder / "latest")

    def discard(self, checkpoint: Path) -> None:
        """Remove a checkpoint: first out of the namespace, so that a crash leaves no half under a committed name."""
        doomed = self.path / f"old-{checkpoint.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        with self.fenced_if_gone():
            os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def discard_if(self, unwanted: Callable[[dict[str, Any]], bool]) -> None:
        """Remove the checkpoints whose state.json, as far as it can be read, is unwanted. Rank 0."""
        for path in committed(self.folder):
            try:
                doomed = unwanted(read_state(path))
            except (UserError, KeyError, TypeError):
                continue  # damaged: whoever looks for one to load says so
            if doomed:
                self.discard(path)
                self.point()

    def abandon(self, name: str) -> None:
        """Remove what there is of a draft."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def prune(self, newest: str, keep: int, keep_every: int | None) -> None:
        """Keep the newest `keep` up to and including the one just written, and those of every `keep_every`-th step.

        Later steps belong to a future that was abandoned when the run walked back past damaged checkpoints. What cannot
        be removed stays: the checkpoint itself is written.
        """
        present = committed(self.folder)
        past = [path for path in present if step_of(path) <= step_of(self.folder / newest)]
        future = present[: len(present) - len(past)]
        for old in [*past[keep:], *future]:
            if old in future or not keep_every or step_of(old) % keep_every:
                with contextlib.suppress(OSError):
                    self.discard(old)

    def close(self) -> None:
        """Leave no empty room behind; what is still in it is removed by the next start."""
        with contextlib.suppress(OSError):
            self.path.rmdir()

    @contextlib.contextmanager
    def fenced_if_gone(self) -> Iterator[None]:
        """Raise Fenced for an error that comes of the room's being gone."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE) and not os.path.isdir(self.path):
                raise Fenced(
                    f"another start has taken over the run of {self.folder} (or removed {self.path}); this one has "
                    "saved nothing since"
                ) from None
            raise


def open_room(folder: Path, token: str) -> Room:
    """Take a folder of checkpoints over: from now on no earlier start can change it. A collective.

    token: NUMBER-ANYTHING, unique to this start, a higher number than earlier ones, equal on all ranks. Whoever wants
    the newest checkpoint must look for it after this. Raises Fenced where a later start has a room, and UserError where
    the folder cannot be written.
    """
    room = Room(folder, token)
    problem: UserError | None = None
    if dist.rank() == 0:
        try:
            room.path.mkdir(parents=True)
            others = [other for other in folder.glob(f"{PREFIX}*") if other != room.path]  # each looks when it has one
            if any(_number(other) > _number(room.path) for other in others):
                room.close()
                problem = Fenced(f"another start has taken over the run of {folder}; this one has saved nothing since")
                others = []
            for other in others:
                with contextlib.suppress(FileNotFoundError):  # its owner left, or we have been taken over
                    os.replace(other, room.path / other.name)
                _remove(room.path / other.name)
        except OSError as error:
            problem = UserError(f"cannot write {folder}: {error}")
    problem = dist.gather(problem)[0]
    if problem is not None:
        raise problem
    return room


def _number(room: Path) -> int:
    number = room.name.removeprefix(PREFIX).partition("-")[0]
    return int(number) if number.isdecimal() else -1


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
