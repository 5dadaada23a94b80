"""What may be chosen, what of it the plan expects to fit, and what to measure next."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fdscale import UserError, config
from fdscale.plan import search
from fdscale.plan.machines import Machine
from fdscale.plan.memory import GIB, Setup
from fdscale.plan.shapes import Networks, with_policy

SLACK = 1.1  # a plan is an estimate: what it expects to be somewhat too large is still tried
SEEDS = 3  # measured, from the best planned on, before the neighbours of the best measured


class Choice(NamedTuple):
    """One configuration."""

    ds: str  # name of the ds_config
    micro_batch: int
    checkpoint: tuple[str, ...]
    attention_chunk: tuple[int, ...]

    def applied(self, settings: config.Config) -> config.Config:
        """A config with it."""
        return with_policy(
            settings,
            micro_batch=self.micro_batch,
            checkpoint=self.checkpoint,
            attention_chunk=self.attention_chunk,
        )


class Candidate(NamedTuple):
    """A choice, and what the plan says: bytes of a GPU and seconds of a step; None where nothing is planned."""

    choice: Choice
    planned_gib: float | None = None
    planned_s: float | None = None


def choices(
    settings: config.Config, ds_names: Sequence[str], world: int, depths: Sequence[int], one_op: bool = False
) -> list[Choice]:
    """All there are, the recipe's own first. Raises UserError where the batch cannot be shared out.

    one_op: whether attention is one op, whose result selective checkpointing keeps; else that is the same as torch's.
    """
    policy, together = settings.memory, config.together(settings)
    share, rest = divmod(settings.optim.batch_size, world)
    micros = [n for n in _powers(share) if share % n == 0 and n % together == 0]
    if rest or not micros or share % policy.micro_batch:
        raise UserError(
            f"optim.batch_size {settings.optim.batch_size} cannot be shared among {world} ranks in micro-batches of "
            f"{policy.micro_batch}; choose another --ranks, or --set memory.micro_batch"
        )
    own = Choice(ds_names[0], policy.micro_batch, policy.checkpoint, policy.attention_chunk)
    longest = max(range(len(depths)), key=lambda stage: depths[stage])
    third = tuple("torch" if stage == longest else "none" for stage in range(len(depths)))
    tried = [policy.checkpoint, ("none",), *([third] if len(depths) > 1 else []), ("torch",)]
    checkpoints = dict.fromkeys([*tried, *([("selective",)] if one_op else [])])
    chunks = dict.fromkeys((policy.attention_chunk, (0,)))
    micros = sorted({*micros, policy.micro_batch}, reverse=True)
    grid = itertools.product(ds_names, micros, checkpoints, chunks)
    return list(dict.fromkeys((own, *(Choice(*one) for one in grid))))


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def planned(
    found: Iterable[Choice],
    settings: config.Config,
    ds_configs: dict[str, dict[str, Any]],
    world: int,
    machine: Machine | None,
) -> list[Candidate]:
    """The choices in the order in which they are worth measuring: by planned time, without those that cannot fit.

    The first stays where it is: it is what the others are compared with. Without a machine nothing is planned.
    """
    first, *rest = found
    if machine is None:
        return [Candidate(choice) for choice in (first, *rest)]
    networks = Networks(settings)
    candidates = []
    for choice in (first, *rest):
        setup = Setup(choice.applied(settings), ds_configs[choice.ds], world, machine.gpus_per_node)
        try:
            one = search.plan(setup, networks, machine)
        except UserError:  # these do not go together
            if choice == first:
                raise
            continue
        if choice == first or one.memory.total <= SLACK * machine.gpu.memory_gib * GIB:
            candidates.append(Candidate(choice, one.memory.total / GIB, one.pace.step_s))
    return [candidates[0], *sorted(candidates[1:], key=lambda candidate: candidate.planned_s or 0.0)]


def following(candidates: Sequence[Candidate], done: dict[Choice, dict[str, Any]]) -> Candidate | None:
    """What to measure next: the recipe's own, a few of the best planned, then what is next to the best measured.

    Where no neighbour of the best is left, the others follow as they are planned. What ran out of memory rules out
    larger micro-batches of the same, and until something runs smaller ones come first. None: all is measured or ruled
    out.
    """
    full = [choice for choice, record in done.items() if record["state"] == "out of memory"]
    left = [one for one in candidates if one.choice not in done and not _ruled_out(one.choice, full)]
    if not left:
        return None
    timed = {choice: record["step_s"] for choice, record in done.items() if record["state"] == "done"}
    if candidates[0].choice in done and len(timed) > SEEDS:
        best = min(timed, key=timed.__getitem__)
        micros = sorted({one.choice.micro_batch for one in candidates})
        near = [one for one in left if _neighbours(one.choice, best, micros)]
        return (near or left)[0]
    if full and not timed:  # first of all something that runs
        least = min(choice.micro_batch for choice in full)
        return next((one for one in left if one.choice.micro_batch < least), left[0])
    return left[0]


def _ruled_out(choice: Choice, full: Iterable[Choice]) -> bool:
    smaller = (one._replace(micro_batch=choice.micro_batch) for one in full if choice.micro_batch >= one.micro_batch)
    return choice in smaller


def _neighbours(one: Choice, other: Choice, micros: Sequence[int]) -> bool:
    """Whether one thing differs; of micro-batches, by one step."""
    if sum(a != b for a, b in zip(one, other, strict=True)) != 1:
        return False
    return abs(micros.index(one.micro_batch) - micros.index(other.micro_batch)) <= 1
