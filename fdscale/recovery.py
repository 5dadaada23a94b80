"""A run's checkpoints while it trains: saving, and going back to an earlier one where the guard says so."""

from __future__ import annotations

from typing import Any

from fdscale import UserError, dist
from fdscale.engine import checkpoint
from fdscale.engine.guard import Detours, Guard
from fdscale.engine.saver import Saver
from fdscale.run import Run
from fdscale.train import TrainState


class Recovery:
    """Saves a run, and rolls it back, at most guard.rollbacks times."""

    def __init__(
        self,
        engine: Any,
        run: Run,
        saver: Saver,
        guard: Guard,
        detours: Detours,
        state: TrainState,
        identity: dict[str, Any],
    ):
        self.saver, self.guard = saver, guard
        self.verdict = "the weights are not finite"  # what a person is told where the run ends as diverged
        self._engine, self._run, self._detours, self._state, self._identity = engine, run, detours, state, identity

    def save(self) -> None:
        """Begin to save the present step; a collective."""
        self.saver.begin(self._state.step, self._state.samples, {"guard": self.guard.state()})
        self.detour()

    def detour(self) -> None:
        """Move on to the sample that a rollback to this step goes on with, if there was one."""
        samples = self._detours.beyond(self._state.step, self._state.samples)
        if samples != self._state.samples:
            self._state.samples = samples
            self.guard.moved(samples)

    def go_back(self) -> bool:
        """Load the newest checkpoint from before the trouble and go on behind it; a collective. False: it cannot be."""
        trouble, most = self.guard.trouble, self._run.settings.guard.rollbacks
        assert trouble is not None
        self.saver.finish()
        self.verdict = trouble.why
        if len(self._detours.taken) >= most:
            self.verdict += f", after {most} rollbacks"
            return False
        start, skipped = checkpoint.newest_valid(self.saver.room.folder, before=trouble.first)
        for line in skipped:
            self._run.say(line, "yellow")
        if start is None:
            return False
        saved = checkpoint.read_state(start)
        step, at = saved["step"], saved["samples"]
        self._write(trouble, step, at)
        checkpoint.load(self._engine, start, self._identity)
        skipped_now = self.guard.skipped
        self.guard.restart(step, trouble.samples, saved.get("guard", {}))
        self.guard.skipped = skipped_now  # they happened, whatever became of them
        self._state.step, self._state.samples = step, trouble.samples
        self.saver.saved_step = step
        self._run.say(
            f"{trouble.why}: back from step {trouble.step} to {start.name}, and on with sample {trouble.samples}; "
            f"{trouble.samples - at} samples from {at} on are left out (rollback {len(self._detours.taken)} of {most})",
            "red",
        )
        return True

    def _write(self, trouble: Any, step: int, at: int) -> None:
        problem = ""
        try:
            self._detours.add(trouble, step, at, write=dist.rank() == 0)
            if dist.rank() == 0:
                self.saver.room.discard_if(lambda saved: saved["step"] > step)
        except (OSError, UserError) as error:
            problem = f"the rollback cannot be written to {self._detours.path}: {error}"
        for told in filter(None, dist.gather(problem)):
            raise UserError(told)
