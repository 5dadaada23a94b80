"""`fdscale export`: a student's weights out of a checkpoint, with its head if it has one; no optimizer, no projector.

Memory holds one parameter at a time, whatever ranks wrote the checkpoint. A directory gets the layout of Hugging Face:
model-00001-of-0000N.safetensors and an index. What is written appears under its name when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fdscale import UserError, __version__, config
from fdscale.durable import sync, write_atomically
from fdscale.engine import tensor_file
from fdscale.engine.contents import Damaged
from fdscale.engine.reader import Reader
from fdscale.engine.state import EMA
from fdscale.models import convert
from fdscale.student import PREFIX, backbone, build_labelled, find_checkpoint

PROJECTOR = "projector."  # of a distillation, which is not exported
SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
OTHER_KINDS = (".pt", ".pth", ".bin", ".ckpt", ".npz", ".onnx")


def main(source: str, out: str, names: str, force: bool, dtype: str, shard_gib: float, ema: bool) -> int:
    """`fdscale export`."""
    target = Path(out)
    if target.suffix in OTHER_KINDS:
        raise UserError(f"{out}: give a name that ends in .safetensors, or the name of a directory")
    if not 0 < shard_gib < math.inf:
        raise UserError(f"--shard-gib {shard_gib}: expected a size above 0")
    found = find_checkpoint(Path(source))
    if os.path.lexists(target):
        if not force:
            raise UserError(f"{out} exists; give another name, or --force to replace it")
        check_replaceable(target)
    try:
        step, count = export(found, target, names, getattr(torch, dtype), int(shard_gib * 2**30), ema)
    except Damaged as damage:
        raise UserError(f"{found}: {damage}") from None
    print(f"{found}: step {step}, {count / 1e6:.2f} M parameters -> {out} ({names} names, {dtype})")
    return 0


def check_replaceable(target: Path) -> None:
    """Refuse to replace what is no weights: a directory that holds anything else."""
    if target.is_dir() and not target.is_symlink():
        other = [path.name for path in target.iterdir() if not path.name.endswith((SUFFIX, INDEX))]
        if other:
            raise UserError(f"{target} holds more than weights ({other[0]}) and is left alone; give another name")
    elif target.suffix != SUFFIX:
        raise UserError(f"{target} is a file; give a name that ends in .safetensors, or another directory")


def export(
    found: Path,
    target: Path,
    names: str = "fdscale",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = 5 << 30,
    ema: bool = False,
) -> tuple[int, int]:
    """Write the backbone of a checkpoint; returns its step and its number of parameters.

    target: a .safetensors file, or a directory of such files of about shard_bytes each. Raises UserError, and leaves
    nothing half behind, where it cannot be written.
    """
    with contextlib.closing(Reader(found)) as reader:
        origins, metadata = student(reader, names, found)
        if ema and EMA not in reader.state["keys"]:
            raise UserError(f"{found} holds no average of the weights: the run had no optim.ema")
        layout = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (_, shape) in origins.items()}
        metadata |= {"weights": EMA if ema else "last", "format": "pt"}

        def write(path: Path, part: dict[str, Tensor]) -> None:
            part = dict(sorted(part.items()))  # as the library orders them
            tensor_file.write(path, part, values(reader, origins, part, EMA if ema else "fp32"), metadata)

        with replacing(target) as new:
            if target.suffix == SUFFIX:
                write(new, layout)
            else:
                new.mkdir()
                parts = shards(layout, shard_bytes)
                files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
                for file, part in zip(files, parts, strict=True):
                    write(new / file, part)
                where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
                total = sum(map(size_of, layout.values()))
                index = {"metadata": {"total_size": total, **metadata}, "weight_map": where}
                write_atomically(new / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
        return reader.state["step"], sum(form.numel() for form in layout.values())


def student(reader: Reader, names: str, found: Path) -> tuple[dict[str, tuple[str, torch.Size]], dict[str, str]]:
    """Exported name -> the checkpoint's name and shape, for all of the student; and what to say about them.

    Of a classifier that is the head, too, and of a segmenter or detector its heads with their buffers. Raises UserError
    where the checkpoint and its config do not fit.
    """
    settings = config.from_dict(reader.state["config"], str(found / "state.json"))
    model = backbone(settings)
    shapes = {f"{PREFIX}{name}": parameter.shape for name, parameter in model.named_parameters()}
    # Renaming keeps the order, one name for one parameter.
    origins = dict(zip(convert.export(model, names), shapes.items(), strict=True))
    task = config.task_of(settings)
    if task != "distill":
        for name, parameter in build_labelled(settings, model).named_parameters():
            if name not in shapes:
                shapes[name] = parameter.shape
                origins[head_name(name, names, settings.student.model)] = (name, parameter.shape)
    kept = {name: shape for name, shape in reader.state["parameters"].items() if not name.startswith(PROJECTOR)}
    if kept != {name: list(shape) for name, shape in shapes.items()}:
        raise UserError(f"{found}: its student is not the one that its config describes")
    if task in ("segment", "detect"):
        origins |= {name: (name, value.shape) for name, value in reader.buffers()}
    step, model_name = str(reader.state["step"]), settings.student.model
    return origins, {"fdscale": __version__, "step": step, "model": model_name, "names": names}


def head_name(name: str, names: str, model: str) -> str:
    """What others call a parameter of the norm or the head: BEiT as we do, timm's Swin has head.fc."""
    plain = name.startswith("head.") and (names, model) == ("timm", "swin_v2")
    return name.replace("head.", "head.fc.") if plain else name


def values(
    reader: Reader, origins: dict[str, tuple[str, torch.Size]], part: dict[str, Tensor], key: str
) -> Iterator[Tensor]:
    """The tensors of one file, one after the other."""
    buffers = dict(reader.buffers())
    for name, form in part.items():
        origin = origins[name][0]
        if origin in buffers:
            value = buffers[origin]
        else:
            value = reader.full(origin, key if key in reader.keys(origin) else "fp32")  # frozen ones have no average
        rounded = value.to(form.dtype)
        if form.dtype == torch.float16 and not rounded.isfinite().all():
            raise UserError(f"{origin} reaches {value.abs().max().item():g}, which float16 cannot hold; take bfloat16")
        yield rounded


def shards(layout: dict[str, Tensor], most_bytes: int) -> list[dict[str, Tensor]]:
    """A layout in parts of at most most_bytes, or of one tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, form in layout.items():
        if parts[-1] and size + size_of(form) > most_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = form
        size += size_of(form)
    return parts


def size_of(form: Tensor) -> int:
    """Its bytes."""
    return form.numel() * form.element_size()


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the target's place when all went well, and else is gone again."""
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield new
        sync(new)
        if target.is_dir() and not target.is_symlink():
            os.replace(target, old)  # a directory cannot be replaced in one go
        try:
            os.replace(new, target)
        except OSError:
            if old.is_dir():
                os.replace(old, target)
            raise
        sync(target.parent)  # the rename itself lives in the directory
    except OSError as error:
        raise UserError(f"{target}: could not be written ({error}). Check permissions and free space there.") from error
    finally:
        for leftover in (new, old):
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
