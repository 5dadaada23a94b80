"""From a module on the meta device and a ds_config to a running DeepSpeed engine.

Models are never built under `deepspeed.zero.Init`: it makes timm-style initialisation a silent no-op and rounds
buffers. Instead every parameter's first value is a function of its name (`models.layers.initial_value`, or a file), and
parameters come into being one at a time, cast to the engine's precision and, at ZeRO-3, partitioned at once: host
memory holds one full parameter, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fdscale import UserError, dist
from fdscale.engine import ds_config, ema
from fdscale.engine.ds_config import accumulation, bf16, offloaded, stage
from fdscale.engine.optim import adamw, param_groups


def read_ds_config(path: str | None) -> dict[str, Any]:
    """`ds_config.read`, and DeepSpeed's own complaints about the section on ZeRO, in one line."""
    ds = ds_config.read(path)
    prepare_environment()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**ds.get("zero_optimization", {}))
    except ValueError as error:  # pydantic's
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        raise UserError(f"{path}: zero_optimization.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return ds


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
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_builds()))
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    for noisy in (
        "torch.distributed",
        "torch.utils.cpp_extension",
    ):  # "No CUDA runtime is found" on every CPU machine with nvcc
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # DeepSpeed calls collectives under names that torch is about to change; at ZeRO-3 that is two lines a step.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)


def _builds() -> Path:
    """Where this environment keeps the ops it compiles.

    torch has one place for all environments. But the ops name their headers by path: each start from another one would
    compile anew and undo what the other has, for a minute each, with everybody else waiting at the lock.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    environment = f"{sys.prefix} {sys.version} {torch.__version__}"
    return cache / "torch_extensions" / f"fdscale-{zlib.crc32(environment.encode()):08x}"


def _tell_of_build(op: str) -> None:
    """Say so where DeepSpeed is about to compile an op: that takes a while and prints nothing."""
    library = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / op / f"{op}.so"
    if dist.rank() == 0 and not library.exists():
        print(f"DeepSpeed compiles {op}, once in this environment, which takes a minute or so", file=sys.stderr)


def build_ops(ds: dict[str, Any]) -> list[str]:
    """Compile now, unless it is there, what DeepSpeed would at first use under this ds_config; what that was."""
    prepare_environment(offloaded(ds))
    from deepspeed.accelerator import get_accelerator

    names = [] if torch.cuda.is_available() else ["ShareMemCommBuilder"]
    names += ["CPUAdamBuilder"] if offloaded(ds) else []
    for name in names:
        get_accelerator().create_op_builder(name).load(verbose=False)
    return [name.removesuffix("Builder") for name in names]


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
    ds_config.check_world(ds, dist.world())
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
    join_deepspeed()
    groups = param_groups(module, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
    partition = (
        deepspeed.zero.Init(config_dict_or_path=settings)._convert_to_zero_parameters if stage(ds) == 3 else None
    )
    materialise(module, initial, torch.bfloat16 if bf16(ds) else torch.float32, dist.device(), partition)
    parameters = dict(module.named_parameters())
    for group in groups:
        group["params"] = [parameters[name] for name in group["names"]]
    if offloaded(ds):
        _tell_of_build("cpu_adam")
    optimizer = adamw(groups, betas, eps, stage=stage(ds), offloaded=offloaded(ds), fused=fused)
    if stage(ds) == 0:
        _clip_or_skip(optimizer, clip_grad)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    if stage(ds) == 0 and dist.world() == 1:
        engine.enable_backward_allreduce = False  # nothing to reduce, and it would copy every gradient twice
    if average is not None:
        ema.keep(engine, average)
    return engine


def join_deepspeed() -> None:
    """Let DeepSpeed see the process group; its activation checkpointing wants it, too."""
    import deepspeed

    if not torch.cuda.is_available():
        _tell_of_build("deepspeed_shm_comm")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the name of the op that it built
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


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
