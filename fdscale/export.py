"""`fdscale export`: a student's weights out of a checkpoint, without optimizer, projector or teacher."""

from __future__ import annotations

from pathlib import Path

import torch

from fdscale import UserError, __version__, config
from fdscale.engine import checkpoint
from fdscale.models import backbone as build_backbone
from fdscale.models import convert


def main(source: str, out: str, names: str, force: bool) -> int:
    """`fdscale export`."""
    if not out.endswith(".safetensors"):
        raise UserError(f"{out}: weights are written as safetensors; give a name that ends in .safetensors")
    found = find(Path(source))
    if Path(out).exists() and not force:
        raise UserError(f"{out} exists; give another name, or --force to replace it")
    step, count = export(found, Path(out), names)
    print(f"{found}: step {step}, {count / 1e6:.2f} M parameters -> {out} ({names} names)")
    return 0


def find(source: Path) -> Path:
    """The checkpoint meant by a run directory or a checkpoint directory.

    Raises UserError where there is no valid one.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such run or checkpoint directory")
    if (source / "manifest.json").exists():
        problem = checkpoint.verify(source)
        if problem:
            raise UserError(f"{source}: {problem}")
        return source
    found, skipped = checkpoint.newest_valid(source / "checkpoints")
    if found is None:
        raise UserError(f"{source} holds no valid checkpoint{': ' + skipped[0] if skipped else ''}")
    return found


def export(found: Path, out: Path, names: str = "fdscale") -> tuple[int, int]:
    """Write the backbone of a checkpoint; returns its step and its number of parameters."""
    reader = checkpoint.Reader(found)
    settings = config.from_dict(reader.state["config"], str(found / "state.json"))
    prefix = "backbone."
    weights = {name.removeprefix(prefix): value for name, value in reader.parameters() if name.startswith(prefix)}
    with torch.device("meta"):
        student = build_backbone(
            settings.student.model, {"img_size": settings.data.image_size, **settings.student.args}
        )
    student.load_state_dict(weights, assign=True)
    metadata = {
        "fdscale": __version__,
        "step": str(reader.state["step"]),
        "model": settings.student.model,
        "names": names,
    }
    convert.save(convert.export(student, names), out, metadata)
    return reader.state["step"], sum(value.numel() for value in weights.values())
