"""Run by test_sharded_teacher.py under torchrun: teachers whole and in shares, on images that differ by rank.

Prints one JSON line per teacher on rank 0: whether the tokens are equal to the last bit on all ranks, twice, and the
bytes that each rank holds, whole and in its share.
"""

from __future__ import annotations

import json
import sys

import torch

from fdscale import dist
from fdscale.engine.sharding import splitter
from fdscale.models.teachers import load_teacher

VIT = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}
CASES = [
    ("timm:vit_tiny_patch16_224.augreg_in21k", VIT),
    ("timm:beit_base_patch16_224.in22k_ft_in22k", VIT),
    ("timm:swinv2_tiny_window8_256", {"img_size": 64, "window_size": 4}),
    ("fdscale:swin_v2", {"embed_dim": 64, "depths": (2, 4), "num_heads": (2, 4), "window_size": 4, "img_size": 32,
                         "pretrained_window_sizes": (0, 0)}),
]  # fmt: skip


def held(network: torch.nn.Module) -> int:
    """Bytes of this rank's parameters."""
    return sum(getattr(p, "_local_tensor", p).nbytes for p in network.parameters())


def compare() -> None:
    """All cases."""
    for source, args in CASES:
        for dtype in ("float32", "bfloat16"):
            weights = sys.argv[1] if source.startswith("fdscale") else "random"
            teachers = [load_teacher(source, weights=weights, args=args, dtype=dtype) for _ in range(2)]
            teachers[0].to("cpu")
            teachers[1].spread(torch.device("cpu"), splitter(torch.device("cpu")))
            size = args["img_size"]
            images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(dist.rank()))
            before = held(teachers[1].network)
            pairs = [(teachers[0](images), teachers[1](images)) for _ in range(2)]
            assert held(teachers[1].network) == before, "what was gathered is let go"
            equal = dist.gather(all(torch.equal(a, b) for a, b in pairs))
            bytes_held = dist.gather([held(one.network) for one in teachers])
            if dist.rank() == 0:
                print(json.dumps({"teacher": f"{source} {dtype}", "equal": equal, "bytes": bytes_held}), flush=True)


if __name__ == "__main__":
    dist.init()
    compare()
    dist.close()
