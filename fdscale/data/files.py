"""Which shards are meant by a pattern, and where what is written about them goes."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import pairwise

import braceexpand

from fdscale import UserError
from fdscale.data.sources import Settings, is_remote, listing, patterns_of_remote, shown, where

Shards = str | os.PathLike | Sequence[str | os.PathLike]


def expand(pattern: Shards) -> list[str]:
    """The shards meant by a folder (its *.tar), a glob, a brace pattern ("a-{000..127}.tar") or a list of these.

    Absolute paths, or locations elsewhere (sources.py), in natural order. Those of a web server or a pipe, and others
    that are named one by one, are not looked for: they are missed when they are read.
    Raises UserError if something named does not exist, is named twice, or nothing is meant.
    """
    found: list[str] = []
    for part in parts_of(pattern):
        here = [path for one in patterns_of(part) for path in _found(one)]
        if not here:
            raise UserError(
                f"{shown(part)}: no shards found (a folder is searched for *.tar, a pattern as the shell would)"
            )
        found += here
    if not found:
        raise UserError("no shards given; give a folder, a pattern or a list of tar files")
    paths = sorted((path if is_remote(path) else os.path.abspath(path) for path in found), key=natural)
    missing = [path for path in paths if not is_remote(path) and not os.path.isfile(path)]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} shards do not exist, the first: {missing[0]}")
    names = sorted(where(path) for path in paths)
    twice = [name for name, following in pairwise(names) if name == following]
    if twice:
        raise UserError(f"{twice[0]}: named twice")
    return paths


def _found(pattern: str) -> list[str]:
    if is_remote(pattern):
        return listing(pattern, Settings()) if is_listed(pattern) else [pattern]
    return glob.glob(pattern) if glob.has_magic(pattern) else [pattern]


def is_listed(pattern: str) -> bool:
    """Whether a remote pattern is a glob, to be listed by its source."""
    return not pattern.startswith(("pipe:", "http://", "https://")) and glob.has_magic(pattern)


def natural(text: str) -> list[tuple[int, str]]:
    """A sort key that puts shard-2 before shard-10."""
    pieces = re.split(r"(\d+)", text)
    return [(int(piece), piece) if i % 2 else (-1, piece) for i, piece in enumerate(pieces)]


def common_folder(paths: list[str]) -> str:
    """The folder that holds all these files, directly or deeper; of locations elsewhere, of the paths that name them.

    Raises UserError if there is none.
    """
    if not any(is_remote(path) for path in paths):
        return os.path.commonpath([os.path.dirname(path) for path in paths])
    folders = [where(path).split("/")[:-1] for path in paths]
    first, last = min(folders), max(folders)
    same = next((i for i, steps in enumerate(zip(first, last, strict=False)) if len(set(steps)) > 1), len(first))
    if same == 0 or ("://" in where(paths[0]) and same < 3):
        raise UserError(f"{shown(paths[0])} and {shown(paths[-1])} lie in no common folder; index them apart")
    return "/".join(first[:same])


def name_of(path: str, root: str) -> str:
    """The name of a shard in the index: its path from the common folder on."""
    return where(path)[len(root) + 1 :] if is_remote(path) else os.path.relpath(path, root)


def index_folder(index_dir: str | None, root: str) -> str:
    """Where the index of the shards below `root` lies. Raises UserError if it has to be named."""
    if index_dir is None and (is_remote(root) or not os.path.isdir(root)):
        raise UserError(
            f"{root}: nothing can be written beside these shards; say where their index lies (--index DIR, in a recipe "
            "data.index)"
        )
    return os.path.abspath(index_dir or os.path.join(root, "index"))


def means(pattern: str, path: str) -> bool:
    """Whether a pattern means a path that it did not find: a file that is gone."""
    if not is_remote(pattern):
        return fnmatch(path, pattern) and not os.path.exists(path)
    steps, wanted = path.split("/"), pattern.split("/")
    return is_listed(pattern) and len(steps) == len(wanted) and all(map(fnmatch, steps, wanted))


def prepare_folder(folder: str, option: str) -> None:
    """Make a folder and see that it can be written to, or raise UserError naming the option to put it elsewhere."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror}); name another place ({option} DIR)") from None


def parts_of(pattern: Shards) -> list[str]:
    """The folders, patterns, paths and locations that were given."""
    parts = [pattern] if isinstance(pattern, (str, os.PathLike)) else pattern
    if not all(os.fspath(part) for part in parts):
        raise UserError("no shards given: an empty text; give a folder, a pattern or a list of tar files")
    return [os.fspath(part).removeprefix("file://") for part in parts]


def patterns_of(part: str) -> list[str]:
    """Absolute globs, paths or locations that a part of a pattern means. What exists under its name is no pattern."""
    if is_remote(part):
        return [meant for one in _braces(part) for meant in patterns_of_remote(one)]
    if os.path.isdir(part):
        return [os.path.join(glob.escape(os.path.abspath(part)), "*.tar")]
    if os.path.exists(part):
        return [glob.escape(os.path.abspath(part))]
    return [os.path.abspath(one) for one in _braces(part)]


def _braces(part: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(part, escape=False))
    except ValueError:
        raise UserError(f"{shown(part)}: the braces of this pattern do not match") from None
