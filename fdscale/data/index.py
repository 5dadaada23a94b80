"""The index of a set: which shards it has, how many samples each holds, and where their bytes lie.

Opening an index, and reading samples through it. indexing.py makes one; index_file.py describes its files.
"""

from __future__ import annotations

import glob
import os

import numpy as np

from fdscale import UserError
from fdscale.data.files import Shards, common_folder, expand, index_folder, means, natural, parts_of, patterns_of
from fdscale.data.index_file import Entry, fingerprint, load_entries, read_layout
from fdscale.data.lost import Lost
from fdscale.data.recent import Recent
from fdscale.data.shard_cache import ShardCache
from fdscale.data.sources import State, Stop, is_remote, shown, where
from fdscale.data.tar import BLOCK, IMAGE_EXTENSIONS, header_size

OPEN_FILES = 256  # per process; the usual limit is 1024
COLUMN_BYTES = 128 * 2**20  # per process; a shard of 10 000 samples takes about 0.4 MB


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
        layout = read_layout(self.index_dir, self._entries[shard])
        offsets, sizes = np.zeros((2, len(layout.keys)), np.uint64)
        owner = np.repeat(np.arange(len(layout.keys)), layout.starts[1:] - layout.starts[:-1])
        names = layout.extensions.tolist()
        for extension in reversed(extensions):  # the first wins
            if extension.encode() in names:
                mine = layout.kinds == names.index(extension.encode())
                offsets[owner[mine]], sizes[owner[mine]] = layout.offsets[mine], layout.sizes[mine]
        return layout.keys, offsets, sizes


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
    entries = {entry.name: entry for entry in load_entries(os.path.join(index_dir, "index.json"))}
    named = [(path, _name_in(entries, path)) for path in paths]
    unknown = [path for path, name in named if name is None]
    chosen = [(path, entries[name]) for path, name in named if name is not None]
    chosen.sort(key=lambda pair: natural(pair[1].name))
    roots = sorted({where(path)[: -len(entry.name)] for path, entry in chosen})
    if len(roots) > 1:
        raise UserError(f"{index_dir}: the shards lie below several folders ({', '.join(roots)}); use one index each")
    if not chosen:
        raise UserError(f"{index_dir}: lists none of the {len(paths)} shards given; name the right one (--index)")
    listed = [pattern for part in parts_of(shards) for pattern in patterns_of(part) if glob.has_magic(pattern)]
    others = [roots[0] + name for name in sorted(set(entries) - {entry.name for _, entry in chosen}, key=natural)]
    gone = [path for path in others if any(means(one, path) for one in listed)]
    return index_dir, roots[0], chosen, unknown, gone


def _name_in(entries: dict[str, Entry], path: str) -> str | None:
    """The name of a path in the index: its longest tail that the index lists."""
    parts = where(path).split(os.sep)
    tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
    return next((tail for tail in tails if tail in entries), None)


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
