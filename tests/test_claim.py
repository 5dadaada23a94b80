"""The claim's experiment: whether it runs and goes on, its intervals against scipy, its loss against a plain loop."""

from __future__ import annotations

import gzip
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import ROOT, outside

from fdscale import UserError
from fdscale.claim import data
from fdscale.claim.contrastive import info_nce, views
from fdscale.claim.data import FILES, Part
from fdscale.claim.experiment import STARTS
from fdscale.claim.summary import STUDENT, mean, summarise, table


def test_the_loss_is_that_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    rows = [one / np.linalg.norm(one) for one in torch.cat((first, second)).numpy().astype(np.float64)]
    losses = []
    for place, one in enumerate(rows):
        shares = {other: math.exp(float(one @ rows[other]) / 0.2) for other in range(10) if other != place}
        losses.append(-math.log(shares[(place + 5) % 10] / sum(shares.values())))
    assert info_nce(first, second).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_views_are_parts_of_their_image_and_a_function_of_the_generator() -> None:
    images = torch.zeros(64, 1, 28, 28)
    images[:, :, :, 14:] = 0.5  # dark left, grey right
    seen = views(images, torch.Generator().manual_seed(0))
    assert seen.shape == images.shape
    assert torch.equal(seen, views(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(seen, views(images, torch.Generator().manual_seed(1)))
    left, right = seen[:, 0, :, 0].mean(1), seen[:, 0, :, -1].mean(1)
    both = (seen.amax((1, 2, 3)) - seen.amin((1, 2, 3))) > 0.1
    mirrored = (left > right)[both].float().mean()
    assert 0.2 < mirrored < 0.8
    assert both.float().mean() > 0.5


def test_intervals_are_students() -> None:
    assert [scipy.stats.t.ppf(0.975, n) for n in range(1, 16)] == pytest.approx(STUDENT, abs=6e-4)
    values = [0.81, 0.83, 0.79, 0.82]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(values), scipy.stats.sem(values))
    found = mean(values)
    assert (found.value - found.half, found.value + found.half) == pytest.approx((low, high), rel=1e-3)
    assert math.isnan(mean([0.5]).half)


def test_differences_are_paired_and_the_table_has_every_row() -> None:
    top1 = {name: [0.5 + 0.01 * seed for seed in range(3)] for name in STARTS}
    top1["contrastive-fd"] = [value + 0.02 for value in top1["contrastive"]]
    results = {"top1": top1, "rates": dict.fromkeys(STARTS, 1e-3), "sizes": {}, "quick": True}
    found = summarise(results)["differences"]["contrastive-fd - contrastive"]
    assert found["value"] == pytest.approx(0.02)
    assert found["half"] == pytest.approx(0, abs=1e-9)
    text = table(results)
    assert text.count("\n| ") == len(STARTS) + 4 + 1
    assert "| contrastive teacher's student - contrastive teacher | +2.00 | ± 0.00 |" in text


def write_idx(path: Path, values: np.ndarray) -> None:
    head = struct.pack(">I", 2048 + values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))


def test_data_are_read_split_and_missed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        data.fashion(tmp_path)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 28, 28)), np.arange(40) % 4
    for name in FILES:
        write_idx(tmp_path / name, images if "images" in name else labels)
    train, test = data.fashion(tmp_path)
    assert np.array_equal(train.images, images)
    assert np.array_equal(test.labels, labels)
    labelled, chosen_by, rest = data.split(train, 12, seed=0)
    assert [len(part.labels) for part in (labelled, chosen_by, rest)] == [12, 12, 16]
    assert np.bincount(labelled.labels).tolist() == np.bincount(chosen_by.labels).tolist() == [3, 3, 3, 3]
    everything = np.concatenate([part.images for part in (labelled, chosen_by, rest)])
    assert len(np.unique(everything.reshape(40, -1), axis=0)) == 40
    with pytest.raises(UserError, match="class 0 has 10"):
        data.split(train, 24, seed=0)
    (tmp_path / FILES[0]).write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        data.fashion(tmp_path)
    small, _ = data.digits()
    assert isinstance(small, Part)
    assert small.images.shape[1:] == (28, 28)


@pytest.mark.long
@pytest.mark.slow
def test_it_runs_from_end_to_end_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fdscale.claim", "--quick", "--out", str(tmp_path / "out")]
    environment = {**outside(), "PYTHONPATH": str(ROOT)}
    how = {"capture_output": True, "text": True, "env": environment, "check": False, "cwd": tmp_path}
    done = subprocess.run(command, timeout=900, **how)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/claim.json").read_text())
    assert set(results["top1"]) == set(results["starts"]) == set(STARTS)
    assert all(len(values) == 2 and all(0 <= value <= 1 for value in values) for values in results["top1"].values())
    assert (tmp_path / "out/claim.png").stat().st_size > 10_000
    assert (tmp_path / "out/claim.md").read_text() in done.stdout
    (tmp_path / "out/runs/test-random-0.003-1/done").unlink()
    again = subprocess.run(command, timeout=300, **how)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("$ fdscale") == 1
    assert json.loads((tmp_path / "out/claim.json").read_text())["top1"] == results["top1"]
    (tmp_path / "out/sizes.json").write_text("{}")
    other = subprocess.run(command, timeout=300, **how)
    assert other.returncode == 2
    assert "holds the experiment in other sizes" in other.stderr
