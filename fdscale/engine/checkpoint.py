"""Checkpoints that are committed or absent, and that unpickle nothing.

    RUN/checkpoints/latest                 the name of the newest committed checkpoint, replaced atomically
    RUN/checkpoints/step-00000100/
        rank-00000.safetensors             this rank's ranges: fp32/NAME, exp_avg/NAME, exp_avg_sq/NAME; buffer/NAME on
        rank 0
        state.json                         step, samples, optimizer step, parameter shapes and groups, identity of the
        trajectory, config
        manifest.json                      size and SHA-256 of every other file, world size, versions

All ranks write under a temporary name and sync; then rank 0 writes the manifest and renames. A directory without the
temporary name is complete, and its manifest proves it. Every file says which range of each flattened parameter it
holds, so any number of ranks, at any ZeRO stage, can read what it needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fdscale import UserError, __version__, config, dist
from fdscale.engine import contents
from fdscale.engine import state as local
from fdscale.engine.contents import FORMAT, Damaged
from fdscale.engine.reader import Reader
from fdscale.run import write_atomically

TEMPORARY = ".writing-"


def name_of(step: int) -> str:
    """Directory name of a step's checkpoint."""
    return f"step-{step:08d}"


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def save(
    engine: Any,
    folder: Path,
    *,
    step: int,
    samples: int,
    identity: dict[str, Any],
    settings: config.Config,
    keep: int,
    guard: dict[str, Any] | None = None,
) -> Path:
    """Write and commit the checkpoint of a step; a collective. Returns its directory.

    identity: plain data that fixes the trajectory (see `config.trajectory`), compared at resume. guard: see
    `guard.Guard.state`. Raises UserError where writing fails; what was committed before stays as it was.
    """
    final = folder / name_of(step)
    temporary = folder / f"{TEMPORARY}{name_of(step)}"
    _together(lambda: _make_room(temporary) if dist.rank() == 0 else None, step, folder)
    entries = _together(lambda: _write_rank(engine, temporary), step, folder)
    state = _describe(engine, step, samples, identity, settings) | {"guard": guard or {}}
    written = [entry for entry in entries if entry]
    _together(lambda: _commit(engine, temporary, final, written, state) if dist.rank() == 0 else None, step, folder)
    if dist.rank() == 0:
        _prune(folder, final, keep)
    return final


def _together(work: Callable[[], Any], step: int, folder: Path) -> list[Any]:
    """Every rank's result, or the same error on all: a rank that fails alone would leave the others waiting for it."""
    result, problem = None, ""
    try:
        result = work()
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem = f"rank {dist.rank()} on {os.uname().nodename}: {type(error).__name__}: {error}"
    gathered = dist.gather((result, problem))
    problems = [problem for _, problem in gathered if problem]
    if problems:
        raise UserError(
            f"the checkpoint of step {step} could not be written to {folder} ({problems[0]}); earlier checkpoints are "
            "intact"
        )
    return [result for result, _ in gathered]


def _make_room(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_rank(engine: Any, temporary: Path) -> dict[str, Any] | None:
    """Write this rank's file; returns its manifest entry, or None when the rank holds nothing."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, list[int]] = {}
    for part, values in local.read(engine):
        index[part.name] = [part.start, part.length]
        tensors.update({f"{key}/{part.name}": value.float().cpu().contiguous() for key, value in values.items()})
    if dist.rank() == 0:
        tensors.update(
            {f"buffer/{name}": buffer.detach().cpu().contiguous() for name, buffer in local.buffers(engine).items()}
        )
    if not tensors:
        return None
    path = temporary / f"rank-{dist.rank():05d}.safetensors"
    save_file(tensors, path, metadata={"ranges": json.dumps(index)})
    _sync(path)
    return _entry(path)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(
    engine: Any, step: int, samples: int, identity: dict[str, Any], settings: config.Config
) -> dict[str, Any]:
    """The content of state.json."""
    return {
        "format": FORMAT,
        "step": step,
        "samples": samples,
        "identity": identity,
        **local.describe(engine),
        "config": config.as_dict(settings),
    }


def _commit(engine: Any, temporary: Path, final: Path, entries: list[dict[str, Any]], state: dict[str, Any]) -> None:
    """Describe what all ranks wrote, and give it its name (rank 0)."""
    write_atomically(temporary / "state.json", json.dumps(state))
    manifest = {
        "format": FORMAT,
        "files": [*entries, _entry(temporary / "state.json")],
        "world": dist.world(),
        "zero_stage": engine.zero_optimization_stage(),
        "identity": config.digest(state["identity"]),
        "versions": {"fdscale": __version__, "torch": torch.__version__, "deepspeed": _deepspeed_version()},
    }
    write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1))
    _sync(temporary)
    if final.exists():  # the same step again, after a resume from an earlier checkpoint
        _discard(final)
    os.replace(temporary, final)
    _sync(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")


def _deepspeed_version() -> str:
    import deepspeed

    return deepspeed.__version__


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Keep the newest `keep` up to and including the one just written.

    Later steps belong to a future that was abandoned when the run walked back past damaged checkpoints. What cannot be
    removed stays: the checkpoint itself is written.
    """
    present = committed(folder)
    past = [path for path in present if path.name <= newest.name]
    with contextlib.suppress(OSError):
        for old in [*past[keep:], *(path for path in present if path.name > newest.name)]:
            _discard(old)


def _discard(checkpoint: Path) -> None:
    """Remove a committed directory.

    First out of the namespace, so that a crash in the middle leaves no half under a committed name.
    """
    doomed = checkpoint.with_name(f"{TEMPORARY}old-{checkpoint.name}")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def discard_if(folder: Path, unwanted: Callable[[dict[str, Any]], bool]) -> None:
    """Remove the checkpoints whose state.json, as far as it can be read, is unwanted (rank 0)."""
    for path in committed(folder):
        try:
            doomed = unwanted(read_state(path))
        except (UserError, KeyError, TypeError):
            continue  # damaged: whoever looks for one to load says so
        if doomed:
            _discard(path)


def sweep(folder: Path) -> None:
    """Remove what an interrupted write left behind (rank 0, before training)."""
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def committed(folder: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


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
