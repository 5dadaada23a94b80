"""Writing a cache of teacher features (see features.py) by any number of writers, each its own files.

A file appears under its name when it is whole and synced, then a small JSON file with its size and hash says so; when
all are there, whoever wrote the last one puts these into the manifest. Nothing that is killed at any moment leaves
more than temporary files, which the next start removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdscale import UserError
from fdscale.data.features import (
    FORMAT,
    HEAD,
    Plan,
    differences,
    is_whole,
    name_of,
    read_json,
    read_manifest,
    read_plan,
    written,
)
from fdscale.durable import sync, write_atomically


def begin(folder: str, wanted: Plan) -> Plan:
    """Make the folder of a cache, or go on in it; returns the plan to follow, whose files may have another size.

    What dead writers left behind is removed. Raises UserError if the folder holds something else.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        names = os.listdir(folder)
        if "cache.json" not in names:
            if strangers := [name for name in names if not name.startswith(".")]:
                raise UserError(
                    f"{folder} is not empty ({strangers[0]}) and holds no feature cache; name another --out"
                )
            about = {"format": FORMAT, **dataclasses.asdict(wanted)}
            write_atomically(os.path.join(folder, "cache.json"), json.dumps(about, indent=1).encode())
            return wanted
        cached = read_plan(folder)
        different = differences(cached, wanted)
        different += [
            f"{what} is {there} there and {here} here"
            for what, there, here in (
                ("the span in samples (cache.epochs)", cached.span, wanted.span),
                ("memory.micro_batch", cached.micro_batch, wanted.micro_batch),
            )
            if there != here
        ]
        if different:
            raise UserError(f"{folder} holds the features of another run: {'; '.join(different)}; name another --out")
        for name in names:
            if name.startswith(".features-") or name.endswith(".tmp"):
                _remove_unless_held(os.path.join(folder, name))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the feature cache there ({error.strerror}); name another --out"
        ) from None
    return cached


def pack(plan: Plan, numbers: Tensor, views: Tensor, values: Tensor, scale: Tensor | None) -> np.ndarray:
    """Records (m, record_bytes) uint8 of the samples `numbers` (m,).

    views: (m, 3, S, S) uint8, on the CPU. values, scale: what `encode` made of the teacher's tokens.
    """
    records = np.empty((len(numbers), plan.record_bytes), np.uint8)
    head = np.zeros(len(numbers), HEAD)
    head["number"] = numbers.numpy()
    head["view"] = [zlib.crc32(view.data) for view in views.contiguous().numpy()]
    records[:, : HEAD.itemsize] = head.view(np.uint8).reshape(-1, HEAD.itemsize)
    if scale is not None:
        scales = scale.cpu().contiguous().numpy().astype("<f4", copy=False)
        records[:, HEAD.itemsize : HEAD.itemsize + plan.scale_bytes] = scales.view(np.uint8)
    raw = values.cpu().contiguous().view(torch.uint8).numpy()  # little-endian, as all machines that run torch are
    records[:, HEAD.itemsize + plan.scale_bytes :] = raw.reshape(len(raw), -1)
    checks = np.array([zlib.crc32(record[4:].data) for record in records], "<u4")
    records[:, :4] = checks.view(np.uint8).reshape(-1, 4)
    return records


def write_file(folder: str, plan: Plan, file: int, records: Iterable[np.ndarray]) -> None:
    """Write one file from the records of its numbers, in order; it is there whole, or not at all."""
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name_of(file)}-")
        try:
            with os.fdopen(handle, "wb") as out:
                with contextlib.suppress(OSError):  # a file system without locks: then nobody sweeps either
                    fcntl.flock(out, fcntl.LOCK_EX)
                digest, size = hashlib.sha256(), 0
                for part in chain([memoryview(plan.header(file))], _in_order(plan, file, records)):
                    out.write(part)
                    digest.update(part)
                    size += len(part)
                out.flush()
                os.fsync(out.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, os.path.join(folder, f"{name_of(file)}.bin"))
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        sync(folder)
        _write_entry(folder, file, {"bytes": size, "sha256": digest.hexdigest()})
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write {name_of(file)}.bin ({error.strerror}); what is written stays: the same command "
            "goes on with it once that is put right"
        ) from None


def _in_order(plan: Plan, file: int, records: Iterable[np.ndarray]) -> Iterator[memoryview]:
    number = plan.numbers(file).start
    for part in records:
        found = part[:, : HEAD.itemsize].copy().view(HEAD)["number"].reshape(-1)
        assert found.tolist() == list(range(number, number + len(part))), "records out of order"
        number += len(part)
        yield part.reshape(-1).data
    assert number == plan.numbers(file).stop, f"{name_of(file)} ends before number {number}"


def _write_entry(folder: str, file: int, entry: dict[str, Any]) -> None:
    write_atomically(os.path.join(folder, f"{name_of(file)}.json"), json.dumps(entry).encode())


def finish(folder: str, plan: Plan) -> bool:
    """Write the manifest if all files are written; whether this cache is whole now. Any number of writers may try."""
    try:
        if len(written(folder, plan)) < plan.files:
            return is_whole(folder)  # or another writer was first, and has cleared up in between
        entries = [read_json(os.path.join(folder, f"{name_of(file)}.json")) for file in range(plan.files)]
    except UserError:
        if is_whole(folder):
            return True
        raise
    manifest = {"format": FORMAT, "cache": plan.digest(), "files": entries}
    write_atomically(os.path.join(folder, "manifest.json"), json.dumps(manifest).encode())
    sync(folder)
    for file in range(plan.files):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, f"{name_of(file)}.json"))
    return True


def reopen(folder: str, plan: Plan) -> None:
    """Take a whole cache apart into its files again, so that single ones can be checked and written anew."""
    if is_whole(folder):
        for file, entry in enumerate(read_manifest(folder, plan)):
            _write_entry(folder, file, entry)
        os.unlink(os.path.join(folder, "manifest.json"))


def problem_with(folder: str, plan: Plan, file: int) -> str | None:
    """What is wrong with a written file, reading all of it; None: it is as it was written."""
    path = os.path.join(folder, f"{name_of(file)}.bin")
    try:
        entry = read_json(os.path.join(folder, f"{name_of(file)}.json"))
        size = os.path.getsize(path)
        if size != plan.file_bytes(file):
            return f"it has {size} bytes, expected {plan.file_bytes(file)}"
        with open(path, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != entry.get("sha256"):
                return "its content does not match its hash"
    except (OSError, UserError) as error:
        return f"it cannot be read ({error})"
    return None


def discard(folder: str, file: int) -> None:
    """Remove a file and the mark that it is written."""
    for ending in (".json", ".bin"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name_of(file) + ending))


def _remove_unless_held(path: str) -> None:
    """Remove a temporary file whose writer is dead; a living one holds a lock."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
