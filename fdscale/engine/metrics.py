"""What a training step is measured by: loss, speed, waiting for data, memory, model FLOP utilisation.

Losses are summed on the device; the host waits for it once per log line.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdscale import dist

# Dense bf16 peak of one GPU in FLOP/s, by a part of its name; vendors' data sheets, without sparsity. Longer names
# first.
PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX A6000": 155e12,
}
MAX_BAD_STEPS = 10  # skipped steps in a row after which a run is called diverged


def peak_flops(dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of this rank's GPU in this precision, or None where it is not known (then no MFU is reported)."""
    if dtype != torch.bfloat16 or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


@dataclass(frozen=True)
class Work:
    """FLOPs of training on one image; a multiply-add counts as two."""

    student: int  # forward and backward, without recomputation
    teacher: int  # forward
    recomputed: int  # what activation checkpointing does again


class Meter:
    """Collects one log interval."""

    def __init__(self, batch_size: int, work: Work, peak: float | None):
        self._batch_size, self._work, self._peak = batch_size, work, peak
        self._bad_steps = 0
        self._step_loss: Tensor | None = None  # sum over the micro-batches of the step under way
        self._poisoned = False  # whether the weights were ever updated with a non-finite loss
        self._pending: tuple[Tensor, torch.cuda.Event, bool] | None = None
        self._reset()

    def _reset(self) -> None:
        self._loss: Tensor | None = None
        self._losses = self._steps = 0
        self._data_wait_s = self._save_stall_s = 0.0
        self._start = time.perf_counter()

    @property
    def steps(self) -> int:
        """Steps in this interval so far."""
        return self._steps

    def wait(self, batches: Iterator[Any]) -> Any:
        """The next batch; the time until it is there counts as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._data_wait_s += time.perf_counter() - start
        return batch

    def add(self, loss: Tensor) -> None:
        """Account one micro-batch's loss, without waiting for it."""
        loss = loss.detach()
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        self._losses += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training (evaluation, saving)."""
        self._start += seconds

    def stall(self, seconds: float) -> None:
        """Account time that training waited for saves; it counts as time aside, too."""
        self._save_stall_s += seconds
        self.pause(seconds)

    def end_step(self, applied: bool) -> bool:
        """Close a step; whether this rank has seen the run diverge.

        A non-finite loss is fatal once the weights have been updated with it (applied); where DeepSpeed skipped the
        update, it is fatal after MAX_BAD_STEPS in a row. On a GPU the verdict is copied to the host behind the step and
        looked at one step later.
        """
        assert self._step_loss is not None
        loss, self._step_loss = self._step_loss, None
        self._loss = loss if self._loss is None else self._loss + loss
        self._steps += 1
        bad = ~torch.isfinite(loss)
        if not bad.is_cuda:
            self._judge(bad, applied)
        else:
            event = torch.cuda.Event()
            on_host = bad.to("cpu", non_blocking=True)
            event.record()
            before, self._pending = self._pending, (on_host, event, applied)
            self._judge_pending(before)
        return self._poisoned or self._bad_steps >= MAX_BAD_STEPS

    def _judge(self, bad: Tensor, applied: bool) -> None:
        self._poisoned |= bool(bad) and applied
        self._bad_steps = self._bad_steps + 1 if bool(bad) or not applied else 0

    def _judge_pending(self, pending: tuple[Tensor, torch.cuda.Event, bool] | None) -> None:
        if pending is not None:
            bad, event, applied = pending
            event.synchronize()
            self._judge(bad, applied)

    def healthy(self) -> bool:
        """Whether this rank's training state may be saved, now, as far as losses tell (waits for the device).

        Not while steps are being skipped: what follows broken weights looks like that too, at ZeRO 1 to 3.
        """
        pending, self._pending = self._pending, None
        self._judge_pending(pending)
        return not self._poisoned and self._bad_steps == 0

    def read(self, engine: Any) -> dict[str, Any]:
        """The interval's record, averaged over ranks where ranks differ, and a new interval. A collective."""
        assert self._loss is not None
        loss = float(dist.total(self._loss.clone())) / (dist.world() * self._losses)
        elapsed_s = time.perf_counter() - self._start
        rate = self._batch_size * self._steps / elapsed_s
        norm = engine.get_global_grad_norm()
        record = {
            "loss": loss,
            "lr": max(group["lr"] for group in engine.optimizer.param_groups),
            "grad_norm": None if norm is None else float(norm),
            "images_per_s": rate,
            "images_per_s_per_gpu": rate / dist.world(),
            "step_s": elapsed_s / self._steps,
            "data_wait_s": self._data_wait_s / self._steps,
            "save_stall_s": self._save_stall_s,
            "mem_gib": memory_gib(),
            "skipped": engine.skipped_steps,
        }
        if self._peak is not None:
            share = rate / (self._peak * dist.world())
            record |= {
                "mfu": self._work.student * share,
                "mfu_teacher": self._work.teacher * share,
                "mfu_recomputed": self._work.recomputed * share,
            }
        self._reset()
        return record


def memory_gib() -> float:
    """Peak memory of this rank: the GPU allocator's, or the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
