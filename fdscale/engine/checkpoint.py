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

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fdscale import UserError, __version__, dist
from fdscale.engine import state as local

FORMAT = 1


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


def verify(checkpoint: Path, *, contents: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint directory, or None. contents: also compare the hash of every file.

    share: (i, n) looks at the i-th of every n files only. Raises UserError for one that a newer fdscale wrote: it is
    not damaged, and must not be walked back past.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            newer = f"it has format {manifest['format']}, and this fdscale {__version__} reads up to {FORMAT}"
            raise UserError(f"{checkpoint}: {newer}; update fdscale")
        for entry in manifest["files"][share[0] :: share[1]]:
            path = checkpoint / Path(entry["name"]).name
            if not path.is_file():
                return f"{entry['name']} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{entry['name']} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
            if contents and _sha256(path) != entry["sha256"]:
                return f"the content of {entry['name']} does not match its hash in the manifest"
    except UserError:
        raise
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json is not readable ({error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint} is not a checkpoint of fdscale ({error}); expected a directory such as "
            "RUN/checkpoints/step-00001000"
        ) from None


def check_identity(saved: dict[str, Any], wanted: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run as a different one; names the keys that differ."""
    different = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    if different:
        lines = "; ".join(
            f"{key} was {json.dumps(saved.get(key))}, is {json.dumps(wanted.get(key))}" for key in different[:5]
        )
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise UserError(
            f"{checkpoint} belongs to another run: {lines}{more}. Take the old values, or start in another --run "
            "directory"
        )


class Reader:
    """Reads ranges of flattened parameters out of the files of a checkpoint, whatever ranks wrote them."""

    def __init__(self, checkpoint: Path):
        self.state = read_state(checkpoint)
        names = sorted(entry["name"] for entry in json.loads((checkpoint / "manifest.json").read_text())["files"])
        self._files = [safe_open(checkpoint / name, "pt") for name in names if name.startswith("rank-")]
        self._where: dict[str, list[tuple[int, int, Any]]] = {}
        for file in self._files:
            for name, (start, length) in json.loads(file.metadata()["ranges"]).items():
                self._where.setdefault(name, []).append((start, length, file))

    def fetch(self, part: local.Range, key: str) -> Tensor:
        """The elements of one range as a flat float32 CPU tensor.

        Raises UserError where the checkpoint does not cover it.
        """
        out = torch.empty(part.length)
        missing = part.length
        for start, length, file in self._where.get(part.name, ()):
            begin, end = max(start, part.start), min(start + length, part.start + part.length)
            if begin < end:
                piece = file.get_slice(f"{key}/{part.name}")[begin - start : end - start]
                out[begin - part.start : end - part.start] = piece
                missing -= end - begin
        if missing:
            raise UserError(f"the checkpoint holds no {key} for {missing} of {part.length} elements of {part.name}")
        return out

    def full(self, name: str, key: str = "fp32") -> Tensor:
        """A whole parameter."""
        shape = tuple(self.state["parameters"][name])
        return self.fetch(local.Range(name, shape, 0, torch.Size(shape).numel()), key).view(shape)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters, one at a time."""
        for name in self.state["parameters"]:
            yield name, self.full(name)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """All persistent buffers."""
        for name in self.state["buffers"]:
            yield name, self._files[0].get_tensor(f"buffer/{name}")


def load(engine: Any, checkpoint: Path, identity: dict[str, Any]) -> tuple[int, int]:
    """Put a checkpoint's state into the engine; a collective. Returns (step, samples).

    Raises UserError where it belongs to another trajectory, or where anything in it would be dropped.
    """
    reader = Reader(checkpoint)
    saved = reader.state
    check_identity(saved["identity"], identity, checkpoint)
    shapes = {name: list(shape) for name, shape in local.names_and_shapes(engine).items()}
    if shapes != saved["parameters"]:
        differing = sorted(
            name
            for name in shapes.keys() | saved["parameters"].keys()
            if shapes.get(name) != saved["parameters"].get(name)
        )
        raise UserError(
            f"{checkpoint} has other parameters than this model: {', '.join(differing[:5])} ({len(differing)} in all)"
        )
    groups = {name: (g["lr_scale"], g["weight_decay"]) for g in saved["groups"] for name in g["names"]}
    for group in engine.optimizer.param_groups:
        for name in group["names"]:
            assert groups[name] == (group["lr_scale"], group["weight_decay"]), (
                f"{name} changed its group without a change of the config"
            )
    local.write(engine, reader.fetch, saved["optimizer_step"])
    own = local.buffers(engine)
    for name, value in reader.buffers():
        own[name].copy_(value)
    engine.global_steps = saved["step"]
    engine.global_samples = saved["samples"]
    engine.micro_steps = saved["step"] * engine.gradient_accumulation_steps()
    return saved["step"], saved["samples"]
