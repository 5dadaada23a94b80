"""Safetensors files piece by piece: memory holds one piece, and the hash is taken on the way to the disk.

Reading looks at the header with suspicion, and maps no file into memory: a mapped file that is cut short kills the
process, and its pages count as memory that is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale.engine.contents import Damaged, is_count, is_name, is_shape, parse

PIECE_BYTES = 4 << 20  # hashed and written at a time: it is still in the cache for the second of them
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # as the format names them (safetensors, README, "Format")
MOST_HEADER_BYTES = 1 << 25
OPEN_FILES = 64  # of many ranks' at a time


def write(
    path: Path, layout: Mapping[str, Tensor], values: Iterable[Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write and sync a safetensors file; returns its entry in a manifest: name, bytes, sha256.

    layout: name -> tensor of the shape and dtype, of which nothing else is looked at (so it may be on the meta device),
    in the order of the file; values: the CPU tensors in that order, each needed only until the next is asked for.
    """
    hashed = hashlib.sha256()
    with path.open("wb", buffering=1 << 20) as file:

        def put(piece: Any) -> None:
            hashed.update(piece)
            file.write(piece)

        put(_header(layout, metadata))
        for (name, form), value in zip(layout.items(), values, strict=True):
            assert (value.shape, value.dtype) == (form.shape, form.dtype), name
            content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(content), PIECE_BYTES):
                put(content[start : start + PIECE_BYTES])
        file.flush()
        os.fsync(file.fileno())
        return {"name": path.name, "bytes": file.tell(), "sha256": hashed.hexdigest()}


def _header(layout: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Its length in 8 bytes, then JSON that says where each tensor lies in what follows."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, form in layout.items():
        start, end = end, end + form.numel() * form.element_size()
        entries[name] = {"dtype": DTYPES[form.dtype], "shape": list(form.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the library's own do
    return len(text).to_bytes(8, "little") + text


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class Entry(NamedTuple):
    """A tensor in a file: begin is its place behind the start of the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file, whose header is sound and describes the whole of it. Raises Damaged."""

    _open: dict[TensorFile, Any] = {}  # noqa: RUF012 - files at hand, of all instances, oldest first

    def __init__(self, path: Path):
        self.path = path
        try:
            self.metadata, self.entries = _parse(self._bytes(0, 8), path, self._bytes)
        except (OSError, ValueError, RecursionError) as error:
            raise Damaged(f"{path.name} is no whole safetensors file ({' '.join(str(error).split())[:200]})") from None

    def read(self, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements start .. start + length of a flattened tensor, by default all of them: a flat CPU tensor."""
        dtype, _, begin = entry = self.entries[name]
        length = entry.elements - start if length is None else length
        assert 0 <= start <= start + length <= entry.elements, name
        out = torch.empty(length, dtype=dtype)
        try:
            self._fill(memoryview(out.view(torch.uint8).numpy().data), begin + start * dtype.itemsize)
        except (OSError, ValueError) as error:
            raise Damaged(f"{name} in {self.path.name} cannot be read ({error})") from None
        return out

    def close(self) -> None:
        """Close it until the next read."""
        if (file := self._open.pop(self, None)) is not None:
            file.close()

    def _bytes(self, begin: int, length: int) -> bytearray:
        out = bytearray(length)
        self._fill(memoryview(out), begin)
        return out

    def _fill(self, out: memoryview, begin: int) -> None:
        if self not in self._open:
            while len(self._open) >= OPEN_FILES:
                next(iter(self._open)).close()
            self._open[self] = self.path.open("rb", buffering=0)
        descriptor = self._open[self].fileno()
        while out:
            got = os.preadv(descriptor, [out], begin)
            if not got:
                raise ValueError("it is cut short")
            out, begin = out[got:], begin + got


def _parse(length: bytearray, path: Path, read: Any) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries from the header. Raises ValueError for what cannot be."""
    size, header = path.stat().st_size, int.from_bytes(length, "little")
    if header > min(MOST_HEADER_BYTES, size - 8):
        raise ValueError(f"its header would have {header} bytes")
    content = parse(bytes(read(8, header)))
    if type(content) is not dict:
        raise ValueError("its header is no JSON object")
    metadata = content.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    entries = {name: _entry(name, told, 8 + header) for name, told in content.items()}
    end = 8 + header
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.elements)):
        if entry.begin != end:
            raise ValueError("its tensors overlap, or leave a gap")
        end += entry.elements * entry.dtype.itemsize
    if end != size:
        raise ValueError(f"it has {size} bytes, and its header describes {end}")
    return metadata, entries


def _entry(name: str, told: Any, data: int) -> Entry:
    """An entry; data: where the tensors begin."""
    dtypes = {text: dtype for dtype, text in DTYPES.items()}
    if not is_name(name) or type(told) is not dict or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header has an entry that makes no sense")
    shape, offsets = told["shape"], told["data_offsets"]
    if type(told["dtype"]) is not str or told["dtype"] not in dtypes:
        raise ValueError(f"{name} has an unknown type")
    dtype = dtypes[told["dtype"]]
    placed = type(offsets) is list and len(offsets) == 2 and all(map(is_count, offsets))
    if not is_shape(shape) or not placed or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has a shape that is not that of its bytes")
    return Entry(dtype, tuple(shape), data + offsets[0])
