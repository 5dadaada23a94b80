"""What a rank holds of the training state, under every ZeRO stage: the one place that knows where DeepSpeed keeps it.

The state of a parameter is three flat float32 vectors: its master weights and the two Adam moments. A rank holds a
range of each: everything at stage 0 (rank 0 speaks for all), a partition at stages 1, 2 and 3. `read` yields the
ranges; `write` puts values back and refreshes the working-precision weights. Nothing here touches files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdscale import UserError, dist

KEYS = ("fp32", "exp_avg", "exp_avg_sq")


class Range(NamedTuple):
    """A rank's part of one parameter: elements start .. start + length of the flattened parameter."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int


def names_and_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Full shapes of all trainable parameters, by name."""
    return {
        name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters() if p.requires_grad
    }


def buffers(engine: Any) -> dict[str, Tensor]:
    """Persistent buffers, equal on all ranks."""
    persistent = engine.module.state_dict(keep_vars=True).keys() - dict(engine.module.named_parameters()).keys()
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in persistent}


def _stage(engine: Any) -> int:
    return engine.zero_optimization_stage()


def ranges(engine: Any, *, owned: bool = True) -> Iterator[tuple[Range, Any]]:
    """This rank's ranges. owned: only those this rank speaks for (at stage 0, rank 0 speaks for all ranks)."""
    stage = _stage(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 3:
            part = (
                parameter.ds_tensor.ds_numel
                if hasattr(parameter.ds_tensor, "ds_numel")
                else parameter.ds_tensor.numel()
            )
            start = min(dist.rank() * part, parameter.ds_numel)
            length = min(part, parameter.ds_numel - start)  # the last partitions are padded
            shape = tuple(parameter.ds_shape)
        elif stage:
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
    """The owned ranges with their three vectors: views, on the device where DeepSpeed keeps them.

    Nothing changes them but the optimizer, at the last micro-batch of a step. Raises UserError where there is nothing
    to save.
    """
    stage = _stage(engine)
    for part, parameter in ranges(engine):
        if stage == 3:
            yield part, {key: _partition(parameter, key)[: part.length] for key in KEYS}
        elif stage:
            yield part, {key: _fragment(engine, parameter, key) for key in KEYS}
        else:
            moments = engine.optimizer.state.get(parameter)
            if not moments:
                raise UserError(
                    f"the parameter {part.name} never received a gradient, so it has no optimizer state to save"
                )
            yield part, {"fp32": parameter.detach().flatten(), **{key: moments[key].flatten() for key in KEYS[1:]}}


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
    stage = _stage(engine)
    _create_moments(engine, optimizer_step)
    for part, parameter in ranges(engine, owned=False):
        for key in KEYS:
            value = fetch(part, key)
            if stage == 3:
                _write_stage3(parameter, key, value)
            elif stage:
                _fragment(engine, parameter, key).copy_(value)
            else:
                target = parameter.detach() if key == "fp32" else engine.optimizer.state[parameter][key]
                target.view(-1).copy_(value)
    _refresh(engine)


def _write_stage3(parameter: Any, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    padded = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32)
    padded[: value.numel()] = value
    if key == "fp32":
        safe_set_local_fp32_param(parameter, padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, key)


def optimizer_step(engine: Any) -> int:
    """How many updates AdamW has made (its bias correction), 0 before the first."""
    base = _base_optimizer(engine)
    counts = [holder["step"] for holder in (*base.state.values(), *base.param_groups) if "step" in holder]
    # As one tensor: the host waits for the device once, not for each parameter.
    steps = {int(count) for count in torch.stack([torch.as_tensor(c) for c in counts]).tolist()} if counts else set()
    assert len(steps) <= 1, f"parameters disagree on the number of updates: {sorted(steps)}"
    return steps.pop() if steps else 0


def _base_optimizer(engine: Any) -> Any:
    return engine.optimizer.optimizer if _stage(engine) else engine.optimizer


def _masters(engine: Any) -> list[Tensor]:
    """The tensors that AdamW itself updates."""
    stage = _stage(engine)
    if stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    if stage:  # for bf16 with float32 accumulation at stage 1 DeepSpeed takes another class, with another name for this
        optimizer = engine.optimizer
        return list(getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition)
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def _create_moments(engine: Any, step: int) -> None:
    """AdamW creates its state at the first step; a resumed run needs it before."""
    base = _base_optimizer(engine)
    per_group = type(base).__module__.startswith("apex")  # counts updates per group, the others per parameter
    for group in base.param_groups if per_group else ():
        group["step"] = step
    for master in _masters(engine):
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
    master = _masters(engine)[mapping.param_group_index]
    flat = master if key == "fp32" else _base_optimizer(engine).state[master][key]
    return flat.detach().narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)


def _refresh(engine: Any) -> None:
    """Copy master weights into the working weights, on all ranks."""
    stage, optimizer = _stage(engine), engine.optimizer
    if stage == 3:
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage:
        optimizer.update_lp_params()
