"""Samples that cannot be had, although the place where they lie answers."""

from __future__ import annotations

from fdscale import UserError


class Lost(UserError):
    """A damaged, missing or unusable sample: it is replaced and counted (see stream.py), and the run goes on.

    Anything else that goes wrong with data (a source that is down, a shard that is gone, an index that does not fit)
    is a plain UserError and stops the run: replacing what may come back would change the order.
    """
