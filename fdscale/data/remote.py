"""Indexing shards that lie elsewhere: each is fetched whole into the shard cache, where a run then finds it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from fdscale import UserError
from fdscale.data.shard_cache import ShardCache
from fdscale.data.sources import State
from fdscale.data.tar import Layout, Problem, scan


def stamp_of(state: State) -> tuple[int, int]:
    """What a sidecar keeps of the state of a remote shard: (bytes, a number made of the version)."""
    number = int.from_bytes(hashlib.sha256(state.version.encode()).digest()[:7], "big")
    return state.size or 0, number


def scan_remote(
    location: str, name: str, cache: ShardCache, known: Callable[[tuple[int, int]], Layout | None]
) -> tuple[State, Layout | None, list[Problem]]:
    """(state, layout of its whole samples, what is wrong with the rest) of a remote shard.

    It is not fetched if `known(stamp)` has its layout; what is wrong is then not said. The layout is None if nothing of
    the tar can be used. Raises UserError if the shard cannot be had: that is not about the shard.
    """
    state = cache.look(location)
    if state.version and state.size is not None and (layout := known(stamp_of(state))) is not None:
        return state, layout, []
    # Without a version, what is kept may be of another time: State() fetches what is there now.
    file, state = cache.open(location, state if state.version else State())
    try:
        layout, problems = scan(file, os.fstat(file).st_size, name)
        return state, layout, problems
    except UserError as error:
        return state, None, [Problem(name, "", str(error))]
    finally:
        os.close(file)
