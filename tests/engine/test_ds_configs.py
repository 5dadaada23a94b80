"""Every entry of every shipped ds_config is one that DeepSpeed knows, parses as it stands, and acts on."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, told_by
from honoured import HPZ, leaves

from fdscale import UserError
from fdscale.engine import ds_config
from fdscale.engine import initialize as init

FOLDER = ROOT / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_parses_every_entry_as_it_stands(
    path: Path, process_group: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    init.prepare_environment()
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", True)
    ds = json.loads(path.read_text())
    parsed = DeepSpeedConfig({**ds, "train_batch_size": 4, "train_micro_batch_size_per_gpu": 4})
    sections = {
        "zero_optimization": parsed.zero_config.model_dump(by_alias=True, mode="json"),
        "bf16": parsed.bfloat16_config.model_dump(by_alias=True, mode="json"),
        "data_types": {"grad_accum_dtype": parsed.grad_accum_dtype},
        "communication_data_type": {torch.float32: "fp32"}[parsed.communication_data_type],
    }
    found = leaves(sections)
    assert leaves(ds).items() <= found.items()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engine_acts_on_every_entry(ranks: int) -> None:
    """On one rank with what is offloaded to the host, for which DeepSpeed builds its CPU Adam; on two without."""
    files = [path for path in FILES if ranks == 1 or "offload" not in path.stem]
    found = told_by(Path(__file__).resolve().parent / "honoured.py", *files, ranks=ranks)
    assert [result["file"] for result in found] == [path.name for path in files]
    for path, result in zip(files, found, strict=True):
        wanted = leaves(json.loads(path.read_text()))
        if HPZ in wanted:
            wanted[HPZ] = ranks
        assert result["held"] == wanted, path.name


def test_the_readme_explains_every_file_and_every_entry() -> None:
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"`(\w+\.json)`", text)) >= {path.name for path in FILES}
    keys = {key for path in FILES for key in leaves(json.loads(path.read_text()))}
    words = set(re.findall(r"`([\w.]+)(?::[^`]*)?`", text))
    unexplained = {key for key in keys if not {key, key.removeprefix("zero_optimization.")} & words}
    assert not unexplained


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (zero(3, zero_quantized_gradients=True), ["zero_quantized_gradients is not supported", "fp16"]),
        (zero(3, zero_quantized_weights=True), ["zero_quantized_weights is not supported", "zero_hpz_partition_size"]),
        (zero(3, zero_quantized_nontrainable_weights=True), ["nothing is frozen"]),
        (zero(2, cpu_offload=True), ["renamed", "offload_optimizer"]),
        (zero(3, offload_optimizer={"device": "nvme"}), ["none or cpu", '"device": "cpu"', "checkpoints"]),
        ({**zero(3), "aio": {"block_size": 1}}, ["aio is about NVMe"]),
        (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), ["offload_optimizer.ratio may not stand here"]),
        (zero(3, offload_param={"device": "cpu", "max_in_cpu": 9}), ["offload_param.max_in_cpu may not stand here"]),
        (zero(3, stage3_gather_16bit_weights_on_model_save=True), ["DeepSpeed's own checkpoints"]),
        (zero(2, elastic_checkpoint=True), ["elastic_checkpoint is not supported"]),
        (zero(2, zenflow={"topk_ratio": 0.1}), ["zenflow is not supported"]),
        (
            zero(3, zero_hpz_partition_size=2, offload_param={"device": "cpu"}),
            ["zero_hpz_partition_size", "offload_param", "choose one"],
        ),
        (zero(2, stage3_prefetch_bucket_size=1), ["stage3_prefetch_bucket_size does nothing at stage 2"]),
        (zero(2, zero_hpz_partition_size=2), ["zero_hpz_partition_size does nothing at stage 2"]),
        (zero(3, allgather_bucket_size=1), ["allgather_bucket_size does nothing at stage 3"]),
        ({**zero(1, reduce_bucket_size=1), **BF16}, ["reduce_bucket_size does nothing at stage 1 in bf16"]),
        (
            zero(0, overlap_comm=True),
            ["overlap_comm does nothing at stage 0: DeepSpeed does not read it there; r"],
        ),
        ({"zero_optimization": {"stge": 3}}, ["stge does nothing at stage 0", "zero_optimization.stage is not set"]),
        ({**BF16, **zero(2), "bf16": {"enabled": True, "check_grad_overflow": False}}, ["always on"]),
        ({**BF16, **zero(2), "bf16": {"enabled": True, "immediate_grad_update": True}}, ["at stage 1 alone"]),
        ({**BF16, **zero(2), "bf16": {"enabled": True, "bf16_optimizer_states": True}}, ["bf16.bf16_optimizer_states"]),
        ({**zero(2), "data_types": {"param_dtype": "bf16"}}, ["data_types.param_dtype", "grad_accum_dtype"]),
    ],
)
def test_what_deepspeed_would_not_do_is_refused_by_name(tmp_path: Path, content: dict, expected: list[str]) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        ds_config.read(str(path))
    for part in ["ds.json", *expected]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {**zero(1, allgather_bucket_size=1), **BF16, "bf16": {"enabled": True, "immediate_grad_update": True}},
        {**zero(1, reduce_bucket_size=1, offload_optimizer={"device": "cpu"}), **BF16},
        zero(1, reduce_bucket_size=1),
        zero(2, allgather_bucket_size=1, zero_quantized_weights=False),
        zero(3, zero_hpz_partition_size=8, prefetch_bucket_size=1),
    ],
)
def test_what_it_reads_may_stand_there(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    assert ds_config.read(str(path)) == content


def test_a_second_partition_must_suit_the_ranks() -> None:
    for world in (8, 64):
        ds_config.check_world(zero(3, zero_hpz_partition_size=8), world)
    ds_config.check_world(zero(3), 5)
    for size, world in ((8, 4), (8, 12), (0, 4)):
        with pytest.raises(UserError, match=rf"zero_hpz_partition_size is {size}.*does not divide the {world} ranks"):
            ds_config.check_world(zero(3, zero_hpz_partition_size=size), world)
