"""All runs of the experiment, one after the other, each by the command that a user would give.

Every network is the same ViT, with absolute positions: tables of relative ones start at zero and take more steps to
learn than there are here. Its starts for fine-tuning: random weights; a supervised teacher, which has learnt from
the labels that fine-tuning sees; a contrastive one, which has seen all images and no label; the students that each has
taught on all images; and the contrastive one trained on for as many images as its student has seen, so that a gain can
be told from that of more training. Each start has its own rate, chosen on images that are in no other part.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdscale import UserError
from fdscale.claim import contrastive, data
from fdscale.durable import write_atomically

STARTS = {
    "random": "random weights",
    "supervised": "supervised teacher",
    "supervised-fd": "its student",
    "contrastive": "contrastive teacher",
    "contrastive-fd": "its student",
    "contrastive-more": "contrastive teacher, trained on",
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything: images with labels and to test on, epochs, seeds, rates that are tried; the ViT's width
    and depth."""

    labelled: int = 4000
    tested: int = 10000
    supervised: int = 60
    contrastive: int = 8
    distilled: int = 8
    finetuned: int = 15
    seeds: int = 4
    rates: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    width: int = 64
    depth: int = 4


QUICK = Sizes(200, 300, 2, 1, 1, 1, 2, (3e-3,), 32, 2)


class Experiment:
    """Runs in a folder, going on where an earlier call stopped. quick: scikit-learn's digits and little of all."""

    def __init__(self, out: Path, source: Path, quick: bool) -> None:
        self.out, self.source, self.quick = out, source, quick
        self.sizes = QUICK if quick else Sizes()
        self.args = {
            "img_size": 28,
            "patch_size": 7,
            "embed_dim": self.sizes.width,
            "depth": self.sizes.depth,
            "num_heads": max(1, self.sizes.width // 32),
            "layer_scale": 0.1,
        }

    def run(self) -> dict:
        """Everything; the results as plain data: top-1 on the test part by start and seed, rates, seconds."""
        with self._timed():
            top1, rates = self._measured()
        seconds = json.loads(self._seconds.read_text())
        return {"top1": top1, "rates": rates, "sizes": vars(self.sizes), "seconds": seconds, "quick": self.quick}

    def _measured(self) -> tuple[dict[str, list[float]], dict[str, float]]:
        unlabelled = self._prepare()
        weights = self._weights(unlabelled)
        rates = {name: self._rate(name, weights[name]) for name in STARTS}
        top1 = {
            name: [
                self._finetune(f"test-{name}-{rates[name]:g}-{seed}", weights[name], rates[name], seed, "test")
                for seed in range(self.sizes.seeds)
            ]
            for name in STARTS
        }
        return top1, rates

    def _prepare(self) -> data.Part:
        """Shards of labelled, chosen-by, all and test images; the images without labels.

        Raises UserError where the folder has runs of other sizes.
        """
        told = json.dumps({**vars(self.sizes), "rates": None})  # these are in the names of runs
        before = self.out / "sizes.json"
        if before.exists() and before.read_text() != told:
            raise UserError(f"{self.out} holds the experiment in other sizes: name another folder with --out")
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(before, told)
        train, test = data.digits() if self.quick else data.fashion(self.source)
        test = data.Part(*(part[: self.sizes.tested] for part in test))
        labelled, chosen_by, rest = data.split(train, self.sizes.labelled, seed=0)
        parts = {"labelled": (labelled, True), "chosen-by": (chosen_by, True), "test": (test, True)}
        everything = data.Part(*(_joined(labelled, rest)))
        parts["all"] = (everything, False)
        for name, (part, classes) in parts.items():
            if (self.out / "shards" / name / "index").is_dir():
                continue
            data.write(part, self.out / "images" / name, classes)
            size = str(max(50, len(part.labels) // 16))
            command(
                "shards", "make", self.out / "images" / name, self.out / "shards" / name, "--samples-per-shard", size
            )
        return everything

    def _weights(self, unlabelled: data.Part) -> dict[str, Path | None]:
        """What every start begins with: a run, or a file; None: nothing."""
        sizes, runs = self.sizes, self.out / "runs"
        own = {**self.args, "position": "absolute"}
        teachers = {}
        for name, epochs, start in (
            ("contrastive", sizes.contrastive, None),
            ("contrastive-more", sizes.distilled, "contrastive"),
        ):
            teachers[name] = self.out / f"{name}.safetensors"
            if not teachers[name].exists():
                before = teachers[start] if start else None
                contrastive.train(unlabelled.images, own, epochs, 0, teachers[name], before)
        self._finetune("supervised", None, 3e-3, 100, "test", sizes.supervised)
        teachers["supervised"] = self.out / "supervised.safetensors"
        if not teachers["supervised"].exists():
            command("export", runs / "supervised", teachers["supervised"])
        students = {}
        for name in ("supervised", "contrastive"):
            self._distil(f"{name}-fd", teachers[name])
            students[f"{name}-fd"] = runs / f"{name}-fd"
        return {"random": None, **teachers, **students}

    def _distil(self, name: str, teacher: Path) -> None:
        if not self._is_done(name):
            self._train(
                "distill",
                "demo",
                name,
                "student.model=vit",
                f"student.args={yaml({**self.args, 'position': 'absolute', 'drop_path_rate': 0.05})}",
                "teacher.source=fdscale:vit",
                "teacher.feature=last",
                f"teacher.args={yaml({**self.args, 'position': 'absolute'})}",
                f"teacher.weights={teacher}",
                f"data.shards={self.out / 'shards/all'}",
                "data.scale=[0.5, 1.0]",
                "optim.lr=1.5e-3",
                "optim.clip_grad=0.3",
                "schedule.steps=null",
                f"schedule.epochs={self.sizes.distilled}",
                "schedule.warmup_steps=null",
                "schedule.warmup_epochs=0.5",
                batch=64 if self.quick else 256,
            )

    def _rate(self, name: str, weights: Path | None) -> float:
        """The one of the rates with the best accuracy on the images to choose by, with one seed."""
        rates = self.sizes.rates
        if len(rates) == 1:
            return rates[0]
        found = [self._finetune(f"chosen-by-{name}-{rate:g}", weights, rate, 0, "chosen-by") for rate in rates]
        return rates[max(range(len(rates)), key=lambda place: found[place])]

    def _finetune(
        self, name: str, weights: Path | None, rate: float, seed: int, part: str, epochs: int | None = None
    ) -> float:
        """Top-1 after fine-tuning on the labelled images."""
        if not self._is_done(name):
            self._train(
                "finetune",
                "demo_finetune",
                name,
                "student.model=vit",
                f"student.args={yaml({**self.args, 'position': 'absolute', 'drop_path_rate': 0.05})}",
                f"student.weights={'null' if weights is None else weights}",
                f"student.seed={seed}",
                f"data.seed={seed}",
                f"data.shards={self.out / 'shards/labelled'}",
                f"data.heldout_shards={self.out / 'shards' / part}",
                "data.scale=[0.8, 1.0]",
                "classify.head_scale=1.0",  # a small head would take most of so few steps to grow
                "classify.mixup=0.0",
                f"data.flip={0.0 if self.quick else 0.5}",
                f"optim.lr={rate:g}",
                f"optim.layer_decay={1.0 if weights is None else 0.75}",  # random layers have all to learn
                f"schedule.epochs={epochs or self.sizes.finetuned}",
                f"schedule.warmup_epochs={min(2, (epochs or self.sizes.finetuned) / 4)}",
                batch=40 if self.quick else 50,
            )
        rows = [json.loads(line) for line in (self.out / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        return [row["heldout_top1"] for row in rows if "heldout_top1" in row][-1]

    def _train(self, verb: str, recipe: str, name: str, *settings: str, batch: int) -> None:
        fixed = (
            "data.image_size=28",
            "data.interpolation=bicubic",
            f"optim.batch_size={batch}",
            f"memory.micro_batch={batch}",
            "data.block=64",
            "log.every=100",
            "log.heldout_every=1000000",
            "log.tensorboard=false",
            "save.every=1000000",
            "save.keep=1",
        )
        words = [word for pair in (*fixed, *settings) for word in ("--set", pair)]
        command(verb, recipe, "--run", self.out / "runs" / name, *words)
        (self.out / "runs" / name / "done").touch()

    def _is_done(self, name: str) -> bool:
        return (self.out / "runs" / name / "done").exists()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the seconds of this call to those of earlier ones that it goes on from, also where it fails."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            if self.out.is_dir():
                before = json.loads(self._seconds.read_text()) if self._seconds.exists() else 0.0
                write_atomically(self._seconds, json.dumps(before + time.perf_counter() - begun))

    @property
    def _seconds(self) -> Path:
        return self.out / "seconds.json"


def yaml(tree: dict) -> str:
    """A mapping of plain values on a line."""
    return "{" + ", ".join(f"{key}: {value}" for key, value in tree.items()) + "}"


def command(*words: object) -> None:
    """Show and run one fdscale command in a process of its own."""
    texts = [str(word) for word in words]
    print(f"$ fdscale {' '.join(texts)}", flush=True)
    if subprocess.run([sys.executable, "-m", "fdscale.cli", *texts], check=False).returncode:
        raise UserError(f"`fdscale {texts[0]}` failed (see above); the same command again goes on from there")


def _joined(first: data.Part, second: data.Part) -> Sequence:
    import numpy as np

    return [np.concatenate(pair) for pair in zip(first, second, strict=True)]
