"""Tables as files: the names of their columns, and their rows with line numbers, read as they are asked for."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any, TextIO

from fdscale import UserError

MOST_LINE = 2**24  # bytes of a line of .jsonl

Table = tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]


def read_csv(path: str) -> Table:
    """Columns by commas, or in .tsv by tabs; the first line names them."""

    def lines(file: TextIO) -> csv.DictReader[str]:
        return csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = lines(file)
            for row in reader:
                yield reader.line_num, row

    with open(path, encoding="utf-8-sig", newline="") as file:
        names = list(lines(file).fieldnames or [])
    return names, rows()


def read_jsonl(path: str) -> Table:
    """JSON, an object of columns a line; the first line names the columns. Raises UserError for a line that is none."""

    def rows() -> Iterator[tuple[int, dict[str, Any]]]:
        with open(path, "rb") as file:
            line = 0
            while text := file.readline(MOST_LINE):
                line += 1
                try:
                    row = json.loads(text) if text.strip() else None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}, line {line}: is no JSON ({error})") from None
                if row is not None and not isinstance(row, dict):
                    raise UserError(f"{path}, line {line}: expected an object of columns")
                if row:
                    yield line, row

    first = next(rows(), (0, {}))[1]
    return list(first), rows()
