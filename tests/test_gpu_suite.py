"""The GPU suite where there is no GPU: its parts on tiny shapes, its report, and what it does when things go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, outside

from fdscale.bench import (
    attention,
    baselines,
    checks,
    curves,
    floor,
    giant,
    gpu,
    gpu_report,
    paths,
    protocol,
    tables,
    timing,
)
from fdscale.kernels.attention import NAMES
from fdscale.models.swin_v2 import SIZES, SwinV2

CPU = torch.device("cpu")


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fdscale.bench.gpu", "--out", str(out), "--device", "cpu", *words]
    return subprocess.Popen(command, cwd=ROOT, env=outside(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
@pytest.mark.slow
def test_the_whole_suite_on_a_cpu(tmp_path: Path) -> None:
    process = start(tmp_path / "report")
    printed, wrong = process.communicate(timeout=300)
    assert process.returncode == 0, printed + wrong
    report = json.loads((tmp_path / "report" / "gpu.json").read_text())
    states = {name: part["state"] for name, part in report["parts"].items()}
    assert states == {part.name: "done" for part in gpu.PARTS} | dict.fromkeys(
        ("build", "memcheck", "racecheck"), "skipped"
    )
    results = {name: part["result"] for name, part in report["parts"].items()}
    assert results["tests"]["failed"] == 0
    assert results["tests"]["skipped"] > 20
    assert set(results["determinism"]["paths"]) >= {"reference", "torch", "triton"}  # triton in its interpreter
    assert results["curves"]["differences"]["torch"]["max"] < 1e-4
    assert results["curves"]["differences"]["reference, again"]["max"] == 0
    assert results["curves"]["differences"]["reference, another seed"]["max"] > 1e-4
    assert set(results["attention"]["layers"]) == {shape.layer for shape in protocol.TINY}
    text = (tmp_path / "report" / "gpu.md").read_text()
    for title in gpu_report.TITLES.values():
        assert f"\n## {title}\n" in text
    assert "it needs a GPU" in text


@pytest.mark.long
@pytest.mark.slow
def test_the_giant_suite_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fdscale.bench.giant", "--out", str(tmp_path), "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--only", "384 px", giant.SAVE], cwd=ROOT, env=outside(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "giant.json").read_text())["parts"]
    assert set(parts["384 px"]["measured"]["ways"]) == {"fdscale", "official"}
    assert parts["384 px"]["planned_bytes"] > 0
    kept = parts[giant.SAVE]
    assert kept["checkpoint_bytes"] > 12 * 20_000  # master weights and two moments, in float32
    assert [record["step"] for record in kept["steps"] if record["loss"] is not None] == [1, 2, 3, 4]
    assert len(kept["starts"]) == 2
    assert not (tmp_path / "parts" / "run").exists()
    report = (tmp_path / "giant.md").read_text()
    assert "\n| 384 px, batch 1 | official |" in report
    assert "## Save and resume" in report


@pytest.mark.slow
def test_a_part_of_the_giant_suite_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giant, "RECIPE", "no_such_recipe")
    assert giant.main(["--out", str(tmp_path), "--device", "cpu", "--only", "192 px"]) == 1
    assert "no recipe is called 'no_such_recipe'" in (tmp_path / "giant.md").read_text()


@pytest.mark.slow
def test_a_report_that_is_interrupted_has_what_was_done(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "machine", "attention", "model")
    deadline = time.monotonic() + 60
    log = tmp_path / "parts" / "attention.log"
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, wrong = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the report has what was done" in wrong
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["state"] for name, part in parts.items()} == {"machine": "done", "attention": "interrupted"}
    assert "| Window attention | interrupted" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "report")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "no CUDA device" in said.err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_place_that_cannot_be_written_to_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert gpu.main(["--device", "cpu", "--out", str(file / inside)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(file) in said
    assert "expected a directory" in said
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    command = ["sh", "-c", "sleep 300 & echo $!; echo begun; wait"]
    assert gpu.run_within(command, 1.0, tmp_path / "log", dict(os.environ)) is None
    child, said = (tmp_path / "log").read_text().split()
    assert said == "begun"
    stat = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_part_that_leaves_nothing_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = gpu.Suite(tmp_path, "cpu", 60)
    monkeypatch.setattr(gpu.Suite, "_command", lambda *_: ["sh", "-c", "echo no luck; exit 7"])
    assert suite.run(["machine", "model"]) == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["state"] for part in parts.values()] == ["failed", "failed"]
    assert parts["model"]["why"] == "exit code 7"
    assert parts["model"]["log_end"] == "no luck\n"
    assert "    no luck" in (tmp_path / "gpu.md").read_text()


def test_the_report_is_written_whatever_is_missing() -> None:
    parts = {
        name: {"state": "timed out", "why": "late", "seconds": 1.0, "problems": [], "result": result}
        for name in gpu_report.TITLES
        for result in [{}]
    }
    report = {"device": "cuda", "started": "now", "seconds": 1.0, "parts": parts}
    assert gpu_report.markdown(report).count("timed out: late") == 2 * len(parts)


def test_failures_of_pytest_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="b" time="1.5"/><testcase classname="a" name="c" time="1">'
        '<failure message="off by one">x</failure></testcase><testcase classname="a" name="d" time="0"><skipped/>'
        "</testcase></testsuite></testsuites>"
    )
    found = gpu.read_tests(tmp_path / "t.xml")
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "seconds": 2.5, "failures": {"a.c": "off by one"}}
    assert gpu_report.problems("tests", found) == ["a.c: off by one"]


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        (["ERROR SUMMARY: 0 errors"], []),
        (["RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"], []),
        (["ERROR SUMMARY: 12 errors"], ["ERROR SUMMARY: 12 errors"]),
        ([], ["no summary was printed"]),
    ],
)
def test_what_a_sanitizer_found_is_a_problem(lines: list[str], problems: list[str]) -> None:
    assert gpu_report.problems("racecheck", {"summary": lines}) == problems


# --- the table of window attention ------------------------------------------------------------------------------------


def test_the_layers_are_those_of_swinv2_g() -> None:
    rows = {row.layer: row for row in protocol.ROWS}
    assert len(rows) == len(protocol.ROWS)
    for name, (side, window, _) in protocol.CONFIGS.items():
        model = _on_meta(4 * side, window)
        for stage, layer in enumerate(model.layers, 1):
            row, attn = rows[f"G {name}, stage {stage}"], layer.blocks[0].attn
            assert attn.window == (row.window, row.window)
            assert row.heads == SIZES["G"]["num_heads"][stage - 1]
            shift = layer.blocks[1].attn.shift(*row.size)
            assert (f"G {name}, stage {stage}, shifted" in rows) == any(shift)
            if any(shift):
                assert (rows[f"G {name}, stage {stage}, shifted"].shift,) * 2 == shift


def _on_meta(pixels: int, window: int) -> Any:
    with torch.device("meta"):
        return SwinV2(img_size=pixels, window_size=window, **(SIZES["G"] | {"depths": (2, 2, 2, 2)}))


@pytest.mark.parametrize(
    ("layer", "scores", "flops", "forward", "backward"),  # by hand: 1e9, 1e9, MB, MB
    [(0, 0.0425, 5.44, 77, 153), (1, 0.0671, 8.59, 68, 136), (2, 0.170, 21.7, 77, 154), (3, 0.328, 41.9, 55, 111)],
)
def test_the_work_of_stage_3(layer: int, scores: float, flops: float, forward: float, backward: float) -> None:
    work = floor.counts(protocol.ROWS[layer])
    assert work["forward"].exps == work["backward"].exps == pytest.approx(1e9 * scores, rel=5e-3)
    assert work["forward"].flops == pytest.approx(1e9 * flops, rel=5e-3)
    assert work["backward"].flops == pytest.approx(2.5e9 * flops, rel=5e-3)
    assert work["forward"].bytes == pytest.approx(1e6 * forward, rel=3e-2)
    assert work["backward"].bytes == pytest.approx(1e6 * backward, rel=3e-2)


def test_the_floor_is_the_longest_of_what_was_measured() -> None:
    shape = protocol.ROWS[2]
    work = floor.counts(shape)["forward"]
    found = floor.floors(shape, floor.Rates(work.bytes / 2, work.exps / 3, work.flops / 1))["forward"]
    assert found == {"seconds": pytest.approx(3.0), "binds": "exps"}
    assert floor.floors(shape, floor.Rates(work.bytes / 2, 0.0, work.flops))["forward"]["binds"] == "bytes"


@pytest.mark.parametrize("shift", [0, 2])
def test_flex_attention_and_a_frozen_bias_compute_the_same(shift: int) -> None:
    shape = attention.Shape("", 2, 8, 4, shift, 2, 12)
    leaves = attention.random_inputs(shape, CPU, torch.float32)
    ways, left_out = baselines.of_others(leaves, 4, shift, compiled=False)
    assert set(left_out) >= {"FlexAttention", "official, compiled", "SDPA, compiled"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not compiled, it has N x N scores: that is how it can be tested here
        expected = baselines.official(*leaves, 4, shift)
        outs = {name: way.attend(*leaves) for name, way in ways.items()}
        outs["FlexAttention"] = baselines.flex(*leaves, 4, shift)
    for name, out in outs.items():
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_protocol_measures_every_way_and_names_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("not on this | machine\nat all")

    monkeypatch.setattr(baselines, "sdpa", broken)
    path = tmp_path / "a.json"
    assert protocol.run(protocol.TINY[:1], CPU, protocol.Effort(0.05, None, 0), path, resume=False) == 0
    layer = json.loads(path.read_text())["layers"][protocol.TINY[0].layer]
    assert layer["ways"]["SDPA"]["failed"] == "RuntimeError: not on this | machine"
    printed = capsys.readouterr().out
    assert "| SDPA | failed: RuntimeError: not on this \\| machine |" in printed
    assert "triton left out: it needs an NVIDIA GPU" in printed
    for name in ("official", "reference", "torch"):
        record = layer["ways"][name]
        assert set(record["seconds"]) == {"forward", "backward"}
        assert all(error < 1e-4 for error in record["errors"].values()), name
        assert set(record["errors"]) == set(protocol.RESULTS)
    assert layer["ways"]["torch"]["kept_bytes"] < layer["ways"]["official"]["kept_bytes"]


def test_what_breaks_the_gpu_is_left_out_of_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, effort = tmp_path / "a.json", protocol.Effort(0.02, None, 0)
    started: list[str] = []
    turn = protocol.Layer._turn

    def breaking(self: protocol.Layer, name: str, *rest: Any, **more: Any) -> None:
        started.append(name)
        if name == "torch":
            raise RuntimeError("illegal memory access")
        turn(self, name, *rest, **more)

    def check(_: torch.device, name: str, why: str) -> None:
        raise protocol.Broken(name, why)

    monkeypatch.setattr(protocol.Layer, "_turn", breaking)
    monkeypatch.setattr(protocol, "_check_context", check)
    rows = protocol.TINY[:1]
    assert protocol.run(rows, CPU, effort, path, resume=True) == protocol.BROKEN
    assert json.loads(path.read_text())["broken"] == {"torch": "RuntimeError: illegal memory access"}
    started.clear()
    assert protocol.run(rows, CPU, effort, path, resume=True) == 0
    assert "torch" not in started
    result = json.loads(path.read_text())
    assert result["layers"][rows[0].layer]["ways"]["torch"]["failed"].startswith("broke the GPU's context")
    assert gpu_report.problems("attention", result) == [
        "torch broke the GPU's context: RuntimeError: illegal memory access"
    ]


def test_no_layer_is_begun_after_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert protocol.run(protocol.TINY, CPU, protocol.Effort(0.05, 0.0, 0), path, resume=False) == 0
    assert json.loads(path.read_text())["not_measured"] == [shape.layer for shape in protocol.TINY]


def test_replayed_times_are_preferred_and_bounds_are_no_rivals() -> None:
    def way(median: float, **more: Any) -> dict[str, Any]:
        return {"seconds": {"forward": {"median": 9.0}, "forward, replayed": {"median": median}}, **more}

    layer = {"ways": {"official": way(4.0), "SDPA": way(2.0), "frozen": way(0.5, exact=False), "torch": way(1.0)}}
    assert tables.best_of_others(layer, "forward", NAMES) == ("SDPA", 2.0)
    assert tables.median({"seconds": {"forward": {"median": 9.0}}}, "forward") == 9.0


# --- whole networks ---------------------------------------------------------------------------------------------------


def test_every_path_computes_the_same_network() -> None:
    module = curves.student(0).backbone.eval()
    images = torch.randn(2, 3, curves.SIDE, curves.SIDE)
    names, _ = paths.names(module, CPU, others=True)
    assert {"reference", "torch", "official", "SDPA"} <= set(names)
    outs = {}
    for name in names:
        with torch.no_grad(), paths.computed_by(name, module):
            outs[name] = module(images)
    for name, out in outs.items():
        torch.testing.assert_close(out, outs["reference"], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert not torch.equal(outs["official"], outs["torch"])  # else the paths were not taken


def test_differences_of_curves() -> None:
    assert curves.difference([1.0, 3.0], [1.0, 2.0]) == {"max": 0.5, "mean": 0.25, "last": 3.0}


def test_what_differs_between_runs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    place = checks.CPU[0]
    assert checks.repeats("torch", place, torch.float32, CPU, 2) == "same"
    plain, calls = checks.results, []

    def wandering(*given: Any) -> list[torch.Tensor]:
        calls.append(1)
        out, d_qkv, d_table, d_scale = plain(*given)
        return [out, d_qkv, d_table + len(calls), d_scale * float("nan")]

    monkeypatch.setattr(checks, "results", wandering)
    assert checks.repeats("torch", place, torch.float32, CPU, 3) == "scale not finite, table differs, scale differs"


def test_percentiles_of_times() -> None:
    found = timing.summary([float(i) for i in range(101)])
    assert found == {"median": 50.0, "p10": pytest.approx(10.0), "p90": pytest.approx(90.0), "count": 101}
    calls: list[str] = []
    taken = timing.times([lambda: calls.append("a"), lambda: calls.append("b")], 0.001, CPU)
    assert len(taken) == len(calls) > 2
    assert calls[:4] == ["a", "b", "a", "b"]
