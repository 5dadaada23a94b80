"""Run by test_giant.py under torchrun: SwinV2-G at a fraction of its width distils under every memory policy.

Arguments: a folder, shards. Prints one JSON line per policy on rank 0: its name and the losses and norms of its steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from test_resume import losses

from fdscale import config, dist
from fdscale.distill import distill

G = "embed_dim: 32, depths: [2, 2, 42, 4], num_heads: [1, 2, 4, 8], window_size: 4, extra_norm_period: 6"
SETTINGS = (
    f"student.args={{{G}, drop_path_rate: 0.3, post_norm_init: 1.0e-1, depth_scaled_init: true}}",
    f"teacher.args={{img_size: 64, {G}, post_norm_init: 1.0}}",
    "teacher.weights=random",
    "data.image_size=64",
    "data.workers=1",
    "data.block=4",
    "optim.batch_size=4",
    "optim.lr=1e-3",
    "memory.micro_batch=1",
    "schedule.epochs=null",
    "schedule.steps=2",
    "schedule.warmup_epochs=null",
    "schedule.warmup_steps=1",
    "save.every=100",
    "log.every=1",
    "log.tensorboard=false",
)
# Every parameter is partitioned and few are gathered at a time, as in a run of the real size.
SMALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 20_000,
    "stage3_max_live_parameters": 100_000,
    "stage3_max_reuse_distance": 100_000,
}
POLICIES = {
    "none": ("memory.checkpoint=[none]",),
    "torch": ("memory.checkpoint=[torch]",),
    "deepspeed": ("memory.checkpoint=[deepspeed]",),
    "torch_offload": ("memory.checkpoint=[torch_offload]",),
    "fairscale": ("memory.checkpoint=[fairscale]",),
    "fairscale_offload": ("memory.checkpoint=[fairscale_offload]",),
    "third stage": ("memory.checkpoint=[none, none, torch, none]",),
    "sequential": ("memory.checkpoint=[none]", "memory.attention_chunk=[2]"),
    "sequential, third stage": ("memory.checkpoint=[torch]", "memory.attention_chunk=[3, 2, 1, 0]"),
}


def main(folder: Path, shards: str) -> None:
    """All policies."""
    ds = folder / "zero3.json"
    if dist.rank() == 0:
        ds.write_text(json.dumps({"zero_optimization": {"stage": 3, **SMALL}}))
    dist.init()
    dist.gather(0)
    for name, policy in POLICIES.items():
        run = folder / name
        settings = config.load("swinv2_g", [*SETTINGS, f"data.shards={shards}", *policy])
        assert distill(settings, run, ds=str(ds)) == 0
        if dist.rank() == 0:
            print(json.dumps({"policy": name, "steps": losses(run)}), flush=True)
    dist.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
