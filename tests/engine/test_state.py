"""The state taken from an engine and put into a fresh one continues bitwise, under every ZeRO stage and precision.

One and two ranks; the gradient norms of all configurations are compared with float32 at stage 0 on one rank.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import outside

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
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(HERE / "stages.py"), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=outside(), timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


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
def test_state_moves_bitwise_with_the_optimizer_on_the_host() -> None:
    """DeepSpeed builds its CPU Adam at first use, which takes a minute or two."""
    (result,) = results(1, "zero3-bf16-offload")
    assert result["losses"]
    assert result["state"]
    assert result["covered"]
    assert result["saved"]
    assert all(result["swapped"])
    assert result["updates"] == 3
