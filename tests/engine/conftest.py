"""What the tests of checkpoints share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import make_engine


@pytest.fixture(scope="module")
def engine(process_group: None) -> Any:
    made = make_engine()
    for _ in range(2):
        loss = made(torch.randn(4, 3, 32, 32), torch.randn(4, 64, 8), torch.arange(4))
        made.backward(loss)
        made.step()
    return made
