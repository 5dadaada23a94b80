"""The loop that every kind of training shares. Tasks differ in the module, the batches and `prepare`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fdscale import dist
from fdscale.engine.metrics import Meter
from fdscale.engine.optim import set_lr
from fdscale.keys import Log, Save
from fdscale.run import Run


@dataclass
class TrainState:
    """All of a run's own state: everything else is a function of it, or lives in the engine."""

    step: int = 0
    samples: int = 0


def train(
    engine: Any,
    batches: Iterator[Any],
    prepare: Callable[[Any], tuple[Any, ...]],
    state: TrainState,
    run: Run,
    meter: Meter,
    *,
    stop_at: int,
    batch_size: int,
    schedule: Callable[[int], float],
    save: Callable[[TrainState], object],
    evaluate: Callable[[], dict[str, Any]],
    logging: Log,
    saving: Save,
) -> None:
    """Train until step `stop_at` (or a signal, or divergence), then save.

    batches yields micro-batches; prepare turns one into the module's arguments; the module returns the loss.
    """
    saved_at = state.step
    while state.step < stop_at and not run.should_stop(state.step):
        set_lr(engine.optimizer, schedule(state.step))
        for _ in range(engine.gradient_accumulation_steps()):
            batch = meter.wait(batches)
            run.clock.mark_once("data")
            loss = engine(*prepare(batch))
            engine.backward(loss)
            engine.step()
            meter.add(loss)
        state.step += 1
        state.samples += batch_size
        run.advance(state.step, batch_size)
        run.tell("nonfinite", meter.end_step(engine.was_step_applied()))

        due = due_at(state.step, stop_at)
        heldout = aside(run, meter, "evaluation", evaluate) if due(logging.heldout_every) else {}
        if due(logging.every) or heldout:
            run.log({"step": state.step, "samples": state.samples, **meter.read(engine), "lost": run.lost, **heldout})
        if state.step % saving.every == 0 and healthy(meter, engine):
            aside(run, meter, "saving", lambda: save(state))
            saved_at = state.step
    if run.fenced:  # what lies in the directory is another start's
        return
    if meter.steps:  # stopped between two log lines
        run.log({"step": state.step, "samples": state.samples, **meter.read(engine), "lost": run.lost})
    if state.step > saved_at and not run.diverged:
        run.diverged = not healthy(meter, engine)
        if not run.diverged:
            aside(run, meter, "saving", lambda: save(state))


def due_at(step: int, stop_at: int) -> Callable[[int], bool]:
    """Whether something that happens every so many steps happens after this one; it always does after the last."""
    return lambda every: step % every == 0 or step == stop_at


def aside(run: Run, meter: Meter, name: str, work: Callable[[], Any]) -> Any:
    """Do something that is not training, without counting its time as training. name: what the time went to."""
    _synchronise()  # what is queued still counts as training
    start = time.perf_counter()
    run.clock.mark("steps")
    try:
        return work()
    finally:
        _synchronise()
        run.clock.mark(name)
        meter.pause(time.perf_counter() - start)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def healthy(meter: Meter, engine: Any) -> bool:
    """Whether all ranks' state may be saved: broken weights never are. A collective."""
    return not dist.any_rank(not meter.healthy(engine))
