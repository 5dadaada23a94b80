"""What `fdscale plan` takes on the command line."""

from __future__ import annotations

import argparse

from fdscale.verbs import positive, recipe, verb

TEXT = "say what a run needs before it runs: memory, time, cost; without a GPU"
EXAMPLE = (
    "fdscale plan swinv2_g --ds ds_configs/zero3.json --gpu a100-40g --gpus 64 --price 2.5\n"
    "  fdscale plan clip_vit_large_300 --ds ds_configs/zero1.json --gpu h100 --gpus 8,64,512"
)


def add(verbs: argparse._SubParsersAction) -> None:
    """The verb."""
    sub = verb(verbs, "plan", "fdscale.plan.app:main", TEXT, EXAMPLE)
    recipe(sub)
    sub.add_argument("--ds", metavar="FILE", help="DeepSpeed JSON (default: ZeRO 0 in float32)")
    gpus = (
        "GPUs of the run (default: 8); several with commas for a table of how it scales, in which micro-batches are "
        "made smaller where the batch asks for it"
    )
    sub.add_argument("--gpus", default="8", metavar="N[,N...]", help=gpus)
    sub.add_argument("--gpu", required=True, metavar="NAME", help="a100-40g, a100-80g, h100 or h200")
    network = "between nodes: hdr, ndr or ethernet, 200, 400 or 12.5 GB/s per node (default: that of NVIDIA's nodes)"
    sub.add_argument("--network", metavar="NAME", help=network)
    sub.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    samples = "samples of an epoch (default: those of data.shards, or where it is not set ImageNet-1K's 1281167)"
    sub.add_argument("--samples", type=int, metavar="N", help=samples)
    mfu = "assume that linear layers run at this share of the GPU's peak (default: 0.5)"
    sub.add_argument("--mfu", type=float, metavar="SHARE", help=mfu)
    overlap = "assume that communication hides under this share of the pass it belongs to (default: 0.8)"
    sub.add_argument("--overlap", type=float, metavar="SHARE", help=overlap)
    sub.add_argument("--price", type=positive, metavar="X", help="of a GPU-hour, for the cost of the run")
    sub.add_argument("--json", action="store_true", help="print plain data instead: bytes and seconds")
