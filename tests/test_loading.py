"""What a process holds in memory of its own while it takes in weights: never the whole of them."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from helpers import TINY
from safetensors.torch import save_file

from fdscale import assemble, config, student
from fdscale.models.swin_v2 import SwinV2
from fdscale.models.teachers import load_teacher

ARGS = {"img_size": 64, "embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "window_size": 4}
YAML = "{embed_dim: 96, depths: [2, 2, 18, 2], num_heads: [3, 6, 12, 24], window_size: 4}"
SETTINGS = (*TINY, f"student.args={YAML}", "data.image_size=64")


def own_bytes() -> int:
    """Of this process: what is not a mapped file, whose pages all processes share."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SwinV2-S at random, 196 MB in float32, in several forms."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in SwinV2(**ARGS).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    folder = tmp_path_factory.mktemp("weights")
    paths = {name: folder / name for name in ("whole.safetensors", "half.safetensors", "whole.pth")}
    save_file(weights, paths["whole.safetensors"])
    save_file({name: value.bfloat16() for name, value in weights.items()}, paths["half.safetensors"])
    torch.save({"model": weights}, paths["whole.pth"])
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("form", ["whole.safetensors", "half.safetensors", "whole.pth"])
def test_a_students_weights_are_taken_one_by_one(saved: dict[str, Path], form: str) -> None:
    settings = config.load("demo", [*SETTINGS, f"student.weights={saved[form]}"])
    backbone = student.backbone(settings)
    with torch.device("meta"):
        module = assemble.Distiller(backbone, 8)
    sizes = {name: 4 * parameter.numel() for name, parameter in module.named_parameters()}
    before = most = own_bytes()
    value = student.initial_values(settings, module)
    for number, (name, parameter) in enumerate(module.named_parameters()):
        first = value(name, parameter.shape)
        assert first.dtype == torch.float32
        if number % 20 == 0 or sizes[name] == max(sizes.values()):
            most = max(most, own_bytes())
        del first
    assert sum(sizes.values()) > 190e6
    assert most - before < 0.15 * sum(sizes.values())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["whole.safetensors", "half.safetensors", "whole.pth"])
def test_a_teacher_holds_nothing_until_it_is_placed(saved: dict[str, Path], form: str) -> None:
    before = own_bytes()
    teacher = load_teacher("fdscale:swin_v2", weights=str(saved[form]), args=ARGS, dtype="bfloat16")
    assert own_bytes() - before < 40e6
    fingerprint = teacher.fingerprint()
    teacher.to("cpu")
    held = own_bytes() - before
    assert 80e6 < held < 130e6, "matrices in 16 bits"
    assert str(saved[form]) not in Path("/proc/self/maps").read_text(), "no view into the file is left"
    types = {type(m).__name__: p.dtype for m in teacher.network.modules() for p in m.parameters(recurse=False)}
    assert types["LayerNorm"] == torch.float32
    assert types["Conv2d"] == torch.bfloat16
    assert teacher(torch.zeros(1, 3, 64, 64)).isfinite().all()
    if form != "half.safetensors":
        again = load_teacher("fdscale:swin_v2", weights=str(saved["whole.pth"]), args=ARGS)
        assert again.fingerprint() == fingerprint, "whatever the file, and whatever the precision it is held in"
    else:
        assert fingerprint != load_teacher("fdscale:swin_v2", weights=str(saved["whole.pth"]), args=ARGS).fingerprint()
