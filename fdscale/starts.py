"""The starts of a run: who owns its directory, and the record of each.

    RUN/starts/000001.json    one file per start, rewritten every few seconds by its rank 0 while it lives

The start with the highest number owns the directory. A number is taken by creating its file exclusively, which exactly
one process can do, also over NFS. Before the next number is taken, the owner must have ended, be dead, be an earlier
life of the same Slurm job, or show no sign of life for a while; signs are seen by change, never by comparing clocks,
which jump and differ between hosts. An owner that finds a higher number than its own is fenced: it stops without
saving. What it may still do before it notices, `fdscale.engine.checkpoint` makes impossible.

Nothing here imports torch, so that the listing of runs is quick.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from fdscale import UserError
from fdscale.durable import write, write_atomically

BEAT_S = 5.0  # between two signs of life
SILENT_BEATS = 3  # so many without a sign, and the owner counts as dead
LOOK_S = 0.25  # between two looks at an owner's sign of life


class Fenced(UserError):
    """Another start has taken the run over; what this one wanted to write was not written."""

    exit_code = 76


# ----------------------------------------------------------------------------------------------------------------------
# Time


def process_age_s() -> float:
    """Seconds since this process began, by the machine's uptime: a change of the clock does not show."""
    ticks = int(_stat("self")[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int | str) -> list[str]:
    """/proc/PID/stat from the state on (field 3): the name before it may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Clock:
    """Where the time of this process goes: each moment since it began belongs to one name."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self._marked_s = 0.0

    def mark(self, name: str) -> None:
        """The time since the last mark (at first: since the process began) went to this."""
        now = process_age_s()
        self.spent_s[name] = self.spent_s.get(name, 0.0) + max(now - self._marked_s, 0.0)
        self._marked_s = now

    def move(self, seconds: float, source: str, target: str) -> None:
        """So much of what went to one name was another's."""
        seconds = min(seconds, self.spent_s.get(source, 0.0))
        if seconds > 0:
            self.spent_s[source] -= seconds
            self.spent_s[target] = self.spent_s.get(target, 0.0) + seconds

    def mark_once(self, name: str) -> None:
        """`mark`, if nothing went to this yet."""
        if name not in self.spent_s:
            self.mark(name)


# ----------------------------------------------------------------------------------------------------------------------
# Records


def numbers(directory: Path) -> list[int]:
    """Numbers of the starts of a run, in order."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(int(name[:-5]) for name in os.listdir(directory / "starts") if re.fullmatch(r"\d+\.json", name))
    return []


def path_of(directory: Path, number: int) -> Path:
    """File of a start."""
    return directory / "starts" / f"{number:06d}.json"


def read(path: Path) -> dict[str, Any]:
    """A start's record; empty where a crash left none that is whole."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def sign(path: Path) -> tuple[Any, ...]:
    """Something that differs after every sign of life."""
    with contextlib.suppress(OSError), path.open("rb") as file:  # opened, so that NFS asks its server
        status = os.fstat(file.fileno())
        return status.st_ino, status.st_mtime_ns, file.read()
    return ()


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process of a record ran on this machine, where we would see it, and is no longer there."""
    return _is_of_this_machine(owner) and _exists(owner) is False


def is_here(owner: dict[str, Any]) -> bool:
    """Whether the process of a record runs on this machine."""
    return _is_of_this_machine(owner) and _exists(owner) is True


def _is_of_this_machine(owner: dict[str, Any]) -> bool:
    return (owner.get("boot"), owner.get("pid_namespace")) == (_boot(), _pid_namespace())


def _exists(owner: dict[str, Any]) -> bool | None:
    try:
        os.kill(owner["pid"], 0)
        state, *fields = _stat(owner["pid"])
        return state not in "ZX" and int(fields[18]) == owner["pid_start"]
    except ProcessLookupError:
        return False
    except (OSError, KeyError, TypeError, OverflowError):  # another user's process, hidden from us
        return None


def name_of(owner: dict[str, Any]) -> str:
    """A start as a person would look for it."""
    job = f"Slurm job {owner['job']}, " if owner.get("job") else ""
    return f"{job}host {owner.get('host', 'unknown')}, process {owner.get('pid', 'unknown')}"


def _identity() -> dict[str, Any]:
    return {
        "job": os.environ.get("SLURM_JOB_ID"),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "host": os.uname().nodename,
        "boot": _boot(),
        "pid": os.getpid(),
        "pid_start": int(_stat("self")[19]),
        "pid_namespace": _pid_namespace(),
    }


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def environment() -> dict[str, Any]:
    """What this process runs on: versions, command, machine, commit of the source tree when it is one."""
    import torch

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    packages = ("torch", "torchvision", "deepspeed", "timm", "webdataset", "numpy", "pillow", "safetensors", "fdscale")
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "packages": {name: version(name) for name in packages},
        "commit": _commit(),
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    with contextlib.suppress(OSError):  # a copy that `fdscale submit` made
        return (root / "COMMIT").read_text().strip()
    if not (root / ".git").exists():
        return None
    try:
        describe = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return describe.stdout.strip()


def exit_code(error: BaseException) -> int:
    """With which code an exception ends the process."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


# ----------------------------------------------------------------------------------------------------------------------
# Ownership


class Start:
    """One start, owner of its run directory until it ends or is fenced. Made by `claim`."""

    def __init__(self, directory: Path, number: int, record: dict[str, Any], clock: Clock):
        self.directory, self.number = directory, number
        self.token = record["token"]  # sorts as the starts do
        self.fenced = False  # whether a later start has taken the directory
        # Called, in a thread, where this start has not ended some beats later: it may wait for ranks that are no more.
        self.leave: Callable[[], object] = lambda: None
        self._record, self._clock = record, clock
        self._lock = threading.Lock()
        self._ending, self._withdrawn = threading.Event(), False
        self._thread = threading.Thread(target=self._live, name="starts", daemon=True)

    def note(self, **values: Any) -> None:
        """Put plain data into the record; it is written with the next sign of life."""
        with self._lock:
            self._record.update(values)

    def beat(self, durable: bool = False) -> None:
        """Write the record, then look whether this is still the highest number."""
        path = path_of(self.directory, self.number)
        with self._lock:
            if self._withdrawn:
                return
            self._record["beats"] += 1
            try:
                write_atomically(path, json.dumps(self._record | _now(self._clock)), durable)
            except OSError:  # a full disk is no reason to look dead
                with contextlib.suppress(OSError):
                    os.utime(path)
        self.look()  # after a write in that directory NFS asks its server what else is there

    def look(self) -> bool:
        """Whether a later start has taken the directory."""
        with contextlib.suppress(OSError):
            self.fenced |= max(numbers(self.directory), default=self.number) > self.number
        return self.fenced

    def end(self, code: int, why: str) -> None:
        """Give the directory back and write down how it ended; the first of several calls counts."""
        with self._lock:
            self._record.setdefault("ended", {"code": code, "why": why})
        self._ending.set()
        self.beat(durable=True)

    def withdraw(self) -> None:
        """Give the directory back as if this start had never been; also remove the directory where nothing is in it."""
        self._ending.set()
        with self._lock, contextlib.suppress(OSError):
            self._withdrawn = True
            path_of(self.directory, self.number).unlink()
            for folder in ("starts", "checkpoints", ""):
                with contextlib.suppress(FileNotFoundError):
                    (self.directory / folder).rmdir()

    def _live(self) -> None:
        fenced = 0
        while not self._ending.wait(BEAT_S):
            self.beat()
            fenced += self.fenced
            if fenced == SILENT_BEATS:
                self.leave()


def _now(clock: Clock) -> dict[str, Any]:
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    return {"seen": time.time(), "up_s": up_s, "alive_s": process_age_s(), "spent_s": dict(clock.spent_s)}


def claim(directory: Path, clock: Clock, say: Callable[[str], object]) -> Start:
    """Become the owner of a run directory; the caller's later writes there are its own.

    say gets what a person should know: whom we wait for, and from whom the directory was taken. Raises UserError where
    another owner lives, and OSError where the directory cannot be written.
    """
    (directory / "starts").mkdir(parents=True, exist_ok=True)
    mine = _identity()
    while True:
        last = max(numbers(directory), default=0)
        how = _freed(directory, last, mine, say) if last else ""
        if how is None:
            continue  # another one came first
        start = _take(directory, last + 1, mine, clock)
        if start is not None:
            if how:
                say(how)
            return start


def _freed(directory: Path, last: int, mine: dict[str, Any], say: Callable[[str], object]) -> str | None:
    """Wait until the newest start is known to live or to be over; how it ended where it did not say so itself.

    None where another one was made meanwhile. Raises UserError where it lives.
    """
    path = path_of(directory, last)
    first, since = sign(path), time.monotonic()
    told = False
    while max(numbers(directory), default=0) == last:
        owner = read(path)
        if owner.get("ended"):
            return ""
        if is_gone(owner):
            return f"the last start ({name_of(owner)}) ended without a word; going on from its last checkpoint"
        if mine["job"] and (owner.get("job"), owner.get("cluster")) == (mine["job"], mine["cluster"]):
            before = owner.get("restart", 0)
            if before < mine["restart"]:
                return f"taken over from restart {before} of this Slurm job ({name_of(owner)})"
            if before > mine["restart"]:
                raise UserError(
                    f"{directory} belongs to restart {before} of this Slurm job ({name_of(owner)}); this is restart "
                    f"{mine['restart']}, which Slurm has given up: nothing to do here"
                )
        if sign(path) != first:
            raise UserError(
                f"{directory} is in use: {name_of(owner)} is running there. Wait for it or stop it (scancel, or kill "
                f"-TERM), or name another --run directory"
            )
        if time.monotonic() - since > SILENT_BEATS * BEAT_S:
            return f"taken over from {name_of(owner)}: it showed no sign of life for {SILENT_BEATS * BEAT_S:g} s"
        if not told:
            say(
                f"{directory} was last used by {name_of(owner)}; looking whether it lives (at most "
                f"{SILENT_BEATS * BEAT_S:g} s)"
            )
            told = True
        time.sleep(min(LOOK_S, BEAT_S))
    return None


def _take(directory: Path, number: int, mine: dict[str, Any], clock: Clock) -> Start | None:
    """The start of this number, or None where another process has it."""
    record = {**mine, "token": f"{number:06d}-{secrets.token_hex(4)}", "beats": 0}
    record["began"] = time.time() - process_age_s()
    path = path_of(directory, number)
    draft = path.with_name(f".{record['token']}.tmp")
    try:
        write(draft, json.dumps(record | _now(clock)))
        try:
            os.link(draft, path)  # whole from the first moment, and one process alone can do it, also over NFS
        except FileExistsError:
            if (
                read(path).get("token") != record["token"]
            ):  # else it was us: NFS repeats a message whose answer got lost
                return None
        except FileNotFoundError:  # a later start has tidied up
            return None
        except OSError:  # a file system without links
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                return None
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    for leftover in path.parent.glob(".*.tmp"):  # of those killed while writing
        if leftover.name < f".{number:06d}":  # who wanted this number too tidies up himself
            leftover.unlink(missing_ok=True)
    start = Start(directory, number, record, clock)
    start._thread.start()
    return start
