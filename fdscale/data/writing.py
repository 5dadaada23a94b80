"""Writing sets of shards: each a plain tar, always the same bytes for the same samples, in a folder that appears whole.

Times, owners and rights in the headers are fixed, and the members of a sample stand in the order of their names.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from fdscale import UserError
from fdscale.data.files import prepare_folder
from fdscale.data.tar import BLOCK, padded

MAX_BYTES = 256 * 2**20  # of a shard: sequential reads stay long, and a shard of 1000 to 4000 photos shuffles well

Members = dict[str, bytes]  # extension -> content


@contextmanager
def new_folder(out: str) -> Iterator[str]:
    """A folder to fill, which gets the name `out` at the end, or is removed if anything goes wrong.

    A process that was killed leaves a folder .OUT.*.part to delete. Raises UserError if `out` is not new, or cannot be
    written.
    """
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out}: exists already; name a new folder, or remove it first")
    prepare_folder(os.path.dirname(out), "--out")
    temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(out)}.", suffix=".part", dir=os.path.dirname(out))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        os.rename(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):  # mostly: the disk is full
            raise UserError(f"{out}: cannot be written ({error.strerror}); nothing was kept") from error
        raise


def check_sizes(samples_per_shard: int | None, max_bytes: int | None) -> None:
    """Raises UserError if where a shard ends is said twice or makes no sense."""
    if samples_per_shard is not None and max_bytes is not None:
        raise UserError("give samples_per_shard or max_bytes (--shard-mib), not both")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}, expected at least 1")
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max_bytes is {max_bytes}, expected at least 1 (--shard-mib: above 0)")


def bytes_in_tar(name: bytes, size: int) -> int:
    """Most bytes that a member takes in a shard, given its name and its size in bytes."""
    plain = len(name) <= 100 and name.isascii()
    return BLOCK + padded(size) + (0 if plain else BLOCK + padded(len(name) + 32))  # a pax header and its payload


def sample_bytes(key: str, members: Members) -> int:
    """Most bytes that a sample takes in a shard."""
    return sum(bytes_in_tar(f"{key}.{name}".encode(), len(data)) for name, data in members.items())


class Tar:
    """One shard being written. Raises OSError as files do."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        # This format writes a plain ustar header wherever the name fits one, and a pax header before it where not.
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)
        self.samples = self.bytes = 0

    def add(self, key: str, members: Members) -> None:
        """Append a sample."""
        for extension in sorted(members):  # webdataset.TarWriter's order
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(members[extension])
            self._tar.addfile(info, io.BytesIO(members[extension]))
        self._tar.members = []  # type: ignore[attr-defined]  # or it would remember every one
        self.samples += 1
        self.bytes += sample_bytes(key, members)

    def close(self) -> None:
        """Write the end mark and wait until all is on the disk."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Shards:
    """Shards shard-000000.tar and so on in a folder, each up to a number of samples or bytes.

    samples_per_shard or max_bytes: where a shard ends; MAX_BYTES by default. A sample larger than that has a shard of
    its own. `close` the last one.
    """

    def __init__(self, folder: str, samples_per_shard: int | None, max_bytes: int | None) -> None:
        self._folder, self._samples = folder, samples_per_shard
        self._bytes = None if samples_per_shard is not None else max_bytes or MAX_BYTES
        self._tar: Tar | None = None
        self._count = 0

    def add(self, key: str, members: Members) -> None:
        """Append a sample."""
        if self._tar is not None and self._full(self._tar, sample_bytes(key, members)):
            self.close()
        if self._tar is None:
            self._tar = Tar(os.path.join(self._folder, shard_name(self._count)))
            self._count += 1
        self._tar.add(key, members)

    def _full(self, tar: Tar, size: int) -> bool:
        return tar.samples == self._samples or (self._bytes is not None and tar.bytes + size > self._bytes)

    def close(self) -> None:
        """End the last shard."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"
