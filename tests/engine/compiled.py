"""Run by test_compile.py under torchrun: a few steps of a small student, compiled and not, under engines of all kinds.

Prints one JSON line per case on rank 0: its name, both ways the losses of rank 0 and the gradient norms, and how many
graphs torch compiled.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from helpers import TINY
from torch._dynamo.utils import counters

from fdscale import assemble, config, dist, student
from fdscale.engine import initialize as init

BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
PARTS = {"stage3_param_persistence_threshold": 0}
VIT = ("student.model=vit", "student.args={patch_size: 8, embed_dim: 16, depth: 3, num_heads: 2, drop_path_rate: 0.3}")
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "swin zero0": ((), {"zero_optimization": {"stage": 0}}),
    "swin zero2 bf16": ((), {"zero_optimization": {"stage": 2}, **BF16}),
    "swin zero3 chunked": (("memory.attention_chunk=[1, 0]",), {"zero_optimization": {"stage": 3, **PARTS}}),
    "swin zero3 checkpointed": (
        ("memory.checkpoint=[torch, torch_offload]",),
        {"zero_optimization": {"stage": 3, **PARTS}},
    ),
    "swin zero3 kernels": (("memory.kernels=torch",), {"zero_optimization": {"stage": 3, **PARTS}}),
    "swin zero3 fp8 bf16": (("student.linear=fp8",), {"zero_optimization": {"stage": 3, **PARTS}, **BF16}),
    "vit zero1": (VIT, {"zero_optimization": {"stage": 1}}),
    "vit zero3 bf16 checkpointed": (
        (*VIT, "memory.checkpoint=[deepspeed]"),
        {"zero_optimization": {"stage": 3, **PARTS}, **BF16},
    ),
}
ADAM = {"lr": 1e-3, "weight_decay": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "clip_grad": 1.0, "layer_decay": 1.0}


def losses(own: tuple[str, ...], ds: dict[str, Any], compiled: str) -> list[float]:
    """Of every micro-batch of two steps, drop path on, and the gradient norms of the steps."""
    settings = config.load("demo", [*TINY, *own, f"memory.compile=[{compiled}]"])
    teachers = assemble.build_teachers(settings)
    pairings, module = assemble.build_student(settings, teachers)
    engine = init.initialize(module, student.initial_values(settings, module), ds, batch_size=8, micro_batch=2, **ADAM)
    generator = torch.Generator().manual_seed(dist.rank())
    found = []
    for turn in range(4):
        images = torch.rand(2, 3, 64, 64, generator=generator)
        target = assemble.learnt_tokens(images, teachers[""], pairings[""])
        images = images.bfloat16() if "bf16" in ds else images
        loss = engine(images, (target,), torch.arange(2) + 2 * turn)
        engine.backward(loss)
        engine.step()
        found.append(float(loss))
        if turn % 2:
            found.append(float(engine.get_global_grad_norm()))
    engine.destroy()
    return found


if __name__ == "__main__":
    init.prepare_environment()
    dist.init()
    init.join_deepspeed()
    for case, (own, ds) in CASES.items():
        eager = losses(own, ds, "none")
        counters.clear()
        compiled = losses(own, ds, "student, teacher")
        if dist.rank() == 0:
            compiles = counters["stats"]["unique_graphs"]
            print(json.dumps({"case": case, "eager": eager, "compiled": compiled, "graphs": compiles}), flush=True)
    dist.close()
