"""What accumulating gradients over micro-batches costs in communication, by ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import told_by

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_stages_0_and_1_reduce_once_a_step_and_2_and_3_in_every_micro_batch() -> None:
    (told,) = told_by(HERE / "traffic.py", ranks=2)
    sent, gradients = told["sent"], told["gradients"]

    def reduced(stage: int, micros: int) -> int:
        of = sent[f"{stage} {micros}"]
        return sum(of.get(kind, [0, 0])[1] for kind in ("all-reduce", "reduce-scatter"))

    for stage in (0, 1, 2, 3):
        assert reduced(stage, 1) == pytest.approx(gradients, rel=0.05)
    for stage, times in ((0, 1), (1, 1), (2, 4), (3, 4)):
        assert reduced(stage, 4) == pytest.approx(times * gradients, rel=0.05), (stage, sent)
    assert sent["1 4"]["all-gather"] == sent["1 1"]["all-gather"]
