"""The feature cache against its format, read back with struct and binascii, and against damage of every kind."""

from __future__ import annotations

import binascii
import copy
import dataclasses
import fcntl
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fdscale import UserError
from fdscale.data import feature_files as writing
from fdscale.data.features import HEADER, TYPES, Features, Plan, decode, encode, name_of

IDENTITY = {"data.seed": 0, "data.lanes": 4, "teacher.args": {"depth": 1}}
SPAN, TOKENS, WIDTH = 11, 5, 12


def plan_of(stored: str = "float32", **changes: Any) -> Plan:
    values = {"span": SPAN, "tokens": TOKENS, "width": WIDTH, "micro_batch": 2, "per_file": 4, "identity": IDENTITY}
    return Plan(**(values | {"stored": stored} | changes))


def tokens_of(numbers: list[int]) -> Tensor:
    """What the teacher says of these samples, (m, TOKENS, WIDTH)."""
    made = [torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(n)) * 3 for n in numbers]
    return torch.stack(made)


def batch_of(numbers: list[int]) -> dict[str, Any]:
    """What the stream says of these samples; numbers beyond the span repeat."""
    views = [np.random.default_rng(n % SPAN).integers(0, 256, (3, 6, 6), dtype=np.uint8) for n in numbers]
    origin = [("a.tar", f"key-{n % SPAN}") for n in numbers]
    return {"numbers": torch.tensor(numbers), "images": torch.from_numpy(np.stack(views)), "origin": origin}


def write(folder: Path, plan: Plan, files: list[int] | None = None) -> Path:
    plan = writing.begin(str(folder), plan)
    for file in range(plan.files) if files is None else files:
        writing.write_file(str(folder), plan, file, [records(plan, [n]) for n in plan.numbers(file)])
    writing.finish(str(folder), plan)
    return folder


def records(plan: Plan, numbers: list[int]) -> np.ndarray:
    batch = batch_of(numbers)
    return writing.pack(plan, batch["numbers"], batch["images"], *encode(tokens_of(numbers), plan.stored))


def replay(folder: Path, plan: Plan, numbers: list[int]) -> Tensor:
    features = Features(str(folder), plan)
    batch = batch_of(numbers)
    return features.tokens(batch | features(batch), torch.device("cpu"))


# ----------------------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(("stored", "bound"), [("float32", 0.0), ("bfloat16", 2**-8), ("float8", 2**-4)])
def test_floating_types_err_by_half_a_unit_in_the_last_place(stored: str, bound: float) -> None:
    tokens = torch.randn(4, 50, 96)
    values, scale = encode(tokens, stored)
    assert values.dtype == TYPES[stored]
    error = (decode(values, scale) - tokens).abs() / tokens.abs()
    normal = tokens.abs() > tokens.abs().amax(-1, keepdim=True) * 2**-6 / 448  # below it e4m3 has fewer digits
    assert error[normal].max() <= bound * (1 + 1e-6)


def test_int8_errs_by_half_a_step_of_its_token() -> None:
    tokens = torch.randn(4, 50, 96) * torch.logspace(-6, 6, 50)[:, None]
    values, scale = encode(tokens, "int8")
    step = tokens.abs().amax(-1, keepdim=True) / 127
    assert ((decode(values, scale) - tokens).abs() <= step * 0.5001).all()
    assert (values.int().abs().amax(-1) == 127).all()


@pytest.mark.parametrize("stored", TYPES)
def test_tokens_of_zeros_and_tiny_ones_stay_finite(stored: str) -> None:
    tokens = torch.zeros(1, 3, 8)
    tokens[0, 1] = 1e-44  # a subnormal number: its scale would be zero
    tokens[0, 2] = 3e38
    back = decode(*encode(tokens, stored))
    assert back.isfinite().all()
    assert (back[0, 0] == 0).all()
    assert back[0, 2] == pytest.approx(tokens[0, 2], rel=0.07)


# ----------------------------------------------------------------------------------------------------------------------
# The format


@pytest.mark.parametrize("stored", TYPES)
def test_what_is_written_is_read_back(tmp_path: Path, stored: str) -> None:
    plan = plan_of(stored)
    write(tmp_path / "cache", plan)
    numbers = [3, 10, 0, SPAN + 3, 5 * SPAN + 10]
    expected = decode(*encode(tokens_of([3, 10, 0, 3, 10]), stored))
    assert torch.equal(replay(tmp_path / "cache", plan, numbers), expected)
    shorter = dataclasses.replace(plan, span=8)  # the first epochs of a longer cache: 11 means 3
    images = batch_of([3])["images"]
    features = Features(str(tmp_path / "cache"), shorter)
    batch = {"numbers": torch.tensor([11]), "images": images, "origin": [("a.tar", "key")]}
    assert torch.equal(features.tokens(batch | features(batch), torch.device("cpu")), expected[:1])


def test_the_files_are_what_the_format_says(tmp_path: Path) -> None:
    """A second reader, in plain Python, of an int8 cache whose last file is short."""
    folder = write(tmp_path / "cache", plan_of("int8"))
    manifest = json.loads((folder / "manifest.json").read_text())
    size = 16 + 4 * TOKENS + TOKENS * WIDTH
    number = 0
    for file, entry in enumerate(manifest["files"]):
        content = (folder / f"features-{file:08d}.bin").read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        header = json.loads(content[:HEADER])
        assert (header["first"], header["count"]) == (number, len(content[HEADER:]) // size)
        for start in range(HEADER, len(content), size):
            record = content[start : start + size]
            crc, view, stored_number = struct.unpack_from("<IIQ", record)
            assert (crc, stored_number) == (binascii.crc32(record[4:]), number)
            assert view == binascii.crc32(batch_of([number])["images"][0].numpy().tobytes())
            scales = np.array(struct.unpack_from(f"<{TOKENS}f", record, 16))
            values = np.array(struct.unpack_from(f"<{TOKENS * WIDTH}b", record, 16 + 4 * TOKENS))
            tokens = values.reshape(TOKENS, WIDTH) * scales[:, None]
            truth = tokens_of([number])[0].numpy()
            assert np.abs(tokens - truth).max() <= np.abs(truth).max() / 254 * 1.001
            number += 1
    assert number == SPAN
    assert sorted(path.name for path in folder.iterdir()) == [
        "cache.json",
        *(f"features-{file:08d}.bin" for file in range(3)),
        "manifest.json",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.slow
def test_every_flipped_byte_and_every_cut_is_found_and_named(tmp_path: Path) -> None:
    plan = plan_of("int8")
    folder = write(tmp_path / "cache", plan)
    path = folder / f"{name_of(1)}.bin"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name_of(1)}\.bin: .*--repair"):
            replay(folder, plan, [4, 5, 6, 7])
    for length in (0, 1, HEADER - 1, HEADER, HEADER + 7, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{name_of(1)}\.bin: it has {length} bytes"):
            replay(folder, plan, [4])
        with pytest.raises(UserError, match=rf"{name_of(1)}\.bin: it has {length} bytes"):
            Features(str(folder), plan).check_sizes()
    path.unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        replay(folder, plan, [4])
    path.write_bytes(whole)
    assert torch.equal(replay(folder, plan, [4]), decode(*encode(tokens_of([4]), "int8")))


def test_a_file_that_shrinks_under_a_running_reader_is_an_error_and_no_signal(tmp_path: Path) -> None:
    plan = plan_of()
    folder = write(tmp_path / "cache", plan)
    features = Features(str(folder), plan)
    features(batch_of([4, 5, 6, 7]))
    with (folder / f"{name_of(1)}.bin").open("r+b") as file:
        file.truncate(HEADER + 2 * plan.record_bytes + 9)
    features(batch_of([4, 5]))
    with pytest.raises(UserError, match="sample number 6 is damaged"):
        features(batch_of([6]))


def test_files_and_records_in_the_wrong_place_are_found(tmp_path: Path) -> None:
    plan = plan_of()
    folder = write(tmp_path / "cache", plan)
    one, other = folder / f"{name_of(0)}.bin", folder / f"{name_of(1)}.bin"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    with pytest.raises(UserError, match="its header is not that of this cache"):
        replay(folder, plan, [0])
    size = plan.record_bytes
    records = [first[start : start + size] for start in range(HEADER, len(first), size)]
    one.write_bytes(first[:HEADER] + b"".join(records[::-1]))  # each is intact
    with pytest.raises(UserError, match="sample number 0 is damaged"):
        replay(folder, plan, [0])
    foreign = write(tmp_path / "foreign", plan_of(identity={**IDENTITY, "data.seed": 1}))
    one.write_bytes((foreign / one.name).read_bytes())
    with pytest.raises(UserError, match="its header is not that of this cache"):
        replay(folder, plan, [0])


def test_a_view_that_the_teacher_did_not_see_is_refused(tmp_path: Path) -> None:
    features = Features(str(write(tmp_path / "cache", plan_of())), plan_of())
    batch = batch_of([4, SPAN + 5])
    features(batch)
    batch["images"][1, 2, 3, 4] += 1
    with pytest.raises(UserError, match=r"sample number 16 \(a\.tar: 'key-5'\) does not look as it did"):
        features(batch)


MUTATIONS: list[Callable[[Any], Any]] = [
    lambda value: None,
    lambda value: [],
    lambda value: {},
    lambda value: "../../../etc/passwd",
    lambda value: -1,
    lambda value: 2**70,
    lambda value: 1.5,
    lambda value: True,
]


@pytest.mark.parametrize("name", ["cache.json", "manifest.json"])
def test_descriptions_are_not_trusted(tmp_path: Path, name: str) -> None:
    """No allocation, loop or file follows from what they claim; every change is refused."""
    folder = write(tmp_path / "cache", plan_of())
    path = folder / name
    whole = json.loads(path.read_text())
    for key in whole:
        for mutate in MUTATIONS:
            changed = copy.deepcopy(whole)
            changed[key] = mutate(changed[key])
            path.write_text(json.dumps(changed))
            with pytest.raises(UserError):
                replay(folder, plan_of(), list(range(SPAN)))
        path.write_text(json.dumps({other: value for other, value in whole.items() if other != key}))
        with pytest.raises(UserError):
            replay(folder, plan_of(), [0])
    for text in ("", "[]", "{", "[" * 100_000, json.dumps(whole)[:-9], "\xff"):
        path.write_text(text)
        with pytest.raises(UserError, match=name):
            replay(folder, plan_of(), [0])


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def test_half_a_cache_is_gone_on_with_and_not_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", plan_of(), files=[2, 0])
    with pytest.raises(UserError, match="is not whole, 2 of 3 files are written"):
        Features(str(folder), plan_of())
    again = writing.begin(str(folder), plan_of(per_file=8))  # files of another size: the cache keeps its own
    assert again.per_file == 4
    assert writing.written(str(folder), again) == {0, 2}
    write(folder, plan_of(), files=[1])
    everything = list(range(SPAN))
    assert torch.equal(replay(folder, plan_of(), everything), tokens_of(everything))
    assert writing.finish(str(folder), again), "whoever comes second finds it done"


def test_a_file_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    plan = plan_of()
    folder = tmp_path / "cache"
    writing.begin(str(folder), plan)

    def broken() -> Any:
        yield records(plan, [0])
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        writing.write_file(str(folder), plan, 0, broken())
    assert [path.name for path in folder.iterdir()] == ["cache.json"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    folder = write(tmp_path / "cache", plan_of(), files=[0])
    dead, living, foreign = folder / ".features-00000001-x", folder / ".features-00000002-y", folder / ".nfs01"
    for path in (dead, living, foreign):
        path.write_bytes(b"begun")
    with living.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writing.begin(str(folder), plan_of())
    assert not dead.exists()
    assert living.exists()
    assert foreign.exists()


def test_repair_finds_exactly_the_damaged_files(tmp_path: Path) -> None:
    plan = plan_of()
    folder = write(tmp_path / "cache", plan)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = bytearray(whole[f"{name_of(1)}.bin"])
    content[-1] ^= 1
    (folder / f"{name_of(1)}.bin").write_bytes(content)
    (folder / f"{name_of(2)}.bin").unlink()
    writing.reopen(str(folder), plan)
    problems = [writing.problem_with(str(folder), plan, file) for file in range(plan.files)]
    assert [problem is None for problem in problems] == [True, False, False]
    for file in (1, 2):
        writing.discard(str(folder), file)
    assert writing.written(str(folder), plan) == {0}
    write(folder, plan, files=[1, 2])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"identity": {**IDENTITY, "data.seed": 7}}, "data.seed is 0 there and 7 here"),
        ({"identity": {**IDENTITY, "data.decode": "scaled"}}, 'data.decode is null there and "scaled" here'),
        ({"stored": "int8"}, 'cache.dtype is "same" there and "int8" here'),
        ({"tokens": 6}, r"tokens and width of a sample is \[5, 12\] there and \[6, 12\] here"),
        ({"width": 13}, r"tokens and width of a sample is \[5, 12\] there and \[5, 13\] here"),
    ],
)
def test_another_runs_cache_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = str(write(tmp_path / "cache", plan_of()))
    wanted = dataclasses.replace(plan_of(), **changes)
    for refusing in (Features, writing.begin):
        with pytest.raises(UserError, match=named):
            refusing(folder, wanted)


def test_only_writing_minds_micro_batch_and_only_longer_spans_are_refused(tmp_path: Path) -> None:
    folder = str(write(tmp_path / "cache", plan_of()))
    Features(folder, plan_of(micro_batch=4, span=9))
    for changes, named in (({"micro_batch": 4}, "memory.micro_batch is 2 there and 4"), ({"span": 9}, "cache.epochs")):
        with pytest.raises(UserError, match=named):
            writing.begin(folder, plan_of(**changes))
    with pytest.raises(UserError, match=r"holds the features of 11 samples, and cache\.epochs asks for 12"):
        Features(folder, plan_of(span=12))


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(thesis\.txt\)"):
        writing.begin(str(tmp_path), plan_of())
    with pytest.raises(UserError, match="holds no feature cache"):
        Features(str(tmp_path), plan_of())
    with pytest.raises(UserError, match="holds no feature cache"):
        Features(str(tmp_path / "nowhere"), plan_of())
