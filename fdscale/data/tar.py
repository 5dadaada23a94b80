"""Reading the headers of a tar file, and the WebDataset rule that groups its members into samples.

Stock readers take a damaged or missing header after the first for the end of the archive and drop the rest of the
shard without a word. Here every header must be whole and pass its checksum, every member must lie inside the file,
and the archive must end with its end mark and nothing after it.

Formats: POSIX.1-1988 ustar and older, GNU long names, pax headers (POSIX.1-2001: path and size).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple
from zlib import adler32

import numpy as np

from fdscale import UserError

BLOCK = 512
WINDOW = 4096  # bytes read at a time: a header, and the small members and headers that often follow
MOST_HEADER = 2**20  # bytes of a long name or pax header: real ones take a few hundred
MOST_NAME = 4096  # characters, as in a path
MOST_MEMBERS = 4_000_000  # of a shard: its tables then take about 1 GB
MOST_KEY_BYTES = 2**30  # all keys of a shard, each as long as the longest
CHUNK = 2**20
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm")

_END = bytes(BLOCK)
_SPACES = adler32(8 * b" ")
_REGULAR = b"0\0007"
_NO_DATA = b"123456"  # links, devices, directories, pipes: a size in their header counts for nothing


class Layout(NamedTuple):
    """Where the n samples and m members of a shard lie; the members of sample i are starts[i] to starts[i + 1]."""

    keys: np.ndarray  # (n,) bytes
    starts: np.ndarray  # (n + 1,) uint32
    extensions: np.ndarray  # (kinds,) bytes, lower case
    kinds: np.ndarray  # (m,) uint32, into extensions
    offsets: np.ndarray  # (m,) uint64, first byte of the data
    sizes: np.ndarray  # (m,) uint64, bytes


class Problem(NamedTuple):
    """What is wrong with a shard, or with one sample of it (`key` is empty if it is not about one sample).

    left_out: the index was made without it (see `index`).
    """

    shard: str
    key: str
    reason: str
    left_out: bool = False

    def __str__(self) -> str:
        about = f"{self.shard}: " + (f"sample '{self.key}': " if self.key else "") + self.reason
        return about + (" (left out of the index)" if self.left_out else "")


def header_size(header: bytes) -> int:
    """The size a header gives, in bytes; -1 if the header is damaged: its checksum or one of its numbers is wrong."""
    stored = _number(header[148:156])
    # The sum of all bytes, those of the checksum taken as spaces. Adler-32 has it too, modulo 65521, and computes it
    # several times as fast; a sum off by just that takes a header whose bytes are mostly over 127.
    if stored < 0 or adler32(header[156:], adler32(header[:148], _SPACES)) & 0xFFFF != stored + 1:
        rest = header[:148] + header[156:]
        total = sum(rest) + 8 * ord(" ")
        if stored not in (total, total - 256 * sum(1 for byte in rest if byte >= 128)):  # old writers: signed bytes
            return -1
    return _number(header[124:136])


def _number(field: bytes) -> int:
    """Octal digits, or base 256 if the first byte is 0x80 (GNU, for sizes from 8 GiB); -1 if neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return -1


def members(file: int, total: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset of the data, size) of the regular files in a tar, in order.

    file: descriptor, read with pread only. total: size of the file, bytes. Raises UserError saying at which byte the
    archive is damaged or ends too early.
    """
    at, window, start = 0, b"", 0
    attributes: dict[str, str] = {}  # of all following members (pax "g")
    pending: dict[str, str] = {}  # of the next member (pax "x", GNU "L")
    while True:
        if not start <= at <= start + len(window) - BLOCK:
            window, start = os.pread(file, WINDOW, at), at
        header = window[at - start : at - start + BLOCK]
        if header == _END:
            check_end(file, at, bool(pending))
            return
        kind, name, size = parse_header(header, at, total)
        data = at + BLOCK
        if kind in b"LKxXg":
            if size > MOST_HEADER:
                raise UserError(f"the header at byte {at} announces {size} bytes of names: damaged")
            payload = _read(file, data, size, total, at)
            new = (
                {}
                if kind == b"K"
                else _pax(payload, at)
                if kind in b"xXg"
                else {"path": _text(payload.split(b"\0")[0])}
            )
            if kind != b"g" and "path" in new and "path" in pending:  # of which readers take the first, or the last
                raise UserError(f"two long names for one member at byte {at}: damaged")
            (attributes if kind == b"g" else pending).update(new)
            at = data + padded(size)
            continue
        about = {**attributes, **pending} if attributes or pending else {}
        pending = {}
        name, size = about.get("path", name), _pax_size(about, size, at)
        if len(name) > MOST_NAME:
            raise UserError(f"the name at byte {at} has {len(name)} characters: damaged")
        if kind == b"S" or (about and any(key.startswith("GNU.sparse") for key in about)):
            raise UserError(f"'{name}' at byte {at} is a sparse file; pack it without --sparse")
        if kind in _NO_DATA or (kind == b"\0" and name.endswith("/")):
            size = 0
        if data + size > total:
            raise UserError(f"truncated: '{name}' should reach byte {data + size}, but the file ends at byte {total}")
        if kind in _REGULAR and not name.endswith("/"):
            yield name, data, size
        at = data + padded(size)


def parse_header(header: bytes, at: int, total: int) -> tuple[bytes, str, int]:
    """(type, name, size) of the header at byte `at` of a file of `total` bytes. Raises UserError if it is damaged."""
    if len(header) < BLOCK:
        where = "inside the header" if header else "without the mark that ends an archive,"
        raise UserError(f"truncated: the file ends {where} at byte {min(at, total)}")
    size = header_size(header)
    if size < 0:
        if at == 0 and header[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5"):
            raise UserError("is a compressed tar: samples can only be found in a plain one; decompress it")
        raise UserError("is not a tar file" if at == 0 else f"the header at byte {at} is damaged")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's own magic differs, and keeps other things here
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return header[156:157], _text(name), size


def _pax(payload: bytes, at: int) -> dict[str, str]:
    """The records "length key=value\\n" of a pax header."""
    found, position = {}, 0
    try:
        while position < len(payload) and payload[position]:
            space = payload.index(b" ", position)
            length = int(payload[position:space])
            key, equals, value = payload[space + 1 : position + length - 1].partition(b"=")
            if length <= space - position or not equals or payload[position + length - 1 : position + length] != b"\n":
                raise ValueError
            found[_text(key)] = _text(value)
            position += length
    except ValueError:
        raise UserError(f"the pax header at byte {at} is damaged") from None
    return found


def _pax_size(about: dict[str, str], size: int, at: int) -> int:
    try:
        size = int(about.get("size", size))
    except ValueError:
        size = -1
    if size < 0:
        raise UserError(f"the pax header before byte {at} is damaged (size {about['size']!r})")
    return size


def check_end(file: int, at: int, pending: bool) -> None:
    """After the end mark there may be padding only: a header overwritten by zeros looks like an end mark as well."""
    if pending:
        raise UserError(f"truncated: the archive ends at byte {at}, right after the long name of a member")
    position = at + BLOCK
    while chunk := os.pread(file, CHUNK, position):
        if chunk.count(0) != len(chunk):
            raise UserError(
                f"the archive ends at byte {at}, but data follow: a damaged header, or tars joined with cat; "
                "stock readers stop there"
            )
        position += len(chunk)


def _read(file: int, offset: int, size: int, total: int, at: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) < size:
        raise UserError(f"truncated: the name at byte {at} should reach byte {offset + size}, the file ends at {total}")
    return data


def padded(size: int) -> int:
    """A size rounded up to whole blocks, bytes."""
    return -(-size // BLOCK) * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")  # a name in another encoding stays printable


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member: split at the first dot of the last path component, extension in lower case.

    None for what is no part of a sample: names without extension, hidden files ("._photo.jpg"), and WebDataset's own
    metadata ("__name__", or anything below a folder of such a name).
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base:
        return None
    if name.startswith("__"):
        first = name.split("/", 1)[0]
        if first.endswith("__") and len(first) >= 4:
            return None
    return name[:dot], name[dot + 1 :].lower()


def scan(file: int, total: int, shard: str) -> tuple[Layout, list[Problem]]:
    """The layout of the whole samples of a shard, from its headers alone, and what is wrong with the rest.

    See `arrange`. Damage of the tar itself is a problem without key; the samples before it are kept. Raises UserError
    for a shard out of all proportion.
    """
    return arrange(members(file, total), shard)


def arrange(found: Iterable[tuple[str, int, int]], shard: str) -> tuple[Layout, list[Problem]]:
    """The layout of the whole samples among members (name, offset, size), and what is wrong with the others.

    WebDataset's rule: consecutive members of one key are a sample. Each needs an image, and whatever other members at
    least half of the samples have. If `found` ends with a UserError, its message is the last problem, without key; the
    sample right before is kept only if it has every kind of member seen so far, since its next may be lost.
    """
    keys: list[str] = []
    starts: list[int] = []
    extensions: dict[str, int] = {}
    rows: list[tuple[int, int, int]] = []  # kind, offset, size
    damage = None
    try:
        for name, offset, size in found:
            parts = split_name(name)
            if parts is None:
                continue
            if len(rows) == MOST_MEMBERS:
                raise UserError(f"holds more than {MOST_MEMBERS} members; cut it into smaller shards")
            if not keys or keys[-1] != parts[0]:
                keys.append(parts[0])
                starts.append(len(rows))
            rows.append((extensions.setdefault(parts[1], len(extensions)), offset, size))
    except UserError as error:
        damage = str(error)
    starts.append(len(rows))
    names = list(extensions)
    problems = _check_samples(shard, keys, starts, names, rows)
    if damage is not None and keys:
        last = len(keys) - 1
        kinds = {kind for kind, _, _ in rows[starts[last] :]}
        cut = "the damage follows it: what else belongs to it is lost"
        if problems and problems[-1][0] == last:
            cut = f"cut off: {problems.pop()[1].reason}"
        elif last > 0 and len(kinds) == len(names):
            cut = ""
        problems += [(last, Problem(shard, keys[last], cut))] if cut else []
    layout = _layout(keys, starts, names, rows, {i for i, _ in problems})
    left = [problem for _, problem in problems]
    return layout, left if damage is None else [*left, Problem(shard, "", damage)]


def _layout(
    keys: list[str], starts: list[int], names: list[str], rows: list[tuple[int, int, int]], without: set[int]
) -> Layout:
    """The arrays of all samples but those numbered in `without`."""
    if without:
        kept = [i for i in range(len(keys)) if i not in without]
        held = [rows[starts[i] : starts[i + 1]] for i in kept]
        used = sorted({kind for some in held for kind, _, _ in some})
        new = {kind: i for i, kind in enumerate(used)}
        keys, names = [keys[i] for i in kept], [names[kind] for kind in used]
        starts = [0, *accumulate(map(len, held))]
        rows = [(new[kind], offset, size) for some in held for kind, offset, size in some]
    table = np.array(rows, np.uint64).reshape(-1, 3)
    return Layout(
        keys=_packed(keys),
        starts=np.array(starts, np.uint32),
        extensions=_packed(names),
        kinds=table[:, 0].astype(np.uint32),
        offsets=np.ascontiguousarray(table[:, 1]),
        sizes=np.ascontiguousarray(table[:, 2]),
    )


def _packed(texts: list[str]) -> np.ndarray:
    encoded = [text.encode() for text in texts]
    if len(encoded) * max(map(len, encoded), default=0) > MOST_KEY_BYTES:
        raise UserError(f"has {len(encoded)} names of up to {max(map(len, encoded))} bytes; cut it into smaller shards")
    return np.array(encoded or np.empty(0, "S1"))


def _check_samples(
    shard: str, keys: list[str], starts: list[int], names: list[str], rows: list[tuple[int, int, int]]
) -> list[tuple[int, Problem]]:
    """What is wrong with which sample: (its number, problem), one for each."""
    problems: list[tuple[int, Problem]] = []
    kinds = [kind for kind, _, _ in rows]
    held = [tuple(kinds[first:end]) for first, end in pairwise(starts)]  # few different ones, so each is judged once
    counts = Counter(held)
    images = {kind for kind, name in enumerate(names) if name in IMAGE_EXTENSIONS}
    having: Counter[int] = Counter()
    for some, count in counts.items():
        for kind in set(some):
            having[kind] += count
    usual = {kind for kind, count in having.items() if 2 * count >= len(keys)} - images
    verdicts = {some: _wrong_with(some, images, usual, names) for some in counts}
    empty = {at for at, (kind, _, size) in enumerate(rows) if size == 0 and kind in images}
    seen: set[str] = set()
    for i, key in enumerate(keys):
        wrong = verdicts[held[i]]
        if key in seen:
            wrong = ["the key occurs twice in the shard, with other samples between", *wrong]
        seen.add(key)
        if empty and (at := next((at for at in range(starts[i], starts[i + 1]) if at in empty), None)) is not None:
            wrong = [*wrong, f"its .{names[kinds[at]]} is empty"]
        if wrong:
            problems.append((i, Problem(shard, key, "; ".join(wrong))))
    return problems


def _wrong_with(held: tuple[int, ...], images: set[int], usual: set[int], names: list[str]) -> list[str]:
    """What is wrong with a sample that has these kinds of members."""
    wrong, have = [], set(held)
    if len(have) < len(held):
        twice, _ = Counter(held).most_common(1)[0]
        wrong.append(f"has two members .{names[twice]}")
    if not have & images:
        held_names = [names[kind] for kind in held[:5]]
        listed, known = (", ".join(f".{name}" for name in some) for some in (held_names, IMAGE_EXTENSIONS))
        hint = "; a key ends at the first dot of a name" if any("." in name for name in held_names) else ""
        wrong.append(f"has no image (found {listed}; known: {known}){hint}")
    if not usual <= have:
        lost = ", ".join("." + names[kind] for kind in sorted(usual - have))
        wrong.append(f"lacks {lost}, which most samples of the shard have")
    return wrong
