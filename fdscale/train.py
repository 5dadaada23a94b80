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
from fdscale.engine.saver import Saver
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
    saver: Saver,
    evaluate: Callable[[], dict[str, Any]],
    logging: Log,
    saving: Save,
) -> None:
    """Train until step `stop_at` (or a signal, or divergence), then save.

    batches yields micro-batches; prepare turns one into the module's arguments; the module returns the loss.
    """
    start = state.step
    while state.step < stop_at and not run.should_stop(state.step):
        saver.poll()
        set_lr(engine.optimizer, schedule(state.step))
        for _ in range(engine.gradient_accumulation_steps()):
            loss = engine(*prepare(meter.wait(batches)))
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary():
                saver.before_update()
            engine.step()
            meter.add(loss)
        state.step += 1
        state.samples += batch_size
        run.advance(state.step, batch_size)
        run.tell("nonfinite", meter.end_step(engine.was_step_applied()))
        meter.stall(saver.take_stall_s())

        due = due_at(state.step, stop_at)
        heldout = aside(meter, evaluate) if due(logging.heldout_every) else {}
        if due(logging.every) or heldout:
            run.log({"step": state.step, "samples": state.samples, **meter.read(engine), "lost": run.lost, **heldout})
        if state.step % saving.every == 0 and healthy(meter):
            saver.begin(state.step, state.samples)
        run.diverged |= saver.broken
    saver.finish()
    run.diverged |= saver.broken
    if meter.steps:  # stopped between two log lines
        run.log({"step": state.step, "samples": state.samples, **meter.read(engine), "lost": run.lost})
    if state.step not in (start, saver.saved_step) and not run.diverged:
        run.diverged = not healthy(meter)
        if not run.diverged:
            saver.save(state.step, state.samples)
            run.diverged = saver.broken


def due_at(step: int, stop_at: int) -> Callable[[int], bool]:
    """Whether something that happens every so many steps happens after this one; it always does after the last."""
    return lambda every: step % every == 0 or step == stop_at


def aside(meter: Meter, work: Callable[[], Any]) -> Any:
    """Do something that is not training, without counting its time as training."""
    _synchronise()  # what is queued still counts as training
    start = time.perf_counter()
    try:
        return work()
    finally:
        _synchronise()
        meter.pause(time.perf_counter() - start)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def healthy(meter: Meter) -> bool:
    """Whether all ranks' state may be saved, as far as losses tell. A collective."""
    return not dist.any_rank(not meter.healthy())
