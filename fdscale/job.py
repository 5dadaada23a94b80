"""A training job of any kind, from a directory that must be ours to an exit code.

What the kinds have in common is here: opening checkpoints, ownership, the engine, the guard, saving, signals, how it
ended. What they do not is a `Task`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fdscale import UserError, config, dist
from fdscale.data import jpeg
from fdscale.engine import checkpoint, memory
from fdscale.engine.ds_config import bf16, check_checkpointing, check_linear
from fdscale.engine.guard import Detours, Guard
from fdscale.engine.initialize import initialize, prepare_environment, read_ds_config
from fdscale.engine.metrics import Meter, Work, peak_flops
from fdscale.engine.room import Room, open_room
from fdscale.engine.saver import Saver
from fdscale.engine.schedule import cosine, poly, stairs
from fdscale.inputs import Inputs
from fdscale.kernels import check
from fdscale.recovery import Recovery
from fdscale.run import TAKEN, Run
from fdscale.starts import Clock
from fdscale.train import TrainState, train
from fdscale.watchdog import SLACK

DONE, DIVERGED, STOPPED, FENCED = 0, 3, 75, 76  # exit codes, see docs/running.md


class Task(Protocol):
    """One kind of training: a module on the meta device, what it is fed, and how it is judged.

    dtype is the precision of the engine.
    """

    inputs: Inputs
    module: Any  # gives the loss of what `prepare` returns

    def identity(self) -> dict[str, Any]:
        """What fixes the trajectory besides `Inputs.identity`, as plain data."""

    def initial_values(self) -> Callable[[str, torch.Size], Tensor]:
        """The first value of every parameter, by name and shape."""

    def place(self) -> None:
        """Bring to the device what is not in the module."""

    def about(self) -> list[str]:
        """Lines for a person; the first names the task."""

    def work(self) -> Work:
        """FLOPs of training on one image."""

    def stream(self, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
        """This rank's micro-batches of the samples start .. stop - 1."""

    def prepare(self, batch: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The module's arguments from a micro-batch."""

    def blank(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Such arguments without data."""

    def evaluation(self, run: Run, dtype: torch.dtype) -> Callable[[Any], dict[str, Any]]:
        """What gives the record of one evaluation of an engine; empty where there is none, or a signal came."""


def run_job(
    build: Callable[[], Task],
    directory: Path,
    *,
    ds: str | None,
    stop_at: int | None,
    resume: str | None,
    saves: bool = True,
) -> int:
    """Begin or continue a training job in a run directory; returns the process's exit code.

    build: checks and builds the task, without a process group; raises UserError before anything is written.
    saves: False: no checkpoint is written, where steps are only measured.
    """
    if stop_at is not None and stop_at < 0:
        raise UserError(f"--steps must not be negative, got {stop_at}")
    prepare_environment()
    ds_config = read_ds_config(ds)
    clock = Clock()
    clock.mark("import")
    task = build()
    check_checkpointing(ds_config, task.inputs.settings.memory.checkpoint)
    check_linear(ds_config, task.inputs.settings.student.linear)
    clock.mark("build")
    dist.init()
    memory.agree_on_kernels(task.module)
    clock.mark("init")
    run = Run(directory, task.inputs.settings, clock)

    def work(token: str) -> int:
        room = open_room(directory / "checkpoints", token)
        try:
            return _work(run, task, room, ds_config, stop_at, resume, saves)
        finally:
            if dist.rank() == 0:
                room.close()

    return run.own(work)


def open_checkpoint(run: Run, resume: str | None) -> Path | None:
    """Where to go on: the run's own newest valid checkpoint, else the given one.

    The caller falls back to initial weights.
    """
    own, skipped = checkpoint.newest_valid(run.directory / "checkpoints")
    for line in skipped:
        run.say(line, "yellow")
    if own is None and skipped:
        raise UserError(
            f"none of the checkpoints in {run.directory / 'checkpoints'} is valid ({skipped[0]}); start in another "
            "--run directory, or remove them"
        )
    if own is not None and resume is not None:
        run.say(f"--resume is left aside: the run goes on from its own {own}", "yellow")
    if own is not None or resume is None:
        return own
    problem = checkpoint.verify_together(Path(resume))
    if problem:
        raise UserError(f"--resume {resume}: {problem}; expected a directory such as RUN/checkpoints/step-00001000")
    return Path(resume)


def _work(
    run: Run,
    task: Task,
    room: Room,
    ds_config: dict[str, Any],
    stop_at: int | None,
    resume: str | None,
    saves: bool,
) -> int:
    """Build the engine, load what there is, and train, in a directory that is ours."""
    settings = task.inputs.settings
    wanted = task.inputs.identity() | task.identity()
    detours = Detours(run.directory)
    _forget_abandoned(room, detours, settings)
    run.clock.mark("build")
    run.watchdog.at("verifying checkpoints")
    start = open_checkpoint(run, resume)
    run.clock.mark("load")
    run.watchdog.at("building the engine")
    if start is not None:
        checkpoint.check_identity(checkpoint.read_state(start)["identity"], wanted, start)
    optim, schedule = settings.optim, settings.schedule
    engine = initialize(
        task.module,
        task.initial_values() if start is None else lambda name, shape: torch.zeros(shape),
        ds_config,
        batch_size=optim.batch_size,
        micro_batch=settings.memory.micro_batch,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        clip_grad=optim.clip_grad,
        layer_decay=optim.layer_decay,
        fused=optim.fused,
        average=optim.ema,
    )
    run.clock.mark("build")
    run.watchdog.at("loading")
    state = TrainState(*checkpoint.load(engine, start, wanted)) if start is not None else TrainState()
    guard = Guard(settings.guard, optim.batch_size)
    guard.restart(state.step, state.samples, checkpoint.read_state(start).get("guard", {}) if start is not None else {})
    recovery = Recovery(engine, run, Saver(engine, room, run, wanted), guard, detours, state, wanted)
    recovery.detour()
    assert schedule.steps is not None
    last = min(schedule.steps, schedule.steps if stop_at is None else stop_at)
    task.place()
    run.clock.mark("load")
    run.open(
        {"ds_config": ds_config, "resumed_from": str(start) if start else None, "steps": 0}
        | {"from_step": state.step, "step": state.step, "goal": schedule.steps}
    )
    with run:
        _announce(run, task, start, state, last)
        try:
            save = recovery.save if saves else functools.partial(_forgo, recovery.saver, state)
            dtype = torch.bfloat16 if bf16(ds_config) else torch.float32
            _train(engine, task, run, state, last, recovery, save, dtype)
        finally:
            recovery.saver.close()
    return _outcome(run, recovery, state, last)


def _forgo(saver: Saver, state: TrainState) -> None:
    """Go on as if this step had been saved."""
    saver.saved_step = state.step


def _outcome(run: Run, recovery: Recovery, state: TrainState, last: int) -> int:
    """Say how it ended, and its exit code. Raises UserError where too many samples were lost."""
    if run.fenced:
        run.say(TAKEN, "red")
        return FENCED
    if run.diverged:
        run.say(f"{recovery.verdict} at step {state.step}; nothing was saved since it broke", "red")
        return DIVERGED
    if run.over_budget:
        raise UserError(
            f"{run.lost} samples could not be had and were replaced since this start, more than data.lost_budget "
            f"{run.settings.data.lost_budget:g} allows: they are listed in {run.directory}/lost-*.log. Repair them "
            "(`fdscale shards verify --decode` names all), or set a larger one; the same command goes on from step "
            f"{state.step}"
        )
    if run.stopped_by and state.step < last:
        run.say(f"stopped by {run.stopped_by} at step {state.step}; the same command goes on from here")
        return STOPPED
    return DONE


def _forget_abandoned(room: Room, detours: Detours, settings: config.Config) -> None:
    """Remove what a crash may have left of what the last rollback gave up; a collective."""
    problem = ""
    if dist.rank() == 0:
        try:
            room.discard_if(functools.partial(_abandoned, detours, settings))
        except (OSError, UserError) as error:
            problem = f"what the last rollback gave up cannot be removed from {room.folder}: {error}"
    problem = dist.gather(problem)[0]
    if problem:
        raise UserError(problem)


def _abandoned(detours: Detours, settings: config.Config, saved: dict[str, Any]) -> bool:
    return detours.abandoned(saved["step"], saved["samples"], settings.optim.batch_size)


def _announce(run: Run, task: Task, start: Path | None, state: TrainState, last: int) -> None:
    index, order = task.inputs.index, task.inputs.order
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in task.module.parameters())
    first, *more = task.about()
    run.say(
        f"{first}, {count / 1e6:.1f} M trained parameters, {index.samples} samples in {len(index.names)} shards, "
        f"{order.lanes} lanes, {dist.world()} rank(s)"
    )
    for line in more:
        run.say(line)
    for line in dict.fromkeys(itertools.chain(*dist.gather(check.failures()))):  # of any rank's GPU
        run.say(line, "yellow")
    if order.span is not None:
        run.say(f"samples and augmentation repeat after {order.span} samples (cache.epochs)")
    if run.settings.data.decode != "pillow" and (missing := jpeg.missing()):
        run.say(f"JPEGs are decoded by Pillow alone, which takes about twice as long: {missing}", "yellow")
    if start is not None:
        run.say(f"resumed from {start}: step {state.step}, sample {state.samples}")
    if state.step >= last:
        run.say(f"nothing to do: step {state.step} of {last} is reached")


def _train(
    engine: Any,
    task: Task,
    run: Run,
    state: TrainState,
    last: int,
    recovery: Recovery,
    save: Callable[[], object],
    dtype: torch.dtype,
) -> None:
    optim, schedule = run.settings.optim, run.settings.schedule

    def prepare(batch: dict[str, Any]) -> tuple[Tensor, ...]:
        run.log_samples(batch["numbers"].tolist(), batch["origin"])
        run.report_lost(batch["replaced"])
        return task.prepare(batch, dtype)

    def open_stream(samples: int) -> Generator[dict[str, Any], None, None]:
        return task.stream(samples, samples + (last - state.step) * optim.batch_size)

    evaluate = task.evaluation(run, dtype)
    run.clock.mark("build")
    run.watchdog.begin("evaluation", SLACK)
    if state.step == 0 and last > 0 and (record := evaluate(engine)):
        run.log({"step": 0, "samples": 0, **record})
        run.clock.mark("evaluation")
    run.start_progress(state.step, last)
    assert schedule.steps is not None
    shapes: dict[str, Callable[..., float]] = {
        "cosine": cosine,
        "poly": functools.partial(poly, power=schedule.power),
        "steps": functools.partial(stairs, drops=schedule.drops),
    }
    lr = functools.partial(
        shapes[schedule.shape],
        steps=schedule.steps,
        lr=optim.lr,
        min_lr=schedule.min_lr,
        warmup_steps=schedule.warmup_steps or 0,
        warmup_lr=schedule.warmup_lr,
    )
    meter = Meter(optim.batch_size, task.work(), peak_flops(dtype))
    train(
        engine, open_stream, prepare, lambda: task.blank(dtype), state, run, meter, recovery.guard, recovery.saver,
        stop_at=last, batch_size=optim.batch_size, schedule=lr, save=save, go_back=recovery.go_back,
        evaluate=lambda: evaluate(engine), logging=run.settings.log, saving=run.settings.save,
    )  # fmt: skip
