"""The command line as a person meets it: fast help, exit codes, one line for every mistake, nothing written half."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT, run_cli, sets

from fdscale import cli


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from fdscale import cli; cli.parser().format_help(); "
        "heavy = {'torch', 'numpy', 'deepspeed', 'timm', 'PIL', 'yaml', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_verb_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["distill"],
        ["finetune"],
        ["evaluate"],
        ["export"],
        ["recipes"],
        ["doctor"],
        ["shards", "make"],
        ["shards", "index"],
        ["shards", "verify"],
        ["shards", "stats"],
        ["shards", "reshard"],
        ["bench", "data"],
        ["bench", "shuffle"],
        ["bench", "step"],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, "--help"])
        assert stopped.value.code == 0
        assert f"example:\n  fdscale {' '.join(words)}" in capsys.readouterr().out


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["distil"], ["distill", "demo"], ["distill", "demo", "--run", "x", "--steps", "many"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 2


@pytest.mark.parametrize(
    "words",
    [
        "shards stats x --sample -5",
        "shards verify x --workers -1",
        "shards make x y --shard-mib nan",
        "shards make x y --shard-mib 0",
        "shards make x y --samples-per-shard 0",
        "shards index x --shard-cache-gib inf",
        "export x y --shard-gib 1e300",
        "export x y --shard-gib much",
        "probe x --epochs 0",
        "probe x --epochs -3",
        "submit demo --run x --time 1 --nodes 0",
        "submit demo --run x --time 1 --cpus-per-task 0",
        "tune demo --out x --ranks 0",
        "tune demo --out x --limit nan",
        "bench data --rounds 0",
        "bench step demo --accumulate 1.5",
        "bench model --seconds -1",
        "bench attention --compiled -1",
    ],
)
def test_numbers_that_make_no_sense_are_named(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words.split())
    assert stopped.value.code == 2
    *_, option, value = words.split()
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: '{value}': expected a " in last
    assert cli.parser().parse_args([*words.split()[:-1], "3"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("recipes nosuch --keys", "leave out nosuch"),
        ("diagnose x --points 5", "--points is of --landscape"),
        ("diagnose x --reach 1", "--reach is of --landscape"),
        ("diagnose x --seeds 3", "--seeds is of --landscape"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n"), says in captured.err) == ("", 1, True)


def test_landscapes_have_their_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdscale import diagnosis

    asked: list[dict] = []
    monkeypatch.setattr(diagnosis, "main", lambda **words: asked.append(words))
    for words in ([], ["--landscape", "line"], ["--landscape", "plane", "--points", "5"]):
        assert cli.main(["diagnose", "x", *words]) == 0
    assert [(one["points"], one["reach"], one["seeds"]) for one in asked] == [(11, 1.0, 3), (11, 1.0, 3), (5, 1.0, 3)]
    assert all("only_with" not in one for one in asked)


def test_doctor_and_recipes_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["state"] == "ok"
    assert findings["JPEG decoder"]["state"] in ("ok", "optional")
    assert "github.com/NVIDIA/apex" in findings["apex"]["detail"] or findings["apex"]["state"] == "ok"
    assert cli.main(["recipes", "--json"]) == 0
    assert {row["recipe"] for row in json.loads(capsys.readouterr().out)} >= {"demo", "swinv2_g"}
    assert cli.main(["recipes", "--keys", "--json"]) == 0
    assert "optim.lr" in {row["key"] for row in json.loads(capsys.readouterr().out)}
    assert cli.main(["recipes", "demo"]) == 0
    assert "make demo" in capsys.readouterr().out


def test_shards_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name in ("cat/a", "cat/b", "dog/c"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / "photos" / f"{name}.png")
    out = tmp_path / "shards"
    assert cli.main(["shards", "make", str(tmp_path / "photos"), str(out), "--workers", "1"]) == 0
    assert "3 samples in 1 shards" in capsys.readouterr().out
    assert cli.main(["shards", "verify", str(out), "--decode", "--workers", "1"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert cli.main(["shards", "index", str(out), "--index", str(tmp_path / "index"), "--workers", "1"]) == 0
    shard = next(out.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1200])
    capsys.readouterr()
    assert cli.main(["shards", "verify", str(out), "--json", "--workers", "1"]) == 2
    assert json.loads(capsys.readouterr().out)


MISTAKES: list[tuple[list[str], list[str], list[str]]] = [
    (["optim.lrr=1"], [], ["unknown key optim.lrr", "did you mean 'lr'"]),
    (["optim.lr=fast"], [], ["optim.lr must be a number"]),
    (["data.shards=/nowhere/x.tar"], [], ["/nowhere/x.tar"]),
    (["data.shards=null"], [], ["data.shards is not set", "shards make"]),
    (["teacher.weights=null"], [], ["teacher.weights is missing", "nothing is downloaded"]),
    (["teacher.weights=/nowhere/w.pth"], [], ["/nowhere/w.pth"]),
    (["teacher.source=timm:vit_tony"], [], ["timm has no model 'vit_tony'"]),
    (
        ["teacher.args={img_size: 64, patch_size: 16, embed_dim: 24, depth: 1, num_heads: 2}"],
        [],
        ["4 x 4", "8 x 8", "resample"],
    ),
    (["student.args={embed_dims: 3}"], [], ["swin_v2 has no argument embed_dims"]),
    (["optim.batch_size=9"], [], ["not divisible by memory.micro_batch 4"]),
    (["data.lanes=3"], [], ["data.lanes 3 does not divide optim.batch_size 8"]),
    (["data.lanes=8", "optim.batch_size=64", "memory.micro_batch=64", "data.lanes=64"], [], ["64 lanes"]),
    (["data.weights=[1, 2]"], [], ["data.weights has 2 values for 1 entries of data.shards"]),
    (["log.wandb=x"], [], ["log.wandb is set, but wandb is missing"]),
    (["memory.checkpoint=[torch, none, none]"], [], ["memory.checkpoint has 3 values"]),
    ([], ["--ds", "/nowhere/ds.json"], ["/nowhere/ds.json: no such ds_config file"]),
    ([], ["--resume", "/nowhere/step-1"], ["--resume /nowhere/step-1"]),
    ([], ["--steps", "-1"], ["--steps must not be negative"]),
]


@pytest.mark.parametrize(
    ("settings", "options", "expected"), MISTAKES, ids=[" ".join(a + b) or "none" for a, b, _ in MISTAKES]
)
def test_mistakes_are_one_line_and_leave_nothing(
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    options: list[str],
    expected: list[str],
) -> None:
    run = tmp_path / "run"
    assert cli.main(tiny(run, *settings, options=options)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fdscale: ")
    for part in expected:
        assert part in lines[0]
    assert not run.exists()


@pytest.mark.slow
def test_no_traceback_and_exit_2_in_a_real_process(
    tiny: Callable[..., list[str]], shards: Path, tmp_path: Path
) -> None:
    done = run_cli(*tiny(tmp_path / "run", "optim.lrr=1"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = run_cli("shards", "index", empty)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    ds = tmp_path / "ds.json"
    ds.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "train_batch_size": 8}')
    done = run_cli(*tiny(tmp_path / "run", options=("--ds", str(ds))))
    assert done.returncode == 2
    assert '"auto"' in done.stderr
    assert "Traceback" not in done.stderr
    # 2 ranks do not divide 1 lane; the message names the usable world sizes
    done = run_cli(*tiny(tmp_path / "run", "data.lanes=1"), ranks=2)
    assert done.returncode != 0
    assert "world size 2 does not divide the 1 lanes" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_recipe_is_refused_and_export_works(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_cli(*tiny(run, options=("--steps", "1"))).returncode == 0

    def files() -> dict[Path, int]:
        """All but the records of starts."""
        return {
            path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.parent.name != "starts"
        }

    before = files()
    done = run_cli(*tiny(run, "optim.lr=5e-4", "objective.beta=1.0"))
    assert done.returncode == 2
    assert "objective.beta was 2.0, is 1.0; optim.lr was 0.002, is 0.0005" in done.stderr
    assert files() == before

    from fdscale.engine import checkpoint
    from fdscale.models import backbone, convert

    reader = checkpoint.Reader(run / "checkpoints" / "step-00000001")
    args = {"img_size": 64, **reader.state["config"]["student"]["args"]}
    for names in ("fdscale", "official", "timm"):
        out = tmp_path / f"{names}.safetensors"
        done = run_cli("export", run, out, "--names", names)
        assert done.returncode == 0, done.stderr
        student = backbone("swin_v2", args)
        convert.load(student, convert.read(out))
        for name, parameter in student.named_parameters():
            assert (parameter == reader.full(f"backbone.{name}")).all(), (names, name)
    assert "ends in .safetensors" in run_cli("export", run, tmp_path / "weights.pth").stderr
    again = run_cli("export", run, tmp_path / "timm.safetensors")
    assert again.returncode == 2
    assert "--force" in again.stderr


@pytest.mark.slow
def test_a_mixture_has_the_shares_it_was_given_and_its_weights_are_part_of_the_run(
    tiny: Callable[..., list[str]], shards: Path, tmp_path: Path
) -> None:
    import shutil

    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(shards, other)
    mixed = (f"data.shards=[{shards}, {other}]", "data.lanes=8", "schedule.steps=125", "optim.batch_size=8")
    done = run_cli(*tiny(run, *mixed, "data.weights=[3, 1]", options=("--steps", "4")))
    assert done.returncode == 0, done.stderr
    done = run_cli(*tiny(run, *mixed, "data.weights=[1, 1]", options=("--steps", "8")))
    assert done.returncode == 2
    assert "data.weights was [3.0, 1.0], is [1.0, 1.0]" in done.stderr
    done = run_cli(*tiny(run, *mixed, "data.weights=[3, 1]", options=("--steps", "32")))
    assert done.returncode == 0, done.stderr
    log = [line.split("\t") for line in (run / "samples-0.log").read_text().splitlines()]
    assert [int(number) for number, _, _ in log] == list(range(256))
    share = sum(shard.startswith(f"{other}/") for _, shard, _ in log) / 256
    assert 0.15 < share < 0.35  # a period is 8000 numbers


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_divergence_stops_the_run_and_saves_nothing_broken(
    tiny: Callable[..., list[str]], tmp_path: Path, stage: int, ranks: int
) -> None:
    run, ds = tmp_path / "run", tmp_path / "ds.json"
    ds.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    # Each step multiplies decayed weights by 1 - lr * weight_decay = -1e19: float32 overflows within a few.
    broken = ("optim.lr=1e20", "optim.weight_decay=0.1", "schedule.warmup_steps=0", "schedule.steps=50", "save.every=1")
    done = run_cli(*tiny(run, *broken, options=("--ds", str(ds))), ranks=ranks)
    assert done.returncode == (3 if ranks == 1 else 1), done.stderr  # torchrun turns every failure into 1
    assert "the loss is not finite" in done.stderr
    from fdscale.engine import checkpoint

    for path in checkpoint.committed(run / "checkpoints"):
        reader = checkpoint.Reader(path)
        assert all(reader.full(name).isfinite().all() for name in reader.state["parameters"]), path


def test_sets_helper_matches_the_cli() -> None:
    assert cli.parser().parse_args(["distill", "demo", "--run", "x", *sets("a.b=1")]).set == ["a.b=1"]
