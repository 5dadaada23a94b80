"""A frozen network in shares: each rank holds its part of the matrices of every block, as torch's fully_shard has them.

A block's matrices are gathered before its forward, the next block's behind it where there is a GPU, and let go after
it. So every rank must compute with the network equally often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fdscale import dist


def splitter(device: torch.device) -> Callable[[nn.Module], None]:
    """What splits a module whose parameters are on this device among all ranks; see `Teacher.spread`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.world(),))

    def split(module: nn.Module) -> None:
        matrices = shared(module)
        rest = {parameter for parameter in module.parameters() if parameter not in matrices}
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=rest)

    return split


def shared(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of a block that are split: weights of Linear and Conv2d, in the dtype that most of them have.

    The rest, below a hundredth of a transformer's block, stays whole on every rank.
    """
    kinds = (nn.Linear, nn.Conv2d)
    weights: list[Any] = [part.weight for part in module.modules() if type(part) in kinds]
    if not weights:
        return set()
    dtype = max(weights, key=lambda weight: weight.numel()).dtype
    return {weight for weight in weights if weight.dtype == dtype}
