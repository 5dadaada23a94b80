"""The Triton kernels compiled for GPUs that are not here, and what became of them: registers, spills, instructions.

Triton brings all that this needs: a compiler to PTX, NVIDIA's assembler and cuobjdump.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's kernels cannot be compiled", allow_module_level=True)

triton = pytest.importorskip("triton")
from sass import Function, functions  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fdscale.kernels import fused, row_kernels, triton_kernels  # noqa: E402

KERNELS = ("forward", "backward_q", "backward_kv", "backward_table")
MAPS = ("GRAD", "QKV", "OUT", "DQKV")  # in the dtype of qkv
INTEGERS = ("TOKENS", "CELLS", "REGIONS")
FLOATS = ("masked", "eps", "beta")
SIZES = ("M", "C")  # of rows.py; C a multiple of 16
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
# Every stage of SwinV2 has heads of 32 channels; 44 are padded to 64.
SHAPES = [(12, 32, torch.bfloat16), (40, 32, torch.bfloat16), (7, 44, torch.bfloat16), (16, 16, torch.float16)]


def compiled(kernel: Any, window: int, dim: int, dtype: torch.dtype, capability: int) -> bytes:
    """The cubin of a kernel as it is launched for a window and heads of `dim` channels."""
    constants = fused.specialisation(kernel, (window, window), dim, dtype, masked=True)
    return cubin(kernel, constants, dict.fromkeys(MAPS, dtype) | dict.fromkeys(INTEGERS, torch.int32), capability)


def cubin(kernel: Any, constants: dict[str, Any], dtypes: dict[str, torch.dtype], capability: int) -> bytes:
    """The same from its compile-time arguments, and the dtypes of tensors that are not float32."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SIZES or not name.isupper():
            signature[name] = "fp32" if name in FLOATS else "i32"
        else:
            signature[name] = POINTERS[dtypes.get(name, torch.float32)]
        if signature[name].startswith("*") or name == "C":
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]


def dissect(binary: bytes, folder: Path) -> Function:
    """The one kernel of a cubin."""
    file = folder / "kernel.cubin"
    file.write_bytes(binary)
    (kernel,) = functions(file).values()
    assert len(kernel.code) > 100
    return kernel


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("window", "dim", "dtype"), SHAPES)
@pytest.mark.parametrize("name", KERNELS)
def test_it_uses_tensor_cores_and_spills_nothing(name, window, dim, dtype, capability, tmp_path):
    kernel = getattr(triton_kernels, f"{name}_kernel")
    it = dissect(compiled(kernel, window, dim, dtype, capability), tmp_path)
    code = it.count()
    assert it.stack == code["LDL"] == code["STL"] == 0
    # A multiprocessor has 65536 registers: three blocks of four warps of the forward run at once, two of the others.
    assert it.registers <= (168 if (name, dim) == ("forward", 32) else 255)
    assert code["HMMA"] + code["HGMMA"] > 0
    assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"} & set(code)  # sums would have no fixed order


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_float32_compiles_too(name, tmp_path):
    """With exact products, which tensor cores do not have."""
    it = dissect(compiled(getattr(triton_kernels, f"{name}_kernel"), 8, 32, torch.float32, 80), tmp_path)
    code = it.count()
    assert it.registers <= 255
    assert code["FFMA"] > 0
    assert code["HMMA"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Of rows.py: channels from SwinV2-T to G, and the most there may be

ROWS = ("residual_norm", "residual_norm_backward", "token_losses", "token_losses_backward")
ROW_MAPS = ("X", "BRANCH", "OUT", "DBRANCH", "WEIGHT", "BIAS", "PREDICTION", "DPREDICTION")


def accesses(it: Function) -> Counter[str]:
    """How often each kind of load and store of device memory stands in the code, such as LDG.E.128."""
    return Counter(found[0] for _, _, line in it.code if (found := re.search(r"(LDG|STG)\.E(\.\w+)*", line)))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels", [96, 352, 1024, 4096, row_kernels.WIDEST])
@pytest.mark.parametrize("name", ROWS)
def test_kernels_of_rows_spill_nothing_and_load_vectors(name, channels, capability, tmp_path):
    constants = row_kernels.tile_of(channels) | ({"KEPT": True} if "norm" in name else {})
    for dtype in (torch.bfloat16, torch.float32):
        maps = (*ROW_MAPS, "GRAD") if "norm" in name else ROW_MAPS  # that of a loss is float32
        kernel = getattr(row_kernels, f"{name}_kernel")
        it = dissect(cubin(kernel, constants, dict.fromkeys(maps, dtype), capability), tmp_path)
        code, moved = it.count(), accesses(it)
        assert it.stack == code["LDL"] == code["STL"] == 0
        assert it.registers * 32 * constants["num_warps"] <= 65536
        assert moved["LDG.E.128"] >= 2
        assert moved["LDG.E.U16"] <= 2  # weight and bias, where a thread has one channel
        assert moved["STG.E.U16"] == 0
        assert not {"ATOM", "ATOMG", "ATOMS", "RED", "REDG"} & set(code)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("reverse", [False, True])
def test_copies_of_windows_spill_nothing_and_load_vectors(reverse, capability, tmp_path):
    constants = row_kernels.copy_tile_of(96) | {"REVERSE": reverse}
    dtypes = dict.fromkeys(("X", "OUT"), torch.bfloat16)
    it = dissect(cubin(row_kernels.window_copy_kernel, constants, dtypes, capability), tmp_path)
    code, moved = it.count(), accesses(it)
    assert it.stack == code["LDL"] == code["STL"] == 0
    assert moved["LDG.E.128"] > 0
    assert moved["STG.E.128"] > 0
    assert moved["LDG.E.U16"] == 0
