"""Safetensors files written piece by piece: memory holds one piece, and the hash is taken on the way to the disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as the library's own do
    return len(text).to_bytes(8, "little") + text
