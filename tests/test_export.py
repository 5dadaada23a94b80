"""Export of checkpoints that several ranks wrote: every value against its closed form, and memory against the model."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import torch
from helpers import outside
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fdscale import UserError
from fdscale.export import INDEX, export, main
from fdscale.models import convert

VIT = (
    "student.model=vit",
    "student.args={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2, position: per_block}",
)
MODELS = {"swin_v2": (), "vit": VIT}


def wanted(of: object, names: str, key: str = "fp32") -> dict[str, torch.Tensor]:
    """What a model that was filled by hand exports."""
    student = checkpoints.student(of).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            flat = checkpoints.value(f"backbone.{name}", key, 0, parameter.numel())
            parameter.copy_(flat.view(parameter.shape))
    return convert.export(student, names)


def data_of(path: Path) -> bytes:
    """The tensors of a safetensors file, behind its header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_every_name_and_value_as_the_model_itself_exports(tmp_path: Path, kind: str) -> None:
    of = checkpoints.settings(*MODELS[kind])
    found = checkpoints.make(tmp_path / "run" / "checkpoints" / "step-00000007", of)
    for names in ("fdscale", "official", "timm"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = {name: tensor.to(dtype).contiguous() for name, tensor in wanted(of, names).items()}
            one, several = tmp_path / f"{names}-{dtype}.safetensors", tmp_path / f"{names}-{dtype}.d"
            step, count = export(found, one, names, dtype)
            assert (step, count) == (7, sum(tensor.numel() for tensor in expected.values()))
            export(found, several, names, dtype, shard_bytes=3000)
            reference = tmp_path / "reference.safetensors"
            save_file(expected, reference)
            assert data_of(one) == data_of(reference)  # byte for byte as the library lays them out
            assert load_file(one).keys() == expected.keys()
            read = convert.read(several)
            assert read.keys() == expected.keys()
            assert all(read[name].dtype == dtype for name in read)
            assert all(torch.equal(read[name], expected[name]) for name in read)
            index = json.loads((several / INDEX).read_text())
            assert index["metadata"]["total_size"] == len(data_of(reference))
            assert len(set(index["weight_map"].values())) > 3
            for file in several.glob("model-*-of-*.safetensors"):
                held = load_file(file)
                assert len(held) == 1 or sum(t.numel() * t.element_size() for t in held.values()) <= 3000
                assert {name for name, where in index["weight_map"].items() if where == file.name} == held.keys()
    with safe_open(one, framework="pt") as file:
        assert file.metadata()["step"] == "7"


def test_the_average_and_frozen_parameters(tmp_path: Path) -> None:
    of = checkpoints.settings()
    frozen = next(name for name, _ in checkpoints.student(of).named_parameters())
    found = checkpoints.make(tmp_path / "a", of, 2, (*checkpoints.MOMENTS, "ema"), (f"backbone.{frozen}",))
    export(found, tmp_path / "ema.safetensors", ema=True)
    export(found, tmp_path / "last.safetensors")
    average, last = load_file(tmp_path / "ema.safetensors"), load_file(tmp_path / "last.safetensors")
    assert all(torch.equal(last[name], value) for name, value in wanted(of, "fdscale").items())
    for name, value in wanted(of, "fdscale", "ema").items():
        assert torch.equal(average[name], last[name] if name == frozen else value)
    with pytest.raises(UserError, match=r"no average of the weights: the run had no optim\.ema"):
        export(checkpoints.make(tmp_path / "b", of), tmp_path / "none.safetensors", ema=True)
    assert not (tmp_path / "none.safetensors").exists()


def run(source: Path, out: Path, *, force: bool = False, dtype: str = "float32", shard_gib: float = 1e-5) -> int:
    return main(str(source), str(out), "fdscale", force, dtype, shard_gib, False)


def test_what_is_there_is_replaced_only_when_asked_and_only_weights(tmp_path: Path) -> None:
    found = checkpoints.make(tmp_path / "run" / "checkpoints" / "step-00000007", checkpoints.settings())
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    for out in (file, folder):
        assert run(tmp_path / "run", out) == 0
        with pytest.raises(UserError, match="exists; give another name, or --force"):
            run(found, out)
        assert run(found, out, force=True) == 0
    assert convert.read(folder).keys() == load_file(file).keys()
    shards = len(list(folder.iterdir()))
    assert run(found, folder, force=True, shard_gib=1.0) == 0
    assert len(list(folder.iterdir())) == 2 < shards  # nothing of the old ones is left
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds more than weights \(notes.txt\)"):
        run(found, folder, force=True)
    for out in ("weights.pth", "weights.bin"):
        with pytest.raises(UserError, match=r"ends in \.safetensors"):
            run(found, tmp_path / out)
    with pytest.raises(UserError, match="expected a size above 0"):
        run(found, tmp_path / "other", shard_gib=float("nan"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.safetensors", "run"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    found = checkpoints.make(tmp_path / "run" / "checkpoints" / "step-00000007", checkpoints.settings())
    file, folder = tmp_path / "out.safetensors", tmp_path / "out"
    assert run(found, file) == run(found, folder) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # as a full disk: a write fails half way
    try:
        for out in (file, folder, tmp_path / "new", tmp_path / "new.safetensors"):
            with pytest.raises(UserError, match="could not be written"):
                run(found, out, force=True, shard_gib=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.safetensors", "run"]


MEASURE = """
import sys
from pathlib import Path
from fdscale import export
from fdscale.models import convert, swin_v2
import torch

def peak_mib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

torch.set_num_threads(1)
before = peak_mib()
assert export.main(sys.argv[1], sys.argv[2], "timm", False, sys.argv[3], 0.05, False) == 0
assert "deepspeed" not in sys.modules and not torch.distributed.is_initialized()
print("\\n" + str(peak_mib() - before))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """49 M parameters, 187 MiB, by four ranks; the largest of them has 9 MiB."""
    sizes = "embed_dim: 96, depths: [2, 2, 18, 2], num_heads: [3, 6, 12, 24], window_size: 8"
    of = checkpoints.settings("data.image_size=256", f"student.args={{{sizes}}}", "teacher.args={}")
    found = checkpoints.make(tmp_path / "step-00000007", of, world=4)
    model = sum(p.numel() * 4 for p in checkpoints.student(of).parameters()) / 2**20
    assert model > 180
    for out, dtype in (("one.safetensors", "float32"), ("several", "bfloat16")):
        command = [sys.executable, "-c", MEASURE, str(found), str(tmp_path / out), dtype]
        done = subprocess.run(command, capture_output=True, text=True, env=outside(), timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.splitlines()[-1]) < 60, done.stdout
        assert len(convert.read(tmp_path / out)) == len(list(checkpoints.student(of).parameters()))
