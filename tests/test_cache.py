"""Teachers that are replayed from a cache against the same teachers live: equal to the last bit.

Augmentation and drop path are on, the photographs are real, the span is no multiple of the batch, the lanes or the
epoch, and the runs go well beyond it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, kill_all, outside, run_cli, sets
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from torch import Tensor

from fdscale import UserError, config
from fdscale.assemble import Parts, assemble, train_stream, training_target
from fdscale.cache import DONE, STOPPED, _ahead
from fdscale.cache import cache as write_cache
from fdscale.data.shards import make
from fdscale.inputs import to_device
from fdscale.objective import feature_loss, whiten

pytestmark = pytest.mark.slow  # together they are: left out of `make quick`

SPAN = 31  # samples, of 12 in an epoch
EPOCHS = f"cache.epochs={SPAN / 12!r}"
RUN = ("schedule.steps=6", "save.every=3", "log.heldout_every=3", "data.heldout_samples=5", EPOCHS)
LONG = "cache.epochs=280"  # for caches that are stopped midway: twenty files of 1 MiB
# Sixteen tokens beside a class token, so that what is aligned is not what the teacher gives.
RESAMPLED = (
    "teacher.args={img_size: 64, patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}",
    "teacher.resample=area",
)


@pytest.fixture
def settings(shards: Path) -> Callable[..., config.Config]:
    """The config of the tiny run with more settings."""

    def made(*more: str) -> config.Config:
        return config.load("demo", [*TINY, f"data.shards={shards}", EPOCHS, *more])

    return made


@pytest.fixture(scope="session")
def cached(shards: Path, tmp_path_factory: pytest.TempPathFactory, process_group: None) -> Path:
    """A cache of SPAN samples, written in this process."""
    folder = tmp_path_factory.mktemp("cache") / "features"
    assert write_cache(config.load("demo", [*TINY, f"data.shards={shards}", EPOCHS]), str(folder)) == DONE
    return folder


def command(shards: Path, out: Path, *more: str) -> list[str]:
    """Arguments of `fdscale cache` for the tiny run."""
    return ["cache", "demo", "--out", str(out), *sets(*TINY, f"data.shards={shards}", *more)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def metrics(run: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock, of every record."""
    kept = ("step", "samples", "loss", "grad_norm", "lr", "heldout_loss", "heldout_trivial")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: record[key] for key in kept if key in record} for record in records]


def weights(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors")


def targets(parts: Parts, stop: int) -> Tensor:
    """The targets of the first samples, in the order of the run."""
    found = [whiten(training_target(parts, b, to_device(b["images"]))) for b in train_stream(parts, 0, stop)]
    return torch.cat(found)


# ----------------------------------------------------------------------------------------------------------------------
# The same run


@pytest.mark.slow
def test_replay_is_the_live_run_to_the_last_bit(
    tiny: Callable[..., list[str]], cached: Path, shards: Path, tmp_path: Path
) -> None:
    """Losses, gradients, held-out losses and weights; also half live and half replayed, on a resumed run.

    Rounded to 8 bits, the target moves the losses of six steps little.
    """
    live, replayed, mixed = tmp_path / "live", tmp_path / "replayed", tmp_path / "mixed"
    features, heldout = f"cache.features={cached}", f"data.heldout_shards={shards}"
    assert run_cli(*tiny(live, *RUN, heldout)).returncode == 0
    done = run_cli(*tiny(replayed, *RUN, heldout, features))
    assert done.returncode == 0, done.stderr
    assert "it does not run" in done.stderr
    for what in ("window attention: stage", "residual and norm: ", "whitening and loss: "):
        assert f"\n{what}" in done.stderr  # what computes
    assert metrics(live) == metrics(replayed)
    assert sum("heldout_loss" in record for record in metrics(live)) == 3
    assert len({record["loss"] for record in metrics(live) if "loss" in record}) == 6
    assert (live / "samples-0.log").read_text() == (replayed / "samples-0.log").read_text()
    seen = [line.split("\t")[1:] for line in (live / "samples-0.log").read_text().splitlines()]
    assert seen[SPAN:] == seen[: 48 - SPAN]

    assert run_cli(*tiny(mixed, *RUN, heldout, options=("--steps", "3"))).returncode == 0
    assert run_cli(*tiny(mixed, *RUN, heldout, features)).returncode == 0
    rounded = tmp_path / "rounded"
    assert run_cli(*tiny(rounded, *RUN, heldout, "cache.dtype=float8")).returncode == 0
    for one, other in zip(metrics(live), metrics(rounded), strict=True):
        for key in {"loss", "heldout_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-3)
    assert metrics(rounded) != metrics(live)

    a, b, c = (weights(run, 6) for run in (live, replayed, mixed))
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)


@pytest.mark.slow
def test_replay_is_elastic(tiny: Callable[..., list[str]], cached: Path, tmp_path: Path) -> None:
    """Two ranks, other micro-batches, accumulation and no workers; without held-out set the teacher is let go of."""
    whole, two = tmp_path / "whole", tmp_path / "two"
    features = f"cache.features={cached}"
    assert run_cli(*tiny(whole, *RUN, features)).returncode == 0
    done = run_cli(*tiny(two, *RUN, features, "memory.micro_batch=2", "data.workers=0"), ranks=2)
    assert done.returncode == 0, done.stderr
    lines = [line for rank in (0, 1) for line in (two / f"samples-{rank}.log").read_text().splitlines()]
    assert sorted(lines, key=lambda line: int(line.split("\t")[0])) == (
        (whole / "samples-0.log").read_text().splitlines()
    )
    for one, other in zip(metrics(whole), metrics(two), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("more", [(), RESAMPLED], ids=["as-given", "resampled"])
@pytest.mark.parametrize("dtype", ["same", "bfloat16", "int8", "float8"])
def test_targets_are_those_of_the_live_teacher(
    settings: Callable[..., config.Config], tmp_path: Path, process_group: None, dtype: str, more: Sequence[str]
) -> None:
    """Bit for bit in every dtype, since the live teacher is rounded likewise; and near the unrounded ones.

    The bounds on the target's relative error are twice what was measured, those on the loss three to five times.
    """
    kept = settings(f"cache.dtype={dtype}", *more)
    assert write_cache(kept, str(tmp_path / "features")) == DONE
    replayed = assemble(settings(f"cache.dtype={dtype}", f"cache.features={tmp_path / 'features'}", *more), 1)
    stop = 2 * SPAN
    target = targets(replayed, stop)
    assert target.shape[1:] == (64, 24)
    assert torch.equal(target, targets(assemble(kept, 1), stop))
    exact = targets(assemble(settings(*more), 1), stop)
    error = ((target - exact).norm() / exact.norm()).item()
    assert error <= {"same": 0.0, "bfloat16": 3e-3, "int8": 1.2e-2, "float8": 4.4e-2}[dtype]
    guess = exact.roll(1, 0)  # of other images: as wrong as an untrained student
    loss, true_loss = feature_loss(guess, target).item(), feature_loss(guess, exact).item()
    assert loss == pytest.approx(true_loss, rel={"same": 0, "bfloat16": 2e-5, "int8": 1e-4, "float8": 5e-4}[dtype])


def test_without_epochs_the_section_does_nothing(shards: Path) -> None:
    plain = config.load("demo", [*TINY, f"data.shards={shards}"])
    assert not [key for key in config.trajectory(plain) if key.startswith("cache.")]
    assert assemble(plain, 1).inputs.order.span is None
    named = config.load("demo", [*TINY, f"data.shards={shards}", EPOCHS, "cache.features=/somewhere"])
    assert [key for key in config.trajectory(named) if key.startswith("cache.")] == ["cache.epochs", "cache.dtype"]


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("data.seed=1", "data.seed"),
        ("data.lanes=4", "data.lanes"),
        ("data.block=3", "data.block"),
        ("data.scale=[0.5, 1.0]", "data.scale"),
        ("data.ratio=[1.0, 1.0]", "data.ratio"),
        ("data.interpolation=bicubic", "data.interpolation"),
        ("data.flip=0.0", "data.flip"),
        ("teacher.args.depth=2", "teacher.args"),
        ("teacher.args.embed_dim=32", "tokens and width of a sample"),
        ("teacher.mean=[0.4, 0.4, 0.4]", "teacher.mean"),
        ("teacher.dtype=bfloat16", "teacher.dtype"),
        ("teacher.image_size=64", "teacher.image_size"),
        ("cache.dtype=int8", "cache.dtype"),
        ("cache.epochs=3", "cache.epochs"),
    ],
)
def test_a_cache_of_another_run_is_refused_by_name(
    settings: Callable[..., config.Config], cached: Path, change: str, named: str
) -> None:
    more = ["teacher.std=[0.2, 0.2, 0.2]"] if "mean" in change else []
    with pytest.raises(UserError, match=rf"cache\.features: .*{named}"):
        assemble(settings(f"cache.features={cached}", change, *more), 1)


def test_another_image_size_set_or_weight_is_refused_by_name(
    settings: Callable[..., config.Config], cached: Path, tmp_path: Path
) -> None:
    size = ("data.image_size=128", "teacher.args.img_size=128")
    with pytest.raises(UserError, match=r"data\.image_size is 64 there and 128 here"):
        assemble(settings(f"cache.features={cached}", *size), 1)

    (tmp_path / "photos").mkdir()
    for part in range(12):
        image = Image.fromarray(photographs.rocket()[20 * part : 20 * part + 150, :150])
        image.save(tmp_path / "photos" / f"{part}.jpg")
    make(tmp_path / "photos", tmp_path / "shards", samples_per_shard=4)
    with pytest.raises(UserError, match=r"content of data\.shards"):
        assemble(settings(f"cache.features={cached}", f"data.shards={tmp_path / 'shards'}"), 1)

    network = assemble(settings(), 1).teachers[""].network
    with torch.no_grad():
        network.get_parameter("patch_embed.proj.weight").mul_(1.01)
    torch.save(network.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"content of teacher\.weights"):
        assemble(settings(f"cache.features={cached}", f"teacher.weights={tmp_path / 'other.pth'}"), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["cache.epochs=0.5"], "is 6 samples, less than a batch of 8"),
        (["cache.epochs=null", "cache.features=/x"], "need cache.epochs"),
        (["cache.epochs=null", "cache.dtype=int8"], "need cache.epochs"),
        (["cache.features=/nowhere"], "/nowhere holds no feature cache"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    settings: Callable[..., config.Config], changes: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        assemble(settings(*changes), 1)


def test_what_cannot_be_written_is_refused_at_once_and_leaves_nothing(
    settings: Callable[..., config.Config], tmp_path: Path, process_group: None
) -> None:
    with pytest.raises(UserError, match=r"take 7\.4\d* TB, and .* are free there"):
        write_cache(settings("cache.epochs=1e8"), str(tmp_path / "features"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"cache\.epochs is not set"):
        write_cache(settings("cache.epochs=null"), str(tmp_path / "features"))
    weights = tmp_path / "broken.pth"
    network = assemble(settings(), 1).teachers[""].network
    network.get_parameter("norm.bias").data[3] = float("nan")
    torch.save(network.state_dict(), weights)
    with pytest.raises(UserError, match=r"shard-\d+\.tar: sample '.*': the teacher's features are not finite"):
        write_cache(settings(f"teacher.weights={weights}"), str(tmp_path / "features"))
    assert sorted(contents(tmp_path / "features")) == ["cache.json"]


# ----------------------------------------------------------------------------------------------------------------------
# Killed, stopped, damaged


@pytest.mark.slow
def test_killed_writers_are_gone_on_with_on_another_number_of_ranks(
    shards: Path, settings: Callable[..., config.Config], tmp_path: Path, process_group: None
) -> None:
    """Two ranks, killed with -9 in the middle, then stopped by a signal, then one rank: the same bytes as in one go."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = (LONG, "cache.file_mib=1", "data.workers=0")
    assert write_cache(settings(*more), str(whole)) == DONE
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*launcher, "-m", "fdscale.cli", "--", *command(shards, killed, *more)]
    process = subprocess.Popen(arguments, start_new_session=True, env=outside(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(killed.glob("features-*.json"))) >= 2, process)
    kill_all(process.pid)
    process.communicate()
    assert not (killed / "manifest.json").exists(), "the cache was whole before its writers were killed"

    process = subprocess.Popen(
        [sys.executable, "-m", "fdscale.cli", *command(shards, killed, *more)],
        env=outside(),
        stderr=subprocess.PIPE,
        text=True,
    )
    before = len(list(killed.glob("features-*.json")))
    wait_for(lambda: len(list(killed.glob("features-*.json"))) > before, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == STOPPED, stderr
    assert "stopped by SIGTERM" in stderr
    assert not (killed / "manifest.json").exists()

    done = run_cli(*command(shards, killed, *more), ranks=2)
    assert done.returncode == 0, done.stderr
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) == 22


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)


def test_the_first_micro_batch_is_asked_for_in_the_callers_thread() -> None:
    """It starts the data workers, which must not be children of a pool's thread: they would end with status 1."""
    made = (threading.get_ident() for _ in range(5))
    here, *others = _ahead(made)
    assert here == threading.get_ident()
    assert len(others) == 4
    assert threading.get_ident() not in others
    assert list(_ahead(item for item in ())) == []


def test_damage_is_named_and_repaired(
    settings: Callable[..., config.Config], tmp_path: Path, process_group: None, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "features"
    more = ("cache.epochs=30", "cache.file_mib=1", "data.workers=0")
    assert write_cache(settings(*more), str(folder)) == DONE
    whole = contents(folder)
    damaged = folder / "features-00000001.bin"
    content = bytearray(whole[damaged.name])
    content[len(content) // 2] ^= 16
    damaged.write_bytes(content)
    parts = assemble(settings(*more, f"cache.features={folder}"), 1)
    with pytest.raises(UserError, match=rf"{damaged}: the record of sample number \d+ is damaged .*--repair"):
        targets(parts, 360)
    damaged.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{damaged}: it has \d+ bytes, expected \d+"):
        assemble(settings(*more, f"cache.features={folder}"), 1)
    capfd.readouterr()
    assert write_cache(settings(*more), str(folder), repair=True) == DONE
    said = capfd.readouterr().err
    assert "file 1 is damaged" in said
    assert "file 0" not in said
    assert contents(folder) == whole
    assert write_cache(settings(*more), str(folder)) == DONE
    assert "nothing to do" in capfd.readouterr().err
