"""What was packed into shards, as others read it."""

from __future__ import annotations

from pathlib import Path

import webdataset


def read(folder: Path) -> dict[str, tuple[str, bytes, int | None]]:
    """{key: (extension, image bytes, class or None)} by webdataset, in its order."""
    paths = sorted(str(path) for path in folder.glob("*.tar"))
    found = {}
    for sample in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False):
        (extension,) = (name for name in sample if not name.startswith("__") and name != "cls")
        found[sample["__key__"]] = (extension, sample[extension], int(sample["cls"]) if "cls" in sample else None)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
