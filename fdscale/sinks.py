"""Where a run's records go: metrics.jsonl, TensorBoard, Weights & Biases, and a line for the console.

Each sink has write(record) and close().
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, TextIO

from fdscale.durable import as_json, write_atomically

LINE = (
    ("loss", "loss {:.4f}"),
    ("heldout_loss", "held-out {:.4f}"),
    ("heldout_top1", "top-1 {:.2%}"),
    ("heldout_miou", "mIoU {:.2%}"),
    ("heldout_box_ap", "box AP {:.2%}"),
    ("heldout_mask_ap", "mask AP {:.2%}"),
    ("heldout_trivial", "(constant predictor {:.4f})"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "grad norm {:.3f}"),
    ("images_per_s", "{:.1f} images/s"),
    ("data_wait_s", "data wait {:.3f} s"),
    ("mfu", "MFU {:.1%}"),
    ("mem_gib", "{:.2f} GiB"),
    ("skipped", "{:d} skipped"),
    ("lost", "{:d} replaced"),
)


def open_lines(path: Path) -> TextIO:
    """A file to add lines to; where a crash cut the last one, the next does not become part of it."""
    file = path.open("a+", buffering=1)
    if end := file.seek(0, os.SEEK_END):
        with path.open("rb") as before:
            before.seek(end - 1)
            if before.read(1) != b"\n":
                file.write("\n")
    return file


class JsonLines:
    """metrics.jsonl: one record a line; non-finite numbers become null."""

    def __init__(self, path: Path):
        self._file = open_lines(path)

    def write(self, values: dict[str, Any]) -> None:
        self._file.write(as_json(values) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Every number as a curve."""

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, values["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; a resumed run goes on in its own record there."""

    def __init__(self, project: str, directory: Path, settings: dict[str, Any]):
        import wandb

        known = directory / "wandb-id"  # directory names repeat; the id of a run must not
        if not known.exists():
            write_atomically(known, secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            dir=str(directory),
            name=directory.name,
            config=settings,
            resume="allow",
            id=known.read_text().strip(),
        )

    def write(self, values: dict[str, Any]) -> None:
        self._run.log(values, step=values["step"])

    def close(self) -> None:
        self._run.finish()


def line_of(values: dict[str, Any]) -> str:
    """A record for the console."""
    shown = [
        form.format(values[key])
        for key, form in LINE
        if values.get(key) is not None and not (key in ("skipped", "lost") and values[key] == 0)
    ]
    return f"step {values['step']}  " + "  ".join(shown)
