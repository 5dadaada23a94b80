"""The meter: exact averages, time that is not training left out, and divergence seen when it happens."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch

from fdscale.engine.metrics import Meter, Work, peak_flops

WORK = Work(student=300, teacher=50, recomputed=100)


def engine() -> SimpleNamespace:
    """What the meter asks of DeepSpeed's engine."""
    return SimpleNamespace(
        get_global_grad_norm=lambda: 0.5,
        optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.2}]),
    )


def test_record_of_an_interval() -> None:
    meter = Meter(batch_size=32, work=WORK, peak=1000.0)
    for values in ((1.0, 2.0), (3.0, 6.0)):
        for value in values:
            meter.add(torch.tensor(value))
        meter.end_step(applied=True)
    time.sleep(0.05)
    meter.pause(0.02)
    meter.stall(0.02)
    record = meter.read(engine())
    assert record["save_stall_s"] == 0.02
    assert record["loss"] == 3.0
    assert (record["lr"], record["grad_norm"]) == (0.2, 0.5)
    assert record["step_s"] * record["images_per_s"] == pytest.approx(32)
    assert record["mfu"] == pytest.approx(record["images_per_s"] * 300 / 1000)
    assert record["mfu_teacher"] / record["mfu"] == pytest.approx(50 / 300)
    assert record["mfu_recomputed"] / record["mfu"] == pytest.approx(100 / 300)
    meter.add(torch.tensor(7.0))
    meter.end_step(applied=True)
    assert meter.read(engine())["loss"] == 7.0


def test_waiting_for_data_is_counted() -> None:
    meter = Meter(8, WORK, None)

    def slow():
        time.sleep(0.03)
        yield "batch"

    assert meter.wait(slow().__next__) == "batch"
    meter.add(torch.tensor(1.0))
    meter.end_step(applied=True)
    record = meter.read(engine())
    assert record["data_wait_s"] >= 0.03
    assert "mfu" not in record


def test_the_fate_of_each_step_is_told_once() -> None:
    meter = Meter(8, WORK, None)
    told = []
    for losses, applied, void in (((1.0, 3.0), True, False), ((math.inf, 1.0), torch.tensor(False), False)):
        for loss in losses:
            meter.add(torch.tensor(loss))
        meter.end_step(applied, void=void)
        told.append(meter.verdicts())
    assert told == [[(2.0, True, False)], [(math.inf, False, False)]]
    assert meter.verdicts(wait=True) == []
    meter.add(torch.tensor(math.nan))
    meter.end_step(False, void=True)
    meter.restart()
    assert meter.steps == 0
    assert meter.verdicts() == []


def test_no_peak_without_a_known_gpu() -> None:
    assert peak_flops(torch.float32) is None


def test_what_a_loss_is_summed_from_is_averaged_by_name() -> None:
    meter = Meter(8, WORK, None)
    for value in (1.0, 2.0, 6.0):
        meter.add(torch.tensor(3 * value), {"a": torch.tensor(value), "b": torch.tensor(2 * value)})
        meter.end_step(applied=True)
    record = meter.read(engine())
    assert (record["loss"], record["loss_a"], record["loss_b"]) == (9.0, 3.0, 6.0)
    meter.add(torch.tensor(1.0))
    meter.end_step(applied=True)
    assert "loss_a" not in meter.read(engine())
