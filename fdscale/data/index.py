"""The index of a set: which shards it has, how many samples each holds, and where their bytes lie.

On disk, apart from the shards, in a folder of its own:

    index.json    {"version", "fingerprint",
                   "shards": [{"name", "samples", "bytes", "mtime_ns", "layout", "sidecar", "version"}, ...]}
    NAME.npz      for each shard: the arrays of tar.Layout, and "stamp" (version, bytes, mtime_ns); no pickles

Names are relative to the folder that holds all shards, in natural order ("2" before "10"), and "layout" is a hash of
the arrays. The fingerprint, a hash over names, samples, bytes and layouts, identifies the data and so the order of a
run. A shard that lies elsewhere has a "version" (sources.py) and no time of change.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from fdscale import UserError
from fdscale.data.files import (
    Shards,
    common_folder,
    expand,
    index_folder,
    means,
    name_of,
    natural,
    parts_of,
    patterns_of,
    prepare_folder,
    write_atomically,
)
from fdscale.data.lost import Lost
from fdscale.data.parallel import parallel
from fdscale.data.recent import Recent
from fdscale.data.remote import scan_remote, stamp_of
from fdscale.data.shard_cache import ShardCache
from fdscale.data.sources import State, Stop, is_remote, shown, where
from fdscale.data.tar import BLOCK, IMAGE_EXTENSIONS, Layout, Problem, header_size, scan

VERSION = 1
OPEN_FILES = 256  # per process; the usual limit is 1024
COLUMN_BYTES = 128 * 2**20  # per process; a shard of 10 000 samples takes about 0.4 MB
MOST_NAMED = 20  # problems spelled out in one error

Progress = Callable[[int, int], None]


class Entry(NamedTuple):
    """What index.json says of one shard."""

    name: str
    samples: int
    bytes: int
    mtime_ns: int
    layout: str
    sidecar: str
    version: str = ""


class Index:
    """An opened index, and reading through it. Made by `open_index`.

    names: of the shards used, relative to the folder `root`, in the order of the index. counts: samples in each.
    fingerprint: of these shards. remote: whether they lie elsewhere and are read through `cache`. Files are read with
    pread only, so a copy made by fork reads on safely, and a pickled copy opens its own.
    """

    def __init__(
        self, root: str, index_dir: str, chosen: list[tuple[str, Entry]], cache: ShardCache | None = None
    ) -> None:
        entries = [entry for _, entry in chosen]
        self.root, self.index_dir = root, index_dir
        self.cache = cache or ShardCache()
        self.remote = any(is_remote(path) for path, _ in chosen)
        self.names = [entry.name for entry in entries]
        self.counts = np.array([entry.samples for entry in entries], np.int64)  # (shards,)
        self.fingerprint = fingerprint(entries)
        self._entries = entries
        self._paths = [path for path, _ in chosen]
        self._files = Recent(limit=OPEN_FILES, drop=os.close)
        self._columns = Recent(limit=COLUMN_BYTES, weigh=_bytes_of)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return int(self.counts.sum())

    def key(self, shard: int, row: int) -> str:
        """The key of a sample."""
        return self._columns.get((shard, IMAGE_EXTENSIONS), self._load_column)[0][row].decode()

    def read(self, shard: int, row: int, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> bytes:
        """The bytes of a sample's member with the first of these extensions that it has (default: its image).

        Raises Lost if its place in the shard is cut off or damaged, UserError if the shard is gone, is another one, or
        cannot be fetched.
        """
        _, offsets, sizes = self._columns.get((shard, extensions), self._load_column)
        offset, size = int(offsets[row]), int(sizes[row])
        if offset == 0:
            raise Lost(f"has no .{' or .'.join(extensions)}")
        file, data = self._member(shard, row, offset, size)
        while not _fits(data, size) and self._renew(shard, file):
            file, data = self._member(shard, row, offset, size)
        if _fits(data, size):
            return data[BLOCK:]
        if not any(self._is_there(file, shard, one, extensions) for one in (0, len(offsets) // 2, len(offsets) - 1)):
            raise self._changed(
                shard, f"sample '{self.key(shard, row)}' is not at byte {offset}, nor are others in place"
            )
        cut = len(data) < BLOCK + size
        raise Lost(f"the shard is {'cut off before byte' if cut else 'damaged at byte'} {offset + size * cut}")

    def _member(self, shard: int, row: int, offset: int, size: int) -> tuple[int, bytes]:
        """(the open shard, what it holds where a member and its header should be)."""
        file = self._files.get(shard, self._open)
        try:
            return file, _pread(file, BLOCK + size, offset - BLOCK)
        except OSError as error:
            what = f"sample '{self.key(shard, row)}' at byte {offset}"
            raise UserError(
                f"{self.path(shard)}: {what} cannot be read ({error.strerror}); see to the storage"
            ) from None

    def _is_there(self, file: int, shard: int, row: int, extensions: tuple[str, ...]) -> bool:
        """Whether the member lies where the index says: the shard is the one that was indexed, at least in part."""
        _, offsets, sizes = self._columns.get((shard, extensions), self._load_column)
        return bool(offsets[row]) and _fits(_pread(file, BLOCK, int(offsets[row]) - BLOCK), int(sizes[row]), body=False)

    def _renew(self, shard: int, file: int) -> bool:
        """Whether a shard that reads wrong may be whole where it comes from: then the next read opens another copy."""
        if not is_remote(self._paths[shard]) or not self.cache.renew(self._paths[shard], self._state(shard), file):
            return False
        self._files.drop_if(lambda key, _: key == shard)
        return True

    def path(self, shard: int) -> str:
        """Where a shard lies, for messages."""
        return shown(self._paths[shard])

    def remote_bytes(self, shard: int) -> int:
        """The size of a shard, in bytes; 0 if it is on this machine."""
        return self._entries[shard].bytes if is_remote(self._paths[shard]) else 0

    def fetch(self, shard: int, stop: Stop) -> None:
        """Have a remote shard in the cache, and count it as just used. Raises what ShardCache.open does."""
        os.close(self.cache.open(self._paths[shard], self._state(shard), stop)[0])

    def _state(self, shard: int) -> State:
        return State(self._entries[shard].bytes, self._entries[shard].version)

    def _open(self, shard: int) -> int:
        if is_remote(self._paths[shard]):
            # Shards that had to go from the cache take room on the disk for as long as they are open.
            self._files.drop_if(lambda _, file: os.fstat(file).st_nlink == 0)
            return self.cache.open(self._paths[shard], self._state(shard))[0]
        try:
            file = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{self.path(shard)}: in the index, but cannot be opened ({error.strerror})") from None
        size, expected = os.fstat(file).st_size, self._entries[shard].bytes
        if size > expected:
            os.close(file)
            raise self._changed(shard, f"it has {size} bytes, the index says {expected}")
        return file  # of a shorter one, read() names the samples that are cut off

    def _changed(self, shard: int, how: str) -> UserError:
        return UserError(
            f"{self.path(shard)}: truncated or changed since it was indexed: {how}. "
            "Restore the shard, or index it anew (fdscale shards index) and start a new run"
        )

    def _load_column(self, key: tuple[int, tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(keys (n,) bytes, offsets (n,) uint64, sizes (n,) uint64); offset 0 where a sample has no such member."""
        shard, extensions = key
        layout = self._layout(shard)
        offsets, sizes = np.zeros((2, len(layout.keys)), np.uint64)
        owner = np.repeat(np.arange(len(layout.keys)), layout.starts[1:] - layout.starts[:-1])
        names = layout.extensions.tolist()
        for extension in reversed(extensions):  # the first wins
            if extension.encode() in names:
                mine = layout.kinds == names.index(extension.encode())
                offsets[owner[mine]], sizes[owner[mine]] = layout.offsets[mine], layout.sizes[mine]
        return layout.keys, offsets, sizes

    def _layout(self, shard: int) -> Layout:
        entry = self._entries[shard]
        path = os.path.join(self.index_dir, entry.sidecar)
        layout = load_sidecar(path)
        if layout is None or layout_hash(layout) != entry.layout:
            raise UserError(f"{path}: missing or damaged; delete it and run fdscale shards index again")
        return layout


def index(
    shards: Shards,
    index_dir: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    cache: ShardCache | None = None,
) -> Index:
    """Index shards from their headers; those unchanged since an earlier call (size and mtime) are not read again.

    shards: see `expand`. index_dir: where the index goes, by default the folder "index" beside the shards. An index
    may be filled by several calls, as for train-*.tar and val-*.tar in one folder. progress: called with (shards
    done, shards). cache: for shards that lie elsewhere; a run with the same cache finds there what still is.
    Raises UserError listing what is wrong in which shard; the index then stays as it was, what was read is kept for
    the next call.
    """
    paths = expand(shards)
    root = common_folder(paths)
    index_dir = index_folder(index_dir, root)
    prepare_folder(index_dir, "--index")
    entries: list[Entry] = []
    problems: list[Problem] = []
    jobs = [(path, name_of(path, root), index_dir, cache or ShardCache()) for path in paths]
    for done, (entry, found) in enumerate(parallel(_index_shard, jobs, workers), 1):
        problems += found
        entries += [entry] if entry else []
        if progress:
            progress(done, len(jobs))
    if problems:
        raise UserError(_listed(problems, len(paths)))
    if not any(entry.samples for entry in entries):
        raise UserError(f"the {len(paths)} shards in {root} hold no samples at all; check which files were given")
    everything = entries + _others(index_dir, root, {entry.name for entry in entries})
    everything.sort(key=lambda entry: natural(entry.name))
    content = {"version": VERSION, "fingerprint": fingerprint(everything), "shards": [e._asdict() for e in everything]}
    write_atomically(os.path.join(index_dir, "index.json"), json.dumps(content, indent=1).encode())
    return open_index(shards, index_dir, cache)


def open_index(shards: Shards, index_dir: str | None = None, cache: ShardCache | None = None) -> Index:
    """The index of these shards, all or some of those it lists; nothing but index.json is read yet.

    cache: for shards that lie elsewhere. Raises UserError if there is no index, or it does not list one of the shards.
    """
    index_dir, root, chosen, unknown, gone = match(shards, index_dir)
    if unknown:
        raise UserError(f"{unknown[0]}: not in the index {index_dir}; run fdscale shards index to add it")
    if gone:
        raise UserError(f"{gone[0]}: in the index {index_dir}, but gone; restore it, or run fdscale shards index again")
    return Index(root, index_dir, chosen, cache)


def match(
    shards: Shards, index_dir: str | None = None
) -> tuple[str, str, list[tuple[str, Entry]], list[str], list[str]]:
    """(index_dir, root, [(path, entry)] in the index's order, paths not in the index, paths in the index but gone).

    Gone are those of the index that a folder or glob in `shards` means but no longer finds.
    """
    paths = expand(shards)
    index_dir = index_folder(index_dir, common_folder(paths))
    entries = {entry.name: entry for entry in _load_entries(os.path.join(index_dir, "index.json"))}
    named = [(path, _name_in(entries, path)) for path in paths]
    unknown = [path for path, name in named if name is None]
    chosen = [(path, entries[name]) for path, name in named if name is not None]
    chosen.sort(key=lambda pair: natural(pair[1].name))
    roots = sorted({where(path)[: -len(entry.name)] for path, entry in chosen})
    if len(roots) > 1:
        raise UserError(f"{index_dir}: the shards lie below several folders ({', '.join(roots)}); use one index each")
    if not chosen:
        raise UserError(f"{index_dir}: lists none of the {len(paths)} shards given; name the right place (--index DIR)")
    listed = [pattern for part in parts_of(shards) for pattern in patterns_of(part)]
    others = [roots[0] + name for name in sorted(set(entries) - {entry.name for _, entry in chosen}, key=natural)]
    gone = [path for path in others if any(means(one, path) for one in listed)]
    return index_dir, roots[0], chosen, unknown, gone


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


def scan_file(path: str, name: str) -> tuple[tuple[Layout, os.stat_result] | None, list[Problem]]:
    """((layout, stat) of a shard, what is wrong with it); None for the first if the file or the tar is damaged."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return None, [Problem(name, "", f"cannot be opened ({error.strerror})")]
    try:
        stat = os.fstat(file)
        layout, problems = scan(file, stat.st_size, name)
        return (layout, stat), problems
    except OSError as error:
        return None, [Problem(name, "", f"cannot be read ({error.strerror})")]
    except UserError as error:
        return None, [Problem(name, "", str(error))]
    finally:
        os.close(file)


def _index_shard(job: tuple[str, str, str, ShardCache]) -> tuple[Entry | None, list[Problem]]:
    path, name, index_dir, cache = job
    sidecar = os.path.join(index_dir, name + ".npz")
    if is_remote(path):
        state, layout, problems = scan_remote(path, name, cache, lambda stamp: load_sidecar(sidecar, (VERSION, *stamp)))
        if layout is None or problems:
            return None, problems
        _save_sidecar(sidecar, layout, (VERSION, *stamp_of(state)))
        return Entry(name, len(layout.keys), state.size or 0, 0, layout_hash(layout), name + ".npz", state.version), []
    try:
        stat = os.stat(path)
        layout = load_sidecar(sidecar, (VERSION, stat.st_size, stat.st_mtime_ns))
    except OSError:
        layout = None  # scan_file says what is wrong
    if layout is None:
        scanned, problems = scan_file(path, name)
        if scanned is None or problems:
            return None, problems
        layout, stat = scanned
        _save_sidecar(sidecar, layout, (VERSION, stat.st_size, stat.st_mtime_ns))
    return Entry(name, len(layout.keys), stat.st_size, stat.st_mtime_ns, layout_hash(layout), name + ".npz"), []


def _save_sidecar(path: str, layout: Layout, stamp: tuple[int, int, int]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, stamp=np.array(stamp, np.int64), **layout._asdict())
    write_atomically(path, buffer.getvalue())


def load_sidecar(path: str, stamp: tuple[int, int, int] | None = None) -> Layout | None:
    """The layout in a sidecar; None if there is none, it is damaged, or the shard was in another state than `stamp`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if stamp is not None and tuple(arrays["stamp"].tolist()) != stamp:
                return None
            return Layout(**{field: arrays[field] for field in Layout._fields})
    except Exception:  # numpy, zipfile and zlib each raise their own on damage
        return None


def _load_entries(path: str) -> list[Entry]:
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = json.load(file)
        if content["version"] != VERSION:
            raise UserError(f"{path}: has version {content['version']}, this fdscale reads {VERSION}; index anew")
        entries = [Entry(**shard) for shard in content["shards"]]
        if content["fingerprint"] != fingerprint(entries):
            raise UserError(f"{path}: was changed (its fingerprint does not fit); run fdscale shards index again")
    except FileNotFoundError:
        raise UserError(f"{path}: no index there; run fdscale shards index, or name its place (--index DIR)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be read as an index ({error}); run fdscale shards index again") from None
    for entry in entries:
        if any(os.path.isabs(name) or ".." in name.split("/") for name in (entry.name, entry.sidecar)):
            raise UserError(f"{path}: names a file outside its folder ({entry.name}); do not use this index")
    return entries


def _others(index_dir: str, root: str, names: set[str]) -> list[Entry]:
    """What an earlier index lists besides these names, as far as it is still there unchanged; elsewhere, all of it."""
    try:
        listed = _load_entries(os.path.join(index_dir, "index.json"))
    except UserError:  # none yet, or one to be replaced
        return []
    if is_remote(root):  # to ask after each would take long, and a shard that has changed is noticed when it is read
        return [entry for entry in listed if entry.name not in names and entry.version]
    kept = []
    for entry in listed:
        with suppress(OSError):
            stat = os.stat(os.path.join(root, entry.name))
            if entry.name not in names and (stat.st_size, stat.st_mtime_ns) == (entry.bytes, entry.mtime_ns):
                kept.append(entry)
    return kept


def _name_in(entries: dict[str, Entry], path: str) -> str | None:
    """The name of a path in the index: its longest tail that the index lists."""
    parts = where(path).split(os.sep)
    tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
    return next((tail for tail in tails if tail in entries), None)


def _listed(problems: list[Problem], shards: int) -> str:
    bad = len({problem.shard for problem in problems})
    lines = [str(problem) for problem in problems[:MOST_NAMED]]
    if len(problems) > MOST_NAMED:
        lines.append(f"and {len(problems) - MOST_NAMED} more")
    return f"{bad} of {shards} shards cannot be used; repair them or leave them out:\n  " + "\n  ".join(lines)


def _fits(data: bytes, size: int, body: bool = True) -> bool:
    """Whether these are the header and (body) the data of a member of `size` bytes.

    A member's header comes right before its data; a pax header may carry the size in its place.
    """
    return len(data) == BLOCK + size * body and header_size(data[:BLOCK]) in (size, 0)


def _pread(file: int, size: int, offset: int) -> bytes:
    data = os.pread(file, size, offset)
    while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    return data


def _bytes_of(arrays: tuple[np.ndarray, ...]) -> int:
    return sum(array.nbytes for array in arrays)
