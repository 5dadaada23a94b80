"""One trial: real steps of a job, in processes of their own, so that whatever becomes of them is only a result.

    python -m fdscale.tune.trial SPEC     what such a process runs; SPEC is a JSON file that `measure` writes

The steps run through the real loop, on the recipe's data and with its teacher, and nothing is saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fdscale import config

PARTS = 3  # the steps that are measured come in so many; one more before them warms up
NO_MEMORY = re.compile(r"out of memory|OutOfMemory|can't allocate memory|Cannot allocate memory|MemoryError", re.I)
SAID = re.compile(r"(\[rank\d+\]: )?(fdscale: |[\w.]+Error: )")  # by a person's error, or at the end of a traceback
MOST_SAID = 1000  # characters of a reason
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
GRACE_S = 45.0  # torchrun gives its ranks 30


def measure(
    folder: Path, settings: config.Config, ds: dict[str, Any], world: int, steps: int, limit_s: float
) -> dict[str, Any]:
    """A record of what came of it: state (done, out of memory, failed, timed out), and of a done one the seconds of a
    step in each part (parts_s), data_wait_s and mem_gib, of rank 0.

    folder: is emptied. Ctrl-C ends the processes, too.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "ds_config.json").write_text(json.dumps(ds))
    spec = {"config": config.as_dict(settings), "steps": steps, "folder": str(folder)}
    (folder / "spec.json").write_text(json.dumps(spec))
    start = time.monotonic()
    with (folder / "output.log").open("w") as output:
        process = subprocess.Popen(
            [*launcher(world), "-m", "fdscale.tune.trial", str(folder / "spec.json")],
            stdout=output, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    record = _outcome(folder, code, limit_s)
    return record | {"seconds": round(time.monotonic() - start, 1)}


def launcher(world: int) -> list[str]:
    """What starts python as so many ranks."""
    if world > 1 and os.environ.get("SLURM_JOB_ID") and shutil.which("srun"):
        return ["srun", f"--ntasks={world}", "--kill-on-bad-exit=1", sys.executable]
    if world > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return [sys.executable]


def _environment() -> dict[str, str]:
    """This process's, without what makes it a rank."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in ours}


def _end(process: subprocess.Popen) -> None:
    """With all that it started: torchrun's ranks are in sessions of their own, and end when it is asked to."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def _outcome(folder: Path, code: int | None, limit_s: float) -> dict[str, Any]:
    text = (folder / "output.log").read_text(errors="replace")
    if code is None:
        return {"state": "timed out", "why": f"no end within {limit_s:g} s"}
    if code != 0:
        full = NO_MEMORY.search(text) or code in KILLED or "exitcode  : -9 " in text
        return {"state": "out of memory" if full else "failed", "why": _why(text) or f"exit code {code}"}
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = [row for row in rows if "step_s" in row][1:]
    return {
        "state": "done",
        "parts_s": [row["step_s"] for row in parts],
        "data_wait_s": statistics.median(row["data_wait_s"] for row in parts),
        "mem_gib": max(row["mem_gib"] for row in parts),
    }


def _why(text: str) -> str:
    """The line that says what went wrong, with the next one where it only announces that; of a very long one both ends,
    since what to do stands at the end."""
    lines = [line.strip() for line in text.splitlines()]
    at = next((number for number, line in enumerate(lines) if SAID.match(line)), None)
    if at is None:
        return ""
    told = " ".join(filter(None, lines[at : at + 1 + lines[at].endswith(":")]))
    return told if len(told) <= MOST_SAID else f"{told[: MOST_SAID // 2]} ... {told[-MOST_SAID // 2 :]}"


def main(spec: Path) -> int:
    """Run the steps of a trial, as one of its ranks."""
    from fdscale import dist, distill, finetune

    told = json.loads(spec.read_text())
    settings = config.from_dict(told["config"], str(spec))
    folder, steps = Path(told["folder"]), told["steps"]
    run = distill.distill if config.task_of(settings) == "distill" else finetune.finetune
    last = steps + steps // PARTS
    code = run(settings, folder / "run", ds=str(folder / "ds_config.json"), stop_at=last, saves=False)
    dist.close()
    return code


if __name__ == "__main__":
    from fdscale import UserError

    try:
        sys.exit(main(Path(sys.argv[1])))
    except UserError as error:
        sys.exit(f"fdscale: {error}")
