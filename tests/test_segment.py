"""Semantic segmentation from end to end: packed, trained, killed and gone on with, evaluated on any number of ranks.

The scenes are generated: discs and squares on photographs, with exact masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import scenes
from helpers import sets

pytestmark = pytest.mark.slow

SEGMENT = (
    "student.model=swin_v2",
    "student.args={embed_dim: 16, depths: [1, 1, 2, 1], num_heads: [1, 2, 4, 4], window_size: 4, drop_path_rate: 0.1}",
    "classify.classes=null",
    "segment.classes=3",
    "segment.reduce_zero_label=true",
    "segment.channels=16",
    "segment.auxiliary_channels=16",
    "segment.bounds=[256, 64]",
    "segment.ratio=[0.8, 1.5]",
    "segment.most_of_a_class=0.9",
    "data.image_size=64",
    "data.block=16",
    "optim.batch_size=8",
    "optim.layer_decay=0.9",
    "optim.clip_grad=1.0",
    "memory.micro_batch=4",
    "schedule.shape=poly",
    "schedule.epochs=null",
    "schedule.warmup_epochs=null",
    "schedule.min_lr=0",
    "log.every=1",
    "log.samples=true",
    "log.tensorboard=false",
)


@pytest.fixture(scope="session")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards train and heldout."""
    folder = tmp_path_factory.mktemp("scenes")
    for split, name, count in (("training", "train", 48), ("validation", "heldout", 13)):
        scenes.write(folder / "ADEChallengeData2016", split, count, seed=count)
        scenes.pack(folder / "ADEChallengeData2016", folder / name, split)
    return folder


@pytest.fixture
def tiny_segment(ade: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny segmentation."""

    def arguments(run: Path, *more: str, options: Sequence[str] = ()) -> list[str]:
        own = (*SEGMENT, f"data.shards={ade / 'train'}", *more)
        return ["finetune", "demo_finetune", "--run", str(run), *sets(*own), *options]

    return arguments
