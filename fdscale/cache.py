"""Run the teacher once over the first epochs of a run and write its features, for runs that replay them.

The format and its guarantees: fdscale.data.features. Each rank writes files of its own, rank r of W the files f with
f mod W = r, and after the start no rank waits for another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fdscale import UserError, config, dist
from fdscale.assemble import Parts, assemble, cache_folder, cache_plan, learnt_tokens, numbered_stream
from fdscale.data import feature_files
from fdscale.data.features import HEADER, Plan, encode, is_whole, written
from fdscale.engine import memory
from fdscale.inputs import to_device
from fdscale.run import Losses, too_many
from fdscale.signals import STOP_SIGNALS

DONE, STOPPED = 0, 75  # exit codes, see docs/running.md
SPARE = 2**28  # bytes left free on the disk, for the names and small files
AHEAD = 2  # micro-batches that the teacher is ahead of the disk
Advance = Callable[[int, int | None], None]  # samples done since, and files that are whole, where it was counted


class _Stopped(Exception):
    """A signal came in the middle of a file."""


def main(recipe: str, out: str, set: list[str], repair: bool) -> int:
    """`fdscale cache`."""
    code = cache(config.load(recipe, set), out, repair=repair)
    dist.close()
    return code


def cache(settings: config.Config, out: str, *, repair: bool = False) -> int:
    """Write a feature cache or go on with it; returns the process's exit code.

    repair: first read every file that is there, and write the damaged ones anew.
    """
    # The same recipe names the cache that its runs replay; here the teacher is always live.
    settings = dataclasses.replace(settings, cache=dataclasses.replace(settings.cache, features=None))
    parts = assemble(settings, world=1)
    dist.init()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for name in parts.teachers:  # of several, one after the other, in a directory of its own
        if code := _cache(parts, name, cache_folder(out, name), repair, console):
            return code
    return DONE


def _cache(parts: Parts, name: str, out: str, repair: bool, console: Console) -> int:
    """One teacher's cache; returns the process's exit code."""
    plan = _prepare(out, cache_plan(parts, name), repair, console)
    if is_whole(out):
        if dist.rank() == 0:
            console.print(f"{out} is whole; nothing to do (--repair looks for damage)", markup=False)
        return DONE
    teacher = parts.teachers[name]
    mine = range(dist.rank(), plan.files, dist.world())
    there = written(out, plan)
    with _stop_signals() as stopped, _bar(plan, len(there)) as advance:
        if repair:
            there -= _discard_damaged(out, plan, [file for file in mine if file in there], console)
        if teacher.is_ours:
            memory.agree_on_kernels(teacher.network)
        teacher.to(dist.device())
        with contextlib.suppress(_Stopped):
            _write(parts, name, plan, out, [file for file in mine if file not in there], stopped, advance, console)
    teacher.to("cpu")
    if feature_files.finish(out, plan):
        console.print(f"{out} is whole: features of {plan.span} samples", markup=False)
        return DONE
    if stopped:
        console.print(f"stopped by {stopped[0]}; files that are whole stay, the same command goes on", markup=False)
    return STOPPED if stopped else DONE


def _prepare(out: str, wanted: Plan, repair: bool, console: Console) -> Plan:
    """Rank 0 makes or opens the directory and sees that there is room; all get the plan, or the error. A collective."""
    plan, problem = None, ""
    if dist.rank() == 0:
        try:
            started = os.path.exists(os.path.join(out, "cache.json"))
            if not started:  # a cache that does not fit leaves no trace
                _say_size(out, wanted, set(), console)
            plan = feature_files.begin(out, wanted)
            if started:
                _say_size(out, plan, written(out, plan), console)
            if repair:
                feature_files.reopen(out, plan)
        except UserError as error:
            problem = str(error)
    plan, problem = dist.gather((plan, problem))[0]
    if problem:
        raise UserError(problem)
    return plan


def _say_size(out: str, plan: Plan, there: set[int], console: Console) -> None:
    """Say how much is to be written, and raise UserError if the disk has no room for it."""
    total = plan.files * HEADER + plan.span * plan.record_bytes
    missing = total - sum(plan.file_bytes(file) for file in there)
    place = os.path.abspath(out)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    console.print(
        f"{out}: {plan.span} samples x {plan.record_bytes / 1000:.1f} kB ({plan.tokens} tokens x {plan.width}, "
        f"{plan.stored}) = {_size(total)} in {plan.files} files; {_size(missing)} to write, {_size(free)} free",
        markup=False,
    )
    if missing and missing + SPARE > free:
        raise UserError(
            f"{out}: the features to be written take {_size(missing)}, and {_size(free)} are free there; make room, "
            "name another --out, or take fewer cache.epochs or a smaller cache.dtype"
        )


def _size(count: int) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"


def _discard_damaged(out: str, plan: Plan, files: list[int], console: Console) -> set[int]:
    damaged = set()
    for file in files:
        if problem := feature_files.problem_with(out, plan, file):
            console.print(f"{out}: file {file} is damaged ({problem}) and is written anew", markup=False)
            feature_files.discard(out, file)
            damaged.add(file)
    return damaged


def _write(
    parts: Parts,
    name: str,
    plan: Plan,
    out: str,
    files: list[int],
    stopped: list[str],
    advance: Advance,
    console: Console,
) -> None:
    """Write these files; raises _Stopped on a signal.

    A micro-batch holds consecutive numbers, and the last one of all is filled up from number 0 on, so that the teacher
    always sees as many as in training.
    """
    size = plan.micro_batch
    chosen = (list(range(first, first + size)) for file in files for first in plan.numbers(file)[::size])
    losses = Losses(Path(out), console)
    computed = _ahead(_computed(parts, name, plan, chosen, losses))

    def records(file: int) -> Iterator[np.ndarray]:
        for first in plan.numbers(file)[::size]:
            if stopped:
                raise _Stopped
            kept = min(size, plan.numbers(file).stop - first)
            numbers, views, values, scale = next(computed)
            scales = None if scale is None else scale[:kept]
            yield feature_files.pack(plan, numbers[:kept], views[:kept], values[:kept], scales)
            advance(kept * dist.world(), None)

    try:
        for file in files:
            feature_files.write_file(out, plan, file, records(file))
            advance(0, len(written(out, plan)))
    finally:
        computed.close()
        losses.close()


def _computed(
    parts: Parts, name: str, plan: Plan, chosen: Iterable[list[int]], losses: Losses
) -> Generator[tuple[Any, ...], None, None]:
    """Numbers, views, values and scales of each micro-batch, on the CPU."""
    stream = numbered_stream(parts, chosen)
    lost, seen, budget = 0, 0, parts.settings.data.lost_budget
    try:
        for batch in stream:
            losses.add(batch["replaced"])
            lost, seen = lost + len(batch["replaced"]), seen + len(batch["numbers"])
            if too_many(lost, seen, budget):
                raise UserError(
                    f"{lost} of {seen} samples could not be had and were replaced, more than data.lost_budget "
                    f"{budget:g} allows: they are listed in lost-{dist.rank()}.log of the cache; repair them, or set a "
                    "larger budget"
                )
            tokens = learnt_tokens(to_device(batch["images"]), parts.teachers[name], parts.pairings[name])
            values, scale = encode(tokens, plan.stored)
            finite = tokens.isfinite().all(-1).all(-1).cpu()
            if not finite.all():
                shard, key = batch["origin"][int(finite.int().argmin())]
                raise UserError(
                    f"{shard}: sample '{key}': the teacher's features are not finite; a teacher.dtype of float16 can "
                    "overflow: take bfloat16 or float32"
                )
            yield batch["numbers"], batch["images"], values.cpu(), None if scale is None else scale.cpu()
    finally:
        stream.close()


def _ahead(items: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """The same items, made by a thread while earlier ones are used: the teacher need not wait for the disk."""
    end = object()
    # The first one in this thread: it starts the data workers. A worker that a pool's thread starts tries to join that
    # thread, which is its own, when it ends, and so ends with status 1.
    first = next(items, end)
    if first is end:
        return
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(next, items, end) for _ in range(AHEAD))
        try:
            yield first
            while (item := made.popleft().result()) is not end:
                made.append(pool.submit(next, items, end))
                yield item
        finally:
            pool.submit(items.close).result()


@contextlib.contextmanager
def _bar(plan: Plan, files: int) -> Iterator[Advance]:
    """A bar over the samples of all ranks on rank 0. Of the others it knows the files that are whole."""
    columns = (
        TextColumn("samples"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=dist.rank() != 0) as progress:
        task = progress.add_task("", total=plan.span, completed=files * plan.per_file)

        def advance(samples: int, whole: int | None) -> None:
            progress.update(task, advance=samples)
            if whole is not None:
                progress.update(task, completed=min(whole * plan.per_file, plan.span))

        yield advance


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that gets the name of a signal that asks to stop. A second Ctrl-C ends the process at once."""
    stopped: list[str] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stopped and name == "SIGINT":
            os._exit(130)  # whole files stand, and the next start removes the one that was begun
        stopped.append(name)
        os.write(2, f"\n{name}: stopping after this micro-batch\n".encode())

    previous = {}
    for number in STOP_SIGNALS:
        with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
            previous[number] = signal.signal(number, on_signal)
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
