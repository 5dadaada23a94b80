"""Shared by all tests: one thread per process, so that results do not depend on the cores, and small real data."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent

# A whole distillation in a moment: a SwinV2 with shifted windows and drop path, and a random ViT as its teacher.
TINY = (
    "student.model=swin_v2",
    "student.args={embed_dim: 16, depths: [2, 2], num_heads: [1, 2], window_size: 4, drop_path_rate: 0.3, "
    "pretrained_window_sizes: [0, 0]}",
    "teacher.source=timm:vit_tiny_patch16_224.augreg_in21k",
    "teacher.args={img_size: 64, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}",
    "teacher.weights=random",
    "teacher.resample=null",
    "teacher.feature=last",
    "data.image_size=64",
    "data.workers=1",
    "data.block=4",
    "optim.batch_size=8",
    "memory.micro_batch=4",
    "schedule.steps=8",
    "schedule.warmup_steps=2",
    "log.every=1",
    "log.samples=true",
    "log.tensorboard=false",
)


def sets(*pairs: str) -> list[str]:
    """--set arguments."""
    return [word for pair in pairs for word in ("--set", pair)]


def outside() -> dict[str, str]:
    """The environment of a fresh shell: without what a process group in this process has set."""
    inside = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{key: value for key, value in os.environ.items() if key not in inside}, "PYTHONPATH": str(ROOT)}


def run_cli(
    *words: object, ranks: int = 1, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run fdscale in processes of its own, under torchrun where there are several ranks."""
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*start, "fdscale.cli", *(["--"] if ranks > 1 else []), *(str(word) for word in words)]
    environment = {**outside(), **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


@pytest.fixture(scope="session")
def process_group() -> None:
    """A process group of one rank for all tests: DeepSpeed keeps references to the first one for good."""
    from fdscale import dist
    from fdscale.engine.initialize import prepare_environment

    dist.init()
    prepare_environment()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve crops of real photographs in three shards, with an index."""
    from PIL import Image
    from skimage import data as photos

    from fdscale.data.shards import make

    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee"):
        image = Image.fromarray(getattr(photos, name)())
        for part in range(4):
            left, top = 60 * part, 40 * part
            image.crop((left, top, left + 160, top + 140)).save(folder / f"{name}-{part}.jpg", quality=92)
    out = folder.parent / f"{folder.name}-shards"
    make(folder, out, samples_per_shard=4)
    return out


@pytest.fixture
def tiny(shards: Path) -> Callable[..., list[str]]:
    """Arguments of a tiny distillation on real photographs."""

    def arguments(run: Path, *more: str, options: Sequence[str] = ()) -> list[str]:
        return [
            "distill",
            "demo",
            "--run",
            str(run),
            *sets(*TINY, f"data.shards={shards}", *more),
            *options,
        ]

    return arguments
