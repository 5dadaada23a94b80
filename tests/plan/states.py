"""Run by test_states.py under torchrun: bytes of all tensors that real engines hold at the end of a backward.

Whatever Python can reach is counted, each storage once, whoever holds it. One JSON line per configuration.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings

import torch

from fdscale import dist
from fdscale.engine.initialize import initialize
from fdscale.models import backbone
from fdscale.models.layers import initial_value
from fdscale.objective import Distiller

warnings.simplefilter("ignore")
ARGS = {"img_size": 32, "embed_dim": 64, "depths": [2], "num_heads": [2], "window_size": 4}
ARGS |= {"pretrained_window_sizes": [0]}
WIDTH = 48  # of the teacher
SMALL = {"reduce_bucket_size": 1000}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
CASES = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1, **SMALL}},
    "zero1-bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "zero1-bf16-immediate": {
        **BF16,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True, "immediate_grad_update": True},
    },
    "zero2-bf16": {"zero_optimization": {"stage": 2, **SMALL}, **BF16},
    "zero3-bf16": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **SMALL}, **BF16},
    "zero3-bf16-persistent": {"zero_optimization": {"stage": 3, **SMALL}, **BF16},  # all of this network
    "zero3-bf16-offload": {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu"},
            **SMALL,
        },
        **BF16,
    },
}


def distiller() -> Distiller:
    """The network of all cases."""
    with torch.device("meta"):
        return Distiller(backbone("swin_v2", ARGS), WIDTH)


def alive() -> dict[int, torch.Tensor]:
    """The tensors, one for each storage."""
    gc.collect()
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [it for it in gc.get_objects() if type(it) in kinds and it.device.type == "cpu"]
    tensors += [it.grad for it in tensors if it.is_leaf and it.grad is not None]  # Python may not have seen them yet
    return {it.untyped_storage()._cdata: it for it in tensors}


def held(ds: dict) -> int:
    """Bytes of an engine at the end of the backward of its second step, activations gone."""
    before = alive()  # kept, so that no address is given out twice
    module = distiller()
    adam = {"lr": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "clip_grad": 3.0, "layer_decay": 1.0}
    engine = initialize(
        module, lambda name, shape: initial_value(module, name, shape, torch.float32, 0), ds,
        batch_size=4 * dist.world(), micro_batch=4, fused="torch", **adam,
    )  # fmt: skip
    dtype = torch.bfloat16 if "bf16" in ds else torch.float32
    found: dict[int, torch.Tensor] = {}
    for step in range(2):
        loss = engine(torch.randn(4, 3, 32, 32).to(dtype), torch.randn(4, 64, WIDTH), torch.arange(4))
        engine.backward(loss)
        del loss
        if step == 0:
            engine.step()
        else:
            found = {key: it for key, it in alive().items() if key not in before}
    size = sum(it.untyped_storage().nbytes() for it in found.values())
    engine.destroy()
    return size


if __name__ == "__main__":
    dist.init()
    for case in sys.argv[1:]:
        size = held(CASES[case])
        if dist.rank() == 0:
            print(json.dumps({"case": case, "bytes": size}), flush=True)
    dist.close()
