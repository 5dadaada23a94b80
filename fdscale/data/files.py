"""Which files are meant by a pattern, and writing files whole or not at all."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise

import braceexpand

from fdscale import UserError

Shards = str | os.PathLike | Sequence[str | os.PathLike]


def expand(pattern: Shards) -> list[str]:
    """The shards meant by a folder (its *.tar), a glob, a brace pattern ("a-{000..127}.tar") or a list of these.

    Absolute paths in natural order. Raises UserError if something named does not exist, is named twice, or nothing is
    meant.
    """
    found: list[str] = []
    for part in parts_of(pattern):
        here = [path for one in patterns_of(part) for path in (glob.glob(one) if glob.has_magic(one) else [one])]
        if not here:
            raise UserError(f"{part}: no shards found (a folder is searched for *.tar, a pattern as the shell would)")
        found += here
    if not found:
        raise UserError("no shards given; give a folder, a pattern or a list of tar files")
    paths = sorted((os.path.abspath(path) for path in found), key=natural)
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} shards do not exist, the first: {missing[0]}")
    twice = [path for path, following in pairwise(paths) if path == following]
    if twice:
        raise UserError(f"{twice[0]}: named twice")
    return paths


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key that puts shard-2 before shard-10."""
    pieces = re.split(r"(\d+)", text)
    return [(int(piece), piece) if i % 2 else (-1, piece) for i, piece in enumerate(pieces)]


def common_folder(paths: list[str]) -> str:
    """The folder that holds all these files, directly or deeper."""
    return os.path.commonpath([os.path.dirname(path) for path in paths])


def prepare_folder(folder: str, option: str) -> None:
    """Make a folder and see that it can be written to, or raise UserError naming the option to put it elsewhere."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); name another place ({option} DIR)") from None


def write_atomically(path: str, data: bytes | Iterable[bytes]) -> None:
    """Write a file so that it is there whole or not at all, whatever interrupts."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def parts_of(pattern: Shards) -> list[str]:
    """The folders, patterns and paths that were given."""
    if isinstance(pattern, (str, os.PathLike)):
        return [os.fspath(pattern)]
    return [os.fspath(part) for part in pattern]


def patterns_of(part: str) -> list[str]:
    """Absolute globs, or paths, that a part of a pattern stands for. What exists under its name is never a pattern."""
    if os.path.isdir(part):
        return [os.path.join(glob.escape(os.path.abspath(part)), "*.tar")]
    if os.path.exists(part):
        return [glob.escape(os.path.abspath(part))]
    try:
        return [os.path.abspath(one) for one in braceexpand.braceexpand(part, escape=False)]
    except ValueError:
        raise UserError(f"{part}: the braces of this pattern do not match") from None
