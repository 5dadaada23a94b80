"""Which rank is slow: named where it is, and nobody where ranks are alike."""

from __future__ import annotations

import pytest

from fdscale.engine.paces import LEAST, WINDOW, Paces, percentiles, slowest


def rows(*spans: tuple[float, float, float], steps: int = LEAST) -> list[dict]:
    """Of ranks that take so long in every step."""
    found = []
    for rank, one in enumerate(spans):
        paces = Paces()
        for _ in range(steps):
            paces.add(*one)
        found += [row | {"rank": rank} for row in paces.gather()]
    return found


def test_the_rank_that_others_wait_for() -> None:
    alike = (1.0, 0.001, 0.30)
    assert slowest(rows(alike, alike, alike)) is None
    assert slowest(rows(alike)) is None
    assert slowest(rows(alike, (1.0, 0.4, 0.30), alike, steps=LEAST - 1)) is None  # too early to tell
    late = slowest(rows(alike, (1.0, 0.4, 0.30), alike))
    assert late is not None
    assert (late.rank, late.what, late.seconds, late.usual) == (1, "data_wait_s", 0.4, 0.001)
    assert "rank 1" in str(late)
    assert "waits for data for 0.4 s" in str(late)
    hot = slowest(rows(alike, alike, (1.0, 0.001, 0.45)))
    assert hot is not None
    assert (hot.rank, hot.what) == (2, "inputs_s")


def test_of_two_the_slower() -> None:
    late = slowest(rows((1.0, 0.0, 0.5), (1.0, 0.0, 0.2)))
    assert late is not None
    assert (late.rank, late.usual) == (0, 0.2)


def test_what_is_small_against_a_step_is_nobodys_fault() -> None:
    assert slowest(rows((1.0, 0.001, 0.3), (1.0, 0.04, 0.3))) is None  # 40 times, but 4 % of a step
    assert slowest(rows((1.0, 0.0, 0.30), (1.0, 0.0, 0.35))) is None  # 5 % of a step, but 1.17 times


def test_percentiles_of_the_last_steps() -> None:
    assert percentiles(()) == [0, 0, 0]
    assert percentiles((2.0,)) == [2, 2, 2]
    assert percentiles(tuple(map(float, range(101)))) == [50, 95, 100]
    paces = Paces()
    for step in range(2 * WINDOW):
        paces.add(float(step), 0.0, 0.0)
    (row,) = paces.gather()
    assert row["steps"] == WINDOW
    assert row["step_s"][0] == pytest.approx(1.5 * WINDOW, abs=1)
