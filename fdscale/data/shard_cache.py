"""Whole remote shards on the local disk: bounded, shared by all processes of a machine, and safe after any death.

In the folder:

    HASH-SIZE.tar             a whole shard; HASH is of its location and version; the time of change is its last use
    HASH-SIZE.again           it read wrong and was fetched anew, less than a day ago
    HASH-SIZE.lock            held (flock) by the process that fetches this shard, gone when it has ended
    .HASH-SIZE.RESERVED.RANDOM.part    what it has so far; RESERVED bytes count as taken
    room.lock                 held while space is counted, reserved or freed

A shard is there whole or not at all. Whoever needs one that is not there fetches it, under its lock; the others wait,
find it, or learn from the lock file why it failed. The kernel drops the locks of a process that dies, so whoever waited
goes on in its place, and parts without a locked lock are leftovers, which the next download removes. Where the bound
would be passed, the shards not used for longest go; readers that have one of them open read on.

Nothing in the folder is trusted: a file of the wrong size is fetched anew, and what is read from a shard is checked as
that of any other. A folder that was not named by the user must belong to them alone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fdscale import UserError
from fdscale.data import sources
from fdscale.data.files import prepare_folder
from fdscale.data.sources import Settings, State, Stop, comparable, shown, stop_of_process

POLL_S = 0.05  # between two looks at a lock that another process holds
STEP = 64 * 2**20  # bytes reserved at a time for a shard of unknown size
MOST_REASON = 4096  # bytes of a reason in a lock file
AGAIN_S = 86400.0
GIB = 2**30

_PART = re.compile(r"\.(?P<stem>[0-9a-f]{32}-\w+)\.(?P<reserved>\d{1,18})\.[0-9a-f]{16}\.part")
_SHARD = re.compile(r"[0-9a-f]{32}-\d{1,18}\.tar")
_LOCK = re.compile(r"[0-9a-f]{32}-\w+\.lock")


@dataclass(frozen=True)
class ShardCache:
    """Where remote shards are kept, how many, and how patiently they are fetched.

    folder: None for one of this user below the system's temporary directory. limit: bytes on the disk. settings: see
    sources.py. downloads: shards that one rank fetches ahead at a time. ranks: on this machine, that share it.
    """

    folder: str | None = None
    limit: int = 64 * GIB
    settings: Settings = field(default_factory=Settings)
    downloads: int = 4
    ranks: int = 1

    @property
    def path(self) -> str:
        """The folder in fact."""
        return os.path.abspath(self.folder or os.path.join(tempfile.gettempdir(), f"fdscale-shards-{os.getuid()}"))

    def look(self, location: str, stop: Stop | None = None) -> State:
        """The state of a shard now, as far as its source tells without sending it. Raises UserError as `open` does."""
        return sources.look(location, self.settings, stop or stop_of_process())

    def open(self, location: str, expected: State, stop: Stop | None = None) -> tuple[int, State]:
        """(descriptor to read from, size and version) of a whole shard, fetched first if it is not there.

        expected: what the index says, or State() for what is at the location now. Close the descriptor after use.
        Raises UserError if the source fails or has changed, the shard is larger than the bound, or the disk is full;
        Stopped if told to stop.
        """
        stop = stop or stop_of_process()
        expected = State(expected.size, comparable(expected.version, location))
        self._prepare()
        while True:
            if (file := self._present(location, expected)) is not None:
                return file, expected
            with self._lock(_stem(location, expected), stop) as lock:
                if lock is None:  # another process has just ended with it
                    continue
                if (file := self._present(location, expected)) is not None:
                    return file, expected
                try:
                    return self._fetch(location, expected, stop)
                except UserError as error:
                    os.pwrite(lock, str(error).encode()[:MOST_REASON], 0)
                    raise

    def renew(self, location: str, expected: State, file: int) -> bool:
        """Whether `open` will give another copy than `file`, which reads wrong.

        If it is still the one that is kept, it is removed, but once only: what reads wrong again is so at its source.
        """
        path = self._file(location, State(expected.size, comparable(expected.version, location)))
        if not _is_at(file, path):
            return True
        try:
            os.close(os.open(path.removesuffix(".tar") + ".again", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            return False
        except OSError as error:
            raise self.unusable(error) from None
        with suppress(FileNotFoundError):
            os.unlink(path)
        return True

    def _file(self, location: str, state: State) -> str:
        return os.path.join(self.path, _stem(location, state) + ".tar")

    def _present(self, location: str, expected: State) -> int | None:
        """A descriptor of the shard if it is there and of the right size."""
        if expected.size is None:
            return None
        path = self._file(location, expected)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror}); empty the folder, or name another") from None
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_size == expected.size:
            _used_now(file)
            return file
        os.close(file)
        with suppress(FileNotFoundError):
            os.unlink(path)
        return None

    def _fetch(self, location: str, expected: State, stop: Stop) -> tuple[int, State]:
        """Fetch a shard whose lock is held."""
        part = _Part(self, location, expected, stop)
        try:
            state = sources.fetch(location, part.file, expected, self.settings, stop, part.grow)
            os.fdatasync(part.file)
            _used_now(part.file)
            named = state if expected.size is None else expected  # as it will be asked for
            reader = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with self.room(stop):  # whoever counts the room must see it under one of its names
                    os.rename(part.path, self._file(location, named))
            except BaseException:
                os.close(reader)
                raise
            return reader, state
        except OSError as error:
            raise self.unusable(error) from None
        finally:
            part.close()

    def _prepare(self) -> None:
        """Make the folder if it is not there; refuse a default one that another user could write to."""
        path = self.path
        if not os.path.lexists(path):
            prepare_folder(os.path.dirname(path), "data.shard_cache")
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
            prepare_folder(path, "data.shard_cache")
        if self.folder is None:
            found = os.lstat(path)
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise UserError(f"{path}: is not a folder of yours alone; remove it, or name another data.shard_cache")

    @contextmanager
    def _lock(self, stem: str, stop: Stop) -> Iterator[int | None]:
        """Hold the lock of a shard; None if who held it before has ended in the meantime, as whatever it was."""
        path = os.path.join(self.path, stem + ".lock")
        lock = self._open_lock(path)
        try:
            while not self._try(lock):
                stop.wait(POLL_S)
            if not _is_at(lock, path):
                if reason := os.pread(lock, MOST_REASON, 0):
                    raise UserError(reason.decode(errors="replace"))
                yield None
                return
            try:
                yield lock
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child may have the descriptor too
        finally:
            os.close(lock)

    @contextmanager
    def room(self, stop: Stop) -> Iterator[None]:
        """Hold the lock under which space is counted."""
        lock = self._open_lock(os.path.join(self.path, "room.lock"))
        try:
            while not self._try(lock):
                stop.wait(POLL_S / 10)
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def make_room(self, size: int, stem: str, mine: str = "") -> bool:
        """Remove what was not used for longest until `size` more bytes fit; whether they do. Under the lock `room`.

        stem: of the shard whose lock the caller holds, so that any part of it but `mine` is a leftover. Leftovers go
        first; `mine` does not count.
        """
        shards, taken = [], 0
        for entry in list(os.scandir(self.path)):
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if _SHARD.fullmatch(entry.name):
                    shards.append((found.st_mtime_ns, found.st_size, entry.path))
                    taken += found.st_size
                elif part := _PART.fullmatch(entry.name):
                    if entry.path == mine:
                        continue
                    if part["stem"] == stem or self._is_leftover(part["stem"]):
                        os.unlink(entry.path)
                    else:
                        taken += max(found.st_size, int(part["reserved"]))
                elif entry.name.endswith(".again") and time.time() - found.st_mtime > AGAIN_S:
                    os.unlink(entry.path)
                elif _LOCK.fullmatch(entry.name):
                    self._is_leftover(entry.name.removesuffix(".lock"))
        for _, freed, path in sorted(shards):
            if taken + size <= self.limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            taken -= freed
        return taken + size <= self.limit

    def _is_leftover(self, stem: str) -> bool:
        """Whether nobody fetches this shard; a lock that nobody holds is removed."""
        path = os.path.join(self.path, stem + ".lock")
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True
        try:
            if not self._try(lock):
                return False
            if _is_at(lock, path):
                os.unlink(path)
            return True
        finally:
            os.close(lock)

    def _open_lock(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self.unusable(error) from None

    def _try(self, lock: int) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.unusable(error) from None
        return True

    def unusable(self, error: OSError) -> UserError:
        """What to say of an error of the folder."""
        hint = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to it"
        return UserError(
            f"{self.path}: cannot keep shards ({error.strerror}); {hint}, or name another data.shard_cache, on a "
            "local disk"
        )


class _Part:
    """The unfinished file of a download, and the room reserved for it."""

    def __init__(self, cache: ShardCache, location: str, expected: State, stop: Stop) -> None:
        self._cache, self._location, self._stop = cache, location, stop
        self._stem, self._reserved = _stem(location, expected), expected.size or 0
        self._known = expected.size is not None
        self._check(self._reserved)
        while True:
            with cache.room(stop):
                if cache.make_room(self._reserved, self._stem):
                    self.path = self._named()
                    try:
                        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    except OSError as error:
                        raise cache.unusable(error) from None
                    return
            stop.wait(POLL_S)  # other downloads hold the room: when they end, their shards may go

    def grow(self, size: int) -> None:
        """Called before the file grows to `size` bytes; raises UserError when it would be larger than the bound."""
        if size <= self._reserved:
            return
        self._check(size)
        self._reserved = min(size + STEP, self._cache.limit)
        try:
            with self._cache.room(self._stop):
                # Others may hold what is missing, and wait for us as we for them: so rather too much for a while.
                self._cache.make_room(self._reserved, self._stem, self.path)
                os.rename(self.path, named := self._named())
                self.path = named
        except OSError as error:
            raise self._cache.unusable(error) from None

    def close(self) -> None:
        """Remove it, unless it has become a shard."""
        os.close(self.file)
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def _named(self) -> str:
        return os.path.join(self._cache.path, f".{self._stem}.{self._reserved}.{secrets.token_hex(8)}.part")

    def _check(self, size: int) -> None:
        if size > self._cache.limit:
            bound = f"{self._cache.limit / GIB:.2f} GiB"
            raise UserError(
                f"{shown(self._location)}: has {f'{size / GIB:.2f} GiB' if self._known else 'more'}, the cache "
                f"{self._cache.path} may hold {bound}; give a larger data.shard_cache_gib"
            )


def _used_now(file: int) -> None:
    """Note the time of use. Not the kernel's own, which stands still for some milliseconds: what is used in one of its
    ticks would be of one age."""
    now = time.time_ns()
    with suppress(OSError):
        os.utime(file, ns=(now, now))


def _stem(location: str, state: State) -> str:
    name = hashlib.sha256(f"{shown(location)}\n{state.version}".encode()).hexdigest()[:32]
    return f"{name}-{'new' if state.size is None else state.size}"


def _is_at(file: int, path: str) -> bool:
    """Whether the open file is the one at the path, not one that was removed."""
    try:
        found, here = os.stat(path, follow_symlinks=False), os.fstat(file)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (here.st_dev, here.st_ino)
