"""How long training waits for a checkpoint: fdscale's save beside training, against DeepSpeed's own.

    fdscale bench checkpoint --json checkpoint.json

One state (a ViT under AdamW and ZeRO: float32 weights and both moments) in one process, or in one per rank under
torchrun. In each round, in random order:

    DeepSpeed       engine.save_checkpoint: training waits until all is written (it is not synced to the disk)
    fdscale, waits  our save, and training waits until it is committed: written, hashed, synced, renamed
    fdscale         the same beside training

Of the last, two things are told: for how long training stood still, and all that the save cost, which is the time of
the steps until it was committed, less what as many steps take with nothing else going on. The second holds what
writing and hashing take from the processor's cores, which a GPU's step would not miss.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fdscale import config, dist
from fdscale.bench.data import machine, ratio
from fdscale.bench.timing import save
from fdscale.engine import state
from fdscale.engine.initialize import initialize
from fdscale.engine.room import open_room
from fdscale.engine.saver import Saver
from fdscale.models import backbone
from fdscale.models.layers import initial_value
from fdscale.objective import Distiller
from fdscale.run import Run

SIZE, WIDTH = 224, 512  # pixels; channels of the target
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
WAYS = ("DeepSpeed", "fdscale, waits", "fdscale")


def main(rounds: int, width: int, batch: int, stage: int, folder: str | None, quick: bool, json: Path | None) -> int:
    """`fdscale bench checkpoint`: measure, print, and write JSON."""
    dist.init()
    place = Path(dist.gather(tempfile.mkdtemp(dir=folder) if dist.rank() == 0 else None)[0])
    try:
        bench = Bench(place, 64 if quick else width, batch, stage)
        result = bench.measure(1 if quick else rounds)
    finally:
        dist.gather(None)
        if dist.rank() == 0:
            shutil.rmtree(place, ignore_errors=True)
    if dist.rank() == 0:
        print_table(result)
        if json:
            save(json, result)
    dist.close()
    return 0


class Bench:
    """An engine that trains, and the ways to save it."""

    def __init__(self, folder: Path, width: int, batch: int, stage: int):
        self.folder, self._stage = folder, stage
        args = {"img_size": SIZE, "patch_size": 16, "embed_dim": width, "depth": 12, "num_heads": width // 64}
        with torch.device("meta"):
            module = Distiller(backbone("vit", args), WIDTH)
            (target,) = module.predict(torch.empty(batch, 3, SIZE, SIZE))
        self.engine = initialize(
            module,
            lambda name, shape: initial_value(module, name, shape, torch.float32, 0),
            {"zero_optimization": {"stage": stage}, **(BF16 if dist.device().type == "cuda" else {})},
            batch_size=batch * dist.world(),
            micro_batch=batch,
            lr=1e-3,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            eps=1e-8,
            clip_grad=3.0,
            layer_decay=1.0,
        )
        self._run = Run(folder, config.load("demo", ["save.keep=1"]))
        self._saver = Saver(self.engine, open_room(folder / "checkpoints", "bench"), self._run, {})
        dtype = next(self.engine.module.parameters()).dtype
        self._images = torch.randn(batch, 3, SIZE, SIZE, device=dist.device(), dtype=dtype)
        self._target = torch.randn(target.shape, device=dist.device(), dtype=dtype)
        self._saves = 0

    def step(self) -> None:
        """One step of training, as `fdscale.train` makes it."""
        self._run.should_stop(0)
        self._saver.poll()
        self.engine.backward(self.engine(self._images, self._target))
        self._saver.before_update()
        self.engine.step()

    def steps(self, count: int) -> float:
        """Seconds of so many."""

        def all_of_them() -> None:
            for _ in range(count):
                self.step()

        return timed(all_of_them)

    def measure(self, rounds: int) -> dict[str, Any]:
        """Seconds of every round, after one that does not count."""
        seconds: dict[str, list[float]] = {name: [] for name in (*WAYS, "fdscale, in all", "a step")}
        during = []
        self.steps(2)
        for turn in range(rounds + 1):
            taken = {"a step": self.steps(4) / 4}
            for name in random.Random(turn).sample(WAYS, len(WAYS)):
                self._saves += 1
                if name == "DeepSpeed":
                    taken[name] = self._deepspeed()
                elif name == "fdscale, waits":
                    taken[name] = timed(self._and_wait)
                else:
                    taken[name], whole, steps = self._beside()
                    taken["fdscale, in all"] = whole - steps * taken["a step"]
            if turn:
                during.append(steps)
                for name, value in taken.items():
                    seconds[name].append(value)
        held = sum(values["fp32"].numel() for _, values in state.read(self.engine))
        versions = machine() | {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
        sizes = {"parameters": sum(dist.gather(held)), "ranks": dist.world(), "stage": self._stage}
        return {"machine": versions, "rounds": rounds, **sizes, "steps_during": during, "seconds": seconds}

    def _deepspeed(self) -> float:
        out = self.folder / "deepspeed"
        taken = timed(lambda: self.engine.save_checkpoint(str(out), tag="bench"))
        dist.gather(None)
        if dist.rank() == 0:
            shutil.rmtree(out)
        return taken

    def _and_wait(self) -> None:
        self._saver.begin(self._saves, 0)
        assert self._saver.has_saved(self._saves)

    def _beside(self) -> tuple[float, float, int]:
        """Seconds that training stood still, seconds until the save was committed, and steps in them."""
        self._saver.take_stall_s()
        start, steps = now(), 0
        self._saver.begin(self._saves, 0)
        while self._saver.saved_step != self._saves:
            self.step()
            steps += 1
        return self._saver.take_stall_s(), now() - start, steps


def now() -> float:
    """Seconds, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = now()
    work()
    return now() - start


def print_table(result: dict[str, Any]) -> None:
    """As Markdown."""
    seconds, gb = result["seconds"], 12e-9 * result["parameters"]
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print(
        f"{result['parameters'] / 1e6:.1f} M parameters, {gb:.2f} GB of state, {result['ranks']} rank(s), "
        f"ZeRO {result['stage']}; a step takes {statistics.median(seconds['a step']):.3f} s, and "
        f"{statistics.median(result['steps_during']):g} are made during a save; {result['rounds']} rounds, medians, "
        "ratios within a round with quartiles\n"
    )
    print("| way | seconds | share of DeepSpeed's |\n|---|---|---|")
    told = {"DeepSpeed": "DeepSpeed", "fdscale, waits": "fdscale, waits"}
    told |= {"fdscale": "fdscale: training stands still", "fdscale, in all": "fdscale: all that it costs training"}
    for name, text in told.items():
        share = ratio(seconds, name, "DeepSpeed", digits=4)
        print(f"| {text} | {statistics.median(seconds[name]):.4f} | {share} |")
