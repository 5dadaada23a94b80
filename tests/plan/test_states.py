"""Parameters, gradients and optimizer state as planned, against the tensors of real DeepSpeed engines."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import told_by

from fdscale import config
from fdscale.engine.ds_config import offloaded
from fdscale.plan import memory

sys.path.insert(0, str(Path(__file__).resolve().parent))
from states import CASES, distiller

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_states_are_those_of_real_engines(ranks: int) -> None:
    found = told_by(HERE / "states.py", *CASES, ranks=ranks)
    assert [row["case"] for row in found] == list(CASES)
    sizes = {name: parameter.numel() for name, parameter in distiller().named_parameters()}
    networks = SimpleNamespace(sizes=sizes, parameters=sum(sizes.values()))
    settings = config.load("demo", [f"optim.batch_size={4 * ranks}", "memory.micro_batch=4"])
    for row in found:
        ds = CASES[row["case"]]
        setup = memory.Setup(settings, ds, ranks)
        planned = sum(memory.states(setup, networks).values())
        if offloaded(ds):  # on a CPU, host memory is where all the rest is, too
            planned += sum(memory.host_states(setup, networks).values())
        assert row["bytes"] == pytest.approx(planned, rel=0.05), row
