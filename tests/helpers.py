"""Running fdscale in processes of its own, and the smallest run that has everything in it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    "optim.lr=2e-3",
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


def told_by(script: Path, *words: object, ranks: int = 1, timeout: float = 400) -> list[dict]:
    """The JSON objects that a script prints, a line each, in processes of its own: so many ranks of it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(script), *map(str, words)]
    environment = {**outside(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


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


def records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kill_all(root: int) -> None:
    """kill -9 a process and all below it: torchrun puts each rank into a session of its own."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    doomed = [root]
    for pid in doomed:
        doomed += [child for child, parent in parents.items() if parent == pid]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
