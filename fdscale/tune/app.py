"""`fdscale tune`."""

from __future__ import annotations

import dataclasses
import json as json_module
import shutil
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fdscale import UserError, __version__, config, student
from fdscale.durable import as_json, write_atomically
from fdscale.engine import ds_config
from fdscale.inputs import open_sets
from fdscale.plan import search
from fdscale.plan.machines import GPUS, Machine, machine
from fdscale.tune import space, trial
from fdscale.tune.space import Candidate, Choice

BEST = 2  # measured again, since the fastest of many was also the luckiest
IMAGES = 512  # made where the recipe has no data


def main(
    recipe: str,
    out: str,
    set: list[str],
    ds: list[str],
    ranks: int | None,
    gpu: str | None,
    trials: int,
    steps: int,
    limit: float,
    json: bool,
) -> int:
    """`fdscale tune`; the exit code is 2 where nothing could be measured."""
    if trials < 1 or steps < trial.PARTS or limit <= 0:
        raise UserError(f"--trials and --limit must be positive, and --steps at least {trial.PARTS}")
    world = ranks or max(1, torch.cuda.device_count())
    settings = config.load(recipe, set)
    _check_sources(settings)
    ds_configs = {name: ds_config.read(name) for name in ds} or _usual()
    folder = Path(out)
    study = Study(folder, settings, ds_configs, world, steps)
    backbone = student.backbone(settings)
    on = _machine(gpu, world)
    one_op = on is not None or torch.cuda.is_available() or settings.memory.kernels not in ("auto", "reference")
    found = space.choices(settings, [*ds_configs], world, backbone.depths, one_op)
    candidates = space.planned(found, _long(settings), ds_configs, world, on)
    _say(f"{len(candidates)} of {len(found)} configurations to choose from\n")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a trial ends with this process
    with study:
        while len(study.done) < trials and not study.hopeless():
            following = space.following(candidates, study.done)
            if following is None:
                break
            study.measure(following, limit)
        for candidate in study.finalists(candidates):
            study.measure(candidate, limit)
    return study.report(candidates, json)


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _long(settings: config.Config) -> config.Config:
    """A config of more steps than are measured."""
    lengths: dict[str, Any] = {"steps": 10_000, "epochs": None, "warmup_steps": 100, "warmup_epochs": None}
    return dataclasses.replace(settings, schedule=dataclasses.replace(settings.schedule, **lengths))


def _usual() -> dict[str, dict[str, Any]]:
    """The ds_configs to try where none are given: those that ship, or on a CPU float32 without sharding."""
    if torch.cuda.is_available():
        return search.shipped()
    return {"none": ds_config.read(None)}


def _machine(gpu: str | None, world: int) -> Machine | None:
    """What to plan for; None where there is no GPU that the plan knows."""
    if gpu is None and torch.cuda.is_available():
        name, gib = torch.cuda.get_device_name().lower(), torch.cuda.get_device_properties(0).total_memory / 2**30
        near = [key for key, one in GPUS.items() if key.split("-")[0] in name and abs(one.memory_gib - gib) < 8]
        gpu = near[0] if near else None
    return machine(gpu, None, min(world, torch.cuda.device_count() or 8)) if gpu else None


class Study:
    """The directory of a tuning: what was measured, line by line. Use as a context manager around measuring."""

    def __init__(
        self,
        folder: Path,
        settings: config.Config,
        ds_configs: dict[str, dict[str, Any]],
        world: int,
        steps: int,
    ):
        self.folder, self._settings, self._ds = folder, settings, ds_configs
        self._world, self._steps = world, steps
        self._path = folder / "trials.jsonl"
        self.done: dict[Choice, dict[str, Any]] = {}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        about = {
            "config": config.as_dict(settings),
            "ds_configs": ds_configs,
            "ranks": world,
            "steps": steps,
            "device": device,
            "torch": torch.__version__,
            "fdscale": __version__,
        }
        self._open(json_module.loads(json_module.dumps(about)))

    def _open(self, about: dict[str, Any]) -> None:
        """Read what is there, or begin. Raises UserError where it is of something else."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text().splitlines() if self._path.exists() else []
            if not lines:
                write_atomically(self._path, json_module.dumps(about) + "\n")
        except OSError as error:
            raise UserError(
                f"--out {self.folder}: {error.strerror}; expected a directory that can be written"
            ) from None
        if not lines:
            return
        try:
            before = json_module.loads(lines[0])
            records = [json_module.loads(line) for line in lines[1:]]
        except ValueError:
            raise UserError(f"{self._path} is damaged; remove it, or name another --out") from None
        if differ := sorted(key for key in {*about, *before} if about.get(key) != before.get(key)):
            raise UserError(
                f"{self.folder} holds trials of something else ({', '.join(differ)} differ): name another --out"
            )
        for record in records:
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        """A trial counts from here on; of a choice that was measured before, both do."""
        choice = _choice(record)
        before = self.done.get(choice)
        if record["state"] == "done":
            if before is not None and before["state"] == "done":
                record = record | {"parts_s": [*before["parts_s"], *record["parts_s"]]}
            record = record | {"step_s": statistics.median(record["parts_s"])}
        self.done[choice] = record if before is None else record | {"again": True}

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exc: object) -> None:
        for name in ("trial", "data"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def hopeless(self) -> bool:
        """Whether what went wrong is not a matter of the choice: it is the same in all trials."""
        reasons = {record.get("why") for record in self.done.values()}
        return len(self.done) >= space.SEEDS and len(reasons) == 1 and None not in reasons

    def finalists(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """What is measured once more, at the end: the recipe's own and the best two, as far as they were not yet."""
        done = [one for one in candidates if self.done.get(one.choice, {}).get("state") == "done"]
        best = sorted(done, key=lambda one: self.done[one.choice]["step_s"])[:BEST]
        own = [one for one in done if one == candidates[0]]
        return [one for one in dict.fromkeys((*own, *best)) if "again" not in self.done[one.choice]]

    def measure(self, candidate: Candidate, limit_s: float) -> None:
        """One trial, and its line."""
        choice = candidate.choice
        _say(f"{len(self.done) + (choice not in self.done)}: {_text(choice)}{', again' * (choice in self.done)} ... ")
        found = trial.measure(
            self.folder / "trial", self._ready(choice), self._ds[choice.ds], self._world, self._steps, limit_s
        )
        step_s = statistics.median(found.get("parts_s", [0.0]))
        done = f"{step_s:.3f} s per step, {found.get('mem_gib', 0):.2f} GiB"
        _say(f"{found['state']}: {found['why']}\n" if "why" in found else f"{done}\n")
        planned = {"planned_s": candidate.planned_s, "planned_gib": candidate.planned_gib}
        text = as_json({**choice._asdict(), **planned, **found})
        write_atomically(self._path, f"{self._path.read_text()}{text}\n")
        self._take(json_module.loads(text))

    def _ready(self, choice: Choice) -> config.Config:
        """The recipe as a trial runs it: this choice, no evaluation, and something for what it has no files for."""
        settings, parts = _long(choice.applied(self._settings)), self._steps // trial.PARTS
        change = dataclasses.replace
        data = change(settings.data, heldout_shards=None)
        if not data.shards:
            data = change(data, shards=(str(_images(self.folder / "data")),))
        teacher, teachers = settings.teacher, settings.teachers
        if config.task_of(settings) == "distill":  # what weights are takes no more or less time
            teachers = {name: change(one, weights=one.weights or "random") for name, one in teachers.items()}
            teacher = teacher if teachers else change(teacher, weights=teacher.weights or "random")
        return change(
            settings,
            data=data,
            teacher=teacher,
            teachers=teachers,
            log=change(settings.log, every=parts, tensorboard=False, samples=False, wandb=None),
            save=change(settings.save, every=10**6),
            guard=change(settings.guard, step_limit_s=0),
        )

    def report(self, candidates: Sequence[Candidate], json: bool) -> int:
        """The table, and the winner's files."""
        own = self.done.get(candidates[0].choice, {}).get("step_s")
        rows = sorted(self.done.values(), key=lambda record: record.get("step_s", float("inf")))
        best = rows[0] if rows and rows[0]["state"] == "done" else None
        table = _table(rows, own, candidates[0].choice)
        write_atomically(self.folder / "table.md", table)
        if best is not None:
            tuned = _choice(best).applied(self._settings)
            write_atomically(self.folder / "recipe.yaml", config.dump(tuned))
            write_atomically(self.folder / "ds_config.json", json_module.dumps(self._ds[best["ds"]], indent=2) + "\n")
        if json:
            print(as_json({"best": best, "own_step_s": own, "trials": rows}, indent=1))
        else:
            print(f"\n{table}")
            print(self._advice(best, own))
        return 0 if best is not None else 2

    def _advice(self, best: dict[str, Any] | None, own: float | None) -> str:
        if best is None:
            return f"nothing ran, see above and {self._path}; remove that file to try again"
        gain = f"{own / best['step_s']:.2f} times as fast as what you have" if own else "what you have does not run"
        verb = "distill" if config.task_of(self._settings) == "distill" else "finetune"
        return (
            f"{gain}. To train with it:\n"
            f"  fdscale {verb} {self.folder / 'recipe.yaml'} --ds {self.folder / 'ds_config.json'} --run DIR"
        )


def _check_sources(settings: config.Config) -> None:
    """What trials would each stumble over. Raises UserError."""
    task = config.task_of(settings)
    if settings.data.shards:
        open_sets(settings.data)
    elif task in ("segment", "detect"):
        raise UserError(f"{task}.classes: masks and objects are not made up; give some with --set data.shards=...")
    for teacher in config.teachers_of(settings).values() if task == "distill" else ():
        if teacher.weights not in (None, "random", "own") and not Path(teacher.weights).exists():
            raise UserError(f"teacher.weights: {teacher.weights} is not there")


def _choice(record: dict[str, Any]) -> Choice:
    checkpoint, chunk = tuple(record["checkpoint"]), tuple(record["attention_chunk"])
    return Choice(record["ds"], record["micro_batch"], checkpoint, chunk)


def _text(choice: Choice) -> str:
    chunk = f", attention_chunk {_short(choice.attention_chunk)}" if any(choice.attention_chunk) else ""
    return f"{choice.ds}, micro_batch {choice.micro_batch}, checkpoint {_short(choice.checkpoint)}{chunk}"


def _short(values: Sequence[Any]) -> str:
    return ",".join(map(str, values))


def _table(rows: Sequence[dict[str, Any]], own: float | None, first: Choice) -> str:
    """Markdown, the fastest first."""
    columns = ["ds_config", "micro-batch", "checkpoint", "chunk", "step s (least .. most)", "GiB", "data wait s"]
    columns += ["planned s, GiB", ""]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        planned = "" if row["planned_s"] is None else f"{row['planned_s']:.3f}, {row['planned_gib']:.1f}"
        if row["state"] == "done":
            times = f"{row['step_s']:.3f} ({min(row['parts_s']):.3f} .. {max(row['parts_s']):.3f})"
            measured = [times, f"{row['mem_gib']:.2f}", f"{row['data_wait_s']:.3f}"]
            remark = f"{own / row['step_s']:.2f}x" if own else ""
        else:
            measured, remark = ["", "", ""], f"{row['state']}: {row['why']}".replace("|", "\\|")
        remark = f"what you have; {remark}" if _choice(row) == first else remark
        cells = [row["ds"], row["micro_batch"], _short(row["checkpoint"]), _short(row["attention_chunk"])]
        lines.append(f"| {' | '.join(map(str, [*cells, *measured, planned, remark]))} |")
    return "\n".join(lines) + "\n"


def _images(folder: Path) -> Path:
    """Shards of made images of about the size of ImageNet's; the same for all trials."""
    shards = folder / "shards"
    if shards.exists():
        return shards
    import numpy as np
    from PIL import Image

    from fdscale.data.shards import make

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.float32)
        noisy = (pixels + rng.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)
        label = folder / "images" / str(number % 2)
        label.mkdir(exist_ok=True)
        Image.fromarray(noisy).save(label / f"{number}.jpg", quality=90)
    make(folder / "images", shards, samples_per_shard=64)
    shutil.rmtree(folder / "images")
    return shards
