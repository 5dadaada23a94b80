"""Run by test_ds_configs.py: start DeepSpeed with a ds_config, take a step, and print what the engine then holds.

One JSON line per file: for each entry of it, by its dotted key, what the parts that act on it were given. A ds_config
for several ranks is taken as for as many as there are here. An entry without a line in HELD is a KeyError: whoever adds
one has to say where DeepSpeed keeps it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engines import ARGS

from fdscale import dist
from fdscale.engine import initialize as init
from fdscale.engine import state
from fdscale.models import backbone
from fdscale.models.layers import initial_value
from fdscale.objective import Distiller

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HPZ = "zero_optimization.zero_hpz_partition_size"


def of_optimizer(name: str) -> Callable[[Any], Any]:
    return lambda engine: getattr(engine.optimizer, name)


def of_gathering(name: str) -> Callable[[Any], Any]:
    return lambda engine: getattr(engine.optimizer.parameter_offload, name)


def device(name: str) -> Callable[[Any], Any]:
    return lambda engine: {True: "cpu", False: "none"}[getattr(engine.optimizer, name)]


HELD: dict[str, Callable[[Any], Any]] = {
    "zero_optimization.stage": lambda engine: engine.zero_optimization_stage(),
    "zero_optimization.allgather_bucket_size": of_optimizer("allgather_bucket_size"),
    "zero_optimization.reduce_bucket_size": of_optimizer("reduce_bucket_size"),
    "zero_optimization.contiguous_gradients": of_optimizer("contiguous_gradients"),
    "zero_optimization.overlap_comm": lambda engine: engine.zero_overlap_comm(),
    "zero_optimization.stage3_prefetch_bucket_size": of_gathering("_prefetch_bucket_sz"),
    "zero_optimization.stage3_param_persistence_threshold": of_gathering("param_numel_persistence_threshold"),
    "zero_optimization.stage3_max_live_parameters": of_gathering("_max_available_parameters_in_numel"),
    "zero_optimization.stage3_max_reuse_distance": of_gathering("_max_reuse_distance_in_numel"),
    "zero_optimization.offload_optimizer.device": device("offload_optimizer"),
    "zero_optimization.offload_optimizer.pin_memory": of_optimizer("offload_optimizer_pin_memory"),
    "zero_optimization.offload_param.device": device("offload_param"),
    "zero_optimization.offload_param.pin_memory": of_optimizer("offload_param_pin_memory"),
    HPZ: lambda engine: next(engine.module.parameters()).ds_secondary_tensor_group_size,
    "bf16.enabled": lambda engine: {p.dtype for p in engine.module.parameters()} == {torch.bfloat16},
    "data_types.grad_accum_dtype": lambda engine: NAMES[engine.get_data_types()[1]],
    "communication_data_type": lambda engine: NAMES[engine.communication_data_type],
}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of nested objects, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def start(ds: dict[str, Any]) -> Any:
    with torch.device("meta"):
        module = Distiller(backbone("swin_v2", ARGS), 8)
    adam = {"lr": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "clip_grad": 3.0, "layer_decay": 1.0}

    def first(name: str, shape: torch.Size) -> torch.Tensor:
        return initial_value(module, name, shape, torch.float32, 0)

    engine = init.initialize(module, first, ds, batch_size=4, micro_batch=4 // dist.world(), **adam)
    torch.manual_seed(dist.rank())
    size = 4 // dist.world()
    loss = engine(torch.randn(size, 3, 32, 32).bfloat16(), torch.randn(size, 64, 8), torch.arange(size))
    engine.backward(loss)
    engine.step()
    assert init.was_applied(engine)
    assert {master.dtype for master in state.masters(engine)} == {torch.float32}
    return engine


def main() -> None:
    dist.init()
    for path in sys.argv[1:]:
        ds = init.read_ds_config(path)
        if HPZ in leaves(ds):
            ds["zero_optimization"]["zero_hpz_partition_size"] = dist.world()
        engine = start(ds)
        held = {key: HELD[key](engine) for key in leaves(ds)}
        if dist.rank() == 0:
            print("\n" + json.dumps({"file": Path(path).name, "held": held}), flush=True)
    dist.gather(None)


if __name__ == "__main__":
    main()
