"""Rooms of starts that overtake each other: the later start keeps the folder, whoever comes to it first."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdscale.engine.room import Fenced, open_room


def test_an_earlier_start_that_comes_late_takes_nothing(tmp_path: Path) -> None:
    """It was stopped between becoming the owner and opening its room."""
    later = open_room(tmp_path, "000002-b")
    with pytest.raises(Fenced, match="another start has taken over"):
        open_room(tmp_path, "000001-c")
    assert [path.name for path in tmp_path.iterdir()] == [".writing-000002-b"]
    later.draft("step-00000001")
    later.commit("step-00000001")
    assert (tmp_path / "step-00000001").is_dir()


def test_a_later_start_takes_all(tmp_path: Path) -> None:
    """Also of one that was withdrawn, whose number it has, and of what is no room of a start."""
    earlier = open_room(tmp_path, "000001-c")
    earlier.draft("step-00000001")
    (tmp_path / ".writing-old").mkdir()
    (tmp_path / ".writing-000002-z").mkdir()
    open_room(tmp_path, "000002-b")
    assert [path.name for path in tmp_path.iterdir()] == [".writing-000002-b"]
    with pytest.raises(Fenced):
        earlier.commit("step-00000001")
