"""`fdscale bench teacher RECIPE`: what lower precision of a teacher does to the target, to its memory and to its time.

    fdscale bench teacher swinv2_g --set teacher.weights=FILE --set data.shards=SHARDS --json teacher.json

Tokens of the recipe's training views, whitened, against those of the same teacher in float32: root mean square of the
difference (a whitened token has 1), the mean cosine between tokens, and the loss that a student would have that gives
the float32 target exactly.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fdscale import assemble, config, dist
from fdscale.bench import machine, tables
from fdscale.bench.step import made_shards, measured
from fdscale.bench.timing import in_turns, ratio, save
from fdscale.engine.initialize import prepare_environment
from fdscale.inputs import to_device
from fdscale.models.teachers import Teacher
from fdscale.objective import feature_loss, whiten

WAYS = {
    "float32": ("float32", "same"),
    "bfloat16": ("bfloat16", "same"),
    "bfloat16, int8": ("bfloat16", "int8"),
    "bfloat16, fp8": ("bfloat16", "fp8"),
}  # and teacher.dtype and teacher.hold of each


def main(recipe: str, set: list[str], images: int, rounds: int, threads: int | None, json: Path | None) -> int:
    """Measure, print Markdown, and write JSON."""
    if threads:
        torch.set_num_threads(threads)
    prepare_environment()
    settings = config.load(recipe, set)
    config.check_verb(settings, "distill")
    dist.init()
    with made_shards(settings) as shards:
        result = measure(measured(settings, shards, 1), images, rounds)
    result |= {"recipe": recipe, "set": set, "made images": shards is not None}
    print(text(result))
    if json:
        save(json, result)
    dist.close()
    return 0


def measure(settings: config.Config, images: int, rounds: int) -> dict[str, Any]:
    """By teacher and way: bytes held, errors against float32 over so many views, and seconds of a micro-batch."""
    result: dict[str, Any] = {"machine": machine.describe(dist.device()), "images": images, "teachers": {}}
    result |= {"micro_batch": settings.memory.micro_batch, "weights": {}}
    parts = assemble.assemble(settings, 1)
    views, count = [], 0
    stream = assemble.train_stream(parts, 0, 2**40)
    while count < images:
        views.append(to_device(next(stream)["images"]))
        count += len(views[-1])
    stream.close()
    for name, of in config.teachers_of(settings).items():
        result["teachers"][name or of.source] = _ways(settings, name, views, rounds)
        result["weights"][name or of.source] = of.weights
    return result


def _ways(settings: config.Config, name: str, views: list[Tensor], rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    teachers: dict[str, Teacher] = {}
    exact: list[Tensor] = []
    for way, (dtype, hold) in WAYS.items():
        of = dataclasses.replace(config.teachers_of(settings)[name], dtype=dtype, hold=hold)
        changed = {"teachers": {**settings.teachers, name: of}} if name else {"teacher": of}
        teacher = assemble.build_teacher(dataclasses.replace(settings, **changed), name)  # type: ignore[arg-type]
        teachers[way] = teacher.to(dist.device())
        tensors = [*teacher.network.parameters(), *teacher.network.buffers()]
        targets = [whiten(teacher(some)) for some in views]
        exact = exact or targets
        pairs = list(zip(targets, exact, strict=True))
        found[way] = {
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "rms": (sum((a - b).square().mean().item() for a, b in pairs) / len(pairs)) ** 0.5,
            "cosine": sum(cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairs) / len(pairs),
            "loss": sum(feature_loss(a, b, settings.objective.beta).item() for a, b in pairs) / len(pairs),
        }
    taken = in_turns({way: partial(_run, teacher, views[0]) for way, teacher in teachers.items()}, rounds)
    for way in teachers:
        found[way]["seconds"] = taken["wall"][way]
    return found


def _run(teacher: Teacher, images: Tensor) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    teacher(images)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def text(result: dict[str, Any]) -> str:
    """Markdown."""
    images = "made images" if result["made images"] else "training views"
    where = f"{tables.machine(result['machine'])}; {result['images']} {images}"
    parts = [f"{result['recipe']} with {', '.join(result['set']) or 'nothing changed'}. {where}"]
    head = ("held and computed in", "weights, MB", "rms of the difference", "cosine", "loss", "time to float32")
    for name, ways in result["teachers"].items():
        seconds = {way: record["seconds"] for way, record in ways.items()}
        rows = [
            (way, f"{one['bytes'] / 1e6:.1f}", f"{one['rms']:.2e}", f"{one['cosine']:.6f}", f"{one['loss']:.2e}",
             ratio(seconds, way, "float32"))
            for way, one in ways.items()
        ]  # fmt: skip
        parts += [f"{name}, weights {result['weights'][name]}", tables.table(head, rows)]
    return tables.paragraphs(*parts)
