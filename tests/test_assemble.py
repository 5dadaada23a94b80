"""What a recipe builds."""

from __future__ import annotations

import torch
from helpers import TINY
from torch import nn

from fdscale import config
from fdscale.assemble import build_teacher

SWIN = (
    "{img_size: 64, embed_dim: 16, depths: [2, 2], num_heads: [1, 2], window_size: 4, post_norm_init: 1.0, "
    "pretrained_window_sizes: [0, 0]}"
)


class Theirs(nn.Module):
    """A network of somebody else's, with attributes of the same names."""

    kernels, fused = (3, 3), "theirs"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_a_teacher_of_ours_takes_the_students_kernels() -> None:
    found, images = {}, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for kernels in ("reference", "torch"):
        own = ("teacher.source=fdscale:swin_v2", f"teacher.args={SWIN}", "teacher.weights=random")
        teacher = build_teacher(config.load("demo", [*TINY, *own, f"memory.kernels={kernels}"]))
        attention = [part.kernels for part in teacher.network.modules() if hasattr(part, "kernels")]
        assert attention == [kernels] * 4
        found[kernels] = teacher(images)
    assert found["reference"].std() > 0.5
    torch.testing.assert_close(found["torch"], found["reference"], rtol=0, atol=1e-5)


def test_a_teacher_of_others_is_left_alone() -> None:
    own = ("teacher.source=python:test_assemble:Theirs", "teacher.args={}", "teacher.weights=own")
    network = build_teacher(config.load("demo", [*TINY, *own, "memory.kernels=torch"])).network
    assert (network.kernels, network.fused) == ((3, 3), "theirs")
