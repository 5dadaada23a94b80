"""Verifying shards against their index, byte for byte, and finding keys that several shards share."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fdscale import UserError
from fdscale.data import foreign
from fdscale.data.files import Shards
from fdscale.data.index import match
from fdscale.data.index_file import Entry, layout_hash, load_left_out, load_sidecar, read_layout
from fdscale.data.indexing import Progress
from fdscale.data.parallel import parallel
from fdscale.data.shard_cache import ShardCache
from fdscale.data.sources import State, is_remote
from fdscale.data.tar import IMAGE_EXTENSIONS, Layout, Problem, scan

BUCKET = 2**24  # hashes of keys that are sorted at a time: 128 MB
MOST_SHARED = 1000  # keys in several shards that are named
CHUNK = 2**20


def verify(
    shards: Shards,
    index_dir: str | None = None,
    *,
    decode: bool = False,
    unique_keys: bool = False,
    counts: Sequence[str] = (),
    workers: int = 1,
    progress: Progress | None = None,
    cache: ShardCache | None = None,
) -> list[Problem]:
    """Read shards anew, every byte of every sample, and compare them with their index; all that is wrong.

    What the index was made without is listed too, marked `left_out`. decode: decode every image as well. unique_keys:
    no key may stand in two shards. counts: further files with numbers of samples, see foreign.py. progress: called
    with (shards done, shards). cache: for shards that lie elsewhere. Raises UserError if there is no index.
    """
    index_dir, root, chosen, unknown, gone = match(shards, index_dir)
    problems = [Problem(path, "", "is not in the index; run fdscale shards index") for path in unknown]
    problems += [Problem(path, "", "is in the index, but gone") for path in gone]
    claims = foreign.claims_of_set(root, [entry.name for _, entry in chosen], counts)
    jobs = (
        _Job(path, entry, index_dir, decode, claims.get(entry.name, []), cache or ShardCache())
        for path, entry in chosen
    )
    for done, found in enumerate(parallel(_verify_shard, jobs, min(workers, len(chosen))), 1):
        problems += found
        if progress:
            progress(done, len(chosen))
    if unique_keys:
        problems += shared_keys(index_dir, [entry for _, entry in chosen])
    return problems


class _Job(NamedTuple):
    path: str
    entry: Entry
    index_dir: str
    decode: bool
    claims: list[foreign.Claim]
    cache: ShardCache


def _verify_shard(job: _Job) -> list[Problem]:
    entry = job.entry
    try:
        if is_remote(job.path):
            file = job.cache.open(job.path, State(entry.bytes, entry.version))[0]
        else:
            file = os.open(job.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return [Problem(entry.name, "", f"cannot be opened ({error.strerror})")]
    except UserError as error:
        return [Problem(entry.name, "", str(error))]
    try:
        return _verify_file(job, file)
    except OSError as error:
        return [Problem(entry.name, "", f"cannot be read ({error.strerror})")]
    except UserError as error:
        return [Problem(entry.name, "", str(error))]
    finally:
        os.close(file)


def _verify_file(job: _Job, file: int) -> list[Problem]:
    entry, size = job.entry, os.fstat(file).st_size
    known = set(load_left_out(job.index_dir, entry)) if entry.left_out or entry.damaged else set()
    layout, problems = scan(file, size, entry.name)
    problems = [problem._replace(left_out=problem in known) for problem in problems]
    found = len(layout.keys) + sum(bool(problem.key) for problem in problems)
    indexed = load_sidecar(os.path.join(job.index_dir, entry.sidecar), total=entry.bytes)
    if indexed is None or layout_hash(indexed) not in (entry.layout, layout_hash(layout)):
        problems.append(Problem(entry.name, "", f"its index file {entry.sidecar} is missing or damaged; index it anew"))
    damaged = any(not problem.key and not problem.left_out for problem in problems)  # then it is clear what changed
    if not damaged and (size, layout_hash(layout)) != (entry.bytes, entry.layout):
        reason = f"changed since it was indexed ({size} bytes, {entry.bytes} in the index); index it anew"
        problems.append(Problem(entry.name, "", reason))
    beside = None if is_remote(job.path) else job.path
    disagreeing = foreign.disagreements(beside, entry.name, found, job.claims)
    problems += [problem._replace(left_out=entry.damaged) for problem in disagreeing]
    with open(file, "rb", closefd=False) as stream:
        return problems + list(_check_members(stream, layout, entry.name, job.decode))


def _check_members(file: io.BufferedReader, layout: Layout, shard: str, decode: bool) -> Iterator[Problem]:
    if decode:
        from fdscale.data.decode import decode as decode_image  # imports torch, which the rest does not need
    names = [name.decode() for name in layout.extensions.tolist()]
    starts, offsets, sizes = layout.starts.tolist(), layout.offsets.tolist(), layout.sizes.tolist()
    for i, raw_key in enumerate(layout.keys.tolist()):
        key = raw_key.decode()
        for j in range(starts[i], starts[i + 1]):
            name = names[layout.kinds[j]]
            whole = decode and name in IMAGE_EXTENSIONS
            try:
                file.seek(offsets[j])
                read, data = 0, b""
                while read < sizes[j] and (data := file.read(sizes[j] if whole else min(CHUNK, sizes[j] - read))):
                    read += len(data)
                if read < sizes[j]:
                    yield Problem(shard, key, f".{name} is cut short ({read} of {sizes[j]} bytes)")
                elif whole:
                    decode_image(data)
            except OSError as error:
                yield Problem(shard, key, f".{name} cannot be read ({error.strerror})")
            except UserError as error:
                yield Problem(shard, key, str(error))


def shared_keys(index_dir: str, entries: list[Entry]) -> list[Problem]:
    """The keys that several shards of an index hold, each named once.

    Memory is bounded: hashes of the keys (8 bytes each) are spread over files in the system's folder for temporary
    files and sorted one file at a time; only keys whose hashes meet are compared themselves.
    """
    buckets = max(1, -(-sum(entry.samples for entry in entries) // BUCKET))
    with tempfile.TemporaryDirectory(prefix="fdscale-keys-") as folder:
        paths = [os.path.join(folder, str(i)) for i in range(buckets)]
        for entry in entries:
            hashes = _hashes(_keys_of(index_dir, entry))
            for i, path in enumerate(paths):
                with open(path, "ab") as file:
                    file.write(hashes[hashes % np.uint64(buckets) == i].tobytes())
        meeting = [_repeated(np.fromfile(path, np.uint64)) for path in paths]
    suspects = np.concatenate(meeting) if meeting else np.empty(0, np.uint64)
    if not len(suspects):
        return []
    holders: dict[bytes, list[str]] = defaultdict(list)
    for entry in entries:
        keys = _keys_of(index_dir, entry)
        for key in keys[np.isin(_hashes(keys), suspects)].tolist():
            holders[key].append(entry.name)
    shared = [(key, names) for key, names in holders.items() if len(names) > 1]
    problems = [
        Problem(names[1], key.decode(), f"{names[0]} holds a sample of the same key")
        for key, names in shared[:MOST_SHARED]
    ]
    if len(shared) > MOST_SHARED:
        problems.append(Problem("all shards", "", f"{len(shared) - MOST_SHARED} more keys are in several shards"))
    return problems


def _keys_of(index_dir: str, entry: Entry) -> np.ndarray:
    return read_layout(index_dir, entry).keys


def _hashes(keys: np.ndarray) -> np.ndarray:
    """(n,) uint64"""
    return np.array(
        [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") for key in keys.tolist()], np.uint64
    )


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """The values that occur more than once."""
    hashes = np.sort(hashes)
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
