"""From a module on the meta device and a ds_config to a running DeepSpeed engine.

Models are never built under `deepspeed.zero.Init`: it makes timm-style initialisation a silent no-op and rounds
buffers. Instead every parameter's first value is a function of its name (`models.layers.initial_value`, or a file), and
parameters come into being one at a time, cast to the engine's precision and, at ZeRO-3, partitioned at once: host
memory holds one full parameter, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdscale import UserError, dist
from fdscale.engine import ema
from fdscale.engine.optim import adamw, param_groups

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


def read_ds_config(path: str | None) -> dict[str, Any]:
    """Read and check a ds_config; None: ZeRO 0 in float32.

    Raises UserError for a key that the recipe owns, "auto" (which DeepSpeed drops silently outside Hugging Face),
    unknown keys, and precisions that DeepSpeed cannot train well.
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
    """DeepSpeed's own model of the section, its complaint in one line; and what was never tried is refused."""
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {json.dumps(zero['stage'])}")
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key, {})
        if not isinstance(part, dict):
            raise UserError(f'{path}: zero_optimization.{key} must be an object such as {{"device": "cpu"}}')
        if part.get("device", "none") not in ("none", "cpu"):
            raise UserError(f"{path}: zero_optimization.{key}.device must be none or cpu; others are not supported")
    prepare_environment()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        raise UserError(f"{path}: zero_optimization.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


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


def prepare_environment(builds: bool = False) -> None:
    """What DeepSpeed needs around it before it is imported: a quiet log, the right accelerator, ninja, a compiler."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The environment's own programs (ninja) are found even where it was not activated.
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = own + os.pathsep + os.environ.get("PATH", "")
    if (builds or not torch.cuda.is_available()) and not (
        shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    ):
        raise UserError(
            "DeepSpeed builds a small C++ op at first use, and no C++ compiler was found: install g++ (Debian: "
            "apt-get install g++), or set CXX"
        )
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    for noisy in (
        "torch.distributed",
        "torch.utils.cpp_extension",
    ):  # "No CUDA runtime is found" on every CPU machine with nvcc
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # DeepSpeed calls collectives under names that torch is about to change; at ZeRO-3 that is two lines a step.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)


def initialize(
    module: nn.Module,
    initial: Callable[[str, torch.Size], Tensor],
    ds: dict[str, Any],
    *,
    batch_size: int,
    micro_batch: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    clip_grad: float,
    layer_decay: float,
    fused: str = "auto",
    average: float | None = None,
) -> Any:
    """Materialise a module that lives on the meta device and hand it to DeepSpeed.

    initial(name, shape) gives a parameter's first value as a float32 CPU tensor; it must not depend on the rank.
    average: decay of the moving average of the weights (`engine.ema`); None: none is kept.
    Returns DeepSpeed's own engine; its optimizer has the groups of `engine.optim.param_groups`.
    """
    prepare_environment(offloaded(ds))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(os.environ["DEEPSPEED_LOG_LEVEL"].upper())
    dist.init()
    accumulate = accumulation(batch_size, micro_batch, dist.world())
    settings = {
        **ds,
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulate,
        # DeepSpeed reports no gradient norm at stage 0, so there the optimizer clips before its step (below).
        "gradient_clipping": clip_grad if stage(ds) else 0.0,
        "steps_per_print": 2**60,
    }
    if bf16(ds):  # without it DeepSpeed applies an update that is not finite, at stage 2
        settings["bf16"] = {**ds["bf16"], "check_grad_overflow": True}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the name of the op that it built
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    groups = param_groups(module, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
    partition = (
        deepspeed.zero.Init(config_dict_or_path=settings)._convert_to_zero_parameters if stage(ds) == 3 else None
    )
    materialise(module, initial, torch.bfloat16 if bf16(ds) else torch.float32, dist.device(), partition)
    parameters = dict(module.named_parameters())
    for group in groups:
        group["params"] = [parameters[name] for name in group["names"]]
    optimizer = adamw(groups, betas, eps, stage=stage(ds), offloaded=offloaded(ds), fused=fused)
    if stage(ds) == 0:
        _clip_or_skip(optimizer, clip_grad)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    if stage(ds) == 0 and dist.world() == 1:
        engine.enable_backward_allreduce = False  # nothing to reduce, and it would copy every gradient twice
    if average is not None:
        ema.keep(engine, average)
    return engine


def materialise(
    module: nn.Module,
    initial: Callable[[str, torch.Size], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    partition: Callable[[list[nn.Parameter]], None] | None = None,
) -> None:
    """Give every meta parameter its first value, one at a time, and partition it at once where asked."""
    for prefix, owner in module.named_modules():
        for name, meta in list(owner.named_parameters(recurse=False)):
            value = initial(f"{prefix}.{name}" if prefix else name, meta.shape)
            parameter = nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=meta.requires_grad)
            setattr(owner, name, parameter)
            if partition is not None:
                partition([parameter])
        for name, buffer in owner.named_buffers(recurse=False):
            assert not buffer.is_meta, f"the buffer {prefix}.{name} has no value"


def was_applied(engine: Any) -> bool | Tensor:
    """Whether the last step updated the weights; a tensor on the device at stage 0, where nobody has waited for it."""
    return (
        engine.was_step_applied() if engine.zero_optimization_stage() else engine.optimizer._global_grad_norm.isfinite()
    )


def _clip_or_skip(optimizer: torch.optim.Optimizer, bound: float) -> None:
    """Make an optimizer clip the whole gradient to the bound before its step, and skip a step that is not finite.

    Weights, moments and the count of updates stay as they are then. The norm is left where DeepSpeed's engine looks for
    it. torch's fused AdamW decides on the device; for others the host waits.
    """
    update = optimizer.step

    def step(closure: None = None) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]
        if bound > 0:
            torch._foreach_mul_(gradients, (bound / (norm + 1e-6)).clamp(max=1.0))
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            update()
        elif norm.isfinite():
            update()

    optimizer.step = step  # type: ignore[method-assign, assignment]
