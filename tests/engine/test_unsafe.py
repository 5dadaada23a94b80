"""Checkpoints made to do harm: no payload runs, and each is refused, or walked past, by the name of its file."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch

from fdscale import UserError, cli
from fdscale.engine import checkpoint, contents

RANK = "rank-00001.safetensors"


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.mark)!r}, 'w')",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make(tmp_path_factory.mktemp("made") / "step-00000007", checkpoints.settings())


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run directory with that checkpoint."""
    shutil.copytree(made, tmp_path / "run" / "checkpoints" / made.name)
    return tmp_path / "run"


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What a payload would create."""
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists(), "the payload ran"


def refused(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that export of the run, and of its checkpoint, is refused with; and resume walks past it."""
    step = run / "checkpoints" / "step-00000007"
    said = []
    for source in (run, step):
        assert cli.main(["export", str(source), str(run / "out.safetensors")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("fdscale: "), error
        said.append(error)
    found, skipped = checkpoint.newest_valid(run / "checkpoints")
    assert found is None
    assert len(skipped) == 1
    assert not (run / "out.safetensors").exists()
    return said[1]


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "manifest adapted"])
@pytest.mark.parametrize("kind", ["torch", "torch-old", "pickle", "numpy"])
@pytest.mark.parametrize("name", [RANK, "state.json", "manifest.json"])
def test_a_pickle_under_any_name_never_runs(
    run: Path, mark: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str, sealed: bool
) -> None:
    step = run / "checkpoints" / "step-00000007"
    if kind.startswith("torch"):
        torch.save({"x": Payload(mark)}, step / name, _use_new_zipfile_serialization=kind == "torch")
    elif kind == "pickle":
        (step / name).write_bytes(pickle.dumps(Payload(mark)))
    else:
        with (step / name).open("wb") as file:
            np.save(file, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    if sealed and name != "manifest.json":
        checkpoints.seal(step)
    assert name in refused(run, capsys)


def test_files_beside_are_never_opened(run: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "step-00000007"
    for path in (step / "extra.pt", step / "rank-00009.safetensors", step / "pytorch_model.bin", run / "latest"):
        torch.save(Payload(mark), path)
    torch.save(Payload(mark), run / "checkpoints" / "latest")
    assert checkpoint.newest_valid(run / "checkpoints")[0] == step
    assert cli.main(["export", str(run), str(run / "out.safetensors")]) == 0, capsys.readouterr().err


def change(step: Path, name: str, at: Callable[[dict], None]) -> None:
    content = json.loads((step / name).read_text())
    at(content)
    (step / name).write_text(json.dumps(content))


def test_names_that_lead_out_and_links_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = run / "checkpoints" / "step-00000007"
    outside = run / RANK
    shutil.copy(step / RANK, outside)
    for name in (f"../../{RANK}", str(outside), f"./{RANK}", "", ".", "manifest.json", RANK + "\n", "state.json\0"):
        kept = (step / "manifest.json").read_text()
        change(step, "manifest.json", lambda content, name=name: content["files"][1].update(name=name))
        assert "files in manifest.json makes no sense" in refused(run, capsys), name
        (step / "manifest.json").write_text(kept)
    for name in (RANK, "state.json", "manifest.json"):
        kept = (step / name).rename(run / "kept")
        (step / name).symlink_to(run / "kept")
        assert f"{name} is not a regular file; a checkpoint holds no links" in refused(run, capsys)
        (step / name).unlink()
        kept.rename(step / name)
    assert checkpoint.verify(step) is None


HEADERS = {
    "a header as large as a disk": (2**62).to_bytes(8, "little"),
    "a header without end": b"\xff" * 8,
    "no JSON": (8).to_bytes(8, "little") + b"{{{{{{{{",
    "deep nesting": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "a number of many digits": (9008).to_bytes(8, "little") + b'{"a":' + b"9" * 9002 + b"}",
    "cut short": b"\x10",
    "empty": b"",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie_are_refused(run: Path, capsys: pytest.CaptureFixture[str], header: bytes) -> None:
    step = run / "checkpoints" / "step-00000007"
    (step / RANK).write_bytes(header)
    checkpoints.seal(step)
    assert f"{RANK} is no whole safetensors file" in refused(run, capsys)


TEXTS = {
    "deep nesting": '{"format": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "NaN": '{"format": 1, "step": NaN}',
    "infinity": '{"format": 1, "step": -Infinity}',
    "too large": '{"format": 1, "step": 1e999}',
    "many digits": '{"format": 1, "step": ' + "9" * 5000 + "}",
    "a list": "[1]",
    "no format": "{}",
    "no text": "\udcff",
    "empty": "",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_json_that_lies_is_refused(run: Path, capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    step = run / "checkpoints" / "step-00000007"
    (step / name).write_bytes(text.encode(errors="surrogateescape"))
    if name == "state.json":
        checkpoints.seal(step)
    assert name in refused(run, capsys)


def test_json_larger_than_any_checkpoints_is_not_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "checkpoints" / "step-00000007" / "manifest.json").open("ab") as file:
        file.truncate(1 << 40)  # takes no space on the disk
    assert "manifest.json is not readable (more than" in refused(run, capsys)


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_newer_format_is_never_walked_past(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    step = run / "checkpoints" / "step-00000007"
    shutil.copytree(step, step.with_name("step-00000003"))
    change(step, name, lambda content: content.update(format=contents.FORMAT + 1))
    if name == "state.json":
        checkpoints.seal(step)
    for source in (run, step):
        assert cli.main(["export", str(source), str(run / "out.safetensors")]) == 2
        assert f"{name} has format {contents.FORMAT + 1}, and this fdscale" in capsys.readouterr().err
    with pytest.raises(UserError, match="update fdscale"):
        checkpoint.newest_valid(run / "checkpoints")


# ----------------------------------------------------------------------------------------------------------------------
# By chance

ODD = (None, True, -1, 0, 1, 7, 2**53, 10**400, 0.5, 1e308, "", "x", "\n", [], [[]], {}, {"a": 1}, [1, 2], [-1])


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in plain data, with each of its keys."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


def mutated(tree: Any, chance: random.Random) -> Any:
    """The same with one value, name or member changed."""
    tree = copy.deepcopy(tree)
    holder, key = chance.choice(list(places(tree)))
    what = chance.randrange(3)
    if what == 0:
        holder[key] = chance.choice(ODD)
    elif what == 1:
        del holder[key]
    elif isinstance(holder, dict):
        holder[chance.choice(["", "x", "../x", "\0", "a" * 2000])] = holder.pop(key)
    else:
        holder.append(copy.deepcopy(holder[key]))
    return tree


@pytest.mark.slow
def test_changed_at_random_it_is_refused_or_whole(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hundreds of changes to what the JSON files and the header say: a reason each time, never another exception."""
    state = json.loads((made / "state.json").read_text())
    manifest = json.loads((made / "manifest.json").read_text())
    raw = (made / RANK).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    step = tmp_path / "run" / "checkpoints" / made.name
    shutil.copytree(made, step)
    refusals = 0
    for seed in range(450):
        chance = random.Random(seed)
        for name in (RANK, "state.json", "manifest.json"):
            shutil.copy(made / name, step / name)
        kind = seed % 3
        if kind == 0:
            (step / "state.json").write_text(json.dumps(mutated(state, chance)))
        elif kind == 1:
            text = json.dumps(mutated(header, chance)).encode()
            (step / RANK).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        if kind < 2:
            checkpoints.seal(step)
        else:
            (step / "manifest.json").write_text(json.dumps(mutated(manifest, chance)))
        code = cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out.safetensors"), "--force"])
        assert code in (0, 2), seed
        refusals += code == 2
        assert "Traceback" not in (said := capsys.readouterr().err), said
        try:
            problem = checkpoint.verify(step)
        except UserError as error:
            problem = str(error)
            assert "update fdscale" in problem
        if problem is None:
            reader = checkpoint.Reader(step)
            checkpoint.read_state(step)
            for name in reader.state["parameters"]:
                reader.full(name)
            reader.close()
    assert refusals > 250
