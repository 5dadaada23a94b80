"""`fdscale bench step RECIPE`: how fast a recipe trains on this machine, where the time goes, and against what.

    fdscale bench step swinv2_g --ds ds_configs/swinv2_g_141g.json --json step.json

The job's own parts are measured: its data (or made photographs, where data.shards is not set), teacher, student and
engine, on one rank or under torchrun or srun on many. A round has a step of every way, in random order; then each way's
parts, waiting for the GPU between them, which the steps before do not. Weights that are not given are random.

    fdscale    the recipe as it is
    official   the same modules, nothing compiled or fused, window attention as in microsoft/Swin-Transformer
    eager      the same modules, nothing compiled
    timm       timm's network of the same size under the same ds_config, with timm's checkpointing if the recipe has any
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fdscale import UserError, assemble, config, dist, student
from fdscale.bench import machine, peers, tables
from fdscale.bench.timing import ratio, save
from fdscale.bench.traffic import Traffic, length, union
from fdscale.classify import Classification
from fdscale.data.shards import make
from fdscale.distill import Distillation
from fdscale.engine.ds_config import bf16, check_checkpointing, check_linear
from fdscale.engine.initialize import initialize, prepare_environment, read_ds_config
from fdscale.engine.metrics import peak_flops
from fdscale.job import Task
from fdscale.models.teachers import Teacher

PARTS = ("data", "inputs and teacher", "forward", "backward", "update")
WARM_UP = 2  # steps of each way: compiling, and the first one's allocations
SHARDS, PER_SHARD, SIDES = 8, 16, (500, 375)  # made photographs, about as ImageNet's
COMMUNICATES = ("nccl", "gloo:", "c10d::")  # beginnings, or parts, of names of what a profile shows
Phases = Callable[[str], AbstractContextManager[None]]


def main(
    recipe: str, set: list[str], ds: str | None, against: str, rounds: int, accumulate: int, threads: int | None,
    json: Path | None,
) -> int:  # fmt: skip
    """Measure, print Markdown on rank 0, and write JSON."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts and stops
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    prepare_environment()
    ds_config = read_ds_config(ds)
    settings = config.load(recipe, set)
    dist.init()
    with made_shards(settings) as shards:
        result = measure(measured(settings, shards, accumulate), ds_config, against, rounds)
    result |= {"recipe": recipe, "set": set, "ds": ds, "made images": shards is not None}
    if dist.rank() == 0:
        print(text(result))
        if json:
            save(json, result)
    dist.close()
    return 0


@contextmanager
def made_shards(settings: config.Config) -> Iterator[str | None]:
    """Shards of smooth noise in two classes, which each rank makes for itself; None where the recipe has its own."""
    if settings.data.shards:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield make_shards(Path(folder))


def make_shards(folder: Path) -> str:
    """The same in a folder; nothing but where they lie tells two such sets apart."""
    rng = np.random.default_rng(0)
    for number in range(SHARDS * PER_SHARD):
        coarse = rng.integers(0, 256, (SIDES[1] // 8, SIDES[0] // 8, 3), dtype=np.uint8)
        path = folder / "in" / str(number % 2) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize(SIDES, Image.Resampling.BICUBIC).save(path, quality=93)
    make(folder / "in", folder / "shards", samples_per_shard=PER_SHARD)
    return f"{folder}/shards"


def measured(settings: config.Config, shards: str | None, accumulate: int) -> config.Config:
    """The config with `accumulate` micro-batches of each rank as its batch, and random weights where none are given."""
    batch = settings.memory.micro_batch * dist.world() * accumulate
    data = settings.data
    if shards is not None:
        data = dataclasses.replace(data, shards=(shards,), index=None, weights=None)
    teachers = {
        name: teacher if teacher.weights or not teacher.source else dataclasses.replace(teacher, weights="random")
        for name, teacher in (("", settings.teacher), *settings.teachers.items())
    }
    return dataclasses.replace(
        settings,
        student=dataclasses.replace(settings.student, weights=None),
        teacher=teachers.pop(""),
        teachers=teachers,
        classify=dataclasses.replace(settings.classify, head="fresh"),
        data=dataclasses.replace(data, heldout_shards=None, lanes=None),
        optim=dataclasses.replace(settings.optim, batch_size=batch),
    )


def measure(settings: config.Config, ds: dict[str, Any], against: str, rounds: int) -> dict[str, Any]:
    """Seconds of steps and of their parts by way, bytes at most, and what of it is communication; a collective."""
    if (task_name := config.task_of(settings)) in ("segment", "detect"):
        raise UserError(
            f"{task_name}.classes is set, and this measures distillation and classifiers: take such a recipe"
        )
    check_checkpointing(ds, settings.memory.checkpoint)
    check_linear(ds, settings.student.linear)
    task: Any = task_of(settings)
    kind = chosen(against, task)
    ways = {"fdscale": Way(task, task.module, ds, nullcontext)}
    before = _allocated()
    task.place()
    ways["fdscale"].beside = beside = _allocated() - before
    if kind == "official":
        ways[kind] = ways["fdscale"].in_context(lambda: peers.eager_and_official(networks_of(task)))
    elif kind == "eager":
        ways[kind] = ways["fdscale"].in_context(lambda: torch.compiler.set_stance("force_eager"))
    elif kind == "timm":
        others = lambda: peers.eager_and_official(networks_of(task)[1:])  # noqa: E731  its teacher is eager, too
        with fitting(kind):
            ways[kind] = Way(task, timm_module(settings, task), ds, others)
            ways[kind].beside = beside
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(WARM_UP + rounds):
        for name in random.Random(turn).sample([*ways], len(ways)):
            with fitting(name):
                taken = ways[name].timed()
            if turn >= WARM_UP:
                seconds[name].append(taken)
    for name, way in ways.items():
        parts[name] = [way.parts() for _ in range(rounds)]
    result: dict[str, Any] = {"machine": machine.describe(dist.device()), "ranks": dist.world()}
    result |= {"batch": settings.optim.batch_size, "micro_batch": settings.memory.micro_batch, "against": kind}
    result |= {
        "about": task.about(),
        "precision": "bf16" if bf16(ds) else "float32",
        "threads": torch.get_num_threads(),
    }
    work = task.work()
    result |= {
        "work": dataclasses.asdict(work),
        "peak_flops": peak_flops(torch.bfloat16 if bf16(ds) else torch.float32),
    }
    result["ways"] = {
        name: {"seconds": seconds[name], "parts": parts[name], "peak_bytes": ways[name].peak_bytes} for name in ways
    }
    result["communication"] = ways["fdscale"].communication() if dist.world() > 1 else None
    for way in ways.values():
        way.close()
    return result


def task_of(settings: config.Config) -> Task:
    """The job's own."""
    if config.task_of(settings) != "distill":
        return Classification(settings, dist.world())
    teachers = {name: teacher_of(settings, name) for name in config.teachers_of(settings)}
    return Distillation(assemble.assemble(settings, dist.world(), teachers))


def teacher_of(settings: config.Config, name: str) -> Teacher:
    """The job's own; a random one of this project's networks is filled on the device, in a moment for any size."""
    of = config.teachers_of(settings)[name]
    if of.weights != "random" or not of.source.startswith("fdscale:"):
        return assemble.build_teacher(settings, name)
    teacher = assemble.build_teacher(settings, name, shapes_only=True)
    assemble.let_compute(teacher, settings)
    teacher.network.to_empty(device=dist.device())
    for tensor in (*teacher.network.parameters(), *teacher.network.buffers()):
        tensor.normal_(std=0.02) if tensor.element_size() > 1 else tensor.view(torch.uint8).zero_()
    return teacher


def networks_of(task: Any) -> list[nn.Module]:
    """The student, and those teachers that take kernels."""
    teachers = task.parts.teachers.values() if isinstance(task, Distillation) else ()
    return [task.module, *(teacher.network for teacher in teachers if teacher.is_ours)]


def chosen(against: str, task: Any) -> str:
    """The other way: by default official for window attention, else timm. Raises UserError where there is no such."""
    windows = peers.has_window_attention(task.module)
    if against == "official" and not windows:
        raise UserError("--against official is for students with window attention; take timm or none")
    return ("official" if windows else "timm") if against == "auto" else against


def timm_module(settings: config.Config, task: Any) -> nn.Module:
    """The task's module around timm's network."""
    other = peers.TimmBackbone(settings)
    if not isinstance(task, Distillation):
        return student.build_classifier(settings, other)
    return assemble.join(settings, other, task.parts.teachers)[1]


@contextmanager
def fitting(name: str) -> Iterator[None]:
    """Say which way it is that does not fit: an engine that ran out of memory in a step is of no use to another way."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = "" if name == "fdscale" else "; --against none measures the recipe alone"
        raise UserError(f"{name}: out of memory: {str(error).splitlines()[0]}{advice}") from None


def _allocated() -> int:
    """Bytes on a GPU now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Way:
    """A module under an engine of its own, its batches, and what holds while it computes."""

    def __init__(self, task: Any, module: nn.Module, ds: dict[str, Any], context: Callable[[], Any]) -> None:
        self._task, self._context = task, context
        self._dtype = torch.bfloat16 if bf16(ds) else torch.float32
        before = _allocated()
        self.engine = engine_of(task.inputs.settings, module, ds, self._dtype)
        self._held = [_allocated() - before]  # and what its steps leave there: moments, after the first
        self._batches: Generator[Any, None, None] = task.stream(0, 2**40)
        self.beside = 0  # bytes of what all ways need, the teachers
        self.peak_bytes: int | None = None

    def in_context(self, context: Callable[[], Any]) -> Way:
        """The same modules and engine in another context."""
        other = object.__new__(Way)
        other.__dict__.update(self.__dict__, _context=context)
        return other

    def step(self, phase: Phases) -> None:
        """One, as `fdscale.train` does it."""
        engine = self.engine
        for _ in range(engine.gradient_accumulation_steps()):
            with phase("data"):
                batch = next(self._batches)
            with phase("inputs and teacher"):
                inputs = self._task.prepare(batch, self._dtype)
            with phase("forward"):
                loss = engine(*inputs)
            with phase("backward"):
                engine.backward(loss)
            with phase("update"):
                engine.step()

    def timed(self) -> float:
        """Seconds of a step, from and to when the GPU is done."""
        before = _allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with self._context():
            taken = _seconds(lambda: self.step(lambda _: nullcontext()))
        if torch.cuda.is_available():
            peak = self.beside + sum(self._held) + torch.cuda.max_memory_allocated() - before
            self.peak_bytes = max(self.peak_bytes or 0, peak)
            self._held.append(_allocated() - before)
        return taken

    def parts(self) -> dict[str, float]:
        """Seconds of a step's parts, each waited for."""
        taken = dict.fromkeys(PARTS, 0.0)

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            start = time.perf_counter()
            yield
            _wait()
            taken[name] += time.perf_counter() - start

        with self._context():
            _wait()
            self.step(phase)
        return taken

    def communication(self) -> dict[str, Any]:
        """Seconds of one step in which ranks communicate, those of them in which a GPU does nothing else, and the
        collectives of one.
        """
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with self._context(), profile(activities=kinds) as seen:
            step_s = _seconds(lambda: self.step(lambda _: nullcontext()))
        on_gpu = torch.autograd.DeviceType.CUDA
        events = [
            (event.start_ns(), event.end_ns(), any(part in event.name() for part in COMMUNICATES))
            for event in seen.profiler.kineto_results.events()
            if not torch.cuda.is_available() or event.device_type() == on_gpu
        ]
        talks = union([(start, end) for start, end, told in events if told])
        with self._context(), torch.compiler.set_stance("force_eager"), Traffic() as traffic:
            self.step(lambda _: nullcontext())
        found = {"step_s": step_s, "communication_s": length(talks) / 1e9, "sent": traffic.of}
        if torch.cuda.is_available():
            computes = union([(start, end) for start, end, told in events if not told])
            found["exposed_s"] = (length(union([*talks, *computes])) - length(computes)) / 1e9
        return found

    def close(self) -> None:
        """Stop the workers."""
        self._batches.close()


def engine_of(settings: config.Config, module: nn.Module, ds: dict[str, Any], dtype: torch.dtype) -> Any:
    """DeepSpeed's, with weights of small random numbers: time does not depend on them."""
    optim, some = settings.optim, torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for buffer in module.buffers():
        buffer.data = buffer.data.to(dtype) if buffer.is_floating_point() else buffer.data

    def first(name: str, shape: torch.Size) -> torch.Tensor:
        return some.repeat(-(-shape.numel() // len(some)))[: shape.numel()].view(shape)

    return initialize(
        module, first, ds, batch_size=optim.batch_size, micro_batch=settings.memory.micro_batch, lr=1e-6,
        weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps, clip_grad=optim.clip_grad,
        layer_decay=1.0, fused=optim.fused,
    )  # fmt: skip


def _seconds(work: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def text(result: dict[str, Any]) -> str:
    """Markdown: the ways, and the parts of a step."""
    ranks, work, peak = result["ranks"], result["work"], result["peak_flops"]
    taken = {name: way["seconds"] for name, way in result["ways"].items()}
    rows, shares = [], []
    for name, way in result["ways"].items():
        median = statistics.median(way["seconds"])
        rate = result["batch"] / median / ranks
        mfu = f"{100 * rate * (work['student'] + work['teacher']) / peak:.1f} %" if peak else ""
        memory = f"{way['peak_bytes'] / 2**30:.2f}" if way["peak_bytes"] else ""
        rows.append((name, f"{median:.3f}", f"{rate:.2f}", mfu, memory, ratio(taken, name, "fdscale")))
        parts = {part: statistics.median(one[part] for one in way["parts"]) for part in PARTS}
        whole = sum(parts.values())
        shares.append((name, f"{whole:.3f}", *(f"{100 * value / whole:.1f} %" for value in parts.values())))
    told = result["communication"]
    lines = []
    if told:
        hidden = f", {told['exposed_s']:.3f} s of it with nothing beside it" if "exposed_s" in told else ""
        lines.append(f"Ranks communicate for {told['communication_s']:.3f} s of a step{hidden}.")
        sent = (f"{kind} {size / 1e6:.2f} MB in {calls}" for kind, (calls, size) in sorted(told["sent"].items()))
        lines.append(f"Collectives of a step, whole tensors and calls: {', '.join(sent)}.")
    where = f"{tables.machine(result['machine'])}, {result['threads']} threads, {ranks} rank(s), {result['precision']}"
    batch = f"batch {result['batch']} in micro-batches of {result['micro_batch']}"
    images = "made images" if result["made images"] else "its own images"
    head = f"{result['recipe']} with {', '.join(result['set']) or 'nothing changed'}, {result['ds'] or 'no ds_config'}"
    return tables.paragraphs(
        f"{head}: {batch}, {images}. {where}",
        "\n".join(f"- {line}" for line in result["about"]),
        tables.table(("way", "s per step", "images/s/GPU", "MFU", "peak, GiB", "takes (quartiles)"), rows),
        tables.table(("way", "s, parts waited for", *PARTS), shares),
        "\n".join(lines),
    )
