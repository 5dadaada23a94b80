"""What others' indexes say of the same shards: a cross-check for ours, and on request a short cut.

How many samples a shard should hold is said by
    wids                    a JSON file with a "shardlist" beside the shards
    Megatron-Energon        .nv-meta/.info.json or .info.yaml, and NAME.tar.idx
    img2dataset             NAME_stats.json
    open_clip               sizes.json
    DALI's wds2idx          NAME.idx, v1.1 or v1.2
A shard that holds another number was damaged before our index could see it, or their index is of another state.

Offsets: only DALI's v1.2 gives what our index needs, name, place and size of every member. Reading it is about
twice as fast as reading the headers from memory, and on a slow file system it saves a read per sample; but headers that
are not read are not checked. So it is used only where `trust_idx` asks for it, and only if its members fill the shard
without a gap up to an end mark and CHECKED of the headers, spread evenly, are whole and agree.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fdscale import UserError
from fdscale.data.tar import BLOCK, Layout, Problem, arrange, check_end, padded, parse_header, split_name

CHECKED = 32  # headers of a shard read before DALI's offsets are believed
MOST_BYTES = 2**29  # of another's index file
MOST_LISTS = 100  # JSON files beside the shards that are looked into
HEAD = 4096  # bytes in which "shardlist" must occur

Members = list[tuple[str, int, int]]  # name, offset, size


class Claim(NamedTuple):
    """So many samples of a shard, said by a file."""

    source: str
    samples: int


def claims_of_set(root: str, names: Sequence[str], given: Sequence[str] = ()) -> dict[str, list[Claim]]:
    """What files about the whole set say: {name of a shard: claims}.

    root: the folder that `names` are relative to; the files in it are found by themselves. given: further such files.
    Raises UserError if one of those cannot be read.
    """
    found: dict[str, list[Claim]] = defaultdict(list)
    known = set(names)
    by_base: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_base[os.path.basename(name)].append(name)
    files = [(path, True) for path in given] + [(path, False) for path in _lists_in(root)]
    for path, asked in files:
        listed = _counts(path)
        if listed is None and asked:
            raise UserError(f"{path}: says of no shard how many samples it holds; expected wids, Energon or sizes JSON")
        for url, count in listed or ():
            parts = url.split("?")[0].split("/")
            tails = ("/".join(parts[i:]) for i in range(len(parts)))
            same = by_base.get(parts[-1], [])
            meant = next((tail for tail in tails if tail in known), same[0] if len(same) == 1 else None)
            if meant is not None:
                found[meant].append(Claim(path, count))
    return dict(found)


def disagreements(path: str | None, shard: str, found: int, claims: Iterable[Claim]) -> list[Problem]:
    """The claims about a shard, those given and those in files beside `path`, that differ from the samples found."""
    beside = [] if path is None else _claims_beside(path)
    wrong = [claim for claim in (*claims, *beside) if claim.samples != found]
    return [
        Problem(
            shard,
            "",
            f"holds {found} samples, {claim.source} says {claim.samples}: the shard lost some, or that file is of "
            "another state of it (delete the file then)",
        )
        for claim in wrong
    ]


def layout_of(path: str, name: str) -> Layout | None:
    """The layout that DALI's index beside a shard gives, if it bears the checks; None otherwise."""
    for idx in _idx_files(path):
        members = (_dali(idx) or (0, None))[1]
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if members and _bears_checks(file, os.fstat(file).st_size, members):
                layout, problems = arrange(members, name)
                return None if problems else layout  # our own reading then says what is wrong
        except (OSError, UserError):
            return None
        finally:
            os.close(file)
    return None


def _bears_checks(file: int, total: int, members: Members) -> bool:
    at = 0
    for _, offset, size in members:
        if offset != at + BLOCK or size < 0:
            return False
        at = offset + padded(size)
    if at > total or os.pread(file, BLOCK, at) != bytes(BLOCK):
        return False
    check_end(file, at, pending=False)
    for i in np.unique(np.linspace(0, len(members) - 1, CHECKED, dtype=int)).tolist():
        name, offset, size = members[i]
        kind, found, stated = parse_header(os.pread(file, BLOCK, offset - BLOCK), offset - BLOCK, total)
        if kind not in (b"0", b"\0") or (found, stated) != (name, size):
            return False
    return True


def _lists_in(root: str) -> list[str]:
    """Files in a folder that say something of all its shards; none if it is elsewhere."""
    if not os.path.isdir(root):
        return []
    found = [os.path.join(root, *parts) for parts in ((".nv-meta", ".info.json"), (".nv-meta", ".info.yaml"))]
    candidates = []
    for entry in os.scandir(root):
        if entry.name.endswith(".json") and not entry.name.endswith("_stats.json") and entry.is_file():
            candidates.append(entry.path)
    for path in sorted(candidates)[:MOST_LISTS]:
        if os.path.basename(path) == "sizes.json" or b'"shardlist"' in (_read(path, HEAD) or b""):
            found.append(path)
    return [path for path in found if os.path.isfile(path)]


def _counts(path: str) -> list[tuple[str, int]] | None:
    """(shard, samples) as a file about the whole set lists them; None if it is no such file."""
    raw = _read(path, MOST_BYTES)
    try:
        content = _yaml(raw) if path.endswith((".yaml", ".yml")) else json.loads(raw or b"")
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    shards = content.get("shardlist", content.get("shard_counts", content))
    pairs: list[tuple[Any, Any]]
    if isinstance(shards, list):
        pairs = [(one.get("url"), one.get("nsamples")) for one in shards if isinstance(one, dict)]
    else:
        pairs = list(shards.items()) if isinstance(shards, dict) else []
    counts = [(url, count) for url, count in pairs if isinstance(url, str) and type(count) is int and count >= 0]
    return counts or None


def _yaml(raw: bytes | None) -> Any:
    import yaml

    try:
        return yaml.load(raw or b"", Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # both are safe loaders
    except yaml.YAMLError:
        return None


def _claims_beside(path: str) -> list[Claim]:
    """What files beside a shard say of it."""
    claims = []
    for idx in _idx_files(path):
        dali = _dali(idx)
        count = dali[0] if dali else _energon(idx)
        if count is not None:
            claims.append(Claim(idx, count))
    stats = path.removesuffix(".tar") + "_stats.json"
    try:
        count = json.loads(_read(stats, HEAD * 256) or b"").get("successes")
        if type(count) is int:
            claims.append(Claim(stats, count))
    except (ValueError, AttributeError, RecursionError):
        pass
    return claims


def _idx_files(path: str) -> list[str]:
    """Where wds2idx (up to the first dot of the name) and Energon put the index of a shard."""
    folder, base = os.path.split(path)
    names = dict.fromkeys((base.split(".", 1)[0] + ".idx", base.removesuffix(".tar") + ".idx", base + ".idx"))
    return [file for name in names if os.path.isfile(file := os.path.join(folder, name))]


def _dali(path: str) -> tuple[int, Members | None] | None:
    """(samples, members if the file names them) by an index of wds2idx; None if it is none."""
    raw = _read(path, MOST_BYTES)
    if raw is None or not raw.startswith((b"v1.1 ", b"v1.2 ")):
        return None
    try:
        first, *lines = raw.decode().splitlines()
        if first.startswith("v1.1"):  # extension, offset, size: no names
            return len(lines), None
        members = []
        for line in lines:
            words = line.split(" ")
            if len(words) % 4:  # a name with a blank in it
                return int(first.split()[1]), None
            members += [(words[i + 3], int(words[i + 1]), int(words[i + 2])) for i in range(0, len(words), 4)]
    except (ValueError, IndexError):
        return None
    keys = [parts[0] for name, _, _ in members if (parts := split_name(name))]
    return sum(key != before for key, before in zip(keys, [None, *keys], strict=False)), members


def _energon(path: str) -> int | None:
    """Samples by a .tar.idx of Energon: where each begins, and where the last ends; None if it is none."""
    raw = _read(path, MOST_BYTES)
    if not raw or len(raw) % 8:
        return None
    places = np.frombuffer(raw, "<u8")
    aligned = bool((places % BLOCK == 0).all() and (places[1:] > places[:-1]).all())
    return len(places) - 1 if aligned else None


def _read(path: str, most: int) -> bytes | None:
    """The content of a file (of HEAD: its beginning); None if there is none, or it is larger than `most`."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError:
        return None
    return data[:most] if most == HEAD or len(data) <= most else None
