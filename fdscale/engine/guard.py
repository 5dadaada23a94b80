"""The numerical guard: when training has gone wrong for too long, and where it may go on.

A step whose loss or gradient is not finite is skipped (the optimizer's part, see `engine.initialize`); `Guard` watches
the steps that all ranks have agreed on, one after another, and says when to roll back. A rollback is a detour: from the
checkpoint before the trouble the run goes on with the samples behind it. Detours are written down before anything else
happens, so that a start after a crash takes them too.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from fdscale import UserError, keys
from fdscale.durable import write_atomically

LEAST = 10  # losses that make a median; with fewer, or less than a window of this size, there is no spike


class Trouble(NamedTuple):
    """What went wrong from step `first` (counted from 1) on; behind sample number `samples` it may be over."""

    first: int
    step: int
    samples: int
    why: str


class Guard:
    """Judges steps in their order; equal on all ranks, since it sees only what they agreed on."""

    def __init__(self, settings: keys.Guard, batch_size: int):
        self._settings, self._batch_size = settings, batch_size
        self.trouble: Trouble | None = None
        self.restart(0, 0, {})

    def restart(self, step: int, samples: int, past: dict[str, Any]) -> None:
        """Go on after a step; samples: number of the next one. past: `state()` of then, empty where there is none."""
        self._step, self._samples = step, samples
        self._losses = [float(loss) for loss in past.get("losses", ())]
        self._skips, self._spikes = int(past.get("skips", 0)), int(past.get("spikes", 0))
        self.skipped = int(past.get("skipped", 0))
        self.trouble = None

    def state(self) -> dict[str, Any]:
        """All that later decisions depend on, as plain data."""
        return {"losses": self._losses, "skips": self._skips, "spikes": self._spikes, "skipped": self.skipped}

    @property
    def calm(self) -> bool:
        """Whether the last step was as it should be."""
        return not self._skips and not self._spikes

    def moved(self, samples: int) -> None:
        """The next step begins at another sample number."""
        self._samples = samples

    def judge(self, loss: float, applied: bool) -> None:
        """The next step had this mean loss over ranks; applied: whether the weights were updated."""
        settings = self._settings
        self._step, self._samples = self._step + 1, self._samples + self._batch_size
        self.skipped += not applied
        if not applied or not math.isfinite(loss):
            self._skips += 1
            if self._skips > settings.skips:
                self._raise(self._skips, f"the loss is not finite, or its gradient, for {self._skips} steps in a row")
            return
        self._skips = 0
        usual = statistics.median(self._losses) if len(self._losses) >= min(LEAST, settings.window) else math.inf
        if settings.spike and loss > settings.spike * usual:
            self._spikes += 1
            if self._spikes >= settings.spike_steps:
                why = f"the loss was {loss:.4g} after a median of {usual:.4g}, for {self._spikes} step(s) in a row"
                self._raise(self._spikes, why)
            return
        self._spikes = 0
        self._losses = [*self._losses, loss][-settings.window :]

    def _raise(self, steps: int, why: str) -> None:
        if self.trouble is None:
            self.trouble = Trouble(self._step - steps + 1, self._step, self._samples, why)


class Detours:
    """RUN/rollbacks.json: the rollbacks of a run, oldest first."""

    def __init__(self, directory: Path):
        self.path = directory / "rollbacks.json"
        self.taken: list[dict[str, Any]] = []
        try:
            told = json.loads(self.path.read_text())
            if not isinstance(told, list):
                raise ValueError("expected a list")
            self.taken = [{**one, **{key: int(one[key]) for key in ("back_to", "at", "to")}} for one in told]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{self.path} is not readable ({error}); it says which samples this run leaves out"
            ) from None

    def beyond(self, step: int, samples: int) -> int:
        """The sample number to go on with after this step and before this sample: another one where a detour starts."""
        for one in reversed(self.taken):
            if (one["back_to"], one["at"]) == (step, samples):
                return one["to"]
        return samples

    def add(self, trouble: Trouble, back_to: int, at: int, *, write: bool) -> dict[str, Any]:
        """Go back to a step whose next sample was `at`. write: also into the file (rank 0)."""
        one = {"step": trouble.step, "back_to": back_to, "at": at, "to": trouble.samples, "why": trouble.why}
        self.taken.append(one)
        if write:
            write_atomically(self.path, json.dumps(self.taken, indent=1) + "\n")
        return one

    def abandoned(self, step: int, samples: int, batch_size: int) -> bool:
        """Whether the state after this step, with this next sample, belongs to what the last rollback gave up."""
        if not self.taken:
            return False
        last = self.taken[-1]
        return step > last["back_to"] and samples < last["to"] + (step - last["back_to"]) * batch_size
