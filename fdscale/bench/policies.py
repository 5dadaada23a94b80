"""`fdscale bench policies`: what each memory policy saves, and what it costs in time.

    fdscale bench policies --json policies.json

Forward and backward of a distillation of a SwinV2 of SwinV2-G's depth, and of a ViT, from made images. Memory is what
comes and goes in a step, parameters and their gradients left out: on a GPU by the allocator's counters, on a CPU all
that its allocator gave out; the plan's figure for the same stands beside it. All policies take turns in each round.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fdscale import assemble, config, dist, student
from fdscale.bench import tables
from fdscale.bench.timing import in_turns, ratio, save
from fdscale.engine.initialize import join_deepspeed, prepare_environment
from fdscale.plan.shapes import Networks

TEACHER = ("teacher.source=timm:vit_tiny_patch16_224.augreg_in21k", "teacher.weights=random", "teacher.feature=last")
G = (
    "student.args={embed_dim: 32, depths: [2, 2, 42, 4], num_heads: [1, 2, 4, 8], window_size: 12, "
    "extra_norm_period: 6, drop_path_rate: 0.3}",
    "data.image_size=192",
    "memory.micro_batch=2",
    "teacher.args={img_size: 192, patch_size: 32, embed_dim: 24, depth: 1, num_heads: 2}",
    "teacher.resample=null",
)
VIT = (
    "student.model=vit",
    "student.args={patch_size: 16, embed_dim: 384, depth: 12, num_heads: 6, drop_path_rate: 0.1}",
    "data.image_size=224",
    "memory.micro_batch=4",
    "teacher.args={patch_size: 16, embed_dim: 24, depth: 1, num_heads: 2}",
    "teacher.resample=null",
)
SMALL = {
    "SwinV2": ("student.args={embed_dim: 16, depths: [2, 2], num_heads: [1, 2], window_size: 4, "
               "pretrained_window_sizes: [0, 0]}", "data.image_size=32",
               "teacher.args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"),
    "ViT": ("student.args={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}", "data.image_size=32",
            "teacher.args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"),
}  # fmt: skip
ALL = ("none", "torch", "torch_offload", "selective", "deepspeed", "fairscale", "fairscale_offload")
Policy = tuple[str, str, str]  # memory.checkpoint, memory.attention_chunk, memory.kernels


def policies(model: str, stages: int, fast: str) -> list[Policy]:
    """Those to compare; fast: what computes window attention as one op. The first is what ratios are to."""
    if model == "ViT":
        return [(f"[{kind}]", "[0]", "auto") for kind in ALL] + [("[none]", "[1]", "auto"), ("[torch]", "[1]", "auto")]
    deep = ", ".join("torch" if stage == stages - 2 else "none" for stage in range(stages))
    found = [("[none]", "[0]", "reference"), ("[none]", "[4]", "reference"), ("[torch]", "[0]", "reference")]
    found += [("[torch]", "[4]", "reference"), (f"[{deep}]", "[0]", fast)]
    return found + [(f"[{kind}]", "[0]", fast) for kind in ALL]


def main(rounds: int, threads: int | None, quick: bool, json: Path | None) -> int:
    """Measure, print Markdown, and write JSON."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    if threads:
        torch.set_num_threads(threads)
    prepare_environment()
    dist.init()
    join_deepspeed()
    fast = "triton" if torch.cuda.is_available() else "torch"
    result: dict[str, Any] = {"device": str(dist.device()), "threads": torch.get_num_threads(), "networks": {}}
    result |= {"torch": torch.__version__, "rounds": rounds}
    for model, settings in (("SwinV2", G), ("ViT", VIT)):
        own = (*TEACHER, *settings, *(SMALL[model] if quick else ()))
        result["networks"][model] = measure(model, own, fast, 1 if quick else rounds)
    print(text(result))
    if json:
        save(json, result)
    return 0


def measure(model: str, own: tuple[str, ...], fast: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each policy: bytes kept from forward to backward, their peak, both as planned, and seconds by turns."""
    depths = student.backbone(config.load("demo", own)).depths
    found = policies(model, len(depths), fast)
    steps = {}
    rows = []
    for policy in found:
        checkpoint, chunk, kernels = policy
        more = (f"memory.checkpoint={checkpoint}", f"memory.attention_chunk={chunk}", f"memory.kernels={kernels}")
        settings = config.load("demo", (*own, *more))
        networks = Networks(settings, gpu=torch.cuda.is_available())
        planned = networks.activations(torch.float32)
        forward = build(settings, networks)
        forward().backward()  # tables that are made once, and kernels, are there
        kept, peak = (bytes_of(work) for work in (forward, lambda forward=forward: forward().backward()))
        steps[name_of(policy)] = partial(step, forward)
        here = 0 if torch.cuda.is_available() else planned.offloaded  # on a CPU host memory is the same
        row: dict[str, Any] = {"policy": policy, "kept": kept[0], "peak": peak[1]}
        rows.append(row | {"planned_kept": planned.kept + here, "planned_peak": planned.peak + here})
    taken = in_turns(steps, rounds)
    for row in rows:
        name = name_of(row["policy"])
        row["seconds"] = {clock: seconds[name] for clock, seconds in taken.items()}
        for clock, seconds in taken.items():
            row[f"{clock}_ratio"] = ratio(seconds, name, name_of(found[0]))
            row[f"{clock}_median"] = statistics.median(seconds[name])
    return rows


def name_of(policy: Policy) -> str:
    """For a person."""
    return ", ".join(policy)


def build(settings: config.Config, networks: Networks) -> Callable[[], torch.Tensor]:
    """The forward of a micro-batch with content, on this machine's device; gradients go as soon as they are there."""
    _, module = assemble.build_student(settings, networks.teachers)
    module = module.to_empty(device=dist.device()).train()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
        parameter.register_post_accumulate_grad_hook(_drop)
    forms = networks.arguments(torch.float32)
    arguments = [torch.zeros(one.shape, dtype=one.dtype, device=dist.device()) for one in forms]
    return partial(module, *arguments)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def step(forward: Callable[[], torch.Tensor]) -> None:
    """Forward and backward, waited for."""
    forward().backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bytes_of(work: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that are there after it and were not before, and the most of them in between."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = work()
    now = peak = 0
    for event in sorted(
        (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return now, peak


def text(result: dict[str, Any]) -> str:
    """Markdown: the policies by their peak, and which of them another one beats in both."""
    head = ("checkpoint", "chunk", "kernels", "kept, MB (planned)", "peak, MB (planned)", "CPU s", "wall s")
    where = f"{result['device']}, {result['threads']} threads, torch {result['torch']}"
    parts = [f"float32, {where}, {result['rounds']} rounds; ratio of CPU seconds to the policy of ratio 1.00"]
    for model, rows in result["networks"].items():
        ordered = sorted(rows, key=lambda row: row["peak"])
        cells = []
        for row in ordered:
            worse = [other for other in ordered if beats(other, row)]
            cells.append(
                (
                    *row["policy"],
                    f"{row['kept'] / 1e6:.1f} ({row['planned_kept'] / 1e6:.1f})",
                    f"{row['peak'] / 1e6:.1f} ({row['planned_peak'] / 1e6:.1f})",
                    f"{row['cpu_median']:.3f}",
                    f"{row['wall_median']:.3f}",
                    row["cpu_ratio"],
                    f"beaten by {name_of(worse[0]['policy'])}" if worse else "",
                )
            )
        parts += [f"## {model}", tables.table((*head, "ratio", ""), cells)]
    return tables.paragraphs(*parts)


def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one needs clearly less of both, or of one at the same of the other."""
    memory, time = one["peak"] / other["peak"], one["cpu_median"] / other["cpu_median"]
    return memory < 1.01 and time < 1.01 and (memory < 0.97 or time < 0.97)
