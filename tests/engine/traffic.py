"""Run by test_traffic.py under torchrun: what one step of each ZeRO stage sends, in one micro-batch and in four.

Prints one JSON line on rank 0: by stage and number of micro-batches the collectives, and the bytes of all gradients.
"""

from __future__ import annotations

import json

import torch
from engines import make_engine

from fdscale import dist
from fdscale.bench.traffic import Traffic
from fdscale.engine.initialize import prepare_environment

if __name__ == "__main__":
    prepare_environment()
    dist.init()
    found, size = {}, 0
    for stage in (0, 1, 2, 3):
        for micros in (1, 4):
            engine = make_engine(stage=stage, batch=4 * micros * dist.world())

            def step(engine=engine, micros=micros) -> None:
                for _ in range(micros):
                    loss = engine(torch.randn(4, 3, 32, 32), torch.randn(4, 64, 8), torch.arange(4))
                    engine.backward(loss)
                    engine.step()

            step()
            with Traffic() as traffic:
                step()
            found[f"{stage} {micros}"] = traffic.of
            size = sum(4 * getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
            engine.destroy()
    if dist.rank() == 0:
        print(json.dumps({"sent": found, "gradients": size}), flush=True)
    dist.close()
