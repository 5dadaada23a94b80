"""`fdscale bench model`: a training step of SwinV2-B, and layers of SwinV2-G's stage 3, by every path of attention.

    SwinV2-B       distillation step: forward, loss, backward, AdamW; float32 weights under bf16 autocast
    SwinV2-G       forward and backward of 4 layers of stage 3 in bf16, with and without activation checkpointing

On a GPU, timed by CUDA events, the paths in random order in each of three rounds; peaks of memory are those that a step
adds to weights, gradients and optimizer. On a CPU one tiny network of each kind, to see whether it runs.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fdscale import dist
from fdscale.bench import machine, paths, tables
from fdscale.bench.protocol import explain
from fdscale.bench.timing import save, summary, times
from fdscale.models.swin_v2 import SIZES, Block, SwinV2
from fdscale.objective import Distiller, whiten

ROUNDS, WARM_UP = 3, 3
LAYERS = 4
TEACHER_WIDTH = 768
TINY = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "pretrained_window_sizes": (0, 0)}


class Case(NamedTuple):
    """A network and the size of its input."""

    name: str
    batch: int
    side: int  # pixels of a student's image, or tokens of a stack's map
    window: int
    width: int = 0  # channels of a stack; 0: a student
    heads: int = 0
    checkpointed: bool = False


GPU = (
    Case("SwinV2-G 384/W24, 4 layers of stage 3", 8, 24, 24, 2048, 64),
    Case("SwinV2-G 384/W24, 4 layers of stage 3, checkpointed", 8, 24, 24, 2048, 64, True),
    Case("SwinV2-B 256/W16, step", 64, 256, 16),
    Case("SwinV2-G 640/W40, 4 layers of stage 3", 2, 40, 40, 2048, 64),
    Case("SwinV2-G 640/W40, 4 layers of stage 3, checkpointed", 2, 40, 40, 2048, 64, True),
    Case("SwinV2-G 192/W12, 4 layers of stage 3", 32, 12, 12, 2048, 64),
    Case("SwinV2-G 192/W12, 4 layers of stage 3, checkpointed", 32, 12, 12, 2048, 64, True),
)
CPU = (Case("tiny student, step", 2, 32, 4), Case("tiny stack, checkpointed", 2, 8, 8, 32, 2, True))


def main(seconds: float, limit: float | None, json: Path | None) -> int:
    """Measure, print Markdown, and write JSON, also in between."""
    run(dist.device(), seconds, limit, json)
    return 0


def run(device: torch.device, seconds: float, limit: float | None, path: Path | None) -> None:
    """seconds: of each case, compiling not counted. limit: begin no case after so many seconds."""
    start_s = time.perf_counter()
    result: dict[str, Any] = {"machine": machine.describe(device), "cases": {}, "not_measured": []}
    for case in GPU if device.type == "cuda" else CPU:
        if limit is not None and time.perf_counter() - start_s > limit:
            result["not_measured"].append(case.name)
            continue
        result["cases"][case.name] = measure(case, device, seconds)
        if path:
            save(path, result)
        _free(device)
    if path:
        save(path, result)
    print(table(result))


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds and peak bytes of a step by every path."""
    module, step = (stack if case.width else student)(case, device)
    names, left_out = paths.names(module, device, others=True)
    found: dict[str, Any] = {"case": case._asdict(), "left_out": left_out, "paths": {name: {} for name in names}}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS):
        for name in random.Random(turn).sample(names, len(names)):
            record = found["paths"][name]
            if "failed" in record:
                continue
            try:
                with paths.computed_by(name, module):
                    for _ in range(WARM_UP if turn == 0 else 1):
                        step()
                    if turn == 0 and device.type == "cuda":
                        record["peak_bytes"] = peak(step)
                    taken[name] += times([step], seconds / (ROUNDS * len(names)), device)
            except Exception as error:
                record["failed"] = explain(error)
                module.zero_grad(set_to_none=True)
            finally:
                _free(device)
    for name, record in found["paths"].items():
        if taken[name]:
            record["seconds"] = summary(taken[name])
    return found


def student(case: Case, device: torch.device) -> tuple[nn.Module, Callable[[], None]]:
    """A distillation step on random images and targets."""
    sizes = SIZES["B"] if device.type == "cuda" else TINY
    with torch.device("meta"):
        made = Distiller(SwinV2(img_size=case.side, window_size=case.window, **sizes), TEACHER_WIDTH)
    module = filled(made.to_empty(device=device)).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    images = torch.randn(case.batch, 3, case.side, case.side, device=device)
    tokens = (case.side // made.backbone.stride) ** 2
    target = whiten(torch.randn(case.batch, tokens, TEACHER_WIDTH, device=device))
    numbers = torch.arange(case.batch, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = module(images, target, numbers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return module, step


def stack(case: Case, device: torch.device) -> tuple[nn.Module, Callable[[], None]]:
    """Forward and backward of layers of one width; every other is shifted where the map has more than one window."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        blocks = [
            Block(case.width, 4 * case.width, False, heads=case.heads, window=(case.window,) * 2, shifted=i % 2 == 1,
                  pretrained_window=0)
            for i in range(LAYERS)
        ]  # fmt: skip
    module = filled(nn.ModuleList(blocks).to_empty(device=device).to(dtype))
    x = torch.randn(case.batch, case.side, case.side, case.width, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    once = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if case.checkpointed else _call

    def step() -> None:
        out: Tensor = x
        for block in module.children():
            out = once(block, out)
        out.backward(grad)
        for parameter in (x, *module.parameters()):
            assert parameter.grad is not None
            parameter.grad.zero_()

    return module, step


def filled(module: nn.Module) -> nn.Module:
    """Weights normal 0.02, norms 1, scales of 10, on the module's own device: time does not depend on them."""
    for name, parameter in module.named_parameters():
        if "logit_scale" in name:
            nn.init.constant_(parameter, math.log(10.0))
        elif "norm" in name and name.endswith("weight"):
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    return module


def _call(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def peak(step: Callable[[], None]) -> int:
    """Bytes that a step adds on a GPU."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows, lines = [], []
    for name, case in result.get("cases", {}).items():
        official = case["paths"].get("official", {}).get("seconds", {}).get("median")
        sdpa = case["paths"].get("SDPA", {}).get("seconds", {}).get("median")
        for path, record in case["paths"].items():
            if "seconds" not in record:
                rows.append((name, path, f"failed: {record.get('failed', 'not measured')}", "", "", ""))
                continue
            taken = record["seconds"]
            spread = f"{1e3 * taken['median']:.2f} ({1e3 * taken['p10']:.2f} .. {1e3 * taken['p90']:.2f})"
            ratios = [f"{other / taken['median']:.2f} x" if other else "" for other in (official, sdpa)]
            rows.append(
                (name, path, spread, *ratios, f"{record['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in record else "")
            )
        lines += [f"- {path} left out: {why}" for path, why in case["left_out"].items()]
    if result.get("not_measured"):
        lines.append(f"- not measured, for lack of time: {tables.join(result['not_measured'])}")
    head = ("step", "path", "ms (p10 .. p90)", "official takes", "SDPA takes", "peak, GB")
    return tables.paragraphs(tables.table(head, rows), "\n".join(dict.fromkeys(lines)))
