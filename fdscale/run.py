"""A run: its directory, what it writes about itself, and when it must stop.

Run directory: config.yaml (resolved, reproduces the run), starts/ (one record per start, see `fdscale.starts`),
metrics.jsonl, samples-RANK.log when asked, lost-RANK.log when samples were replaced, tensorboard/, checkpoints/ (see
`fdscale.engine.checkpoint`), and what export puts there.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fdscale import UserError, config, dist, starts
from fdscale.durable import write_atomically
from fdscale.signals import Stop
from fdscale.sinks import JsonLines, TensorBoard, Wandb, line_of, open_lines
from fdscale.watchdog import SLACK, Watchdog

TOLD = ("stop", "fenced", "lost", "written", "judged", "loss", "skipped", "void")  # what ranks tell at every step
TAKEN = "another start has taken this run over; this one stops and saves nothing"
SPACES = {ord(sign): " " for sign in "\t\n\r"}  # what a file's name or a decoder's message may hold ends no field
PATIENCE_S = 5.0  # for data after a signal, where other ranks may be waiting for this one
LOST_TOLD = 5  # replaced samples shown in full by each rank,
LOST_QUIET_S = 60.0  # then one in so many seconds
LOST_OVER_AT_LEAST = 10_000  # samples: the budget is a share of these or of all seen, so that a start allows a few


class Run:
    """One run directory as seen by one rank; only rank 0 writes shared files.

    Use as a context manager: signal handlers and the progress bar live inside it.
    """

    def __init__(self, directory: str | Path, settings: config.Config, clock: starts.Clock | None = None):
        self.directory = Path(directory)
        self.settings = settings
        self.console = Console(stderr=True, highlight=False)
        self.stopped_by: str | None = None  # name of the signal that ended the run, agreed by all ranks
        self.diverged = False
        self.fenced = False  # whether another start has taken the directory; agreed by all ranks
        self.clock = clock or starts.Clock()
        self.watchdog = Watchdog(settings.guard.step_limit_s, self.directory, self.end)
        self.start: starts.Start | None = None  # rank 0's, while the directory is ours
        self.lost = 0  # samples replaced since this start, over all ranks
        self.over_budget = False  # whether these are more than data.lost_budget allows
        self.written = 0  # times that a rank was done with its part in a save, over all ranks
        self._stop = Stop(PATIENCE_S if dist.world() > 1 else 0.1)
        self._agreement = dist.Agreement(*TOLD)
        self.void = 0  # last steps that did not count, since a rank left its wait for data
        self._aside = dist.Agreement("stop")  # outside the steps
        self._verdicts: list[tuple[float, bool]] = []  # of steps, agreed and not yet taken
        self._told: dict[str, float] = {}  # what this rank says at the next exchange
        self._seen = 0  # samples trained on since this start, over all ranks
        self._steps, self._from_step = 0, 0  # of this start; the lowest step that it stood at
        self._losses = Losses(self.directory, self.console)
        self._sinks: list[Any] = []
        self._progress: Progress | None = None
        self._samples: Any = None
        self._slow: int | None = None  # the rank that the others wait for
        self._refused = False  # whether the disk did not take a line

    # -- directory -----------------------------------------------------------------------------------------------------

    def own(self, work: Callable[[str], int]) -> int:
        """Do the work as the one owner of the directory, and write down how it ended. Returns the work's exit code.

        work gets the token of this start. A collective. Raises UserError on all ranks where another owner lives.
        """
        self.watchdog.start()
        try:
            token = self._claim()
            code = work(token)
        except BaseException as error:
            self.watchdog.stop()  # where it is giving up, on a peer whose loss this error may be, the process ends here
            if isinstance(error, RuntimeError) and self.start is not None and self.start.look():
                error = starts.Fenced(TAKEN)  # such as the loss of a peer that Slurm has ended: nothing to put right
            mistake = isinstance(error, UserError)
            if mistake and self.start is not None and self.start.number == 1 and not self._sinks:
                self.start.withdraw()  # a new run that never began leaves nothing
            self.end(starts.exit_code(error), str(error) if mistake else f"{type(error).__name__}: {error}")
            raise error
        finally:
            self.watchdog.stop()
        self.end(code, self.stopped_by or "")
        return code

    def end(self, code: int, why: str) -> None:
        """Give the directory back and write down how this start ended; the first call counts. Any thread may call."""
        if self.start is not None:
            self.start.end(code, why)

    def _leave(self) -> None:
        """End the process, which is fenced and waits for something that may never come."""
        self.say(TAKEN, "red")
        self.end(starts.Fenced.exit_code, TAKEN)
        os._exit(starts.Fenced.exit_code)

    def note(self, **values: Any) -> None:
        """Put plain data into the record of this start."""
        if self.start is not None:
            self.start.note(**values)

    def _claim(self) -> str:
        problem = ""
        if dist.rank() == 0:
            try:
                self.start = starts.claim(self.directory, self.clock, lambda line: self.say(line, "yellow"))
                self.start.leave = self._leave
            except UserError as error:
                problem = str(error)
            except Exception as error:  # whatever it is, the other ranks must hear of it
                problem = f"cannot write the run directory {self.directory}: {error}"
        self._raise_together(problem)
        return dist.gather(self.start.token if self.start is not None else "")[0]

    def open(self, extra: dict[str, Any] | None = None) -> None:
        """Write the config and a snapshot of the environment into the directory."""
        problem = ""
        if dist.rank() == 0:
            try:
                (self.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
                write_atomically(self.directory / "config.yaml", config.dump(self.settings))
                self.note(**starts.environment(), world=dist.world(), **(extra or {}))
                if self.start is not None:
                    self.start.beat()
                self._sinks = self._open_sinks()
            except Exception as error:  # whatever it is, the other ranks must hear of it
                problem = f"cannot write the run directory {self.directory}: {error}"
        self._raise_together(problem)
        try:
            if self.settings.log.samples:
                self._samples = open_lines(self.directory / f"samples-{dist.rank()}.log")
        except OSError as error:
            problem = f"cannot write the log of samples: {error}"
        self._raise_together(problem)

    def _raise_together(self, problem: str) -> None:
        """Raise on all ranks what went wrong on one; a collective."""
        problems = [text for text in dist.gather(problem) if text]
        if problems:
            raise UserError(problems[0])

    def _open_sinks(self) -> list[Any]:
        sinks: list[Any] = [JsonLines(self.directory / "metrics.jsonl")]
        if self.settings.log.tensorboard and importlib.util.find_spec("tensorboard"):
            sinks.append(TensorBoard(self.directory / "tensorboard"))
        if self.settings.log.wandb:
            sinks.append(Wandb(self.settings.log.wandb, self.directory, config.as_dict(self.settings)))
        return sinks

    def __enter__(self) -> Run:
        self._stop.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.__exit__()
        if self._progress is not None:
            self._progress.stop()
        for file in (*self._sinks, *([self._samples] if self._samples is not None else []), self._losses):
            self._note(file.close)

    # -- stopping ------------------------------------------------------------------------------------------------------

    def wait(self, batches: Iterator[Any]) -> Any:
        """The next batch; None where it did not come and a signal has, and ever after: the iterator is closed then."""
        return self._stop.wait(batches)

    def interrupted(self) -> bool:
        """Whether all ranks agreed to leave what they do aside from training. A collective, heard one call later."""
        self.watchdog.again()
        if self._aside.exchange({"stop": self._stop.signal is not None})["stop"]:
            self._agree_on_signal()
        return self.stopped_by is not None

    def _agree_on_signal(self) -> None:
        self.stopped_by = next((name for name in dist.gather(self._stop.signal) if name), "signal")

    def tell(self, name: str, value: float = 1) -> None:
        """Add to what this rank says under a name of TOLD; all ranks hear the sum in `should_stop`."""
        self._told[name] = self._told.get(name, 0) + value

    def should_stop(self, step: int) -> bool:
        """Whether all ranks agreed to stop before this step.

        A collective without a device sync: what ranks tell is heard one step later.
        """
        self.watchdog.begin(f"step {step + 1}", 1 if self._steps else SLACK)
        self.tell("stop", self._stop.signal is not None)
        self.tell("lost", self._losses.take())
        self.tell("fenced", self.start is not None and self.start.fenced)
        told, self._told = self._told, {}
        self._hear(self._agreement.exchange(told))
        return bool(self.stopped_by or self.diverged or self.over_budget or self.fenced)

    def settle(self) -> None:
        """Hear all that ranks have told up to now, and whether the run is still ours; a collective that waits."""
        if self.start is not None:
            self.start.beat()
            self.tell("fenced", self.start.fenced)
        told, self._told = self._told, {}
        self._hear(self._agreement.exchange(told))
        self._hear(self._agreement.drain())

    def tell_verdicts(self, verdicts: list[tuple[float, bool, bool]]) -> None:
        """Steps of this rank, at most one between two exchanges: mean loss, whether applied, whether void."""
        for loss, applied, void in verdicts:
            self.tell("judged")
            self.tell("loss", loss)
            self.tell("skipped", not applied)
            self.tell("void", void)

    def verdicts(self) -> list[tuple[float, bool]]:
        """What all ranks agreed on, step after step, since the last call: mean loss, and whether it was applied."""
        taken, self._verdicts = self._verdicts, []
        return taken

    def _hear(self, heard: dict[str, float]) -> None:
        if heard["judged"]:
            assert heard["judged"] == dist.world(), "ranks judge the same step"
            if heard["void"]:
                self.void += 1
            else:
                self._verdicts.append((heard["loss"] / dist.world(), not heard["skipped"]))
        self.fenced |= heard["fenced"] > 0
        self.lost += int(heard["lost"])
        self.written += int(heard["written"])
        self.over_budget = too_many(self.lost, self._seen, self.settings.data.lost_budget)
        if heard["stop"]:
            self._agree_on_signal()

    def report_lost(self, replaced: list[Any]) -> None:
        """Samples of this rank that had to be replaced: listed in lost-RANK.log, some shown, all counted."""
        self._note(functools.partial(self._losses.add, replaced))

    # -- logging -------------------------------------------------------------------------------------------------------

    def say(self, text: str, style: str | None = None) -> None:
        """One line for a person, from rank 0. style: a colour, such as red."""
        if dist.rank() == 0:
            (self._progress.console if self._progress is not None else self.console).print(
                text, soft_wrap=True, markup=False, style=style
            )

    def start_progress(self, done: int, total: int) -> None:
        """Show a live bar over steps (rank 0)."""
        if dist.rank() == 0:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._progress.start()
            self._progress.add_task("step", total=total, completed=done, note="")

    def advance(self, step: int, samples: int) -> None:
        """A step of so many samples over all ranks is done: account for it and move the bar."""
        self._seen += samples
        self._steps += 1
        if self._steps == 1:
            self._first_step(step)
        else:
            self.clock.mark("steps")
        self._from_step = min(self._from_step, step - 1)
        self.note(from_step=self._from_step, step=step, steps=self._steps)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def _first_step(self, step: int) -> None:
        """Say how long it took from the start of the process to the end of its first step, and what took it."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.mark("first_step")
        self._from_step = step - 1
        parts = ", ".join(f"{name.replace('_', ' ')} {spent:.2f}" for name, spent in self.clock.spent_s.items())
        self.say(f"step {step} after {sum(self.clock.spent_s.values()):.2f} s: {parts}")

    def log(self, values: dict[str, Any]) -> None:
        """One record to every sink and one line to the console (rank 0). Non-finite numbers become null in JSON."""
        if dist.rank() != 0:
            return
        for sink in self._sinks:
            self._note(functools.partial(sink.write, values))
        self.say(line_of(values))
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], note=f"loss {values['loss']:.4f}" if "loss" in values else ""
            )

    def report_ranks(self, ranks: list[dict[str, Any]], slow: int | None, text: str) -> None:
        """How fast each rank is, into ranks.json; a rank that has become the slow one is told of (rank 0)."""
        if dist.rank() != 0 or len(ranks) == 1:
            return
        self._note(lambda: write_atomically(self.directory / "ranks.json", json.dumps(ranks) + "\n", durable=False))
        if slow is not None and slow != self._slow:
            self.say(text, "yellow")
        self._slow = slow

    def log_samples(self, numbers: list[int], origins: list[tuple[str, str]]) -> None:
        """One line per sample: number, shard, key."""
        if self._samples is not None:
            lines = (f"{number}\t{shard}\t{key}\n" for number, (shard, key) in zip(numbers, origins, strict=True))
            self._note(functools.partial(self._samples.write, "".join(lines)))

    def _note(self, write: Callable[[], object]) -> None:
        """Write what only informs: a disk that refuses it is told of once and costs lines, not the run."""
        try:
            write()
        except OSError as error:
            if not self._refused:
                self.console.print(f"{self.directory}: lines of logs are lost: {error}", style="red", markup=False)
            self._refused = True


class Losses:
    """This rank's list of replaced samples, lost-RANK.log of a directory, and how loudly each is told."""

    def __init__(self, directory: Path, console: Console):
        self._directory, self._console = directory, console
        self._file: Any = None
        self._told, self._quiet, self._untold, self._new = 0, 0.0, 0, 0

    def add(self, replaced: list[Any]) -> None:
        """List and count these `data.lost.Replaced`."""
        self._new += len(replaced)
        if replaced and self._file is None:
            self._file = open_lines(self._directory / f"lost-{dist.rank()}.log")
        for one in replaced:
            self._file.write("\t".join(str(field).translate(SPACES) for field in one) + "\n")
            self._tell(one)

    def _tell(self, one: Any) -> None:
        """The first few in full, then a line a minute."""
        now = time.monotonic()
        if self._told >= LOST_TOLD and now < self._quiet:
            self._untold += 1
            return
        more = f" (and {self._untold} since the last line, all in {self._file.name})" if self._untold else ""
        self._console.print(f"lost: {one}{more}", style="yellow", soft_wrap=True, markup=False)
        self._told, self._quiet, self._untold = self._told + 1, now + LOST_QUIET_S, 0

    def take(self) -> int:
        """How many since the last call."""
        new, self._new = self._new, 0
        return new

    def close(self) -> None:
        """End the list."""
        if self._file is not None:
            self._file.close()


def too_many(lost: int, seen: int, budget: float) -> bool:
    """Whether so many of the samples seen since the start were lost that a run must stop."""
    return lost > budget * max(seen, LOST_OVER_AT_LEAST)
