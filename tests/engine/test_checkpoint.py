"""Checkpoints as files: committed or absent, verified, walked back, pruned, and refused by name where they do not fit.

The state comes from a real DeepSpeed engine on one rank; damage is done to the files by hand.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import IDENTITY, make_engine, trained
from safetensors.torch import load_file

from fdscale import UserError, config
from fdscale.engine import checkpoint, state
from fdscale.engine.room import open_room
from fdscale.engine.saver import Saver
from fdscale.run import Run


def save(engine: Any, folder: Path, step: int = 2, *more: str, identity: dict | None = None) -> Path:
    """As a start of its own does. more: settings."""
    run = Run(folder.parent, config.load("demo", [*more]))
    saver = Saver(engine, open_room(folder, secrets.token_hex(4)), run, identity or IDENTITY)
    try:
        saver.begin(step, 4 * step)
        assert saver.has_saved(step)
    finally:
        saver.close()
    return folder / checkpoint.name_of(step)


def test_what_is_written_is_complete_and_plain(engine: Any, tmp_path: Path) -> None:
    path = save(engine, tmp_path)
    assert (tmp_path / "latest").read_text().strip() == path.name == "step-00000002"
    assert checkpoint.verify(path) is None
    assert sorted(os.listdir(tmp_path)) == ["latest", path.name]
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}  # nothing that could be a pickle
    reader = checkpoint.Reader(path)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(reader.full(name), parameter.detach()), name
    assert not [name for name in load_file(path / "rank-00000.safetensors") if "teacher" in name]


def test_a_fresh_engine_continues_bitwise(engine: Any, tmp_path: Path) -> None:
    path = save(engine, tmp_path)
    other = make_engine(seed=9)
    assert checkpoint.load(other, path, IDENTITY) == (2, 8)
    assert state.optimizer_step(other) == 2
    before = {(part.name, key): value for part, values in state.read(engine) for key, value in values.items()}
    for part, values in state.read(other):
        for key, value in values.items():
            assert torch.equal(before[part.name, key], value), (part.name, key)


def test_ranges_can_be_read_across_files(engine: Any, tmp_path: Path) -> None:
    reader = checkpoint.Reader(save(engine, tmp_path))
    whole = reader.full("projector.weight").flatten()
    piece = reader.fetch(state.Range("projector.weight", (8, 16), 5, 40), "fp32")
    assert torch.equal(piece, whole[5:45])
    with pytest.raises(UserError, match=r"holds no fp32 for 1 of 129 elements of projector\.weight"):
        reader.fetch(state.Range("projector.weight", (8, 16), 0, 129), "fp32")


def test_newest_valid_walks_back_and_says_why(engine: Any, tmp_path: Path) -> None:
    steps = [save(engine, tmp_path, step, "save.keep=9") for step in (1, 2, 3, 4, 5)]
    weights = steps[4] / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with (steps[3] / "rank-00000.safetensors").open("ab") as file:
        file.truncate(1000)
    (steps[2] / "state.json").unlink()
    (steps[1] / "manifest.json").write_text("{")
    found, skipped = checkpoint.newest_valid(tmp_path)
    assert found == steps[0]
    reasons = ("does not match its hash", "has 1000 bytes, the manifest says", "state.json is missing", "not readable")
    for line, path, reason in zip(skipped, reversed(steps), reasons, strict=False):
        assert str(path) in line
        assert reason in line


def test_keep_removes_the_oldest_only(engine: Any, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(engine, tmp_path, step, "save.keep=2")
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-00000004", "step-00000003"]


def test_those_of_every_so_many_steps_are_kept_for_ever(engine: Any, tmp_path: Path) -> None:
    for step in range(1, 8):
        save(engine, tmp_path, step, "save.keep=1", "save.keep_every=3")
    mine = tmp_path / "step-by-step notes"
    mine.mkdir()
    assert [checkpoint.step_of(path) for path in checkpoint.committed(tmp_path)] == [7, 6, 3]
    save(engine, tmp_path, 4, "save.keep=1", "save.keep_every=3")  # back before 6, which is another future now
    assert [checkpoint.step_of(path) for path in checkpoint.committed(tmp_path)] == [4, 3]
    assert mine.is_dir()


def test_what_was_walked_back_past_does_not_push_out_the_valid(engine: Any, tmp_path: Path) -> None:
    """Resumed from step 3 since step 6 is damaged: saving step 4 with keep=1 must leave step 4."""
    save(engine, tmp_path, 3, "save.keep=2")
    damaged = save(engine, tmp_path, 6, "save.keep=2")
    with (damaged / "rank-00000.safetensors").open("ab") as file:
        file.truncate(1000)
    assert checkpoint.newest_valid(tmp_path)[0] == tmp_path / "step-00000003"
    path = save(engine, tmp_path, 4, "save.keep=1")
    assert [present.name for present in checkpoint.committed(tmp_path)] == ["step-00000004"]
    assert checkpoint.newest_valid(tmp_path) == (path, [])


def test_a_step_can_be_saved_again(engine: Any, tmp_path: Path) -> None:
    save(engine, tmp_path, 3)
    path = save(engine, tmp_path, 3)
    assert checkpoint.verify(path) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_another_run_is_refused_by_key(engine: Any, tmp_path: Path) -> None:
    path = save(engine, tmp_path)
    with pytest.raises(UserError, match=r"belongs to another run: optim\.lr was 0\.001, is 0\.002"):
        checkpoint.load(engine, path, {**IDENTITY, "optim.lr": 2e-3})
    with pytest.raises(UserError, match=r'optim\.layers was null, is "new"'):
        checkpoint.load(engine, path, {**IDENTITY, "optim.layers": "new"})


def test_other_parameters_are_refused_by_name(engine: Any, tmp_path: Path) -> None:
    path = save(engine, tmp_path)
    with pytest.raises(
        UserError, match=r"other parameters than this model: projector\.bias is \[8\] there and \[12\] here; "
    ):
        checkpoint.load(make_engine(width=12), path, IDENTITY)


def freeze(module: Any) -> None:
    module.projector.bias.requires_grad_(False)


def buffer(module: Any) -> None:
    module.register_buffer("seen", torch.zeros(3, device="cpu"))


REFUSED = {
    "frozen": ({"change": freeze}, r"other frozen parameters .*: projector\.bias is here alone"),
    "buffer": ({"change": buffer}, r"other buffers than this model: seen is here alone"),
    "average": ({"average": 0.9}, r"other vectors of each parameter than this model: ema is here alone"),
    "groups": ({"layer_decay": 0.5}, r"other groups of parameters .*: backbone\.\S+ is \{.*\} there and \{.*\} here"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_state_that_would_be_dropped_or_missing_is_refused_by_name(engine: Any, tmp_path: Path, kind: str) -> None:
    settings, message = REFUSED[kind]
    other = make_engine(seed=5, **settings)
    before = {(part.name, key): v.clone() for part, values in state.read(other) for key, v in values.items()}
    with pytest.raises(UserError, match=message):
        checkpoint.load(other, save(engine, tmp_path), IDENTITY)
    after = {(part.name, key): v for part, values in state.read(other) for key, v in values.items()}
    assert all(torch.equal(before[key], after[key]) for key in before)  # refused before anything was touched
    if kind != "groups":  # and the other way round
        path = save(trained(other), tmp_path / "other")
        with pytest.raises(UserError, match=message.replace("here", "there")):
            checkpoint.load(make_engine(), path, IDENTITY)


def test_frozen_parameters_buffers_and_the_average_come_back(tmp_path: Path, process_group: None) -> None:
    def change(module: Any) -> None:
        freeze(module)
        buffer(module)

    one = trained(make_engine(change=change, average=0.9))
    one.module.seen += torch.arange(3)
    path = save(one, tmp_path)
    written = load_file(path / "rank-00000.safetensors")
    assert "fp32/projector.bias" in written
    assert "exp_avg/projector.bias" not in written
    other = make_engine(seed=9, change=change, average=0.9)
    checkpoint.load(other, path, IDENTITY)
    assert torch.equal(other.module.seen, torch.arange(3.0))
    found = {(part.name, key): value for part, values in state.read(other) for key, value in values.items()}
    assert {key for name, key in found if name == "projector.weight"} == {*state.KEYS, "ema"}
    for part, values in state.read(one):
        assert all(torch.equal(value, found[part.name, key]) for key, value in values.items()), part


def test_a_parameter_without_gradients_is_named(tmp_path: Path, process_group: None) -> None:
    def change(module: Any) -> None:
        module.idle = torch.nn.Parameter(torch.empty(3))

    def save_it(average: float | None) -> None:
        save(trained(make_engine(change=change, stage=0, average=average)), tmp_path)

    with pytest.raises(UserError, match="the parameter idle never received a gradient"):
        save_it(None)
    with pytest.raises(UserError, match="the parameter idle did not receive a gradient at every step"):
        save_it(0.9)
    assert not checkpoint.committed(tmp_path)


def test_a_newer_format_is_refused(engine: Any, tmp_path: Path) -> None:
    path = save(engine, tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format"] = 99
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"has format 99, .* update fdscale"):
        checkpoint.newest_valid(tmp_path)
