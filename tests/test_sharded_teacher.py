"""Teachers whose blocks are shared out among the ranks: the same targets to the last bit, and a share of the memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, run_cli, told_by
from sharded import CASES
from test_resume import SCHEDULE, assert_same, ds_file

from fdscale import UserError, config
from fdscale.models.swin_v2 import SwinV2
from fdscale.models.teachers import load_teacher


@pytest.mark.slow
def test_tokens_are_the_same_to_the_last_bit_and_each_rank_holds_a_share(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(SwinV2(**CASES[-1][1], post_norm_init=1.0).state_dict(), tmp_path / "weights.pth")
    found = told_by(ROOT / "tests" / "sharded.py", tmp_path / "weights.pth", ranks=2)
    assert len(found) == 2 * len(CASES)
    for one in found:
        assert one["equal"] == [True, True], one
        for whole, share in one["bytes"]:
            assert share < 0.65 * whole, one


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.long), 3])
def test_a_run_is_the_same_to_the_last_bit(
    tiny: Callable[..., list[str]], shards: Path, tmp_path: Path, stage: int
) -> None:
    options = ("--ds", str(ds_file(tmp_path, stage)))
    more = (f"data.heldout_shards={shards}", "data.heldout_samples=6", "log.heldout_every=4")
    for kind in ("replicated", "sharded"):
        done = run_cli(*tiny(tmp_path / kind, f"memory.teacher={kind}", *SCHEDULE, *more, options=options), ranks=2)
        assert done.returncode == 0, done.stderr
        assert ("the teacher's blocks are shared out among the ranks" in done.stderr) == (kind == "sharded")
    assert_same(tmp_path / "replicated", tmp_path / "sharded", 2)
    told = [
        [line for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines() if "heldout_loss" in line]
        for kind in ("replicated", "sharded")
    ]
    losses = [[json.loads(line)["heldout_loss"] for line in lines] for lines in told]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3  # at the start, at step 4 and at the end


def test_what_cannot_be_shared_out_is_refused() -> None:
    for other in ("memory.compile=[teacher]", "teacher.hold=int8"):
        with pytest.raises(UserError, match=r"memory\.teacher is sharded, and .* take one of them"):
            config.load("demo", [*TINY, "memory.teacher=sharded", other])
    teacher = load_teacher("timm:tf_efficientnet_lite0", weights="random")
    assert len(teacher.blocks()) == 7
    teacher.network.blocks = torch.nn.Identity()
    with pytest.raises(UserError, match="has no blocks to share out; take replicated"):
        teacher.blocks()
