"""The index of a set: which shards it has, how many samples each holds, and where their bytes lie.

Making an index, opening it, and reading samples through it. Its files are described in index_file.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from typing import NamedTuple

import numpy as np

from fdscale import UserError
from fdscale.data import foreign
from fdscale.data.files import Shards, common_folder, expand, natural, parts_of, patterns_of, prepare_folder
from fdscale.data.index_file import (
    NO_SAMPLES,
    UNREADABLE,
    VERSION,
    Entry,
    Stamp,
    fingerprint,
    layout_hash,
    load_entries,
    load_left_out,
    load_sidecar,
    read_layout,
    save_sidecar,
    write_entries,
)
from fdscale.data.parallel import parallel
from fdscale.data.recent import Recent
from fdscale.data.tar import BLOCK, IMAGE_EXTENSIONS, Layout, Problem, header_size, scan

OPEN_FILES = 256  # per process; the usual limit is 1024
COLUMN_BYTES = 128 * 2**20  # per process; a shard of 10 000 samples takes about 0.4 MB
MOST_NAMED = 20  # problems spelled out in one error
MOST_HELD = 10_000  # problems kept for such an error: a set of billions may be damaged everywhere

Progress = Callable[[int, int], None]


class Index:
    """An opened index, and reading through it. Made by `open_index`.

    names: of the shards used, relative to the folder `root`, in the order of the index. counts: samples in each.
    fingerprint: of these shards. Files are read with pread only, so a copy made by fork reads on safely, and a pickled
    copy opens its own.
    """

    def __init__(self, root: str, index_dir: str, entries: list[Entry]) -> None:
        self.root, self.index_dir = root, index_dir
        self.names = [entry.name for entry in entries]
        self.counts = np.array([entry.samples for entry in entries], np.int64)  # (shards,)
        self.fingerprint = fingerprint(entries)
        self._entries = entries
        self._files = Recent(limit=OPEN_FILES, drop=os.close)
        self._columns = Recent(limit=COLUMN_BYTES, weigh=_bytes_of)

    @property
    def samples(self) -> int:
        """Samples in all shards."""
        return int(self.counts.sum())

    @property
    def entries(self) -> list[Entry]:
        """All that the index says of each shard."""
        return self._entries

    @property
    def left_out(self) -> tuple[int, int]:
        """(samples left out, shards whose damaged rest is left out): none but where the index was told to."""
        return sum(entry.left_out for entry in self._entries), sum(entry.damaged for entry in self._entries)

    def key(self, shard: int, row: int) -> str:
        """The key of a sample."""
        return self._columns.get((shard, IMAGE_EXTENSIONS), self._load_column)[0][row].decode()

    def read(self, shard: int, row: int, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> bytes:
        """The bytes of a sample's member with the first of these extensions that it has (default: its image).

        Raises UserError naming the shard and the sample if the shard is gone or is not what was indexed.
        """
        _, offsets, sizes = self._columns.get((shard, extensions), self._load_column)
        offset, size = int(offsets[row]), int(sizes[row])
        if offset == 0:
            raise UserError(f"{self.names[shard]}: sample '{self.key(shard, row)}' has no .{' or .'.join(extensions)}")
        file = self._files.get(shard, self._open)
        try:
            data = _pread(file, BLOCK + size, offset - BLOCK)
        except OSError as error:
            where = f"sample '{self.key(shard, row)}' at byte {offset}"
            raise UserError(
                f"{self.path(shard)}: {where} cannot be read ({error.strerror}); see to the storage"
            ) from None
        # The member's header comes right before its data; a pax header may carry the size in its place.
        if len(data) < BLOCK + size or header_size(data[:BLOCK]) not in (size, 0):
            raise self._changed(shard, f"sample '{self.key(shard, row)}' is not at byte {offset}")
        return data[BLOCK:]

    def path(self, shard: int) -> str:
        """Where a shard lies."""
        return os.path.join(self.root, self.names[shard])

    def _open(self, shard: int) -> int:
        try:
            file = os.open(self.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{self.path(shard)}: in the index, but cannot be opened ({error.strerror})") from None
        size, expected = os.fstat(file).st_size, self._entries[shard].bytes
        if size != expected:
            os.close(file)
            raise self._changed(shard, f"it has {size} bytes, the index says {expected}")
        return file

    def _changed(self, shard: int, how: str) -> UserError:
        return UserError(
            f"{self.path(shard)}: truncated or changed since it was indexed: {how}. "
            "Restore the shard, or index it anew (fdscale shards index) and start a new run"
        )

    def _load_column(self, key: tuple[int, tuple[str, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(keys (n,) bytes, offsets (n,) uint64, sizes (n,) uint64); offset 0 where a sample has no such member."""
        shard, extensions = key
        layout = read_layout(self.index_dir, self._entries[shard])
        offsets, sizes = np.zeros((2, len(layout.keys)), np.uint64)
        owner = np.repeat(np.arange(len(layout.keys)), layout.starts[1:] - layout.starts[:-1])
        names = layout.extensions.tolist()
        for extension in reversed(extensions):  # the first wins
            if extension.encode() in names:
                mine = layout.kinds == names.index(extension.encode())
                offsets[owner[mine]], sizes[owner[mine]] = layout.offsets[mine], layout.sizes[mine]
        return layout.keys, offsets, sizes


def index(
    shards: Shards,
    index_dir: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    *,
    skip_damaged: bool = False,
    trust_idx: bool = False,
    counts: Sequence[str] = (),
    report: Callable[[Problem], None] | None = None,
) -> Index:
    """Index shards from their headers; those unchanged since an earlier call (size and mtime) are not read again.

    shards: see `expand`. index_dir: where the index goes, by default the folder "index" beside the shards. An index
    may be filled by several calls, as for train-*.tar and val-*.tar in one folder. progress: called with (shards
    done, shards). skip_damaged: index what is whole, list the rest in left-out.jsonl, and call `report` with whatever
    is wrong. trust_idx and counts: what to do with others' indexes, see foreign.py.
    Raises UserError listing what is wrong in which shard, unless skip_damaged; the index then stays as it was, what
    was read is kept for the next call.
    """
    paths = expand(shards)
    root = common_folder(paths)
    index_dir = os.path.abspath(index_dir or os.path.join(root, "index"))
    prepare_folder(index_dir, "--index")
    before = _before(index_dir)
    names = [os.path.relpath(path, root) for path in paths]
    claims = foreign.claims_of_set(root, names, counts)
    jobs = (
        _Job(path, name, index_dir, before.get(name), claims.get(name, []), trust_idx)
        for path, name in zip(paths, names, strict=True)
    )
    entries: list[Entry] = []
    problems: list[Problem] = []
    bad = 0
    try:
        for done, (entry, found) in enumerate(parallel(_index_shard, jobs, min(workers, len(paths))), 1):
            entries.append(entry)
            bad += bool(found)
            problems += found[: 0 if skip_damaged else max(0, MOST_HELD - len(problems))]
            if skip_damaged and report:
                for problem in found:
                    report(problem)
            if progress:
                progress(done, len(paths))
    except OSError as error:  # what is wrong with reading a shard is a problem of it: this is about writing
        raise UserError(f"{index_dir}: cannot be written ({error.strerror})") from error
    if problems:
        raise UserError(_listed(problems, bad, len(paths)))
    if not any(entry.samples for entry in entries):
        raise UserError(
            f"the {len(paths)} shards in {root} hold no samples at all that are whole; check which files were given"
        )
    write_entries(index_dir, entries + _others(before, root, set(names)))
    return open_index(shards, index_dir)


def open_index(shards: Shards, index_dir: str | None = None) -> Index:
    """The index of these shards, all or some of those it lists; nothing but index.json is read yet.

    Raises UserError if there is no index, or it does not list one of the shards.
    """
    index_dir, root, chosen, unknown, gone = match(shards, index_dir)
    if unknown:
        raise UserError(f"{unknown[0]}: not in the index {index_dir}; run fdscale shards index to add it")
    if gone:
        raise UserError(f"{gone[0]}: in the index {index_dir}, but gone; restore it, or run fdscale shards index again")
    return Index(root, index_dir, [entry for _, entry in chosen])


def match(
    shards: Shards, index_dir: str | None = None
) -> tuple[str, str, list[tuple[str, Entry]], list[str], list[str]]:
    """(index_dir, root, [(path, entry)] in the index's order, paths not in the index, paths in the index but gone).

    Gone are those of the index that a folder or glob in `shards` means but no longer finds.
    """
    paths = expand(shards)
    index_dir = os.path.abspath(index_dir or os.path.join(common_folder(paths), "index"))
    entries = {entry.name: entry for entry in load_entries(os.path.join(index_dir, "index.json"))}
    named = [(path, _name_in(entries, path)) for path in paths]
    unknown = [path for path, name in named if name is None]
    chosen = [(path, entries[name]) for path, name in named if name is not None]
    chosen.sort(key=lambda pair: natural(pair[1].name))
    roots = sorted({path[: -len(entry.name)] for path, entry in chosen})
    if len(roots) > 1:
        raise UserError(f"{index_dir}: the shards lie below several folders ({', '.join(roots)}); use one index each")
    if not chosen:
        raise UserError(f"{index_dir}: lists none of the {len(paths)} shards given; name the right place (--index DIR)")
    listed = [pattern for part in parts_of(shards) for pattern in patterns_of(part)]
    others = [roots[0] + name for name in sorted(set(entries) - {entry.name for _, entry in chosen}, key=natural)]
    gone = [path for path in others if any(fnmatch(path, one) for one in listed) and not os.path.exists(path)]
    return index_dir, roots[0], chosen, unknown, gone


def scan_file(path: str, name: str) -> tuple[tuple[Layout, os.stat_result] | None, list[Problem]]:
    """((layout of its whole samples, stat) of a shard, what is wrong with it); None first if it is unreadable."""
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


class _Job(NamedTuple):
    """A shard to index. before: what an earlier index says of it. claims: what others' indexes of the set say."""

    path: str
    name: str
    index_dir: str
    before: Entry | None
    claims: list[foreign.Claim]
    trust_idx: bool


def _index_shard(job: _Job) -> tuple[Entry, list[Problem]]:
    """(what the index will say of a shard, what is wrong with it)."""
    sidecar = os.path.join(job.index_dir, job.name + ".npz")
    try:
        stat = os.stat(job.path)
        stamp = (VERSION, stat.st_size, stat.st_mtime_ns)
    except OSError:  # reading it will say why
        stamp = (VERSION, 0, UNREADABLE)
    if job.before is not None and stamp[1:] == (job.before.bytes, job.before.mtime_ns) and os.path.exists(sidecar):
        entry = job.before
        left_out = load_left_out(job.index_dir, entry) if entry.left_out or entry.damaged else []
    elif (layout := load_sidecar(sidecar, stamp)) is not None:
        entry = _entry(job.name, layout, stamp)
        left_out = load_left_out(job.index_dir, entry, missing_ok=True)
        entry = _counting(entry, left_out)
    else:
        layout, stamp, left_out = _read_shard(job, stamp)
        save_sidecar(sidecar, layout, stamp, left_out)
        entry = _counting(_entry(job.name, layout, stamp), left_out)
    found = entry.samples + entry.left_out
    return entry, left_out + foreign.disagreements(job.path, job.name, found, job.claims)


def _read_shard(job: _Job, stamp: Stamp) -> tuple[Layout, Stamp, list[Problem]]:
    if job.trust_idx and (theirs := foreign.layout_of(job.path, job.name)) is not None:
        return theirs, stamp, []
    scanned, problems = scan_file(job.path, job.name)
    if scanned is None:
        return NO_SAMPLES, (VERSION, stamp[1], UNREADABLE), problems
    layout, stat = scanned
    return layout, (VERSION, stat.st_size, stat.st_mtime_ns), problems


def _entry(name: str, layout: Layout, stamp: Stamp) -> Entry:
    return Entry(name, len(layout.keys), stamp[1], stamp[2], layout_hash(layout), name + ".npz")


def _counting(entry: Entry, left_out: list[Problem]) -> Entry:
    samples = sum(bool(problem.key) for problem in left_out)
    return entry._replace(left_out=samples, damaged=samples < len(left_out))


def _before(index_dir: str) -> dict[str, Entry]:
    """What an earlier index lists, by name."""
    try:
        return {entry.name: entry for entry in load_entries(os.path.join(index_dir, "index.json"))}
    except UserError:  # none yet, or one to be replaced
        return {}


def _others(before: dict[str, Entry], root: str, names: set[str]) -> list[Entry]:
    """What an earlier index lists besides these names, as far as it is still there unchanged."""
    kept = []
    for entry in before.values():
        with suppress(OSError):
            if entry.name not in names:
                stat = os.stat(os.path.join(root, entry.name))
                if stat.st_size == entry.bytes and entry.mtime_ns in (stat.st_mtime_ns, UNREADABLE):
                    kept.append(entry)
    return kept


def _name_in(entries: dict[str, Entry], path: str) -> str | None:
    """The name of a path in the index: its longest tail that the index lists."""
    parts = path.split(os.sep)
    tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
    return next((tail for tail in tails if tail in entries), None)


def _listed(problems: list[Problem], bad: int, shards: int) -> str:
    lines = [str(problem) for problem in problems[:MOST_NAMED]]
    if len(problems) > MOST_NAMED:
        lines.append(f"and {len(problems) - MOST_NAMED} more")
    return (
        f"{bad} of {shards} shards cannot be used; repair them, leave them out, or index what is whole of them "
        "(--skip-damaged):\n  " + "\n  ".join(lines)
    )


def _pread(file: int, size: int, offset: int) -> bytes:
    data = os.pread(file, size, offset)
    while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    return data


def _bytes_of(arrays: tuple[np.ndarray, ...]) -> int:
    return sum(array.nbytes for array in arrays)
