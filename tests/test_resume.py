"""Runs that are killed, stopped or cut short, against the same run left alone: equal to the last bit.

Drop path and augmentation are on in all of them; the teacher is random, the photographs are real.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import kill_all, outside, run_cli
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

STEPS = 6
SCHEDULE = ("schedule.steps=6", "save.every=3")


def ds_file(folder: Path, stage: int, bf16: bool = False) -> Path:
    """A ds_config of a ZeRO stage."""
    content: dict = {"zero_optimization": {"stage": stage}}
    if bf16:
        content |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(content))
    return path


def losses(run: Path) -> dict[int, float]:
    """Loss by step; a later line for a step replaces an earlier one, and one that is being written does not count."""
    lines = (run / "metrics.jsonl").read_text().split("\n")
    records = [json.loads(line) for line in lines[:-1]]
    return {
        record["step"]: (record["loss"], record["grad_norm"], record["lr"]) for record in records if "loss" in record
    }


def samples(run: Path, ranks: int) -> dict[int, tuple[str, str]]:
    """Shard and key by sample number, over all ranks; a number must never mean two samples."""
    seen: dict[int, tuple[str, str]] = {}
    for rank in range(ranks):
        for line in (run / f"samples-{rank}.log").read_text().splitlines():
            number, shard, key = line.split("\t")
            assert seen.setdefault(int(number), (shard, key)) == (shard, key)
    return seen


def tensors(run: Path, step: int, ranks: int) -> dict[str, torch.Tensor]:
    """Everything in the checkpoint of a step."""
    found = {}
    for rank in range(ranks):
        path = run / "checkpoints" / f"step-{step:08d}" / f"rank-{rank:05d}.safetensors"
        if path.exists():
            found |= {f"{rank}/{name}": value.clone() for name, value in load_file(path).items()}
    return found


def assert_same(one: Path, other: Path, ranks: int) -> None:
    """Bitwise equality of two finished runs."""
    assert losses(one) == losses(other)
    assert sorted(losses(one)) == list(range(1, STEPS + 1))
    assert samples(one, ranks) == samples(other, ranks)
    a, b = tensors(one, STEPS, ranks), tensors(other, STEPS, ranks)
    assert a.keys() == b.keys()
    assert a
    for name in a:
        assert torch.equal(a[name], b[name]), name


def kill_after_checkpoint(arguments: list[str], run: Path, ranks: int) -> None:
    """Start a run and kill -9 every process of it once the checkpoint of step 3 is there."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command = [*launcher, "fdscale.cli", *(["--"] if ranks > 1 else []), *arguments]
    process = subprocess.Popen(command, env=outside(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "step-00000003").is_dir():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.001)
    kill_all(process.pid)
    process.wait()
    process.stderr.close()
    assert not (run / "checkpoints" / f"step-{STEPS:08d}").exists(), "the run was over before it was killed"


@pytest.mark.parametrize(
    ("ranks", "stage", "bf16", "more"),
    [
        (1, 0, False, ()),
        pytest.param(2, 0, False, (), marks=pytest.mark.long),
        pytest.param(1, 3, False, ("memory.checkpoint=[torch, none]",), marks=pytest.mark.long),
        (2, 3, False, ("memory.checkpoint=[torch, none]", "memory.attention_chunk=[1, 0]")),
        pytest.param(2, 2, True, ("memory.checkpoint=[deepspeed]",), marks=pytest.mark.long),
    ],
    ids=[
        "1-rank-zero0",
        "2-ranks-zero0",
        "1-rank-zero3",
        "2-ranks-zero3-checkpointed-sequential",
        "2-ranks-zero2-bf16",
    ],
)
def test_killed_and_resumed_is_bitwise(
    tiny: Callable[..., list[str]], tmp_path: Path, ranks: int, stage: int, bf16: bool, more: tuple[str, ...]
) -> None:
    options = ("--ds", str(ds_file(tmp_path, stage, bf16)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_cli(*tiny(whole, *SCHEDULE, *more, options=options), ranks=ranks)
    assert done.returncode == 0, done.stderr
    arguments = tiny(killed, *SCHEDULE, *more, options=options)
    kill_after_checkpoint(arguments, killed, ranks)
    resumed = run_cli(*arguments, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stderr
    assert_same(whole, killed, ranks)


def test_stopped_early_goes_on_bitwise_and_other_ranks_agree(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """--steps does not bend the schedule; two ranks at another stage and micro-batch follow to rounding."""
    whole, parts, two = tmp_path / "whole", tmp_path / "parts", tmp_path / "two"
    assert run_cli(*tiny(whole, *SCHEDULE)).returncode == 0
    assert run_cli(*tiny(parts, *SCHEDULE, options=("--steps", "2"))).returncode == 0
    assert max(losses(parts)) == 2
    assert run_cli(*tiny(parts, *SCHEDULE)).returncode == 0
    assert_same(whole, parts, ranks=1)

    elastic = tiny(two, *SCHEDULE, "memory.micro_batch=2", options=("--ds", str(ds_file(tmp_path, 3))))
    assert run_cli(*elastic, ranks=2).returncode == 0
    assert samples(two, 2) == samples(whole, 1)
    for step, (loss, norm, lr) in losses(whole).items():
        assert losses(two)[step] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3), lr)


def test_resumed_at_other_worlds_the_samples_are_the_same(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """One rank, then two at another stage, micro-batch and number of workers, then one again, against a single run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_cli(*tiny(whole, *SCHEDULE)).returncode == 0
    assert run_cli(*tiny(parts, *SCHEDULE, "data.workers=0", options=("--steps", "2"))).returncode == 0
    other = ("memory.micro_batch=2", "data.workers=2")
    two = run_cli(*tiny(parts, *SCHEDULE, *other, options=("--steps", "4", "--ds", str(ds_file(tmp_path, 3)))), ranks=2)
    assert two.returncode == 0, two.stderr
    assert run_cli(*tiny(parts, *SCHEDULE, "memory.micro_batch=8")).returncode == 0
    assert samples(parts, 2) == samples(whole, 1)
    lines = [line for rank in range(2) for line in (parts / f"samples-{rank}.log").read_text().splitlines()]
    assert len(lines) == 8 * STEPS  # none twice
    for step, (loss, norm, lr) in losses(whole).items():
        assert losses(parts)[step] == (pytest.approx(loss, rel=1e-4), pytest.approx(norm, rel=1e-3), lr)


def test_sigterm_saves_and_the_same_command_goes_on(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_cli(*tiny(whole, *SCHEDULE)).returncode == 0
    arguments = tiny(stopped, "schedule.steps=6", "save.every=1000")
    process = subprocess.Popen(
        [sys.executable, "-m", "fdscale.cli", *arguments],
        env=outside(),
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = stopped / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "stopped by SIGTERM" in stderr
    assert run_cli(*arguments).returncode == 0
    assert_same(whole, stopped, ranks=1)


def test_a_damaged_checkpoint_is_skipped_and_named(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    arguments = tiny(whole, *SCHEDULE)
    assert run_cli(*arguments).returncode == 0
    before = (losses(whole), tensors(whole, STEPS, 1))
    damaged = whole / "checkpoints" / f"step-{STEPS:08d}" / "rank-00000.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    again = run_cli(*arguments)
    assert again.returncode == 0, again.stderr
    assert "does not match its hash" in again.stderr
    assert "resumed from" in again.stderr
    assert "step 3" in again.stderr
    assert losses(whole) == before[0]
    after = tensors(whole, STEPS, 1)
    assert all(torch.equal(before[1][name], after[name]) for name in before[1])
