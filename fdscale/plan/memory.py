"""Bytes of a training step per GPU and per node, by ZeRO stage.

What the parts are follows DeepSpeed 0.19's source; where the source says what a buffer may hold and not what it will,
the most is taken. N parameters, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from fdscale import config
from fdscale.engine.ds_config import (
    accumulation,
    bf16,
    check_checkpointing,
    check_linear,
    check_world,
    offloaded,
    stage,
)
from fdscale.plan.shapes import Networks

GIB = 2**30
CONTEXT = int(1.5 * GIB)  # CUDA context, NCCL, cuBLAS: our allowance
FRAGMENTATION = 0.05  # of what comes and goes: our allowance
PROCESS = 4 * GIB  # of host memory, a rank's process with torch and CUDA: our allowance
WORKER = GIB // 2  # of host memory, a data worker besides its batches: our allowance
REDUCED_AT_ONCE = 500_000_000  # elements that DeepSpeed's engine flattens at a time at stages 0 and 1


@dataclass(frozen=True)
class Setup:
    """A config with its lengths in steps, the ds_config, and on how many GPUs."""

    settings: config.Config
    ds: dict[str, Any]
    world: int
    gpus_per_node: int = 8

    @property
    def zero(self) -> dict[str, Any]:
        """The ds_config's section on ZeRO."""
        return self.ds.get("zero_optimization", {})

    @property
    def nodes(self) -> int:
        """Nodes that the GPUs fill."""
        return -(-self.world // self.gpus_per_node)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that compute."""
        return torch.bfloat16 if bf16(self.ds) else torch.float32

    @property
    def weight_bytes(self) -> int:
        """Of one such weight."""
        return 2 if bf16(self.ds) else 4

    @property
    def accumulation(self) -> int:
        """Micro-batches per step and rank. Raises UserError where the batch does not divide."""
        return accumulation(self.settings.optim.batch_size, self.settings.memory.micro_batch, self.world)

    @property
    def overlaps(self) -> bool:
        """Whether gradients are reduced while the backward goes on."""
        return bool(self.zero.get("overlap_comm", stage(self.ds) == 3)) and stage(self.ds) >= 2


class Memory(NamedTuple):
    """Bytes. The parts add up to the peak of one GPU."""

    parts: dict[str, int]
    host: dict[str, int]  # of one node
    notes: list[str]

    @property
    def total(self) -> int:
        """Of a GPU."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The part that needs most."""
        return max(self.parts, key=lambda part: self.parts[part])


def states(setup: Setup, networks: Networks) -> dict[str, int]:
    """Parameters, gradients and optimizer state of one GPU: what DeepSpeed holds from step to step, or at its end.

    bf16: weights 2 bytes, gradients accumulated in float32, float32 master weights with two moments; stage 1 also keeps
    the gradients in bf16 until the update, unless bf16.immediate_grad_update is on. float32: the same with weights of
    4, and at stage 0 no second copy of them.
    tests/plan/states.py counts the tensors of real engines.
    """
    n, r, zero = networks.parameters, setup.world, stage(setup.ds)
    kept = sum(size for size in networks.sizes.values() if size <= _persistent(setup)) if zero == 3 else 0
    weights = setup.weight_bytes * (n if zero < 3 else -(-n // r) + kept * (r > 1))
    grads = 4 * (n if zero == 0 or (zero == 1 and setup.accumulation > 1) else -(-n // r))
    if zero == 1 and bf16(setup.ds):
        grads = (4 if setup.ds["bf16"].get("immediate_grad_update") else 4 + 2) * n
    optimizer = 8 * n if zero == 0 else 12 * -(-n // r)
    if offloaded(setup.ds):
        grads, optimizer = (grads if zero < 2 else 0), 0
    if zero == 3 and _on_host(setup, "offload_param"):
        weights = setup.weight_bytes * kept
    return {"parameters": weights, "gradients": grads, "optimizer": optimizer}


def host_states(setup: Setup, networks: Networks) -> dict[str, int]:
    """What one rank holds in host memory instead; gradients twice, as they come and as the update takes them."""
    share, parts = -(-networks.parameters // setup.world), {}
    if offloaded(setup.ds):
        parts["offloaded optimizer"] = (12 + 4 + 4) * share
    if _on_host(setup, "offload_param"):
        parts["offloaded parameters"] = setup.weight_bytes * share
    return parts


def estimate(setup: Setup, networks: Networks) -> Memory:
    """All of it. Raises UserError where the batch does not divide, or the ds_config does not suit so many GPUs."""
    setup.accumulation  # noqa: B018  it raises
    check_world(setup.ds, setup.world)
    check_checkpointing(setup.ds, setup.settings.memory.checkpoint)
    check_linear(setup.ds, setup.settings.student.linear)
    settings, n = setup.settings, networks.parameters
    found, notes = networks.activations(setup.dtype), []
    teacher = networks.teacher_peak()
    if teacher is None:
        notes.append("a teacher does not run on the meta device: its activations are not in the sum")
    parts = states(setup, networks)
    if settings.optim.ema is not None:
        parts["average of the weights"] = 4 * (n if stage(setup.ds) == 0 else -(-n // setup.world))
    parts |= teachers(setup, networks)
    parts |= {"buckets": buckets(setup, n), "batch": _batch(setup, networks)}
    gathered = _gathered(setup, networks)
    backward = found.peak + gathered
    parts |= {"activations kept": found.kept, "activations at work": found.peak - found.kept}
    if gathered:
        parts["gathered layers"] = gathered
    update = _update(setup, networks)
    beyond = max(0, update - backward, (teacher or 0) - backward)
    if beyond:
        parts["the update, beyond that" if update >= (teacher or 0) else "the teacher at work, beyond that"] = beyond
    parts["fragmentation"] = int(FRAGMENTATION * (backward + beyond + parts["batch"]))
    parts["CUDA and NCCL"] = CONTEXT
    return Memory(parts, _host(setup, networks, found.offloaded), notes)


def teachers(setup: Setup, networks: Networks) -> dict[str, int]:
    """Each teacher whole, or a rank's share of its blocks; of these then the one that computes, and the next, whole."""
    parts = {f"teacher {name}".rstrip(): networks.teacher_bytes[name] for name in networks.running}
    if not sharded(setup, networks):
        return parts
    for name in networks.running:
        split = sum(networks.teacher_blocks[name])
        parts[f"teacher {name}".rstrip()] -= split - -(-split // setup.world)
    largest = max(max(networks.teacher_blocks[name]) for name in networks.running)
    return parts | {"a teacher's gathered blocks": 2 * largest}


def sharded(setup: Setup, networks: Networks) -> bool:
    """Whether ranks hold shares of teachers."""
    return setup.settings.memory.teacher == "sharded" and setup.world > 1 and bool(networks.running)


def buckets(setup: Setup, parameters: int) -> int:
    """Those in which gradients are reduced.

    Stage 2: two with overlap_comm, else one, in the weights' dtype; stage 3, and stage 1 in float32: one. What goes
    over the wire in float32 is a further copy.
    """
    zero = stage(setup.ds)
    if zero == 0 or (zero == 1 and bf16(setup.ds)):
        return 0
    size = int(setup.zero.get("reduce_bucket_size", 500_000_000))
    count = 2 if zero == 2 and setup.overlaps else 1
    contiguous = setup.zero.get("contiguous_gradients", True)
    wire = 4 * min(size, parameters) if setup.weight_bytes == 2 and setup.world > 1 else 0
    return (count * setup.weight_bytes * size if contiguous else 0) + wire


def _persistent(setup: Setup) -> int:
    """Elements up to which a parameter stays whole on every rank at stage 3."""
    return int(setup.zero.get("stage3_param_persistence_threshold", 100_000))


def _on_host(setup: Setup, part: str) -> bool:
    return setup.zero.get(part, {}).get("device", "none") != "none"


def _gathered(setup: Setup, networks: Networks) -> int:
    """Whole layers on a GPU at stage 3, at most stage3_max_live_parameters, and the second partition of hpZ."""
    if stage(setup.ds) < 3 or setup.world == 1:
        return 0
    n = networks.parameters
    live = min(n, int(setup.zero.get("stage3_max_live_parameters", 1_000_000_000)))
    second = int(setup.zero.get("zero_hpz_partition_size", 1))
    return setup.weight_bytes * (live + (n // second if second > 1 else 0))


def _update(setup: Setup, networks: Networks) -> int:
    """What the optimizer's step needs for a while: gradients in one flat float32 piece."""
    zero, n, r = stage(setup.ds), networks.parameters, setup.world
    if zero == 0 or (zero == 1 and bf16(setup.ds)):
        return 4 * min(n, REDUCED_AT_ONCE) if r > 1 else 0
    if offloaded(setup.ds):
        return 0
    largest = -(-max(networks.groups) // r)
    return 4 * (largest if zero < 3 else min(largest, int(setup.zero.get("sub_group_size", 1_000_000_000))))


def _batch(setup: Setup, networks: Networks) -> int:
    """The module's arguments, and the images as they come, 8 bits each."""
    arguments = networks.arguments(setup.dtype)
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(arguments)) + arguments[0].numel()


def _host(setup: Setup, networks: Networks, offloaded_inputs: int) -> dict[str, int]:
    """Of one node."""
    settings, share = setup.settings, -(-networks.parameters // setup.world)
    ranks = min(setup.world, setup.gpus_per_node)
    data = settings.data
    images = settings.memory.micro_batch * 3 * data.image_size**2
    parts = {
        "snapshot of a checkpoint": (12 if settings.optim.ema is None else 16) * share,
        "data workers": data.workers * (WORKER + data.prefetch * images),
        "processes": PROCESS,
    }
    if offloaded_inputs:
        parts["offloaded activations"] = offloaded_inputs
    parts |= host_states(setup, networks)
    return {name: ranks * size for name, size in parts.items()}
