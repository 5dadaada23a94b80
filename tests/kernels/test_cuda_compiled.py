"""The CUDA kernels compiled for GPUs that are not here, and what the assembler made of them.

Slots: instructions that a warp issues for 32 scores. A multiprocessor issues four at a time and takes 8 slots for the
exponentials alone, so a forward below that is bound by them and not by what surrounds them; on an A100 the products of
the two backward kernels take 12 and 16.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from sass import Function, functions

from fdscale.kernels import build

pytestmark = pytest.mark.slow
SLOTS = {"forward": (5.7, 10.2), "backward_q": (14.5, 19.5), "backward_kv": (8.9, 13.5)}  # without a mask, with one


@pytest.fixture(scope="module", params=[80, 90])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Function]:
    """By mangled name, for one architecture."""
    try:
        nvcc = build.find_nvcc()
    except SystemExit as reason:
        pytest.skip(str(reason))
    folder, found = tmp_path_factory.mktemp("cubin"), {}
    for name in ("forward", "backward"):
        cubin = folder / f"{name}.cubin"
        options = ["-std=c++17", "-O3", f"-arch=sm_{request.param}", "-cubin", f"-I{build.SOURCES}"]
        subprocess.run([nvcc, *options, str(build.SOURCES / f"{name}.cu"), "-o", str(cubin)], check=True)
        found |= functions(Path(cubin))
    return found


def test_there_is_a_kernel_for_every_layout(kernels):
    for name in SLOTS:
        assert (
            sum(f"{name}_kernel" in kernel for kernel in kernels) == 10
        )  # 2 dtypes x (2 layouts x 2 masks + 1 layout)


def test_tensor_cores_no_atomics_and_few_registers(kernels):
    for name, it in kernels.items():
        count = it.count()
        # Sums would have no fixed order; on shared memory those of floats are loops of compare-and-swap besides.
        assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"} & set(count), name
        assert it.registers <= 255, name
        assert it.stack <= 48, name  # spilled outside of the loops, if at all: see below
        if "add_parts" not in name:
            assert count["HMMA"] > 0, name


def test_loops_over_scores_spill_nothing_and_issue_little(kernels):
    for name, it in kernels.items():
        kernel = next((kind for kind in SLOTS if f"{kind}_kernel" in name), None)
        if kernel is None:
            continue
        loop = it.hot_loop()
        assert loop["LDL"] == loop["STL"] == 0, name
        if (kernel, "7Float16" in name) != ("forward", True):  # its loop holds the rarely taken way to a new maximum
            assert loop.total() / loop["EX2"] <= SLOTS[kernel]["Lb1E" in name], (name, loop)
