"""Checkpoints that are committed or absent, and that unpickle nothing: what they are, and reading them.

    RUN/checkpoints/latest                 the name of the newest committed checkpoint, replaced atomically
    RUN/checkpoints/step-00000100/
        rank-00000.safetensors             this rank's ranges: fp32/NAME, exp_avg/NAME, exp_avg_sq/NAME; buffer/NAME on
        rank 0
        state.json                         step, samples, optimizer step, parameter shapes and groups, identity of the
        trajectory, config
        manifest.json                      size and SHA-256 of every other file, world size, versions

They are written by `fdscale.engine.saver`, in a directory that gets its name when all ranks have written and synced
(`fdscale.engine.room`): what has a name is complete, and its manifest proves it. Every file says which range of each
flattened parameter it holds, so any number of ranks, at any ZeRO stage, can read what it needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fdscale import UserError, dist
from fdscale.engine import contents
from fdscale.engine import state as local
from fdscale.engine.contents import Damaged
from fdscale.engine.reader import Reader


def name_of(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's directory is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def committed(folder: Path) -> list[Path]:
    """Checkpoint directories, newest first; what people call otherwise is left alone."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())
    return sorted(named, key=step_of, reverse=True)


def verify(checkpoint: Path, *, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint directory, or None. hashes: also compare the hash of every file.

    share: (i, n) looks at the i-th of every n files only, and the first at what they hold together. Raises UserError
    for one that a newer fdscale wrote: it is not damaged, and must not be walked back past.
    """
    try:
        contents.verify_files(checkpoint, hashes=hashes, share=share)
        if share[0] == 0:
            Reader(checkpoint).close()
    except Damaged as damage:
        return str(damage)
    return None


def newest_valid(folder: Path, *, before: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not.

    before: only of steps below this one. A collective. Raises UserError for one that a newer fdscale wrote.
    """
    skipped: list[str] = []
    for checkpoint in _from_rank_0(lambda: committed(folder)):
        if before is not None and checkpoint.name >= name_of(before):
            continue
        problem = verify_together(checkpoint)
        if problem is None:
            return checkpoint, skipped
        skipped.append(f"skipped {checkpoint}: {problem}")
    return None, skipped


def verify_together(checkpoint: Path) -> str | None:
    """`verify` by all ranks, each a share of the files; a collective.

    Rank 0's word counts: a node that cannot read what is whole must not make a run walk back. Raises UserError there.
    """
    problem, newer = None, ""
    try:
        problem = verify(checkpoint, share=(dist.rank(), dist.world()))
    except UserError as error:
        newer = str(error)
    told = dist.gather((problem, newer, os.uname().nodename))
    for _, newer, _ in told:
        if newer:
            raise UserError(newer)
    bad = [(rank, host, problem) for rank, (problem, _, host) in enumerate(told) if problem]
    if not bad or dist.world() == 1:
        return problem
    rank, host, problem = bad[0]
    whole = _from_rank_0(lambda: verify(checkpoint))
    if whole is None:
        raise UserError(
            f"{checkpoint} is whole for rank 0, not for rank {rank} on {host} ({problem}): see to that node"
        )
    return whole


def _from_rank_0(work: Callable[[], Any]) -> Any:
    """What rank 0 finds, or its UserError, on all ranks: shared storage is read once."""
    answer: tuple[Any, str] = (None, "")
    if dist.rank() == 0:
        try:
            answer = (work(), "")
        except UserError as error:
            answer = (None, str(error))
    result, problem = dist.gather(answer)[0]
    if problem:
        raise UserError(problem)
    return result


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises UserError where it is no checkpoint."""
    try:
        return contents.read_state(checkpoint)
    except Damaged as damage:
        raise UserError(
            f"{checkpoint} is not a checkpoint of fdscale ({damage}); expected a directory such as "
            "RUN/checkpoints/step-00001000"
        ) from None


def check_identity(saved: dict[str, Any], wanted: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run as a different one; names the keys that differ."""
    different = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    if different:
        lines = "; ".join(f"{key} was {_show(saved.get(key))}, is {_show(wanted.get(key))}" for key in different[:5])
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(
            f"{checkpoint} belongs to another run: {lines}{more}. Take the old values, or start in another --run "
            "directory"
        )


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:197] + "..."


def load(engine: Any, checkpoint: Path, identity: dict[str, Any]) -> tuple[int, int]:
    """Put a checkpoint's state into the engine; a collective. Returns (step, samples).

    Raises UserError where it belongs to another trajectory, or where anything in it would be dropped.
    """
    saved = read_state(checkpoint)
    check_identity(saved["identity"], identity, checkpoint)
    check_fit(saved, local.describe(engine), checkpoint)
    try:
        with contextlib.closing(Reader(checkpoint)) as reader:
            local.write(engine, reader.fetch, saved["optimizer_step"])
            own = local.buffers(engine)
            for name, value in reader.buffers():
                own[name].copy_(value)
    except Damaged as damage:
        raise UserError(f"{checkpoint}: {damage}") from None
    for group in engine.optimizer.param_groups:
        group["lr"] = next((old["lr"] for old in saved["groups"] if old["names"] == group["names"]), group["lr"])
    engine.global_steps = saved["step"]
    engine.global_samples = saved["samples"]
    engine.micro_steps = saved["step"] * engine.gradient_accumulation_steps()
    return saved["step"], saved["samples"]


def check_fit(saved: dict[str, Any], own: dict[str, Any], checkpoint: Path) -> None:
    """Refuse what an engine (`state.describe`) would drop of a checkpoint, or would not find there, by name."""
    kinds = {
        "parameters": (saved["parameters"], own["parameters"]),
        "frozen parameters": (dict.fromkeys(saved["frozen"]), dict.fromkeys(own["frozen"])),
        "buffers": (dict.fromkeys(saved["buffers"]), dict.fromkeys(own["buffers"])),
        "vectors of each parameter": (dict.fromkeys(saved["keys"]), dict.fromkeys(own["keys"])),
        "groups of parameters": (_by_parameter(saved["groups"]), _by_parameter(own["groups"])),
    }
    for kind, (there, here) in kinds.items():
        different = [_difference(name, there, here) for name in sorted(there.keys() | here.keys())]
        different = [what for what in different if what]
        if different:
            more = f" and {len(different) - 5} more" if len(different) > 5 else ""
            raise UserError(f"{checkpoint} has other {kind} than this model: {'; '.join(different[:5])}{more}")


def _difference(name: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    if name not in here:
        return f"{name} is there alone"
    if name not in there:
        return f"{name} is here alone"
    return f"{name} is {_show(there[name])} there and {_show(here[name])} here" if there[name] != here[name] else ""


def _by_parameter(groups: list[dict[str, Any]]) -> dict[str, Any]:
    kept = ("lr_scale", "weight_decay")
    return {name: {key: group[key] for key in kept} for group in groups for name in group["names"]}
