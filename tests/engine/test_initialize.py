"""ds_configs are read strictly, batches divide or say how, and models come into being one parameter at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fdscale import UserError
from fdscale.engine import initialize as init
from fdscale.models import backbone
from fdscale.models.layers import initial_value

ROOT = Path(__file__).resolve().parent.parent.parent
FP32 = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def written(tmp_path: Path, content: object) -> str:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_ds_configs_are_valid_and_known_to_deepspeed(path: Path) -> None:
    ds = init.read_ds_config(str(path))
    assert init.bf16(ds)
    init.prepare_environment()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = set(DeepSpeedZeroConfig.model_fields)
    known |= {field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias}
    assert set(ds["zero_optimization"]) <= known
    assert int(DeepSpeedZeroConfig(**ds["zero_optimization"]).stage) == init.stage(ds)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"train_batch_size": 8}, ["train_batch_size belongs to the recipe", "optim.batch_size"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping belongs to the recipe", "optim.clip_grad"]),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer belongs to the recipe"]),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            ["zero_optimization.reduce_bucket_size", "auto"],
        ),
        ({"zero_optimisation": {"stage": 3}}, ["unknown key zero_optimisation", "did you mean 'zero_optimization'"]),
        ({"zero_optimization": {"stage": 4}}, ["stage must be 0, 1, 2 or 3"]),
        ({"zero_optimization": 3}, ["zero_optimization must be an object, got 3"]),
        ({"bf16": True}, ["bf16 must be an object, got true"]),
        ({"fp16": None}, ["fp16 must be an object, got null"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_sise": 1}}, ["zero_optimization.reduce_bucket_sise"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "x"}}, ["reduce_bucket_size", "integer"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, ["offload_optimizer must be an object"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["device must be none or cpu"]),
        ({"fp16": {"enabled": True}}, ["fp16 is not supported", "bf16"]),
        ({"bf16": {"enabled": True}, **FP32}, ["bf16 needs ZeRO stage 1, 2 or 3"]),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, ["data_types.grad_accum_dtype", "fp32"]),
        ([1], ["JSON object"]),
        ("{", ["not readable as JSON"]),
    ],
)
def test_what_is_wrong_in_a_ds_config_is_named(tmp_path: Path, content: object, expected: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        init.read_ds_config(written(tmp_path, content))
    for part in ["ds.json", *expected]:
        assert part in str(caught.value)


def test_a_missing_ds_config_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such ds_config file"):
        init.read_ds_config("nowhere.json")


def test_batches_divide_or_say_how() -> None:
    assert init.accumulation(2048, 128, 16) == 1
    assert init.accumulation(2048, 32, 8) == 8
    with pytest.raises(UserError, match=r"not divisible .* 4 ranks; usable with 4 ranks: --set memory\.micro_batch=4"):
        init.accumulation(16, 5, 4)
    with pytest.raises(UserError, match="use fewer ranks"):
        init.accumulation(16, 1, 3)


def test_materialised_weights_do_not_depend_on_how_they_came_to_be() -> None:
    """From the meta device, one at a time, equals construction; and the seed is all that matters."""
    args = {
        "img_size": 32,
        "embed_dim": 16,
        "depths": [2],
        "num_heads": [2],
        "window_size": 4,
        "pretrained_window_sizes": [0],
    }
    torch.manual_seed(5)
    plain = backbone("swin_v2", args)
    with torch.device("meta"):
        lazy = backbone("swin_v2", args)
    seen = []

    def first(name: str, shape: torch.Size) -> torch.Tensor:
        seen.append(name)
        return initial_value(lazy, name, shape, torch.float32, 5)

    partitioned: list[int] = []
    init.materialise(lazy, first, torch.float32, torch.device("cpu"), lambda ps: partitioned.append(len(ps)))
    assert seen == [name for name, _ in plain.named_parameters()]
    assert set(partitioned) == {1}
    for (name, one), (_, other) in zip(plain.named_parameters(), lazy.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(plain.eval()(images), lazy.eval()(images))


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no C\\+\\+ compiler was found: install g\\+\\+"):
        init.prepare_environment()


def test_each_environment_keeps_its_own_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a person says where."""
    places = []
    for prefix, given in (("/one/.venv", None), ("/two/.venv", None), ("/two/.venv", "/elsewhere")):
        monkeypatch.setattr(init.sys, "prefix", prefix)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", given or "")
        if given is None:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        init.prepare_environment()
        places.append(os.environ["TORCH_EXTENSIONS_DIR"])
    assert len(set(places)) == 3
    assert places[2] == "/elsewhere"


def test_what_is_compiled_first_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("deepspeed.init_distributed", lambda **keywords: None)
    init.join_deepspeed()
    assert "DeepSpeed compiles deepspeed_shm_comm, once in this environment" in capsys.readouterr().err
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm/deepspeed_shm_comm.so").touch()  # where DeepSpeed has always put it
    init.join_deepspeed()
    assert capsys.readouterr().err == ""
