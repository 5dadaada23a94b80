"""The Triton kernels compiled for GPUs that are not here, and what became of them: registers, spills, instructions.

Triton brings all that this needs: a compiler to PTX, NVIDIA's assembler and cuobjdump.
"""

from __future__ import annotations

import os
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

from fdscale.kernels import fused, triton_kernels  # noqa: E402

KERNELS = ("forward", "backward_q", "backward_kv", "backward_table")
MAPS = ("GRAD", "QKV", "OUT", "DQKV")  # in the dtype of qkv
INTEGERS = ("TOKENS", "CELLS", "REGIONS")
# Every stage of SwinV2 has heads of 32 channels; 44 are padded to 64.
SHAPES = [(12, 32, torch.bfloat16), (40, 32, torch.bfloat16), (7, 44, torch.bfloat16), (16, 16, torch.float16)]


def compiled(kernel: Any, window: int, dim: int, dtype: torch.dtype, capability: int) -> bytes:
    """The cubin of a kernel as it is launched for a window and heads of `dim` channels."""
    constants = fused.specialisation(kernel, (window, window), dim, dtype, masked=True)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.isupper():
            signature[name] = element if name in MAPS else "*i32" if name in INTEGERS else "*fp32"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "masked" else "i32"
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
