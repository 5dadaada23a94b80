"""`fdscale runs`: what became of the runs below a directory, and where their time went. Only reads, without torch.

Goodput is the time of steps that count over the time that processes of the run lived; both are taken from the records
of its starts (`fdscale.starts`), which measure time by the machine's uptime, so that no change of a clock bends it.
"""

from __future__ import annotations

import contextlib
import json as json_module
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdscale import UserError, starts
from fdscale.durable import as_json

WIDE = 140  # columns of a terminal from which on there is room for where the time went
DEPTH = 4  # levels of directories below a given one that are looked through
TAIL_BYTES = 2**18  # of metrics.jsonl
STARTING = ("import", "init", "build", "load", "data", "first_step")
STATES = {0: "done", 3: "diverged", 74: "hung", 75: "stopped", 76: "fenced"}
SHARES = (
    ("heldout_top1", "top-1"),
    ("heldout_miou", "mIoU"),
    ("heldout_box_ap", "box AP"),
)  # shown where a run has them
COLOURS = {"running": "green", "starting": "green", "done": "cyan", "stopped": "yellow", "paused": "yellow"}


def main(directories: list[str], json: bool, ranks: bool = False) -> int:
    """`fdscale runs`."""
    for directory in directories:
        if not Path(directory).is_dir():
            raise UserError(f"{directory}: no such directory; expected run directories, or one that holds some")
    found = [run for directory in directories for run in find(Path(directory))]
    rows = [{"run": str(run), "ranks": read_ranks(run)} for run in found] if ranks else survey(found)
    if json:
        print(as_json(rows, indent=1))
    elif rows and ranks:
        for row in rows:
            _print_ranks(**row)
    elif rows:
        _print(rows)
    else:
        print(f"no runs below {', '.join(directories)}")
    return 0


def find(directory: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Run directories at or below a directory, in order of their names."""
    if (directory / "starts").is_dir():
        yield directory
    elif depth:
        with contextlib.suppress(PermissionError):
            for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
                if entry.is_dir() and not entry.name.startswith("."):
                    yield from find(Path(entry.path), depth - 1)


def survey(runs: list[Path]) -> list[dict[str, Any]]:
    """A row for each run; whether those on other machines live takes a few seconds where clocks do not say."""
    newest = [starts.path_of(run, max(starts.numbers(run), default=1)) for run in runs]
    alive = [_lives(starts.read(path)) for path in newest]
    unsure = {index: starts.sign(newest[index]) for index, answer in enumerate(alive) if answer is None}
    if unsure:
        time.sleep(1.5 * starts.BEAT_S)
    for index, before in unsure.items():
        alive[index] = starts.sign(newest[index]) != before
    return [describe(run, bool(answer)) for run, answer in zip(runs, alive, strict=True)]


def _lives(record: dict[str, Any]) -> bool | None:
    """Whether a start's process lives; None where only time will tell."""
    if record.get("ended") or starts.is_gone(record):
        return False
    if starts.is_here(record) or 0 <= time.time() - _number(record, "seen") < starts.SILENT_BEATS * starts.BEAT_S:
        return True
    return None


def describe(run: Path, alive: bool) -> dict[str, Any]:
    """All there is to know about a run, as plain data; documented in docs/running.md."""
    records = [starts.read(starts.path_of(run, number)) for number in starts.numbers(run)]
    last = records[-1] if records else {}
    begun: dict[str, Any] = next((record for record in reversed(records) if "step" in record), {})
    saved = newest_whole(run / "checkpoints")
    ended = last.get("ended") or {}
    if ended.get("code") == 2 and last is not begun and begun.get("ended"):  # refused before it did anything
        ended = begun["ended"]
    step, goal = begun.get("step", 0), begun.get("goal")
    return {
        "run": str(run),
        "state": _state(ended, alive, "step" in last, goal is not None and step < goal),
        "exit_code": ended.get("code"),
        "why": ended.get("why"),
        **{key: last.get(key) for key in ("job", "host", "pid", "seen")},
        "step": step,
        "steps": goal,
        "checkpoint_step": saved,
        "restarts": len(records) - 1,
        **_last_values(run / "metrics.jsonl"),
        **account(records, None if alive or ended.get("code") == 0 else saved or 0),
        "last_start_s": last.get("spent_s"),
    }


def _state(ended: dict[str, Any], alive: bool, trains: bool, more: bool) -> str:
    if alive:
        return "running" if trains else "starting"
    if not ended:
        return "vanished"  # killed, or its machine was lost
    state = STATES.get(ended.get("code", 1), "failed")
    return "paused" if state == "done" and more else state


def newest_whole(checkpoints: Path) -> int | None:
    """Step of the newest checkpoint whose files are there in full; their contents are not read."""
    for path in sorted(checkpoints.glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            files = json_module.loads((path / "manifest.json").read_text())["files"]
            if all((path / file["name"]).stat().st_size == file["bytes"] for file in files):
                return int(path.name.removeprefix("step-"))
    return None


def _last_values(metrics: Path) -> dict[str, Any]:
    """The last loss, held-out loss and speed in a log that may be torn, or written to just now."""
    values: dict[str, Any] = dict.fromkeys(("loss", "heldout_loss", *(key for key, _ in SHARES), "images_per_s"))
    with contextlib.suppress(FileNotFoundError), metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # the first line may be cut, and one that a crash tore
                record = json_module.loads(line)
                values.update({key: record[key] for key in values if key in record})
    return values


# ----------------------------------------------------------------------------------------------------------------------
# Where the time went


def account(records: list[dict[str, Any]], saved_step: int | None) -> dict[str, float | None]:
    """Goodput and where the rest of the time went, in seconds, over all starts.

    saved_step: where the next start would go on; None while the run lives or is done. A step counts once: what a later
    start did again is lost. The first step of a start counts as starting, since it does what the later ones need not.
    """
    sums = dict.fromkeys(("wall_s", "useful_s", "starting_s", "evaluation_s", "saving_s", "lost_s", "down_s"), 0.0)
    later, after = math.inf if saved_step is None else saved_step, None
    for record in reversed(records):
        spent = record.get("spent_s") if isinstance(record.get("spent_s"), dict) else {}
        alive = _number(record, "alive_s")
        kept, steps = 0.0, _number(record, "steps")
        if "from_step" in record:
            low = _number(record, "from_step")
            kept = max(min(_number(record, "step"), later) - low, 0)
            later = min(later, low)
        training = _number(spent, "steps")
        useful = training * min(max(kept - 1, 0) / max(steps - 1, 1), 1)
        sums["wall_s"] += alive
        sums["useful_s"] += useful
        sums["lost_s"] += training - useful + _number(spent, "rollback")
        sums["starting_s"] += sum(_number(spent, name) for name in STARTING)
        sums["evaluation_s"] += _number(spent, "evaluation")
        sums["saving_s"] += _number(spent, "saving")
        sums["down_s"] += 0 if after is None else _gap_s(record, after)
        after = record
    known = sum(value for key, value in sums.items() if key not in ("wall_s", "down_s"))
    goodput = sums["useful_s"] / sums["wall_s"] if sums["wall_s"] else None
    return {"goodput": goodput, **sums, "other_s": max(sums["wall_s"] - known, 0.0)}


def _gap_s(record: dict[str, Any], after: dict[str, Any]) -> float:
    """Seconds from the last sign of life of a start to the beginning of the next."""
    same = record.get("boot") is not None and record.get("boot") == after.get("boot")
    if same:
        return max(_number(after, "up_s") - _number(after, "alive_s") - _number(record, "up_s"), 0.0)
    return max(_number(after, "began") - _number(record, "seen"), 0.0)  # there are only the clocks of two machines


def _number(record: dict[str, Any], key: str) -> float:
    """A number of a record that a crash or a person may have changed; 0 where there is none."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# For a person


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    shown = [(key, name) for key, name in SHARES if any(row[key] is not None for row in rows)]
    numbers = (
        "step",
        "saved",
        "loss",
        "held-out",
        *(name for _, name in shown),
        "images/s",
        "restarts",
        "goodput",
    )
    console = _console()
    rest = ("the rest",) if console.width >= WIDE else ()
    for name in ("run", "state", *numbers, *rest):
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in rows:
        table.add_row(
            row["run"],
            _state_line(row),
            f"{row['step']}/{row['steps'] or '?'}",
            _shown(row["checkpoint_step"], "{:d}"),
            _shown(row["loss"], "{:.4f}"),
            _shown(row["heldout_loss"], "{:.4f}"),
            *(_shown(row[key], "{:.2%}") for key, _ in shown),
            _shown(row["images_per_s"], "{:.1f}"),
            str(row["restarts"]),
            _shown(row["goodput"], "{:.1%}"),
            *((_rest(row),) if rest else ()),
            style=COLOURS.get(row["state"], "red"),
        )
    console.print(table)


def read_ranks(run: Path) -> list[dict[str, Any]]:
    """How fast each rank was in the last steps, the one that the others wait for first; empty for one rank."""
    try:
        rows = json_module.loads((run / "ranks.json").read_text())
        return sorted(rows, key=lambda row: -row["data_wait_s"][0] - row["inputs_s"][0])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{run / 'ranks.json'} is not readable ({error!r}); the next log line of the run replaces it"
        ) from None


def _print_ranks(run: str, ranks: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title=run, title_justify="left", box=None, pad_edge=False)
    for name in ("rank", "host", "steps", "step s", "data wait s", "inputs s"):
        table.add_column(name, justify="left" if name == "host" else "right")
    for row in ranks:
        spans = (row["step_s"], row["data_wait_s"], row["inputs_s"])
        table.add_row(*(str(row[key]) for key in ("rank", "host", "steps")), *map(_percentiles, spans))
    _console().print(table if ranks else f"{run}: one rank, or no log line yet")


def _console() -> Any:
    """As wide as the terminal; without one, as wide as it takes."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 1000
    return Console(highlight=False, markup=False, soft_wrap=True, width=width)


def _percentiles(seconds: list[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in seconds)


def _state_line(row: dict[str, Any]) -> str:
    if row["state"] in ("running", "starting"):
        return f"{row['state']} on {row['host']}" + (f", job {row['job']}" if row["job"] else "")
    if row["state"] == "vanished":
        return f"vanished on {row['host']}" + (f", job {row['job']}" if row["job"] else "")
    if row["state"] == "stopped":
        return f"stopped by {row['why']}"
    return f"failed ({row['exit_code']}): {str(row['why'])[:60]}" if row["state"] == "failed" else row["state"]


def _shown(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _rest(row: dict[str, Any]) -> str:
    if not row["wall_s"]:
        return ""
    names = ("starting", "evaluation", "saving", "lost", "other")
    shares = [f"{name} {row[f'{name}_s'] / row['wall_s']:.0%}" for name in names if row[f"{name}_s"] > 0]
    return ", ".join(shares) + (f"; down {_duration(row['down_s'])}" if row["down_s"] >= 1 else "")


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
