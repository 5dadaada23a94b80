"""The loop that every kind of training shares. Tasks differ in the module, the batches and `prepare`."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdscale import dist
from fdscale.engine.guard import Guard
from fdscale.engine.initialize import was_applied
from fdscale.engine.metrics import Meter
from fdscale.engine.optim import set_lr
from fdscale.engine.paces import slowest
from fdscale.engine.saver import Saver
from fdscale.engine.state import Buffers
from fdscale.keys import Log, Save
from fdscale.run import Run
from fdscale.watchdog import SLACK


@dataclass
class TrainState:
    """All of a run's own state: everything else is a function of it, or lives in the engine."""

    step: int = 0
    samples: int = 0


def train(
    engine: Any,
    open_stream: Callable[[int], Generator[Any, None, None]],
    prepare: Callable[[Any], tuple[Any, ...]],
    blank: Callable[[], tuple[Any, ...]],
    state: TrainState,
    run: Run,
    meter: Meter,
    guard: Guard,
    saver: Saver,
    *,
    stop_at: int,
    batch_size: int,
    schedule: Callable[[int], float],
    save: Callable[[], object],
    go_back: Callable[[], bool],
    evaluate: Callable[[], dict[str, Any]],
    logging: Log,
    saving: Save,
) -> None:
    """Train until step `stop_at` (or a signal, or divergence), then save.

    open_stream gives the micro-batches from a sample number on; prepare turns one into the module's arguments, and
    blank gives such without data; the module returns the loss, and its `losses`, if it
    has such, says what that was summed from. go_back handles `guard.trouble`: it changes `state`, or
    returns False where it cannot. save begins to save `state`, through the saver.
    """
    saver.saved_step, stream = state.step, Stream(open_stream)
    stuck, buffers = functools.partial(_stuck, run, meter, guard, stream, go_back), Buffers(engine)

    try:
        while state.step < stop_at and not run.should_stop(state.step) and not stuck():
            run.watchdog.at("an earlier save")
            saver.poll()
            set_lr(engine.optimizer, schedule(state.step))
            void = _step(engine, stream.at(state.samples), prepare, blank, run, meter, saver, buffers)
            if void and dist.world() == 1:
                run.tell("stop")
                break
            run.watchdog.at("its account")
            state.step, state.samples = state.step + 1, state.samples + batch_size
            stream.went_on(state.samples)
            run.advance(state.step, batch_size)
            _account(engine, run, meter, saver, void)
            if state.step % saving.every == 0 or state.step == stop_at:
                _settle(run, meter)
                step = state.step
                if run.void or run.fenced or stuck() or state.step != step:
                    continue

            due = due_at(state.step, stop_at)
            heldout = aside(run, meter, "evaluation", evaluate) if due(logging.heldout_every) else {}
            if due(logging.every) or heldout:
                _log(run, state, meter, guard, engine, heldout)
            if state.step % saving.every == 0 and guard.calm:
                run.watchdog.at("a save")
                save()
    finally:
        stream.close()
    run.watchdog.begin("the end", SLACK)
    _settle(run, meter)
    if run.fenced:  # what lies in the directory is another start's
        return
    for verdict in run.verdicts():
        guard.judge(*verdict)
    state.step -= run.void
    state.samples -= run.void * batch_size
    run.note(step=state.step)
    saver.finish()
    meter.stall(saver.take_stall_s())
    if meter.steps and not run.void:  # stopped between two log lines
        _log(run, state, meter, guard, engine, {})
    if state.step != saver.saved_step and not run.diverged and guard.trouble is None:
        save()
        run.diverged = not saver.has_saved(state.step)
    run.clock.mark("saving")


def _account(engine: Any, run: Run, meter: Meter, saver: Saver, void: bool) -> None:
    """Where the time of a step went, and what came of it."""
    stall_s = saver.take_stall_s()
    run.clock.move(stall_s, "steps", "saving")
    meter.stall(stall_s)
    meter.end_step(was_applied(engine), void=void)
    run.tell_verdicts(meter.verdicts())


def _stuck(run: Run, meter: Meter, guard: Guard, stream: Stream, go_back: Callable[[], bool]) -> bool:
    """Judge what was heard, and go back where it says so; whether the run must end for it. A collective then."""
    for verdict in run.verdicts():
        guard.judge(*verdict)
    if guard.trouble is not None and not run.stopped_by:
        run.settle()
        if run.fenced:
            return True
        run.verdicts()  # these steps and what follows are given up
        meter.restart()
        stream.close()
        run.diverged |= not aside(run, meter, "rollback", go_back)
    return run.diverged


def _settle(run: Run, meter: Meter) -> None:
    """Hear of all steps there were; a collective."""
    run.settle()
    for verdict in meter.verdicts(wait=True):
        run.tell_verdicts([verdict])
        run.settle()


def _step(
    engine: Any,
    batches: Iterator[Any],
    prepare: Callable[[Any], tuple[Any, ...]],
    blank: Callable[[], tuple[Any, ...]],
    run: Run,
    meter: Meter,
    saver: Saver,
    buffers: Buffers,
) -> bool:
    """One step; returns whether it is void: this rank was told to stop and left its wait for data.

    The others may be in the step's collectives already, so it takes part with blank data and a loss that is not a
    number, and nobody's weights change. A rank alone just leaves.
    """
    void, at = False, run.watchdog.at
    buffers.keep()
    for _ in range(engine.gradient_accumulation_steps()):
        at("data")
        batch = None if void else meter.wait(lambda: run.wait(batches))
        void = batch is None
        run.clock.mark_once("data")
        if void and dist.world() == 1:
            buffers.settle(False)
            return True
        at("inputs")
        inputs = blank() if void else meter.prepare(prepare, batch)
        at("forward")
        loss = engine(*inputs)
        loss = loss * (math.nan if void else finite_or_nan(loss))
        at("backward")
        engine.backward(loss)
        at("update")
        if engine.is_gradient_accumulation_boundary():
            saver.before_update()
        engine.step()
        meter.add(loss, getattr(engine.module, "losses", {}))
    buffers.settle(was_applied(engine))
    return void


class Stream:
    """The stream of batches, opened anew where the next sample is not the one that it would give."""

    def __init__(self, open_at: Callable[[int], Generator[Any, None, None]]):
        self._open, self._next = open_at, -1
        self._batches: Generator[Any, None, None] | None = None

    def at(self, samples: int) -> Iterator[Any]:
        """The micro-batches from this sample number on."""
        if self._batches is None or samples != self._next:
            self.close()
            self._batches, self._next = self._open(samples), samples
        return self._batches

    def went_on(self, samples: int) -> None:
        """The next sample is this one."""
        self._next = samples

    def close(self) -> None:
        """Stop the workers."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def finite_or_nan(loss: Tensor) -> Tensor:
    """1, or NaN where the loss is not finite: a gradient that is finite all the same must not be applied."""
    return loss.detach() * 0 + 1


def _log(run: Run, state: TrainState, meter: Meter, guard: Guard, engine: Any, more: dict[str, Any]) -> None:
    record = {"step": state.step, "samples": state.samples, **meter.read(engine)}
    ranks = meter.paces.gather()
    slow = slowest(ranks)
    run.report_ranks(ranks, slow and slow.rank, str(slow))
    counts = {"slow_rank": slow and slow.rank, "skipped": guard.skipped, "lost": run.lost}
    run.log({**record, **counts, **more})


def due_at(step: int, stop_at: int) -> Callable[[int], bool]:
    """Whether something that happens every so many steps happens after this one; it always does after the last."""
    return lambda every: step % every == 0 or step == stop_at


def aside(run: Run, meter: Meter, name: str, work: Callable[[], Any]) -> Any:
    """Do something that is not training, without counting its time as training. name: what the time went to."""
    _synchronise()  # what is queued still counts as training
    start = time.perf_counter()
    run.clock.mark("steps")
    run.watchdog.begin(name, SLACK)
    try:
        return work()
    finally:
        _synchronise()
        run.clock.mark(name)
        meter.pause(time.perf_counter() - start)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
