"""What a training step is measured by: loss, speed, waiting for data, memory, model FLOP utilisation.

Losses are summed on the device; the host waits for it once per log line.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fdscale import dist
from fdscale.engine.paces import Events, Paces

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
        self._micro = 0  # micro-batches of the step under way
        self._step_loss: Tensor | None = None  # sum over the micro-batches of the step under way
        self._fates: list[tuple[Tensor, torch.cuda.Event | None, bool]] = []  # of steps
        self.paces = Paces()
        self._begin_step(time.perf_counter())
        self._reset()

    def _reset(self) -> None:
        self._loss: Tensor | None = None
        self._parts: dict[str, Tensor] = {}
        self._losses = self._steps = 0
        self._data_wait_s = self._save_stall_s = 0.0
        self._start = time.perf_counter()

    def _begin_step(self, now: float) -> None:
        self._step_start, self._step_wait_s, self._inputs_s = now, 0.0, 0.0
        self._inputs: Events = []  # the same on a GPU

    def restart(self) -> None:
        """Forget the steps of this interval, and what is known of them."""
        self._fates.clear()
        self._begin_step(time.perf_counter())
        self._reset()

    @property
    def steps(self) -> int:
        """Steps in this interval so far."""
        return self._steps

    def wait(self, take: Callable[[], Any]) -> Any:
        """The next batch, which take() returns; the time until it is there counts as waiting for data."""
        start = time.perf_counter()
        batch = take()
        waited = time.perf_counter() - start
        self._data_wait_s += waited
        self._step_wait_s += waited
        return batch

    def prepare(self, make: Callable[[Any], Any], batch: Any) -> Any:
        """What make(batch) returns: the module's inputs; its time is one of the spans of `Paces`."""
        if torch.cuda.is_available():
            ends = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            ends[0].record()
            made = make(batch)
            ends[1].record()
            self._inputs.append(ends)
            return made
        start = time.perf_counter()
        made = make(batch)
        self._inputs_s += time.perf_counter() - start
        return made

    def add(self, loss: Tensor, parts: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Account one micro-batch's loss, and by name what it was summed from, without waiting for them."""
        loss = loss.detach()
        self._parts = {name: part + self._parts[name] if self._parts else part for name, part in parts.items()}
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        self._losses += 1
        self._micro += 1

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training (evaluation, saving)."""
        self._start += seconds
        self._step_start += seconds

    def stall(self, seconds: float) -> None:
        """Account time that training waited for saves; it counts as time aside, too."""
        self._save_stall_s += seconds
        self.pause(seconds)

    def end_step(self, applied: bool | Tensor, *, void: bool = False) -> None:
        """Close a step; applied: whether the weights were updated, a tensor where only the device knows.

        void: whether it does not count, since this rank had no data for it.
        """
        assert self._step_loss is not None
        loss, self._step_loss = self._step_loss, None
        self._loss = loss if self._loss is None else self._loss + loss
        self._steps += 1
        fate = torch.stack([loss.double() / self._micro, torch.as_tensor(applied, device=loss.device).double()])
        self._micro = 0
        event = None
        if fate.is_cuda:
            fate = fate.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._fates.append((fate, event, void))
        now = time.perf_counter()
        if self._inputs:
            self.paces.add_queued(now - self._step_start, self._step_wait_s, self._inputs)
        else:
            self.paces.add(now - self._step_start, self._step_wait_s, self._inputs_s)
        self._begin_step(now)

    def verdicts(self, *, wait: bool = False) -> list[tuple[float, bool, bool]]:
        """Mean loss of each step that has not been given yet, whether it was applied, and whether it was void.

        On a GPU a step's are copied to the host behind it and given one step later; wait: all, now.
        """
        known = []
        while len(self._fates) > (0 if wait or not torch.cuda.is_available() else 1):
            fate, event, void = self._fates.pop(0)
            if event is not None:
                event.synchronize()
            loss, applied = fate.tolist()
            known.append((loss, bool(applied), void))
        return known

    def read(self, engine: Any) -> dict[str, Any]:
        """The interval's record, averaged over ranks where ranks differ, and a new interval. A collective."""
        assert self._loss is not None
        sums = dist.total(torch.stack([self._loss, *self._parts.values()])).tolist()
        loss, *parts = (value / (dist.world() * self._losses) for value in sums)
        elapsed_s = time.perf_counter() - self._start
        rate = self._batch_size * self._steps / elapsed_s
        norm = engine.get_global_grad_norm()
        record = {
            "loss": loss,
            **{f"loss_{name}": part for name, part in zip(self._parts, parts, strict=True)},
            "lr": max(group["lr"] for group in engine.optimizer.param_groups),
            "grad_norm": None if norm is None else float(norm),
            "images_per_s": rate,
            "images_per_s_per_gpu": rate / dist.world(),
            "step_s": elapsed_s / self._steps,
            "data_wait_s": self._data_wait_s / self._steps,
            "save_stall_s": self._save_stall_s,
            "mem_gib": memory_gib(),
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
