"""What a ds_config says, and whether it may say so: without torch and DeepSpeed, so that looking is quick.

`engine.initialize.read_ds_config` also asks DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from fdscale import UserError

# Keys that the recipe owns, and the recipe's key for each.
OWNED_BY_RECIPE = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "memory.micro_batch",
    "gradient_accumulation_steps": "nothing: it is batch_size / (micro_batch x world)",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim",
    "scheduler": "schedule",
    "activation_checkpointing": "memory.checkpoint",
    "steps_per_print": "log.every",
    "tensorboard": "log.tensorboard",
    "wandb": "log.wandb",
    "seed": "student.seed and data.seed",
}
ALLOWED = {
    "zero_optimization",
    "bf16",
    "fp16",  # known, so that its refusal can say why
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "aio",
    "zero_force_ds_cpu_optimizer",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "compile",
    "dump_state",
}
PRECISION_KEYS = ("data_types.grad_accum_dtype", "communication_data_type")


def read(path: str | None) -> dict[str, Any]:
    """Read and check a ds_config; None: ZeRO 0 in float32.

    Raises UserError for a key that the recipe owns, "auto" (which DeepSpeed drops silently outside Hugging Face),
    unknown keys, stages and offloads that do not exist, and precisions that DeepSpeed cannot train well.
    """
    if path is None:
        return {"zero_optimization": {"stage": 0}}
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such ds_config file; examples are in ds_configs/")
    try:
        ds = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(ds, dict):
        raise UserError(f"{path}: a ds_config is a JSON object, got {type(ds).__name__}")
    for key, value in _walk(ds):
        if value == "auto":
            raise UserError(
                f'{path}: {key} is "auto", which DeepSpeed ignores silently here; write the value, or remove the key'
            )
    for key in ds:
        if key in OWNED_BY_RECIPE:
            raise UserError(
                f"{path}: {key} belongs to the recipe ({OWNED_BY_RECIPE[key]}); remove it from the ds_config"
            )
        if key not in ALLOWED:
            close = difflib.get_close_matches(key, ALLOWED, n=1)
            raise UserError(
                f"{path}: unknown key {key}{f' (did you mean {close[0]!r}?)' if close else ''}; ds_configs/README.md "
                "lists what may stand here"
            )
    for key in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(ds.get(key, {}), dict):
            raise UserError(f"{path}: {key} must be an object, got {json.dumps(ds[key])}")
    _check_precision(ds, path)
    _check_zero(ds.get("zero_optimization", {}), path)
    return ds


def _walk(tree: Any, prefix: str = "") -> Any:
    for key, value in tree.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def _check_precision(ds: dict[str, Any], path: str) -> None:
    if ds.get("fp16", {}).get("enabled"):
        raise UserError(
            f"{path}: fp16 is not supported: its loss scale makes steps depend on history; use bf16, or float32"
        )
    if not bf16(ds):
        return
    if stage(ds) == 0:
        raise UserError(f"{path}: bf16 needs ZeRO stage 1, 2 or 3: DeepSpeed accumulates gradients in bf16 at stage 0")
    found = dict(_walk(ds))
    for key in PRECISION_KEYS:
        if key not in found:
            raise UserError(
                f'{path}: bf16 needs "{key}" (choose "fp32"): without it DeepSpeed accumulates and reduces gradients '
                "in bf16"
            )


def _check_zero(zero: dict[str, Any], path: str) -> None:
    """The stages and offloads that exist here."""
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {json.dumps(zero['stage'])}")
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key, {})
        if not isinstance(part, dict):
            raise UserError(f'{path}: zero_optimization.{key} must be an object such as {{"device": "cpu"}}')
        if part.get("device", "none") not in ("none", "cpu"):
            raise UserError(f"{path}: zero_optimization.{key}.device must be none or cpu; others are not supported")


def stage(ds: dict[str, Any]) -> int:
    """ZeRO stage of a ds_config."""
    return int(ds.get("zero_optimization", {}).get("stage", 0))


def offloaded(ds: dict[str, Any]) -> bool:
    """Whether the optimizer's state lies in host memory."""
    return ds.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"


def bf16(ds: dict[str, Any]) -> bool:
    """Whether parameters are held in bfloat16."""
    return bool(ds.get("bf16", {}).get("enabled"))


def accumulation(batch_size: int, micro_batch: int, world: int) -> int:
    """Micro-batches per step and rank. Raises UserError where the batch does not divide."""
    if batch_size % (micro_batch * world):
        usable = [m for m in range(1, batch_size // world + 1) if batch_size % (m * world) == 0]
        advice = (
            f"usable with {world} ranks: --set "
            f"memory.micro_batch={max((m for m in usable if m <= micro_batch), default=usable[0])}"
            if usable
            else "use fewer ranks"
        )
        raise UserError(
            f"optim.batch_size {batch_size} is not divisible by memory.micro_batch {micro_batch} x {world} ranks; "
            f"{advice}"
        )
    return batch_size // (micro_batch * world)
