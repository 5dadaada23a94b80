"""Making the index of a set of shards: from their headers, in parallel, and only where they changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from fdscale import UserError
from fdscale.data import foreign
from fdscale.data.files import Shards, common_folder, expand, index_folder, name_of, prepare_folder
from fdscale.data.index import Index, open_index
from fdscale.data.index_file import (
    NO_SAMPLES,
    UNREADABLE,
    VERSION,
    Entry,
    Stamp,
    layout_hash,
    load_entries,
    load_left_out,
    load_sidecar,
    save_sidecar,
    write_entries,
)
from fdscale.data.parallel import parallel
from fdscale.data.remote import scan_remote, stamp_of
from fdscale.data.shard_cache import ShardCache
from fdscale.data.sources import is_remote
from fdscale.data.tar import Layout, Problem, scan

MOST_NAMED = 20  # problems spelled out in one error
MOST_HELD = 10_000  # problems kept for such an error: a set of billions may be damaged everywhere

Progress = Callable[[int, int], None]


def index(
    shards: Shards,
    index_dir: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    cache: ShardCache | None = None,
    *,
    skip_damaged: bool = False,
    trust_idx: bool = False,
    counts: Sequence[str] = (),
    report: Callable[[Problem], None] | None = None,
) -> Index:
    """Index shards from their headers; those unchanged since an earlier call (size and mtime) are not read again.

    shards: see `expand`. index_dir: where the index goes, by default the folder "index" beside the shards. An index
    may be filled by several calls, as for train-*.tar and val-*.tar in one folder. progress: called with (shards
    done, shards). cache: for shards that lie elsewhere; a run with the same cache finds there what still is.
    skip_damaged: index what is whole, list the rest in left-out.jsonl, and call `report` with whatever is wrong.
    trust_idx and counts: what to do with others' indexes, see foreign.py.
    Raises UserError listing what is wrong in which shard, unless skip_damaged; the index then stays as it was, what
    was read is kept for the next call.
    """
    paths = expand(shards)
    root = common_folder(paths)
    index_dir = index_folder(index_dir, root)
    prepare_folder(index_dir, "--index")
    before = _before(index_dir)
    names = [name_of(path, root) for path in paths]
    claims = foreign.claims_of_set(root, names, counts)
    jobs = (
        _Job(path, name, index_dir, before.get(name), claims.get(name, []), trust_idx, cache or ShardCache())
        for path, name in zip(paths, names, strict=True)
    )
    entries: list[Entry] = []
    problems: list[Problem] = []
    bad = 0
    try:
        for done, (entry, found) in enumerate(parallel(_index_shard, jobs, min(workers, len(paths))), 1):
            entries.append(entry)
            bad += bool(found)
            problems += found[: 0 if skip_damaged else max(0, MOST_HELD - len(problems))]
            if skip_damaged and report:
                for problem in found:
                    report(problem)
            if progress:
                progress(done, len(paths))
    except OSError as error:  # what is wrong with reading a shard is a problem of it: this is about writing
        raise UserError(f"{index_dir}: cannot be written ({error.strerror})") from error
    if problems:
        raise UserError(_listed(problems, bad, len(paths)))
    if not any(entry.samples for entry in entries):
        raise UserError(
            f"the {len(paths)} shards in {root} hold no samples at all that are whole; check which files were given"
        )
    write_entries(index_dir, entries + _others(before, root, set(names)))
    return open_index(shards, index_dir, cache)


def scan_file(path: str, name: str) -> tuple[tuple[Layout, os.stat_result] | None, list[Problem]]:
    """((layout of its whole samples, stat) of a shard, what is wrong with it); None first if it is unreadable."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return None, [Problem(name, "", f"cannot be opened ({error.strerror})")]
    try:
        stat = os.fstat(file)
        layout, problems = scan(file, stat.st_size, name)
        return (layout, stat), problems
    except OSError as error:
        return None, [Problem(name, "", f"cannot be read ({error.strerror})")]
    except UserError as error:
        return None, [Problem(name, "", str(error))]
    finally:
        os.close(file)


class _Job(NamedTuple):
    """A shard to index. before: what an earlier index says of it. claims: what others' indexes of the set say."""

    path: str
    name: str
    index_dir: str
    before: Entry | None
    claims: list[foreign.Claim]
    trust_idx: bool
    cache: ShardCache


def _index_shard(job: _Job) -> tuple[Entry, list[Problem]]:
    """(what the index will say of a shard, what is wrong with it)."""
    sidecar = os.path.join(job.index_dir, job.name + ".npz")
    if is_remote(job.path):
        entry, left_out = _index_remote(job, sidecar)
        return entry, left_out + foreign.disagreements(None, job.name, entry.samples + entry.left_out, job.claims)
    try:
        stat = os.stat(job.path)
        stamp = (VERSION, stat.st_size, stat.st_mtime_ns)
    except OSError:  # reading it will say why
        stamp = (VERSION, 0, UNREADABLE)
    if job.before is not None and stamp[1:] == (job.before.bytes, job.before.mtime_ns) and os.path.exists(sidecar):
        entry = job.before
        left_out = load_left_out(job.index_dir, entry) if entry.left_out or entry.damaged else []
    elif (layout := load_sidecar(sidecar, stamp)) is not None:
        entry, left_out = _known(job, _entry(job.name, layout, stamp))
    else:
        layout, stamp, left_out = _read_shard(job, stamp)
        save_sidecar(sidecar, layout, stamp, left_out)
        entry = _counting(_entry(job.name, layout, stamp), left_out)
    found = entry.samples + entry.left_out
    return entry, left_out + foreign.disagreements(job.path, job.name, found, job.claims)


def _index_remote(job: _Job, sidecar: str) -> tuple[Entry, list[Problem]]:
    known: list[Layout] = []

    def find(stamp: tuple[int, int]) -> Layout | None:
        layout = load_sidecar(sidecar, (VERSION, *stamp))
        known.extend([layout] if layout is not None else [])
        return layout

    state, layout, left_out = scan_remote(job.path, job.name, job.cache, find)
    layout = NO_SAMPLES if layout is None else layout
    stamp = (VERSION, *stamp_of(state))
    entry = _entry(job.name, layout, stamp)._replace(mtime_ns=0, version=state.version)
    if known:
        return _known(job, entry)
    save_sidecar(sidecar, layout, stamp, left_out)
    return _counting(entry, left_out), left_out


def _known(job: _Job, entry: Entry) -> tuple[Entry, list[Problem]]:
    left_out = load_left_out(job.index_dir, entry, missing_ok=True)
    return _counting(entry, left_out), left_out


def _read_shard(job: _Job, stamp: Stamp) -> tuple[Layout, Stamp, list[Problem]]:
    if job.trust_idx and (theirs := foreign.layout_of(job.path, job.name)) is not None:
        return theirs, stamp, []
    scanned, problems = scan_file(job.path, job.name)
    if scanned is None:
        return NO_SAMPLES, (VERSION, stamp[1], UNREADABLE), problems
    layout, stat = scanned
    return layout, (VERSION, stat.st_size, stat.st_mtime_ns), problems


def _entry(name: str, layout: Layout, stamp: Stamp) -> Entry:
    return Entry(name, len(layout.keys), stamp[1], stamp[2], layout_hash(layout), name + ".npz")


def _counting(entry: Entry, left_out: list[Problem]) -> Entry:
    samples = sum(bool(problem.key) for problem in left_out)
    return entry._replace(left_out=samples, damaged=samples < len(left_out))


def _before(index_dir: str) -> dict[str, Entry]:
    """What an earlier index lists, by name."""
    try:
        return {entry.name: entry for entry in load_entries(os.path.join(index_dir, "index.json"))}
    except UserError:  # none yet, or one to be replaced
        return {}


def _others(before: dict[str, Entry], root: str, names: set[str]) -> list[Entry]:
    """What an earlier index lists besides these names, as far as it is still there unchanged; elsewhere, all of it."""
    others = [entry for entry in before.values() if entry.name not in names]
    if is_remote(root):  # to ask after each would take long, and a shard that has changed is noticed when it is read
        return [entry for entry in others if entry.version]
    kept = []
    for entry in others:
        with suppress(OSError):
            stat = os.stat(os.path.join(root, entry.name))
            if stat.st_size == entry.bytes and entry.mtime_ns in (stat.st_mtime_ns, UNREADABLE):
                kept.append(entry)
    return kept


def _listed(problems: list[Problem], bad: int, shards: int) -> str:
    lines = [str(problem) for problem in problems[:MOST_NAMED]]
    if len(problems) > MOST_NAMED:
        lines.append(f"and {len(problems) - MOST_NAMED} more")
    return (
        f"{bad} of {shards} shards cannot be used; repair them, leave them out, or index what is whole of them "
        "(--skip-damaged):\n  " + "\n  ".join(lines)
    )
