"""One page about a run: whole, living, torn or broken; well-formed, without network, every picture and chart named."""

from __future__ import annotations

import csv
import html.parser
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdscale import UserError, cli, report
from fdscale.report import flat, page, points, read_metrics
from fdscale.svg import Line, chart, short, thinned, ticks

VOID = {"meta", "img", "br", "hr", "link", "input", "line", "circle", "polyline"}


class Strict(html.parser.HTMLParser):
    """Tags that are opened are closed, and identities are said once."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identities: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if "id" in known:
            self.identities.append(known["id"])
        self.links += [known[key] for key in ("href", "src") if known.get(key)]
        if tag == "img":
            self.images.append(known)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> Strict:
    found = Strict()
    found.feed(text)
    assert found.open == []
    assert len(set(found.identities)) == len(found.identities)
    assert all(link.startswith(("#", "data:image/")) for link in found.links)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.identities)
    assert all(image.get("alt") for image in found.images)
    return found


def write_run(folder: Path, steps: int = 40, lr: float = 1e-3) -> Path:
    """A run of two starts, the second of which goes on from step 20."""
    (folder / "starts").mkdir(parents=True)
    (folder / "predictions").mkdir()
    for number, (low, high, ended) in enumerate(((0, 23, None), (20, steps, {"code": 0, "why": ""})), start=1):
        record = {
            "host": "node<1>", "from_step": low, "step": high, "goal": steps, "steps": high - low, "alive_s": 100.0,
            "spent_s": {"steps": 80.0, "import": 5.0}, "began": 1.0, "seen": 2.0, "boot": "a", "pid": 1,
            "packages": {"torch": "2.14"}, "command": ["fdscale", "distill", "--set", "a<b"], "ds_config": {"x": 1},
        }  # fmt: skip
        (folder / f"starts/{number:06d}.json").write_text(json.dumps(record | ({"ended": ended} if ended else {})))
    rows = [
        {"step": n, "loss": math.exp(-n / 20), "lr": lr, "grad_norm": 1.0, "loss_decode": 0.5} for n in range(steps)
    ]
    rows.insert(9, {"step": 9, "loss": 5.0})
    rows[30]["loss"] = "NaN"  # of step 29
    rows[-1] |= {"heldout_loss": 0.25, "heldout_miou": 0.5}
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:5], '{"step": 4, "lo', *lines[5:], '{"step": 39']))
    (folder / "config.yaml").write_text(f"optim: {{lr: {lr}}}\nstudent: {{model: vit, args: {{}}}}\n")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "predictions/000001.png")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run <1>")


def test_a_page_says_all_and_needs_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert "it needs no network" in capsys.readouterr().out
    found = parsed((run / "report.html").read_text())
    assert [name for name in found.identities if not name.startswith("c-")] == [
        "main", "curves", "time", "starts", "pictures", "settings", "environment",
    ]  # fmt: skip
    for text in ("run <1>", "node<1>", "a<b", "mIoU", "50.00%", "Loss decode", "no end on record", "3 keys"):
        assert text in found.text, text
    assert {"c-loss", "c-lr", "c-grad_norm", "c-heldout_miou", "c-loss_decode"} <= set(found.identities)
    assert (run / "report.html").read_text().count('class="mark"') >= 4  # where the second start went on
    assert len(found.images) == 1


def test_a_run_named_by_a_dot_has_its_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "predictions")
    words = ("report", "..", "--compare", "..", "--pictures", ".", "--data", str(tmp_path / "data"))
    assert cli.main([*words]) == 0
    text = (run / "report.html").read_text()
    assert "<title>fdscale: run &lt;1&gt; beside run &lt;1&gt;</title>" in text
    assert [image["alt"] for image in parsed(text).images] == ["predictions/000001.png"] * 2
    assert {row["run"] for row in csv.DictReader((tmp_path / "data/curves.csv").open())} == {"run <1>"}
    assert {one["name"] for one in json.loads((tmp_path / "data/report.json").read_text())} == {"run <1>"}


def test_two_runs_stand_beside_each_other(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", lr=3e-3)
    found = parsed(page(run, other, []))
    assert "loss of other" in found.text
    assert "optim.lr" in found.text
    assert "student.model" not in found.text
    assert "The same in both." in parsed(page(run, write_run(tmp_path / "again"), [])).text


def test_what_a_page_shows_is_there_as_files(run: Path, tmp_path: Path) -> None:
    other, folder = write_run(tmp_path / "other", lr=3e-3), tmp_path / "data"
    assert cli.main(["report", str(run), "--compare", str(other), "--data", str(folder)]) == 0
    rows = list(csv.reader((folder / "curves.csv").open()))
    assert rows[0] == ["run", "step", "key", "value"]
    assert ["other", "0", "lr", "0.003"] in rows
    assert sum(row[:3] == ["run <1>", "39", "heldout_miou"] for row in rows) == 1
    assert sum(row[2] == "loss" for row in rows) == 80
    about = json.loads((folder / "report.json").read_text())
    assert [(one["name"], one["config"]["optim"]["lr"]) for one in about] == [("run <1>", 1e-3), ("other", 3e-3)]
    assert about[0]["step"] == 40
    charts = {path.stem for path in folder.glob("*.svg")}
    assert {"loss", "lr", "grad_norm", "heldout_miou", "loss_decode"} <= charts
    for path in folder.glob("*.svg"):
        root = xml.etree.ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}title").text


def test_runs_whose_folders_have_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other, folder = write_run(tmp_path / "a/run"), write_run(tmp_path / "b/run"), tmp_path / "data"
    assert cli.main(["report", str(one), "--compare", str(other), "--data", str(folder)]) == 0
    rows = list(csv.reader((folder / "curves.csv").open()))[1:]
    assert {row[0] for row in rows} == {"a/run", "b/run"}
    assert [about["name"] for about in json.loads((folder / "report.json").read_text())] == ["a/run", "b/run"]
    text = parsed((one / "report.html").read_text()).text
    assert "a/run beside b/run" in text
    assert "loss of b/run" in text


def test_a_diagnosis_is_shown_as_a_table(run: Path, tmp_path: Path) -> None:
    block = {"distance_px": [3.0, 9.5], "similarity": math.nan, "diagonality": [0.25, 0.75], "columns": [0.5]}
    (tmp_path / "found").mkdir()
    (tmp_path / "found/diagnosis.json").write_text(json.dumps({"subjects": [{"name": "<s>", "blocks": [block] * 2}]}))
    found = parsed(page(run, None, [tmp_path / "found"]))
    assert "diagnosis" in found.identities
    for text in ("<s>", "3.0 to 9.5", "0.500", "nan"):
        assert text in found.text
    (tmp_path / "found/diagnosis.json").write_text("{}")
    with pytest.raises(UserError, match="is not what `fdscale diagnose` writes"):
        page(run, None, [tmp_path / "found"])


def test_torn_lines_and_missing_files_are_passed_over(run: Path) -> None:
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(40))
    assert rows[9]["loss"] == pytest.approx(math.exp(-9 / 20))  # the last line of a step
    values = dict(points(rows, "loss"))
    assert math.isnan(values[29])
    assert math.isnan(points([{"step": 1, "loss": None}], "loss")[0][1])  # as the run writes what is not finite
    for name in ("metrics.jsonl", "config.yaml"):
        (run / name).unlink()
    shutil.rmtree(run / "predictions")
    assert "c-loss" not in parsed(page(run, None, [])).identities


def test_what_is_no_run_or_cannot_be_written_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        ([str(tmp_path)], "is no run directory"),
        ([str(run), "--compare", str(tmp_path)], "is no run directory"),
        ([str(run), "--pictures", str(tmp_path / "none")], "none: no such folder"),
        ([str(run), "--out", str(run / "metrics.jsonl" / "x.html")], "could not be written"),
    ):
        assert cli.main(["report", *words]) == 2
        assert says in capsys.readouterr().err


def test_pictures_that_do_not_fit_are_counted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = tmp_path / "more"
    more.mkdir()
    for name in ("a.png", "b.jpg", "c.txt"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3)).astype(np.uint8)).save(
            more / name, "PNG" if name != "b.jpg" else "JPEG"
        )
    assert len(parsed(page(run, None, [more])).images) == 3
    monkeypatch.setattr(report, "MOST_PICTURE_BYTES", 5000)
    found = parsed(page(run, None, [more]))
    assert "more were left out" in found.text
    assert len(found.images) < 3
    monkeypatch.setattr(report, "MOST_PICTURE_BYTES", 10)
    assert "more were left out" in parsed(page(run, None, [more])).text  # of none that fits, too


def test_a_chart_keeps_peaks_gaps_and_single_points() -> None:
    line = [(float(x), math.sin(x / 50)) for x in range(5000)]
    line[1234] = (1234.0, 9.0)
    line[3456] = (3456.0, math.nan)
    kept = thinned(line)
    assert len(kept) <= 400
    assert (1234.0, 9.0) in kept
    assert line[3456] in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    line[5], line[8] = (5.0, -9.0), (8.0, 9.0)
    line[2], line[20] = (2.0, math.nan), (20.0, math.nan)  # of one stretch, before and after its ends
    for gap in (2, 20, 3456):
        numbers = [x for x, y in thinned(line) if math.isfinite(y)]
        before, after = max((x for x in numbers if x < gap), default=0), min(x for x in numbers if x > gap)
        assert any(math.isnan(y) for x, y in thinned(line) if before <= x <= after), gap
    text = chart("x", "Title <b>", "s", [Line("a", [(0, 1), (1, math.nan), (2, 3), (3, 4)], 0), Line("none", [], 1)])
    assert text.count("<polyline") == 1
    assert text.count("<circle") == 1
    assert "Title &lt;b&gt;" in text
    assert parsed(text).text.count("not finite") == 1
    assert chart("x", "t", "", [Line("a", [(0, math.nan)], 0)]) == ""
    assert "<svg" in chart("x", "t", "", [Line("a", [(5, 2.0)], 0)])


def test_ticks_and_numbers() -> None:
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.31, 0.52, 5) == [0.3, 0.35, 0.4, 0.45, 0.5, 0.55]
    assert len(ticks(3, 3, 5)) > 1
    for low, high in ((-1e-9, 2e-9), (1e5, 3.3e7), (-5, 1)):
        found = ticks(low, high, 5)
        assert found[0] <= low + 1e-12
        assert found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 8
    assert [short(value) for value in (0, 1234567.0, 0.00001, 0.12345678)] == ["0", "1.23e+06", "1.00e-05", "0.12346"]
    assert dict(flat({"a": {"b": 1, "c": {}}, "d": [1, 2]})) == {"a.b": "1", "a.c": "{}", "d": "[1, 2]"}


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize(("width", "dark"), [(360, False), (1200, True)])
def test_a_browser_shows_it_on_a_phone_and_in_the_dark(run: Path, tmp_path: Path, width: int, dark: bool) -> None:
    cli.main(["report", str(run)])
    picture = tmp_path / "page.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1500"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    target = (run / "report.html").as_uri()
    done = subprocess.run(
        [BROWSER, *options, f"--screenshot={picture}", target], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape[1] >= width
    corner = pixels[2, 2]
    assert (corner.max() < 60) == dark, corner
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # lines, letters
    command = [BROWSER, *options, "--dump-dom", target]
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"<svg[^>]*role=\"img\"", dump.stdout)
