"""The main job: train a student on the whitened features of a frozen teacher."""

from __future__ import annotations

import functools
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdscale import UserError, config, dist
from fdscale.assemble import (
    Parts,
    assemble,
    heldout_stream,
    identity,
    initial_values,
    normalise,
    shard_cache,
    target_of,
    to_device,
    train_stream,
    training_target,
    work_per_image,
)
from fdscale.data import jpeg
from fdscale.data.index import open_index
from fdscale.engine import checkpoint, ema
from fdscale.engine.ds_config import bf16
from fdscale.engine.guard import Detours, Guard
from fdscale.engine.initialize import initialize, prepare_environment, read_ds_config
from fdscale.engine.metrics import Meter, peak_flops
from fdscale.engine.room import Room, open_room
from fdscale.engine.saver import Saver
from fdscale.engine.schedule import cosine
from fdscale.objective import feature_loss
from fdscale.recovery import Recovery
from fdscale.run import TAKEN, Run
from fdscale.starts import Clock
from fdscale.train import TrainState, train
from fdscale.watchdog import SLACK

MEAN_VIEWS = 256  # fewer make the mean token noisy, and a trivial predictor that is easily beaten
DONE, DIVERGED, STOPPED, FENCED = 0, 3, 75, 76  # exit codes, see docs/running.md


def main(recipe: str, run: str, steps: int | None, set: list[str], ds: str | None, resume: str | None) -> int:
    """`fdscale distill`."""
    code = distill(config.load(recipe, set), Path(run), ds=ds, stop_at=steps, resume=resume)
    dist.close()
    return code


class HeldOut:
    """Held-out loss, beside that of a trivial predictor: the training set's mean token, predicted everywhere."""

    def __init__(self, parts: Parts, dtype: torch.dtype, run: Run):
        data = parts.settings.data
        self._parts, self._dtype, self._run = parts, dtype, run
        opened = data.heldout_shards and open_index(data.heldout_shards, data.heldout_index, shard_cache(data))
        self._index = opened or None
        self._constant: Tensor | None = None

    def __call__(self, engine: Any) -> dict[str, Any]:
        """The record of one evaluation; a collective. Empty where there is no held-out set, or a signal came."""
        if self._index is None:
            return {}
        first = self._constant is None
        if self._constant is None:
            self._constant = self._mean_training_token()
        if self._constant is None:
            return {}
        record = self._evaluate(engine, first)
        if record and self._parts.settings.optim.ema is not None:
            with ema.in_place_of_weights(engine):
                averaged = self._evaluate(engine, False)
            record = record | {"heldout_loss_ema": averaged["heldout_loss"]} if averaged else {}
        return record

    def _evaluate(self, engine: Any, first: bool) -> dict[str, Any]:
        """The losses of the weights that are in place; empty where a signal came."""
        parts, beta = self._parts, self._parts.settings.objective.beta
        sums = torch.zeros(3, dtype=torch.float64, device=dist.device())
        engine.eval()
        if parts.cached is not None:  # the teacher is needed here alone, and is on the device only as long
            parts.teacher.to(dist.device())
        with torch.no_grad():
            for batch in heldout_stream(parts, self._index):
                if self._run.interrupted():
                    break
                if first:  # every evaluation loses the same samples
                    self._run.report_lost(batch["replaced"])
                images, weights = to_device(batch["images"]), batch["weights"].to(dist.device())
                target = target_of(images, parts.teacher, parts.pairing)
                loss = engine(normalise(images, self._dtype), target, None, weights)
                trivial = feature_loss(self._constant.expand_as(target), target, beta, weights)
                sums += torch.stack([loss.double(), trivial.double(), weights.sum().double()])
        engine.train()
        if parts.cached is not None:
            parts.teacher.to("cpu")
        if self._run.stopped_by:
            return {}
        loss, trivial, count = dist.total(sums).tolist()
        if not count:
            raise UserError(f"no sample of data.heldout_shards ({parts.settings.data.heldout_shards}) can be read")
        return {"heldout_loss": loss / count, "heldout_trivial": trivial / count, "heldout_samples": int(count)}

    def _mean_training_token(self) -> Tensor | None:
        """(T,) over as many training views as there are held-out samples, but at least MEAN_VIEWS; a collective.

        None: a signal came.
        """
        parts = self._parts
        wanted = max(MEAN_VIEWS, min(parts.settings.data.heldout_samples, parts.index.samples))
        sums = torch.zeros(parts.teacher.width + 1, dtype=torch.float64, device=dist.device())
        for batch in train_stream(parts, 0, wanted):
            if self._run.interrupted():
                return None
            target = training_target(parts, batch, to_device(batch["images"])).flatten(0, 1)
            sums[:-1] += target.double().sum(0)
            sums[-1] += target.shape[0]
        sums = dist.total(sums)
        return (sums[:-1] / sums[-1]).float()


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


def distill(
    settings: config.Config,
    directory: Path,
    *,
    ds: str | None = None,
    stop_at: int | None = None,
    resume: str | None = None,
) -> int:
    """Run or continue a distillation; returns the process's exit code."""
    if stop_at is not None and stop_at < 0:
        raise UserError(f"--steps must not be negative, got {stop_at}")
    prepare_environment()
    ds_config = read_ds_config(ds)
    clock = Clock()
    clock.mark("import")
    parts = assemble(settings, dist.world())
    clock.mark("build")
    dist.init()
    clock.mark("init")
    run = Run(directory, parts.settings, clock)

    def work(token: str) -> int:
        room = open_room(directory / "checkpoints", token)
        try:
            return _distill(run, parts, room, ds_config, stop_at, resume)
        finally:
            if dist.rank() == 0:
                room.close()

    return run.own(work)


def _distill(
    run: Run, parts: Parts, room: Room, ds_config: dict[str, Any], stop_at: int | None, resume: str | None
) -> int:
    """Build the engine, load what there is, and train, in a directory that is ours."""
    directory, settings = run.directory, parts.settings
    wanted = identity(parts, parts.teacher.fingerprint())
    detours = Detours(directory)
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
        parts.module,
        initial_values(settings, parts.module) if start is None else lambda name, shape: torch.zeros(shape),
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
    if parts.cached is None:
        parts.teacher.to(dist.device())
    elif not settings.data.heldout_shards:
        parts.teacher.to("meta")  # nothing computes with it: its memory is free again
    run.clock.mark("load")
    run.open(
        {"ds_config": ds_config, "resumed_from": str(start) if start else None, "steps": 0}
        | {"from_step": state.step, "step": state.step, "goal": schedule.steps}
    )
    with run:
        _announce(run, parts, start, state, last)
        try:
            _train(engine, parts, run, state, last, recovery, torch.bfloat16 if bf16(ds_config) else torch.float32)
        finally:
            recovery.saver.close()
    if run.fenced:
        run.say(TAKEN, "red")
        return FENCED
    if run.diverged:
        run.say(f"{recovery.verdict} at step {state.step}; nothing was saved since it broke", "red")
        return DIVERGED
    if run.over_budget:
        raise UserError(
            f"{run.lost} samples could not be had and were replaced since this start, more than data.lost_budget "
            f"{settings.data.lost_budget:g} allows: they are listed in {directory}/lost-*.log. Repair them (`fdscale "
            f"shards verify --decode` names all), or set a larger one; the same command goes on from step {state.step}"
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


def _announce(run: Run, parts: Parts, start: Path | None, state: TrainState, last: int) -> None:
    count = sum(
        parameter.numel() if not hasattr(parameter, "ds_numel") else parameter.ds_numel
        for parameter in parts.module.parameters()
    )
    run.say(
        f"{parts.settings.teacher.source} -> {parts.settings.student.model}, {count / 1e6:.1f} M trained parameters, "
        f"{parts.index.samples} samples in {len(parts.index.names)} shards, {parts.order.lanes} lanes, "
        f"{dist.world()} rank(s)"
    )
    if parts.cached is not None:
        run.say(f"the teacher's features come from {parts.cached.folder}; it does not run")
    if parts.order.span is not None:
        run.say(f"samples and augmentation repeat after {parts.order.span} samples (cache.epochs)")
    if parts.settings.data.decode != "pillow" and (missing := jpeg.missing()):
        run.say(f"JPEGs are decoded by Pillow alone, which takes about twice as long: {missing}", "yellow")
    if start is not None:
        run.say(f"resumed from {start}: step {state.step}, sample {state.samples}")
    if state.step >= last:
        run.say(f"nothing to do: step {state.step} of {last} is reached")


def _train(
    engine: Any, parts: Parts, run: Run, state: TrainState, last: int, recovery: Recovery, dtype: torch.dtype
) -> None:
    settings = parts.settings
    optim, schedule = settings.optim, settings.schedule

    def prepare(batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        run.log_samples(batch["numbers"].tolist(), batch["origin"])
        run.report_lost(batch["replaced"])
        images = to_device(batch["images"])
        return (
            normalise(images, dtype),
            training_target(parts, batch, images),
            batch["numbers"].to(dist.device(), non_blocking=True),
        )

    def blank() -> tuple[Tensor, Tensor, Tensor]:
        size = settings.data.image_size
        images = torch.zeros(settings.memory.micro_batch, 3, size, size, device=dist.device())
        numbers = torch.zeros(len(images), dtype=torch.int64, device=dist.device())
        rows, columns = parts.pairing.student_grid
        tokens = len(parts.pairing.student_kept) + rows * columns
        target = torch.zeros(len(images), tokens, parts.teacher.width, device=dist.device())
        return normalise(images, dtype), target, numbers

    def open_stream(samples: int) -> Generator[dict[str, Any], None, None]:
        return train_stream(parts, samples, samples + (last - state.step) * optim.batch_size)

    heldout = HeldOut(parts, dtype, run)
    run.clock.mark("build")
    run.watchdog.begin("evaluation", SLACK)
    if state.step == 0 and last > 0 and (record := heldout(engine)):
        run.log({"step": 0, "samples": 0, **record})
        run.clock.mark("evaluation")
    run.start_progress(state.step, last)
    lr = functools.partial(
        cosine,
        steps=schedule.steps,
        lr=optim.lr,
        min_lr=schedule.min_lr,
        warmup_steps=schedule.warmup_steps or 0,
        warmup_lr=schedule.warmup_lr,
    )
    meter = Meter(optim.batch_size, work_per_image(parts), peak_flops(dtype))
    train(
        engine, open_stream, prepare, blank, state, run, meter, recovery.guard, recovery.saver,
        stop_at=last, batch_size=optim.batch_size, schedule=lr, save=recovery.save, go_back=recovery.go_back,
        evaluate=lambda: heldout(engine), logging=settings.log, saving=settings.save,
    )  # fmt: skip
