"""One distillation step of SwinV2-T, against timm's swinv2_tiny in a plain PyTorch loop.

    fdscale bench loop --rounds 12 --json loop.json

Three ways of doing the same step (same images, teacher, projector, loss, AdamW, float32, batch) take turns within one
process, so that whatever else the machine does hits all alike; reported are medians, and the median and quartiles of
the ratio within a round:

    timm      timm's network in a plain loop
    ours      fdscale's network in the same plain loop
    fdscale   fdscale's network under DeepSpeed, through fdscale.train.train, with its metrics, flags and logging

`ours / timm` says what the network costs, `fdscale / ours` what the framework adds. The second is small against the
noise of a shared machine, so it is also measured in milliseconds on a network with as many parameter tensors, but
narrow.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdscale import config, dist
from fdscale.bench.timing import save
from fdscale.engine.guard import Guard
from fdscale.engine.initialize import initialize
from fdscale.engine.metrics import Meter, Work
from fdscale.engine.room import Room
from fdscale.engine.saver import Saver
from fdscale.engine.schedule import cosine
from fdscale.inputs import normalise
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
# As many layers and parameters as SwinV2-T, but narrow: a step is short, so that what the framework adds is seen.
NARROW = SWIN_T | {"embed_dim": 12, "num_heads": [1, 2, 4, 8]}
PAIRS = ("ours / timm", "fdscale / ours")
ADAM: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05}


class TimmDistiller(nn.Module):
    """timm's network with the same projector and loss."""

    def __init__(self, teacher_width: int) -> None:
        super().__init__()
        self.backbone = _timm_swin()
        self.projector = nn.Linear(self.backbone.num_features, teacher_width)

    def forward(self, images: Tensor, target: Tensor, numbers: Tensor) -> Tensor:
        return feature_loss(self.projector(self.backbone.forward_features(images).flatten(1, 2)), whiten(target))


def _timm_swin() -> Any:
    import timm

    return timm.create_model("swinv2_tiny_window8_256", img_size=SIZE, window_size=7, num_classes=0, drop_path_rate=0.2)


def main(rounds: int, batch: int, threads: int | None, json: Path | None) -> int:
    """Measure, print, and write JSON."""
    torch.set_num_threads(threads or os.cpu_count() or 1)
    result = measure(rounds, batch)
    result |= {"batch": batch, "threads": torch.get_num_threads(), "rounds": rounds, "torch": torch.__version__}
    print_table(result)
    if json:
        save(json, result)
    return 0


def measure(rounds: int, batch: int) -> dict[str, Any]:
    """Seconds of every step of all ways."""
    dist.init()
    teacher = load_teacher("timm:tf_efficientnet_lite0", weights="random")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        full = {
            "timm": plain(TimmDistiller(teacher.width), teacher, images),
            "ours": plain(Distiller(backbone("swin_v2", SWIN_T), teacher.width), teacher, images),
            "fdscale": framework(SWIN_T, teacher, images, Path(folder) / "full"),
        }
        seconds = in_turns(full, rounds)
        narrow = {
            "ours": plain(Distiller(backbone("swin_v2", NARROW), teacher.width), teacher, images[:1]),
            "fdscale": framework(NARROW, teacher, images[:1], Path(folder) / "narrow"),
        }
        narrow_s = in_turns(narrow, 10 * rounds)
    added_s = [b - a for a, b in zip(narrow_s["wall"]["ours"], narrow_s["wall"]["fdscale"], strict=True)]
    return {
        "seconds": seconds,
        "ratios": {
            clock: {pair: ratio(taken, *pair.split(" / ")) for pair in PAIRS} for clock, taken in seconds.items()
        },
        "added_s": dict(zip(("quartile_1", "median", "quartile_3"), statistics.quantiles(added_s, n=4), strict=True)),
    }


def in_turns(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by clock and way of every round after a warm-up, the ways in random order within a round."""
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in ways} for clock in clocks}
    for turn in range(rounds + 1):
        # Whoever comes after another network finds the caches and the allocator as that one left them.
        for name in random.Random(turn).sample([*ways], len(ways)):
            start = {clock: read() for clock, read in clocks.items()}
            ways[name]()
            if turn:
                for clock, read in clocks.items():
                    seconds[clock][name].append(read() - start[clock])
    return seconds


def prepared(images: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor, Tensor]:
    """What every step does before the student: decode to float, teacher forward."""
    floats = images.float() / 255
    return normalise(floats, torch.float32), teacher(floats), torch.arange(images.shape[0])


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


def framework(args: dict[str, Any], teacher: Teacher, images: Tensor, folder: Path) -> Callable[[], None]:
    """A step through the loop that `fdscale distill` runs, one log line each."""
    with torch.device("meta"):
        module = Distiller(backbone("swin_v2", args), teacher.width)
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
    run = Run(folder, settings)
    run.console.quiet = True
    run.open()
    turnstile = Turnstile(images)

    def loop() -> None:
        train(
            engine,
            lambda samples: turnstile.batches(),
            lambda batch: prepared(batch, teacher),
            tuple,
            TrainState(),
            run,
            Meter(batch, Work(0, 0, 0), None),
            Guard(settings.guard, batch),
            stop_at=10**9,
            batch_size=batch,
            schedule=lambda step: cosine(step, steps=1000, lr=1e-3),
            saver=Saver(engine, Room(folder, "bench"), run, {}),
            save=lambda: None,
            go_back=lambda: False,
            evaluate=dict,
            logging=settings.log,
            saving=settings.save,
        )

    threading.Thread(target=loop, daemon=True).start()
    turnstile.arrived.acquire()
    return turnstile.step


class Turnstile:
    """Batches that let a loop in another thread take one whole step at a time."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.arrived, self._enter = threading.Semaphore(0), threading.Semaphore(0)

    def batches(self) -> Generator[Tensor, None, None]:
        """For the loop, which ends with the process."""
        while True:
            self.arrived.release()
            self._enter.acquire()
            yield self._images

    def step(self) -> None:
        """From one request for a batch to the next."""
        self._enter.release()
        self.arrived.acquire()


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
    added, full_s = result["added_s"], statistics.median(result["seconds"]["wall"]["ours"])
    quartiles = f"{1e3 * added['quartile_1']:.1f} .. {1e3 * added['quartile_3']:.1f}"
    print(
        f"\nThe framework adds {1e3 * added['median']:.1f} ms ({quartiles}) to a step of a narrow network with as many"
    )
    print(f"parameter tensors: {added['median'] / full_s:.2%} of the SwinV2-T step of {full_s:.2f} s.")
