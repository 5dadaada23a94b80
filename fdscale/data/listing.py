"""What to pack into shards: a folder of images, a table that lists them, or a data set in Hugging Face's layout.

    photos/dog/1.jpg ...                 one folder per class, or images alone
    list.csv, list.tsv, list.jsonl       a column of paths, relative to the table, and optionally labels and keys
    *.parquet                            the same, or the bytes of the images, or Hugging Face's {bytes, path}
    train/ test/ ...                     splits, each of which is any of these; metadata.csv or .jsonl is its table
    images/ annotations/                 images and masks, see pairs.py
    annotations/instances_*.json ...     images and objects, see coco.py

Rows go into a file as they are found, so that millions of them need little memory: about 110 bytes each, mostly for
telling keys apart.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from fdscale import UserError
from fdscale.data.tables import read_csv, read_jsonl
from fdscale.data.tar import IMAGE_EXTENSIONS, MOST_NAME, split_name

MOST_TOLD = 10  # wrong rows spelled out in one error
MOST_IMAGE_BYTES = 2**30  # of an image file
PATH_COLUMNS = ("path", "file_name")
IMAGE_COLUMNS = ("image", "img", "jpg", "bytes")  # of Parquet: Hugging Face's usual names
SPLITS = re.compile(r"(train|test|val|valid|validation|dev|eval|training|testing|evaluation)([-_.\d].*)?")


class Row(NamedTuple):
    """A sample to pack: where its image lies. offset -1: `path` is the image file; else `size` bytes in it from there.

    where: for messages, which row of which table it is. mask: the PNG with the classes of its pixels, whose numbers are
    at most `most`; objects: what is on it, see `coco`; "": it has none.
    """

    key: str
    path: str
    offset: int
    size: int
    extension: str
    cls: int | None
    where: str
    mask: str = ""
    most: int = 0
    objects: str = ""


class Columns(NamedTuple):
    """Names of a table's columns; None: found by their usual names. label "none": leave labels out, a folder's too."""

    image: str | None = None
    label: str | None = None
    key: str | None = None


class Listing:
    """Rows, written to a file one after another and then read by number.

    classes: names of the classes by number, None if they have none. Labels that are names are numbered in the order of
    the names, or of the numbers if all names are such, once all rows are there.
    """

    def __init__(self, path: str) -> None:
        self._file: BinaryIO = open(path, "wb+")  # noqa: SIM115 - closed by close()
        self._at = array("Q")
        self._end = 0
        self._names: dict[str, int] = {}  # label -> number in the order of first sight
        self._keys: set[int] = set()
        self._kinds: set[type] = set()
        self._wrong: list[str] = []
        self._wrong_count = 0
        self.classes: list[str] | None = None
        self.categories: list[Any] | None = None  # the numbers that others have for the classes
        self._ranks: list[int] | None = None
        self.folder = os.path.dirname(path)  # where images that come out of Parquet may be kept

    def __len__(self) -> int:
        return len(self._at)

    def add(
        self,
        path: str,
        label: str | int | None,
        where: str = "",
        key: str | None = None,
        name: str = "",
        mask: str = "",
        most: int = 0,
        objects: str = "",
    ) -> None:
        """Add an image file. label: a name, or a number. key: None for one made from `name`, the path by default. mask,
        most, objects: see Row."""
        extension = os.path.splitext(path)[1][1:].lower()
        try:
            size = os.stat(path).st_size
        except (OSError, ValueError) as error:
            self.refuse(f"{where}{path}: {getattr(error, 'strerror', None) or error}")
            return
        if extension not in IMAGE_EXTENSIONS:
            self.refuse(f'{where}{path}: unknown extension "{extension}" (known: {", ".join(IMAGE_EXTENSIONS)})')
        elif size == 0:
            self.refuse(f"{where}{path}: is empty")
        elif size > MOST_IMAGE_BYTES:
            self.refuse(f"{where}{path}: has {size} bytes, more than the {MOST_IMAGE_BYTES} that an image may have")
        else:
            self.append(Row("", path, -1, size, extension, None, where, mask, most, objects), label, key, name or path)

    def append(self, row: Row, label: str | int | None, key: str | None, name: str) -> None:
        """Add a row whose image is known to be there; its key and class are filled in."""
        if key is not None:
            if not _usable(key):
                raise UserError(f'{row.where}unusable key "{key}"; expected a relative path without dots')
            if not self._take(key) and (first := self._where(key)) is not None:
                raise UserError(f'{row.where}has the same key "{key}" as {first or "another"}; keys must differ')
        number = label
        if isinstance(label, str):
            number = self._names.setdefault(label, len(self._names))
        self._kinds.add(type(label))
        if len(self._kinds) > 1:
            raise UserError(f"{row.where}the labels are of several kinds: names, numbers or none; expected one kind")
        key = self._key_of(name) if key is None else key
        self._at.append(self._end)
        self._end += self._file.write(json.dumps([key, *row[1:5], number, *row[6:]]).encode() + b"\n")

    def give_classes(self, names: list[str], where: str) -> None:
        """Say what the classes are called whose numbers the labels are. Raises UserError if it was said otherwise."""
        if self.classes not in (None, names):
            raise UserError(f"{where}: names other classes than the files before it; pack them apart")
        self.classes = names

    def refuse(self, reason: str) -> None:
        """Note that an image cannot be packed; `finish` raises."""
        self._wrong_count += 1
        if len(self._wrong) < MOST_TOLD:
            self._wrong.append(reason)

    def finish(self, nothing: str) -> None:
        """Number the classes. Raises UserError if rows were refused, or there are none (saying `nothing`)."""
        if self._wrong:
            more = f"\n  and {self._wrong_count - MOST_TOLD} more" if self._wrong_count > MOST_TOLD else ""
            listed = "\n  ".join(self._wrong)
            raise UserError(f"{self._wrong_count} files cannot be packed; repair or remove them:\n  {listed}{more}")
        if not self._at:
            raise UserError(nothing)
        if self._names:
            self.classes = in_order(self._names)
            self._ranks = [0] * len(self.classes)
            for rank, label in enumerate(self.classes):
                self._ranks[self._names[label]] = rank
        self._keys.clear()

    def row(self, number: int) -> Row:
        """A row by its number."""
        self._file.seek(self._at[number])
        row = Row(*json.loads(self._file.readline()))
        return row if self._ranks is None or row.cls is None else row._replace(cls=self._ranks[row.cls])

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _take(self, key: str) -> bool:
        digest = int.from_bytes(
            hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
        )
        if digest in self._keys:
            return False
        self._keys.add(digest)
        return True

    def _where(self, key: str) -> str | None:
        """Where a key stands already; None if it does not (then only its hash was met before)."""
        rows = (self.row(number) for number in range(len(self)))
        found = next((row.where.rstrip(": ") for row in rows if row.key == key), None)
        self._file.seek(self._end)  # to go on writing
        return found

    def _key_of(self, path: str) -> str:
        """A key of its own: the path without extension, further dots in the last part turned to "_"."""
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        stem = os.path.splitext(parts[-1])[0].replace(".", "_")
        folder = "/".join(parts[:-1])
        if folder.startswith("__"):  # WebDataset skips folders such as __meta__
            folder = "_" + folder.lstrip("_")
        key = base = f"{folder}/{stem}" if folder else stem
        count = 1
        while not self._take(key):
            count += 1
            key = f"{base}-{count}"
        return key


def in_order(names: Iterable[str]) -> list[str]:
    """Classes as they are numbered: by name, or by number where all names are such, as ImageNet-V2's: 2 before 10."""
    known = list(names)
    numbers = all(name.isdecimal() for name in known)
    return sorted(known, key=lambda name: (int(name) if numbers else 0, name))


def _usable(key: str) -> bool:
    return (
        split_name(f"{key}.jpg") == (key, "jpg")
        and not {".", "..", ""} & set(key.split("/"))
        and "\n" not in key
        and len(key) < MOST_NAME // 2
    )


def find(source: str, split: str | None, columns: Columns, listing: Listing, workers: int = 1) -> None:
    """List all that is to be packed of a source, see the top of this file.

    Raises UserError if there is nothing, if something listed is missing, empty or of an unknown kind, or if it is not
    clear what is meant.
    """
    from fdscale.data import coco, pairs, parquet

    nothing = f"{source}: no images there; expected one folder per class, or image files"
    if not os.path.isdir(source):
        if split is not None:
            raise UserError(f"{source}: is no folder, so it has no split {split}; leave --split out")
        if source.endswith(".parquet"):
            parquet.list_images([source], columns, listing, workers)
        else:
            _from_table(source, columns, listing)
        listing.finish(f"{source}: lists no images")
        return
    if pairs.has_masks(source):
        _no_columns(source, columns, "masks", ("image", "label", "key"))
        pairs.list_pairs(source, split, listing)
        listing.finish(nothing)
        return
    if coco.splits_of(source):
        _no_columns(source, columns, "objects", ("image", "label", "key"))
        coco.list_objects(source, split, listing)
        listing.finish(nothing)
        return
    folder, prefix, files = _split_of(source, split)
    table = next(iter(_tables_in(folder)), None)
    if files:
        parquet.list_images(files, columns, listing, workers)
    elif table and table.endswith(".parquet"):
        parquet.list_images([table], columns, listing, workers, prefix)
    elif table:
        _from_table(table, columns, listing, prefix)
    else:
        _no_columns(source, columns, "images", ("image", "key") if columns.label == "none" else columns._fields)
        _from_folder(folder, listing, columns.label is None)
    listing.finish(nothing)


def _no_columns(source: str, columns: Columns, of: str, names: Iterable[str]) -> None:
    """Raises UserError where a column is named of what is no table."""
    given = [f"--{name} {value}" for name in names if (value := getattr(columns, name)) is not None]
    if given:
        raise UserError(
            f"{source}: is a folder of {of} and no table, so {' and '.join(given)} has no column to name; leave it out"
        )


def _split_of(source: str, split: str | None) -> tuple[str, str, list[str]]:
    """(folder, beginning of the paths in its table, Parquet files to take instead) of a split."""
    files: list[str] = []
    for folder in (source, os.path.join(source, "data")):
        if os.path.isdir(folder):
            files += sorted(entry.path for entry in os.scandir(folder) if entry.name.endswith(".parquet"))
    files = [path for path in files if os.path.basename(path) != "metadata.parquet"]
    splits = {_split_name(path) for path in files}
    folders = sorted(entry.name for entry in os.scandir(source) if entry.is_dir() and not entry.name.startswith("."))
    if files:
        if split is None and len(splits) > 1:
            raise UserError(f"{source}: holds several splits ({', '.join(sorted(splits))}); choose one with --split")
        chosen = [path for path in files if split in (None, _split_name(path))]
        if not chosen:
            raise UserError(f"{source}: has no split {split} (found: {', '.join(sorted(splits))})")
        return source, "", chosen
    if split is None:
        parts = [name for name in folders if SPLITS.fullmatch(name)]
        if parts and len(parts) == len(folders) and not _tables_in(source):
            raise UserError(
                f"{source}: holds splits ({', '.join(parts)}), not classes; choose one with --split {parts[0]}, or "
                "name the folder above the classes itself"
            )
        return source, "", []
    for base in (source, os.path.join(source, "data")):
        folder = os.path.join(base, split)
        if os.path.isdir(folder):
            inside = sorted(entry.path for entry in os.scandir(folder) if entry.name.endswith(".parquet"))
            inside = [path for path in inside if os.path.basename(path) != "metadata.parquet"]
            listed_above = _tables_in(base) and not _tables_in(folder) and not inside
            return (base, f"{split}/", []) if listed_above else (folder, "", inside)
    raise UserError(f"{source}: has no split {split} (folders: {', '.join(folders) or 'none'})")


def _tables_in(folder: str) -> list[str]:
    tables = [os.path.join(folder, f"metadata.{kind}") for kind in ("csv", "jsonl", "parquet")]
    return [path for path in tables if os.path.isfile(path)]


def _split_name(path: str) -> str:
    """train of train-00000-of-00005.parquet, and of train.parquet."""
    return re.sub(r"(-\d+-of-\d+.*)?\.parquet$", "", os.path.basename(path))


def _from_folder(root: str, listing: Listing, labels: bool = True) -> None:
    entries = sorted((e for e in os.scandir(root) if not e.name.startswith(".")), key=lambda e: e.name)
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if not entry.is_dir()]
    if folders and files:
        raise UserError(
            f"{root}: holds folders ({folders[0]}, ...) and files ({files[0]}, ...); expected one folder per class, or "
            "images alone"
        )
    for name in files:
        listing.add(os.path.join(root, name), None, name=name)
    for folder in folders:
        inside = sorted(_walk(root, folder))
        if not inside:
            raise UserError(f"{os.path.join(root, folder)}: this class holds no images; remove the folder")
        for name in inside:
            listing.add(os.path.join(root, name), folder if labels else None, name=name)


def _walk(root: str, folder: str) -> Iterator[str]:
    for where, subfolders, files in os.walk(os.path.join(root, folder)):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(where, name), root)


def _from_table(path: str, columns: Columns, listing: Listing, prefix: str = "") -> None:
    read = read_jsonl if path.endswith(".jsonl") else read_csv
    try:
        names, rows = read(path)
        list_paths(path, names, rows, columns, listing, prefix)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: neither a folder nor a table that can be read ({error})") from None


def list_paths(
    path: str,
    names: list[str],
    rows: Iterable[tuple[int, dict[str, Any]]],
    columns: Columns,
    listing: Listing,
    prefix: str = "",
) -> None:
    """List the image files of a table's rows, (line, {column: value}). prefix: leave out paths that begin otherwise."""
    image = columns.image or next((name for name in PATH_COLUMNS if name in names), None)
    label = label_column(path, names, columns)
    key = columns.key or ("key" if "key" in names else None)
    wanted = [name for name in (image, label, key) if name]
    if image is None or not set(wanted) <= set(names):
        raise UserError(
            f'{path}: has the columns {names}; expected "path" or "file_name" (or --image COLUMN), at most one of '
            '"label" and "cls" (or --label COLUMN), and optionally "key"'
        )
    folder = os.path.dirname(os.path.abspath(path))
    for line, row in rows:
        where = f"{path}, line {line}: "
        if None in row or any(row.get(name) is None or (row[name] == "" and name != key) for name in wanted):
            filled = " and ".join(wanted)
            raise UserError(f"{where}expected {len(names)} columns ({', '.join(names)}), with {filled} filled in")
        if not isinstance(row[image], str):
            raise UserError(f"{where}{image} is no path")
        if row[image].startswith(prefix):
            value = None if label is None else class_of(row[label], label, where)
            listing.add(os.path.join(folder, row[image]), value, where, str(row[key]) if key else None, row[image])


def label_column(path: str, names: list[str], columns: Columns) -> str | None:
    """The column that holds labels. Raises UserError if two could be meant."""
    if columns.label is not None:
        return None if columns.label == "none" else columns.label
    if {"label", "cls"} <= set(names):
        raise UserError(
            f'{path}: has the columns {names}; expected at most one of "label" and "cls", or --label COLUMN'
        )
    return next((name for name in ("label", "cls") if name in names), None)


def class_of(value: Any, column: str, where: str) -> str | int:
    """A label as it is: a number where it is one or the column is called "cls", a name otherwise."""
    if isinstance(value, str) and column != "cls":
        return value
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UserError(
        f'{where}{column} is "{value}", expected a whole number (names: use a column "label"; to leave labels out: '
        "--label none)"
    )
