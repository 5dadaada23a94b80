"""What a ds_config says is what DeepSpeed does: every value of every shipped file arrives, and the rest is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fdscale import UserError
from fdscale.engine import ds_config
from fdscale.engine import initialize as init

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
# Where DeepSpeed's ZeRO optimizers keep what they were given, by the name in zero_optimization.
IN_OPTIMIZER = {
    "overlap_comm": ("overlap_comm",),
    "contiguous_gradients": ("contiguous_gradients",),
    "reduce_bucket_size": ("reduce_bucket_size",),
    "allgather_bucket_size": ("allgather_bucket_size",),
    "stage3_max_live_parameters": ("parameter_offload", "max_live_parameters"),
    "stage3_max_reuse_distance": ("parameter_offload", "max_reuse_distance"),
    "stage3_prefetch_bucket_size": ("parameter_offload", "prefetch_bucket_sz"),
    "stage3_param_persistence_threshold": ("parameter_offload", "param_persistence_threshold"),
    "offload_optimizer": ("offload_optimizer",),
    "offload_param": ("offload_param",),
}


class Net(nn.Module):
    depths = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x))).float().square().mean()

    def no_decay(self) -> set[str]:
        return {"a.bias", "b.bias"}

    def depth_of(self, name: str) -> int:
        return "ab".index(name[0])


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def held(parsed: Any, path: tuple[str, ...]) -> Any:
    """What DeepSpeed's parsed config holds for a key of the file. KeyError: it does not know the key."""
    if path == ("bf16", "enabled"):
        return parsed.bfloat16_config.enabled
    if path == ("data_types", "grad_accum_dtype"):
        return parsed.grad_accum_dtype
    if path == ("communication_data_type",):
        return parsed.communication_data_type
    assert path[0] == "zero_optimization", path
    found = parsed.zero_config
    for key in path[1:]:
        fields = type(found).model_fields
        (name,) = [name for name, field in fields.items() if key in (name, field.alias)]
        extra = fields[name].json_schema_extra or {}
        assert not extra.get("deprecated"), key
        assert name in found.model_fields_set, key
        found = getattr(found, name)
    return found


def test_every_file_is_tried() -> None:
    assert {path.stem for path in FILES} == {
        *("zero1", "zero2", "zero3", "zero3_offload", "zero3_offload_all", "zero3_hpz"),
        *("swinv2_g_40g", "swinv2_g_80g", "swinv2_g_141g"),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_holds_every_value_of_every_file(path: Path) -> None:
    text = json.loads(path.read_text())
    assert init.read_ds_config(str(path)) == text
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig({**text, "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1})
    for place, value in leaves(text):
        expected = DTYPES[value] if place == ("data_types", "grad_accum_dtype") else value
        found = held(parsed, place)
        if place == ("communication_data_type",):
            expected = DTYPES[value]
        elif isinstance(found, str):  # DeepSpeed holds a device in an enumeration of strings
            found = getattr(found, "value", found)
        assert found == (DTYPES[value] if isinstance(found, torch.dtype) else expected), place


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if "offload" in path.stem else []) for path in FILES],
    ids=lambda path: path.stem,
)
def test_engines_are_made_of_every_file(path: Path, process_group: None) -> None:
    """With offload DeepSpeed builds its CPU Adam at first use, which takes a minute or two."""
    ds = init.read_ds_config(str(path))
    zero = dict(ds["zero_optimization"])
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = 1  # there is one rank
    with torch.device("meta"):
        net = Net()
    engine = init.initialize(
        net,
        lambda name, shape: torch.full(shape, 0.1),
        {**ds, "zero_optimization": zero},
        **{"batch_size": 2, "micro_batch": 1, "lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8},
        clip_grad=1.0,
        layer_decay=1.0,
    )
    assert engine.zero_optimization_stage() == zero["stage"]
    assert engine.get_data_types() == (torch.bfloat16, torch.float32)
    assert engine.communication_data_type == torch.float32
    for key, value in zero.items():
        if key not in IN_OPTIMIZER:
            assert key in ("stage", "zero_hpz_partition_size")
            continue
        found = engine.optimizer
        for name in IN_OPTIMIZER[key]:
            found = getattr(found, name)
        if isinstance(value, dict):
            assert found, key
            assert getattr(engine.optimizer, f"{key}_pin_memory") == value["pin_memory"]
        else:
            assert found == value, key
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 6, dtype=torch.bfloat16)))
        engine.step()
    assert init.was_applied(engine)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({"stage": 3, "zero_quantized_weights": True}, ["zero_quantized_weights is not supported", "8 bits"]),
        ({"stage": 3, "zero_quantized_gradients": True}, ["zero_quantized_gradients is not supported", "fp16"]),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, ["none or cpu", "36 GB"]),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, ["offload_optimizer.ratio may not stand"]),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, ["super_offload may not stand"]),
        ({"stage": 3, "offload_param": {"device": "cpu", "max_in_cpu": 9}}, ["offload_param.max_in_cpu may not"]),
        ({"stage": 3, "zero_hpz_partition_size": 8, "offload_param": {"device": "cpu"}}, ["choose one"]),
        ({"stage": 2, "zero_hpz_partition_size": 8}, ["zero_hpz_partition_size does nothing at stage 2"]),
        ({"stage": 2, "stage3_max_live_parameters": 9}, ["stage3_max_live_parameters does nothing at stage 2"]),
        ({"stage": 3, "allgather_bucket_size": 9}, ["allgather_bucket_size does nothing at stage 3"]),
        ({"stage": 1, "overlap_comm": True}, ["overlap_comm does nothing at stage 1 in bf16"]),
        ({"stage": 1, "reduce_bucket_size": 9}, ["reduce_bucket_size does nothing at stage 1 in bf16"]),
        ({"stage": 2, "cpu_offload": True}, ["cpu_offload is not supported", "offload_optimizer"]),
        ({"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, ["DeepSpeed's own checkpoints"]),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, ["zenflow is not supported"]),
        ({"stage": 3, "compute_grad_norm": False}, ["compute_grad_norm must be on"]),
        ({"stage": 2, "elastic_checkpoint": True}, ["elastic_checkpoint is not supported"]),
    ],
)
def test_what_would_do_nothing_or_harm_is_refused(tmp_path: Path, zero: dict, expected: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero, **BF16}))
    with pytest.raises(UserError) as caught:
        ds_config.read(str(path))
    for part in ["ds.json", *expected]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"aio": {"block_size": 1}}, "aio is about NVMe, which is not supported"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow is always on"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states may not stand here"),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "immediate_grad_update is read at stage 1 alone"),
        ({"zero_optimization": {"stage": 0, "overlap_comm": True}, "bf16": {}}, "does nothing at stage 0"),
    ],
)
def test_other_sections_are_read_as_strictly(tmp_path: Path, content: dict, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, **BF16, **content}))
    with pytest.raises(UserError, match=expected.replace(".", r"\.")):
        ds_config.read(str(path))


def test_the_gpus_of_a_node_divide_the_ranks() -> None:
    ds = ds_config.read(str(ROOT / "ds_configs" / "zero3_hpz.json"))
    for world in (8, 16, 64):
        ds_config.check_world(ds, world)
    for world in (1, 4, 12):
        with pytest.raises(UserError, match=f"zero_hpz_partition_size is 8, .* does not divide the {world} ranks"):
            ds_config.check_world(ds, world)
