"""What a rank holds of the training state, under every ZeRO stage: the one place that knows where DeepSpeed keeps it.

The state of a parameter is a few flat float32 vectors: its master weights, the two Adam moments, and where one is kept
the average of the weights (`fdscale.engine.ema`); of a frozen parameter its weights alone. A rank holds a range of
each: everything at stage 0 (rank 0 speaks for all), a partition at stages 1, 2 and 3. `read` yields the ranges; `write`
puts values back and refreshes the working-precision weights. Nothing here touches files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale import UserError, dist

KEYS = ("fp32", "exp_avg", "exp_avg_sq")
FROZEN_KEYS = ("fp32",)
EMA = "ema"


class Range(NamedTuple):
    """A rank's part of one parameter: elements start .. start + length of the flattened parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int


def keys(engine: Any) -> tuple[str, ...]:
    """The vectors that are kept of a trained parameter."""
    averaged = any(EMA in kept for kept in base_optimizer(engine).state.values())
    return (*KEYS, EMA) if averaged else KEYS


def names_and_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Full shapes of all parameters, by name."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def buffers(engine: Any) -> dict[str, Tensor]:
    """Persistent buffers, equal on all ranks."""
    persistent = engine.module.state_dict(keep_vars=True).keys() - dict(engine.module.named_parameters()).keys()
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in persistent}


class Buffers:
    """The persistent buffers of an engine around a step: one that was not applied leaves them as the weights.

    Those of modules that say they are `constant` are left alone: no step writes to them, and they may be large.
    """

    def __init__(self, engine: Any) -> None:
        parts = engine.module.modules()
        constant = {id(b) for part in parts if getattr(part, "constant", False) for b in part.buffers()}
        self._now = [buffer for buffer in buffers(engine).values() if id(buffer) not in constant]
        self._before: list[Tensor] = []

    def keep(self) -> None:
        """Remember them, before a step."""
        self._before = [buffer.clone() for buffer in self._now]

    @torch.no_grad()
    def settle(self, applied: bool | Tensor) -> None:
        """Put them back behind a step where it was not applied."""
        for now, before in zip(self._now, self._before, strict=True):
            if isinstance(applied, Tensor):
                now.copy_(torch.where(applied, now, before))
            elif not applied:
                now.copy_(before)


def describe(engine: Any) -> dict[str, Any]:
    """What there is besides the vectors, as plain data: what a checkpoint must have in common with an engine."""
    return {
        "optimizer_step": optimizer_step(engine),
        "keys": list(keys(engine)),
        "parameters": {name: list(shape) for name, shape in names_and_shapes(engine).items()},
        "frozen": sorted(name for name, p in engine.module.named_parameters() if not p.requires_grad),
        "buffers": sorted(buffers(engine)),
        "groups": [
            {key: group[key] for key in ("names", "lr", "lr_scale", "weight_decay")}
            for group in engine.optimizer.param_groups
        ],
    }


def _stage(engine: Any) -> int:
    return engine.zero_optimization_stage()


def ranges(engine: Any, *, owned: bool = True) -> Iterator[tuple[Range, Any]]:
    """This rank's ranges. owned: only those this rank speaks for (rank 0 speaks for all of what all hold whole)."""
    stage = _stage(engine)
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            part = parameter.ds_tensor.numel()
            start = min(dist.rank() * part, parameter.ds_numel)
            length = min(part, parameter.ds_numel - start)  # the last partitions are padded
            shape = tuple(parameter.ds_shape)
        elif stage and parameter.requires_grad:
            mapping = parameter._hp_mapping
            shape = tuple(parameter.shape)
            start, length = (
                (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
                if mapping is not None
                else (0, 0)
            )
        else:
            shape, start, length = tuple(parameter.shape), 0, parameter.numel()
            if owned and dist.rank() != 0:
                length = 0
        if length:
            yield Range(name, shape, start, length), parameter


def read(engine: Any) -> Iterator[tuple[Range, dict[str, Tensor]]]:
    """The owned ranges with their float32 vectors: views, on the device where DeepSpeed keeps them.

    Nothing changes them but the optimizer, at the last micro-batch of a step. Frozen weights of another precision are
    copies. Raises UserError where there is nothing to save.
    """
    if not any(KEYS[1] in kept for kept in base_optimizer(engine).state.values()):
        create_moments(engine, 0)  # no update was made yet, or all were skipped
    trained = keys(engine)
    for part, parameter in ranges(engine):
        wanted = trained if parameter.requires_grad else FROZEN_KEYS
        yield part, {key: _vector(engine, part, parameter, key)[: part.length].float() for key in wanted}


def _vector(engine: Any, part: Range, parameter: Any, key: str) -> Tensor:
    """Where DeepSpeed keeps a vector of this rank's part of a parameter, as a view; at stage 3 with its padding."""
    stage = _stage(engine)
    if not parameter.requires_grad:
        return (parameter.ds_tensor if stage == 3 else parameter).detach().view(-1)
    if stage == 3:
        return _partition(parameter, key)
    if stage:
        return _fragment(engine, parameter, key)
    if key == "fp32":
        return parameter.detach().view(-1)
    moments = engine.optimizer.state.get(parameter)
    if not moments:
        raise UserError(f"the parameter {part.name} never received a gradient, so it has no optimizer state to save")
    return moments[key].view(-1)


def _partition(parameter: Any, key: str) -> Tensor:
    """A parameter's part of its flat group at stage 3, as a view.

    DeepSpeed's public way (0.19.8, `safe_get_local_fp32_param`) takes the same and copies it to the accelerator, also
    where it was offloaded to the host.
    """
    name = None if key == "fp32" else key
    value, _ = parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, True, name)
    return value.detach()


def write(engine: Any, fetch: Callable[[Range, str], Tensor], optimizer_step: int) -> None:
    """Overwrite this rank's ranges with fetch(range, key) -> flat float32 tensor, then refresh the working weights."""
    create_moments(engine, optimizer_step)
    trained = keys(engine)
    for part, parameter in ranges(engine, owned=False):
        for key in trained if parameter.requires_grad else FROZEN_KEYS:
            target = _vector(engine, part, parameter, key)
            target[: part.length].copy_(fetch(part, key))
            target[part.length :].zero_()
    refresh(engine)


def optimizer_step(engine: Any) -> int:
    """How many updates AdamW has made (its bias correction), 0 before the first."""
    base = base_optimizer(engine)
    counts = [holder["step"] for holder in (*base.state.values(), *base.param_groups) if "step" in holder]
    # As one tensor: the host waits for the device once, not for each parameter.
    steps = {int(count) for count in torch.stack([torch.as_tensor(c) for c in counts]).tolist()} if counts else set()
    if len(steps) > 1:  # at stage 0: at the others AdamW knows of no parameters
        late = [
            name
            for name, p in engine.module.named_parameters()
            if p in base.state and int(base.state[p]["step"]) < max(steps)
        ]
        raise UserError(
            f"the parameter {late[0]} did not receive a gradient at every step ({len(late)} in all), so there is no "
            "one number of updates to save"
        )
    return steps.pop() if steps else 0


def base_optimizer(engine: Any) -> Any:
    """AdamW itself."""
    return engine.optimizer.optimizer if _stage(engine) else engine.optimizer


def masters(engine: Any) -> list[Tensor]:
    """The tensors that AdamW itself updates."""
    stage = _stage(engine)
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage:  # for bf16 with float32 accumulation at stage 1 DeepSpeed takes another class, with another name for this
        optimizer = engine.optimizer
        return list(getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition)
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def create_moments(engine: Any, step: int) -> None:
    """AdamW creates its state at the first step; a resumed run needs it before."""
    base = base_optimizer(engine)
    per_group = type(base).__module__.startswith("apex")  # counts updates per group, the others per parameter
    for group in base.param_groups if per_group else ():
        group["step"] = step
    for master in masters(engine):
        state = base.state[master]
        if isinstance(base, torch.optim.AdamW):
            state["step"] = torch.tensor(float(step), device=master.device)
        elif not per_group:
            state["step"] = step
        for key in KEYS[1:]:
            if key not in state:
                state[key] = torch.zeros_like(master)


def _fragment(engine: Any, parameter: Any, key: str) -> Tensor:
    """A parameter's part of its flat group at stages 1 and 2, as a view.

    DeepSpeed's own link from a parameter to its moments is made after the first group's first step and never again, so
    with several groups it misses all but the first (0.19.8, stage_1_and_2.py `_lazy_init_hp_params_optimizer_state`);
    the addresses are right.
    """
    mapping = parameter._hp_mapping
    master = masters(engine)[mapping.param_group_index]
    flat = master if key == "fp32" else base_optimizer(engine).state[master][key]
    return flat.detach().narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)


def refresh(engine: Any) -> None:
    """Copy master weights into the working weights, on all ranks."""
    stage, optimizer = _stage(engine), engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # whatever is gathered goes, also what a forward alone has left
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        for parameter in engine.module.parameters():
            parameter.ds_secondary_tensor = None  # of ZeRO++ (hpZ); DeepSpeed forgets those of trained parameters alone
        optimizer.checkpoint_event_epilogue()  # what stays gathered is gathered anew
    elif stage:
        optimizer.update_lp_params()
