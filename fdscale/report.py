"""`fdscale report`: one HTML file about a run, living or ended, that needs nothing else to be read.

Curves, where the time went, starts, pictures, settings, environment. Only reads, without torch.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import html
import io
import json as json_module
import math
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fdscale import UserError, __version__, runs, starts
from fdscale.durable import as_json, write_atomically
from fdscale.svg import Line, Points, chart, standalone

MOST_PICTURE_BYTES = 3 * 2**20  # of all pictures together
PICTURES = (".png", ".jpg", ".jpeg")
CURVES = (  # keys of metrics.jsonl, title, unit
    (("loss", "heldout_loss"), "Loss", ""),
    (("heldout_top1", "heldout_top5"), "Held-out accuracy", "share of images"),
    (("heldout_miou", "heldout_macc"), "Held-out segmentation", "share"),
    (("heldout_box_ap", "heldout_mask_ap"), "Held-out average precision", "share"),
    (("lr",), "Learning rate", ""),
    (("grad_norm",), "Gradient norm", ""),
    (("images_per_s",), "Throughput", "images/s"),
    (("data_wait_s", "save_stall_s"), "Waiting", "s in a step"),
    (("mem_gib",), "Memory", "GiB at most"),
)
SPENT = ("useful", "starting", "evaluation", "saving", "lost", "other")


def main(run: str, compare: str | None, pictures: list[str], data: str | None, out: str | None) -> int:
    """Write the report, and its data where they are wanted, and say where."""
    for one in filter(None, (run, compare)):
        if not (Path(one) / "starts").is_dir():
            raise UserError(f"{one} is no run directory: it holds no starts/; `fdscale runs DIR` finds runs")
    path = Path(run).resolve()
    for folder in pictures:
        if not Path(folder).is_dir():
            raise UserError(f"--pictures {folder}: no such folder")
    shown = [Path(folder).resolve() for folder in pictures]
    target = Path(out) if out is not None else Path(run) / "report.html"
    other = Path(compare).resolve() if compare else None
    text = page(path, other, shown)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, text)
    except OSError as error:
        raise UserError(f"{target}: could not be written ({error}); name another with --out") from None
    if data is not None:
        try:
            write_data(path, other, text, Path(data))
        except OSError as error:
            raise UserError(f"{data}: could not be written ({error}); name another with --data") from None
    print(f"{target} ({len(text.encode()) / 1024:.0f} KiB): open it in a browser; it needs no network")
    return 0


def page(run: Path, other: Path | None, pictures: list[Path]) -> str:
    """The whole page."""
    about = runs.survey([run])[0]
    records = [starts.read(starts.path_of(run, number)) for number in starts.numbers(run)]
    name = " beside ".join(names(run, other))
    sections = [
        ("curves", "Curves", _curves(run, other, records)),
        ("time", "Where the time went", _time(about)),
        ("starts", "Starts", _starts(records)),
        ("diagnosis", "Diagnosis", "".join(_diagnosis(folder) for folder in pictures)),
        ("pictures", "Pictures", _pictures([run / "predictions", *pictures])),
        ("settings", "Settings", _settings(run, other)),
        ("environment", "Environment", _environment(records)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{identity}">{title}</a>' for identity, title, _ in sections)
    body = "".join(f'<section id="{identity}"><h2>{title}</h2>{text}</section>' for identity, title, text in sections)
    style = (resources.files("fdscale") / "report.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>fdscale: {html.escape(name)}</title><style>{style}</style></head><body>"
        f'<a class="skip" href="#main">To the content</a><header><h1>{html.escape(name)}</h1>{_cards(about)}'
        f'<nav aria-label="Sections">{links}</nav></header><main id="main">{body}</main>'
        f"<footer><p>fdscale {__version__}, {html.escape(str(run.resolve()))}</p></footer></body></html>\n"
    )


def names(run: Path, other: Path | None) -> list[str]:
    """Of each run the end of its path, as much of it as tells them apart."""
    known = [one.resolve().parts for one in (run, other) if one is not None]
    ends = range(1, max(map(len, known)) + 1)
    last = next((end for end in ends if len({parts[-end:] for parts in known}) == len(known)), 1)
    return ["/".join(parts[-last:]) for parts in known]


def _cards(about: dict[str, Any]) -> str:
    """The run in a few numbers."""
    steps = f"{about['step']} of {about['steps'] or '?'}"
    rows = [("state", about["state"]), ("step", steps), ("saved at step", about["checkpoint_step"])]
    rows += [(key.replace("_", " "), about[key]) for key in ("loss", "heldout_loss", "images_per_s")]
    rows += [(name, None if about[key] is None else f"{about[key]:.2%}") for key, name in runs.SHARES]
    rows += [("restarts", about["restarts"])]
    rows += [("goodput", None if about["goodput"] is None else f"{about['goodput']:.1%}")]
    known = (
        (name, f"{value:.5g}" if isinstance(value, float) else str(value)) for name, value in rows if value is not None
    )
    cards = "".join(f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>" for name, value in known)
    return f'<div class="cards">{cards}</div>'


def _curves(run: Path, other: Path | None, records: list[dict[str, Any]]) -> str:
    """A chart for every line of CURVES, and of each loss that the task has besides."""
    sets = [("", read_metrics(run))] + ([(f" of {names(run, other)[1]}", read_metrics(other))] if other else [])
    marks = [record["from_step"] for record in records[1:] if isinstance(record.get("from_step"), int)]
    parts = sorted({key for _, rows in sets for row in rows for key in row if key.startswith("loss_")})
    wanted = [*CURVES, *(((key,), key.replace("_", " ").capitalize(), "") for key in parts)]
    charts = []
    for keys, title, unit in wanted:
        lines = [
            Line(f"{key.replace('_', ' ')}{suffix}", points(rows, key), 2 * place + number)
            for number, (suffix, rows) in enumerate(sets)
            for place, key in enumerate(keys)
        ]
        charts.append(chart(f"c-{keys[0]}", title, unit, [line for line in lines if line.points], marks))
    found = "".join(charts)
    note = "<p>Dashed lines: where a later start went on.</p>" if marks else ""
    return f'{note}<div class="charts">{found}</div>' if found else ""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of a step the last; torn ones, as a crash or a write just now leaves them, are left
    out."""
    rows: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                record = json_module.loads(line)
                step = record.get("step")
                if isinstance(step, int) and not isinstance(step, bool):
                    rows[step] = record
    return [rows[step] for step in sorted(rows)]


def points(rows: list[dict[str, Any]], key: str) -> Points:
    """(step, value) wherever a line has the key; what is no number is a gap."""
    found: Points = []
    for row in rows:
        if key in row:  # null stands for what is not finite
            value = row[key]
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            found.append((row["step"], float(value) if good else math.nan))
    return found


def _time(about: dict[str, Any]) -> str:
    if not about["wall_s"]:
        return ""
    spent = [(name, about[f"{name}_s"]) for name in SPENT if about[f"{name}_s"]]
    rows = [(name, f"{seconds:.1f} s", f"{seconds / about['wall_s']:.1%}") for name, seconds in spent]
    down = f"<p>Between starts: {about['down_s']:.0f} s.</p>" if about["down_s"] >= 1 else ""
    return table(("what", "time", "of all"), rows) + down


def _starts(records: list[dict[str, Any]]) -> str:
    rows = []
    for number, record in enumerate(records, start=1):
        ended = record.get("ended") or {}
        code, why = ended.get("code"), ended.get("why")
        how = "no end on record" if code is None else runs.STATES.get(code, f"code {code}")
        told = f"{how}: {why}" if why else how
        rows.append((number, *(record.get(key) for key in ("host", "job", "from_step", "step")), told))
    return table(("start", "host", "job", "from step", "to step", "how it ended"), rows) if rows else ""


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Of texts, which are escaped; None is an empty cell."""
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    cells = ("".join(f"<td>{html.escape('' if cell is None else str(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _diagnosis(folder: Path) -> str:
    """What `fdscale diagnose` has written there, a row for each block; empty where it has not."""
    try:
        subjects = json_module.loads((folder / "diagnosis.json").read_text())["subjects"]
        rows = [
            (
                subject["name"],
                number,
                f"{min(block['distance_px']):.1f} to {max(block['distance_px']):.1f}",
                "one head" if block["similarity"] is None else f"{block['similarity']:.3f}",
                *(f"{sum(block[name]) / len(block[name]):.3f}" for name in ("diagonality", "columns")),
            )
            for subject in subjects
            for number, block in enumerate(subject["blocks"])
        ]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/diagnosis.json is not what `fdscale diagnose` writes ({error})") from None
    head = ("network", "block", "distance of heads, px", "likeness of heads", "diagonal", "columns")
    return table(head, rows) if rows else ""


def write_data(run: Path, other: Path | None, text: str, folder: Path) -> None:
    """curves.csv, (run, step, key, value) of every number in metrics.jsonl; report.json, what is known of the runs; and
    the charts of a page as .svg files. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    known = [one for one in (run, other) if one is not None]
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(("run", "step", "key", "value"))
    for name, one in zip(names(run, other), known, strict=True):
        for record in read_metrics(one):
            writer.writerows(
                (name, record["step"], key, value)
                for key, value in record.items()
                if key != "step" and isinstance(value, (int, float, str)) and not isinstance(value, bool)
            )
    write_atomically(folder / "curves.csv", rows.getvalue())
    about = [
        {"name": name, "config": read_config(one), **runs.survey([one])[0]}
        for name, one in zip(names(run, other), known, strict=True)
    ]
    write_atomically(folder / "report.json", as_json(about, indent=1) + "\n")
    for name, drawing in standalone(text, (resources.files("fdscale") / "report.css").read_text()):
        write_atomically(folder / f"{name}.svg", drawing)


def _pictures(folders: list[Path]) -> str:
    """All pictures of the folders inside the page, as far as they fit."""
    found, room, left_out = [], MOST_PICTURE_BYTES, 0
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix.lower() not in PICTURES:
                continue
            size = path.stat().st_size
            if size > room:
                left_out += 1
                continue
            room -= size
            kind = "png" if path.suffix.lower() == ".png" else "jpeg"
            data = base64.b64encode(path.read_bytes()).decode()
            name = html.escape(f"{folder.name}/{path.name}")
            found.append(
                f'<figure><img loading="lazy" alt="{name}" src="data:image/{kind};base64,{data}">'
                f"<figcaption>{name}</figcaption></figure>"
            )
    more = (
        f"<p>{left_out} more were left out: a page holds {MOST_PICTURE_BYTES >> 20} MiB of pictures.</p>"
        if left_out
        else ""
    )
    return f'<div class="charts">{"".join(found)}</div>{more}' if found else more


def _settings(run: Path, other: Path | None) -> str:
    """What differs between the runs, or all that is set."""
    ours = dict(flat(read_config(run)))
    if not ours:
        return ""
    if other is None:
        everything = table(("key", "value"), ours.items())
        return f"<details><summary>{len(ours)} keys of config.yaml</summary>{everything}</details>"
    theirs = dict(flat(read_config(other)))
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    rows = [(key, ours.get(key, "-"), theirs.get(key, "-")) for key in keys]
    return table(("key", *names(run, other)), rows) if rows else "<p>The same in both.</p>"


def read_config(run: Path) -> dict[str, Any]:
    """config.yaml as plain data; empty where it is not there or torn."""
    with contextlib.suppress(OSError, yaml.YAMLError):
        tree = yaml.safe_load((run / "config.yaml").read_text())
        return tree if isinstance(tree, dict) else {}
    return {}


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json_module.dumps(value)


def _environment(records: list[dict[str, Any]]) -> str:
    """Of the last start."""
    if not records:
        return ""
    last = records[-1]
    rows = [(key, last.get(key)) for key in ("host", "device", "world", "platform", "python", "commit")]
    rows += (last.get("packages") or {}).items()
    command = " ".join(str(word) for word in last.get("command") or ())
    text = table(("what", "version"), [row for row in rows if row[1] is not None])
    text += f"<h3>Command</h3><pre>{html.escape(command)}</pre>"
    if ds := last.get("ds_config"):
        text += f"<h3>ds_config</h3><pre>{html.escape(json_module.dumps(ds, indent=1))}</pre>"
    return text
