"""Backbones by name: arguments that make no sense are one message each."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fdscale import UserError, config
from fdscale.models import BACKBONES, OWN, backbone


@pytest.mark.parametrize(
    ("model", "args", "expected"),
    [
        ("resnet", {}, "unknown backbone 'resnet'; known: swin_v2, vit, python:MODULE:CLASS"),
        ("python:nowhere:Net", {}, "student.model: python:nowhere:Net cannot be imported (No module named 'nowhere')"),
        ("python:torch.nn:Identity", {}, "python:torch.nn:Identity lacks maps, levels, blocks, depths"),
        ("vit", {"depths": [2]}, "vit has no argument depths; it has img_size, patch_size"),
        ("swin_v2", {"window_size": 0}, "student.args.window_size must be positive, got 0"),
        ("swin_v2", {"depths": [2, -1, 2, 2]}, "student.args.depths must be positive"),
        ("swin_v2", {"embed_dim": "x"}, "student.args.embed_dim must be positive, got 'x'"),
        ("swin_v2", {"depths": 4}, "swin_v2 cannot be built"),
        ("swin_v2", {"drop_path_rate": 1.5}, "drop_path_rate must be at least 0 and below 1"),
        ("vit", {"patch_size": 0}, "student.args.patch_size must be positive"),
        ("vit", {"num_heads": 5}, "5 heads do not divide 768 channels"),
        ("vit", {"position": "rope"}, "expected one of shared, per_block, absolute"),
    ],
)
def test_senseless_arguments_are_named(model: str, args: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught, torch.device("meta"):
        backbone(model, args)
    assert expected in str(caught.value)


def test_defaults_build_on_the_meta_device() -> None:
    for model in BACKBONES:
        with torch.device("meta"):
            assert all(parameter.is_meta for parameter in backbone(model, {}).parameters())


def test_recipes_may_name_what_can_be_built() -> None:
    assert (tuple(BACKBONES), OWN) == (config.MODELS, config.OWN)
