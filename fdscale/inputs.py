"""What a run reads, from a config: its sets of samples, their order, and what every stream of them has in common.

All kinds of training ask this module; what they do with the samples is their own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdscale import UserError, config, dist, keys
from fdscale.data.augment import train_view
from fdscale.data.folders import Folders, is_folder
from fdscale.data.index import Index, open_index
from fdscale.data.mixture import Joined, Mixture, quotas
from fdscale.data.order import Order, check_world, default_lanes
from fdscale.data.randaugment import augmented_view
from fdscale.data.shard_cache import GIB, ShardCache
from fdscale.data.sources import Settings
from fdscale.data.stream import Complete, Samples, batches, evaluation_batches
from fdscale.engine.ds_config import accumulation

Statistics = tuple[float, float, float]
# A network's input, RGB: the ImageNet statistics that torchvision, timm and the official repository use.
MEAN: Statistics = (0.485, 0.456, 0.406)
STD: Statistics = (0.229, 0.224, 0.225)
# Mean and standard deviation of OpenAI's CLIP, with which the official repository evaluates what it has fine-tuned.
CLIP_STATISTICS: tuple[Statistics, Statistics] = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The samples that a run trains on, and which of them each number means."""

    settings: config.Config  # with all lengths in steps
    index: Index | Joined
    order: Order | Mixture

    def identity(self) -> dict[str, Any]:
        """What fixes the trajectory in every task, as plain data: kept in every checkpoint and compared at resume."""
        return {
            **config.trajectory(self.settings),
            "data.lanes": self.order.lanes,
            "content of data.shards": self.index.fingerprint,
        }


def open_inputs(settings: config.Config, world: int) -> Inputs:
    """Check and open everything about data that needs no process group. Raises UserError."""
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
    check_world(lanes, world, config.together(settings))
    span = span_of(settings, index.samples)
    order: Order | Mixture
    if settings.data.weights is None:
        order = Order(index.counts, settings.data.seed, lanes, settings.data.block, span)
    else:
        counts = [one.counts for one in sets]
        order = Mixture(counts, settings.data.weights, settings.data.seed, lanes, settings.data.block, span)
    return Inputs(settings, index, order)


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


def open_sets(data: keys.Data) -> Index | Joined:
    """The training data: one set, or with data.weights several."""
    assert data.shards is not None
    for one in data.shards:
        if is_folder(one):
            raise UserError(
                f"data.shards: {one} holds images, no shards: `fdscale shards make {one} DIRECTORY` packs it"
            )
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


def open_heldout(data: keys.Data) -> Index | Folders | None:
    """The held-out set, shards or a folder of class folders, or None where there is none."""
    if is_folder(data.heldout_shards):
        return Folders(str(data.heldout_shards))
    return open_index(data.heldout_shards, data.heldout_index, shard_cache(data)) if data.heldout_shards else None


def shard_cache(data: keys.Data) -> ShardCache:
    """Where this machine keeps shards that lie elsewhere."""
    return ShardCache(
        data.shard_cache,
        int(data.shard_cache_gib * GIB),
        Settings(data.fetch_tries, data.fetch_timeout_s),
        downloads=data.fetch_parallel,
        ranks=dist.local_world(),
    )


def training_samples(
    inputs: Inputs, augment: Callable[[Tensor, int], Tensor] | None = None, classes: int | None = None
) -> Samples:
    """The training views by number. augment: of a view, by its number. classes: see `Samples`."""
    data = inputs.settings.data
    view: Callable[..., Tensor] = functools.partial(
        train_view,
        seed=data.seed,
        size=data.image_size,
        scale=data.scale,
        ratio=data.ratio,
        interpolation=data.interpolation,
        flip=data.flip,
        decoding=data.decode,
    )
    if augment is not None:
        view = functools.partial(augmented_view, view=view, augment=augment)
    return Samples(inputs.index, inputs.order, view, classes)


def training_batches(
    inputs: Inputs, samples: Samples, start: int, stop: int, complete: Complete | None = None
) -> Generator[dict[str, Any], None, None]:
    """This rank's micro-batches of the samples start .. stop - 1; see `data.stream.batches`."""
    settings = inputs.settings
    return batches(
        samples,
        batch_size=settings.optim.batch_size,
        micro_batch=settings.memory.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        start=start,
        stop=stop,
        workers=settings.data.workers,
        prefetch=settings.data.prefetch,
        pin_memory=torch.cuda.is_available(),
        complete=complete,
        together=config.together(settings),
    )


def heldout_batches(
    settings: config.Config,
    index: Index | Folders,
    view: Callable[..., Any],
    classes: int | None = None,
    members: Sequence[tuple[str, ...]] = (),
    micro_batch: int | None = None,
) -> Iterator[dict[str, Any]]:
    """This rank's micro-batches of views of the held-out samples, each exactly once over all ranks.

    classes, members: see `Samples`. micro_batch: where it is not memory.micro_batch: 1, as images keep their sizes.
    """
    return evaluation_batches(
        index,
        view,
        limit=settings.data.heldout_samples,
        micro_batch=micro_batch or settings.memory.micro_batch,
        rank=dist.rank(),
        world=dist.world(),
        workers=settings.data.workers,
        pin_memory=torch.cuda.is_available(),
        classes=classes,
        members=members,
    )


def to_device(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 from a stream -> RGB in [0, 1], float32, on this rank's device."""
    return images.to(dist.device(), non_blocking=True).float() / 255


def normalise(images: Tensor, dtype: torch.dtype, mean: Statistics = MEAN, std: Statistics = STD) -> Tensor:
    """(B, 3, H, W) RGB in [0, 1], float32 -> a network's input."""
    return ((images - _on(images.device, mean)) / _on(images.device, std)).to(dtype)


@functools.lru_cache(maxsize=16)
def _on(device: torch.device, statistics: Statistics) -> Tensor:
    """Statistics on a device, (3, 1, 1); made once, since making them waits for the device."""
    return torch.tensor(statistics, device=device).view(3, 1, 1)


def names_of_classes(index: Index | Folders) -> list[str]:
    """By number, where classes.json lies beside the shards, or of the folders. Raises UserError where it holds others
    than names."""
    if isinstance(index, Folders):
        return index.names
    path = Path(index.root) / "classes.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: is not readable as JSON ({error}); it should be a list of names, or not there"
        ) from None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}: expected a list of names, one for each class in order; mend it, or take it away")
    return found
