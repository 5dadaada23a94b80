"""Payloads in every file that a start reads: none runs, and each is refused in one line, or walked past."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase

import pytest
import torch

from faults.starts import STEPS, Starts
from fdscale.engine import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.faults]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return exec, (f"open({str(self.mark)!r}, 'w')",)


def refused(starts: Starts, run: Path, *, more: tuple[str, ...] = (), options: tuple[str, ...] = ()) -> str:
    """The one line that a start is refused with."""
    before = starts.output(run).read_text() if starts.output(run).exists() else ""
    assert starts.run(run, more=more, options=options) == [2], starts.output(run).read_text()
    said = starts.output(run).read_text().removeprefix(before)
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("fdscale: ")]
    assert len(lines) == 1, said
    return lines[0]


def test_a_poisoned_checkpoint_is_walked_past_and_refused(starts: Starts, tmp_path: Path) -> None:
    mark, run = tmp_path / "mark", starts.new()
    shutil.copytree(starts.whole(), run)
    for name, step in (("rank-00000.safetensors", STEPS), ("state.json", STEPS - 2)):
        torch.save({"x": Payload(mark)}, run / "checkpoints" / checkpoint.name_of(step) / name)
    for beside in ("latest", "extra.pt", "step-00000002/optimizer.pt"):
        torch.save(Payload(mark), run / "checkpoints" / beside)
    poisoned = run / "checkpoints" / checkpoint.name_of(STEPS)
    assert "rank-00000.safetensors" in refused(starts, starts.new(), options=("--resume", str(poisoned)))
    assert starts.run(run, more=("save.keep=9",)) == [0], starts.output(run).read_text()
    starts.same(run)
    said = starts.output(run).read_text()
    assert "skipped" in said
    assert not mark.exists()


def test_poisoned_weights_recipes_and_ds_configs_are_refused(starts: Starts, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    weights = tmp_path / "weights.pth"
    torch.save({"model": Payload(mark)}, weights)
    for key in ("student.weights", "teacher.weights"):
        assert str(weights) in refused(starts, starts.new(), more=(f"{key}={weights}",))
    shutil.copy(weights, tmp_path / "weights.safetensors")
    assert "weights.safetensors" in refused(
        starts, starts.new(), more=(f"student.weights={tmp_path / 'weights.safetensors'}",)
    )
    cache = tmp_path / "cache"
    cache.mkdir()
    torch.save(Payload(mark), cache / "cache.json")
    assert str(cache) in refused(starts, starts.new(), more=("cache.epochs=1", f"cache.features={cache}"))
    run = starts.new()
    recipe = tmp_path / "config.yaml"
    texts = {
        "tag": f"student: !!python/object/apply:builtins.open [{json.dumps(str(mark))}, w]\n",
        "nested": "[" * 20_000,
        "laughs": "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(ascii_lowercase[:22])),
        "odd key": "? [a]\n: b\n",
        "date": "a: 2001-99-99\n",
        "pickle": None,
    }
    for text in texts.values():
        if text is None:
            torch.save(Payload(mark), recipe)
        else:
            recipe.write_text(text)
        code = starts.zygote.run(["distill", recipe, "--run", run], starts.output(run))
        assert code == 2, starts.output(run).read_text()
    said = starts.output(run).read_text()
    assert said.count(f"fdscale: {recipe}: not readable as YAML") == len(texts), said
    assert not mark.exists()
