"""One distillation step of SwinV2-T, against timm's swinv2_tiny in a plain PyTorch loop.

    python -m fdscale.bench.step --rounds 12 --json step.json

Three ways of doing the same step (same images, teacher, projector, loss, AdamW, float32, batch) take turns within one
process, so that whatever else the machine does hits all alike; reported are medians, and the median and quartiles of
the ratio within a round:

    timm      timm's network in a plain loop
    ours      fdscale's network in the same plain loop
    fdscale   fdscale's network under DeepSpeed, through fdscale.train.train, with its metrics, flags and logging

`ours / timm` says what the network costs, `fdscale / ours` what the framework adds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdscale import config, dist
from fdscale.assemble import normalise
from fdscale.engine.initialize import initialize
from fdscale.engine.metrics import Meter, Work
from fdscale.engine.schedule import cosine
from fdscale.models import backbone
from fdscale.models.layers import initial_value
from fdscale.models.teachers import Teacher, load_teacher
from fdscale.objective import Distiller, feature_loss, whiten
from fdscale.run import Run
from fdscale.train import TrainState, train

SIZE = 224  # pixels
SWIN_T = {
    "img_size": SIZE,
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "drop_path_rate": 0.2,
}
PAIRS = ("ours / timm", "fdscale / ours")
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05}


class TimmDistiller(nn.Module):
    """timm's network with the same projector and loss."""

    def __init__(self, teacher_width: int) -> None:
        super().__init__()
        import timm

        self.backbone = timm.create_model(
            "swinv2_tiny_window8_256", img_size=SIZE, window_size=7, num_classes=0, drop_path_rate=0.2
        )
        self.projector = nn.Linear(self.backbone.num_features, teacher_width)

    def forward(self, images: Tensor, target: Tensor, numbers: Tensor) -> Tensor:
        return feature_loss(self.projector(self.backbone.forward_features(images).flatten(1, 2)), target)


def main() -> int:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m fdscale.bench.step", description="Step time against timm.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.rounds, arguments.batch)
    result |= {
        "batch": arguments.batch,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }
    print_table(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(rounds: int, batch: int) -> dict[str, Any]:
    """Seconds of every step of the three ways, after one warm-up round."""
    dist.init()
    teacher = load_teacher("timm:tf_efficientnet_lite0", weights="random")
    images = torch.randint(
        0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "timm": plain(TimmDistiller(teacher.width), teacher, images),
            "ours": plain(Distiller(backbone("swin_v2", SWIN_T), teacher.width), teacher, images),
            "fdscale": framework(teacher, images, Path(folder)),
        }
        clocks = {"wall": time.perf_counter, "cpu": time.process_time}
        seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in ways} for clock in clocks}
        for turn in range(rounds + 1):
            order = [*ways][turn % len(ways) :] + [*ways][: turn % len(ways)]  # nobody is always behind the same one
            for name in order:
                step = ways[name]
                start = {clock: read() for clock, read in clocks.items()}
                step()
                if turn:
                    for clock, read in clocks.items():
                        seconds[clock][name].append(read() - start[clock])
    ratios = {clock: {pair: ratio(taken, *pair.split(" / ")) for pair in PAIRS} for clock, taken in seconds.items()}
    return {"seconds": seconds, "ratios": ratios}


def prepared(images: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor, Tensor]:
    """What every step does before the student: decode to float, teacher forward, whitening."""
    floats = images.float() / 255
    return normalise(floats, torch.float32), whiten(teacher(floats)), torch.arange(images.shape[0])


def plain(module: nn.Module, teacher: Teacher, images: Tensor) -> Callable[[], None]:
    """A step of a plain PyTorch loop."""
    module.train()
    decayed = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)

    def step() -> None:
        loss = module(*prepared(images, teacher))
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def framework(teacher: Teacher, images: Tensor, folder: Path) -> Callable[[], None]:
    """A step through the loop that `fdscale distill` runs, one log line each."""
    with torch.device("meta"):
        module = Distiller(backbone("swin_v2", SWIN_T), teacher.width)
    batch = images.shape[0]
    engine = initialize(
        module,
        lambda name, shape: initial_value(module, name, shape, torch.float32, 0),
        {"zero_optimization": {"stage": 0}},
        batch_size=batch,
        micro_batch=batch,
        betas=(0.9, 0.999),
        eps=1e-8,
        clip_grad=3.0,
        layer_decay=1.0,
        **ADAM,
    )
    settings = config.load("demo", ["log.every=1", "log.tensorboard=false"])
    run = Run(folder / "run", settings)
    run.console.quiet = True
    run.open()
    state, meter = TrainState(), Meter(batch, Work(0, 0, 0), None)

    def step() -> None:
        train(
            engine,
            iter([images]),
            lambda batch: prepared(batch, teacher),
            state,
            run,
            meter,
            stop_at=state.step + 1,
            batch_size=batch,
            schedule=lambda step: cosine(step, steps=1000, lr=1e-3),
            save=lambda state: None,
            evaluate=dict,
            logging=settings.log,
            saving=settings.save,
        )

    return step


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Median and quartiles of one / other within each round."""
    within = [a / b for a, b in zip(seconds[one], seconds[other], strict=True)]
    low, median, high = statistics.quantiles(within, n=4)
    return {"median": median, "quartile_1": low, "quartile_3": high}


def print_table(result: dict[str, Any]) -> None:
    """Markdown tables: wall-clock time, and CPU time of all threads, which other programs disturb less."""
    machine = f"float32, {result['threads']} CPU threads, torch {result['torch']}"
    print(f"SwinV2-T, {SIZE} px, batch {result['batch']}, {machine}, {result['rounds']} rounds\n")
    print("| way | wall s per step: median (least) | CPU s per step: median (least) |\n|---|---|---|")
    for name in result["seconds"]["wall"]:
        cells = [result["seconds"][clock][name] for clock in ("wall", "cpu")]
        print("|".join(["", f" {name} ", *(f" {statistics.median(v):.3f} ({min(v):.3f}) " for v in cells), ""]))
    print("\n| ratio within a round | wall: median (quartiles) | CPU: median (quartiles) |\n|---|---|---|")
    for pair in PAIRS:
        cells = [result["ratios"][clock][pair] for clock in ("wall", "cpu")]
        form = " {median:.3f} ({quartile_1:.3f} .. {quartile_3:.3f}) "
        print("|".join(["", f" {pair} ", *(form.format(**cell) for cell in cells), ""]))


if __name__ == "__main__":
    raise SystemExit(main())
