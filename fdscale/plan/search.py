"""The cheapest configuration that fits: real ones are planned one by one, and the least GPU-hours win."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from fdscale import UserError, config
from fdscale.engine import ds_config
from fdscale.plan import memory, pace
from fdscale.plan.machines import Machine
from fdscale.plan.memory import GIB, Setup
from fdscale.plan.shapes import Networks, with_policy

LARGE = 0.02  # share of a GPU's memory from which on a teacher is worth sharing out
TRIED = tuple(f"ds_configs/{name}.json" for name in ("zero1", "zero2", "zero3", "zero3_offload"))
ALIKE = 1.05  # no estimate here is better than that: of what costs alike, the fewest changes win


class Planned(NamedTuple):
    """One configuration, and what it needs."""

    setup: Setup
    memory: memory.Memory
    pace: pace.Pace
    fits: bool

    @property
    def gpu_seconds(self) -> float:
        """Of one step, on all GPUs."""
        return self.pace.step_s * self.setup.world


def plan(setup: Setup, networks: Networks, machine: Machine) -> Planned:
    """Plan one. Raises UserError where the batch does not divide."""
    networks = networks.with_memory(setup.settings)
    needed = memory.estimate(setup, networks)
    fits = needed.total <= machine.gpu.memory_gib * GIB
    return Planned(setup, needed, pace.estimate(setup, networks, machine), fits)


def divided(setup: Setup) -> Setup:
    """The same with the largest micro-batch, up to its own, that divides the batch.

    Raises UserError where none does.
    """
    together = config.together(setup.settings)
    share, rest = divmod(setup.settings.optim.batch_size, setup.world)
    for micro in range(setup.settings.memory.micro_batch, 0, -1):
        if not rest and share % micro == 0 and micro % together == 0:
            return dataclasses.replace(setup, settings=with_policy(setup.settings, micro_batch=micro))
    raise UserError(
        f"optim.batch_size {setup.settings.optim.batch_size} cannot be shared among {setup.world} GPUs"
        f"{' in pairs' if together > 1 else ''}; choose other numbers with --gpus"
    )


def cheapest(setup: Setup, networks: Networks, machine: Machine) -> Planned | None:
    """Of the shipped ds_configs, checkpointing, sequential attention and micro-batches on as many GPUs, else on 2, 4 or
    8 times as many; None where nothing fits."""
    for factor in (1, 2, 4, 8):
        wider = dataclasses.replace(setup, world=setup.world * factor)
        fitting = [found for found in _all(wider, networks, machine) if found.fits]
        if fitting:
            least = min(found.gpu_seconds for found in fitting)
            alike = [found for found in fitting if found.gpu_seconds <= ALIKE * least]
            return min(alike, key=lambda found: (len(changes(setup, found.setup)), found.gpu_seconds))
    return None


def _all(setup: Setup, networks: Networks, machine: Machine) -> Iterator[Planned]:
    settings = setup.settings
    policy = settings.memory
    checkpoints = list(dict.fromkeys((policy.checkpoint, ("torch",))))
    chunks = [policy.attention_chunk]
    if networks.kernels == "reference" and set(policy.attention_chunk) == {0}:  # others keep no scores anyway
        chunks.append((1,))
    together = config.together(settings)
    halves = [policy.micro_batch // 2**i for i in range(policy.micro_batch.bit_length())]
    micros = [micro for micro in halves if micro % together == 0]
    held = dict.fromkeys((policy.teacher, *(("sharded",) if _may_share(setup, networks, machine) else ())))
    for zero, checkpoint, chunk, teacher in itertools.product(
        (setup.ds, *shipped().values()), checkpoints, chunks, held
    ):
        for micro in micros:
            policies = {"checkpoint": checkpoint, "attention_chunk": chunk, "teacher": teacher}
            other = with_policy(settings, micro_batch=micro, **policies)
            one = dataclasses.replace(setup, settings=other, ds=zero)
            if sum(memory.states(one, networks).values()) > machine.gpu.memory_gib * GIB:
                break  # no activations needed to see that
            try:
                found = plan(one, networks, machine)
            except UserError:  # this micro-batch does not divide the batch
                continue
            yield found
            if found.fits:  # smaller ones take longer
                break


def _may_share(setup: Setup, networks: Networks, machine: Machine) -> bool:
    """Whether teachers are large enough to be worth sharing out among the ranks, and can be."""
    wide = [of.hold != "same" for of in config.teachers_of(setup.settings).values()]
    if setup.world == 1 or any(wide) or "teacher" in setup.settings.memory.compile:
        return False
    large = sum(networks.teacher_bytes[name] for name in networks.running) > LARGE * machine.gpu.memory_gib * GIB
    try:
        return large and all(networks.teacher_blocks.values())
    except UserError:  # one has no blocks
        return False


def shipped() -> dict[str, dict[str, Any]]:
    """The files in ds_configs/ that are tried."""
    return {name: ds_config.read(name) for name in TRIED}


def changes(before: Setup, after: Setup) -> list[str]:
    """What a person changes to get from one to the other: options of the command, and keys of the ds_config."""
    found = []
    if after.world != before.world:
        found.append(f"{after.world} GPUs")
    old, new = before.settings.memory, after.settings.memory
    for name in ("micro_batch", "checkpoint", "attention_chunk", "teacher"):
        if getattr(old, name) != getattr(new, name):
            value = getattr(new, name)
            text = f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
            found.append(f"--set memory.{name}={text}")
    found += [f"--ds {name}" for name, ds in shipped().items() if ds == after.ds != before.ds]
    return found
