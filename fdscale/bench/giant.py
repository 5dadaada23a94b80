"""The 3-billion-parameter student on one large GPU: real steps at three sizes, memory as planned, save and resume.

    make gpu-giant                                  # or, with the torch and DeepSpeed that are installed there:
    python3 -m fdscale.bench.giant --out giant-report

SwinV2-G learns from a SwinV2-G, bf16, ZeRO 3 and activation checkpointing, at 192, 384 and 640 px with windows 12, 24
and 40, beside the official code's attention (`fdscale bench step`). Then it is trained for two steps, saved, and a new
process goes on from there for two more; 36 GB of disk are needed. Each part runs in processes of its own with a limit
of its own. DIR/giant.json and DIR/giant.md are rewritten after each. Exit code: 0 all is well, 1 not all, 2 there is
nothing to run on. `--device cpu` runs the same on a tiny student, to test the suite itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fdscale import UserError, config, dist
from fdscale.bench import machine, tables
from fdscale.bench.gpu import ROOT, environment, run_within
from fdscale.bench.step import make_shards
from fdscale.bench.timing import save

RECIPE, DS = "swinv2_g", "ds_configs/zero3.json"
LIMIT_S = 535.0  # of a part: under nine minutes
STEPS = {"192 px": (192, 12, 16), "384 px": (384, 24, 8), "640 px": (640, 40, 2)}  # side, window, micro-batch
SAVE = "save and resume"
TINY = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "extra_norm_period": 2}
# Features of the student's grid: of what is saved nothing is the teacher's.
SMALL_TEACHER = (
    "teacher.source=timm:vit_tiny_patch16_224.augreg_in21k",
    "teacher.args={img_size: 192, patch_size: 32, embed_dim: 24, depth: 1, num_heads: 2}",
)
SAVED = (
    "teacher.weights=random", "optim.batch_size=16", "memory.micro_batch=16", "schedule.epochs=null",
    "schedule.steps=100", "schedule.warmup_epochs=null", "schedule.warmup_steps=1", "log.every=1",
    "log.tensorboard=false", "save.every=1000", "save.keep=1", "data.workers=2",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The suite, or the second half of its last part in this process (--resume, which the suite uses)."""
    words = argparse.ArgumentParser("python -m fdscale.bench.giant", description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("--out", default="giant-report", metavar="DIR", help="for the report (default: giant-report)")
    words.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a tiny student, to test it")
    words.add_argument("--only", nargs="+", choices=[*STEPS, SAVE], help="these parts only")
    words.add_argument("--rounds", type=int, default=5, metavar="N", help="of each step (default: 5)")
    words.add_argument("--resume", nargs=2, help=argparse.SUPPRESS)
    given = words.parse_args(argv)
    tiny = given.device == "cpu"
    try:
        if given.resume:
            return resume(Path(given.resume[0]), given.resume[1], tiny)
        if not tiny and not torch.cuda.is_available():
            raise UserError("no CUDA device is visible to torch here; --device cpu tests the suite itself")
        return Suite(Path(given.out), tiny, given.rounds).run(given.only or [*STEPS, SAVE])
    except UserError as error:
        print(f"fdscale: {error}", file=sys.stderr)
        return error.exit_code


def sized(side: int, window: int, micro: int, tiny: bool) -> list[str]:
    """Overrides of the recipe for a size; tiny ones keep the windows and a sixth of the side."""
    found: dict[str, Any] = {
        "data.image_size": side,
        "student.args.window_size": window,
        "teacher.args.window_size": window,
    }
    found |= {"teacher.args.img_size": side, "memory.micro_batch": micro, "optim.batch_size": micro}
    if tiny:
        found |= {"data.image_size": side // 6, "teacher.args.img_size": side // 6, "memory.micro_batch": 1}
        found |= {f"{who}.args.{name}": value for who in ("student", "teacher") for name, value in TINY.items()}
        found |= {f"{who}.args.pretrained_window_sizes": [0, 0] for who in ("student", "teacher")}
        found |= {"data.workers": 1, "optim.batch_size": 1}
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


def saved_run(shards: str, tiny: bool) -> list[str]:
    """Overrides of the recipe for the part that saves."""
    teacher = [one.replace("192, patch_size: 32", "32, patch_size: 8") if tiny else one for one in SMALL_TEACHER]
    found = [*sized(*STEPS["192 px"], tiny), *SAVED, f"data.shards={shards}", *teacher]
    own = [one for one in found if not one.startswith("teacher.args.")]
    return [*own, *(("memory.micro_batch=4", "optim.batch_size=4") if tiny else ())]


def resume(run: Path, shards: str, tiny: bool) -> int:
    """Go on from the checkpoint for two steps, without saving: the disk has no room for two."""
    from fdscale.distill import distill

    code = distill(config.load(RECIPE, saved_run(shards, tiny)), run, ds=str(ROOT / DS), stop_at=4, saves=False)
    dist.close()
    return code


class Suite:
    """A run of the suite: what came of each part, and the report."""

    def __init__(self, out: Path, tiny: bool, rounds: int) -> None:
        self.out, self.tiny, self.rounds = out.resolve(), tiny, rounds
        self.parts = self.out / "parts"
        self.report: dict[str, Any] = {"parts": {}, "tiny": tiny}

    def run(self, names: Sequence[str]) -> int:
        """The parts named; the exit code."""
        shutil.rmtree(self.parts, ignore_errors=True)
        self.parts.mkdir(parents=True)
        self.report["machine"] = machine.describe(torch.device("cpu" if self.tiny else "cuda"))
        for name in names:
            print(f"{name} ({LIMIT_S:.0f} s at most) ...", flush=True)
            try:
                record = self._save_and_resume() if name == SAVE else self._step(name)
            except Failed as failure:
                record = {"failed": str(failure)}
            self.report["parts"][name] = record
            save(self.out / "giant.json", self.report)
            (self.out / "giant.md").write_text(text(self.report))
            print(f"{name}: {record.get('failed', 'done')}", flush=True)
        print(f"report: {self.out / 'giant.md'}")
        return int(any("failed" in record for record in self.report["parts"].values()))

    def _step(self, name: str) -> dict[str, Any]:
        sets = sized(*STEPS[name], self.tiny)
        path = self.parts / f"{name.split()[0]}.json"
        words = ["bench", "step", RECIPE, "--ds", DS, "--rounds", str(self.rounds), "--json", str(path), *_sets(sets)]
        end_s, failed = time.monotonic() + LIMIT_S, {}
        try:
            self._fdscale(name, words, LIMIT_S)
        except Failed as failure:
            if "official: out of memory" not in str(failure):
                raise
            failed = {"official": "out of memory"}
            self._fdscale(name, [*words, "--against", "none"], end_s - time.monotonic())
        gpu = "h200" if "H200" in self.report["machine"]["device"] else "h100"
        planned = self._fdscale(
            name, ["plan", RECIPE, "--ds", DS, "--gpus", "1", "--gpu", gpu, "--json", *_sets(sets)], 60
        )
        plan = json.loads(planned[planned.index("{\n") :])["plans"][0]
        # torch's allocator sees neither the context of CUDA nor what lies between its blocks.
        seen = sum(size for part, size in plan["gpu_parts"].items() if part not in ("CUDA and NCCL", "fragmentation"))
        return {
            "measured": json.loads(path.read_text()),
            "failed_ways": failed,
            "planned_bytes": seen,
            "planned_s": plan["step_s"],
        }

    def _save_and_resume(self) -> dict[str, Any]:
        shards, run = make_shards(self.parts), self.parts / "run"
        free = shutil.disk_usage(self.parts).free
        self._fdscale(
            SAVE,
            ["distill", RECIPE, "--ds", DS, "--run", str(run), "--steps", "2", *_sets(saved_run(shards, self.tiny))],
            LIMIT_S,
        )
        saved = sum(path.stat().st_size for path in run.glob("checkpoints/step-*/*"))
        device = "cpu" if self.tiny else "cuda"
        command = [sys.executable, "-m", "fdscale.bench.giant", "--device", device, "--resume", str(run), shards]
        self._run(SAVE, command, LIMIT_S)
        starts = [json.loads(path.read_text()) for path in sorted(run.glob("starts/*.json"))]
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(run)  # what it holds fills the disk
        return {
            "checkpoint_bytes": saved,
            "free_bytes_before": free,
            "starts": [start.get("spent_s") for start in starts],
            "steps": [{key: record.get(key) for key in ("step", "loss", "grad_norm", "step_s")} for record in records],
        }

    def _fdscale(self, name: str, words: list[str], limit_s: float) -> str:
        return self._run(name, [sys.executable, "-m", "fdscale.cli", *words], limit_s)

    def _run(self, name: str, command: list[str], limit_s: float) -> str:
        """What a command of a part says. Raises Failed."""
        log = self.parts / f"{name.split()[0]}.log"
        before = log.stat().st_size if log.exists() else 0
        code = run_within(command, limit_s, log, environment())
        said = log.read_bytes()[before:].decode(errors="replace")
        if code is None:
            raise Failed(f"it did not end within {limit_s:.0f} s")
        if code != 0:
            raise Failed(f"exit code {code}: {said.strip()[-1500:]}")
        return said


class Failed(Exception):
    """A part's command did not do its work."""


def _sets(pairs: Sequence[str]) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def text(report: dict[str, Any]) -> str:
    """Markdown."""
    who = "a tiny student, to test this suite" if report["tiny"] else "SwinV2-G learns from SwinV2-G"
    parts = [f"# {who}, bf16, ZeRO 3, every block checkpointed", tables.machine(report["machine"])]
    head = ("size", "way", "s per step", "images/s", "MFU", "peak, GiB", "planned, GiB", "planned, s", "takes")
    rows: list[tuple[str, ...]] = []
    for name, record in report["parts"].items():
        if "measured" in record:
            rows += _rows(name, record)
    parts += [tables.table(head, rows)] if rows else []
    kept = report["parts"].get(SAVE, {})
    if "checkpoint_bytes" in kept:
        first, second = ({name: round(taken, 1) for name, taken in one.items()} for one in kept["starts"])
        losses = ", ".join(f"{record['loss']:.5f}" for record in kept["steps"] if record["loss"] is not None)
        parts += [
            f"## Save and resume\n\nA checkpoint of {kept['checkpoint_bytes'] / 1e9:.1f} GB. Seconds of the start that "
            f"saved it: {tables.machine(first)}. Of the one that went on: {tables.machine(second)}. Losses of the "
            f"steps: {losses}."
        ]
    parts += [f"{name}: {record['failed']}" for name, record in report["parts"].items() if "failed" in record]
    return tables.paragraphs(*parts) + "\n"


def _rows(name: str, record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of one size, a row for each way."""
    found, rows = record["measured"], []
    ours = statistics.median(found["ways"]["fdscale"]["seconds"])
    for way, taken in found["ways"].items():
        seconds = statistics.median(taken["seconds"])
        rate = found["batch"] / seconds
        flops = found["work"]["student"] + found["work"]["teacher"]
        mfu = f"{100 * rate * flops / found['peak_flops']:.1f} %" if found["peak_flops"] else ""
        peak = f"{taken['peak_bytes'] / 2**30:.2f}" if taken["peak_bytes"] else ""
        plan = (
            (f"{record['planned_bytes'] / 2**30:.2f}", f"{record['planned_s']:.3f}") if way == "fdscale" else ("", "")
        )
        rows.append(
            (f"{name}, batch {found['batch']}", way, f"{seconds:.3f}", f"{rate:.1f}", mfu, peak, *plan,
             f"{seconds / ours:.2f}")
        )  # fmt: skip
    return rows + [(name, way, f"not measured: {why}", *[""] * 6) for way, why in record["failed_ways"].items()]


if __name__ == "__main__":
    sys.exit(main())
