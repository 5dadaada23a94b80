"""Seconds of a training step, and what follows: data rate, days, GPU-hours, checkpoints. All of it is an estimate.

Linear layers take their FLOPs at an assumed share of the GPU's peak. Attention takes the longest of its arithmetic, its
exponentials and its traffic (a roofline), at another. Communication takes its bytes at the bandwidth of the links, and
hides under a share of the pass it belongs to where the ds_config lets it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fdscale import config, student
from fdscale.engine import memory
from fdscale.engine.ds_config import bf16, offloaded, stage
from fdscale.models.layers import Attended
from fdscale.plan.machines import NETWORKS, Machine
from fdscale.plan.memory import Setup, sharded
from fdscale.plan.shapes import Networks

IMAGE_BYTES = 110e3  # of a stored image: the mean of ImageNet-1K's training set, 138 GB / 1.28 M


class Pace(NamedTuple):
    """Seconds of one step, part by part, and of a checkpoint; sizes in bytes."""

    parts: dict[str, float]
    hidden_s: float  # communication behind computation
    flops: float  # per step and GPU: student without recomputation
    checkpoint_bytes: int
    write_s: float

    @property
    def step_s(self) -> float:
        """The whole step."""
        return sum(self.parts.values())


class Pass(NamedTuple):
    """Seconds for one micro-batch."""

    forward: float
    backward: float  # recomputation included
    teacher: float  # of all of them


def estimate(setup: Setup, networks: Networks, machine: Machine) -> Pace:
    """Of a step on this machine."""
    settings = setup.settings
    times = _passes(setup, networks, machine)
    in_forward, in_backward, at_end = _traffic(setup, networks, machine)
    again = setup.accumulation
    in_teacher = 0.0
    if sharded(setup, networks):
        split = sum(sum(networks.teacher_blocks[name]) for name in networks.running)
        in_teacher = ring_s(split, setup, machine)
    shown_teacher, shown_forward, shown_backward = (
        max(0.0, seconds - (machine.overlap * under if hides else 0.0))
        for seconds, under, hides in (
            (in_teacher, times.teacher, True),
            (in_forward, times.forward, True),
            (in_backward, times.backward, setup.overlaps),
        )
    )
    parts = {
        "teacher": again * times.teacher,
        "forward": again * times.forward,
        "backward": again * times.backward,
        "communication that shows": again * (shown_teacher + shown_forward + shown_backward) + at_end,
        "update": _update(setup, networks, machine),
    }
    size = (12 if settings.optim.ema is None else 16) * networks.parameters
    work = student.work_per_image(settings, networks.module.backbone, heads=networks.head_flops)
    return Pace(
        parts,
        hidden_s=again * (in_teacher + in_forward + in_backward - shown_teacher - shown_forward - shown_backward),
        flops=work.student * settings.optim.batch_size / setup.world,
        checkpoint_bytes=size,
        write_s=size / machine.storage,
    )


def attention_s(
    work: list[Attended], images: int, machine: Machine, *, fused: bool, backward: bool = False
) -> list[float]:
    """Seconds of each block's attention.

    fused: as kernels that keep no scores do it: per score 4 d FLOP and one exponential forward, 10 d backward, and per
    token and head 8 d + 4 bytes forward, 16 d + 4 backward in 16 bits. Else as separate torch ops do it, which pass the
    scores through memory: 32 bytes per score forward, 58 backward.
    """
    gpu, found = machine.gpu, []
    for one in work:
        rows = images * one.sequences * one.tokens * one.heads
        scores = rows * one.tokens
        traffic = rows * ((16 if backward else 8) * one.dim + 4)
        if not fused:
            traffic += scores * (58 if backward else 32)
        arithmetic = scores * (10 if backward else 4) * one.dim / gpu.bf16
        found.append(max(traffic / gpu.memory, arithmetic, scores / gpu.exps) / machine.attention)
    return found


def _passes(setup: Setup, networks: Networks, machine: Machine) -> Pass:
    """Forward, backward and teacher of a micro-batch."""
    settings, backbone = setup.settings, networks.module.backbone
    images, size = settings.memory.micro_batch, (settings.data.image_size,) * 2
    rate = machine.mfu * (machine.gpu.bf16 if bf16(setup.ds) else machine.gpu.float32)
    work = backbone.attended(size)
    linear = images * max(0, 2 * (backbone.flops(size) + networks.head_flops) - _attention_flops(work)) / rate
    fused = networks.kernels != "reference" or not hasattr(getattr(backbone.blocks()[0], "attn", None), "kernels")
    ahead = attention_s(work, images, machine, fused=fused)
    back = attention_s(work, images, machine, fused=fused, backward=True)
    kinds = memory.per_stage(settings.memory.checkpoint, backbone.depths, "memory.checkpoint")
    chunks = memory.per_stage(settings.memory.attention_chunk, backbone.depths, "memory.attention_chunk")
    kept = ("none", "selective") if fused else ("none",)  # separate ops are computed again
    again = [seconds for seconds, kind in zip(ahead, kinds, strict=True) if kind not in kept]
    again += [s for s, chunk in zip(ahead, chunks, strict=True) if chunk and networks.kernels == "reference"]
    teachers = sum(_teacher_s(name, networks, machine) for name in networks.running)
    recomputed = linear * sum(kind != "none" for kind in kinds) / len(kinds)
    return Pass(linear + sum(ahead), 2 * linear + recomputed + sum(back) + sum(again), teachers)


def _teacher_s(name: str, networks: Networks, machine: Machine) -> float:
    """A teacher's forward."""
    teacher, settings = networks.teachers[name], networks.settings
    images, size = settings.memory.micro_batch, (settings.data.image_size,) * 2
    single = config.teachers_of(settings)[name].dtype == "float32"
    rate = machine.mfu * (machine.gpu.float32 if single else machine.gpu.bf16)
    flops = 2 * teacher.flops(size)
    if not hasattr(teacher.network, "attended"):
        return images * flops / rate
    network: Any = teacher.network
    work = network.attended(teacher.image_size or size)
    fused = networks.kernels != "reference" or not hasattr(getattr(network.blocks()[0], "attn", None), "kernels")
    linear = images * max(0, flops - _attention_flops(work)) / rate
    return linear + sum(attention_s(work, images, machine, fused=fused))


def _attention_flops(work: list[Attended]) -> int:
    """Of one image's forward."""
    return sum(4 * one.sequences * one.tokens**2 * one.heads * one.dim for one in work)


def _traffic(setup: Setup, networks: Networks, machine: Machine) -> tuple[float, float, float]:
    """Seconds of communication: in each forward, in each backward, and once per step where nothing hides it."""
    zero, n = stage(setup.ds), networks.parameters
    weights, grads = setup.weight_bytes * n, 4 * n
    if setup.world == 1:
        return 0.0, 0.0, 0.0
    if zero == 3:
        second = int(setup.zero.get("zero_hpz_partition_size", 1))
        gather = ring_s(weights, setup, machine)
        return (
            gather,
            (ring_s(weights, setup, machine, second) if second > 1 else gather) + ring_s(grads, setup, machine),
            0.0,
        )
    if zero == 2:
        return 0.0, ring_s(grads, setup, machine), ring_s(weights, setup, machine)
    all_reduce = 2 * ring_s(grads, setup, machine)
    return 0.0, 0.0, all_reduce + (ring_s(weights, setup, machine) if zero else 0.0)


def ring_s(size: int, setup: Setup, machine: Machine, ranks: int | None = None) -> float:
    """Seconds of an all-gather to, or reduce-scatter from, `size` bytes on every one of the ranks (all of them).

    Each GPU passes on all but its own share within the node, each node all but its own between nodes.
    """
    ranks = ranks or setup.world
    inside = min(ranks, setup.gpus_per_node)
    nodes = -(-ranks // setup.gpus_per_node)
    within = size * (ranks - 1) / ranks / machine.gpu.nvlink if inside > 1 else 0.0
    between = size * (nodes - 1) / nodes / NETWORKS[machine.network]
    return max(within, between) / machine.links


def _update(setup: Setup, networks: Networks, machine: Machine) -> float:
    """The optimizer's step, which reads gradient, weight and moments and writes weight and moments: bandwidth."""
    share = networks.parameters / (setup.world if stage(setup.ds) else 1)
    passed = share * (16 + 12 + setup.weight_bytes)
    if not offloaded(setup.ds):
        return passed / (machine.gpu.memory * machine.links)
    ranks = min(setup.world, setup.gpus_per_node)
    copied = share * (4 + setup.weight_bytes) / (machine.gpu.host * machine.links)
    return copied + ranks * passed / machine.host_memory
