"""The index on disk, apart from the shards, in a folder of its own:

    index.json      {"version", "fingerprint", "shards": [{"name", "samples", "bytes", "mtime_ns", "layout", "sidecar"},
                    ...]}, one shard per line; where it lies elsewhere also "version", where something was left out
                    "left_out" (samples) and "damaged" (the rest of the shard)
    NAME.npz        for each shard: the arrays of tar.Layout, "stamp" (version, bytes, mtime_ns), and "left_out" (JSON
                    in bytes) where something was left out; no pickles
    left-out.jsonl  {"shard", "key", "reason"} of all that was left out; without key it is about the rest of the shard

Names are relative to the folder that holds all shards, in natural order ("2" before "10"), and "layout" is a hash of
the arrays. The fingerprint, a hash over names, samples, bytes and layouts, identifies the data and so the order of a
run. A shard that lies elsewhere has a version (sources.py) and no time of change. Nothing read from here is trusted:
names stay inside the folder, arrays fit each other and the shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from fdscale import UserError
from fdscale.data.files import natural
from fdscale.data.tar import Layout, Problem
from fdscale.durable import write_atomically

VERSION = 1
MOST_SIDECAR_BYTES = 4 * 2**30  # uncompressed: more than a shard of tar.MOST_MEMBERS takes

UNREADABLE = -1  # in place of the mtime_ns of a shard that could not be read: the next call tries again
NO_SAMPLES = Layout(*(np.empty(0, kind) for kind in ("S1", "u4", "S1", "u4", "u8", "u8")))._replace(
    starts=np.zeros(1, np.uint32)
)

Stamp = tuple[int, int, int]  # version, bytes and mtime_ns of the shard


class Entry(NamedTuple):
    """What index.json says of one shard. left_out: samples left out; damaged: so is the rest of the shard."""

    name: str
    samples: int
    bytes: int
    mtime_ns: int
    layout: str
    sidecar: str
    version: str = ""
    left_out: int = 0
    damaged: bool = False


def fingerprint(entries: list[Entry]) -> str:
    """A hash (64 hex digits) of what decides which bytes sample number n is, given a seed."""
    listed = sorted((entry.name, entry.samples, entry.bytes, entry.layout) for entry in entries)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def layout_hash(layout: Layout) -> str:
    """A hash (64 hex digits) of the arrays of a layout."""
    digest = hashlib.sha256()
    for array in layout:
        digest.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def write_entries(index_dir: str, entries: list[Entry]) -> None:
    """Write index.json, and left-out.jsonl or none. Entries are sorted in place, in natural order of their names."""
    entries.sort(key=lambda entry: natural(entry.name))
    _write_left_out(index_dir, entries)
    write_atomically(os.path.join(index_dir, "index.json"), _lines(entries))


def _lines(entries: list[Entry]) -> Iterator[bytes]:
    yield f'{{"version": {VERSION}, "fingerprint": "{fingerprint(entries)}", "shards": ['.encode()
    defaults = Entry._field_defaults
    for i, entry in enumerate(entries):
        about = {key: value for key, value in entry._asdict().items() if key not in defaults or value != defaults[key]}
        yield (",\n" if i else "\n").encode() + json.dumps(about).encode()
    yield b"\n]}\n"


def _write_left_out(index_dir: str, entries: list[Entry]) -> None:
    path = os.path.join(index_dir, "left-out.jsonl")
    spoilt = [entry for entry in entries if entry.left_out or entry.damaged]
    if spoilt:
        problems = (problem for entry in spoilt for problem in load_left_out(index_dir, entry))
        write_atomically(path, (line_of(problem) for problem in problems))
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)


def line_of(problem: Problem) -> bytes:
    """A line of left-out.jsonl."""
    return json.dumps({"shard": problem.shard, "key": problem.key, "reason": problem.reason}).encode() + b"\n"


def load_entries(path: str) -> list[Entry]:
    """What an index.json lists. Raises UserError if there is none, or not one of ours."""
    try:
        with open(path, encoding="utf-8") as file:
            # Each shard's object becomes an Entry at once: at 200 000 shards that halves the memory.
            content: Any = json.load(file, object_hook=lambda one: Entry(**one) if "layout" in one else one)
        if content["version"] != VERSION:
            raise UserError(f"{path}: has version {content['version']}, this fdscale reads {VERSION}; index anew")
        entries = content["shards"]
        if not all(isinstance(entry, Entry) and _sound(entry) for entry in entries):
            raise ValueError("a shard's entry has the wrong types")
        if content["fingerprint"] != fingerprint(entries):
            raise UserError(f"{path}: was changed (its fingerprint does not fit); run fdscale shards index again")
    except FileNotFoundError:
        raise UserError(f"{path}: no index there; run fdscale shards index, or name it (--index, data.index)") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as an index ({error}); run fdscale shards index again") from None
    for entry in entries:
        if any(os.path.isabs(name) or ".." in name.split("/") for name in (entry.name, entry.sidecar)):
            raise UserError(f"{path}: names a file outside its folder ({entry.name}); do not use this index")
    return entries


def _sound(entry: Entry) -> bool:
    texts, numbers = (
        (entry.name, entry.layout, entry.sidecar, entry.version),
        (entry.samples, entry.bytes, entry.left_out),
    )
    return all(isinstance(text, str) for text in texts) and all(type(n) is int and n >= 0 for n in numbers)


def save_sidecar(path: str, layout: Layout, stamp: Stamp, left_out: list[Problem]) -> None:
    """Write what was found out about a shard."""
    arrays: dict[str, np.ndarray] = {"stamp": np.array(stamp, np.int64), **layout._asdict()}
    if left_out:
        text = json.dumps([[problem.key, problem.reason] for problem in left_out])
        arrays["left_out"] = np.frombuffer(text.encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load_sidecar(path: str, stamp: Stamp | None = None, total: int | None = None) -> Layout | None:
    """The layout in a sidecar; None if there is none, it is damaged, or the shard was in another state than `stamp`.

    total: size of the shard in bytes, which no member may exceed (default: the stamp's).
    """
    arrays = _arrays(path, ("stamp", *Layout._fields))
    if arrays is None or arrays["stamp"].shape != (3,):
        return None
    layout = Layout(**{field: arrays[field] for field in Layout._fields})
    stamped: Stamp = tuple(arrays["stamp"].tolist())  # type: ignore[assignment]
    if stamp is not None and stamped != stamp:
        return None
    return layout if _fits(layout, stamped[1] if total is None else total) else None


def read_layout(index_dir: str, entry: Entry) -> Layout:
    """The layout of a shard as the index has it. Raises UserError if its sidecar is missing or damaged."""
    path = os.path.join(index_dir, entry.sidecar)
    layout = load_sidecar(path, total=entry.bytes)
    if layout is None or layout_hash(layout) != entry.layout:
        raise UserError(f"{path}: missing or damaged; delete it and run fdscale shards index again")
    return layout


def load_left_out(index_dir: str, entry: Entry, missing_ok: bool = False) -> list[Problem]:
    """What was left out of a shard. missing_ok: a sidecar without such a list means nothing, else it is damaged."""
    arrays = _arrays(os.path.join(index_dir, entry.sidecar), ("left_out",))
    if arrays is None and missing_ok:
        return []
    try:
        listed = json.loads(b"" if arrays is None else arrays["left_out"].tobytes())
        return [Problem(entry.name, str(key), str(reason)) for key, reason in listed]
    except (ValueError, TypeError, RecursionError):
        return [Problem(entry.name, "", f"the list in {entry.sidecar} is missing or damaged; index it anew")]


def _arrays(path: str, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MOST_SIDECAR_BYTES:
                return None
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception:  # numpy, zipfile and zlib each raise their own on damage
        return None


def _fits(layout: Layout, total: int) -> bool:
    """Whether the arrays fit each other, and the members the shard."""
    keys, starts, extensions, kinds, offsets, sizes = layout
    if any(array.ndim != 1 for array in layout) or [array.dtype for array in (starts, kinds, offsets, sizes)] != [
        np.dtype(kind) for kind in ("uint32", "uint32", "uint64", "uint64")
    ]:
        return False
    members = len(kinds)
    return bool(
        keys.dtype.kind == extensions.dtype.kind == "S"
        and len(starts) == len(keys) + 1
        and len(offsets) == len(sizes) == members
        and starts[0] == 0
        and starts[-1] == members
        and (starts[1:] >= starts[:-1]).all()
        and (kinds < len(extensions)).all()
        and (sizes <= total).all()
        and (offsets <= total - np.minimum(sizes, total)).all()
    )
