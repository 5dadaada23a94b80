"""The CUDA kernels compiled for a CPU: their own source, with tests/kernels/emulated in place of a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdscale.kernels import build, compiled

HERE = Path(__file__).resolve().parent


def compile_for_cpu(out: Path, *sources: Path) -> None:
    """One library."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (Debian: apt-get install g++)")
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-x", "c++"]
    command = [compiler, *options, f"-I{HERE / 'emulated'}", f"-I{build.SOURCES}", *map(str, sources), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("emulated") / "kernels.so"
    compile_for_cpu(out, build.SOURCES / "forward.cu", build.SOURCES / "backward.cu")
    return out


@pytest.fixture
def emulated(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """While a test runs, `cuda` computes window attention on the CPU; the library, for emulator_seed."""
    monkeypatch.setattr(compiled, "LIBRARY", emulated_library)
    compiled.library.cache_clear()
    yield compiled.library()
    compiled.library.cache_clear()


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The emulation's own test kernels."""
    out = tmp_path_factory.mktemp("emulated") / "probe.so"
    compile_for_cpu(out, HERE / "emulated" / "probe.cu")
    library = ctypes.CDLL(str(out))
    library.text.restype = ctypes.c_char_p
    return library
