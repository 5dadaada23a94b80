"""The Triton implementation: its tests in the interpreter, in a process of their own, and those that need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, gradients, inputs, leaves_of, random_inputs
from helpers import outside

from fdscale.bench.attention import official
from fdscale.kernels import attention
from fdscale.kernels.attention import window_attention

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=attention.FASTEST)
def kernels(request: pytest.FixtureRequest) -> str:
    """Each of the implementations for GPUs, where it can run."""
    if why := attention.cannot_run(request.param, torch.device("cuda")):
        pytest.skip(why)
    return request.param


def cannot_interpret() -> bool:
    """Triton 3.6 has no bound of a loop that is known at run time only, with a NumPy that makes no number of [3]."""
    version = tuple(map(int, metadata.version("triton").split("+")[0].split(".")[:2]))
    return version < (3, 8) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(cannot_interpret(), reason="needs Triton 3.8, or NumPy before 2.4")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_the_kernels_in_the_interpreter() -> None:
    files = [str(Path(__file__).with_name(name)) for name in ("test_interpreted.py", "test_rows_interpreted.py")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=outside() | {"TRITON_INTERPRET": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("window", "down", "across", "heads", "dim"),
    [
        *((6, 1, 1, 8, 32), (7, 4, 2, 3, 32), (8, 4, 4, 4, 44), (12, 2, 2, 4, 32), (14, 1, 1, 4, 64)),
        *((16, 2, 2, 2, 16), (20, 1, 1, 4, 32), (24, 2, 2, 2, 32), (32, 1, 1, 2, 32), (40, 1, 1, 2, 32)),
    ],
)
def test_on_a_gpu_it_is_as_exact_as_eager_autocast_and_repeats_to_the_bit(
    window, down, across, heads, dim, dtype, kernels
):
    qkv, table, scale = random_inputs(2, (down * window, across * window), heads, dim, window)
    data = [x.cuda() for x in (qkv.to(dtype), table.float(), scale.float())]
    shift = window // 2 if min(down, across) > 1 else 0
    exact, eager = leaves_of(*(x.double() for x in data)), leaves_of(*data)
    out = official(*exact, window, shift)
    expected = [out, *gradients(out, exact, dtype)]
    narrow = dtype != torch.float32
    with torch.autocast("cuda", dtype=dtype if narrow else torch.bfloat16, enabled=narrow):
        out = official(*eager, window, shift)
        theirs = [out, *gradients(out, eager, dtype)]
    results = []
    for _ in range(3):
        leaves = leaves_of(*data)
        out = window_attention(*leaves, (window, window), (shift, shift), by=kernels)
        results.append([out, *gradients(out, leaves, dtype)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
    for name, e, t, m in zip(("out", "qkv", "table", "scale"), expected, theirs, results[0], strict=True):
        ours, eagers = ((x.double() - e).norm().item() for x in (m, t))
        factor = 1.5 if narrow else 4
        # The scale's gradient is one sum of numbers of both signs, in which roundings to 16 bits may happen to cancel.
        least = 0.05 if (name, kernels) == ("scale", "cuda") and narrow else 2 * torch.finfo(m.dtype).eps
        assert ours <= max(factor * eagers, least * e.norm().item()), name


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("mask", ["-100", "-inf"])
@pytest.mark.parametrize(("size", "window", "shift"), CASES)
def test_on_a_gpu_it_equals_the_reference_on_padded_and_narrow_maps(size, window, shift, mask, kernels):
    exact = leaves_of(*(x.cuda() for x in inputs(size, window)))
    out = window_attention(*exact, window, shift, mask=mask)
    expected = [out, *gradients(out, exact, torch.float32)]
    ours = leaves_of(*(x.float() for x in exact))
    out = window_attention(*ours, window, shift, by=kernels, mask=mask)
    for a, e in zip([out, *gradients(out, ours, torch.float32)], expected, strict=True):
        assert (a - e).abs().max() <= 1e-4 * e.abs().max()
