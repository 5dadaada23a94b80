"""Teachers for jobs: one that takes its time until it is let go, and one that breaks."""

from __future__ import annotations

import os
import time
from pathlib import Path

from faults.teachers import Teacher
from torch import Tensor


class Patient(Teacher):
    """Sleeps before every batch, PATIENT_S seconds, unless the file LET_GO is there."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 1 and not Path(os.environ["LET_GO"]).exists():  # a single one is a dry run
            time.sleep(float(os.environ.get("PATIENT_S", "2")))
        return super().forward(images)


class Broken(Teacher):
    """Breaks at the first batch."""

    def forward(self, images: Tensor) -> Tensor:
        assert len(images) == 1, "broken on purpose"
        return super().forward(images)
