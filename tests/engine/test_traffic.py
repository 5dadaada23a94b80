"""What accumulating gradients over micro-batches costs in communication, by ZeRO stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, outside

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_stages_0_and_1_reduce_once_a_step_and_2_and_3_in_every_micro_batch() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**outside(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, *launcher, str(HERE / "traffic.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"sent"'))
    sent, gradients = told["sent"], told["gradients"]

    def reduced(stage: int, micros: int) -> int:
        of = sent[f"{stage} {micros}"]
        return sum(of.get(kind, [0, 0])[1] for kind in ("all-reduce", "reduce-scatter"))

    for stage in (0, 1, 2, 3):
        assert reduced(stage, 1) == pytest.approx(gradients, rel=0.05)
    for stage, times in ((0, 1), (1, 1), (2, 4), (3, 4)):
        assert reduced(stage, 4) == pytest.approx(times * gradients, rel=0.05), (stage, sent)
    assert sent["1 4"]["all-gather"] == sent["1 1"]["all-gather"]
