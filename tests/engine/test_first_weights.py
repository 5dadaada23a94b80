"""A run's first weights depend on its recipe and seed alone: on no number of ranks, no ZeRO stage, no offloading."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from helpers import TINY, told_by

from fdscale import assemble, config
from fdscale.models.layers import initial_value

HERE = Path(__file__).resolve().parent


def expected(dtype: torch.dtype) -> str:
    """The hash of the values that each parameter's own rule gives, without an engine."""
    settings = config.load("demo", [*TINY])
    _, module = assemble.build_student(settings, assemble.build_teachers(settings))
    digest = hashlib.sha256()
    for name, meta in sorted(module.named_parameters()):
        value = initial_value(module, name, meta.shape, torch.float32, settings.student.seed).to(dtype).float()
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long), 4])
def test_first_weights_are_the_same_on_any_number_of_ranks_at_any_stage(ranks: int) -> None:
    found = told_by(HERE / "first_weights.py", ranks=ranks)
    whole, half = expected(torch.float32), expected(torch.bfloat16)
    assert len(found) == 7
    for one in found:
        assert one["hashes"] == ranks * [half if "bf16" in one["case"] else whole], one
