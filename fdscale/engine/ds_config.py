"""What a ds_config says, and whether it may say so: without torch and DeepSpeed, so that looking is quick.

`engine.initialize.read_ds_config` also asks DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fdscale import UserError

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = (PACKAGE / "ds_configs", PACKAGE.parent / "ds_configs")  # where it was installed; in a source tree

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
    "zero_force_ds_cpu_optimizer",
    "comms_logger",
    "wall_clock_breakdown",
    "memory_breakdown",
    "compile",
    "dump_state",
}
PRECISION_KEYS = ("data_types.grad_accum_dtype", "communication_data_type")
INSIDE = {"bf16": ("enabled", "immediate_grad_update", "check_grad_overflow"), "data_types": ("grad_accum_dtype",)}
# Keys of zero_optimization that DeepSpeed (0.19.8) reads at some stages and passes over at the others, without a word.
ONLY_STAGE_3 = {
    "sub_group_size",
    "zero_hpz_partition_size",
    "offload_param",
    "leaf_module",
    "module_granularity_threshold",
}
ONLY_STAGE_3 |= {"prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"}
ONLY_STAGE_3 |= {"max_live_parameters", "max_reuse_distance", "use_all_reduce_for_fetch_params", "allgather_sequential"}
ONLY_STAGES_1_AND_2 = {"allgather_bucket_size", "allgather_partitions", "use_multi_rank_bucket_allreduce"}
ONLY_STAGES_1_AND_2 |= {"round_robin_gradients", "ignore_unused_parameters", "parameter_alignment"}
BF16_STAGE_1 = {"stage", "allgather_bucket_size"}  # all that its BF16_Optimizer takes
NO_NVME = (
    "checkpoints are taken from optimizer state in memory, and that of 3 billion parameters, 36 GB over all ranks, "
    'fits host memory: "device": "cpu"'
)
# Keys that DeepSpeed knows and that would do harm here, and why.
REFUSED = {
    "zero_quantized_gradients": "its kernel (DeepSpeed 0.19.8, csrc/quantization, swizzle_quant) reads gradients as "
    "fp16 whatever they are, so the float32 gradients that are reduced here would become noise",
    "zero_quantized_weights": "DeepSpeed (0.19.8) rounds a rank's share of a module in groups of 8 and stops where it "
    "is no multiple of 8, as with the scale per head of SwinV2; zero_hpz_partition_size saves traffic between nodes "
    "and rounds nothing",
    "zero_quantized_nontrainable_weights": "nothing is frozen in what is trained: the teacher is not part of it",
    "cpu_offload": 'DeepSpeed has renamed it: "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'DeepSpeed has renamed it: "offload_param": {"device": "cpu"}',
    "cpu_offload_use_pin_memory": "DeepSpeed has moved it into offload_optimizer and offload_param, as pin_memory",
    "load_from_fp32_weights": "it is about DeepSpeed's own checkpoints, which are not used here",
    "elastic_checkpoint": "it is about DeepSpeed's own checkpoints, which are not used here",
    "gather_16bit_weights_on_model_save": "it is about DeepSpeed's own checkpoints, which are not used here",
    "gather_fp16_weights_on_model_save": "it is about DeepSpeed's own checkpoints, which are not used here",
    "pipeline_loading_checkpoint": "it is about DeepSpeed's own checkpoints, which are not used here",
    "save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "zenflow": "it updates weights with gradients of other steps, and its state is not in the checkpoints",
    "legacy_stage1": "DeepSpeed has removed it",
}
# What may stand in offload_optimizer and offload_param: the other keys are about NVMe, or make optimizers whose state
# the checkpoints do not know.
OFFLOAD = ("device", "pin_memory")


def find(path: str) -> Path:
    """The file of a ds_config; ds_configs/NAME.json, or NAME alone, may be one that came with fdscale.

    Raises UserError where there is none.
    """
    if Path(path).is_file():
        return Path(path)
    name = Path(path).name.removesuffix(".json")
    shipped = next((folder for folder in SHIPPED if folder.is_dir()), SHIPPED[0]) / f"{name}.json"
    if path in (name, f"ds_configs/{name}.json") and shipped.is_file():
        return shipped
    known = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.json")))
    raise UserError(f"{path}: no such ds_config file; those that come with fdscale: {known}")


def read(path: str | None) -> dict[str, Any]:
    """Read and check a ds_config, see `find`; None: ZeRO 0 in float32.

    Raises UserError for a key that the recipe owns, "auto" (which DeepSpeed drops silently outside Hugging Face),
    unknown keys, stages and offloads that do not exist, and precisions that DeepSpeed cannot train well.
    """
    if path is None:
        return {"zero_optimization": {"stage": 0}}
    file = find(path)
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
        if key == "aio":
            raise UserError(f"{path}: aio is about NVMe, which is not supported; {NO_NVME}")
        if key not in ALLOWED:
            close = difflib.get_close_matches(key, ALLOWED, n=1)
            raise UserError(
                f"{path}: unknown key {key}{f' (did you mean {close[0]!r}?)' if close else ''}; ds_configs/README.md "
                "lists what may stand here"
            )
    for key in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(ds.get(key, {}), dict):
            raise UserError(f"{path}: {key} must be an object, got {json.dumps(ds[key])}")
    for section, known in INSIDE.items():
        for key in ds.get(section, {}):
            if key not in known:
                raise UserError(f"{path}: {section}.{key} may not stand here; known: {', '.join(known)}")
    _check_precision(ds, path)
    _check_zero(ds.get("zero_optimization", {}), path)
    _check_read(ds, path)
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
            raise UserError(
                f"{path}: zero_optimization.{key}.device must be none or cpu; others are not supported: {NO_NVME}"
            )
        for inner in part:
            if inner not in OFFLOAD:
                raise UserError(
                    f"{path}: zero_optimization.{key}.{inner} may not stand here; known: {', '.join(OFFLOAD)}"
                )
    for key, value in zero.items():
        why = REFUSED.get(key.removeprefix("stage3_"))
        if value and why:
            raise UserError(f"{path}: zero_optimization.{key} is not supported: {why}")
    if zero.get("compute_grad_norm") is False:
        raise UserError(f"{path}: zero_optimization.compute_grad_norm must be on: clipping and the log need the norm")
    if zero.get("zero_hpz_partition_size", 1) != 1 and zero.get("offload_param", {}).get("device", "none") != "none":
        raise UserError(
            f"{path}: zero_optimization.zero_hpz_partition_size keeps a second copy of the weights on the GPUs, and "
            "offload_param takes the first one off them: choose one"
        )


def _check_read(ds: dict[str, Any], path: str) -> None:
    """Refuse what DeepSpeed would not read at this stage, so that a file says nothing that does not happen."""
    of_stage_1 = stage(ds) == 1 and bf16(ds) and not offloaded(ds)
    for key in ds.get("zero_optimization", {}):
        name = key.removeprefix("stage3_")
        unread = {
            0: key != "stage",
            1: name in ONLY_STAGE_3 or (of_stage_1 and key not in BF16_STAGE_1),
            2: name in ONLY_STAGE_3,
            3: name in ONLY_STAGES_1_AND_2,
        }[stage(ds)]
        if unread and name in REFUSED:  # switched off, which it is anyway
            continue
        if unread:
            precision = " in bf16" if of_stage_1 else ""
            unset = "" if "stage" in ds["zero_optimization"] else ", and zero_optimization.stage is not set"
            raise UserError(
                f"{path}: zero_optimization.{key} does nothing at stage {stage(ds)}{precision}: DeepSpeed does not "
                f"read it there{unset}; remove it{', or set the stage' if unset else ''}"
            )
    if ds.get("bf16", {}).get("check_grad_overflow") is False:
        raise UserError(f"{path}: bf16.check_grad_overflow is always on here: an update that is not finite is skipped")
    if "immediate_grad_update" in ds.get("bf16", {}) and not of_stage_1:
        raise UserError(f"{path}: bf16.immediate_grad_update is read at stage 1 alone; remove it")


def check_world(ds: dict[str, Any], world: int) -> None:
    """Raise UserError where a ds_config does not suit a number of ranks."""
    size = ds.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if size < 1 or world % size:
        raise UserError(
            f"zero_optimization.zero_hpz_partition_size is {size}, the GPUs of a node that hold the weights together, "
            f"and does not divide the {world} ranks; write the GPUs per node, or take a ds_config without it"
        )


def check_checkpointing(ds: dict[str, Any], kinds: Iterable[str]) -> None:
    """Raise UserError where a ds_config does not suit `memory.checkpoint`.

    torch's selective checkpointing counts the ops of both runs of a block, and stage 3 gathers weights by other ops in
    the second.
    """
    if stage(ds) == 3 and "selective" in kinds:
        raise UserError(
            "memory.checkpoint is selective, which does not go with ZeRO 3: its gathering of weights differs between "
            "the two runs of a block; take torch, or a ds_config of stage 0, 1 or 2"
        )


def check_linear(ds: dict[str, Any], linear: str) -> None:
    """Raise UserError where a ds_config does not suit `student.linear`."""
    if linear == "fp8" and not bf16(ds):
        raise UserError(
            "student.linear=fp8 needs a ds_config with bf16 enabled: its products give bfloat16; see ds_configs/"
        )


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
