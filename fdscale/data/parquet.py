"""Images listed or held by Parquet files, as Hugging Face's data sets come."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fdscale import UserError
from fdscale.data.listing import (
    IMAGE_COLUMNS,
    PATH_COLUMNS,
    Columns,
    Listing,
    Row,
    class_of,
    label_column,
    list_paths,
)
from fdscale.data.parallel import parallel
from fdscale.data.recode import extension_of
from fdscale.data.tar import IMAGE_EXTENSIONS

BATCH = 32  # rows read at a time


class _Plan(NamedTuple):
    """Which columns hold what."""

    image: str
    label: str | None
    key: str | None
    classes: list[str] | None


def list_images(paths: Sequence[str], columns: Columns, listing: Listing, workers: int, prefix: str = "") -> None:
    """List the images of Parquet files. Images inside are first copied into files in `listing.folder`.

    The image column holds paths, relative to the file, bytes, or structs of bytes and path. prefix: leave out paths
    that begin otherwise. Raises UserError for files that cannot be read or whose columns do not fit.
    """
    pq = _pyarrow()
    jobs = []
    for number, path in enumerate(paths):
        try:
            with pq.ParquetFile(path) as file:
                schema, groups = file.schema_arrow, file.metadata.num_row_groups
        except Exception as error:  # pyarrow raises its own on damage
            raise UserError(f"{path}: cannot be read as Parquet ({error})") from None
        plan = _plan(path, schema, columns)
        if _holds_paths(schema.field(plan.image).type):
            names = [name for name in (plan.image, plan.label, plan.key) if name]
            as_given = Columns(plan.image, plan.label or "none", plan.key)
            list_paths(path, names, _named(path, _rows(path, plan), plan), as_given, listing, prefix)
        else:
            jobs += [(path, number, group, plan, listing.folder) for group in range(groups)]
        if plan.classes is not None:
            listing.give_classes(plan.classes, path)
    starts: dict[str, int] = {}
    for (path, _, _, plan, _), (spool, rows) in zip(jobs, parallel(_copy_out, list(jobs), workers), strict=True):
        first = starts.get(path, 0)
        for i, (offset, size, extension, name, label, key) in enumerate(rows, first):
            where = f"{path}, row {i}: "
            if offset < 0:
                if os.path.isabs(name) or ".." in name.split("/"):  # of a data set that somebody else made
                    raise UserError(f"{where}names a file outside its folder ({name}); do not use this file")
                value = None if plan.label is None else _label(label, plan, where)
                listing.add(os.path.join(os.path.dirname(path), name), value, where, key, name)
                continue
            if extension not in IMAGE_EXTENSIONS:
                listing.refuse(f"{where}{'holds no image' if size == 0 else 'is of no known kind of image'}")
                continue
            value = None if plan.label is None else _label(label, plan, where)
            name = name or f"{os.path.basename(path)[: -len('.parquet')]}/{i:09d}"
            listing.append(Row("", spool, offset, size, extension, None, where), value, key, name)
        starts[path] = first + len(rows)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("reading Parquet needs pyarrow: pip install 'fdscale[parquet]'") from None
    return pq


def _plan(path: str, schema: Any, columns: Columns) -> _Plan:
    names = list(schema.names)
    image = columns.image or next((name for name in (*IMAGE_COLUMNS, *PATH_COLUMNS) if name in names), None)
    label = label_column(path, names, columns)
    key = columns.key or ("key" if "key" in names else None)
    missing = [name for name in (image, label, key) if name and name not in names]
    if image is None or missing:
        raise UserError(
            f"{path}: has the columns {names}; expected one of {', '.join((*IMAGE_COLUMNS, *PATH_COLUMNS))} (or "
            "--image COLUMN), and where they are named, the label and key columns"
        )
    kind = str(schema.field(image).type)
    if not (_holds_paths(schema.field(image).type) or "binary" in kind):
        raise UserError(f"{path}: column {image} is {kind}; expected paths, bytes, or structs of bytes and path")
    return _Plan(image, label, key, _class_names(schema, label))


def _holds_paths(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """The names of the classes, where Hugging Face's description of the columns gives them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
        return [str(name) for name in names] if isinstance(names, list) else None
    except (KeyError, TypeError, ValueError):
        return None


def _rows(path: str, plan: _Plan, groups: list[int] | None = None) -> Iterator[dict[str, Any]]:
    names = [name for name in (plan.image, plan.label, plan.key) if name]
    try:
        with _pyarrow().ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, row_groups=groups, columns=names, use_threads=False):
                yield from batch.to_pylist()
    except UserError:
        raise
    except Exception as error:  # pyarrow raises its own on damage
        raise UserError(f"{path}: cannot be read as Parquet ({error})") from None


def _named(path: str, rows: Iterator[dict[str, Any]], plan: _Plan) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, row in enumerate(rows):
        if plan.label is not None:
            row[plan.label] = _label(row[plan.label], plan, f"{path}, row {i}: ")
        yield i, row


def _label(value: Any, plan: _Plan, where: str) -> str | int:
    assert plan.label is not None
    label = class_of(value, plan.label, where)
    if plan.classes is not None and (not isinstance(label, int) or label >= len(plan.classes)):
        raise UserError(f'{where}{plan.label} is "{label}", expected the number of one of {len(plan.classes)} classes')
    return label


def _copy_out(job: tuple[str, int, int, _Plan, str]) -> tuple[str, list[tuple[int, int, str, str, Any, str | None]]]:
    """Copy the images of a row group into a file; its path and (offset, size, extension, name, label, key) of each."""
    path, number, group, plan, folder = job
    spool, at, found = os.path.join(folder, f"images-{number:05d}-{group:06d}"), 0, []
    with open(spool, "wb") as file:
        for row in _rows(path, plan, [group]):
            image = row[plan.image]
            name = ""
            if isinstance(image, dict):
                name, image = image.get("path") or "", image.get("bytes")
            label = row[plan.label] if plan.label else None
            key = str(row[plan.key]) if plan.key else None
            if image is None and name:  # the file beside the table
                found.append((-1, 0, "", name, label, key))
                continue
            image = image or b""
            file.write(image)
            found.append((at, len(image), extension_of(image), name, label, key))
            at += len(image)
    return spool, found
