"""Saving while training goes on.

The state changes only in the optimizer's step, so a save takes two things from training: the moment in which the copy
of this rank's part to host memory is started, and, before the next update, the wait for that copy where it is not over.
Everything else happens in a thread: each rank looks whether its part is finite, writes, hashes and syncs its file; when
all have, rank 0 writes the manifest and gives the checkpoint its name (`fdscale.engine.room`).

Threads take part in no collective. A rank whose thread is done tells so with the flags that ranks exchange at every
step, and all act at the step at which they hear it of all. A save that falls due while another is under way waits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fdscale import UserError, __version__, config, dist
from fdscale.durable import write
from fdscale.engine import state as local
from fdscale.engine import tensor_file
from fdscale.engine.checkpoint import committed, name_of
from fdscale.engine.contents import FORMAT
from fdscale.engine.room import Fenced, Room
from fdscale.run import Run


class Snapshot:
    """This rank's part of the training state, copied to host memory that is allocated once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}  # as they are called in the file
        self.ranges: dict[str, list[int]] = {}  # parameter -> start and length of what this rank holds
        self._memory: Tensor | None = None
        self._stream: Any = None
        self._copied: Any = None  # on a GPU: the event behind the copies
        self._on_host: list[tuple[Tensor, Tensor]] = []

    def begin(self, engine: Any) -> None:
        """Start the copies on the accelerator's side stream; those within host memory are made by `finish`."""
        sources: dict[str, Tensor] = {}
        self.ranges = {}
        for part, values in local.read(engine):
            self.ranges[part.name] = [part.start, part.length]
            sources.update({f"{key}/{part.name}": value for key, value in values.items()})
        sizes = [value.numel() for value in sources.values()]
        if self._memory is None or self._memory.numel() != sum(sizes):
            self._memory = host_memory(sum(sizes))
        self.tensors = dict(zip(sources, self._memory.split(sizes), strict=True)) if sizes else {}
        pairs = [(self.tensors[name], value) for name, value in sources.items()]
        self._on_host = [pair for pair in pairs if not pair[1].is_cuda]
        self._copied = self._to_host([pair for pair in pairs if pair[1].is_cuda])
        if dist.rank() == 0:  # small, and equal on all ranks
            buffers = local.buffers(engine).items()
            self.tensors |= {f"buffer/{name}": buffer.detach().to("cpu", copy=True) for name, buffer in buffers}

    def _to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        if not pairs:
            return None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.no_grad():
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs], non_blocking=True)
            return self._stream.record_event()

    def finish(self) -> None:
        """Make the copies within host memory, and wait for the others. In a thread."""
        while self._on_host:
            target, source = self._on_host.pop()
            np.copyto(target.numpy(), source.numpy())  # one thread; torch would take the cores that training needs
        if self._copied is not None:
            self._copied.synchronize()

    def before_update(self) -> None:
        """Let the accelerator change the state only behind the copies; the host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)


def host_memory(elements: int) -> Tensor:
    """Float32 host memory of just this size, page-locked where there is a GPU, that data workers do not inherit."""
    if elements == 0:
        return torch.empty(0)
    # A worker that is forked while this is written to would keep the old pages, up to the whole of it once more; and
    # torch rounds page-locked memory up to a power of two.
    memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_DONTFORK)
    tensor = torch.frombuffer(memory, dtype=torch.float32)
    if torch.cuda.is_available():  # where it fails, for want of a limit, copies still are right, but the host waits
        torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), 4 * elements, 0)
    return tensor


class NotFinite(Exception):
    """The state holds a value that is not finite."""


class Outcome(NamedTuple):
    """What came of what a rank's thread had to do."""

    result: Any = None
    kind: str = ""  # of what went wrong: fenced, broken, disk or other
    problem: str = ""


def outcome(work: Callable[[], Any]) -> Outcome:
    """Do it, and say what came of it."""
    where = f"rank {dist.rank()} on {os.uname().nodename}: "
    try:
        return Outcome(work())
    except Fenced as error:
        return Outcome(kind="fenced", problem=str(error))
    except NotFinite as error:
        return Outcome(kind="broken", problem=f"{where}{error}")
    except OSError as error:
        return Outcome(kind="disk", problem=f"{where}{type(error).__name__}: {error}")
    except Exception as error:  # whatever it is, the other ranks must hear of it
        if not isinstance(error, UserError):
            traceback.print_exc()
        return Outcome(kind="other", problem=f"{where}{type(error).__name__}: {error}")


class Saver:
    """Saves a run into a room, one checkpoint at a time.

    Every rank calls the same methods at the same steps. Those that wait, and `poll`, raise on all ranks alike: Fenced
    where another start has taken the run over, UserError where it makes no sense to go on. A save that the disk refuses
    is told and given up, and the next one that is due is another attempt, `save.failures` times in a row.
    """

    def __init__(self, engine: Any, room: Room, run: Run, identity: dict[str, Any]):
        self.room = room
        self.saved_step: int | None = None  # of the newest checkpoint of this run, as far as this start knows
        self.broken = False  # whether the last save was given up since the state is not finite; agreed by all ranks
        self._engine, self._run, self._identity = engine, run, identity
        self._settings = run.settings.save
        self._snapshot = Snapshot()
        self._thread = ThreadPoolExecutor(1, "save")
        self._copied: Future[None] | None = None  # until the next update has waited for it
        self._save: Generator[Callable[[], Any], list[Outcome], None] | None = None  # under way
        self._job: Future[Outcome] | None = None  # what this rank's thread does for it
        self._jobs, self._told = 0, 0  # begun since the start; told to be done
        self._failures = 0  # saves that failed in a row
        self._stall_s = 0.0

    # -- from the loop -------------------------------------------------------------------------------------------------

    def begin(self, step: int, samples: int, more: dict[str, Any] | None = None) -> None:
        """Start to save the present state, after the save before if that is not over.

        more: plain data that goes into state.json beside the rest.
        """
        with self._stalling():
            self._finish()
            self.broken = False
            problem: Exception | None = None
            state: dict[str, Any] = {}
            try:
                self._snapshot.begin(self._engine)
                state = self._describe(step, samples) | (more or {})
            except Exception as error:  # the others hear of it with what came of writing
                problem = error
            self._copied = self._thread.submit(self._snapshot.finish)
            self._save = self._saving(step, state, problem)
            self._start(next(self._save))

    def before_update(self) -> None:
        """Call it before the optimizer changes the state: by then the copy must be over."""
        if self._copied is not None:
            with self._stalling():
                wait([self._copied])
                self._snapshot.before_update()
            self._copied = None

    def poll(self) -> None:
        """Call it at every step, after `run.should_stop`: go on with the save under way, if all ranks can."""
        if self._job is not None and self._run.written == self._jobs * dist.world():
            with self._stalling():
                self._go_on()
        if self._job is not None and self._job.done():
            self._tell()

    def finish(self) -> None:
        """Wait until the save under way is over."""
        with self._stalling():
            self._finish()

    def has_saved(self, step: int) -> bool:
        """Wait, and see whether the checkpoint of a step is there; False: the state is not finite.

        Raises UserError where the disk refused it.
        """
        self.finish()
        if self.saved_step != step and not self.broken:
            raise UserError(f"the checkpoint of step {step} could not be written, see above; {self._last_good()}")
        return not self.broken

    def take_stall_s(self) -> float:
        """Seconds that training has waited for saves since the last call."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def close(self) -> None:
        """Leave what is under way."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if dist.rank() == 0 and self._save is None:
            self.room.close()

    @contextlib.contextmanager
    def _stalling(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stall_s += time.perf_counter() - start

    # -- one save, agreed by all ranks ---------------------------------------------------------------------------------

    def _saving(
        self, step: int, state: dict[str, Any], problem: Exception | None
    ) -> Generator[Callable[[], Any], list[Outcome], None]:
        """Gives what this rank's thread has to do, and is sent what came of it on all ranks, until the save is over."""
        name, first = name_of(step), dist.rank() == 0
        written = yield lambda: self._write(name, problem)
        bad = [one for one in written if one.kind]
        if bad:
            yield lambda: self.room.abandon(name) if first else None
        else:
            entries = [one.result for one in written if one.result]
            named = yield lambda: self._commit(name, state, entries) if first else None
            bad = [one for one in named if one.kind]
            for warning in filter(None, (one.result for one in named)):
                self._run.say(warning, "yellow")
        self._end(step, {one.kind: one.problem for one in reversed(bad)})

    def _start(self, work: Callable[[], Any]) -> None:
        self._job = self._thread.submit(outcome, work)
        self._jobs += 1

    def _tell(self) -> None:
        if self._told < self._jobs:
            self._told += 1
            self._run.tell("written")

    def _go_on(self) -> None:
        """What the threads had to do is done, or waited for here: the next thing."""
        assert self._job is not None
        assert self._save is not None
        wait([self._job])
        self._tell()
        outcomes = dist.gather(self._job.result())
        save, self._job, self._save = self._save, None, None
        with contextlib.suppress(StopIteration):
            self._start(save.send(outcomes))
            self._save = save

    def _finish(self) -> None:
        while self._job is not None:
            self._go_on()

    def _end(self, step: int, problems: dict[str, str]) -> None:
        """A save is over; problems: by their kind."""
        if not problems:
            self.saved_step, self._failures = step, 0
            return
        what = f"the checkpoint of step {step} could not be written to {self.room.folder}"
        if "fenced" in problems:
            raise Fenced(problems["fenced"])
        if "other" in problems:
            raise UserError(f"{what} ({problems['other']}); {self._last_good()}")
        if "broken" in problems:
            self.broken = True
            self._run.say(f"step {step} is not saved: {problems['broken']}", "red")
            return
        self._failures += 1
        self._run.say(f"{what} ({problems['disk']}); {self._last_good()}", "red")
        if self._failures >= self._settings.failures:
            raise UserError(
                f"{self._failures} saves in a row have failed (save.failures), at last that of step {step} "
                f"({problems['disk']}); {self._last_good()}. Make room, or repair the disk, and start the same command "
                "again"
            )

    def _last_good(self) -> str:
        for found in committed(self.room.folder):
            return f"the last good checkpoint is {found}"
        return "there is no earlier checkpoint"

    # -- what is written -----------------------------------------------------------------------------------------------

    def _describe(self, step: int, samples: int) -> dict[str, Any]:
        """The content of state.json."""
        return {
            "format": FORMAT,
            "step": step,
            "samples": samples,
            "identity": self._identity,
            **local.describe(self._engine),
            "config": config.as_dict(self._run.settings),
        }

    def _write(self, name: str, problem: Exception | None) -> dict[str, Any] | None:
        """Write this rank's file, in a thread; returns its manifest entry, or None when the rank holds nothing."""
        if problem is not None:
            raise problem
        self._snapshot.finish()
        tensors = self._snapshot.tensors
        if not tensors:
            return None
        for tensor_name, tensor in tensors.items():
            if not finite(tensor):
                raise NotFinite(f"{tensor_name} holds a value that is not finite")
        with self.room.fenced_if_gone():
            path = self.room.draft(name) / f"rank-{dist.rank():05d}.safetensors"
            return tensor_file.write(path, tensors, tensors.values(), {"ranges": json.dumps(self._snapshot.ranges)})

    def _commit(self, name: str, state: dict[str, Any], entries: list[dict[str, Any]]) -> str:
        """Describe what all ranks wrote, give it its name, and remove what is too old (rank 0, in a thread).

        Returns a warning where it has its name, but the rest could not be done.
        """
        try:
            with self.room.fenced_if_gone():
                draft, text = self.room.draft(name), json.dumps(state)
                write(draft / "state.json", text)
                content = text.encode()
                described = {
                    "name": "state.json",
                    "bytes": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
                manifest = {
                    "format": FORMAT,
                    "files": [*entries, described],
                    "world": dist.world(),
                    "zero_stage": self._engine.zero_optimization_stage(),
                    "identity": config.digest(state["identity"]),
                    "versions": {"fdscale": __version__, "torch": torch.__version__, "deepspeed": deepspeed_version()},
                }
                write(draft / "manifest.json", json.dumps(manifest, indent=1))
                self.room.commit(name)
        except BaseException:
            self.room.abandon(name)
            raise
        try:
            self.room.point()
            self.room.prune(name, self._settings.keep, self._settings.keep_every)
        except OSError as error:
            return f"{name} is saved, but the pointer to it, or what is too old, could not be changed: {error}"
        return ""


def finite(tensor: Tensor) -> bool:
    """Whether all values of a CPU tensor are finite, with one thread and a piece at a time."""
    if not tensor.is_floating_point():
        return True
    pieces = (piece.float().numpy() for piece in tensor.reshape(-1).split(1 << 20))
    return all(np.isfinite(piece.min()) and np.isfinite(piece.max()) for piece in pieces if piece.size)


def deepspeed_version() -> str:
    """Its version, without importing it before it is needed."""
    import deepspeed

    return deepspeed.__version__
