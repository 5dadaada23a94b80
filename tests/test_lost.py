"""Damaged data in a real run, as a user meets it: what is said, what is listed, when the run stops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import run_cli

pytestmark = pytest.mark.slow


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """The shards with their second one cut off in its third sample: 2 of 12 samples are lost."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    return folder


def lost(run: Path, ranks: int) -> list[tuple[str, ...]]:
    files = [run / f"lost-{rank}.log" for rank in range(ranks)]
    return sorted(tuple(line.split("\t")) for file in files if file.exists() for line in file.read_text().splitlines())


def test_losses_are_shown_listed_and_counted_and_the_run_goes_on(
    tiny: Callable[..., list[str]], damaged: Path, tmp_path: Path
) -> None:
    where = (f"data.shards={damaged}", "data.lost_budget=0.01")
    done = run_cli(*tiny(tmp_path / "one", *where))
    assert done.returncode == 0, done.stderr
    listed = lost(tmp_path / "one", 1)
    trained = [line.split("\t") for line in (tmp_path / "one" / "samples-0.log").read_text().splitlines()]
    assert len(trained) == 64
    whole = {key for _, shard, key in trained if shard == "shard-000001.tar"}
    broken = {key for _, _, key, *_ in listed}
    assert len(broken) == 2
    assert not broken & whole
    assert "lost: shard-000001.tar: sample '" in done.stderr
    assert "the shard is cut off before byte" in done.stderr
    assert done.stderr.count("lost: ") == 5  # the first few, then one a minute
    last = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["lost"] == sum(int(number) < 56 for number, *_ in listed)  # told one step later

    two = run_cli(*tiny(tmp_path / "two", *where), ranks=2)
    assert two.returncode == 0, two.stderr
    assert lost(tmp_path / "two", 2) == listed


def test_above_the_budget_the_run_stops_saved_and_goes_on_with_a_larger_one(
    tiny: Callable[..., list[str]], damaged: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = run_cli(*tiny(run, f"data.shards={damaged}", "data.lost_budget=2e-4"))
    assert done.returncode == 2, done.stderr
    assert "more than data.lost_budget 0.0002 allows: they are listed in" in done.stderr
    assert "Traceback" not in done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = records[-1]["step"]
    assert 0 < step < 8
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{step:08d}"
    more = run_cli(*tiny(run, f"data.shards={damaged}", "data.lost_budget=0.01"))
    assert more.returncode == 0, more.stderr
    numbers = [int(line.split("\t")[0]) for line in (run / "samples-0.log").read_text().splitlines()]
    assert numbers == list(range(64))


def test_heldout_losses_have_no_weight(tiny: Callable[..., list[str]], damaged: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_cli(*tiny(run, f"data.heldout_shards={damaged}", options=("--steps", "1")))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["heldout_samples"] for record in records if "heldout_loss" in record] == [10, 10]
    assert len(lost(run, 1)) == 2


def test_a_feature_cache_of_damaged_shards_names_them_and_replays_what_the_live_teacher_sees(
    tiny: Callable[..., list[str]], damaged: Path, tmp_path: Path
) -> None:
    where = (f"data.shards={damaged}", "cache.epochs=2", "data.lost_budget=0.01", "schedule.steps=4")
    out = tmp_path / "features"
    words = tiny(out, *where)
    assert words[2] == "--run"
    made = run_cli("cache", "demo", "--out", out, *words[4:])
    assert made.returncode == 0, made.stderr
    assert "lost: shard-000001.tar: sample '" in made.stderr
    assert len(lost(out, 1)) == 4  # two samples, two epochs
    for run, more in (("live", ()), ("replayed", (f"cache.features={out}",))):
        done = run_cli(*tiny(tmp_path / run, *where, *more))
        assert done.returncode == 0, done.stderr
    live, replayed = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("live", "replayed")
    )
    for one, other in zip(live, replayed, strict=True):
        assert all(one[key] == other[key] for key in ("step", "loss", "grad_norm", "lost") if key in one)
    assert lost(tmp_path / "live", 1) == lost(tmp_path / "replayed", 1) != []
    strict = run_cli("cache", "demo", "--out", tmp_path / "none", *words[4:], "--set", "data.lost_budget=0")
    assert strict.returncode == 2
    assert "more than data.lost_budget 0 allows" in strict.stderr
    assert "Traceback" not in strict.stderr


def test_a_message_or_name_of_many_lines_stays_one_line(tmp_path: Path) -> None:
    from rich.console import Console

    from fdscale.data.lost import Replaced
    from fdscale.run import Losses

    losses = Losses(tmp_path, Console(stderr=True))
    losses.add([Replaced(7, "a.tar", "odd\tname", "first line\nsecond line", "b.tar", "x"), Replaced(8, *"abcde")])
    losses.close()
    assert [line.count("\t") for line in (tmp_path / "lost-0.log").read_text().split("\n")] == [5, 5, 0]
    assert losses.take() == 2
