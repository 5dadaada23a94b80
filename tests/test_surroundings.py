"""What `fdscale doctor` says of a machine, with the limits and file systems of this one and worse ones."""

from __future__ import annotations

import json
import os
import resource
import stat
import time
from pathlib import Path

import pytest

from fdscale import cli, surroundings
from fdscale.surroundings import file_system, locked_memory, nvcc, open_files, shared_memory, slurm


def program(folder: Path, name: str, says: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_file_system_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, speed = file_system(str(tmp_path))
    assert "GiB free" in room.detail
    assert "MB/s written and synced" in speed.detail
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(surroundings, "SLOW", 1e15)
    assert file_system(str(tmp_path))[1].state == "warning"
    *_, skewed = file_system(str(tmp_path), now=lambda: time.time() + 100)
    assert "its clock is 100 s behind" in skewed.detail
    assert [one.state for one in file_system(str(tmp_path / "none"))] == ["missing"]


def test_a_full_or_read_only_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    assert "No space left on device" in file_system(str(tmp_path))[1].detail
    assert list(tmp_path.iterdir()) == []


def test_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = {resource.RLIMIT_NOFILE: (1024, 1_048_576), resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    assert (open_files().state, "ulimit -n 1048576" in open_files().detail) == ("warning", True)
    assert locked_memory(tmp_path / "none") == []
    (tmp_path / "mlx5_0").mkdir()
    (found,) = locked_memory(tmp_path)
    assert (found.state, "mlx5_0" in found.detail, "65536 bytes" in found.detail) == ("warning", True, True)
    limits |= {resource.RLIMIT_NOFILE: (65536, 65536), resource.RLIMIT_MEMLOCK: (resource.RLIM_INFINITY,) * 2}
    assert (open_files().state, locked_memory(tmp_path)[0].state) == ("ok", "ok")


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_memory(str(tmp_path / "none")).state == "warning"
    usage = type("usage", (), {"free": 60 * 2**20, "total": 64 * 2**20})
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda folder: usage)
    found = shared_memory()
    assert (found.state, "--shm-size" in found.detail) == ("warning", True)


def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (slurm().state, nvcc().state) == ("optional", "optional")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "sbatch", "slurm 23.11.4")
    program(tmp_path, "sinfo", "")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert (slurm().state, "no controller answers" in slurm().detail) == ("warning", True)
    program(tmp_path, "sinfo", "main*")
    program(tmp_path, "nvcc", "Build cuda_13.0.r13.0")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "slurm 23.11.4; not in a job" in slurm().detail
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert slurm().detail == "slurm 23.11.4; in job 17"
    assert nvcc().detail.endswith("Build cuda_13.0.r13.0")


def test_doctor_looks_at_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json", "--path", str(tmp_path)]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"open files", "shared memory", "Slurm", "driver", "nvcc"} <= {one["what"] for one in findings}
    assert sum(one["what"] == f"path {tmp_path}" for one in findings) >= 2
    assert {one["state"] for one in findings} <= {"ok", "optional", "warning"}
    assert cli.main(["doctor", "--path", str(tmp_path / "none")]) == 2
