"""Checkpoints made by hand: what any number of ranks would have written, with values that follow from their place."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from helpers import TINY

from fdscale import config
from fdscale.engine import contents, tensor_file
from fdscale.models import backbone

MOMENTS = ("fp32", "exp_avg", "exp_avg_sq")


def value(name: str, key: str, start: int, length: int) -> torch.Tensor:
    """Elements of a parameter's vector, in steps of 1/997."""
    place = torch.arange(start, start + length) + zlib.crc32(f"{key}/{name}".encode()) % 997
    return place.remainder(997).float() / 997


def settings(*more: str) -> config.Config:
    """A tiny recipe."""
    return config.load("demo", [pair for pair in (*TINY, *more) if not pair.startswith("data.shards")])


def student(of: config.Config) -> torch.nn.Module:
    """Its student, on the meta device."""
    with torch.device("meta"):
        return backbone(of.student.model, {"img_size": of.data.image_size, **of.student.args})


def make(
    checkpoint: Path, of: config.Config, world: int = 3, keys: Sequence[str] = MOMENTS, frozen: Sequence[str] = ()
) -> Path:
    """Write one; frozen: parameters that have their weights alone."""
    shapes = {f"backbone.{name}": list(p.shape) for name, p in student(of).named_parameters()}
    shapes |= {"projector.weight": [5, 3], "projector.bias": [5]}
    checkpoint.mkdir(parents=True)
    files = []
    for rank in range(world):
        layout, ranges, wanted = {}, {}, []
        for name, shape in shapes.items():
            count = torch.Size(shape).numel()
            part = -(-count // world)
            start = min(rank * part, count)
            if length := min(part, count - start):
                ranges[name] = [start, length]
                for key in MOMENTS[:1] if name in frozen else keys:
                    layout[f"{key}/{name}"] = torch.empty(length, device="meta")
                    wanted.append((name, key, start, length))
        path = checkpoint / f"rank-{rank:05d}.safetensors"
        files.append(tensor_file.write(path, layout, (value(*w) for w in wanted), {"ranges": json.dumps(ranges)}))
    groups = [{"names": sorted(shapes), "lr": 1e-3, "lr_scale": 1.0, "weight_decay": 0.05}]
    state = {
        "format": contents.FORMAT,
        "step": 7,
        "samples": 56,
        "optimizer_step": 7,
        "identity": {"data.seed": 0},
        "keys": list(keys),
        "parameters": shapes,
        "frozen": sorted(frozen),
        "buffers": [],
        "groups": groups,
        "config": config.as_dict(of),
        "guard": {"losses": [1.0], "skips": 0, "spikes": 0, "skipped": 0},
    }
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").write_text(json.dumps({"format": contents.FORMAT, "files": files, "world": world}))
    seal(checkpoint)
    return checkpoint


def seal(checkpoint: Path) -> None:
    """Bring sizes and hashes in the manifest up to what the files are: what a hostile author does."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    names = {entry["name"] for entry in manifest["files"]} | {"state.json"}
    manifest["files"] = [
        {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in sorted(names)
        for content in [(checkpoint / name).read_bytes()]
    ]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
