"""Samples that cannot be had, although the place where they lie answers."""

from __future__ import annotations

from typing import NamedTuple

from fdscale import UserError


class Lost(UserError):
    """A damaged, missing or unusable sample: it is replaced and counted (see stream.py), and the run goes on.

    Anything else that goes wrong with data (a source that is down, a shard that is gone, an index that does not fit)
    is a plain UserError and stops the run: replacing what may come back would change the order.
    """


class Replaced(NamedTuple):
    """A lost sample and what was taken in its place."""

    number: int
    shard: str
    key: str
    reason: str
    by_shard: str
    by_key: str

    def __str__(self) -> str:
        return f"{self.shard}: sample '{self.key}': {self.reason}; replaced by '{self.by_key}' of {self.by_shard}"
