"""The parts of a distillation, from a config: data, teacher, student, and how they fit. Nothing here trains or writes.

Everything that has to know what a recipe builds (training, planning, diagnosis, pictures) asks this module, so that all
see the same.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fdscale import UserError, config, dist, keys
from fdscale.data import features
from fdscale.data.augment import eval_view, train_view
from fdscale.data.features import Features, Plan
from fdscale.data.index import Index, open_index
from fdscale.data.mixture import Joined, Mixture, quotas
from fdscale.data.order import Order, check_world, default_lanes
from fdscale.data.shard_cache import GIB, ShardCache
from fdscale.data.sources import Settings
from fdscale.data.stream import Samples, batches, chosen_batches, evaluation_batches
from fdscale.engine import memory
from fdscale.engine.ds_config import accumulation
from fdscale.engine.metrics import Work
from fdscale.models import backbone as build_backbone
from fdscale.models import convert
from fdscale.models.layers import initial_value
from fdscale.models.pairing import Pairing, pair
from fdscale.models.teachers import Teacher, load_teacher
from fdscale.objective import Distiller, whiten

# The student's input, RGB: the ImageNet statistics that torchvision, timm and the official repository use.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything a distillation is made of, before any of it trains; the module lives on the meta device."""

    settings: config.Config  # with all lengths in steps
    index: Index | Joined
    order: Order | Mixture
    teacher: Teacher
    pairing: Pairing
    module: Distiller
    cached: Features | None  # the teacher's features, where they are replayed


def assemble(settings: config.Config, world: int) -> Parts:
    """Check and build everything that needs no process group; raises UserError before anything is written."""
    if not settings.data.shards:
        raise UserError(
            "data.shards is not set: --set data.shards=DIRECTORY_OR_PATTERN (make shards with `fdscale shards make`)"
        )
    if settings.log.wandb and not importlib.util.find_spec("wandb"):
        raise UserError("log.wandb is set, but wandb is missing: pip install 'fdscale[wandb]', or --set log.wandb=null")
    accumulation(settings.optim.batch_size, settings.memory.micro_batch, world)
    index = open_sets(settings.data)
    settings = config.in_steps(settings, index.samples)
    sets = index.indexes if isinstance(index, Joined) else [index]
    lanes = settings.data.lanes or default_lanes(
        settings.optim.batch_size, min(len(one.names) for one in sets), min(one.samples for one in sets)
    )
    if settings.optim.batch_size % lanes:
        raise UserError(f"data.lanes {lanes} does not divide optim.batch_size {settings.optim.batch_size}")
    check_world(lanes, world)
    span = span_of(settings, index.samples)
    order: Order | Mixture
    if settings.data.weights is None:
        order = Order(index.counts, settings.data.seed, lanes, settings.data.block, span)
    else:
        counts = [one.counts for one in sets]
        order = Mixture(counts, settings.data.weights, settings.data.seed, lanes, settings.data.block, span)
    teacher = load_teacher(
        settings.teacher.source,
        weights=settings.teacher.weights,
        image_size=settings.teacher.image_size,
        args=settings.teacher.args,
        dtype=settings.teacher.dtype,
        feature=settings.teacher.feature,
        key=settings.teacher.key,
        mean=settings.teacher.mean,
        std=settings.teacher.std,
    )
    parts = Parts(settings, index, order, teacher, *build_student(settings, teacher), cached=None)
    if settings.cache.features is None:
        return parts
    cached = Features(settings.cache.features, cache_plan(parts))
    if dist.rank() == 0:  # one look at every file is enough for all ranks
        cached.check_sizes()
    return dataclasses.replace(parts, cached=cached)


def span_of(settings: config.Config, samples_per_epoch: int) -> int | None:
    """Samples after which numbers repeat, of `cache.epochs`; None: they never do."""
    if settings.cache.epochs is None:
        return None
    span, batch = round(settings.cache.epochs * samples_per_epoch), settings.optim.batch_size
    if span < batch:
        raise UserError(
            f"cache.epochs {settings.cache.epochs:g} of {samples_per_epoch} samples is {span} samples, less than a "
            f"batch of {batch}; expected at least {batch / samples_per_epoch:g}"
        )
    return span


def cache_plan(parts: Parts) -> Plan:
    """What a feature cache of this distillation is. Raises UserError without `cache.epochs`."""
    settings, pairing = parts.settings, parts.pairing
    span = parts.order.span
    if span is None:
        raise UserError("cache.epochs is not set: how many epochs of features to write, such as --set cache.epochs=10")
    full = identity(parts, parts.teacher.fingerprint())
    plan = Plan(
        span=span,
        tokens=len(pairing.teacher_kept) + pairing.student_grid[0] * pairing.student_grid[1],
        width=parts.teacher.width,
        stored=stored_as(settings),
        micro_batch=settings.memory.micro_batch,
        per_file=1,
        # Of the student only the tokens that it can be compared with count, and of the batch only its lanes.
        identity={key: value for key, value in full.items() if key.startswith(("data.", "teacher.", "content of "))}
        | {"teacher's tokens before the grid": list(pairing.teacher_kept), "token grid": list(pairing.student_grid)},
    )
    # A file ends where a micro-batch ends, so that it does not matter which were written before a stop.
    batches = max(1, settings.cache.file_mib * 2**20 // (plan.record_bytes * plan.micro_batch))
    return dataclasses.replace(plan, per_file=batches * plan.micro_batch)


def stored_as(settings: config.Config) -> str:
    """`cache.dtype` as `fdscale.data.features` names it."""
    return "float32" if settings.cache.dtype == "same" else settings.cache.dtype


def open_sets(data: keys.Data) -> Index | Joined:
    """The training data: one set, or with data.weights several."""
    assert data.shards is not None
    count = len(data.shards)
    if data.weights is None:
        if data.index is not None and len(data.index) > 1:
            raise UserError("data.index has several entries, but without data.weights all shards are one set with one")
        return open_index(data.shards, data.index[0] if data.index else None, shard_cache(data))
    quotas(data.weights, count)  # before anything is opened
    places = data.index or (None,) * count
    if len(places) != count:
        raise UserError(f"data.index has {len(places)} entries for {count} of data.shards; give one for each, or null")
    cache = shard_cache(data)
    return Joined([open_index(one, place, cache) for one, place in zip(data.shards, places, strict=True)])


def shard_cache(data: keys.Data) -> ShardCache:
    """Where this machine keeps shards that lie elsewhere."""
    return ShardCache(
        data.shard_cache,
        int(data.shard_cache_gib * GIB),
        Settings(data.fetch_tries, data.fetch_timeout_s),
        downloads=data.fetch_parallel,
        ranks=dist.local_world(),
    )


def build_student(settings: config.Config, teacher: Teacher) -> tuple[Pairing, Distiller]:
    """The pairing of tokens and the trainable module, on the meta device."""
    size = (settings.data.image_size, settings.data.image_size)
    with torch.device("meta"):
        student = build_backbone(settings.student.model, {"img_size": size[0], **settings.student.args})
        pairing = pair(
            student.prefix, student.grid(size), teacher.prefix, teacher.grid(size), settings.teacher.resample
        )
        module = Distiller(student, teacher.width, settings.objective.beta, pairing.align_student)
    student.drop_path_seed = settings.student.seed
    memory.apply(student, settings.memory.checkpoint, settings.memory.attention_chunk)
    return pairing, module


def initial_values(settings: config.Config, module: Distiller) -> Callable[[str, torch.Size], Tensor]:
    """First value of every parameter: from the given weights where there are any, else random by seed and name."""
    loaded: dict[str, Tensor] = {}
    if settings.student.weights:
        size = settings.data.image_size
        with torch.device("meta"):
            holder = build_backbone(settings.student.model, {"img_size": size, **settings.student.args})
        convert.load(holder, convert.read(settings.student.weights))
        loaded = {f"backbone.{name}": parameter.detach() for name, parameter in holder.named_parameters()}

    def value(name: str, shape: torch.Size) -> Tensor:
        if name in loaded:
            return loaded[name].float()
        return initial_value(module, name, shape, torch.float32, settings.student.seed)

    return value


def identity(parts: Parts, teacher_fingerprint: str) -> dict[str, Any]:
    """What fixes the trajectory, as plain data: kept in every checkpoint and compared at resume."""
    return {
        **config.trajectory(parts.settings),
        "data.lanes": parts.order.lanes,
        "content of data.shards": parts.index.fingerprint,
        "content of teacher.weights": teacher_fingerprint,
    }


def normalise(images: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1], float32 -> the student's input."""
    mean, std = _statistics(images.device)
    return ((images - mean) / std).to(dtype)


@functools.lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """MEAN and STD on a device, (3, 1, 1); made once, since making them waits for the device."""
    return torch.tensor(MEAN, device=device).view(3, 1, 1), torch.tensor(STD, device=device).view(3, 1, 1)


def target_of(images: Tensor, teacher: Teacher, pairing: Pairing) -> Tensor:
    """The whitened teacher tokens (B, L, T) that answer the student's, from RGB in [0, 1]."""
    return whiten(learnt_tokens(images, teacher, pairing))


def learnt_tokens(images: Tensor, teacher: Teacher, pairing: Pairing) -> Tensor:
    """The same before whitening, float32: what a feature cache holds."""
    return pairing.align_teacher(teacher(images).float())


def training_target(parts: Parts, batch: dict[str, Any], images: Tensor) -> Tensor:
    """The target of a micro-batch of `train_stream`, and its RGB in [0, 1]: from the cache or the live teacher.

    Both give the same: where a cache holds 8 bits, the live teacher's tokens are rounded to them too.
    """
    if parts.cached is not None:
        return whiten(parts.cached.tokens(batch, images.device))
    tokens = learnt_tokens(images, parts.teacher, parts.pairing)
    return whiten(features.decode(*features.encode(tokens, stored_as(parts.settings))))


def train_stream(parts: Parts, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
    """This rank's micro-batches of training views of the samples start .. stop - 1."""
    data, settings = parts.settings.data, parts.settings
    return batches(
        _training_samples(parts),
        batch_size=settings.optim.batch_size,
        micro_batch=settings.memory.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        start=start,
        stop=stop,
        workers=data.workers,
        prefetch=data.prefetch,
        pin_memory=torch.cuda.is_available(),
        complete=parts.cached,
    )


def numbered_stream(parts: Parts, numbers: Iterable[list[int]]) -> Generator[dict[str, Any], None, None]:
    """Micro-batches of the training views of these numbers, whatever the rank."""
    data = parts.settings.data
    return chosen_batches(
        _training_samples(parts),
        numbers,
        workers=data.workers,
        prefetch=data.prefetch,
        pin_memory=torch.cuda.is_available(),
    )


def _training_samples(parts: Parts) -> Samples:
    data = parts.settings.data
    view = functools.partial(
        train_view,
        seed=data.seed,
        size=data.image_size,
        scale=data.scale,
        ratio=data.ratio,
        interpolation=data.interpolation,
        flip=data.flip,
        decoding=data.decode,
    )
    return Samples(parts.index, parts.order, view)


def heldout_stream(parts: Parts, index: Index) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of centre views of the held-out samples, each exactly once over all ranks."""
    data = parts.settings.data
    return evaluation_batches(
        index,
        functools.partial(eval_view, size=data.image_size, interpolation=data.interpolation, decoding=data.decode),
        limit=data.heldout_samples,
        micro_batch=parts.settings.memory.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        workers=data.workers,
        pin_memory=torch.cuda.is_available(),
    )


def to_device(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 from a stream -> RGB in [0, 1], float32, on this rank's device."""
    return images.to(dist.device(), non_blocking=True).float() / 255


def work_per_image(parts: Parts) -> Work:
    """FLOPs of training on one image, for MFU."""
    size = (parts.settings.data.image_size,) * 2
    student = parts.module.backbone
    forward = 2 * student.flops(size)
    kinds = memory.per_stage(parts.settings.memory.checkpoint, student.depths, "memory.checkpoint")
    # Blocks of a stage are alike, and in these networks stages cost nearly the same per block.
    recomputed = forward * sum(kind != "none" for kind in kinds) // len(kinds)
    teacher = 2 * parts.teacher.flops(size) if parts.cached is None else 0
    return Work(student=3 * forward, teacher=teacher, recomputed=recomputed)
