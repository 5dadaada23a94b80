"""The GPU suite: one command that checks and measures all kernels on whatever CUDA machine it is started on.

    make gpu                                        # or, with the torch that is installed there:
    python3 -m fdscale.bench.gpu --out gpu-report

It needs no network and nothing but torch and triton (and pytest, for the tests). It takes less than nine minutes, each
part in a process and with a limit of its own, so that what fails or hangs loses nothing else:

    machine       device, driver, clocks, versions
    build         the CUDA kernels, where nvcc is and they are not built yet
    tests         pytest -m gpu: numerics and gradients of all paths
    determinism   ten runs of each path, compared to the bit
    curves        a short training by each path against the reference
    attention     the table of `fdscale bench attention`
    fused         the table of `fdscale bench fused`
    model         the table of `fdscale bench model`
    memcheck      compute-sanitizer over small shapes, where it is installed
    racecheck     likewise

DIR/gpu.json and DIR/gpu.md are rewritten after each part, from what it left in DIR/parts. Exit code: 0 all is well, 1
not all, 2 there is no GPU or no place for the report. `--device cpu` runs on tiny shapes what a CPU can, to test the
suite itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fdscale import UserError
from fdscale.bench import gpu_report, machine, protocol
from fdscale.bench.timing import save
from fdscale.kernels import build

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 515.0
STARTING_S = 15.0  # that a part keeps of its limit for starting and for what is under way at the end
GRACE_S = 10.0  # between asking a part to end and ending it
INTERRUPTED = 130
SANITIZER = "compute-sanitizer"


class Part(NamedTuple):
    """A part and its share of the time, in seconds of SECONDS; what a part leaves, those after it have."""

    name: str
    share: float


PARTS = (
    Part("machine", 15),
    Part("build", 40),
    Part("tests", 95),
    Part("determinism", 40),
    Part("curves", 40),
    Part("attention", 145),
    Part("fused", 35),
    Part("model", 45),
    Part("memcheck", 30),
    Part("racecheck", 30),
)


def main(argv: Sequence[str] | None = None) -> int:
    """The suite, or one part of it in this process (--part, which the suite uses)."""
    words = argparse.ArgumentParser("python -m fdscale.bench.gpu", description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("--out", default="gpu-report", metavar="DIR", help="where the report goes (default: gpu-report)")
    words.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: tiny shapes, to test the suite")
    words.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help=f"in all (default: {SECONDS:.0f})")
    words.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts only")
    words.add_argument("--part", help=argparse.SUPPRESS)
    given = words.parse_args(argv)
    try:
        if given.device == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA device is visible to torch here; --device cpu tests the suite itself")
        out = Path(given.out)
        with _putting_right(out):
            out.mkdir(parents=True, exist_ok=True)
            if given.part:
                return run_part(given.part, out, torch.device(given.device), given.seconds)
            return Suite(out, given.device, given.seconds).run(given.only or [part.name for part in PARTS])
    except UserError as error:
        print(f"fdscale: {error}", file=sys.stderr)
        return error.exit_code


@contextlib.contextmanager
def _putting_right(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; expected a directory that can be written to") from None


def run_part(name: str, out: Path, device: torch.device, seconds: float) -> int:
    """One part, in this process. Results go to DIR/NAME.json as they come."""
    from fdscale.bench import checks, curves, fused, model

    gpu, path = device.type == "cuda", out / f"{name}.json"
    left_s = max(seconds - STARTING_S, 1.0)
    if name == "machine":
        save(path, machine.describe(device))
    elif name == "determinism":
        checks.determinism(device, path)
    elif name == "curves":
        curves.run(device, path)
    elif name == "attention":
        effort = protocol.Effort(6.0, left_s, 4) if gpu else protocol.Effort(0.3, None, 0)
        return protocol.run(protocol.ROWS if gpu else protocol.TINY, device, effort, path, resume=True)
    elif name == "fused":
        fused.measure(device, path=path)
    elif name == "model":
        model.run(device, 5.0 if gpu else 0.3, left_s, path)
    elif name in ("memcheck", "racecheck"):
        checks.once(device)
    return 0


class Suite:
    """A run of the suite: what came of each part, and the report."""

    def __init__(self, out: Path, device: str, seconds: float) -> None:
        self.out, self.parts, self.device = out, out / "parts", device
        self.end_s = time.monotonic() + seconds
        started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        self.report: dict[str, Any] = {"started": started, "device": device, "seconds": seconds, "parts": {}}

    def run(self, names: Sequence[str]) -> int:
        """All parts named, in order; the exit code."""
        shutil.rmtree(self.parts, ignore_errors=True)
        self.parts.mkdir()
        before = signal.signal(signal.SIGTERM, _interrupt)
        parts = [part for part in PARTS if part.name in names]
        try:
            for number, part in enumerate(parts):
                left_s = self.end_s - time.monotonic()
                seconds = left_s * part.share / sum(later.share for later in parts[number:])
                self._part(part.name, seconds)
        except KeyboardInterrupt:
            print("fdscale: interrupted; the report has what was done", file=sys.stderr)
            return INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, before)
        done = self.report["parts"].values()
        print(f"report: {self.out / 'gpu.md'}")
        return 0 if all(part["state"] in ("done", "skipped") and not part["problems"] for part in done) else 1

    def _part(self, name: str, seconds: float) -> None:
        """Run a part within so many seconds, and write the report."""
        start_s = time.monotonic()
        record = {"state": "interrupted", "why": "", "seconds": 0.0, "problems": [], "result": {}}
        self.report["parts"][name] = record
        why = self._cannot_run(name)
        log = self.parts / f"{name}.log"
        try:
            if why:
                record |= {"state": "skipped", "why": why}
            else:
                print(f"{name} ({seconds:.0f} s at most) ...", flush=True)
                record["state"], record["why"] = self._start(name, log, seconds)
        finally:
            record["seconds"] = round(time.monotonic() - start_s, 1)
            if not why:
                self._read(name, log, record)
            save(self.out / "gpu.json", self.report)
            (self.out / "gpu.md").write_text(gpu_report.markdown(self.report))
        print(f"{name}: {gpu_report.verdict(name, record)}", flush=True)

    def _cannot_run(self, name: str) -> str:
        """Why a part is skipped, or nothing."""
        if name in ("memcheck", "racecheck"):
            if self.device != "cuda":
                return "it needs a GPU"
            return "" if sanitizer() else f"{SANITIZER} is not on the PATH"
        if name == "build":
            return why_not_build(self.device)
        if name == "tests":
            if importlib.util.find_spec("pytest") is None:
                return "pytest is not installed"
            return "" if test_files() else f"there are no tests in {ROOT / 'tests'}"
        return ""

    def _command(self, name: str, seconds: float) -> list[str]:
        if name == "build":
            return [sys.executable, "-m", "fdscale.kernels.build"]
        if name == "tests":
            # Compiling the kernels of all windows takes longest; several processes share it.
            several = (
                ["-n", str(min(16, os.cpu_count() or 1))]
                if importlib.util.find_spec("xdist") and self.device == "cuda"
                else []
            )
            junit = f"--junitxml={self.parts.resolve() / 'tests.xml'}"
            options = ["-m", "gpu", "-p", "no:cacheprovider", junit, *several]
            return [sys.executable, "-m", "pytest", *options, *(str(path) for path in test_files())]
        part = [sys.executable, "-m", "fdscale.bench.gpu", "--part", name, "--out", str(self.parts.resolve())]
        part += ["--device", self.device, "--seconds", f"{seconds:.0f}"]
        return [str(sanitizer()), "--tool", name, *part] if name in ("memcheck", "racecheck") else part

    def _start(self, name: str, log: Path, seconds: float) -> tuple[str, str]:
        """Run a part's process, again where it left out what broke the GPU's context: its state, and why."""
        end_s = time.monotonic() + seconds
        while True:
            left_s = end_s - time.monotonic()
            code = run_within(self._command(name, left_s), left_s, log, self._environment(name))
            if code is None:
                return "timed out", f"it did not end within {seconds:.0f} s"
            if name != "attention" or code != protocol.BROKEN or end_s - time.monotonic() < STARTING_S:
                return ("done", "") if code == 0 else ("failed", f"exit code {code}")

    def _environment(self, name: str) -> dict[str, str]:
        found = environment()
        found.pop("PYTEST_ADDOPTS", None)  # may send the tests' own report elsewhere
        if name in ("memcheck", "racecheck"):  # each tensor an allocation of its own, whose bounds are then watched
            found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        if self.device == "cpu" and name == "determinism":
            found["TRITON_INTERPRET"] = "1"
        return found

    def _read(self, name: str, log: Path, record: dict[str, Any]) -> None:
        """What a part left, whole or not, and what is wrong with it."""
        text = log.read_text(errors="replace") if log.exists() else ""
        try:
            if name == "tests":
                record["result"] = read_tests(self.parts / "tests.xml")
            elif name == "build":
                record["result"] = {"said": text.strip()[-500:]}
            elif name in ("memcheck", "racecheck"):
                summaries = re.findall(r"={3,} (\w+ SUMMARY: .*)", text)
                record["result"] = {"summary": summaries, "ran": re.findall(r"^ran (\w+)", text, re.M)}
            else:
                record["result"] = json.loads((self.parts / f"{name}.json").read_text())
        except (OSError, ValueError, ElementTree.ParseError) as error:
            record["why"] = record["why"] or f"it left no result ({error})"
            record["state"] = "failed" if record["state"] == "done" else record["state"]
        record["problems"] = gpu_report.problems(name, record["result"])
        if record["state"] not in ("done", "skipped"):
            record["log_end"] = text[-3000:]


def test_files() -> list[Path]:
    """The files with tests that need a GPU; the others may need packages that are not there."""
    return [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]


def why_not_build(device: str) -> str:
    """Why the CUDA kernels are not built here, or nothing."""
    if device != "cuda":
        return "it needs a GPU"
    try:
        build.find_nvcc()
    except SystemExit as error:
        return str(error)
    made = build.LIBRARY.stat().st_mtime if build.LIBRARY.exists() else 0.0
    newest = max(path.stat().st_mtime for path in build.SOURCES.iterdir())
    return f"{build.LIBRARY.name} is there and newer than its sources" if made > newest else ""


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    return shutil.which(SANITIZER, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin")))


def environment() -> dict[str, str]:
    """Of a part's process: this repository's code, whatever is installed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_within(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """Run a command in a session of its own, its output appended to a log: its exit code, or None past its time.

    Past its time, and when this process is interrupted, it is asked to end, and then ended with all that it started.
    """
    with log.open("a") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
        )
    try:
        return process.wait(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        _end(process)
        return None
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen) -> None:
    """First as by Ctrl-C, so that pytest writes its report."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)


def read_tests(path: Path) -> dict[str, Any]:
    """Counts of pytest's JUnit file, and every failure with the end of its message."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "failures": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        found["seconds"] += float(case.get("time") or 0)
        wrong = [child for child in case if child.tag in ("failure", "error")]
        state = "failed" if wrong else "skipped" if case.find("skipped") is not None else "passed"
        found[state] += 1
        for child in wrong:
            found["failures"][f"{case.get('classname')}.{case.get('name')}"] = (child.get("message") or "")[-500:]
    return found


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
