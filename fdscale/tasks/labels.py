"""Labels of a set from a file apart: other ones than its shards have, or several for an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fdscale import UserError

NONE = -1  # in place of a label, where others have more

Labels = Callable[[Sequence[str]], Tensor]


def read_labels(path: str, classes: int) -> Labels:
    """What gives the labels (B, M) int64 of samples by their keys; NONE where one has fewer than M, or none at all.

    The file: JSON with a list whose entry n is of ILSVRC2012_val_{n + 1} (real.json of google-research/reassessed-
    imagenet), or with an object from names to classes; or text, a name and its classes on each line. An entry is a
    class or a list of them, which may be empty: such an image does not count. A name is a sample's key, or the last
    part of it. Raises UserError for a file that is none of these, and later naming a sample that has no entry.
    """
    known = _read(path)
    for name, labels in known.items():
        wrong = [label for label in labels if not (type(label) is int and 0 <= label < classes)]
        if wrong:
            raise UserError(f"{path}: {name} has the class {wrong[0]!r}; expected numbers from 0 to {classes - 1}")
    most = max(1, *(len(labels) for labels in known.values())) if known else 1

    def labels_of(keys: Sequence[str]) -> Tensor:
        found = torch.full((len(keys), most), NONE)
        for row, key in enumerate(keys):
            name = key if key in known else key.rpartition("/")[2]
            if name not in known:
                raise UserError(f"{path} has no entry for the sample '{key}'; expected its key or the last part of it")
            found[row, : len(known[name])] = torch.tensor(known[name], dtype=torch.int64)
        return found

    return labels_of


def _read(path: str) -> dict[str, list[int]]:
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels {path}: not readable ({error})") from None
    if text.lstrip()[:1] not in ("[", "{"):
        return _read_lines(path, text)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"labels {path}: no JSON ({error})") from None
    if isinstance(found, list):
        found = {f"ILSVRC2012_val_{number:08d}": entry for number, entry in enumerate(found, 1)}
    return {name: entry if isinstance(entry, list) else [entry] for name, entry in found.items()}


def _read_lines(path: str, text: str) -> dict[str, list[int]]:
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, *labels = line.split()
        try:
            found[name] = [int(label) for label in labels]
        except ValueError:
            raise UserError(f"labels {path}, line {number}: expected a name and class numbers, got {line!r}") from None
    return found
