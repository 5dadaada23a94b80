"""Making WebDataset shards from image files, and verifying shards against their index.

A shard is a plain tar; a sample is an image file, its bytes untouched, and, where classes are known, a member .cls
with the number of the class in decimal. The same source gives the same bytes: times, owners and rights in the headers
are fixed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from fdscale import UserError
from fdscale.data.files import Shards, prepare_folder
from fdscale.data.index import Entry, Index, Progress, index, layout_hash, load_sidecar, match, open_index, scan_file
from fdscale.data.order import check_seed, permutation
from fdscale.data.parallel import parallel
from fdscale.data.tar import BLOCK, IMAGE_EXTENSIONS, Layout, Problem, split_name

MAX_BYTES = 256 * 2**20  # of a shard: sequential reads stay long, and a shard of 1000 to 4000 photos shuffles well


class Source(NamedTuple):
    """A sample to pack. size: of the image file, bytes. cls: number of its class, None if there are no classes."""

    path: str
    key: str
    extension: str
    size: int
    cls: int | None


def make(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    samples_per_shard: int | None = None,
    max_bytes: int | None = None,
    seed: int | None = 0,
    workers: int = 1,
    index_dir: str | None = None,
    progress: Progress | None = None,
) -> Index:
    """Pack images into the new folder `out`: shard-000000.tar and so on, classes.json where classes have names, index.

    source: a folder of images; a folder with one subfolder of images per class (numbered in the order of their
    names); or a table (.csv, or .tsv for tabs) with a column "path", relative to the table, and optionally "label" (a
    name, numbered in order) or "cls" (a number), and "key". Keys are the paths without extension, further dots turned
    to "_"; a key that would come twice gets a number, unless the table names it.
    samples_per_shard or max_bytes: where a shard ends; 256 MiB by default. seed: shuffles the samples over the
    shards; None keeps their order (by path, or as in the table). index_dir: by default out/index. progress: called
    with (samples done, samples). `out` appears when all is written, or not at all; a run that was killed leaves a
    folder .OUT.*.part to delete.
    Raises UserError if a file is missing, empty or of an unknown kind, or if `out` is not new.
    """
    if samples_per_shard is not None and max_bytes is not None:
        raise UserError("give samples_per_shard or max_bytes, not both")
    out = os.path.abspath(out)
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise UserError(f"{out}: exists already; name a new folder, or remove it first")
    samples, classes = _from_folder(os.fspath(source)) if os.path.isdir(source) else _from_table(os.fspath(source))
    if seed is not None:
        check_seed(seed)
        samples = [samples[i] for i in permutation(seed, 0, (0, 3, 0, 0), len(samples))]
    prepare_folder(os.path.dirname(out), "--out")
    if index_dir is not None:
        prepare_folder(index_dir, "--index")
    temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(out)}.", suffix=".part", dir=os.path.dirname(out))
    try:
        os.chmod(temporary, 0o755)
        done, parts = 0, _split(samples, samples_per_shard, max_bytes)
        jobs = [(os.path.join(temporary, f"shard-{i:06d}.tar"), part) for i, part in enumerate(parts)]
        for packed in parallel(_write_shard, jobs, workers):
            done += packed
            if progress:
                progress(done, len(samples))
        if classes is not None:
            with open(os.path.join(temporary, "classes.json"), "w", encoding="utf-8") as file:
                json.dump(classes, file, indent=1)
        index(temporary, index_dir, workers)
        os.rename(temporary, out)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):  # mostly: the disk is full
            raise UserError(f"{out}: cannot be written ({error.strerror}); nothing was kept") from error
        raise
    return open_index(out, index_dir)


def verify(
    shards: Shards,
    index_dir: str | None = None,
    *,
    decode: bool = False,
    workers: int = 1,
    progress: Progress | None = None,
) -> list[Problem]:
    """Read shards anew, every byte of every sample, and compare them with their index; all that is wrong.

    decode: decode every image as well. progress: called with (shards done, shards). Raises UserError if there is no
    index.
    """
    index_dir, _, chosen, unknown, gone = match(shards, index_dir)
    problems = [Problem(path, "", "is not in the index; run fdscale shards index") for path in unknown]
    problems += [Problem(path, "", "is in the index, but gone") for path in gone]
    jobs = [(path, entry, index_dir, decode) for path, entry in chosen]
    for done, found in enumerate(parallel(_verify_shard, jobs, workers), 1):
        problems += found
        if progress:
            progress(done, len(jobs))
    return problems


def _verify_shard(job: tuple[str, Entry, str, bool]) -> list[Problem]:
    path, entry, index_dir, decode = job
    scanned, problems = scan_file(path, entry.name)
    if scanned is None:
        return problems
    layout, stat = scanned
    indexed = load_sidecar(os.path.join(index_dir, entry.sidecar))
    if indexed is None or layout_hash(indexed) != entry.layout:
        problems.append(Problem(entry.name, "", f"its index file {entry.sidecar} is missing or damaged; index it anew"))
    if (stat.st_size, layout_hash(layout)) != (entry.bytes, entry.layout):
        reason = f"changed since it was indexed ({stat.st_size} bytes, {entry.bytes} in the index); index it anew"
        problems.append(Problem(entry.name, "", reason))
    with open(path, "rb") as file:
        return problems + list(_check_members(file, layout, entry.name, decode))


def _check_members(file: io.BufferedReader, layout: Layout, shard: str, decode: bool) -> Iterator[Problem]:
    if decode:
        from fdscale.data.decode import decode as decode_image  # imports torch, which the rest does not need
    names = [name.decode() for name in layout.extensions.tolist()]
    starts, offsets, sizes = layout.starts.tolist(), layout.offsets.tolist(), layout.sizes.tolist()
    for i, raw_key in enumerate(layout.keys.tolist()):
        key = raw_key.decode()
        for j in range(starts[i], starts[i + 1]):
            name = names[layout.kinds[j]]
            try:
                file.seek(offsets[j])
                data = file.read(sizes[j])
                if len(data) < sizes[j]:
                    yield Problem(shard, key, f".{name} is cut short ({len(data)} of {sizes[j]} bytes)")
                elif decode and name in IMAGE_EXTENSIONS:
                    decode_image(data)
            except OSError as error:
                yield Problem(shard, key, f".{name} cannot be read ({error.strerror})")
            except UserError as error:
                yield Problem(shard, key, str(error))


def _from_folder(root: str) -> tuple[list[Source], list[str] | None]:
    entries = sorted((e for e in os.scandir(root) if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if not entry.is_dir()]
    if folders and files:
        raise UserError(
            f"{root}: holds folders ({folders[0]}, ...) and files ({files[0]}, ...); expected one folder per class, or "
            "images alone"
        )
    found: list[tuple[str, int | None]] = [(name, None) for name in files]
    for cls, folder in enumerate(folders):
        inside = sorted(_walk(root, folder))
        if not inside:
            raise UserError(f"{os.path.join(root, folder)}: this class holds no images; remove the folder")
        found += [(name, cls) for name in inside]
    if not found:
        raise UserError(f"{root}: no images there; expected one folder per class, or image files")
    keys = _keys([name for name, _ in found])
    rows = [(os.path.join(root, name), key, cls, "") for (name, cls), key in zip(found, keys, strict=True)]
    return _sources(rows), folders or None


def _walk(root: str, folder: str) -> Iterator[str]:
    for where, subfolders, files in os.walk(os.path.join(root, folder)):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(where, name), root)


def _from_table(path: str) -> tuple[list[Source], list[str] | None]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: neither a folder nor a table that can be read ({error})") from None
    if "path" not in columns or {"label", "cls"} <= set(columns):
        raise UserError(
            f'{path}: the first line names the columns {columns}; expected "path", at most one of "label" and "cls", '
            'and optionally "key"'
        )
    if not rows:
        raise UserError(f"{path}: lists no images")
    for line, row in rows:
        if None in row or None in row.values() or not row["path"]:
            raise UserError(f"{path}, line {line}: expected {len(columns)} columns ({', '.join(columns)}) and a path")
    classes = sorted({row["label"] for _, row in rows}) if "label" in columns else None
    numbers: Sequence[int | None] = [None] * len(rows)
    if classes is not None:
        number_of = {name: i for i, name in enumerate(classes)}
        numbers = [number_of[row["label"]] for _, row in rows]
    elif "cls" in columns:
        numbers = [_class_number(row["cls"], path, line) for line, row in rows]
    keys = _given_keys(path, rows) if "key" in columns else _keys([row["path"] for _, row in rows])
    folder = os.path.dirname(os.path.abspath(path))
    listed = zip(rows, keys, numbers, strict=True)
    found: list[tuple[str, str, int | None, str]] = [
        (os.path.join(folder, row["path"]), key, cls, f"{path}, line {line}: ") for (line, row), key, cls in listed
    ]
    return _sources(found), classes


def _class_number(text: str, path: str, line: int) -> int:
    if not text.strip().isdecimal():
        raise UserError(f'{path}, line {line}: cls is "{text}", expected a whole number (names: use a column "label")')
    return int(text)


def _given_keys(path: str, rows: list[tuple[int, dict[str, str]]]) -> list[str]:
    lines: dict[str, int] = {}
    for line, row in rows:
        key = row["key"]
        parts = PurePosixPath(key).parts
        if split_name(f"{key}.jpg") != (key, "jpg") or ".." in parts or "/" in (key[:1], key[-1:]) or "\n" in key:
            raise UserError(f'{path}, line {line}: unusable key "{key}"; expected a relative path without dots')
        if key in lines:
            raise UserError(f'{path}: lines {lines[key]} and {line} have the same key "{key}"; keys must differ')
        lines[key] = line
    return list(lines)


def _keys(paths: list[str]) -> list[str]:
    """A key of its own for every path: without extension, further dots in the last part turned to "_"."""
    keys, used = [], set()
    for path in paths:
        parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
        stem = os.path.splitext(parts[-1])[0].replace(".", "_")
        folder = "/".join(parts[:-1])
        if folder.startswith("__"):  # WebDataset skips folders such as __meta__
            folder = "_" + folder.lstrip("_")
        key = base = f"{folder}/{stem}" if folder else stem
        count = 1
        while key in used:
            count += 1
            key = f"{base}-{count}"
        used.add(key)
        keys.append(key)
    return keys


def _sources(rows: list[tuple[str, str, int | None, str]]) -> list[Source]:
    """Sources of (path, key, class, where it was listed), each file checked."""
    sources, wrong = [], []
    for path, key, cls, where in rows:
        extension = os.path.splitext(path)[1][1:].lower()
        try:
            size = os.stat(path).st_size
        except OSError as error:
            wrong.append(f"{where}{path}: {error.strerror}")
            continue
        if extension not in IMAGE_EXTENSIONS:
            wrong.append(f'{where}{path}: unknown extension "{extension}" (known: {", ".join(IMAGE_EXTENSIONS)})')
        elif size == 0:
            wrong.append(f"{where}{path}: is empty")
        sources.append(Source(path, key, extension, size, cls))
    if wrong:
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        listed = "\n  ".join(wrong[:10])
        raise UserError(f"{len(wrong)} files cannot be packed; repair or remove them:\n  {listed}{more}")
    return sources


def _split(samples: list[Source], samples_per_shard: int | None, max_bytes: int | None) -> list[list[Source]]:
    if samples_per_shard is not None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard is {samples_per_shard}, expected at least 1")
        return [samples[i : i + samples_per_shard] for i in range(0, len(samples), samples_per_shard)]
    parts: list[list[Source]] = []
    filled, limit = 0, max_bytes or MAX_BYTES
    for sample in samples:
        size = BLOCK + -(-sample.size // BLOCK) * BLOCK + (0 if sample.cls is None else 2 * BLOCK)
        if not parts or filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(sample)
        filled += size
    return parts


def _write_shard(job: tuple[str, list[Source]]) -> int:
    """Write one shard; how many samples it holds."""
    path, samples = job
    # This format writes a plain ustar header wherever the name fits one, and a pax header before it where not.
    with open(path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            try:
                with open(sample.path, "rb") as image:
                    members = {sample.extension: image.read()}
            except OSError as error:
                raise UserError(f"{sample.path}: cannot be read ({error.strerror})") from None
            if sample.cls is not None:
                members["cls"] = str(sample.cls).encode()
            for extension in sorted(members):  # webdataset.TarWriter's order
                info = tarfile.TarInfo(f"{sample.key}.{extension}")
                info.size = len(members[extension])
                tar.addfile(info, io.BytesIO(members[extension]))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    return len(samples)
