"""What is measured, and in which order: on costs that are known."""

from __future__ import annotations

from typing import Any

import pytest

from fdscale import UserError, config
from fdscale.plan.machines import machine
from fdscale.tune import space
from fdscale.tune.space import Candidate, Choice

SETTINGS = ("optim.batch_size=64", "memory.micro_batch=4")


def seconds(choice: Choice) -> float:
    """A valley: the best is micro-batch 16 of ds_config b, without checkpointing."""
    away = abs(choice.micro_batch.bit_length() - 5)
    return 1 + 0.3 * away + 0.5 * (choice.ds != "b") + 0.4 * sum(kind != "none" for kind in choice.checkpoint)


def walked(candidates: list[Candidate], trials: int, most: int = 64) -> dict[Choice, dict[str, Any]]:
    """All that was measured; micro-batches above `most` run out of memory unless blocks are checkpointed."""
    done: dict[Choice, dict[str, Any]] = {}
    while len(done) < trials and (one := space.following(candidates, done)):
        full = one.choice.micro_batch > most and "none" in one.choice.checkpoint
        assert one.choice not in done
        done[one.choice] = {"state": "out of memory"} if full else {"state": "done", "step_s": seconds(one.choice)}
    return done


def grid() -> list[Candidate]:
    found = space.choices(config.load("demo", SETTINGS), ["a", "b"], 1, (2, 2, 6, 2))
    return space.planned(found, config.load("demo", SETTINGS), {}, 1, None)


def test_all_choices_are_there_once_and_the_recipes_own_is_first() -> None:
    found = [one.choice for one in grid()]
    assert found[0] == Choice("a", 4, ("none",), (0,))
    assert len(found) == len(set(found)) == 2 * 7 * 3
    assert {one.micro_batch for one in found} == {1, 2, 4, 8, 16, 32, 64}
    assert {one.checkpoint for one in found} == {("none",), ("torch",), ("none", "none", "torch", "none")}


def test_pairs_stay_together_and_ranks_share_the_batch() -> None:
    settings = config.load("demo_finetune", [*SETTINGS, "student.weights=x"])
    assert {one.micro_batch for one in space.choices(settings, ["a"], 4, (2, 2))} == {2, 4, 8, 16}
    with pytest.raises(UserError, match="64 cannot be shared among 3 ranks"):
        space.choices(settings, ["a"], 3, (2, 2))


def test_the_best_is_found_without_measuring_all() -> None:
    done = walked(grid(), 20)
    timed = {choice: record["step_s"] for choice, record in done.items()}
    assert min(timed, key=timed.__getitem__) == Choice("b", 16, ("none",), (0,))


def test_what_ran_out_of_memory_rules_out_more_of_the_same() -> None:
    done = walked(grid(), 1000, most=8)
    full = [choice for choice, record in done.items() if record["state"] == "out of memory"]
    assert full
    assert not any(
        one != other and one == other._replace(micro_batch=one.micro_batch) and one.micro_batch > other.micro_batch
        for one in full
        for other in full[: full.index(one)]
    )
    timed = {choice: record["step_s"] for choice, record in done.items() if record["state"] == "done"}
    assert min(timed, key=timed.__getitem__) == Choice("b", 8, ("none",), (0,))


@pytest.mark.slow
def test_the_plan_leaves_out_what_cannot_fit_and_sorts_the_rest() -> None:
    from fdscale.plan import search

    settings = config.load("swinv2_g", ["schedule.epochs=null", "schedule.steps=1000", "schedule.warmup_epochs=null"])
    found = space.choices(settings, ["ds_configs/zero1.json", "ds_configs/zero3.json"], 64, (2, 2, 42, 4))
    candidates = space.planned(found, settings, search.shipped(), 64, machine("a100-40g", None, 8))
    assert candidates[0].choice == found[0]
    assert 10 < len(candidates) < len(found)
    times = [one.planned_s for one in candidates[1:]]
    assert times == sorted(times)
    assert all(one.planned_gib < 1.1 * 39.4 for one in candidates[1:])
    assert not [one for one in candidates[1:] if one.choice == Choice("ds_configs/zero1.json", 32, ("none",), (0,))]
