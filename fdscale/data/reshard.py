"""The same samples in shards of another size, in the same order or shuffled."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fdscale import UserError
from fdscale.data.files import Shards, parts_of, prepare_folder
from fdscale.data.index import Index, open_index
from fdscale.data.index_file import read_layout
from fdscale.data.indexing import Progress, index
from fdscale.data.lost import Lost
from fdscale.data.order import check_seed, permutation
from fdscale.data.parallel import parallel
from fdscale.data.recent import Recent
from fdscale.data.shard_cache import ShardCache
from fdscale.data.tar import Layout
from fdscale.data.writing import MAX_BYTES, Tar, bytes_in_tar, check_sizes, new_folder, shard_name

LAYOUT_BYTES = 256 * 2**20  # of sidecars kept per process


def reshard(
    shards: Shards,
    out: str | os.PathLike,
    *,
    index_dir: str | None = None,
    samples_per_shard: int | None = None,
    max_bytes: int | None = None,
    seed: int | None = None,
    prefix_keys: bool = False,
    out_index_dir: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    cache: ShardCache | None = None,
) -> Index:
    """Write the samples of indexed shards into new ones in the new folder `out`, with an index.

    Every member of every sample keeps its bytes; extensions come out in lower case, and what is no part of a sample
    (hidden files, WebDataset's metadata, what the index leaves out) stays behind. The result is always the same bytes,
    and appears whole or not at all.
    index_dir, out_index_dir: of the old and the new shards. samples_per_shard or max_bytes: where a shard ends;
    256 MiB by default. seed: shuffles all samples; None keeps their order. prefix_keys: put the name of the old shard
    before each key. progress: called with (samples done, samples). cache: for old shards that lie elsewhere. Memory:
    under 40 bytes per sample, and per worker up to 400 MB of tables and what a sample takes.
    Raises UserError if there is no index, a sample is not as indexed, or two samples of one key meet in a shard.
    """
    check_sizes(samples_per_shard, max_bytes)
    if seed is not None:
        check_seed(seed)
    out = os.path.abspath(out)
    source = _Source(tuple(parts_of(shards)), index_dir, prefix_keys, cache)
    _open.cache_clear()  # an earlier call may have seen another state
    _layouts.cache_clear()
    opened = _open(source)
    if out_index_dir is not None:
        prepare_folder(out_index_dir, "--index")
    total, done = opened.samples, 0
    with new_folder(out) as folder:
        jobs = _jobs(source, opened, folder, samples_per_shard, max_bytes, seed)
        for written in parallel(_write, jobs, workers):
            done += written
            if progress:
                progress(done, total)
        for name in ("classes.json", "categories.json"):
            beside = os.path.join(opened.root, name)
            if os.path.isfile(beside):
                shutil.copyfile(beside, os.path.join(folder, name))
        index(folder, out_index_dir, workers)
    return open_index(out, out_index_dir)


class _Source(NamedTuple):
    """What each worker opens for itself, once: an index of 200 000 shards is too large to send with every job."""

    shards: tuple[str, ...]
    index_dir: str | None
    prefix_keys: bool
    cache: ShardCache | None


class _Job(NamedTuple):
    """A shard to write: sample i of it is row rows[i] of the old shard shards[i]."""

    source: _Source
    fingerprint: str
    path: str
    shards: np.ndarray
    rows: np.ndarray


@lru_cache(maxsize=1)
def _open(source: _Source) -> Index:
    return open_index(source.shards, source.index_dir, source.cache)


@lru_cache(maxsize=1)
def _layouts(source: _Source) -> Recent:
    return Recent(LAYOUT_BYTES, weigh=lambda layout: sum(array.nbytes for array in layout))


def _jobs(
    source: _Source, opened: Index, folder: str, samples_per_shard: int | None, max_bytes: int | None, seed: int | None
) -> Iterator[_Job]:
    total, starts = opened.samples, np.cumsum(opened.counts) - opened.counts
    order = np.arange(total) if seed is None else permutation(seed, 0, (0, 3, 0, 0), total)
    if samples_per_shard is not None:
        ends: Iterator[int] | range = range(samples_per_shard, total + samples_per_shard, samples_per_shard)
    else:
        ends = _ends(_sample_bytes(opened, source.prefix_keys)[order], max_bytes or MAX_BYTES)
    first = 0
    for number, end in enumerate(ends):
        picked = order[first:end].astype(np.int64)
        shards = np.searchsorted(starts, picked, side="right") - 1
        path = os.path.join(folder, shard_name(number))
        yield _Job(source, opened.fingerprint, path, shards, picked - starts[shards])
        first = end


def _sample_bytes(opened: Index, prefix_keys: bool) -> np.ndarray:
    """(samples,) most bytes that each takes in a shard."""
    found = [np.empty(0, np.int64)]
    for shard, name in enumerate(opened.names):
        if opened.counts[shard]:
            layout = read_layout(opened.index_dir, opened.entries[shard])
            names = [b"." + extension for extension in layout.extensions.tolist()]
            before = (_prefix(name) if prefix_keys else "").encode()
            keys, kinds, sizes = layout.keys.tolist(), layout.kinds.tolist(), layout.sizes.tolist()
            owner = np.repeat(np.arange(len(keys)), layout.starts[1:] - layout.starts[:-1])
            each = [
                bytes_in_tar(before + keys[i] + names[kind], size)
                for i, kind, size in zip(owner.tolist(), kinds, sizes, strict=True)
            ]
            found.append(np.bincount(owner, each, len(keys)).astype(np.int64))
    return np.concatenate(found)


def _ends(sizes: np.ndarray, limit: int) -> Iterator[int]:
    """Where each shard ends: as many samples as fit in `limit`, and at least one."""
    filled = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = filled[first - 1] if first else 0
        first = max(first + 1, int(np.searchsorted(filled, before + limit, side="right")))
        yield first


def _write(job: _Job) -> int:
    """Write one shard; how many samples it holds."""
    opened = _open(job.source)
    if opened.fingerprint != job.fingerprint:
        raise UserError(f"{opened.index_dir}: the index changed in the middle of the work; start again")
    layouts = _layouts(job.source)
    tar, keys = Tar(job.path), set()
    for shard, row in zip(job.shards.tolist(), job.rows.tolist(), strict=True):
        layout: Layout = layouts.get(shard, lambda shard: read_layout(opened.index_dir, opened.entries[shard]))
        key = layout.keys[row].decode()
        if job.source.prefix_keys:
            key = _prefix(opened.names[shard]) + key
        if key in keys:
            raise UserError(
                f'{opened.path(shard)}: its sample "{key}" meets another of the same key in a new shard, where readers '
                "would take them for one; put the shard's name before each key (--prefix-keys)"
            )
        keys.add(key)
        kinds = layout.kinds[layout.starts[row] : layout.starts[row + 1]].tolist()
        extensions = [layout.extensions[kind].decode() for kind in kinds]
        try:
            tar.add(key, {extension: opened.read(shard, row, (extension,)) for extension in extensions})
        except Lost as lost:
            raise UserError(
                f"{opened.path(shard)}: sample '{key}': {lost}. Restore the shard, or index what is whole of it "
                "(fdscale shards index --skip-damaged)"
            ) from None
    tar.close()
    return len(keys)


def _prefix(name: str) -> str:
    """What --prefix-keys puts before the keys of a shard: its name without the ending, as a folder."""
    folder, base = os.path.split(name)
    stem = base.removesuffix(".tar")
    return (f"{folder}/{stem}/" if folder else f"{stem}/").lstrip("_")
