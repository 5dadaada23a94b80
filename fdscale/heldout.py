"""Evaluating an engine on the held-out set between its steps, whatever the evaluation is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fdscale import config
from fdscale.data.folders import Folders
from fdscale.data.index import Index
from fdscale.engine import ema
from fdscale.inputs import open_heldout
from fdscale.run import Run

GoOn = Callable[[dict[str, Any]], bool]  # called with each micro-batch: whether to go on


class HeldOut:
    """Evaluations as records of a run; where one is kept, of the average of the weights too.

    look(index, engine, go_on, averaged): what an evaluation finds, None where it did not go on; a collective.
    record(found): as plain numbers. also: the names of those that are recorded of the average too, as NAME_ema.
    """

    def __init__(
        self,
        settings: config.Config,
        run: Run,
        look: Callable[[Index | Folders, Any, GoOn, bool], Any],
        record: Callable[[Any], dict[str, float]],
        also: tuple[str, ...],
    ) -> None:
        self._settings, self._run = settings, run
        self._look, self._record, self._also = look, record, also
        self._index = open_heldout(settings.data)
        self._first = True

    def __call__(self, engine: Any) -> dict[str, Any]:
        """The record of one evaluation; a collective. Empty where there is no held-out set, or a signal came."""
        if self._index is None or (found := self._evaluate(self._index, engine, False)) is None:
            return {}
        record = self._record(found)
        if self._settings.optim.ema is not None:
            with ema.in_place_of_weights(engine):
                averaged = self._evaluate(self._index, engine, True)
            if averaged is None:
                return {}
            record |= {f"{name}_ema": value for name, value in self._record(averaged).items() if name in self._also}
        return record

    def _evaluate(self, index: Index | Folders, engine: Any, averaged: bool) -> Any:
        engine.eval()
        found = self._look(index, engine, self._go_on, averaged)
        engine.train()
        self._first = False
        return found

    def _go_on(self, batch: dict[str, Any]) -> bool:
        if self._first:  # every evaluation loses the same samples
            self._run.report_lost(batch["replaced"])
        return not self._run.interrupted()
