"""What is around a run on this machine: driver, limits, shared memory, Slurm, and file systems."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
TRIED = 64 * 2**20  # bytes written and read on a file system
SLOW = 50e6  # bytes/s
SKEW = 2.0  # s
OPEN_FILES = 4096


@dataclass(frozen=True)
class Finding:
    """One line: `ok`, `missing` (something will not work), `warning` (it will, badly) or `optional`."""

    state: str
    what: str
    detail: str


def surroundings() -> list[Finding]:
    """All that needs no path."""
    return [driver(), nvcc(), open_files(), *locked_memory(), shared_memory(), slurm()]


def driver() -> Finding:
    """NVIDIA's driver, and NCCL."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        version = first.partition("Kernel Module")[2].split()[0]
    except (OSError, IndexError):
        version = ""
    if not torch.cuda.is_available():
        if version:
            why = f"{version}, and torch, built for CUDA {torch.version.cuda}, finds no GPU: is it too old for that?"
            return Finding("warning", "driver", why)
        return Finding("ok", "driver", "none, as there is no GPU")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("ok", "driver", f"{version or 'version unknown'}, for CUDA {torch.version.cuda}; NCCL {nccl}")


def nvcc() -> Finding:
    """The compiler, which is wanted for memory.kernels=cuda alone."""
    path = shutil.which("nvcc")
    if path is None:
        return Finding(
            "optional",
            "nvcc",
            "optional: builds the CUDA kernels (FDSCALE_BUILD_CUDA=1 pip install .); Triton's need none",
        )
    last = _told(path, "--version").splitlines()[-1:] or [""]
    return Finding("ok", "nvcc", f"{path}: {last[0]}")


def open_files() -> Finding:
    """How many a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        return Finding(
            "warning",
            "open files",
            f"{soft} (ulimit -n), of at most {hard}: shards and workers may need {OPEN_FILES}; ulimit -n {hard}",
        )
    return Finding("ok", "open files", f"{'unlimited' if soft < 0 else soft} (ulimit -n)")


def locked_memory(infiniband: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """Whether InfiniBand, where there is any, may pin memory."""
    if not infiniband.is_dir() or not any(infiniband.iterdir()):
        return []
    cards = ", ".join(sorted(path.name for path in infiniband.iterdir()))
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        return [
            Finding(
                "warning",
                "InfiniBand",
                f"{cards}; a process may lock {soft} bytes (ulimit -l): NCCL wants unlimited; ask the administrator",
            )
        ]
    return [Finding("ok", "InfiniBand", cards)]


def shared_memory(folder: str = "/dev/shm") -> Finding:
    """What data workers pass batches through."""
    try:
        found = shutil.disk_usage(folder)
    except OSError as error:
        return Finding("warning", "shared memory", f"{folder}: {error.strerror}: data.workers=0 does without")
    text = f"{folder}: {found.free / GIB:.1f} of {found.total / GIB:.1f} GiB free"
    if found.free < GIB:
        return Finding(
            "warning",
            "shared memory",
            f"{text}; data workers pass batches through it: docker run --shm-size=16g, or fewer workers",
        )
    return Finding("ok", "shared memory", text)


def slurm() -> Finding:
    """The scheduler."""
    if shutil.which("sbatch") is None:
        return Finding(
            "optional", "Slurm", "optional: none here; torchrun starts ranks on one machine, or on several by hand"
        )
    job = os.environ.get("SLURM_JOB_ID")
    inside = f"in job {job}" if job else "not in a job: look again with `srun --gpus 1 fdscale doctor`"
    version = _told("sbatch", "--version").strip()
    if not job and not _told("sinfo", "-h", "-o", "%P").strip():
        what = f"{version or 'sbatch'} is here, but no controller answers to sinfo: see slurm.conf"
        return Finding("warning", "Slurm", what)
    return Finding("ok", "Slurm", f"{version}; {inside}")


def file_system(folder: str, now: Callable[[], float] = time.time) -> list[Finding]:
    """Room, speed and clock of where data or checkpoints lie; what is written there is removed again."""
    path, what = Path(folder), f"path {folder}"
    if not path.is_dir():
        return [Finding("missing", what, "no such directory; name one that is there")]
    free = shutil.disk_usage(path).free
    room = Finding("ok" if free > 10 * GIB else "warning", what, f"{free / GIB:.1f} GiB free")
    file = path / f".fdscale-doctor-{uuid.uuid4().hex}"
    block = os.urandom(2**20)
    try:
        start = time.perf_counter()
        with open(file, "wb") as out:
            for _ in range(TRIED // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        written = TRIED / (time.perf_counter() - start)
        skew = file.stat().st_mtime - now()
        with open(file, "rb") as back:
            os.posix_fadvise(back.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory would be measured
            start = time.perf_counter()
            while back.read(len(block)):
                pass
            read = TRIED / (time.perf_counter() - start)
    except OSError as error:
        return [
            room,
            Finding("warning", what, f"cannot be written ({error.strerror}): good for data alone, not for runs"),
        ]
    finally:
        file.unlink(missing_ok=True)
    slow = min(written, read) < SLOW
    speed = f"{written / 1e6:.0f} MB/s written and synced, {read / 1e6:.0f} MB/s read, one file of {TRIED >> 20} MiB"
    found = [
        room,
        Finding("warning" if slow else "ok", what, speed + ("; a slow disk: saves and data will wait" if slow else "")),
    ]
    if abs(skew) > SKEW:
        text = (
            f"its clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's: dates in logs will "
            "not agree; let both follow NTP"
        )
        found.append(Finding("warning", what, text))
    return found


def _told(*command: str) -> str:
    """What a program says, nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
