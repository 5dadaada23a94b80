"""What torch.compile makes of blocks and teacher learns the same, under DeepSpeed engines of every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import TINY, told_by

from fdscale import UserError, assemble, config
from fdscale.engine import memory
from fdscale.models import backbone
from fdscale.models.teachers import load_teacher

HERE = Path(__file__).resolve().parent


@pytest.mark.long
@pytest.mark.slow
def test_compiled_blocks_learn_the_same_at_every_stage() -> None:
    found = told_by(HERE / "compiled.py", ranks=2, timeout=1200)
    assert len(found) == 8
    for one in found:
        assert one["compiled"] == pytest.approx(one["eager"], rel=1e-2 if "bf16" in one["case"] else 1e-4), one
        assert one["graphs"] >= (2 if "swin" in one["case"] else 1), one
    assert any(one["compiled"] != one["eager"] for one in found)


@pytest.mark.parametrize("kind", ["selective", "fairscale", "fairscale_offload"])
def test_what_does_not_go_with_compiling_is_refused(kind: str) -> None:
    with torch.device("meta"):
        student = backbone("vit", {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1})
    with pytest.raises(UserError, match=rf"memory\.compile names student, and memory\.checkpoint {kind}"):
        memory.apply(student, (kind,), compiled=True)


@pytest.mark.slow
def test_a_compiled_teacher_gives_the_same_tokens() -> None:
    settings = config.load("demo", [*TINY, "memory.compile=[teacher]"])
    images = torch.rand(2, 3, 64, 64)
    compiled = assemble.build_teacher(settings)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    tokens = compiled(images)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    of = settings.teacher
    torch.testing.assert_close(tokens, load_teacher(of.source, weights=of.weights, args=of.args)(images))


def test_nothing_compiles_unless_asked() -> None:
    settings = config.load("demo", [*TINY])
    assert settings.memory.compile == ("none",)
    with pytest.raises(UserError, match=r"memory\.compile must be one of none, student, teacher, got 'blocks'"):
        config.load("demo", ["memory.compile=[blocks]"])
