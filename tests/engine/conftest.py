"""What the tests of checkpoints share."""

from __future__ import annotations

from typing import Any

import pytest
from engines import make_engine, trained


@pytest.fixture(scope="module")
def engine(process_group: None) -> Any:
    return trained(make_engine())
