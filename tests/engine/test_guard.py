"""The guard's judgement of a series of losses, against what is expected by hand; and its detours."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fdscale import UserError, keys
from fdscale.engine.guard import Detours, Guard, Trouble

SETTINGS = keys.Guard(spike=3.0, spike_steps=2, window=4, skips=2)


def judged(guard: Guard, *losses: float) -> Trouble | None:
    for loss in losses:
        guard.judge(loss, math.isfinite(loss))
    return guard.trouble


def test_spikes_in_a_row_and_only_those() -> None:
    guard = Guard(SETTINGS, 8)
    assert judged(guard, 1, 9, 9, 1) is None  # no window yet: 9 is as usual as 1
    guard.restart(0, 0, {})
    assert judged(guard, 1, 1, 1, 1, 9, 1, 9) is None
    trouble = judged(guard, 9)
    assert trouble is not None
    assert trouble[:3] == (7, 8, 64)
    assert "median of 1" in trouble.why


def test_spikes_do_not_become_usual() -> None:
    guard = Guard(keys.Guard(spike=3.0, spike_steps=9, window=4), 8)
    assert judged(guard, 1, 1, 1, 1, *[9] * 8) is None
    assert judged(guard, 9) == guard.trouble
    assert guard.trouble is not None


def test_skips_in_a_row_are_counted_exactly() -> None:
    guard = Guard(SETTINGS, 8)
    assert judged(guard, 1, math.nan, math.inf, 1, math.nan, math.nan) is None
    assert (guard.skipped, guard.calm) == (4, False)
    trouble = judged(guard, math.nan)
    assert trouble is not None
    assert trouble[:3] == (5, 7, 56)


@pytest.mark.parametrize("cut", range(9))
def test_resumed_it_decides_the_same(cut: int) -> None:
    losses = [1, 1, 1, 2, math.nan, 1, 9, 9, 1]
    whole, before, after = (Guard(SETTINGS, 8) for _ in range(3))
    judged(whole, *losses)
    judged(before, *losses[:cut])
    if before.trouble is None:
        after.restart(cut, 8 * cut, json.loads(json.dumps(before.state())))
        assert judged(after, *losses[cut:]) == whole.trouble
        assert after.state() == whole.state()


def test_detours_are_kept_and_the_last_one_holds(tmp_path: Path) -> None:
    detours = Detours(tmp_path)
    assert detours.beyond(4, 32) == 32
    assert not detours.abandoned(6, 48, 8)
    detours.add(Trouble(5, 7, 56, "why"), 4, 32, write=True)
    detours.add(Trouble(5, 9, 96, "why"), 4, 32, write=True)
    again = Detours(tmp_path)
    assert again.taken == detours.taken
    assert (again.beyond(4, 32), again.beyond(4, 40), again.beyond(5, 40)) == (96, 40, 40)
    assert again.abandoned(6, 72, 8)  # of the first detour
    assert not again.abandoned(6, 112, 8)
    assert not again.abandoned(4, 32, 8)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"back_to": 1}]', '[{"back_to": "x", "at": 1, "to": 2}]', "null"])
def test_broken_notes_are_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(UserError, match=r"rollbacks\.json"):
        Detours(tmp_path)
