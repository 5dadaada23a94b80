"""Why a trial failed, and why none is begun, as a person reads it."""

from __future__ import annotations

import pytest

from fdscale import UserError, config
from fdscale.tune import app, trial

HINT = "name one of them with --set teacher.source=..."


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (f"fdscale: {'/long/path' * 40}: {HINT}", f"fdscale: {'/long/path' * 40}: {HINT}"),
        ("RuntimeError: Error(s) in loading X:\n\tMissing a.b", "RuntimeError: Error(s) in loading X: Missing a.b"),
        (f"[rank1]: ValueError: {'x' * 9000}{HINT}", HINT),
        ("only what a library prints", ""),
    ],
)
def test_a_reason_keeps_its_meaning(said: str, expected: str) -> None:
    found = trial._why(f"loading\n{said}\n  then a line of torchrun\n")
    assert len(found) < 1100
    assert found.endswith(expected)
    assert not expected or found.startswith(said[:200].split("\n")[0])


def test_the_table_tells_the_whole_reason() -> None:
    why = f"fdscale: {'a|b' * 120}: {HINT}"
    row = {
        "ds": "none", "micro_batch": 1, "checkpoint": ["none"], "attention_chunk": [0], "state": "failed", "why": why,
        "planned_s": None, "planned_gib": None,
    }  # fmt: skip
    table = app._table([row], None, app._choice(row))
    assert f"failed: {why.replace('|', chr(92) + '|')} |" in table


@pytest.mark.parametrize("recipe", ["upernet_vit_base", "mask_rcnn_vit_base"])
def test_masks_and_objects_are_asked_for_before_a_trial(recipe: str) -> None:
    with pytest.raises(UserError, match=r"are not made up; give some with --set data\.shards="):
        app._check_sources(config.load(recipe))
