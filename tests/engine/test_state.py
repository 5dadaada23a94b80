"""The state taken from an engine and put into a fresh one continues bitwise, under every ZeRO stage and precision.

One and two ranks; the gradient norms of all configurations are compared with float32 at stage 0 on one rank.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import told_by

from fdscale.engine.state import Buffers
from fdscale.phi_s import PhiS

HERE = Path(__file__).resolve().parent
CASES = [
    "zero0",
    "zero1",
    "zero2",
    "zero3",
    "zero1-bf16",
    "zero2-bf16",
    "zero3-bf16",
    "zero3-partitioned",
    "zero0-apex",
    "zero2-apex",
]


def results(ranks: int, *cases: str) -> list[dict]:
    return told_by(HERE / "stages.py", *cases, ranks=ranks)


@pytest.mark.slow
def test_state_moves_bitwise_under_every_stage() -> None:
    reference = None
    for ranks in (1, 2):
        found = results(ranks, *CASES)
        assert len(found) == ranks * len(CASES)
        for result in found:
            where = (ranks, result)
            assert result["losses"], where
            assert result["state"], where
            assert result["covered"], where
            assert result["saved"], where
            assert all(result["swapped"]), where
            assert result["average"] <= (2e-2 if "bf16" in result["case"] else 2e-6), where
            assert result["updates"] == 3, where
            reference = reference or result["norms"]
            tolerance = 2e-2 if "bf16" in result["case"] else 1e-5
            assert result["norms"] == pytest.approx(reference, rel=tolerance), where


@pytest.mark.slow
@pytest.mark.long
def test_state_moves_bitwise_with_the_optimizer_on_the_host() -> None:
    """DeepSpeed builds its CPU Adam at first use, which takes a minute or two."""
    for result in results(1, "zero3-bf16-offload", "zero3-bf16-offload-all"):
        assert_moved(result)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_second_partition_changes_nothing(ranks: int) -> None:
    """hpZ of ZeRO++, on one node of two ranks and on two, bitwise as ZeRO 3 without it."""
    found = results(ranks, "zero3-hpz2", "zero3-partitioned", "zero3-bf16-hpz2", "zero3-bf16")
    for result in found:
        assert_moved(result)
    for with_, without in (("zero3-hpz2", "zero3-partitioned"), ("zero3-bf16-hpz2", "zero3-bf16")):
        norms = {case: [result["norms"] for result in found if result["case"] == case] for case in (with_, without)}
        assert norms[with_] == norms[without]
        assert len(norms[with_]) == ranks


def assert_moved(result: dict) -> None:
    """State, losses and average are what they would be had nothing been taken out and put back."""
    assert result["losses"], result
    assert result["state"], result
    assert result["covered"], result
    assert result["saved"], result
    assert all(result["swapped"]), result
    assert result["updates"] == 3, result


@pytest.mark.parametrize("applied", [True, False, torch.tensor(True), torch.tensor(False)])
def test_buffers_follow_a_step_that_was_applied(applied: bool | torch.Tensor) -> None:
    """Those that are saved; one that is not is nobody's business, and what is constant is not copied."""
    norm, constant = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(1)
    constant.constant = True
    norm.register_buffer("beside", torch.zeros(1), persistent=False)
    buffers = Buffers(SimpleNamespace(module=torch.nn.Sequential(norm, constant)))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    buffers.keep()
    assert len(buffers._before) == 3
    norm(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    norm.beside += 1
    changed = {name: value.clone() for name, value in norm.named_buffers()}
    buffers.settle(applied)
    for name, value in norm.named_buffers():
        assert torch.equal(value, changed[name] if applied or name == "beside" else before[name])
        assert not torch.equal(changed[name], before[name])


def test_what_whitens_by_phi_s_is_constant() -> None:
    module = torch.nn.Sequential(PhiS(4))
    assert Buffers(SimpleNamespace(module=module))._now == []
    assert [*module.state_dict()]
