"""`fdscale bench data` and `workers` run and report what they say; how fast anything is, no test asserts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import run_cli, sets
from PIL import Image
from test_resume import ds_file

from fdscale import UserError, cli, config, student
from fdscale.bench import attention, peers, step, traffic
from fdscale.bench.data import in_turns, photographs, ratio
from fdscale.models import swin_v2
from fdscale.models.swin_v2 import SwinV2
from fdscale.objective import Distiller

DECODE = {"PIL + torchvision", "exact", "scaled", "pillow"}


@pytest.mark.slow
def test_bench_data_measures_every_table(tmp_path: Path) -> None:
    done = run_cli("bench", "data", "--quick", "--json", tmp_path / "data.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "data.json").read_text())
    assert result["rounds"] == 1
    assert result["machine"]["torch"]
    assert result["decode"]
    measured = [(of, DECODE) for of in result["decode"].values()]
    assert set(result["loader"]) == {"1", "2"}
    measured += [(of, {"webdataset", "fdscale"}) for of in result["loader"].values()]
    measured += [(result["index"], {"tarfile", "fdscale"})]
    for of, ways in measured:
        assert set(of["seconds"]) == {"wall", "cpu"}
        for taken in of["seconds"].values():
            assert set(taken) == ways
            assert all(len(rounds) == 1 and rounds[0] >= 0 for rounds in taken.values())
        for name in ways:
            assert f"\n| {name} | " in done.stdout
    assert done.stdout.count("| way | ") == len(measured)


@pytest.mark.slow
def test_bench_workers_measures_every_way(tmp_path: Path) -> None:
    done = run_cli("bench", "workers", "--quick", "--json", tmp_path / "workers.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "workers.json").read_text())
    ways = {"no loader", *(f"{count} {kind}" for kind in ("processes", "threads") for count in (2, 4))}
    ways |= {"1 process", "1 thread"}
    assert set(result["step"]) == set(result["wait"]) == ways == set(result["alone"]) | {"no loader"}
    for name in ways:
        assert len(result["step"][name]) == len(result["wait"][name]) == 1
        assert f"\n| {name} | " in done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_bench_loop_runs_through_the_real_loop(tmp_path: Path) -> None:
    done = run_cli("bench", "loop", "--rounds", "2", "--batch", "1", "--threads", "1", "--json", tmp_path / "loop.json")
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "loop.json").read_text())["seconds"]["wall"]
    assert {name: len(taken) for name, taken in seconds.items()} == {"timm": 2, "ours": 2, "fdscale": 2}


SMALL = (
    "student.args={embed_dim: 16, depths: [2, 2], num_heads: [1, 2], window_size: 4, pretrained_window_sizes: [0, 0]}",
    "data.image_size=32",
    "data.workers=1",
    "memory.micro_batch=2",
    "memory.checkpoint=[torch]",
    "log.every=1",
)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "against"), [(1, "official"), (2, "timm")])
def test_bench_step_says_where_the_time_of_a_recipe_goes(tmp_path: Path, ranks: int, against: str) -> None:
    ds = ds_file(tmp_path, 3, bf16=True)
    words = ("bench", "step", "demo", "--rounds", "2", "--threads", "1", "--accumulate", "2", "--ds", ds)
    more = ("--against", against, "--json", tmp_path / "step.json", *sets(*SMALL))
    done = run_cli(*words, *more, ranks=ranks)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "step.json").read_text())
    assert result["batch"] == 2 * 2 * ranks
    assert set(result["ways"]) == {"fdscale", against}
    for way in result["ways"].values():
        assert len(way["seconds"]) == len(way["parts"]) == 2
        assert all(set(parts) == set(step.PARTS) and min(parts.values()) > 0 for parts in way["parts"])
    told = result["communication"]
    assert 0 < told["communication_s"] < told["step_s"] if ranks > 1 else told is None
    assert ranks == 1 or told["sent"]["reduce-scatter"][1] > 0
    assert done.stdout.count(f"| {against} |") == 2
    assert ("Ranks communicate for" in done.stdout) == (ranks > 1)


@pytest.mark.slow
def test_bench_step_takes_recipes_of_fine_tuning_and_a_teacher_of_ours(tmp_path: Path) -> None:
    small = ("student.args={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}", "data.image_size=32")
    words = ("--rounds", "1", "--threads", "1", "--json", tmp_path / "step.json")
    more = sets(*small, "memory.micro_batch=4", "data.workers=1")
    done = run_cli("bench", "step", "deit_vit_base_300_finetune", *words, *more)
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "step.json").read_text())["ways"]) == {"fdscale", "timm"}
    args = "{embed_dim: 16, depths: [2, 2], num_heads: [1, 2], window_size: 4, pretrained_window_sizes: [0, 0]}"
    ours = (f"student.args={args}", f"teacher.args={args}", "teacher.dtype=float32", "data.workers=1")
    done = run_cli("bench", "step", "swinv2_g", *words, *sets(*ours, "data.image_size=32", "memory.micro_batch=2"))
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "step.json").read_text())["ways"]) == {"fdscale", "official"}


def test_timm_has_the_same_student() -> None:
    for recipe in ("clip_vit_base_300", "clip_vit_base_300_finetune", "esvit_swinv2_base_300"):
        settings = config.load(recipe)
        with torch.device("meta"):
            theirs = peers.TimmBackbone(settings)
            ours = student.backbone(settings)
        assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
        assert theirs.width == ours.width


def test_another_way_leaves_the_network_as_it_was() -> None:
    with torch.device("meta"):
        network = Distiller(SwinV2(img_size=32, embed_dim=16, depths=(1, 1), num_heads=(1, 1), window_size=4,
                                   pretrained_window_sizes=(0, 0)), 8)  # fmt: skip
    parts = [*network.modules()]
    for number, part in enumerate(part for part in parts if hasattr(part, "kernels")):
        part.kernels = ("torch", "triton")[number]
    switches = [(getattr(part, "kernels", None), getattr(part, "fused", None), dict(vars(part))) for part in parts]
    ours = swin_v2.window_attention
    with peers.eager_and_official([network]):
        assert swin_v2.window_attention is not ours
        assert {part.kernels for part in parts if hasattr(part, "kernels")} == {"reference"}
    assert swin_v2.window_attention is ours
    assert switches == [
        (getattr(part, "kernels", None), getattr(part, "fused", None), dict(vars(part))) for part in parts
    ]


def test_a_way_that_does_not_fit_is_named() -> None:
    said = "official: out of memory: no room; --against none measures the recipe alone"
    with pytest.raises(UserError, match=said), step.fitting("official"):
        raise torch.OutOfMemoryError("no room")


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="--against official is for students with window attention"):
        step.chosen("official", SimpleNamespace(module=torch.nn.Linear(1, 1)))
    assert traffic.union([(5, 7), (0, 2), (1, 3)]) == [(0, 3), (5, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_bench_checkpoint_measures_every_way(tmp_path: Path, ranks: int) -> None:
    words = ("bench", "checkpoint", "--quick", "--folder", tmp_path, "--json", tmp_path / "checkpoint.json")
    done = run_cli(*words, "--stage", 2 * ranks - 1, ranks=ranks)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "checkpoint.json").read_text())
    assert result["ranks"] == ranks
    assert result["parameters"] > 500_000
    assert all(len(taken) == 1 for taken in result["seconds"].values())
    assert done.stdout.count("| fdscale") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"]


@pytest.mark.slow
def test_bench_attention_measures_every_way(tmp_path: Path) -> None:
    done = run_cli("bench", "attention", "--quick", "--json", tmp_path / "attention.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "attention.json").read_text())["layers"]["tiny"]
    assert set(found["kept_bytes"]) >= {"official", "SDPA", "reference", "torch"}
    assert found["kept_bytes"]["torch"] < found["kept_bytes"]["official"]
    for taken in found["seconds"].values():
        assert all(len(taken[name]) == 1 for name in found["kept_bytes"])
    assert done.stdout.count("| tiny | ") == 2 * len(found["kept_bytes"])


@pytest.mark.slow
def test_bench_fused_measures_every_way(tmp_path: Path) -> None:
    assert cli.main(["bench", "fused", "--quick", "--json", str(tmp_path / "fused.json")]) == 0
    result = json.loads((tmp_path / "fused.json").read_text())
    assert len(result["ops"]) == 3
    for layers in result["ops"].values():
        found = layers["tiny"]
        assert set(found["seconds"]) == set(found["kept_bytes"]) >= {"eager", "torch.compile"}
        assert all(len(taken) == 1 and taken[0] > 0 for taken in found["seconds"].values())


@pytest.mark.slow
@pytest.mark.long
def test_bench_policies_measures_every_policy(tmp_path: Path) -> None:
    done = run_cli("bench", "policies", "--quick", "--threads", "1", "--json", tmp_path / "policies.json")
    assert done.returncode == 0, done.stderr
    networks = json.loads((tmp_path / "policies.json").read_text())["networks"]
    assert {name: len(rows) for name, rows in networks.items()} == {"SwinV2": 12, "ViT": 9}
    for rows in networks.values():
        by = {tuple(row["policy"]): row for row in rows}
        plain, again = (next(row for key, row in by.items() if key[0] == f"[{kind}]") for kind in ("none", "torch"))
        assert again["kept"] < plain["kept"]
        assert all(row["peak"] == pytest.approx(row["planned_peak"], rel=0.25) for row in rows)
    assert "| checkpoint | chunk |" in done.stdout


def test_where_the_figures_go_is_asked_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path / "missing" / "step.json", tmp_path):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", "loop", "--json", str(place)])
        assert f"'{place}' cannot be written: expected a file in a directory that exists" in capsys.readouterr().err


@pytest.mark.parametrize("shift", [0, 2])
def test_all_ways_of_attention_compute_the_same(shift: int) -> None:
    shape = attention.Shape("", 2, 8, 4, shift, 2)
    leaves = attention.random_inputs(shape, torch.device("cpu"), torch.float32)
    outs = {name: way(*leaves) for name, way in attention.ways(shape, torch.device("cpu")).items()}
    assert len(outs) >= 4
    for name, out in outs.items():
        torch.testing.assert_close(out, outs["official"], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_photographs_are_jpegs_of_about_the_size_asked_for() -> None:
    files = photographs(6, 120, 90)
    assert len(set(files)) == 6
    for data in files:
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG"
        assert 114 <= image.width <= 126
        assert 85 <= image.height <= 95
    assert files == photographs(6, 120, 90)


def test_ways_take_turns_and_the_warm_up_does_not_count() -> None:
    called: list[str] = []
    ways = {name: (lambda name=name: called.append(name)) for name in "abc"}
    seconds = in_turns(ways, 5)
    assert len(called) == 18
    assert all(set(called[i : i + 3]) == {"a", "b", "c"} for i in range(0, 18, 3))
    assert len({"".join(called[i : i + 3]) for i in range(0, 18, 3)}) > 1
    assert all(len(taken) == 5 for of in seconds.values() for taken in of.values())
    assert in_turns({"a": lambda: 7.0}, 2)["wall"]["a"] == [7.0, 7.0]


def test_ratios_are_taken_within_rounds() -> None:
    seconds = {"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 1.0]}
    assert ratio(seconds, "slow", "fast") == "3.00 (2.50 .. 3.50)"
    assert ratio({"slow": [3.0], "fast": [2.0]}, "slow", "fast") == "1.50"
