"""Reading ranges of flattened parameters out of the files of a checkpoint, whatever ranks wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fdscale import UserError
from fdscale.engine import contents
from fdscale.engine import state as local
from fdscale.engine.contents import Damaged
from fdscale.engine.tensor_file import TensorFile


class Reader:
    """The files of a checkpoint, open.

    What it opens has all that state.json names, every element once, and nothing else. Raises Damaged otherwise.
    """

    def __init__(self, checkpoint: Path):
        self.state = contents.read_state(checkpoint)
        names = sorted(entry["name"] for entry in contents.read_manifest(checkpoint)["files"])
        paths = [contents.regular_file(checkpoint, name) for name in names if name != "state.json"]
        self._files = [TensorFile(path) for path in paths]
        self._where: dict[str, list[tuple[int, int, TensorFile]]] = {name: [] for name in self.state["parameters"]}
        self._buffers: dict[str, TensorFile] = {}
        for file in self._files:
            self._place(file)
        for name, parts in self._where.items():
            end = 0
            for start, length, file in sorted(parts, key=lambda part: part[:2]):
                if start != end:
                    raise Damaged(f"{file.path.name} holds {name} from {start} on, where {end} was to follow")
                end += length
            if end != self._elements(name):
                raise Damaged(f"the files hold {end} of {self._elements(name)} elements of {name}")
        if missing := sorted(set(self.state["buffers"]) - self._buffers.keys()):
            raise Damaged(f"the files hold no buffer {missing[0]}")

    def _place(self, file: TensorFile) -> None:
        """Note what a file holds, and that it holds nothing else."""
        unknown = set(file.entries)
        for name, (start, length) in _ranges(file).items():
            if name not in self._where or start + length > self._elements(name):
                raise Damaged(f"{file.path.name} holds {name}, which state.json does not have so")
            for key in self.keys(name):
                entry = file.entries.get(f"{key}/{name}")
                if entry is None or (entry.dtype, entry.elements) != (torch.float32, length):
                    raise Damaged(f"{file.path.name} holds no {key} of {name} as it should")
                unknown.discard(f"{key}/{name}")
            self._where[name].append((start, length, file))
        for name in self.state["buffers"]:
            if f"buffer/{name}" in unknown and name not in self._buffers:
                self._buffers[name] = file
                unknown.discard(f"buffer/{name}")
        if unknown:
            raise Damaged(f"{file.path.name} holds {min(unknown)}, which state.json does not have")

    def _elements(self, name: str) -> int:
        return math.prod(self.state["parameters"][name])

    def keys(self, name: str) -> tuple[str, ...]:
        """The vectors that there are of a parameter."""
        return local.FROZEN_KEYS if name in self.state["frozen"] else tuple(self.state["keys"])

    def fetch(self, part: local.Range, key: str) -> Tensor:
        """The elements of one range as a flat float32 CPU tensor.

        Raises UserError where the checkpoint does not have them.
        """
        out = torch.empty(part.length)
        missing = part.length
        for start, length, file in self._where[part.name] if key in self.keys(part.name) else ():
            begin, end = max(start, part.start), min(start + length, part.start + part.length)
            if begin < end:
                piece = file.read(f"{key}/{part.name}", begin - start, end - begin)
                out[begin - part.start : end - part.start] = piece
                missing -= end - begin
        if missing:
            raise UserError(f"the checkpoint holds no {key} for {missing} of {part.length} elements of {part.name}")
        return out

    def full(self, name: str, key: str = "fp32") -> Tensor:
        """A whole parameter."""
        shape = tuple(self.state["parameters"][name])
        return self.fetch(local.Range(name, shape, 0, self._elements(name)), key).view(shape)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """All persistent buffers."""
        for name, file in self._buffers.items():
            entry = file.entries[f"buffer/{name}"]
            yield name, file.read(f"buffer/{name}").view(entry.shape)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _ranges(file: TensorFile) -> dict[str, list[int]]:
    """Parameter -> start and length of what a file holds of it."""
    try:
        ranges = contents.parse(file.metadata.get("ranges", "").encode())
        if type(ranges) is dict and all(contents.is_shape(part) and len(part) == 2 for part in ranges.values()):
            return ranges
    except (ValueError, RecursionError):
        pass
    raise Damaged(f"{file.path.name} does not say which ranges it holds")
