"""The cheapest configuration that fits: real ones are planned one by one, and the least GPU-hours win."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from fdscale import UserError, config
from fdscale.engine.ds_config import offloaded, stage
from fdscale.plan import memory, pace
from fdscale.plan.machines import Machine
from fdscale.plan.memory import GIB, Setup
from fdscale.plan.shapes import Networks, with_policy


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
    """Of ZeRO stages, offload, checkpointing, sequential attention and micro-batches on as many GPUs, else on 2, 4 or
    8 times as many; None where nothing fits."""
    for factor in (1, 2, 4, 8):
        wider = dataclasses.replace(setup, world=setup.world * factor)
        fitting = [found for found in _all(wider, networks, machine) if found.fits]
        if fitting:  # of equals the one with the fewest changes
            return min(fitting, key=lambda found: (found.gpu_seconds, len(changes(setup, found.setup))))
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
    for zero, checkpoint, chunk in itertools.product(_stages(setup.ds), checkpoints, chunks):
        for micro in micros:
            other = with_policy(settings, checkpoint=checkpoint, attention_chunk=chunk, micro_batch=micro)
            try:
                found = plan(dataclasses.replace(setup, settings=other, ds=zero), networks, machine)
            except UserError:  # this micro-batch does not divide the batch
                continue
            yield found
            if found.fits:  # smaller ones take longer
                break


def _stages(ds: dict[str, Any]) -> list[dict[str, Any]]:
    """The ds_config as it is, with each higher stage, and with the optimizer offloaded."""
    found = [ds]
    precision = {key: value for key, value in ds.items() if key != "zero_optimization"}
    found += [precision | {"zero_optimization": _section(ds, number)} for number in (1, 2, 3) if number > stage(ds)]
    if not offloaded(ds):
        section = _section(ds, 3) | {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
        found.append(precision | {"zero_optimization": section})
    return found


def _section(ds: dict[str, Any], number: int) -> dict[str, Any]:
    """The section on ZeRO of the ds_config, or that of ds_configs/zeroN.json for another stage."""
    if stage(ds) == number:
        return dict(ds["zero_optimization"])
    usual: dict[int, dict[str, Any]] = {
        1: {"allgather_bucket_size": 200_000_000},
        2: {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 200_000_000},
        3: {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        },
    }
    return {"stage": number, **usual[number]}


def changes(before: Setup, after: Setup) -> list[str]:
    """What a person changes to get from one to the other: options of the command, and keys of the ds_config."""
    found = []
    if after.world != before.world:
        found.append(f"{after.world} GPUs")
    old, new = before.settings.memory, after.settings.memory
    for name in ("micro_batch", "checkpoint", "attention_chunk"):
        if getattr(old, name) != getattr(new, name):
            value = getattr(new, name)
            text = f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
            found.append(f"--set memory.{name}={text}")
    if after.ds != before.ds:
        name = f"zero{stage(after.ds)}{'_offload' if offloaded(after.ds) else ''}.json"
        found.append(f"the zero_optimization of ds_configs/{name}")
    return found
