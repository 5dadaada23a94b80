"""Build the CUDA kernels of kernels/cuda: `python -m fdscale.kernels.build`. Needs nvcc of CUDA 12.4 or later, no more.

The library knows nothing of torch, so one serves every torch; it holds code for compute capabilities 8.0 (A100) and 9.0
(H100, H200), and what a driver translates for later ones. setup.py runs this file where FDSCALE_BUILD_CUDA is 1; it
imports nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "cuda"
LIBRARY = HERE / "libfdscale_cuda.so"
CAPABILITIES = (80, 90)


def find_nvcc() -> str:
    """The compiler: $NVCC, that of $CUDA_HOME, or the one on the path. Raises SystemExit where there is none."""
    home = os.environ.get("CUDA_HOME")
    for nvcc in (os.environ.get("NVCC"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        if nvcc and (found := shutil.which(nvcc)):
            return found
    raise SystemExit(
        "nvcc is not here, which builds the CUDA kernels: install NVIDIA's CUDA toolkit (12.4 or later), or load its "
        "module, or set CUDA_HOME or NVCC; without them fdscale uses its Triton kernels"
    )


def build(out: Path, capabilities: Sequence[int] = CAPABILITIES) -> None:
    """Write the library. Raises SystemExit with what nvcc said where that fails."""
    nvcc = find_nvcc()
    codes = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in capabilities]
    newest = max(capabilities)
    codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    part = out.with_name(f".{out.name}-{os.getpid()}")
    options = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC", "-cudart=static", "--threads=0", f"-I{SOURCES}"]
    sources = [str(SOURCES / name) for name in ("forward.cu", "backward.cu")]
    try:
        done = subprocess.run([nvcc, *options, *codes, *sources, "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{nvcc} could not build the CUDA kernels:\n{done.stdout}{done.stderr}")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fdscale.kernels.build", description="Build the CUDA kernels.")
    parser.add_argument("--out", type=Path, default=LIBRARY, help="the library (default: where fdscale looks for it)")
    parser.add_argument(
        "--capabilities", type=int, nargs="+", default=CAPABILITIES, help="of GPUs, such as 80 for 8.0 (default: 80 90)"
    )
    given = parser.parse_args()
    if min(given.capabilities) < 80:
        raise SystemExit("the kernels need compute capability 8.0 or later: --capabilities 80 and up")
    build(given.out, given.capabilities)
    print(f"{given.out}: CUDA kernels for compute capability {', '.join(str(c / 10) for c in given.capabilities)}")


if __name__ == "__main__":
    main()
