"""What ranks send each other in a piece of work, and for how long: collectives by kind, and spans of time."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {"allreduce": "all-reduce", "allgather": "all-gather", "reduce_scatter": "reduce-scatter"}


class Traffic(TorchDispatchMode):
    """Counts the collectives that this process starts within it.

    of: by kind, [calls, bytes]; the bytes are those of the tensor that is gathered, or reduced, as a whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d":
            kind = next((told for part, told in KINDS.items() if part in name), name.strip("_"))
            sizes = [sum(one.nbytes for one in tree_leaves(arg) if isinstance(one, Tensor)) for arg in args]
            counted = self.of.setdefault(kind, [0, 0])
            counted[0] += 1
            counted[1] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint and in order."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(spans: list[tuple[int, int]]) -> int:
    """Of disjoint spans."""
    return sum(end - start for start, end in spans)
