from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdscale import durable


def _parts(fails: bool) -> Iterator[bytes]:
    yield b"new"
    if fails:
        raise RuntimeError("no more")
    yield b"er"


def test_what_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    durable.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        durable.write_atomically(path, "\udcff")
    with pytest.raises(RuntimeError):
        durable.write_atomically(path, _parts(fails=True))
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        durable.write_atomically(tmp_path / "folder", "new")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "record.json"]
    assert path.read_text() == "old"
    durable.write_atomically(path, _parts(fails=False))
    assert path.read_bytes() == b"newer"
    durable.write_atomically(tmp_path / ("é" * 127), "a name as long as they may be")


def test_json_holds_no_number_that_others_cannot_read() -> None:
    value = {"loss": [1.5, math.inf, (-math.inf, math.nan)], "count": 3, "name": None, "on": True}
    assert json.loads(durable.as_json(value), parse_constant=pytest.fail) == {
        "loss": [1.5, None, [None, None]], "count": 3, "name": None, "on": True
    }  # fmt: skip


def test_a_file_is_wanted_where_one_can_be(tmp_path: Path) -> None:
    durable.must_be_writable(tmp_path / "new/folder/report.json")
    assert (tmp_path / "new/folder").is_dir()
    with pytest.raises(durable.UserError, match="expected a file in a folder"):
        durable.must_be_writable(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(durable.UserError, match="name another file"):
        durable.must_be_writable(tmp_path / "file/report.json")
