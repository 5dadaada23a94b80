"""Run by test_first_weights.py, alone or under torchrun: a run's first weights, as engines of every stage hold them.

Prints one JSON line per configuration on rank 0: its name, and each rank's hash of all whole parameters.
"""

from __future__ import annotations

import hashlib
import json

from helpers import TINY

from fdscale import assemble, config, dist, student
from fdscale.engine import initialize as init

PARTS = {"stage3_param_persistence_threshold": 0}
CASES = {
    **{f"zero{stage}": {"zero_optimization": {"stage": stage}} for stage in (0, 1, 2, 3)},
    "zero3-partitioned": {"zero_optimization": {"stage": 3, **PARTS}},
    "zero3-offloaded": {"zero_optimization": {"stage": 3, **PARTS, "offload_optimizer": {"device": "cpu"}}},
    "zero1-bf16": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    },
}
ADAM = {"lr": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "clip_grad": 1.0, "layer_decay": 1.0}


def fingerprint(name: str) -> str:
    """Of the weights that an engine begins with."""
    settings = config.load("demo", [*TINY])
    teachers = assemble.build_teachers(settings)
    _, module = assemble.build_student(settings, teachers)
    values = student.initial_values(settings, module)
    engine = init.initialize(module, values, CASES[name], batch_size=8, micro_batch=1, **ADAM)
    import deepspeed  # after fdscale has prepared for it

    digest = hashlib.sha256()
    for key, parameter in sorted(engine.module.named_parameters()):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            digest.update(key.encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    dist.init()
    for case in CASES:
        hashes = dist.gather(fingerprint(case))
        if dist.rank() == 0:
            print(json.dumps({"case": case, "hashes": hashes}), flush=True)
    dist.close()
