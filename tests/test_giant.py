"""SwinV2-G at a fraction of its width, with all its depth: what it learns depends on no memory policy, and no world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from giant import POLICIES
from helpers import ROOT, outside


def trained(folder: Path, shards: Path, ranks: int) -> dict[str, dict[str, list[float]]]:
    """[loss, gradient norm, lr] by policy and step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "tests" / "giant.py"), str(folder), str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, env=outside(), timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    for whose in ("", "the teacher's "):
        assert f"\n{whose}window attention: stages 1-4 by reference (windows 4, 4, 4, 2)\n" in done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"policy"')]
    return {record["policy"]: record["steps"] for record in records}


@pytest.mark.slow
@pytest.mark.long
def test_every_policy_learns_the_same_on_two_and_four_ranks(shards: Path, tmp_path: Path) -> None:
    found = {}
    for ranks in (2, 4):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        found[ranks] = trained(folder, shards, ranks)
        assert found[ranks].keys() == POLICIES.keys()
        plain = found[ranks]["none"]
        assert len(plain) == 2
        for policy, steps in found[ranks].items():
            if "sequential" in policy:  # sums over fewer windows at a time
                for step, values in steps.items():
                    assert values == pytest.approx(plain[step], rel=1e-5), (ranks, policy, step)
            else:
                assert steps == plain, (ranks, policy)
    for step, values in found[4]["none"].items():
        assert values == pytest.approx(found[2]["none"][step], rel=1e-5), step
